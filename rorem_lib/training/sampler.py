"""In which order samples are seen: a function of the seed and the global position alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: multiples of it, mod 2^64, spread most evenly


class ShuffledOrder:
    """An endless shuffled order over `n` samples: position -> index, a fresh shuffle an epoch."""

    def __init__(self, n: int, seed: int):
        if n < 1:
            raise ValueError("there is nothing to train on: the training set is empty")
        self.n, self.seed, self._epoch, self._permutation = n, seed, None, None

    def get_index(self, position: int) -> int:
        epoch, place = divmod(position, self.n)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._permutation = epoch, rng.permutation(self.n)
        return int(self._permutation[place])


class BucketSampler:
    """An endless order over buckets of samples: position -> (bucket, index in the bucket).

    All samples of an optimizer step are of one bucket, so that they have one shape, however the
    global batch is split into processes and micro-batches. Which bucket a step has is a function of
    the step and the seed: a low-discrepancy sequence (multiples of the golden ratio), by which at
    any time each bucket had its share of the steps but for a few. In each bucket every sample is
    seen once before any is seen twice. With one bucket this is `ShuffledOrder(n, seed)`.

    Args:
        sizes: samples in each bucket; one without samples needs a weight of 0.
        weights: relative shares of the optimizer steps, at least 0; need not sum to 1.
        seed: another seed, another order.
        global_batch: samples an optimizer step (batch x processes x accumulation).

    Raises:
        ValueError: there are no samples, a share for an empty bucket, or a weight below 0.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], *, seed: int, global_batch: int
    ):
        if len(sizes) != len(weights):
            raise ValueError(f"{len(sizes)} buckets but {len(weights)} weights")
        if global_batch < 1:
            raise ValueError(f"an optimizer step needs at least one sample, not {global_batch}")
        weights = np.asarray(weights, dtype=np.float64)
        if not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise ValueError(f"the buckets' weights must be numbers of at least 0: {list(weights)}")
        if not any(n and w for n, w in zip(sizes, weights)):
            raise ValueError("there is nothing to train on: the training set is empty")
        if any(w and not n for n, w in zip(sizes, weights)):
            raise ValueError("a bucket without samples cannot have a share of the steps")
        used = [bucket for bucket, weight in enumerate(weights) if weight]
        # counted among the used ones, so that empty buckets beside a bucket change nothing
        self._orders = {
            bucket: ShuffledOrder(sizes[bucket], seed + number)
            for number, bucket in enumerate(used)
        }
        self._ends = weights.cumsum() / weights.sum()
        self._ends[used[-1] :] = 1.0  # rounding must not leave a gap below 1
        self._start = np.random.default_rng([seed, 2]).integers(2**64, dtype=np.uint64)
        self._batch, self._chosen, self._places = global_batch, np.empty(0), np.empty(0)

    def find(self, position: int) -> tuple[int, int]:
        """The bucket and the index in it of the sample at global position `position` >= 0."""
        step, offset = divmod(position, self._batch)
        if step >= len(self._chosen):
            self._lay_out(max(4096, 2 * step))
        bucket, place = int(self._chosen[step]), int(self._places[step])
        return bucket, self._orders[bucket].get_index(place * self._batch + offset)

    def _lay_out(self, steps: int) -> None:
        """Choose the first steps' buckets, and count each one's earlier turns."""
        # whole numbers, which wrap around: exact at any step, on any machine
        points = self._start + np.arange(steps, dtype=np.uint64) * np.uint64(GOLDEN)
        points = (points >> np.uint64(11)).astype(np.float64) / 2**53
        self._chosen = np.searchsorted(self._ends, points, side="right").astype(np.int32)
        self._places = np.empty(steps, dtype=np.int64)
        for bucket in self._orders:
            turns = np.flatnonzero(self._chosen == bucket)
            self._places[turns] = np.arange(len(turns))


class PositionSampler:
    """Batch sampler: this process's positions of every micro-batch from a step on."""

    def __init__(self, config, accelerator, first_step):
        self.batch, self.accumulate = config.train_batch_size, config.gradient_accumulation_steps
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.first, self.last = first_step, config.max_train_steps

    def __iter__(self):
        micro = self.batch * self.world
        for number in range(self.first * self.accumulate, self.last * self.accumulate):
            start = number * micro + self.rank * self.batch
            yield list(range(start, start + self.batch))

    def __len__(self):
        return max(0, self.last - self.first) * self.accumulate


def make_buckets(resolution: int, *, unit: int, step: int = 0) -> list[tuple[int, int]]:
    """The shapes (height, width) in px that images are trained at, from the widest on.

    Ratios reach from 1:2 to 2:1, the area is at most that of the square, which is always there.

    Args:
        resolution: side of the square.
        unit: what sides must be divisible by: the VAE's factor x 2 per downsampling of the UNet.
        step: sides other than the square's are multiples of it; 0 takes an eighth of `resolution`.

    Raises:
        ValueError: `resolution` or `step` is no multiple of `unit`.
    """
    if resolution < unit or resolution % unit:
        raise ValueError(
            f"a resolution of {resolution} px does not suit this model: take a multiple of {unit}"
        )
    if step < 0 or step % unit:
        raise ValueError(
            f"bucket_step {step} does not suit this model: take a multiple of {unit}, "
            "or 0 for an automatic one"
        )
    step = step or max(unit, resolution // 8 // unit * unit)
    found = {1.0: (resolution, resolution)}  # by ratio, the largest of each
    for short in range(step, resolution, step):
        long = min(resolution**2 // short // step * step, 2 * short)
        if long > short:
            found[long / short], found[short / long] = (long, short), (short, long)
    return [found[ratio] for ratio in sorted(found)]


def assign_buckets(
    picture_sizes: Sequence[tuple[int, int]], buckets: Sequence[tuple[int, int]], *, min_images: int
) -> list[int]:
    """Which bucket each image is trained in: the one of the nearest aspect ratio.

    A bucket with fewer than `min_images` images would show the same few ones again and again within
    a step: they go to the next bucket nearer the square (the square's to the nearest that is left).

    Args:
        picture_sizes: (height, width) of each image.
        buckets: (height, width) of each bucket, as `make_buckets` gives them.
        min_images: images a bucket must have to be used.

    Returns:
        For each image an index into `buckets`.
    """
    if not len(picture_sizes):
        return []
    ratios = np.array([math.log(height / width) for height, width in buckets])
    sizes = np.asarray(picture_sizes, dtype=np.float64)
    wanted = np.log(sizes[:, 0] / sizes[:, 1])
    chosen = np.abs(wanted[:, None] - ratios).argmin(axis=1)
    counts = np.bincount(chosen, minlength=len(buckets))
    target = np.arange(len(buckets))
    for bucket in np.argsort(-np.abs(ratios), kind="stable"):
        if not 0 < counts[bucket] < min_images:
            continue
        distances = np.abs(ratios - ratios[bucket])
        # on its way to the square, or, from the square, where images are
        others = np.abs(ratios) < np.abs(ratios[bucket]) - 1e-9
        others &= ratios * ratios[bucket] > -1e-9
        if not others.any():
            others = (counts > 0) & (np.arange(len(buckets)) != bucket)
        if not others.any():
            break
        near = int(np.where(others, distances, np.inf).argmin())
        target[target == bucket] = near
        counts[near] += counts[bucket]
        counts[bucket] = 0
    return target[chosen].tolist()


def split_chunks(batch: dict, pixels_allowed: int, pixels_each: int) -> list[dict]:
    """Cut a micro-batch into the fewest chunks of equal length (give or take one) that fit.

    Args:
        batch: tensors [B, ...].
        pixels_allowed: pixels of images that fit into memory at once.
        pixels_each: pixels of one of the batch's images.

    Returns:
        Views of the batch, in order; of one sample at least, be it larger than what is allowed.
        A mean over the batch is the sum over chunks of (chunk's length / B) x the chunk's mean.
    """
    total = len(next(iter(batch.values())))
    count = math.ceil(total / max(1, pixels_allowed // pixels_each))
    if count < 2:
        return [batch]
    parts = {name: value.tensor_split(count) for name, value in batch.items()}
    return [{name: part[n] for name, part in parts.items()} for n in range(count)]
