"""Open every image of a triplet set and name each fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rorem_lib.data.pictures import TripletError
from rorem_lib.data.triplets import (
    Locator,
    Triplet,
    load_images,
    make_unique,
    parse_record,
    read_records,
    resolve_meta,
)
from rorem_lib.workers import map_processes

_CHUNK = 32  # triplets that a process checks at a time


@dataclass(frozen=True)
class Problem:
    """What `check_set` found wrong with one file."""

    file: Path
    reason: str


def check_set(
    meta: str | Path,
    *,
    allow_absolute: bool = False,
    allow_outside: bool = False,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> list[Problem]:
    """Open every image of a set and name each fault; an empty list is a sound set.

    A set has a GT in every record or in none.

    Args:
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
                chunk.append((number, make_unique(triplet, record, number, seen, meta)))
            except TripletError as error:
                found[number] = Problem(error.file or meta, str(error))
            if len(chunk) == _CHUNK:
                yield chunk
                chunk = []
        yield chunk

    checked = 0
    for count, problems in map_processes(_check_chunk, list_chunks(), workers=workers):
        checked += count
        found |= problems
        if progress:
            progress(checked)
    return [found[number] for number in sorted(found)]


def _check_chunk(chunk: list[tuple[int, Triplet]]) -> tuple[int, dict[int, Problem]]:
    problems = {}
    for number, triplet in chunk:
        gone = [
            path
            for path in (triplet.source, triplet.mask, triplet.gt)
            if path and not path.exists()
        ]
        try:
            if gone:
                raise TripletError(
                    f"{gone[0]} is missing (record {number}): restore it or remove its record",
                    file=gone[0],
                )
            load_images(triplet)
        except TripletError as error:
            problems[number] = Problem(error.file or triplet.source, str(error))
    return len(chunk), problems
