"""Fingerprints: what a stage's result depends on, so that the same work is never done twice.

A stage's fingerprint is a SHA-256 over

- its parameters, the notebook's defaults included (`${stage}` as written, not as a path);
- its notebook's code cells (not its text, not its outputs);
- the sources of the `rorem_lib` modules its code imports or launches as jobs, and of all that
  those import in turn; the modules that only run notebooks (`RUNNER`) don't count, and what is
  imported for a `builtin:` set counts where a parameter names one;
- the fingerprints of the stages it refers to;
- the files its parameters name: a `meta.json`, or a folder that holds one, by the content of
  `meta.json` (the pictures under it are not looked at); a folder that another run made by its
  DONE marker; every other file by size and modification time; other folders by the size and
  modification time of all files in them;
- the built-in model's files, when a parameter is `builtin` or begins with `builtin:`;
- where people label (`mode: interactive`), the label files in the stage's own folder.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rorem_lib.files import ROOT, hash_file, resolve_path
from rorem_lib.parameters import read_cells
from rorem_lib.runner.recipes import Recipe, RecipeError, StageRow, list_strings

PACKAGE = ROOT / "rorem_lib"
RUNNER = ("runner", "parameters", "evaluation.report")  # with what lies in them
# Imports that happen for a set `builtin:<role>` alone. Followed for every stage, they would make
# each depend on the code that renders scenes and on the code that makes candidates of them.
BUILTIN_SETS = "builtin.sets"
ONLY_FOR_BUILTIN_SETS = frozenset(
    {("data.triplets", BUILTIN_SETS), (BUILTIN_SETS, "removal"), (BUILTIN_SETS, "models.sdxl")}
)
_AWAIT = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT


@dataclass(frozen=True)
class Fingerprint:
    """Attributes:
    digest: what DONE holds when the stage is finished.
    base: the same without the labels people added; decides whether a half-done folder is kept.
    inputs: the parts, as written to `stage.json`.
    """

    digest: str
    base: str
    inputs: dict


def _digest(value) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def list_used_modules(source: str, *, module: str = "", package: Path = PACKAGE) -> set[str]:
    """Modules of the package that a Python source imports or launches, as dotted names.

    Args:
        source: Python, or a notebook cell (lines that begin with `%` or `!` are left out).
        module: the dotted name of the module the source is, below the package; for relative
            imports. A package's own name ends in `.__init__`.
        package: the package's folder.

    Raises:
        SyntaxError: the source is no Python.
    """
    lines = ["pass" if line.startswith(("%", "!")) else line for line in source.splitlines()]
    tree = compile("\n".join(lines), module or "<cell>", "exec", _AWAIT, dont_inherit=True)
    root, found = package.name, set()

    def add(name: str) -> None:
        """Add `name` and the packages above it, where they are modules of this package."""
        if name != root and not name.startswith(f"{root}."):
            return
        parts = name.split(".")[1:]
        for depth in range(len(parts) + 1):
            if _find_module(".".join(parts[:depth]), package):
                found.add(".".join(parts[:depth]))

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = [root, *module.split(".")][: -node.level]
                origin = ".".join([*above, *([origin] if origin else [])])
            add(origin)
            for alias in node.names:
                add(f"{origin}.{alias.name}")
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            named = [k.value for k in node.keywords if k.arg == "module"]
            target = (node.args[:1] + named)[0] if node.args or named else None
            if called == "launch_job" and isinstance(target, ast.Constant):
                add(f"{root}.{target.value}")
            elif called == "import_module" and isinstance(target, ast.Constant):
                add(str(target.value))
            elif called == "import_module" and isinstance(target, ast.JoinedStr):
                # f"rorem_lib.sources.{name}": whichever it is, so all of them
                stem = getattr(target.values[0], "value", "")
                folder = package.joinpath(*str(stem).strip(".").split(".")[1:])
                if str(stem).startswith(f"{root}.") and folder.is_dir():
                    for file in folder.glob("*.py"):
                        add(f"{str(stem).strip('.')}.{file.stem}")
    return found


def _find_module(name: str, package: Path) -> Path | None:
    """The file of a dotted name below the package ("" is the package itself)."""
    place = package.joinpath(*name.split(".")) if name else package
    for file in (place / "__init__.py", place.with_suffix(".py")):
        if file.is_file() and (name or file.parent == package):
            return file
    return None


def _read_module(name: str, package: Path) -> tuple[str, frozenset[str]]:
    """A module's content hash and the modules it uses itself."""
    file = _find_module(name, package)
    return _parse_module(file, name, package, file.stat().st_mtime_ns)


@cache
def _parse_module(file: Path, name: str, package: Path, modified: int):
    source = file.read_text(encoding="utf-8")
    module = f"{name}.__init__".strip(".") if file.name == "__init__.py" else name
    try:
        used = frozenset(list_used_modules(source, module=module, package=package))
    except SyntaxError as error:
        raise RecipeError(file, [f"is no Python: {error}"]) from error
    return hashlib.sha256(source.encode()).hexdigest()[:16], used


def _runs_alone(name: str) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in RUNNER)


def hash_modules(names, *, package: Path = PACKAGE, without=frozenset()) -> dict[str, str]:
    """Hashes of these modules and of all that they import, in turn; the runner's left out.

    Args:
        names: dotted names below the package.
        package: the package's folder.
        without: imports that are not followed, as (importing module, imported module).
    """
    hashes, waiting = {}, list(names)
    while waiting:
        name = waiting.pop()
        if name not in hashes and not _runs_alone(name):
            hashes[name], used = _read_module(name, package)
            waiting += [other for other in used if (name, other) not in without]
    return {name or package.name: hashes[name] for name in sorted(hashes)}


def _read_notebook(notebook: Path, package: Path) -> tuple[str, frozenset[str]]:
    """A notebook's code hash and the modules its cells use."""
    return _parse_notebook(notebook, package, notebook.stat().st_mtime_ns)


@cache
def _parse_notebook(notebook: Path, package: Path, modified: int):
    sources = [cell["source"] for cell in read_cells(notebook)]
    used = set()
    for number, source in enumerate(sources, 1):
        try:
            used |= list_used_modules(source, package=package)
        except SyntaxError as error:
            raise RecipeError(notebook, [f"code cell {number} is no Python: {error}"]) from error
    return _digest(sources)[:16], frozenset(used)


@cache
def _hash_builtin(package: Path) -> str:
    """The built-in model's files; its card and other text don't count."""
    files = sorted(
        p
        for p in (package / "builtin" / "model").rglob("*")
        if p.is_file() and p.suffix != ".md" and "__pycache__" not in p.parts
    )
    return _digest([(str(p.relative_to(package)), hash_file(p)) for p in files])[:16]


def stamp_path(path: Path) -> str | None:
    """What stands for the file or folder's content; None where there is nothing."""
    if path.is_file() and path.name == "meta.json":
        return f"sha256 {hash_file(path)[:16]}"
    if path.is_file():
        status = path.stat()
        return f"{status.st_size} bytes, modified {status.st_mtime_ns}"
    if not path.is_dir():
        return None
    if (path / "meta.json").is_file():
        return stamp_path(path / "meta.json")
    files = []
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder, name)
            if file.exists():
                status = file.stat()
                files.append((str(file.relative_to(path)), status.st_size, status.st_mtime_ns))
    return f"{len(files)} files, {_digest(sorted(files))[:16]}"


def _stamp_parameter(text: str) -> str | None:
    """The stamp of what a parameter's text names on disk; None for ordinary text and Hub ids."""
    if "${" in text or "\n" in text or len(text) > 1000 or not ("/" in text or "." in text):
        return None
    path = resolve_path(text)
    for folder in (path, *path.parents):
        if folder == ROOT:
            break
        if (folder / "DONE").is_file():  # another run made it: its marker says which run
            return f"made by {(folder / 'DONE').read_text(encoding='utf-8').strip()[:40]}"
    return stamp_path(path)


def list_labels(folder: Path) -> list[Path]:
    """The label files in a stage's folder."""
    return sorted(folder.rglob("labels-*.jsonl")) if folder.is_dir() else []


def asks_people(row: StageRow) -> bool:
    """Whether people answer in this stage's notebook: what they have said is one of its inputs."""
    return row.parameters.get("mode") == "interactive" or bool(row.parameters.get("user_study"))


def compute_fingerprints(
    recipe: Recipe, *, run_dir: Path, settled: dict | None = None, package: Path = PACKAGE
) -> dict[str, Fingerprint]:
    """Every stage's fingerprint, by name, in the recipe's order.

    Args:
        recipe: the checked recipe.
        run_dir: `runs/<recipe>`.
        settled: fingerprints, by stage, to be taken as they are: a run's stages so far.
        package: the library's folder.

    Raises:
        RecipeError: a notebook's code cell or a module is no Python.
    """
    found: dict[str, Fingerprint] = {}
    for row in recipe.stages:
        if settled and row.name in settled:
            found[row.name] = settled[row.name]
            continue
        notebook, used = _read_notebook(row.notebook, package)
        texts = [text for value in row.parameters.values() for text in list_strings(value)]
        inputs = {
            "parameters": row.parameters,
            "notebook": notebook,
            "modules": {},
            "stages": {name: found[name].digest for name in row.upstream},
            "files": {t: stamp for t in texts if (stamp := _stamp_parameter(t))},
        }
        renders = any(text.startswith("builtin:") for text in texts)
        if renders and _find_module(BUILTIN_SETS, package):
            used = used | {BUILTIN_SETS}
        if any(text.split(":")[0] == "builtin" for text in texts):
            inputs["builtin"] = _hash_builtin(package)
        inputs["modules"] = hash_modules(
            used, package=package, without=frozenset() if renders else ONLY_FOR_BUILTIN_SETS
        )
        base = digest = _digest(inputs)
        if asks_people(row):
            folder = run_dir / row.name
            inputs["labels"] = {
                str(p.relative_to(folder)): hash_file(p)[:16] for p in list_labels(folder)
            }
            digest = _digest(inputs)
        found[row.name] = Fingerprint(digest, base, inputs)
    return found


def describe_change(before: dict, now: dict) -> str:
    """What differs between two `inputs`, in a few words: "parameter seed: 4 -> 5, module masks"."""
    words = []
    for part, label in (
        ("parameters", "parameter"),
        ("modules", "module"),
        ("stages", "stage"),
        ("files", "file"),
        ("labels", "labels"),
    ):
        old, new = before.get(part) or {}, json.loads(json.dumps(now.get(part) or {}, default=str))
        for name in sorted(set(old) | set(new)):
            if old.get(name) != new.get(name):
                change = f": {old.get(name)} -> {new.get(name)}" if part == "parameters" else ""
                words.append(f"{label} {name}{change}")
    words += [
        label
        for part, label in (("notebook", "the notebook"), ("builtin", "built-in model"))
        if before.get(part) != now.get(part)
    ]
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")
