"""Remove objects from images of any size, in batches, with a diffusion model or with OpenCV.

The stock `StableDiffusionXLInpaintPipeline` does the work. Every image has a generator of its
own, so a removal does not depend on the batch it was in.
"""

from __future__ import annotations

import contextlib
import functools
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from accelerate.utils import convert_outputs_to_fp32
from PIL import Image
from tqdm.auto import tqdm

from rorem_lib.data import masks
from rorem_lib.models import sdxl

CLASSICAL = {"telea": cv2.INPAINT_TELEA, "ns": cv2.INPAINT_NS}


MAX_ASPECT = 8  # wider or taller than photographs are: memory grows with the long side


def _fit(image: np.ndarray, mask: np.ndarray, resolution: int, multiple: int):
    """Shrink or enlarge an image so that its short side is near `resolution`, sides divisible.

    Of an image that is longer than `MAX_ASPECT` times its short side, the long side decides: the
    model sees it smaller.
    """
    height, width = image.shape[:2]
    scale = resolution / max(min(height, width), max(height, width) / MAX_ASPECT)
    sides = [max(multiple, round(side * scale / multiple) * multiple) for side in (width, height)]
    if sides == [width, height]:
        return image, mask
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    # A pixel of the hole must not get lost in a smaller mask: any part of it counts.
    small = cv2.resize(mask, sides, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    return cv2.resize(image, sides, interpolation=way), np.where(small > 0, 255, 0).astype(np.uint8)


def _put_back(original, mask, fitted, removed):
    """Bring a removal to the original's size without losing the original's detail.

    Inside the mask it is the enlarged removal; outside the original plus what the removal changed
    (a shadow that went away), which is smooth enough to be enlarged.
    """
    if removed.shape == original.shape:
        return removed
    size = (original.shape[1], original.shape[0])
    change = cv2.resize(removed.astype(np.float32) - fitted, size, interpolation=cv2.INTER_CUBIC)
    inside = cv2.resize(removed, size, interpolation=cv2.INTER_CUBIC).astype(np.float32)
    soft = cv2.GaussianBlur((mask >= 128).astype(np.float32), (0, 0), 1.5)[..., None]
    mixed = inside * soft + (original + change) * (1 - soft)
    return np.clip(mixed + 0.5, 0, 255).astype(np.uint8)


def make_generator(seed: int, number: int) -> torch.Generator:
    """The noise source of removal `number` under a run's `seed` (each well mixed)."""
    mixed = np.random.SeedSequence([seed, number]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(mixed[0]) << 31 | int(mixed[1]) >> 1)


@torch.no_grad()
def remove_objects(
    pipe,
    images: list[np.ndarray],
    object_masks: list[np.ndarray],
    *,
    resolution: int = 0,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    strength: float = 1.0,
    seed: int = 0,
    numbers: list[int] | None = None,
    names: list[str] | None = None,
    batch_size: int = 8,
    dilate: int = 0,
    paste_back: bool = False,
    mixed_precision: str = "auto",
    progress: bool = False,
) -> list[np.ndarray]:
    """Remove what the masks cover.

    Args:
        pipe: a pipeline of `sdxl.load_pipeline`.
        images: [H, W, 3] uint8, any sizes; equal sizes share a batch.
        object_masks: [H, W], white (>= 128) is removed.
        resolution: short side at which the model works, px: images are brought to it and back; 0
            takes what the model was trained at (`sdxl.get_resolution`). The long side is at most
            `MAX_ASPECT` times as long.
        num_inference_steps: denoising steps; each costs one UNet call (two with guidance).
        guidance_scale: classifier-free guidance; 1 is off (RORem removes without guidance).
        strength: share of the noise schedule that is run; 1 starts from pure noise.
        seed: fixes all noise.
        numbers: what each image's noise is numbered; by default its place in the list.
        names: what each image is called in errors; by default its place in the list.
        batch_size: images a forward pass; the default is for 512 px.
        dilate: widens the masks by so many pixels.
        paste_back: keep the source's own pixels outside the (dilated) mask; shadows then stay.
        mixed_precision: see `sdxl.choose_precision`.
        progress: show a bar.

    Returns:
        The removals, [H, W, 3] uint8, each of its source's size.

    Raises:
        ValueError: lists of unequal length, a mask of another size than its image, or an option
            that makes no sense, by its name.
        FloatingPointError: a removal is not finite; names the model and the image.
    """
    if len(images) != len(object_masks):
        raise ValueError(f"{len(images)} images but {len(object_masks)} masks")
    for name, value in (("num_inference_steps", num_inference_steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}: take 1 or more")
    if resolution < 0:
        raise ValueError(f"resolution is {resolution} px: take 0 for what the model was trained at")
    numbers = list(range(len(images))) if numbers is None else list(numbers)
    resolution = resolution or sdxl.get_resolution(pipe)
    multiple = sdxl.get_unit(pipe)
    fitted = []
    for number, (image, mask) in enumerate(zip(images, object_masks)):
        if image.shape[:2] != mask.shape[:2]:
            raise ValueError(
                f"image {number} is {image.shape[1]}x{image.shape[0]} px but its "
                f"mask {mask.shape[1]}x{mask.shape[0]}"
            )
        mask = masks.dilate_mask(masks.binarise_mask(mask), dilate)
        fitted.append((mask, *_fit(image, mask, resolution, multiple)))
    groups: dict[tuple, list[int]] = {}
    for place, (_, image, _) in enumerate(fitted):
        groups.setdefault(image.shape, []).append(place)
    embeds, pooled = sdxl.encode_prompt(pipe)
    precision = sdxl.choose_precision(mixed_precision, pipe.device)
    results: list = [None] * len(images)
    bar = tqdm(total=len(images), disable=not progress, unit="image", mininterval=1)
    for shape, places in groups.items():
        for begin in range(0, len(places), batch_size):
            batch = places[begin : begin + batch_size]
            with _compute_in(pipe, precision):
                removed = pipe(
                    prompt_embeds=embeds.expand(len(batch), -1, -1),
                    pooled_prompt_embeds=pooled.expand(len(batch), -1),
                    image=[Image.fromarray(fitted[i][1]) for i in batch],
                    mask_image=[Image.fromarray(fitted[i][2]) for i in batch],
                    height=shape[0],
                    width=shape[1],
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    strength=strength,
                    output_type="np",
                    generator=[make_generator(seed, numbers[i]) for i in batch],
                ).images
            _check_finite(pipe, removed, [names[i] if names else f"image {i}" for i in batch])
            for i, picture in zip(batch, (removed * 255).round().astype(np.uint8)):
                mask, image, _ = fitted[i]
                results[i] = _put_back(images[i], mask, image, picture)
                if paste_back:
                    results[i] = np.where(mask[..., None] >= 128, results[i], images[i])
            bar.update(len(batch))
    bar.close()
    return results


def _check_finite(pipe, removed: np.ndarray, names: list[str]) -> None:
    """Refuse what would become black pixels: removals [B, H, W, 3] with NaN or infinity."""
    for picture, name in zip(removed, names):
        if not np.isfinite(picture).all():
            raise FloatingPointError(
                f"{getattr(pipe, 'origin', 'the model')} gives numbers that are not finite for "
                f"{name}: its weights are damaged (train or download it again), or they overflow "
                "in mixed_precision fp16 (take bf16 or no)"
            )


@contextlib.contextmanager
def _compute_in(pipe, precision: str):
    """The pipeline's work in a lower precision. What the UNet gives stays float32, else some
    schedulers round the latents between steps; so does the VAE in fp16, where SDXL's overflows."""

    def lower(method, used):
        def call(x, *args, **options):
            with sdxl.autocast(used, x.device):
                return method(x, *args, **options)

        return call

    unet, vae = pipe.unet, pipe.vae
    for_vae = "no" if precision == "fp16" else precision
    decode, again = lower(vae.decode, for_vae), lower(vae.decode, "no")
    with contextlib.ExitStack() as stack:
        if precision != "no":
            forward = convert_outputs_to_fp32(lower(unet.forward, precision))
            stack.enter_context(_replace(unet, "forward", forward))
        stack.enter_context(_replace(vae, "encode", lower(vae.encode, for_vae)))
        decode = functools.partial(_decode, vae, decode, again)
        stack.enter_context(_replace(vae, "decode", decode))
        yield


@contextlib.contextmanager
def _replace(module, name: str, method):
    own = module.__dict__.get(name)
    setattr(module, name, method)
    try:
        yield
    finally:
        delattr(module, name)
        if own is not None:
            setattr(module, name, own)


def _decode(vae, decode, again, latents, *args, **options):
    """`decode`, or where a VAE in half precision overflows `again`, its weights in float32.

    An image that is not finite then, or whose latents were not, is NaN: else what comes after would
    clip infinity to white.
    """
    decoded, dtype = decode(latents, *args, **options), vae.dtype
    sound = latents.isfinite().flatten(1).all(1)
    if sound.all() and not decoded[0].isfinite().all():
        with sdxl.silence_libraries():  # diffusers remarks on every change of precision
            try:
                vae.to(torch.float32)
                decoded = again(latents.float(), *args, **options)
            finally:
                vae.to(dtype)
    sound &= decoded[0].isfinite().flatten(1).all(1)
    if not sound.all():
        decoded[0][~sound] = torch.nan
    return decoded


def inpaint_classical(
    image: np.ndarray, mask: np.ndarray, *, method: str = "telea", radius: float = 5
) -> np.ndarray:
    """OpenCV's Telea or Navier-Stokes ("ns") inpainting; [H, W, 3] uint8 in and out."""
    if method not in CLASSICAL:
        raise ValueError(f"unknown classical method {method!r}: take telea or ns")
    return cv2.inpaint(image, masks.binarise_mask(mask), radius, CLASSICAL[method])


MODES = ("effect", "exact", "full")


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
        pipe: the pipeline (`sdxl.load_pipeline`).
        settings: what the model was released with (`presets.Settings`): the defaults of a call.
    """

    def __init__(self, pipe, *, score=None):
        """Args:
        pipe: of `sdxl.load_pipeline`; left as it is.
        score: (sources, masks, removals) -> probabilities of being good; lists of arrays. It
            chooses among `candidates`.
        """
        self.pipe, self.score = pipe, score

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
        base_model: str = sdxl.BASE_MODEL,
        local_files_only: bool = False,
        runtime: str = "torch",
        score=None,
    ) -> ObjectRemover:
        """Open a remover.

        Args:
            model: `builtin`, `builtin:remover`, a folder or a Hub id.
            lora: folder or Hub id of a LoRA that is laid over it.
            device: "cpu", "cuda", "mps", or "auto" for the best there is.
            dtype: "auto", "bf16", "fp16", "no" (float32): what the weights are kept and computed in.
            offload: move each part to the GPU only while it works.
            runtime: "torch", "onnx" or "openvino" (a folder written by `rorem export`).
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        pipe = sdxl.load_pipeline(
            model,
            revision=revision,
            variant=variant,
            device=device,
            base_model=base_model,
            local_files_only=local_files_only,
        )
        if lora:
            from rorem_lib.models.lora import load_lora

            load_lora(pipe, lora)
        return cls(pipe, score=score)

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
        numbers: list[int] | None = None,
        candidates: int = 1,
        dilate: int = 0,
        invert_mask: bool = False,
        batch_size: int = 8,
        use_lora: bool = True,
        names: list[str] | None = None,
        progress: bool = False,
    ) -> Removal | list[Removal]:
        """Remove what the masks cover. One image and mask, or a list of each.

        Args:
            image: PIL, array [H, W(, C)], tensor [(1|3|4), H, W] in 0..1, or path.
            mask: likewise; white is removed. Of another size it is fitted where the aspect agrees.
            mode: "effect", "exact" or "full".
            crop: work on crops around the objects; False is the paper's whole frame.
            resolution: short side at which the model works, px; 0 takes what it was trained at.
            num_inference_steps, guidance_scale, strength: 0 and None take the model's own.
            seed, numbers: fix the noise; number n of an image gives the same removal in any batch.
            candidates: removals made of each image, of which `score` chooses one.
        """
        single = not isinstance(image, list)
        images, object_masks = ([image], [mask]) if single else (image, mask)
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}: take one of {', '.join(MODES)}")
        arrays = [
            np.asarray(Image.open(i).convert("RGB"))
            if isinstance(i, (str, Path))
            else np.asarray(i)
            for i in images
        ]
        maps = [
            masks.binarise_mask(
                np.asarray(Image.open(m).convert("L"))
                if isinstance(m, (str, Path))
                else np.asarray(m)
            )
            for m in object_masks
        ]
        maps = [255 - m if invert_mask else m for m in maps]
        numbers = list(range(len(images))) if numbers is None else numbers
        found = []
        for source, hole, number, given in zip(arrays, maps, numbers, images):
            began = time.monotonic()
            ys, xs = np.where(hole > 0)
            side = max(np.ptp(ys), np.ptp(xs)) + 1
            h, w = hole.shape
            x0, x1 = max(0, xs.min() - side), min(w, xs.max() + side)
            y0, y1 = max(0, ys.min() - side), min(h, ys.max() + side)
            if not crop:
                x0, y0, x1, y1 = 0, 0, w, h
            (painted,) = remove_objects(
                self.pipe,
                [np.ascontiguousarray(source[y0:y1, x0:x1])],
                [np.ascontiguousarray(hole[y0:y1, x0:x1])],
                resolution=resolution,
                num_inference_steps=num_inference_steps or 20,
                guidance_scale=guidance_scale or 1.0,
                strength=strength or 1.0,
                seed=seed,
                numbers=[number],
                dilate=dilate,
            )
            weight = np.zeros((h, w), np.float32)
            inner = weight[y0:y1, x0:x1]
            if mode == "full":
                inner[:] = 1
            else:
                grown = cv2.dilate(hole, np.ones((5, 5), np.uint8))
                if mode == "effect":
                    delta = cv2.GaussianBlur(
                        np.abs(painted.astype(np.float32) - source[y0:y1, x0:x1]).max(2), (0, 0), 1
                    )
                    grown = grown.copy()
                    grown[y0:y1, x0:x1][delta > 6] = 255
                inner[:] = cv2.GaussianBlur(grown.astype(np.float32) / 255, (0, 0), 1)[y0:y1, x0:x1]
            canvas = source.astype(np.float32)
            canvas[y0:y1, x0:x1] = (
                canvas[y0:y1, x0:x1] * (1 - inner[..., None]) + painted * inner[..., None]
            )
            result = np.where(weight[..., None] > 0, canvas.round().astype(np.uint8), source)
            result = (
                Image.fromarray(result) if isinstance(given, (str, Path, Image.Image)) else result
            )
            found.append(
                Removal(
                    result,
                    np.ceil(weight * 255).astype(np.uint8),
                    [(x0, y0, x1, y1)],
                    time.monotonic() - began,
                )
            )
        return found[0] if single else found
