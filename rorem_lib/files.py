"""Files and folders that must never be half-written: written beside and renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path


def write_text(path, text: str | Iterable[str]) -> Path:
    """Write `text` atomically: a reader or a killed writer sees the old file or the new one.

    Args:
        text: whole, or in parts that are made as they are written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # on shared storage another host may have an equal pid
    beside = path.with_name(f".{path.name}.{os.getpid()}.{socket.gethostname()}.partial")
    try:
        with open(beside, "w", encoding="utf-8") as stream:
            stream.writelines([text] if isinstance(text, str) else text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
    finally:
        beside.unlink(missing_ok=True)
    return path


def write_json(path, value) -> Path:
    """Write `value` as indented JSON, atomically (see `write_text`)."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def replace_folder(beside, path) -> Path:
    """Put a file or folder that was written `beside` in the place of `path`.

    No half of either is ever found there. A folder that is replaced has its hidden name for a
    moment before the new one has its place.
    """
    beside, path = Path(beside), Path(path)
    aside = _move_aside(path)
    os.replace(beside, path)
    shutil.rmtree(aside, ignore_errors=True)
    return path


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
        ValueError: names the file and the line where it stops being JSON.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON (line {error.lineno}: {error.msg})") from error


def hash_file(path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
