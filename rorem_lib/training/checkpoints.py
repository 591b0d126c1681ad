"""Checkpoints of a training: written beside and renamed, checked before they are loaded.

`<output_dir>/checkpoint-<step>` holds the weights, what accelerate knows of a training (optimizer,
gradient scaler, each process's random state), the weights' average in `ema.safetensors` and,
written last, `step.json` with the settings, the content of what was read and where the schedule
stands. The weights are `unet/` in diffusers' layout where a UNet is trained, else
`model.safetensors`; of a model with adapters, the trained parameters alone. Neither depends on the
number of processes. ZeRO-2 and FSDP2 keep accelerate's own divided files. What accelerate keeps as
pickles is read so that none can run code (`pickles`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import CheckpointException

from rorem_lib import files
from rorem_lib.files import read_json, remove_folder, replace_folder, write_json
from rorem_lib.models import sdxl
from rorem_lib.models.lora import check_keys
from rorem_lib.training import distributed, pickles

logger = logging.getLogger(__name__)

# What may differ between a checkpoint and the run that goes on from it.
FREE_FIELDS = {
    "output_dir",
    "max_train_steps",
    "num_train_epochs",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "logging_steps",
    "logging_dir",
    "report_to",
    "comments",
    "dataloader_num_workers",
    "latent_cache_dir",
    "validation_steps",
    "num_validation_images",
    "validation_meta_path",
    # speed and memory alone
    "gradient_checkpointing",
    "torch_compile",
    "channels_last",
    "allow_tf32",
    "enable_xformers_memory_efficient_attention",
}
# What they come to on this hardware is compared in their place.
HARDWARE_FIELDS = {"train_batch_size", "gradient_accumulation_steps", "mixed_precision"}
# Their content is compared in the place of their paths (`finished.hash_inputs`).
SETS = ("meta_path", "high_resolution_meta_path")
MODELS = (
    "pretrained_model_name_or_path",
    "pretrained_unet",
    "pretrained_vae_model_name_or_path",
    "vae",
    "init_from",
)
_UNET = Path("unet", "diffusion_pytorch_model.safetensors")
_RECORD = set("step config num_processes kind global_batch precision train_size files".split())


def list_checkpoints(folder) -> list[Path]:
    """The complete checkpoints `checkpoint-<step>` of a run, oldest first."""
    return [p for p in _list_folders(folder) if (p / "step.json").is_file()]


def _list_folders(folder) -> list[Path]:
    return sorted(
        (p for p in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)),
        key=_get_step,
    )


def _get_step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


# ------------------------------------------------------------------------------------------ write


def save_checkpoint(
    accelerator,
    config,
    step: int,
    *,
    states: Mapping,
    train_size: int | None = None,
    inputs: dict | None = None,
) -> None:
    """Write `checkpoint-<step>` and remove those that are too many. For all processes at once.

    A killed run leaves either the whole checkpoint under its name or none.

    Args:
        states: what else a training goes on from, by name, each with a `state_dict` of plain
            values, and tensors in its list `shadow_params`.
        train_size: samples of an epoch, where they have an end.
        inputs: the content of what was read, of `finished.hash_inputs`.

    Raises:
        OSError: (ENOSPC) the disk is full; what was written of it is removed, the last good
            checkpoint is intact. On all processes, whichever of them could not write.
    """
    folder = Path(config.output_dir)
    tmp_path = folder / f"checkpoint-{step}.partial"
    if accelerator.is_main_process:
        _clear(folder)
    accelerator.wait_for_everyone()  # none writes before it is cleared
    with writing(accelerator, tmp_path, together=not distributed.is_divided(accelerator)):
        _save_state(accelerator, tmp_path)
        plain = _save_own(accelerator, states, tmp_path)
    record = {
        "step": step,
        "config": dataclasses.asdict(config),
        "num_processes": accelerator.num_processes,
        "kind": distributed.get_kind(accelerator),
        **_describe_training(accelerator, config, train_size),
        "inputs": inputs,
        "states": plain,
    }
    with writing(accelerator, tmp_path):
        if accelerator.is_main_process:
            _complete(tmp_path, record, config)


@contextlib.contextmanager
def writing(accelerator, tmp_path: Path, *, together: bool = True) -> Iterator[None]:
    """A block that writes the folder `tmp_path`: where it fails on any process, it is removed.

    Args:
        tmp_path: `<name>.partial`, in a training's output folder.
        together: without it a failing process raises alone, and its end makes the launcher end
            the others: they may be waiting for it inside DeepSpeed, where nothing reaches them.

    Raises:
        OSError: (ENOSPC) the disk is full, on all processes, whichever of them met it.
        Exception: as `distributed.failing_together`.
    """
    try:
        if together:
            with distributed.failing_together():
                yield
        else:
            yield
            accelerator.wait_for_everyone()
    except (Exception, CheckpointException) as error:
        if accelerator.is_main_process or not together:
            shutil.rmtree(tmp_path, ignore_errors=True)
        if not files.is_full(error):
            raise
        raise OSError(
            errno.ENOSPC,
            f"no space left for {tmp_path.stem.lstrip('.')} in {tmp_path.parent}. "
            f"{_describe_last(tmp_path.parent)} Make room and start the same command again",
        ) from error


def _describe_training(accelerator, config, train_size: int | None) -> dict:
    """What has to be the same in a run that goes on, and no option says alone."""
    return {
        "global_batch": distributed.count_global_batch(accelerator, config),
        "precision": distributed.get_precision(accelerator),
        "train_size": train_size,
    }


def _describe_last(folder) -> str:
    """What is left to go on from when a training stops, in a sentence."""
    done = list_checkpoints(folder)
    return (
        f"{done[-1]} is intact, and training goes on from it."
        if done
        else "There is no checkpoint yet: training begins anew."
    )


def _clear(folder: Path) -> None:
    """Remove what killed runs left half written or half removed."""
    for pattern in ("checkpoint-*.partial", ".checkpoint-*.old", ".model.partial"):
        for left in folder.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def _save_state(accelerator, tmp_path: Path) -> None:
    handle = accelerator.register_save_state_pre_hook(partial(_save_weights, accelerator))
    try:
        accelerator.save_state(str(tmp_path))
    finally:
        handle.remove()


def _save_weights(accelerator, models, weights, folder) -> None:
    """A hook of `save_state`: the weights under the names they have without wrappers."""
    if not weights:  # divided: they are written already
        return
    module = accelerator.unwrap_model(models[0])
    if _has_adapters(module):
        weights[0] = _select_trained(module)
    elif isinstance(module, UNet2DConditionModel):
        weights.clear()
        if accelerator.is_main_process:
            with sdxl.silence_libraries():  # one file: SDXL's has 10.3 GB
                module.save_pretrained(Path(folder, "unet"), max_shard_size="1TB")
    else:
        weights[0] = module.state_dict()


def _save_own(accelerator, states: Mapping, folder: Path) -> dict:
    """The tensors of `states` to `<name>.safetensors`; returns the rest, for `step.json`."""
    plain = {}
    for name, part in states.items():
        state = part.state_dict()  # on all processes: it may have to be gathered
        tensors = state.pop("shadow_params", [])
        plain[name] = state
        if tensors and accelerator.is_main_process:
            numbered = {str(n): tensor.contiguous() for n, tensor in enumerate(tensors)}
            save_file(numbered, folder / f"{name}.safetensors")
    return plain


def _has_adapters(module) -> bool:
    return any(isinstance(part, BaseTunerLayer) for part in module.modules())


def _select_trained(module) -> dict:
    """The trained parameters and the buffers: what a training with a frozen base changes."""
    frozen = {
        name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad
    }
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def _complete(tmp_path: Path, record: dict, config) -> None:
    """The files to the disk, `step.json`, the name, the old ones away."""
    folder = tmp_path.parent
    files.flush_folder(tmp_path)
    written = [p for p in sorted(tmp_path.rglob("*")) if p.is_file()]
    write_json(
        tmp_path / "step.json",
        record | {"files": {str(p.relative_to(tmp_path)): p.stat().st_size for p in written}},
    )
    replace_folder(tmp_path, tmp_path.with_suffix(""))
    for other in _list_folders(folder):
        if _get_step(other) > record["step"]:
            logger.warning(
                "removing %s: it is of an earlier run, which this one left at a step before it",
                other,
            )
            remove_folder(other)
    if config.checkpoints_total_limit > 0:
        for old in list_checkpoints(folder)[: -config.checkpoints_total_limit]:
            remove_folder(old)


def finish_checkpoints(config) -> None:
    """When the model is saved: of the newest checkpoints keep `unet/`, remove all the rest.

    As many as `checkpoints_total_limit` says stay (0: all), each a folder that opens as a UNet,
    for evaluation; none is resumed from again. For the main process alone.
    """
    folder, limit = Path(config.output_dir), config.checkpoints_total_limit
    folders = _list_folders(folder)
    _clear(folder)
    kept = [p for p in folders if (p / _UNET).is_file()][-limit:]  # [-0:] is all of them
    for checkpoint in folders:  # oldest first: killed here, one can still resume from the newest
        if checkpoint not in kept:
            remove_folder(checkpoint)
            continue
        (checkpoint / "step.json").unlink(missing_ok=True)
        for path in list(checkpoint.iterdir()):
            if path.is_file():
                path.unlink()
            elif path.name != "unet":
                shutil.rmtree(path, ignore_errors=True)


# ------------------------------------------------------------------------------------------- read


def find_checkpoint(config) -> Path | None:
    """The checkpoint that a run resumes from; None where there is none.

    Raises:
        FileNotFoundError: the named one does not exist or is not complete.
        ValueError: the named one is torn, or is a UNet without the state of a training.
    """
    requested, folder = config.resume_from_checkpoint, Path(config.output_dir)
    if requested in ("none", "", None):
        return None
    if requested != "latest":
        checkpoint = _find_named(requested, folder)
        _read_checkpoint(checkpoint)
        return checkpoint
    complete = list_checkpoints(folder)
    for other in sorted(set(folder.glob("checkpoint-*")) - set(complete)):
        if _holds_only_unet(other):
            logger.info("%s is of a training that came to its end: it is not resumed", other)
        else:
            logger.warning("skipping %s: it was not finished", other)
    for checkpoint in complete[::-1]:
        try:
            _read_checkpoint(checkpoint)
            return checkpoint
        except (OSError, ValueError) as error:
            logger.warning("skipping %s: %s", checkpoint, error)
    return None


def _find_named(requested: str, folder: Path) -> Path:
    """A path, or upstream's way: a bare name in the output folder."""
    checkpoint = Path(requested)
    if len(checkpoint.parts) == 1 and (folder / requested).is_dir():
        checkpoint = folder / requested
    if (checkpoint / "step.json").is_file():
        return checkpoint
    if any((checkpoint / name).is_file() for name in ("config.json", "unet/config.json")):
        raise ValueError(
            f"{checkpoint} holds a UNet without the state of its training: start "
            f"from it by --pretrained_unet {checkpoint} in the place of "
            "--resume_from_checkpoint"
        )
    raise FileNotFoundError(f"{checkpoint} is not a complete checkpoint (no step.json in it)")


def _holds_only_unet(checkpoint: Path) -> bool:
    return checkpoint.is_dir() and [p.name for p in checkpoint.iterdir()] == ["unet"]


def load_checkpoint(
    accelerator,
    config,
    optimizer,
    *,
    states: Mapping,
    train_size: int | None = None,
    inputs: dict | None = None,
) -> int:
    """Load the newest checkpoint that can be read, or the named one; its step, 0 without one.

    Args:
        optimizer: as `distributed.prepare` returned it.
        states: as `save_checkpoint` had them; they are set to what they were.
        train_size: samples of an epoch now, where they have an end.
        inputs: the content of what is read now.

    Raises:
        FileNotFoundError, ValueError: see `find_checkpoint`.
        FileNotFoundError: a process does not see the main one's checkpoint.
        ValueError: other settings, images or models, another global batch, precision or number of
            samples (a warning where it is named), another kind of sharding, or a file that would
            run code.
    """
    checkpoint = distributed.ask_main(partial(find_checkpoint, config))
    if checkpoint is None:
        return 0
    if not (checkpoint / "step.json").is_file():
        raise FileNotFoundError(
            f"process {accelerator.process_index} does not see {checkpoint}: "
            "output_dir has to be a folder that all processes share"
        )
    record = _read_checkpoint(checkpoint)
    pickles.check_pickles(checkpoint)
    _compare_settings(
        checkpoint, record, config, _describe_training(accelerator, config, train_size), inputs
    )
    same = record["num_processes"] == accelerator.num_processes
    _compare_kind(checkpoint, record, distributed.get_kind(accelerator), same)
    handle = accelerator.register_load_state_pre_hook(partial(_load_weights, accelerator))
    scaler = accelerator.scaler
    if not (checkpoint / "scaler.pt").is_file():  # it was made in another precision
        accelerator.scaler = None
    if "states" not in record:  # of a release that gave them to accelerate
        accelerator.register_for_checkpointing(*states.values())
    try:
        with pickles.refusing_code():
            accelerator.load_state(str(checkpoint))
    finally:
        handle.remove()
        accelerator.scaler = scaler
        accelerator._custom_objects.clear()  # there is no public way; they are saved by `_save_own`
    if "states" in record:
        _load_own(states, record, checkpoint)
    if not distributed.is_divided(accelerator):
        _lay_out_moments(optimizer, checkpoint)
    # counted in micro-batches, of which a step may have another number now
    accelerator.step = record["step"] * config.gradient_accumulation_steps
    if not same:
        logger.warning(
            "%s was made by %d processes, these are %d: torch's random state begins anew on each",
            checkpoint,
            record["num_processes"],
            accelerator.num_processes,
        )
        set_seed(config.seed + record["step"], device_specific=True)
    logger.info("resumed from %s", checkpoint)
    return record["step"]


def _load_weights(accelerator, models, folder) -> None:
    """A hook of `load_state`, the counterpart of `_save_weights`."""
    if not models:
        return
    module = models[0] = accelerator.unwrap_model(models[0])
    if _has_adapters(module):
        models.clear()
        path = Path(folder, "model.safetensors")
        found = load_file(path)
        check_keys(path, found, _select_trained(module))
        module.load_state_dict(found, strict=False)
    elif isinstance(module, UNet2DConditionModel):
        models.clear()
        module.load_state_dict(load_file(Path(folder, _UNET)))


def _load_own(states: Mapping, record: dict, checkpoint: Path) -> None:
    """The counterpart of `_save_own`."""
    for name, part in states.items():
        state, path = dict(record["states"][name]), checkpoint / f"{name}.safetensors"
        if path.is_file():
            tensors = load_file(path)
            state["shadow_params"] = [tensors[str(n)] for n in range(len(tensors))]
        part.load_state_dict(state)


def _lay_out_moments(optimizer, checkpoint: Path) -> None:
    """Give the optimizer's states the layout of their weights: they keep the one they were saved
    in (`channels_last` or not), and a fused step walks through both as they lie in memory."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if not torch.is_tensor(value) or value.shape != parameter.shape:
                continue
            if value.stride() == parameter.stride():
                continue
            if value.dtype == torch.uint8:  # in blocks of what lies side by side
                raise ValueError(
                    f"{checkpoint} has 8-bit optimizer states of another memory layout: set "
                    "channels_last as it was"
                )
            state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _read_checkpoint(checkpoint: Path) -> dict:
    """A checkpoint's `step.json`, once each of its files is found whole.

    Looked at before anything is loaded: half of a torn checkpoint in the model would be worse
    than none.
    """
    record = read_json(checkpoint / "step.json")
    if missing := sorted(_RECORD - record.keys()):
        raise ValueError(f"{checkpoint / 'step.json'} has no {', '.join(missing)}")
    for name, size in record["files"].items():
        found = (checkpoint / name).stat().st_size
        if found != size:
            raise ValueError(f"{checkpoint / name} is truncated ({found} of {size} bytes)")
    return record


def describe_content(before: dict, now: dict) -> list[str]:
    """Which of the `finished.hash_inputs` differ, in words; earlier releases noted no images."""
    names = (before.keys() | now.keys()) - ({"images"} - before.keys())
    return [
        "the images were others (the same files with another content, or other files)"
        if name == "images"
        else f"{name} had another content"
        for name in sorted(names)
        if before.get(name) != now.get(name)
    ]


def _compare_settings(
    checkpoint: Path, record: dict, config, training: dict, inputs: dict | None
) -> None:
    """Refuse to go on with other settings or data unawares; where the checkpoint is named, warn."""
    before, now = record["config"], json.loads(json.dumps(dataclasses.asdict(config)))
    by_content = {*SETS, *MODELS} if record.get("inputs") and inputs else set()
    free = FREE_FIELDS | HARDWARE_FIELDS | by_content
    changed = [
        f"{name} was {before[name]!r} and is {now.get(name)!r}"
        for name in before
        if name not in free and before[name] != now.get(name)
    ]
    if by_content:
        changed += describe_content(record["inputs"], inputs)
    words = {
        "global_batch": "the global batch (train_batch_size x gradient_accumulation_steps x "
        "processes)",
        "precision": "the precision",
        "train_size": "the number of samples",
    }
    changed += [
        f"{words[name]} was {record[name]} and is {value}"
        for name, value in training.items()
        if record[name] != value
    ]
    if not changed:
        return
    text = f"{checkpoint} was made with other settings or data ({'; '.join(changed)}): "
    if config.resume_from_checkpoint == "latest":
        raise ValueError(
            text + "delete it to begin anew, choose another output_dir, or name it "
            "in resume_from_checkpoint to go on from it all the same"
        )
    if bool(before.get("ema_decay")) != bool(config.ema_decay):
        raise ValueError(text + "averages (ema_decay) cannot begin or end half-way")
    logger.warning(
        "%sit goes on all the same; learning rate and its schedule, betas, epsilon, "
        "weight decay and ema_decay stay those of the checkpoint",
        text,
    )


def _compare_kind(checkpoint: Path, record: dict, kind: str, same: bool) -> None:
    """Refuse what accelerate could not load, or would load without a word."""
    before = record["kind"]
    if before != kind and not {before, kind} <= {"one", "DDP"}:
        raise ValueError(
            f"{checkpoint} was made by {before}, this is {kind}: start it with the "
            "hardware file (--config_file) it was made with"
        )
    if kind.startswith("ZeRO") and not same:
        raise ValueError(
            f"{checkpoint} was made by {record['num_processes']} processes: ZeRO "
            "goes on with that many only"
        )
