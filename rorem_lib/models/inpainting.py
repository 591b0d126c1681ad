"""Remove objects from images of any size, in batches, with a diffusion model or with OpenCV.

`denoising.denoise` does the work. Every image has a generator of its own, so a removal does not
depend on the batch it was in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from rorem_lib.data import masks
from rorem_lib.models import denoising, presets, sdxl
from rorem_lib.models.attention import compile_unet
from rorem_lib.models.composition import MODES
from rorem_lib.models.inputs import read_inputs
from rorem_lib.models.lora import PlainWeights, load_lora
from rorem_lib.models.presets import FOUR_STEPS, Settings, find_settings
from rorem_lib.models.removing import remove_from

logger = logging.getLogger(__name__)

CLASSICAL = {"telea": cv2.INPAINT_TELEA, "ns": cv2.INPAINT_NS}


TILED_PIXELS = 4_200_000  # of a frame, above which the VAE works in tiles


def make_generator(seed: int, number: int) -> torch.Generator:
    """The noise source of removal `number` under a run's `seed` (each well mixed)."""
    mixed = np.random.SeedSequence([seed, number]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(mixed[0]) << 31 | int(mixed[1]) >> 1)


def inpaint_classical(
    image: np.ndarray, mask: np.ndarray, *, method: str = "telea", radius: float = 5
) -> np.ndarray:
    """OpenCV's Telea or Navier-Stokes ("ns") inpainting; [H, W, 3] uint8 in and out."""
    if method not in CLASSICAL:
        raise ValueError(f"unknown classical method {method!r}: take telea or ns")
    return cv2.inpaint(image, masks.binarise_mask(mask), radius, CLASSICAL[method])


@dataclass
class Removal:
    """What `ObjectRemover.remove` gives for one image.

    Attributes:
        image: the image without the object: of the kind that was given (a PIL image for a path),
            of the source's size.
        effect: [H, W] uint8, how much of each pixel is the remover's: 0 where the source's own
            pixel stands, bit for bit, 255 where it is all new.
        crops: boxes (x0, y0, x1, y1) in px that the model saw; the whole frame with `crop=False`.
        seconds: how long it took, a share of its batch.
        score: the discriminator's probability that it is a good removal; None without one.
        number: of the candidate that was chosen, from 0.
    """

    image: object
    effect: np.ndarray
    crops: list[tuple[int, int, int, int]]
    seconds: float
    score: float | None = None
    number: int = 0


class ObjectRemover:
    """A remover of objects: opened once, called with images and masks.

        remover = ObjectRemover.from_pretrained("LetsThink/RORem", device="cuda")
        result = remover("photo.jpg", "mask.png")

    Attributes:
        pipe: the pipeline (`sdxl.load_pipeline`); None where another runtime has the networks.
        networks: what computes (`denoising.Networks`).
        settings: what the model was released with: the defaults of a call.
        score: chooses among candidates.
    """

    def __init__(self, pipe=None, *, networks=None, settings: Settings | None = None, score=None):
        """Args:
        pipe: of `sdxl.load_pipeline`; left as it is, and computed with in the types it has.
        networks: in place of a pipeline.
        settings: of the defaults of a call.
        score: (sources, masks, removals) -> probabilities of being good; lists of arrays. It
            chooses among `candidates`.
        """
        self.pipe, self.score = pipe, score
        self.networks = networks or denoising.PipelineNetworks(pipe)
        self.settings = settings or Settings()
        self._plain = None  # the model without its LoRA

    @classmethod
    def from_pretrained(
        cls,
        model: str = "builtin",
        *,
        lora: str = "",
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
            model: `builtin`, `builtin:remover`, a folder or a Hub id.
            lora: folder or Hub id of a LoRA that is laid over it. One that does not say how it is
                used is taken for a 4-step one (LCM).
            revision, variant, base_model, local_files_only: see `sdxl.load_pipeline`.
            device: "cpu", "cuda", "mps", or "auto" for the best there is.
            dtype: "auto", "bf16", "fp16", "no" (float32): what the weights are kept and computed
                in. With fp16 the VAE stays in float32: SDXL's overflows.
            offload: keep the weights in the CPU's memory and move each part to the GPU while it
                works. Decoding then goes in tiles.
            compile: on GPUs compile the UNet's repeated blocks, on CPUs record its operations once
                (the same bits); the first call of each size takes longer.
            runtime: "torch", "onnx" or "openvino" (a folder written by `rorem export`).
            score: see `ObjectRemover`.

        Raises:
            ValueError: an option that makes no sense, by its name. See `sdxl.load_pipeline` too.
        """
        if runtime != "torch":
            from rorem_lib.models.runtimes import ExportedNetworks

            if lora:
                raise ValueError("an exported model has its LoRA merged: rorem export --lora")
            networks = ExportedNetworks(model, runtime, dtype=dtype)
            return cls(networks=networks, settings=Settings(**networks.settings), score=score)
        device = sdxl.choose_device(device)
        if offload and torch.device(device).type == "cpu":
            raise ValueError("offload moves weights to a GPU while they work: device is cpu")
        if not isinstance(dtype, torch.dtype):
            dtype = sdxl.DTYPES[sdxl.choose_precision(dtype, device)]
        where = {"revision": revision, "local_files_only": local_files_only}
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
        remover = cls(pipe, settings=settings, score=score)
        if lora:
            remover._lay_lora(lora, local_files_only)
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

    def _lay_lora(self, lora: str, local_files_only: bool) -> None:
        """Merge a LoRA, which costs no time then, and keep what was there without it."""
        plain = PlainWeights(self.pipe.unet)
        self._plain = plain, self.pipe.scheduler, self.settings
        load_lora(self.pipe, lora)
        plain.drop_equal()
        found = find_settings(lora, local_files_only=local_files_only, default=FOUR_STEPS)
        said = self.pipe.unet.config.get(sdxl.TRAINED_RESOLUTION)
        size = found.resolution or said or self.settings.resolution
        self.settings = dataclasses.replace(found, resolution=size)
        presets.set_scheduler(self.pipe, found.scheduler)
        self._has_lora = True

    def _switch_lora(self, on: bool) -> None:
        """Put the weights, the scheduler and the settings of the other state in their place."""
        if self._plain is None or on == self._has_lora:
            return
        weights, scheduler, settings = self._plain
        weights.exchange()
        self._plain = weights, self.pipe.scheduler, self.settings
        self.pipe.scheduler, self.settings = scheduler, settings
        self._has_lora = on

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
        use_lora: bool = True,
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
            use_lora: with the LoRA that `from_pretrained` was given, or without it.
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
        images, object_masks = ([image], [mask]) if single else (list(image), list(mask))
        self._check(images, object_masks, mode, num_inference_steps, batch_size, resolution)
        self._switch_lora(use_lora)
        names = names or ["the image" if single else f"image {n}" for n in range(len(images))]
        numbers = range(len(images)) if numbers is None else numbers
        for what, found in ("names", names), ("numbers", numbers):
            if len(found) != len(images):
                raise ValueError(f"{len(images)} images but {len(found)} {what}")
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
                found[place] = Removal(one.restore(one.image.copy()), effect, [], 0.0)
        todo = [place for place in range(len(given)) if found[place] is None]
        removed = remove_from(
            [given[place].image for place in todo],
            [given[place].mask for place in todo],
            functools.partial(self._paint_fitted, **sampling),
            self._round_trip,
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
            found[place] = Removal(
                given[place].restore(one.image),
                one.effect,
                one.crops,
                one.seconds,
                one.score,
                one.number,
            )
        return found[0] if single else found

    def _check(self, images, object_masks, mode, num_inference_steps, batch_size, resolution):
        if len(images) != len(object_masks):
            raise ValueError(f"{len(images)} images but {len(object_masks)} masks")
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}: take one of {', '.join(MODES)}")
        if num_inference_steps < 0:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}: take 1 or more, or 0 for "
                "the model's own"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: take 1 or more")
        if resolution < 0:
            raise ValueError(
                f"resolution is {resolution} px: take 0 for what the model was trained at"
            )

    def _paint_fitted(
        self, images, object_masks, numbers, names, *, seed: int, **sampling
    ) -> list[np.ndarray]:
        """Removals of one batch: images [h, w, 3] and masks of one size that `unit` divides.

        Args:
            sampling: `num_inference_steps`, `guidance_scale`, `strength` of `denoising.denoise`.

        Raises:
            FloatingPointError: a removal is not finite; names the model and the image.
        """
        with self._tiled(images[0].shape):
            removed = denoising.denoise(
                self.networks,
                np.stack(images),
                np.stack(object_masks),
                [make_generator(seed, number) for number in numbers],
                **sampling,
            )
        for picture, name in zip(removed, names):
            if not np.isfinite(picture).all():
                raise FloatingPointError(
                    f"{self.networks.origin} gives numbers that are not finite for {name}: its "
                    "weights are damaged (train or download it again), or they overflow in fp16 "
                    "(take bf16 or no)"
                )
        return list((removed * 255).round().astype(np.uint8))

    def _round_trip(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """Images of one size that `unit` divides, through the VAE alone."""
        with self._tiled(images[0].shape):
            seen = denoising.encode_decode(self.networks, np.stack(images))
        return list((np.nan_to_num(seen) * 255).round().astype(np.uint8))

    @contextlib.contextmanager
    def _tiled(self, shape: tuple[int, ...]):
        """The VAE in tiles where a frame is so large that its memory would not do.

        `AutoencoderTiny` needs little, and tiles of it do not fit together (diffusers 0.42).
        """
        vae = self.pipe.vae if self.pipe else None
        large = isinstance(vae, sdxl.AutoencoderKL) and shape[0] * shape[1] > TILED_PIXELS
        turn = large and not vae.use_tiling
        try:
            if turn:
                vae.enable_tiling()
            yield
        finally:
            if turn:
                vae.disable_tiling()
