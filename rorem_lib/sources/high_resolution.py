"""DIV2K and Flickr2K: large images, each with masks of yours; a pool without GT.

RORem's last stage takes 1,200 triplets of these images; how their masks and GT were made is not
said. There are two honest routes to such triplets:

1. masks that people draw or a segmentation model makes, given to this importer; then the current
   remover takes the objects out (notebook 03) and people accept what is good (notebook 04);
2. the images as backgrounds that objects are pasted into, so that the GT is known: that is
   `rorem_lib.sources.composites`.

DIV2K (NTIRE 2017, Agustsson and Timofte) is 800 training and 100 validation images, PNG with the
longer side 2,040 px. Flickr2K (EDSR, Lim et al. 2017) is 2,650 of the same size, without a split.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import cv2
import numpy as np

from rorem_lib.data.items import (
    SUFFIXES,
    Item,
    Picture,
    Pictures,
    Rejected,
    Source,
    SourceError,
    check_shape,
    make_id,
    open_picture,
)
from rorem_lib.data.masks import binarise_mask, resize_mask

_DATASETS = {"DIV2K_train_HR": "DIV2K", "DIV2K_valid_HR": "DIV2K", "Flickr2K_HR": "Flickr2K"}
_LICENSES = {
    "DIV2K": "academic research only; the images belong to their owners",
    "Flickr2K": "none stated; each image has its owner's Flickr terms",
}


class _Place(NamedTuple):
    dataset: str
    image: str | None
    mask: str | None


@dataclass(frozen=True)
class HighResolutionSource(Source):
    """Large images with a mask each, cut to about the size that is trained.

    An image may have several masks: `0001.png`, `0001_1.png`, `0001-2.png`, each an item of its
    own. An image without a mask and a mask without an image are items too, which are rejected.

    Attributes:
        folder: holds DIV2K_train_HR, DIV2K_valid_HR, Flickr2K_HR, or some of them, directly or in
            DIV2K/ and Flickr2K/; or is one of them.
        masks: the folder of the masks, below `folder` or absolute; white is to be removed. Where it
            has a folder of the images' folder's name, the masks of these images are there.
        images: another folder of large images, below `folder` or absolute, in place of the above.
        size: px; the shorter side that images are cut and shrunk to. Nothing is ever enlarged.
        crop: "mask" cuts a square of `size` px that holds the mask, from the image as it is, and
            a larger one, which is then shrunk, where the mask needs it; "center" takes the largest
            square in the middle, "none" the whole image, both shrunk.
        margin: px between the mask and the edges of its square, where the image has room.
        min_side: px; images whose shorter side is below are rejected.
    """

    folder: str
    masks: str = "masks"
    images: str = ""
    size: int = 1024
    crop: str = "mask"
    margin: int = 64
    min_side: int = 512

    name: ClassVar[str] = "high_resolution"
    origin: ClassVar[str] = "DIV2K & Flickr2K"
    license: ClassVar[str] = "; ".join(f"{name}: {text}" for name, text in _LICENSES.items())
    layout: ClassVar[str] = (
        "DIV2K_train_HR/0001.png, DIV2K_valid_HR/0801.png, "
        "Flickr2K/Flickr2K_HR/000001.png, and masks/<the same name>.png"
    )
    has_gt: ClassVar[bool] = False
    choices = {"crop": ("mask", "center", "none")}
    limits = {"size": (64, math.inf)}

    def __post_init__(self):
        super().__post_init__()
        if not self.masks:
            raise ValueError("masks must name a folder: the images have no masks of their own")

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return bool(_find_folders(Path(folder)))

    # ------------------------------------------------------------------------------------ listing

    def list_items(self) -> Iterator[Item]:
        root = Path(self.folder)
        folders = [root / self.images] if self.images else _find_folders(root)
        if not all(folder.is_dir() for folder in folders):
            raise SourceError(f"{folders[0]} is no folder: mend the option images")
        if not folders:
            raise self.refuse_layout()
        used: dict[Path, set[str]] = {}
        found = []
        for folder in folders:
            mask_folder = root / self.masks / folder.absolute().name
            if not mask_folder.is_dir():
                mask_folder = mask_folder.parent
            if mask_folder.resolve() == folder.resolve():
                raise SourceError(
                    f"{folder} is given for the images and for the masks: put the "
                    "masks into a folder of their own and name it with masks"
                )
            images, masks = _list_stems(folder), _list_stems(mask_folder)
            owners: dict[str, list[str]] = {}
            for stem in masks:
                owner = stem if stem in images else re.sub(r"[_-]\d+$", "", stem)
                if owner in images:
                    owners.setdefault(owner, []).append(stem)
                    used.setdefault(mask_folder, set()).add(stem)
            used.setdefault(mask_folder, set())
            found.append((folder, mask_folder, images, masks, owners))
        if not any(owners for *_, owners in found):
            raise SourceError(
                f"{root / self.masks} holds no mask of an image in "
                f"{', '.join(map(str, folders))}: draw them, or let any segmentation model make "
                "them (white is to be removed), and name each like its image, 0001.png, or "
                "0001_1.png and 0001_2.png where an image has several; the option masks names "
                "another folder"
            )
        for folder, mask_folder, images, masks, owners in found:
            dataset = _DATASETS.get(folder.absolute().name, folder.absolute().name)
            for stem, image in images.items():
                for mask in owners.get(stem, [None]):
                    file = mask and str(mask_folder / masks[mask])
                    place = _Place(dataset, str(folder / image), file)
                    name, group = make_id(dataset, mask or stem), make_id(dataset, stem)
                    yield Item(name, group, place, _get_split(folder.absolute().name))
        for mask_folder, stems in used.items():
            for stem, mask in _list_stems(mask_folder).items():
                if stem not in stems:
                    name = make_id("mask", mask_folder.name, stem)
                    yield Item(name, name, _Place("", None, str(mask_folder / mask)))

    # ------------------------------------------------------------------------------------ opening

    def load_item(self, item: Item) -> Pictures:
        place = _Place(*item.place)
        if not place.image:
            raise Rejected("no image", f"{place.mask} is named like no image")
        if not place.mask:
            raise Rejected("no mask", f"{place.image} has no mask of its name")
        source, mask = open_picture(place.image), open_picture(place.mask, "L").array
        height, width = source.array.shape[:2]
        if min(height, width) < self.min_side:
            raise Rejected(
                "small image", f"{place.image} is {width}x{height} px, below {self.min_side} px"
            )
        check_shape(mask, source.array, Path(place.mask))
        if mask.max() < 128:  # nothing to cut around
            raise Rejected(
                "empty mask",
                f"{place.mask} is nowhere white (its brightest pixel has {mask.max()}, 128 counts)",
            )
        mask = resize_mask(binarise_mask(mask), height, width)
        x, y, w, h = box = self._choose_box(mask, item.id)
        scale = min(1, self.size / min(w, h))
        size = round(w * scale), round(h * scale)
        if box != (0, 0, width, height) or scale < 1:
            source = Picture(_shrink(source.array[y : y + h, x : x + w], size))
        mask = resize_mask(mask[y : y + h, x : x + w], size[1], size[0])
        extra = {"dataset": place.dataset, "crop": [x, y, x + w, y + h]}
        if place.dataset in _LICENSES:
            extra |= {"origin": place.dataset, "license": _LICENSES[place.dataset]}
        return Pictures(source, Picture(np.ascontiguousarray(mask)), None, Path(place.image), extra)

    def _choose_box(self, mask: np.ndarray, name: str) -> tuple[int, int, int, int]:
        """Left, top, width, height of what is kept, in px of the image."""
        height, width = mask.shape
        if self.crop == "none":
            return 0, 0, width, height
        if self.crop == "center":
            side = min(height, width)
            return (width - side) // 2, (height - side) // 2, side, side
        left, top, w, h = cv2.boundingRect(mask)
        side = max(self.size, w + 2 * self.margin, h + 2 * self.margin)
        # Anywhere that holds the mask, by a hash: objects in the middle of every image would be
        # learned.
        digest = hashlib.sha256(name.encode()).digest()
        x, w = _place_span(left, w, side, width, self.margin, digest[:8])
        y, h = _place_span(top, h, side, height, self.margin, digest[8:16])
        return x, y, w, h


def _place_span(
    start: int, length: int, side: int, whole: int, margin: int, digest: bytes
) -> tuple[int, int]:
    """Where a span of `side` px lies that holds another one and a margin, within `whole` px."""
    side = min(side, whole)
    low = max(0, min(whole, start + length + margin) - side)
    high = min(whole - side, max(0, start - margin))
    return low + int.from_bytes(digest) % (high - low + 1), side


def _shrink(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if image.shape[1::-1] == size:
        return np.ascontiguousarray(image)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _find_folders(root: Path) -> list[Path]:
    """The folders of images by their known names; of one that is there twice, the first."""
    if root.absolute().name in _DATASETS and root.is_dir():
        return [root]
    places = (
        (parent / name for parent in (root, root / dataset) if (parent / name).is_dir())
        for name, dataset in _DATASETS.items()
    )
    return [found for folders in places if (found := next(folders, None))]


def _get_split(folder: str) -> str | None:
    words = set(re.split(r"[^a-z]+", folder.lower()))
    return "train" if "train" in words else "test" if words & {"val", "valid", "test"} else None


def _list_stems(folder: Path) -> dict[str, str]:
    """File names of images by what stands before the ending."""
    stems: dict[str, str] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            if path.stem in stems:
                raise SourceError(
                    f"{path} and {stems[path.stem]} have one name: rename or remove "
                    "one, masks are found by it"
                )
            stems[path.stem] = path.name
    return stems
