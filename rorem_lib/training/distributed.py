"""What differs between one process, DDP, DeepSpeed's ZeRO-2 and PyTorch's FSDP2.

Which of them a training uses is `accelerate launch`'s matter (the files in
`notebooks/recipes/accelerate`); the loop calls these functions and needs not know. DDP keeps the
whole model on each process. ZeRO-2 divides gradients, float32 weights and Adam's moments, and each
process computes with a whole copy in the mixed precision. FSDP2 divides the weights as well.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import logging
import math
import os
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    recursively_apply,
)
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor, distribute_tensor

from rorem_lib.files import is_full

logger = logging.getLogger(__name__)

PATIENCE = timedelta(hours=2)  # that processes wait for each other


def get_device() -> str:
    """The kind of device accelerate will take, known before an `Accelerator` exists."""
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return "cuda" if torch.cuda.is_available() and not use_cpu else "cpu"


def make_handlers(device: str) -> list:
    """`kwargs_handlers` for `Accelerator`: how its processes are joined.

    The main process writes tens of GB while the others wait: the usual limit of 10 minutes is too
    short for that. DeepSpeed on a CPU would not choose gloo itself.

    Args:
        device: "cpu" or "cuda", see `get_device`.
    """
    limits = {"timeout": PATIENCE}
    if device == "cpu" and is_asked_for("DEEPSPEED"):
        limits["backend"] = "gloo"
    # one copy of the gradients instead of two: 10 GB of an SDXL's
    return [
        InitProcessGroupKwargs(**limits),
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
    ]


def is_asked_for(name: str) -> bool:
    """Whether the launcher asked for "DEEPSPEED" or "FSDP"."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes")


def get_kind(accelerator) -> str:
    """ "one", "DDP", "ZeRO-2" or "FSDP2" (also "ZeRO-1", "ZeRO-3", "FSDP1" before `prepare`)."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    if kind == DistributedType.FSDP:
        return f"FSDP{accelerator.state.fsdp_plugin.fsdp_version}"
    return "one" if kind == DistributedType.NO else "DDP"


def is_divided(accelerator) -> bool:
    """Whether weights or the optimizer's states are divided among the processes."""
    return accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def get_precision(accelerator) -> str:
    """What is really computed in: "no" (float32), "bf16" or "fp16"."""
    return "no" if _is_half_on_cpu(accelerator) else accelerator.mixed_precision


def count_global_batch(accelerator, config) -> int:
    """Samples an optimizer step, on all processes together."""
    return config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes


def describe(accelerator, config) -> str:
    """The line a training starts with, such as "8 processes, ZeRO-2, bf16, global batch 128"."""
    count, kind = accelerator.num_processes, get_kind(accelerator)
    precision = get_precision(accelerator)
    words = [
        f"{count} process{'es' if count > 1 else ''}",
        *([kind] if kind != "one" else []),
        "fp32" if precision == "no" else precision,
        f"global batch {count_global_batch(accelerator, config)}",
    ]
    return ", ".join(words)


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """A block that fails on all processes where it fails on one, so that none waits for another.

    To be entered on all of them. One that is killed ends the launch: the launcher ends the others.

    Raises:
        Exception: what this process met.
        OSError: (ENOSPC) another process met a full disk.
        RuntimeError: another process failed; says which one, and what it met.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    here = [] if error is None else [(PartialState().process_index, is_full(error), str(error))]
    failed = gather_object(here)
    if error is not None:
        raise error
    for number, full, text in failed:
        told = OSError(errno.ENOSPC, text) if full else RuntimeError(f"process {number}: {text}")
        told.elsewhere = True  # for who looks for the first error, see `runner.launch.note_error`
        raise told


def ask_main(function: Callable[[], object]):
    """What a function gives on the main process, on all of them; it is called there alone.

    On a network file system the others may still see an older state of a folder.

    Raises:
        Exception: as `failing_together`.
    """
    with failing_together():
        found = [function() if PartialState().is_main_process else None]
    return broadcast_object_list(found)[0]


def _is_half_on_cpu(accelerator) -> bool:
    return (
        accelerator.mixed_precision == "fp16"
        and accelerator.device.type == "cpu"
        and accelerator.distributed_type != DistributedType.DEEPSPEED
    )


def prepare(accelerator, model, optimizer, config):
    """`Accelerator.prepare` for a model and its optimizer.

    The parameters may be others afterwards: ask `list_trained` again, and make the scheduler from
    the optimizer that is returned (with its states offloaded, ZeRO-2 uses one of its own).

    Raises:
        ValueError: ZeRO-3 or FSDP1, which the hardware files do not offer.
    """
    kind = get_kind(accelerator)
    if kind in ("FSDP1", "ZeRO-3"):
        raise ValueError(
            f"{kind} is not supported: set fsdp_version to 2, or zero_stage to 2, in "
            "the file that --config_file names (fsdp2.yaml, deepspeed_zero2.yaml)"
        )
    if _is_half_on_cpu(accelerator):
        logger.warning("mixed_precision fp16 needs a GPU: this trains in float32")
    for name in ("FSDP", "DEEPSPEED"):
        if is_asked_for(name) and not is_divided(accelerator):
            logger.warning(
                "the hardware file asks for %s, which needs several GPUs: this trains "
                "with a whole copy of the model on each process",
                name,
            )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # Only a data loader that goes through `prepare` would tell it the batch; "auto" means 1 for
        # the clipping, whatever max_grad_norm says; and the file's number of micro-batches would
        # win over the option.
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = config.train_batch_size
        settings["gradient_accumulation_steps"] = config.gradient_accumulation_steps
        settings["gradient_clipping"] = float(max(config.max_grad_norm, 0))
        # Autocast is off under DeepSpeed, which turns the weights alone into bf16.
        model.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
    elif accelerator.distributed_type == DistributedType.FSDP:
        model.to(memory_format=torch.contiguous_format)  # it takes no other
        plugin = accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:  # sum gradients as DDP does, in float32
            plugin.mixed_precision_policy = dataclasses.replace(
                plugin.mixed_precision_policy, reduce_dtype=torch.float32
            )
    return accelerator.prepare(model, optimizer)


def _cast_inputs(module, args, kwargs):
    dtype = next(module.parameters()).dtype
    return recursively_apply(
        lambda tensor: tensor.to(dtype),
        (args, kwargs),
        test_type=lambda x: torch.is_tensor(x) and x.is_floating_point(),
    )


def backward(accelerator, loss: torch.Tensor, *, last: bool = True) -> None:
    """`Accelerator.backward` for one chunk of a micro-batch.

    Args:
        last: whether it is the micro-batch's last: DeepSpeed takes the optimizer's step within the
            backward pass, and must not take one for each chunk.
    """
    if last or accelerator.distributed_type != DistributedType.DEEPSPEED:
        accelerator.backward(loss)
    else:
        accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=False)


def list_trained(model) -> list[torch.nn.Parameter]:
    """The parameters that are trained, in the model's order; to be asked after `prepare`."""
    return [p for p in model.parameters() if p.requires_grad]


def clip(accelerator, model, max_norm: float):
    """Clip the gradients to a total norm and return the norm they had.

    Args:
        model: the prepared model; all its parameters are looked at, since accelerate's FSDP would
            not know a part of them as its own. Those without a gradient do not count.
        max_norm: the limit; 0 clips nothing.

    Returns:
        The norm (a scalar tensor or a number), or None where DeepSpeed has none yet. DeepSpeed
        has stepped already when this is called, and has clipped by the value `prepare` gave it.
    """
    limit = max_norm if max_norm > 0 else math.inf
    norm = accelerator.clip_grad_norm_(list(model.parameters()), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class Average(EMAModel):
    """The moving average of the trained weights (EMA), in float32 and divided as they are.

    What is stored is whole: it can be loaded on another number of processes. Under FSDP2 its
    `state_dict` and `load_state_dict` have to be called on all processes.

    Args:
        trained: `list_trained` of the prepared model.
        decay: of the average; a warm-up of power 3/4 leads to it.
    """

    def __init__(self, trained, *, decay: float, foreach: bool = False):
        super().__init__(trained, decay=decay, use_ema_warmup=True, power=0.75, foreach=foreach)
        self.to(dtype=torch.float32)  # of weights in bf16 too: small steps would be rounded off

    @contextlib.contextmanager
    def in_place(self, trained, *, rounded: bool = False) -> Iterator[None]:
        """A block in which the weights are the averaged ones; afterwards all is as before.

        Args:
            trained: the parameters.
            rounded: they are in lower precision than the average (ZeRO-2): a copy is kept on the
                CPU. Else both change places, which takes no memory.
        """
        if rounded:
            self.store(trained)
            self.copy_to(trained)
        else:
            self._swap(trained)
        try:
            yield
        finally:
            self.restore(trained) if rounded else self._swap(trained)

    @torch.no_grad()
    def _swap(self, trained) -> None:
        for parameter, shadow in zip(trained, self.shadow_params, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(shadow)
            shadow.copy_(kept)

    def state_dict(self) -> dict:
        return {**super().state_dict(), "shadow_params": [_gather(p) for p in self.shadow_params]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a state; the average stays on its device, divided and laid out as it is."""
        numbers = dict(state_dict)
        loaded = numbers.pop("shadow_params")
        super().load_state_dict(numbers)
        for shadow, whole in zip(self.shadow_params, loaded, strict=True):
            shadow.copy_(_divide(whole, shadow))


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def _divide(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if isinstance(like, DTensor):
        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)
    return whole


def copy_structure(accelerator, model):
    """A copy of a model without its weights, to be filled by `gather_model`; before `prepare`.

    Returns:
        The copy, its parameters on the meta device; None where `prepare` leaves the model whole.
    """
    if not is_divided(accelerator):
        return None
    # deepcopy takes what is in `memo` as copied already: 10 GB that are not copied
    memo = {
        id(p): torch.nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


@torch.no_grad()
def gather_state(accelerator, model, ema: Average | None = None) -> dict[str, torch.Tensor]:
    """The whole state dict, unwrapped names, in the weights' own precision (ZeRO-2: float32).

    To be called on all processes.

    Args:
        ema: takes the averaged weights in the place of the trained ones.

    Returns:
        The state dict on the main process, {} on the others. Under DDP its tensors are the
        model's (or the average's) own, not copies.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        state = accelerator.get_state_dict(model)
        whole = model
    else:
        whole = accelerator.unwrap_model(model)
        state = dict(whole.state_dict())
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        state = _gather_masters(accelerator, whole, state)
    if ema is not None:
        names = [name for name, p in whole.named_parameters() if p.requires_grad]
        for name, shadow in zip(names, ema.shadow_params, strict=True):
            shadow = _gather(shadow)
            if accelerator.is_main_process:
                state[name] = shadow
    return state if accelerator.is_main_process else {}


def _gather_masters(accelerator, module, state: dict) -> dict:
    """Replace ZeRO's bf16 copies by the float32 weights its optimizer steps."""
    from deepspeed.utils import safe_get_full_fp32_param

    state = (
        {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in state.items()
        }
        if accelerator.is_main_process
        else {}
    )
    for name, parameter in module.named_parameters():
        whole = safe_get_full_fp32_param(parameter)  # a sum over all processes
        if whole is not None and accelerator.is_main_process:
            state[name] = whole.cpu()
    return state


def gather_model(accelerator, model, structure, ema: Average | None = None):
    """The whole trained model, ready to be saved. To be called on all processes, at the end.

    Args:
        model: the prepared model.
        structure: what `copy_structure` gave.
        ema: put the averaged weights into it.

    Returns:
        The module on the main process (under ZeRO-2 and FSDP2 on the CPU, in float32), None on
        the others.
    """
    if structure is None:
        if ema is not None:
            ema.copy_to(list_trained(model))
        return accelerator.unwrap_model(model) if accelerator.is_main_process else None
    state = gather_state(accelerator, model, ema)
    if not accelerator.is_main_process:
        return None
    structure.load_state_dict(state, assign=True)
    return structure
