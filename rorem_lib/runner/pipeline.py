"""Run a recipe: every stage a notebook, executed once, skipped while nothing it depends on changed.

A stage counts as done through its DONE marker alone, which is written here, last: the notebook's
own metadata can't be trusted, since a killed kernel leaves a notebook that papermill calls
completed. What took longer than a minute is not made anew before somebody has agreed to it; a yes
holds for the stages that were named.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from rorem_lib.files import ROOT, format_time, write_json
from rorem_lib.runner.fingerprints import list_references, read_inputs
from rorem_lib.runner.recipes import Recipe, RecipeError, StageRow, substitute, suggest
from rorem_lib.runner.run_folder import (
    LONG,
    UNREADABLE,
    Outputs,
    StageState,
    accept_stage,
    close_folder,
    find_gone,
    lock_run,
    open_folder,
    read_finished,
    read_record,
    read_state,
    supersede_folder,
)
from rorem_lib.runner.stage import FINISHED_JOBS, STARTED, describe_environment

_WHY = {
    "to run": "first run",
    "half-way": "goes on where it was stopped",
    "failed": "tried again",
    "waiting": "looks for labels again",
}


class NotAgreed(RuntimeError):
    """Stages that took long would be made anew, and nobody agreed; `states` are they."""

    def __init__(self, states: list[StageState]):
        self.states = states
        super().__init__("would be made anew: " + ", ".join(s.row.name for s in states))


class ReportFailed(RuntimeError):
    """All stages are done, but the report could not be written."""


class StageFailed(RuntimeError):
    """A stage that ended before its end.

    Attributes:
        stage: its row.
        cell: number of the code cell, as `In [n]` in the executed notebook; None where unknown.
        source: the cell's source.
        error: the error's name and message.
        log: the last 20 lines of the stage's `train.log`, where the error doesn't hold them.
        waiting: True where nothing is broken: people have to label first.
        changed: True where its job had finished with other settings, and nobody was asked yet.
    """

    def __init__(
        self,
        stage: StageRow,
        error: str,
        *,
        cell=None,
        source="",
        log=(),
        waiting=False,
        changed=False,
    ):
        super().__init__(f"{stage.name}: {error}")
        self.stage, self.cell, self.source, self.error = stage, cell, source, error
        self.log, self.waiting, self.changed = list(log), waiting, changed


class Observer:
    """What a run tells while it goes on; this one keeps silent."""

    def begin(self, number: int, total: int, row: StageRow, why: str) -> None:
        """A stage starts; `why` says what made it necessary."""

    def skip(self, number: int, total: int, row: StageRow, note: str = "") -> None:
        """A stage is finished and stays; `note` says what changed nevertheless."""

    def line(self, row: StageRow, text: str) -> None:
        """A line that the stage's notebook or job wrote."""

    def end(self, number: int, total: int, row: StageRow, seconds: float, metrics: dict) -> None:
        """A stage is finished."""


def run_recipe(
    recipe: Recipe,
    *,
    runs_dir: Path,
    from_stage: str | None = None,
    only: str | None = None,
    keep: bool = False,
    agree: Callable[[list[StageState]], bool] = lambda states: False,
    progress: Observer | None = None,
) -> dict:
    """Run what is not done, in order; then write the report.

    Args:
        recipe: from `read_recipe`.
        runs_dir: the recipe's folder is made in it.
        from_stage: run this stage again, and every later one that depends on it, done or not.
        only: run no stage but this one; those it refers to must be done.
        keep: take finished stages as they are and go on with half-done ones, whatever changed.
        agree: asked before folders with more than a minute's work are set aside, with the states
            of their stages and of those with as much that read of them and so may follow
            (`replaced` is False). True allows these; another stage that turns up is asked for anew.
        progress: told what happens.

    Returns:
        `{"ran": [names], "skipped": [names], "report": path or None}`.

    Raises:
        RecipeError: `from_stage` or `only` names no stage, or `only` lacks what it refers to.
        NotAgreed: `agree` answered False; the folders are where they were.
        RunLocked: another runner is at work in the folder.
        StageFailed: the first stage that failed, or that waits for labels.
        ReportFailed: the stages are done, the report is not.
        OSError: the folder can't be written, the disk is full.
    """
    _check_names(recipe, filter(None, (from_stage, only)))
    run_dir = runs_dir / recipe.name
    if "{" in str(run_dir) or "}" in str(run_dir):
        raise RecipeError(
            recipe.path,
            [
                f"the path {run_dir} has braces, which papermill reads as "
                "a template: choose another --runs-dir"
            ],
        )
    with _open_run(run_dir):
        return _Run(recipe, run_dir, only, keep, agree, progress or Observer()).run(from_stage)


def accept_stages(recipe: Recipe, names: list[str], *, runs_dir: Path) -> dict[str, str]:
    """Mark stages as current, in the recipe's order; returns what had changed in each.

    Raises:
        RecipeError: an unknown stage, or one of which nothing is there.
        RunLocked: a runner is at work in the folder.
        OSError: the folder can't be written.
    """
    _check_names(recipe, names)
    run_dir = runs_dir / recipe.name
    rows = [row for row in recipe.stages if row.name in names]
    with _open_run(run_dir):
        outputs = Outputs(run_dir, keep=True)
        return {row.name: accept_stage(row, run_dir, outputs) for row in rows}


def _check_names(recipe: Recipe, names) -> None:
    known = [row.name for row in recipe.stages]
    for name in names:
        if name not in known:
            raise RecipeError(recipe.path, [f'there is no stage "{name}"{suggest(name, known)}'])


def _open_run(run_dir: Path):
    """Make the run's folder and hold its lock."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return lock_run(run_dir)
    except OSError as error:
        raise OSError(
            error.errno, f"{run_dir} can't be written: {error.strerror}; choose another --runs-dir"
        ) from error


class _Run:
    """One `rorem run`, its lock held."""

    def __init__(self, recipe, run_dir, only, keep, agree, progress):
        self.recipe, self.run_dir, self.only, self.keep = recipe, run_dir, only, keep
        self.agree, self.agreed, self.progress = agree, set(), progress
        self.outputs = Outputs(run_dir, keep=True)
        self.began, self.clock = time.time(), time.monotonic()  # a clock may be set back meanwhile
        self.ran, self.skipped, self.earlier = [], [], []

    def run(self, from_stage: str | None) -> dict:
        rows, total, needed = self.recipe.stages, len(self.recipe.stages), ()
        if from_stage:
            self._withdraw(from_stage)
        else:
            self._ask_about(map(self._read, rows))
        if any((self.run_dir / row.name / "DONE").exists() for row in rows):
            runs = read_record(self.run_dir / "run.json").get("runs", [])
            runs = [run for run in runs if isinstance(run, dict)]
            self.earlier = [run for run in runs if isinstance(run.get("seconds"), (int, float))]
        if self.only:
            needed = next(row for row in rows if row.name == self.only).upstream
        for number, row in enumerate(rows, 1):
            state = self._read(row)
            if state.state == "done" or (self.keep and state.finished):
                self.skipped.append(row.name)
                self.progress.skip(number, total, row, state.note)
            elif self.only in (None, row.name):
                if state.long:
                    self._ask_about(map(self._read, rows[number - 1 :]))
                why = _WHY.get(state.state) or f"changed: {state.note}"
                self.progress.begin(number, total, row, why)
                seconds, metrics = self._run_stage(row)
                self.ran.append(row.name)
                self.record()
                self.progress.end(number, total, row, seconds, metrics)
            elif row.name in needed:
                raise RecipeError(
                    self.recipe.path,
                    [
                        f'"{self.only}" needs the stage "{row.name}", which is '
                        f"not up to date ({state.note or state.state})"
                    ],
                )
        report = None if self.only else self._write_report()
        return {"ran": self.ran, "skipped": self.skipped, "report": report}

    def _read(self, row: StageRow) -> StageState:
        """Read anew at each turn: code edited while a stage runs counts for those after it."""
        return read_state(row, self.run_dir, self.outputs)

    def _ask_about(self, states) -> None:
        """Ask before long work is set aside, unless somebody agreed to that stage's before."""
        states = [s for s in states if self.only in (None, s.row.name)]
        if self.keep:  # all else stays where it is
            states = [s for s in states if s.state == UNREADABLE]
        found = [s for s in states if s.long and s.row.name not in self.agreed]
        if not found:
            return
        found += [s for s in list_followers(states) if s.row.name not in self.agreed]
        if not self.agree(found):
            raise NotAgreed(found)
        self.agreed |= {s.row.name for s in found}

    def _withdraw(self, first: str) -> None:
        """Set aside the folders of a stage and of all that depend on it: they start anew."""
        rows, stale = [], {first}
        for row in self.recipe.stages:
            if stale & {row.name, *row.upstream}:
                stale.add(row.name)
                rows += [row] * (self.only in (None, row.name))
        states = [state for row in rows if (state := self._read(row)).state != "to run"]
        self._ask_about([dataclasses.replace(s, note="--from", replaced=True) for s in states])
        for row in rows:
            supersede_folder(self.run_dir / row.name)
            self.outputs.forget(row.name)

    def _run_stage(self, row: StageRow) -> tuple[float, dict]:
        if gone := [f"{stage}/{path}" for stage, path in find_gone(row, self.run_dir)]:
            raise RecipeError(
                self.run_dir,
                [
                    f'the stage "{row.name}" reads {", ".join(gone)}, which was made and is gone: '
                    f"bring it back, or make it anew with --from {gone[0].partition('/')[0]}"
                ],
            )
        inputs = read_inputs(
            row,
            folder=self.run_dir / row.name,
            get_content=self.outputs.get,
            stamps=self.outputs.stamps,
        )
        os.environ[FINISHED_JOBS] = "keep" if self.keep else "ask"
        run = partial(
            run_stage,
            row,
            inputs,
            run_dir=self.run_dir,
            keep=self.keep,
            say=lambda text: self.progress.line(row, text),
        )
        try:
            found = run()
        except StageFailed as failure:
            if not failure.changed:
                raise
            self.agreed.discard(row.name)
            state = dataclasses.replace(self._read(row), note=failure.error, replaced=True)
            if not state.long:  # the job says that it took longer than what is recorded
                state = dataclasses.replace(state, seconds=None)
            self._ask_about([state])
            os.environ[FINISHED_JOBS] = "replace"
            found = run()
        self.outputs.forget(row.name)
        for stage, path in {ref for later in self.recipe.stages for ref in list_references(later)}:
            if stage == row.name:  # hashed now, while the files are in memory
                self.outputs.get(stage, path, say=lambda text: self.progress.line(row, text))
        return found

    def record(self, **more) -> None:
        """Bring `run.json` up to date; a killed run keeps the seconds of its finished stages."""
        path, seconds = self.run_dir / "run.json", round(time.monotonic() - self.clock, 2)
        run = {"started": format_time(self.began), "ran": self.ran, "seconds": seconds}
        runs = [*self.earlier, run]
        taken = {
            row.name: read_record(self.run_dir / row.name / "stage.json").get("seconds")
            for row in self.recipe.stages
        }
        write_json(
            path,
            read_record(path)
            | {
                "recipe": self.recipe.name,
                "seed": self.recipe.seed,
                "runs": runs,
                "stages": {k: v for k, v in taken.items() if v is not None},
                "wall_seconds": round(sum(r["seconds"] for r in runs), 2),
                **more,
            },
        )

    def _write_report(self) -> Path | None:
        """The report, unless it stands there already and was made from these very stages."""
        records = {r.name: read_finished(self.run_dir / r.name) for r in self.recipe.stages}
        made_from = {n: [r["fingerprint"], r["finished"]] for n, r in records.items() if r}
        path = self.run_dir / "report.html"
        if path.exists() and read_record(self.run_dir / "run.json").get("report") == made_from:
            return path
        if find_spec("rorem_lib.evaluation.report") is None:
            return None
        from rorem_lib.evaluation.report import write_report

        self.record()
        try:
            path = write_report(self.run_dir, self.recipe)
        except Exception as error:
            raise ReportFailed(
                f"all stages are finished, but the report failed: {type(error).__name__}: {error}"
            ) from error
        self.record(report=made_from)
        return path


def list_followers(states: list[StageState]) -> list[StageState]:
    """Of a run's stages those with more than a minute's work that follow if what they read does."""
    found, anew = [], set()
    for state in states:
        if state.state != "done" or anew & set(state.row.upstream):
            anew.add(state.row.name)
            if (
                not state.replaced
                and (state.seconds or 0) > LONG
                and anew & set(state.row.upstream)
            ):
                found.append(dataclasses.replace(state, note="follows if what it reads changes"))
    return found


def run_stage(
    row: StageRow, inputs: dict, *, run_dir: Path, keep: bool = False, say=lambda text: None
) -> tuple[float, dict]:
    """Execute a stage's notebook and mark the stage as done.

    Args:
        row: the stage.
        inputs: what it depends on, from `read_inputs`.
        run_dir: `runs/<recipe>`.
        keep: go on with what is half done in its folder, whatever it was made of.
        say: called with each line that the notebook and its jobs write.

    Returns:
        Seconds, those before a kill included, and the stage's metrics.

    Raises:
        StageFailed: the notebook failed, its kernel died, or it ended without its metrics.
    """
    folder, began, clock = run_dir / row.name, time.time(), time.monotonic()
    started = open_folder(row, inputs, folder, keep=keep)
    shown = os.path.relpath(run_dir, ROOT) if run_dir.is_relative_to(ROOT) else str(run_dir)
    folders = {name: f"{shown}/{name}" for name in row.upstream}
    parameters = {"output_dir": f"{shown}/{row.name}"} | substitute(row.given, folders)
    from rorem_lib.runner.execution import NotebookFailed, execute_notebook

    try:
        try:
            execute_notebook(row.notebook, folder / "notebook.ipynb", parameters, say=say)
        except NotebookFailed as error:
            raise StageFailed(
                row,
                str(error),
                cell=error.cell,
                source=error.source,
                waiting=error.name == "LabelsMissing",
                changed=error.name == "JobChanged",
            ) from error
        if not (folder / "metrics.json").is_file():
            raise StageFailed(
                row,
                "the notebook ended without stage.finish(): it writes "
                "metrics.json, and a stage without it is not finished",
            )
    except StageFailed as failure:
        if (folder / "train.log").is_file() and not failure.error.startswith("JobError"):
            text = (folder / "train.log").read_text(encoding="utf-8", errors="replace")
            failure.log = text.splitlines()[-20:]
        ended = {
            "state": "waiting" if failure.waiting else "failed",
            "error": failure.error.partition("\n")[0][:300],
            "worked": started["worked"] + time.monotonic() - clock,
        }
        write_json(folder / STARTED, started | ended)
        raise
    here = time.monotonic() - clock
    seconds = started["worked"] + here
    close_folder(
        folder,
        inputs,
        {
            "stage": row.name,
            "row": row.row,
            "notebook": row.notebook.name,
            "parameters": row.parameters | parameters,
            **describe_environment(),
            "seconds": round(seconds, 2),
            "started": format_time(began),
            "finished": format_time(began + here),
            "accepted": started["accepted"],
        },
    )
    return seconds, read_record(folder / "metrics.json")
