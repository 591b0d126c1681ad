"""A small kit of its own in a temporary folder: the real runner, made-up modules and notebooks.

The runner takes the folder above `rorem_lib` for the repository root, so a copy of its modules
beside made-up ones makes a whole repository whose stages take no time.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[1] / "rorem_lib"
COPIED = ("__init__.py", "files.py", "parameters.py", "runner")

TRAINER = """
import argparse, json, os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
import yaml

@dataclass
class TrainerConfig:
    output_dir: str = "runs/alone/train"
    max_train_steps: int = 4
    pause: float = 0.0
    trouble: str = "none"

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    config = TrainerConfig(**yaml.safe_load(Path(parser.parse_args().config).read_text()))
    folder = Path(config.output_dir)
    checkpoint = folder / "checkpoint.txt"
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    print(f"pid {os.getpid()} begins at step {first}")
    for step in range(first + 1, config.max_train_steps + 1):
        time.sleep(config.pause)
        with open(folder / "metrics.jsonl", "a") as stream:
            stream.write(json.dumps({"step": step, "loss": 1.0 / step}) + "\\n")
        # beside and renamed: the tests kill this job at any moment, and two processes write it
        partial = checkpoint.with_suffix(f".{os.getpid()}")
        partial.write_text(str(step))
        partial.replace(checkpoint)
        print(f"step {step} rank {os.environ.get('RANK', '0')}", flush=True)
        if config.trouble == "raise" and step == 2:
            raise ValueError("the loss is odd")
        if config.trouble == "memory" and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    if config.trouble != "silent" and os.environ.get("RANK", "0") == "0":
        (folder / "train_metrics.json").write_text(json.dumps({"steps": step, "loss": 1.0 / step}))

if __name__ == "__main__":
    main()
"""

MODULES = {
    "shapes": "SIDES = 3\n",
    "colours": "from rorem_lib import shapes\n\ndef count():\n    return shapes.SIDES\n",
    "trainer": TRAINER,
    "labels": "class LabelsMissing(RuntimeError):\n    pass\n",
    "evaluation/__init__": "",
    "evaluation/report": (
        "def write_report(run_dir, recipe):\n"
        "    path = run_dir / 'report.html'\n"
        "    old = path.read_text() if path.exists() else ''\n"
        "    path.write_text(old + recipe.name + ' ')\n"
        "    return path\n"
    ),
}

NOTEBOOKS = {
    "01_make": [
        'output_dir: str = "runs/alone/01_make"\nsize: int = 8\nflavour: str = "plain"\n'
        "seed: int = 1\nrate: float = 1.0e-3\nbig: bool = False\nnames: list[str] = []\n"
        "limit: int | None = None",
        "from rorem_lib import shapes\nfrom rorem_lib.runner.stage import start_stage\n"
        'stage = start_stage(output_dir, notebook="01_make")',
        'print("making", size, flavour)\n(stage.folder / "made.txt").write_text(str(size))',
        'stage.finish({"size": size, "seed": seed, "sides": shapes.SIDES})',
    ],
    "02_train": [
        'output_dir: str = "runs/alone/02_train"\ndata: str = ""\nmax_train_steps: int = 4\n'
        'pause: float = 0.0\ntrouble: str = "none"',
        "from rorem_lib.runner.launch import launch_job\n"
        "from rorem_lib.files import resolve_path\nfrom rorem_lib.runner.stage import start_stage\n"
        "from rorem_lib.trainer import TrainerConfig\n"
        'stage = start_stage(output_dir, notebook="02_train")',
        "config = TrainerConfig(str(stage.folder), max_train_steps, pause, trouble)\n"
        'metrics = launch_job("trainer", config)',
        "stage.finish(metrics)",
    ],
    "03_judge": [
        'output_dir: str = "runs/alone/03_judge"\nmodel: str = ""\nsets: list[str] = []\n'
        'trouble: str = "none"\nmode: str = "simulate"',
        "import os\nimport signal\nfrom pathlib import Path\n\n"
        "from rorem_lib.colours import count\n"
        "from rorem_lib.labels import LabelsMissing\n"
        "from rorem_lib.files import resolve_path\nfrom rorem_lib.runner.stage import start_stage\n"
        'stage = start_stage(output_dir, notebook="03_judge")',
        'if trouble == "raise":\n    raise ValueError("nothing to judge")\n'
        'if trouble == "exit":\n    raise SystemExit(0)\n'
        'if trouble == "kill":\n    os.kill(os.getpid(), signal.SIGKILL)\n'
        'if mode == "interactive" and not list(stage.folder.glob("labels-*.jsonl")):\n'
        '    raise LabelsMissing("0 of 5 labels are there")',
        'made = [Path(resolve_path(s), "made.txt").read_text() for s in sets]\n'
        'stage.finish({"judged": len(made), "sides": count()})',
    ],
}

RECIPE = """
name: small
seed: 7
stages:
  make: {notebook: 01_make, row: base, parameters: {size: 5}}
  other: {notebook: 01_make, parameters: {flavour: odd}}
  train: {notebook: 02_train, parameters: {data: "${make}/made.txt"}}
  judge: {notebook: 03_judge, parameters: {model: "${train}/model", sets: ["${make}", "${other}"]}}
"""


def write_notebook(path: Path, cells: list[str], *, outputs=()) -> Path:
    """A notebook whose first code cell is tagged `parameters`."""
    content = [{"cell_type": "markdown", "metadata": {}, "id": "title", "source": ["# Title"]}]
    for number, source in enumerate(cells):
        content.append(
            {
                "cell_type": "code",
                "execution_count": None,
                "id": f"cell{number}",
                "metadata": {"tags": ["parameters"]} if number == 0 else {},
                "outputs": list(outputs),
                "source": source.splitlines(keepends=True),
            }
        )
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"cells": content, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})
    )
    return path


class Kit:
    """The temporary repository and its `rorem` command."""

    def __init__(self, root: Path, *, like: "Kit | None" = None):
        self.root, self.run_dir = root, root / "runs" / "small"
        self.library = root / "rorem_lib"
        if like:
            shutil.copytree(like.root, root, dirs_exist_ok=True)
            return
        self.library.mkdir(parents=True)
        for name in COPIED:
            copy = shutil.copytree if (LIBRARY / name).is_dir() else shutil.copy
            copy(LIBRARY / name, self.library / name)
        for name, source in MODULES.items():
            path = self.library / f"{name}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(source)
        for name, cells in NOTEBOOKS.items():
            write_notebook(root / "notebooks" / f"{name}.ipynb", cells)
        shutil.copytree(
            LIBRARY.parent / "notebooks" / "recipes" / "accelerate",
            root / "notebooks" / "recipes" / "accelerate",
        )
        self.write_recipe(RECIPE)

    def write_recipe(self, text: str) -> None:
        (self.root / "notebooks" / "recipes" / "small.yaml").write_text(text)

    @property
    def environment(self) -> dict:
        return os.environ | {"PYTHONPATH": str(self.root), "PYTHONUNBUFFERED": "1"}

    def start(
        self, *words: str, module: str = "rorem_lib.runner.cli", **options
    ) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", module, *words],
            cwd=self.root,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environment,
            **options,
        )

    def call(self, *words: str, code: int = 0) -> str:
        """Run `rorem WORDS` to its end, check its exit code, return what it printed."""
        process = self.start(*words)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == code, output
        return output

    def python(self, source: str, **options) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", source],
            cwd=self.root,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environment,
            **options,
        )

    def states(self) -> dict[str, str]:
        """Stage -> state, from `rorem status`."""
        lines = self.call("status", "small").splitlines()[1:]
        words = ("done", "changed", "half-way", "failed", "waiting", "to run", "running")
        return {
            line.split()[0]: next(w for w in words if f"  {w}" in line)
            for line in lines
            if line.startswith("  ")
        }

    def find_processes(self) -> set[int]:
        """Pids of the processes that have this kit in their environment; zombies don't count."""
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    if f"PYTHONPATH={self.root}".encode() in (entry / "environ").read_bytes():
                        found.add(int(entry.name))
                except OSError:
                    continue
        return found


def wait_until(condition, *, seconds: float = 60.0):
    """The condition's first true value; fails where it stays false."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError("what was waited for did not happen")


def kill(pid: int) -> None:
    """SIGKILL."""
    os.kill(pid, signal.SIGKILL)
