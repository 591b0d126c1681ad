"""Small trainings on one or several processes, step for step as `training.loop` does them.

`main` takes the path of RUNS.json: a list of trainings, done one after the other. Each has a
`LoopConfig`'s options and `kind` (what has to come of it, as `distributed.get_kind` says), `model`
("unet", "lora" or "plain"), `chunks` (of a micro-batch), `sgd` (plain steps of size 1: how far the
weights move is then the clipped norm), `fused` (AdamW), `channels_last`, `die` (a place in the
second checkpoint where it kills itself, see `die_at`), `full` ([rank, bytes]: no file of that
process may be larger from the second checkpoint on). Each writes `result.json` and the weights
into its `output_dir`.
"""

import contextlib
import json
import os
import resource
import signal
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, set_seed
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from safetensors.torch import save_file

from rorem_lib.training import checkpoints, distributed, loop, sampler


def make_unet() -> UNet2DConditionModel:
    """SDXL-inpainting's kinds of layers, 100 K parameters."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=9,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=4 * 6 + 8,
    )


def build_model(name: str):
    if name == "plain":
        return torch.nn.Sequential(torch.nn.Linear(9, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    unet = make_unet()
    if name == "lora":
        unet.requires_grad_(False)
        unet.add_adapter(
            LoraConfig(
                r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"
            )
        )
    return unet


def make_batch(positions):
    """Inputs [B, 9, 8, 8], targets [B, 4, 8, 8] and timesteps [B], functions of the positions."""
    parts = []
    for position in positions:
        rng = np.random.default_rng(position)
        parts.append(
            (
                rng.standard_normal((9, 8, 8), dtype=np.float32),
                rng.standard_normal((4, 8, 8), dtype=np.float32) * 30,
                rng.integers(1000),
            )
        )
    inputs, targets, times = zip(*parts)
    return (
        torch.from_numpy(np.stack(inputs)),
        torch.from_numpy(np.stack(targets)),
        torch.tensor([int(t) for t in times]),
    )


def compute_loss(model, name, batch):
    inputs, targets, times = batch
    if name == "plain":
        predicted = model(inputs.movedim(1, -1)).movedim(-1, 1)
    else:
        count = len(inputs)
        predicted = model(
            inputs,
            times,
            torch.ones(count, 3, 8),
            added_cond_kwargs={
                "text_embeds": torch.ones(count, 8),
                "time_ids": torch.full((count, 6), 8.0),
            },
        ).sample
    return (predicted.float() - targets).square().mean()


def divide_on_cpu() -> None:
    """Have accelerate take FSDP2 on a CPU too, where it would fall back to DDP."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def die_at(place: str) -> None:
    """SIGKILL in the second checkpoint: "in save_state", "before rename" or "in removal"."""
    count, save_state, replace, remove = (
        [],
        Accelerator.save_state,
        checkpoints.replace_folder,
        (checkpoints.remove_folder),
    )

    def die(here):
        if here == place and len(count) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def save_and_die(self, folder):
        count.append(folder)
        save_state(self, folder)
        if place == "in save_state" and len(count) == 2:
            Path(folder, "optimizer.bin").unlink()
        die("in save_state")

    def die_and_replace(beside, path):
        die("before rename")
        replace(beside, path)

    def die_and_remove(folder):
        for path in list(folder.rglob("*.bin")):
            path.unlink()
        folder.rename(folder.with_name(f".{folder.name}.old"))
        die("in removal")

    Accelerator.save_state = save_and_die
    checkpoints.replace_folder = die_and_replace
    checkpoints.remove_folder = die_and_remove if place == "in removal" else remove


def run(options: dict) -> dict:
    """One training; returns what it also writes to `result.json`."""
    AcceleratorState._reset_state()
    known = {field.name for field in fields(loop.LoopConfig)}
    config = loop.LoopConfig(**{k: v for k, v in options.items() if k in known})
    kind, name = options["kind"], options.get("model", "unet")
    if kind == "FSDP2":
        divide_on_cpu()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps
        ),
        kwargs_handlers=distributed.make_handlers("cpu"),
    )
    assert distributed.get_kind(accelerator) == kind, distributed.get_kind(accelerator)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    set_seed(config.seed)
    model = build_model(name)
    if options.get("channels_last"):
        model.to(memory_format=torch.channels_last)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = (
        torch.optim.SGD(trained, lr=1.0)
        if options.get("sgd")
        else torch.optim.AdamW(trained, lr=config.learning_rate, fused=options.get("fused"))
    )
    structure = distributed.copy_structure(accelerator, model)
    model, optimizer = distributed.prepare(accelerator, model, optimizer, config)
    scheduler = get_scheduler("linear", optimizer, num_training_steps=100, num_warmup_steps=0)
    states = {"scheduler": scheduler}
    trained = distributed.list_trained(model)
    ema = None
    if config.ema_decay:
        states["ema"] = ema = distributed.Average(trained, decay=config.ema_decay)
    kept = {"states": states, "train_size": 24}
    step = first = checkpoints.load_checkpoint(accelerator, config, optimizer, **kept)
    states = {"before": copy_state(accelerator, model)}
    result = {
        "kind": kind,
        "processes": accelerator.num_processes,
        "first": first,
        "line": distributed.describe(accelerator, config),
        "count": sum(p.numel() for p in trained),
        "losses": [],
        "norms": [],
        "rates": [],
    }
    for positions in sampler.PositionSampler(config, accelerator, first):
        with accelerator.accumulate(model):
            noise = 1 + 0.01 * torch.randn(()).item()  # of the state a checkpoint restores
            chunks, losses = options.get("chunks", 1), []
            for number, chunk in enumerate(np.array_split(positions, chunks), 1):
                with contextlib.nullcontext() if number == chunks else accelerator.no_sync(model):
                    with accelerator.autocast():
                        loss = noise * compute_loss(model, name, make_batch(chunk))
                    distributed.backward(accelerator, loss / chunks, last=number == chunks)
                losses.append(loss.detach())
            if accelerator.sync_gradients:
                norm = distributed.clip(accelerator, model, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        result["losses"].append(accelerator.gather(torch.stack(losses)).mean().item())
        if not accelerator.sync_gradients:
            continue
        scheduler.step()
        if ema is not None:
            ema.step(trained)
        step += 1
        result["norms"].append(float(norm))
        result["rates"].append(optimizer.param_groups[0]["lr"])
        if step % config.checkpointing_steps == 0:
            if "full" in options and step == 2 * config.checkpointing_steps:
                fill_disk(accelerator, *options["full"])
            checkpoints.save_checkpoint(accelerator, config, step, **kept)
    states["after"] = copy_state(accelerator, model)
    whole = distributed.gather_model(accelerator, model, structure, ema)
    if accelerator.is_main_process:
        states["whole"] = whole.state_dict()
        for file, state in states.items():
            save_file({k: v.contiguous() for k, v in state.items()}, folder / f"{file}.safetensors")
        if name == "unet":
            whole.save_pretrained(folder / "unet")
        (folder / "result.json").write_text(json.dumps(result))
    accelerator.wait_for_everyone()
    return result


def copy_state(accelerator, model):
    state = distributed.gather_state(accelerator, model)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def fill_disk(accelerator, rank: int, size: int) -> None:
    if accelerator.process_index == rank:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def main() -> None:
    runs = json.loads(Path(sys.argv[1]).read_text())
    if "die" in runs[0]:
        die_at(runs[0]["die"])
    for options in runs:
        run(options)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
