"""What a training step costs in FLOPs and memory, and two settings that make it fast on a CPU.

Costs are counted on copies without data (the meta device), so that a model can be measured before
a byte of it is computed, and on any machine.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import math
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

# What a GPU multiplies at most in bf16 without sparsity and with float32 sums, TFLOP a second, by
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
# Gradients of activations, work space and fragments, as a factor on what is kept for backward.
# On an H100 SDXL's UNet took what was counted, without any (512 px, batch 16, bf16: 71.4 GB).
ACTIVATION_MARGIN = 1.2


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


def find_peak_flops(device) -> float | None:
    """FLOPs a second a GPU can do at most in dense bf16; None where that is not known.

    `ROREM_PEAK_TFLOPS` (in 10^12 a second) goes before the table, on CPUs too.

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


def count_activation_bytes(
    unet, height: int, width: int, *, precision: str = "no", encoder_tokens: int = 77
) -> int:
    """Bytes of activations that one image keeps for the backward pass without checkpointing.

    Every storage counts once; weights do not count. Frozen layers keep less, so LoRA's need is
    counted as it is. Attention counts as fused, on CPUs as plain (see `set_attention`).

    Args:
        unet: a `UNet2DConditionModel` of the SDXL kind on the device that trains it; not run.
        height: of the latents.
        width: of the latents.
        precision: "no", "bf16" or "fp16": what autocast keeps in which type is imitated.
        encoder_tokens: length of the prompt.
    """
    on_cpu = unet.device.type == "cpu"
    model = _copy_to_meta(unet)
    model.disable_gradient_checkpointing()
    model.set_attn_processor(AttnProcessor() if on_cpu else AttnProcessor2_0())
    model.train()
    if precision != "no":
        _imitate_autocast(model, norms=not on_cpu)
    weights = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, or its address could be given out again
        return tensor

    with _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _run_once(model, height, width, encoder_tokens)
    return sum(storage.nbytes() for storage in kept.values())


def choose_checkpointing(
    unet,
    sizes: Sequence[tuple[int, int]],
    batch_size: int,
    *,
    bytes_free: int,
    states_bytes: int,
    gradients_bytes: int,
    gradients_stay: bool,
    precision: str,
) -> bool:
    """Whether gradient checkpointing is needed for a micro-batch to fit in memory.

    Checkpointing computes the forward pass twice (a third more work), so it is for those who must.
    It is needed when states, the copies of the weights that autocast keeps (2 bytes a weight) and
    `ACTIVATION_MARGIN` times the activations of the largest size are more than what is free.
    Gradients that are made anew at each step come while activations go: when the most of them are
    there, the half of the activations is left, the down blocks'.

    Args:
        unet: the model as it will be trained, on its device, before it is wrapped or compiled.
        sizes: (height, width) of all latents that occur.
        batch_size: samples of one forward pass.
        bytes_free: memory that is free now on the device (of the fullest one).
        states_bytes: what of it optimizer and averages will take on one device, and the weights,
            where they are not there yet.
        gradients_bytes: what gradients will take.
        gradients_stay: they are there in the forward pass too (DDP's buckets, accumulation).
        precision: "no", "bf16" or "fp16".
    """
    need = states_bytes
    if precision != "no":
        need += 2 * sum(p.numel() for p in unet.parameters())
    activations = batch_size * max(
        count_activation_bytes(unet, height, width, precision=precision)
        for height, width in set(sizes)
    )
    need += max(
        ACTIVATION_MARGIN * activations + gradients_stay * gradients_bytes,
        activations / 2 + gradients_bytes,
    )
    return need > bytes_free


def _copy_to_meta(unet):
    """A copy without data: same layers, LoRA included, same `requires_grad`."""
    memo = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in unet.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in unet.buffers()}
    return copy.deepcopy(unet, memo)


def _imitate_autocast(model, *, norms: bool) -> None:
    """Give each layer the types autocast gives it; there is no autocast for the meta device.

    Matrix products take half precision. Norms take float32 on GPUs (`norms`), not on CPUs.
    """

    def cast(dtype):
        return lambda module, inputs: (inputs[0].to(dtype), *inputs[1:])

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(torch.bfloat16).register_forward_pre_hook(cast(torch.bfloat16))
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and norms:
            module.register_forward_pre_hook(cast(torch.float32))


class _FusedAttention(TorchFunctionMode):
    """Fused attention on the meta device, where PyTorch takes the plain one and keeps N x N scores.

    Flash and memory-efficient kernels keep the same: their inputs, the output, a number a query.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **(kwargs or {}))


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
