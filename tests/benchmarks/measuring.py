"""What every benchmark needs: the machine's description, and where results are kept."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def describe_machine(*packages: str) -> dict:
    """Processor, cores, memory in GiB, and the versions of Python and of some packages."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(memory),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages}}


def save_result(name: str, result: dict, *packages: str) -> Path:
    """Write `results/<name>.json` with the machine and the date, and print it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            cwd=Path(__file__).parent).stdout.strip()
    whole = {"benchmark": name, "date": datetime.now(UTC).date().isoformat(), "commit": commit,
             "machine": describe_machine(*packages), **result}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(whole, indent=1))
    return path
