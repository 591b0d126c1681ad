"""Recipes: which notebooks run, in which order, with which parameters; checked before any runs.

A recipe is a YAML table of stages. A row names a notebook and the parameters that differ from the
notebook's own, and refers to an earlier stage's folder as `${stage}`:

    name: demo
    seed: 4                        # to every notebook that has a `seed`, unless the row sets it
    full_size: true                # optional: the library's defaults, not the cells' miniature
    defaults:                      # optional: parameters for every row of a notebook
      02_train_remover: {train_batch_size: 16}
    stages:
      initialization: {notebook: 02_train_remover, parameters: {max_train_steps: 300}}
      human_1: {notebook: 03_generate_removals, row: human 1,
                parameters: {pretrained_model_name_or_path: "${initialization}/remover"}}

The order of precedence is: notebook, the library's defaults (`full_size`), recipe's seed,
`defaults`, the row, `--set`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rorem_lib.files import ROOT
from rorem_lib.parameters import (
    CONFIGS,
    StrictLoader,
    coerce_value,
    read_defaults,
    read_parameters,
    suggest,
)

REFERENCE = re.compile(r"\$\{([^}]*)\}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\Z")
_ROW_KEYS = ("notebook", "row", "parameters")
_TOP_KEYS = ("name", "description", "seed", "full_size", "defaults", "stages")


class RecipeError(ValueError):
    """A recipe that can't run as written; `problems` lists everything found, not the first only."""

    def __init__(self, path, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(f"{path}: {problem}" for problem in problems))


@dataclass(frozen=True)
class StageRow:
    """One row of a recipe.

    Attributes:
        name: the stage's name, also its folder's.
        notebook: path of the notebook.
        row: the row of the paper's table that the stage belongs to ("" for none).
        given: parameters handed to the notebook, checked and coerced, `${…}` still in them.
        parameters: `given` over the notebook's defaults: every parameter's value.
        defaults: what parameters are that neither the recipe nor its caller gives.
        upstream: the earlier stages that `given` refers to, in order.
    """

    name: str
    notebook: Path
    row: str
    given: dict[str, Any]
    parameters: dict[str, Any]
    defaults: dict[str, Any]
    upstream: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `seed` is None where neither the file nor the caller sets one."""

    name: str
    description: str
    seed: int | None
    stages: tuple[StageRow, ...]
    path: Path


def get_recipe(name_or_path) -> Path:
    """A recipe's file, from its name in `notebooks/recipes` or its path.

    Raises:
        RecipeError: there is none.
    """
    folder = ROOT / "notebooks" / "recipes"
    if not folder.is_dir():
        raise RecipeError(
            name_or_path,
            [
                f"{ROOT} has no notebooks: recipes are run in a clone of the repository "
                "(git clone, then pip install -e . in it)"
            ],
        )
    path = Path(name_or_path).expanduser()
    if path.suffix in (".yaml", ".yml"):
        found = path if path.is_file() else folder / path
    else:
        found = folder / f"{name_or_path}.yaml"
    if not found.is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise RecipeError(
            name_or_path,
            [
                f"there is no such recipe{suggest(path.stem, known)}; notebooks/recipes has: "
                f"{', '.join(known) or 'none'}"
            ],
        )
    return found.resolve()


def list_strings(value) -> list[str]:
    """Every string in a parameter's value, lists and dicts opened."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [s for v in value for s in list_strings(v)] if hasattr(value, "__iter__") else []


def substitute(value, folders: dict[str, str]):
    """`value` with every `${stage}` replaced by that stage's folder, lists and dicts opened."""
    if isinstance(value, str):
        return REFERENCE.sub(lambda match: folders[match[1]], value)
    if isinstance(value, list):
        return [substitute(v, folders) for v in value]
    if isinstance(value, dict):
        return {k: substitute(v, folders) for k, v in value.items()}
    return value


def read_recipe(
    name_or_path, *, overrides: dict[str, dict[str, Any]] | None = None, seed: int | None = None
) -> Recipe:
    """Read and check a recipe.

    Args:
        name_or_path: a name in `notebooks/recipes`, or a YAML file.
        overrides: stage -> parameter -> value, what `--set` gives.
        seed: replaces the recipe's seed.

    Raises:
        RecipeError: lists every unknown notebook, parameter or stage, every mistyped value and
            every reference that points nowhere or forward.
    """
    path = get_recipe(name_or_path)
    try:
        table = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(path, [f"not valid YAML: {error}"]) from error
    if not isinstance(table, dict) or not isinstance(table.get("stages"), dict):
        raise RecipeError(path, ["a recipe is a table with `stages`, a table of rows"])
    if not table["stages"]:
        raise RecipeError(path, ["`stages` has no rows"])
    if odd := [name for name in table["stages"] if not isinstance(name, str)]:
        raise RecipeError(
            path, [f"YAML reads the name of a stage as {odd[0]!r}: put it in quotation marks"]
        )
    if not isinstance(table.get("defaults") or {}, dict):
        raise RecipeError(path, ["`defaults` is a table: notebook -> parameters"])
    problems = [
        f'unknown key "{key}"{suggest(key, _TOP_KEYS)}' for key in table if key not in _TOP_KEYS
    ]
    name = table.get("name", path.stem)
    if not _NAME.match(str(name)):
        problems.append(f'the name "{name}" is no folder name: letters, digits, - and _ only')
    seed = table.get("seed") if seed is None else seed
    if not (seed is None or type(seed) is int):
        problems.append(f"seed: expected int, got {seed!r}")
    if not isinstance(table.get("full_size", False), bool):
        problems.append(f"full_size: expected bool, got {table['full_size']!r}")
    overrides = overrides or {}
    for stage in overrides:
        if stage not in table["stages"]:
            problems.append(f'unknown stage "{stage}" in --set{suggest(stage, table["stages"])}')
    defaults = table.get("defaults") or {}
    rows = [row for row in table["stages"].values() if isinstance(row, dict)]
    used = {row.get("notebook") for row in rows if isinstance(row.get("notebook"), str)}
    problems += [
        f'defaults: no stage uses the notebook "{key}"{suggest(key, used)}'
        for key in defaults
        if key not in used
    ]
    stages: list[StageRow] = []
    for stage, row in table["stages"].items():
        _check_row(
            path,
            stage,
            row,
            {"seed": seed, "full_size": table.get("full_size")},
            defaults,
            overrides.get(stage, {}),
            list(table["stages"]),
            stages,
            problems,
        )
    if problems:
        raise RecipeError(path, problems)
    return Recipe(str(name), str(table.get("description", "")), seed, tuple(stages), path)


def _check_row(path, name, row, top, defaults, override, order, stages, problems) -> None:
    """Check one row; append it to `stages`, or what is wrong with it to `problems`."""
    if not _NAME.match(name):
        problems.append(f'stage "{name}": the name is no folder name: letters, digits, - and _')
    if not isinstance(row, dict) or not isinstance(row.get("notebook"), str):
        problems.append(f'stage "{name}": a row is a table with at least `notebook`, a name')
        return
    problems += [
        f'stage "{name}": unknown key "{key}"{suggest(key, _ROW_KEYS)}'
        for key in row
        if key not in _ROW_KEYS
    ]
    notebook = _find_notebook(path, row["notebook"])
    if notebook is None:
        known = [p.stem for p in (ROOT / "notebooks").glob("*.ipynb")]
        problems.append(
            f'stage "{name}": there is no notebook "{row["notebook"]}"'
            f"{suggest(row['notebook'], known)}"
        )
        return
    try:
        known = read_parameters(notebook)
    except ValueError as error:
        problems.append(f'stage "{name}": {error}')
        return
    given = {}
    for config in CONFIGS.get(notebook.stem, ()) if top["full_size"] else ():
        given |= {k: v for k, v in read_defaults(config).items() if k in known}
    given.pop("output_dir", None)  # the runner's
    standard = {k: p.default for k, p in known.items() if k != "output_dir"} | given
    if top["seed"] is not None and "seed" in known:
        given["seed"] = top["seed"]
    for source in (defaults.get(row["notebook"]), row.get("parameters"), override):
        if not isinstance(source or {}, dict):
            problems.append(f'stage "{name}": parameters are a table, not {source!r}')
            return
        given |= source or {}
    upstream: list[str] = []
    for key, value in given.items():
        where = f'stage "{name}": parameter "{key}"'
        if key == "output_dir":
            problems.append(f"{where} is the stage's folder and set by the runner")
        elif key not in known:
            problems.append(f"{where} is unknown to {notebook.name}{suggest(key, known)}")
        else:
            try:
                given[key] = coerce_value(value, known[key].kind)
            except TypeError as error:
                problems.append(f"{where}: {error}")
        for text in list_strings(value):
            if "${" in REFERENCE.sub("", text):
                problems.append(f'{where}: "{text}" has a "${{" without its "}}"')
            for target in REFERENCE.findall(text):
                if target not in order:
                    problems.append(
                        f'{where} refers to an unknown stage "{target}"{suggest(target, order)}'
                    )
                elif order.index(target) >= order.index(name):
                    problems.append(
                        f'{where} refers to "{target}", which runs no earlier than this stage'
                    )
                elif target not in upstream:
                    upstream.append(target)
    title, parameters = str(row.get("row", "")), standard | given
    stages.append(StageRow(name, notebook, title, given, parameters, standard, tuple(upstream)))


def _find_notebook(recipe: Path, name: str) -> Path | None:
    """A name stands for a notebook beside the recipe or in `notebooks/`; a path for itself."""
    file = name if name.endswith(".ipynb") else f"{name}.ipynb"
    places = (recipe.parent / file, ROOT / "notebooks" / file, ROOT / file)
    return next((p.resolve() for p in places if p.is_file()), None)
