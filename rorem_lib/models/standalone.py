"""One file out of several modules: the code in a model's folder for people without the kit.

`build_source` starts at a module and takes what it uses of the kit, and what that uses, and nothing
else: functions, classes and constants as they stand in their modules, with their comments. Imports
of the kit go, all others stay. Names that two modules give to different things get their module's
name in front.
"""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rorem_lib import __version__
from rorem_lib.files import write_text

LIBRARY = Path(__file__).parents[1]
PACKAGE = LIBRARY.name


@dataclass
class _Definition:
    """Something that a module defines at its top: its lines (from 0, end outside) and its tree."""

    name: str
    begin: int
    end: int
    node: ast.stmt
    uses: dict[int, tuple[str, str]] = field(default_factory=dict)  # id of a node -> target


class _Module:
    """A module's definitions, and what its names mean."""

    def __init__(self, name: str):
        self.name = name  # dotted, below the package
        path = LIBRARY.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        self.text = path.read_text(encoding="utf-8")
        self.lines = self.text.splitlines()
        self.definitions: dict[str, _Definition] = {}
        self.aliases: dict[str, str] = {}  # name -> module of the kit
        self.borrowed: dict[str, tuple[str, str]] = {}  # name -> (module of the kit, name there)
        self.imports: dict[str, str] = {}  # name -> line that imports it from elsewhere
        for node in ast.parse(self.text).body:
            self._read(node)

    def _read(self, node: ast.stmt) -> None:
        if isinstance(node, ast.With):  # a block that only silences what imports say
            for inner in node.body:
                self._read(inner)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith(PACKAGE), f"{self.name}: import {alias.name}"
                name = alias.asname or alias.name.partition(".")[0]
                self.imports[name] = f"import {_write_alias(alias)}"
        elif isinstance(node, ast.ImportFrom):
            self._read_from(node)
        else:
            for name in _list_names(node):
                self.definitions[name] = _Definition(name, *self._find_lines(node), node)

    def _read_from(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            name = alias.asname or alias.name
            if not node.module.startswith(PACKAGE):
                self.imports[name] = f"from {node.module} import {_write_alias(alias)}"
                continue
            origin = node.module.removeprefix(PACKAGE).lstrip(".")
            below = f"{origin}.{alias.name}".lstrip(".")
            path = LIBRARY.joinpath(*below.split("."))
            if path.is_dir() or path.with_suffix(".py").is_file():
                self.aliases[name] = below
            else:
                self.borrowed[name] = (origin, alias.name)

    def _find_lines(self, node: ast.stmt) -> tuple[int, int]:
        """With decorators and the comments right above."""
        begin = min(n.lineno for n in (node, *getattr(node, "decorator_list", ()))) - 1
        while begin and self.lines[begin - 1].startswith("#"):
            begin -= 1
        return begin, node.end_lineno


def _write_alias(alias: ast.alias) -> str:
    return f"{alias.name} as {alias.asname}" if alias.asname else alias.name


def _list_names(node: ast.stmt) -> list[str]:
    """What a statement at a module's top defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [n.id for target in node.targets for n in ast.walk(target) if type(n) is ast.Name]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id]
    return []


class _Collector:
    """Follows names from a module through the kit."""

    def __init__(self):
        self.modules: dict[str, _Module] = {}
        self.order: list[str] = []  # a module stands behind those that it uses
        self.taken: dict[tuple[str, str], _Definition] = {}
        self.imports: dict[str, str] = {}

    def open(self, name: str) -> _Module:
        if name not in self.modules:
            self.modules[name] = _Module(name)
        return self.modules[name]

    def take(self, module: _Module, name: str) -> None:
        key = (module.name, name)
        if key in self.taken:
            return
        definition = self.taken[key] = module.definitions[name]
        for node in ast.walk(definition.node):
            self._follow(module, definition, node)
        if module.name not in self.order:
            self.order.append(module.name)

    def _follow(self, module: _Module, definition: _Definition, node: ast.AST) -> None:
        target = None
        if isinstance(node, ast.Name):
            if node.id in module.definitions:
                target = (module.name, node.id)
            elif node.id in module.borrowed:
                target = module.borrowed[node.id]
            elif node.id in module.imports:
                line = module.imports[node.id]
                assert self.imports.setdefault(node.id, line) == line, f"two imports: {node.id}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            alias = module.aliases.get(node.value.id)
            if alias and node.attr in self.open(alias).definitions:
                target = (alias, node.attr)
            elif alias and node.attr in self.open(alias).imports:
                self.imports[node.attr] = self.open(alias).imports[node.attr]
                target = (alias, node.attr)
        if target:
            definition.uses[id(node)] = target
            if target[1] in self.open(target[0]).definitions:
                self.take(self.open(target[0]), target[1])


def build_source(module: str, header: str = "", replaced: dict[str, str] | None = None) -> str:
    """A module with all that it uses of the kit, as the text of one file.

    Args:
        module: dotted, below the package.
        header: its docstring and comments.
        replaced: constants of the module that get other values: name -> Python expression.

    Raises:
        ValueError: a name would have to be changed where that cannot be done safely.
    """
    collector = _Collector()
    root = collector.open(module)
    for name in root.definitions:
        collector.take(root, name)
    if module in collector.order:  # it may have been reached before what it uses
        collector.order.remove(module)
    collector.order.append(module)
    count = Counter(name for _, name in collector.taken)
    new = {
        (origin, name): name if count[name] == 1 else f"{name}_of_{origin.rpartition('.')[2]}"
        for origin, name in collector.taken
    }
    blocks = []
    for origin in collector.order:
        found = [d for (m, _), d in collector.taken.items() if m == origin]
        for definition in sorted({d.begin: d for d in found}.values(), key=lambda d: d.begin):
            if replaced and origin == module and definition.name in replaced:
                blocks.append(f"{definition.name} = {replaced[definition.name]}")
                continue
            blocks.append(_rewrite(collector.modules[origin], definition, new))
    plain = sorted(line for line in set(collector.imports.values()) if line.startswith("import"))
    others = sorted(line for line in set(collector.imports.values()) if line.startswith("from"))
    future = "from __future__ import annotations"
    parts = [header.strip(), future, "\n".join([*plain, *others])]
    return "\n\n".join(parts) + "\n\n\n" + "\n\n\n".join(blocks) + "\n"


def _rewrite(module: _Module, definition: _Definition, new: dict[tuple[str, str], str]) -> str:
    """A definition's lines with the names that it uses changed to their new ones."""
    lines = [line.encode() for line in module.lines[definition.begin : definition.end]]
    edits = []
    bound = {a.arg for a in ast.walk(definition.node) if isinstance(a, ast.arg)}
    bound |= {
        n.id
        for n in ast.walk(definition.node)
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    } - {definition.name}
    in_strings = {
        id(inner)
        for node in ast.walk(definition.node)
        if isinstance(node, ast.JoinedStr)
        for inner in ast.walk(node)
    }
    for node in ast.walk(definition.node):
        if id(node) not in definition.uses:
            continue
        target = definition.uses[id(node)]
        name = new.get(target, target[1])
        if isinstance(node, ast.Name) and name == node.id:
            continue
        if id(node) in in_strings or isinstance(node, ast.Name) and node.id in bound:
            raise ValueError(
                f"{module.name}.{definition.name}: {target[1]} must become {name}, but stands in "
                "an f-string or is a local name too: rename one of them"
            )
        edits.append((node.lineno, node.col_offset, node.end_lineno, node.end_col_offset, name))
    own = new[module.name, definition.name]
    for line, begin, last, end, name in sorted(edits, reverse=True):
        assert line == last, f"{module.name}.{definition.name}: a name over two lines"
        number = line - 1 - definition.begin
        text = lines[number]
        lines[number] = text[:begin] + name.encode() + text[end:]
    text = b"\n".join(lines).decode()
    if own != definition.name and not isinstance(definition.node, ast.Assign | ast.AnnAssign):
        kind = "def" if isinstance(definition.node, ast.FunctionDef) else "class"
        text = text.replace(f"{kind} {definition.name}", f"{kind} {own}", 1)
    return text


PIPELINE = "pipeline.py"  # the name that diffusers looks for


def write_pipeline(folder, settings: dict) -> Path:
    """Write `models/diffusers_pipeline.py` with all that it uses into a model's folder, for
    `DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)`.

    Args:
        folder: the model's.
        settings: what it was released with (`presets.Settings`); they are written into the file.
    """
    module = "models.diffusers_pipeline"
    document = ast.get_docstring(ast.parse(_Module(module).text), clean=False).strip()
    header = (
        f'"""{document}\n"""\n\n'
        f"# Made of modules of the RORem kit, release {__version__} (Apache License 2.0), by its\n"
        "# models/standalone.py. Change those, not this."
    )
    source = build_source(module, header, {"SETTINGS": repr(settings)})
    return write_text(Path(folder) / PIPELINE, source)
