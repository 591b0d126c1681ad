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

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rorem_lib.data.conversion import MISSING, Job, convert_item, reject_lost, wait_for_space
from rorem_lib.data.filters import Checker, FilterConfig, reject_duplicates, reject_unsafe
from rorem_lib.data.items import Item, Pictures, Source, SourceError, escape_text
from rorem_lib.data.journal import Journal, JournalIndex, write_lines
from rorem_lib.data.pictures import TripletError
from rorem_lib.data.triplets import read_records
from rorem_lib.data.writer import OWNED, TripletWriter, clear_set, has_records
from rorem_lib.files import is_filled, lock_folder, read_json, read_limit, write_json
from rorem_lib.workers import Progress, group_chunks, limit_time, map_processes

logger = logging.getLogger(__name__)

VERSION = 2  # raise it when the same settings give other files
_CHUNK = 16  # items between two calls of `progress`
_SETS = ("labelled", "pool", "test")


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


def assemble_sets(
    source: Source,
    folder: str | Path,
    *,
    filters: FilterConfig | None = None,
    max_side: int = 0,
    test_share: float = 0.0,
    seed: int = 4,
    limit: int = 0,
    workers: int = 1,
    evaluation_sets: Iterable[str | Path] = (),
    safety: Checker | None = None,
    patience: float = 600,
    progress: Callable[[Progress], None] | None = None,
) -> Assembly:
    """Turn a source into triplet sets.

    A folder that was assembled with other settings is assembled anew; what others keep in it stays.

    Args:
        source: an importer with its options.
        folder: where the sets go.
        filters: limits; the defaults of `FilterConfig`.
        max_side: px; longer images are shrunk to it, with mask and GT; 0 keeps them.
        test_share: share of the groups that go into `test/`, by a hash of their name: a source
            that grows keeps its split. A source with a split of its own keeps that.
        seed: another seed, another split.
        limit: at most so many items, the first ones; 0 takes all.
        workers: processes; an item whose file ends its process, or takes it longer than
            `ROREM_ITEM_SECONDS`, is rejected and the others go on. 0 works in this process, which
            such a file ends.
        evaluation_sets: sets of images that must not occur in this one.
        safety: sources that it takes for unsafe are rejected.
        patience: seconds to wait for space on a full disk before giving up.
        progress: called after every few items.

    Returns:
        What was written.

    Raises:
        SourceError: the source has not the layout that its importer expects.
        TripletError: the sets' folders hold, or are, something that was not assembled here.
        BlockingIOError: another process assembles in this folder.
        OSError: a file cannot be written; names it. Started again, the work goes on.
    """
    folder, evaluation_sets = Path(folder), [str(meta) for meta in evaluation_sets]
    if not 0 <= test_share < 1:
        raise ValueError(f"test_share must be at least 0 and below 1, not {test_share}")
    job = Job(source, folder, filters or FilterConfig(), max_side, patience)
    settings = {
        "version": VERSION,
        "source": source.name,
        "options": asdict(source),
        "filters": asdict(job.filters),
        "max_side": max_side,
        "test_share": test_share,
        "seed": seed,
        "limit": limit,
        "safety": getattr(safety, "model_id", ""),
        "evaluation_sets": evaluation_sets,
    }
    _refuse_inputs(folder, [source.folder, *evaluation_sets])
    _read_settings(folder)  # which refuses what others have there, before anything is written
    with lock_folder(folder):
        _claim_folder(folder, settings)
        writers = {
            name: TripletWriter(folder / name) for name in _SETS if has_records(folder / name)
        }
        rejections = Journal(folder / "rejected.jsonl")
        choose = functools.partial(_choose_set, source=source, fraction=test_share, seed=seed)
        items = itertools.islice(source.list_items(), limit or None)
        _work_off(job, items, choose, writers, rejections, workers, progress)
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
    from rorem_lib.data.card import lay_table  # pandas and pyarrow, which assembling spares

    rows = [[reason, f"{count:,}"] for reason, count in found["rejected"].items()]
    shown = ", ".join(f"`{name}` {value}" for name, value in limits.items())
    return "\n".join(
        [
            f"Assembled with the limits {shown}"
            + (", and Stable Diffusion's safety checker" if found["settings"]["safety"] else "")
            + f". {kept:,} items were kept"
            + ("; rejected were:\n" if rows else "."),
            *([lay_table(["reason", "items"], rows)] if rows else []),
        ]
    )


def open_examples(source: Source, count: int = 4, *, tries: int = 50) -> dict[str, Pictures]:
    """The first items of a source that open, of different groups: to look at before the work.

    Returns:
        By id; fewer than `count` where none of `tries` items more can be opened.

    Raises:
        SourceError: the source has not the layout that its importer expects, or no items.
    """
    found, groups, last = {}, set(), None
    items = itertools.islice(source.list_items(), tries)
    tasks = ((source, item) for item in items if item.group not in groups)
    opened = map_processes(_open_item, tasks, lost=lambda task, why: (task[1], None, why))
    with contextlib.closing(opened):  # in a process of its own, which any file may end
        for item, pictures, why in opened:
            if pictures is None:
                last = why
            elif item.group not in groups:
                found[item.id] = pictures
                groups.add(item.group)
            if len(found) == count:
                break
    if not found:
        raise SourceError(
            f"no item of {source.folder} can be opened; the last one: {last or 'there is none'}"
        )
    return found


def _open_item(task: tuple[Source, Item]) -> tuple[Item, Pictures | None, str]:
    source, item = task
    try:
        with limit_time(read_limit("ROREM_ITEM_SECONDS", 300)):
            return item, source.load_item(item), ""
    except Exception as error:
        return item, None, f"{error}"[:1000]


def _work_off(
    job: Job,
    items: Iterator[Item],
    choose: Callable[[Item], str],
    writers: dict[str, TripletWriter],
    rejections: Journal,
    workers: int,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Turn every item that is not done into a record or a rejection; opens writers as needed."""
    with JournalIndex([rejections.path]) as index:
        done, bad = set(index.list_ids()), len(index)
    for writer in writers.values():
        done |= writer.done_ids
        del writer.done_ids  # held once is enough
    with tempfile.TemporaryFile(dir=job.folder) as spool:
        total = _spool_items(items, spool)
        todo = (item for item in _read_spool(spool) if item.id not in done)
        tasks = ((job, item, choose(item)) for item in todo)
        if workers == 0:
            results = map(convert_item, tasks)
        else:
            results = map_processes(convert_item, tasks, workers=workers, lost=reject_lost)
        state = Progress("items", total, done=len(done), active=False)
        missing = Counter()
        for chunk in group_chunks(results, _CHUNK):
            for name, record in chunk:
                if name is None:
                    bad += 1
                    append = rejections.append
                else:
                    missing.update(record.pop(MISSING, ()))
                    if name not in writers:
                        writers[name] = TripletWriter(job.folder / name)
                    append = writers[name].add_record
                wait_for_space(functools.partial(append, record), job.patience)
            state.add(len(chunk))
            state.note = f", {bad:,} rejected"
            if progress:
                progress(state)
    for key, count in missing.items():
        logger.warning("%s is NaN in %d records: they are kept without it", key, count)


# ------------------------------------------------------------------------------------ settings


def _refuse_inputs(folder: Path, inputs: Iterable[str | Path]) -> None:
    """Refuse to write where something is read; an output folder below it has room of its own."""
    folder = folder.resolve()
    for given in inputs:
        path = Path(given).resolve()
        path = path.parent if path.is_file() else path
        if path == folder or {path, *path.parents} & {folder / name for name in _SETS}:
            raise TripletError(
                f"{folder} is written to, {given} is read there: choose an output folder outside "
                "of what is read"
            )


def _read_settings(folder: Path) -> dict | None:
    """With which settings a folder was assembled, None if nothing is there yet.

    Raises:
        TripletError: something that was not assembled is in the way.
    """
    marker = folder / "assembly.json"
    record = read_json(marker) if marker.is_file() else None
    found = record.get("settings") if isinstance(record, dict) else None
    for path in (marker, *_list_notes(folder), *(folder / name for name in _SETS)):
        ours = found and (path.name not in _SETS or (path / OWNED).exists())
        if is_filled(path) and not ours:
            raise TripletError(
                f"{path} was not assembled here: choose another folder than {folder}, or move away "
                "what it holds (so too a set of an earlier version)"
            )
    return found


def _list_notes(folder: Path) -> list[Path]:
    return [folder / "rejected.jsonl", folder / "safety.jsonl"]


def _claim_folder(folder: Path, settings: dict) -> None:
    """Note the settings; clear what an assembly with other ones left, and nothing else."""
    found = _read_settings(folder)
    settings = json.loads(json.dumps(settings))  # as it comes back from a file: tuples are lists
    if found == settings:
        return
    if found:
        changed = [key for key in settings if found.get(key) != settings[key]]
        logger.info(
            "%s was assembled with other settings (%s): it is written anew",
            folder,
            ", ".join(changed),
        )
        for name in _SETS:
            if (folder / name / OWNED).exists():
                clear_set(folder / name)
        for path in _list_notes(folder):
            path.unlink(missing_ok=True)
    write_json(folder / "assembly.json", {"settings": settings})


def _choose_set(item: Item, *, source: Source, fraction: float, seed: int) -> str:
    if item.split:
        test = item.split == "test"
    else:
        digest = hashlib.sha256(f"{seed}:{item.group}".encode()).digest()
        test = int.from_bytes(digest[:8]) < fraction * 2**64
    return "test" if test else "labelled" if source.gives_gt else "pool"


# --------------------------------------------------------------------------------------- items


def _spool_items(items: Iterator[Item], spool) -> int:
    """Write the items to a file, so that they are listed once and not held; their number."""
    seen, count = set(), 0
    for item in items:
        name, number = escape_text(item.id), 1
        while name in seen:  # two files of one name in different folders
            number += 1
            name = f"{escape_text(item.id)}~{number}"
        seen.add(name)
        item = Item(name, escape_text(item.group), item.place, item.split)
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


# ------------------------------------------------------------------------------- the whole set


def _finish(
    job: Job,
    settings: dict,
    writers: dict[str, TripletWriter],
    rejections: Journal,
    evaluation_sets,
    safety,
) -> Assembly:
    """What needs all records: the safety checker and near-duplicates; then fold the journals."""
    answers = Journal(job.folder / "safety.jsonl")
    for late in (
        *reject_unsafe(writers, safety, answers),
        *reject_duplicates(
            writers, distance=job.filters.duplicate_distance, evaluation_sets=evaluation_sets
        ),
    ):
        rejections.append(late)
    rejections.close()
    sets, counts = {}, {}
    # The rejections first: killed between, the next run drops their records all the same.
    with JournalIndex([rejections.path]) as index:
        write_lines(rejections.path, index.items())
        reasons = Counter(record["reason"] for record in index.items())
        drop = set(index.list_ids())
        for name, writer in writers.items():
            sets[name] = writer.close(drop=drop)
            counts[name] = sum(1 for _ in read_records(sets[name]))
    reasons = dict(sorted(reasons.items(), key=lambda x: (-x[1], x[0])))
    write_json(
        job.folder / "assembly.json",
        {
            "settings": settings,
            "counts": counts,
            "rejected": reasons,
            "left_out": job.source.summarise(),
        },
    )
    return Assembly(sets, counts, reasons, rejections.path)
