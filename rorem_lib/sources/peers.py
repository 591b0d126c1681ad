"""Importers of other groups' sets that lie as folders of pictures with equal names.

    RemovalBenchSource   images/  gt/      masks/      RemovalBench (BaiLing/RemovalBench)
    SmartEraserSource    paste/   gt/      mask/       Syn4Removal and SmartEraser's three val sets
    OmniEraserSource     img/     gt_new/  sam_mask/   OmniEraser's training set
    CorneSource          shot/    bg/      masks/ or mask_eff/, and mask_sam/   CORNE, CORNE-Val

They differ in names alone, so each is a few class attributes. The sub folders lie in the folder
that is given or one level below it (`train/`, `val_rord/`). Files belong together by their names;
their suffixes may differ.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import ijson

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
from rorem_lib.data.pictures import AGAIN

MASKS = {"object": "object", "effect": "with_effect"}  # option: what records call that kind
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_RORD_SCENE = re.compile(r"I-\d+_[A-Z0-9]+_[TW]\d+(?=_F\d)")


def check_mask_option(mask: str) -> None:
    """Refuse a kind of mask that is not in `MASKS`, with a ValueError."""
    if mask not in MASKS:
        raise ValueError(f"mask must be {' or '.join(MASKS)}, not {mask!r}")


def name_group(stem: str, default: str) -> str:
    """The RORD scene of a frame that a peer took from RORD, so that no split cuts it."""
    found = _RORD_SCENE.search(stem)
    return found[0] if found else default


def find_file(folder: Path, *names: str) -> Path:
    """The first of `names` that is in a folder, by that name or with another picture suffix.

    Raises:
        Rejected: none is there; names the first.
    """
    for name in names:
        path = folder / name
        for suffix in (path.suffix, *SUFFIXES, *map(str.upper, SUFFIXES)):
            found = path.with_suffix(suffix)
            if os.path.isfile(found):  # False, where Path.is_file raises: a name too long
                return found
    raise Rejected(
        "missing file",
        f"{folder / names[0]} is missing, under any picture suffix: "
        "download it again, or leave the item out",
    )


@dataclass(frozen=True)
class _PairedFolders(Source):
    """A set whose pictures, GTs and masks have folders of their own and names in common.

    Attributes:
        source_folder, gt_folder: their sub folders.
        mask_paths: for each kind of mask its possible paths; `{}` is the picture's name.
    """

    source_folder: ClassVar[str]
    gt_folder: ClassVar[str]
    mask_paths: ClassVar[dict[str, tuple[str, ...]]]
    folder: str
    mask = "object"  # a field where there is a choice

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return any(
            cls._has_layout(root, kind)
            for root in (folder, *list_folders(folder))
            for kind in cls.mask_paths
        )

    @classmethod
    def _has_layout(cls, root: Path, kind: str) -> bool:
        return (
            (root / cls.source_folder).is_dir()
            and (root / cls.gt_folder).is_dir()
            and any((root / path).parent.is_dir() for path in cls.mask_paths[kind])
        )

    def list_items(self) -> Iterator[Item]:
        folder = Path(self.folder)
        roots = [
            root for root in (folder, *list_folders(folder)) if self._has_layout(root, self.mask)
        ]
        if not roots:
            raise self.refuse_layout()
        seen: set[str] = set()
        for root in roots:
            prefix = () if root == folder else (root.name,)
            masks = [path for path in self.mask_paths[self.mask] if (root / path).parent.is_dir()]
            split = self._split(root)
            details = self._read_details(root)
            rows = enumerate(self._list_rows(root, masks), 1)
            for number, (sources, mask_files, gts) in rows:
                stem = Path(sources[0]).stem
                name = name_once(make_id(*prefix, stem), number, seen)
                place = (
                    prefix,
                    sources,
                    mask_files,
                    gts,
                    details.get(os.path.basename(sources[0])),
                )
                yield Item(name, name_group(stem, name), place, split)

    def _list_rows(self, root: Path, masks: list[str]) -> Iterator[tuple[tuple[str, ...], ...]]:
        """Each triplet's possible paths below `root`: of its source, its mask, its GT."""
        with os.scandir(root / self.source_folder) as entries:
            names = sorted(
                e.name for e in entries if e.name.lower().endswith(SUFFIXES) and e.name[0] != "."
            )
        for name in names:
            yield (
                (f"{self.source_folder}/{name}",),
                tuple(path.format(name) for path in masks),
                (f"{self.gt_folder}/{name}",),
            )

    def _split(self, root: Path) -> str | None:
        return read_split(os.path.basename(os.path.abspath(root)))

    def _read_details(self, root: Path) -> dict[str, tuple]:
        """What a list beside the pictures says of each, as (key, value) pairs of the record."""
        return {}

    def load_item(self, item: Item) -> Pictures:
        prefix, sources, masks, gts, details = item.place
        root = Path(self.folder, *prefix)
        source, mask, gt = (find_file(root, *names) for names in (sources, masks, gts))
        extra = dict(details or ()) | ({"set": prefix[0]} if prefix else {})
        if len(self.mask_paths) > 1:
            extra["mask_kind"] = MASKS[self.mask]
        return Pictures(
            open_picture(source),
            open_picture(mask, "L"),
            open_picture(gt),
            origin_file=source,
            extra=extra,
        )


@dataclass(frozen=True)
class RemovalBenchSource(_PairedFolders):
    """RemovalBench (OmniEraser, arXiv 2501.07397): about 70 photographs, for evaluation alone."""

    name = "removal_bench"
    origin = "RemovalBench"
    license = UNKNOWN_LICENSE
    layout = "images/, gt/ and masks/ with equal names"
    source_folder, gt_folder = "images", "gt"
    mask_paths = {"object": ("masks/{}",)}

    def _split(self, root: Path) -> str:
        return "test"


@dataclass(frozen=True)
class OmniEraserSource(_PairedFolders):
    """OmniEraser's training set, Video4Removal (arXiv 2501.07397): pairs of video frames.

    What in a name tells the video is not published: each picture is a group of its own.
    """

    name = "omnieraser"
    origin = "Video4Removal"
    license = UNKNOWN_LICENSE
    layout = "img/, gt_new/ and sam_mask/ with equal names"
    source_folder, gt_folder = "img", "gt_new"
    mask_paths = {"object": ("sam_mask/{}",)}


@dataclass(frozen=True)
class SmartEraserSource(_PairedFolders):
    """Syn4Removal as SmartEraser's pipeline writes it, and SmartEraser's val sets (CVPR 2025).

    `result.json` (the pasted object's class and box), where it is there, goes into the records as
    `class` and `box_xywh` (x, y, width, height in pixels). Masks are often JPEG: grey at the edge.
    """

    name = "syn4removal"
    origin = "Syn4Removal"
    license = UNKNOWN_LICENSE
    layout = "paste/, mask/ and gt/ with equal names, in it or in train/ or val_rord/ below it"
    source_folder, gt_folder = "paste", "gt"
    mask_paths = {"object": ("mask/{}",)}

    def _read_details(self, root: Path) -> dict[str, tuple]:
        path, details = root / "result.json", {}
        if not path.is_file():
            return details
        try:
            with open(path, "rb") as stream:  # a million entries: kept as small as they can be
                for name, value in ijson.kvitems(stream, "", use_float=True):
                    if (
                        isinstance(value, list)
                        and len(value) > 1
                        and isinstance(value[0], str)
                        and isinstance(value[1], list)
                    ):
                        details[name] = (("class", sys.intern(value[0])), ("box_xywh", value[1]))
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise SourceError(
                f"{path} is no JSON ({str(error).splitlines()[0]}): {AGAIN}; "
                "without it, records have no class and box"
            ) from None
        return details


@dataclass(frozen=True)
class CorneSource(_PairedFolders):
    """CORNE and CORNE-Val (OSOR, arXiv 2606.28094): edited pictures, verified.

    Where `shot_list.txt`, `bg_list.txt` and the masks' list are there, they say which files belong
    together, line by line; else the names do.

    Args:
        folder: holds `shot/`, `bg/` and masks, or sub folders that do.
        mask: "object": `mask_sam/`, the object alone; "effect": `masks/` or, in CORNE-Val,
            `mask_eff/`, with its shadow and reflection.
    """

    mask: str = "object"

    name = "corne"
    origin = "CORNE"
    license = "Apache-2.0"
    layout = "shot/, bg/ and mask_sam/ (mask: object) or masks/ or mask_eff/ (mask: effect)"
    source_folder, gt_folder = "shot", "bg"
    mask_paths = {
        "object": ("mask_sam/{}", "mask_sam/mask_{}"),
        "effect": ("mask_eff/{}", "masks/mask_{}", "masks/{}"),
    }

    def __post_init__(self):
        check_mask_option(self.mask)

    def _split(self, root: Path) -> str:
        return "test" if (root / "mask_eff").is_dir() else "train"

    def _list_rows(self, root: Path, masks: list[str]) -> Iterator[tuple[tuple[str, ...], ...]]:
        lists = [
            root / f"{name}_list.txt"
            for name in ("shot", {"object": "mask_sam", "effect": "mask"}[self.mask], "bg")
        ]
        if not all(path.is_file() for path in lists):
            yield from super()._list_rows(root, masks)
            return
        counts = [sum(1 for _ in _read_lines(path)) for path in lists]
        if len(set(counts)) > 1:
            raise SourceError(
                "the lists are not aligned: "
                + ", ".join(f"{path} has {count} lines" for path, count in zip(lists, counts))
                + f": {AGAIN}; without them files are matched by name"
            )
        folders = (self.source_folder, os.path.dirname(masks[0]), self.gt_folder)
        for lines in zip(*map(_read_lines, lists)):
            yield tuple(_locate_line(root, folder, line) for folder, line in zip(folders, lines))


def _read_lines(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig") as stream:
            yield from filter(None, map(str.strip, stream))
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is no UTF-8 text (byte {error.start}): {AGAIN}") from None


def _locate_line(root: Path, folder: str, line: str) -> tuple[str, ...]:
    """Where a list's line may be below `root`: as it says, else in the layout's own folder.

    Lists carry the folders of the machine that wrote them; nothing outside `root` is opened.
    """
    base = os.path.abspath(root)
    full = os.path.normpath(os.path.join(base, line))
    here = f"{folder}/{os.path.basename(full)}"
    inside = os.path.relpath(full, base)
    return (here,) if inside.startswith("..") or inside == here else (inside, here)
