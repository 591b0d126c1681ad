"""The `rorem` command: run a recipe, show how far it is, work on triplet sets, remove objects.

Exit codes: 0 done; 1 a stage failed, a set is faulty, or an image could not be worked on; 2 a
recipe or an option is wrong, there is no model, or nobody agreed to make long work anew or to
delete; 3 labels by people are missing; 130 interrupted.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
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
from rorem_lib.parameters import StrictLoader
from rorem_lib.runner import data_commands, export_command, remove_command
from rorem_lib.runner.pipeline import (
    NotAgreed,
    Observer,
    ReportFailed,
    StageFailed,
    accept_stages,
    run_recipe,
)
from rorem_lib.runner.recipes import Recipe, RecipeError, read_recipe, suggest
from rorem_lib.runner.run_folder import (
    SUPERSEDED,
    UNREADABLE,
    RunLocked,
    StageState,
    is_running,
    list_superseded,
    lock_run,
    read_states,
    remove_superseded,
)

DONE, FAILED, WRONG, WAITING, INTERRUPTED = 0, 1, 2, 3, 130
ACCEPTED = ("changed", UNREADABLE)  # the states that `rorem accept` ends


class Console(Observer):
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

    def skip(self, number, total, row, note="") -> None:
        why = f"kept as it is ({note})" if note else "unchanged"
        self.write(f"{self._head(number, total, row)} done before, {why}")

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
        prog="rorem",
        description="Run the notebooks of a recipe, work on triplet sets, or "
        "remove objects from images.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_seeds(target) -> None:
        target.add_argument(
            "--seeds",
            type=int,
            nargs="+",
            metavar="SEED",
            help="the whole recipe once a seed, each in its own folder RECIPE-seedN (nothing is "
            "shared: built-in scenes are rendered anew); a run ends in RECIPE-seeds/report.html, "
            "mean and spread over the trainings",
        )

    run = commands.add_parser(
        "run",
        help="run every stage that is not done or that changed",
        description="Run every stage that is not done or that changed. What took longer than a "
        "minute is made anew only with a typed yes or --yes, and what was there is set aside in "
        "runs/RECIPE/.superseded: nothing is deleted.",
    )
    status = commands.add_parser("status", help="show the stages and how far each is")
    accept = commands.add_parser(
        "accept", help="mark stages as current, though what they depend on changed"
    )
    clean = commands.add_parser(
        "clean",
        help="list the folders that were set aside, or delete some",
        description="List the folders that newer ones took the place of; delete those named, "
        "with a typed yes or --yes. Labels by people that stand nowhere else are kept.",
    )
    commands.add_parser("app", help="remove objects from photos on a page in the browser")
    data = commands.add_parser("data", help="check, merge or publish triplet sets")
    data_commands.add_commands(data)
    remove_command.add_options(commands.add_parser("remove", help="remove objects from images"))
    export_command.add_options(commands.add_parser("export", help="write a remover as ONNX"))
    for command in (run, status, accept, clean):
        command.add_argument("recipe", help="a name in notebooks/recipes, or a YAML file")
        command.add_argument(
            "--runs-dir", metavar="FOLDER", help="where the recipe's folder goes (default: runs)"
        )
        command.set_defaults(set=[], seed=None, seeds=None, only=None)
    for command in (run, status, accept):
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="STAGE.PARAMETER=VALUE",
            help="replace a parameter; the value is read as YAML; repeatable",
        )
        seeds = command.add_mutually_exclusive_group()
        seeds.add_argument("--seed", type=int, help="replace the recipe's seed")
        add_seeds(seeds)
    add_seeds(clean)
    accept.add_argument("stages", nargs="+", metavar="STAGE", help="its result is taken as it is")
    which = run.add_mutually_exclusive_group()
    which.add_argument(
        "--from",
        dest="from_stage",
        metavar="STAGE",
        help="run this stage again, and all that depend on it, done or not",
    )
    which.add_argument(
        "--keep",
        action="store_true",
        help="take finished stages as they are, whatever changed; finish what is not done",
    )
    run.add_argument("--only", metavar="STAGE", help="run no stage but this one")
    clean.add_argument("folders", nargs="*", metavar="FOLDER", help="delete these of the list")
    clean.add_argument("--all", action="store_true", help="delete all of the list")
    for command in (run, clean):
        command.add_argument("--yes", action="store_true", help="don't ask")
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
            found.setdefault(stage, {})[parameter] = yaml.load(value, StrictLoader)
        except yaml.YAMLError as error:
            raise RecipeError("--set", [f'"{text}": not valid YAML: {error}']) from None
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["app"]:
        from rorem_lib.app import app

        return app.main(words[1:])
    options = build_parser().parse_args(words)  # exits with 2 on a wrong option
    if options.command == "data":
        return data_commands.run_command(options)
    if options.command == "remove":
        return remove_command.run_command(options)
    if options.command == "export":
        return export_command.run_command(options)
    runs_dir = Path(options.runs_dir).absolute() if options.runs_dir else ROOT / "runs"
    work = {"run": _run, "status": show_status, "accept": _accept, "clean": _clean}
    try:
        recipes = read_recipes(options)
        for recipe in recipes:
            one = copy.copy(options)
            one.seed = recipe.seed if options.seeds else options.seed
            if code := work[options.command](recipe, runs_dir, one):
                return code
        return _tell_seeds(recipes, runs_dir, options) if options.seeds else DONE
    except (RecipeError, RunLocked) as error:
        print(f"rorem: {error}", file=sys.stderr)
        return WRONG
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        print(f"rorem: {'the disk is full: ' if full else ''}{error}", file=sys.stderr)
        if full:
            print("Make room, then go on with: " + describe_command(options), file=sys.stderr)
        return FAILED


def read_recipes(options) -> list[Recipe]:
    """The recipe, or with `--seeds` one a seed, whose names and so folders are `<name>-seed<seed>`.

    Raises:
        RecipeError: see `recipes.read_recipe`; or a seed is given twice.
    """
    overrides = parse_overrides(options.set)
    if not options.seeds:
        return [read_recipe(options.recipe, overrides=overrides, seed=options.seed)]
    if len(set(options.seeds)) < len(options.seeds):
        raise RecipeError("--seeds", ["a seed is given twice"])
    recipes = [read_recipe(options.recipe, overrides=overrides, seed=x) for x in options.seeds]
    return [dataclasses.replace(r, name=f"{r.name}-seed{r.seed}") for r in recipes]


def _tell_seeds(recipes: list[Recipe], runs_dir: Path, options) -> int:
    """Write the report over the trainings, or say where it is."""
    name = recipes[0].name.removesuffix(f"-seed{recipes[0].seed}")
    report = runs_dir / f"{name}-seeds" / "report.html"
    if options.command == "run" and not options.only:
        from rorem_lib.evaluation.seeds import write_seeds_report

        write_seeds_report(report.parent, name, {r.seed: runs_dir / r.name for r in recipes})
    if options.command in ("run", "status") and report.exists():
        print(f"report over the seeds: {os.path.relpath(report)}")
    return DONE


def describe_command(options, command: str = "run", *more: str) -> str:
    """A command on the same recipe with the same settings; by default the one that goes on after
    a stop, without starting anything afresh."""
    words = ["rorem", command, options.recipe, *more]
    for text in options.set:
        words += ["--set", text]
    if options.seeds:  # what is not run is about the one at hand
        chosen = options.seeds if command == "run" else [options.seed]
        words += ["--seeds", *map(str, chosen)]
    for name, value in (
        ("--seed", None if options.seeds else options.seed),
        ("--runs-dir", options.runs_dir),
        ("--only", options.only if command == "run" else None),
    ):
        words += [name, str(value)] if value is not None else []
    program = Path(sys.argv[0])
    if program.name == "rorem" and shutil.which("rorem") != str(program.absolute()):
        words[0] = os.path.relpath(program)  # called by its path: it is not on PATH
    return shlex.join(words)


def format_seconds(seconds: float) -> str:
    """How long something took, as people say it: "40 s", "12 min", "3.5 h", "2.1 days"."""
    for unit, length, digits in (("days", 86400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= length:
            return f"{seconds / length:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def _ask(question: str) -> bool | None:
    """Whether somebody types yes; None where nobody can be asked."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    try:
        return input(f"{question} Type yes to go on: ").strip() == "yes"
    except EOFError:
        return False


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
            keep=options.keep,
            agree=lambda states: _agree(states, recipe, runs_dir, options, console),
            progress=console,
        )
    except NotAgreed as refused:
        _tell_choices(refused.states, options, console)
        return WRONG
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
    message = f"; report: {os.path.relpath(result['report'])}" if result["report"] else ""
    console.write(
        f"{recipe.name}: {len(result['ran'])} run, {len(result['skipped'])} unchanged, "
        f"{time.monotonic() - began:.0f} s{message}"
    )
    return DONE


def _agree(states: list[StageState], recipe, runs_dir, options, console: Console) -> bool:
    """Name what would be made anew, why, and how long it took; then ask."""
    console.write("This is there already and would be made anew:")
    width = max(len(state.row.name) for state in states)
    for state in states:
        took = "unknown time" if state.seconds is None else format_seconds(state.seconds)
        done = f"took {took}, finished {state.finished}"
        half = f"half done, {took} of work"
        console.write(
            f"  {state.row.name:<{width}}  {done if state.finished else half}; {state.note}"
        )
    console.write(
        "Shorter work that depends on it follows if its inputs change. What is there is set aside "
        f"in {os.path.relpath(runs_dir / recipe.name / SUPERSEDED)}."
    )
    return options.yes or bool(_ask("Make it anew?"))


def _tell_choices(states: list[StageState], options, console: Console) -> None:
    """The commands to choose from, where nobody agreed."""
    again = ["--from", options.from_stage] if options.from_stage else []
    again += ["--keep"] if options.keep else []
    names = [s.row.name for s in states if s.replaced and s.state in ACCEPTED]
    console.write("Stopped, nothing of it was touched. Go on with one of:")
    console.write(f"  {describe_command(options, 'run', *again, '--yes')}   (make it anew)")
    if not again:
        console.write(f"  {describe_command(options, 'run', '--keep')}   (take it as it is)")
    if names and not options.from_stage:
        console.write(f"  {describe_command(options, 'accept', *names)}   (and mark it as current)")


def _accept(recipe: Recipe, runs_dir: Path, options) -> int:
    for name, changes in accept_stages(recipe, options.stages, runs_dir=runs_dir).items():
        print(f"{name}: " + (f"accepted ({changes})" if changes else "was current"))
    return DONE


def _clean(recipe: Recipe, runs_dir: Path, options) -> int:
    entries = list_superseded(runs_dir / recipe.name)
    known = [entry.path.name for entry in entries]
    named = set()
    for name in options.folders:
        place = os.path.abspath(name)  # as printed, or with its path
        found = [e for e in entries if name.rstrip("/") == e.path.name or place == str(e.path)]
        if not found:
            raise RecipeError(recipe.path, [f'"{name}" was not set aside{suggest(name, known)}'])
        named.add(found[0].path.name)
    shown = os.path.relpath(runs_dir / recipe.name / SUPERSEDED)
    print(f"{shown}: {len(entries)} folders that newer ones took the place of")
    width = max(map(len, known), default=0)
    for entry in entries:
        print(
            f"  {entry.path.name:<{width}}  {entry.stage}, made {entry.made:%Y-%m-%d %H:%M} UTC, "
            f"{entry.size / 1e6:,.1f} MB: {', '.join(entry.holds) or 'records alone'}"
        )
    chosen = [e for e in entries if options.all or e.path.name in named]
    if not chosen:
        return DONE
    with lock_run(runs_dir / recipe.name):
        agreed = options.yes or _ask(f"Delete {len(chosen)} of them?")
        if not agreed:
            words = [*(["--all"] if options.all else options.folders), "--yes"]
            command = describe_command(options, "clean", *words)
            print(f"Nothing was deleted. Go on with: {command}")
            return WRONG
        for entry in chosen:
            kept = remove_superseded(entry)
            print(f"deleted {entry.path.name}" + " but for what people said" * bool(kept))
            for path in kept:
                print(f"  kept, it stands nowhere else: {os.path.relpath(path)}")
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


def show_status(recipe: Recipe, runs_dir: Path, options) -> int:
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
    if changed := [s.row.name for s in states if s.state in ACCEPTED]:
        print(f"{describe_command(options)} makes anew what changed. To take it as it is:")
        print(f"  {describe_command(options, 'accept', *changed)}")
        print(f"  {describe_command(options, 'run', '--keep')}")
    report = run_dir / "report.html"
    if report.exists():
        print(f"report: {os.path.relpath(report)}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
