"""One removal from plan to image: which crops, painted in batches, the best chosen, composed.

What paints is given: `paint(images, masks, numbers, names)` makes removals of a batch of images of
one size, `round_trip(images)` takes such a batch through the autoencoder alone. So this knows of no
model, and nothing of what it does depends on what shares a batch: every crop's noise is its
image's own, and crops never see each other's results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

from rorem_lib.models.composition import compose, shrink
from rorem_lib.models.crops import Box, Crop, frame_crop, plan_crops

NO_SCORER = (
    "candidates is {}, but nothing chooses among them: give the remover a discriminator "
    "(ObjectRemover(..., score=...)), or take candidates=1"
)


@dataclass
class Removal:
    """The outcome for one image.

    Attributes:
        image: the image without the object, of the source's size. `ObjectRemover.remove` gives it
            in the kind that was given (a PIL image for a path).
        effect: [H, W] uint8, how much of each pixel is the remover's: 0 where the source's own
            pixel stands, bit for bit, 255 where it is all new.
        crops: boxes (x0, y0, x1, y1) in px that the model saw; the whole frame with `crop=False`.
        seconds: how long it took, a share of its batch.
        score: the discriminator's probability that it is a good removal; None without one.
        number: of the candidate that was chosen, from 0.
    """

    image: object
    effect: np.ndarray
    crops: list[Box] = field(default_factory=list)
    seconds: float = 0.0
    score: float | None = None
    number: int = 0


@dataclass
class _Job:
    """A crop of image `place`, what the model sees of it, and what it made of it."""

    place: int
    crop: Crop
    small: np.ndarray
    hole: np.ndarray
    removals: list[np.ndarray] = field(default_factory=list)
    round_trip: np.ndarray | None = None
    scores: Sequence[float] = ()


def remove_from(
    sources: Sequence[np.ndarray],
    holes: Sequence[np.ndarray],
    paint: Callable,
    round_trip: Callable,
    *,
    resolution: int,
    unit: int,
    mode: str = "effect",
    crop: bool = True,
    numbers: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    candidates: int = 1,
    score: Callable | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> list[Removal]:
    """Remove what the masks cover.

    Args:
        sources: [H, W, 3] uint8, any sizes.
        holes: [H, W] uint8, white (>= 128) is removed; where nothing is, the image comes back.
        paint: (images [h, w, 3], masks [h, w], numbers, names) -> removals [h, w, 3], all uint8;
            lists of at most `batch_size`, all of one size.
        round_trip: (images) -> images after the autoencoder alone; not asked in the mode `full`.
        resolution: short side at which the model works, px.
        unit: what the sides of what it works on are multiples of, px.
        mode: see `composition`.
        crop: work on crops around the objects; False takes the whole frame.
        numbers: what each image's noise is numbered; by default its place. Candidate j of an image
            is number * candidates + j.
        names: what each image is called in errors; by default its place.
        candidates: removals made of each image; `score` chooses among them.
        score: (sources, masks, removals) -> probabilities of being good, of what the model saw and
            made; lists of arrays of one size. Of an image with several crops its worst counts.
        batch_size: crops a forward pass.
        progress: show a bar.

    Returns:
        One `Removal` an image, as arrays.

    Raises:
        ValueError: several candidates, but no `score`; an image and a mask of different sizes.
    """
    if candidates < 1:
        raise ValueError(f"candidates is {candidates}: take 1 or more")
    if candidates > 1 and score is None:
        raise ValueError(NO_SCORER.format(candidates))
    numbers = range(len(sources)) if numbers is None else numbers
    names = [f"image {i}" for i in range(len(sources))] if names is None else names
    jobs: list[_Job] = []
    seconds = [0.0] * len(sources)
    for place, (source, hole) in enumerate(zip(sources, holes, strict=True)):
        began = time.monotonic()
        if source.shape[:2] != hole.shape[:2]:
            raise ValueError(
                f"{names[place]} is {source.shape[1]}x{source.shape[0]} px but its "
                f"mask {hole.shape[1]}x{hole.shape[0]}"
            )
        for planned in _plan(hole, resolution, unit, crop):
            part = planned.slices
            jobs.append(_Job(place, planned, *shrink(source[part], hole[part], planned.size[::-1])))
        seconds[place] += time.monotonic() - began
    _paint_all(jobs, paint, numbers, names, candidates, batch_size, seconds, progress)
    _visit(
        jobs if mode != "full" else [],
        batch_size,
        seconds,
        lambda batch: round_trip([job.small for job in batch]),
        lambda job, image: setattr(job, "round_trip", image),
    )
    if score is not None:
        for job in jobs:
            job.scores = _score(job, score, seconds)
    results = []
    for place, (source, hole) in enumerate(zip(sources, holes)):
        own = [job for job in jobs if job.place == place]
        results.append(_compose_all(source, hole, own, mode, seconds[place]))
    return results


def _plan(hole, resolution: int, unit: int, crop: bool) -> list[Crop]:
    if crop:
        return plan_crops(hole, resolution, unit)
    return [frame_crop(hole.shape[1], hole.shape[0], resolution, unit)] if hole.max() > 127 else []


def _visit(jobs, batch_size: int, seconds: list[float], make, keep) -> None:
    """`keep(job, made)` of what `make(batch)` makes of batches of jobs of one size."""
    groups: dict[tuple[int, int], list[_Job]] = {}
    for job in jobs:
        groups.setdefault(job.crop.size, []).append(job)
    for group in groups.values():
        for begin in range(0, len(group), batch_size):
            batch = group[begin : begin + batch_size]
            began = time.monotonic()
            for job, made in zip(batch, make(batch), strict=True):
                keep(job, made)
            each = (time.monotonic() - began) / len(batch)
            for job in batch:
                seconds[job.place] += each


def _paint_all(jobs, paint, numbers, names, candidates, batch_size, seconds, progress) -> None:
    bar = tqdm(total=len(jobs) * candidates, disable=not progress, unit="removal", mininterval=1)
    for k in range(candidates):

        def make(batch, k=k):
            painted = paint(
                [job.small for job in batch],
                [job.hole for job in batch],
                [numbers[job.place] * candidates + k for job in batch],
                [names[job.place] for job in batch],
            )
            bar.update(len(batch))
            return painted

        _visit(jobs, batch_size, seconds, make, lambda job, image: job.removals.append(image))
    bar.close()


def _score(job: _Job, score, seconds: list[float]) -> list[float]:
    began = time.monotonic()
    count = len(job.removals)
    found = score([job.small] * count, [job.hole] * count, job.removals)
    seconds[job.place] += time.monotonic() - began
    return [float(value) for value in found]


def _compose_all(source, hole, jobs: list[_Job], mode: str, seconds: float) -> Removal:
    """Lay the crops of one image over it, in their order."""
    began = time.monotonic()
    image, effect = source.copy(), np.zeros(source.shape[:2], np.uint8)
    number, best = 0, None
    if jobs and jobs[0].scores:
        worst = np.min([job.scores for job in jobs], axis=0)
        number = int(worst.argmax())
        best = float(worst[number])
    height, width = hole.shape
    for job in jobs:
        x0, y0, x1, y1 = job.crop.box
        part = job.crop.slices
        own = hole[part].copy()
        others = None
        if len(jobs) > 1:
            left, top, right, bottom = np.subtract(job.crop.core, (x0, y0, x0, y0))
            inside = np.zeros(own.shape, bool)
            inside[top:bottom, left:right] = True
            others = (own >= 128) & ~inside
            own[others] = 0
        mixed, share = compose(
            source[part],
            job.removals[number],
            job.round_trip,
            own,
            mode,
            keep=others,
            canvas=image[part],
            borders=(x0 == 0, y0 == 0, x1 == width, y1 == height),
        )
        image[part] = mixed
        # What an earlier crop laid under this one is the model's too.
        effect[part] = np.maximum(effect[part], share)
    return Removal(
        image,
        effect,
        [job.crop.box for job in jobs],
        seconds + time.monotonic() - began,
        best,
        number,
    )
