"""Attention processors, memory layout and compilation of a UNet that is trained."""

from __future__ import annotations

import os
import shutil

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.utils import is_xformers_available

# All blocks share one line of code: two widths x shapes x lengths of chunks x modes of graphs.
# More than this many would end the training.
COMPILED_GRAPHS = 1024


class SharedPromptAttention:
    """Cross-attention whose prompt is the same for the whole batch, as in RORem's training.

    Keys and values are projected once instead of once a sample (3 % of SDXL's FLOPs at 512 px);
    their gradients are the sums over the batch, as they would be otherwise. The prompt counts as
    shared when its states have one row, [1, L, C], or are a view of one, `states.expand(B, -1,
    -1)`. Anything else is projected row by row, so guidance with two prompts stays right. The
    processor has no parameters and no state.

    Args:
        fused: PyTorch's fused attention on keys and values expanded to the batch; else plain
            attention of all queries of the batch in one product, which is faster on CPUs.
    """

    def __init__(self, *, fused: bool):
        self.fused = fused
        self.stock = AttnProcessor2_0() if fused else AttnProcessor()

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, temb=None):
        """[B, N, C] and [1 or B, L, D] -> [B, N, C]; see `Attention.forward`."""
        states, batch = encoder_hidden_states, hidden_states.shape[0]
        shared = attention_mask is None and (states.shape[0] == 1 or states.stride(0) == 0)
        if not shared:
            return self.stock(attn, hidden_states, states, attention_mask, temb)
        states = states[:1]
        if not self.fused:  # B samples with N queries each are one sample with B x N of them
            flat = hidden_states.flatten(0, 1)[None]
            return self.stock(attn, flat, states).view_as(hidden_states)
        query, key, value = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (attn.to_q(hidden_states), attn.to_k(states), attn.to_v(states))
        )
        key, value = (x.expand(batch, -1, -1, -1) for x in (key, value))
        result = F.scaled_dot_product_attention(query, key, value)
        result = attn.to_out[0](result.transpose(1, 2).flatten(2))
        return attn.to_out[1](result)


def set_attention(unet, *, xformers: bool = False) -> None:
    """Give every attention layer the processor that trains fastest on the UNet's device.

    Self-attention stays diffusers' own: fused on GPUs, plain on CPUs, where the fused one's
    backward pass is slow at the few tokens of small latents. Cross-attention becomes
    `SharedPromptAttention`. Names of weights do not change.

    Args:
        unet: a `UNet2DConditionModel`, with or without LoRA layers, on its device.
        xformers: xformers' kernels for all layers instead; the prompt's states must then be given
            for each sample, [B, L, C], expanded or not.

    Raises:
        ValueError: xformers is asked for and is not installed, or there is no GPU.
    """
    if xformers:
        requested = "enable_xformers_memory_efficient_attention"
        if not is_xformers_available():
            raise ValueError(
                f"{requested}: xformers is not installed: run `pip install -c requirements/"
                'constraints.txt -e ".[xformers]"`, or leave the option off (attention is fused '
                "without it)"
            )
        if unet.device.type != "cuda":
            raise ValueError(
                f"{requested} needs an NVIDIA GPU and the model is on "
                f"{unet.device.type}: leave the option off"
            )
        unet.enable_xformers_memory_efficient_attention()
        return
    fused = unet.device.type != "cpu"
    stock = AttnProcessor2_0() if fused else AttnProcessor()
    shared = SharedPromptAttention(fused=fused)
    unet.set_attn_processor(
        {
            f"{name}.processor": shared if _is_plain_cross_attention(module) else stock
            for name, module in unet.named_modules()
            if isinstance(module, Attention)
        }
    )


def _is_plain_cross_attention(attn: Attention) -> bool:
    """Whether a layer is as SDXL's are: no norms or residuals of its own."""
    extras = (attn.group_norm, attn.spatial_norm, attn.norm_cross, attn.norm_q, attn.norm_k)
    return (
        attn.is_cross_attention
        and not any(extras)
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
        and attn.scale_qk
    )


def prepare_training(unet, *, xformers: bool = False, channels_last: bool | None = None):
    """Unfreeze a UNet and lay it out for training on its device; see `set_attention`.

    Args:
        unet: on the device that trains it.
        xformers: see `set_attention`.
        channels_last: the weights' memory layout; None takes it on GPUs. On a CPU it gains nothing.
    """
    unet.requires_grad_(True).train()
    set_attention(unet, xformers=xformers)
    if channels_last or (channels_last is None and unet.device.type != "cpu"):
        unet.to(memory_format=torch.channels_last)
    return unet


def compile_unet(unet, *, backend: str = "inductor") -> None:
    """Compile the repeated transformer blocks in place; names of weights do not change.

    Each size of latents gets graphs of its own at its first step, which then takes longer.

    Args:
        unet: the model, its attention and LoRA layers already set.
        backend: `torch.compile`'s.

    Raises:
        ValueError: there is no compiler that could build the generated code.
    """
    gpu = unet.device.type == "cuda"
    variable, names = ("CC", ("gcc", "clang", "cc")) if gpu else ("CXX", ("g++", "clang++", "c++"))
    requested = os.environ.get(variable, "").split()[:1]
    if backend == "inductor" and not any(map(shutil.which, requested or names)):
        raise ValueError(
            f"torch_compile needs a {'C' if gpu else 'C++'} compiler and there is "
            f"no {' or '.join(requested or names)} here: install one (for example "
            f"`apt-get install g++`), name it in {variable}, or set torch_compile "
            "to false"
        )
    # All blocks share one line of code, so the limit counts the graphs of all of them together.
    options = torch.compiler.config
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(options, limit, max(getattr(options, limit), COMPILED_GRAPHS))
    unet.compile_repeated_blocks(backend=backend, fullgraph=True, dynamic=False)
