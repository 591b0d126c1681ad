"""What a stage's result depends on, so that the same work is never done twice nor thrown away.

A stage's *inputs* are

- `parameters`: its notebook's, the defaults included (`${stage}` as written, not as a path);
- `notebook`: what its code cells do. Text, comments, messages, the names of variables, imports,
  what only prints or draws, and cells with the tag `view` don't count (see `describe_code`);
- `versions`: `VERSION` in the module of each job that it launches (`launch_job("remover", ...)`) or
  that `start_stage(..., job="acceptance")` names. Whoever changes what a job computes, in its own
  module or in one that it uses, raises its number. No source is hashed: an edit re-runs nothing;
- `content`: SHA-256 of what its parameters name in earlier stages (`${human_1}/remover`), so that
  an unchanged result ends the chain;
- `files`: what its parameters name elsewhere: a `meta.json`, or a folder that holds one, by the
  content of `meta.json`; a folder that another run made by its DONE marker; every other file by
  size and modification time; other folders by the size and modification time of all files in them;
- `builtin`: the built-in model's files, where a parameter is `builtin` or begins with `builtin:`
  (then the version of the built-in sets counts too);
- `labels`: the label files in its own folder, where people answer (`mode: interactive`).
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path

from rorem_lib.files import ROOT, hash_file, resolve_path
from rorem_lib.parameters import read_cells, read_parameters
from rorem_lib.runner.notebook_code import describe_code, name_call, parse_cells
from rorem_lib.runner.recipes import REFERENCE, RecipeError, StageRow, list_strings

PACKAGE = ROOT / "rorem_lib"
BUILTIN_SETS = "builtin.sets"
WRITTEN = ("latent_cache_dir",)  # parameters that name what a stage fills, not what it reads
VIEW = "view"  # the tag of cells that only look

# What a run writes about itself at the top of a stage's folder; no later stage reads it.
RECORDS = frozenset(
    "notebook.ipynb stage.json stage.started.json DONE metrics.json train_metrics.json config.yaml "
    "metrics.jsonl figures labels logs validation_images".split()
)
NOTES = frozenset({"settings.json", "scenes.json"})  # how a set was made, beside its meta.json
_PARTS = {  # of a stage's inputs, as people say it
    "parameters": "parameter",
    "versions": "version of",
    "content": "content of",
    "files": "file",
    "builtin": "built-in model",
}


def digest(value) -> str:
    """SHA-256 of a JSON value; of a stage's inputs it is what its DONE marker holds."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------------------- notebooks and jobs


@cache
def _read_notebook(notebook: Path, modified: int) -> tuple[str, tuple]:
    """A notebook's code hash, and the expressions that name its jobs, compiled."""
    cells = [c["source"] for c in read_cells(notebook) if not {"parameters", VIEW} & set(c["tags"])]
    try:
        code = describe_code(cells, parameters=read_parameters(notebook))
        trees = parse_cells(cells)
    except SyntaxError as error:
        raise RecipeError(notebook, [f"{error.filename} is no Python: {error}"]) from error
    jobs = []
    for call in (n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call)):
        key = {"launch_job": "module", "start_stage": "job"}.get(name_call(call))
        named = [k.value for k in call.keywords if k.arg == key]
        if key == "module":
            named = [*call.args[:1], *named]
        jobs += [compile(ast.Expression(node), "<job>", "eval") for node in named if key]
    return digest(code), tuple(jobs)


def _list_jobs(row: StageRow) -> list[str]:
    """The jobs of a stage, whose names are constants or depend on its parameters alone."""
    found = []
    for job in _read_notebook(row.notebook, row.notebook.stat().st_mtime_ns)[1]:
        try:
            names = eval(job, {"__builtins__": {}}, dict(row.parameters))
        except Exception as error:
            raise RecipeError(
                row.notebook,
                [f"the name of a job must be a constant, or one chosen by a parameter: {error}"],
            ) from error
        found += [names] if isinstance(names, str) else names
    return sorted({name for name in found if name})


def read_version(module: str) -> int:
    """The number `VERSION` in a job's module, which is read, not imported.

    Args:
        module: its dotted name below the package.

    Raises:
        RecipeError: there is no such module, or it has no such line.
    """
    file = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    if not file.is_file():
        raise RecipeError(file, [f'there is no module for the job "{module}"'])
    return _parse_version(file, file.stat().st_mtime_ns)


@cache
def _parse_version(file: Path, modified: int) -> int:
    try:
        body = ast.parse(file.read_text(encoding="utf-8")).body
    except SyntaxError as error:
        raise RecipeError(file, [f"is no Python: {error}"]) from error
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VERSION":
            return ast.literal_eval(node.value)
    raise RecipeError(file, ["is a job's module and needs a line `VERSION = 1`"])


# ------------------------------------------------------------------------------------ contents


def list_references(row: StageRow) -> list[tuple[str, str]]:
    """What a stage's parameters name in earlier stages: (stage, path below its folder)."""
    found = []
    for text in (text for value in row.given.values() for text in list_strings(value)):
        for match in REFERENCE.finditer(text):
            rest = text[match.end() :]
            below = match.start() == 0 and rest.startswith("/") and not REFERENCE.search(rest)
            found.append((match[1], os.path.normpath(rest.strip("/") or ".") if below else "."))
    return sorted(set(found))


def list_files(path: Path, *, top: bool = False) -> Iterator[tuple[str, int, int]]:
    """The files that are a folder's content, or a file itself: (name below it, bytes, mtime in ns).

    Hidden files and unfinished ones (`.partial`) are none, nor are `NOTES`.

    Args:
        path: a folder or a file.
        top: the folder is a stage's own: `RECORDS`, logs and checkpoints are left out.
    """
    if not path.is_dir():
        status = path.stat()
        yield "", status.st_size, status.st_mtime_ns
        return
    waiting = [("", path)]
    while waiting:
        above, folder = waiting.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(".") or name.endswith(".partial") or name in NOTES:
                    continue
                if top and not above and is_record(name):
                    continue
                if entry.is_dir():
                    waiting.append((f"{above}{name}/", Path(entry.path)))
                elif entry.is_file():
                    status = entry.stat()
                    yield above + name, status.st_size, status.st_mtime_ns


def is_record(name: str) -> bool:
    """Whether a file or folder at the top of a stage's folder is a run's record of itself."""
    return name in RECORDS or name.startswith("checkpoint-") or name.endswith(".log")


def measure_content(path: Path, *, top: bool = False) -> dict:
    """Number and bytes of `list_files`, and a hash of what it gives: 600,000 take seconds."""
    listed = sorted(list_files(path, top=top))
    return {
        "files": len(listed),
        "bytes": sum(size for _, size, _ in listed),
        "listing": digest(listed),
    }


def hash_content(path: Path, *, top: bool = False) -> str:
    """SHA-256 over the names and the SHA-256 of the files that `list_files` lists."""
    return _hash_files(path, [name for name, _, _ in list_files(path, top=top)])


def _hash_files(path: Path, names: list[str]) -> str:
    names, total = sorted(names), hashlib.sha256()
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        hashes = pool.imap(lambda name: hash_file(path / name), names, chunksize=64)
        for name, text in zip(names, hashes):
            total.update(f"{name}\0{text}\n".encode())
    return total.hexdigest()


@cache
def _hash_builtin() -> str:
    """The built-in model's files; its card and other text don't count."""
    model = PACKAGE / "builtin" / "model"
    return _hash_files(model, [name for name, _, _ in list_files(model) if name[-3:] != ".md"])


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
    return f"{len(files)} files, {digest(sorted(files))[:16]}"


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


# -------------------------------------------------------------------------------------- inputs


def read_inputs(row: StageRow, *, folder: Path, get_content: Callable) -> dict:
    """What a stage's result depends on, as it is now; plain JSON, as `stage.json` holds it.

    Args:
        row: the stage.
        folder: its folder.
        get_content: (stage, path) -> the hash of what an earlier stage made; None where that
            stage is not finished, so that nobody knows.

    Raises:
        RecipeError: a cell is no Python, or a job has no module or no version.
    """
    read = {key: value for key, value in row.parameters.items() if key not in WRITTEN}
    texts = [text for value in read.values() for text in list_strings(value)]
    jobs = _list_jobs(row)
    if any(text.startswith("builtin:") for text in texts):
        jobs.append(BUILTIN_SETS)
    inputs = {
        "parameters": row.parameters,
        "notebook": _read_notebook(row.notebook, row.notebook.stat().st_mtime_ns)[0],
        "versions": {job: read_version(job) for job in jobs},
        "content": {
            os.path.normpath(f"{stage}/{path}"): get_content(stage, path)
            for stage, path in list_references(row)
        },
        "files": {text: stamp for text in texts if (stamp := _stamp_parameter(text))},
    }
    if any(text.partition(":")[0] == "builtin" for text in texts):
        inputs["builtin"] = _hash_builtin()
    if asks_people(row):
        inputs["labels"] = {str(p.relative_to(folder)): hash_file(p) for p in list_labels(folder)}
    return json.loads(json.dumps(inputs, default=str))


def is_earlier(inputs: dict) -> bool:
    """Whether inputs were written by a version of the kit that hashed the library's sources."""
    return bool(inputs) and "content" not in inputs


def describe_change(before: dict, now: dict, *, labels: bool = True) -> str:
    """What differs between two `inputs`, in a few words ("parameter seed 4 -> 5"); "" for nothing.

    Args:
        before: as recorded.
        now: as read; content that nobody knows yet (None) differs from nothing.
        labels: whether labels count, which make a stage run again in the folder it has.
    """
    if is_earlier(before):
        return "made by an earlier version of the kit"
    words = []
    for part in sorted({*before, *now} - ({"labels"} if not labels else set())):
        label, (old, new) = _PARTS.get(part, part), (before.get(part), now.get(part))
        if not isinstance(old, dict) or not isinstance(new, dict):
            words += [label] if old != new else []
            continue
        for name in sorted({*old, *new}):
            if part == "content" and name in new and new[name] is None:
                continue
            if (name in old) != (name in new) or old.get(name) != new.get(name):
                shown = (_shorten(old.get(name)), _shorten(new.get(name)))
                change = " -> ".join(shown) if part in ("parameters", "versions") else ""
                words.append(f"{label} {name} {change}".rstrip())
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")


def _shorten(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:39] + "…"
