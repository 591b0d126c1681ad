"""Checkpoints of a training: written beside and renamed, checked before they are loaded."""

from __future__ import annotations

import dataclasses
import logging
import re
import shutil
from pathlib import Path

from rorem_lib.files import read_json, write_json

logger = logging.getLogger(__name__)

# What may differ between a checkpoint and the run that goes on from it.
FREE_FIELDS = {"output_dir", "max_train_steps", "checkpointing_steps", "checkpoints_total_limit",
               "resume_from_checkpoint", "logging_steps", "dataloader_num_workers", "report_to",
               "latent_cache_dir"}


def list_checkpoints(folder) -> list[Path]:
    """The complete checkpoints `checkpoint-<step>` of a run, oldest first."""
    found = [p for p in Path(folder).glob("checkpoint-*")
             if re.fullmatch(r"checkpoint-\d+", p.name) and (p / "step.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def save_checkpoint(accelerator, config, step):
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


def load_checkpoint(accelerator, config) -> int:
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
