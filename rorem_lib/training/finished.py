"""A training that came to its end: what it leaves, and that the next one there deletes none of it.

`<output_dir>/training.json`, written last but for `train_metrics.json`, holds the settings, the
content of what was read, the metrics, and the names of what `save_model` wrote (`parts`). The same
command typed again finds it and has nothing to do; another one moves all of it into
`<output_dir>/finished-<when it was made>/` before it begins.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path

from rorem_lib.files import format_time, hash_file, read_json, write_json
from rorem_lib.models import hub, sdxl
from rorem_lib.sets import resolve
from rorem_lib.training import checkpoints, distributed

logger = logging.getLogger(__name__)

RECORD, METRICS = "training.json", "train_metrics.json"
# Fields that a training may be resumed with other values of, but that make it another one.
_STEPS = {"max_train_steps", "num_train_epochs"}
_NOT_COMPARED = (
    (checkpoints.FREE_FIELDS - _STEPS)
    | checkpoints.HARDWARE_FIELDS
    | {*checkpoints.SETS, *checkpoints.MODELS}
)


def open_folder(accelerator, config, version, images: str | None) -> tuple[dict, dict | None]:
    """Look whether this very training came to its end in `output_dir`; set another one aside.

    For the main process alone (`distributed.ask_main`), before anything is loaded.

    Args:
        config: the run's `LoopConfig`, as it was given.
        version: of the job's module.
        images: of the job's `Objective.hash_images`.

    Returns:
        What is noted of this training, for `note`; the metrics of the finished one, None where it
        is to be made.
    """
    folder = Path(config.output_dir)
    record = {
        "version": version,
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "global_batch": distributed.count_global_batch(accelerator, config),
        "precision": distributed.get_precision(accelerator),
        "inputs": hash_inputs(config, images),
    }
    if not (folder / RECORD).is_file():
        if (folder / METRICS).is_file():  # of a release that noted no settings
            _set_aside(folder, {})
        return record, None
    found = read_json(folder / RECORD)
    whole = all((folder / part).exists() for part in found["parts"])
    changed = _compare(found, record, type(config))
    if whole and not changed and config.resume_from_checkpoint != "none":
        logger.info(
            "%s: this training came to its end before (%s), its result is kept; "
            "--resume_from_checkpoint none trains anew",
            folder,
            found["finished"],
        )
        if checkpoints.list_checkpoints(folder):  # killed before it had tidied up
            checkpoints.finish_checkpoints(config)
        write_json(folder / METRICS, found["metrics"])
        return record, found["metrics"]
    _set_aside(folder, found, changed)
    return record, None


def note(folder: Path, record: dict, metrics: dict, parts: list[str]) -> None:
    """Write `training.json` and `train_metrics.json`, when the model is there."""
    write_json(
        folder / RECORD,
        record | {"finished": format_time(), "parts": sorted(parts), "metrics": metrics},
    )
    write_json(folder / METRICS, metrics)


def hash_inputs(config, images: str | None) -> dict:
    """The content of the sets and models that a config names, whatever their paths are; `images`
    is of the job's `Objective.hash_images`."""
    found = {} if images is None else {"images": images}
    for name in checkpoints.SETS:
        if paths := getattr(config, name, None):
            found[name] = [hash_file(resolve(path)) for path in paths]
    for name in checkpoints.MODELS:
        if model := getattr(config, name, None):
            found[name] = hub.hash_model(sdxl.resolve_model(model))
    return found


def _compare(found: dict, record: dict, kind) -> list[str]:
    """What differs between a finished training and this one, in words; fields that were not noted
    had their defaults."""
    defaults = {
        field.name: field.default_factory()
        if field.default is dataclasses.MISSING
        else field.default
        for field in dataclasses.fields(kind)
    }
    before, now = defaults | found["config"], record["config"]
    changed = [
        f"{name} was {before[name]!r} and is {value!r}"
        for name, value in now.items()
        if name not in _NOT_COMPARED and before[name] != value
    ]
    changed += [
        f"{name} was {found[name]} and is {record[name]}"
        for name in ("version", "global_batch", "precision")
        if found[name] != record[name]
    ]
    changed += checkpoints.describe_content(found["inputs"], record["inputs"])
    named = now["resume_from_checkpoint"]
    if named != "latest" and named != before["resume_from_checkpoint"]:
        changed.append(f"resume_from_checkpoint is {named!r}")
    return changed


def _set_aside(folder: Path, found: dict, changed: list[str] = ()) -> None:
    """Move a finished training into a folder of its own; killed half-way, the next start goes on:
    what says that it is there is moved last."""
    last = [name for name in (METRICS, RECORD) if (folder / name).exists()]
    made = datetime.fromtimestamp((folder / last[0]).stat().st_mtime, UTC)
    if "finished" in found:
        made = datetime.fromisoformat(found["finished"])
    names = [*found.get("parts", ()), "metrics.jsonl", "validation_images"]
    names += [
        p.name
        for p in folder.glob("checkpoint-*")
        # of a release before this one, a later training may have begun beside it
        if p.suffix != ".partial" and (found or not (p / "step.json").is_file())
    ]
    names = [name for name in names if (folder / name).exists()] + last
    stem = f"finished-{made:%Y%m%d-%H%M%S}"
    places = (folder / f"{stem}{n or ''}" for n in itertools.count())
    target = next(p for p in places if not any((p / name).exists() for name in names))
    target.mkdir(exist_ok=True)
    for name in names:
        os.rename(folder / name, target / name)
    logger.info(
        "the training that came to its end in %s is another one%s: it is now %s",
        folder,
        f" ({'; '.join(changed)})" if changed else "",
        target,
    )
