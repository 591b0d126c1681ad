"""The runner: what it refuses, what it runs again, what it asks before, what a kill leaves."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
from dataclasses import dataclass, field

import pytest
from fake_kit import Kit, wait_until, write_notebook

from rorem_lib.files import clean_metrics
from rorem_lib.parameters import coerce_value, fill_config, read_defaults, read_parameters
from rorem_lib.runner import cli, fingerprints, recipes, run_folder
from rorem_lib.runner import stage as stage_module
from rorem_lib.runner.fingerprints import (
    hash_content,
    measure_content,
    read_inputs,
    read_version,
    stamp_path,
)
from rorem_lib.runner.notebook_code import describe_code
from rorem_lib.runner.recipes import RecipeError, read_recipe
from rorem_lib.runner.stage import start_stage

DAY = 86400.0


@pytest.fixture
def kit(tmp_path):
    return Kit(tmp_path)


@pytest.fixture
def real_kit(tmp_path):
    """One whose notebooks are executed in kernels."""
    return Kit(tmp_path, kernels=True)


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
        ("a: {notebook: [1]}", "a row is a table"),
        ("yes: {notebook: make}", "put it in quotation marks"),
        ("../a: {notebook: make}", "is no folder name"),
    ],
)
def test_recipe_is_refused(folder, stages, words):
    with pytest.raises(RecipeError) as caught:
        folder(stages)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "text", ["stages: {}", "stages: {a: {notebook: make}}\ndefaults: 3", "# \xe9", "[]"]
)
def test_a_recipe_of_another_form_is_refused(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(RecipeError):
        read_recipe(tmp_path / "r.yaml")


def test_a_wheel_has_no_recipes(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "ROOT", tmp_path)
    with pytest.raises(RecipeError, match="clone"):
        read_recipe("demo")


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

CODE = """
import numpy as np
from scipy import stats
from rorem_lib.data.masks import widen

paths = [p if p else str(p) for p in meta_path]
if not paths:
    raise ValueError("give a set")
for name, part in {"a": 1}.items():
    paths.append(widen(part, by=steps))
rows = stats.describe(np.array(paths))
paths = rows
job = lambda done, path=paths: launch(done, path)
stage.finish({"steps": steps, "rows": rows}, job)
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("import numpy as np", "# a comment\n\nimport numpy as np"),
        ("import numpy as np", "import numpy as np, json\nimport matplotlib.pyplot as plt"),
        ("import numpy as np", "%matplotlib inline\nimport numpy as np"),
        ("rorem_lib.data.masks", "rorem_lib.models.masks"),
        ("give a set", "give at least one set"),
        ("for name, part", 'print("now", len(paths))\nfor name, part'),
        ("paths.append(", 'if name:\n        print(f"{name}")\n    paths.append('),
        ("stage.finish(", 'stage.save_figure(plots.plot_losses(rows), "loss");\nstage.finish('),
        ("rows = ", "pd.DataFrame(paths).describe().round(2)\nrows = "),
        ("rows = ", '"a docstring"\nrows = '),
        ("[p if p else str(p) for p in", "[q if q else str(q) for q in"),
        ("name, part in", "_, part in"),
        ("np.array", "numpy.array"),
        ("done, path=paths: launch(done, path)", "d, q=paths: launch(d, q)"),
    ],
)
def test_notebook_code_is_the_same(old, new):
    changed = CODE.replace(old, new)
    if new == "numpy.array":
        changed = changed.replace("numpy as np", "numpy")
    assert changed != CODE
    names = ["steps", "meta_path"]
    assert describe_code([changed], parameters=names) == describe_code([CODE], parameters=names)


def test_notebook_code_is_the_same_with_other_names_in_cells_of_any_size():
    changed = CODE
    for old, new in (("rows", "table"), ("paths", "folders"), ("part", "x"), ("job", "y")):
        changed = changed.replace(f'"{old}"', "KEPT").replace(old, new).replace("KEPT", f'"{old}"')
    names = ["steps", "meta_path"]
    once = describe_code([CODE], parameters=names)
    assert describe_code([changed], parameters=names) == once
    halves = changed.partition("for name")
    assert describe_code([halves[0], "for name" + halves[2]], parameters=names) == once


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("by=steps", "by=steps + 1"),
        ("by=steps", "to=steps"),
        ("by=steps", "by=part"),
        ("str(p) for p in meta_path", "str(p) for p in other"),
        ("stats.describe", "stats.zscore"),
        ("from scipy import stats", "from numpy import stats"),
        ("import widen", "import narrow as widen"),
        ("ValueError", "TypeError"),
        ("not paths", "paths"),
        ("paths = rows", "paths = part"),
        ('"rows": rows', '"rows": paths'),
        ("paths = rows", "paths += rows"),
        ("path=paths: launch(done, path)", "path=rows: launch(done, path)"),
        ("launch(done, path)", "launch(path, done)"),
        ("paths.append(", "print(paths.append("),
    ],
)
def test_notebook_code_is_another(old, new):
    changed = CODE.replace(old, new)
    if new.startswith("print("):
        changed = changed.replace("by=steps))", "by=steps)))")
    names = ["steps", "meta_path"]
    assert describe_code([changed], parameters=names) != describe_code([CODE], parameters=names)


@pytest.mark.parametrize(
    "statement",
    [
        "table.sort_values('score', inplace=True)",
        "table.replace({0: 1}, inplace=True)",
        "path.replace(other)",
        "path.rename(other)",
        "thread.join()",
        "write_table(table)",
        "unread = launch(rows)",
        "rows += launch(rows)",
        "unread = 1\nfill(globals())",
        "text = '''\n%a\n'''\nwrite(text)",
    ],
)
def test_what_only_looks_like_a_look_counts(statement):
    assert describe_code([f"{CODE}\n{statement}\n"]) != describe_code([CODE])


@pytest.mark.parametrize(
    "statement",
    [
        "make_round_table(rows)",
        "table.rename('n').to_frame()",
        "logging.getLogger('x').info('…')",
        "warnings.warn('x')",
        "message = 'hello'\nlonger = message + '!'\nprint(longer)",
        "%time\n!ls",
    ],
)
def test_a_look_does_not_count(statement):
    assert describe_code([f"{CODE}\n{statement}\n"]) == describe_code([CODE])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("x = '''\n%a\n'''\nrun(x)", "x = '''\n%b\n'''\nrun(x)"),
        ("x = f'''{1}\n!a\n'''\nrun(x)", "x = f'''{1}\n!b\n'''\nrun(x)"),
        ("run(1\n% 2)", "run(1\n% 3)"),
        ("from rorem_lib.a import f\nf()", "from rorem_lib.b import f\nf()"),
    ],
)
def test_code_with_another_text_or_import_is_another(first, second):
    assert describe_code([first]) != describe_code([second])


@pytest.mark.parametrize("name", ["{}.masks import f", "{} import f"])
def test_a_module_may_move(name):
    first, second = (f"from rorem_lib.{name.format(p)}\nf()" for p in ("data", "models"))
    assert describe_code([first]) == describe_code([second])


def test_names_that_functions_read_later_are_one_variable():
    """Python looks them up when the function is called."""
    first = ["a = 1\nf = lambda: a\na = 2\nf()"]
    assert describe_code(first) != describe_code(["a = 1\nf = lambda: a\nb = 2\nf()"])


def test_versions_are_read_and_not_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "PACKAGE", tmp_path)
    (tmp_path / "jobs").mkdir()
    job = tmp_path / "jobs" / "train.py"
    for text, words in (
        (None, 'no module for the job "jobs.train"'),
        ("VERSION: int", "VERSION = 1"),
        ("VERSION = ", "no Python"),
        ("VERSION = 1 + 1", "no plain number"),
        ("VERSION = 'a'", "no plain number"),
        ("# \xe9", "no Python"),  # in another encoding than UTF-8
    ):
        if text:
            job.write_text(text, encoding="latin-1")
            os.utime(job, ns=(hash(text) % 10**18,) * 2)
        with pytest.raises(RecipeError, match=words):
            read_version("jobs.train")
    job.write_text("raise SystemExit\nVERSION = 12  # of what is made here\n")
    assert read_version("jobs.train") == 12


def read_one(row, run_dir, get_content=lambda stage, path: "abc"):
    return read_inputs(row, folder=run_dir / row.name, get_content=get_content)


def test_jobs_are_found_in_the_code(folder, tmp_path):
    cells = [
        'output_dir: str = "x"\nmode: str = "a"',
        'start_stage(job=["data.assembly", "removal"] if mode == "a" else "acceptance")',
        'rorem_lib.runner.launch.launch_job(module="remover", config=1)',
    ]
    write_notebook(tmp_path / "jobs.ipynb", cells)
    a, b = folder("a: {notebook: jobs}\nb: {notebook: jobs, parameters: {mode: b}}").stages
    assert set(read_one(a, tmp_path)["versions"]) == {"data.assembly", "removal", "remover"}
    assert set(read_one(b, tmp_path)["versions"]) == {"acceptance", "remover"}
    write_notebook(tmp_path / "jobs.ipynb", [cells[0], "name = 1\nlaunch_job(name, config)"])
    with pytest.raises(RecipeError, match="name of a job"):
        read_one(folder("a: {notebook: jobs}").stages[0], tmp_path)
    write_notebook(tmp_path / "jobs.ipynb", [cells[0], "x = 1", "y = ("])
    with pytest.raises(RecipeError, match="code cell 2 is no Python"):
        read_one(folder("a: {notebook: jobs}").stages[0], tmp_path)


def test_content_is_files_and_no_records(tmp_path):
    def write(name, text="x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    for name in ("meta.json", "source/a.png", "discriminator/config.json"):
        write(name)
    first, seen = hash_content(tmp_path, top=True), measure_content(tmp_path, top=True)
    assert seen["files"] == 3 and seen["bytes"] == 3
    for name in ("stage.json", "train.log", "figures/loss.png", "checkpoint-5/unet.bin", "DONE"):
        write(name)
    for name in (
        ".hidden",
        "source/.b.partial",
        "meta.jsonl.partial",
        "settings.json",
        "README.md",
    ):
        write(name)
    assert hash_content(tmp_path, top=True) == first
    assert measure_content(tmp_path, top=True) == seen
    for change in (
        lambda: write("source/b.png"),
        lambda: write("source/b.png", "y"),
        lambda: (tmp_path / "source/b.png").rename(tmp_path / "source/c.png"),
        lambda: write("discriminator/figures/x.png"),  # records lie at the top alone
        lambda: (tmp_path / "source/a.png").unlink(),
    ):
        before = hash_content(tmp_path, top=True)
        change()
        assert hash_content(tmp_path, top=True) != before
    seen = measure_content(tmp_path, top=True)
    write("older")
    os.utime(tmp_path / "older", (1, 1))
    (tmp_path / "older").replace(tmp_path / "source/c.png")  # as many bytes, and not the newest
    assert measure_content(tmp_path, top=True) != seen
    write("other.json")
    assert hash_content(tmp_path / "meta.json") == hash_content(tmp_path / "other.json")


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
    small, large = tmp_path / "small.csv", tmp_path / "large.csv"
    small.write_text("a")
    large.write_bytes(bytes(fingerprints.SMALL + 1))
    before = stamp_path(small), stamp_path(large)
    os.utime(small, (1, 1))
    os.utime(large, (1, 1))
    assert stamp_path(small) == before[0] and stamp_path(large) != before[1]
    (weights.parent / "loop").symlink_to(weights.parent)
    assert stamp_path(weights.parent).startswith("1 files")


def test_text_that_names_nothing_on_disk_is_no_input(folder, tmp_path, monkeypatch):
    """A prompt, somebody's home, an empty text are none; a folder's name alone is one."""
    monkeypatch.setattr("rorem_lib.files.ROOT", tmp_path)

    def read(text, **more):
        row = folder(f"a: {{notebook: plain, parameters: {{data: {json.dumps(text)}}}}}").stages[0]
        return read_inputs(row, folder=tmp_path / "a", get_content=None, **more)["files"]

    for text in ("a dog, gone. " * 40, "~nobody_here/x", "a\0/b", "", ".", "mydata"):
        assert read(text) == {}
    (tmp_path / "mydata").mkdir()
    (tmp_path / "mydata" / "DONE").write_text("by hand")
    seen = {}
    first = read("mydata", stamps=seen)
    assert read("mydata") == first and list(seen) == [tmp_path / "mydata"]
    (tmp_path / "mydata" / "x.png").write_text("")
    assert read("mydata") != first
    assert read("mydata", stamps=seen) == first  # looked at once in a run
    (tmp_path / "mydata" / "stage.json").write_text("{}")
    assert read("mydata") == {"mydata": "made by by hand"}


def test_what_changes_no_result_is_recorded_and_not_compared(folder, tmp_path):
    from rorem_lib.training.checkpoints import FREE_FIELDS

    assert FREE_FIELDS - {"max_train_steps", "num_train_epochs"} <= fingerprints.FREE
    cells = [
        'output_dir: str = "x"\nsteps: int = 3\nhardware: str = "cpu"\npreview_meta: str = ""\n'
        'more_options: dict = {}\nsize: int = 1\nkind: str = "a"',
        'start_stage(free=["size"] if kind == "a" else [])',
    ]
    write_notebook(tmp_path / "n.ipynb", cells)

    def read(given, name="n"):
        row = folder(f"a: {{notebook: {name}, parameters: {{{given}}}}}").stages[0]
        return read_one(row, tmp_path)

    compare = fingerprints.describe_change
    first, free = read(""), "hardware: many_gpus, more_options: {report_to: wandb}, size: 2"
    same = read(f"{free}, preview_meta: {tmp_path}")
    assert same != first and compare(first, same) == "" and same["files"] == {}
    assert same["parameters"]["hardware"] == "many_gpus"
    for other in ("steps: 4", "more_options: {rank: 3}", "kind: b"):
        assert compare(first, read(other))
    assert "size 1 -> 2" in compare(read("kind: b"), read("kind: b, size: 2"))

    cells[0] += "\nnew: int = 0"  # a parameter comes, or goes
    write_notebook(tmp_path / "m.ipynb", cells)
    new, chosen = read("", "m"), read("new: 2", "m")
    assert compare(first, new) == compare(new, first) == ""
    assert compare(first, chosen) == "parameter new null -> 2"
    assert compare(chosen, first) == "parameter new 2 -> null"
    assert compare(new, chosen) == "parameter new 0 -> 2"


def test_what_re_runs(finished):
    """One change at a time: what it touches is stale, and nothing else is."""
    kit = finished
    assert set(kit.states().values()) == {"done"}

    def changing(path, old, new):
        text = kit.edit(path, old, new)
        result = {name for name, state in kit.states().items() if state != "done"}
        (kit.root / path).write_text(text)
        return result

    recipe = "notebooks/recipes/small.yaml"
    assert changing(recipe, "flavour: odd", "flavour: new") == {"other"}
    assert changing(recipe, "seed: 7", "seed: 8") == {"make", "other"}
    assert changing("notebooks/03_judge.ipynb", "len(made)", "len(made) + 1") == {"judge"}
    assert changing("notebooks/02_train.ipynb", "pause: float = 0.0", "pause: float = 0.01") == {
        "train"
    }
    assert changing("rorem_lib/trainer.py", "VERSION = 1", "VERSION = 2") == {"train"}
    assert changing("rorem_lib/shapes.py", "VERSION = 1", "VERSION = 2") == {"make", "other"}
    # all that changes no result, at once
    kit.edit(recipe, "row: base", "row: else")
    kit.edit("notebooks/01_make.ipynb", "# Title", "# Another")
    kit.edit("notebooks/01_make.ipynb", '\\"making\\"', '\\"made\\"')
    kit.edit("notebooks/03_judge.ipynb", "nothing to", "not a thing to")
    for path in kit.library.rglob("*.py"):
        path.write_text("# a comment\n" + path.read_text())
    kit.edit("rorem_lib/trainer.py", "the loss is odd", "the loss is strange")
    assert set(kit.states().values()) == {"done"}

    # and the change is carried out on what is stale alone, upstream results kept
    times = {p.parent.name: p.stat().st_mtime_ns for p in kit.run_dir.glob("*/notebook.ipynb")}
    output = kit.call("run", "small", "--set", "judge.trouble=calm")
    assert output.count("done before, unchanged") == 3
    assert "parameter trouble none -> calm" in output
    new = {p.parent.name: p.stat().st_mtime_ns for p in kit.run_dir.glob("*/notebook.ipynb")}
    assert {name for name in times if times[name] != new[name]} == {"judge"}
    assert len(list((kit.run_dir / ".superseded").glob("judge-*/DONE"))) == 1


def list_ran(output: str) -> list[str]:
    """The stages that a run started."""
    return [line.split()[1] for line in output.splitlines() if " starts " in line]


def test_an_unchanged_result_ends_the_chain(finished):
    kit = finished
    kit.edit("rorem_lib/shapes.py", "VERSION = 1", "VERSION = 2")
    output = kit.call("run", "small")
    assert list_ran(output) == ["make", "other"] and "version of shapes 1 -> 2" in output
    kit.edit("rorem_lib/shapes.py", "VERSION = 2\nSIDES = 3", "VERSION = 3\nSIDES = 4")
    output = kit.call("run", "small")  # train reads made.txt, but its model does not change
    assert list_ran(output) == ["make", "other", "train", "judge"]
    assert "content of make/made.txt" in output and "content of train" not in output
    made = kit.run_dir / "other" / "made.txt"
    text = made.read_text()
    os.utime(made, (1, 1))
    assert kit.states()["judge"] == "done"  # hashed again, and the same
    made.write_text("by hand")
    assert kit.states() == {"make": "done", "other": "done", "train": "done", "judge": "changed"}
    made.write_text(text)
    assert kit.states()["judge"] == "done"


def test_results_are_hashed_once(finished, monkeypatch):
    hashed = []
    real = run_folder.hash_content
    monkeypatch.setattr(
        run_folder, "hash_content", lambda *a, **k: hashed.append(a) or real(*a, **k)
    )
    outputs = run_folder.Outputs(finished.run_dir)
    assert outputs.get("make", "made.txt") and outputs.get("train", "model") and not hashed
    assert outputs.get("train", "gone") == "nothing"
    os.utime(finished.run_dir / "make" / "made.txt", (5, 5))
    for keep, count in ((False, 1), (False, 2), (True, 3), (True, 3)):
        run_folder.Outputs(finished.run_dir, keep=keep).get("make", "made.txt")
        assert len(hashed) == count
    (finished.run_dir / "make" / "DONE").unlink()
    assert run_folder.Outputs(finished.run_dir).get("make", "made.txt") is None


def test_what_a_stage_fills_is_none_of_its_inputs(folder, tmp_path):
    write_notebook(tmp_path / "n.ipynb", ['latent_cache_dir: str = ""\nmeta_path: str = ""'])
    cache, data = tmp_path / "cache", tmp_path / "data"
    cache.mkdir()
    data.mkdir()
    row = folder(
        f"a: {{notebook: n, parameters: {{latent_cache_dir: {cache}, meta_path: {data}}}}}"
    ).stages[0]
    first = read_one(row, tmp_path)
    (cache / "shard").write_text("x")
    assert read_one(row, tmp_path) == first
    (data / "x").write_text("x")
    assert read_one(row, tmp_path) != first


# ---- what is asked


@pytest.fixture
def trained(finished):
    """A kit whose training took a day, and whose job's version was raised since."""
    finished.pretend("train", seconds=DAY)
    finished.edit("rorem_lib/trainer.py", "VERSION = 1", "VERSION = 2")
    return finished


def test_long_work_is_not_made_anew_without_a_word(trained):
    kit, before = trained, trained.hash_all()
    output = kit.call("run", "small", code=2)
    assert "train  took 1.0 days, finished 20" in output
    assert "version of trainer 1 -> 2" in output and "follows if its inputs change" in output
    commands = [line.strip() for line in output.splitlines() if line.startswith("  rorem ")]
    assert [c.partition("   ")[0] for c in commands] == [
        "rorem run small --yes",
        "rorem run small --keep",
        "rorem accept small train",
    ]
    assert list_ran(output) == [] and kit.hash_all() == before

    output = kit.call("run", "small", "--keep")
    assert "kept as it is (version of trainer 1 -> 2)" in output and list_ran(output) == []
    assert kit.states()["train"] == "changed"  # asked again the next time
    output = kit.call("run", "small", "--yes")
    assert "train  took 1.0 days" in output and list_ran(output) == ["train"]
    assert set(kit.states().values()) == {"done"} and kit.read("train")["seconds"] < DAY


def test_a_stage_is_accepted(trained):
    kit = trained
    assert "version of trainer 1 -> 2" in kit.call("accept", "small", "train", "make")
    assert set(kit.states().values()) == {"done"}
    record = kit.read("train")
    assert record["accepted"][0]["changes"] == "version of trainer 1 -> 2"
    assert record["inputs"]["versions"] == {"trainer": 2} and record["seconds"] == DAY
    assert list_ran(kit.call("run", "small")) == []
    assert "did you mean" in kit.call("accept", "small", "trian", code=2)
    shutil.rmtree(kit.run_dir / "other")
    assert "nothing of the stage" in kit.call("accept", "small", "other", code=2)


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "code"), [("yes", 0), ("no", 2), ("", 2), ("y", 2)])
def test_somebody_in_a_terminal_is_asked(trained, answer, code):
    before = trained.hash_all()
    output = trained.talk("run", "small", answer=answer, code=code)
    assert output.count("Type yes to go on") == 1
    assert list_ran(output) == (["train"] if code == 0 else [])
    if code:
        assert trained.hash_all() == before and "rorem run small --keep" in output


def test_one_yes_covers_what_was_named(trained):
    kit = trained
    kit.pretend("judge", seconds=2 * DAY)
    kit.edit("rorem_lib/trainer.py", '"{step} steps"', '"{step} other steps"')
    output = kit.call("run", "small", code=2)
    assert re.search("judge +took 2.0 days, .*; follows if what it reads changes", output)
    assert "rorem accept small train   (" in output  # not what is current
    output = kit.talk("run", "small", answer="yes")
    assert output.count("Type yes to go on") == 1 and list_ran(output) == ["train", "judge"]


def test_what_was_not_named_is_asked_for_anew(finished):
    """`make` is named; `other`, whose notebook is edited while `make` runs, is not."""
    kit = finished
    for name in ("make", "other"):
        kit.pretend(name, seconds=DAY)
    code = (
        "import json, sys\nfrom pathlib import Path\n"
        "from rorem_lib.runner.pipeline import Observer, run_recipe\n"
        "from rorem_lib.runner.recipes import read_recipe\n"
        "recipe = read_recipe('small', overrides={'make': {'size': 6}})\n"
        "class Editor(Observer):\n"
        "    def end(self, number, total, row, seconds, metrics):\n"
        "        if row.name == 'make':\n"
        "            path = Path('notebooks/01_make.ipynb')\n"
        "            path.write_text(path.read_text().replace('made.txt', 'new.txt'))\n"
        "def agree(states):\n"
        "    print('asked', [s.row.name for s in states])\n"
        "    return True\n"
        "run_recipe(recipe, runs_dir=Path('runs').absolute(), agree=agree, progress=Editor())\n"
    )
    output, _ = kit.python(code).communicate(timeout=60)
    asked = [line for line in output.splitlines() if line.startswith("asked")]
    assert asked == ["asked ['make']", "asked ['other']"], output


def test_what_becomes_stale_on_the_way_is_asked_for(finished):
    kit = finished
    kit.pretend("judge", seconds=2 * DAY)
    kit.edit("rorem_lib/shapes.py", "VERSION = 1\nSIDES = 3", "VERSION = 2\nSIDES = 4")
    output = kit.call("run", "small", code=2)
    assert list_ran(output) == ["make", "other", "train"]  # seconds each: nobody is asked
    assert "judge  took 2.0 days" in output and "content of make, content of other" in output
    assert kit.states()["judge"] == "changed" and (kit.run_dir / "judge" / "DONE").exists()
    assert list_ran(kit.call("run", "small", "--yes")) == ["judge"]


def test_from_a_stage_is_asked_for_too(finished):
    kit = finished
    kit.pretend("judge", seconds=2 * DAY)
    before = kit.hash_all()
    output = kit.call("run", "small", "--from", "train", code=2)
    assert "judge  took 2.0 days" in output and "rorem run small --from train --yes" in output
    assert "rorem accept" not in output and kit.hash_all() == before
    assert list_ran(kit.call("run", "small", "--from", "other", "--yes")) == ["other", "judge"]
    assert kit.call("run", "small", "--from", "train", "--keep", code=2)


def leave_half_done(kit, worked: float) -> None:
    """As a kill would leave the training."""
    for name in ("DONE", "metrics.json", "stage.json", "train_metrics.json"):
        (kit.run_dir / "train" / name).unlink()
    kit.pretend("train", "stage.started.json", worked=worked)
    (kit.run_dir / "train" / "checkpoint.txt").write_text("2")


@pytest.mark.slow
def test_half_done_work_is_kept(finished):
    kit = finished
    leave_half_done(kit, DAY)
    assert kit.states() == {"make": "done", "other": "done", "train": "half-way", "judge": "done"}
    kit.edit("rorem_lib/trainer.py", "VERSION = 1", "VERSION = 2")
    output = kit.call("run", "small", code=2)
    assert "half done, 1.0 days of work; version of trainer 1 -> 2" in output
    output = kit.call("run", "small", "--keep")
    assert list_ran(output) == ["train"] and "begins at step 2" in output
    assert kit.states()["train"] == "done" and kit.read("train")["seconds"] >= DAY

    leave_half_done(kit, DAY)
    kit.edit("rorem_lib/trainer.py", "VERSION = 2", "VERSION = 3")
    kit.call("accept", "small", "train")
    assert kit.states()["train"] == "half-way"
    assert "begins at step 2" in kit.call("run", "small")
    assert kit.read("train")["accepted"]

    leave_half_done(kit, 5)
    kit.edit("rorem_lib/trainer.py", "VERSION = 3", "VERSION = 4")
    assert "begins at step 0" in kit.call("run", "small")  # seconds are not worth a question
    assert list((kit.run_dir / ".superseded").glob("train-*/checkpoint.txt"))


def test_a_model_without_a_record_is_not_made_anew_without_a_word(finished):
    kit, folder = finished, finished.run_dir / "train"
    (folder / "stage.json").write_text('{"inputs": {"for')  # torn
    (folder / "stage.started.json").unlink()
    assert kit.states()["train"] == "unreadable"
    before = kit.hash_all()
    for words in ([], ["--keep"]):
        output = kit.call("run", "small", *words, code=2)
        assert "unknown time of work; no record" in output and kit.hash_all() == before
        assert "rorem accept small train" in output
    assert "no record" in kit.call("accept", "small", "train")
    assert kit.states()["train"] == "half-way"
    output = kit.call("run", "small")
    assert list_ran(output) == ["train"] and "finished before, its result is kept" in output
    assert set(kit.states().values()) == {"done"}

    for name in ("stage.json", "stage.started.json"):
        (folder / name).write_text(json.dumps({"inputs": 3, "seconds": "x", "started": 5}))
    (kit.run_dir / "run.json").write_text('{"runs": [3, {"seconds": "x"}], "stages": 4}')
    assert kit.states()["train"] == "unreadable"
    assert list_ran(kit.call("run", "small", "--yes")) == ["train"]
    assert list(kit.run_dir.glob(".superseded/train-*/model/weights.txt"))


def test_a_result_that_was_deleted_is_told(finished):
    """What read it and is finished stays; what has to read it again is not fed with nothing."""
    kit = finished
    shutil.rmtree(kit.run_dir / "train" / "model")
    assert set(kit.states().values()) == {"done"}
    kit.edit("rorem_lib/colours.py", "VERSION = 1", "VERSION = 2")
    output = kit.call("run", "small", code=2)
    assert "train/model" in output and "--from train" in output
    assert list_ran(kit.call("run", "small", "--from", "train")) == ["train", "judge"]


def test_links_are_moved_and_unlinked_and_never_followed(finished):
    kit, away = finished, finished.root / "away"
    (kit.run_dir / "train").rename(away)
    (kit.run_dir / "train").symlink_to("../../away")
    assert set(kit.states().values()) == {"done"}
    kit.call("run", "small", "--from", "train")
    assert (away / "model" / "weights.txt").exists()
    assert not (kit.run_dir / "train").is_symlink()
    (kit.run_dir / ".superseded" / "gone").symlink_to("nowhere")
    output = kit.call("clean", "small")
    assert re.search(r"train-\S+ +train, made .*0.0 MB: a link to /.*away", output)
    assert "0.0 MB: a link to nowhere" in output and "3 folders" in output
    link = next((kit.run_dir / ".superseded").glob("train-*"))
    with open(kit.run_dir / ".lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another runner" in kit.call("clean", "small", link.name, "--yes", code=2)
    assert f"deleted {link.name}" in kit.call("clean", "small", f"{link.name}/", "--yes")
    kit.call("clean", "small", "runs/small/.superseded/gone", "--yes")
    assert kit.call("clean", "small", "elsewhere/.superseded/judge", "--yes", code=2)
    kit.call("clean", "small", "--all", "--yes")
    assert (away / "model" / "weights.txt").exists()
    assert list((kit.run_dir / ".superseded").iterdir()) == []

    shutil.rmtree(kit.run_dir / "train")
    (kit.run_dir / "train").symlink_to("nowhere")
    assert "is a link to nowhere" in kit.call("run", "small", code=2)
    assert "is a link to nowhere" in kit.call("status", "small", code=2)


def test_runs_of_an_earlier_version_are_opened(finished):
    kit = finished
    for stage in ("make", "other", "train", "judge"):
        for name in ("stage.json", "stage.started.json"):
            inputs = {"parameters": {}, "notebook": "1", "modules": {"a": "2"}, "stages": {}}
            kit.pretend(stage, name, inputs=inputs, base="3", outputs={}, seconds=DAY)
    output = kit.call("status", "small")
    assert output.count("made by an earlier version") == 4
    assert "rorem accept small make other train judge" in output and "--keep" in output
    output = kit.call("run", "small", code=2)
    assert output.count("made by an earlier version") == 4
    assert list_ran(kit.call("run", "small", "--keep")) == []
    kit.call("accept", "small", "make", "other", "train", "judge")
    assert set(kit.states().values()) == {"done"}
    assert list_ran(kit.call("run", "small")) == []


@pytest.mark.slow
def test_a_run_deletes_nothing(finished):
    """Whatever it is told, what a stage made is still there, under a name that says when."""
    kit, made = finished, {}

    def run(*words):
        made.update((h, n) for h, n in kit.hash_all().items() if "/" in n)
        assert len(list_ran(kit.call("run", "small", "--yes", *words))) > 1
        lost = {name for digest, name in made.items() if digest not in kit.hash_all()}
        assert not lost, lost

    run("--seed", "8")
    run("--from", "make")
    kit.edit("rorem_lib/shapes.py", "VERSION = 1\nSIDES = 3", "VERSION = 2\nSIDES = 4")
    run("--seed", "9", "--set", "train.max_train_steps=6")
    run()
    shelf = sorted(path.name for path in (kit.run_dir / ".superseded").iterdir())
    assert sum(name.startswith("train-20") for name in shelf) >= 3
    assert len({name[:17] for name in shelf}) < len(shelf)  # of one minute, and none is lost


def test_a_folder_set_aside_can_be_brought_back(finished):
    kit = finished
    weights = kit.run_dir / "train" / "model" / "weights.txt"
    kit.edit("rorem_lib/trainer.py", '"{step} steps"', '"{step} other steps"')
    kit.edit("rorem_lib/trainer.py", "VERSION = 1", "VERSION = 2")
    kit.call("run", "small")
    assert weights.read_text() == "4 other steps"
    (kit.run_dir / "train").rename(kit.root / "away")
    next(kit.run_dir.glob(".superseded/train-*")).rename(kit.run_dir / "train")
    assert weights.read_text() == "4 steps" and kit.states()["train"] == "changed"
    assert "version of trainer 1 -> 2" in kit.call("accept", "small", "train")
    assert list_ran(kit.call("run", "small")) == ["judge"]  # it reads this model again


def test_folders_set_aside_are_listed_and_deleted(finished):
    kit = finished
    assert "0 folders" in kit.call("clean", "small")
    kit.call("run", "small", "--from", "train")
    shelf = kit.run_dir / ".superseded"
    first, second = sorted(path.name for path in shelf.iterdir())
    before = kit.hash_all()
    output = kit.call("clean", "small")
    assert f"{second}  train, made 20" in output and " UTC, " in output
    assert "0.0 MB: checkpoint.txt, model" in output and f"{first}  judge" in output
    assert "did you mean" in kit.call("clean", "small", first[:-1], code=2)
    assert f"rorem clean small {first} --yes" in kit.call("clean", "small", first, code=2)
    assert "Nothing was deleted" in kit.talk("clean", "small", first, answer="no", code=2)
    assert kit.hash_all() == before
    assert f"deleted {first}" in kit.talk("clean", "small", first, answer="yes")
    assert [path.name for path in shelf.iterdir()] == [second]
    (shelf / "judge").mkdir()  # as an earlier version named them
    assert "deleted judge" in kit.call("clean", "small", "--all", "--yes")
    assert list(shelf.iterdir()) == [] and set(kit.states().values()) == {"done"}


def test_what_people_said_is_not_deleted(finished):
    kit = finished
    line = '{"id": "1", "label": "accept", "simulated": false}\n'
    for stage, text in (("make", line), ("other", '{"simulated": true}\n')):
        (kit.run_dir / stage / "labels").mkdir()
        (kit.run_dir / stage / "labels" / "labels-anna.jsonl").write_text(text)
    kit.call("run", "small", "--seed", "8")
    live = kit.run_dir / "make" / "labels" / "labels-anna.jsonl"
    assert live.read_text() == line
    live.write_text(line * 2)  # she goes on
    kit.call("run", "small", "--seed", "9")
    shelf = kit.run_dir / ".superseded"
    assert len(list(shelf.glob("make-*/labels/*"))) == 2
    output = kit.call("clean", "small", "--all", "--yes")
    assert "labels-anna.jsonl" in output and "kept" not in output
    assert list(shelf.iterdir()) == []  # the log that went on has all of it
    kit.call("run", "small", "--from", "make")
    live.write_text('{"id": "2", "label": "accept", "simulated": false}\n')
    (live.parent / "trials.json").write_text("{}")
    output = kit.call("clean", "small", "--all", "--yes")
    kept = [path for path in shelf.rglob("*") if path.is_file()]
    assert [path.name for path in kept] == ["labels-anna.jsonl"] and kept[0].read_text() == line * 2
    assert f"stands nowhere else: {os.path.relpath(kept[0], kit.root)}" in output
    kit.call("clean", "small", "--all", "--yes")
    assert kept[0].exists()


# ---- runs


@pytest.mark.slow
def test_notebooks_are_executed_in_kernels(real_kit):
    kit = real_kit
    kit.write_recipe(
        "stages:\n  make: {notebook: 01_make, parameters: {size: 5}}\n"
        "  train: {notebook: 02_train, parameters: {data: '${make}/made.txt'}}\n"
    )
    output = kit.call("run", "small")
    assert "train | step 4" in output and "make | making 5 plain" in output
    assert kit.read("make")["versions"]["papermill"]
    executed = kit.read("make", "notebook.ipynb")["cells"]
    assert any("injected-parameters" in c["metadata"].get("tags", []) for c in executed)
    assert kit.states() == {"make": "done", "train": "done"}


def test_a_clock_that_is_set_back_takes_no_seconds_away(kit):
    path = kit.library / "runner" / "execution.py"
    path.write_text(
        f"""import time
{path.read_text()}
_execute = execute_notebook
def execute_notebook(*given, **options):
    now = time.time
    time.time = lambda: now() - 3600
    return _execute(*given, **options)
"""
    )
    kit.call("run", "small")
    for stage in map(kit.read, kit.states()):
        assert 0 <= stage["seconds"] < 600 and stage["started"] <= stage["finished"]
    record = json.loads((kit.run_dir / "run.json").read_text())
    assert 0 <= record["runs"][-1]["seconds"] < 600


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
    assert stage["versions"]["papermill"] and stage["seconds"] >= 0 and "commit" in stage
    assert (kit.run_dir / "make" / "DONE").read_text().strip() == stage["fingerprint"]
    assert json.loads((kit.run_dir / "judge" / "metrics.json").read_text()) == {
        "judged": 2,
        "sides": 3,
    }
    record = json.loads((kit.run_dir / "run.json").read_text())
    assert set(record["stages"]) == {"make", "other", "train", "judge"}
    assert record["wall_seconds"] >= sum(record["stages"].values())
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


@pytest.mark.slow
def test_a_recipe_runs_once_a_seed_and_ends_in_one_report(kit):
    runs, page = kit.root / "runs", kit.root / "runs" / "small-seeds" / "report.html"
    stopped = kit.call("run", "small", "--seeds", "4", "5", "--set", "train.trouble=raise", code=1)
    assert "run small --set train.trouble=raise --seeds 4 5" in stopped
    assert not page.exists() and not (runs / "small-seed5").exists()
    output = kit.call("run", "small", "--seeds", "4", "5")
    assert "small-seed4: 2 run, 2 unchanged" in output and "small-seed5: 4 run" in output
    assert f"report over the seeds: {os.path.join('runs', 'small-seeds', 'report.html')}" in output
    made = {s: json.loads((runs / f"small-seed{s}/make/metrics.json").read_text()) for s in (4, 5)}
    assert (made[4]["seed"], made[5]["seed"]) == (4, 5)
    assert page.read_text().startswith("small [4, 5] ") and not (runs / "small").exists()
    again = kit.call("run", "small", "--seeds", "4", "5")
    assert again.count("0 run, 4 unchanged") == 2
    status = kit.call("status", "small", "--seeds", "4", "5", "6")
    assert "small-seed5: 4 stages, 4 done" in status and "over the seeds" in status
    assert "small-seed6: 4 stages, 0 done" in status
    only = kit.call("run", "small", "--seeds", "6", "--only", "make")
    assert "over the seeds" in only and page.read_text().startswith("small [4, 5] ")


def test_seeds_and_the_commands_that_go_with_them(kit):
    kit.call("run", "small", "--seeds", "4", "5")
    changed = ("small", "--set", "train.max_train_steps=3", "--seeds", "4", "5")
    status = kit.call("status", *changed)
    assert "accept small train --set train.max_train_steps=3 --seeds 5\n" in status
    kit.call("accept", "small", "train", *changed[1:])
    assert "train: accepted" not in kit.call("accept", "small", "train", *changed[1:])
    assert "0 folders" in kit.call("clean", "small", "--seeds", "4", "5")
    assert "given twice" in kit.call("run", "small", "--seeds", "4", "4", code=2)
    assert "not allowed" in kit.call("run", "small", "--seeds", "4", "--seed", "5", code=2)


def test_only_one_stage(kit):
    assert "needs the stage" in kit.call("run", "small", "--only", "judge", code=2)
    output = kit.call("run", "small", "--only", "other")
    assert "1 run" in output and not (kit.run_dir / "report.html").exists()
    assert kit.states() == {"make": "to run", "other": "done", "train": "to run", "judge": "to run"}
    assert 'no stage "mak" (did you mean "make"?)' in kit.call(
        "run", "small", "--only", "mak", code=2
    )


@pytest.mark.slow
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
def test_failure_in_a_notebook(real_kit, trouble, words):
    kit = real_kit
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
    assert "JobError" in output and "train/train.log" in output
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
    kit.edit("rorem_lib/colours.py", "VERSION = 1", "VERSION = 2")
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
    kit.edit("rorem_lib/colours.py", "VERSION = 1", "VERSION = 2")
    kit.call("run", "small")
    assert answers.read_text() and (answers.parent / "trials.json").exists()
    assert kit.states() == {"judge": "done"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_runner_leaves_nothing_and_loses_nothing(real_kit, number):
    kit = real_kit
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
        kit.use_no_kernels()
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


def test_skipping_imports_nothing_heavy(real_kit):
    kit = real_kit
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
    now = stage.started
    monkeypatch.setattr("time.time", lambda: now - 3600)  # a clock that was set back
    assert not (tmp_path / "DONE").exists() and not stage.batch
    stage.save_figure(Figure(), "empty")
    stage.finish({"a": np.float32(0.5), "b": [np.int64(2)], "c": float("nan")})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 0.5, "b": [2], "c": None}
    assert (tmp_path / "figures" / "empty.png").stat().st_size > 0
    assert (tmp_path / "DONE").read_text().startswith("alone ")
    record = json.loads((tmp_path / "stage.json").read_text())
    assert record["stage"] == "alone" and 0 <= record["seconds"] < 600
    assert clean_metrics({1: (tmp_path,)}) == {"1": [str(tmp_path)]}


def test_what_done_promises_is_on_the_disk_before(tmp_path, monkeypatch):
    monkeypatch.delenv("ROREM_BATCH", raising=False)
    seen = []

    def flush(folder):
        seen.append((folder.name, (folder / "DONE").exists(), (folder / "image.png").exists()))

    for module in (stage_module, run_folder):
        monkeypatch.setattr(module, "flush_disk", flush)
    stage = start_stage(tmp_path / "alone", notebook="none")
    (tmp_path / "run").mkdir()
    for folder in (tmp_path / "alone", tmp_path / "run"):
        (folder / "image.png").write_bytes(b"x")
    stage.finish({})
    run_folder.close_folder(tmp_path / "run", {}, {})
    assert seen == [("alone", False, True), ("run", False, True)]
    assert (tmp_path / "alone/DONE").exists() and (tmp_path / "run/DONE").exists()


def test_a_folder_of_others_keeps_its_metrics(tmp_path, monkeypatch):
    """Where somebody gives the folder of his raw data as the stage's."""
    for name in ("metrics.json", "DONE"):
        (tmp_path / name).write_text("mine")
    start_stage(tmp_path, notebook="none")
    assert sorted(p.read_text() for p in tmp_path.iterdir()) == ["mine", "mine"]
    assert not (tmp_path / "metrics.json").exists() and not (tmp_path / "DONE").exists()


def test_recipes_in_the_repository_are_valid(tmp_path):
    """Every recipe that is there, with the notebooks that it names and their jobs."""
    for path in sorted((recipes.ROOT / "notebooks" / "recipes").glob("*.yaml")):
        for row in read_recipe(path).stages:
            assert read_one(row, tmp_path)["versions"], row.name


def test_built_in_sets_count_only_where_they_are_used(folder, tmp_path):
    """Reading a set on disk doesn't depend on the code that renders scenes."""
    inputs = {
        data: read_one(
            folder(f"a: {{notebook: plain, parameters: {{data: '{data}'}}}}").stages[0], tmp_path
        )
        for data in ("some/set", "builtin", "builtin:test")
    }
    assert [i["versions"] for i in inputs.values()] == [{}, {}, {"builtin.sets": 1}]
    assert "builtin" not in inputs["some/set"]
    assert inputs["builtin"]["builtin"] == inputs["builtin:test"]["builtin"]
