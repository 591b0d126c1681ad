"""LoRA on the UNet: add it to a model for training, write it, read it, merge it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from diffusers import StableDiffusionXLInpaintPipeline
from huggingface_hub import hf_hub_download
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file

from rorem_lib.models import sdxl

LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
]


def add_lora(unet, rank: int, targets=LORA_TARGETS) -> None:
    """Freeze a UNet and add LoRA layers of `rank` (and alpha) to it, which start without effect.

    Raises:
        ValueError: the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"a LoRA rank of {rank} has no weights: take 1 or more")
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)))


def save_lora(unet, folder: Path) -> None:
    """Write a UNet's LoRA as `load_lora_weights` of stock diffusers reads it.

    In peft's own names. diffusers' older names exist for the attention layers alone, and its loader
    silently drops one kind from a file that mixes both. The size that the UNet was trained at goes
    into the file's metadata, as it goes into a UNet's config.
    """
    metadata = {"format": "pt"}
    if size := unet.config.get(sdxl.TRAINED_RESOLUTION):
        metadata[sdxl.TRAINED_RESOLUTION] = str(size)
    StableDiffusionXLInpaintPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        save_function=partial(save_file, metadata=metadata),
    )


def load_lora(pipe, folder) -> None:
    """Merge a LoRA that `save_lora` wrote into a pipeline's UNet: it costs no time then.

    The pipeline then works at the size that the LoRA was trained at, where the LoRA says it.

    Args:
        pipe: of `sdxl.load_pipeline`.
        folder: its folder or Hub id.

    Raises:
        OSError: there is no `LORA_FILE` in the folder.
    """
    # Named, since diffusers refuses to look for the file itself where the network is switched off.
    found = sdxl.resolve_model(folder)
    with sdxl.silence_libraries():
        pipe.load_lora_weights(found, weight_name=LORA_FILE)
        pipe.fuse_lora(components=["unet"])
        pipe.unload_lora_weights()
    path = Path(found, LORA_FILE) if Path(found).is_dir() else hf_hub_download(found, LORA_FILE)
    with safe_open(path, "pt") as file:
        size = (file.metadata() or {}).get(sdxl.TRAINED_RESOLUTION, "")
    if size.isdecimal():
        sdxl.set_resolution(pipe, pipe.unet, int(size))


def merge_lora(unet) -> None:
    """Add a UNet's LoRA to its weights and take the layers away: it is a plain UNet again."""
    unet.fuse_lora()
    unet.unload_lora()
