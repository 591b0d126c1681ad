"""The content filter: Stable Diffusion's safety checker, over whole sets, in batches.

The authors ran it over their release, so a set of the same sources without it is slightly larger.
It is a CLIP image encoder that compares an image with 20 fixed concepts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

CHECKER = "CompVis/stable-diffusion-safety-checker"
REVISION = "cb41f3a270d63d454d385fc2e4f571c487c253c5"


class SafetyChecker:
    """Says which images the checker takes for unsafe.

    Args:
        model_id: a Hub id or a folder with the checker and its image processor.
        revision: commit, branch or tag of a Hub id; the default checker's is pinned.
        device: "cuda", "cpu", ...; by default a GPU where there is one.

    Attributes:
        model_id: as given; an assembly with another checker is another one.

    Raises:
        OSError: the model is neither in the folder nor in the cache nor to be reached.
    """

    def __init__(self, model_id: str = CHECKER, *, revision: str | None = None, device: str = ""):
        import torch
        from diffusers.pipelines.stable_diffusion.safety_checker import (
            StableDiffusionSafetyChecker,
        )
        from transformers import CLIPImageProcessor

        from rorem_lib.models.sdxl import silence_libraries

        self.model_id = model_id
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        revision = revision or (REVISION if model_id == CHECKER else None)
        try:
            with silence_libraries():
                self._model = (
                    StableDiffusionSafetyChecker.from_pretrained(model_id, revision=revision)
                    .eval()
                    .to(self.device)
                )
                self._processor = CLIPImageProcessor.from_pretrained(model_id, revision=revision)
        except OSError as error:
            raise OSError(
                f"the safety checker {model_id} is in no folder, not in the Hub's cache "
                "and cannot be reached: run once with a network, give a folder, or go "
                f"without it ({str(error).splitlines()[0]})"
            ) from error

    def find_unsafe(
        self, pictures: Iterable[np.ndarray], *, batch_size: int = 32
    ) -> Iterator[bool]:
        """Whether each image [H, W, 3] uint8, of any size, is unsafe; in order, lazily."""
        from rorem_lib.models.sdxl import silence_libraries
        from rorem_lib.workers import group_chunks

        for batch in group_chunks(pictures, batch_size):
            inputs = self._processor(batch, return_tensors="pt").pixel_values.to(self.device)
            # It blackens what it is given to blacken; only its answer is wanted.
            with silence_libraries():
                _, unsafe = self._model(
                    clip_input=inputs, images=[np.zeros((1, 1, 3)) for _ in batch]
                )
            yield from unsafe
