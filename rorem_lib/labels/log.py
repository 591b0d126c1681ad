"""The label log: every decision of an annotator is on the disk before the next image shows.

A label log is one append-only file an annotator, `labels-<annotator>.jsonl`, one JSON object a
line. Each line is on the disk (fsync) before the call returns, undo is a further line, and a line
torn by a crash is skipped by the reader and never glued to the next one. One writer a file means
that annotators need no lock, also on a network file system; one name at work on two machines at
once can lose labels there, as appends of two clients overwrite each other on NFS.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from rorem_lib.files import hash_file

logger = logging.getLogger(__name__)

DECISIONS = ("accept", "reject", "skip")
PREFERENCES = ("left", "same", "right")  # which of two removals, in a user study
REASONS = (
    "incomplete removal",
    "wrong content",
    "blur",
    "shadow left",
    "colour shift",
    "rest changed",
    "other",
)


class LabelError(RuntimeError):
    """A label could not be kept or read; the message says which file and how to mend it."""


class LabelsMissing(LabelError):
    """There are fewer labels than wanted. In a notebook it shows as its message alone."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


@dataclass(frozen=True, slots=True)  # thousands of them stay in memory
class Label:
    """One decision of one annotator about one candidate.

    Attributes:
        id: the candidate's id.
        label: "accept", "reject" or "skip"; of two removals "left", "same" or "right".
        annotator: whose decision; filled in by the log.
        reason: why it was rejected, one of `REASONS` or free text.
        note: free text.
        time: ISO 8601, UTC; filled in by the log.
        ms: milliseconds between the image's appearance and the decision.
        content: first 16 hex characters of the SHA-256 of the removal's file.
        order: the order under which it was drawn ("random", "uncertainty", "audit", ...).
        simulated: True if no person decided.
        repeat: True if the annotator had decided this item before (silent repeat).
    """

    id: str
    label: str
    annotator: str = ""
    reason: str | None = None
    note: str | None = None
    time: str = ""
    ms: int = 0
    content: str = ""
    order: str = "random"
    simulated: bool = False
    repeat: bool = False


class LabelLog:
    """The append-only log of one annotator in `folder` (created if missing).

    Args:
        folder: where all annotators of one candidate set keep their logs.
        annotator: 1 to 64 letters, digits, `_`, `.`, `@`, `+` or `-`; it names the file.

    Raises:
        LabelError: the name cannot name a file, its file is a symbolic link, or the folder cannot
            be made.
    """

    def __init__(self, folder: str | Path, annotator: str):
        check_name(annotator)
        self.annotator = annotator
        self.folder = Path(folder)
        self.path = self.folder / f"labels-{annotator}.jsonl"
        self._size = 0
        with _explain(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._refuse_link()  # before somebody labels, not after

    def append(
        self, item_id: str, label: str, *, content_file: str | Path | None = None, **values
    ) -> Label:
        """Write one label; when this returns, it survives a crash.

        Args:
            item_id: the candidate's id.
            label: one of `DECISIONS` or `PREFERENCES`.
            content_file: the removal's file; its hash binds the label to what was judged.
            values: further fields of `Label` (`reason`, `note`, `ms`, `order`, ...).

        Returns:
            The label as it was written, annotator and time filled in.

        Raises:
            LabelError: it is not on the disk (full, read-only, a link, ...), or not a decision, or
                a value has a type that no reader takes.
        """
        if content_file is not None:
            values["content"] = hash_content(content_file)
        return self.append_many([Label(id=item_id, label=label, **values)])[0]

    def append_many(self, labels: Iterable[Label]) -> list[Label]:
        """Write many labels with a single fsync: all or, if it raises, none of them count."""
        now = _tell_time()
        kept = [replace(x, annotator=self.annotator, time=x.time or now) for x in labels]
        for label in kept:
            known = label.label in DECISIONS + PREFERENCES
            if not known or not isinstance(label.id, str) or not label.id:
                raise LabelError(f"{label} is no decision: label must be one of {DECISIONS}")
        events = [{"event": "label", **asdict(label)} for label in kept]
        for event in events:
            if fault := find_fault(event):
                raise LabelError(f"not saved: the label of {event['id']} can't be kept: {fault}")
        self._write(events)
        return kept

    def undo(self, label: Label) -> None:
        """Take back a label, which must be the last that stands of its item: nothing is read.

        Raises:
            LabelError: it could not be written.
        """
        event = {"event": "undo", "id": label.id, "annotator": self.annotator, "time": _tell_time()}
        self._write([event])

    def read(self) -> list[Label]:
        """The labels that stand, in the order they were given."""
        self._size = self._measure()
        return replay_events(read_events(self.path))

    def was_continued(self) -> bool:
        """Whether somebody else has written to this log since it was last read or written here:
        the same name in a second notebook.

        Raises:
            LabelError: the log is shorter than it was, or gone: what it held is lost from here. Or
                a link stands in its place.
        """
        self._refuse_link()
        size = self._measure()
        if size < self._size:
            raise LabelError(
                f"not saved: {self.path} is gone, or was cut: it held {self._size} bytes and now "
                f"holds {size}. Bring the folder back (is the disk mounted?), then run this again"
            )
        return size > self._size

    def _refuse_link(self) -> None:
        with _explain(self.path):
            if self.path.is_symlink():
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))

    def _measure(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def _write(self, events: list[dict]) -> None:
        if not events:
            return
        data = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events)
        with _explain(self.path):
            self._size += _append_bytes(self.path, data.encode("utf-8", "replace"))


def check_name(annotator: str) -> None:
    """Raise LabelError where an annotator's name cannot name a file."""
    if not re.fullmatch(r"\w[\w.@+-]{0,63}", annotator):
        raise LabelError(
            f"{annotator!r} cannot name a label file: use 1 to 64 letters, digits, "
            "'_', '.', '@', '+' or '-', for example anna.m"
        )


def _tell_time() -> str:
    # Microseconds: labels are put back into their order by time when a log is exported and
    # imported, and several may fall into one millisecond.
    return datetime.now(UTC).isoformat(timespec="microseconds")


@contextlib.contextmanager
def _explain(path: Path):
    try:
        yield
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise LabelError(
                f"not saved: {path} is a symbolic link, and labels are written to no other file "
                "than their own. Put the file itself in its place, or label under another name"
            ) from error
        gone = isinstance(error, FileNotFoundError)
        mend = "Bring the folder back" if gone else "Free some space or make the folder writable"
        raise LabelError(
            f"not saved: {path} cannot be written ({error.strerror or error}). {mend}, then label "
            "this image again"
        ) from error


def _append_bytes(path: Path, data: bytes) -> int:
    """Returns how many bytes longer the file is, once they are on the disk."""
    # Opened anew for each line: a log that was moved away or replaced is never written blindly, nor
    # is another file through a link in its place.
    new = not os.path.lexists(path)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o644)
    try:
        start = os.fstat(descriptor).st_size
        if start:
            os.lseek(descriptor, start - 1, os.SEEK_SET)
            if os.read(descriptor, 1) != b"\n":
                data = b"\n" + data  # the line before was torn by a crash: leave it alone
        written = 0
        try:
            while written < len(data):
                written += os.write(descriptor, data[written:])
            os.fsync(descriptor)
        except OSError:
            # What is reported as not saved should not turn up as a label later on. A network file
            # system may have taken the whole line, and kept a part of it when its disk is full.
            with contextlib.suppress(OSError):
                if start < os.fstat(descriptor).st_size <= start + len(data):
                    os.ftruncate(descriptor, start)
            raise
    finally:
        os.close(descriptor)
    if new:
        with contextlib.suppress(OSError):  # not every file system can sync a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    return len(data)


def read_events(path: str | Path) -> list[dict]:
    """The events of one log, whole lines only; a missing log has none."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return parse_events(lines, path)


def parse_events(lines: Iterable[bytes | str], path: str | Path) -> list[dict]:
    """The events among a log's lines; `path` is named in the warning about the others."""
    events, torn = [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        if find_fault(event):
            torn += 1
        else:
            events.append(event)
    if torn:
        logger.warning("%s: %d torn or foreign line(s) skipped", path, torn)
    return events


_TYPES = {
    **dict.fromkeys(("id", "label", "annotator", "time", "content", "order"), str),
    **dict.fromkeys(("reason", "note"), (str, type(None))),
    **dict.fromkeys(("simulated", "repeat"), bool),
    "ms": (int, float),
}


def find_fault(event) -> str:
    """Why no reader takes this for an event of a log; "" where all do. Writers ask it too."""
    if not isinstance(event, dict) or event.get("event") not in ("label", "undo"):
        return "it is neither a label nor an undo"
    if not event.get("id"):
        return "it has no id"
    for name, kind in _TYPES.items():
        if name in event and not isinstance(event[name], kind):
            return f"{name} can't be {event[name]!r}"
    return ""


def replay_events(events: Iterable[dict]) -> list[Label]:
    """The labels that stand after all `events`, in the order they were given."""
    names = {field.name for field in fields(Label)}
    standing: dict[int, Label] = {}
    of_item: dict[tuple, list[int]] = defaultdict(list)
    for place, event in enumerate(events):
        stack = of_item[event.get("annotator", ""), event["id"]]
        if event["event"] == "undo":
            if stack:
                standing.pop(stack.pop(), None)
            continue
        stack.append(place)  # also a word that is not known here: its undo takes back no other
        if event.get("label") in DECISIONS + PREFERENCES:
            standing[place] = Label(**{k: v for k, v in event.items() if k in names})
    last = {(x.annotator, x.id, x.repeat): place for place, x in standing.items()}
    return [standing[place] for place in sorted(last.values())]


def read_labels(folder: str | Path) -> list[Label]:
    """The labels that stand, of every annotator in `folder`; one an annotator and item.

    Undone labels are left out, a second label of the same item replaces the first, silent
    repeats stand beside it (`repeat=True`). A missing folder holds no labels.
    """
    logs = sorted(Path(folder).glob("labels-*.jsonl"))
    return [label for log in logs for label in replay_events(read_events(log))]


def hash_content(path: str | Path) -> str:
    """The 16 hex characters that bind a label to the removal that was judged."""
    status = os.stat(path)
    return _hash_version(str(path), status.st_size, status.st_mtime_ns)


@functools.cache  # a widget asks for all of them again and again
def _hash_version(path: str, size: int, modified: int) -> str:
    return hash_file(path)[:16]


def split_stale(labels: Iterable[Label], triplets: Iterable) -> tuple[list[Label], list[Label]]:
    """Separate labels that belong to these candidates from labels of removals that are gone.

    A candidate generated anew keeps its id but not its content: its old label must not count.

    Returns:
        (current, stale). Labels without a content hash are taken as current if their id exists.
    """
    paths = {triplet.id: triplet.gt for triplet in triplets}
    hashes: dict[str, str] = {}
    current, stale = [], []
    for label in labels:
        known = label.id in paths
        if known and label.content:
            if label.id not in hashes:
                with contextlib.suppress(FileNotFoundError):
                    hashes[label.id] = hash_content(paths[label.id])
            known = hashes.get(label.id) == label.content
        (current if known else stale).append(label)
    return current, stale
