"""Where a model looks: crops of an image around the objects that are to be removed.

A model of 512 px sees nothing of a small object in a photograph that was shrunk to its size, and
gives back a blur. So each object, with those near it, is removed in a crop: not smaller than what
the model works at, so that small objects are seen pixel by pixel, and large enough to hold the
object's shadow and reflection and some of what is around it. Only where the objects fill most of
the image it is the whole frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

MARGIN = 0.4  # context on each side of the objects, as a share of their larger side
SQUARE = 1.5  # a crop that would be longer than wide by less than this is made square
MAX_ASPECT = 2.0  # of a crop; longer than wide models are trained on little
FRAME_SHARE = 0.7  # a crop that covers more of the image than this is the whole frame
NATIVE = 1.35  # an image whose short side is up to so many times the model's is seen whole
MAX_CROPS = 24  # of an image: a mask of many specks costs no more than so many removals
LEAST_SCALE = 0.6  # objects that share a crop are not seen smaller than this against one alone
FRAME_ASPECT = 8  # wider or taller than photographs are: memory grows with the long side
_MAP_SIDE = 1024  # px of the map in which objects are looked for
_MOST_BOXES = 64

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in px; x1 and y1 lie just outside


@dataclass(frozen=True)
class Crop:
    """A part of an image, and the size at which the model works on it.

    Attributes:
        box: x0, y0, x1, y1 in px of the image.
        size: width and height in px at which the model works, multiples of its unit.
        core: x0, y0, x1, y1 around the objects that this crop is for; other holes in the box belong
            to other crops.
    """

    box: Box
    size: tuple[int, int]
    core: Box

    @property
    def scale(self) -> float:
        """Px that the model sees for one px of the image."""
        return self.size[0] / (self.box[2] - self.box[0])

    @property
    def slices(self) -> tuple[slice, slice]:
        """For an array [H, W, ...]."""
        x0, y0, x1, y1 = self.box
        return slice(y0, y1), slice(x0, x1)


def frame_crop(width: int, height: int, resolution: int, unit: int) -> Crop:
    """The whole frame, its short side near `resolution` px; of an image longer than `FRAME_ASPECT`
    times its short side the long side decides."""
    scale = resolution / max(min(height, width), max(height, width) / FRAME_ASPECT)
    size = tuple(max(unit, round(side * scale / unit) * unit) for side in (width, height))
    return Crop((0, 0, width, height), size, (0, 0, width, height))


def plan_crops(
    mask: np.ndarray, resolution: int, unit: int, *, margin: float = MARGIN
) -> list[Crop]:
    """Crops that hold all of a mask, each with context.

    Objects share a crop where that shows the model no more than a crop for each would, and where
    there are more than `MAX_CROPS`. Boxes lie inside of the image; they may overlap, their cores do
    not.

    Args:
        mask: [H, W] uint8, white (>= 128) is removed.
        resolution: short side at which the model works, px.
        unit: what the sides of what it works on are multiples of, px.
        margin: context on each side, as a share of an object's larger side.

    Returns:
        From the top down; none where nothing is white.
    """
    height, width = mask.shape
    boxes = find_boxes(mask, resolution)
    if not boxes:
        return []
    whole = frame_crop(width, height, resolution, unit)
    if max(whole.size) <= MAX_ASPECT * resolution and min(height, width) <= NATIVE * resolution:
        return [whole]
    native = max(unit, round(resolution / unit) * unit)

    def make(box: Box, context: float) -> Crop:
        return _make_crop(box, context, (width, height), native, unit)

    groups = []
    for box, side in boxes:
        context = margin * side
        crop = make(box, context)
        groups.append((context, crop.scale, crop))
    crops = [crop for *_, crop in _merge(groups, make)]
    if max(_area(crop.box) for crop in crops) > FRAME_SHARE * width * height:
        return [whole]
    return sorted(crops, key=lambda crop: crop.core[1::-1])


def find_boxes(mask: np.ndarray, resolution: int) -> list[tuple[Box, int]]:
    """Boxes around the connected white parts of a mask, at most `_MOST_BOXES`, each with its
    largest part's larger side.

    They are looked for in a map of at most `_MAP_SIDE` px a side. Of more parts than that, those in
    one cell of a grid share a box.
    """
    height, width = mask.shape
    white = cv2.compare(mask, 127, cv2.CMP_GT)
    step = -(-max(height, width) // _MAP_SIDE)
    cells = white
    if step > 1:  # any white in a cell counts
        down, right = -height % step, -width % step
        cells = cv2.copyMakeBorder(white, 0, down, 0, right, cv2.BORDER_CONSTANT)
        cells = cells.reshape(cells.shape[0] // step, step, -1, step).max(axis=(1, 3))
    _, _, stats, _ = cv2.connectedComponentsWithStats(cells, connectivity=8)
    boxes = []
    for x, y, w, h, _ in stats[1:].tolist():
        part = white[y * step : (y + h) * step, x * step : (x + w) * step]
        ys, xs = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
        left, top = x * step, y * step
        boxes.append((left + xs[0], top + ys[0], left + xs[-1] + 1, top + ys[-1] + 1))
    boxes = [tuple(map(int, box)) for box in boxes]
    boxes = [(box, max(box[2] - box[0], box[3] - box[1])) for box in boxes]
    cell = max(1, resolution // 2)
    while len(boxes) > _MOST_BOXES:
        shared: dict[tuple[int, int], tuple[Box, int]] = {}
        for box, side in boxes:
            place = ((box[0] + box[2]) // 2 // cell, (box[1] + box[3]) // 2 // cell)
            other, largest = shared.get(place, (box, side))
            shared[place] = (_unite(box, other), max(side, largest))
        boxes = list(shared.values())
        cell *= 2
    return boxes


def _merge(groups: list, make) -> list:
    """Unite groups while that pays, pair by pair, the best pair first.

    A group is (context, scale at which its objects would be seen alone, crop).
    """

    def weigh(a, b):
        """By how much more of the image the model would see if two were united, and the group."""
        context, scale = max(a[0], b[0]), max(a[1], b[1])
        crop = make(_unite(a[2].core, b[2].core), context)
        growth = _area(crop.box) - _area(a[2].box) - _area(b[2].box)
        if _meet(a[2].core, b[2].core):
            growth = -np.inf
        elif crop.scale < LEAST_SCALE * scale:
            growth = max(growth, 1)
        return growth, (context, scale, crop)

    groups = dict(enumerate(groups))
    pairs = {(i, j): weigh(groups[i], groups[j]) for i in groups for j in groups if i < j}
    while pairs:
        (i, j), (growth, united) = min(pairs.items(), key=lambda item: (item[1][0], item[0]))
        if growth > 0 and len(groups) <= MAX_CROPS:
            break
        pairs = {pair: found for pair, found in pairs.items() if not {i, j} & set(pair)}
        del groups[i], groups[j]
        number = max((i, j, *groups)) + 1
        pairs |= {(k, number): weigh(group, united) for k, group in groups.items()}
        groups[number] = united
    return list(groups.values())


def _make_crop(core: Box, context: float, frame: tuple[int, int], native: int, unit: int) -> Crop:
    """The crop around a core with `context` px on each side, in an image of `frame` (W, H) px."""
    extents = (core[2] - core[0], core[3] - core[1])
    least = min(native, *frame)  # of small objects: the model's size, pixel by pixel
    sides = [max(least, extent + 2 * context) for extent in extents]
    # Square unless the objects are long: that is what models have seen most of.
    longest = max(sides)
    shortest = longest if longest <= SQUARE * min(sides) else longest / MAX_ASPECT
    sides = [min(most, max(side, shortest)) for side, most in zip(sides, frame)]
    # Where the image is too narrow for that, some context is cut off at the ends.
    sides = [
        max(min(side, MAX_ASPECT * min(sides)), min(1.25 * extent, most))
        for side, extent, most in zip(sides, extents, frame)
    ]
    scale = native / max(min(sides), max(sides) / FRAME_ASPECT)
    size, box = [], [0, 0, 0, 0]
    for axis in (0, 1):
        most, low, high = frame[axis], core[axis], core[axis + 2]
        side = max(unit, round(sides[axis] * scale / unit) * unit)
        length = min(most, max(high - low, round(side / scale)))
        begin = round((low + high - length) / 2)
        begin = min(max(begin, high - length, 0), low, most - length)
        size.append(side)
        box[axis], box[axis + 2] = begin, begin + length
    return Crop(tuple(box), tuple(size), core)


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _unite(a: Box, b: Box) -> Box:
    return (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
