"""Run a recipe: every stage a notebook, executed once, skipped while nothing it depends on changed.

A stage counts as done through its DONE marker alone, which is written here, last: the notebook's
own metadata can't be trusted, since a killed kernel leaves a notebook that papermill calls
completed.
"""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from pathlib import Path

from rorem_lib.files import ROOT, format_time, write_json, write_text
from rorem_lib.runner.fingerprints import Fingerprint, compute_fingerprints
from rorem_lib.runner.recipes import Recipe, RecipeError, StageRow, substitute, suggest
from rorem_lib.runner.run_folder import (
    lock_run,
    open_folder,
    read_record,
    read_state,
    supersede_folder,
)
from rorem_lib.runner.stage import STARTED, describe_environment

_WHY = {
    "to run": "first run",
    "half-way": "goes on where it was stopped",
    "failed": "tried again",
    "waiting": "looks for labels again",
}


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
    """

    def __init__(self, stage: StageRow, error: str, *, cell=None, source="", log=(), waiting=False):
        super().__init__(f"{stage.name}: {error}")
        self.stage, self.cell, self.source, self.error = stage, cell, source, error
        self.log, self.waiting = list(log), waiting


class Progress:
    """What a run tells while it goes on; this one keeps silent."""

    def begin(self, number: int, total: int, row: StageRow, why: str) -> None:
        """A stage starts; `why` says what made it necessary."""

    def skip(self, number: int, total: int, row: StageRow) -> None:
        """A stage is finished and unchanged."""

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
    progress: Progress | None = None,
) -> dict:
    """Run what is not done, in order; then write the report.

    Args:
        recipe: from `read_recipe`.
        runs_dir: the recipe's folder is made in it.
        from_stage: run this stage again, and every later one that depends on it, done or not.
        only: run no stage but this one; those it refers to must be done.
        progress: told what happens.

    Returns:
        `{"ran": [names], "skipped": [names], "report": path or None}`.

    Raises:
        RecipeError: `from_stage` or `only` names no stage, or `only` lacks what it refers to.
        RunLocked: another runner is at work in the folder.
        StageFailed: the first stage that failed, or that waits for labels.
        ReportFailed: the stages are done, the report is not.
        OSError: the folder can't be written, the disk is full.
    """
    names = [row.name for row in recipe.stages]
    for name in filter(None, (from_stage, only)):
        if name not in names:
            raise RecipeError(recipe.path, [f'there is no stage "{name}"{suggest(name, names)}'])
    run_dir, progress = runs_dir / recipe.name, progress or Progress()
    if "{" in str(run_dir) or "}" in str(run_dir):
        raise RecipeError(
            recipe.path,
            [
                f"the path {run_dir} has braces, which papermill reads as "
                "a template: choose another --runs-dir"
            ],
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = lock_run(run_dir)
    except OSError as error:
        raise OSError(
            error.errno, f"{run_dir} can't be written: {error.strerror}; choose another --runs-dir"
        ) from error
    with lock:
        if from_stage:
            _withdraw_stages(recipe, run_dir, from_stage)
        return _run_stages(recipe, run_dir, only, progress)


def _withdraw_stages(recipe: Recipe, run_dir: Path, first: str) -> None:
    """Set aside the folders of a stage and of all that depend on it: they start afresh."""
    stale = {first}
    for row in recipe.stages:
        if stale & {row.name, *row.upstream}:
            stale.add(row.name)
            supersede_folder(run_dir / row.name)


def _run_stages(recipe: Recipe, run_dir: Path, only: str | None, progress: Progress) -> dict:
    began, total = time.time(), len(recipe.stages)
    fresh = not any((run_dir / row.name / "DONE").exists() for row in recipe.stages)
    earlier = [] if fresh else read_record(run_dir / "run.json").get("runs", [])
    ran, skipped = [], []

    def record(**more) -> None:
        """Bring `run.json` up to date; a killed run keeps the seconds of its finished stages."""
        runs = [
            *earlier,
            {"started": format_time(began), "ran": ran, "seconds": round(time.time() - began, 2)},
        ]
        seconds = {
            row.name: read_record(run_dir / row.name / "stage.json").get("seconds")
            for row in recipe.stages
        }
        write_json(
            run_dir / "run.json",
            read_record(run_dir / "run.json")
            | {
                "recipe": recipe.name,
                "seed": recipe.seed,
                "runs": runs,
                "stages": {k: v for k, v in seconds.items() if v is not None},
                "wall_seconds": round(sum(r["seconds"] for r in runs), 2),
                **more,
            },
        )

    settled = {}
    prints = compute_fingerprints(recipe, run_dir=run_dir)
    for number, row in enumerate(recipe.stages, 1):
        state = read_state(row, prints[row.name], run_dir / row.name)
        settled[row.name] = prints[row.name]
        why = _WHY.get(state.state) or f"changed: {state.note}"
        if state.state == "done":
            skipped.append(row.name)
            progress.skip(number, total, row)
        elif only in (None, row.name):
            progress.begin(number, total, row, why)
            seconds, metrics = run_stage(
                row,
                prints[row.name],
                run_dir=run_dir,
                say=lambda text, row=row: progress.line(row, text),
            )
            ran.append(row.name)
            record()
            progress.end(number, total, row, seconds, metrics)
            # Computed anew: code edited while the stage ran counts for the stages that follow.
            prints = compute_fingerprints(recipe, run_dir=run_dir, settled=settled)
        elif row.name in next(r for r in recipe.stages if r.name == only).upstream:
            raise RecipeError(
                recipe.path,
                [
                    f'"{only}" needs the stage "{row.name}", which is '
                    f"not up to date ({state.note or state.state})"
                ],
            )
    report = None if only else _write_report(recipe, run_dir, settled, record)
    return {"ran": ran, "skipped": skipped, "report": report}


def _write_report(recipe: Recipe, run_dir: Path, prints: dict, record) -> Path | None:
    """The report, unless it stands there already and was made from these very stages."""
    made_from = {
        name: [fingerprint.digest, read_record(run_dir / name / "stage.json").get("finished")]
        for name, fingerprint in prints.items()
    }
    path = run_dir / "report.html"
    if path.exists() and read_record(run_dir / "run.json").get("report") == made_from:
        return path
    if find_spec("rorem_lib.evaluation.report") is None:
        return None
    from rorem_lib.evaluation.report import write_report

    record()
    try:
        path = write_report(run_dir, recipe)
    except Exception as error:
        raise ReportFailed(
            f"all stages are finished, but the report failed: {type(error).__name__}: {error}"
        ) from error
    record(report=made_from)
    return path


def run_stage(
    row: StageRow, fingerprint: Fingerprint, *, run_dir: Path, say=lambda text: None
) -> tuple[float, dict]:
    """Execute a stage's notebook and mark the stage as done.

    Args:
        row: the stage.
        fingerprint: its fingerprint.
        run_dir: `runs/<recipe>`.
        say: called with each line that the notebook and its jobs write.

    Returns:
        Seconds and the stage's metrics.

    Raises:
        StageFailed: the notebook failed, its kernel died, or it ended without its metrics.
    """
    folder, began = run_dir / row.name, time.time()
    started = open_folder(row, fingerprint, folder)
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
        state = "waiting" if failure.waiting else "failed"
        write_json(
            folder / STARTED,
            started | {"state": state, "error": failure.error.partition("\n")[0][:300]},
        )
        raise
    ended = time.time()
    write_json(
        folder / "stage.json",
        {
            "stage": row.name,
            "row": row.row,
            "notebook": row.notebook.name,
            "parameters": row.parameters | parameters,
            "inputs": fingerprint.inputs,
            "fingerprint": fingerprint.digest,
            **describe_environment(),
            "seconds": round(ended - began, 2),
            "started": format_time(began),
            "finished": format_time(ended),
        },
    )
    write_text(folder / "DONE", fingerprint.digest + "\n")
    return ended - began, read_record(folder / "metrics.json")
