"""Write and merge triplet sets (RORem, sec. 3.1).

A set is a folder with `source/`, `mask/`, `GT/` and `meta.json`, a JSON list of records whose paths
are relative to the folder. White in a mask (at least 128) is what is to be removed. The files that
the authors publish load unchanged. A set written here never leaves its folder: files taken from
another set are hard-linked into it.

The file `.rorem-set` marks a folder as one of these sets. Nothing is written into a set without it,
and of one with it only what its own records name is ever deleted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from rorem_lib.data.journal import Journal, JournalIndex, read_lines, write_lines, write_list
from rorem_lib.data.pictures import TripletError, link_file, save_image
from rorem_lib.data.triplets import (
    BYTES_SHA256,
    META,
    Triplet,
    check_id,
    check_ids,
    check_mask,
    describe_size,
    is_hidden,
    iter_triplets,
    read_records,
    resolve_meta,
)
from rorem_lib.files import flush_disk, hash_file, is_filled, lock_folder, write_text
from rorem_lib.workers import group_chunks

logger = logging.getLogger(__name__)

FOLDERS = {"source": "source", "mask": "mask", "gt": "GT"}
OWNED = ".rorem-set"
_RECENT = 120  # s before a journal's end: what a lost power may have torn, its size right or not


def claim_set(folder: str | Path, *, known: bool = False) -> Path:
    """Mark a folder, made if missing, as a set whose files the writer may replace and delete.

    Args:
        known: the set is known to be ours by a record of its job that lies in it.

    Returns:
        The folder.

    Raises:
        TripletError: it holds a set, or images where the writer's would go, that are somebody's.
    """
    folder = Path(folder)
    for name in FOLDERS.values():
        if (folder / name).is_symlink():
            raise TripletError(
                f"{folder / name} is a link, through which another folder's files would be "
                "replaced: choose another folder, or remove the link"
            )
    if (folder / OWNED).exists():
        return folder
    found = None if known else _find_foreign(folder)
    if found and not (folder / OWNED).exists():  # another process may have marked it by now
        raise TripletError(
            f"{found} was not written by this kit (there is no {OWNED} beside it), and would be "
            f"replaced: choose another folder than {folder}, or move away what it holds. If it is "
            f"a set of an earlier version and may be replaced, make the empty file {folder / OWNED}"
        )
    write_text(folder / OWNED, "A triplet set of RORem's kit, which may replace its files.\n")
    return folder


def _find_foreign(folder: Path) -> Path | None:
    """What lies in the way of a set's files."""
    places = [folder / META, *folder.glob("meta.*jsonl.partial")]
    places += [folder / name for name in FOLDERS.values()]
    return next(filter(is_filled, places), None)


def has_records(folder: str | Path) -> bool:
    """Whether a set, finished or not, has been written in a folder."""
    folder = Path(folder)
    return (folder / META).exists() or any(folder.glob("meta.*jsonl.partial"))


def clear_set(folder: str | Path, *, ids: Iterable[str] = ()) -> None:
    """Delete a set, file by file as its records name them; what else lies in the folder stays.

    Args:
        folder: of a set that is marked as the writer's.
        ids: further ones whose images it may hold, of which no record may be left.

    Raises:
        TripletError: it is not marked.
    """
    writer = TripletWriter(folder)
    with writer.open_index() as index:
        for record in index.items():
            writer.remove(writer.list_own(record))
    writer.remove(f"{part}/{name}.png" for name in ids for part in FOLDERS.values())
    writer.remove_leftovers()
    (writer.folder / META).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody's files are in it
        for name in FOLDERS.values():
            if (writer.folder / name).is_dir():
                (writer.folder / name).rmdir()
        if [path.name for path in writer.folder.iterdir()] == [OWNED]:
            (writer.folder / OWNED).unlink()
            writer.folder.rmdir()


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
        restart: begin anew; what an earlier set had and this one has not is deleted at the end, and
            what an earlier writer noted when the first triplet is added.

    Raises:
        TripletError: the folder holds files of others in the place of a set's.
    """

    def __init__(self, folder: str | Path, *, part: str = "", restart: bool = False):
        self.folder, self._part, self._restart = claim_set(folder), part, restart
        self._old: list[Path] = []  # journals that `restart` does away with
        self._old = self._list_journals() if restart else []
        self._journal = Journal(self.folder / f"meta.{part + '.' * bool(part)}jsonl.partial")

    def _begin(self) -> None:
        """With `restart`: from now on there is no way back."""
        while self._old:
            self._old.pop().unlink(missing_ok=True)

    @functools.cached_property
    def done_ids(self) -> set[str]:
        """Ids that are in the set already, their files as they were written.

        A lost power leaves files that are empty or torn, also of finished sets: what a record says
        of their bytes tells. In the last minutes of a journal they are read as well.
        """
        done, torn = set(), set()
        with ThreadPoolExecutor(16) as pool:  # on a network file system each look takes a while
            for chunk in group_chunks(self._list_records(), 4096):
                for (record, _), whole in zip(chunk, pool.map(self._is_whole, *zip(*chunk))):
                    (done if whole else torn).add(str(record["id"]))
                    (torn if whole else done).discard(str(record["id"]))
        if torn:
            logger.warning(
                "%s: files of %d triplets are not what was written (such as %s): they are made "
                "anew",
                self.folder,
                len(torn),
                min(torn),
            )
        return done

    def list_known(self) -> set[str]:
        """Ids that have a record, whether their files are as they were written or not."""
        return {str(record["id"]) for record, _ in self._list_records()}

    def _list_records(self) -> Iterator[tuple[dict, float]]:
        """Each record so far, the newest of an id last, and since when its files were not flushed
        (s since 1970)."""
        for record in () if self._restart else self._read_old():
            yield record, float("inf")
        for path in self._list_journals():
            since = path.stat().st_mtime - _RECENT
            for _, record in read_lines(path):
                yield record, since

    def _is_whole(self, record: dict, since: float) -> bool:
        noted = str(record.get(BYTES_SHA256) or "").split()
        try:
            for part, place in enumerate(key for key in FOLDERS.values() if record.get(key)):
                path = self.folder / record[place]
                size, _, digest = noted[part].partition("-") if noted else ("", "", "")
                status = path.stat()
                if status.st_size != (int(size) if size else status.st_size or -1):
                    return False
                if digest and status.st_mtime > since and hash_file(path)[:16] != digest:
                    return False
        except (OSError, TypeError, ValueError, IndexError):
            return False
        return True

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
                a file of a hidden folder, or (with `restart`) one of this set, which would be
                deleted.
            OSError: the disk refuses; names the file.
        """
        if self._restart:
            for value in (source, mask, gt):
                if not isinstance(value, (np.ndarray, type(None))):
                    self._refuse_own(value)
            self._begin()
        self.add_record(write_files(self.folder, id=id, source=source, mask=mask, gt=gt, **extra))

    def _refuse_own(self, path) -> None:
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.folder)):
            raise TripletError(
                f"{path} is a file of {self.folder}, which is being written anew: give the new set "
                "another folder"
            )

    def add_record(self, record: dict) -> None:
        """Add a record that `write_files` returned, perhaps in another process."""
        self._begin()
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
        parts = [part for part in FOLDERS if known[part] is not None]
        noted = dict(zip(parts, triplet.bytes_sha256.split()))
        noted = {part: note for part, note in noted.items() if part not in changes}
        self.add(**{**triplet.extra, **known, **changes, BYTES_SHA256: noted})

    def close(self, *, drop: Collection[str] = ()) -> Path:
        """Fold the journals into `meta.json` and return its path (with `part`: only stop).

        Args:
            drop: ids that do not go into the set, if they are there; their files are deleted.
        """
        self._begin()
        self._journal.close()
        flush_disk(self.folder)  # the images, before what promises them
        if self._part:
            return self._journal.path
        meta = self.folder / META
        leftover = set()
        with self.open_index() as index:
            for old in self._read_old():
                leftover |= self.list_own(old)
                if old["id"] in index:
                    leftover -= self.list_own(index[old["id"]])
            for name in filter(index.__contains__, drop):
                leftover |= self.list_own(index[name])
            write_list(
                meta,
                _keep_files(
                    (record for record in index.items() if record["id"] not in drop), leftover
                ),
            )
        self.remove_leftovers()
        self.remove(leftover)
        return meta

    def list_own(self, record: dict) -> set[str]:
        """The files of a record that a writer made here: in the set's folders, named after its id.

        A set may come from anywhere, and its records may name any file of this machine.
        """
        found = set()
        for place in FOLDERS.values():
            folder, _, name = str(record.get(place) or "").partition("/")
            own = os.path.splitext(name)[0] == str(record["id"]) and "/" not in name
            if folder == place and own:
                found.add(record[place])
        return found

    def remove(self, names: Iterable[str]) -> None:
        """Delete files of the set, as `list_own` names them; what is not there is no fault."""
        for name in names:
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()

    def remove_leftovers(self) -> None:
        """Delete the journals, and what a killed writer was writing."""
        for journal in (*self._list_journals(), self._aside):
            journal.unlink(missing_ok=True)
        for place in FOLDERS.values():
            for path in (self.folder / place).glob(".*.partial"):
                path.unlink(missing_ok=True)

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
        """The one written to last is the last: of two records of an id it has the newer."""
        found = set(self.folder.glob("meta.*jsonl.partial")).difference(self._old)
        return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def _keep_files(records: Iterable[dict], leftover: set[str]) -> Iterator[dict]:
    """Pass records on, and take the files they name out of what is to be deleted."""
    for record in records:
        named = (record.get(key) for key in (*FOLDERS.values(), "gt", "inpaint"))
        leftover.difference_update(os.path.normpath(path) for path in named if path)
        yield record


def write_files(
    folder: str | Path,
    /,
    *,
    id: str,
    source,
    mask,
    gt=None,
    bytes_sha256: Mapping[str, str] | None = None,
    **extra,
) -> dict:
    """Write one triplet's files into a set's folder and return its record.

    The arguments and errors are those of `TripletWriter.add`. The record is not in the set yet:
    workers write files side by side, and one writer adds their records. Its `bytes_sha256` has a
    word for each of source, mask and GT: how many bytes the file has, and the first 16 hex digits
    of their SHA-256.

    Args:
        bytes_sha256: these words, by `source`, `mask` and `gt`, of files whose content is known;
            of another file that is reused the hash is left out: it is linked, and not read.
    """
    folder = claim_set(folder)
    check_id(id)
    foreign = extra.keys() & {"GT", "inpaint"}
    if foreign:
        raise TripletError(f"{id}: {', '.join(foreign)} cannot be extra keys")
    extra = {key: value for key, value in extra.items() if value is not None}
    _refuse_nan(id, extra)
    parts = {"source": source, "mask": mask} | ({} if gt is None else {"gt": gt})
    arrays = {part: a for part, a in parts.items() if isinstance(a, np.ndarray)}
    if len({a.shape[:2] for a in arrays.values()}) > 1:
        raise TripletError(
            f"{id}: sizes differ: "
            + ", ".join(f"{part} {describe_size(a)}" for part, a in arrays.items())
        )
    if "mask" in arrays:
        check_mask(mask, f"mask of {id}")
    record, noted = {"id": id}, []
    for part, value in parts.items():
        record[FOLDERS[part]], content = _write_part(folder, id, part, value)
        known = (bytes_sha256 or {}).get(part, "")
        noted.append(known if known.partition("-")[0] == content else content)
    return record | extra | {BYTES_SHA256: " ".join(noted)}


def _refuse_nan(name: str, extra: dict) -> None:
    for key, value in extra.items():
        try:
            json.dumps(value, allow_nan=False, default=lambda x: x.item())
        except ValueError:
            raise TripletError(
                f"{name}: {key} is {value}, and JSON has no such number: leave the key out"
            ) from None


def describe_file(path: str | Path, digest: str | None = None) -> str:
    """The word for a file in a record's `bytes_sha256`; `digest` is its SHA-256, where known."""
    return f"{os.stat(path).st_size}-{(digest or hash_file(path))[:16]}"


def _write_part(folder: Path, name: str, part: str, value) -> tuple[str, str]:
    """Returns the file's name below the folder, and what is known of its bytes."""
    place = folder / FOLDERS[part]
    place.mkdir(exist_ok=True)
    if isinstance(value, np.ndarray):
        data = save_image(place / f"{name}.png", value)
        content = f"{len(data)}-{hashlib.sha256(data).hexdigest()[:16]}"
        return f"{FOLDERS[part]}/{name}.png", content
    real = os.path.realpath(value)
    if is_hidden(os.path.dirname(real)):
        raise TripletError(
            f"{value} lies in a hidden folder: the scenes' truth never becomes a triplet"
        )
    if not os.path.isfile(real):
        raise TripletError(f"{value} is missing: {name} cannot be written without it")
    path = place / f"{name}{Path(value).suffix.lower() or '.png'}"
    link_file(real, path)
    return f"{FOLDERS[part]}/{path.name}", str(path.stat().st_size)


def merge_sets(metas: Iterable[str | Path], folder: str | Path) -> Path:
    """Merge sets into one in `folder`, files reused; ids stay, a second of a kind gets `~2`.

    Returns:
        The new set's `meta.json`.

    Raises:
        TripletError: `folder` is one of the sets or holds what no writer wrote, or a set is
            unsound.
        BlockingIOError: another process is writing there.
    """
    metas = [resolve_meta(path) for path in metas]
    for meta in metas:  # its files would be replaced while they are read
        if meta.parent.resolve() == Path(folder).resolve():
            raise TripletError(
                f"{folder} is one of the sets to be merged: give the merged set a folder of its own"
            )
    # what can be seen without opening images, before a set that is there is touched
    check_ids(name for _, name in _name_once(metas, look=True))
    with lock_folder(claim_set(folder)), TripletWriter(folder, restart=True) as writer:
        for triplet, name in _name_once(metas, look=False):
            writer.add_triplet(triplet, id=name)
    return writer.folder / META


def _name_once(metas: list[Path], *, look: bool) -> Iterator[tuple[Triplet, str]]:
    """The triplets of several sets, each with an id that none before it has."""
    used = set()
    for path in metas:
        for triplet in iter_triplets(path, require_gt=False, look=look):
            names = (f"{triplet.id}~{n}" if n > 1 else triplet.id for n in range(1, 10**9))
            name = next(name for name in names if name not in used)
            used.add(name)
            yield triplet, name
