"""Removes objects: the pipeline that comes with a model, for diffusers alone.

    from diffusers import DiffusionPipeline
    from diffusers.utils import load_image

    pipe = DiffusionPipeline.from_pretrained(MODEL, custom_pipeline=MODEL, trust_remote_code=True)
    pipe(load_image("photo.jpg"), load_image("mask.png")).images[0].save("removed.png")

It gives what the kit's `ObjectRemover` gives: the removal is made in crops around the objects, at
the size, strength and number of steps that the model was released with, and what the removal did
not change stays the photograph's own. Besides diffusers it needs opencv-python-headless.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLInpaintPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_output import StableDiffusionXLPipelineOutput
from PIL import Image, ImageOps

from rorem_lib.data import masks
from rorem_lib.models import denoising, presets
from rorem_lib.models.inpainting import make_generator
from rorem_lib.models.removing import remove_from

# What the model was released with; of the kit's own file beside it.
SETTINGS: dict = {}


class ObjectRemovalPipeline(StableDiffusionXLInpaintPipeline):
    """Stock SDXL-inpainting, called with images and masks instead of prompts."""

    works_on = property(lambda self: self._execution_device)  # with offloading, where it runs

    @torch.no_grad()
    def __call__(
        self,
        image,
        mask,
        *,
        mode: str = "effect",
        crop: bool = True,
        resolution: int = 0,
        num_inference_steps: int = 0,
        guidance_scale: float | None = None,
        strength: float | None = None,
        seed: int = 0,
        numbers: list[int] | None = None,
        dilate: int = 0,
        batch_size: int = 8,
    ) -> StableDiffusionXLPipelineOutput:
        """Remove what the masks cover.

        Args:
            image: a PIL image, [H, W, 3] uint8 or path, or a list of them.
            mask: likewise, of the images' sizes; white is removed. Strokes on a transparent layer
                and masks of 0 and 1 are understood too.
            mode: "effect" keeps the source's pixels wherever the removal changed nothing, "exact"
                everywhere but in the mask, "full" nowhere.
            crop: work on crops around the objects; False is the whole frame.
            resolution: short side at which the model works, px; 0 takes what it was trained at.
            num_inference_steps, guidance_scale, strength: 0 and None take the model's own.
            seed: fixes all noise.
            numbers: what each image's noise is numbered; by default its place in the list.
            dilate: widens the masks by so many px.
            batch_size: crops a forward pass.

        Returns:
            `.images`, a list of PIL images of the sources' sizes.
        """
        settings = presets.Settings(**SETTINGS)
        if not getattr(self, "scheduler_is_set", False):
            presets.set_scheduler(self, settings.scheduler)
            self.scheduler_is_set = True
        single = not isinstance(image, (list, tuple))
        images, holes = ([image], [mask]) if single else (image, mask)
        if self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast"):
            self.vae.to(torch.float32)  # SDXL's overflows in fp16
        networks = denoising.PipelineNetworks(self)
        sampling = {
            "num_inference_steps": num_inference_steps or settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale if guidance_scale is None else guidance_scale,
            "strength": settings.strength if strength is None else strength,
        }
        found = remove_from(
            [np.array(_open(x).convert("RGB")) for x in images],
            [masks.dilate_mask(_to_mask(x), dilate) for x in holes],
            partial(_paint, networks, seed, sampling),
            partial(_round_trip, networks),
            resolution=resolution or settings.resolution or networks.resolution,
            unit=networks.unit,
            mode=mode,
            crop=crop,
            numbers=numbers,
            batch_size=batch_size,
        )
        self.maybe_free_model_hooks()
        return StableDiffusionXLPipelineOutput(images=[Image.fromarray(r.image) for r in found])


def _open(image) -> Image.Image:
    """A PIL image, array or path as a PIL image, upright as its EXIF says."""
    if isinstance(image, (str, Path)):
        image = Image.open(image)
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image)
    return Image.fromarray(np.asarray(image))


def _to_mask(mask) -> np.ndarray:
    """[H, W] uint8, 0 or 255: white, the other colour than black, strokes on nothing, or 1 of 0 and
    1; see `masks.interpret_mask`."""
    mask = _open(mask)
    if mask.mode == "1":
        mask = mask.convert("L")
    elif mask.mode not in ("L", "RGB", "RGBA"):
        mask = mask.convert("RGBA")
    return masks.binarise_mask(masks.interpret_mask(np.asarray(mask))[0])


def _paint(networks, seed: int, sampling: dict, images, holes, numbers, names) -> list[np.ndarray]:
    generators = [make_generator(seed, number) for number in numbers]
    removed = denoising.denoise(networks, np.stack(images), np.stack(holes), generators, **sampling)
    if not np.isfinite(removed).all():
        raise FloatingPointError(
            f"the model gives numbers that are not finite for {', '.join(names)}: its weights are "
            "damaged, or they overflow in float16 (take bfloat16 or float32)"
        )
    return list((removed * 255).round().astype(np.uint8))


def _round_trip(networks, images) -> list[np.ndarray]:
    seen = denoising.encode_decode(networks, np.stack(images))
    return list((np.nan_to_num(seen) * 255).round().astype(np.uint8))
