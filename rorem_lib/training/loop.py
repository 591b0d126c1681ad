"""The only training loop: accelerate, checkpoints with full state, resume, EMA, `metrics.jsonl`.

An *objective* brings the model, the samples and the loss; the loop brings everything else. The
sample at global position `p` of a run (step x global batch + place in the batch) is a function of
`p` and the seed alone, noise, timestep and flip included. So a resumed run goes on exactly where
the killed one stopped, and the same global batch gives the same training on 1 or 8 processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader, Dataset

from rorem_lib import files
from rorem_lib.files import set_aside
from rorem_lib.models import sdxl
from rorem_lib.training import checkpoints, distributed, finished, tracking
from rorem_lib.training.config import LoopConfig
from rorem_lib.training.sampler import PositionSampler

logger = logging.getLogger(__name__)


class Objective:
    """What a stage trains. Subclasses override `build_model`, `make_dataset`, `compute_loss` and
    `save_model`.

    `config` is the run's `LoopConfig`; the loop sets `accelerator` before `build_model`. What a
    subclass puts into `metrics` joins the run's metrics.
    """

    def __init__(self, config: LoopConfig):
        self.config = config
        self.accelerator: Accelerator
        # Activations in the backward pass. None: the loop tries without, and where the memory does
        # not suffice calls the model's `enable_gradient_checkpointing` and makes it True.
        self.recomputes: bool | None = False
        self.metrics: dict = {}

    @property
    def device(self) -> torch.device:
        """Where the training runs."""
        return self.accelerator.device

    @property
    def global_batch(self) -> int:
        """Samples an optimizer step, over all processes and micro-batches."""
        return distributed.count_global_batch(self.accelerator, self.config)

    def hash_images(self) -> str | None:
        """SHA-256 of the images that are trained on, by their content; None where there are none.
        It is called on every process at once, before anything is loaded."""

    def build_model(self) -> torch.nn.Module:
        """The module whose `requires_grad` parameters are trained, in float32."""
        raise NotImplementedError

    def make_dataset(self) -> Dataset:
        """A dataset indexed by the global position `p` >= 0, without end. `metrics["train_size"]`
        tells how many samples an epoch has."""
        raise NotImplementedError

    def tune_model(self, model) -> float | None:
        """Choose what costs memory or speed (`recomputes` too), once model and samples are there;
        returns the floating point operations of training on one image, where they are known."""

    def split_batch(self, batch: dict) -> list[dict]:
        """Chunks of a micro-batch that go through the model one after the other."""
        return [batch]

    def compute_loss(self, model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The scalar loss of one chunk and what else should be logged: scalars, or [B] values in
        which NaN is left out of the mean."""
        raise NotImplementedError

    def make_validation(self):
        """A function (model, step) -> values to log that shows how far the training is; None
        where the stage has none. It is called on every process at once."""

    def save_model(self, model, folder: Path) -> None:
        """Write the trained model (EMA weights already in place) below `folder`."""
        raise NotImplementedError


def train(objective: Objective, config: LoopConfig) -> dict:
    """Run the whole training; resume it when the output folder holds checkpoints.

    Where this very training came to its end there before, it is not made again. Another one that
    did is set aside first, see `training.finished`.

    Returns:
        `{"steps", "images", "seconds", "images_per_second", "loss", "num_processes", …}`, also
        written to `<output_dir>/train_metrics.json` after the model is saved.

    Raises:
        BlockingIOError: another process trains in this folder.
        FileNotFoundError: a checkpoint was named that does not exist.
        FloatingPointError: the loss is no longer finite.
        MemoryError: the memory does not suffice; says what to lower.
        OSError: the disk is full; says which checkpoint is intact.
        ValueError: options that do not go together, or a tracker that is not installed.
    """
    tracking.check_report_to(config.report_to)
    # An earlier training here may have had another precision; accelerate has no public way.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=sdxl.choose_precision(config.mixed_precision, distributed.get_device()),
        # as a plugin: else a number in the hardware file wins over the option
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps
        ),
        kwargs_handlers=distributed.make_handlers(distributed.get_device()),
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(
            project_dir=config.output_dir,
            logging_dir=str(Path(config.output_dir) / config.logging_dir),
        ),
    )
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    if accelerator.device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32" if config.allow_tf32 else "ieee"
    with contextlib.ExitStack() as stack:
        lock = files.lock_folder(config.output_dir)
        distributed.ask_main(partial(stack.enter_context, lock))
        return _train_here(objective, config, accelerator)


def _train_here(objective: Objective, config: LoopConfig, accelerator) -> dict:
    """`train`, in a folder in which no other process is at work."""
    version = getattr(sys.modules[type(objective).__module__], "VERSION", None)
    images = objective.hash_images()
    record, metrics = distributed.ask_main(
        partial(finished.open_folder, accelerator, config, version, images)
    )
    if metrics is not None:
        _end(accelerator)
        return metrics
    try:
        return _Training(objective, config, accelerator, record).run()
    except (RuntimeError, MemoryError) as error:
        if objective.recomputes:  # no advice to do so
            config = dataclasses.replace(config, gradient_checkpointing=True)
        if text := tracking.describe_out_of_memory(error, config):
            raise MemoryError(text) from error
        raise


def make_optimizer(config: LoopConfig, parameters, batch: int = 1) -> torch.optim.Optimizer:
    """AdamW as the options say; `batch` is the global batch that `scale_lr` multiplies by.

    Raises:
        ValueError: `use_8bit_adam` without bitsandbytes.
    """
    options = {
        "lr": config.learning_rate * (batch if config.scale_lr else 1),
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }
    if not config.use_8bit_adam:
        return torch.optim.AdamW(parameters, **options, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError('use_8bit_adam needs bitsandbytes: pip install -e ".[eightbit]"') from None
    return AdamW8bit(parameters, **options)


class _Training:
    """One run: what `train` builds, steps through and saves."""

    def __init__(self, objective, config, accelerator, record):
        self.objective, self.accelerator, self.record = objective, accelerator, record
        set_seed(config.seed)
        objective.accelerator = accelerator
        model = objective.build_model()
        accelerator.wait_for_everyone()  # one node may load for minutes longer than another
        self.dataset = objective.make_dataset()
        if not config.max_train_steps:
            config = objective.config = _count_steps(config, objective)
        self.config, self.folder = config, Path(config.output_dir)
        flops = objective.tune_model(model)
        optimizer = make_optimizer(
            config, [p for p in model.parameters() if p.requires_grad], objective.global_batch
        )
        self.structure = distributed.copy_structure(accelerator, model)
        self.model, self.optimizer = distributed.prepare(accelerator, model, optimizer, config)
        self.scheduler = get_scheduler(
            config.lr_scheduler,
            self.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        self.states = {"scheduler": self.scheduler}
        # after `prepare`: a sharded model has other parameters than the one that was built
        self.trained = distributed.list_trained(self.model)
        self.count = sum(p.numel() for p in self.trained)
        self.fitting: list = []  # shapes of batches for which the memory suffices
        self.ema = None
        if config.ema_decay:
            self.ema = distributed.Average(
                self.trained, decay=config.ema_decay, foreach=accelerator.device.type == "cuda"
            )
            self.states["ema"] = self.ema
        self.first = self.step = checkpoints.load_checkpoint(
            accelerator,
            config,
            self.optimizer,
            **self._describe_state(),
        )
        self.validate = objective.make_validation()
        if self.validate is not None and distributed.get_kind(accelerator) == "FSDP2":
            logger.warning(
                "validation_steps has no effect under FSDP2, whose weights are whole "
                "on no process: only the finished model can be looked at"
            )
            self.validate = None
        tracking.start_trackers(accelerator, config)
        self.tracker = tracking.Tracker(
            accelerator, config, self.folder, objective.global_batch, flops_per_image=flops
        )
        if accelerator.is_main_process:
            tracking.trim_lines(self.folder / "metrics.jsonl", self.first)
            logger.info("%s", distributed.describe(accelerator, config))

    def run(self) -> dict:
        config, accelerator, objective = self.config, self.accelerator, self.objective
        started = time.monotonic()
        on_gpu = accelerator.device.type == "cuda"
        loader = DataLoader(
            self.dataset,
            batch_sampler=PositionSampler(config, accelerator, self.first),
            num_workers=config.dataloader_num_workers,
            pin_memory=on_gpu,
            # of its own: else it draws from the noise that a checkpoint restores
            generator=torch.Generator().manual_seed(config.seed),
            persistent_workers=config.dataloader_num_workers > 0,
        )
        line: dict = {}
        if self.first == 0:
            with self.tracker.excluded():
                self._look()
        for batch in _name_shared_memory(loader):
            batch = {k: v.to(accelerator.device, non_blocking=on_gpu) for k, v in batch.items()}
            if objective.recomputes is None:
                self._make_room(batch)
            norm = self._learn(batch)
            if not accelerator.sync_gradients:
                continue
            self.step += 1
            if self.step == self.first + 1:
                self.fitting.clear()  # there are the optimizer's states now
            if self._is_due(config.logging_steps) or self.step == config.max_train_steps:
                line = self.tracker.write(self.step, norm, self.scheduler.get_last_lr()[0])
            elif not config.logging_steps:
                self.tracker.begin()
            self._pause_at(norm)
        accelerator.wait_for_everyone()
        metrics = self._finish(line, time.monotonic() - started)
        _end(accelerator)
        return metrics

    def _make_room(self, batch) -> None:
        """Before a batch of a shape that was not seen yet: a trial, whose gradients go nowhere.

        Where the memory does not suffice on any process, activations are recomputed on all of them
        from then on. In a real step the others would wait for the gradients of one that has run
        out. Random states are afterwards as before: the training's numbers are the same.
        """
        accelerator, objective = self.accelerator, self.objective
        shape = [value.shape for value in batch.values()]
        if shape in self.fitting:
            return
        on_gpu, short = accelerator.device.type == "cuda", False
        with (
            self.tracker.excluded(),
            torch.random.fork_rng(devices=[accelerator.device] if on_gpu else []),
        ):
            try:
                # with accumulation, most forward passes find gradients there
                for _ in range(min(2, self.config.gradient_accumulation_steps)):
                    self._compute_gradients(batch, synchronise=False)
            except (RuntimeError, MemoryError) as error:
                if not tracking.is_out_of_memory(error):
                    raise
                short = True
            for parameter in self.trained:
                parameter.grad = None
            short = accelerator.gather(torch.tensor([int(short)], device=accelerator.device)).any()
        if not short:
            self.fitting.append(shape)
            return
        logger.info("the memory does not suffice as it is: gradient_checkpointing is turned on")
        objective.recomputes = True
        accelerator.unwrap_model(self.model).enable_gradient_checkpointing()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(accelerator.device)

    def _compute_gradients(self, batch, *, synchronise: bool = True) -> dict:
        """Forward and backward pass of one micro-batch, chunk by chunk; what is to be logged."""
        accelerator, model, shown = self.accelerator, self.model, []
        chunks = self.objective.split_batch(batch)
        sizes = [len(next(iter(chunk.values()))) for chunk in chunks]
        for number, (chunk, size) in enumerate(zip(chunks, sizes), 1):
            fraction, last = size / sum(sizes), number == len(chunks)
            # gradients travel once, with the last chunk
            travels = last and synchronise
            with contextlib.nullcontext() if travels else accelerator.no_sync(model):
                with accelerator.autocast():
                    loss, extra = self.objective.compute_loss(model, chunk)
                distributed.backward(accelerator, loss * fraction, last=last)
            shown.append((fraction, {"loss": loss.detach(), **extra}))
        return tracking.merge_chunks(shown)

    def _learn(self, batch):
        """One micro-batch; returns the gradient's norm before clipping where a step was taken."""
        accelerator, model, norm = self.accelerator, self.model, None
        with accelerator.accumulate(model):
            self.tracker.add(self._compute_gradients(batch))
            if accelerator.sync_gradients:
                norm = distributed.clip(accelerator, model, self.config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            self.scheduler.step()
            if self.ema is not None:
                self.ema.step(self.trained)
        return norm

    def _pause_at(self, norm) -> None:
        """What a step may end with: a look at the images, a checkpoint."""
        config, step = self.config, self.step
        save = self._is_due(config.checkpointing_steps) and step < config.max_train_steps
        if not (save or self._is_look_due()):
            return
        with self.tracker.excluded():  # waits for the GPU: not at every step
            self._look()
            if save:
                # with a scaler, infinite norms are skipped steps
                if norm is not None and self.accelerator.scaler is None:
                    tracking.check_finite(norm, "gradient's norm", step)
                checkpoints.save_checkpoint(
                    self.accelerator,
                    config,
                    step,
                    **self._describe_state(),
                )

    def _describe_state(self) -> dict:
        """What checkpoints keep besides the model and its optimizer."""
        return {
            "states": self.states,
            "train_size": self.objective.metrics.get("train_size"),
            "inputs": self.record["inputs"],
        }

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _is_look_due(self) -> bool:
        every = getattr(self.config, "validation_steps", 0)
        return (
            every > 0
            and self.validate is not None
            and (self._is_due(every) or self.step == self.config.max_train_steps)
        )

    def _look(self) -> None:
        """Validation at the start, every `validation_steps` and at the end, of averaged weights
        where they are kept."""
        if not self._is_look_due():
            return
        rounded = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        with (
            self.ema.in_place(self.trained, rounded=rounded)
            if self.ema is not None
            else contextlib.nullcontext()
        ):
            values = self.validate(self.accelerator.unwrap_model(self.model), self.step)
        self.accelerator.log(values, step=self.step)

    def _finish(self, line: dict, seconds: float) -> dict:
        """Save the model and the run's metrics; both are there whole or not at all."""
        accelerator, objective, step = self.accelerator, self.objective, self.step
        images, batch = (step - self.first) * objective.global_batch, objective.global_batch
        metrics = {
            "steps": step,
            "images": step * batch,
            "resumed_at": self.first,
            "seconds": round(seconds, 2),
            "images_per_second": round(images / max(seconds, 1e-9), 2),
            "num_processes": accelerator.num_processes,
            "trainable_parameters": self.count,
            **{k: v for k, v in line.items() if k.startswith("loss")},
        }
        model = distributed.gather_model(accelerator, self.model, self.structure, self.ema)
        tmp_path = self.folder / ".model.partial"
        with checkpoints.writing(accelerator, tmp_path):
            if accelerator.is_main_process:
                shutil.rmtree(tmp_path, ignore_errors=True)
                tmp_path.mkdir()
                objective.save_model(model, tmp_path)
                files.flush_folder(tmp_path)
        if accelerator.is_main_process:
            parts = [part.name for part in sorted(tmp_path.iterdir())]
            for name in parts:
                place = self.folder / name
                if place.exists():  # of a release that noted no settings, or of this run, killed
                    logger.info("%s was there before: it is now %s", place, set_aside(place))
                os.replace(tmp_path / name, place)
            tmp_path.rmdir()
            files.flush(self.folder)
            metrics |= objective.metrics
            if note := getattr(self.config, "comments", ""):
                metrics["comments"] = note
            finished.note(self.folder, self.record, metrics, parts)
            checkpoints.finish_checkpoints(self.config)
        return metrics


def _name_shared_memory(batches: Iterable) -> Iterator:
    """Batches as they come; too little shared memory is said with the setting that helps."""
    try:
        yield from batches
    except RuntimeError as error:
        if re.search("shared memory|shm|Bus error", str(error)):
            raise RuntimeError(
                "the processes that read samples pass them through /dev/shm, which is too small: "
                "set dataloader_num_workers to 0 (--dataloader_num_workers 0), or give the "
                f"container more (docker run --shm-size=8g). {error}"
            ) from error
        raise


def _end(accelerator) -> None:
    """Take leave of the other processes and of the trackers."""
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        # Gloo's thread may still need Python's lock to drop the last barrier. Freed before it
        # had it, the process group waits for the thread, holding that lock: for ever.
        # A pause makes that unlikely, not impossible.
        time.sleep(0.2)
    accelerator.end_training()


def _count_steps(config, objective):
    """The config with `max_train_steps` for its epochs."""
    size = objective.metrics.get("train_size")
    if size is None:
        raise ValueError("these samples have no end, hence no epochs: set max_train_steps")
    steps = math.ceil(config.num_train_epochs * size / objective.global_batch)
    return dataclasses.replace(config, max_train_steps=steps)
