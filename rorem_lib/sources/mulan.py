"""MULAN: photographs taken apart into a background and one RGBA layer an object.

Tudosiu et al., "MULAN: A Multi Layer Annotated Dataset for Controllable Text-to-Image Generation",
CVPR 2024; `mulan-dataset/v1.0` on the Hugging Face Hub. The publisher gives annotations without the
photographs (COCO 2017 and LAION Aesthetics v2 6.5+) and a script, `dataset_decomposition.py`, that
makes the layers of both. Either is read:

    <image id>.p.zl             zlib-compressed pickle: {"background": {...}, "instances": {key:
                                {"blip2", "original_image_mask", "instance_mask" (not always),
                                "inpainted_delta", "instance_alpha"}}}; needs the photograph
    <image id>-layer_0.png      the background, RGB
    <image id>-layer_<N>.png    instance N, RGBA; the captions are in `meta_data.csv`

A layer is `photograph * original_image_mask * instance_mask + inpainted_delta`, with
`instance_alpha` as its transparency. The publisher states no ranges; what is accepted here: masks
and alpha from 0 to 1 (bool, integer or float) or, where a value is above 1, from 0 to 255; deltas
in grey levels, signed or not, added modulo 256 if they are uint8, as arrays of that type add;
masks, alphas and deltas of one or three channels; an alpha that is a pickled Pillow image.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd

from rorem_lib.data.items import Item, Picture, Pictures, Rejected, Source, SourceError, make_id
from rorem_lib.data.masks import dilate_mask
from rorem_lib.data.pictures import TripletError, load_image
from rorem_lib.sources.mulan_layers import (
    CAPTIONS,
    Layer,
    compose_layers,
    count_instances,
    measure_border,
    read_annotation,
    read_layers,
    round_picture,
)

_ANNOTATION = ".p.zl"
_LAYER = re.compile(r"(?P<id>.+)-layer_(?P<number>0|[1-9]\d*)\.png")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".JPG", ".JPEG", ".PNG")
_ID_COLUMNS = ("annotation", "annotation_path", "annotations", "image_id", "file_id", "id")
_PHOTO_COLUMNS = ("image", "image_path", "images", "path", "file_name", "filename", "url")


@dataclass(frozen=True)
class MulanSource(Source):
    """Triplets from MULAN's layers.

    Source and GT are composites (alpha-over) and differ by one instance, so they are aligned and
    equal outside of its alpha. `remove="top"` gives one triplet an image: all layers, and all but
    the top one. `remove="each"` gives one an instance: the layers up to and with it, and without
    it. The layers above it are in neither, since they would hide a part of what the mask marks;
    what they hid is MULAN's inpainting there. To list the instances of annotations, "each" has to
    read them all; "top" reads none, and layers are counted by their names.

    The dataset's own discussions do not agree on whether the first or the last instance is on top.
    `composite_error` in `extra` tells: the mean absolute difference, in grey levels, between the
    composite of all layers and the photograph; compare both orders on some images that overlap.

    Attributes:
        folder: holds annotations or layers, in any folders below.
        images: folder of photographs (several: joined by `os.pathsep`; relative ones count from
            `folder`, as in `linking`), by image id, in it or one folder below (`train2017`, or
            the shards that img2dataset writes); annotations need it or `linking`; for layers it
            only gives `composite_error`.
        linking: CSV that says which photograph an annotation belongs to: a column `annotation` or
            `image_id` (or `file_id`, `id`), and `image` (or `path`, `file_name`, `url`): a file,
            or a name or URL whose last part is looked for in `images`.
        order: "ascending" has the last instance on top, "descending" the first.
        remove: "top" or "each"; a top instance that is filtered out is not replaced by another.
        threshold: share of opacity above which a pixel is in the mask; at the default, what stays
            outside changes by one grey level at most.
        dilate: side in pixels of the square that the mask is then widened by.
        min_area, max_area: share of the image that the instance covers, alpha weighted.
        max_border: largest share of the instance's outline that may lie on the image's border,
            where the frame cuts it.
        words: keep instances with one of these in a caption: whole words, any case. A list, or a
            text with commas.
        exclude_words: drop instances with one of these.
        max_mb: largest size of a decompressed annotation, in MiB.
    """

    name: ClassVar[str] = "mulan"
    origin: ClassVar[str] = "MULAN"
    license: ClassVar[str] = "CC-BY-NC-SA-4.0"
    layout: ClassVar[str] = (
        "annotations <image id>.p.zl or layers <image id>-layer_<N>.png, in it or in folders below"
    )
    choices = {"order": ("ascending", "descending"), "remove": ("top", "each")}
    limits = {"max_mb": (1, math.inf)}

    folder: str
    images: str = ""
    linking: str = ""
    order: str = "ascending"
    remove: str = "top"
    threshold: float = 0.004
    dilate: int = 5
    min_area: float = 0.0
    max_area: float = 1.0
    max_border: float = 1.0
    words: tuple[str, ...] = ()
    exclude_words: tuple[str, ...] = ()
    max_mb: int = 2048

    def __post_init__(self):
        for key in ("words", "exclude_words"):
            value = getattr(self, key)
            words = value.split(",") if isinstance(value, str) else value
            words = (word.strip() if isinstance(word, str) else word for word in words)
            object.__setattr__(self, key, tuple(word for word in words if word != ""))
        super().__post_init__()
        if self.min_area > self.max_area:
            raise ValueError(
                f"min_area must be at most max_area, not {self.min_area} to {self.max_area}"
            )

    # ------------------------------------------------------------------------------------ listing

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        names = itertools.islice(_peek(folder, 1), 2000)
        return any(name.endswith(_ANNOTATION) or _LAYER.fullmatch(name) for name in names)

    def list_items(self) -> Iterator[Item]:
        if not Path(self.folder).is_dir():
            raise self.refuse_layout()
        for folder in _split_folders(self._images):
            if not os.path.isdir(folder):
                raise SourceError(
                    f"images: {folder} is no folder: give those of COCO 2017 and "
                    f"LAION, joined by {os.pathsep!r}"
                )
        try:
            self._read_linking()
        except TripletError as error:
            raise SourceError(f"linking: {error}") from None
        seen = set()
        for where, image_id, numbers in self._find_stacks():
            if image_id in seen:
                name = make_id(where, image_id, "again")
                yield Item(name, image_id, (where, image_id, numbers, "again"))
                continue
            seen.add(image_id)
            if numbers is None and not (self.images or self.linking):
                raise SourceError(
                    f"{Path(self.folder, where)} is an annotation without its "
                    "photograph: give the folders of COCO 2017 and LAION as images"
                )
            if self.remove == "top":
                yield Item(make_id(image_id), image_id, (where, image_id, numbers, None))
                continue
            for layer in self._count_instances(where, numbers) or [None]:
                name = make_id(image_id, layer or 0)
                yield Item(name, image_id, (where, image_id, numbers, layer))
        if not seen:
            raise self.refuse_layout()

    def _find_stacks(self) -> Iterator[tuple[str, str, tuple[int, ...] | None]]:
        """(annotation, image id, None) or (folder, image id, layers' numbers), relative paths."""
        for place, folders, names in os.walk(self.folder, onerror=_refuse_folder):
            folders.sort()
            stacks: dict[tuple, list[int] | None] = {}
            for name in names:
                if name.startswith("."):  # what macOS leaves beside files
                    continue
                if name.endswith(_ANNOTATION):
                    stacks[name.removesuffix(_ANNOTATION), 1] = None
                elif match := _LAYER.fullmatch(name):
                    stacks.setdefault((match["id"], 0), []).append(int(match["number"]))
            where = os.path.relpath(place, self.folder)
            for image_id, kind in sorted(stacks):
                numbers = stacks[image_id, kind]
                if numbers is None:
                    yield os.path.join(where, image_id + _ANNOTATION), image_id, None
                else:
                    yield where, image_id, tuple(sorted(numbers))

    def _count_instances(self, where: str, numbers: tuple[int, ...] | None) -> list[int]:
        if numbers is not None:
            return [number for number in numbers if number]
        path = Path(self.folder, where)
        try:
            return list(range(1, count_instances(path, self.max_mb << 20) + 1))
        except TripletError:
            return []  # `load_item` says what is wrong with it

    # ------------------------------------------------------------------------------------ opening

    def load_item(self, item: Item) -> Pictures:
        where, image_id, numbers, number = item.place
        path = Path(self.folder, where)
        if number == "again":
            raise Rejected("same image", f"{path}: {image_id} was listed before, from another file")
        photo_file = self._find_photo(image_id)
        photo = None if photo_file is None else load_image(photo_file)
        if numbers is not None:
            background, layers = read_layers(path, image_id, numbers, self._read_captions(where))
            path = path / f"{image_id}-layer_0.png"
        elif photo is None:
            through = f" nor through {self.linking}" if self.linking else ""
            raise Rejected(
                "no photograph",
                f"{path}: there is no photograph {image_id} in "
                f"{self.images or '-'}{through}: get it, or add its folder to images",
            )
        else:
            background, layers = read_annotation(path, photo, self.max_mb << 20)
        if not layers:
            raise Rejected("no instance", f"{path} has a background and no instance")
        if self.order == "descending":
            layers.reverse()
        number = layers[-1].number if number is None else number
        index = next(i for i, layer in enumerate(layers) if layer.number == number)
        layer = layers[index]
        self._filter(layer, path)
        gt = compose_layers(background, layers[:index])
        source = compose_layers(gt, [layer])
        extra = {"layer": number, "n_layers": len(layers) + 1}
        if layer.captions:
            extra["caption"] = layer.captions[0]
        if photo is not None and photo.shape == background.shape:
            error = float(np.abs(compose_layers(source, layers[index + 1 :]) - photo).mean())
            extra |= {"photograph": photo_file.name, "composite_error": round(error, 2)}
        mask = np.where(layer.alpha > 255 * self.threshold, 255, 0).astype(np.uint8)
        mask = dilate_mask(mask, self.dilate)
        return Pictures(
            Picture(round_picture(source)), Picture(mask), Picture(round_picture(gt)), path, extra
        )

    def _filter(self, layer: Layer, path: Path) -> None:
        named = f"{path}, layer {layer.number}"
        area = float(layer.alpha.mean()) / 255
        if not self.min_area <= area <= self.max_area:
            raise Rejected(
                "area",
                f"{named} covers {area:.4f} of the image, not {self.min_area} to {self.max_area}",
            )
        border = measure_border(layer.alpha)
        if border > self.max_border:
            raise Rejected(
                "border",
                f"{named} has {border:.3f} of its outline on the image's "
                f"border, above {self.max_border}",
            )
        text = " | ".join(layer.captions)
        if self.words and not _has_word(text, self.words):
            raise Rejected(
                "class words",
                f"{named} ({text or 'no caption'}) has none of {', '.join(self.words)}",
            )
        if self.exclude_words and _has_word(text, self.exclude_words):
            raise Rejected(
                "class words", f"{named} ({text}) has one of {', '.join(self.exclude_words)}"
            )

    def _find_photo(self, image_id: str) -> Path | None:
        names = _spell_id(image_id)
        rows = self._read_linking()
        known = (rows.get(name + _ANNOTATION) or rows.get(name, ()) for name in names)
        if linked := next(filter(None, itertools.chain(*known)), None):
            file = Path(self.folder, self.linking).parent / linked
            if os.path.isfile(file):
                return file
            stem = Path(_last_part(linked.split("?")[0])).stem
            names.insert(len(names) if "://" in linked else 0, stem)
        for name, folder in itertools.product(names, _list_folders(self._images)):
            for suffix in _SUFFIXES:
                if os.path.isfile(file := os.path.join(folder, name + suffix)):
                    return Path(file)
        return None

    def _read_linking(self) -> dict[str, tuple[str, ...]]:
        if not self.linking:
            return {}
        path = os.path.join(self.folder, self.linking)
        return _read_table(path, _ID_COLUMNS, _PHOTO_COLUMNS)

    @property
    def _images(self) -> str:
        """`images` with relative folders below `folder`, so that it means the same everywhere."""
        whole = os.path.join(self.folder, self.images)
        if not self.images or os.path.isdir(whole):  # also one with the separator in its name
            return self.images and whole
        parts = filter(None, self.images.split(os.pathsep))
        return os.pathsep.join(os.path.join(self.folder, part) for part in parts)

    def _read_captions(self, where: str) -> dict[str, tuple[str, ...]]:
        """Captions by layer's name, from the nearest `meta_data.csv`, not above `folder`."""
        for folder in (Path(where), *Path(where).parents):
            file = Path(self.folder, folder, "meta_data.csv")
            if file.is_file():
                return _read_table(str(file), ("paths",), CAPTIONS)
        return {}


# ------------------------------------------------------------------------------ folders and tables


def _has_word(text: str, words: tuple[str, ...]) -> bool:
    pattern = "|".join(map(re.escape, words))
    return re.search(rf"(?<!\w)(?:{pattern})(?!\w)", text, re.IGNORECASE) is not None


def _peek(folder: str | Path, depth: int) -> Iterator[str]:
    """Some files' names of a folder and of those below."""
    try:
        with os.scandir(folder) as entries:
            for entry in itertools.islice(entries, 200):
                if depth and entry.is_dir():
                    yield from _peek(entry.path, depth - 1)
                else:
                    yield entry.name
    except OSError:
        return


def _refuse_folder(error: OSError) -> None:
    raise SourceError(f"{error.filename} cannot be read: {error.strerror}")


def _split_folders(images: str) -> list[str]:
    if os.path.isdir(images):  # also one with the separator in its name
        return [images]
    return [folder for folder in images.split(os.pathsep) if folder]


@functools.lru_cache(maxsize=8)
def _list_folders(images: str) -> tuple[str, ...]:
    """The folders of `images` and those directly in them."""
    found = []
    for folder in _split_folders(images):
        with os.scandir(folder) as entries:
            found += [folder, *sorted(entry.path for entry in entries if entry.is_dir())]
    return tuple(found)


def _spell_id(image_id: str) -> list[str]:
    """An image id as files may have it: COCO pads it to 12 digits. LAION's has 9, padded too."""
    if image_id.isdecimal() and len(image_id) == 12:
        return [image_id, image_id.lstrip("0") or "0"]
    if image_id.isdecimal() and not image_id.startswith("0"):
        return [image_id, image_id.zfill(12)]
    return [image_id]


@functools.lru_cache(maxsize=8)
def _read_table(file: str, keys: tuple, values: tuple) -> dict[str, tuple[str, ...]]:
    """A CSV's values by the last part of its key; of `keys` and `values`, those that it has."""
    try:
        table = pd.read_csv(
            file, dtype=str, keep_default_na=False, encoding="utf-8-sig", encoding_errors="replace"
        )
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise TripletError(f"{file} cannot be read as CSV ({error})", file=Path(file)) from None
    names = {name.strip().lower(): name for name in table}
    key = next((names[name] for name in keys if name in names), None)
    columns = [names[name] for name in values if name in names]
    if key is None or not columns:
        raise TripletError(
            f"{file} has the columns {', '.join(table)}; expected "
            f"{' or '.join(keys)}, and {' or '.join(values)}",
            file=Path(file),
        )
    return dict(zip(map(_last_part, table[key]), zip(*(table[name] for name in columns))))


def _last_part(path: str) -> str:
    return path.strip().replace("\\", "/").rsplit("/", 1)[-1]
