"""The mask of an object that somebody clicked on, by a SAM-class model."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModelForMaskGeneration, AutoProcessor

from rorem_lib.data.remote import talk_to_hub
from rorem_lib.models import sdxl


class Segmenter:
    """A model that transformers opens for mask generation (SAM, SAM-HQ): a click gives a mask.

    segmenter = Segmenter("facebook/sam-vit-base")
    mask = segmenter(image, (x, y))
    """

    def __init__(self, model: str, *, revision: str | None = None, device="cpu"):
        """Args:
            model: folder or Hub id.
            device: where it runs.

        Raises:
            FileNotFoundError, PermissionError: see `data.remote.talk_to_hub`.
            ValueError: transformers opens no such model for masks.
        """
        options = {"revision": revision}
        with sdxl.silence_libraries(), talk_to_hub(model, revision, kind="model"):
            self.processor = AutoProcessor.from_pretrained(model, **options)
            loaded = AutoModelForMaskGeneration.from_pretrained(model, **options)
        self.model = loaded.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, image: np.ndarray, point: tuple[int, int]) -> np.ndarray:
        """The object at a point.

        Args:
            image: [H, W, 3] uint8.
            point: (x, y) px.

        Returns:
            [H, W] uint8, 0 or 255: of the model's guesses (a part, an object, a group) the one
            that it scores highest.
        """
        points = [[[[float(value) for value in point]]]]  # image, object, click
        inputs = self.processor(images=image, input_points=points, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        guess = self.model(**inputs, multimask_output=True)
        sizes = [inputs[k].cpu() for k in ("original_sizes", "reshaped_input_sizes") if k in inputs]
        post_process = getattr(self.processor, "post_process_masks", None)
        post_process = post_process or self.processor.image_processor.post_process_masks
        (found,) = post_process(guess.pred_masks.float().cpu(), *sizes)  # [objects, guesses, H, W]
        best = int(guess.iou_scores.flatten().argmax())
        return found[0, best].numpy().astype(np.uint8) * 255
