"""Importer of OBER, ObjectClear's set of objects with their shadows and reflections.

The dataset's page is sczhou/OBERDataset_ObjectClear (gated): parquet files whose columns `input`,
`gt`, `object_mask` and `object_effect_mask` hold the picture files' bytes. An older release has a
folder a picture: `<id>/{input_*.jpg,gt_*.jpg,mask_*.png,shadow_mask_*.png}`.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rorem_lib.data.items import (
    Item,
    Picture,
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
from rorem_lib.data.pictures import AGAIN, TripletError, decode_image
from rorem_lib.sources.peers import (
    MASKS,
    SUFFIXES,
    check_mask_option,
    find_file,
    name_group,
)

logger = logging.getLogger(__name__)

COLUMNS = {"object": "object_mask", "effect": "object_effect_mask"}
_OLDER = {"object": "mask_", "effect": "shadow_mask_"}


@dataclass(frozen=True)
class OberSource(Source):
    """OBER (ObjectClear, arXiv 2505.22636), as parquet files or as the older folders.

    Crops of one picture (`0427_1.jpg`, `0427_2.jpg`) are one group.

    Args:
        folder: the dataset's folder, its `data/`, or the folder of the older release.
        mask: "object": the object alone, as ObjectClear is given it, while the GT also lacks its
            shadow and reflection; "effect": with them.
        subset: take this subset alone (`OBER-Test`, `OBER-Wild`, `RORD-Val-343`, ...).
        require_gt: refuse rows without GT (`OBER-Wild` has none); false makes a pool.
    """

    folder: str
    mask: str = "object"
    subset: str = ""
    require_gt: bool = True

    name = "ober"
    origin = "OBER"
    license = "S-Lab License 1.0 (non-commercial)"
    layout = (
        "data/train-*.parquet and data/test-*.parquet, or <id>/input_*.jpg with gt_*.jpg, "
        "mask_*.png and shadow_mask_*.png"
    )

    def __post_init__(self):
        check_mask_option(self.mask)
        if not isinstance(self.subset, str):
            raise ValueError(f"subset must be a subset's name or empty, not {self.subset!r}")
        if not isinstance(self.require_gt, bool):
            raise ValueError(f"require_gt must be true or false, not {self.require_gt!r}")

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        files = _list_parquet(folder)
        if files:  # other sets have files of these names: the columns' names tell
            try:
                return {"input", *COLUMNS.values()} <= set(pq.read_schema(files[0]).names)
            except (OSError, pa.ArrowException):
                return False
        few = list_folders(folder)[:3]
        few += [inner for outer in few for inner in list_folders(outer)[:3]]
        return any(_list_inputs(place) for place in few)

    def list_items(self) -> Iterator[Item]:
        files = _list_parquet(Path(self.folder))
        yield from self._list_rows(files) if files else self._list_older()

    def _list_rows(self, files: list[Path]) -> Iterator[Item]:
        for file in files:
            _check_file(file)  # all of them first: a run is not to stop half-way for one
        _warn_of_gaps(files)
        seen: set[str] = set()
        subsets: Counter[str] = Counter()
        for file in files:
            with pq.ParquetFile(file) as parquet:
                for group in range(parquet.num_row_groups):
                    # the projection leaves the bytes unread
                    table = parquet.read_row_group(group, ["input.path", "subset", "split"])
                    for row, values in enumerate(table.to_pylist()):
                        subset = str(values.get("subset") or "")
                        subsets[subset] += 1
                        if self.subset in ("", subset):
                            place = (str(file.relative_to(self.folder)), group, row)
                            yield _name_row(place, values, subset, len(seen) + 1, seen)
        if self.subset and self.subset not in subsets:
            raise SourceError(
                f"{self.folder} has no subset {self.subset!r}: take one of "
                + ", ".join(sorted(subsets))
            )

    def _list_older(self) -> Iterator[Item]:
        folder = Path(self.folder)
        places = [
            inner for outer in list_folders(folder) for inner in (outer, *list_folders(outer))
        ]
        if not any(map(_list_inputs, places)):
            raise self.refuse_layout()
        if self.subset:
            raise SourceError(
                f"{folder} is the older release, which names no subsets: leave subset empty"
            )
        seen: set[str] = set()
        for place in places:
            parts = place.relative_to(folder).parts
            for name in _list_inputs(place):
                crop = Path(name).stem.removeprefix("input_")
                item = name_once(make_id(*parts, crop), len(seen) + 1, seen)
                yield Item(item, make_id(*parts), (*parts, name), read_split(parts[0]))

    def load_item(self, item: Item) -> Pictures:
        load = self._load_older if isinstance(item.place[-1], str) else self._load_row
        return load(*item.place)

    def _load_row(self, file: str, group: int, row: int) -> Pictures:
        path = Path(self.folder, file)
        columns = ("input", "gt", COLUMNS[self.mask], "subset")
        try:
            table = _read_group(str(path), path.stat().st_mtime_ns, group, columns)
            values = table.slice(row, 1).to_pylist()[0]
        except (OSError, pa.ArrowException, IndexError) as error:
            raise TripletError(
                f"{path}, row group {group}, cannot be read ({error}): {AGAIN}", file=path
            ) from None
        where = f"{path}, row {row} of group {group}"
        data = {name: (values.get(name) or {}).get("bytes") for name in columns[:3]}
        if not data["gt"] and self.require_gt:
            raise _no_gt(where)
        for name in ("input", columns[2]):
            if not data[name]:
                raise Rejected("missing picture", f"{where}: the column {name} is empty")
        source, gt, mask = (
            data[name]
            and Picture(
                decode_image(
                    f"{where}, {name}", "L" if name == columns[2] else "RGB", data=data[name]
                )[0]
            )
            for name in columns[:3]
        )
        # the picture's own hash: the file's says nothing, and takes a second an item
        extra = {
            "subset": values.get("subset"),
            "path": values["input"].get("path"),
            "mask_kind": MASKS[self.mask],
            "sha256": hashlib.sha256(data["input"]).hexdigest(),
        }
        return Pictures(source, mask, gt or None, origin_file=path, extra=extra)

    def _load_older(self, *place: str) -> Pictures:
        source = Path(self.folder, *place)
        crop = source.name.removeprefix("input_")
        mask = find_file(source.parent, _OLDER[self.mask] + crop)
        try:
            gt = find_file(source.parent, "gt_" + crop)
        except Rejected:
            if self.require_gt:
                raise _no_gt(str(source)) from None
            gt = None
        return Pictures(
            open_picture(source),
            open_picture(mask, "L"),
            gt and open_picture(gt),
            origin_file=source,
            extra={"mask_kind": MASKS[self.mask]},
        )


def _no_gt(where: str) -> Rejected:
    return Rejected("no GT", f"{where} has no GT: take it into a pool (require_gt: false)")


def _list_parquet(folder: Path) -> list[Path]:
    for place in (folder / "data", folder):
        if files := sorted(p for p in place.glob("*.parquet") if p.name[0] != "."):
            return files
    return []


def _list_inputs(folder: Path) -> list[str]:
    return sorted(
        name
        for name in os.listdir(folder)
        if name.startswith("input_") and name.lower().endswith(SUFFIXES)
    )


def _check_file(file: Path) -> None:
    try:
        names = pq.read_schema(file).names
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{file} is no parquet file, or half of one ({error}): {AGAIN}") from None
    if lacking := [c for c in ("input", "gt", *COLUMNS.values()) if c not in names]:
        raise SourceError(
            f"{file} has no column {', '.join(lacking)}: it is no file of OBER; its "
            f"columns are {', '.join(names)}"
        )


def _warn_of_gaps(files: list[Path]) -> None:
    """A part of the files is a fair choice, or a download that broke off."""
    there = Counter(
        found.groups()
        for file in files
        if (found := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})", file.stem))
    )
    for (name, count), number in there.items():
        if number < int(count):
            logger.warning(
                "%s: %d of %d files of %s are there", files[0].parent, number, int(count), name
            )


def _name_row(place: tuple, values: dict, subset: str, number: int, seen: set[str]) -> Item:
    file, group, row = place
    path = (values.get("input") or {}).get("path")
    stem = Path(path).stem if path else f"{Path(file).stem}-{group}-{row}"
    original = re.sub(r"_\d+$", "", stem) if path else stem
    parts = (subset,) if subset else ()
    return Item(
        name_once(make_id(*parts, stem), number, seen),
        name_group(stem, make_id(*parts, original)),
        place,
        read_split(str(values.get("split") or Path(file).stem)),
    )


@functools.lru_cache(maxsize=1)  # rows come in order: each group is read once, and one is held
def _read_group(path: str, changed: int, group: int, columns: tuple[str, ...]) -> pa.Table:
    """A row group of a file; `changed`, its time, keeps a replaced file from the cache."""
    with pq.ParquetFile(path) as parquet:
        return parquet.read_row_group(group, list(columns), use_threads=False)
