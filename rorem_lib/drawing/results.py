"""Removals of one photo: made, saved under numbers of their own, and shown with what they cost."""

from __future__ import annotations

import html
import re
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rorem_lib.data.pictures import read_metadata, save_image, to_array
from rorem_lib.drawing.compare import compare_images
from rorem_lib.files import write_json


class NothingMarked(ValueError):
    """There is no mask yet. A notebook shows the message alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def require_mask(mask: np.ndarray) -> np.ndarray:
    """The mask, if anything is marked in it.

    Raises:
        NothingMarked: says how to mark something.
    """
    if not mask.any():
        raise NothingMarked(
            "Nothing is marked yet. Paint over the object in the image above and press Remove; the "
            "cells below follow with Run > Run Selected Cell and All Below. Without a browser give "
            "mask_path or mask_box."
        )
    return mask


@dataclass
class Outcome:
    """The removals of one image and mask.

    Attributes:
        source: [H, W, 3] uint8.
        mask: [H, W] uint8, 0 or 255.
        removals: of `ObjectRemover.remove`, one for each number of noise.
        files: where they were saved.
        seconds: for each removal.
        memory: bytes at most: of the process, and `gpu` where there is one.
        note: what is to be known about the model that made them.
    """

    source: np.ndarray
    mask: np.ndarray
    removals: Sequence
    files: list[Path]
    seconds: float
    memory: dict[str, int]
    note: str = ""

    @property
    def images(self) -> dict[str, np.ndarray]:
        """File name -> [H, W, 3] uint8, to be shown; the files have the photo's own kind."""
        return {
            path.name: to_array(removal.image, "RGB", path)
            for path, removal in zip(self.files, self.removals, strict=True)
        }

    @property
    def cost(self) -> str:
        peak = ", ".join(
            f"{size / 1e9:.1f} GB {'of GPU memory' if name == 'gpu' else 'of memory'}"
            for name, size in self.memory.items()
        )
        return f"{self.seconds:.1f} s per removal, at most {peak}"

    def __str__(self) -> str:
        names = ", ".join(path.name for path in self.files)
        return f"saved {names}; {self.cost}"

    def _repr_html_(self) -> str:
        words = "".join(f"<p>{html.escape(x)}</p>" for x in (str(self), self.note) if x)
        return compare_images(self.source, self.images) + words


class Desk:
    """Where a photo lies: removes from it, and saves each removal under a number of its own.

    Nothing that is there is overwritten: `photo.jpg` gives `photo-1.png`, then `photo-2.png`, and
    what comes out a second time, pixel by pixel, is the file that is there. Beside the first of
    each press lie its mask and its settings.

    Attributes:
        last: the last `Outcome`, None before.
    """

    def __init__(
        self,
        remover,
        image: np.ndarray,
        path: Path,
        folder: Path,
        *,
        removals: int = 1,
        note: str = "",
        **options,
    ):
        """Args:
        remover: an `ObjectRemover`.
        image: [H, W, 3] uint8, what `load_image(path)` gives; it is shown.
        path: its file, whose mode, depth, transparency, colour profile and EXIF the results keep.
        folder: of the results.
        removals: how many are made, each from noise of its own.
        note: what is to be known about the remover, shown at each result.
        options: of `ObjectRemover.remove`.
        """
        if removals < 1:
            raise ValueError(f"removals is {removals}: take 1 or more")
        self.remover, self.image, self.path, self.folder = remover, image, path, folder
        self.removals, self.note, self.options = removals, note, options
        self.metadata = read_metadata(path)
        self.last: Outcome | None = None

    def remove(self, mask: np.ndarray) -> Outcome:
        """Remove what a mask [H, W] covers, and save the results."""
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        started, count = time.monotonic(), self.removals
        found = self.remover.remove(
            [str(self.path)] * count,
            [mask] * count,
            numbers=list(range(count)),
            **self.options,
        )
        seconds = (time.monotonic() - started) / count
        memory = {"process": _measure_peak()}
        if on_gpu:
            memory["gpu"] = torch.cuda.max_memory_allocated()
        files = [self._save(removal.image) for removal in found]
        self.last = Outcome(self.image, mask, found, files, seconds, memory, self.note)
        first = files[0]
        if first.with_suffix(".json").exists():  # it came out a second time
            return self.last
        save_image(first.with_name(f"{first.stem}-mask.png"), mask)
        settings = {"image": str(self.path), "files": [path.name for path in files]}
        settings |= {"seconds": round(seconds, 3), "memory": memory, "options": self.options}
        write_json(first.with_suffix(".json"), settings)
        return self.last

    def _save(self, image: Image.Image) -> Path:
        pattern = re.compile(rf"{re.escape(self.path.stem)}-(\d+)\.png")
        numbers = [int(m[1]) for p in self.folder.iterdir() if (m := pattern.fullmatch(p.name))]
        number = max(numbers, default=0) + 1
        path = self.folder / f"{self.path.stem}-{number}.png"
        data = save_image(path, image, self.metadata)
        for other in numbers:
            before = self.folder / f"{self.path.stem}-{other}.png"
            if before.stat().st_size == len(data) and before.read_bytes() == data:
                path.unlink()
                return before
        return path


def _measure_peak() -> int:
    """The most memory that this process has had, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
