"""Files and folders: where they are, and written so that none is ever found half-written."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
LOCK = ".lock"
_locks: set = set()  # open files that this process holds a lock by
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# How libraries that do not raise OSError say that a file could not be written to its end.
_FULL_WORDS = re.compile(
    r"No space left|quota exceeded|File too large|PytorchStreamWriter failed"
    r"|file write failed|unexpected pos",
    re.IGNORECASE,
)
# Absolute paths in a text: two folders or more, so that `/m/01g317`, a class, is none.
_PATH = re.compile(r"(?<![\w:/.~-])(?:file://|~)?(?:/[^/\s\"'`<>|,;:()]+){3,}")
_WINDOWS_PATH = re.compile(r"(?<!\w)(?:[A-Za-z]:|\\)\\[^\s\"'`<>|,;:()]+")


def resolve_path(path) -> Path:
    """An absolute path; a relative one counts from the repository root, wherever Python runs."""
    return ROOT / Path(path).expanduser()


def find_file(path) -> Path:
    """A file that a person names: from the working folder, which in JupyterLab and VS Code is the
    notebook's own, or, where there is none, from the repository.

    Raises:
        FileNotFoundError: it is in neither; names both places.
    """
    here, there = Path(path).expanduser().absolute(), resolve_path(path)
    for found in (here, there):
        if found.is_file():
            return found
    also = f", nor is {there}" if there != here else ""
    raise FileNotFoundError(f"{here} is no file{also}: a relative path counts from {Path.cwd()}")


def find_cache() -> Path:
    """Where caches live: `$ROREM_CACHE`, by default `~/.cache/rorem`.

    Where that cannot be written (a container's user without a home, a disk that is read-only) it is
    a folder of the user's own among the temporary ones, with a warning.

    Raises:
        OSError: that cannot be written either; names the variables to set.
    """
    given = os.environ.get("ROREM_CACHE") or "~/.cache/rorem"
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home is known
        path = Path(given).expanduser().absolute()
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
    return _make_temporary_cache(given)


@functools.cache
def _make_temporary_cache(given: str) -> Path:
    words = "no cache can be written: set ROREM_CACHE (or TMPDIR) to a folder with room"
    try:
        path = Path(tempfile.gettempdir(), f"rorem-{os.getuid()}")
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"{words}; {error.strerror}") from error
    if path.is_symlink() or path.stat().st_uid != os.getuid():  # another user's trap
        raise PermissionError(errno.EPERM, f"{words}; {path} is another user's")
    logger.warning("%s cannot be written: caches are in %s (set ROREM_CACHE)", given, path)
    return path


def write_text(path, text: str | Iterable[str]) -> Path:
    """Write `text` atomically: a reader or a killed writer sees the old file or the new one.

    Args:
        text: whole, or in parts that are made as they are written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # on shared storage another host may have an equal pid
    tmp_path = path.with_name(f".{path.name}.{os.getpid()}.{socket.gethostname()}.partial")
    try:
        with open(tmp_path, "w", encoding="utf-8") as stream:
            stream.writelines([text] if isinstance(text, str) else text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(tmp_path, path)
        flush(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
    finally:
        tmp_path.unlink(missing_ok=True)
    return path


def write_json(path, value) -> Path:
    """Write `value` as indented JSON, atomically (see `write_text`).

    Raises:
        ValueError: it holds NaN or infinity, which JSON has no word for (`clean_metrics`).
    """
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path} is not written: {error}") from error
    return write_text(path, text + "\n")


def replace_folder(tmp_path, path) -> Path:
    """Put a file or folder that was written at `tmp_path` in the place of `path`.

    No half of either is ever found there, and the new name is on the disk. A folder that is
    replaced has its hidden name for a moment before the new one has its place.
    """
    tmp_path, path = Path(tmp_path), Path(path)
    aside = _move_aside(path)
    os.replace(tmp_path, path)
    flush(path.parent)
    shutil.rmtree(aside, ignore_errors=True)
    return path


def set_aside(path) -> Path:
    """Give a file or folder a name that says when it was put away; returns the new path."""
    path, stamp = Path(path), f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    names = (f"{path.name}.{stamp}{n or ''}" for n in itertools.count())
    target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    os.rename(path, target)
    return target


def is_filled(path: Path) -> bool:
    """Whether something lies at a path: a file, a link, or a folder with anything in it."""
    return any(path.iterdir()) if path.is_dir() else os.path.lexists(path)


def remove_folder(path) -> None:
    """Remove a folder, if it is there; a killed process leaves all of it or nothing of it."""
    shutil.rmtree(_move_aside(Path(path)), ignore_errors=True)


def _move_aside(path: Path) -> Path:
    """The hidden name that a folder gets before it is removed: no half of it is ever found."""
    aside = path.with_name(f".{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if path.is_dir():
        os.rename(path, aside)
    return aside


def read_json(path):
    """Read a JSON file.

    Raises:
        FileNotFoundError: names the missing file.
        ValueError: names the file and the line where it stops being JSON; or it is larger than
            `ROREM_MAX_JSON_MB` (512), or nested too deeply.
    """
    try:
        size, most = os.path.getsize(path), read_limit("ROREM_MAX_JSON_MB", 512)
        if size > most * 1e6:
            raise ValueError(f"{path} has {size:,} bytes: set ROREM_MAX_JSON_MB above {most:g}")
        with open(path, "rb") as stream:
            text = Shallow(stream, path).read().decode()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start})") from None
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON (line {error.lineno}: {error.msg})") from error
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{path} cannot be read: {error}") from None


class JsonLimitError(ValueError):
    """JSON that costs more than it can be worth; the message names the file."""


class Shallow:
    """A stream of JSON, to be read by a parser, that refuses lists in lists without end.

    Parsers take memory for every level (ijson the square of it) or crash.

    Args:
        stream: bytes.
        name: for the message.
        room: the most bytes of one object, for a reader that sets `since` to 0 behind each.

    Attributes:
        since: bytes that were read since.
    """

    most = 100  # levels; records have five

    def __init__(self, stream, name, *, room: float = math.inf):
        self._stream, self._name, self._room = stream, name, room
        self._depth, self._quoted, self._held, self.since = 0, False, b"", 0

    def read(self, size: int = -1) -> bytes:
        """As a file's.

        Raises:
            JsonLimitError: what was read is nested deeper than `most`, or larger than `room`.
        """
        data = self._stream.read(size)
        self.since += len(data)
        if self.since > self._room:
            raise JsonLimitError(f"{self._name} has an object of more than {self._room:,} bytes")
        # Backslashes stand in texts alone; without them every quotation mark opens or ends one.
        text = (self._held + data).replace(b"\\\\", b"")
        self._held = b"\\" if text.endswith(b"\\") else b""
        parts = text.removesuffix(b"\\").replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[self._quoted :: 2])
        self._quoted ^= len(parts) % 2 == 0
        for bracket in outside.translate(None, _NO_BRACKETS):
            self._depth += 1 if bracket in b"[{" else -1
            if self._depth > self.most:
                raise JsonLimitError(f"{self._name} is nested deeper than {self.most} levels")
        return data


_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def parse_json(text: str | bytes):
    """`json.loads`, without the NaN and the infinities that Python alone reads and writes.

    Raises:
        json.JSONDecodeError: it is no JSON.
    """

    def refuse(name):
        found = text.decode() if isinstance(text, bytes) else text
        place = re.search(rf"(?<![\w\"])-?{name.lstrip('-')}(?![\w\"])", found)
        raise json.JSONDecodeError(f"{name} is no JSON", found, place.start() if place else 0)

    return json.loads(text, parse_constant=refuse)


def hash_file(path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_full(error: BaseException) -> bool:
    """Whether an error of torch, safetensors or the system means that the disk is full."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return _FULL_WORDS.search(str(error)) is not None


def flush(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk before what comes next."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        # some network file systems have no word for it, and keep a folder's names themselves
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not os.path.isdir(path):
            raise
    finally:
        os.close(number)


def flush_folder(folder: Path) -> None:
    """`flush` of everything below a folder, and of the folder."""
    below = sorted(folder.rglob("*"))
    for path in [p for p in below if p.is_file()] + [p for p in below if p.is_dir()] + [folder]:
        flush(path)


def flush_disk(folder: Path) -> None:
    """Have all that was written so far to the file system of `folder` on its disk.

    One call, whatever the number of files: each `flush` makes the disk empty its cache.

    Raises:
        OSError: what was written cannot be kept; names the folder.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "syncfs"):  # not Linux
        os.sync()
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        if library.syncfs(number):
            code = ctypes.get_errno()
            raise OSError(code, f"cannot flush {folder}: {os.strerror(code)}")
    finally:
        os.close(number)


@contextlib.contextmanager
def lock_folder(folder) -> Iterator[None]:
    """A block in which no other process works in `folder`, which is made if it is missing.

    A process that is at work holds the file `.lock` in it; the kernel lets go of it when the
    process ends, in any way. A file system without locks gets a warning, and the work goes on.

    Raises:
        BlockingIOError: another process is at work there; says its pid, its host and since when.
    """
    path = Path(folder) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                stream.seek(0)
                who = stream.read().decode(errors="replace") or "another process"
                raise BlockingIOError(
                    f"{who} is at work in {folder}: wait for it, end it, or choose another folder"
                ) from None
            logger.warning(
                "%s cannot be locked (%s): see that no other process works there",
                folder,
                error.strerror,
            )
        _locks.add(stream)
        with contextlib.suppress(OSError):  # a full disk; the lock itself stands
            stream.truncate(0)
            stream.write(
                f"process {os.getpid()} on {socket.gethostname()}, since {format_time()},".encode()
            )
        try:
            yield
        finally:
            _locks.discard(stream)
            with contextlib.suppress(OSError):  # what was done is done
                stream.truncate(0)
                fcntl.flock(stream, fcntl.LOCK_UN)  # a child may have its copy still open


def _drop_locks() -> None:
    """In a process that was forked, such as a data loader's: it must not hold what its parent holds
    for longer than the parent lives."""
    for stream in _locks:
        stream.close()
    _locks.clear()


os.register_at_fork(after_in_child=_drop_locks)


def format_time(seconds: float | None = None) -> str:
    """A moment (default: now) as UTC in ISO 8601, to the second."""
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="seconds")


def hide_paths(value):
    """`value` for publication: of absolute paths of files, in texts too, the last two names.

    So `/home/anna/runs/human_1/remover` becomes `human_1/remover`. Lists and tables are opened.
    """
    if isinstance(value, dict):
        return {key: hide_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [hide_paths(part) for part in value]
    if not isinstance(value, str):
        return value
    alone = value.startswith(("/", "~/", "file://")) and value.count("/") > 1
    if alone and "\n" not in value and " /" not in value:  # its names may hold spaces
        return _hide_path(value)
    for pattern in (_PATH, _WINDOWS_PATH):
        value = pattern.sub(lambda match: _hide_path(match[0]), value)
    return value


def _hide_path(text: str) -> str:
    if text.count("/") == 2 and not os.path.exists(text):  # /m/01g317 is a class
        return text
    return "/".join(re.split(r"[/\\]", text.rstrip("/\\"))[-2:]).lstrip("/")


def clean_metrics(value):
    """`value` as plain JSON: NumPy and torch values opened, NaN and infinity as None."""
    if isinstance(value, dict):
        return {str(k): clean_metrics(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [clean_metrics(v) for v in value]
    if hasattr(value, "tolist"):
        return clean_metrics(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def read_limit(name: str, default: float) -> float:
    """A limit on what a file may cost: the environment variable `name`, else `default`.

    Raises:
        ValueError: the variable is no number above 0.
    """
    given = os.environ.get(name) or default
    try:
        value = float(given)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ValueError(f"{name} is {given!r}: give a number above 0")
    return value
