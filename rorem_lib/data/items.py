"""What an importer gives to `rorem_lib.data.assembly`: items that are cheap to list, then images.

An importer is a frozen dataclass whose fields are its options. `list_items` names every triplet to
be, in a fixed order and without opening an image; `load_item` opens one, in a worker process. What
cannot become a triplet raises `Rejected`, or the `TripletError` of the reader: the assembly counts
it and keeps it with its reason, and goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rorem_lib.data.masks import has_shape
from rorem_lib.data.pictures import decode_image, decode_mask

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # of images
UNKNOWN_LICENSE = "unknown: see the dataset's page"


class SourceError(ValueError):
    """A source's folder has none of the layouts that its importer knows, or lacks a file of it."""


class Rejected(Exception):
    """An item that becomes no triplet, on purpose.

    Attributes:
        reason: one of few words, the same for all items of a kind; they are counted by it.
        message: what exactly, with the file's name.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason, self.message = reason, message


def describe_rejection(id: str, group: str, set: str, reason: str, message: str) -> dict:
    """A line of `rejected.jsonl`; `set` is where the item would have gone."""
    id, group, message = map(escape_text, (id, group, message[:2000]))
    return {"id": id, "group": group, "set": set, "reason": reason, "message": message}


def escape_text(text: str) -> str:
    """A text as UTF-8 can hold it: `\\xe9` for a byte of a file's name that is none, `\\ud800` for
    half a character of JSON's."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Item:
    """A triplet to be; small, since many are queued.

    Attributes:
        id: unique in its source; names the files, so it has no `/` (see `make_id`).
        group: scene, video or original image: what a split must not cut.
        place: what `load_item` needs to find it; picklable.
        split: "train" or "test" where the source itself says so.
    """

    id: str
    group: str
    place: Any
    split: str | None = None

    def describe_place(self) -> str:
        """`place` as JSON, for messages: names in it that are no UTF-8 are not escaped yet."""
        return json.dumps(self.place, ensure_ascii=False, default=str)


@dataclass
class Picture:
    """An image of an item, opened.

    Attributes:
        array: uint8, [H, W, 3] or, for a mask, [H, W].
        file: the file that holds exactly this array and can be taken over as it is; None where the
            array was computed, turned, cut or resized, and has to be encoded.
    """

    array: np.ndarray
    file: Path | None = None


@dataclass
class Pictures:
    """What `load_item` found.

    Attributes:
        source, mask, gt: the triplet's images; `gt` is None in a pool.
        origin_file: the raw file that the source came from; the record keeps its name and hash.
        extra: further keys of the record (`class`, `layer`, `score`, ...), plain JSON values.
    """

    source: Picture
    mask: Picture
    gt: Picture | None
    origin_file: Path
    extra: dict = field(default_factory=dict)


class Source(ABC):
    """One kind of raw data; its options are the fields of a dataclass, checked by their defaults.

    Attributes:
        name: how recipes and the notebook call it.
        origin: what records say they come from.
        license: SPDX identifier or name, as the publisher states it.
        layout: the files it expects, for the error message when they are not there.
        has_gt: False for a pool of images and masks.
        choices: of options that are texts, the values that they can have.
        limits: of options that are numbers, the lowest and the highest value; by default 0 to 1,
            whole numbers 0 or more.

    Raises:
        ValueError: an option's value is of another type than its default, or not among these.
    """

    name: ClassVar[str]
    origin: ClassVar[str]
    license: ClassVar[str]
    layout: ClassVar[str]
    has_gt: ClassVar[bool] = True
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    limits: ClassVar[dict[str, tuple[float, float]]] = {}
    folder: str

    def __post_init__(self):
        for option in fields(self):
            if isinstance(value := getattr(self, option.name), list):  # as recipes have them
                object.__setattr__(self, option.name, value := tuple(value))
            if wanted := self._refuse(option.name, value, type(option.default)):
                raise ValueError(f"{option.name} must be {wanted}, not {value!r}")

    def _refuse(self, name: str, value, kind: type) -> str | None:
        """What an option must be, where its value is something else."""
        if kind is bool:
            return None if isinstance(value, bool) else "true or false"
        if kind is tuple:
            texts = isinstance(value, tuple) and all(isinstance(x, str) and x for x in value)
            return None if texts else "a list of texts that are not empty"
        if kind in (int, float):
            low, high = self.limits.get(name, (0, math.inf if kind is int else 1))
            number = isinstance(value, (int, kind)) and not isinstance(value, bool)
            if number and low <= value <= high:
                return None
            what = f"a {'whole ' * (kind is int)}number"
            return f"{what}, {low} or more" if high == math.inf else f"{what} from {low} to {high}"
        if choices := self.choices.get(name):
            return None if value in choices else " or ".join(choices)
        return "a text" if kind is str and not isinstance(value, str) else None

    @classmethod
    @abstractmethod
    def recognises(cls, folder: Path) -> bool:
        """Whether a folder looks like this source; looks at names alone, never walks it all."""

    @abstractmethod
    def list_items(self) -> Iterator[Item]:
        """Every triplet to be, in a fixed order; opens no image.

        Raises:
            SourceError: the folder has not the layout; names what was expected and what is there.
        """

    @abstractmethod
    def load_item(self, item: Item) -> Pictures:
        """Open one item.

        Raises:
            Rejected, TripletError: it cannot become a triplet.
        """

    @property
    def gives_gt(self) -> bool:
        """Whether its triplets have a GT: not in a pool, nor where an option asks for none."""
        return self.has_gt and getattr(self, "require_gt", True)

    def summarise(self) -> dict[str, int]:
        """What `list_items` left out, by reason: rows of a table that never were items."""
        return {}

    def refuse_layout(self, expected: str = "") -> SourceError:
        """The error for a folder without this source's layout; names what is there."""
        folder = Path(self.folder)
        if not folder.is_dir():
            return SourceError(f"{folder} is no folder: give the folder of {self.origin}")
        found = sorted(path.name for path in folder.iterdir())
        shown = ", ".join(found[:8]) + (" ..." if len(found) > 8 else "")
        return SourceError(
            f"{folder} does not look like {self.origin}: expected {expected or self.layout}; "
            f"it holds {shown or 'nothing'}"
        )


def make_id(*parts: str | int) -> str:
    """An id from a relative path's parts: joined by `-`, without ending spaces, dots or slashes.

    The result is at most 150 bytes; what is longer is cut and gets a hash of the whole.
    """
    text = "-".join(str(part).replace("/", "-").replace("\\", "-").strip(" .") for part in parts)
    text = escape_text(text.lstrip(".")) or "item"
    data = text.encode()
    if len(data) > 150:
        text = data[:137].decode(errors="ignore") + "~" + hashlib.sha256(data).hexdigest()[:12]
    return text


def open_picture(path: str | Path, mode: str = "RGB") -> Picture:
    """Open a file as an image, to be taken over as it is where every reader sees these pixels.

    Args:
        mode: "RGB" for an image, "L" for a mask.

    Anything but an upright 8-bit RGB or grey file (16 bits, CMYK, EXIF rotation, palette, alpha) is
    encoded again.

    Raises:
        TripletError: missing, empty, truncated or no image; no mask.
    """
    path = Path(path)
    array, plain = decode_image(path) if mode == "RGB" else decode_mask(path)
    return Picture(array, path if plain else None)


def check_shape(mask: np.ndarray, image: np.ndarray, path: Path) -> None:
    """Refuse a mask [h, w] that is no scaled view of an image [H, W, 3]; `path` names the mask.

    Raises:
        Rejected: the aspects differ; for one, the image was turned after it was masked.
    """
    (h, w), (height, width) = mask.shape, image.shape[:2]
    if not has_shape(mask.shape, image.shape[:2]):
        raise Rejected(
            "mask of another shape",
            f"{path} is {w}x{h} px, which is another shape than its image's {width}x{height} px",
        )


def read_split(name: str) -> str | None:
    """What the name of a folder, a file or a split says: train, or test for val too."""
    name = name.lower()
    if name.startswith("train"):
        return "train"
    return "test" if name.startswith(("test", "val")) else None


def name_once(name: str, number: int, seen: set[str]) -> str:
    """`name`, or `name~number` where it was given before; `number` is the item's own."""
    while name in seen:
        name = f"{name}~{number}"
    seen.add(name)
    return name


def list_folders(folder: Path) -> list[Path]:
    """A folder's sub folders, in order."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(folder / e.name for e in entries if e.is_dir() and e.name[0] != ".")
