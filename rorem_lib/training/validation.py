"""Fixed scenes, removed again and again while a remover trains: grids to look at, and their PSNR.

Scenes, their sizes and their noise are the same every time, so that two grids differ by what was
learnt between them and by nothing else. The training does not notice: weights, gradients, modes and
random states are afterwards what they were.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel

from rorem_lib import metrics
from rorem_lib.data import masks
from rorem_lib.data.pictures import TripletError, save_image
from rorem_lib.data.triplets import Triplet, iter_triplets, load_images
from rorem_lib.files import write_text
from rorem_lib.models import sdxl
from rorem_lib.models.inpainting import ObjectRemover
from rorem_lib.sets import choose_preview, resolve
from rorem_lib.training import distributed, tracking

logger = logging.getLogger(__name__)

FOLDER = "validation_images"
CELL = 512  # px; larger images are shrunk in the grid
GAP = 4  # px between its cells


@dataclass(frozen=True)
class Scene:
    """What is removed: `source` [H, W, 3], `mask` [H, W] 0 or 255, `gt` as `source`, all uint8."""

    name: str
    source: np.ndarray
    mask: np.ndarray
    gt: np.ndarray | None


class Validation:
    """Removes the objects of some scenes with the model under training; see `__call__`.

    Args:
        pipe: the training's own pipeline, whose VAE may lie on another device or have another
            precision; afterwards it does so again.
        config: the run's `RemoverConfig`. Scenes are the first `num_validation_images` of
            `validation_meta_path`; where that is empty, of the test set beside the first training
            set; where there is none, of that training set itself (the PSNR is then of images
            that were trained on).
        accelerator: the run's.
        num_inference_steps: denoising steps of a removal.

    Raises:
        ValueError: there are no such scenes, or they cannot be read; names the option.
    """

    def __init__(self, pipe, config, accelerator, *, num_inference_steps: int = 20):
        self.pipe, self.config, self.accelerator = pipe, config, accelerator
        self.num_inference_steps = num_inference_steps
        self.folder = Path(config.output_dir) / FOLDER
        unit = sdxl.get_unit(pipe)
        self.side = max(unit, config.resolution // unit * unit)
        self.scenes = load_scenes(config, side=self.side, unit=unit)

    def __call__(self, model, step: int) -> dict[str, float]:
        """Make the removals, write `validation_images/step_<step>.png`, show it to the trackers.

        To be called on every process at once: each makes the same removals, since a model whose
        weights are sharded runs nowhere alone, and the others would wait anyway. The first process
        alone writes. What a killed run left of later steps is removed.

        Args:
            model: the UNet under training, as it is or as accelerate wrapped it; averaged weights
                have to be in their place.
            step: names the grid.

        Returns:
            `validation_psnr_hole`, the mean over scenes with GT in dB (over those that differ from
            it); nothing where none has GT, or where a removal is not finite (a warning).

        Raises:
            OSError: the grid cannot be written; names the file.
        """
        unet = extract_model_from_parallel(model, keep_torch_compile=False)
        try:
            removals = remove_scenes(
                self.pipe,
                unet,
                self.scenes,
                side=self.side,
                seed=self.config.seed,
                num_inference_steps=self.num_inference_steps,
                precision=distributed.get_precision(self.accelerator),
            )
        except FloatingPointError as error:  # an overflow in fp16: the loss decides of a training
            logger.warning("no removals of step %d: %s", step, error)
            return {}
        scores = {
            scene.name: metrics.psnr_hole(removal, scene.gt, scene.mask)
            for scene, removal in zip(self.scenes, removals)
            if scene.gt is not None
        }
        mean, _ = metrics.mean_psnr(scores.values())
        values = {} if mean is None else {"validation_psnr_hole": round(mean, 4)}
        if self.accelerator.is_main_process:
            grid = compose_grid(self.scenes, removals)
            scores = {k: round(v, 4) if np.isfinite(v) else None for k, v in scores.items()}
            self._write(step, grid, {"step": step, **values, "scenes": scores})
            self._track(step, grid)
        return values

    def _write(self, step: int, grid: np.ndarray, line: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob("step_*.png"):
            number = old.stem.removeprefix("step_")
            if number.isdecimal() and int(number) > step:
                old.unlink()
        save_image(self.folder / f"step_{step}.png", grid)
        lines = self.folder / "metrics.jsonl"
        tracking.trim_lines(lines, step - 1)
        before = lines.read_text(encoding="utf-8") if lines.exists() else ""
        write_text(lines, before + json.dumps(line) + "\n")

    def _track(self, step: int, grid: np.ndarray) -> None:
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"validation": grid[None]}, step=step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"validation": [grid]}, step=step)


def load_scenes(config, *, side: int, unit: int) -> list[Scene]:
    """The scenes that `Validation` describes, their short side `side` px, aspect kept.

    Args:
        unit: sides are multiples of it.

    Raises:
        ValueError: as `Validation`.
    """
    if config.num_validation_images < 1:
        raise ValueError(
            f"num_validation_images {config.num_validation_images}: take at least 1, "
            "or validation_steps 0 for no validation"
        )
    try:
        if config.validation_meta_path:
            place = resolve(config.validation_meta_path)
        else:
            first = [*config.meta_path, *config.high_resolution_meta_path][0]
            place = choose_preview(resolve(first))
        triplets = list(
            islice(
                (t for t in iter_triplets(place, require_gt=False) if _counts(t)),
                config.num_validation_images,
            )
        )
        if not triplets:
            raise TripletError(f"{place} holds no triplets")
        return [_fit_scene(triplet, side, unit) for triplet in triplets]
    except TripletError as error:
        raise ValueError(
            f"there are no scenes to validate on: {error}; name another set in "
            "validation_meta_path, or set validation_steps to 0"
        ) from error


def _counts(triplet: Triplet) -> bool:
    """Whether a triplet was accepted: GT of the others is no truth."""
    score = triplet.extra.get("score")
    return score is None or score >= 0.5


def _fit_scene(triplet: Triplet, side: int, unit: int) -> Scene:
    """A triplet at the size at which `ObjectRemover` leaves it alone."""
    pictures = load_images(triplet)
    height, width = pictures["source"].shape[:2]
    scale = side / min(height, width)
    size = [max(side, round(x * scale / unit) * unit) for x in (width, height)]
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    source, gt = (
        x if x is None else cv2.resize(x, size, interpolation=way)
        for x in (pictures["source"], pictures["gt"])
    )
    # as in removals of larger images: any part of a pixel of the hole counts
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    mask = np.where(cv2.resize(pictures["mask"], size, interpolation=way) > 0, 255, 0)
    return Scene(triplet.id, source, mask.astype(np.uint8), gt)


def remove_scenes(
    pipe,
    unet,
    scenes: Sequence[Scene],
    *,
    side: int,
    seed: int,
    num_inference_steps: int = 20,
    precision: str = "no",
    batch_size: int = 4,
) -> list[np.ndarray]:
    """Removals of scenes by a UNet that is being trained, which is left as it was.

    Args:
        pipe: what the rest comes from; left as it was too.
        unet: not wrapped for several processes.
        scenes: of `load_scenes`.
        side: their short side in px, at which the model works.
        seed: fixes all noise; global random states stay what they were.
        num_inference_steps: denoising steps, without guidance.
        precision: what the UNet runs in: "no", "bf16" or "fp16". The VAE runs in float32, since
            SDXL's overflows in fp16.
        batch_size: scenes a forward pass; another one rounds otherwise.

    Returns:
        [H, W, 3] uint8, each of its scene's size.
    """
    with (
        _keep_random_states(unet.device),
        _lend_parts(pipe, unet),
        _evaluate(unet, precision),
    ):
        return ObjectRemover(pipe)(
            [scene.source for scene in scenes],
            [scene.mask for scene in scenes],
            names=[scene.name for scene in scenes],
            resolution=side,
            seed=seed,
            batch_size=batch_size,
            num_inference_steps=num_inference_steps,
            guidance_scale=1.0,
            strength=1.0,
            mode="full",
            crop=False,
        )


@contextlib.contextmanager
def _keep_random_states(device: torch.device) -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def _lend_parts(pipe, unet) -> Iterator[None]:
    """Put the UNet into the pipeline, the VAE beside it in float32."""
    unet_before = pipe.unet
    device, dtype = pipe.vae.device, pipe.vae.dtype
    try:
        _move(pipe.vae, unet.device, torch.float32)
        pipe.unet = unet
        yield
    finally:
        pipe.unet = unet_before
        _move(pipe.vae, device, dtype)


def _move(module, device: torch.device, dtype: torch.dtype) -> None:
    with sdxl.silence_libraries():  # diffusers remarks on every change of precision
        module.to(device, dtype)


@contextlib.contextmanager
def _evaluate(unet, precision: str) -> Iterator[None]:
    """Evaluation mode, the training's precision, nothing compiled (other shapes would be anew)."""
    modes = [(module, module.training) for module in unet.modules()]
    plain, own = unet.forward, unet.__dict__.get("forward")

    def forward(*args, **kwargs):
        with sdxl.autocast(precision, unet.device):
            return plain(*args, **kwargs)

    try:
        unet.eval()
        unet.forward = convert_outputs_to_fp32(forward)
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        del unet.forward
        if own is not None:  # accelerate's, which sets the precision too
            unet.forward = own
        for module, training in modes:
            module.training = training


def compose_grid(scenes: Sequence[Scene], removals: Sequence[np.ndarray]) -> np.ndarray:
    """A row a scene on white: source with the mask's outline, removal, GT where there is one.

    Returns:
        [H, W, 3] uint8. Cells are as large as the largest scene, at most `CELL` px a side.
    """
    rows = [
        [masks.outline_mask(scene.source, scene.mask), removal]
        + ([] if scene.gt is None else [scene.gt])
        for scene, removal in zip(scenes, removals)
    ]
    rows = [[_shrink(picture) for picture in row] for row in rows]
    height, width = (max(row[0].shape[axis] for row in rows) for axis in (0, 1))
    columns = max(map(len, rows))
    grid = np.full(
        (len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8
    )
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            top, left = r * (height + GAP), c * (width + GAP)
            grid[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return grid


def _shrink(picture: np.ndarray) -> np.ndarray:
    scale = CELL / max(picture.shape[:2])
    if scale >= 1:
        return picture
    size = [max(1, round(side * scale)) for side in picture.shape[1::-1]]
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
