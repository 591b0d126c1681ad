"""Journals: what a long job has done so far, as JSON lines that survive a kill.

A line is appended as soon as an item is done. At the end `JournalIndex` gives the objects in the
order of their ids, so that the result does not depend on interruptions, on the order of the work or
on how many processes did it. Only ids and positions are held in memory, never the objects. What
libraries write as JSON lines is whole when they close it; this is whole after every line.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from rorem_lib.files import parse_json, write_text

logger = logging.getLogger(__name__)

_SHIFT = 48  # a position is (file number, offset) in one integer: half the memory of a tuple


class Journal:
    """Appends objects to a file of JSON lines; what a kill has torn is taken away first.

    Args:
        path: the file, made at the first `append`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._stream = None

    def append(self, record: dict) -> dict:
        """Add one object and return it as it will be read back.

        Raises:
            OSError: the disk refuses; the file holds whole lines only, or one torn at its end.
            ValueError: the object holds NaN or infinity, which are no JSON; nothing is written.
        """
        line = _format_line(record)
        if self._stream is None:
            self._stream = open(self.path, "ab", buffering=0)
            self._stream.truncate(_find_end(self.path))
        end = self._stream.tell()
        data = line.encode()
        try:
            written = self._stream.write(data)
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}") from error
        if written != len(data):
            self._stream.truncate(end)
            raise OSError(errno.ENOSPC, f"cannot write {self.path}: no space left")
        return json.loads(line)

    def close(self) -> None:
        """Close the file; the next `append` opens it again."""
        if self._stream:
            self._stream.close()
            self._stream = None


def _format_line(record: dict) -> str:
    try:
        text = json.dumps(
            record, ensure_ascii=False, allow_nan=False, default=lambda value: value.item()
        )
    except ValueError as error:
        raise ValueError(f"record {record.get('id')} cannot be written: {error}") from error
    return text + "\n"


def _find_end(path: Path) -> int:
    """The length of a file's whole lines."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        while size:
            start = max(0, size - 65536)
            stream.seek(start)
            found = stream.read(size - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            size = start
    return 0


def read_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """(offset, object) of every whole line that has an id; others are skipped with a warning.

    Such are what a kill or a lost power has torn, and lines with NaN of an earlier version.
    """
    with open(path, "rb") as stream:
        offset = 0
        for line in stream:
            if line.endswith(b"\n"):
                try:
                    record = parse_json(line)
                    record["id"]
                    yield offset, record
                except (ValueError, KeyError, TypeError):
                    logger.warning("%s: a torn line was skipped", path)
            offset += len(line)


class JournalIndex:
    """Where each id's newest object stands in some journals.

    Args:
        paths: journals, which may be missing; a later one's object replaces an earlier one's of
            the same id.
    """

    def __init__(self, paths: Iterable[Path]):
        self._paths = [path for path in paths if path.exists()]
        self._places: dict[str, int] = {}
        for number, path in enumerate(self._paths):
            for offset, record in read_lines(path):
                self._places[str(record["id"])] = number << _SHIFT | offset
        self._streams = [open(path, "rb") for path in self._paths]

    def __len__(self):
        return len(self._places)

    def __contains__(self, name):
        return name in self._places

    def __enter__(self) -> JournalIndex:
        return self

    def __exit__(self, *_):
        for stream in self._streams:
            stream.close()

    def __getitem__(self, name: str) -> dict:
        place = self._places[name]
        stream = self._streams[place >> _SHIFT]
        stream.seek(place & ((1 << _SHIFT) - 1))
        return json.loads(stream.readline())

    def list_ids(self) -> list[str]:
        """All ids, in order."""
        return sorted(self._places)

    def items(self) -> Iterator[dict]:
        """All objects, ordered by id."""
        for name in self.list_ids():
            yield self[name]


def write_list(path: str | Path, records: Iterable[dict]) -> Path:
    """Write objects as a JSON list, one a line, atomically and without holding them all.

    Raises:
        OSError: names the file; the old one is still there.
    """

    def format_list():
        comma = ""
        yield "["
        for record in records:
            yield f"{comma}\n {_format_line(record)[:-1]}"
            comma = ","
        yield "\n]\n" if comma else "]\n"

    return write_text(path, format_list())


def write_lines(path: str | Path, records: Iterable[dict]) -> Path:
    """As `write_list`, as JSON lines."""
    return write_text(path, map(_format_line, records))
