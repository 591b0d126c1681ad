"""Publish triplet sets: Parquet shards with their pictures embedded, a dataset card, the upload.

The layout is that of datasets on the Hugging Face Hub, so `datasets.load_dataset` opens the folder
and the repository, streaming or not; `rorem_lib.sources.parquet` reads them back.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rorem_lib.data.card import make_card
from rorem_lib.data.items import SourceError
from rorem_lib.data.pictures import TripletError
from rorem_lib.data.remote import talk_to_hub
from rorem_lib.data.summary import CLASS_KEYS
from rorem_lib.data.triplets import (
    Triplet,
    describe_size,
    iter_triplets,
    load_images,
    resolve_meta,
)
from rorem_lib.files import read_json, write_json, write_text

logger = logging.getLogger(__name__)

VERSION = 1  # raise it when what a shard holds changes
NOTES = ".publishing"  # what is known of each finished shard; not published
GROUP_ROWS, GROUP_BYTES = 100, 64_000_000  # of a row group, the least that a reader has to load
PICTURES = ("source", "mask", "GT")
TEXTS = ("origin", "license", "accepted_by", "remover")


@dataclass
class _Shard:
    """A part of a split, planned: so many of its records, in the set's order."""

    split: str
    rows: int = 0
    size: int = 0
    digest: object = field(default_factory=hashlib.sha256)
    name: str = ""


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

    Picture files are embedded as they are. Every picture is opened once, to be sure and for the
    card's statistics. Killed and started again it goes on: finished shards whose records and files
    are still the same are kept. The same sets give the same bytes.

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
            missing, some records of a split have a GT and others none, a split's name, or the
            folder has other Parquet files. Nothing of the shard at fault is written.
        OSError: the disk is full or refuses.
    """
    folder = Path(folder)
    wrong = [split for split in sets if not re.fullmatch(r"\w+", split)]
    if wrong:
        raise TripletError(
            "a split's name has letters, digits and _ only: rename " + ", ".join(wrong)
        )
    metas = {split: resolve_meta(meta) for split, meta in sets.items()}
    shards = [
        shard
        for split, meta in metas.items()
        for shard in _plan(split, meta, license, max_shard_bytes)
    ]
    if not shards:
        raise TripletError(
            f"there is nothing to publish: {', '.join(map(str, metas.values()))} have no records"
        )
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / NOTES).mkdir(exist_ok=True)
    _drop_others(folder, {shard.name for shard in shards})
    total, done = sum(shard.rows for shard in shards), 0
    for split, meta in metas.items():
        triplets = iter_triplets(meta, require_gt=False, look=False)
        for shard in (s for s in shards if s.split == split):
            rows = itertools.islice(triplets, shard.rows)
            if _is_done(folder, shard):
                deque(rows, maxlen=0)  # passed over
            else:
                (folder / "README.md").unlink(missing_ok=True)  # with it a folder is complete
                _write_shard(folder, shard, rows, license)
            done += shard.rows
            if progress:
                progress(done, total)
    write_text(
        folder / "README.md",
        make_card(
            _merge_facts(folder, shards),
            _features(),
            repo_id=repo_id,
            acceptance=acceptance,
            title=title or repo_id.split("/")[-1],
            filters=filters,
        ),
    )
    return folder


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


def _plan(split: str, meta: Path, license: str, max_bytes: int) -> list[_Shard]:
    """Cut a set into shards, without opening a picture; refuse what can be seen so far."""
    shards, missing, unlicensed, without = [], [], [], []
    for triplet in iter_triplets(meta, require_gt=False, look=False):
        stats = []
        for path in _files(triplet):
            try:
                stats.append(path.stat())
            except OSError:
                missing.append(str(path))
        if not triplet.extra.get("license") and not license:
            unlicensed.append(triplet.id)
        if triplet.gt is None:
            without.append(triplet.id)
        size = sum(stat.st_size for stat in stats)
        if not shards or shards[-1].size + size > max_bytes:
            shards.append(_Shard(split))
        shard = shards[-1]
        shard.rows, shard.size = shard.rows + 1, shard.size + size
        shard.digest.update(
            json.dumps(
                [
                    VERSION,
                    pa.__version__,
                    license,
                    triplet.id,
                    triplet.group,
                    triplet.extra,
                    [[stat.st_size, stat.st_mtime_ns] for stat in stats],
                ]
            ).encode()
        )
    count = sum(shard.rows for shard in shards)
    if not count:
        logger.warning("%s has no records: %s becomes no split", meta, split)
    if missing:
        raise TripletError(
            f"{meta}: {len(missing)} files are missing, restore them or remove "
            f"their records: {_list_some(missing)}",
            file=Path(missing[0]),
        )
    if unlicensed:
        raise TripletError(
            f"{meta}: {len(unlicensed)} records name no license: add it to them, or "
            f"pass the license of the rest: {_list_some(unlicensed)}",
            file=meta,
        )
    if 0 < len(without) < count:
        raise TripletError(
            f"{meta}: {len(without)} of {count} records have no GT: publish them as "
            f"a split of their own: {_list_some(without)}",
            file=meta,
        )
    for number, shard in enumerate(shards):
        shard.name = f"{split}-{number:05d}-of-{len(shards):05d}"
    return shards


def _files(triplet: Triplet) -> list[Path]:
    return [path for path in (triplet.source, triplet.mask, triplet.gt) if path]


def _list_some(names: list[str]) -> str:
    return ", ".join(names[:5]) + " ..." * (len(names) > 5)


def _note(folder: Path, name: str) -> Path:
    return folder / NOTES / f"{name}.json"


def _is_done(folder: Path, shard: _Shard) -> bool:
    note = _note(folder, shard.name)
    return (
        (folder / "data" / f"{shard.name}.parquet").is_file()
        and note.is_file()
        and read_json(note)["digest"] == shard.digest.hexdigest()
    )


def _drop_others(folder: Path, names: set[str]) -> None:
    """Delete the shards of an earlier plan; refuse to share the folder with other files."""
    found = sorted((folder / "data").glob("*.parquet"))
    foreign = [str(path) for path in found if not _note(folder, path.stem).is_file()]
    if foreign:
        raise TripletError(
            f"{folder} holds Parquet files of something else: choose another "
            f"folder, or move them away: {_list_some(foreign)}"
        )
    for path in found:
        if path.stem not in names:
            path.unlink()
            _note(folder, path.stem).unlink()


def _features():
    from datasets import Features, Image, Value

    return Features(
        {"id": Value("string"), "group": Value("string")}
        | {key: Image() for key in PICTURES}
        | {key: Value("string") for key in TEXTS}
        | {"score": Value("float64"), "round": Value("int64"), "extra": Value("string")}
    )


def _write_shard(folder: Path, shard: _Shard, triplets, license: str) -> None:
    schema = _features().arrow_schema
    facts = {
        "rows": 0,
        "bytes": 0,
        "areas": [],
        "sizes": Counter(),
        "classes": Counter(),
        "kinds": Counter(),
    }
    problems, rows, size = [], [], 0
    path = folder / "data" / f"{shard.name}.parquet"
    beside = path.with_name(f".{path.name}.partial")
    path.unlink(missing_ok=True)
    try:
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            pq.ParquetWriter(
                beside,
                schema,
                use_dictionary=list(TEXTS),
                write_statistics=["id"],
                use_content_defined_chunking=True,
            ) as writer,
        ):  # so that the Hub finds old chunks

            def write_group():
                found = list(pool.map(lambda triplet: _read_row(triplet, license), rows))
                problems.extend(row for row in found if isinstance(row, TripletError))
                if not problems:
                    table = pa.Table.from_pylist([row for row, _ in found], schema)
                    writer.write_table(table, row_group_size=len(found))
                    facts["bytes"] += table.nbytes
                    for row, fact in found:
                        _count(facts, row, fact)

            for triplet in triplets:
                new = sum(file.stat().st_size for file in _files(triplet))
                if rows and (len(rows) == GROUP_ROWS or size + new > GROUP_BYTES):
                    write_group()
                    rows, size = [], 0
                rows.append(triplet)
                size += new
            write_group()
        if problems:
            raise TripletError(
                f"{len(problems)} records are unsound; mend or remove them: "
                + "; ".join(map(str, problems[:5])),
                file=problems[0].file,
            )
        # The note first: a shard without one is somebody else's.
        write_json(_note(folder, shard.name), {"digest": shard.digest.hexdigest(), "facts": facts})
        os.replace(beside, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def _read_row(triplet: Triplet, license: str):
    """(a row, the class, size and mask's share), or the error that forbids it."""
    try:
        images = load_images(triplet)
    except TripletError as error:
        return error
    row = {"id": triplet.id, "group": triplet.group}
    for key, path in zip(PICTURES, (triplet.source, triplet.mask, triplet.gt)):
        row[key] = path and {"bytes": path.read_bytes(), "path": path.name}
    extra = dict(triplet.extra)
    extra["license"] = extra.get("license") or license
    kinds = {**dict.fromkeys(TEXTS, str), "score": float, "round": int}
    for key, kind in kinds.items():
        row[key] = extra.pop(key) if type(extra.get(key)) is kind else None
    row["extra"] = json.dumps(extra, ensure_ascii=False, sort_keys=True)
    return row, (
        _name_class(extra),
        describe_size(images["mask"]),
        round(float(np.mean(images["mask"] >= 128)), 5),
    )


def _name_class(extra: dict) -> str:
    found = next((extra[key] for key in CLASS_KEYS if extra.get(key)), "")
    return ", ".join(map(str, found)) if isinstance(found, list) else str(found)


def _count(facts: dict, row: dict, fact: tuple[str, str, float]) -> None:
    facts["rows"] += 1
    facts["classes"][fact[0]] += 1
    facts["sizes"][fact[1]] += 1
    facts["areas"].append(fact[2])
    facts["kinds"][json.dumps([row[key] for key in (*TEXTS, "round")], ensure_ascii=False)] += 1


def _merge_facts(folder: Path, shards: list[_Shard]) -> dict[str, dict]:
    """What the notes of a split's shards say together."""
    splits: dict[str, dict] = {}
    for shard in shards:
        facts = read_json(_note(folder, shard.name))["facts"]
        facts |= {
            "shards": 1,
            "file_bytes": (folder / "data" / f"{shard.name}.parquet").stat().st_size,
        }
        merged = splits.setdefault(shard.split, {})
        for key, value in facts.items():
            value = Counter(value) if isinstance(value, dict) else value
            merged[key] = merged[key] + value if key in merged else value
    return splits
