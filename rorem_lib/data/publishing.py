"""Publish triplet sets: Parquet shards with their images embedded, a dataset card, the upload.

`datasets` writes the shards and `huggingface_hub` uploads them; the layout is that of datasets on
the Hub, so `datasets.load_dataset` opens the folder and the repository, streaming or not;
`rorem_lib.sources.parquet` reads them back. What `Dataset.push_to_hub` lacks is here: every image
is opened before anything is sent, the folder can be looked at first, and stopped, it goes on.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from rorem_lib.data.card import make_card
from rorem_lib.data.items import SourceError
from rorem_lib.data.pictures import TripletError
from rorem_lib.data.remote import talk_to_hub
from rorem_lib.data.triplets import Triplet, iter_triplets, load_images, resolve_meta
from rorem_lib.files import flush_disk, hide_paths, read_json, write_json, write_text
from rorem_lib.workers import group_chunks

logger = logging.getLogger(__name__)

VERSION = 3  # raise it when what a shard holds changes
NOTE = ".publishing.json"  # {shard: hash of what it holds}; not published
IMAGES = ("source", "mask", "GT")
TYPES = {  # of the records' keys that are columns; the others are in `extra`
    "origin": str,
    "license": str,
    "accepted_by": str,
    "remover": str,
    "score": float,
    "round": int,
}
AHEAD = 32  # rows in memory


def publish_sets(
    sets: Mapping[str, str | Path],
    folder: str | Path,
    *,
    repo_id: str,
    acceptance: str = "",
    filters: str = "",
    license: str = "",
    title: str = "",
    max_shard_bytes: int = 500_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write sets as `data/<split>-00000-of-00001.parquet` ... and a dataset card, `README.md`.

    Image files are embedded as they are. Of paths on this machine, such as the remover's folder,
    the last two names are published. Every image is opened once, to be sure and to measure it
    (columns `width`, `height` in px, `mask_area` 0 to 1). Killed and started again it goes on:
    finished shards whose records and files are still the same are kept. The same sets give the same
    bytes.

    Args:
        sets: {split: what `resolve_meta` takes}; a split's name is letters, digits and `_`.
        folder: made if missing.
        repo_id: `owner/name`, for the card.
        acceptance: Markdown, how the GTs were made and accepted.
        filters: Markdown, what the triplets had to pass.
        license: of records that name none (SPDX identifier).
        title: of the card (default: the repository's name).
        max_shard_bytes: about the largest shard.
        progress: called with (records done, all records).

    Returns:
        `folder`.

    Raises:
        TripletError: a set is missing, all are empty, files are missing or unsound, licences are
            missing, some records of a split have a GT and others none, a split's name, `repo_id`,
            or the folder has other Parquet files. Nothing of the shard at fault is written.
        OSError: the disk is full or refuses.
    """
    from huggingface_hub.utils import validate_repo_id

    folder = Path(folder)
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise TripletError(f"{repo_id!r} is no repository, owner/name: {error}") from None
    wrong = [split for split in sets if not re.fullmatch(r"\w+", split)]
    if wrong:
        raise TripletError(
            "a split's name has letters, digits and _ only: rename " + ", ".join(wrong)
        )
    metas = {split: resolve_meta(meta) for split, meta in sets.items()}
    plans = {split: _plan(meta, license, max_shard_bytes) for split, meta in metas.items()}
    shards, digests = {}, {}
    for split, plan in plans.items():
        for number, (_, digest) in enumerate(plan):
            name = f"{split}-{number:05d}-of-{len(plan):05d}.parquet"
            shards.setdefault(split, []).append(folder / "data" / name)
            digests[name] = digest
        if not plan:
            logger.warning("%s has no records: %s becomes no split", metas[split], split)
    if not shards:
        raise TripletError(
            f"there is nothing to publish: {', '.join(map(str, metas.values()))} have no records"
        )
    _clear(folder, digests)
    total, done = sum(count for plan in plans.values() for count, _ in plan), 0
    for split, paths in shards.items():
        triplets = iter_triplets(metas[split], require_gt=False, look=False)
        for path, (count, _) in zip(paths, plans[split]):
            rows = itertools.islice(triplets, count)
            if path.is_file():
                deque(rows, maxlen=0)  # passed over
            else:
                write_parquet(path, _get_features(), _read_rows(rows, license))
            done += count
            if progress:
                progress(done, total)
    title = title or repo_id.split("/")[-1]
    card = make_card(shards, title=title, repo_id=repo_id, acceptance=acceptance, filters=filters)
    flush_disk(folder)
    write_text(folder / "README.md", card)
    return folder


def write_parquet(path: str | Path, features, rows: Iterable[dict]) -> Path:
    """Write rows as one Parquet file, atomically, for `datasets.load_dataset`.

    They are on the disk beside it on their way there: memory does not grow with them.

    Args:
        path: in a folder that is made if missing.
        features: the rows' `datasets.Features`; an image is {"bytes": ..., "path": its name}.
        rows: at least one; read once.

    Raises:
        OSError: the disk is full or refuses; no half of the file is left.
        Exception: what `rows` raises.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    path = Path(path)
    partial = path.with_name(f".{path.stem}.partial")
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # there would be two a file
    try:
        shutil.rmtree(partial, ignore_errors=True)  # what a kill has left
        partial.mkdir(parents=True)
        table = datasets.Dataset.from_generator(
            lambda: rows,
            features=features,
            cache_dir=str(partial),
            fingerprint="rows",
            writer_batch_size=AHEAD,
        )
        table.to_parquet(partial / path.name)
        os.replace(partial / path.name, path)
    except (OSError, DatasetGenerationError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, OSError):
            raise OSError(cause.errno, f"cannot write {path}: {cause}") from error
        raise cause from None
    finally:
        if bars:
            datasets.enable_progress_bars()
        shutil.rmtree(partial, ignore_errors=True)
    return path


def upload_dataset(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str = "Publish",
) -> str:
    """Put a published folder on the Hub; the repository is made if it is not there.

    Started again after a broken connection or a kill it sends what is not there yet, shard by
    shard. Shards of the same splits that an earlier upload left are deleted. The token is that of
    `hf auth login` or `HF_TOKEN`.

    Args:
        folder: what `publish_sets` wrote.
        repo_id: `owner/name`.
        private: of a new repository.
        revision: branch, made if missing; the default branch if None.
        message: the commit's.

    Returns:
        The commit's address, which ends in its hash.

    Raises:
        SourceError: the folder is not finished.
        OSError: the Hub's errors, see `data.remote.talk_to_hub`.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    splits = {re.sub(r"-\d+-of-\d+$", "", p.stem) for p in (folder / "data").glob("*.parquet")}
    if not splits or not (folder / "README.md").is_file():
        raise SourceError(f"{folder} is not published to the end: publish again, it goes on")
    with talk_to_hub(repo_id, revision):
        api = HfApi()
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        if revision:
            api.create_branch(repo_id, branch=revision, repo_type="dataset", exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            revision=revision,
            allow_patterns=["README.md", "data/*.parquet"],
            commit_message=message,
            delete_patterns=[f"data/{split}-*-of-*.parquet" for split in sorted(splits)],
        )
    return f"{api.endpoint}/datasets/{repo_id}/tree/{commit.oid}"


# ---------------------------------------------------------------------------------------- shards


def _plan(meta: Path, license: str, max_bytes: int) -> list[tuple[int, str]]:
    """Cut a set into shards, without opening an image; refuse what can be seen so far.

    Returns:
        How many records each shard has, in the set's order, and a hash of what it will hold.
    """
    shards, size, missing, unlicensed, without = [], 0, [], [], []
    for triplet in iter_triplets(meta, require_gt=False, look=False):
        stats = []
        for path in filter(None, (triplet.source, triplet.mask, triplet.gt)):
            try:
                stats.append(path.stat())
            except OSError:
                missing.append(str(path))
        if not triplet.extra.get("license") and not license:
            unlicensed.append(triplet.id)
        if triplet.gt is None:
            without.append(triplet.id)
        size += sum(stat.st_size for stat in stats)
        if not shards or size > max_bytes:
            shards.append([0, hashlib.sha256()])
            size = sum(stat.st_size for stat in stats)
        shards[-1][0] += 1
        state = [[stat.st_size, stat.st_mtime_ns] for stat in stats]
        record = [VERSION, license, triplet.id, triplet.group, triplet.extra, state]
        shards[-1][1].update(json.dumps(record).encode())
    total = sum(count for count, _ in shards)
    if len(without) == total:  # a pool
        without = []
    for names, fault in (
        (missing, "files are missing, restore them or remove their records"),
        (unlicensed, "records name no license: add it to them, or pass the license of the rest"),
        (without, f"of {total} records have no GT: publish them as a split of their own"),
    ):
        if names:
            raise TripletError(
                f"{meta}: {len(names)} {fault}: {_list_some(names)}",
                file=Path(names[0]) if names is missing else meta,
            )
    return [(count, digest.hexdigest()) for count, digest in shards]


def _list_some(names: list[str]) -> str:
    return ", ".join(names[:5]) + " ..." * (len(names) > 5)


def _clear(folder: Path, digests: dict[str, str]) -> None:
    """Delete shards of other records; refuse to share the folder with somebody else's files."""
    noted = (folder / NOTE).is_file()
    old = read_json(folder / NOTE) if noted else {}
    found = sorted((folder / "data").glob("*.parquet"))
    foreign = [str(path) for path in found if path.name not in old]
    if not noted and (folder / "README.md").exists():
        foreign.append(str(folder / "README.md"))
    if foreign:
        raise TripletError(
            f"{folder} holds Parquet files or a card of something else: choose another "
            f"folder, or move them away: {_list_some(foreign)}"
        )
    (folder / "README.md").unlink(missing_ok=True)  # with it a folder is complete
    for path in found:
        if old[path.name] != digests.get(path.name):
            path.unlink()
    write_json(folder / NOTE, digests)  # before the first shard: one that it lacks is foreign


def _get_features():
    from datasets import Features, Image, Value

    names = {str: "string", float: "float64", int: "int64"}
    columns = {"id": str, "group": str, **dict.fromkeys(IMAGES), **TYPES}
    columns |= {"width": int, "height": int, "mask_area": float, "extra": str}
    return Features({key: Value(names[kind]) if kind else Image() for key, kind in columns.items()})


def _read_rows(triplets: Iterable[Triplet], license: str) -> Iterator[dict]:
    """A shard's rows; where images are unsound it fails at the end, with all of them named."""
    problems = []
    with ThreadPoolExecutor() as pool:
        for chunk in group_chunks(triplets, AHEAD):
            for row in pool.map(functools.partial(_read_row, license=license), chunk):
                if isinstance(row, TripletError):
                    problems.append(row)
                else:
                    yield row
    if problems:
        raise TripletError(
            f"{len(problems)} records are unsound; mend or remove them: "
            + "; ".join(map(str, problems[:5])),
            file=problems[0].file,
        )


def _read_row(triplet: Triplet, license: str) -> dict | TripletError:
    try:
        mask = load_images(triplet)["mask"]
    except TripletError as error:
        return error
    row = {"id": triplet.id, "group": hide_paths(triplet.group)}
    for key, path in zip(IMAGES, (triplet.source, triplet.mask, triplet.gt)):
        row[key] = path and {"bytes": path.read_bytes(), "path": path.name}
    extra = hide_paths(triplet.extra)  # such as the remover's folder
    extra["license"] = extra.get("license") or license
    for key, kind in TYPES.items():
        row[key] = extra.pop(key) if type(extra.get(key)) is kind else None
    row["height"], row["width"] = mask.shape
    row["mask_area"] = float(np.mean(mask >= 128))
    row["extra"] = json.dumps(extra, ensure_ascii=False, sort_keys=True)
    return row
