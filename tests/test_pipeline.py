"""The runner: what it refuses, what it runs again, what a kill or a failure leaves behind."""

import errno
import fcntl
import json
import os
import signal
from dataclasses import dataclass, field

import pytest
from fake_kit import Kit, wait_until, write_notebook

from rorem_lib.files import clean_metrics
from rorem_lib.parameters import coerce_value, fill_config, read_defaults, read_parameters
from rorem_lib.runner import cli, fingerprints, recipes, run_folder
from rorem_lib.runner.fingerprints import (
    describe_change,
    hash_modules,
    list_used_modules,
    stamp_path,
)
from rorem_lib.runner.recipes import RecipeError, read_recipe
from rorem_lib.runner.stage import start_stage


@pytest.fixture
def kit(tmp_path):
    return Kit(tmp_path)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A kit whose recipe ran once, and what the run printed."""
    kit = Kit(tmp_path_factory.mktemp("kit"))
    return kit, kit.call("run", "small")


@pytest.fixture
def finished(first_run, tmp_path):
    """A copy of that kit, to change."""
    return Kit(tmp_path, like=first_run[0])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with two notebooks, and a function that reads a recipe from its stages' YAML."""
    write_notebook(
        tmp_path / "make.ipynb",
        [
            'output_dir: str = "x"\nsteps: int = 3\nrate: float = 1.0e-4\nflip: bool = False\n'
            'name: str = "a"\npaths: list[str] = []\nlimit: int | None = None\nseed: int = 1'
        ],
    )
    write_notebook(tmp_path / "plain.ipynb", ['output_dir: str = "x"\ndata: str = ""'])

    def read(stages: str, top: str = "", **options):
        (tmp_path / "r.yaml").write_text(
            f"{top}\nstages:\n" + "\n".join(f"  {line}" for line in stages.splitlines())
        )
        return read_recipe(tmp_path / "r.yaml", **options)

    return read


# ---- recipes


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ("a: {notebook: mkae}", 'stage "a": there is no notebook "mkae"'),
        (
            "a: {notebook: make, parameters: {stps: 3}}",
            'parameter "stps" is unknown to make.ipynb (did you mean "steps"?)',
        ),
        ("a: {notebook: make, parameters: {steps: many}}", 'expected int, got str "many"'),
        ("a: {notebook: make, parameters: {steps: 1.5}}", "expected int, got float 1.5"),
        ("a: {notebook: make, parameters: {steps: true}}", "expected int, got bool true"),
        ("a: {notebook: make, parameters: {steps: null}}", "expected int, got NoneType null"),
        ("a: {notebook: make, parameters: {flip: 'true'}}", 'expected bool, got str "true"'),
        ("a: {notebook: make, parameters: {flip: 1}}", "expected bool, got int 1"),
        ("a: {notebook: make, parameters: {name: 2024_01}}", "expected str, got int 202401"),
        ("a: {notebook: make, parameters: {paths: here}}", 'expected list[str], got str "here"'),
        ("a: {notebook: make, parameters: {paths: [1]}}", "expected list[str], got list [1]"),
        ("a: {notebook: make, parameters: {rate: fast}}", "expected float"),
        ("a: {notebook: make, parameters: {output_dir: y}}", "set by the runner"),
        ("a: {notebook: make, parametres: {}}", '"parametres" (did you mean "parameters"?)'),
        ('a: {notebook: plain, parameters: {data: "${b}"}}', 'unknown stage "b"'),
        (
            'a: {notebook: plain, parameters: {data: "${b}"}}\nb: {notebook: make}',
            'refers to "b", which runs no earlier',
        ),
        ('a: {notebook: plain, parameters: {data: "${a}"}}', "runs no earlier"),
        ('a: {notebook: plain, parameters: {data: "${a"}}', 'without its "}"'),
        ("a: {notebook: make}\na: {notebook: plain}", '"a" stands here twice'),
        ("a: 3", "a row is a table"),
        ("../a: {notebook: make}", "is no folder name"),
    ],
)
def test_recipe_is_refused(folder, stages, words):
    with pytest.raises(RecipeError) as caught:
        folder(stages)
    assert words in str(caught.value)


def test_every_problem_is_told_at_once(folder):
    with pytest.raises(RecipeError) as caught:
        folder(
            "a: {notebook: make, parameters: {steps: x, nmae: y}}\nb: {notebook: gone}",
            top="sed: 4",
            overrides={"c": {"steps": 1}},
        )
    assert len(caught.value.problems) == 5


def test_values_are_coerced_by_annotation(folder):
    recipe = folder("a: {notebook: make, parameters: {steps: 1e3, rate: 1e-4, limit: null}}")
    given = recipe.stages[0].given
    assert given == {"steps": 1000, "rate": 1e-4, "limit": None}
    assert type(given["steps"]) is int and type(given["rate"]) is float
    assert type(coerce_value(3, "float")) is float
    assert type(coerce_value(3, "int | float")) is int
    assert coerce_value([1, "2.5"], "list[float]") == [1.0, 2.5]
    assert coerce_value("1e-4", "str | float") == "1e-4"
    assert coerce_value({"a": 1}, "dict[str, int]") == {"a": 1}
    assert coerce_value("x", "Literal['x', 'y']") == "x"
    with pytest.raises(TypeError):
        coerce_value("z", "Optional[Literal['x', 'y']]")


@pytest.mark.parametrize(
    "value, kind, expected",
    [
        ("2.0e+3", "int", 2000),
        (3.0, "int | None", 3),
        (None, "int | None", None),
        ([[1, "2"]], "list[list[int]]", [[1, 2]]),
        ({"a": "1e-3"}, "dict[str, float]", {"a": 1e-3}),
        ("7", "str", "7"),
        ({"x": [1, "2"]}, "dict", {"x": [1, "2"]}),
        ("3", "Any", "3"),
        ("3", "", "3"),
        ("4", int, 4),
        (["a"], list[str], ["a"]),
        ("3", "'int'", 3),
    ],
)
def test_a_value_is_fitted_to_its_type(value, kind, expected):
    found = coerce_value(value, kind)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "value, kind",
    [
        ("true", "bool"),
        (1, "bool"),
        (0, "bool | None"),
        (True, "int"),
        (False, "float"),
        (3.5, "int"),
        ("3.5", "int"),
        ("many", "int"),
        (7, "str"),
        (("a",), "list[str]"),
        ([1, True], "list[int]"),
        ({1: "a"}, "dict[str, str]"),
        (3, "list[str] | None"),
        (3, "ndarray"),
        (3, "open('/dev/null')"),
    ],
)
def test_what_has_another_type_is_refused(value, kind):
    with pytest.raises(TypeError):
        coerce_value(value, kind)


@dataclass
class Settings:
    rate: float = 1e-3
    limit: int | None = None
    names: list[str] = field(default_factory=list)


def test_a_config_is_filled_from_parameters_and_more_options():
    cell = {"rate": 0.5, "names": ["a"], "other": 1}
    assert fill_config(Settings, cell, {"limit": "7"}) == Settings(0.5, 7, ["a"])
    for more, words in (
        ({"lmit": 3}, "lmit.*limit"),
        ({"rate": 0.1}, "rate"),
        ({"limit": "many"}, "limit"),
    ):
        with pytest.raises(ValueError, match=words):
            fill_config(Settings, cell, more)


def test_a_full_size_recipe_starts_from_the_librarys_defaults(tmp_path):
    def read(top):
        path = tmp_path / "r.yaml"
        path.write_text(
            f"{top}\nseed: 5\ndefaults: {{02_train_remover: {{train_batch_size: 12}}}}\n"
            "stages: {a: {notebook: 02_train_remover, parameters: {meta_path: [x]}},"
            " b: {notebook: 08_evaluate}}"
        )
        return read_recipe(path).stages

    small, _ = read("")
    assert small.given == {"seed": 5, "train_batch_size": 12, "meta_path": ["x"]}
    large, other = read("full_size: true")
    names = ("resolution", "max_train_steps", "random_flip", "pretrained_model_name_or_path")
    cell = read_parameters(small.notebook)
    defaults = read_defaults("remover.RemoverConfig")
    assert {n: small.parameters[n] for n in names} == {n: cell[n].default for n in names}
    assert {n: large.given[n] for n in names} == {n: defaults[n] for n in names}
    assert all(defaults[n] != cell[n].default for n in names)
    assert large.given | small.given == large.given  # what is stated wins
    assert set(large.given) <= set(cell) - {"output_dir"}
    assert other.given == {"seed": 5}
    with pytest.raises(RecipeError, match="full_size"):
        read("full_size: 3")


def test_precedence_of_parameters(folder):
    stages = (
        "a: {notebook: make, parameters: {steps: 7}}\nb: {notebook: make}\n"
        "c: {notebook: plain}\nd: {notebook: make, parameters: {seed: 9}}"
    )
    recipe = folder(
        stages,
        top="seed: 5\ndefaults: {make: {steps: 6, rate: 0.5}}",
        seed=8,
        overrides=cli.parse_overrides(["b.rate=1e-3", "b.paths=[p, q]", "b.flip=yes"]),
    )
    a, b, c, d = recipe.stages
    assert a.given == {"seed": 8, "steps": 7, "rate": 0.5}
    assert b.given == {"seed": 8, "steps": 6, "rate": 1e-3, "paths": ["p", "q"], "flip": True}
    assert c.given == {} and d.given["seed"] == 9
    assert a.parameters["name"] == "a" and "output_dir" not in a.parameters


@pytest.mark.parametrize("text", ["steps=3", "a.steps", "a.=3", "a.x=[1"])
def test_override_is_refused(text):
    with pytest.raises(RecipeError):
        cli.parse_overrides([text])


def test_parameters_cell_with_code_is_refused(tmp_path):
    path = write_notebook(tmp_path / "n.ipynb", ["a: int = 3\nb: int = a * 2"])
    with pytest.raises(ValueError, match="parameters cell"):
        read_parameters(path)


def test_unknown_recipe_and_options_exit_with_2(capsys, tmp_path):
    assert cli.main(["run", "no_such_recipe"]) == 2
    assert "no such recipe" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["run"])
    assert caught.value.code == 2


# ---- fingerprints


def test_modules_are_followed_through_imports_and_jobs(tmp_path):
    package = tmp_path / "kit"
    (package / "sources").mkdir(parents=True)
    for name, source in {
        "__init__": "",
        "a": "from . import b",
        "b": "import json\n",
        "c": "x = 1",
        "job": "def f():\n    from kit.c import x",
        "sources/__init__": "from .one import y",
        "sources/one": "y = 1",
        "sources/two": "from ..b import z",
    }.items():
        (package / f"{name}.py").write_text(source)

    def follow(source):
        return set(hash_modules(list_used_modules(source, package=package), package=package))

    assert follow("%matplotlib inline\nfrom kit.a import q") == {"kit", "a", "b"}
    assert follow('launch_job("job", config)') == {"kit", "job", "c"}
    assert follow('launch.launch_job(module="job", config=1)') == {"kit", "job", "c"}
    assert follow("from kit import sources") == {"kit", "sources", "sources.one"}
    assert follow("from kit.sources import two") == {
        "kit",
        "sources",
        "sources.one",
        "sources.two",
        "b",
    }
    assert "sources.two" in follow('import_module(f"kit.sources.{name}")')
    assert follow("import torch, kitten") == set()
    before = hash_modules({"a"}, package=package)
    (package / "b.py").write_text("import json\nz = 2\n")
    after = hash_modules({"a"}, package=package)
    assert before["a"] == after["a"] and before["b"] != after["b"]
    assert describe_change({"modules": before}, {"modules": after}) == "module b"


def test_input_files_are_stamped(tmp_path):
    meta = tmp_path / "set" / "meta.json"
    meta.parent.mkdir()
    meta.write_text("[]")
    first = stamp_path(meta.parent)
    os.utime(meta, (1, 1))
    assert stamp_path(meta) == stamp_path(meta.parent) == first  # content, not time
    meta.write_text("[1]")
    assert stamp_path(meta.parent) != first
    weights = tmp_path / "model" / "weights.bin"
    weights.parent.mkdir()
    weights.write_text("abc")
    first = stamp_path(weights.parent)
    weights.write_text("abcd")
    assert stamp_path(weights.parent) != first
    assert stamp_path(tmp_path / "nothing") is None


def test_what_re_runs(finished):
    """One change at a time: what it touches is stale, and nothing else is."""
    kit = finished
    assert set(kit.states().values()) == {"done"}

    def stale():
        return {name for name, state in kit.states().items() if state != "done"}

    def changing(path, old, new):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        result = stale()
        path.write_text(text)
        return result

    recipe, notebooks = kit.root / "notebooks/recipes/small.yaml", kit.root / "notebooks"
    assert changing(recipe, "flavour: odd", "flavour: new") == {"other", "judge"}
    assert changing(recipe, "seed: 7", "seed: 8") == {"make", "other", "train", "judge"}
    assert changing(recipe, "row: base", "row: else") == set()
    assert changing(notebooks / "01_make.ipynb", "# Title", "# Another") == set()
    assert changing(notebooks / "03_judge.ipynb", "nothing to", "not a thing to") == {"judge"}
    assert changing(notebooks / "02_train.ipynb", "pause: float = 0.0", "pause: float = 0.01") == {
        "train",
        "judge",
    }
    assert changing(kit.library / "trainer.py", "is odd", "is even") == {"train", "judge"}
    assert changing(kit.library / "colours.py", "count", "count_sides") == {"judge"}
    assert changing(kit.library / "shapes.py", "3", "4") == {"make", "other", "train", "judge"}
    assert changing(kit.library / "evaluation" / "report.py", "old", "older") == set()
    assert changing(kit.library / "runner" / "launch.py", "40 lines", "41 lines") == set()

    # and the change is carried out on what is stale alone, upstream results kept
    times = {p.parent.name: p.stat().st_mtime_ns for p in kit.run_dir.glob("*/notebook.ipynb")}
    output = kit.call("run", "small", "--set", "judge.trouble=calm")
    assert output.count("done before, unchanged") == 3
    assert "parameter trouble: none -> calm" in output
    new = {p.parent.name: p.stat().st_mtime_ns for p in kit.run_dir.glob("*/notebook.ipynb")}
    assert {name for name in times if times[name] != new[name]} == {"judge"}
    assert (kit.run_dir / ".superseded" / "judge" / "DONE").exists()


# ---- runs


def test_a_run_its_records_and_its_report(first_run, finished):
    kit, output = finished, first_run[1]
    assert "train | step 4" in output and "make | making 5 plain" in output
    stage = json.loads((kit.run_dir / "make" / "stage.json").read_text())
    assert stage["parameters"] == {
        "size": 5,
        "flavour": "plain",
        "seed": 7,
        "rate": 1e-3,
        "big": False,
        "names": [],
        "limit": None,
        "output_dir": "runs/small/make",
    }
    assert stage["versions"]["papermill"] and stage["seconds"] > 0 and "commit" in stage
    assert (kit.run_dir / "make" / "DONE").read_text().strip() == stage["fingerprint"]
    assert json.loads((kit.run_dir / "judge" / "metrics.json").read_text()) == {
        "judged": 2,
        "sides": 3,
    }
    record = json.loads((kit.run_dir / "run.json").read_text())
    assert set(record["stages"]) == {"make", "other", "train", "judge"}
    assert record["wall_seconds"] >= sum(record["stages"].values())
    executed = json.loads((kit.run_dir / "make" / "notebook.ipynb").read_text())
    assert any("injected-parameters" in c["metadata"].get("tags", []) for c in executed["cells"])
    report = kit.run_dir / "report.html"
    assert report.read_text() == "small "

    kit.call("run", "small")
    assert report.read_text() == "small "  # nothing ran: not written again
    assert json.loads((kit.run_dir / "run.json").read_text()) == record
    report.unlink()
    kit.call("run", "small")
    assert report.read_text() == "small "
    output = kit.call("run", "small", "--from", "train")
    assert output.count("unchanged") == 3  # make, other, and the last line's
    assert "2 run, 2 unchanged" in output and report.read_text() == "small small "
    assert "train | pid" in output and "begins at step 0" in output


def test_only_one_stage(kit):
    assert "needs the stage" in kit.call("run", "small", "--only", "judge", code=2)
    output = kit.call("run", "small", "--only", "other")
    assert "1 run" in output and not (kit.run_dir / "report.html").exists()
    assert kit.states() == {"make": "to run", "other": "done", "train": "to run", "judge": "to run"}
    assert 'no stage "mak" (did you mean "make"?)' in kit.call(
        "run", "small", "--only", "mak", code=2
    )


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (
            "raise",
            [
                "03_judge.ipynb, cell In [4]",
                "ValueError: nothing to judge",
                'if trouble == "raise":',
            ],
        ),
        ("exit", ["without stage.finish()"]),
        ("kill", ["the kernel died"]),
    ],
)
def test_failure_in_a_notebook(kit, trouble, words):
    kit.write_recipe("stages:\n  judge: {notebook: 03_judge}\n")
    output = kit.call("run", "small", "--set", f"judge.trouble={trouble}", code=1)
    for word in [
        *words,
        'Stage "judge" failed',
        f"Go on with: rorem run small --set judge.trouble={trouble}",
    ]:
        assert word in output
    assert not (kit.run_dir / "judge" / "DONE").exists()
    assert (kit.run_dir / "judge" / "notebook.ipynb").exists()
    assert "failed" in kit.call("status", "small", "--set", f"judge.trouble={trouble}")


def test_failure_in_a_job_shows_its_log(kit):
    kit.write_recipe("stages:\n  train: {notebook: 02_train, parameters: {trouble: raise}}\n")
    output = kit.call("run", "small", code=1)
    assert "JobError" in output and "train/train.log:" in output
    assert "ValueError: the loss is odd" in output and "failed with exit code 1" in output
    assert kit.states() == {"train": "failed"}


def test_missing_labels_wait_and_survive_a_change(kit):
    kit.write_recipe(
        "stages:\n  judge: {notebook: 03_judge, parameters: {mode: interactive}}\n"
        "  after: {notebook: 03_judge, parameters: {sets: ['${judge}']}}\n"
    )
    output = kit.call("run", "small", code=3)
    assert "waits for labels" in output and "0 of 5 labels are there" in output
    assert "runs/small/judge/notebook.ipynb" in output and "go on with: rorem run small" in output
    assert kit.states()["judge"] == "waiting"
    labels = kit.run_dir / "judge" / "labels-anna.jsonl"
    labels.write_text('{"id": "1", "label": "accept", "simulated": false}\n')
    assert "judge                        finished" in kit.call("run", "small", "--only", "judge")
    assert kit.states() == {"judge": "done", "after": "to run"}
    labels.write_text(labels.read_text() * 2)  # somebody labels on
    assert kit.states()["judge"] == "changed"
    (kit.library / "colours.py").write_text("def count():\n    return 4\n")
    kit.call("run", "small", "--only", "judge")
    assert labels.read_text().count("\n") == 2
    kept = list((kit.run_dir / ".superseded").glob("judge-*/labels-anna.jsonl"))
    assert len(kept) == 1


@pytest.mark.parametrize("asked", ["mode: import", "user_study: success"])
def test_what_people_said_is_carried_wherever_they_are_asked(kit, asked):
    notebook = kit.root / "notebooks" / "03_judge.ipynb"
    notebook.write_text(
        notebook.read_text().replace(
            'mode: str = \\"simulate\\"', 'mode: str = \\"simulate\\"\\nuser_study: str = \\"\\"'
        )
    )
    kit.write_recipe(f"stages:\n  judge: {{notebook: 03_judge, parameters: {{{asked}}}}}\n")
    kit.call("run", "small")
    answers = kit.run_dir / "judge" / "study" / "labels-anna.jsonl"
    answers.parent.mkdir()
    answers.write_text('{"id": "1", "label": "accept", "simulated": false}\n')
    (answers.parent / "trials.json").write_text("{}")
    assert kit.states()["judge"] == ("changed" if "user_study" in asked else "done")
    (kit.library / "colours.py").write_text("def count():\n    return 4\n")
    kit.call("run", "small")
    assert answers.read_text() and (answers.parent / "trials.json").exists()
    assert kit.states() == {"judge": "done"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_runner_leaves_nothing_and_loses_nothing(kit, number):
    kit.write_recipe(
        "stages:\n  train: {notebook: 02_train, parameters: {max_train_steps: 40, pause: 0.05}}\n"
    )
    runner, checkpoint = kit.start("run", "small"), kit.run_dir / "train" / "checkpoint.txt"
    wait_until(checkpoint.exists)
    assert len(kit.find_processes()) >= 3  # runner, kernel, job
    runner.send_signal(number)
    output, _ = runner.communicate(timeout=30)
    wait_until(lambda: not kit.find_processes(), seconds=15)
    assert kit.states() == {"train": "half-way"}
    step = int(checkpoint.read_text())
    assert step < 40
    if number == signal.SIGKILL:
        output = kit.call("run", "small")
        assert f"begins at step {step}" in output and "goes on where it was stopped" in output
    else:
        assert runner.returncode == 130 and "Go on with: rorem run small" in output


def test_second_runner_is_refused(kit):
    kit.run_dir.mkdir(parents=True)
    with open(kit.run_dir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("12345")
        lock.flush()
        assert "another runner (pid 12345)" in kit.call("run", "small", code=2)
        assert "a runner (pid 12345) is at work" in kit.call("status", "small")
    assert "is at work" not in kit.call("status", "small")


def test_folder_that_cannot_be_written(kit, tmp_path):
    (tmp_path / "file").write_text("")
    output = kit.call("run", "small", "--runs-dir", str(tmp_path / "file" / "runs"), code=1)
    assert "can't be written" in output and "Traceback" not in output
    output = kit.call("run", "small", "--runs-dir", str(tmp_path / "{x}"), code=2)
    assert "braces" in output


def test_full_disk_is_told(folder, tmp_path, monkeypatch, capsys):
    folder("a: {notebook: make}")

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "cannot write x: No space left on device")

    monkeypatch.setattr(run_folder, "write_json", fail)
    assert cli.main(["run", str(tmp_path / "r.yaml"), "--runs-dir", str(tmp_path / "runs")]) == 1
    told = capsys.readouterr().err
    assert "the disk is full" in told and "go on with" in told


def test_skipping_imports_nothing_heavy(kit):
    code = (
        "import sys, rorem_lib.runner.cli as cli\nassert cli.main(['status', 'small']) == 0\n"
        "print([m for m in ('torch', 'numpy', 'papermill', 'nbformat') if m in sys.modules])"
    )
    output, _ = kit.python(code).communicate(timeout=60)
    assert output.splitlines()[-1] == "[]"


# ---- a notebook alone


def test_stage_alone_writes_its_own_records(tmp_path, monkeypatch):
    monkeypatch.delenv("ROREM_BATCH", raising=False)
    import numpy as np
    from matplotlib.figure import Figure

    (tmp_path / "DONE").write_text("old")
    stage = start_stage(tmp_path, notebook="none")
    assert not (tmp_path / "DONE").exists() and not stage.batch
    stage.save_figure(Figure(), "empty")
    stage.finish({"a": np.float32(0.5), "b": [np.int64(2)], "c": float("nan")})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 0.5, "b": [2], "c": None}
    assert (tmp_path / "figures" / "empty.png").stat().st_size > 0
    assert (tmp_path / "DONE").read_text().startswith("alone ")
    assert json.loads((tmp_path / "stage.json").read_text())["stage"] == "alone"
    assert clean_metrics({1: (tmp_path,)}) == {"1": [str(tmp_path)]}


def test_recipes_in_the_repository_are_valid():
    """Every recipe that is there; the notebooks they name are checked with them."""
    for path in sorted((recipes.ROOT / "notebooks" / "recipes").glob("*.yaml")):
        recipe = read_recipe(path)
        assert recipe.stages and fingerprints.compute_fingerprints(recipe, run_dir=path.parent)


def test_built_in_sets_count_only_where_they_are_used(folder, tmp_path, monkeypatch):
    """In the real library: reading a set on disk doesn't depend on the code that renders scenes."""
    write_notebook(
        tmp_path / "plain.ipynb",
        [
            'output_dir: str = "x"\ndata: str = ""',
            "from rorem_lib.data.triplets import read_triplets",
        ],
    )

    def find_modules(data):
        recipe = folder(f"a: {{notebook: plain, parameters: {{data: '{data}'}}}}")
        inputs = fingerprints.compute_fingerprints(recipe, run_dir=tmp_path)["a"].inputs
        return set(inputs["modules"]), "builtin" in inputs

    modules, weights = find_modules("some/set")
    assert "data.triplets" in modules and "builtin.scenes" not in modules and not weights
    modules, weights = find_modules("builtin:candidates")
    assert {"builtin.scenes", "removal", "models.sdxl"} <= modules and weights
