"""Masks: binarise, widen, draw as a hand would, show. White (255) is what is to be removed."""

from __future__ import annotations

import math

import cv2
import numpy as np


def binarise_mask(mask: np.ndarray, threshold: int = 128) -> np.ndarray:
    """A mask of grey levels as one of 0 and 255.

    Args:
        mask: [H, W] or [H, W, C] (channel 0 counts, as upstream) uint8 or bool.
        threshold: the lowest grey level that counts as white.

    Returns:
        [H, W] uint8, 0 or 255.

    Raises:
        ValueError: another type or shape.
    """
    mask = np.asarray(mask)
    if mask.ndim == 3:
        mask = mask[..., 0]
    if mask.dtype == bool:
        mask = mask.astype(np.uint8) * 255
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise ValueError(f"a mask is uint8 or bool [H, W], not {mask.dtype} {list(mask.shape)}")
    return np.where(mask >= threshold, 255, 0).astype(np.uint8)


def dilate_mask(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Widen a mask with a square kernel of `pixels` px a side, as upstream's inference does.

    It grows by about half of `pixels` on each side; 0 leaves it as it is.

    Args:
        mask: [H, W] uint8.
        pixels: the kernel's side, at least 0.
    """
    if pixels < 0:
        raise ValueError(f"a mask cannot be dilated by {pixels} px: take 0 or more")
    return cv2.dilate(mask, np.ones((pixels, pixels), np.uint8)) if pixels else mask.copy()


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask [h, w] uint8 at [height, width], nearest neighbours: no new grey level comes in."""
    if mask.shape == (height, width):
        return mask
    return cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def loosen_mask(mask: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """Make an exact mask look drawn by hand: wider, wobbly, with the object still all covered.

    Args:
        mask: [H, W] uint8, white is >= 128.
        rng: fixes the wobble.
        strength: 0 leaves the mask as it is; 1 grows it by about 6 % of the short side.

    Returns:
        [H, W] uint8, 0 or 255, white wherever `mask` is.
    """
    if strength < 0:
        raise ValueError(f"strength must be 0 or more, not {strength}")
    exact = binarise_mask(mask)
    height, width = exact.shape
    reach = 0.06 * strength * min(height, width)
    if reach < 0.5:
        return exact
    grown = cv2.dilate(exact, _disc(reach)).astype(np.float32)
    small = rng.standard_normal((8, 8)).astype(np.float32)
    wobble = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    drawn = cv2.GaussianBlur(grown, (0, 0), max(0.5, reach / 2)) + 40 * wobble
    near = cv2.dilate(grown, _disc(reach / 2)) > 0  # the wobble draws no islands elsewhere
    return np.maximum(np.where((drawn > 110) & near, 255, 0).astype(np.uint8), exact)


def perturb_mask(
    mask: np.ndarray, rng: np.random.Generator, *, dilate_max: float = 0.04, loosen: float = 1.0
) -> np.ndarray:
    """Another mask that people might have given for the same object: wider, or drawn by hand.

    One of the two by a coin: `dilate_mask` by a uniformly drawn width, or `loosen_mask`.

    Args:
        mask: [H, W] uint8, white is >= 128.
        rng: fixes what is drawn.
        dilate_max: the most that an object's width grows, as a share of the short side (0.04 of
            512 px is 20 px); it grows by 1 px at least. 0 never dilates.
        loosen: strength of `loosen_mask`; 0 never loosens.

    Returns:
        [H, W] uint8, 0 or 255, white wherever `mask` is; `mask` itself where the other one would
        leave nothing of the image.
    """
    if dilate_max < 0:
        raise ValueError(f"dilate_max must be 0 or more, not {dilate_max}")
    exact = binarise_mask(mask)
    coin = rng.random() < 0.5
    if dilate_max and (coin or not loosen):
        growth = math.ceil(rng.uniform(0, dilate_max) * min(exact.shape))
        changed = dilate_mask(exact, 1 + growth)
    else:
        changed = loosen_mask(exact, rng, loosen)
    return exact if changed.min() >= 128 else changed


def _disc(radius: float) -> np.ndarray:
    side = 2 * max(1, round(radius)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def draw_box_mask(height: int, width: int, box) -> np.ndarray:
    """A rectangle as a mask.

    Args:
        height, width: the image's size in pixels.
        box: x0, y0, x1, y1 in pixels; x1 and y1 lie just outside; what leaves the image is cut.

    Returns:
        [H, W] uint8, 0 or 255.

    Raises:
        ValueError: not four numbers, or nothing of the box lies in the image.
    """
    if len(box) != 4:
        raise ValueError(f"a box is x0, y0, x1, y1 in pixels, not {list(box)}")
    x0, y0, x1, y1 = (max(0, round(value)) for value in box)
    mask = np.zeros((height, width), np.uint8)
    mask[y0:y1, x0:x1] = 255
    if not mask.any():
        raise ValueError(f"the box {list(box)} covers nothing of an image of {width}x{height} px")
    return mask


def outline_mask(image: np.ndarray, mask: np.ndarray, colour=(230, 30, 130)) -> np.ndarray:
    """Draw a mask's outline over an image, just outside the mask, for looking at.

    Args:
        image: [H, W, 3] uint8.
        mask: [H, W] uint8.
        colour: RGB 0..255.

    Returns:
        A copy, [H, W, 3] uint8; the line is 1 px thick, more on large images.
    """
    exact = binarise_mask(mask)
    if exact.shape != image.shape[:2]:
        raise ValueError(f"the mask has {exact.shape} px but the image {image.shape[:2]}")
    line = cv2.dilate(exact, _disc(max(1, min(exact.shape) / 300))) > exact
    shown = image.copy()
    shown[line] = colour
    return shown
