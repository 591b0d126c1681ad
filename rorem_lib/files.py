"""Files and folders: where they are, and written so that none is ever found half-written."""

from __future__ import annotations

import contextlib
import errno
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
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# How libraries that do not raise OSError say that a file could not be written to its end.
_FULL_WORDS = re.compile(
    r"No space left|quota exceeded|File too large|PytorchStreamWriter failed"
    r"|file write failed|unexpected pos",
    re.IGNORECASE,
)


def resolve_path(path) -> Path:
    """An absolute path; a relative one counts from the repository root, wherever Python runs."""
    return ROOT / Path(path).expanduser()


def find_cache() -> Path:
    """Where caches live: `$ROREM_CACHE`, by default `~/.cache/rorem`.

    Where that cannot be written (a container's user without a home) it is a folder of the user's
    own among the temporary ones, with a warning.

    Raises:
        OSError: that cannot be written either; names the variables to set.
    """
    if given := os.environ.get("ROREM_CACHE"):
        return Path(given).expanduser().absolute()
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home is known
        path = Path("~/.cache/rorem").expanduser().absolute()
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
    return _make_temporary_cache()


@functools.cache
def _make_temporary_cache() -> Path:
    words = "no cache can be written: set ROREM_CACHE (or TMPDIR) to a folder with room"
    try:
        path = Path(tempfile.gettempdir(), f"rorem-{os.getuid()}")
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"{words}; {error.strerror}") from error
    if path.is_symlink() or path.stat().st_uid != os.getuid():  # another user's trap
        raise PermissionError(errno.EPERM, f"{words}; {path} is another user's")
    logger.warning("~/.cache cannot be written: caches are in %s (set ROREM_CACHE)", path)
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
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
    finally:
        tmp_path.unlink(missing_ok=True)
    return path


def write_json(path, value) -> Path:
    """Write `value` as indented JSON, atomically (see `write_text`)."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def replace_folder(tmp_path, path) -> Path:
    """Put a file or folder that was written at `tmp_path` in the place of `path`.

    No half of either is ever found there. A folder that is replaced has its hidden name for a
    moment before the new one has its place.
    """
    tmp_path, path = Path(tmp_path), Path(path)
    aside = _move_aside(path)
    os.replace(tmp_path, path)
    shutil.rmtree(aside, ignore_errors=True)
    return path


def set_aside(path) -> Path:
    """Give a file or folder a name that says when it was put away; returns the new path."""
    path, stamp = Path(path), f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    names = (f"{path.name}.{stamp}{n or ''}" for n in itertools.count())
    target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    os.rename(path, target)
    return target


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
        return json.loads(text)
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
    finally:
        os.close(number)


def flush_folder(folder: Path) -> None:
    """`flush` of everything below a folder, and of the folder."""
    below = sorted(folder.rglob("*"))
    for path in [p for p in below if p.is_file()] + [p for p in below if p.is_dir()] + [folder]:
        flush(path)


def format_time(seconds: float | None = None) -> str:
    """A moment (default: now) as UTC in ISO 8601, to the second."""
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="seconds")


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
