"""The `rorem` command: run a recipe, show how far it is, or work on triplet sets.

Exit codes: 0 done; 1 a stage failed, or a set is faulty; 2 a recipe or an option is wrong; 3 labels
by people are missing; 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import shutil
import signal
import sys
import textwrap
import time
import traceback
from pathlib import Path

import yaml

from rorem_lib.files import ROOT
from rorem_lib.runner import data_commands
from rorem_lib.runner.pipeline import Progress, ReportFailed, StageFailed, run_recipe
from rorem_lib.runner.recipes import Recipe, RecipeError, read_recipe
from rorem_lib.runner.run_folder import RunLocked, is_running, read_states

DONE, FAILED, WRONG, WAITING, INTERRUPTED = 0, 1, 2, 3, 130


class Console(Progress):
    """Tells a run on a stream: plain lines, and in a terminal the jobs' lines in one live line."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.began = time.monotonic()

    def write(self, text: str) -> None:
        """A line that stays."""
        self.stream.write(("\r\x1b[K" if self.live else "") + text + "\n")
        self.stream.flush()

    def _head(self, number, total, row) -> str:
        return f"[{number:{len(str(total))}}/{total}] {row.name:<28}"

    def begin(self, number, total, row, why) -> None:
        self.began = time.monotonic()
        self.write(f"{self._head(number, total, row)} starts {row.notebook.stem} ({why})")

    def skip(self, number, total, row) -> None:
        self.write(f"{self._head(number, total, row)} done before, unchanged")

    def line(self, row, text) -> None:
        if not self.live:
            self.write(f"    {row.name} | {text}")
            return
        shown = f"    {row.name} {time.monotonic() - self.began:.0f} s | {text}"
        width = shutil.get_terminal_size().columns - 1
        self.stream.write("\r\x1b[K" + shown.replace("\t", " ")[:width])
        self.stream.flush()

    def end(self, number, total, row, seconds, metrics) -> None:
        self.write(
            f"{self._head(number, total, row)} finished in {seconds:.0f} s   "
            f"{format_metrics(metrics)}".rstrip()
        )


def format_metrics(metrics: dict) -> str:
    """The first four numbers of a stage's metrics, on one line."""
    words = [
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
        for k, v in metrics.items()
        if type(v) in (int, float)
    ]
    return ", ".join(words[:4])


def build_parser() -> argparse.ArgumentParser:
    """The command line of `rorem`."""
    parser = argparse.ArgumentParser(
        prog="rorem", description="Run the notebooks of a recipe, or work on triplet sets."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run every stage that is not done or that changed")
    status = commands.add_parser("status", help="show the stages and how far each is")
    data = commands.add_parser("data", help="check, merge or publish triplet sets")
    data_commands.add_commands(data)
    for command in (run, status):
        command.add_argument("recipe", help="a name in notebooks/recipes, or a YAML file")
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="STAGE.PARAMETER=VALUE",
            help="replace a parameter; the value is read as YAML; repeatable",
        )
        command.add_argument("--seed", type=int, help="replace the recipe's seed")
        command.add_argument(
            "--runs-dir", metavar="FOLDER", help="where the recipe's folder goes (default: runs)"
        )
    run.add_argument(
        "--from",
        dest="from_stage",
        metavar="STAGE",
        help="run this stage again, and all that depend on it, done or not",
    )
    run.add_argument("--only", metavar="STAGE", help="run no stage but this one")
    return parser


def parse_overrides(texts: list[str]) -> dict[str, dict]:
    """`["stage.parameter=value"]` as stage -> parameter -> value, values read as YAML.

    Raises:
        RecipeError: a text has another form.
    """
    found: dict[str, dict] = {}
    for text in texts:
        target, equals, value = text.partition("=")
        stage, dot, parameter = target.strip().partition(".")
        if not (equals and dot and stage and parameter):
            raise RecipeError("--set", [f'"{text}" is no STAGE.PARAMETER=VALUE'])
        try:
            found.setdefault(stage, {})[parameter] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError("--set", [f'"{text}": not valid YAML: {error}']) from None
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(words)  # exits with 2 on a wrong option
    if options.command == "data":
        return data_commands.run_command(options)
    runs_dir = Path(options.runs_dir).absolute() if options.runs_dir else ROOT / "runs"
    try:
        recipe = read_recipe(
            options.recipe, overrides=parse_overrides(options.set), seed=options.seed
        )
        if options.command == "status":
            return show_status(recipe, runs_dir)
        return _run(recipe, runs_dir, options)
    except (RecipeError, RunLocked) as error:
        print(f"rorem: {error}", file=sys.stderr)
        return WRONG
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        print(f"rorem: {'the disk is full: ' if full else ''}{error}", file=sys.stderr)
        if full:
            print("Make room, then go on with: " + describe_command(options), file=sys.stderr)
        return FAILED


def describe_command(options) -> str:
    """The command that goes on after a stop: the same one, without starting anything afresh."""
    words = ["rorem", "run", options.recipe]
    for text in options.set:
        words += ["--set", text]
    for name, value in (
        ("--seed", options.seed),
        ("--runs-dir", options.runs_dir),
        ("--only", options.only),
    ):
        words += [name, str(value)] if value is not None else []
    program = Path(sys.argv[0])
    if program.name == "rorem" and shutil.which("rorem") != str(program.absolute()):
        words[0] = os.path.relpath(program)  # called by its path: it is not on PATH
    return shlex.join(words)


def _interrupt(number, frame):
    raise KeyboardInterrupt(signal.Signals(number).name)


def _run(recipe: Recipe, runs_dir: Path, options) -> int:
    console, began = Console(), time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup's choice stays
            signal.signal(number, _interrupt)
    shown = os.path.relpath(runs_dir / recipe.name)
    console.write(f"{recipe.name}: {len(recipe.stages)} stages, results in {shown}")
    try:
        result = run_recipe(
            recipe,
            runs_dir=runs_dir,
            from_stage=options.from_stage,
            only=options.only,
            progress=console,
        )
    except StageFailed as failure:
        console.write("")
        tell_failure(failure, runs_dir / recipe.name, describe_command(options), console)
        return WAITING if failure.waiting else FAILED
    except ReportFailed as failure:
        traceback.print_exception(failure.__cause__)
        console.write(f"{failure}. Go on with: {describe_command(options)}")
        return FAILED
    except KeyboardInterrupt as stop:
        console.write("")
        console.write(
            f"Interrupted{f' by {stop}' if str(stop) else ''}. Go on with: "
            f"{describe_command(options)}"
        )
        # At once: the kernel's clean-up would wait for the cell that was interrupted. Kernel and
        # jobs are tied to this process and end with it.
        sys.stdout.flush()
        os._exit(INTERRUPTED)
    told = f"; report: {os.path.relpath(result['report'])}" if result["report"] else ""
    console.write(
        f"{recipe.name}: {len(result['ran'])} run, {len(result['skipped'])} unchanged, "
        f"{time.monotonic() - began:.0f} s{told}"
    )
    return DONE


def tell_failure(failure: StageFailed, run_dir: Path, command: str, console: Console) -> None:
    """Say where a run stopped, why, and how it goes on."""
    notebook = os.path.relpath(run_dir / failure.stage.name / "notebook.ipynb")
    if failure.waiting:
        console.write(f'Stage "{failure.stage.name}" waits for labels: {failure.error}')
        console.write(f"Open {notebook} in JupyterLab (make lab), run its cells and label.")
        console.write(f"Then go on with: {command}")
        return
    console.write(
        f'Stage "{failure.stage.name}" failed ({failure.stage.notebook.name}'
        + (f", cell In [{failure.cell}])" if failure.cell else ")")
    )
    if failure.source:
        lines = failure.source.splitlines()
        shown = lines[:6] + ["…"] * (len(lines) > 6)
        console.write(textwrap.indent("\n".join(shown), "    "))
    console.write(failure.error)
    if failure.log:
        console.write("The end of train.log:")
        console.write(textwrap.indent("\n".join(failure.log), "    "))
    console.write(f"The notebook as far as it came: {notebook}")
    console.write(f"Go on with: {command}")


def show_status(recipe: Recipe, runs_dir: Path) -> int:
    """Print the table of stages with their states."""
    run_dir = runs_dir / recipe.name
    pid = is_running(run_dir)
    states = read_states(recipe, runs_dir=runs_dir)
    running = f", a runner (pid {pid}) is at work" if pid else ""
    print(
        f"{recipe.name}: {len(states)} stages, "
        f"{sum(s.state == 'done' for s in states)} done{running}"
    )
    width = max(len(s.row.name) for s in states)
    stems = max(len(s.row.notebook.stem) for s in states)
    for state in states:
        word = "running" if pid and state.state in ("half-way",) else state.state
        seconds = f"{state.seconds:8.0f} s" if state.seconds is not None else " " * 10
        row, note = state.row, state.note or format_metrics(state.metrics)
        print(
            f"  {row.name:<{width}}  {row.row:<16}  {row.notebook.stem:<{stems}}  {word:<8}  "
            f"{seconds}  {state.finished or '':<25}  {note}".rstrip()
        )
    report = run_dir / "report.html"
    if report.exists():
        print(f"report: {os.path.relpath(report)}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
