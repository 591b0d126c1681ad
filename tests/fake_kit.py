"""A small kit of its own in a temporary folder: the real runner, made-up modules and notebooks.

The runner takes the folder above `rorem_lib` for the repository root, so a copy of its modules
beside made-up ones makes a whole repository whose stages take no time. Where kernels are not what
is tested, cells run in the runner's own process: starting a kernel takes seconds.
"""

import hashlib
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[1] / "rorem_lib"
COPIED = ("__init__.py", "files.py", "parameters.py", "runner")

# Takes the place of `runner/execution.py`.
EXECUTION = """
import contextlib, json, logging, os
from rorem_lib.files import ROOT

class NotebookFailed(RuntimeError):
    def __init__(self, error, number, source):
        self.name, self.cell, self.source = type(error).__name__, number, source
        super().__init__(f"{self.name}: {error}")

class Lines:
    def __init__(self, say):
        self.say, self.waiting = say, ""
    def write(self, text):
        *lines, self.waiting = (self.waiting + text).split("\\n")
        for line in lines:
            self.say(line)
    def flush(self):
        pass

def execute_notebook(notebook, output, parameters, *, say):
    os.environ["ROREM_BATCH"] = "1"
    logging.getLogger("rorem_lib").handlers.clear()
    output.write_text(notebook.read_text())
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    names = {"__name__": "__main__"}
    with contextlib.redirect_stdout(Lines(say)):
        for number, cell in enumerate(cells, 1):
            source = "".join(cell["source"])
            try:
                exec(source, names)
            except Exception as error:
                raise NotebookFailed(error, number, source) from error
            if number == 1:
                names.update(parameters)
"""

# The same for the real notebooks: what a stage makes depends on all it reads, and on `salt.json`.
PRETENCE = """
import hashlib, json
from pathlib import Path
from rorem_lib.files import ROOT, resolve_path
from rorem_lib.runner.recipes import list_strings

MADE = "remover lora discriminator candidates/meta.json accepted/meta.json scored/meta.json".split()
MADE += [f"{name}/meta.json" for name in ("labelled", "pool", "test", "high_resolution")]
MADE += ["calibration.json", "hidden/pool/truth.png", "hidden/high_resolution/truth.png"]

class NotebookFailed(RuntimeError):
    pass

def execute_notebook(notebook, output, parameters, *, say):
    salt = json.loads((ROOT / "salt.json").read_text()).get(notebook.stem, "")
    read = hashlib.sha256(salt.encode())
    folder = resolve_path(parameters.pop("output_dir"))
    for text in list_strings(parameters):
        path = resolve_path(text)
        for file in [path, *sorted(path.rglob("*"))] if "runs/" in text else []:
            if file.is_file() and "stage" not in file.name and file.name != "DONE":
                read.update(file.read_bytes())
    for name in MADE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(read.hexdigest())
    output.write_text("{}")
    (folder / "metrics.json").write_text("{}")
"""

# `rorem` without Python's start each time: forked for every line of words, as JSON, that comes in.
SERVER = """
import json, multiprocessing.pool, os, sys
import yaml
from rorem_lib.runner import cli

for line in sys.stdin:
    if not (pid := os.fork()):
        output = os.open("output.txt", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
            os.dup2(file, number)
        try:
            code = cli.main(json.loads(line))
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

REPORT = """
def write_report(run_dir, recipe):
    path = run_dir / 'report.html'
    old = path.read_text() if path.exists() else ''
    path.write_text(old + recipe.name + ' ')
    return path
"""

SEEDS = """
def write_seeds_report(folder, name, runs):
    folder.mkdir(exist_ok=True)
    made = [(run / 'make' / 'metrics.json').read_text() for run in runs.values()]
    (folder / 'report.html').write_text(f"{name} {list(runs)} {made}")
"""

TRAINER = """
import argparse, json, os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
import yaml

VERSION = 1

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
        (folder / "model").mkdir(exist_ok=True)
        (folder / "model" / "weights.txt").write_text(f"{step} steps")
        (folder / "train_metrics.json").write_text(json.dumps({"steps": step, "loss": 1.0 / step}))

if __name__ == "__main__":
    main()
"""

MODULES = {
    "shapes": '"""Shapes."""\n\nVERSION = 1\nSIDES = 3\n',
    "colours": (
        "from rorem_lib import shapes\n\nVERSION = 1\n\ndef count():\n    return shapes.SIDES\n"
    ),
    "trainer": TRAINER,
    "labels": "class LabelsMissing(RuntimeError):\n    pass\n",
    "evaluation/__init__": "",
    "evaluation/report": REPORT,
    "evaluation/seeds": SEEDS,
}

NOTEBOOKS = {
    "01_make": [
        'output_dir: str = "runs/alone/01_make"\nsize: int = 8\nflavour: str = "plain"\n'
        "seed: int = 1\nrate: float = 1.0e-3\nbig: bool = False\nnames: list[str] = []\n"
        "limit: int | None = None",
        "from rorem_lib import shapes\nfrom rorem_lib.runner.stage import start_stage\n"
        'stage = start_stage(output_dir, notebook="01_make", job="shapes")',
        'print("making", size, flavour)\n'
        '(stage.folder / "made.txt").write_text(f"{size} of {shapes.SIDES}")',
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
        'stage = start_stage(output_dir, notebook="03_judge", job="colours")',
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
    """The temporary repository and its `rorem` command.

    Args:
        root: an empty folder.
        like: a kit to copy.
        kernels: notebooks are executed by papermill, as outside of tests.
        real: a copy of the real library and notebooks, of which no cell is run.
    """

    def __init__(
        self, root: Path, *, like: "Kit | None" = None, kernels: bool = False, real: bool = False
    ):
        self.root, self.run_dir = root, root / "runs" / "small"
        self.library, self.kernels, self.server = root / "rorem_lib", kernels, None
        if like:
            shutil.copytree(like.root, root, dirs_exist_ok=True)
            return
        if real:
            left = shutil.ignore_patterns("__pycache__")
            shutil.copytree(LIBRARY, self.library, ignore=left, dirs_exist_ok=True)
            shutil.copytree(LIBRARY.parent / "notebooks", root / "notebooks", ignore=left)
            (self.library / "runner" / "execution.py").write_text(PRETENCE)
            (self.library / "evaluation" / "report.py").write_text(REPORT)
            (root / "salt.json").write_text("{}")
            return
        self.library.mkdir(parents=True)
        for name in COPIED:
            copy = shutil.copytree if (LIBRARY / name).is_dir() else shutil.copy
            copy(LIBRARY / name, self.library / name)
        if not kernels:
            self.use_no_kernels()
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

    def use_no_kernels(self) -> None:
        """Cells run in the runner's process from now on."""
        self.kernels = False
        (self.library / "runner" / "execution.py").write_text(EXECUTION)

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
        if self.kernels:
            process = self.start(*words)
            output, _ = process.communicate(timeout=120)
            assert process.returncode == code, output
            return output
        if self.server is None:  # ends with this object, whose end of the pipe it reads
            self.server = self.python(SERVER, stdin=subprocess.PIPE, bufsize=1)
        self.server.stdin.write(json.dumps(words) + "\n")
        returned = int(self.server.stdout.readline())
        output = (self.root / "output.txt").read_text()
        assert returned == code, output
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

    def __del__(self):
        if self.server is not None:
            self.server.stdin.close()
            self.server.stdout.close()
            self.server.wait(timeout=30)

    def talk(self, *words: str, answer: str, code: int = 0) -> str:
        """`call` in a terminal, where somebody types `answer` at the question."""
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "rorem_lib.runner.cli", *words],
            cwd=self.root,
            env=self.environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        output, asked, end = b"", False, time.monotonic() + 120
        while time.monotonic() < end:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    output += os.read(ours, 65536)
                except OSError:  # Linux's way to say that the other side is closed
                    break
            if not asked and b"Type yes to go on: " in output:
                asked = True
                os.write(ours, answer.encode() + b"\n")
        os.close(ours)
        assert process.wait(timeout=30) == code, output.decode()
        return output.decode().replace("\r\n", "\n")

    def read(self, stage: str, name: str = "stage.json") -> dict:
        """One of a stage's records."""
        return json.loads((self.run_dir / stage / name).read_text())

    def pretend(self, stage: str, name: str = "stage.json", **values) -> None:
        """Change one of a stage's records, such as how long it took."""
        path = self.run_dir / stage / name
        path.write_text(json.dumps(self.read(stage, name) | values))

    def edit(self, path: str, old: str, new: str) -> str:
        """Replace a text in a file of the repository; returns the file as it was."""
        text = (self.root / path).read_text()
        assert old in text, f"{path} has no {old!r}"
        (self.root / path).write_text(text.replace(old, new))
        return text

    def hash_all(self) -> dict[str, str]:
        """The content of every file in the run's folder, by its hash: one of its names."""
        return {
            hashlib.sha256(path.read_bytes()).hexdigest(): str(path.relative_to(self.run_dir))
            for path in self.run_dir.rglob("*")
            if path.is_file() and path.name != ".lock"
        }

    def states(self, recipe: str = "small") -> dict[str, str]:
        """Stage -> state, from `rorem status`."""
        lines = self.call("status", recipe).splitlines()[1:]
        words = "done changed half-way failed waiting unreadable running".split() + ["to run"]
        return {
            line.split()[0]: next(w for w in words if f"  {w}" in line)
            for line in lines
            if line.startswith("  ") and not line.startswith("  rorem ")
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
