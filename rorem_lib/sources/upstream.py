"""Importer of triplet sets: the authors' published ones, and those that this kit writes.

The dataset's page is LetsThink/RORem_dataset. Each set is a folder with `source/`, `mask/`, `GT/`
and a `meta.json`: a JSON list of `{"source": ..., "mask": ..., "GT": ...}`, the paths relative to
it. A single object, JSON lines, a `score` (for the discriminator) and the authors' older keys
(`gt` the image given in, `inpaint` the removal) are understood too.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rorem_lib.data.items import (
    UNKNOWN_LICENSE,
    Item,
    Pictures,
    Rejected,
    Source,
    SourceError,
    list_folders,
    make_id,
    name_once,
    open_picture,
    read_split,
)
from rorem_lib.data.pictures import TripletError
from rorem_lib.data.triplets import META, Locator, parse_record, read_records

_DEPTH = 2  # levels of sub folders that are searched
_MEASURED = {"width", "height", "gt"}  # of the image as it was; `gt` names another part here
_PICTURE_FOLDERS = {"source", "mask", "gt", "hidden"}  # large, and without lists


@dataclass(frozen=True)
class UpstreamSource(Source):
    """Sets with a `meta.json` (RORem, sec. 3.1); their records keep all their keys.

    A record that is at fault is rejected and the rest goes on; a meta file that stops being JSON
    ends the listing. The `split` of a record counts, else a set's folder named train or test.

    Args:
        folder: a set, or a folder with sets up to two levels below it.
        metas: the meta files or sets to take, relative to `folder`; default: every `meta*.json`,
            and in a folder without one every `.json` or `.jsonl` that holds such records.
        require_gt: refuse records without GT; false makes a pool, with a GT where there is one.
        allow_absolute: accept absolute paths in records.
        allow_outside: accept relative paths that leave the set's folder.
    """

    folder: str
    metas: tuple[str, ...] = ()
    require_gt: bool = True
    allow_absolute: bool = False
    allow_outside: bool = False

    name = "upstream"
    origin = "RORem_dataset"
    license = UNKNOWN_LICENSE
    layout = "meta.json beside source/, mask/ and GT/, here or in sub folders (archives unpacked)"

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return any((place / META).is_file() for place in (folder, *list_folders(folder)))

    def list_items(self) -> Iterator[Item]:
        metas = self._choose_metas()
        if not metas:
            raise self.refuse_layout()
        seen: set[str] = set()
        for meta, prefix in zip(metas, _name_sets(metas)):
            set_name = Path(os.path.abspath(meta)).parent.name
            for number, record in enumerate(_read(meta), 1):
                name = name_once(make_id(*prefix, _find_name(record, number)), number, seen)
                known = record if isinstance(record, dict) else {}
                group = name if known.get("group") is None else str(known["group"])
                yield Item(
                    name,
                    group,
                    (os.path.relpath(meta, self.folder), number, record),
                    read_split(str(known.get("split") or set_name)),
                )

    def _choose_metas(self) -> list[Path]:
        folder = Path(self.folder)
        if not self.metas:
            return list(_find_metas(folder, _DEPTH)) if folder.is_dir() else []
        metas = [folder / meta for meta in self.metas]
        metas = [meta / META if meta.is_dir() else meta for meta in metas]
        for meta in metas:
            if not meta.is_file():
                raise SourceError(f"there is no {meta}: metas are relative to {folder}")
        return metas

    def load_item(self, item: Item) -> Pictures:
        place, number, record = item.place
        meta = os.path.abspath(os.path.join(self.folder, place))
        where = f"{meta}, record {number}"
        if (
            self.require_gt
            and isinstance(record, dict)
            and not record.get("inpaint" if "inpaint" in record else "GT")
        ):
            raise Rejected(
                "no GT",
                f"{where} has no GT: take it into a pool (require_gt: false), "
                "or generate removals and accept them",
            )
        try:
            triplet = parse_record(
                record,
                number,
                _locator(meta, self.allow_absolute, self.allow_outside),
                self.require_gt,
            )
        except ValueError as error:  # TripletError, or a path that the system cannot spell
            message = str(error) if isinstance(error, TripletError) else f"{where}: {error}"
            raise Rejected("bad record", message) from None
        parts = (triplet.source, triplet.mask, triplet.gt)
        for path in parts:
            if path and not os.path.isfile(path):  # Path.is_file raises at names too long
                raise Rejected(
                    "missing file", f"{path} is missing ({where}): restore it or remove its record"
                )
        source, mask, gt = (
            path and open_picture(path, mode) for path, mode in zip(parts, ("RGB", "L", "RGB"))
        )
        extra = {key: value for key, value in triplet.extra.items() if key not in _MEASURED}
        return Pictures(
            source,
            mask,
            gt,
            origin_file=triplet.source,
            extra={"set": Path(meta).parent.name} | extra,
        )


@functools.lru_cache(maxsize=16)
def _locator(meta: str, allow_absolute: bool, allow_outside: bool) -> Locator:
    # a look at each file is cheap where it is opened next; listings of 200,000 names are not
    return Locator(Path(meta), allow_absolute, allow_outside, look=False)


def _find_metas(folder: Path, depth: int) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        files = sorted(
            folder / e.name
            for e in entries
            if e.name[0] != "." and e.name.lower().endswith((".json", ".jsonl")) and e.is_file()
        )
    named = [file for file in files if file.name.lower().startswith("meta")]
    yield from (
        list(filter(_holds_records, named))
        or [file for file in files if file not in named and _holds_records(file)]
    )
    if depth:
        for inner in list_folders(folder):
            if inner.name.lower() not in _PICTURE_FOLDERS:
                yield from _find_metas(inner, depth - 1)


def _holds_records(path: Path) -> bool:
    """Whether a file lists triplets; one that speaks of masks and is no JSON is an error."""
    if path.name != META:
        with open(path, "rb") as stream:
            if b'"mask"' not in stream.read(65536):
                return False
    first = itertools.islice(_read(path), 20)  # the very first may be at fault
    return any(
        isinstance(record, dict)
        and isinstance(record.get("mask"), str)
        and ("source" in record or "inpaint" in record)
        for record in first
    )


def _read(meta: Path) -> Iterator:
    try:
        yield from read_records(meta)
    except TripletError as error:
        raise SourceError(str(error)) from None


def _name_sets(metas: list[Path]) -> list[tuple[str, ...]]:
    """What comes before the ids of each set: nothing if it is the only one, else its folder."""
    if len(metas) == 1:
        return [()]
    folders = [Path(os.path.abspath(meta)).parent.name for meta in metas]
    if len(set(folders)) == len(folders):
        return [(name,) for name in folders]
    return [(*Path(os.path.abspath(meta)).parts[-3:-1], meta.stem) for meta in metas]


def _find_name(record, number: int) -> str:
    """The record's id, else its source's file name, else its number."""
    if isinstance(record, dict):
        if record.get("id") is not None:
            return str(record["id"])
        source = record.get("gt" if "inpaint" in record else "source")
        if isinstance(source, str) and Path(source).stem:
            return Path(source).stem
    return f"record{number}"
