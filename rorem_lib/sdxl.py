"""The SDXL-inpainting stack: open it (Hub, folder or built in), prompts, time ids, latents.

Every stage opens models here and nowhere else, so the small model that ships in this package runs
through the same code as `diffusers/stable-diffusion-xl-1.0-inpainting-0.1`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

BUILTIN_FOLDER = Path(__file__).parent / "builtin"
BASE_MODEL = "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"  # upstream's starting point
MODEL_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler")


@contextlib.contextmanager
def silence_libraries():
    """diffusers' and transformers' loading bars and notes would drown a notebook's own lines."""
    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels):
            library.set_verbosity(level)
            library.enable_progress_bar()


with silence_libraries():  # they remark that torchvision is missing, which is as it should be
    from diffusers import (
        AutoPipelineForInpainting,
        StableDiffusionXLInpaintPipeline,
        UNet2DConditionModel,
    )


def resolve_model(model_id: str) -> str:
    """`builtin` -> the folder that ships in this package; a folder or a Hub id stays itself.

    Raises:
        FileNotFoundError: a path was given that holds no model.
    """
    if str(model_id) == "builtin":
        if not (BUILTIN_FOLDER / "model_index.json").is_file():
            raise FileNotFoundError(f"{BUILTIN_FOLDER} holds no model: reinstall the package, or "
                                    "make it again with `python -m rorem_lib.pretrain all`")
        return str(BUILTIN_FOLDER)
    path = Path(model_id)
    if path.is_absolute() or str(model_id).startswith((".", "~", "runs/")):
        path = path.expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"there is no model folder {path}: run the stage that makes "
                                    "it, or take `builtin` or a Hub id")
        return str(path)
    return str(model_id)


def load_pipeline(model_id: str = "builtin", *, revision: str | None = None,
                  variant: str | None = None, dtype: torch.dtype = torch.float32,
                  device: str | torch.device = "cpu", base_model: str = BASE_MODEL,
                  local_files_only: bool = False) -> StableDiffusionXLInpaintPipeline:
    """Open an SDXL-inpainting pipeline.

    Args:
        model_id: `builtin`, a pipeline folder, a Hub id, or a folder that holds a UNet alone (as
            upstream's trainer writes it), which is opened over `base_model`.
        revision: the Hub commit, tag or branch; pin it.
        variant: weight files' variant, for example `fp16`.
        dtype: the type of all weights in memory.
        device: where the weights go.
        base_model: what the rest of the pipeline comes from when `model_id` is a UNet alone.
        local_files_only: never ask the network.

    Returns:
        The pipeline, its progress bar off, its modules frozen and in evaluation mode.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the UNet does not take 9 channels, so it is not an inpainting model.
    """
    folder = resolve_model(model_id)
    common = {"revision": revision, "variant": variant, "local_files_only": local_files_only}
    with silence_libraries():
        if Path(folder).is_dir() and not (Path(folder) / "model_index.json").is_file():
            inner = Path(folder) / "unet" if (Path(folder) / "unet").is_dir() else Path(folder)
            if not (inner / "config.json").is_file():
                raise FileNotFoundError(f"{folder} holds neither a pipeline (model_index.json) "
                                        "nor a UNet (config.json)")
            unet = UNet2DConditionModel.from_pretrained(inner, dtype=dtype, variant=variant)
            pipe = AutoPipelineForInpainting.from_pretrained(
                resolve_model(base_model), unet=unet, dtype=dtype,
                local_files_only=local_files_only)
        else:
            pipe = AutoPipelineForInpainting.from_pretrained(folder, dtype=dtype, **common)
    if pipe.unet.config.in_channels != 9:
        raise ValueError(f"{model_id} is no inpainting model: its UNet takes "
                         f"{pipe.unet.config.in_channels} channels instead of 9")
    for name in MODEL_PARTS[:-1]:
        getattr(pipe, name).requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def choose_precision(wish: str, device="cpu") -> str:
    """What "auto" means on this machine: "bf16" where matrix units take it, else "no".

    Args:
        wish: "auto", "no", "bf16" or "fp16"; all but "auto" are returned as they are.
        device: where the model runs. On CPUs bf16 pays where there are instructions for it (AMX,
            avx512_bf16: training is 1.3 times as fast); elsewhere it is slower than float32.
    """
    if wish != "auto":
        return wish
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "no"


def prepare_training(unet):
    """Unfreeze a UNet and lay it out for training on its device.

    On a CPU plain attention trains 1.25 times as fast as the fused one, whose backward pass is slow
    at the few tokens of small latents, and channels_last gains nothing.
    """
    unet.requires_grad_(True).train()
    if unet.device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())
        return unet
    return unet.to(memory_format=torch.channels_last)


def autocast(precision: str, device="cpu"):
    """The autocast context of a precision that `choose_precision` returned."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(device).type, dtype, enabled=precision != "no")


def encode_prompt(pipe, prompt: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Text conditioning as SDXL has it: ([1, L, C] penultimate states, [1, P] pooled).

    RORem trains and removes with the empty prompt; its embedding is that of "", not zeros
    (RORem, sec. 3.3).
    """
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False,
                                                  device=pipe.unet.device)
    return embeds, pooled


def make_time_ids(height: int, width: int, batch: int = 1, *, device="cpu") -> torch.Tensor:
    """SDXL's micro-conditioning [batch, 6]: original size, crop corner (0, 0), target size (px)."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32,
                        device=device).repeat(batch, 1)


def encode_images(vae, images: torch.Tensor, *, generator=None) -> torch.Tensor:
    """[B, 3, H, W] in -1..1 -> scaled latents [B, 4, H / f, W / f].

    Takes the mode of `AutoencoderKL`'s posterior when `generator` is None, else a sample;
    `AutoencoderTiny` has no posterior.
    """
    encoded = vae.encode(images)
    if hasattr(encoded, "latent_dist"):
        latents = (encoded.latent_dist.mode() if generator is None
                   else encoded.latent_dist.sample(generator))
    else:
        latents = encoded.latents
    return latents * vae.config.scaling_factor


def decode_latents(vae, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents -> images [B, 3, H, W], clipped to -1..1."""
    return vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)


def to_tensor(images) -> torch.Tensor:
    """uint8 [B, H, W, 3] (array or tensor) -> float32 [B, 3, H, W] in -1..1."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_bytes(images: torch.Tensor):
    """[B, 3, H, W] in -1..1 -> uint8 array [B, H, W, 3]."""
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def mask_source(source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Blank the hole: source [B, 3, H, W] in -1..1, mask [B, 1, H, W] in {0, 1} -> mid-grey hole.

    Hiding the object from the UNet is what avoids ghosts of it (RORem, sec. 3.3).
    """
    return source * (mask < 0.5)


def shrink_mask(mask: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """[B, 1, H, W] -> the latents' size by nearest neighbour, as the pipeline does."""
    return F.interpolate(mask.float(), size=latents.shape[-2:], mode="nearest")
