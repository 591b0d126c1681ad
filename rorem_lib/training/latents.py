"""From images to latents: how a triplet is fitted, its mask perturbed, and both encoded.

The latent cache and training without one both go through here, so that they train the same.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from rorem_lib.data.masks import perturb_mask
from rorem_lib.data.triplets import Triplet, load_images
from rorem_lib.models import sdxl

logger = logging.getLogger(__name__)

PARTS = ("gt", "masked", "source")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class CacheSpec:
    """How images become latents.

    Attributes:
        parts: which latents: `gt`, `masked` (the source with its hole blanked), `source`.
        dtype: "fp16", finer in the latents' range, or "bf16".
        resize_mode: "crop" keeps the aspect, "squash" does not (see `pictures.fit_triplet`).
        center_crop: crop the centre, unless that would cut the whole mask away.
        flipped: also mirrored.
        mask_variants: how many perturbed masks a triplet has besides its own.
        mask_dilate_max, mask_loosen: see `masks.perturb_mask`.
        vae_precision: "fp32", "bf16" or "fp16".

    Raises:
        ValueError: another value.
    """

    parts: tuple[str, ...] = ("gt", "masked")
    dtype: str = "fp16"
    resize_mode: str = "crop"
    center_crop: bool = False
    flipped: bool = True
    mask_variants: int = 0
    mask_dilate_max: float = 0.04
    mask_loosen: float = 1.0
    vae_precision: str = "fp32"

    def __post_init__(self):
        for name, allowed in (
            ("dtype", DTYPES),
            ("resize_mode", ("crop", "squash")),
            ("vae_precision", ("fp32", *DTYPES)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: take {' or '.join(allowed)}")
        if not self.parts or set(self.parts) - set(PARTS):
            raise ValueError(f"parts are {self.parts}: take some of {', '.join(PARTS)}")
        for name in ("mask_variants", "mask_dilate_max", "mask_loosen"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: take 0 or more")
        if self.mask_variants and "masked" not in self.parts:
            raise ValueError("mask_variants needs masked among the parts")
        if self.mask_variants and not (self.mask_dilate_max or self.mask_loosen):
            raise ValueError(
                "mask_variants would all be the mask itself: set mask_dilate_max or "
                "mask_loosen above 0"
            )


def vary_mask(mask: np.ndarray, variant: int, spec: CacheSpec) -> np.ndarray:
    """A mask [h, w] uint8 perturbed; what comes out depends on its content and the number alone.

    Args:
        variant: 0 is the mask itself.
    """
    if not variant:
        return mask
    content = hashlib.sha256(mask.tobytes()).digest()[:8]
    return perturb_mask(
        mask,
        np.random.default_rng([int.from_bytes(content), variant]),
        dilate_max=spec.mask_dilate_max,
        loosen=spec.mask_loosen,
    )


def prepare_pictures(
    triplet: Triplet, size: tuple[int, int], spec: CacheSpec, *, flipped: int = 0, variant: int = 0
) -> dict[str, np.ndarray]:
    """The images whose latents are trained on.

    Args:
        triplet: with GT.
        size: (height, width) in px, as the VAE takes them.
        spec: how they are fitted and their masks perturbed.
        flipped: 1 mirrors them.
        variant: which mask; 0 is the triplet's own.

    Returns:
        `gt`, `source` [h, w, 3] uint8, `mask` [h, w] uint8 0 or 255.

    Raises:
        TripletError: an image cannot be read, or sizes differ.
    """
    pictures = load_images(triplet, size=size, mode=spec.resize_mode, center=spec.center_crop)
    pictures["mask"] = vary_mask(pictures["mask"], variant, spec)
    return {
        part: np.ascontiguousarray(x[:, ::-1]) if flipped else x for part, x in pictures.items()
    }


@torch.no_grad()
def encode_pictures(vae, pictures: Mapping, spec: CacheSpec) -> dict[str, torch.Tensor]:
    """Latents of a batch of `prepare_pictures`; they are moved to the VAE's device.

    Args:
        vae: the frozen autoencoder, in float32; its work is done in `spec.vae_precision`. A batch
            whose latents overflow in half precision is encoded again in float32.
        pictures: `gt`, `source` [B, h, w, 3] and `mask` [B, h, w] uint8, arrays or tensors; only
            what `spec.parts` needs.
        spec: which parts, and the precision.

    Returns:
        The parts, scaled latents [B, 4, h / f, w / f] float32, and `mask` [B, 1, h / f, w / f]
        float32 0 or 1.

    Raises:
        ValueError: the VAE's factor does not divide the size.
    """
    device = next(vae.parameters()).device
    pictures = {part: torch.as_tensor(x).to(device) for part, x in pictures.items()}
    mask = (pictures["mask"] >= 128).float()[:, None]
    found = {}
    for part in spec.parts:
        image = sdxl.to_tensor(pictures["gt" if part == "gt" else "source"])
        if part == "masked":
            image = sdxl.mask_source(image, mask)
        found[part] = _encode(vae, image, spec.vae_precision)
    (height, width), (high, wide) = mask.shape[-2:], found[spec.parts[0]].shape[-2:]
    if height % high or width % wide or height // high != width // wide:
        raise ValueError(
            f"images of {height}x{width} px do not suit this VAE: take a multiple of its factor"
        )
    return found | {"mask": sdxl.shrink_mask(mask, found[spec.parts[0]])}


def _encode(vae, images: torch.Tensor, precision: str) -> torch.Tensor:
    half, latents = precision != "fp32", None
    try:
        with sdxl.autocast(precision if half else "no", images.device):
            latents = sdxl.encode_images(vae, images).float()
    except torch.OutOfMemoryError:
        if len(images) == 1:
            raise
    if latents is None:  # outside the handler: its traceback keeps the failed batch's activations
        torch.cuda.empty_cache()
        return torch.cat([_encode(vae, part, precision) for part in images.chunk(2)])
    if half and not latents.isfinite().all():
        _warn_overflow(precision)
        return _encode(vae, images, "fp32")
    return latents


@functools.cache
def _warn_overflow(precision: str) -> None:
    logger.warning(
        "the VAE overflows in %s: such batches are encoded again in float32 (vae_precision)",
        precision,
    )
