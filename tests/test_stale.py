"""What an edit of the real library or notebooks makes stale, in a copy of them; no cell is run."""

import ast
import json
import re

import pytest
from fake_kit import Kit

from rorem_lib.runner.recipes import read_recipe

RECIPES = ("demo", "paper")


@pytest.fixture(scope="module")
def first_runs(tmp_path_factory):
    """A copy of the repository in which every stage of both recipes is finished."""
    kit = Kit(tmp_path_factory.mktemp("real"), real=True)
    for name in RECIPES:
        kit.call("run", name)
    return kit


@pytest.fixture
def kit(first_runs, tmp_path):
    return Kit(tmp_path, like=first_runs)


def list_stale(kit, recipe: str) -> set[str]:
    return {name for name, state in kit.states(recipe).items() if state != "done"}


def run(kit, recipe: str) -> set[str]:
    """The stages that a run started."""
    return set(re.findall(r"\] (\S+) +starts ", kit.call("run", recipe)))


def list_stages(recipe: str, notebook: str) -> set[str]:
    stages = read_recipe(recipe).stages
    return {row.name for row in stages if row.notebook.stem.startswith(notebook)}


def list_dependents(recipe: str, first: set[str]) -> set[str]:
    """These stages and all that read of them, in turn."""
    found = set(first)
    for row in read_recipe(recipe).stages:
        found |= {row.name} if found & set(row.upstream) else set()
    return found


class Renamer(ast.NodeTransformer):
    """Gives every variable another name and every error another message."""

    def __init__(self, names):
        self.names = names

    def visit_Name(self, node):
        return ast.Name(node.id + "_" * (node.id in self.names), node.ctx)

    def visit_arg(self, node):
        return ast.arg(node.arg + "_" * (node.arg in self.names))

    def visit_Raise(self, node):
        node.exc.args = [ast.Constant("something else")]
        return node


def list_bound(tree) -> set[str]:
    return {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def rewrite_notebook(path) -> None:
    """Say everything in it in other words."""
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    trees = [ast.parse("".join(cell["source"])) for cell in code]
    tagged = [cell["metadata"].get("tags", []) for cell in code]
    parameters = list_bound(trees[[("parameters" in tags) for tags in tagged].index(True)])
    renamer = Renamer(set().union(*map(list_bound, trees)) - parameters)
    for cell, tags, tree in zip(code, tagged, trees):
        if "parameters" in tags:
            cell["source"] = ["# these are the parameters\n", *cell["source"]]
        elif "view" in tags:
            cell["source"] = ["1 / 0  # another plot\n"]
        else:
            lines = ast.unparse(renamer.visit(tree)).splitlines(keepends=True)
            cell["source"] = ["# a comment\n", *lines, "\nprint('another message')\n"]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = ["## Another text\n"]
    path.write_text(json.dumps(notebook))


@pytest.mark.slow
def test_words_make_nothing_stale(kit):
    """Comments, docstrings and messages in every module; prose, comments, names in notebooks."""
    modules = sorted(kit.library.rglob("*.py"))
    assert len(modules) > 40
    for path in modules:
        text = re.sub(r'^"""', '"""In other words. ', path.read_text(), count=1)
        text = re.sub(r'(Error\(\s*f?")', r"\1oh: ", text)
        text = re.sub(r'(logger\.\w+\(\s*")', r"\1well, ", text)
        path.write_text("# A comment.\n" + text + "\n\ndef unused():\n    return 1\n")
        ast.parse(path.read_text())
    for path in (kit.root / "notebooks").glob("*.ipynb"):
        rewrite_notebook(path)
    for name in RECIPES:
        assert list_stale(kit, name) == set()
        assert run(kit, name) == set()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_job_that_changed_makes_its_stages_stale_and_what_reads_other_results(kit, recipe):
    trainings = list_stages(recipe, "02")
    kit.edit("rorem_lib/remover.py", "error.mean()", "2 * error.mean()")
    assert list_stale(kit, recipe) == set()  # nobody has said yet that results change
    kit.edit("rorem_lib/remover.py", "VERSION = 1", "VERSION = 2")
    assert list_stale(kit, recipe) == trainings
    assert run(kit, recipe) == trainings  # the results are what they were
    assert list_stale(kit, recipe) == set()

    kit.edit("rorem_lib/remover.py", "VERSION = 2", "VERSION = 3")
    kit.edit("salt.json", "{}", '{"02_train_remover": "other weights"}')
    assert list_stale(kit, recipe) == trainings
    assert run(kit, recipe) == list_dependents(recipe, trainings)
    assert list_stale(kit, recipe) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "notebook", "there"),
    [
        ("distill", "07", RECIPES),
        ("removal", "03", RECIPES),
        ("evaluation/evaluate", "08", RECIPES),
        ("labels/votes", "04", RECIPES),
        ("builtin/judge", "04", ("demo",)),
        ("builtin/sets", "01", ("demo",)),
        ("data/assembly", "01", ("paper",)),
    ],
)
def test_each_job_has_a_version_of_its_own(kit, job, notebook, there):
    (line,) = re.findall(r"^VERSION = \d+", (kit.root / f"rorem_lib/{job}.py").read_text(), re.M)
    kit.edit(f"rorem_lib/{job}.py", line, f"{line}0")
    for name in RECIPES:
        stale = list_stages(name, notebook) if name in there else set()
        if job in ("builtin/judge", "evaluation/evaluate"):  # the audits of 06 are the miniature's
            stale |= list_stages(name, "08") | (
                list_stages(name, "06") if name == "demo" else set()
            )
        assert list_stale(kit, name) == stale, name


def test_the_discriminator_is_a_part_of_what_it_scores(kit):
    kit.edit("rorem_lib/discriminator.py", "VERSION = 1", "VERSION = 2")
    for name in RECIPES:
        rows = [r for r in read_recipe(name).stages if r.parameters.get("discriminator")]
        assert {row.notebook.stem[:2] for row in rows} == {"06", "08"}
        assert list_stale(kit, name) == list_stages(name, "05") | {row.name for row in rows}


def test_the_miniatures_sizes_are_none_of_the_full_size(kit):
    kit.edit("notebooks/01_assemble_dataset.ipynb", "labelled: int = 600", "labelled: int = 700")
    kit.edit("notebooks/02_train_remover.ipynb", "preview: int = 4", "preview: int = 5")
    assert list_stale(kit, "paper") == set()


def test_acceptance_is_a_part_of_calibration_and_of_choosing(kit):
    kit.edit("rorem_lib/acceptance.py", "VERSION = 1", "VERSION = 2")
    for name in RECIPES:
        assert list_stale(kit, name) == list_stages(name, "05") | list_stages(name, "06")


def test_every_version_is_of_a_job_that_a_notebook_names():
    """A number that nobody reads would be raised in vain."""
    from rorem_lib.files import ROOT
    from rorem_lib.parameters import read_cells

    text = "".join(c["source"] for p in (ROOT / "notebooks").glob("*.ipynb") for c in read_cells(p))
    own = {"training.latent_cache", "data.publishing"}  # of what they write, checked there
    for path in sorted((ROOT / "rorem_lib").rglob("*.py")):
        if re.search(r"^VERSION = ", path.read_text(), re.MULTILINE):
            name = ".".join(path.relative_to(ROOT / "rorem_lib").with_suffix("").parts)
            assert f'"{name}"' in text or name in own, name
