"""Parameters of notebooks: read the typed parameters cell, fit values to its annotations.

Papermill warns about an unknown parameter and goes on with the default, and hands `1e-4`, which
YAML reads as a string, to the notebook as a string. Here both are settled before anything runs.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorem_lib.files import read_json

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\Z")


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameters cell."""

    name: str
    kind: str  # the annotation as written, such as "float" or "list[str]"; "" where there is none
    default: Any


def read_cells(notebook: Path) -> list[dict]:
    """A notebook's code cells as `{"source": str, "tags": list}`, in order.

    Raises:
        ValueError: the file is no notebook.
    """
    try:
        cells = read_json(notebook)["cells"]
        return [
            {"source": "".join(cell["source"]), "tags": cell.get("metadata", {}).get("tags", [])}
            for cell in cells
            if cell["cell_type"] == "code"
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{notebook} is not a Jupyter notebook (format 4)") from error


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """The parameters cell of a notebook (tag `parameters`), by name; empty where it has none.

    Raises:
        ValueError: the cell is no plain list of assignments with literal values.
    """
    source = next((c["source"] for c in read_cells(notebook) if "parameters" in c["tags"]), "")
    found = {}
    try:
        for node in ast.parse(source).body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                name, kind = node.target.id, ast.unparse(node.annotation)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name, kind = node.targets[0].id, ""
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue  # a docstring
            else:
                raise ValueError(f"line {node.lineno} is no `name: type = value`")
            found[name] = Parameter(name, kind, ast.literal_eval(node.value))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{notebook}: the parameters cell can't be read: {error}") from error
    return found


def coerce_value(value, kind: str):
    """`value` as the annotation `kind` wants it.

    YAML reads `1e-4` as a string and `3` as an int: both become floats where a float is wanted.
    Everything else must have the type already; words such as "true" are no bools.

    Raises:
        TypeError: the value doesn't fit.
    """
    if not kind:
        return value
    node = ast.parse(kind, mode="eval").body
    for lenient in (False, True):
        fits, fitted = _fit(value, node, lenient)
        if fits:
            return fitted
    shown = json.dumps(value, default=str)
    raise TypeError(f"expected {kind}, got {type(value).__name__} {shown}")


def _fit(value, node, lenient: bool) -> tuple[bool, Any]:
    """Whether `value` has the type that the annotation `node` names, and the value to hand on."""
    if isinstance(node, ast.BinOp):  # X | Y
        first = _fit(value, node.left, lenient)
        return first if first[0] else _fit(value, node.right, lenient)
    if isinstance(node, ast.Constant):  # None, or a quoted annotation
        if node.value is None:
            return value is None, None
        return _fit(value, ast.parse(node.value, mode="eval").body, lenient)
    if isinstance(node, ast.Subscript):
        return _fit_subscript(value, node, lenient)
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "Any")
    if name in ("Any", "object"):
        return True, value
    if name == "bool":
        return isinstance(value, bool), value
    if name in ("str", "list", "dict"):
        return isinstance(value, {"str": str, "list": list, "dict": dict}[name]), value
    if isinstance(value, bool) or name not in ("int", "float"):
        return False, None
    if lenient and isinstance(value, str) and _NUMBER.match(value):
        value = float(value)
    if name == "float":
        return isinstance(value, (int, float)) and (lenient or isinstance(value, float)), (
            float(value) if isinstance(value, (int, float)) else None
        )
    if lenient and isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    return isinstance(value, int), value


def _fit_subscript(value, node, lenient: bool) -> tuple[bool, Any]:
    name = node.value.attr if isinstance(node.value, ast.Attribute) else node.value.id
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if name == "Optional":
        return (True, None) if value is None else _fit(value, inner[0], lenient)
    if name == "Union":
        return next((r for r in (_fit(value, n, lenient) for n in inner) if r[0]), (False, None))
    if name == "Literal":
        return value in [ast.literal_eval(n) for n in inner], value
    if name in ("list", "List") and isinstance(value, list):
        results = [_fit(v, inner[0], lenient) for v in value]
        return all(fits for fits, _ in results), [v for _, v in results]
    if name in ("dict", "Dict") and isinstance(value, dict):
        results = [
            (_fit(k, inner[0], lenient), _fit(v, inner[-1], lenient)) for k, v in value.items()
        ]
        return (all(k[0] and v[0] for k, v in results), {k[1]: v[1] for k, v in results})
    return False, None


def fill_config(cls, parameters: dict, more: dict):
    """A config of a notebook's parameters, by name, and of `more` options that have none there.

    Args:
        cls: the config's dataclass.
        parameters: the notebook's `globals()`; names that are no field of `cls` are left alone.
        more: further fields, such as a `more_options` parameter holds.

    Raises:
        ValueError: a name in `more` is no field of `cls`, has a parameter of its own, or its value
            is of another type.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    if unknown := sorted(set(more) - set(kinds)):
        raise ValueError(f"more_options: {cls.__name__} has no option {', '.join(unknown)}")
    if twice := sorted(set(more) & set(parameters)):
        raise ValueError(f"more_options: {', '.join(twice)} has a parameter of its own")
    given = {}
    for name, value in more.items():
        try:
            given[name] = coerce_value(value, kinds[name])
        except TypeError as error:
            raise ValueError(f"more_options: {name}: {error}") from None
    return cls(**{name: parameters[name] for name in kinds if name in parameters}, **given)
