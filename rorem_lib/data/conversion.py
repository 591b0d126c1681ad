"""One raw item becomes one record of a triplet set; what worker processes do in an assembly."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    escape_text,
)
from rorem_lib.data.masks import binarise_mask
from rorem_lib.data.pictures import TripletError
from rorem_lib.data.triplets import BYTES_SHA256
from rorem_lib.data.writer import describe_file, write_files
from rorem_lib.files import hash_file, read_limit
from rorem_lib.workers import limit_time

logger = logging.getLogger(__name__)

MISSING = "missing"  # beside a record's keys on its way to the set: keys that were NaN
_OWN_KEYS = {"id", "source", "mask", "gt", "GT", "inpaint"}  # a record's, see `write_files`
_HOLDERS = (dict, list, tuple)
_MOST_DEEP = 50  # levels of a record's values; readers refuse 100


@dataclass(frozen=True)
class Job:
    """What every worker needs to know; sent with each item.

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


def convert_item(task: tuple[Job, Item, str]) -> tuple[str | None, dict]:
    """Open, measure and write one item; it may take `ROREM_ITEM_SECONDS` (300) to open.

    Args:
        task: the job, an item, the name of its set.

    Returns:
        The name and the record, or None and the rejection.

    Raises:
        SourceError: the raw data is gone.
        OSError: a file cannot be written.
    """
    job, item, name = task
    place = job.folder / name
    try:
        with limit_time(read_limit("ROREM_ITEM_SECONDS", 300)):
            pictures, measured = _load(item, job)
        place.mkdir(exist_ok=True)
        write = functools.partial(_write, item, pictures, measured, place, job.source)
        return name, wait_for_space(write, job.patience)
    except Rejected as error:
        return None, describe_rejection(item.id, item.group, name, error.reason, error.message)


def reject_lost(task: tuple[Job, Item, str], why: str) -> tuple[None, dict]:
    """The rejection of an item at which its process died."""
    job, item, name = task
    message = f"{item.describe_place()}, in {job.source.folder}: the process that opened it {why}"
    return None, describe_rejection(item.id, item.group, name, "process died", message)


def _load(item: Item, job: Job) -> tuple[Pictures, dict]:
    """Open, shrink and measure an item; one odd file in 200,000 must not end the run."""
    pictures, place = None, item.describe_place()
    try:
        if bad := [text for text in _list_texts(item.place) if text != escape_text(text)]:
            raise Rejected(
                "bad name",
                f"{bad[0]}, in {job.source.folder}, is no UTF-8: rename it, or mend its record",
            )
        pictures = _shrink(job.source.load_item(item), job.max_side)
        return pictures, check_pictures(pictures, job.filters)
    except Exception as error:
        if not Path(job.source.folder).exists():  # a disk that went away is no fault of its items
            raise SourceError(
                f"{job.source.folder} is gone: mount it again; started again, the work goes on"
            ) from error
        if isinstance(error, SourceError):  # a fault of all items
            raise
        if isinstance(error, Rejected):
            if pictures is not None and str(pictures.origin_file) not in error.message:
                error.message += f" ({pictures.origin_file})"  # the filters know no files
            raise
        file = getattr(error, "file", None) or getattr(error, "filename", None)
        gone = isinstance(error, FileNotFoundError) or (file and not Path(file).exists())
        known = isinstance(error, (TripletError, OSError))
        words = f"{error}"[:1000]
        if isinstance(error, MemoryError):
            words = "more memory than ROREM_ITEM_GB lets a process have"
        words = words if known else f"{type(error).__name__}: {words} (at {place})"
        raise Rejected(
            "missing file" if gone else "unreadable" if known else "error", words
        ) from error


def _list_texts(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, _HOLDERS):
        for inner in itertools.chain(value, value.values() if isinstance(value, dict) else ()):
            yield from _list_texts(inner)


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
        known["sha256"] = digests[pictures.origin_file] = _hash_raw(pictures.origin_file)
    files = {part: picture.file for part, picture in parts.items() if picture and picture.file}
    noted = {
        part: describe_file(file, digests.get(file) or _hash_raw(file))
        for part, file in files.items()
    }
    missing = [key for key, value in pictures.extra.items() if _is_nan(value)]
    skipped = {*missing, BYTES_SHA256}
    extra = {**known, **pictures.extra, **measured}
    extra = {key: value for key, value in extra.items() if key not in skipped}
    _check_extra(extra, pictures.origin_file)
    try:
        record = write_files(folder, id=item.id, **values, **extra, bytes_sha256=noted)
    except (TripletError, ValueError, TypeError) as error:  # an id that names no file, ...
        raise Rejected("bad record", f"{pictures.origin_file}: {error}") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL):
            raise Rejected("bad name", f"{pictures.origin_file}: {error}") from None
        raise
    return record | ({MISSING: missing} if missing else {})


def _is_nan(value) -> bool:
    """What tables hold where there is no value."""
    return isinstance(value, (float, np.floating)) and bool(np.isnan(value))


def _hash_raw(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise Rejected("unreadable", f"{path} cannot be read: {error.strerror}") from None


def _check_extra(extra: dict, file: Path) -> None:
    """Refuse keys of a record that are its own, and values that no reader would get back."""
    if taken := sorted(extra.keys() & _OWN_KEYS):
        raise Rejected("bad record", f"{file}: {', '.join(taken)} cannot be further keys")
    try:
        if _measure_depth(extra) > _MOST_DEEP:
            raise ValueError(f"lists in lists deeper than {_MOST_DEEP}")
        text = json.dumps(extra, ensure_ascii=False, default=lambda value: value.item())
        text.encode()
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Rejected("bad record", f"{file}: its further keys cannot be kept: {error}") from None


def _measure_depth(value) -> int:
    depth, level = 0, [value]
    while level and depth <= _MOST_DEEP:
        inner = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, _HOLDERS)]
        depth, level = depth + bool(inner), [x for holder in inner for x in holder]
    return depth


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
