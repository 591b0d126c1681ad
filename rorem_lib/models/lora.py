"""LoRA on the UNet: add it to a model for training, write it, read it, merge it."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch
from diffusers import StableDiffusionXLInpaintPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from huggingface_hub import hf_hub_download
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file

from rorem_lib.models import sdxl

LORA_FILE = "pytorch_lora_weights.safetensors"
# What tools put before the names of a UNet's layers; `transformer.` only where such a layer exists.
PREFIXES = ("base_model.model.", "unet.", "transformer.")
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
    """Merge a LoRA into a pipeline's UNet: it costs no time then.

    Of the kit, peft, diffusers or kohya's trainer: what their names begin with is known. The
    pipeline then works at the size that the LoRA was trained at, where the LoRA says it.

    Args:
        pipe: of `sdxl.load_pipeline`; where the LoRA is refused, it stays as it was.
        folder: its folder or Hub id.

    Raises:
        OSError: there is no `LORA_FILE` in the folder.
        ValueError: tensors that do not fit the UNet, or that are missing; says how many.
    """
    found = sdxl.resolve_model(folder)
    path = Path(found, LORA_FILE) if Path(found).is_dir() else hf_hub_download(found, LORA_FILE)
    with safe_open(path, "pt") as file:
        names, size = list(file.keys()), (file.metadata() or {}).get(sdxl.TRAINED_RESOLUTION, "")
    with sdxl.silence_libraries():
        state, alphas, metadata = _read_lora(pipe, found, path, names)
        check_keys(path, state, _list_wanted(pipe.unet, state))
        pipe.load_lora_into_unet(
            {f"unet.{name}": tensor for name, tensor in state.items()},
            network_alphas=alphas,
            unet=pipe.unet,
            metadata=metadata,
            _pipeline=pipe,
            low_cpu_mem_usage=True,  # no random start, which would draw from torch's generator
        )
        pipe.fuse_lora(components=["unet"])
        pipe.unload_lora_weights()
    if size.isdecimal():
        sdxl.set_resolution(pipe, pipe.unet, int(size))


class PlainWeights:
    """A UNet's weights as they are now, in the CPU's memory, to go back to them bit for bit.

    After a merge, `drop_equal` keeps those alone that it changed.
    """

    def __init__(self, unet):
        self.unet = unet
        self.kept = {name: p.detach().to("cpu", copy=True) for name, p in unet.named_parameters()}

    def drop_equal(self) -> None:
        for name, parameter in self.unet.named_parameters():
            if torch.equal(parameter.detach().cpu(), self.kept[name]):
                del self.kept[name]

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the kept weights into the UNet and keep those that were there."""
        parameters = dict(self.unet.named_parameters())
        for name, kept in self.kept.items():
            before = parameters[name].detach().to("cpu", copy=True)
            parameters[name].copy_(kept)
            self.kept[name] = before


def check_keys(path, found: Collection[str], wanted: Collection[str]) -> None:
    """Refuse adapters of which libraries would drop a part without a word.

    Args:
        path: their file.
        found: the names of its tensors.
        wanted: those that the model has places for.

    Raises:
        ValueError: they are not the same; says how many fit, are left over and are missing.
    """
    found, wanted = set(found), set(wanted)
    over, missing = sorted(found - wanted), sorted(wanted - found)
    if over or missing or not found:
        raise ValueError(
            f"{path} does not fit this model: {len(found & wanted)} of its {len(found)} tensors "
            f"match, {len(over)} are unexpected{_give_example(over)} and {len(missing)} are "
            f"missing{_give_example(missing)}"
        )


def _give_example(names: list[str]) -> str:
    return f" (such as {names[0]})" if names else ""


def _read_lora(pipe, found: str, path, names: list[str]) -> tuple[dict, dict | None, dict | None]:
    """A LoRA's tensors by the names that peft gives them in a UNet, kohya's scales, and the
    settings it was trained with, as `load_lora_into_unet` wants both."""
    try:  # the file is named, since without a network diffusers refuses to look for it itself
        state, alphas, metadata = pipe.lora_state_dict(
            found, weight_name=LORA_FILE, unet_config=pipe.unet.config, return_lora_metadata=True
        )
    except (KeyError, ValueError, IndexError):  # of diffusers' translation of kohya's names
        check_keys(path, names, ())
        raise
    check_keys(path, names, [name for name in names if "dora_scale" not in name])  # it drops them
    plain = {}
    for name, tensor in state.items():
        while prefix := next((p for p in PREFIXES if name.startswith(p)), ""):
            name = name.removeprefix(prefix)
        plain[name] = tensor
    return convert_unet_state_dict_to_peft(plain), alphas, metadata


def _list_wanted(unet, state: dict) -> set[str]:
    """The names of tensors that a LoRA like this has in a UNet: a pair for each layer of a kind
    (its name without the blocks' numbers) of which the file has one that fits."""
    fitting, layers = set(), {}
    for name, module in unet.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            pair = [f"{name}.lora_{letter}.weight" for letter in "AB"]
            down, up = map(state.get, pair)
            layers[name] = pair
            if down is not None and down.shape[1:] == module.weight.shape[1:]:
                fitting.add(_name_kind(name))
            if up is not None and up.shape[0] == module.weight.shape[0]:
                fitting.add(_name_kind(name))
    return {key for name, pair in layers.items() if _name_kind(name) in fitting for key in pair}


def _name_kind(layer: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", layer)


def merge_lora(unet) -> None:
    """Add a UNet's LoRA to its weights and take the layers away: it is a plain UNet again."""
    unet.fuse_lora()
    unet.unload_lora()
