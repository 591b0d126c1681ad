"""A run's folder `runs/<recipe>/`: its lock, the state of each stage in it, folders set aside.

It holds a folder a stage, `run.json` (seconds), `.lock`, and `.superseded/` with the folders that
newer ones took the place of. Nothing in it is ever deleted but by `remove_superseded`, which
`rorem clean` calls. A stage is finished when its DONE marker, written last, holds the fingerprint
of its `stage.json`, and current while the inputs in there are what they would be now. Until it is
finished `stage.started.json` says for which inputs work began, so that a killed training goes on
from its checkpoints and a changed one starts afresh.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rorem_lib.files import flush_disk, format_time, read_json, write_json, write_text
from rorem_lib.runner.fingerprints import (
    describe_change,
    digest,
    hash_content,
    is_earlier,
    is_record,
    list_labels,
    list_references,
    measure_content,
    read_inputs,
)
from rorem_lib.runner.recipes import Recipe, RecipeError, StageRow
from rorem_lib.runner.stage import STARTED

SUPERSEDED = ".superseded"
LONG = 60  # seconds of work that are not thrown away without asking
UNREADABLE = "unreadable"
_TYPES = {  # of the records' entries; one of another type counts as missing
    "inputs": dict,
    "outputs": dict,
    "stages": dict,
    "accepted": list,
    "runs": list,
    "seconds": (int, float),
    "worked": (int, float),
    **dict.fromkeys(("stage", "started", "finished", "state", "error", "fingerprint"), str),
}
# What is no work: records, and what people said, which is carried on.
_NO_WORK = re.compile(
    r"(notebook\.ipynb|config\.yaml|DONE|metrics\.json|stage(\.started)?\.json|trials\.json"
    r"|labels-.*\.jsonl|.*\.log|\..*)\Z"
)


class RunLocked(RuntimeError):
    """Another runner works in the same folder."""


@dataclass(frozen=True)
class StageState:
    """Where a stage stands.

    `state` is "done", "changed" (what is there was made of other inputs), "half-way" (killed),
    "failed", "waiting" (for labels), "unreadable" (something is there, and no record says of what
    it was made) or "to run"; `note` says what changed or failed. `seconds` is the work in its
    folder, where it is known, `finished` when it was finished (None: half-done), `metrics` its
    results. `replaced` is whether running it sets its folder aside.
    """

    row: StageRow
    state: str
    note: str = ""
    seconds: float | None = None
    finished: str | None = None
    metrics: dict = field(default_factory=dict)
    replaced: bool = False

    @property
    def long(self) -> bool:
        """Whether running the stage takes the place of more than a minute's work, or of unknown."""
        return self.replaced and (self.seconds is None or self.seconds > LONG)


def read_record(path: Path) -> dict:
    """A JSON record; empty where it is missing or torn. Entries of a wrong type are left out."""
    try:
        record = read_json(path)
    except (OSError, ValueError):
        return {}
    entries = record.items() if isinstance(record, dict) else ()
    return {key: value for key, value in entries if isinstance(value, _TYPES.get(key, object))}


def read_finished(folder: Path) -> dict:
    """The `stage.json` of a finished stage; empty where it is not finished."""
    record = read_record(folder / "stage.json")
    try:
        done = (folder / "DONE").read_text(encoding="utf-8").strip()
    except OSError:
        return {}
    finished = done == record.get("fingerprint") and (folder / "metrics.json").is_file()
    return record if finished and "inputs" in record else {}


# ------------------------------------------------------------------------------------- results


class Outputs:
    """What the stages of a run have made, as hashes; see `get`.

    Args:
        run_dir: `runs/<recipe>`.
        keep: write new hashes to `stage.json`; only for who holds the run's lock.
    """

    def __init__(self, run_dir: Path, *, keep: bool = False):
        self.run_dir, self.keep = run_dir, keep
        self.stamps: dict[Path, str | None] = {}  # of folders outside, see `read_inputs`
        self._known: dict[tuple[str, str], str | None] = {}

    def get(self, stage: str, path: str, say=lambda text: None) -> str | None:
        """SHA-256 of what lies at `path` in a finished stage's folder; None if it is not finished.

        Files are read once: `outputs` in `stage.json` holds the hash with the files' names, bytes
        and times, and while these stay the hash does. `say` is called before many are read.
        """
        if (stage, path) not in self._known:
            self._known[stage, path] = self._read(self.run_dir / stage, path, say)
        return self._known[stage, path]

    def forget(self, stage: str) -> None:
        """Look anew at a stage that has run."""
        self._known = {key: value for key, value in self._known.items() if key[0] != stage}

    def _read(self, folder: Path, path: str, say) -> str | None:
        record, place, top = read_finished(folder), folder / path, path == "."
        if not record:
            return None
        known = record.get("outputs", {}).get(path)
        known = known if isinstance(known, dict) and "sha256" in known else {}
        if not place.exists():  # what was deleted since is what it was, see `find_gone`
            return known.get("sha256", "nothing")
        seen = measure_content(place, top=top)
        if {**known, **seen} == known:
            return known["sha256"]
        if seen["bytes"] > 1e9:
            say(f"reads {path} for its hash: {seen['files']:,} files, {seen['bytes'] / 1e9:.0f} GB")
        seen["sha256"] = hash_content(place, top=top)
        if self.keep:
            record["outputs"] = {**record.get("outputs", {}), path: seen}
            write_json(folder / "stage.json", record)
        return seen["sha256"]


def find_gone(row: StageRow, run_dir: Path) -> list[tuple[str, str]]:
    """What a stage reads of finished stages and somebody has deleted: (stage, path below it)."""
    return [
        (stage, path)
        for stage, path in list_references(row)
        if path in read_finished(run_dir / stage).get("outputs", {})
        and not (run_dir / stage / path).exists()
    ]


# -------------------------------------------------------------------------------------- states


def read_states(recipe: Recipe, *, runs_dir: Path) -> list[StageState]:
    """Every stage's state, in the recipe's order; changes nothing."""
    run_dir = runs_dir / recipe.name
    outputs = Outputs(run_dir)
    return [read_state(row, run_dir, outputs) for row in recipe.stages]


def read_state(row: StageRow, run_dir: Path, outputs: Outputs) -> StageState:
    """One stage's state, from the records in its folder.

    Raises:
        RecipeError: its notebook or the module of its job can't be read.
    """
    folder = run_dir / row.name
    if folder.is_symlink() and not folder.exists():
        target = os.readlink(folder)
        raise RecipeError(
            folder,
            [f"is a link to {target}, which is not there: bring that back, or remove the link"],
        )
    record, started = read_finished(folder), read_started(folder)
    if not (record or started):
        if not has_work(folder):
            return StageState(row, "to run")
        note = "no record says what it was made of"
        return StageState(row, UNREADABLE, note, replaced=True)
    before = (record or started)["inputs"]
    known = (lambda stage, path: None) if is_earlier(before) else outputs.get  # no need to hash
    now = read_inputs(row, folder=folder, get_content=known, stamps=outputs.stamps)
    note = describe_change(before, now)
    replaced = bool(describe_change(before, now, labels=False))
    if record:
        metrics = read_record(folder / "metrics.json")
        seconds, finished = record.get("seconds"), record.get("finished")
        state = "changed" if note else "done"
        return StageState(row, state, note, seconds, finished, metrics, replaced)
    state = "changed" if replaced else started.get("state") or "half-way"
    note = note if replaced else started.get("error", "")
    return StageState(row, state, note, count_work(folder), replaced=replaced)


def read_started(folder: Path) -> dict:
    """The record of work that began in a stage's folder; empty where none can be read."""
    for name in (STARTED, "stage.json"):  # the latter without its DONE marker
        if "inputs" in (record := read_record(folder / name)):
            return record
    return {}


def has_work(folder: Path) -> bool:
    """Whether a stage's folder holds more than records and what people said."""
    places = [folder] if folder.is_dir() else []
    while places:
        for path in places.pop().iterdir():
            if path.is_dir() and not path.is_symlink():
                places.append(path)
            elif not _NO_WORK.match(path.name):
                return True
    return False


def count_work(folder: Path) -> float:
    """Seconds of work in a half-done stage's folder, over all times that it was started.

    What failed left them; of what was killed the newest file at the top of the folder, and of the
    folders in it, tells when the work ended.
    """
    started = read_record(folder / STARTED)
    if "state" in started or "started" not in started:
        return started.get("worked", 0.0)
    paths = [*folder.iterdir(), *folder.glob("*/*")]
    newest = max((path.lstat().st_mtime for path in paths), default=0.0)
    try:
        began = datetime.fromisoformat(started["started"]).timestamp()
    except ValueError:
        return started.get("worked", 0.0)
    return started.get("worked", 0.0) + max(0.0, newest - began)


def accept_stage(row: StageRow, run_dir: Path, outputs: Outputs) -> str:
    """Mark what is there of a stage, finished or half-done, as made of the inputs of now.

    Where no record can be read, one is written of work that began: the stage goes on in its folder,
    with what is there. Call it with the run's lock held.

    Returns:
        What had changed, "" where the stage was current. `stage.json` keeps it in `accepted`.

    Raises:
        RecipeError: nothing is there.
    """
    folder = run_dir / row.name
    state = read_state(row, run_dir, outputs)
    if state.state == "to run":
        raise RecipeError(folder, [f'there is nothing of the stage "{row.name}" yet'])
    if state.state not in ("changed", UNREADABLE):
        return ""
    name = "stage.json" if state.finished else STARTED
    record = read_record(folder / name) or {"stage": row.name, "started": format_time()}
    now = read_inputs(row, folder=folder, get_content=outputs.get, stamps=outputs.stamps)
    for key, value in now["content"].items():
        if value is None:  # of a stage that is not finished: as it was
            now["content"][key] = record.get("inputs", {}).get("content", {}).get(key)
    accepted = {"time": format_time(), "changes": state.note}
    record |= {"inputs": now, "accepted": [*record.get("accepted", []), accepted]}
    write_json(folder / name, record)
    return state.note


# ---------------------------------------------------------------------------------------- lock


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


# ------------------------------------------------------------------------- a stage's own folder


def open_folder(row: StageRow, inputs: dict, folder: Path, *, keep: bool = False) -> dict:
    """Get a stage's folder ready, the half-done work of the same inputs kept in it.

    Args:
        row: the stage.
        inputs: what it is made of now.
        folder: its folder.
        keep: go on with what is half done there, whatever it was made of.

    Returns:
        The record that says so.
    """
    fresh = _name_fresh(folder)
    record, started = read_finished(folder), read_started(folder)
    before = (record or started).get("inputs", {})
    if fresh.exists() and not folder.exists():  # killed between the two renames
        os.rename(fresh, folder)
    elif describe_change(before, inputs, labels=False) and not (keep and before):
        supersede_folder(folder)
        started = {}
    folder.mkdir(exist_ok=True)
    before = {} if record else started  # what is finished is made anew, the rest goes on
    started = {
        "stage": row.name,
        "inputs": inputs,
        "pid": os.getpid(),
        "started": format_time(),
        "worked": count_work(folder) if before else 0.0,
        "accepted": before.get("accepted", []),
    }
    write_json(folder / STARTED, started)
    for name in ("DONE", "metrics.json", "stage.json"):
        (folder / name).unlink(missing_ok=True)
    return started


def close_folder(folder: Path, inputs: dict, record: dict) -> None:
    """Mark a stage as finished: `stage.json`, then DONE; a kill in between leaves it half-done.

    What the stage wrote is on the disk before.
    """
    fingerprint = digest(inputs)
    flush_disk(folder)
    write_json(folder / "stage.json", record | {"inputs": inputs, "fingerprint": fingerprint})
    write_text(folder / "DONE", fingerprint + "\n")


def _name_fresh(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.fresh")


def _read_made(folder: Path) -> datetime:
    """When what lies in a stage's folder was made: finished, else started."""
    record = read_record(folder / "stage.json") or read_record(folder / STARTED)
    try:
        made = datetime.fromisoformat(record.get("finished") or record["started"])
        return made.replace(tzinfo=made.tzinfo or UTC)
    except (KeyError, ValueError):
        return datetime.fromtimestamp(folder.lstat().st_mtime, UTC)


def supersede_folder(folder: Path) -> None:
    """Move a stage's folder aside to `.superseded/<stage>-<when it was made>`; nothing is deleted.

    What people labelled (with a user study's trials) is in the stage's new folder at once. Labels
    name the candidates' content hashes, so those of images that changed count for nothing. Of a
    link the link is moved, not what it points to.
    """
    if not folder.exists():
        return
    place, fresh = _find_place(folder), _name_fresh(folder)
    shutil.rmtree(fresh, ignore_errors=True)  # copies, of a kill before the first rename
    for path in _list_answers(folder):
        target = fresh / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    if folder.is_symlink():  # a relative one would point elsewhere from its new place
        place.symlink_to(folder.parent.absolute() / os.readlink(folder))
        folder.unlink()
    else:
        os.rename(folder, place)
    if fresh.exists():
        os.rename(fresh, folder)


def supersede_job(folder: Path) -> Path:
    """Move what a finished job made out of its stage's folder to `.superseded`; returns the place.

    What the notebook that is running has written since it began stays.
    """
    place, started = _find_place(folder), folder / STARTED
    place.mkdir()
    shutil.copy2(started, place)
    for path in list(folder.iterdir()):
        old = path.lstat().st_mtime < started.stat().st_mtime
        if path.name in ("config.yaml", "train_metrics.json") or (old and path != started):
            os.rename(path, place / path.name)
    return place


def _find_place(folder: Path) -> Path:
    """A free name in `.superseded` for what lies in a stage's folder."""
    shelf = folder.parent / SUPERSEDED
    shelf.mkdir(exist_ok=True)
    stem = f"{folder.name}-{_read_made(folder):%Y%m%d-%H%M%S}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(shelf / name for name in names if not os.path.lexists(shelf / name))


def _list_answers(folder: Path) -> list[Path]:
    """Label files with labels by people, and the trials of the user studies beside them."""
    labels = [
        path
        for path in list_labels(folder)
        if '"simulated": false' in path.read_text(encoding="utf-8", errors="replace")
    ]
    trials = {path.with_name("trials.json") for path in labels}
    return [*labels, *sorted(path for path in trials if path.exists())]


# --------------------------------------------------------------------------- folders set aside


@dataclass(frozen=True)
class Superseded:
    """A folder that was set aside: its stage, when it was made (UTC), bytes, and what it holds."""

    path: Path
    stage: str
    made: datetime
    size: int
    holds: list[str]


def list_superseded(run_dir: Path) -> list[Superseded]:
    """The folders that were set aside, the oldest first."""
    found = []
    shelf = run_dir / SUPERSEDED
    for path in shelf.iterdir() if shelf.is_dir() else ():
        if path.is_symlink():  # what it points to is not the run's
            size, holds = 0, [f"a link to {os.readlink(path)}"]
        elif path.is_dir():
            size = sum(p.lstat().st_size for p in path.rglob("*") if not p.is_dir())
            holds = sorted(p.name for p in path.iterdir() if not is_record(p.name))
            holds += [p.name for p in _list_answers(path) if p.suffix == ".jsonl"]
        else:
            continue
        record = read_record(path / "stage.json") or read_record(path / STARTED)
        stage = record.get("stage") or path.name
        found.append(Superseded(path, stage, _read_made(path), size, holds))
    return sorted(found, key=lambda entry: (entry.made, entry.path.name))


def _stands_here_alone(answers: Path) -> bool:
    """Whether a label file in a folder set aside has lines that no other file of its name has."""
    shelf = next(p for p in answers.parents if p.parent.name == SUPERSEDED)
    others = [p for p in shelf.parents[1].rglob(answers.name) if shelf not in p.parents]
    lines = {line for other in others for line in other.read_bytes().splitlines()}
    return answers.suffix == ".jsonl" and bool(set(answers.read_bytes().splitlines()) - lines)


def remove_superseded(entry: Superseded) -> list[Path]:
    """Delete a folder that was set aside, but for what people said that stands nowhere else.

    Returns:
        The label files (and trials) that were kept. Of a link the link alone is removed.
    """
    if entry.path.is_symlink():
        entry.path.unlink()
        return []
    answers = _list_answers(entry.path)
    kept = answers if any(map(_stands_here_alone, answers)) else []
    if not kept:
        shutil.rmtree(entry.path)
        return []
    for path in sorted(entry.path.rglob("*"), reverse=True):  # what is inside of a folder first
        if path.is_dir() and not path.is_symlink():
            if not any(path in other.parents for other in kept):
                path.rmdir()
        elif path not in kept:
            path.unlink()
    return kept
