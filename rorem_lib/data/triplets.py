"""The records of triplet sets: find and read them, open their images."""

from __future__ import annotations

import codecs
import functools
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import ijson
import numpy as np

from rorem_lib.data.pictures import (
    AGAIN,
    TripletError,
    describe_content,
    fit_triplet,
    load_image,
    load_mask,
    read_head,
)
from rorem_lib.files import JsonLimitError, Shallow

META = "meta.json"
_MOST_RECORD = 2**26  # bytes of a record, some thousand times what they have
HIDDEN_MARK = ".hidden-truth"  # a file; what lies beside and below it is never read as a triplet
HIDDEN_PARTS = ("truth", "object", "shadow")  # what `hidden/<set>` of the built-in scenes holds
BYTES_SHA256 = "bytes_sha256"
_OWN_KEYS = {"id", "source", "mask", "GT", "group", BYTES_SHA256}
_LONGEST_ID = 200  # bytes; a file's name has 255, and needs an ending and a second name beside it
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Triplet:
    """One record of a set.

    Attributes:
        id: unique within its set; the source's file name where the record has none.
        source: the image with the object.
        mask: what is to be removed.
        gt: the image without the object, or a removal; None in an unlabelled pool.
        group: scene, video or original image (default: the id); a split never cuts a group.
        extra: every other key of the record (`score` as a float, `origin`, `license`, ...).
        bytes_sha256: what the files held when they were written (see `writer.write_files`); ""
            where the record does not say.
    """

    id: str
    source: Path
    mask: Path
    gt: Path | None
    group: str
    extra: dict = field(default_factory=dict)
    bytes_sha256: str = ""


# ------------------------------------------------------------------------------- reading records


def resolve_meta(path: str | Path) -> Path:
    """The `meta.json` that a set's folder or file means (`sets.resolve` knows `builtin:` too).

    Args:
        path: a set's folder, or its meta file.

    Raises:
        TripletError: there is no such set; says which sets are near.
    """
    path = Path(path).expanduser()
    meta = path / META if path.is_dir() or not path.suffix else path
    if meta.is_file():
        return meta
    if list(meta.parent.glob("meta.*jsonl.partial")):
        raise TripletError(
            f"{meta.parent} is an unfinished set: run again what writes it, it "
            "goes on where it stopped"
        )
    near = sorted(str(found.parent) for found in meta.parent.glob(f"*/{META}"))
    hint = f"; there is {', '.join(near)}" if near else ": run the stage that writes this set"
    raise TripletError(f"there is no triplet set at {path} ({META} is missing){hint}")


def read_records(meta: Path) -> Iterator:
    """A meta file's records as they stand: a JSON list, a single object, or JSON lines.

    They are read one by one: a list of 200,000 takes no more memory than one of 10.

    Raises:
        TripletError: it is neither; names the file and the line, or the record that holds NaN.
    """
    with open(meta, "rb") as stream:
        if stream.read(3) != codecs.BOM_UTF8:
            stream.seek(0)
        start, head = stream.tell(), b" "
        while head.isspace():
            head = stream.read(1)
        stream.seek(start)
        if not head:  # an empty file has no records, as an empty list of lines
            return
        stream, count = Shallow(stream, meta, room=_MOST_RECORD), 0
        try:
            for record in ijson.items(
                stream, "item" if head == b"[" else "", use_float=True, multiple_values=head != b"["
            ):
                count, stream.since = count + 1, 0
                yield record
        except JsonLimitError as error:
            raise TripletError(str(error), file=meta) from None
        except (ijson.JSONError, ValueError) as error:
            if not re.search("digits|overflow", str(error)):
                raise _describe_fault(meta, error) from None
            yield from itertools.islice(_read_long_numbers(meta), count, None)


def _read_long_numbers(meta: Path) -> Iterator:
    """As `read_records`, all at once: integers of thousands of digits stay texts, floats above
    all are infinite."""
    most = sys.get_int_max_str_digits()
    decoder = json.JSONDecoder(parse_int=lambda x: x if len(x) > most else int(x))
    text, place = meta.read_text(encoding="utf-8-sig").strip(), 0
    try:
        if text.startswith("["):
            yield from decoder.decode(text)
            return
        while place < len(text):
            record, place = decoder.raw_decode(text, place)
            yield record
            place = _SPACE.match(text, place).end()
    except json.JSONDecodeError as error:
        raise _describe_fault(meta, error) from None


def _describe_fault(meta: Path, error: Exception) -> TripletError:
    """Where a meta file stops being JSON; only then is it worth reading it a second time."""
    if what := describe_content(read_head(meta)):
        return TripletError(f"{meta} is {what}", file=meta)
    where = str(error).splitlines()[0]
    try:
        text = meta.read_text(encoding="utf-8-sig")
        if found := _find_constant(text):
            return TripletError(
                f"{meta}, record {found[0]}: {found[1]} is no JSON: put null in its place, or take "
                "the key away",
                file=meta,
            )
        json.loads(text)
    except json.JSONDecodeError as found:
        where = f"line {found.lineno}: {found.msg}"
    except UnicodeDecodeError as found:
        where = f"byte {found.start} is no UTF-8"
    except ValueError as found:
        where = str(found)
    return TripletError(f"{meta} is neither JSON nor JSON lines ({where}): {AGAIN}")


def _find_constant(text: str) -> tuple[int, str] | None:
    """The number of the first record with NaN or infinity, and which; Python alone writes them."""
    found = []
    decoder = json.JSONDecoder(parse_constant=found.append)
    place, number = 0, 0
    while (place := re.compile(r"[\s,\[\]]*").match(text, place).end()) < len(text):
        number += 1
        try:
            place = decoder.raw_decode(text, place)[1]
        except ValueError:
            return None
        if found:
            return number, found[0]
    return None


def check_id(name: str) -> None:
    """Refuse an id that cannot name a triplet's files, as the writer does.

    Raises:
        TripletError: it is empty, has a `/` or a leading dot, is no UTF-8, or has more than 200
            bytes.
    """
    size = len(name.encode(errors="surrogatepass"))
    if not 0 < size <= _LONGEST_ID or re.search("^[.]|[/\0\ud800-\udfff]", name):
        raise TripletError(
            f"the id {ascii(name) if not name.isprintable() else repr(name)} cannot name a "
            f"triplet's files: take 1 to {_LONGEST_ID} bytes (it has {size}) without '/' and "
            "without a leading dot. A record without an id has its source's file name: add one"
        )


def check_ids(names: Iterable[str]) -> None:
    """`check_id` of all that a job will write, before it begins."""
    for name in names:
        check_id(name)


def is_hidden(folder: str | Path) -> bool:
    """Whether a folder, or one above it, carries the mark of hidden truth, or is a scene set's
    `hidden/<set>` of an earlier version, which had none."""
    place = os.path.realpath(folder)
    while True:
        above = os.path.dirname(place)
        if os.path.exists(os.path.join(place, HIDDEN_MARK)) or (
            os.path.basename(above) == "hidden"
            and all(os.path.isdir(os.path.join(place, part)) for part in HIDDEN_PARTS)
        ):
            return True
        if above == place:
            return False
        place = above


class Locator:
    """Turns a record's paths into files; refuses what a set must not reach."""

    def __init__(self, meta: Path, allow_absolute: bool, allow_outside: bool, look: bool = True):
        self.meta, self.look = meta, look  # look: whether the files are there
        self.folder = os.path.abspath(meta.parent)
        self.allow_absolute, self.allow_outside = allow_absolute, allow_outside
        # One listing a folder is far cheaper than asking for 200,000 files one by one.
        self._list = functools.cache(lambda folder: frozenset(_list_folder(folder)))
        self._is_hidden = functools.cache(is_hidden)

    def find(self, value, where: str) -> Path:
        if not isinstance(value, str) or not value:
            raise TripletError(f"{where}: a path must be a text, not {value!r}")
        full = os.path.normpath(os.path.join(self.folder, value))
        parent, name = os.path.split(full)
        if self._is_hidden(parent):
            raise TripletError(
                f"{where}: {value} lies in a hidden folder (there is a file {HIDDEN_MARK} in it or "
                "above it, or it is hidden/<set> of built-in scenes): their truth is never read as "
                "a triplet"
            )
        if os.path.isabs(value):
            if not self.allow_absolute:
                raise TripletError(
                    f"{where}: {value} is an absolute path: make it relative to "
                    f"{self.folder}, or allow absolute paths on purpose"
                )
        elif not self.allow_outside and os.path.commonpath([full, self.folder]) != self.folder:
            raise TripletError(
                f"{where}: {value} leaves the set's folder {self.folder}: copy the "
                "file into the set, or allow outside paths on purpose"
            )
        if self.look and name not in self._list(parent) and not os.path.exists(full):
            raise TripletError(
                f"{full} is missing ({where}): restore it or remove its record", file=Path(full)
            )
        return Path(full)


def _list_folder(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def parse_record(record, number: int, locator: Locator, require_gt: bool | None) -> Triplet:
    """A record of a meta file, the `number`-th from 1, as a triplet.

    Raises:
        TripletError: a key is missing or no path, or the locator refuses a path.
    """
    where = f"{locator.meta}, record {number}"
    if not isinstance(record, dict):
        raise TripletError(f"{where} is no object: expected source, mask and GT, got {record!r}")
    keys = {"source": "source", "mask": "mask", "gt": "GT"}
    if "inpaint" in record:  # the authors' older layout: there `gt` is the image given in
        keys = {"source": "gt", "mask": "mask", "gt": "inpaint"}
    missing = [
        key for part, key in keys.items() if not record.get(key) and (part != "gt" or require_gt)
    ]
    if missing:
        raise TripletError(
            f"{where} has no {' and no '.join(missing)} (its keys: "
            f"{', '.join(record)})"
            + (
                "; a pool without GT is no training set: "
                "generate removals and accept them first" * (missing == ["GT"])
            )
        )
    paths = {
        part: locator.find(record[key], where) if record.get(key) else None
        for part, key in keys.items()
    }
    extra = {k: v for k, v in record.items() if k not in _OWN_KEYS | set(keys.values())}
    if extra.get("score") is not None:
        try:
            score = float(extra["score"])
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):  # a text may say "nan"
            raise TripletError(f"{where}: the score {extra['score']!r} is no number")
        extra["score"] = score
    name = str(record["id"]) if record.get("id") is not None else paths["source"].stem
    group = str(record["group"]) if record.get("group") is not None else name
    content = str(record.get(BYTES_SHA256) or "")
    return Triplet(name, paths["source"], paths["mask"], paths["gt"], group, extra, content)


def read_triplets(
    meta_paths,
    *,
    require_gt: bool = True,
    allow_absolute: bool = False,
    allow_outside: bool = False,
) -> list[Triplet]:
    """Read one or several sets; images are not opened, but each file must be there.

    Args:
        meta_paths: what `resolve_meta` takes, or a list of it.
        require_gt: refuse records without GT.
        allow_absolute: accept absolute paths.
        allow_outside: accept relative paths that leave the set's folder.

    Returns:
        The triplets in the files' order. Ids are unique within a set; sets that share ids keep
        them (`merge_sets` makes them unique).

    Raises:
        TripletError: a set, a key or a file is missing, a path is refused, or an id occurs twice.
    """
    return list(
        iter_triplets(
            meta_paths,
            require_gt=require_gt,
            allow_absolute=allow_absolute,
            allow_outside=allow_outside,
        )
    )


def iter_triplets(
    meta_paths,
    *,
    require_gt: bool = True,
    allow_absolute: bool = False,
    allow_outside: bool = False,
    look: bool = True,
) -> Iterator[Triplet]:
    """As `read_triplets`, one by one: for sets that are larger than the memory.

    Args:
        look: whether the files are there; spare it where each is opened anyway.
    """
    if isinstance(meta_paths, (str, Path)):
        meta_paths = [meta_paths]
    for path in meta_paths:
        meta = resolve_meta(path)
        locator = Locator(meta, allow_absolute, allow_outside, look)
        seen: set[int] = set()
        for number, record in enumerate(read_records(meta), 1):
            triplet = parse_record(record, number, locator, require_gt)
            yield make_unique(triplet, record, number, seen, meta)


def make_unique(triplet: Triplet, record: dict, number: int, seen: set[int], meta: Path) -> Triplet:
    """Refuse an id given twice; number the ids made from equal file names (a/0.png, b/0.png).

    `seen` holds hashes: of 200,000 names they take a third of the names' memory.
    """
    name = triplet.id
    if hash(name) in seen:
        if record.get("id") is not None:
            first = next(
                (
                    n
                    for n, other in enumerate(read_records(meta), 1)
                    if isinstance(other, dict) and str(other.get("id")) == name
                ),
                "?",
            )
            raise TripletError(
                f"{meta}, record {number}: id {name} occurs twice (first in record "
                f"{first}): give each record an id of its own"
            )
        name = f"{name}~{number}"
        group = name if record.get("group") is None else triplet.group
        triplet = replace(triplet, id=name, group=group)
    seen.add(hash(name))
    return triplet


def load_images(
    triplet: Triplet,
    *,
    size: int | tuple[int, int] | None = None,
    mode: str = "squash",
    center: bool = False,
) -> dict[str, np.ndarray | None]:
    """Open a triplet's images.

    Args:
        triplet: what to open.
        size: the side of a square, or (height, width) in px, that they are brought to.
        mode: how: "squash" resizes straight, aspect not kept, as the authors' trainer does; "crop"
            keeps it (see `pictures.fit_triplet`, also for `center`).

    Returns:
        `source` [H, W, 3] uint8, `mask` [H, W] uint8 0 or 255, `gt` [H, W, 3] uint8 or None.

    Raises:
        TripletError: an image cannot be read, sizes differ, the mask is empty or covers all.
    """
    source, mask = load_image(triplet.source), load_mask(triplet.mask)
    gt = None if triplet.gt is None else load_image(triplet.gt)
    for path, other in ((triplet.mask, mask), (triplet.gt, gt)):
        if other is not None and other.shape[:2] != source.shape[:2]:
            raise TripletError(
                f"{path} is {describe_size(other)} px but {triplet.source} is "
                f"{describe_size(source)}: resize one, or remove the record",
                file=path,
            )
    check_mask(mask, triplet.mask)
    if isinstance(size, int):
        size = (size, size)
    return fit_triplet(
        {"source": source, "mask": mask, "gt": gt}, size or mask.shape, mode=mode, center=center
    )


def describe_size(image: np.ndarray) -> str:
    """Width x height, as people say it."""
    return f"{image.shape[1]}x{image.shape[0]}"


def check_mask(mask: np.ndarray, path: Path | str) -> None:
    """Refuse a mask [H, W] uint8 that marks nothing or everything; `path` names it."""
    file = path if isinstance(path, Path) else None
    if mask.max() < 128:
        hint = "spread its values to 0 and 255" if 0 < mask.max() < 9 else "draw it again, white"
        raise TripletError(
            f"{path} is an empty mask: no pixel reaches 128 (its brightest has "
            f"{mask.max()}); {hint}, or remove the record",
            file=file,
        )
    if mask.min() >= 128:
        raise TripletError(
            f"{path} is white everywhere: nothing is left to continue; draw it "
            "again, or remove the record",
            file=file,
        )
