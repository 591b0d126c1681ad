"""A run's folder `runs/<recipe>/`: its lock, the state of each stage in it, folders set aside.

It holds a folder a stage, `run.json` (seconds), `.lock`, and `.superseded/` with the latest copy
of the folders that a change made stale. A stage is done when its DONE marker holds its fingerprint.
Until then `stage.started.json` says for which fingerprint work began, so that a killed training
goes on from its checkpoints and a changed one starts afresh.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rorem_lib.files import format_time, read_json, write_json
from rorem_lib.runner.fingerprints import (
    Fingerprint,
    compute_fingerprints,
    describe_change,
    list_labels,
)
from rorem_lib.runner.recipes import Recipe, StageRow
from rorem_lib.runner.stage import STARTED


class RunLocked(RuntimeError):
    """Another runner works in the same folder."""


@dataclass(frozen=True)
class StageState:
    """Where a stage stands.

    `state` is "done", "changed" (done once, stale now), "half-way" (killed), "failed", "waiting"
    (for labels) or "to run"; `note` says what changed or failed; `seconds`, `finished` and
    `metrics` are those of the last finished run.
    """

    row: StageRow
    fingerprint: Fingerprint
    state: str
    note: str = ""
    seconds: float | None = None
    finished: str | None = None
    metrics: dict = field(default_factory=dict)


def read_record(path: Path) -> dict:
    """A JSON record; empty where it is missing or torn."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def read_states(recipe: Recipe, *, runs_dir: Path) -> list[StageState]:
    """Every stage's state, in the recipe's order; changes nothing."""
    run_dir = runs_dir / recipe.name
    prints = compute_fingerprints(recipe, run_dir=run_dir)
    return [read_state(row, prints[row.name], run_dir / row.name) for row in recipe.stages]


def read_state(row: StageRow, fingerprint: Fingerprint, folder: Path) -> StageState:
    """One stage's state, from the records in its folder."""
    started, record = read_record(folder / STARTED), read_record(folder / "stage.json")
    try:
        done = (folder / "DONE").read_text(encoding="utf-8").strip()
    except OSError:
        done = None
    if done == fingerprint.digest and (folder / "metrics.json").is_file():
        return StageState(
            row,
            fingerprint,
            "done",
            "",
            record.get("seconds"),
            record.get("finished"),
            read_record(folder / "metrics.json"),
        )
    if done or (started and started.get("base") != fingerprint.base):
        note = describe_change((record if done else started).get("inputs", {}), fingerprint.inputs)
        return StageState(
            row, fingerprint, "changed", note, record.get("seconds"), record.get("finished")
        )
    if started:
        return StageState(
            row, fingerprint, started.get("state", "half-way"), started.get("error", "")
        )
    return StageState(row, fingerprint, "to run")


def lock_run(run_dir: Path):
    """Hold `runs/<recipe>/.lock`; the kernel lets go of it when this process ends, in any way."""
    lock = open(run_dir / ".lock", "a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        pid = lock.read().strip() or "unknown"
        lock.close()
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise RunLocked(
            f"another runner (pid {pid}) is at work in {run_dir}: wait for it, or end "
            f"it with: kill {pid}"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def is_running(run_dir: Path) -> str | None:
    """The pid of the runner at work in the folder; None where there is none."""
    try:
        with open(run_dir / ".lock", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return lock.read().strip()
    except OSError:
        pass
    return None


def supersede_folder(folder: Path) -> None:
    """Move a stage's folder aside to `.superseded/`, where the latest copy of each stage stays.

    What people labelled is never deleted: a copy that holds it gets a name of its own, and the
    label files (with a user study's trials) are in the stage's new folder at once. They name the
    candidates' content hashes, so labels of pictures that changed count for nothing.
    """
    if not folder.exists():
        return
    shelf, fresh = folder.parent / ".superseded", folder.parent / f".{folder.name}.fresh"
    shelf.mkdir(exist_ok=True)
    place = shelf / folder.name
    labels = [
        p
        for p in list_labels(folder)
        if '"simulated": false' in p.read_text(encoding="utf-8", errors="replace")
    ]
    if labels:
        place = shelf / f"{folder.name}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    shutil.rmtree(fresh, ignore_errors=True)
    trials = {path.with_name("trials.json") for path in labels}
    for path in [*labels, *(path for path in trials if path.exists())]:
        target = fresh / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    if place.exists():
        shutil.rmtree(place)
    os.rename(folder, place)
    if fresh.exists():
        os.rename(fresh, folder)


def open_folder(row: StageRow, fingerprint: Fingerprint, folder: Path) -> dict:
    """Get a stage's folder ready, the half-done work of the same fingerprint kept in it."""
    fresh = folder.parent / f".{folder.name}.fresh"
    if fresh.exists() and not folder.exists():  # killed between the two renames
        os.rename(fresh, folder)
    elif read_record(folder / STARTED).get("base") != fingerprint.base:
        supersede_folder(folder)
    folder.mkdir(exist_ok=True)
    started = {
        "stage": row.name,
        "fingerprint": fingerprint.digest,
        "base": fingerprint.base,
        "inputs": fingerprint.inputs,
        "pid": os.getpid(),
        "started": format_time(),
    }
    write_json(folder / STARTED, started)
    for name in ("DONE", "metrics.json", "stage.json"):
        (folder / name).unlink(missing_ok=True)
    return started
