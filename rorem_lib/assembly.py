"""Raw data becomes triplet sets: list, open, filter, write; in parallel, resumable, nothing lost.

The paper's public part (RORem, sec. 3.1) is 61,565 triplets of RORD and MULAN; how they were made
was never published. `assemble_sets` takes any importer of `rorem_lib.sources` and writes

    <folder>/labelled/   triplets (or pool/ where the source has no GT)
    <folder>/test/       those of the test groups
    <folder>/rejected.jsonl every item that became none, with its reason
    <folder>/assembly.json  the settings, and the counts when it is finished

Started again it goes on where it was killed, and the result is the same to the byte as without the
interruption: each item depends on itself alone, records are ordered by id, and what compares items
(near-duplicates) runs over the whole set at the end.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import functools
import hashlib
import logging
import os
import pickle
import shutil
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cv2
import numpy as np

from rorem_lib import filters
from rorem_lib.files import hash_file, read_json, write_json
from rorem_lib.filters import FilterConfig
from rorem_lib.journal import Journal, JournalIndex, write_lines
from rorem_lib.masks import binarise_mask
from rorem_lib.pictures import TripletError, load_image
from rorem_lib.records import META, iter_triplets
from rorem_lib.sources.base import Item, Picture, Pictures, Rejected, Source, SourceError
from rorem_lib.triplets import TripletWriter, write_files
from rorem_lib.workers import group_chunks, map_processes

logger = logging.getLogger(__name__)

VERSION = 1  # raise it when the same settings give other files
_CHUNK = 16  # items a process takes at a time
_SETS = ("labelled", "pool", "test")


@dataclass
class Progress:
    """How far an assembly is.

    Attributes:
        done, total: items.
        rejected: items among `done` that became no triplet.
        rate: items a second of this run; what was there before does not count.
    """

    done: int
    total: int
    rejected: int
    rate: float

    def __str__(self):
        left = (self.total - self.done) / max(self.rate, 1e-9)
        return (f"{self.done:,} of {self.total:,} items, {self.rejected:,} rejected, "
                f"{self.rate:.1f} a second, {left / 60:.0f} min left")


@dataclass
class Assembly:
    """What was assembled.

    Attributes:
        sets: `meta.json` of each set that was written, by its name.
        counts: triplets of each set.
        reasons: rejected items by reason.
        rejected: the list of them, JSON lines.
    """

    sets: dict[str, Path]
    counts: dict[str, int]
    reasons: dict[str, int]
    rejected: Path


@dataclass(frozen=True)
class _Job:
    """What every worker needs; sent once with each chunk."""

    source: Source
    folder: Path
    filters: FilterConfig
    max_side: int
    patience: float


@dataclass
class _Outcome:
    """A chunk's records by set, and its rejections."""

    records: list[tuple[str, dict]] = field(default_factory=list)
    rejected: list[dict] = field(default_factory=list)


def assemble_sets(source: Source, folder: str | Path, *, filters: FilterConfig | None = None,
                  max_side: int = 0, test_share: float = 0.0, seed: int = 4, limit: int = 0,
                  workers: int = 1, evaluation_sets: Iterable[str | Path] = (), safety=None,
                  patience: float = 600, progress: Callable[[Progress], None] | None = None
                  ) -> Assembly:
    """Turn a source into triplet sets.

    A folder that was assembled with other settings is assembled anew.

    Args:
        source: an importer with its options.
        folder: where the sets go.
        filters: limits; the defaults of `FilterConfig`.
        max_side: px; longer pictures are shrunk to it, with mask and GT; 0 keeps them.
        test_share: share of the groups that go into `test/`, by a hash of their name: a source
            that grows keeps its split. A source with a split of its own keeps that.
        seed: another seed, another split.
        limit: at most so many items, the first ones; 0 takes all.
        workers: processes.
        evaluation_sets: sets of pictures that must not occur in this one.
        safety: a `safety.SafetyChecker`; sources it takes for unsafe are rejected.
        patience: seconds to wait for space on a full disk before giving up.
        progress: called after every chunk.

    Returns:
        What was written.

    Raises:
        SourceError: the source has not the layout that its importer expects.
        OSError: a file cannot be written; names it. Started again, the work goes on.
    """
    folder = Path(folder)
    if not 0 <= test_share < 1:
        raise ValueError(f"test_share must be at least 0 and below 1, not {test_share}")
    job = _Job(source, folder, filters or FilterConfig(), max_side, patience)
    settings = {"version": VERSION, "source": source.name, "options": asdict(source),
                "filters": asdict(job.filters), "max_side": max_side, "test_share": test_share,
                "seed": seed, "limit": limit, "safety": bool(safety),
                "evaluation_sets": [str(meta) for meta in evaluation_sets]}
    _claim_folder(folder, settings)
    writers = {name: TripletWriter(folder / name) for name in _SETS
               if (folder / name).exists()}
    rejections = Journal(folder / "rejected.jsonl")
    with JournalIndex([rejections.path]) as index:
        done, bad = set(index.list_ids()), len(index)
    done = done.union(*(writer.done_ids for writer in writers.values()))

    with tempfile.TemporaryFile(dir=folder) as spool:
        total = _spool_items(_limit(source.list_items(), limit), spool)
        todo = (item for item in _read_spool(spool) if item.id not in done)
        choose = functools.partial(_choose_set, source=source, share=test_share, seed=seed)
        chunks = ((job, [(item, choose(item)) for item in chunk])
                  for chunk in group_chunks(todo, _CHUNK))
        began, before, count = time.monotonic(), len(done), len(done)
        for outcome in map_processes(_assemble_chunk, chunks, workers=workers):
            for name, record in outcome.records:
                if name not in writers:
                    writers[name] = TripletWriter(folder / name)
                _wait_for_space(lambda n=name, r=record: writers[n].add_record(r), patience)
            for record in outcome.rejected:
                _wait_for_space(lambda r=record: rejections.append(r), patience)
            count += len(outcome.records) + len(outcome.rejected)
            bad += len(outcome.rejected)
            if progress:
                rate = (count - before) / max(1e-9, time.monotonic() - began)
                progress(Progress(count, total, bad, rate))
    return _finish(job, settings, writers, rejections, evaluation_sets, safety)


def describe_filters(folder: str | Path) -> str:
    """What an assembled folder's triplets had to pass, as Markdown for a dataset card.

    Returns:
        "" for a folder that was not assembled here.
    """
    try:
        found = read_json(Path(folder) / "assembly.json")
        kept, limits = sum(found["counts"].values()), found["settings"]["filters"]
    except (FileNotFoundError, KeyError):  # no assembly, or not finished
        return ""
    rows = [f"| {reason} | {count:,} |" for reason, count in found["rejected"].items()]
    shown = ", ".join(f"`{name}` {value}" for name, value in limits.items())
    return "\n".join([
        f"Assembled with the limits {shown}"
        + (", and Stable Diffusion's safety checker" if found["settings"]["safety"] else "")
        + f". {kept:,} items were kept" + ("; rejected were:\n" if rows else "."),
        *(["| reason | items |", "| --- | --- |", *rows] if rows else [])])


def open_examples(source: Source, count: int = 4, *, tries: int = 50) -> dict[str, Pictures]:
    """The first items of a source that open, of different groups: to look at before the work.

    Returns:
        By id; fewer than `count` where none of `tries` items more can be opened.

    Raises:
        SourceError: the source has not the layout that its importer expects, or no items.
    """
    found, groups, last = {}, set(), None
    for number, item in enumerate(source.list_items()):
        if len(found) == count or number == tries:
            break
        if item.group not in groups:
            try:
                found[item.id] = source.load_item(item)
                groups.add(item.group)
            except (Rejected, TripletError, OSError) as error:
                last = error
    if not found:
        raise SourceError(f"no item of {source.folder} can be opened; the last one: "
                          f"{last or 'there is none'}")
    return found


# ------------------------------------------------------------------------------------ settings


def _claim_folder(folder: Path, settings: dict) -> None:
    """Note the settings; clear what others left."""
    marker = folder / "assembly.json"
    found = read_json(marker)["settings"] if marker.is_file() else None
    if found == _as_json(settings):
        return
    if found is None and any((folder / name / META).exists() for name in _SETS):
        raise TripletError(f"{folder} holds sets that were not assembled here: choose another "
                           "folder, or move them away")
    if found:
        changed = [key for key in settings if found.get(key) != _as_json(settings)[key]]
        logger.info("%s was assembled with other settings (%s): it is written anew", folder,
                    ", ".join(changed))
    for name in (*_SETS, "rejected.jsonl", "safety.jsonl"):
        old, aside = folder / name, folder / f".{name}.old"
        shutil.rmtree(aside, ignore_errors=True)
        if old.is_dir():  # renamed first: no half of it is ever found
            os.rename(old, aside)
            shutil.rmtree(aside)
        else:
            old.unlink(missing_ok=True)
    write_json(marker, {"settings": settings})


def _as_json(value):
    """As it comes back from a JSON file: tuples are lists."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def _choose_set(item: Item, *, source: Source, share: float, seed: int) -> str:
    if item.split:
        test = item.split == "test"
    else:
        digest = hashlib.sha256(f"{seed}:{item.group}".encode()).digest()
        test = int.from_bytes(digest[:8]) < share * 2**64
    return "test" if test else "labelled" if source.has_gt else "pool"


# --------------------------------------------------------------------------------------- items


def _limit(items: Iterator[Item], limit: int) -> Iterator[Item]:
    for number, item in enumerate(items):
        if limit and number == limit:
            return
        yield item


def _spool_items(items: Iterator[Item], spool) -> int:
    """Write the items to a file, so that they are listed once and not held; their number."""
    seen, count = set(), 0
    for item in items:
        name, number = item.id, 1
        while name in seen:  # two files of one name in different folders
            number += 1
            name = f"{item.id}~{number}"
        seen.add(name)
        if name != item.id:
            item = Item(name, item.group, item.place, item.split)
        pickle.dump(item, spool)
        count += 1
    return count


def _read_spool(spool) -> Iterator[Item]:
    spool.seek(0)
    while True:
        try:
            yield pickle.load(spool)
        except EOFError:
            return


# ------------------------------------------------------------------------------------- a worker


def _assemble_chunk(task: tuple[_Job, list[tuple[Item, str]]]) -> _Outcome:
    job, items = task
    outcome = _Outcome()
    for item, name in items:
        place = job.folder / name
        try:
            pictures, measured = _load(item, job)
            place.mkdir(exist_ok=True)
            write = functools.partial(_write, item, pictures, measured, place, job.source)
            outcome.records.append((name, _wait_for_space(write, job.patience)))
        except Rejected as error:
            outcome.rejected.append({"id": item.id, "group": item.group, "set": name,
                                     "reason": error.reason, "message": error.message})
    return outcome


def _load(item: Item, job: _Job) -> tuple[Pictures, dict]:
    """Open, shrink and measure an item; one odd file in 200,000 must not end the run."""
    try:
        pictures = _shrink(job.source.load_item(item), job.max_side)
        return pictures, filters.check_pictures(pictures, job.filters)
    except Exception as error:
        if not Path(job.source.folder).exists():  # a disk that went away is no fault of its items
            raise SourceError(f"{job.source.folder} is gone: mount it again; started again, the "
                              "work goes on") from error
        if isinstance(error, Rejected):
            raise
        file = getattr(error, "file", None) or getattr(error, "filename", None)
        gone = isinstance(error, FileNotFoundError) or (file and not Path(file).exists())
        known = isinstance(error, (TripletError, OSError))
        words = str(error) if known else f"{type(error).__name__}: {error} (at {item.place})"
        raise Rejected("missing file" if gone else "unreadable" if known else "error",
                       words) from error


def _write(item: Item, pictures: Pictures, measured: dict, folder: Path, source: Source) -> dict:
    parts = {"source": pictures.source, "mask": pictures.mask, "gt": pictures.gt}
    values = {part: picture and (picture.array if picture.file is None else picture.file)
              for part, picture in parts.items()}
    if isinstance(values["mask"], np.ndarray):
        values["mask"] = binarise_mask(values["mask"])
    height, width = pictures.source.array.shape[:2]
    known = {"group": item.group, "origin": source.origin, "license": source.license,
             "file": _shorten(pictures.origin_file, source), "width": width, "height": height}
    if "sha256" not in pictures.extra:
        known["sha256"] = hash_file(pictures.origin_file)
    return write_files(folder, id=item.id, **values, **{**known, **pictures.extra, **measured})


def _shorten(path: Path, source: Source) -> str:
    """The raw file relative to the source's folder: records name no machine's folders."""
    try:
        return str(Path(path).absolute().relative_to(Path(source.folder).absolute()))
    except ValueError:
        return Path(path).name


def _shrink(pictures: Pictures, max_side: int) -> Pictures:
    height, width = pictures.source.array.shape[:2]
    if not max_side or max(height, width) <= max_side:
        return pictures
    scale = max_side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))

    def shrink(picture, mask=False):
        if picture is None or picture.array.shape[:2] != (height, width):
            return picture  # the filters name a size that differs
        small = cv2.resize(picture.array, size, interpolation=cv2.INTER_AREA)
        # a mask keeps every pixel that it touched, or thin ones fade away
        return Picture(np.where(small > 0, 255, 0).astype(np.uint8) if mask else small)

    mask = Picture(binarise_mask(pictures.mask.array))
    return Pictures(shrink(pictures.source), shrink(mask, True), shrink(pictures.gt),
                    pictures.origin_file, pictures.extra)


def _wait_for_space(write: Callable, patience: float):
    """Run `write`; on a full disk try again until there is space or the patience ends."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return write()
        except OSError as error:
            left = deadline - time.monotonic()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or left <= 0:
                raise
            logger.warning("%s: waiting for space, %.0f s more", error, left)
            time.sleep(min(5, left))


# ------------------------------------------------------------------------------- the whole set


def _finish(job: _Job, settings: dict, writers: dict[str, TripletWriter], rejections: Journal,
            evaluation_sets, safety) -> Assembly:
    """What needs all records: the safety checker and near-duplicates; then fold the journals."""
    for late in (*_find_unsafe(job, writers, safety),
                 *_find_duplicates(job, writers, evaluation_sets)):
        rejections.append(late)
    rejections.close()
    sets, counts = {}, {}
    # The rejections first: killed between, the next run drops their records all the same.
    with JournalIndex([rejections.path]) as index:
        write_lines(rejections.path, index.items())
        reasons = Counter(record["reason"] for record in index.items())
        for name, writer in writers.items():
            drop = {name for name in writer.done_ids if name in index}
            sets[name] = writer.close(drop=drop)
            counts[name] = len(writer.done_ids) - len(drop)
    reasons = dict(sorted(reasons.items(), key=lambda x: (-x[1], x[0])))
    write_json(job.folder / "assembly.json", {
        "settings": settings, "counts": counts, "rejected": reasons,
        "left_out": job.source.summarise()})
    return Assembly(sets, counts, reasons, rejections.path)


def _find_unsafe(job: _Job, writers: dict[str, TripletWriter], safety) -> Iterator[dict]:
    """Rejections of sources that the checker takes for unsafe; its answers are kept."""
    if not safety:
        return
    answers = Journal(job.folder / "safety.jsonl")
    with JournalIndex([answers.path]) as known:
        for writer in writers.values():
            with writer.open_index() as index:
                todo = [key for key in index.list_ids() if key not in known]
                pictures = (load_image(writer.folder / index[key]["source"]) for key in todo)
                for key, unsafe in zip(todo, safety.find_unsafe(pictures), strict=True):
                    answers.append({"id": key, "unsafe": bool(unsafe)})
    answers.close()
    with JournalIndex([answers.path]) as known:
        for name, writer in writers.items():
            with writer.open_index() as index:
                for key in index.list_ids():
                    if known[key]["unsafe"]:
                        yield {"id": key, "group": index[key]["group"], "set": name,
                               "reason": "unsafe", "message": "the safety checker takes the "
                                                              "source for unsafe"}


def _find_duplicates(job: _Job, writers: dict[str, TripletWriter],
                     evaluation_sets) -> Iterator[dict]:
    """Rejections of near-duplicates: of evaluation sets, in the test set, then in the rest."""
    if job.filters.duplicate_distance < 0:
        return
    hashes, groups = array("Q"), array("q")
    files = []
    for triplet in iter_triplets(list(evaluation_sets), require_gt=False):
        files.append(triplet.source)
        hashes.append(int(triplet.extra.get("phash")
                          or filters.hash_picture(load_image(triplet.source)), 16))
        groups.append(-1)
    numbers: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        ids, starts, indices = [], [], []
        # The test set first: of a picture that is in both, the training set gives up its own.
        order = sorted(writers, key=lambda name: (name != "test", name))
        for name in order:
            index = stack.enter_context(writers[name].open_index())
            starts.append(len(ids))
            indices.append(index)
            ids += index.list_ids()
            for record in index.items():
                hashes.append(int(record["phash"], 16))
                groups.append(numbers.setdefault(record["group"], len(numbers)))

        def find(position: int) -> tuple[str, dict]:
            which = bisect.bisect_right(starts, position) - 1
            return order[which], indices[which][ids[position]]

        def locate(position: int) -> Path:
            if position < len(files):
                return files[position]
            name, record = find(position - len(files))
            return writers[name].folder / record["source"]

        for late, early in filters.find_duplicates(
                hashes, groups, locate, start=len(files),
                distance=job.filters.duplicate_distance):
            name, record = find(late - len(files))
            twin = (f"{files[early]}, a picture of an evaluation set" if early < len(files) else
                    "{1[id]} of {0}".format(*find(early - len(files))))
            yield {"id": record["id"], "group": record["group"], "set": name,
                   "reason": "near-duplicate", "message": f"looks like {twin}"}
