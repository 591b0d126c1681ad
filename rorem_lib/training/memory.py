"""What a training step costs in FLOPs, and two settings that make it fast on a CPU."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import math
import os

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# What a GPU multiplies at most in bf16 without sparsity and with float32 sums, TFLOP per second, by
# words of its name; the first row that fits counts. From the makers' data sheets.
PEAK_TFLOPS = (
    ("H100 PCIe", 756),
    ("H100 NVL", 835),
    ("H100", 989),
    ("H200 NVL", 835),
    ("H200", 989),
    ("GH200", 989),
    ("H800 PCIe", 756),
    ("H800", 989),
    ("H20", 148),
    ("B200", 2250),
    ("A100", 312),
    ("A800", 312),
    ("A40", 149.7),
    ("A30", 165),
    ("A10", 125),
    ("L40S", 362),
    ("L40", 181),
    ("L4", 121),
    ("RTX 6000 Ada", 364),
    ("RTX A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71),
    ("MI300X", 1307),
)
# mallopt's M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
_KEEP_MEMORY = ((-4, 0), (-1, 2**31 - 1), (-2, 2**28))


def tune_cpu() -> None:
    """Make this process's training on a CPU faster, with the same numbers; for a job's start.

    Two settings, together worth a quarter of a float32 step (`tests/benchmarks/bench_training.py`):

    - Freed memory is kept (glibc) instead of giving every large tensor's pages back to the system
      and asking for them again.
    - float32 matrix products go to oneDNN, on AMD's processors twice as fast as MKL. PyTorch does
      so only where products may be rounded to bf16; without AMX units oneDNN does not round them,
      which is tried here, and taken back where it does. (`torch.get_float32_matmul_precision`
      then raises an error, which inductor's max-autotune meets.)
    """
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _KEEP_MEMORY:
            mallopt(parameter, value)
    if torch.cpu.get_capabilities().get("amx_tile"):
        return
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 512, generator=generator) for _ in range(2))
    exact = F.linear(a.double(), b.double())
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    if (F.linear(a, b) - exact).abs().max() > 1e-5 * exact.abs().max():
        torch.backends.mkldnn.matmul.fp32_precision = "none"


def count_flops(unet, height: int, width: int, *, encoder_tokens: int = 77) -> float:
    """FLOPs of one image through a UNet, forward, 2 a multiply-add, all matrix products.

    They are counted on a copy without data (the meta device), in no time and on any machine.
    Training takes 3 times as many: backward costs two forwards. Work that is saved (keys and
    values of a shared prompt) or done twice (gradient checkpointing) does not change the number,
    as MFU wants it. SDXL-inpainting at 512 px: 1.589e12.

    Args:
        unet: a `UNet2DConditionModel` of the SDXL kind on any device; it is not run.
        height: of the latents.
        width: of the latents.
        encoder_tokens: length of the prompt.
    """
    model = _copy_to_meta(unet)
    model.set_attn_processor(AttnProcessor())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _run_once(model, height, width, encoder_tokens)
    return float(counter.get_total_flops())


def get_peak_flops(device) -> float | None:
    """FLOPs per second a GPU can do at most in dense bf16; None where that is not known.

    `ROREM_PEAK_TFLOPS` (in 10^12 per second) goes before the table, on CPUs too.

    Raises:
        ValueError: the variable is not a number above 0.
    """
    if given := os.environ.get("ROREM_PEAK_TFLOPS"):
        try:
            peak = float(given)
        except ValueError:
            peak = math.nan
        if not 0 < peak < math.inf:
            raise ValueError(
                f"ROREM_PEAK_TFLOPS is {given!r}: give the device's peak in TFLOP a "
                "second, for example 989, or unset it"
            )
        return peak * 1e12
    device = torch.device(device)
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    if {"D", "Laptop", "MIG"} & set(words):  # less than the name promises
        return None
    return next(
        (peak * 1e12 for name, peak in PEAK_TFLOPS if set(name.split()) <= set(words)), None
    )


def _copy_to_meta(unet):
    """A copy without data: same layers, LoRA included, same `requires_grad`."""
    memo = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in unet.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in unet.buffers()}
    return copy.deepcopy(unet, memo)


def _run_once(model, height: int, width: int, tokens: int) -> None:
    """One image through a UNet on the meta device."""
    config = model.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    with torch.device("meta"):
        model(
            torch.empty(1, config.in_channels, height, width),
            torch.empty(1, dtype=torch.int64),
            torch.empty(1, tokens, config.cross_attention_dim),
            added_cond_kwargs={
                "text_embeds": torch.empty(1, pooled),
                "time_ids": torch.empty(1, 6),
            },
        )
