"""What people give a remover, as arrays, and its results in the kind that was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rorem_lib.data import masks
from rorem_lib.data.pictures import (
    TripletError,
    collect_metadata,
    keep_bands,
    load_mask,
    open_image,
    to_array,
    turn_upright,
)

KINDS = "a path, a PIL image, an array [H, W(, 1, 3 or 4)] or a tensor [(1, 3 or 4,) H, W]"


@dataclass
class Given:
    """One image and its mask.

    Attributes:
        name: what it is called in errors.
        image: [H, W, 3] uint8.
        mask: [H, W] uint8, 0 or 255; 255 is removed.
        restore: a result [H, W, 3] uint8 -> the kind, the mode and the depth of the image that was
            given. Where the result is the source's, so is every bit of it; elsewhere a deeper
            image gets 8 bits. Palettes and CMYK become RGB (RGBA), since they may lack the colours.
    """

    name: str
    image: np.ndarray
    mask: np.ndarray
    restore: Callable[[np.ndarray], object]


def read_inputs(image, mask, name: str, *, invert: bool = False) -> Given:
    """Read an image and its mask.

    Args:
        image: a path (anything `data.pictures` opens), a PIL image, an array of uint8, uint16 or
            floats in 0..1, or a tensor, channels first. Files and PIL images are turned as their
            EXIF says.
        mask: likewise, and bool; `masks.interpret_mask` says what counts as white. One of another
            size is fitted where its aspect is the image's.
        name: what to call it in errors, unless it is a path.
        invert: black is removed.

    Raises:
        TripletError: a file that cannot be read.
        ValueError: another kind, type or shape; no mask; another aspect. Names image and mend.
    """
    name = str(image) if isinstance(image, (str, Path)) else name
    pixels, restore = _read_image(image, name)
    return Given(name, pixels, _read_mask(mask, pixels.shape[:2], name, invert), restore)


def _read_image(image, name: str) -> tuple[np.ndarray, Callable]:
    if isinstance(image, (str, Path)):
        with open_image(image) as opened:
            opened.load()
            return _read_pil(opened, name)
    if isinstance(image, Image.Image):
        return _read_pil(image, name)
    if isinstance(image, torch.Tensor):
        array = image.detach().cpu()
        array = array.float() if array.dtype in (torch.bfloat16, torch.float16) else array
        planar = array.ndim == 3
        pixels, restore = _read_array(
            array.numpy().transpose(1, 2, 0) if planar else array.numpy(), name
        )

        def restore_tensor(result: np.ndarray) -> torch.Tensor:
            made = restore(result)
            made = np.ascontiguousarray(made.transpose(2, 0, 1) if planar else made)
            return torch.from_numpy(made).to(image.device, image.dtype)

        return pixels, restore_tensor
    if isinstance(image, np.ndarray):
        return _read_array(image, name)
    raise ValueError(f"{name} is a {type(image).__name__}: give {KINDS}")


def _read_pil(image: Image.Image, name: str) -> tuple[np.ndarray, Callable]:
    metadata = collect_metadata(image, name)
    image = turn_upright(image)
    deep = image.mode.startswith("I")
    layered = image.has_transparency_data
    pixels = to_array(image, "RGB", name)
    grey = image.mode in ("1", "L", "LA", "La") or deep
    alpha = np.asarray(image.convert("RGBA").getchannel("A")) if layered else None
    stored = np.asarray(image) if deep else None

    def restore(result: np.ndarray) -> Image.Image:
        if deep:
            made = Image.fromarray(_deepen(_to_grey(result), stored, pixels[..., 0], 257))
        else:
            made = _to_grey(result) if grey else result
            if alpha is not None:
                made = np.dstack([made, alpha])
            made = Image.fromarray(np.ascontiguousarray(made))
        made.info |= metadata
        return made

    return pixels, restore


def _to_grey(result: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(result).convert("L"))


def _read_array(array: np.ndarray, name: str) -> tuple[np.ndarray, Callable]:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or not array.size:
        raise ValueError(f"{name} has the shape {list(array.shape)}: give {KINDS}")
    small, scale = _to_bytes(array, name)
    flat = small if array.ndim == 3 else small[..., None]
    pixels = np.repeat(flat, 3, 2) if channels == 1 else np.ascontiguousarray(flat[..., :3])

    def restore(result: np.ndarray) -> np.ndarray:
        made = _to_grey(result)[..., None] if channels == 1 else result
        if channels == 4:
            made = np.concatenate([made, flat[..., 3:]], axis=2)
        made = made.reshape(array.shape)
        return made if scale is None else _deepen(made, array, small, scale)

    return pixels, restore


def _deepen(made: np.ndarray, stored: np.ndarray, seen: np.ndarray, scale) -> np.ndarray:
    """`made` (8 bits) in the stored values' depth; those themselves where nothing changed."""
    return np.where(made == seen, stored, made * np.float64(scale)).astype(stored.dtype)


def _to_bytes(array: np.ndarray, name: str) -> tuple[np.ndarray, float | None]:
    """As uint8, and what one of its grey levels is worth in the array's own values."""
    if array.dtype == np.uint8:
        return array, None
    if array.dtype == bool:
        return array.astype(np.uint8) * 255, 1 / 255
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8), 257
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN too
            raise ValueError(
                f"{name} is {array.dtype} with values from {low:g} to {high:g}: floats count from "
                "0 to 1; divide by 255, or give uint8"
            )
        return (array.clip(0, 1) * 255 + 0.5).astype(np.uint8), 1 / 255
    raise ValueError(f"{name} is {array.dtype}: give uint8, uint16 or floats in 0..1")


def _read_mask(mask, size: tuple[int, int], name: str, invert: bool) -> np.ndarray:
    """[H, W] uint8, 0 or 255, of the image's size (height, width)."""
    if isinstance(mask, (str, Path)):
        return masks.binarise_mask(load_mask(mask, size, invert=invert))
    called = f"{name}, its mask"
    if isinstance(mask, Image.Image):
        array = keep_bands(turn_upright(mask), called)
    elif isinstance(mask, (np.ndarray, torch.Tensor)):
        array = mask.detach().cpu() if isinstance(mask, torch.Tensor) else mask
        if isinstance(array, torch.Tensor):
            array = array.float() if array.dtype in (torch.bfloat16, torch.float16) else array
            array = array.numpy()
            array = array.transpose(1, 2, 0) if array.ndim == 3 else array
        array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
        if array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,), (4,)) or not array.size:
            raise ValueError(f"{called} has the shape {list(array.shape)}: give {KINDS}")
        if array.dtype.kind in "iu" and array.dtype != np.uint8 and array.max() <= 1:
            array = array.astype(bool)
        array = np.ascontiguousarray(_to_bytes(array, called)[0])
    else:
        raise ValueError(f"{called} is a {type(mask).__name__}: give {KINDS}")
    try:
        found = masks.interpret_mask(array)[0]
        return masks.binarise_mask(masks.fit_mask(255 - found if invert else found, *size))
    except TripletError:
        raise
    except ValueError as error:
        raise ValueError(f"{called}: {error}") from None
