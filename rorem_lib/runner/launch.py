"""Start a training or inference job from a notebook, watch it, and never leave it behind.

A job is a module of `rorem_lib` that reads `--config FILE.yaml` and writes `train_metrics.json` to
its `output_dir`. One process on the CPU is a plain `python -m`; everything else goes through
`accelerate launch` with a file of `notebooks/recipes/accelerate/`. `accelerate` and the workers it
starts run behind `python -m rorem_lib.runner.launch MODULE …`, which ties each to its parent: when
the notebook's kernel is killed, in any way, the kernel (Linux) kills the whole chain.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import io
import json
import logging
import math
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import yaml

from rorem_lib.files import ROOT, format_time, read_json, resolve_path, write_text
from rorem_lib.runner.fingerprints import FREE
from rorem_lib.runner.run_folder import LONG, supersede_job
from rorem_lib.runner.stage import FINISHED_JOBS, STARTED

logger = logging.getLogger(__name__)
HARDWARE = ROOT / "notebooks" / "recipes" / "accelerate"
FIRST_ERROR = "first-error.log"  # in a failed job's folder
_PR_SET_PDEATHSIG = 1
_OUT_OF_MEMORY = (
    "out of memory",
    "MemoryError",
    "can't allocate memory",
    "bad_alloc",
    "exitcode: -9",
    "exitcode  : -9",
    "Signals.SIGKILL",
)


class JobChanged(RuntimeError):
    """A job finished before with other settings, and nobody agreed to do its work anew."""


class JobError(RuntimeError):
    """A job that failed; the message ends with the first error of any of its processes, or with the
    end of its log where none was noted."""


def die_with_parent() -> None:
    """Have this process killed when the process that started it ends, however it ends.

    A job calls it first. Where the launcher's pid is known (`ROREM_LAUNCHER`) and that process is
    gone already, this one exits at once. Does nothing where Linux's prctl is missing.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    launcher = os.environ.get("ROREM_LAUNCHER")
    ancestors = _list_ancestors()
    if launcher and ancestors is not None and int(launcher) not in ancestors:
        os._exit(1)


def _list_ancestors() -> list[int] | None:
    """Pids from the parent up to init, as /proc shows them; None where it shows nothing."""
    found, pid = [], os.getpid()
    while pid > 1:
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return found if pid in found and not Path(f"/proc/{pid}").exists() else None
        pid = int(status.rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def get_hardware(hardware: str | None) -> Path | None:
    """The accelerate file of a hardware name; None for one plain process on the CPU.

    Args:
        hardware: a name in `notebooks/recipes/accelerate` ("cpu", "one_gpu", …) or a YAML file.

    Raises:
        ValueError: there is no such file; lists those there are.
    """
    if hardware in (None, "", "cpu"):
        return None
    name = str(hardware)
    path = resolve_path(name) if name.endswith((".yaml", ".yml")) else HARDWARE / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in HARDWARE.glob("*.yaml")))
        raise ValueError(f'there is no hardware "{hardware}"; known are: {known}')
    return path


def build_command(
    module: str,
    config: Path,
    *,
    hardware: str | None = "cpu",
    num_processes: int | None = None,
    tied: bool = True,
) -> list[str]:
    """The command line of a job.

    Args:
        module: its module below `rorem_lib`, such as "remover".
        config: its YAML file.
        hardware: see `get_hardware`.
        num_processes: replaces the hardware file's number.
        tied: go through this module, so that no process outlives its parent; False gives the
            plain command a person would type.
    """
    tie = ["rorem_lib.runner.launch"] if tied else []
    job = ["-m", *tie, f"rorem_lib.{module}", "--config", str(config)]
    python = [sys.executable if tied else "python"]
    file = get_hardware(hardware)
    if file is None:
        return python + job
    more = ["--num_processes", str(num_processes)] if num_processes else []
    # accelerate 1.15 reads this key of its file but goes by the command line's default
    if backend := (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("rdzv_backend"):
        more += ["--rdzv_backend", backend]
    start = [*python, "-m", *tie, "accelerate.commands.launch"]
    return [*(start if tied else ("accelerate", "launch")), "--config_file", str(file), *more, *job]


def build_environment(hardware: str | None, output_dir: Path) -> dict[str, str]:
    """The environment of a job: this process's, and what its hardware needs."""
    environment = dict(os.environ)
    environment["ROREM_LAUNCHER"] = str(os.getpid())
    environment["ROREM_LOG_DIR"] = str(output_dir)
    environment["PYTHONUNBUFFERED"] = "1"
    environment["MPLBACKEND"] = "agg"  # the kernel's inline backend has no place in a job
    above = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{above}" if above else str(ROOT)
    file = get_hardware(hardware)
    if file is None or file.stem.startswith("cpu"):
        environment["ACCELERATE_USE_CPU"] = "true"
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return environment


def launch_job(
    module: str, config, *, hardware: str | None = "cpu", num_processes: int | None = None
) -> dict:
    """Run a job to its end and return its metrics.

    Writes `<output_dir>/config.yaml`, keeps all output in `<output_dir>/train.log` (processes
    other than the first in `train-rank<N>.log`). Under `rorem run` the log's lines are passed on;
    in a notebook one live plot of the loss is drawn instead. Interrupting the cell ends the job.
    A stage that `rorem run` starts again does not repeat a job that came to its end before. One
    that did so with settings of another result is set aside in the run's `.superseded`.

    Args:
        module: the job's module below `rorem_lib`: "remover", "discriminator", "distill", …
        config: its config dataclass, which has an `output_dir`.
        hardware: "cpu", another name in `notebooks/recipes/accelerate`, or a YAML file.
        num_processes: replaces the number in the hardware file.

    Returns:
        The content of `<output_dir>/train_metrics.json`.

    Raises:
        JobError: the job failed, or ended without writing its metrics.
        JobChanged: under `rorem run`, where more than a minute's work would be set aside.
        ValueError: unknown hardware.
    """
    folder = resolve_path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    values = _plain(dataclasses.asdict(config)) | {"output_dir": str(config.output_dir)}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    path, result = folder / "config.yaml", folder / "train_metrics.json"
    if (folder / STARTED).exists() and result.is_file():
        batch, asked = os.environ.get("ROREM_BATCH") == "1", os.environ.get(FINISHED_JOBS)
        changes = describe_settings(path, config)
        if batch and (asked == "keep" or not changes):
            logger.info("%s: finished before, its result is kept", module)
            return read_json(result)
        if changes:
            if batch and asked == "ask" and _measure_work(path, result) > LONG:
                raise JobChanged(f"{module} finished before with other settings: {changes}")
            logger.info("%s finished before; it is now %s", module, supersede_job(folder))
    result.unlink(missing_ok=True)
    (folder / FIRST_ERROR).unlink(missing_ok=True)
    write_text(path, text)
    options = {"hardware": hardware, "num_processes": num_processes}
    plain = shlex.join(build_command(module, path, **options, tied=False))
    log = folder / "train.log"
    with open(log, "ab") as stream:
        stream.write(f"---- {format_time()}  {plain}\n".encode())
        stream.flush()
        start = stream.tell()
        # The log is the job's own: it goes on being written whatever becomes of this process's
        # ends of pipes. A group of its own keeps a terminal's Ctrl-C for the notebook to pass on.
        process = subprocess.Popen(
            build_command(module, path, **options),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            process_group=0,
            env=build_environment(hardware, folder),
        )
    try:
        _follow(process, log, start, folder / "metrics.jsonl", title=module)
    finally:
        if process.poll() is None:
            stop_group(process)
    if process.returncode or not result.is_file():
        raise JobError(describe_failure(module, process.returncode, log, start))
    return read_json(result)


def describe_settings(path: Path, config) -> str:
    """Where a job's `config.yaml` differs from its config now; "" where the result is the same.

    Left out are `FREE` settings and those that either side does not know, the latter where the
    other has the default. The run's folder, or the repository around it, may have moved.
    """
    run = resolve_path(config.output_dir).parent
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        place = resolve_path(before["output_dir"]).parent
        tail = os.path.relpath(run, ROOT)
        root = str(place).removesuffix(tail) if str(place).endswith(f"/{tail}") else f"{ROOT}/"
        before = _relate(before, place, root)
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return "they cannot be read"
    now = _relate(_plain(dataclasses.asdict(config)), run, f"{ROOT}/")
    fields = {field.name: field for field in dataclasses.fields(config)}
    words = []
    for name, field in fields.items():
        if name in FREE:
            continue
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        old = before.get(name, _plain(default))
        if old != now[name]:
            words.append(f"{name} {old} -> {now[name]}")
    return ", ".join(words)


def _relate(value, run: Path, root: str):
    """`value` with paths relative to the run's folder, or to the repository, that they lie in."""
    if isinstance(value, dict):
        return {k: _relate(v, run, root) for k, v in value.items()}
    if isinstance(value, list):
        return [_relate(v, run, root) for v in value]
    if not isinstance(value, str):
        return value
    if value.startswith(f"{run}/"):
        return "${run}/" + value.removeprefix(f"{run}/")
    value = value.removeprefix(root)
    below = f"{str(run).removeprefix(root)}/"  # as the runner hands on what is in the repository
    return "${run}/" + value.removeprefix(below) if value.startswith(below) else value


def _measure_work(config: Path, result: Path) -> float:
    """Seconds that a finished job took: as it says, else from its start to its end."""
    try:
        return float(read_json(result)["seconds"])
    except (ValueError, TypeError, KeyError):
        return result.stat().st_mtime - config.stat().st_mtime if config.is_file() else math.inf


def _plain(value):
    """Dataclass values as YAML's own types."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def stop_group(process: subprocess.Popen, *, patience: float = 10.0) -> None:
    """End a job and all it started: politely, then after `patience` seconds by force."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=patience)
            break
        except ProcessLookupError:
            process.wait()
            break
        except subprocess.TimeoutExpired:
            continue


def describe_failure(module: str, code: int, log: Path, start: int) -> str:
    """What a failed job's user reads: the reason, then its first error or the end of its logs.

    Args:
        module: the job's, below `rorem_lib`.
        code: how its process ended.
        log: its `train.log`; the other processes' logs and the first error are beside it.
        start: where in the log this run begins, in bytes.
    """
    with open(log, "rb") as stream:
        stream.seek(start)
        text = stream.read().decode(errors="replace")
    lines, logs = text.splitlines(), [log]
    for other in sorted(log.parent.glob("train-rank*.log")):
        if other.stat().st_mtime >= log.stat().st_mtime - 60 and other.stat().st_size:
            rank = other.read_text(errors="replace").splitlines()[-20:]
            lines = [*lines[-20:], f"---- {other.name}", *rank]
            text += "\n".join(rank)
            logs.append(other)
    if code in (-9, 137) or any(sign in text for sign in _OUT_OF_MEMORY):
        reason = (
            "ran out of memory (or was killed from outside): lower train_batch_size and "
            "raise gradient_accumulation_steps by as much"
        )
    elif code == 0:
        reason = "ended without writing train_metrics.json"
    else:
        reason = f"failed with exit code {code}"
    head = f"the job rorem_lib.{module} {reason}. "
    try:
        cause, *trace = (log.parent / FIRST_ERROR).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):  # a process that is killed notes nothing
        return head + f"The end of {log}:\n" + "\n".join(lines[-40:])
    where = f"(All that it wrote is in {', '.join(map(str, logs))}.)"
    return "\n".join([f"{head}The first error: {cause}", where, *trace[-38:]])


def note_error(folder: Path) -> None:
    """Keep the error being handled in `FIRST_ERROR`, unless another process has kept one there.

    Of several processes one fails, and the others a moment later, since it is gone. torch's
    launcher compares their errors' times in whole seconds, and so often names another.
    """
    met = sys.exception()
    if getattr(met, "elsewhere", False):  # told by the process that met it: that one comes first
        time.sleep(1)
    error = traceback.TracebackException.from_exception(met)
    cause = " ".join("".join(error.format_exception_only()).split())
    who = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    text = f"{who}{cause}\n{''.join(error.format())}"
    with contextlib.suppress(OSError), open(folder / FIRST_ERROR, "xb") as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def _follow(process, log: Path, start: int, metrics: Path, *, title: str) -> None:
    """Until the job ends, pass on its log lines, or redraw its loss where somebody watches."""
    plot = _make_plot(title) if os.environ.get("ROREM_BATCH") != "1" else None
    drawn = 0.0
    with open(log, encoding="utf-8", errors="replace", newline="\n") as stream:
        stream.seek(start)
        waiting = ""
        while True:
            running = process.poll() is None
            waiting += stream.read()
            *lines, waiting = waiting.split("\n")
            for line in lines if running or not waiting else [*lines, waiting]:
                if plot is None and line.strip():
                    logger.info("%s", line.rpartition("\r")[2])
            if plot is not None and (time.monotonic() - drawn > 3 or not running):
                drawn = time.monotonic()
                _draw(plot, metrics, title)
            if not running:
                return
            try:
                process.wait(timeout=0.3)
            except subprocess.TimeoutExpired:
                pass


def _make_plot(title: str):
    """A display handle in a notebook; None where there is no notebook to draw in."""
    try:
        from IPython import get_ipython
        from IPython.display import Markdown, display
    except ImportError:
        return None
    if get_ipython() is None or not hasattr(get_ipython(), "kernel"):
        return None
    return display(Markdown(f"*{title}: starting …*"), display_id=True)


def _draw(plot, metrics: Path, title: str) -> None:
    """Replace the plot by the loss so far."""
    from IPython.display import Image
    from matplotlib.figure import Figure

    records = []
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:  # the line being written
            continue
    records = [r for r in records if isinstance(r.get("loss"), float) and "step" in r]
    if not records:
        return
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], linewidth=1)
    last = records[-1]
    words = [f"step {last['step']}", f"loss {last['loss']:.4f}"]
    words += [
        f"{last[k]:.3g} {unit}"
        for k, unit in (("images_per_second", "images/s"), ("seconds_left", "s left"))
        if k in last
    ]
    axes.set(xlabel="step", ylabel="loss", title=f"{title}: {', '.join(words)}")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=90)
    plot.update(Image(data=picture.getvalue()))


def main() -> None:
    """`python -m rorem_lib.runner.launch MODULE …`: run a module tied to the life of its parent."""
    die_with_parent()
    rank = os.environ.get("RANK", "0")
    folder = os.environ.get("ROREM_LOG_DIR")
    module, sys.argv = sys.argv[1], sys.argv[1:]
    if rank != "0" and folder:  # one process speaks, the others keep a log of their own
        file = os.open(
            Path(folder) / f"train-rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666
        )
        os.dup2(file, 1)
        os.dup2(file, 2)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception:
        if folder and module.startswith("rorem_lib."):  # not accelerate's, which only says so
            note_error(Path(folder))
        raise


if __name__ == "__main__":
    main()
