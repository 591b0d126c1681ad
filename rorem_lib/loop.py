"""The only training loop: accelerate, checkpoints with full state, resume, EMA, `metrics.jsonl`.

An *objective* brings the model, the samples and the loss; the loop brings everything else. The
sample at global position `p` of a run (step x global batch + place in the batch) is a function of
`p` and the seed alone, noise, timestep and flip included. So a resumed run goes on exactly where
the killed one stopped, and the same global batch gives the same training on 1 or 8 processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, Dataset

from rorem_lib import sdxl
from rorem_lib.files import read_json, write_json, write_text
from rorem_lib.parameters import coerce_value

logger = logging.getLogger(__name__)


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


# What may differ between a checkpoint and the run that goes on from it.
FREE_FIELDS = {"output_dir", "max_train_steps", "checkpointing_steps", "checkpoints_total_limit",
               "resume_from_checkpoint", "logging_steps", "dataloader_num_workers", "report_to",
               "latent_cache_dir"}


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


class Order:
    """An endless shuffled order over `n` samples: position -> index, a fresh shuffle an epoch."""

    def __init__(self, n: int, seed: int):
        if n < 1:
            raise ValueError("there is nothing to train on: the training set is empty")
        self.n, self.seed, self._epoch, self._permutation = n, seed, None, None

    def find_index(self, position: int) -> int:
        epoch, place = divmod(position, self.n)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._permutation = epoch, rng.permutation(self.n)
        return int(self._permutation[place])


class _Positions:
    """Batch sampler: this process's positions of every micro-batch from a step on."""

    def __init__(self, config, accelerator, first_step):
        self.batch, self.accumulate = config.train_batch_size, config.gradient_accumulation_steps
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.first, self.last = first_step, config.max_train_steps

    def __iter__(self):
        micro = self.batch * self.world
        for number in range(self.first * self.accumulate, self.last * self.accumulate):
            start = number * micro + self.rank * self.batch
            yield list(range(start, start + self.batch))

    def __len__(self):
        return max(0, self.last - self.first) * self.accumulate


def list_checkpoints(folder) -> list[Path]:
    """The complete checkpoints `checkpoint-<step>` of a run, oldest first."""
    found = [p for p in Path(folder).glob("checkpoint-*")
             if re.fullmatch(r"checkpoint-\d+", p.name) and (p / "step.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def _save_checkpoint(accelerator, config, step):
    """Written beside and renamed, so that a killed run leaves no torn checkpoint."""
    folder = Path(config.output_dir)
    final, beside = folder / f"checkpoint-{step}", folder / f"checkpoint-{step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(beside, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(beside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        sizes = {str(p.relative_to(beside)): p.stat().st_size
                 for p in sorted(beside.rglob("*")) if p.is_file()}
        write_json(beside / "step.json", {"step": step, "config": dataclasses.asdict(config),
                                          "files": sizes})
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
        for old in list_checkpoints(folder)[: -config.checkpoints_total_limit]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _resume(accelerator, config) -> int:
    """Load the newest checkpoint that can be read; 0 where there is none."""
    wish = config.resume_from_checkpoint
    if wish in ("none", "", None):
        return 0
    if wish == "latest":
        candidates = list_checkpoints(config.output_dir)[::-1]
        for torn in sorted(set(Path(config.output_dir).glob("checkpoint-*")) - set(candidates)):
            logger.warning("skipping %s: it was not finished", torn)
    else:
        candidates = [Path(wish)]
        if not (Path(wish) / "step.json").is_file():
            raise FileNotFoundError(f"{wish} is not a complete checkpoint (no step.json in it)")
    for checkpoint in candidates:
        try:
            record = _read_checkpoint(checkpoint)
        except (OSError, ValueError, KeyError) as error:
            if wish != "latest":
                raise
            logger.warning("skipping %s: %s", checkpoint, error)
            continue
        if wish == "latest":
            _compare_settings(checkpoint, record.get("config", {}), dataclasses.asdict(config))
        accelerator.load_state(str(checkpoint))
        logger.info("resumed from %s", checkpoint)
        return record["step"]
    return 0


def _read_checkpoint(checkpoint: Path) -> dict:
    """A checkpoint's `step.json`, once each of its files is found whole.

    Looked at before anything is loaded: half of a torn checkpoint in the model would be worse
    than none.
    """
    record = read_json(checkpoint / "step.json")
    for name, size in record.get("files", {}).items():
        found = (checkpoint / name).stat().st_size
        if found != size:
            raise ValueError(f"{checkpoint / name} is truncated ({found} of {size} bytes)")
    return {**record, "step": int(record["step"])}


def _compare_settings(checkpoint: Path, before: dict, now: dict) -> None:
    """Refuse to go on with other settings unawares: the optimizer's would win over the new ones."""
    changed = [f"{name} was {before[name]!r} and is {now.get(name)!r}" for name in before
               if name not in FREE_FIELDS and before[name] != now.get(name)]
    if changed:
        raise ValueError(f"{checkpoint} was made with other settings ({'; '.join(changed)}): "
                         "delete it to begin anew, choose another output_dir, or name it in "
                         "resume_from_checkpoint to go on from it all the same")


def _trim_metrics(path: Path, step: int) -> None:
    """Drop the lines a killed run wrote after its last checkpoint, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    write_text(path, "".join(kept))


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
    first = _resume(accelerator, config)
    if ema is not None:
        ema.to(accelerator.device)
    if config.report_to != "none":
        accelerator.init_trackers("rorem", config=dataclasses.asdict(config))
    loader = DataLoader(dataset, batch_sampler=_Positions(config, accelerator, first),
                        num_workers=config.dataloader_num_workers,
                        # of its own: else it draws from the noise that a checkpoint restores
                        generator=torch.Generator().manual_seed(config.seed),
                        persistent_workers=config.dataloader_num_workers > 0)
    batch_total = (config.train_batch_size * accelerator.num_processes
                   * config.gradient_accumulation_steps)
    if accelerator.is_main_process:
        _trim_metrics(folder / "metrics.jsonl", first)
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
            last = _log(accelerator, folder, config, step, window, norm, scheduler,
                        logged, batch_total)
            logged, window = time.time(), []
        if step % config.checkpointing_steps == 0 and step < config.max_train_steps:
            if config.mixed_precision != "fp16":  # there, infinite norms are skipped steps
                _check_finite(norm, "gradient's norm", step)
            _save_checkpoint(accelerator, config, step)
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


def _check_finite(value, name: str, step: int) -> None:
    if not math.isfinite(float(value)):
        raise FloatingPointError(
            f"the {name} is {float(value)} at step {step}: lower learning_rate, or use bf16 or "
            "float32 in the place of fp16; the last checkpoint is intact")


def _log(accelerator, folder, config, step, window, norm, scheduler, since, batch_total) -> dict:
    seconds = max(time.time() - since, 1e-9)
    steps = len(window) / config.gradient_accumulation_steps
    names = window[-1].keys()
    line = {"step": step}
    for name in names:
        mean = torch.stack([w[name].float().mean() for w in window]).mean()
        mean = accelerator.gather(mean[None].to(accelerator.device)).mean().item()
        line[name] = round(mean, 6)
    _check_finite(line["loss"], "loss", step)
    line |= {"lr": scheduler.get_last_lr()[0], "grad_norm": round(float(norm), 4),
             "images_per_second": round(steps * batch_total / seconds, 2),
             "seconds_left": round((config.max_train_steps - step) * seconds / steps, 1)}
    if accelerator.is_main_process:
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        logger.info("step %d/%d  loss %.4f  lr %.2g  %.1f images/s  %d s left", step,
                    config.max_train_steps, line["loss"], line["lr"],
                    line["images_per_second"], line["seconds_left"])
    accelerator.log({k: v for k, v in line.items() if k != "step"}, step=step)
    return line


def parse_config(cls, arguments: list[str] | None = None):
    """A config dataclass from a command line: one `--option` a field, or `--config FILE.yaml`.

    Options on the command line win over the file. Lists take several words.

    Raises:
        SystemExit: an unknown or mistyped option, named by argparse.
        ValueError: the file has a key that is no field of `cls`, or a value of another type.
    """
    parser = argparse.ArgumentParser(description=(cls.__doc__ or "").splitlines()[0],
                                     allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with any of these options")
    hints, defaults = get_type_hints(cls), dataclasses.asdict(cls())
    for field in dataclasses.fields(cls):
        kind, options = hints[field.name], {}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif getattr(kind, "__origin__", None) is list:
            options = {"nargs": "+", "type": kind.__args__[0]}
        else:
            options = {"type": kind}
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **options,
                            help=f"default: {defaults[field.name]!r}".replace("%", "%%"))
    given = vars(parser.parse_args(arguments))
    values = {}
    if path := given.pop("config", None):
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if unknown := sorted(set(values) - set(defaults)):
        raise ValueError(f"{path}: unknown option {', '.join(unknown)} for {cls.__name__}")
    for name, value in values.items():
        try:
            values[name] = coerce_value(value, inspect.formatannotation(hints[name]))
        except TypeError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
    return cls(**(values | given))


def run_job(function, config) -> None:
    """A stage module's `main`: log lines to standard output, then the work."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    function(config)
