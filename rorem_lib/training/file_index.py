"""What files hold, without reading them again: SHA-256 by path, kept as long as they are unchanged.

A file is read again where its size or its times of modification and change are others. No program
can set the time of change back, so changed content is not missed; inodes tell nothing, since FUSE
invents them at every mount. One process of a job writes the index; the others wait for it by
looking at its files. Several jobs may write it at once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rorem_lib.data.pictures import TripletError
from rorem_lib.files import hash_file, write_text
from rorem_lib.workers import Progress, group_chunks, wait_for

logger = logging.getLogger(__name__)

SAVE_SECONDS = 60.0  # hashes are kept at least so often: a kill loses no more


class FileIndex:
    """Hashes of files by path, in a few JSON files of a folder.

    Each file holds `{folder: {name: [stat, sha256]}}` of the folders that fall to it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._rows: dict[Path, dict[str, dict[str, Sequence[str]]]] = {}  # what each shelf holds
        self._seen: dict[Path, tuple | None] = {}  # the state in which a file was read

    def _find_shelf(self, path: str) -> Path:
        return _shelve(self.folder, os.path.dirname(path))

    def refresh(self, paths: Iterable[str]) -> bool:
        """Read what changed of the files that may know `paths`; whether there was any."""
        changed = False
        for shelf in {self._find_shelf(path) for path in paths}:
            try:
                state = shelf.stat()
                state = (state.st_mtime_ns, state.st_size, state.st_ino)
            except FileNotFoundError:
                state = None
            if state is not None and state != self._seen.get(shelf):
                changed = True
                _merge(self._rows.setdefault(shelf, {}), _read_shelf(shelf))
            self._seen[shelf] = state
        return changed

    def find(self, path: str, stat: str) -> str | None:
        """The hash of a file that has that `describe_stat`, or None."""
        parent, name = os.path.split(path)
        names = self._rows.get(_shelve(self.folder, parent), {}).get(parent, {})
        known, value = names.get(name, ("", None))
        return value if known == stat else None

    def save(self, rows: dict[str, tuple[str, str]], *, prune: bool = False) -> None:
        """Keep path -> (stat, hash), beside what others have kept in the meantime.

        Two processes that save at once may each miss the other's rows. So all that is known of a
        shelf is written, not `rows` alone: what was lost comes back with the next save.

        Args:
            prune: forget the folders that are gone.

        Raises:
            OSError: the index cannot be written; names the file.
        """
        shelves = defaultdict(lambda: defaultdict(dict))
        for path, row in rows.items():
            parent, name = os.path.split(path)
            shelves[self._find_shelf(path)][parent][name] = row
        for shelf, folders in shelves.items():
            known = self._rows.setdefault(shelf, {})
            _merge(known, _read_shelf(shelf))
            _merge(known, folders)
            if prune:
                known = {p: names for p, names in known.items() if os.path.isdir(p)}
            write_text(shelf, json.dumps(known))


@functools.lru_cache(4096)
def _shelve(folder: Path, parent: str) -> Path:
    return folder / f"{hashlib.sha256(os.fsencode(parent)).hexdigest()[:2]}.json"


def _read_shelf(shelf: Path) -> dict:
    try:
        return json.loads(shelf.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        logger.warning("%s is damaged: the files it knew are read again", shelf)
        return {}


def _merge(known: dict[str, dict], newer: dict[str, dict]) -> None:
    for parent, names in newer.items():
        known.setdefault(parent, {}).update(names)


def describe_stat(path: str | Path) -> str:
    """Size and times of a file: what changes when its content does."""
    try:
        state = os.stat(path)
    except FileNotFoundError:
        raise TripletError(f"{path} does not exist", file=Path(path)) from None
    return f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"


def _describe_all(paths: list[str]) -> list[str]:
    return [describe_stat(path) for path in paths]


def _hash(path: str) -> tuple[str, str]:
    before = ""
    while before != (stat := describe_stat(path)):  # again where it changed while it was read
        before, value = stat, hash_file(path)
    return stat, value


def hash_files(
    paths: Sequence[Path], folder: Path, *, heartbeat: Path | None = None, threads: int = 8
) -> list[tuple[str, str]]:
    """SHA-256 of files; only those that the index in `folder` does not know are read.

    Args:
        paths: the files.
        folder: where the index lies.
        heartbeat: None hashes; else this process waits until the one with this
            `workers.Heartbeat` has done so, and hashes what is missing once that one is gone.

    Returns:
        (`describe_stat`, hash in hex) of each.

    Raises:
        TripletError: a file does not exist.
        TimeoutError: the process that hashes is gone, or its `folder` is another one: there is
            none here.
        OSError: the index cannot be written; names the file.
    """
    index = FileIndex(folder)
    names = [os.path.abspath(path) for path in paths]
    found: dict[str, tuple[str, str]] = {}
    missing = list(dict.fromkeys(names))
    with ThreadPoolExecutor(threads) as pool:

        def look():
            nonlocal missing
            if index.refresh(missing):
                chunks = list(group_chunks(missing, 512))  # a future a file would take far longer
                for chunk, stats in zip(chunks, pool.map(_describe_all, chunks)):
                    found.update(
                        {
                            path: (stat, value)
                            for path, stat in zip(chunk, stats)
                            if (value := index.find(path, stat))
                        }
                    )
                missing = [path for path in missing if path not in found]
            return [heartbeat] * bool(missing)

        look()
        if heartbeat is not None:
            try:
                wait_for(look)
            except TimeoutError:  # it has ended, and another job has overwritten its rows
                if not folder.is_dir():
                    raise
        if missing:
            found |= _hash_missing(missing, index, pool)
    return [found[name] for name in names]


def _hash_missing(missing: list[str], index: FileIndex, pool) -> dict[str, tuple[str, str]]:
    progress, saved = Progress("files hashed", len(missing)), time.monotonic()
    found, rows = {}, {}
    try:
        for chunk in group_chunks(missing, 256):
            for path, row in zip(chunk, pool.map(_hash, chunk)):
                rows[path] = found[path] = row
            progress.add(len(chunk))
            if time.monotonic() - saved > SAVE_SECONDS:
                index.save(rows)
                saved, rows = time.monotonic(), {}
    finally:
        if rows:
            index.save(rows, prune=True)
    return found
