"""What a triplet must be to go into a set, measured: sizes, mask, change inside and outside of it.

A removal differs from its source inside the mask and hardly outside of it. Where it differs
outside too, the pair is either misaligned (another camera position: RORD's tripods move at times)
or another image. Shadows and reflections outside of the mask are welcome, so the outside is
judged by its typical pixel, not by its worst.

`find_duplicates` compares whole sets: the same image twice among the training images, or in
training and evaluation, makes every figure too good. `reject_duplicates` and `reject_unsafe` do so,
and ask a safety checker, when an assembly has all records together.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import imagehash
import numpy as np
from PIL import Image

from rorem_lib.data.items import Pictures, Rejected, describe_rejection
from rorem_lib.data.journal import Journal, JournalIndex
from rorem_lib.data.pictures import load_image
from rorem_lib.data.triplets import describe_size, iter_triplets
from rorem_lib.data.writer import TripletWriter
from rorem_lib.parameters import option

_SMALL = 256  # px: side of the images on which a shift is measured
_EDGE = 40.0  # strength of an edge (Sobel, grey levels) that noise and JPEG seldom reach
_HASH_BITS = 64
_LOOKS = 8  # images of one hash that a candidate is compared with


@dataclass(frozen=True)
class FilterConfig:
    """The limits; an image at a limit passes."""

    min_side: int = option(0, "shortest side, px")
    min_mask_area: float = option(0.0005, "least fraction of the image that is masked, 0 to 1")
    max_mask_area: float = option(0.9, "largest fraction of the image that is masked, 0 to 1")
    min_change: float = option(
        2.0, "mean difference of source and GT inside the mask, grey levels 0 to 255"
    )
    max_change_outside: float = option(
        12.0, "median difference outside of the mask, grey levels 0 to 255"
    )
    max_shift: float = option(
        0.004, "shift between source and GT, as a fraction of the longer side"
    )
    duplicate_distance: int = option(
        4,
        "bits in which the perceptual hashes (64 bits) of two near-duplicates differ at most; -1 "
        "looks for none",
    )

    def __post_init__(self):
        if not 0 <= self.min_mask_area < self.max_mask_area <= 1:
            raise ValueError(
                "min_mask_area and max_mask_area are shares, the first is smaller: "
                f"{self.min_mask_area}, {self.max_mask_area}"
            )
        if not -1 <= self.duplicate_distance <= 16:
            raise ValueError(
                f"duplicate_distance lies between -1 and 16 bits, not {self.duplicate_distance}"
            )
        if min(self.min_side, self.min_change, self.max_change_outside, self.max_shift) < 0:
            raise ValueError("min_side, min_change, max_change_outside and max_shift are 0 or more")


def check_pictures(pictures: Pictures, config: FilterConfig) -> dict:
    """Measure a triplet and refuse what breaks a limit.

    Returns:
        `mask_area` (0 to 1), `phash` (16 hex digits) and, with a GT, `change_inside` and
        `change_outside` in grey levels: the filters' results, kept in the record.

    Raises:
        Rejected: with the reason "sizes differ", "small image", "empty mask", "white mask",
            "mask area", "unchanged", "misaligned" or "changed outside".
    """
    source, mask = pictures.source.array, pictures.mask.array
    gt = None if pictures.gt is None else pictures.gt.array
    for part, other in (("mask", mask), ("GT", gt)):
        if other is not None and other.shape[:2] != source.shape[:2]:
            raise Rejected(
                "sizes differ", f"{part} {describe_size(other)}, source {describe_size(source)} px"
            )
    if min(source.shape[:2]) < config.min_side:
        raise Rejected(
            "small image", f"{describe_size(source)} px, at least {config.min_side} are asked for"
        )
    hole = cv2.compare(mask, 128, cv2.CMP_GE)
    area = cv2.countNonZero(hole) / hole.size
    if area in (0, 1):
        raise Rejected(
            "white mask" if area else "empty mask",
            f"the mask is {'white everywhere' if area else 'empty'}",
        )
    if not config.min_mask_area <= area <= config.max_mask_area:
        raise Rejected("mask area", f"the mask covers {area:.2%} of the image")
    found = {"mask_area": round(area, 5), "phash": hash_picture(source)}
    return found if gt is None else found | _check_change(source, hole, gt, config)


def _check_change(source, hole, gt, config: FilterConfig) -> dict:
    difference = cv2.cvtColor(cv2.absdiff(source, gt), cv2.COLOR_RGB2GRAY)
    inside = cv2.mean(difference, mask=hole)[0]
    # The hole's surroundings are left out: blended GTs change there, and so do soft edges.
    reach = 2 * max(1, round(0.02 * max(hole.shape))) + 1
    outside = cv2.bitwise_not(cv2.dilate(hole, np.ones((reach, reach), np.uint8)))
    counts = cv2.calcHist([difference], [0], outside, [256], [0, 256]).ravel()
    median = float(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
    if inside < config.min_change:
        raise Rejected(
            "unchanged",
            f"source and GT differ by {inside:.2f} grey levels inside of "
            "the mask: nothing was removed",
        )
    if counts.sum() and median >= 1:
        shift = measure_shift(source, gt, hole)
        if shift > config.max_shift * max(hole.shape):
            raise Rejected("misaligned", f"GT is shifted by {shift:.1f} px against the source")
    if median > config.max_change_outside:
        raise Rejected(
            "changed outside",
            f"half of the pixels outside of the mask differ by {median:.0f} grey levels or more",
        )
    return {"change_inside": round(inside, 2), "change_outside": median}


def measure_shift(source: np.ndarray, gt: np.ndarray, mask: np.ndarray) -> float:
    """How far a camera moved between two images, by phase correlation outside of the mask.

    Args:
        source, gt: [H, W, 3] uint8.
        mask: [H, W] uint8; its white part is left out.

    Returns:
        The shift's length in px; 0 where the images show too little to tell.
    """
    scale = max(1.0, max(mask.shape) / _SMALL)
    size = tuple(max(8, round(side / scale)) for side in mask.shape[::-1])
    hole = (
        cv2.dilate(
            cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST), np.ones((5, 5), np.uint8)
        )
        > 0
    )
    planes = []
    for picture in (source, gt):
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        small = cv2.resize(grey, size, interpolation=cv2.INTER_AREA).astype(np.float32)
        # Edges, not light: exposure and shadows change between two shots, edges stay.
        edges = cv2.magnitude(
            cv2.Sobel(small, cv2.CV_32F, 1, 0), cv2.Sobel(small, cv2.CV_32F, 0, 1)
        )
        edges[hole] = 0
        if np.count_nonzero(edges > _EDGE) < 0.01 * np.count_nonzero(~hole):
            return 0.0  # smooth: its edges would be noise and JPEG's blocks
        planes.append(edges)
    (dx, dy), response = cv2.phaseCorrelate(*planes, cv2.createHanningWindow(size, cv2.CV_32F))
    # OpenCV counts from size / 2, which for odd transforms lies half a pixel off.
    dx -= cv2.getOptimalDFTSize(size[0]) % 2 / 2
    dy -= cv2.getOptimalDFTSize(size[1]) % 2 / 2
    return float(np.hypot(dx, dy) * scale) if response > 0.1 else 0.0


def hash_picture(picture: np.ndarray) -> str:
    """Perceptual hash of [H, W, 3] uint8: 16 hex digits, near for images that look alike.

    The DCT hash of the ImageHash package, on an image first shrunk by averaging, which is faster
    and hashes the same.
    """
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    if max(grey.shape) > 128:
        grey = cv2.resize(grey, (128, 128), interpolation=cv2.INTER_AREA)
    return str(imagehash.phash(Image.fromarray(grey)))


def find_duplicates(
    hashes: Sequence[int],
    groups: Sequence[int],
    locate: Callable[[int], Path],
    *,
    distance: int,
    start: int = 0,
) -> Iterator[tuple[int, int]]:
    """Images that look like an earlier one of another group.

    Hashes within `distance` bits are candidates; each is then looked at, since smooth images
    have like hashes without being alike (with eight images of a hash at most).

    Args:
        hashes: [N] perceptual hashes, 64 bits; of two duplicates the first stays.
        groups: [N] numbers; images of one group are no duplicates of each other.
        locate: the file of the image at a position.
        distance: bits, 0 to 16.
        start: positions before it are compared with, and never dropped (an evaluation set that
            must share no image with the rest).

    Yields:
        (position of the duplicate, position of what it is a duplicate of), in order.
    """
    values, kinds = np.unique(np.asarray(hashes, dtype=np.uint64), return_inverse=True)
    near: dict[int, list[int]] = {}
    for one, two in _find_near(values, distance):
        near.setdefault(one, []).append(two)
        near.setdefault(two, []).append(one)
    alone = np.bincount(kinds, minlength=len(values)) == 1
    first: dict[int, dict[int, int]] = {}  # of each kind, the first image of each group
    dropped = set()
    for late, kind in enumerate(kinds.tolist()):
        if alone[kind] and kind not in near:
            continue
        known = [
            (early, group)
            for other in (kind, *near.get(kind, ()))
            for group, early in itertools.islice(first.get(other, {}).items(), _LOOKS)
        ]
        for early, group in sorted(known) if late >= start else ():
            if group != groups[late] and look_alike(locate(early), locate(late)):
                dropped.add(late)
                yield late, early
                break
        if late not in dropped:
            first.setdefault(kind, {}).setdefault(groups[late], late)


def _find_near(values: np.ndarray, distance: int) -> Iterator[tuple[int, int]]:
    """Pairs of different values [N] uint64 within `distance` bits.

    Cut into `distance + 1` bands, two near values agree in one band at least. ImageHash compares
    two hashes at a time: among 200,000 these are 20 billion pairs.
    """
    edges = np.linspace(0, _HASH_BITS, distance + 2).astype(int)
    found = set()
    for low, high in zip(edges[:-1], edges[1:]):
        keys = (values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        # Neighbours in the order, one step apart, then two, ... as long as any share a key.
        for step in range(1, len(keys)):
            same = np.flatnonzero(keys[step:] == keys[:-step])
            if not len(same):
                break
            one, two = order[same], order[same + step]
            close = np.bitwise_count(values[one] ^ values[two]) <= distance
            found.update(zip(one[close].tolist(), two[close].tolist()))
    yield from sorted(found)


def look_alike(first: str | Path, second: str | Path, *, limit: float = 12.0) -> bool:
    """Whether two images are the same but for size, compression and small edits.

    Args:
        limit: mean difference of their 32 x 32 px thumbnails, grey levels, up to which they are.
    """
    small = [
        cv2.resize(load_image(path), (32, 32), interpolation=cv2.INTER_AREA).astype(np.int16)
        for path in (first, second)
    ]
    return float(np.abs(small[0] - small[1]).mean()) <= limit


# ------------------------------------------------------------------------------- the whole set


class Checker(Protocol):
    """A content filter, such as `rorem_lib.models.safety.SafetyChecker`.

    Attributes:
        model_id: names it: an assembly with another checker is another one.
    """

    model_id: str

    def find_unsafe(self, pictures: Iterable[np.ndarray]) -> Iterable[bool]:
        """Whether each image [H, W, 3] uint8, of any size, is unsafe; in order."""


def reject_unsafe(
    writers: dict[str, TripletWriter], safety: Checker | None, answers: Journal
) -> Iterator[dict]:
    """Rejections of sources that the checker takes for unsafe.

    Args:
        writers: the sets so far, by name.
        safety: None rejects none.
        answers: what the checker said before, so that no image is looked at twice.
    """
    if safety is None:
        return
    with JournalIndex([answers.path]) as known:
        for writer in writers.values():
            with writer.open_index() as index:
                todo = [key for key in index.list_ids() if key not in known]
                pictures = (load_image(writer.folder / index[key]["source"]) for key in todo)
                for key, unsafe in zip(todo, safety.find_unsafe(pictures), strict=True):
                    answers.append({"id": key, "unsafe": bool(unsafe)})
    answers.close()
    message = "the safety checker takes the source for unsafe"
    with JournalIndex([answers.path]) as known:
        for name, writer in writers.items():
            with writer.open_index() as index:
                for key in index.list_ids():
                    if known[key]["unsafe"]:
                        yield describe_rejection(key, index[key]["group"], name, "unsafe", message)


def reject_duplicates(
    writers: dict[str, TripletWriter], *, distance: int, evaluation_sets: Iterable[str | Path] = ()
) -> Iterator[dict]:
    """Rejections of near-duplicates: of evaluation sets, in the test set, then in the rest.

    Args:
        writers: the sets so far, by name; their records have a `phash`.
        distance: see `find_duplicates`; -1 rejects none.
        evaluation_sets: sets of images that must not occur in these.
    """
    if distance < 0:
        return
    hashes, groups = array("Q"), array("q")
    files = []
    for triplet in iter_triplets(list(evaluation_sets), require_gt=False):
        files.append(triplet.source)
        known = triplet.extra.get("phash")
        hashes.append(int(known or hash_picture(load_image(triplet.source)), 16))
        groups.append(-len(files))  # each is a group
    numbers: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        ids, starts, indices = [], [], []
        # The test set first: of an image that is in both, the training set gives up its own.
        order = sorted(writers, key=lambda name: (name != "test", name))
        for name in order:
            indices.append(index := stack.enter_context(writers[name].open_index()))
            starts.append(len(ids))
            ids += index.list_ids()
            for record in index.items():
                hashes.append(int(record["phash"], 16))
                groups.append(numbers.setdefault(record["group"], len(numbers)))

        def get_record(position: int) -> tuple[str, dict]:
            which = bisect.bisect_right(starts, position - len(files)) - 1
            return order[which], indices[which][ids[position - len(files)]]

        def locate(position: int) -> Path:
            if position < len(files):
                return files[position]
            name, record = get_record(position)
            return writers[name].folder / record["source"]

        for late, early in find_duplicates(
            hashes, groups, locate, start=len(files), distance=distance
        ):
            name, record = get_record(late)
            other = (
                f"{files[early]}, an image of an evaluation set"
                if early < len(files)
                else "{1[id]} of {0}".format(*get_record(early))
            )
            yield describe_rejection(
                record["id"], record["group"], name, "near-duplicate", f"looks like {other}"
            )
