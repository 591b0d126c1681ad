"""One raw item becomes one record of a triplet set; what worker processes do in an assembly."""

from __future__ import annotations

import errno
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from rorem_lib.data.filters import FilterConfig, check_pictures
from rorem_lib.data.items import (
    Item,
    Picture,
    Pictures,
    Rejected,
    Source,
    SourceError,
    describe_rejection,
)
from rorem_lib.data.masks import binarise_mask
from rorem_lib.data.pictures import TripletError
from rorem_lib.data.triplets import BYTES_SHA256
from rorem_lib.data.writer import describe_file, write_files
from rorem_lib.files import hash_file

logger = logging.getLogger(__name__)

MISSING = "missing"  # beside a record's keys on its way to the set: keys that were NaN


@dataclass(frozen=True)
class Job:
    """What every worker needs to know; sent with each chunk.

    Attributes:
        source: the importer.
        folder: where the sets go.
        filters: limits.
        max_side: px, 0 shrinks nothing.
        patience: seconds to wait for space on a full disk.
    """

    source: Source
    folder: Path
    filters: FilterConfig
    max_side: int
    patience: float


@dataclass
class Outcome:
    """A chunk's records by set, and its rejections."""

    records: list[tuple[str, dict]] = field(default_factory=list)
    rejected: list[dict] = field(default_factory=list)


def convert_chunk(task: tuple[Job, list[tuple[Item, str]]]) -> Outcome:
    """Open, measure and write some items.

    Args:
        task: the job, and items with the names of their sets.

    Raises:
        SourceError: the raw data is gone.
        OSError: a file cannot be written.
    """
    job, items = task
    outcome = Outcome()
    for item, name in items:
        place = job.folder / name
        try:
            pictures, measured = _load(item, job)
            place.mkdir(exist_ok=True)
            write = functools.partial(_write, item, pictures, measured, place, job.source)
            outcome.records.append((name, wait_for_space(write, job.patience)))
        except Rejected as error:
            outcome.rejected.append(
                describe_rejection(item.id, item.group, name, error.reason, error.message)
            )
    return outcome


def _load(item: Item, job: Job) -> tuple[Pictures, dict]:
    """Open, shrink and measure an item; one odd file in 200,000 must not end the run."""
    pictures = None
    try:
        pictures = _shrink(job.source.load_item(item), job.max_side)
        return pictures, check_pictures(pictures, job.filters)
    except Exception as error:
        if not Path(job.source.folder).exists():  # a disk that went away is no fault of its items
            raise SourceError(
                f"{job.source.folder} is gone: mount it again; started again, the work goes on"
            ) from error
        if isinstance(error, Rejected):
            if pictures is not None and str(pictures.origin_file) not in error.message:
                error.message += f" ({pictures.origin_file})"  # the filters know no files
            raise
        file = getattr(error, "file", None) or getattr(error, "filename", None)
        gone = isinstance(error, FileNotFoundError) or (file and not Path(file).exists())
        known = isinstance(error, (TripletError, OSError))
        words = str(error) if known else f"{type(error).__name__}: {error} (at {item.place})"
        raise Rejected(
            "missing file" if gone else "unreadable" if known else "error", words
        ) from error


def _write(item: Item, pictures: Pictures, measured: dict, folder: Path, source: Source) -> dict:
    parts = {"source": pictures.source, "mask": pictures.mask, "gt": pictures.gt}
    values = {
        part: picture and (picture.array if picture.file is None else picture.file)
        for part, picture in parts.items()
    }
    if isinstance(values["mask"], np.ndarray):
        values["mask"] = binarise_mask(values["mask"])
    height, width = pictures.source.array.shape[:2]
    known = {
        "group": item.group,
        "origin": source.origin,
        "license": source.license,
        "file": _shorten(pictures.origin_file, source),
        "width": width,
        "height": height,
    }
    digests = {}
    if "sha256" not in pictures.extra:
        known["sha256"] = digests[pictures.origin_file] = hash_file(pictures.origin_file)
    files = {part: picture.file for part, picture in parts.items() if picture and picture.file}
    noted = {part: describe_file(file, digests.get(file)) for part, file in files.items()}
    missing = [key for key, value in pictures.extra.items() if _is_nan(value)]
    skipped = {*missing, BYTES_SHA256}
    extra = {**known, **pictures.extra, **measured}
    extra = {key: value for key, value in extra.items() if key not in skipped}
    try:
        record = write_files(folder, id=item.id, **values, **extra, bytes_sha256=noted)
    except TripletError as error:  # an id that names no file, an infinite score
        raise Rejected("bad record", f"{pictures.origin_file}: {error}") from None
    return record | ({MISSING: missing} if missing else {})


def _is_nan(value) -> bool:
    """What tables hold where there is no value."""
    return isinstance(value, (float, np.floating)) and bool(np.isnan(value))


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
    return Pictures(
        shrink(pictures.source),
        shrink(mask, True),
        shrink(pictures.gt),
        pictures.origin_file,
        pictures.extra,
    )


def wait_for_space(write: Callable, patience: float):
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
