"""Write and merge triplet sets (RORem, sec. 3.1).

A set is a folder with `source/`, `mask/`, `GT/` and `meta.json`, a JSON list of records whose paths
are relative to the folder. White in a mask (at least 128) is what is to be removed. The files that
the authors publish load unchanged. A set written here never leaves its folder: files taken from
another set are hard-linked into it.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np

from rorem_lib.data.journal import Journal, JournalIndex, read_lines, write_lines, write_list
from rorem_lib.data.pictures import TripletError, link_file, save_image
from rorem_lib.data.triplets import (
    META,
    Triplet,
    check_mask,
    describe_size,
    is_hidden,
    iter_triplets,
    read_records,
    resolve_meta,
)

FOLDERS = {"source": "source", "mask": "mask", "gt": "GT"}


class TripletWriter:
    """Writes a set, item by item; killed at any moment it loses the item in work at most.

    Every item goes to the journal `meta.jsonl.partial` as soon as its files are there. `close`
    (or the end of the `with` block) folds the journal into `meta.json`, ordered by id, so that a
    set does not depend on interruptions or on the order of the work. Opened on an existing set,
    it goes on from there. Its memory holds the ids, not the records.

    Args:
        folder: the set's folder, made if missing.
        part: name of this writer's own journal where several processes write one set at once; the
            last to close is one without `part`, which folds all journals.
        restart: begin anew; what an earlier set had and this one has not is deleted at the end.
    """

    def __init__(self, folder: str | Path, *, part: str = "", restart: bool = False):
        self.folder, self._part, self._restart = Path(folder), part, restart
        self._journal = Journal(self.folder / f"meta.{part + '.' * bool(part)}jsonl.partial")
        self.folder.mkdir(parents=True, exist_ok=True)
        if restart:
            for journal in self._list_journals():
                journal.unlink()

    @functools.cached_property
    def done_ids(self) -> set[str]:
        """Ids that are in the set already."""
        old = set() if self._restart else {record["id"] for record in self._read_old()}
        return old.union(
            str(record["id"]) for path in self._list_journals() for _, record in read_lines(path)
        )

    def __enter__(self) -> TripletWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        else:
            self._journal.close()  # it keeps what was added

    def add(self, *, id: str, source, mask, gt=None, **extra) -> None:
        """Write one triplet; an id that is there already is replaced.

        Args:
            id: names the files: no `/`, no leading dot, at most 200 bytes.
            source: [H, W, 3] uint8, or the path of a file to reuse (a hard link where possible).
            mask: [H, W] uint8 (any other kind of mask is a file's), or a path.
            gt: as `source`; None in a pool.
            extra: further keys of the record (`group`, `origin`, `license`, `score`, ...).

        Raises:
            TripletError: an id that cannot name a file, arrays of different sizes, an empty mask,
                or a file of a hidden folder.
            OSError: the disk refuses; names the file.
        """
        self.add_record(write_files(self.folder, id=id, source=source, mask=mask, gt=gt, **extra))

    def add_record(self, record: dict) -> None:
        """Add a record that `write_files` returned, perhaps in another process."""
        self._journal.append(record)
        if "done_ids" in self.__dict__:  # else they are read when they are asked for
            self.done_ids.add(record["id"])

    def add_triplet(self, triplet: Triplet, **changes) -> None:
        """Take over a triplet of another set, its files reused, some keys changed or added."""
        known = {
            "id": triplet.id,
            "source": triplet.source,
            "mask": triplet.mask,
            "gt": triplet.gt,
            "group": triplet.group,
        }
        self.add(**{**triplet.extra, **known, **changes})

    def close(self, *, drop: Collection[str] = ()) -> Path:
        """Fold the journals into `meta.json` and return its path (with `part`: only stop).

        Args:
            drop: ids that do not go into the set, if they are there; their files are deleted.
        """
        self._journal.close()
        if self._part:
            return self._journal.path
        meta = self.folder / META
        leftover = set()
        with self.open_index() as index:
            for old in self._read_old():
                new = index[old["id"]] if old["id"] in index else {}
                # only files named after the id are this record's own
                leftover |= {
                    old[key]
                    for key in FOLDERS.values()
                    if old.get(key)
                    and old[key] != new.get(key)
                    and Path(old[key]).stem == old["id"]
                }
            for name in filter(index.__contains__, drop):
                leftover |= {index[name][key] for key in FOLDERS.values() if key in index[name]}
            write_list(
                meta,
                _keep_files(
                    (record for record in index.items() if record["id"] not in drop), leftover
                ),
            )
        for journal in (*self._list_journals(), self._aside):
            journal.unlink(missing_ok=True)
        for path in (*leftover, *self.folder.glob("*/.*.partial")):  # the latter a kill left
            with contextlib.suppress(OSError):
                (self.folder / path).unlink()
        return meta

    @property
    def _aside(self) -> Path:
        return self.folder / ".meta.old.jsonl"

    def open_index(self) -> JournalIndex:
        """All records so far, those of the journals too; close it, or use it in a `with` block."""
        self._aside.unlink(missing_ok=True)
        if not self._restart and (self.folder / META).is_file():
            # what `meta.json` holds is laid out as lines, which can be read at any place
            write_lines(self._aside, self._read_old())
        return JournalIndex([self._aside, *self._list_journals()])

    def _read_old(self) -> Iterator[dict]:
        """The records of `meta.json`, each with an id."""
        meta, seen = self.folder / META, set()
        for number, record in enumerate(read_records(meta) if meta.is_file() else (), 1):
            name = record.get("id")
            if name is None:  # as the reader names it
                name = Path(record.get("gt" if "inpaint" in record else "source") or "").stem
                name = f"{name}~{number}" if hash(name) in seen else name
            seen.add(hash(str(name)))
            yield {**record, "id": str(name)}

    def _list_journals(self) -> list[Path]:
        return sorted(self.folder.glob("meta.*jsonl.partial"))


def _keep_files(records: Iterable[dict], leftover: set[str]) -> Iterator[dict]:
    """Pass records on, and take the files they name out of what is to be deleted."""
    for record in records:
        leftover.difference_update(record.get(key) for key in FOLDERS.values())
        yield record


def write_files(folder: str | Path, /, *, id: str, source, mask, gt=None, **extra) -> dict:
    """Write one triplet's files into a set's folder and return its record.

    The arguments and errors are those of `TripletWriter.add`. The record is not in the set yet:
    workers write files side by side, and one writer adds their records.
    """
    folder = Path(folder)
    if not id or id != Path(id).name or id.startswith(".") or len(id.encode()) > 200:
        raise TripletError(
            f"{id!r} cannot name a triplet's files: take 1 to 200 letters "
            "without '/' and without a leading dot"
        )
    foreign = extra.keys() & {"GT", "inpaint"}
    if foreign:
        raise TripletError(f"{id}: {', '.join(foreign)} cannot be extra keys")
    parts = {"source": source, "mask": mask} | ({} if gt is None else {"gt": gt})
    arrays = {part: a for part, a in parts.items() if isinstance(a, np.ndarray)}
    if len({a.shape[:2] for a in arrays.values()}) > 1:
        raise TripletError(
            f"{id}: sizes differ: "
            + ", ".join(f"{part} {describe_size(a)}" for part, a in arrays.items())
        )
    if "mask" in arrays:
        check_mask(mask, f"mask of {id}")
    record = {"id": id}
    for part, value in parts.items():
        record[FOLDERS[part]] = _write_part(folder, id, part, value)
    return record | {key: value for key, value in extra.items() if value is not None}


def _write_part(folder: Path, name: str, part: str, value) -> str:
    place = folder / FOLDERS[part]
    place.mkdir(exist_ok=True)
    if isinstance(value, np.ndarray):
        save_image(place / f"{name}.png", value)
        return f"{FOLDERS[part]}/{name}.png"
    real = os.path.realpath(value)
    if is_hidden(os.path.dirname(real)):
        raise TripletError(
            f"{value} lies in a hidden folder: the scenes' truth never becomes a triplet"
        )
    if not os.path.isfile(real):
        raise TripletError(f"{value} is missing: {name} cannot be written without it")
    path = place / f"{name}{Path(value).suffix.lower() or '.png'}"
    link_file(real, path)
    return f"{FOLDERS[part]}/{path.name}"


def merge_sets(metas: Iterable[str | Path], folder: str | Path) -> Path:
    """Merge sets into one in `folder`, files reused; ids stay, a second of a kind gets `~2`.

    Returns:
        The new set's `meta.json`.

    Raises:
        TripletError: `folder` is one of the sets, or one of them is unsound.
    """
    metas, used = [resolve_meta(path) for path in metas], set()
    for meta in metas:  # its files would be replaced while they are read
        if meta.parent.resolve() == Path(folder).resolve():
            raise TripletError(
                f"{folder} is one of the sets to be merged: give the merged set a folder of its own"
            )
    for _ in iter_triplets(metas, require_gt=False):
        pass  # what can be seen without opening images, before a set that is there is touched
    with TripletWriter(folder, restart=True) as writer:
        for path in metas:
            for triplet in iter_triplets(path, require_gt=False, look=False):
                names = (f"{triplet.id}~{n}" if n > 1 else triplet.id for n in range(1, 10**9))
                name = next(name for name in names if name not in used)
                used.add(name)
                writer.add_triplet(triplet, id=name)
    return writer.folder / META
