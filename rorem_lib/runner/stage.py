"""A notebook's side of a stage: its folder, its figures, and how it says that it is finished."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from rorem_lib.files import (
    ROOT,
    clean_metrics,
    flush_disk,
    format_time,
    resolve_path,
    set_aside,
    write_json,
    write_text,
)

logger = logging.getLogger(__name__)

STARTED = "stage.started.json"
# How the runner tells `launch_job` what to do where a job finished with other settings: "keep" the
# result, "replace" it, or "ask" (stop, so that the runner asks).
FINISHED_JOBS = "ROREM_FINISHED_JOBS"
INJECTED = "# Parameters\n"  # how the cell begins in which papermill assigns what it was given
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "papermill")


def describe_environment() -> dict:
    """Versions of what computes, the commit, and whether tracked files differ from it."""
    versions = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    place = _ask_git("rev-parse", "--show-toplevel")
    # A copy of the kit inside another repository has that one's commit, which says nothing of it.
    commit = _ask_git("rev-parse", "HEAD") if place and Path(place).resolve() == ROOT else None
    changes = _ask_git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {
        "versions": versions,
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
    }


def _ask_git(*arguments: str) -> str | None:
    # In a hook of git these name the repository that the hook is of.
    hidden = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR"}
    try:
        answer = subprocess.run(
            ["git", "-C", str(ROOT), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            stdin=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name not in hidden},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


@dataclass
class Stage:
    """A running stage.

    Attributes:
        folder: absolute path of the stage's folder; everything the notebook writes goes there.
        notebook: the notebook's name.
        batch: True under `rorem run`: nobody watches, so log lines in the place of widgets.
        parameters: the notebook's parameters, for `stage.json`.
    """

    folder: Path
    notebook: str
    batch: bool
    parameters: dict = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    clock: float = field(default_factory=time.monotonic)  # the other may be set back meanwhile

    def save_figure(self, figure, name: str) -> Path:
        """Write a matplotlib figure to `figures/<name>.png` and show it under the cell."""
        path = self.folder / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp_path = path.with_suffix(".partial.png")
        figure.savefig(tmp_path, dpi=110, bbox_inches="tight")
        os.replace(tmp_path, path)
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close(figure)  # or the inline backend shows it again
        if "IPython" in sys.modules:
            from IPython.display import Image, display

            display(Image(filename=str(path)))
        return path

    @contextlib.contextmanager
    def track(self, unit: str) -> Iterator[Callable]:
        """Progress of a long cell: a bar for people, a log line every 20 seconds in a batch run.

        Args:
            unit: what is counted, such as "triplet".

        Yields:
            `update(done, total, note="")`; `note` is the batch run's line.
        """
        from tqdm.auto import tqdm

        shown = time.monotonic()
        with tqdm(unit=unit, disable=self.batch) as bar:

            def update(done: int, total: int, note: str = "") -> None:
                nonlocal shown
                bar.total = total
                bar.update(done - bar.n)
                if self.batch and (time.monotonic() - shown > 20 or done >= total):
                    shown = time.monotonic()
                    logger.info("%s", note or f"{done:,} of {total:,} {unit}s")

            yield update

    def finish(self, metrics: dict) -> None:
        """Write `metrics.json`; call it last. Alone, also `stage.json` and the DONE marker.

        In a recipe's folder these two are the runner's, which writes them when the notebook has
        come to its end.
        """
        if not self.batch and not (self.folder / STARTED).exists():
            flush_disk(self.folder)  # what DONE promises
            write_json(self.folder / "metrics.json", clean_metrics(metrics))
            seconds = time.monotonic() - self.clock
            write_json(
                self.folder / "stage.json",
                {
                    "stage": "alone",
                    "notebook": self.notebook,
                    "parameters": clean_metrics(self.parameters),
                    **describe_environment(),
                    "seconds": round(seconds, 2),
                    "started": format_time(self.started),
                    "finished": format_time(self.started + seconds),
                },
            )
            write_text(self.folder / "DONE", f"alone {datetime.now(UTC).isoformat()}\n")
        else:
            write_json(self.folder / "metrics.json", clean_metrics(metrics))


def start_stage(
    output_dir, *, notebook: str, job: str | Sequence[str] = (), free: Sequence[str] = ()
) -> Stage:
    """Open a stage's folder and take back what an earlier run of it said about being finished.

    The notebook's parameters are checked first, see `check_parameters`.

    Args:
        output_dir: the folder, relative to the repository root or absolute; made if missing.
        notebook: the notebook's name without ending, such as "02_train_remover".
        job: modules below `rorem_lib` that do the stage's work in the notebook itself; the runner
            finds them in the notebook's text, see `runner.fingerprints`.
        free: parameters that count for nothing in this stage; found there too.

    Raises:
        ValueError: a parameter is unknown, or its value is of another type.
        OSError: the folder can't be made or written.
    """
    values = inspect.currentframe().f_back.f_globals
    parameters = check_parameters(notebook, values)
    folder = resolve_path(output_dir)
    batch = os.environ.get("ROREM_BATCH") == "1"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ours = any((folder / name).exists() for name in (STARTED, "stage.json"))
        for name in ("DONE", "metrics.json"):
            if ours:
                (folder / name).unlink(missing_ok=True)
            elif (folder / name).exists():  # of raw data, say, where output_dir is their folder
                logger.info("%s is now %s", folder / name, set_aside(folder / name))
    except OSError as error:
        raise OSError(
            error.errno,
            f"the stage's folder {folder} can't be written: "
            f"{error.strerror}; choose another output_dir",
        ) from error
    log = logging.getLogger("rorem_lib")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    if "pandas" in sys.modules:  # a name with two $ in a table is no formula
        sys.modules["pandas"].set_option("display.html.use_mathjax", False)
    return Stage(folder, notebook, batch, parameters)


def check_parameters(notebook: str, values: dict) -> dict:
    """Check a notebook's parameters against its parameters cell, and fit their values to its types.

    `rorem run` does so before a notebook starts. Papermill started by hand hands on whatever is
    typed, and in JupyterLab the cell may be edited. Papermill assigns the values in a cell of their
    own, which IPython's history shows.

    Args:
        notebook: the notebook's name without ending.
        values: its globals; what is fitted (`3` where a float is wanted) is put back there.

    Returns:
        The parameters' values by name; empty where no parameters cell is known.

    Raises:
        ValueError: an unknown name, with the nearest known one, or a value of another type. All of
            them are named.
    """
    from rorem_lib.parameters import coerce_value, parse_parameters, read_parameters, suggest

    try:
        known = read_parameters(ROOT / "notebooks" / f"{notebook}.ipynb")
    except (OSError, ValueError):  # renamed, or half-edited
        known = {}
    given: set[str] = set()
    for source in values.get("In", []):
        injected = source.startswith(INJECTED)
        try:
            cell = parse_parameters(re.sub(r"float\('-?(inf|nan)'\)", "0.0", source))
        except ValueError:  # another cell
            continue
        if injected:
            given |= cell.keys()
        elif "output_dir" in cell:  # as it ran: a copy of the notebook may have more parameters
            known |= cell
    problems = [
        f'there is no parameter "{name}"{suggest(name, known)}'
        for name in sorted(given - known.keys() if known else ())
    ]
    found = {}
    for name, parameter in known.items():
        if name in values:
            try:
                found[name] = coerce_value(values[name], parameter.kind)
            except TypeError as error:
                hint = _explain_papermill(name, values[name], parameter.kind, name in given)
                problems.append(f"{name}: {error}{hint}")
    if problems:
        raise ValueError(f"the parameters of {notebook} are wrong: " + "; ".join(problems))
    values |= found
    return found


def _explain_papermill(name: str, value, kind: str, given: bool) -> str:
    """How to hand papermill what its `-p` reads as another type; "" for a cell edited by hand."""
    if not given:
        return ""
    if kind == "str":
        return f" (papermill's -p reads numbers: give a text as it stands with -r {name} TEXT)"
    if kind.startswith("list") and not isinstance(value, list):
        return f" (papermill takes a list with -y '{name}: {json.dumps([value])}')"
    return " (papermill's -p takes True and False)" if kind == "bool" else ""
