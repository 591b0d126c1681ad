"""Triplet sets on the disk: read, check, write, merge, split by group (RORem, sec. 3.1).

A set is a folder with `source/`, `mask/`, `GT/` and `meta.json`, a JSON list of records whose paths
are relative to the folder. White in a mask (at least 128) is what is to be removed. The files that
the authors publish load unchanged. A set written here never leaves its folder: files taken from
another set are hard-linked into it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rorem_lib.files import write_json
from rorem_lib.pictures import TripletError, link_file, load_image, save_image
from rorem_lib.records import (
    META,
    Problem,
    Triplet,
    check_mask,
    check_set,
    describe_size,
    load_images,
    read_records,
    read_triplets,
    resolve_meta,
)

__all__ = [
    "Problem", "Triplet", "TripletError", "TripletWriter", "check_set", "load_image",
    "load_images", "merge_sets", "read_triplets", "resolve_meta", "save_image", "split_by_group",
]  # fmt: skip

logger = logging.getLogger(__name__)

FOLDERS = {"source": "source", "mask": "mask", "gt": "GT"}


class TripletWriter:
    """Writes a set, item by item; killed at any moment it loses the item in work at most.

    Every item goes to the journal `meta.jsonl.partial` as soon as its files are there. `close`
    (or the end of the `with` block) folds the journal into `meta.json`, ordered by id, so that a
    set does not depend on interruptions or on the order of the work. Opened on an existing set,
    it goes on from there.

    Args:
        folder: the set's folder, made if missing.
        part: name of this writer's own journal where several processes write one set at once; the
            last to close is one without `part`, which folds all journals.
        restart: begin anew; what an earlier set had and this one has not is deleted at the end.

    Attributes:
        done_ids: ids that are in the set already.
    """

    def __init__(self, folder: str | Path, *, part: str = "", restart: bool = False):
        self.folder, self._part = Path(folder), part
        self._journal = self.folder / f"meta.{part + '.' * bool(part)}jsonl.partial"
        self._stream = None
        self.folder.mkdir(parents=True, exist_ok=True)
        if restart:
            for journal in self._list_journals():
                journal.unlink()
        self._old = self._read_set()
        self._records = {} if restart else {**self._old, **self._read_journals()}
        self.done_ids = set(self._records)

    def __enter__(self) -> TripletWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        elif self._stream:
            self._stream.close()  # the journal keeps what was added

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
        if not id or id != Path(id).name or id.startswith(".") or len(id.encode()) > 200:
            raise TripletError(f"{id!r} cannot name a triplet's files: take 1 to 200 letters "
                               "without '/' and without a leading dot")
        foreign = extra.keys() & {"GT", "inpaint"}
        if foreign:
            raise TripletError(f"{id}: {', '.join(foreign)} cannot be extra keys")
        parts = {"source": source, "mask": mask} | ({} if gt is None else {"gt": gt})
        arrays = {part: a for part, a in parts.items() if isinstance(a, np.ndarray)}
        if len({a.shape[:2] for a in arrays.values()}) > 1:
            raise TripletError(f"{id}: sizes differ: " + ", ".join(
                f"{part} {describe_size(a)}" for part, a in arrays.items()))
        if "mask" in arrays:
            check_mask(mask, f"mask of {id}")
        record = {"id": id}
        for part, value in parts.items():
            record["GT" if part == "gt" else part] = self._write_part(id, part, value)
        record |= {key: value for key, value in extra.items() if value is not None}
        line = json.dumps(record, ensure_ascii=False, default=lambda v: v.item()) + "\n"
        self._append(line.encode())
        self._records[id] = json.loads(line)
        self.done_ids.add(id)

    def add_triplet(self, triplet: Triplet, **changes) -> None:
        """Take over a triplet of another set, its files reused, some keys changed or added."""
        known = {"id": triplet.id, "source": triplet.source, "mask": triplet.mask,
                 "gt": triplet.gt, "group": triplet.group}
        self.add(**{**triplet.extra, **known, **changes})

    def close(self) -> Path:
        """Fold the journals into `meta.json` and return its path (with `part`: only stop)."""
        if self._stream:
            self._stream.close()
            self._stream = None
        if self._part:
            return self._journal
        records = {**self._records, **self._read_journals()}
        meta = write_json(self.folder / META, [records[name] for name in sorted(records)])
        for journal in self._list_journals():
            journal.unlink()
        kept = {record.get(key) for record in records.values() for key in ("source", "mask", "GT")}
        for record in self._old.values():
            for key in ("source", "mask", "GT"):
                if record.get(key) and record[key] not in kept:
                    with contextlib.suppress(OSError):
                        (self.folder / record[key]).unlink()
        return meta

    def _write_part(self, name: str, part: str, value) -> str:
        folder = self.folder / FOLDERS[part]
        folder.mkdir(exist_ok=True)
        if isinstance(value, np.ndarray):
            save_image(folder / f"{name}.png", value)
            return f"{FOLDERS[part]}/{name}.png"
        original = Path(value)
        if "hidden" in original.resolve().parts:
            raise TripletError(f"{original} lies in a hidden folder: the scenes' truth never "
                               "becomes a triplet")
        if not original.is_file():
            raise TripletError(f"{original} is missing: {name} cannot be written without it")
        path = folder / f"{name}{original.suffix.lower() or '.png'}"
        link_file(original, path)
        return f"{FOLDERS[part]}/{path.name}"

    def _append(self, line: bytes) -> None:
        if self._stream is None:
            self._stream = open(self._journal, "ab", buffering=0)
            text = self._journal.read_bytes()
            if text and not text.endswith(b"\n"):  # torn by a kill: that item is written again
                self._stream.truncate(text.rfind(b"\n") + 1)
        if self._stream.write(line) != len(line):
            raise OSError(errno.ENOSPC, f"cannot write {self._journal}: no space left")

    def _list_journals(self) -> list[Path]:
        return sorted(self.folder.glob("meta.*jsonl.partial"))

    def _read_journals(self) -> dict[str, dict]:
        found = {}
        for journal in self._list_journals():
            for line in journal.read_bytes().split(b"\n")[:-1]:
                try:
                    record = json.loads(line)
                    found[record["id"]] = record
                except (ValueError, KeyError, TypeError):
                    logger.warning("%s: a torn line was skipped", journal)
        return found

    def _read_set(self) -> dict[str, dict]:
        meta = self.folder / META
        records = read_records(meta) if meta.is_file() else []
        return {str(r.get("id", Path(r.get("source", "")).stem)): r for r in records}


def merge_sets(metas: Iterable[str | Path], folder: str | Path) -> Path:
    """Merge sets into one in `folder`, files reused; ids stay, a second of a kind gets `~2`.

    Returns:
        The new set's `meta.json`.
    """
    used = set()
    with TripletWriter(folder, restart=True) as writer:
        for path in metas:
            for triplet in read_triplets(path, require_gt=False):
                names = (f"{triplet.id}~{n}" if n > 1 else triplet.id for n in range(1, 10**9))
                name = next(name for name in names if name not in used)
                used.add(name)
                writer.add_triplet(triplet, id=name)
    return writer.folder / META


def split_by_group(triplets: Iterable[Triplet], share: float,
                   seed: int = 0) -> tuple[list[Triplet], list[Triplet]]:
    """Split in two without cutting a group.

    Groups are ordered by a hash of (seed, group), so a set that grows keeps most of its split.

    Args:
        triplets: what to split; both parts keep its order.
        share: about which share goes into the first part, 0 to 1; with two groups or more
            and a share strictly between, neither part is empty.
        seed: another seed, another split.

    Returns:
        (the first part, the rest).
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie between 0 and 1, not {share}")
    triplets = list(triplets)
    sizes: dict[str, int] = {}
    for triplet in triplets:
        sizes[triplet.group] = sizes.get(triplet.group, 0) + 1
    order = sorted(sizes, key=lambda g: hashlib.sha256(f"{seed}:{g}".encode()).digest())
    first, taken = set(), 0
    for group in order:
        # A group goes in if that brings the count nearer to what was asked for.
        if taken + sizes[group] / 2 > share * len(triplets):
            break
        first.add(group)
        taken += sizes[group]
    if 0 < share < 1 and len(order) > 1:
        first = (first or {order[0]}) - ({order[-1]} if len(first) == len(order) else set())
    return ([t for t in triplets if t.group in first],
            [t for t in triplets if t.group not in first])
