"""The notebooks as they are committed: stripped, short, their parameters those of the library."""

import ast
import dataclasses
import importlib
import inspect
import json
import subprocess
import symtable
import sys
import tokenize
import typing
from io import StringIO

import pytest

from rorem_lib.files import ROOT
from rorem_lib.parameters import CONFIGS, coerce_value, read_parameters

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return json.loads(path.read_text(encoding="utf-8"))


def select(notebook, kind: str) -> list[dict]:
    """The cells of a kind, each with its source as one string."""
    return [
        cell | {"source": "".join(cell["source"])}
        for cell in notebook["cells"]
        if cell["cell_type"] == kind
    ]


def find_parameters_cell(notebook) -> str:
    tagged = [
        c["source"]
        for c in select(notebook, "code")
        if "parameters" in c["metadata"].get("tags", [])
    ]
    assert len(tagged) == 1, "one cell has the tag `parameters`"
    return tagged[0]


def test_is_stripped(notebook):
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None, (
            f"{''.join(cell['source'])[:60]!r} carries outputs: run nbstripout"
        )
        assert "papermill" not in cell["metadata"] and "execution" not in cell["metadata"]
        assert "injected-parameters" not in cell["metadata"].get("tags", [])
    assert not {"papermill", "widgets"} & set(notebook["metadata"])
    assert [cell["id"] for cell in notebook["cells"]] == [
        str(number) for number in range(len(notebook["cells"]))
    ], "run nbstripout, see make lint"
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


def test_has_the_shape_of_a_notebook(notebook):
    code, text = select(notebook, "code"), select(notebook, "markdown")
    assert 20 <= len(notebook["cells"]) <= 35
    assert 0.6 <= len(text) / len(code) <= 1.6
    assert notebook["cells"][0]["cell_type"] == "markdown" and text[0]["source"].startswith("# ")
    for cell in code + text:
        # the parameters cell has a line for each parameter, and papermill reads one cell only
        if "parameters" not in cell["metadata"].get("tags", []):
            lines = cell["source"].count("\n") + 1
            if cell["cell_type"] == "code":  # the formatter gives each argument a line
                assert lines <= 30, f"{lines} lines: {cell['source'][:60]!r}"
                lines = ast.unparse(ast.parse(cell["source"])).count("\n") + 1
            assert lines <= 15, f"{lines} lines: {cell['source'][:60]!r}"


def test_defines_nothing(notebook):
    for cell in select(notebook, "code"):
        for node in ast.walk(ast.parse(cell["source"])):
            assert not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)), (
                f"{node.name} belongs into rorem_lib"
            )


def test_parameters_are_typed_one_a_line_with_a_plain_comment(path, notebook):
    source = find_parameters_cell(notebook)
    lines = source.splitlines()
    parameters = read_parameters(path)
    body = ast.parse(source).body
    assert [node.lineno for node in body] == list(range(1, len(lines) + 1)), "one a line, no more"
    assert next(iter(parameters.values())).name == "output_dir"
    assert parameters["output_dir"].default == f"runs/alone/{path.stem}"
    comments = {}
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string[1:]
        # papermill's own reader of this cell stumbles over both signs
        assert token.type != tokenize.STRING or "#" not in token.string
    for number, (name, parameter) in enumerate(parameters.items(), 1):
        assert parameter.kind, f"{name} has no type"
        assert coerce_value(parameter.default, parameter.kind) == parameter.default
        comment = comments.get(number, "")
        assert comment.strip(), f"{name} has no comment with its unit or meaning"
        assert "=" not in comment and "#" not in comment, f"{name}: {comment}"


def test_papermill_sees_every_parameter(path):
    from papermill.inspection import inspect_notebook

    assert set(inspect_notebook(str(path))) == set(read_parameters(path))


def test_is_a_stage(path, notebook):
    calls = {}
    for cell in select(notebook, "code"):
        for node in ast.walk(ast.parse(cell["source"])):
            if isinstance(node, ast.Call):
                calls[getattr(node.func, "id", getattr(node.func, "attr", ""))] = node
    start = f"start_stage(output_dir, notebook='{path.stem}'"
    assert ast.unparse(calls["start_stage"]).startswith((f"{start})", f"{start}, job="))
    assert "finish" in calls, "stage.finish(metrics) is never called"


def list_scopes(source: str) -> list[symtable.SymbolTable]:
    """A cell's own scope, then those of its comprehensions and lambdas."""
    waiting, found = [symtable.symtable(source, "cell", "exec")], []
    while waiting:
        found.append(waiting.pop(0))
        waiting += found[-1].get_children()
    return found


def list_bound(cell) -> set[str]:
    """The notebook's variables that a cell binds."""
    own = list_scopes(cell["source"])[0].get_symbols()
    return {s.get_name() for s in own if s.is_assigned() or s.is_imported()}


def list_read(cell) -> set[str]:
    """The notebook's variables that a cell reads and does not bind itself."""
    own, *inner = list_scopes(cell["source"])
    found = {s.get_name() for s in own.get_symbols() if s.is_referenced()}
    found |= {s.get_name() for scope in inner for s in scope.get_symbols() if s.is_global()}
    return found - list_bound(cell)


def test_cells_that_only_look_change_nothing_that_counts(path, notebook):
    """The runner leaves cells with the tag `view` out of a stage's fingerprint."""
    cells = select(notebook, "code")
    views = [c for c in cells if "view" in c["metadata"].get("tags", [])]
    assert views, "a plot of it would repeat the stage"
    bound = set().union(*map(list_bound, views))
    for cell in cells:
        if cell not in views:
            wrong = list_read(cell) & bound
            assert not wrong, f"{wrong} of a view cell: {cell['source'][:60]!r}"
    assert not bound & set(read_parameters(path))
    calls = [n for c in views for n in ast.walk(ast.parse(c["source"])) if isinstance(n, ast.Call)]
    names = {getattr(call.func, "attr", getattr(call.func, "id", "")) for call in calls}
    assert not names & {"launch_job", "start_stage", "finish", "write_json", "to_csv"}


def test_ruff_is_content():
    if not NOTEBOOKS:
        pytest.skip("there is no notebook yet")
    check = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format=concise", *map(str, NOTEBOOKS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert check.returncode == 0, check.stdout + check.stderr


@pytest.mark.parametrize(
    "name, config", [(name, config) for name, configs in CONFIGS.items() for config in configs]
)
def test_no_variable_is_taken_for_an_option(name, config):
    """A config is filled from the notebook's globals: whatever has an option's name sets it."""
    path = ROOT / "notebooks" / f"{name}.ipynb"
    module, _, kind = config.rpartition(".")
    cls = getattr(importlib.import_module(f"rorem_lib.{module}"), kind)
    options = {field.name for field in dataclasses.fields(cls)} - set(read_parameters(path))
    cells = select(json.loads(path.read_text(encoding="utf-8")), "code")
    assert not options & set().union(*map(list_bound, cells))


@pytest.mark.parametrize(
    "name, config", [(name, config) for name, configs in CONFIGS.items() for config in configs]
)
def test_parameters_mirror_the_config(name, config):
    """Names and types: the values are the miniature's here, and full size in the config."""
    parameters = read_parameters(ROOT / "notebooks" / f"{name}.ipynb")
    module, _, kind = config.rpartition(".")
    cls = getattr(importlib.import_module(f"rorem_lib.{module}"), kind)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name not in parameters and "more_options" in parameters:
            continue  # a rarer one, set through `more_options`
        assert field.name in parameters, f"{kind}.{field.name} has no parameter"
        wanted = inspect.formatannotation(hints[field.name])
        assert parameters[field.name].kind == wanted, f"{kind}.{field.name} is {wanted}"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_notebook_runs_alone_on_built_in_data_or_what_the_one_before_wrote(name):
    parameters = read_parameters(ROOT / "notebooks" / f"{name}.ipynb")
    if name == "01_assemble_dataset":
        assert parameters["source"].default == "scenes"
        return
    (meta,) = parameters["meta_path"].default
    before = "runs/alone/04_annotate/scored" if name[:2] == "05" else "builtin:"
    assert meta.startswith(before)
    assert parameters["pretrained_model_name_or_path"].default == "builtin"
    assert parameters["hardware"].default == "cpu"


@pytest.mark.parametrize("name", ["02_train_remover", "07_distill_lora"])
def test_the_model_it_compares_with_is_the_one_that_is_trained(name):
    """`more_options` may put another UNet or VAE in its place."""
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    calls = [
        ast.unparse(node)
        for cell in select(notebook, "code")
        for node in ast.walk(ast.parse(cell["source"]))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "sdxl.load_pipeline"
    ]
    own = [call for call in calls if "(pretrained_model_name_or_path" in call]
    assert own and all("**parts" in call for call in own)
