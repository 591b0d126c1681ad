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

import torch
from diffusers import StableDiffusionXLInpaintPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_output import StableDiffusionXLPipelineOutput

from rorem_lib.models import denoising, presets
from rorem_lib.models.inpainting import Remover

# What the model was released with; of the kit's own file beside it.
SETTINGS: dict = {}


class ObjectRemovalPipeline(StableDiffusionXLInpaintPipeline):
    """Stock SDXL-inpainting, called with images and masks instead of prompts."""

    works_on = property(lambda self: self._execution_device)  # with offloading, where it runs

    @torch.no_grad()
    def __call__(self, image, mask, **options) -> StableDiffusionXLPipelineOutput:
        """Remove what the masks cover: `Remover.remove` in this file, which names the options.

        Args:
            image: a PIL image, path, array or tensor, or a list of them.
            mask: likewise; white is removed.

        Returns:
            `.images`, a list, of the kinds and sizes that were given (a PIL image for a path).
        """
        settings = presets.Settings(**SETTINGS)
        if not getattr(self, "scheduler_is_set", False):
            presets.set_scheduler(self, settings.scheduler)
            self.scheduler_is_set = True
        if self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast"):
            self.vae.to(torch.float32)  # SDXL's overflows in fp16
        made = Remover(denoising.PipelineNetworks(self), settings)(image, mask, **options)
        self.maybe_free_model_hooks()
        return StableDiffusionXLPipelineOutput(images=made if isinstance(made, list) else [made])
