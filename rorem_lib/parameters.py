"""Settings: fields with their meaning, a notebook's parameters cell, values fitted to types.

Papermill warns about an unknown parameter and goes on with the default, and hands `1e-4`, which
YAML reads as a string, to the notebook as a string. Here both are settled before anything runs.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import difflib
import inspect
import itertools
import json
import math
import re
import typing
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from rorem_lib.files import ROOT, read_json

# The config dataclasses whose fields a notebook's parameters are, below `rorem_lib`.
CONFIGS = {
    "01_assemble_dataset": ("data.filters.FilterConfig",),
    "02_train_remover": ("remover.RemoverConfig",),
    "03_generate_removals": ("removal.GenerateConfig",),
    "05_train_discriminator": ("discriminator.DiscriminatorConfig", "acceptance.AcceptanceConfig"),
    "07_distill_lora": ("distill.DistillConfig",),
}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\Z")
_TYPES = {kind.__name__: kind for kind in (bool, int, float, str, list, dict, object)} | {
    name: getattr(typing, name) for name in ("Any", "Dict", "List", "Literal", "Optional", "Union")
}


class StrictLoader(yaml.SafeLoader):
    """Refuses the same key twice: plain YAML would silently take the last.

    Refuses too what a recipe never has and a few bytes can spell: nesting deeper than 50 levels,
    and more than 100,000 values once aliases are written out, each where it is referred to.
    """

    def __init__(self, stream):
        super().__init__(stream)
        self._depth, self._sizes = 0, {}  # values in each node, by its identity

    def compose_node(self, parent, index):
        start = self.peek_event()
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(start, yaml.AliasEvent):
            size = self._sizes.get(id(node), math.inf)  # it is in itself
        else:
            size = self._sizes[id(node)] = 1 + sum(self._sizes[id(x)] for x in _list_inner(node))
        if size > 100_000:
            raise yaml.composer.ComposerError(
                None, None, "more than 100,000 values, or one that is in itself", start.start_mark
            )
        return node

    def compose_sequence_node(self, anchor):
        self._check_depth()
        return super().compose_sequence_node(anchor)

    def compose_mapping_node(self, anchor):
        self._check_depth()
        return super().compose_mapping_node(anchor)

    def _check_depth(self):
        if self._depth > 50:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "nested deeper than 50 levels", mark)

    def construct_mapping(self, node, deep=False):
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in counts.items():
            if count > 1 and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f'"{key}" stands here twice', node.start_mark
                )
        return super().construct_mapping(node, deep)

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:  # a number or a date that there is not
            raise yaml.constructor.ConstructorError(
                None, None, str(error), node.start_mark
            ) from None


def _list_inner(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return list(itertools.chain.from_iterable(node.value))
    return node.value if isinstance(node, yaml.SequenceNode) else []


def option(default, help: str):
    """A config dataclass's field: its default and, in `help`, what it means, which `--help` shows.

    The default is a literal wherever `read_defaults` is to read it.
    """
    if isinstance(default, (list, dict)):
        given = {"default_factory": lambda: copy.deepcopy(default)}
    else:
        given = {"default": default}
    return dataclasses.field(**given, metadata={"help": help})


def read_defaults(config: str) -> dict[str, Any]:
    """The defaults of a config dataclass, without the seconds that importing its module takes.

    Args:
        config: its name below `rorem_lib`, such as "remover.RemoverConfig"; every field is an
            `option`.
    """
    module, _, name = config.rpartition(".")
    path = ROOT / "rorem_lib" / f"{module.replace('.', '/')}.py"
    body = ast.parse(path.read_text(encoding="utf-8")).body
    imported = {
        alias.name: node.module.removeprefix("rorem_lib.")
        for node in body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    found = {}
    (wanted,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == name)
    for base in wanted.bases:
        found |= read_defaults(f"{imported.get(base.id, module)}.{base.id}")
    for node in wanted.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            found[node.target.id] = ast.literal_eval(node.value.args[0])
    return found


def suggest(name: str, names) -> str:
    """` (did you mean "…"?)`, or nothing where no name is near."""
    near = difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=0.5)
    return f' (did you mean "{near[0]}"?)' if near else ""


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
    try:
        return parse_parameters(source)
    except ValueError as error:
        raise ValueError(f"{notebook}: the parameters cell can't be read: {error}") from error


def parse_parameters(source: str) -> dict[str, Parameter]:
    """The parameters that a cell's text assigns, by name.

    Raises:
        ValueError: it is no plain list of assignments with literal values.
    """
    found = {}
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(error) from error
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            name, kind = node.target.id, ast.unparse(node.annotation)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, kind = node.targets[0].id, ""
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        else:
            raise ValueError(f"line {node.lineno} is no `name: type = value`")
        found[name] = Parameter(name, kind, ast.literal_eval(node.value))
    return found


def coerce_value(value, kind):
    """`value` as its type wants it; pydantic checks it, strictly.

    YAML reads `1e-4` as a string and `3` as an int: both become floats where a float is wanted.
    Everything else must have the type already; words such as "true" are no bools.

    Args:
        kind: a type, or an annotation as written; "" takes everything.

    Raises:
        TypeError: the value doesn't fit.
    """
    if not kind:
        return value
    wanted = kind
    try:
        while isinstance(wanted, str):  # an annotation may be quoted
            wanted = eval(wanted, {"__builtins__": {}}, _TYPES)
    except (NameError, SyntaxError, TypeError) as error:
        raise TypeError(f"a parameter can't have the type {kind}: {error}") from None
    adapter = TypeAdapter(wanted)
    for candidate in (value, _read_numbers(value)):
        try:
            return adapter.validate_python(candidate, strict=True)
        except ValidationError:
            continue
    shown = kind if isinstance(kind, str) else inspect.formatannotation(kind)
    raise TypeError(
        f"expected {shown}, got {type(value).__name__} {json.dumps(value, default=str)}"
    )


def _read_numbers(value):
    """`value` with numbers in the place of strings that are some, and integers of whole floats."""
    if isinstance(value, list):
        return [_read_numbers(x) for x in value]
    if isinstance(value, dict):
        return {key: _read_numbers(x) for key, x in value.items()}
    if isinstance(value, str) and _NUMBER.match(value):
        value = float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


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
    hints = typing.get_type_hints(cls)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    if unknown := sorted(set(more) - set(kinds)):
        raise ValueError(
            f"more_options: {cls.__name__} has no option {', '.join(unknown)}"
            f"{suggest(unknown[0], kinds)}"
        )
    if twice := sorted(set(more) & set(parameters)):
        raise ValueError(f"more_options: {', '.join(twice)} has a parameter of its own")
    given = {}
    for name, value in more.items():
        try:
            given[name] = coerce_value(value, kinds[name])
        except TypeError as error:
            raise ValueError(f"more_options: {name}: {error}") from None
    return cls(**{name: parameters[name] for name in kinds if name in parameters}, **given)
