"""Remove objects from images of any size, in batches, with a diffusion model or with OpenCV.

`denoising.denoise` does the work. Every image has a generator of its own, so a removal does not
depend on the batch it was in.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Sequence, Sized
from numbers import Integral
from pathlib import Path

import cv2
import numpy as np
import torch

from rorem_lib.data import masks
from rorem_lib.models import advice, denoising, presets, sdxl
from rorem_lib.models.attention import compile_unet
from rorem_lib.models.composition import MODES
from rorem_lib.models.inputs import read_inputs
from rorem_lib.models.lora import PlainWeights, load_lora
from rorem_lib.models.presets import FOUR_STEPS, Settings, find_settings
from rorem_lib.models.removing import Removal, remove_from

logger = logging.getLogger(__name__)

CLASSICAL = {"telea": cv2.INPAINT_TELEA, "ns": cv2.INPAINT_NS}


def inpaint_classical(
    image: np.ndarray, mask: np.ndarray, *, method: str = "telea", radius: float = 5
) -> np.ndarray:
    """OpenCV's Telea or Navier-Stokes ("ns") inpainting; [H, W, 3] uint8 in and out."""
    if method not in CLASSICAL:
        raise ValueError(f"unknown classical method {method!r}: take telea or ns")
    return cv2.inpaint(image, masks.binarise_mask(mask), radius, CLASSICAL[method])


def _check(images, object_masks, mode, numbers, names, guidance_scale) -> None:
    if len(images) != len(object_masks):
        raise ValueError(f"{len(images)} images but {len(object_masks)} masks")
    for what, given in (("numbers", numbers), ("names", names)):
        listed = isinstance(given, Sized) and not isinstance(given, str)
        if given is not None and not (listed and len(given) == len(images)):
            raise ValueError(f"{what} is {given!r}: give one for each of {len(images)} images")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}: take one of {', '.join(MODES)}")
    if guidance_scale is not None and not 0 <= guidance_scale < math.inf:
        raise ValueError(f"guidance_scale is {guidance_scale}: take 1 for none, or more")


def _check_counts(**counts: tuple) -> None:
    """Whether options are whole numbers, and not too small: (value, least, what else to take)."""
    for name, (value, least, other) in counts.items():
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} is {value!r}: take {max(least, 1)} or more{other}")


class Remover:
    """Networks that are called with images and masks.

    Attributes:
        networks: what computes (`denoising.Networks`).
        settings: what the model was released with: the defaults of a call.
        score: (sources, masks, removals) -> probabilities of being good, lists of arrays; it
            chooses among candidates. None where nothing does.
    """

    def __init__(self, networks: denoising.Networks, settings: Settings, score=None):
        self.networks, self.settings, self.score = networks, settings, score

    def __call__(self, image, mask, **options):
        """As `remove`, the images alone."""
        found = self.remove(image, mask, **options)
        return [r.image for r in found] if isinstance(found, list) else found.image

    def remove(
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
        numbers: Sequence[int] | None = None,
        candidates: int = 1,
        dilate: int = 0,
        invert_mask: bool = False,
        batch_size: int = 8,
        names: Sequence[str] | None = None,
        progress: bool = False,
    ) -> Removal | list[Removal]:
        """Remove what the masks cover. One image and mask, or a list of each.

        Args:
            image: PIL, array [H, W(, C)], tensor [(1|3|4), H, W] in 0..1, or path; see `inputs`.
            mask: likewise; white is removed. Of another size it is fitted where the aspect agrees.
            mode: "effect", "exact" or "full"; see `composition`.
            crop: work on crops around the objects; False is the paper's whole frame.
            resolution: short side at which the model works, px: 0 takes what it was trained at. The
                long side is at most `crops.FRAME_ASPECT` times as long.
            num_inference_steps: denoising steps, one UNet call each (two with guidance).
            guidance_scale: classifier-free guidance; 1 is off (RORem removes without guidance).
            strength: share of the noise schedule that is run; 1 starts from pure noise. Of steps,
                guidance and strength 0 and None take the model's own.
            seed, numbers: fix the noise; number n of an image gives the same removal in any batch.
                By default an image's number is its place.
            candidates: removals made of each image, of which `score` chooses one.
            dilate: side of the square that widens the masks, px: half of it on each side.
            invert_mask: black is removed.
            batch_size: images a forward pass; the default is for 512 px.
            names: what each image is called in errors; by default its path or place.
            progress: show a bar.

        Returns:
            What came of each image, in its own kind and size. With an empty mask that is the image
            itself, and a warning.

        Raises:
            ValueError: lists of unequal length, an input or an option that makes no sense, by its
                name.
            FloatingPointError: a removal is not finite; names the model and the image.
        """
        single = not isinstance(image, (list, tuple))
        if not single and (isinstance(mask, (str, Path)) or not isinstance(mask, Iterable)):
            raise ValueError(f"a list of images needs a list of masks, not a {type(mask).__name__}")
        images, object_masks = ([image], [mask]) if single else (list(image), list(mask))
        _check(images, object_masks, mode, numbers, names, guidance_scale)
        _check_counts(
            num_inference_steps=(num_inference_steps, 0, ", or 0 for the model's own"),
            resolution=(resolution, 0, " px, or 0 for what the model was trained at"),
            batch_size=(batch_size, 1, ""),
            candidates=(candidates, 1, ""),
            dilate=(dilate, 0, ""),
            seed=(seed, 0, ""),
        )
        names = names or ["the image" if single else f"image {n}" for n in range(len(images))]
        numbers = range(len(images)) if numbers is None else numbers
        given = [
            read_inputs(i, m, name, invert=invert_mask)
            for i, m, name in zip(images, object_masks, names, strict=True)
        ]
        for one in given:
            one.mask = masks.dilate_mask(one.mask, dilate)
        own = self.settings
        sampling = {
            "num_inference_steps": num_inference_steps or own.num_inference_steps,
            "guidance_scale": own.guidance_scale if guidance_scale is None else guidance_scale,
            "strength": own.strength if strength is None else strength,
            "seed": seed,
        }
        resolution = resolution or own.resolution or self.networks.resolution
        found: list = [None] * len(given)
        for place, one in enumerate(given):
            if not one.mask.any():
                logger.warning("%s: its mask is empty, nothing is removed", one.name)
                effect = np.zeros(one.mask.shape, np.uint8)
                found[place] = Removal(one.restore(one.image.copy()), effect)
        todo = [place for place in range(len(given)) if found[place] is None]
        removed = remove_from(
            [given[place].image for place in todo],
            [given[place].mask for place in todo],
            functools.partial(denoising.paint, self.networks, **sampling),
            functools.partial(denoising.round_trip, self.networks),
            resolution=resolution,
            unit=self.networks.unit,
            mode=mode,
            crop=crop,
            numbers=[numbers[place] for place in todo],
            names=[given[place].name for place in todo],
            candidates=candidates,
            score=self.score,
            batch_size=batch_size,
            progress=progress,
        )
        for place, one in zip(todo, removed, strict=True):
            found[place] = dataclasses.replace(one, image=given[place].restore(one.image))
        return found[0] if single else found


class ObjectRemover(Remover):
    """A remover of objects: opened once, called with images and masks.

        remover = ObjectRemover.from_pretrained("LetsThink/RORem", device="cuda")
        result = remover("photo.jpg", "mask.png")

    Attributes:
        pipe: the pipeline (`sdxl.load_pipeline`); None where another runtime has the networks.
    """

    def __init__(self, pipe=None, *, networks=None, settings: Settings | None = None, score=None):
        """Args:
        pipe: of `sdxl.load_pipeline`; left as it is, and computed with in the types it has.
        networks: in place of a pipeline.
        settings: of the defaults of a call.
        score: (sources, masks, removals) -> probabilities of being good; lists of arrays. It
            chooses among `candidates`.
        """
        networks = networks or denoising.PipelineNetworks(pipe)
        super().__init__(networks, settings or Settings(), score)
        self.pipe = pipe
        self._plain = None  # the model without its LoRA

    @classmethod
    def from_pretrained(
        cls,
        model: str = advice.AUTHORS_MODEL,
        *,
        lora: str = "",
        scheduler: str = "",
        revision: str | None = None,
        variant: str | None = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        offload: bool = False,
        compile: bool = False,
        base_model: str = sdxl.BASE_MODEL,
        local_files_only: bool = False,
        runtime: str = "torch",
        score=None,
    ) -> ObjectRemover:
        """Open a remover.

        Args:
            model: a folder, a Hub id (by default the authors' model), or `builtin:remover` or
                `builtin`, miniatures for rendered scenes of 64 px.
            lora: folder or Hub id of a LoRA that is laid over it. One that does not say how it is
                used is taken for a 4-step one (LCM).
            scheduler: one of `presets.SCHEDULERS` in place of what the LoRA, or without one the
                model, was released with.
            revision, variant, base_model, local_files_only: see `sdxl.load_pipeline`.
            device: "cpu", "cuda", "mps", or "auto" for the best there is.
            dtype: "auto", "bf16", "fp16", "fp32" (or "no"): what the weights are kept and computed
                in. With fp16 the VAE stays in float32: SDXL's overflows.
            offload: keep the weights in the CPU's memory and move each part to the GPU while it
                works. Decoding then goes in tiles.
            compile: on GPUs compile the UNet's repeated blocks, on CPUs record its operations once
                (the same bits); the first call of each size takes longer.
            runtime: "torch", or for a folder written by `rorem export` "onnx" or "openvino", which
                compute on the CPU what was exported.
            score: see `ObjectRemover`.

        Raises:
            ValueError: an option that makes no sense, by its name. See `sdxl.load_pipeline` too.
            FileNotFoundError, ConnectionError, PermissionError: the model cannot be had; says how
                to get it.
        """
        if not isinstance(dtype, torch.dtype):
            dtype = "no" if dtype == "fp32" else dtype
            if dtype not in sdxl.PRECISIONS:
                raise ValueError(f"dtype is {dtype!r}: take auto, bf16, fp16 or fp32")
        if runtime != "torch":
            from rorem_lib.models.runtimes import ExportedNetworks, refuse_options

            refuse_options(
                device="" if str(device) in ("auto", "cpu") else str(device),
                base_model="" if base_model == sdxl.BASE_MODEL else base_model,
                lora=lora,
                scheduler=scheduler,
                revision=revision,
                variant=variant,
                offload=offload,
                compile=compile,
            )
            networks = ExportedNetworks(model, runtime, dtype=dtype)
            return cls(networks=networks, settings=Settings(**networks.settings), score=score)
        device = sdxl.choose_device(device)
        if offload and torch.device(device).type == "cpu":
            raise ValueError("offload moves weights to a GPU while they work: device is cpu")
        if not isinstance(dtype, torch.dtype):
            dtype = sdxl.DTYPES[sdxl.choose_precision(dtype, device)]
        where = {"revision": revision, "local_files_only": local_files_only}
        with advice.explain_absence(model, revision):
            pipe = sdxl.load_pipeline(
                model,
                variant=variant,
                dtype=dtype,
                vae_dtype=torch.float32 if dtype == torch.float16 else None,
                device="cpu" if offload else device,
                base_model=base_model,
                text_encoders=False,
                **where,
            )
        settings = find_settings(model, **where)
        own = settings.resolution or sdxl.get_resolution(pipe)
        settings = dataclasses.replace(settings, resolution=own)
        presets.set_scheduler(pipe, settings.scheduler)
        if scheduler and not lora:  # "default" is what it has now
            settings = dataclasses.replace(settings, scheduler=scheduler)
            presets.set_scheduler(pipe, scheduler)
        remover = cls(pipe, settings=settings, score=score)
        if lora:
            remover._lay_lora(lora, scheduler, local_files_only)
        if compile and torch.device(device).type == "cpu":
            remover.networks = denoising.PipelineNetworks(pipe, record=True)
        elif compile:
            compile_unet(pipe.unet)
        if offload:
            pipe.enable_model_cpu_offload(device=device)
            pipe.works_on = torch.device(device)
            if isinstance(pipe.vae, sdxl.AutoencoderKL):
                pipe.vae.enable_tiling()
        return remover

    def _lay_lora(self, lora: str, scheduler: str, local_files_only: bool) -> None:
        """Merge a LoRA, which costs no time then, and keep what was there without it."""
        plain = PlainWeights(self.pipe.unet)
        self._plain = plain, self.pipe.scheduler, self.settings
        load_lora(self.pipe, lora)
        plain.drop_equal()
        found = find_settings(lora, local_files_only=local_files_only, default=FOUR_STEPS)
        said = self.pipe.unet.config.get(sdxl.TRAINED_RESOLUTION)
        size = found.resolution or said or self.settings.resolution
        scheduler = scheduler or found.scheduler
        self.settings = dataclasses.replace(found, resolution=size, scheduler=scheduler)
        presets.set_scheduler(self.pipe, scheduler)
        self._has_lora = True

    def remove(self, image, mask, *, use_lora: bool = True, **options):
        """As `Remover.remove`, with the LoRA that `from_pretrained` was given, or without it."""
        self._switch_lora(use_lora)
        return super().remove(image, mask, **options)

    def _switch_lora(self, on: bool) -> None:
        """Put the weights, the scheduler and the settings of the other state in their place."""
        if self._plain is None or on == self._has_lora:
            return
        weights, scheduler, settings = self._plain
        weights.exchange()
        self._plain = weights, self.pipe.scheduler, self.settings
        self.pipe.scheduler, self.settings = scheduler, settings
        self._has_lora = on
