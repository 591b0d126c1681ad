"""What the page and the HTTP API share: the model, the limits, errors and words for people."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path

try:
    spaces = importlib.import_module("spaces")  # ZeroGPU's; it patches torch, so it comes first
except ImportError:
    spaces = None

import gradio as gr
import numpy as np
import torch
from PIL import Image

from rorem_lib.data.pictures import open_still, read_metadata, read_size
from rorem_lib.models import advice
from rorem_lib.models.inpainting import ObjectRemover, Removal

GPU_SECONDS = 60  # what ZeroGPU is asked for: a removal's longest time
# PNG keeps every pixel; of JPEG's settings the ones that nobody sees.
FORMATS = {"png": {"compress_level": 1}, "jpg": {"quality": 95, "subsampling": 0}}


def refuse(text: str) -> gr.Error:
    """An error for the visitor, without a traceback in the server's log."""
    return gr.Error(text, print_exception=False)


@contextlib.contextmanager
def explain_errors(*paths: str):
    """A block whose errors become the visitor's, naming files as their owner does."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise refuse(
            "The GPU's memory is full: take fewer variants or a smaller photo, or try again when "
            "nobody else is at work."
        ) from None
    except (ValueError, OSError, FloatingPointError) as error:
        text = str(error)
        for path in paths:
            text = text.replace(str(path), Path(path).name)
        raise refuse(text) from error


def lend_gpu(call):
    """`call`, on ZeroGPU with a GPU for as long as it runs."""
    return spaces.GPU(duration=GPU_SECONDS)(call) if spaces else call


class Service:
    """A remover with its limits.

    Attributes:
        segmenter: (image, (x, y)) -> mask; None where no model for clicks is configured.
        note: what the model is and is not for, said where its result is.
    """

    def __init__(self, remover: ObjectRemover, *, name="", segmenter=None, megapixels=50.0):
        """Args:
        name: what the model is called on the page.
        megapixels: the largest image that is taken.
        """
        self.remover, self.name, self.megapixels = remover, name, megapixels
        self.segmenter = segmenter and lend_gpu(segmenter)
        self._remove = lend_gpu(remover.remove)
        count = sum(weights.numel() for weights in remover.pipe.unet.parameters())
        self.note = advice.describe_use(name or "The remover", count)

    def check(self, path: str | None) -> tuple[int, int]:
        """(height, width) px of an image that may be worked on.

        Raises:
            gr.Error: there is none, it is no image or holds several, or it is too large.
        """
        if not path:
            raise refuse("There is no image: upload a photo first.")
        with explain_errors(path), open_still(path):
            height, width = read_size(path)
        if height * width > self.megapixels * 1e6:
            raise refuse(
                f"{Path(path).name} has {height * width / 1e6:.1f} megapixels ({width}x{height} "
                f"px), the limit here is {self.megapixels:g}: make it smaller first."
            )
        return height, width

    def remove(self, path: str, mask: np.ndarray, *, variants: int = 1, **options) -> list[Removal]:
        """Removals from a checked image, each with noise of its own.

        Args:
            mask: [H, W] uint8 of the image's size, 255 is removed.
            options: of `ObjectRemover.remove`.

        Raises:
            gr.Error: the mask is empty or covers everything, an option makes no sense, or the
                model fails.
        """
        if not mask.any():
            raise refuse("Nothing is marked: paint over the object first.")
        if mask.all():
            raise refuse("The whole image is marked: leave something to go by.")
        with explain_errors(path):
            numbers = list(range(variants))
            return self._remove([path] * variants, [mask] * variants, numbers=numbers, **options)


def save_removal(removal: Image.Image, source: str, folder: Path, kind: str = "png") -> str:
    """Write a result in its own size, with its source's colour profile and EXIF.

    Args:
        kind: of `FORMATS`.

    Returns:
        The file's path, `<source's name>_removed.<kind>` in `folder`.
    """
    path = folder / f"{Path(source).stem}_removed.{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    removal.save(path, **FORMATS[kind], **read_metadata(source))
    return str(path)


def describe_removal(removal: Removal, mode: str) -> str:
    """How much of the image is the model's and what it cost, in two lines."""
    share, count = (removal.effect > 0).mean(), len(removal.crops)
    kept = (
        "all of each crop went through the model, which changes a little everywhere"
        if mode == "full"
        else "the other pixels of the PNG equal your photo's, bit for bit"
    )
    crops = f"{count} crop{'s' * (count != 1)}"
    return f"The model painted {share:.1%} of the image; {kept}. {removal.seconds:.1f} s, {crops}."
