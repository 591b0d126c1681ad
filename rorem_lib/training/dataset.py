"""What the remover is trained on: samples by global position, from cached latents or images.

A sample is a function of its position and the seed alone (see `loop`), and so is the shape of a
whole optimizer step: square, wide, tall or of high resolution, the same on any number of processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from rorem_lib.data.triplets import Triplet
from rorem_lib.training.latent_cache import read_sizes
from rorem_lib.training.latents import CacheSpec, prepare_pictures
from rorem_lib.training.sampler import BucketSampler, assign_buckets, make_buckets


@dataclass
class TrainingMix:
    """Triplets that are trained at one resolution.

    Attributes:
        sets: the triplets, set by set (each set has cached latents of its own).
        resolution: side of the square, px; other shapes have at most its area.
        fraction: of the optimizer steps, 0..1.
    """

    sets: list[list[Triplet]]
    resolution: int
    fraction: float = 1.0

    def assign_shapes(
        self, *, unit: int, buckets: bool, step: int, min_images: int
    ) -> list[list[tuple[int, int]]]:
        """The training size (h, w) in px of every triplet, set by set."""
        if self.resolution < unit or self.resolution % unit:
            raise ValueError(
                f"a resolution of {self.resolution} px does not suit this model: take "
                f"a multiple of {unit}"
            )
        square = (self.resolution, self.resolution)
        if not buckets:
            return [[square] * len(part) for part in self.sets]
        shapes = make_buckets(self.resolution, unit=unit, step=step)
        sizes = read_sizes([t for part in self.sets for t in part])
        chosen = iter(assign_buckets(sizes, shapes, min_images=min_images))
        return [[shapes[next(chosen)] for _ in part] for part in self.sets]


class TripletDataset(Dataset):
    """Endless samples of triplets, by global position.

    Each item: `gt`, `masked` [4, h, w] scaled latents, `mask` [1, h, w] 0 or 1; where latents are
    not cached `gt`, `source` [H, W, 3] and `mask` [H, W] uint8 images in their place. Further
    `noise` [4, h, w] float32, `timestep`, `min_timestep` (below it the hole does not count) and
    `index` int64.
    """

    def __init__(
        self,
        readers: Sequence,
        *,
        order: BucketSampler,
        members: list[np.ndarray],
        min_timestep: np.ndarray,
        seed: int,
        flip: bool,
        timesteps: int,
        variants: int = 0,
        variant_share: float = 0.5,
        picture_shape: tuple[int, int] | None = None,
    ):
        self.readers, self.order, self.members, self.min_timestep = (
            readers,
            order,
            members,
            min_timestep,
        )
        self.ends = np.cumsum([len(reader) for reader in readers])
        self.seed, self.flip, self.timesteps = seed, flip, timesteps
        self.variants, self.variant_share = variants, variant_share
        # the latents' channels and the VAE's factor, where the readers give images
        self.picture_shape = picture_shape

    def __len__(self):
        return sys.maxsize

    def __getitem__(self, position):
        rng = np.random.default_rng([self.seed, 1, position])
        bucket, number = self.order.find(position)
        index = int(self.members[bucket][number])
        flipped = int(self.flip and rng.random() < 0.5)
        variant = 0
        if self.variants and rng.random() < self.variant_share:
            variant = int(rng.integers(1, self.variants + 1))
        which = int(np.searchsorted(self.ends, index, side="right"))
        place = index - int(self.ends[which - 1] if which else 0)
        sample = self.readers[which].read(place, flipped=flipped, variant=variant)
        shape = sample["gt"].shape
        if self.picture_shape:
            channels, factor = self.picture_shape
            shape = (channels, shape[0] // factor, shape[1] // factor)
        sample["noise"] = rng.standard_normal(shape, dtype=np.float32)
        sample["timestep"] = np.int64(rng.integers(0, self.timesteps))
        sample["min_timestep"] = np.int64(self.min_timestep[index])
        sample["index"] = np.int64(index)
        return sample


@dataclass(frozen=True)
class PictureReader:
    """Reads what `latent_cache.LatentStore` has as latents, as uint8 images instead."""

    triplets: list[Triplet]
    sizes: list[tuple[int, int]]
    spec: CacheSpec

    def __len__(self):
        return len(self.triplets)

    def read(self, index: int, *, flipped: int = 0, variant: int = 0) -> dict[str, torch.Tensor]:
        """`gt`, `source` [H, W, 3] and `mask` [H, W] uint8 of one triplet."""
        pictures = prepare_pictures(
            self.triplets[index], self.sizes[index], self.spec, flipped=flipped, variant=variant
        )
        return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in pictures.items()}


def weigh_buckets(mixes: list[TrainingMix], shapes: list[list[tuple[int, int]]]):
    """Which samples each bucket holds and how often it is drawn.

    Args:
        mixes: as the run has them.
        shapes: the (h, w) of every triplet of each mix, in order.

    Returns:
        The buckets' (h, w), their members (positions in the list of all triplets), their weights.
        Within a mix each triplet is seen equally often.
    """
    found, members, weights, begin = [], [], [], 0
    for mix, sizes in zip(mixes, shapes):
        for shape in sorted(set(sizes)):
            inside = begin + np.flatnonzero([size == shape for size in sizes])
            found.append(shape)
            members.append(inside)
            weights.append(mix.fraction * len(inside) / len(sizes))
        begin += len(sizes)
    return found, members, weights
