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


def interpret_mask(image: np.ndarray) -> tuple[np.ndarray, bool]:
    """The mask that an image file means, of the kinds that people and programs make.

    - Grey levels: white is to be removed. Values of exactly 0 and 1 count as black and white.
    - Two colours, one of them black (a palette of classes, a red layer): the other one counts.
    - Strokes on a transparent layer: what was drawn; white ones by their lightness, as in black
      and white.
    - An image with a transparent hole, as DALL-E's editor takes it: the hole.

    Args:
        image: [H, W], [H, W, 3] or [H, W, 4] (RGBA) uint8.

    Returns:
        [H, W] uint8, and whether it is as the file's own lightness has it.

    Raises:
        ValueError: a photograph, or something that can be read in two ways: names them.
    """
    if image.ndim == 3 and image.shape[2] == 4:
        if image[..., 3].min() < 255:
            return _read_layer(image), False
        image = image[..., :3]
    if image.ndim == 3:
        if _is_coloured(image):
            return _read_two_colours(image), False
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    low, high, *_ = cv2.minMaxLoc(image)
    if (low, high) == (0, 1):
        return image * 255, False
    middle = cv2.countNonZero(cv2.inRange(image, 32, 223)) / image.size
    if middle > 0.6 and len(np.unique(image)) > 64:
        raise ValueError(
            f"is a photograph: {middle:.0%} of it is neither black nor white. Give a mask of its "
            "size, white where something is to be removed and black elsewhere"
        )
    return image, True


def _read_layer(image: np.ndarray) -> np.ndarray:
    """The mask of an RGBA image [H, W, 4] that is transparent somewhere."""
    colour, alpha = np.ascontiguousarray(image[..., :3]), image[..., 3]
    seen = alpha >= 128
    edge = np.concatenate([seen[0], seen[-1], seen[:, 0], seen[:, -1]])
    is_canvas = edge.mean() > 0.5  # a whole image with a hole, not something on nothing
    grey = cv2.cvtColor(colour, cv2.COLOR_RGB2GRAY)
    drawn = (grey * (alpha / np.float32(255)) + 0.5).astype(np.uint8)
    if not seen.any():
        return drawn
    if seen.all():
        return interpret_mask(colour)[0]
    some = colour[seen][:: 1 + seen.sum() // 100_000].astype(np.float32)
    low, high = some.min(axis=1), some.max(axis=1)
    white = ((high < 48) | (low > 207)).mean() > 0.97 and (low > 207).mean() > 0.01
    if is_canvas and white:
        raise ValueError(
            "has white in it and a transparent hole: is the white to be removed, or the hole? Save "
            "the one in white on black, without transparency"
        )
    if is_canvas:
        return np.where(seen, 0, 255).astype(np.uint8)
    if (np.abs(some - _find_mode(some)).max(axis=1) <= 48).mean() > 0.97:  # one colour
        return alpha
    if white:
        return drawn
    raise ValueError(
        "is an object cut out of its image: is the object to be removed, or what is around it? "
        "Save the one in white on black"
    )


def _is_coloured(image: np.ndarray) -> bool:
    """Whether more than specks of an RGB image [H, W, 3] are no grey."""
    step = max(1, int((image.size / 3e6) ** 0.5))  # a megapixel tells
    red, green, blue = cv2.split(image[::step, ::step])
    spread = cv2.max(cv2.absdiff(red, green), cv2.absdiff(green, blue))
    return cv2.countNonZero(cv2.compare(spread, 24, cv2.CMP_GT)) > 1e-4 * spread.size


def _read_two_colours(image: np.ndarray) -> np.ndarray:
    """How much each pixel [H, W, 3] is of the other colour than black, as a mask [H, W]."""
    flat = image.reshape(-1, 3)
    some = flat[:: 1 + len(flat) // 100_000].astype(np.float32)
    first = _find_mode(some)
    others = some[np.abs(some - first).max(axis=1) > 48]
    if not len(others):  # one colour all over
        return np.where((image.max(axis=2) < 48), 0, 255).astype(np.uint8)
    second = _find_mode(others)
    line = second - first
    way = np.clip((some - first) @ line / (line @ line), 0, 1)[:, None]
    off = np.abs(some - (first + way * line)).max(axis=1) > 48
    if off.mean() > 0.02:
        raise ValueError(
            "has many colours, as a photograph or a map of classes has. Give a mask of the image's "
            "size, white where something is to be removed and black elsewhere"
        )
    black = [colour.max() < 48 for colour in (first, second)]
    if not any(black):
        shown = " and ".join(f"rgb({', '.join(map(str, c.astype(int)))})" for c in (first, second))
        raise ValueError(
            f"has the colours {shown}: which of them is to be removed? Save that one in white, the "
            "other one in black"
        )
    start, end = (first, second) if black[0] else (second, first)
    line = (end - start) / ((end - start) @ (end - start))
    way = image.astype(np.float32) @ line - start @ line
    return np.clip(255 * way + 0.5, 0, 255).astype(np.uint8)


def _find_mode(colours: np.ndarray) -> np.ndarray:
    """The commonest of some colours [N, 3] float32, as the mean of those like it."""
    cells = (colours.astype(np.int64) >> 5) @ (64, 8, 1)
    return colours[cells == np.bincount(cells).argmax()].mean(axis=0)


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


def has_shape(mask: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether a mask of (height, width) px is a scaled view of an image of `size`.

    Rounded sides pass: the aspects may differ by 2 px on the shortest of the four.
    """
    (h, w), (height, width) = mask, size
    return abs(w * height / (h * width) - 1) <= 2 / min(h, w, height, width)


def fit_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask [h, w] uint8 drawn at another size, at its image's: [height, width], 0 or 255.

    Made smaller, it keeps every pixel that it touched: thin lines do not fade away.

    Raises:
        ValueError: its aspect is another; names both sizes.
    """
    if not has_shape(mask.shape, (height, width)):
        raise ValueError(
            f"the mask is {mask.shape[1]}x{mask.shape[0]} px, which is another shape than its "
            f"image's {width}x{height} px: draw it on the image as it is, or crop it alike"
        )
    mask = binarise_mask(mask)
    if mask.shape[0] <= height:
        return resize_mask(mask, height, width)
    exact = mask.astype(np.float32)  # in bytes a small share would be rounded away
    small = cv2.resize(exact, (width, height), interpolation=cv2.INTER_AREA)
    return np.where(small > 0, 255, 0).astype(np.uint8)


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


def find_surroundings(mask: np.ndarray) -> tuple[slice, slice]:
    """Where to look at a mask closely: its box, wider on all sides by half of its longer one.

    Args:
        mask: [H, W] uint8 with anything above 0.

    Returns:
        Slices of rows and columns.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    margin = max(8, max(np.ptp(rows), np.ptp(columns)) // 2)
    return tuple(slice(max(0, int(x[0]) - margin), int(x[-1]) + margin) for x in (rows, columns))


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
