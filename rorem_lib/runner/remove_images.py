"""What `rorem remove` reads and writes: an image with its mask, and a result as a file's bytes."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rorem_lib.data import masks
from rorem_lib.data.pictures import open_still, read_size
from rorem_lib.files import hash_file
from rorem_lib.models.inputs import Given, read_inputs
from rorem_lib.runner.remove_plan import WRITTEN, Item
from rorem_lib.runner.remove_results import Unusable

ENCODING = {
    "PNG": {"compress_level": 1},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95, "exact": True},
}


@dataclass(eq=False)
class Loaded:
    """An image that was read.

    Attributes:
        item: which.
        key: SHA-256 over its bytes, its mask's and the settings.
        given: the image, its mask, and how a result becomes an image of its kind.
        format: of its file, as Pillow names it.
    """

    item: Item
    key: str
    given: Given
    format: str


def make_key(item: Item, settings: Mapping) -> str:
    """SHA-256 of all that decides a result: the bytes of image and mask, and the settings.

    Raises:
        Unusable: one of them is no file.
        OSError: one of them cannot be read.
    """
    parts = []
    for path in filter(None, (item.source, item.mask)):
        if not path.is_file():  # a pipe would be waited for
            raise Unusable(f"{path} {'is no file' if path.exists() else 'does not exist'}")
        parts.append(hash_file(path))
    text = json.dumps([*parts, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def load_item(item: Item, key: str, *, boxes: Sequence, invert: bool = False) -> Loaded:
    """Read an image and its mask.

    Args:
        boxes: (x0, y0, x1, y1) in px of the upright image, where there is no mask.
        invert: what the mask or the boxes leave is removed.

    Raises:
        ValueError: one of them cannot be read, or they do not fit; names the file.
    """
    with open_still(item.source) as opened:
        kind = opened.format
    mask = item.mask
    if mask is None:
        size = read_size(item.source)
        try:
            mask = np.maximum.reduce([masks.draw_box_mask(*size, box) for box in boxes])
        except ValueError as error:
            raise Unusable(f"{item.source}: {error}") from None
    given = read_inputs(item.source, mask, str(item.source), invert=invert)
    return Loaded(item, key, given, kind)


def encode_result(loaded: Loaded, image: np.ndarray | None, suffix: str) -> bytes:
    """The bytes of a result's file: the image's own mode, transparency, colour profile and EXIF.

    Args:
        image: [H, W, 3] uint8; None where nothing is removed: in its own format the image stays
            the file that it is.
        suffix: one of `WRITTEN`.

    Raises:
        Unusable: the format cannot hold it.
    """
    source, kind = loaded.item.source, WRITTEN[suffix]
    if image is None:
        if loaded.format == kind:
            return source.read_bytes()
        image = loaded.given.image
    made = loaded.given.restore(image)
    if kind == "JPEG" and made.mode.endswith("A"):
        if made.getchannel("A").getextrema()[0] < 255:
            raise Unusable(f"{source} has transparency, which JPEG cannot keep: take .png or .webp")
        made = made.convert(made.mode[:-1])
    if kind != "PNG" and made.mode.startswith("I"):  # 16 bits
        metadata, made = made.info, Image.fromarray(image).convert("L")
        made.info |= metadata
    if made.mode[0] in "LI":
        made.info.pop("icc_profile", None)  # of RGB
    return _encode(loaded, made, kind)


def encode_side_by_side(loaded: Loaded, image: np.ndarray | None, suffix: str) -> bytes:
    """The bytes of a file with the image, its mask's outline in it, and the result.

    They lie beside each other, or one below the other where the image is wider than tall.
    """
    source, mask = loaded.given.image, loaded.given.mask
    axis = 0 if source.shape[1] > source.shape[0] else 1
    shape = list(source.shape)
    shape[axis] = max(2, min(shape[:2]) // 100)
    gap = np.full(shape, 255, np.uint8)
    after = source if image is None else image
    joined = np.concatenate([masks.outline_mask(source, mask), gap, after], axis=axis)
    return _encode(loaded, Image.fromarray(joined), WRITTEN[suffix])


def _encode(loaded: Loaded, image: Image.Image, kind: str) -> bytes:
    kept = {name: image.info[name] for name in ("icc_profile", "exif") if image.info.get(name)}
    stream = io.BytesIO()
    try:
        image.save(stream, kind, **ENCODING[kind], **kept)
    except (ValueError, OSError) as error:  # WebP ends at 16383 px, JPEG's EXIF at 64 KB
        raise Unusable(f"{loaded.item.source} cannot be written as {kind} ({error})") from None
    return stream.getvalue()


def name_side_by_side(output: str) -> str:
    """What the comparison beside a result is called."""
    path = Path(output)
    return f"{path.stem}_side_by_side{path.suffix}"
