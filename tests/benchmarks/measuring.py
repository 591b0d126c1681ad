"""What benchmarks need: other processes' time and memory, the machine, where results are kept."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import psutil

RESULTS = Path(__file__).parent / "results"


def describe_machine(*packages: str) -> dict:
    """Processor, cores, memory in GiB, and the versions of Python and of some packages."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def run_watched(
    command: Sequence,
    log: Path,
    *,
    env: dict | None = None,
    cwd: Path | None = None,
    every: float | None = 0.25,
) -> dict:
    """Run a command to its end and look at the memory of it and its children.

    Args:
        command: the program and its words.
        log: where its output goes.
        env: its environment.
        cwd: its working folder.
        every: seconds between two looks, each of which takes 15 ms of a core a process; None
            takes none.

    Returns:
        `seconds` from start to end; where it was looked at, `peak_mb` of all processes together
        (shared pages counted once) and `main_process_mb`, in 10^6 bytes.

    Raises:
        RuntimeError: it failed; shows the end of its log.
    """
    words = [str(word) for word in command]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else what was started goes on
    began, peak, main = time.monotonic(), 0, 0
    with open(log, "wb") as stream:
        process = subprocess.Popen(words, env=env, cwd=cwd, stdout=stream, stderr=subprocess.STDOUT)
    watched = psutil.Process(process.pid)
    try:
        while every and process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                found = [
                    p.memory_full_info().pss for p in (watched, *watched.children(recursive=True))
                ]
                peak, main = max(peak, sum(found)), max(main, found[0])
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(every)
        process.wait()
    finally:
        if process.poll() is None:
            for child in (*watched.children(recursive=True), watched):
                child.kill()
    seconds = time.monotonic() - began
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(words)} ended with {process.returncode}:\n"
            f"{log.read_text(errors='replace')[-3000:]}"
        )
    sizes = {"peak_mb": peak / 1e6, "main_process_mb": main / 1e6} if every else {}
    return {"seconds": seconds, **sizes}


def require_idle(limit: float = 0.1) -> None:
    """Stop where other programs take more than `limit` of the processors just now.

    Raises:
        SystemExit: with code 2.
    """
    busy = psutil.cpu_percent(interval=3) / 100
    if busy > limit:
        print(
            f"other programs take {busy:.0%} of the processors: times would mean nothing. "
            "--busy measures all the same",
            file=sys.stderr,
        )
        raise SystemExit(2)


def summarise_ratios(ratios: Sequence[float]) -> dict:
    """The median of some runs' ratios, and all of them."""
    return {"median": round(float(np.median(ratios)), 2), "all": [round(r, 2) for r in ratios]}


def save_result(name: str, result: dict, *packages: str) -> Path:
    """Write `results/<name>.json` with the machine and the date, and print it."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    whole = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "machine": describe_machine(*packages),
        **result,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(whole, indent=1))
    return path
