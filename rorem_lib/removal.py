"""Inference: remove objects from pictures of any size, in batches, one or many processes.

The stock `StableDiffusionXLInpaintPipeline` does the work. Every picture has a generator of its
own, so a removal does not depend on the batch it was in, nor on how many processes shared the work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from accelerate.utils import convert_outputs_to_fp32
from PIL import Image
from tqdm.auto import tqdm

from rorem_lib import options, sdxl, sharding
from rorem_lib.data import masks
from rorem_lib.data.triplets import load_images, read_triplets, resolve_meta
from rorem_lib.data.writer import TripletWriter
from rorem_lib.files import hash_file, read_json, remove_folder, write_json

logger = logging.getLogger(__name__)

CLASSICAL = {"telea": cv2.INPAINT_TELEA, "ns": cv2.INPAINT_NS}


@dataclass
class GenerateConfig:
    """Generate removal candidates for a set of sources and masks (RORem, sec. 3.1).

    Attributes:
        output_dir: the candidate set is written to `<output_dir>/candidates`.
        meta_path: sets of sources and masks (GT is not read).
        pretrained_model_name_or_path: the remover: `builtin`, a folder or a Hub id.
        revision: the Hub revision.
        also: further methods that take turns with the remover, picture by picture: models, or
            `telea` and `ns` for OpenCV's. A discriminator that shall judge several methods has to
            see how each of them fails.
        start: first picture of the set that is used.
        count: how many pictures are used; 0 takes all from `start` on.
        seeds_per_image: removals made of each picture, with different noise.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 is off.
        strength: 1 starts from pure noise; below it the object can shine through.
        dilate: pixels by which the mask is widened for the removal; several values take turns with
            the removals of a picture. The candidate keeps the mask as it was: where the wider one
            hid a shadow, what is accepted teaches the remover to take the shadow away unasked.
        batch_size: removals a forward pass.
        mixed_precision: "no", "bf16", "fp16", or "auto": bf16 where the hardware has it.
        seed: fixes all noise.
    """

    output_dir: str = "runs/alone/03_generate_removals"
    meta_path: list[str] = field(default_factory=lambda: ["builtin:pool"])
    pretrained_model_name_or_path: str = "builtin"
    revision: str = ""
    also: list[str] = field(default_factory=list)
    start: int = 0
    count: int = 0
    seeds_per_image: int = 1
    num_inference_steps: int = 20
    guidance_scale: float = 1.0
    strength: float = 1.0
    dilate: list[int] = field(default_factory=lambda: [0])
    batch_size: int = 32
    mixed_precision: str = "auto"
    seed: int = 4


def _fit(image: np.ndarray, mask: np.ndarray, native: int, multiple: int):
    """Shrink or enlarge a picture so that its short side is near `native`, sides divisible."""
    height, width = image.shape[:2]
    scale = 1.0 if min(height, width) in (native, native * 3 // 2) else native / min(height, width)
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
    num_inference_steps: int = 20,
    guidance_scale: float = 1.0,
    strength: float = 1.0,
    seed: int = 0,
    numbers: list[int] | None = None,
    batch_size: int = 32,
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
        num_inference_steps: denoising steps; each costs one UNet call (two with guidance).
        guidance_scale: classifier-free guidance; 1 is off (RORem removes without guidance).
        strength: share of the noise schedule that is run; 1 starts from pure noise.
        seed: fixes all noise.
        numbers: what each picture's noise is numbered; by default its place in the list.
        batch_size: pictures a forward pass.
        dilate: widens the masks by so many pixels.
        paste_back: keep the source's own pixels outside the (dilated) mask; shadows then stay.
        mixed_precision: see `sdxl.choose_precision`.
        progress: show a bar.

    Returns:
        The removals, [H, W, 3] uint8, each of its source's size.

    Raises:
        ValueError: lists of unequal length, or a mask of another size than its image.
    """
    if len(images) != len(object_masks):
        raise ValueError(f"{len(images)} images but {len(object_masks)} masks")
    numbers = list(range(len(images))) if numbers is None else list(numbers)
    native = pipe.unet.config.sample_size * pipe.vae_scale_factor
    multiple = sdxl.find_unit(pipe)
    fitted = []
    for number, (image, mask) in enumerate(zip(images, object_masks)):
        if image.shape[:2] != mask.shape[:2]:
            raise ValueError(
                f"picture {number} is {image.shape[1]}x{image.shape[0]} px but its "
                f"mask {mask.shape[1]}x{mask.shape[0]}"
            )
        mask = masks.dilate_mask(masks.binarise_mask(mask), dilate)
        fitted.append((mask, *_fit(image, mask, native, multiple)))
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
            for i, picture in zip(batch, (removed * 255).round().astype(np.uint8)):
                mask, image, _ = fitted[i]
                results[i] = _put_back(images[i], mask, image, picture)
                if paste_back:
                    results[i] = np.where(mask[..., None] >= 128, results[i], images[i])
            bar.update(len(batch))
    bar.close()
    return results


@contextlib.contextmanager
def _compute_in(pipe, precision: str):
    """The pipeline's work in a lower precision. What the UNet gives stays float32, else some
    schedulers round the latents between steps; so does the VAE in fp16, where SDXL's overflows."""
    if precision == "no":
        yield
        return

    def lower(method, used):
        def call(x, *args, **options):
            with sdxl.autocast(used, x.device):
                return method(x, *args, **options)

        return call

    unet, vae = pipe.unet, pipe.vae
    own = unet.__dict__.get("forward")
    unet.forward = convert_outputs_to_fp32(lower(unet.forward, precision))
    for name in ("encode", "decode"):
        setattr(vae, name, lower(getattr(vae, name), "no" if precision == "fp16" else precision))
    try:
        yield
    finally:
        del unet.forward, vae.encode, vae.decode
        if own is not None:
            unet.forward = own


def inpaint_classical(
    image: np.ndarray, mask: np.ndarray, *, method: str = "telea", radius: float = 5
) -> np.ndarray:
    """OpenCV's Telea or Navier-Stokes ("ns") inpainting; [H, W, 3] uint8 in and out."""
    if method not in CLASSICAL:
        raise ValueError(f"unknown classical method {method!r}: take telea or ns")
    return cv2.inpaint(image, masks.binarise_mask(mask), radius, CLASSICAL[method])


def generate_candidates(config: GenerateConfig) -> dict:
    """Write `<output_dir>/candidates`, a triplet set whose GT is the removal; resumable.

    Ids are the pictures' own, with `-s<k>` behind them where several seeds were used. What another
    remover, other settings or other pictures left there is written anew.

    Returns:
        `{"n_images", "n_removals", "seconds", "removals_per_second", "num_processes"}`.

    Raises:
        ValueError: there are no pictures, or two of the sets share ids.
    """
    from accelerate import PartialState

    # Unlike `Accelerator`, it does not ask the environment whether it shall stay on the CPU, and
    # would take each of several CPU processes for the only one.
    state = PartialState(cpu=sharding.find_device() == "cpu")
    triplets = read_triplets(config.meta_path, require_gt=False)[config.start :]
    triplets = triplets[: config.count] if config.count else triplets
    if not triplets:
        raise ValueError(f"no pictures at {config.meta_path} from number {config.start} on")
    wanted = [
        (t, k, config.start + i)
        for i, t in enumerate(triplets)
        for k in range(config.seeds_per_image)
    ]
    names = [_name(t, k, config) for t, k, _ in wanted]
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ValueError(f"{config.meta_path} share ids, such as {twice}: merge the sets first")
    folder = Path(config.output_dir) / "candidates"
    if state.is_main_process:
        _open_candidates(folder, config)
    state.wait_for_everyone()
    started, made = time.time(), 0
    methods = _list_methods(config)
    with TripletWriter(folder, part=f"rank{state.process_index}") as writer:
        mine = [
            (t, k, n)
            for t, k, n in wanted[state.process_index :: state.num_processes]
            if _name(t, k, config) not in writer.done_ids
        ]
        for turn, method in enumerate(methods):
            todo = [item for item in mine if item[2] % len(methods) == turn]
            remove = _open_method(method, config, state.device) if todo else None
            for begin in range(0, len(todo), 4 * config.batch_size):
                part = todo[begin : begin + 4 * config.batch_size]
                pictures = [load_images(t) for t, _, _ in part]
                wide = [
                    masks.dilate_mask(masks.binarise_mask(p["mask"]), _find_dilation(k, config))
                    for p, (_, k, _) in zip(pictures, part)
                ]
                removed = remove(
                    [p["source"] for p in pictures],
                    wide,
                    [n * config.seeds_per_image + k for _, k, n in part],
                )
                for (triplet, k, _), result in zip(part, removed):
                    extra = {
                        **triplet.extra,
                        "remover": method,
                        "seed": k,
                        "dilate": _find_dilation(k, config),
                        "group": triplet.group,
                    }
                    writer.add(
                        id=_name(triplet, k, config),
                        source=triplet.source,
                        mask=triplet.mask,
                        gt=result,
                        **extra,
                    )
                made += len(part)
                rate = made / (time.time() - started)
                logger.info(
                    "%d of %d removals  %.1f a second  %d s left",
                    made,
                    len(mine),
                    rate,
                    (len(mine) - made) / rate,
                )
    state.wait_for_everyone()
    if state.is_main_process:
        TripletWriter(folder).close()
    seconds = time.time() - started
    metrics = {
        "n_images": len(triplets),
        "n_removals": len(wanted),
        "seconds": round(seconds, 2),
        "removals_per_second": round(made / seconds, 2),
        "num_processes": state.num_processes,
    }
    if state.is_main_process:
        write_json(Path(config.output_dir) / "train_metrics.json", metrics)
    state.wait_for_everyone()
    return metrics


def _list_methods(config: GenerateConfig) -> list[str]:
    return [config.pretrained_model_name_or_path, *config.also]


def _find_dilation(k: int, config: GenerateConfig) -> int:
    """By how many pixels the mask of a picture's removal number `k` is widened."""
    return config.dilate[k % len(config.dilate)]


def _open_method(method: str, config: GenerateConfig, device):
    """A method as a function of sources, masks and noise numbers."""
    if method in CLASSICAL:
        return lambda sources, object_masks, _: [
            inpaint_classical(source, mask, method=method)
            for source, mask in zip(sources, object_masks, strict=True)
        ]
    own = method == config.pretrained_model_name_or_path
    pipe = sdxl.load_pipeline(method, device=device, revision=own and config.revision or None)
    return lambda sources, object_masks, numbers: remove_objects(
        pipe,
        sources,
        object_masks,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        strength=config.strength,
        seed=config.seed,
        numbers=numbers,
        batch_size=config.batch_size,
        mixed_precision=config.mixed_precision,
    )


def _open_candidates(folder: Path, config: GenerateConfig) -> None:
    """Clear away candidates of another remover, other settings or pictures; note this run's."""
    models = [Path(sdxl.resolve_model(m)) for m in _list_methods(config) if m not in CLASSICAL]
    settings = dataclasses.asdict(config) | {
        "weights": [hash_file(p) for m in models for p in sorted(m.glob("unet/*.safetensors"))],
        "sets": [hash_file(resolve_meta(path)) for path in config.meta_path],
    }
    for name in ("output_dir", "batch_size", "meta_path"):
        settings.pop(name)
    marker = folder / "settings.json"
    if marker.is_file() and read_json(marker) == settings:
        return
    if folder.exists():
        logger.info("%s was made with other settings: it is written anew", folder)
        remove_folder(folder)
    write_json(marker, settings)


def _name(triplet, k: int, config: GenerateConfig) -> str:
    return triplet.id if config.seeds_per_image == 1 else f"{triplet.id}-s{k}"


def main(arguments: list[str] | None = None) -> None:
    options.run_job(generate_candidates, options.parse_config(GenerateConfig, arguments))


if __name__ == "__main__":
    main()
