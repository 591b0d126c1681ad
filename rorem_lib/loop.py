"""The only training loop: accelerate, checkpoints with full state, resume, EMA, `metrics.jsonl`.

An *objective* brings the model, the samples and the loss; the loop brings everything else. The
sample at global position `p` of a run (step x global batch + place in the batch) is a function of
`p` and the seed alone, noise, timestep and flip included. So a resumed run goes on exactly where
the killed one stopped, and the same global batch gives the same training on 1 or 8 processes.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, Dataset

from rorem_lib import checkpoints, sdxl, tracking
from rorem_lib.files import write_json
from rorem_lib.order import Positions


@dataclass
class LoopConfig:
    """What every training run has. Names follow upstream's and diffusers' command lines.

    Attributes:
        output_dir: folder for the model, checkpoints and `metrics.jsonl`.
        max_train_steps: optimizer steps in all.
        train_batch_size: samples a process and micro-batch.
        gradient_accumulation_steps: micro-batches an optimizer step.
        learning_rate: AdamW's peak rate.
        lr_scheduler: a name that `diffusers.optimization.get_scheduler` knows.
        lr_warmup_steps: steps of linear warm-up (schedulers that have one).
        adam_weight_decay: AdamW's decoupled weight decay.
        max_grad_norm: gradients are clipped to this norm.
        mixed_precision: "no", "bf16", "fp16", or "auto": bf16 where the hardware has it.
        ema_decay: decay of the weights' moving average; 0 keeps none.
        checkpointing_steps: steps between checkpoints.
        checkpoints_total_limit: how many checkpoints are kept.
        resume_from_checkpoint: "latest", "none" or a checkpoint folder.
        logging_steps: steps between lines of `metrics.jsonl`.
        dataloader_num_workers: processes that read samples; 0 reads in the training process.
        report_to: "none", or a tracker accelerate knows ("tensorboard", "wandb", "trackio").
        seed: fixes initialisation, order, noise and flips.
    """

    output_dir: str = "runs/alone/training"
    max_train_steps: int = 1000
    train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-5
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    adam_weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    mixed_precision: str = "auto"
    ema_decay: float = 0.0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str = "latest"
    logging_steps: int = 25
    dataloader_num_workers: int = 0
    report_to: str = "none"
    seed: int = 4


class Objective:
    """What a stage trains. Subclasses override all four methods.

    `config` is the run's `LoopConfig`; `make_dataset` may use `self.device` and anything that
    `build_model` has set up. What the subclass puts into `metrics` joins the run's metrics.
    """

    def __init__(self, config: LoopConfig):
        self.config = config
        self.device = torch.device("cpu")
        self.metrics: dict = {}

    def build_model(self) -> torch.nn.Module:
        """The module whose `requires_grad` parameters are trained, in float32."""
        raise NotImplementedError

    def make_dataset(self) -> Dataset:
        """A dataset indexed by the global position `p` >= 0, without end."""
        raise NotImplementedError

    def compute_loss(self, model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The scalar loss of one micro-batch and what else should be logged."""
        raise NotImplementedError

    def save_model(self, model, folder: Path) -> None:
        """Write the trained model (EMA weights already in place) below `folder`."""
        raise NotImplementedError


def find_device() -> str:
    """The kind of device accelerate will take, known before an `Accelerator` exists."""
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return "cuda" if torch.cuda.is_available() and not use_cpu else "cpu"


def train(objective: Objective, config: LoopConfig) -> dict:
    """Run the whole training; resume it when the output folder holds checkpoints.

    Returns:
        `{"steps", "images", "seconds", "images_per_second", "loss", "num_processes", …}`, also
        written to `<output_dir>/train_metrics.json` after the model is saved.

    Raises:
        FileNotFoundError: a checkpoint was named that does not exist.
        FloatingPointError: the loss is no longer finite.
    """
    AcceleratorState._reset_state()  # an earlier training here may have had another precision
    accelerator = Accelerator(
        mixed_precision=sdxl.choose_precision(config.mixed_precision, find_device()),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
    )
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    set_seed(config.seed)
    objective.device = accelerator.device
    model = objective.build_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate,
                                  weight_decay=config.adam_weight_decay, fused=True)
    scheduler = get_scheduler(config.lr_scheduler, optimizer,
                              num_warmup_steps=config.lr_warmup_steps,
                              num_training_steps=config.max_train_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    ema = None
    if config.ema_decay:
        ema = EMAModel(trained, decay=config.ema_decay, use_ema_warmup=True, power=0.75)
        accelerator.register_for_checkpointing(ema)
    dataset = objective.make_dataset()
    first = checkpoints.load_checkpoint(accelerator, config)
    if ema is not None:
        ema.to(accelerator.device)
    if config.report_to != "none":
        accelerator.init_trackers("rorem", config=dataclasses.asdict(config))
    loader = DataLoader(dataset, batch_sampler=Positions(config, accelerator, first),
                        num_workers=config.dataloader_num_workers,
                        # of its own: else it draws from the noise that a checkpoint restores
                        generator=torch.Generator().manual_seed(config.seed),
                        persistent_workers=config.dataloader_num_workers > 0)
    batch_total = (config.train_batch_size * accelerator.num_processes
                   * config.gradient_accumulation_steps)
    if accelerator.is_main_process:
        tracking.trim_lines(folder / "metrics.jsonl", first)
    step, started, logged, window = first, time.time(), time.time(), []
    last = {}
    for batch in loader:
        batch = {k: v.to(accelerator.device) for k, v in batch.items()}
        with accelerator.accumulate(model):
            with accelerator.autocast():
                loss, extra = objective.compute_loss(model, batch)
            accelerator.backward(loss)
            norm = None
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        window.append({"loss": loss.detach(), **{k: v.detach() for k, v in extra.items()}})
        if not accelerator.sync_gradients:
            continue
        scheduler.step()
        if ema is not None:
            ema.step(trained)
        step += 1
        if step % config.logging_steps == 0 or step == config.max_train_steps:
            last = tracking.write_line(accelerator, folder, config, step, window, norm, scheduler,
                        logged, batch_total)
            logged, window = time.time(), []
        if step % config.checkpointing_steps == 0 and step < config.max_train_steps:
            if config.mixed_precision != "fp16":  # there, infinite norms are skipped steps
                tracking.check_finite(norm, "gradient's norm", step)
            checkpoints.save_checkpoint(accelerator, config, step)
    accelerator.wait_for_everyone()
    if ema is not None:
        ema.copy_to(trained)
    seconds = max(time.time() - started, 1e-9)
    images = (step - first) * batch_total
    metrics = {"steps": step, "images": step * batch_total, "resumed_at": first,
               "seconds": round(seconds, 2), "images_per_second": round(images / seconds, 2),
               "num_processes": accelerator.num_processes,
               "trainable_parameters": sum(p.numel() for p in trained),
               **{k: v for k, v in last.items() if k.startswith("loss")}}
    if accelerator.is_main_process:
        objective.save_model(accelerator.unwrap_model(model), folder)
        metrics |= objective.metrics
        write_json(folder / "train_metrics.json", metrics)
        for checkpoint in folder.glob("checkpoint-*"):  # the model is saved: no need to go back
            shutil.rmtree(checkpoint, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return metrics
