"""What a stage's result depends on, so that the same work is never done twice nor thrown away.

A stage's *inputs* are

- `parameters`: its notebook's, the defaults included (`${stage}` as written, not as a path). Those
  that change no result (`FREE`, and what its `start_stage(..., free=[...])` names) are recorded and
  not compared, nor is one that came or went at its default (`defaults`);
- `notebook`: what its code cells do. Text, comments, messages, the names of variables, imports,
  what only prints or draws, and cells with the tag `view` don't count (see `describe_code`);
- `versions`: `VERSION` in the module of each job that it launches (`launch_job("remover", ...)`) or
  that `start_stage(..., job="acceptance")` names. Whoever changes what a job computes, in its own
  module or in one that it uses, raises its number. No source is hashed: an edit re-runs nothing;
- `content`: SHA-256 of what its parameters name in earlier stages (`${human_1}/remover`), so that
  an unchanged result ends the chain;
- `files`: what its parameters name elsewhere: a `meta.json`, or a folder that holds one, by the
  content of `meta.json`; a folder that another run made by its DONE marker; every other file of at
  most 1 MB by its content, a larger one by size and modification time; other folders by the size
  and modification time of all files in them. A folder is looked at once in a `rorem run`;
- `builtin`: the built-in model's files, where a parameter is `builtin` or begins with `builtin:`
  (then the version of the built-in sets counts too); those of `builtin:remover`, a UNet on top of
  it, stand among the files;
- `labels`: the label files in its own folder, where people answer (`mode: interactive`).
"""

from __future__ import annotations

import ast
import errno
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
FORMAT = 2  # of `inputs`; raised when they are read or written otherwise than before
VIEW = "view"  # the tag of cells that only look
SMALL = 1_000_000  # bytes of a file that is hashed, whatever its time

# Parameters, and names in `more_options`, that change how a result is made or shown and not what
# it is. `training.checkpoints.FREE_FIELDS`, but for the number of steps; then the notebooks' own.
FREE = frozenset(
    "output_dir checkpointing_steps checkpoints_total_limit resume_from_checkpoint logging_steps "
    "logging_dir report_to comments dataloader_num_workers latent_cache_dir validation_steps "
    "num_validation_images validation_meta_path gradient_checkpointing torch_compile channels_last "
    "allow_tf32 enable_xformers_memory_efficient_attention "
    "hardware device workers preview preview_steps preview_meta keys".split()
)

# What a run writes about itself at the top of a stage's folder; no later stage reads it.
RECORDS = frozenset(
    "notebook.ipynb stage.json stage.started.json DONE metrics.json train_metrics.json "
    "training.json config.yaml metrics.jsonl figures labels logs validation_images".split()
)
NOTES = frozenset({"settings.json", "scenes.json"})  # how a set was made, beside its meta.json
_PARTS = {  # of a stage's inputs, as people say it
    "parameters": "parameter",
    "versions": "version of",
    "content": "content of",
    "files": "file",
    "builtin": "built-in model",
}
BUILTIN_REMOVER = "builtin:remover"  # as in `models.sdxl`, which imports torch


def digest(value) -> str:
    """SHA-256 of a JSON value; of a stage's inputs it is what its DONE marker holds."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------------------- notebooks and jobs


@cache
def _read_notebook(notebook: Path, modified: int) -> tuple[str, tuple, tuple]:
    """A notebook's code hash, and the expressions that name its jobs and its free parameters."""
    cells = [c["source"] for c in read_cells(notebook) if not {"parameters", VIEW} & set(c["tags"])]
    try:
        code = describe_code(cells, parameters=read_parameters(notebook))
        trees = parse_cells(cells)
    except SyntaxError as error:
        raise RecipeError(notebook, [f"{error.filename} is no Python: {error}"]) from error
    jobs, free = [], []
    for call in (n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call)):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if name_call(call) == "launch_job":
            jobs += [*call.args[:1], *([given["module"]] if "module" in given else [])]
        elif name_call(call) == "start_stage":
            jobs += [given["job"]] if "job" in given else []
            free += [given["free"]] if "free" in given else []
    return digest(code), *(
        tuple(compile(ast.Expression(node), "<name>", "eval") for node in nodes)
        for nodes in (jobs, free)
    )


def _list_names(row: StageRow, expressions: tuple, what: str) -> list[str]:
    """Names of jobs or parameters, which are constants or depend on a stage's parameters alone."""
    found = []
    for expression in expressions:
        try:
            names = eval(expression, {"__builtins__": {}}, dict(row.parameters))
            found += [names] if isinstance(names, str) else [str(name) for name in names]
        except Exception as error:
            raise RecipeError(
                row.notebook,
                [f"the name of {what} must be a constant, or one chosen by a parameter: {error}"],
            ) from error
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
    except (SyntaxError, ValueError) as error:
        raise RecipeError(file, [f"is no Python: {error}"]) from error
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VERSION":
            if isinstance(node.value, ast.Constant) and type(node.value.value) is int:
                return node.value.value
            raise RecipeError(file, [f"VERSION is no plain number: {ast.unparse(node.value)}"])
    raise RecipeError(file, ["is a job's module and needs a line `VERSION = 1`"])


# ------------------------------------------------------------------------------------ contents


def list_texts(parameters: dict) -> list[str]:
    """Every string in the parameters that count."""
    return list_strings(_drop_free(parameters))


def _drop_free(parameters: dict) -> dict:
    """Parameters without `FREE` ones, in `more_options` too."""
    kept = {name: value for name, value in parameters.items() if name not in FREE}
    if isinstance(more := kept.get("more_options"), dict):
        kept["more_options"] = {name: more[name] for name in more if name not in FREE}
    return kept


def list_references(row: StageRow) -> list[tuple[str, str]]:
    """What a stage's parameters name in earlier stages: (stage, path below its folder)."""
    found = []
    for text in list_texts(row.given):
        for match in REFERENCE.finditer(text):
            rest = text[match.end() :]
            below = match.start() == 0 and rest.startswith("/") and not REFERENCE.search(rest)
            found.append((match[1], os.path.normpath(rest.strip("/") or ".") if below else "."))
    return sorted(set(found))


def list_files(
    path: Path, *, top: bool = False, raw: bool = False
) -> Iterator[tuple[str, int, int]]:
    """The files that are a folder's content, or a file itself: (name below it, bytes, mtime in ns).

    Hidden files and unfinished ones (`.partial`) are none, nor are cards (`.md`) and `NOTES`.

    Args:
        path: a folder or a file.
        top: the folder is a stage's own: `RECORDS`, logs and checkpoints are left out.
        raw: no stage made the folder: `NOTES` count, and links to folders are not followed.
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
                if name.startswith(".") or name.endswith((".partial", ".md")):
                    continue
                if name in NOTES and not raw:
                    continue
                if top and not above and is_record(name):
                    continue
                if entry.is_dir(follow_symlinks=not raw):
                    waiting.append((f"{above}{name}/", Path(entry.path)))
                elif entry.is_file():
                    status = entry.stat()
                    yield above + name, status.st_size, status.st_mtime_ns


def is_record(name: str) -> bool:
    """Whether a file or folder at the top of a stage's folder is a run's record of itself."""
    return name in RECORDS or name.startswith(("checkpoint-", "finished-")) or name.endswith(".log")


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
    names, total = sorted(name for name, _, _ in list_files(path, top=top)), hashlib.sha256()
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        hashes = pool.imap(lambda name: hash_file(path / name), names, chunksize=64)
        for name, text in zip(names, hashes):
            total.update(f"{name}\0{text}\n".encode())
    return total.hexdigest()


@cache
def _hash_builtin() -> str:
    return hash_content(PACKAGE / "builtin" / "model")


def stamp_path(path: Path) -> str | None:
    """What stands for the file or folder's content; None where there is nothing."""
    if path.is_file():
        status = path.stat()
        if path.name == "meta.json" or status.st_size <= SMALL:
            return f"sha256 {hash_file(path)[:16]}"
        return f"{status.st_size} bytes, modified {status.st_mtime_ns}"
    if not path.is_dir():
        return None
    if (path / "meta.json").is_file():
        return stamp_path(path / "meta.json")
    files = sorted(list_files(path, raw=True))
    return f"{len(files)} files, {digest(files)[:16]}"


def _stamp_parameter(text: str, known: dict) -> str | None:
    """The stamp of what a parameter's text names on disk; None for ordinary text and Hub ids.

    Args:
        text: the parameter's text.
        known: stamps of folders that were looked at before, by path; filled.
    """
    if "${" in text or "\n" in text or not text.strip("./ "):
        return None
    try:
        path = resolve_path(text)
        if not path.exists():
            return None
    except (RuntimeError, ValueError):  # the home of nobody, a NUL
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # a prompt
            return None
        raise
    for folder in (path, *path.parents):
        if folder == ROOT:
            break
        if (folder / "DONE").is_file() and (folder / "stage.json").is_file():  # another run's
            return f"made by {(folder / 'DONE').read_text(encoding='utf-8').strip()[:40]}"
    if path.is_file():
        return stamp_path(path)
    if path not in known:
        known[path] = stamp_path(path)
    return known[path]


def list_labels(folder: Path) -> list[Path]:
    """The label files in a stage's folder."""
    return sorted(folder.rglob("labels-*.jsonl")) if folder.is_dir() else []


def asks_people(row: StageRow) -> bool:
    """Whether people answer in this stage's notebook: what they have said is one of its inputs."""
    return row.parameters.get("mode") == "interactive" or bool(row.parameters.get("user_study"))


# -------------------------------------------------------------------------------------- inputs


def read_inputs(
    row: StageRow, *, folder: Path, get_content: Callable, stamps: dict | None = None
) -> dict:
    """What a stage's result depends on, as it is now; plain JSON, as `stage.json` holds it.

    Args:
        row: the stage.
        folder: its folder.
        get_content: (stage, path) -> the hash of what an earlier stage made; None where that
            stage is not finished, so that nobody knows.
        stamps: what stands for folders of raw data that were looked at before; filled.

    Raises:
        RecipeError: a cell is no Python, or a job has no module or no version.
    """
    texts, stamps = list_texts(row.parameters), {} if stamps is None else stamps
    code, jobs, free = _read_notebook(row.notebook, row.notebook.stat().st_mtime_ns)
    jobs = _list_names(row, jobs, "a job")
    if any(text.startswith("builtin:") for text in texts):
        jobs.append(BUILTIN_SETS)
    inputs = {
        "format": FORMAT,
        "parameters": row.parameters,
        "defaults": row.defaults,
        "free": _list_names(row, free, "a free parameter"),
        "notebook": code,
        "versions": {job: read_version(job) for job in jobs},
        "content": {
            os.path.normpath(f"{stage}/{path}"): get_content(stage, path)
            for stage, path in list_references(row)
        },
        "files": {text: stamp for text in texts if (stamp := _stamp_parameter(text, stamps))},
    }
    if any(text.partition(":")[0] == "builtin" for text in texts):
        inputs["builtin"] = _hash_builtin()
    if BUILTIN_REMOVER in texts:
        inputs["files"][BUILTIN_REMOVER] = hash_content(PACKAGE / "builtin" / "remover")
    if asks_people(row):
        inputs["labels"] = {str(p.relative_to(folder)): hash_file(p) for p in list_labels(folder)}
    return json.loads(json.dumps(inputs, default=str))


def is_earlier(inputs: dict) -> bool:
    """Whether inputs were written by a version of the kit that read them otherwise."""
    return bool(inputs) and inputs.get("format") != FORMAT


def describe_change(before: dict, now: dict, *, labels: bool = True) -> str:
    """What differs between two `inputs`, in a few words ("parameter seed 4 -> 5"); "" for nothing.

    Args:
        before: as recorded.
        now: as read; content that nobody knows yet (None) differs from nothing.
        labels: whether labels count, which make a stage run again in the folder it has.
    """
    if is_earlier(before):
        return "made by an earlier version of the kit"
    sides, words = [_compared(inputs, now.get("free", [])) for inputs in (before, now)], []
    for part in sorted({*sides[0], *sides[1]} - ({"labels"} if not labels else set())):
        label, (old, new) = _PARTS.get(part, part), (side.get(part) for side in sides)
        if not isinstance(old, dict) or not isinstance(new, dict):
            words += [label] if old != new else []
            continue
        for name in sorted({*old, *new}):
            if part == "content" and name in new and new[name] is None:
                continue
            if part == "parameters" and _is_default(name, before, now):
                continue
            if (name in old) != (name in new) or old.get(name) != new.get(name):
                shown = (_shorten(old.get(name)), _shorten(new.get(name)))
                change = " -> ".join(shown) if part in ("parameters", "versions") else ""
                words.append(f"{label} {name} {change}".rstrip())
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")


def _compared(inputs: dict, free: list[str]) -> dict:
    """Inputs without what is recorded alone."""
    kept = {name: part for name, part in inputs.items() if name not in ("defaults", "free")}
    if isinstance(parameters := kept.get("parameters"), dict):
        parameters = _drop_free(parameters)
        kept["parameters"] = {name: parameters[name] for name in parameters if name not in free}
    return kept


def _is_default(name: str, before: dict, now: dict) -> bool:
    """Whether a parameter came or went, and where it is, is what nobody chose otherwise."""
    there = [inputs for inputs in (before, now) if name in inputs["parameters"]]
    return len(there) == 1 and there[0].get("defaults", {}).get(name, ...) == there[0][
        "parameters"
    ].get(name)


def _shorten(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:39] + "…"
