"""The start of a notebook: its parameters are checked, and its record names the right commit."""

import logging
import os
import shutil
import subprocess

import pytest
from fake_kit import Kit

from rorem_lib.files import ROOT
from rorem_lib.parameters import read_parameters
from rorem_lib.runner import stage
from rorem_lib.runner.stage import check_parameters, describe_environment, start_stage

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(autouse=True)
def logger():
    """A stage has a handler of its own, which takes the log from the tests that follow."""
    log = logging.getLogger("rorem_lib")
    before = list(log.handlers), log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before


def inject(notebook: str, **given) -> dict:
    """The globals of a notebook that papermill has given these values, its history among them."""
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    book = load_notebook_node(str(ROOT / "notebooks" / f"{notebook}.ipynb"))
    cells = parameterize_notebook(book, given).cells if given else book.cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    ran = code[: 2 if given else 1]
    values = {"In": ["", *(cell.source for cell in ran), "import torch\n%matplotlib inline"]}
    for cell in ran:
        exec(cell.source, values)
    return values


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_refuses_what_its_cell_does_not_have(path):
    parameters = read_parameters(path)
    plain = inject(path.stem)
    assert check_parameters(path.stem, plain) == {k: p.default for k, p in parameters.items()}
    name = list(parameters)[-1]
    values = inject(path.stem, **{f"{name}x": 2, "output_dir": 7})
    with pytest.raises(ValueError) as caught:
        check_parameters(path.stem, values)
    message = str(caught.value)
    assert f'"{name}x"' in message and f'"{name}"?' in message and "-r output_dir" in message
    plain["output_dir"] = ["a"]  # edited by hand, in JupyterLab
    with pytest.raises(ValueError, match="output_dir") as caught:
        check_parameters(path.stem, plain)
    assert "papermill" not in str(caught.value)


@pytest.mark.parametrize(
    ("notebook", "given", "words"),
    [
        ("03_generate_removals", {"num_inference_step": 2}, ["num_inference_steps"]),
        ("02_train_remover", {"meta_path": "DIR"}, ["meta_path", "-y 'meta_path: [\"DIR\"]'"]),
        ("04_annotate", {"annotator": 7}, ["annotator", "-r annotator TEXT"]),
        ("02_train_remover", {"revision": float("7e12345")}, ["revision", "-r revision TEXT"]),
        ("02_train_remover", {"random_flip": "true"}, ["random_flip", "True"]),
        ("02_train_remover", {"seed": 1.5, "sed": 1}, ["seed: expected int", '"sed"']),
    ],
)
def test_what_papermill_hands_on_is_checked(tmp_path, notebook, given, words):
    values = inject(notebook, output_dir=str(tmp_path / "out"), **given)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "DONE").touch()
    values["start_stage"] = start_stage
    with pytest.raises(ValueError) as caught:
        exec(f'start_stage(output_dir, notebook="{notebook}")', values)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert (tmp_path / "out" / "DONE").exists()  # nothing was touched


def test_values_are_fitted_to_their_types(tmp_path):
    given = {"learning_rate": "1e-4", "max_train_steps": 20.0, "snr_gamma": 5}
    values = inject("02_train_remover", output_dir=str(tmp_path), **given)
    values["start_stage"] = start_stage
    exec('stage = start_stage(output_dir, notebook="02_train_remover")', values)
    found = [values["learning_rate"], values["max_train_steps"], values["snr_gamma"]]
    assert found == [1e-4, 20, 5.0] and list(map(type, found)) == [float, int, float]
    assert values["stage"].parameters["learning_rate"] == 1e-4


def test_a_copy_of_a_notebook_may_have_more_parameters():
    values = inject("05_train_discriminator", seed=3)
    values["In"][1] += "\nmine: str = 'a'"
    values["In"][2] += "\nmine = 'b'"
    values |= {"mine": "b", "seed": 3}
    assert check_parameters("05_train_discriminator", values)["mine"] == "b"
    assert check_parameters("a_new_name", values)["seed"] == 3
    values["mine"] = 4
    with pytest.raises(ValueError, match="mine"):
        check_parameters("a_new_name", values)
    assert check_parameters("a_new_name", {"seed": 3}) == {}


@pytest.mark.slow
def test_papermill_itself_stops_at_a_wrong_parameter(tmp_path):
    kit = Kit(tmp_path)
    wrong = {
        'there is no parameter "siez" (did you mean "size"?)': ["-p", "siez", "3"],
        "-r flavour TEXT": ["-p", "flavour", "007"],
        "-y 'names: [\"abc\"]'": ["-r", "flavour", "007", "-p", "names", "abc"],
    }
    right = ["-r", "flavour", "007", "-y", "{names: [abc], rate: 1e-4}"]
    # One process for all: papermill takes a second to import.
    code = f"""
from pathlib import Path
from papermill.cli import papermill
def run(words):
    common = ["--log-level", "ERROR", "--no-progress-bar", "notebooks/01_make.ipynb", "out.ipynb"]
    papermill([*common, *words], standalone_mode=False)
for told, words in {wrong!r}.items():
    try:
        run(words)
    except Exception as error:
        assert told in str(error), error
    else:
        raise AssertionError(words)
    assert not Path("runs/alone").exists()
run({right!r})
"""
    process = kit.python(code)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    record = (kit.root / "runs" / "alone" / "01_make" / "stage.json").read_text()
    assert '"flavour": "007"' in record and '"rate": 0.0001' in record


def test_a_name_in_a_table_is_no_formula(tmp_path):
    import pandas as pd

    before = pd.get_option("display.html.use_mathjax")
    start_stage(tmp_path / "out", notebook="none")
    try:
        page = pd.DataFrame({"$x$": ["<b>$y$</b>"]})._repr_html_()
        assert "tex2jax_ignore" in page and "<b>" not in page
    finally:
        pd.set_option("display.html.use_mathjax", before)


# -------------------------------------------------------------------------------- provenance


def git(folder, *words):
    options = ["-c", "user.name=x", "-c", "user.email=x@y.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *options, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_commit_is_the_kits_own_or_none(tmp_path, monkeypatch):
    outer, kit = tmp_path / "outer", tmp_path / "outer" / "third_party" / "kit"
    kit.mkdir(parents=True)
    (kit / "a.txt").write_text("1")
    git(outer, "init", "-q")
    git(outer, "add", ".")
    git(outer, "commit", "-qm", "1")
    monkeypatch.setattr(stage, "ROOT", kit)
    found = describe_environment()
    assert (found["commit"], found["dirty"]) == (None, None)
    git(kit, "init", "-q")
    assert describe_environment()["commit"] is None  # there is none yet
    git(kit, "add", ".")
    git(kit, "commit", "-qm", "2")
    mine = git(kit, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(outer / ".git"))  # as in a hook of the outer one
    found = describe_environment()
    assert (found["commit"], found["dirty"]) == (mine, False)
    (kit / "a.txt").write_text("2")
    assert describe_environment()["dirty"] is True
    monkeypatch.setenv("PATH", str(tmp_path))
    assert os.environ["PATH"] and describe_environment()["commit"] is None
