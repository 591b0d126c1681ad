"""What a training shows of itself: the lines of `metrics.jsonl`, trackers, its log."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path

import torch

from rorem_lib.files import write_text

logger = logging.getLogger(__name__)


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
    if not math.isfinite(float(value)):
        raise FloatingPointError(
            f"the {name} is {float(value)} at step {step}: lower learning_rate, or use bf16 or "
            "float32 in the place of fp16; the last checkpoint is intact")


def write_line(accelerator, folder, config, step, window, norm, scheduler, since,
               batch_total) -> dict:
    seconds = max(time.time() - since, 1e-9)
    steps = len(window) / config.gradient_accumulation_steps
    names = window[-1].keys()
    line = {"step": step}
    for name in names:
        mean = torch.stack([w[name].float().mean() for w in window]).mean()
        mean = accelerator.gather(mean[None].to(accelerator.device)).mean().item()
        line[name] = round(mean, 6)
    check_finite(line["loss"], "loss", step)
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
