"""Open every image of a triplet set and name each fault."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from rorem_lib.data.pictures import TripletError, load_image
from rorem_lib.data.triplets import (
    Locator,
    Triplet,
    check_id,
    load_images,
    make_unique,
    parse_record,
    read_records,
    resolve_meta,
)
from rorem_lib.files import hash_file
from rorem_lib.workers import map_processes

logger = logging.getLogger(__name__)

_CHUNK = 32  # triplets that a process checks at a time
_SIDE = 512  # px: about the longer side of what the signs of exchanged images are measured on


@dataclass(frozen=True)
class Problem:
    """What `check_set` found wrong with one file, or with the set as a whole (its `meta.json`)."""

    file: Path
    reason: str


def check_set(
    meta: str | Path,
    *,
    allow_absolute: bool = False,
    allow_outside: bool = False,
    hashes: bool = False,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> list[Problem]:
    """Open every image of a set and name each fault; an empty list is a sound set.

    A set has a GT in every record or in none. Masks that are black where an object was, and masks
    in the place of sources, are a fault of the set: each of them alone may be meant, most are not.

    Args:
        hashes: also whether the files are still those that the records describe: their bytes
            (`bytes_sha256`, of sets that the kit wrote), else the source's `sha256`.
        workers: processes that decode.
        progress: called with the number of records checked so far.

    Raises:
        TripletError: the set itself is missing or its meta file is no JSON.
    """
    meta = resolve_meta(meta)
    with_gt = any(
        isinstance(r, dict) and (r.get("GT") or r.get("inpaint")) for r in read_records(meta)
    )
    locator = Locator(meta, allow_absolute, allow_outside, look=False)
    found: dict[int, Problem] = {}

    def list_chunks():
        seen: set[int] = set()
        chunk: list[tuple[int, Triplet]] = []
        for number, record in enumerate(read_records(meta), 1):
            try:
                triplet = parse_record(record, number, locator, with_gt)
                triplet = make_unique(triplet, record, number, seen, meta)
                check_id(triplet.id)
                chunk.append((number, triplet))
            except TripletError as error:
                found[number] = Problem(error.file or meta, _name_record(str(error), number))
            if len(chunk) == _CHUNK:
                yield chunk
                chunk = []
        yield chunk

    checked, signs = 0, Counter()
    check = functools.partial(_check_chunk, hashes=hashes)
    lost = functools.partial(_check_alone, check) if workers > 1 else None
    results = map_processes(check, list_chunks(), workers=workers, lost=lost)
    for count, problems, seen_signs in results:
        checked += count
        found |= problems
        signs += seen_signs
        if progress:
            progress(checked)
    if hashes and signs["no hash"]:
        logger.warning(
            "%s: %d files have no hash in their records, and were opened only",
            meta,
            signs["no hash"],
        )
    whole = _judge_signs(meta, signs)
    return [Problem(meta, reason) for reason in whole] + [found[number] for number in sorted(found)]


def _name_record(reason: str, number: int) -> str:
    return reason if f"record {number}" in reason else f"record {number}: {reason}"


def _judge_signs(meta: Path, signs: Counter) -> list[str]:
    """What is wrong with the set as a whole, from how many triplets look so."""
    opened = signs["opened"]
    if 2 * signs["source is a mask"] > opened:
        return [
            f"{meta}: {signs['source is a mask']:,} of {opened:,} sources are black and white as "
            "masks are, and the masks are not: exchange the two in the records"
        ]
    if 2 * signs["inverted"] > signs["measured"]:
        return [
            f"{meta}: the masks are inverted in {signs['inverted']:,} of {signs['measured']:,} "
            "triplets: source and GT differ where they are black, and white marks what is removed. "
            "Invert them"
        ]
    if signs["open border"] > 0.9 * opened:
        logger.warning(
            "%s: %d of %d masks are white along the whole border: white marks what is removed; "
            "invert them if it is what stays",
            meta,
            signs["open border"],
            opened,
        )
    return []


def _check_chunk(
    chunk: list[tuple[int, Triplet]], *, hashes: bool
) -> tuple[int, dict[int, Problem], Counter]:
    problems, signs = {}, Counter()
    for number, triplet in chunk:
        gone = [path for path in _list_paths(triplet) if not path.exists()]
        try:
            if gone:
                raise TripletError(
                    f"{gone[0]} is missing (record {number}): restore it or remove its record",
                    file=gone[0],
                )
            signs.update(_find_signs(triplet, load_images(triplet)))
            if hashes:
                signs["no hash"] += _compare_bytes(triplet, number)
        except TripletError as error:
            problems[number] = Problem(error.file or triplet.source, str(error))
            if error.file == triplet.mask and not gone:  # perhaps it is the source
                signs.update(_find_exchange(triplet))
    return len(chunk), problems, signs


def _check_alone(
    check, chunk: list[tuple[int, Triplet]], why: str
) -> tuple[int, dict[int, Problem], Counter]:
    """The result of a chunk at which a process died: that triplet is named, the others checked."""
    if len(chunk) == 1:
        number, triplet = chunk[0]
        what = f"record {number}: the process that opened the files of {triplet.id} {why}"
        return 1, {number: Problem(triplet.source, what)}, Counter()
    lost = functools.partial(_check_alone, check)
    problems, signs = {}, Counter()
    for _, found, seen in map_processes(check, ([pair] for pair in chunk), lost=lost):
        problems |= found
        signs += seen
    return len(chunk), problems, signs


def _find_exchange(triplet: Triplet) -> dict[str, int]:
    """The signs of a triplet whose mask is refused."""
    try:
        source = load_image(triplet.source)
    except TripletError:
        return {}
    return {"opened": 1, "source is a mask": int(_is_mask(source))}


def _is_mask(image: np.ndarray) -> bool:
    return _is_drawn(image) and np.ptp(image, axis=2).max() < 16


def _list_paths(triplet: Triplet) -> list[Path]:
    return [path for path in (triplet.source, triplet.mask, triplet.gt) if path]


def _compare_bytes(triplet: Triplet, number: int) -> int:
    """How many of a triplet's files have no hash in its record.

    Raises:
        TripletError: a file is not the one that was written.
    """
    paths, noted = _list_paths(triplet), triplet.bytes_sha256.split()
    described = "that was written"
    # of a set that others made; where there is a `file`, it is the hash of that raw file
    if not noted and triplet.extra.get("sha256") and "file" not in triplet.extra:
        noted = [f"-{triplet.extra['sha256']}"]
        described = "whose sha256 the record holds"
    without = len(paths)
    for path, note in zip(paths, noted):
        size, _, digest = note.partition("-")
        same = not size or str(path.stat().st_size) == size
        if not same or (digest and not hash_file(path).startswith(digest)):
            raise TripletError(
                f"{path} is not the file {described} (record {number}): it was changed or "
                "exchanged since; restore it, or write the set anew",
                file=path,
            )
        without -= bool(digest)
    return without


def _find_signs(triplet: Triplet, images: dict[str, np.ndarray | None]) -> dict[str, int]:
    """Signs of exchanged or inverted images in a triplet, as 0 and 1."""
    source, gt, mask = (images[part] for part in ("source", "gt", "mask"))
    step = max(1, max(mask.shape) // _SIDE)  # every so many px: the signs are coarse
    source, mask = source[::step, ::step], mask[::step, ::step]
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    signs = {"opened": 1, "open border": int(gt is None and (border >= 128).mean() > 0.99)}
    if _is_mask(source):
        signs["source is a mask"] = int(not _is_drawn(load_image(triplet.mask, "L")))
    white = mask >= 128
    if gt is not None and white.any() and not white.all():
        gt = np.ascontiguousarray(gt[::step, ::step])
        change = cv2.absdiff(np.ascontiguousarray(source), gt).mean(axis=2)
        inside, outside = change[white].mean(), change[~white].mean()
        signs |= {"measured": 1, "inverted": int(outside > 8 and outside > 3 * inside)}
    return signs


def _is_drawn(image: np.ndarray) -> bool:
    """Whether an image is black and white alone, as masks are and photos are not."""
    return bool(((image < 16) | (image > 239)).mean() > 0.98)
