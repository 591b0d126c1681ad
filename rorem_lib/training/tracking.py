"""What a training shows of itself: the lines of `metrics.jsonl`, trackers, its log."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from rorem_lib.data.journal import Journal
from rorem_lib.files import write_text
from rorem_lib.training import distributed
from rorem_lib.training.memory import get_peak_flops

logger = logging.getLogger(__name__)

EXTRA_TRACKERS = ("tensorboard", "trackio", "wandb")  # the package's extra `trackers`
# In the texts of errors, lower case: allocators of GPUs, of CPUs, of CUDA's libraries.
OOM_SIGNS = ("out of memory", "can't allocate memory", "defaultcpuallocator", "alloc_failed")


def trim_lines(path: Path, step: int) -> None:
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


def check_finite(value, name: str, step: int) -> None:
    """Stop a training that has diverged; a value that is None is not known and passes.

    Raises:
        FloatingPointError: the value is infinite or not a number.
    """
    if value is not None and not math.isfinite(float(value)):
        raise FloatingPointError(
            f"the {name} is {float(value)} at step {step}: lower learning_rate, or use bf16 or "
            "float32 in the place of fp16, and begin anew or from a checkpoint before this step"
        )


def _append_line(path: Path, line: dict) -> None:
    """Write it whole or, on a full disk, not at all: it is not worth the training."""
    journal = Journal(path)
    try:
        journal.append(line)
    except OSError as error:
        logger.warning("no line of step %d: %s", line["step"], error)
    journal.close()


class Tracker:
    """Lines of `metrics.jsonl`: means over a window of steps, of all processes.

    Nothing is read from the device between two lines, so the device does not wait for them.

    Args:
        accelerator: the run's.
        config: the run's `LoopConfig`.
        folder: where `metrics.jsonl` is.
        batch_total: samples an optimizer step, of all processes.
        flops_per_image: of training on one image, forward and backward (`memory.count_flops` x 3);
            None leaves `mfu` out.
    """

    def __init__(
        self,
        accelerator,
        config,
        folder: Path,
        batch_total: int,
        flops_per_image: float | None = None,
    ):
        self.accelerator, self.config, self.folder = accelerator, config, Path(folder)
        self.batch_total, self.flops_per_image = batch_total, flops_per_image
        self.device = torch.device(accelerator.device)
        self.peak = get_peak_flops(self.device)
        self.window: dict[str, list[torch.Tensor]] = {}
        self.begin()

    def begin(self) -> None:
        """Forget what was noted: the next line's window begins here."""
        self.window = {name: [] for name in self.window}
        self.micro_batches, self.excluded_seconds = 0, 0.0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.since = time.monotonic()

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Note one micro-batch.

        Args:
            values: a scalar, or a tensor [B] with a value a sample, in which NaN means absent, by
                name. Each call has the same names, on all processes; `loss` is one of them.

        Raises:
            ValueError: the names are not those of the first call.
        """
        if self.window and values.keys() != self.window.keys():
            raise ValueError(
                f"an objective logged {', '.join(values)} after "
                f"{', '.join(self.window)}: the names must stay the same"
            )
        for name, value in values.items():
            self.window.setdefault(name, []).append(value.detach())
        self.micro_batches += 1

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """What runs inside (a checkpoint, a validation) is no training time."""
        self._wait()
        start = time.monotonic()
        try:
            yield
        finally:
            self._wait()
            self.excluded_seconds += time.monotonic() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":  # steps are queued there, and still count
            torch.cuda.synchronize(self.device)

    def write(self, step: int, norm, lr: float) -> dict | None:
        """Write the line of the window that ends here, to trackers too, and begin the next.

        All processes call it; only the main one writes.

        Args:
            step: optimizer steps done in all.
            norm: the last step's gradient norm, or None where it is not known.
            lr: the learning rate.

        Returns:
            The line, the same on all processes but for their clocks: `step`; the mean of each
            name, left out where no sample had a value; `lr`; `grad_norm`, left out where it is
            unknown or infinite (a step that fp16 skips); `images_per_second` of all processes;
            `seconds_left`; `memory_gb`, in 10^9 bytes the most any process had allocated on its
            GPU in the window, or without GPU had resident since it began; `mfu` where the
            device's peak is known. None where nothing was noted since the last line.

        Raises:
            FloatingPointError: the loss is infinite or not a number.
        """
        if not self.micro_batches:
            return None
        means, memory = self._gather()
        seconds = max(time.monotonic() - self.since - self.excluded_seconds, 1e-9)
        steps = self.micro_batches / self.config.gradient_accumulation_steps
        check_finite(means.get("loss", math.nan), "loss", step)
        line = {"step": step, **{name: round(mean, 6) for name, mean in means.items()}, "lr": lr}
        norm = None if norm is None else float(norm)
        if norm is not None and math.isfinite(norm):
            line["grad_norm"] = round(norm, 4)
        line |= {
            "images_per_second": round(steps * self.batch_total / seconds, 2),
            "seconds_left": round((self.config.max_train_steps - step) * seconds / steps, 1),
            "memory_gb": round(memory / 1e9, 3),
        }
        if self.peak and self.flops_per_image:
            done = self.flops_per_image * self.micro_batches * self.config.train_batch_size
            line["mfu"] = round(done / seconds / self.peak, 4)
        if self.accelerator.is_main_process:
            _append_line(self.folder / "metrics.jsonl", line)
            logger.info(
                "step %d/%d  loss %.4f  lr %.2g  %.1f images/s%s  %.1f GB  %d s left",
                step,
                self.config.max_train_steps,
                line["loss"],
                lr,
                line["images_per_second"],
                f"  MFU {line['mfu']:.1%}" if "mfu" in line else "",
                line["memory_gb"],
                line["seconds_left"],
            )
        self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=step)
        self.begin()
        return line

    def _gather(self) -> tuple[dict[str, float], float]:
        """Means by name and the largest memory (bytes), in one gather."""
        rows = []
        for values in self.window.values():
            # A scalar that is NaN is a loss gone wrong; only a sample's NaN means absent.
            absent = [
                value.isnan() if value.ndim else torch.zeros_like(value, dtype=torch.bool)
                for value in values
            ]
            flat = torch.cat([value.flatten().float() for value in values])
            here = ~torch.cat([mask.flatten() for mask in absent])
            if self.accelerator.scaler is not None:  # it skips a step that overflows
                here &= flat.isfinite()
            rows.append(torch.stack([flat.where(here, 0).sum(), here.sum()]))
        memory = torch.tensor([[_read_peak_memory(self.device), 0.0]])
        table = torch.cat([torch.stack(rows).to(self.device), memory.to(self.device)])
        gathered = self.accelerator.gather(table[None]).double().cpu()  # [P, names + 1, 2]
        sums = gathered[:, :-1].sum(dim=0).tolist()
        means = {name: total / count for name, (total, count) in zip(self.window, sums) if count}
        return means, gathered[:, -1, 0].max().item()


def _read_peak_memory(device: torch.device) -> float:
    """Bytes: the GPU's peak since it was last reset, or else this process's resident peak."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):  # Linux; getrusage begins there at what the parent had
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def check_report_to(name: str) -> None:
    """Refuse a tracker that could not be started, before a model is loaded.

    Args:
        name: "none", "all" that are installed, or one tracker that accelerate knows.

    Raises:
        ValueError: there is no such tracker, or it is not installed; accelerate itself would go
            on and log nowhere.
    """
    installed = {str(tracker) for tracker in get_available_trackers()}
    # what was registered with accelerate besides its own is there
    installed |= {tracker for tracker in LOGGER_TYPE_TO_CLASS if tracker not in LoggerType}
    if name == "none" or name in installed or (name == "all" and installed):
        return
    if name == "all" or name in EXTRA_TRACKERS:
        raise ValueError(
            f"report_to is {name}, which is not installed: run `pip install -c "
            'requirements/constraints.txt -e ".[trackers]"`, or set report_to to none'
        )
    if name in LOGGER_TYPE_TO_CLASS:
        raise ValueError(
            f"report_to is {name}, which is not installed: install its package, or "
            f"take one of {', '.join(EXTRA_TRACKERS)} or none"
        )
    raise ValueError(
        f"report_to is {name!r}: take none, all or one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
    )


def start_trackers(accelerator, config) -> None:
    """Start what `report_to` names, and hand it the run's settings; "none" starts nothing."""
    if config.report_to == "none":
        return
    settings = {}
    for name, value in dataclasses.asdict(config).items():  # trackers take no lists
        if isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        settings[name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    Path(accelerator.logging_dir).mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers(
        "rorem", config=settings, init_kwargs={"wandb": {"dir": accelerator.logging_dir}}
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device's memory, or the machine's, did not suffice."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in OOM_SIGNS)
    )


def describe_out_of_memory(
    error: BaseException, config, sizes: Sequence[tuple[int, int]] = ()
) -> str | None:
    """What to lower when a training's memory did not suffice.

    Args:
        error: what was raised.
        config: the run's `LoopConfig`; what it has no field for, or has on already, is not named.
        sizes: (height, width) of the training images, px; empty takes the config's resolutions.

    Returns:
        A sentence, or None where the error is another one.
    """
    if not is_out_of_memory(error):
        return None
    on_gpu = isinstance(error, torch.OutOfMemoryError) or str(error).lower().startswith(
        ("cu", "hip")
    )

    batch, times = config.train_batch_size, config.gradient_accumulation_steps
    ways = []
    if batch > 1:
        part = next(n for n in range(2, batch + 1) if batch % n == 0)
        ways.append(
            f"train_batch_size {batch // part} with gradient_accumulation_steps "
            f"{times * part} (the training stays the same)"
        )
    if not getattr(config, "gradient_checkpointing", True):
        ways.append("gradient_checkpointing")
    if on_gpu and not getattr(config, "use_8bit_adam", True):
        ways.append("use_8bit_adam")
    if not getattr(config, "lora_rank", 1) and not hasattr(config, "rank"):
        ways.append("lora_rank 64 (in the place of all weights)")
    if on_gpu and not any(map(distributed.is_asked_for, ("DEEPSPEED", "FSDP"))):
        ways.append(
            "several GPUs with `accelerate launch --config_file notebooks/recipes/"
            "accelerate/deepspeed_zero2.yaml`"
        )
    if not sizes:
        names = ["resolution"]
        if getattr(config, "high_resolution_meta_path", ()):
            names.append("high_resolution")
        sizes = [(side, side) for name in names if (side := getattr(config, name, 0))]
    where = " on the GPU" if on_gpu else ""
    if sizes:
        height, width = max(sizes, key=math.prod)
        where += f" at {width} x {height} px"
        ways.append("a lower resolution")
    advice = (
        f"any of this lowers what is needed: {', '.join(ways)}"
        if ways
        else "there is nothing left to lower"
    )
    return f"out of memory{where} with train_batch_size {batch}: {advice}"


def merge_chunks(parts: list[tuple[float, dict]]) -> dict:
    """What the chunks of one micro-batch showed, as if it had been one: means weighted by their
    share, [B] values joined."""
    if len(parts) == 1:
        return parts[0][1]
    merged = {}
    for name, value in parts[0][1].items():
        values = [shown[name].detach() for _, shown in parts]
        merged[name] = (
            torch.cat(values)
            if value.ndim
            else sum(fraction * v for (fraction, _), v in zip(parts, values))
        )
    return merged


def split_by_time(losses: torch.Tensor, timesteps: torch.Tensor, total: int) -> dict:
    """Losses [B] by quartile of their timesteps [B], `loss_t1` (least noise) to `loss_t4`; NaN
    where a sample belongs to another quartile."""
    quartile = timesteps * 4 // total
    return {f"loss_t{n + 1}": losses.masked_fill(quartile != n, math.nan) for n in range(4)}
