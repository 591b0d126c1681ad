"""The folder that `rorem remove` writes into, and the journal there of what it wrote.

A result is known by its content: `.rorem/removals.jsonl` beside the results has, for each, what it
was made from and the SHA-256 of its bytes. Only such files are ever replaced, by a result of the
same image; nothing else is, unless the user says so.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from rorem_lib.data.items import escape_text
from rorem_lib.data.journal import Journal, read_lines
from rorem_lib.files import flush, hash_file, lock_folder

STATE = ".rorem"  # the folder in that of the results with lock, journal and unfinished files
JOURNAL = "removals.jsonl"


class Unusable(ValueError):
    """An image that cannot be worked on; the message says why and what to do."""


def complain(text: str) -> None:
    """A line on standard error, whatever bytes a file's name has."""
    print(escape_text(text), file=sys.stderr, flush=True)


def list_results(folder: Path) -> set[str]:
    """Names in a folder that `rorem remove` wrote, by its journal there."""
    journal = folder / STATE / JOURNAL
    return {str(r["id"]) for _, r in read_lines(journal)} if journal.is_file() else set()


@contextlib.contextmanager
def open_results(folder: Path, inputs: Iterable[Path], overwrite: bool) -> Iterator[Results]:
    """A block with the `Results` of a folder, which is made, and locked for other processes.

    Raises:
        OSError: it cannot be written; names it.
        BlockingIOError: another process is at work there.
    """
    state = folder / STATE
    for path in (state, state / JOURNAL):
        if path.is_symlink():
            raise OSError(errno.ELOOP, f"{path} is a link: remove it")
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot write into {folder}: {error.strerror}") from error
    with lock_folder(state), contextlib.closing(Journal(state / JOURNAL)) as journal:
        yield Results(folder, journal, inputs, overwrite)


class Results:
    """What was done in the folder, what may be written there, and writing it (`open_results`)."""

    def __init__(self, folder: Path, journal: Journal, inputs: Iterable[Path], overwrite: bool):
        """Args:
        folder: where the results go, locked.
        journal: of what this command wrote there.
        inputs: images and masks, none of which is ever written over.
        overwrite: replace files that this command did not write.
        """
        self.folder, self.overwrite, self._journal = folder, overwrite, journal
        states = filter(None, map(_look, inputs))
        self._inputs = {(state.st_dev, state.st_ino) for state in states}
        self._entries: dict[str, list[dict]] = {}
        if journal.path.exists():
            for _, record in read_lines(journal.path):
                self._entries.setdefault(str(record["id"]), []).append(record)

    def is_done(self, name: str, key: str) -> bool:
        """Whether the file `name` is the result of `key`, as it was written."""
        return any(entry.get("key") == key for entry in self._find_entries(name))

    def _find_entries(self, name: str) -> Iterator[dict]:
        """The journal's lines about the very file that is there under a name."""
        path, entries = self.folder / name, self._entries.get(escape_text(name), [])
        state = _look(path, follow=False)
        if not entries or state is None or not stat.S_ISREG(state.st_mode):
            return
        digest = None
        for entry in reversed(entries):
            if entry.get("size") != state.st_size:
                continue
            if entry.get("mtime_ns") != state.st_mtime_ns:  # copied, or changed
                digest = digest or hash_file(path)
                if entry.get("sha256") != digest:
                    continue
            yield entry

    def check_free(self, name: str, source: Path) -> None:
        """Whether the result of an image may be written under a name.

        Raises:
            Unusable: something is there that is not to be replaced.
        """
        path = self.folder / name
        state = _look(path, follow=False)
        if state is None:
            return
        if (state.st_dev, state.st_ino) in self._inputs:
            raise Unusable(f"{path} is an image or mask that is read: choose another -o")
        if stat.S_ISDIR(state.st_mode):
            raise Unusable(f"{path} is a folder: choose another -o")
        ours = any(e.get("source") == self._describe(source) for e in self._find_entries(name))
        if not ours and not self.overwrite:
            raise Unusable(
                f"{path} is there already and no result of {source}: choose another -o, or give "
                "--overwrite"
            )

    def _describe(self, source: Path) -> str:
        return escape_text(os.path.relpath(os.path.realpath(source), self.folder.resolve()))

    def write(self, name: str, data: bytes, *, source: Path, key: str) -> None:
        """Write a result; a killed process leaves all of it, or nothing.

        Its line in the journal comes first: a file without a line would not be known again.

        Raises:
            Unusable: see `check_free`.
            OSError: the disk refuses; names the file.
        """
        self.check_free(name, source)
        path, partial = self.folder / name, self.folder / STATE / "unfinished"
        try:
            partial.unlink(missing_ok=True)
            with open(partial, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            entry = {
                "id": escape_text(name),
                "source": self._describe(source),
                "key": key,
                "sha256": hashlib.sha256(data).hexdigest(),
                "size": len(data),
                "mtime_ns": partial.stat().st_mtime_ns,
            }
            self._journal.append(entry)
            flush(self._journal.path)
            os.replace(partial, path)
            self._entries.setdefault(entry["id"], []).append(entry)
        except OSError as error:
            raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
        finally:
            partial.unlink(missing_ok=True)


def _look(path: Path, *, follow: bool = True) -> os.stat_result | None:
    """What lies at a path; None where nothing does."""
    try:
        return os.stat(path, follow_symlinks=follow)
    except OSError:
        return None
