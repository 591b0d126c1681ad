"""MULAN's layers: read from an annotation or from images, composed, measured.

What the values of an annotation mean stands in `rorem_lib.sources.mulan`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from rorem_lib.data.pictures import TripletError, load_image, open_image, turn_upright
from rorem_lib.data.triplets import describe_size
from rorem_lib.sources.safe_pickle import load_compressed_pickle

CAPTIONS = ("blip2", "llava")  # the models whose captions count


@dataclass(frozen=True)
class Layer:
    """One instance of an image.

    Attributes:
        number: 1 is the first instance.
        rgb: [H, W, 3] uint8.
        alpha: [H, W] uint8, 255 is opaque.
        captions: what models call it.
    """

    number: int
    rgb: np.ndarray
    alpha: np.ndarray
    captions: tuple[str, ...]


def count_instances(path: Path, max_bytes: int) -> int:
    """How many instances an annotation has.

    Raises:
        TripletError: it is damaged, or refused.
    """
    return len(_get_dict(load_compressed_pickle(path, max_bytes), "instances", path))


def read_annotation(
    path: Path, photo: np.ndarray, max_bytes: int
) -> tuple[np.ndarray, list[Layer]]:
    """Take a photograph [H, W, 3] uint8 apart as an annotation says.

    Returns:
        The background [H, W, 3] uint8, and the instances in the order of their keys.

    Raises:
        TripletError: the annotation is damaged, refused, or does not fit the photograph.
    """
    annotation = load_compressed_pickle(path, max_bytes)
    background = _paste(photo, _get_dict(annotation, "background", path), f"{path}, background")
    instances = _get_dict(annotation, "instances", path)
    keys = list(instances)
    if all(str(key).isdecimal() for key in keys):
        keys.sort(key=lambda key: int(str(key)))
    layers = []
    for number, key in enumerate(keys, 1):
        named = f"{path}, instance {key}"
        entry = _get_dict(instances, key, path)
        alpha = _read_shares(entry, "instance_alpha", photo, named)[..., 0]
        layers.append(
            Layer(
                number,
                _paste(photo, entry, named),
                np.rint(255 * alpha).astype(np.uint8),
                _clean(entry.get(key) for key in CAPTIONS),
            )
        )
    return background, layers


def _paste(photo: np.ndarray, entry: dict, named: str) -> np.ndarray:
    """A layer's colours: [H, W, 3] uint8."""
    kept = photo * _read_shares(entry, "original_image_mask", photo, named)
    if entry.get("instance_mask") is not None:
        kept = kept * _read_shares(entry, "instance_mask", photo, named)
    delta = _read_array(entry, "inpainted_delta", photo, named)
    if delta.dtype == np.uint8:
        return np.rint(kept).astype(np.uint8) + delta
    return round_picture(kept + delta)


def _read_shares(entry: dict, key: str, photo: np.ndarray, named: str) -> np.ndarray:
    """A mask or alpha as [H, W, 1 or 3] float32 from 0 to 1."""
    array = _read_array(entry, key, photo, named)
    low, high = array.min(), array.max()
    if low < 0 or high > 255:
        raise TripletError(f"{named}: {key} reaches from {low} to {high}, not from 0 to 1 or 255")
    return array.astype(np.float32) / (255 if high > 1 else 1)


def _read_array(entry: dict, key: str, photo: np.ndarray, named: str) -> np.ndarray:
    """[H, W, 1 or 3] of the photograph's size."""
    array = entry.get(key)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise TripletError(f"{named} has no array {key} (its keys: {', '.join(map(str, entry))})")
    array = np.asarray(array)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or array.shape[:2] != photo.shape[:2]:
        raise TripletError(
            f"{named}: {key} has {list(array.shape)} values but the photograph is "
            f"{describe_size(photo)} px: give the photograph in its first size"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise TripletError(f"{named}: {key} has values that are no numbers")
    return array


def _get_dict(holder, key, path: Path) -> dict:
    value = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(value, dict):
        raise TripletError(f"{path} is no annotation of MULAN: it has no {key}", file=path)
    return value


def read_layers(
    folder: Path, image_id: str, numbers: tuple[int, ...], captions: dict
) -> tuple[np.ndarray, list[Layer]]:
    """Open the layers of an image that was taken apart already.

    Args:
        folder: holds `<image_id>-layer_<number>.png`.
        numbers: of the layers that are there, in order; 0 is the background.
        captions: by file name.

    Returns:
        As `read_annotation`.

    Raises:
        TripletError: a layer is missing, has no alpha or another size.
    """
    missing = set(range(numbers[-1] + 1)).difference(numbers)
    if missing:
        file = folder / f"{image_id}-layer_{min(missing)}.png"
        raise TripletError(f"{file} is missing: decompose {image_id} again", file=file)
    background = load_image(folder / f"{image_id}-layer_0.png")
    layers = []
    for number in numbers[1:]:
        file = folder / f"{image_id}-layer_{number}.png"
        rgb = load_image(file)
        if rgb.shape != background.shape:
            raise TripletError(
                f"{file} is {describe_size(rgb)} px but layer_0 is "
                f"{describe_size(background)}: decompose {image_id} again",
                file=file,
            )
        with open_image(file) as image:
            if not image.has_transparency_data:
                raise TripletError(
                    f"{file} has no alpha channel: decompose {image_id} again", file=file
                )
            alpha = np.array(turn_upright(image).convert("RGBA").getchannel("A"))
        layers.append(Layer(number, rgb, alpha, _clean(captions.get(file.name, ()))))
    return background, layers


def _clean(captions: Iterable) -> tuple[str, ...]:
    return tuple(
        str(text).strip()
        for text in captions
        if isinstance(text, str) and text.strip() not in ("", "N/A")
    )


def compose_layers(under: np.ndarray, layers: list[Layer]) -> np.ndarray:
    """Lay layers over an image, the last on top: [H, W, 3] float32, not rounded."""
    under = under.astype(np.float32)
    for layer in layers:
        alpha = layer.alpha[..., None].astype(np.float32) / 255
        under = layer.rgb * alpha + under * (1 - alpha)
    return under


def round_picture(picture: np.ndarray) -> np.ndarray:
    """Grey levels of any type as uint8, rounded and clipped."""
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def measure_border(alpha: np.ndarray) -> float:
    """The share of an object's outline, where it is at least half opaque, on the border."""
    solid = (alpha >= 128).astype(np.uint8)
    inner = cv2.erode(
        solid, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0
    )
    outline = solid > inner
    on_border = outline.sum() - outline[1:-1, 1:-1].sum()
    return float(on_border) / max(1, int(outline.sum()))
