"""Jobs: their command lines, their failures, and that none outlives who started it."""

import json
import os
import signal
import subprocess
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml
from fake_kit import Kit, kill, wait_until

from rorem_lib.runner import launch
from rorem_lib.runner.launch import HARDWARE, build_command, build_environment, get_hardware

pytestmark = pytest.mark.slow

START = """
import json, logging, sys
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
from rorem_lib.runner.launch import JobError, launch_job
from rorem_lib.trainer import TrainerConfig
try:
    metrics = launch_job("trainer", TrainerConfig("runs/job", {options}), hardware="{hardware}")
    print("metrics", json.dumps(metrics))
except JobError as error:
    print("JobError", error)
except KeyboardInterrupt:
    print("KeyboardInterrupt")
"""

TWINS = """
import argparse, json, os
from dataclasses import dataclass
from pathlib import Path
import torch, yaml
from accelerate import Accelerator

@dataclass
class TrainerConfig:
    output_dir: str = ""

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    folder = Path(yaml.safe_load(open(parser.parse_args().config))["output_dir"])
    accelerator = Accelerator()
    total = accelerator.reduce(torch.tensor([accelerator.process_index + 1.0]), "sum").item()
    print("here is rank", accelerator.process_index)
    if accelerator.is_main_process:
        (folder / "train_metrics.json").write_text(json.dumps({
            "num_processes": accelerator.num_processes, "total": total,
            "kind": str(accelerator.distributed_type), "device": accelerator.device.type}))
    accelerator.end_training()
"""


@pytest.fixture
def kit(tmp_path):
    return Kit(tmp_path)


def start(kit, options="", hardware="cpu", **more):
    return kit.python(START.format(options=options, hardware=hardware), **more)


def finish(process) -> str:
    output, _ = process.communicate(timeout=120)
    return output


def test_job_returns_its_metrics_and_keeps_its_log(kit):
    output = finish(start(kit, "max_train_steps=3"))
    assert "step 3 rank 0" in output
    assert json.loads(output.partition("metrics ")[2]) == {"steps": 3, "loss": 1 / 3}
    folder = kit.root / "runs" / "job"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config == {
        "output_dir": "runs/job",
        "max_train_steps": 3,
        "pause": 0.0,
        "trouble": "none",
    }
    log = (folder / "train.log").read_text()
    assert "python -m rorem_lib.trainer --config" in log and "step 3" in log


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("raise", ["failed with exit code 1", "ValueError: the loss is odd"]),
        ("memory", ["ran out of memory", "train_batch_size", "step 2"]),
        ("silent", ["ended without writing train_metrics.json"]),
    ],
)
def test_failed_job_says_why(kit, trouble, words):
    (kit.root / "runs" / "job").mkdir(parents=True)
    (kit.root / "runs" / "job" / "train_metrics.json").write_text("{}")  # of an earlier run
    output = finish(start(kit, f"trouble={trouble!r}"))
    assert "JobError" in output and all(word in output for word in words)


def test_error_carries_forty_lines_and_the_other_ranks(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("before\n" + "".join(f"line {i}\n" for i in range(100)))
    told = launch.describe_failure("remover", 1, log, len("before\n"))
    assert told.count("\n") == 40 and "line 60" in told and "line 59" not in told
    (tmp_path / "train-rank1.log").write_text("torch.OutOfMemoryError: CUDA out of memory\n")
    told = launch.describe_failure("remover", 1, log, 0)
    assert "train-rank1.log" in told and "ran out of memory" in told


def test_the_first_error_is_told_whatever_follows(tmp_path, monkeypatch):
    log = tmp_path / "train.log"
    log.write_text("".join(f"traceback of the launcher {i}\n" for i in range(100)))
    (tmp_path / "train-rank1.log").write_text("Connection closed by peer\n")

    def fail(rank, error):
        monkeypatch.setenv("RANK", rank)
        try:
            raise error
        except Exception:
            launch.note_error(tmp_path)

    fail("1", ValueError("/sets/a\udcff.png is truncated:\ndownload it again"))
    fail("0", RuntimeError("Connection closed by peer"))
    told = launch.describe_failure("remover", 1, log, 0)
    first, second, *rest = told.splitlines()
    assert "failed with exit code 1" in first and first.endswith(
        r"rank 1: ValueError: /sets/a\udcff.png is truncated: download it again"
    )
    assert "train.log" in second and "train-rank1.log" in second
    assert "Traceback" in rest[0] and "Connection closed" not in told
    assert "launcher" not in told and told.count("\n") < 40

    (tmp_path / launch.FIRST_ERROR).unlink()
    other = RuntimeError("process 1: a.png is truncated")  # told to rank 0, which is faster
    other.elsewhere = True
    teller = threading.Thread(target=fail, args=("0", other))
    teller.start()
    fail("1", ValueError("a.png is truncated"))
    teller.join()
    assert ": ValueError: a.png is" in launch.describe_failure("remover", 1, log, 0)
    (tmp_path / launch.FIRST_ERROR).write_text("")  # a full disk
    assert "launcher 99" in launch.describe_failure("remover", 1, log, 0)


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Two processes, of which the first fails, then the second, then neither: what each run printed
    and whether it left a first error. A start imports torch three times, so there are only three.
    """
    kit, runs = Kit(tmp_path_factory.mktemp("twins")), []
    for rank in (0, 1, None):
        failing = TWINS.replace(
            "    total =",
            f"    if accelerator.process_index == {rank}:\n"
            "        raise OSError('/sets/a.png: image file is truncated')\n    total =",
        )
        (kit.library / "trainer.py").write_text(failing)
        output = finish(start(kit, hardware="cpu_two_processes"))
        runs.append((output, (kit.root / "runs" / "job" / launch.FIRST_ERROR).exists()))
    return kit, runs


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_one_that_failed_first_is_told(twins, rank):
    """The other one notices a moment later, and the launcher tells forty lines of its own."""
    output, noted = twins[1][rank]
    (told,) = [line for line in output.splitlines() if line.startswith("JobError")]
    assert f"rank {rank}: OSError: /sets/a.png: image file is truncated" in told and noted
    output, noted = twins[1][-1]  # what an earlier run left is not told again
    assert "metrics" in output and not noted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_job_ends_with_who_started_it(kit, number):
    process = start(kit, "max_train_steps=600, pause=0.1")
    wait_until((kit.root / "runs" / "job" / "checkpoint.txt").exists)
    assert len(kit.find_processes()) == 2
    process.send_signal(number)
    assert (number == signal.SIGKILL) or "KeyboardInterrupt" in finish(process)
    process.wait(timeout=30)
    wait_until(lambda: not kit.find_processes(), seconds=10)
    process.communicate()


def test_finished_job_is_kept_in_a_batch_run_alone(kit, monkeypatch):
    """What `rorem run` repeats after a failure in a later cell is not trained a second time."""
    folder = kit.root / "runs" / "job"
    finish(start(kit))
    (folder / launch.STARTED).write_text("{}")
    (folder / "train_metrics.json").write_text('{"steps": "from before"}')
    monkeypatch.setenv("ROREM_BATCH", "1")
    assert "from before" in finish(start(kit))
    assert "from before" not in finish(start(kit, "max_train_steps=5"))  # another config
    aside = next((kit.root / "runs" / ".superseded").glob("job-*"))
    assert "from before" in (aside / "train_metrics.json").read_text()
    assert (aside / "model" / "weights.txt").read_text() == "4 steps"
    assert (folder / "model" / "weights.txt").read_text() == "5 steps"
    (folder / "train_metrics.json").write_text('{"steps": "from before"}')
    monkeypatch.delenv("ROREM_BATCH")
    assert "from before" not in finish(start(kit, "max_train_steps=5"))


@dataclass
class Config:
    output_dir: str
    meta_path: list[str] = field(default_factory=list)
    steps: int = 4
    logging_steps: int = 25
    new: str = "none"


def test_a_finished_job_is_known_wherever_it_lies(tmp_path, monkeypatch):
    """No process is started: what is there is kept, or somebody has to agree first."""
    monkeypatch.setenv("ROREM_BATCH", "1")
    monkeypatch.setenv(launch.FINISHED_JOBS, "ask")
    folder = tmp_path / "moved" / "train"
    folder.mkdir(parents=True)
    (folder / launch.STARTED).write_text("{}")
    (folder / "train_metrics.json").write_text('{"seconds": 1e6}')
    values = {"output_dir": "/old/run/train", "meta_path": ["/old/run/make/x", "data/y"]}
    text = yaml.safe_dump(values | {"steps": 4, "logging_steps": 5, "gone": 1})
    (folder / "config.yaml").write_text(text)
    paths = [f"{tmp_path}/moved/make/x", "data/y"]
    config = Config(str(folder), paths)
    assert launch.launch_job("none", config) == {"seconds": 1e6}
    assert (folder / "config.yaml").read_text() == text
    for other in ({"steps": 5}, {"new": "x"}, {"meta_path": ["data/y"]}):
        (name,) = other
        with pytest.raises(launch.JobChanged, match=name):
            launch.launch_job("none", replace(config, **other))
    monkeypatch.setattr(launch, "ROOT", tmp_path)  # the repository has moved with the run
    monkeypatch.setattr("rorem_lib.files.ROOT", tmp_path)
    values = {"output_dir": "/old/moved/train", "meta_path": ["moved/make/x", "/old/data/y"]}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    assert launch.launch_job("none", replace(config, meta_path=["moved/make/x", "data/y"]))
    assert launch.launch_job("none", config)
    monkeypatch.setenv(launch.FINISHED_JOBS, "keep")
    assert launch.launch_job("none", replace(config, steps=5))
    (folder / "config.yaml").write_text("- torn")
    monkeypatch.setenv(launch.FINISHED_JOBS, "ask")
    with pytest.raises(launch.JobChanged):
        launch.launch_job("none", config)
    assert (folder / "train_metrics.json").exists()


def test_a_run_asks_before_a_finished_job_is_repeated(kit):
    kit.write_recipe("stages:\n  train: {notebook: 02_train}\n")
    kit.call("run", "small")
    for name in ("DONE", "stage.json"):  # killed after its job
        (kit.run_dir / "train" / name).unlink()
    metrics = kit.run_dir / "train" / "train_metrics.json"
    metrics.write_text('{"seconds": 86400}')
    kit.edit("rorem_lib/trainer.py", '= "none"\n', '= "none"\n    new: int = 0\n')
    assert "finished before, its result is kept" in kit.call("run", "small")
    for name in ("DONE", "stage.json"):
        (kit.run_dir / "train" / name).unlink()
    kit.edit("rorem_lib/trainer.py", "new: int = 0", "new: int = 1")
    kit.edit("runs/small/train/config.yaml", "trouble: none", "trouble: none\nnew: 0")
    output = kit.call("run", "small", code=2)
    assert "JobChanged: trainer finished before with other settings: new 0 -> 1" in output
    assert "86400" in metrics.read_text()
    assert "its result is kept" in kit.call("run", "small", "--keep")
    for name in ("DONE", "stage.json"):
        (kit.run_dir / "train" / name).unlink()
    assert "begins at step 0" in kit.call("run", "small", "--yes")
    kept = list(kit.run_dir.glob(".superseded/train-*/train_metrics.json"))
    assert len(kept) == 1 and "86400" in kept[0].read_text()
    assert kit.states() == {"train": "done"}


def test_two_processes_work_together(twins):
    """The hardware file really starts two ranks: the wrong ways exit with 0 and one process."""
    kit, (*_, (output, _)) = twins
    metrics = json.loads(output.partition("metrics ")[2])
    assert metrics["num_processes"] == 2 and metrics["total"] == 3.0
    assert metrics["device"] == "cpu" and "MULTI" in metrics["kind"]
    assert "here is rank 0" in output and "here is rank 1" not in output
    assert "here is rank 1" in (kit.root / "runs/job/train-rank1.log").read_text()


def test_workers_end_with_who_started_the_launcher(kit):
    process = start(kit, "max_train_steps=600, pause=0.1", hardware="cpu_two_processes")
    folder = kit.root / "runs" / "job"
    signs = [folder / "train-rank1.log", folder / "checkpoint.txt"]
    wait_until(lambda: all(map(Path.exists, signs)) or process.poll() is not None)
    assert all(map(Path.exists, signs)), finish(process)  # says why the launch failed
    assert len(kit.find_processes()) == 4  # this one's child, the launcher, two workers
    kill(process.pid)
    process.communicate()
    wait_until(lambda: not kit.find_processes(), seconds=10)


def test_commands(tmp_path):
    plain = build_command("remover", Path("c.yaml"), tied=False)
    assert plain == ["python", "-m", "rorem_lib.remover", "--config", "c.yaml"]
    many = build_command(
        "remover", Path("c.yaml"), hardware="many_gpus", num_processes=4, tied=False
    )
    assert many == [
        "accelerate",
        "launch",
        "--config_file",
        str(HARDWARE / "many_gpus.yaml"),
        "--num_processes",
        "4",
        "-m",
        "rorem_lib.remover",
        "--config",
        "c.yaml",
    ]
    nodes = build_command("remover", Path("c.yaml"), hardware="several_nodes", tied=False)
    assert nodes[4:6] == ["--rdzv_backend", "c10d"]
    assert build_environment("cpu_two_processes", tmp_path)["ACCELERATE_USE_CPU"] == "true"
    assert build_environment("cpu", tmp_path)["GLOO_SOCKET_IFNAME"] == "lo"
    added = set(build_environment("many_gpus", tmp_path)) - set(os.environ)
    assert not {"ACCELERATE_USE_CPU", "GLOO_SOCKET_IFNAME"} & added
    with pytest.raises(ValueError, match="cpu_two_processes"):
        get_hardware("laptop")


def test_hardware_files_say_what_they_start():
    """Read by accelerate's own launcher: an unknown key or a misread file fails here."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    found = {}
    for path in sorted(HARDWARE.glob("*.yaml")):
        load_config_from_file(str(path))
        words = build_command("remover", Path("c.yaml"), hardware=str(path), tied=False)[2:]
        options, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        kind = (
            "deepspeed"
            if options.use_deepspeed
            else "fsdp"
            if options.use_fsdp
            else "ddp"
            if options.multi_gpu
            else "one"
        )
        found[path.stem] = (kind, options.num_processes, options.num_machines)
    assert found == {
        "cpu": ("one", 1, 1),
        "cpu_two_processes": ("ddp", 2, 1),
        "one_gpu": ("one", 1, 1),
        "many_gpus": ("ddp", 8, 1),
        "deepspeed_zero2": ("deepspeed", 8, 1),
        "fsdp2": ("fsdp", 8, 1),
        "several_nodes": ("ddp", 16, 2),
    }


SLURM = HARDWARE / "slurm.sbatch"
# Each node's shell starts with its own SLURM_NODEID, as under the real one.
FAKE_SRUN = """#!/bin/bash
printf '%s\\n' "$@" > srun.txt
while [[ $1 == --* ]]; do shift; done
for id in 0 1; do SLURM_NODEID=$id "$@" || exit; done
"""
FAKE_ACCELERATE = """#!/bin/bash
printf '%s\\n' "$@" > "words-$SLURM_NODEID.txt"
exit ${FAIL:-0}
"""
FAKE_SCONTROL = """#!/bin/bash
[[ "$*" == "show hostnames gpu[07-08]" ]] && printf 'gpu07\\ngpu08\\n'
"""


def submit(folder, *words, **more):
    """Run the Slurm script as on the first of two nodes with 4 GPUs each."""
    tools = folder / "tools"
    tools.mkdir()
    for name, text in (
        ("srun", FAKE_SRUN),
        ("accelerate", FAKE_ACCELERATE),
        ("scontrol", FAKE_SCONTROL),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = (
        os.environ
        | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_JOB_NODELIST": "gpu[07-08]",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_JOB_ID": "1234567",
            "SLURM_CPUS_PER_TASK": "32",
        }
        | more
    )
    return subprocess.run(
        ["bash", str(SLURM), *words], env=environment, cwd="/", capture_output=True, text=True
    )


def test_slurm_starts_one_launcher_a_node(tmp_path):
    (tmp_path / "notebooks").symlink_to(HARDWARE.parents[1])
    words = ["-m", "rorem_lib.remover", "--output_dir", "a folder/with spaces"]
    done = submit(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert {"--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(
        (tmp_path / "srun.txt").read_text().splitlines()
    )
    for node in range(2):
        assert (tmp_path / f"words-{node}.txt").read_text().splitlines() == [
            "launch",
            "--config_file",
            "notebooks/recipes/accelerate/several_nodes.yaml",
            "--num_machines",
            "2",
            "--num_processes",
            "8",
            "--machine_rank",
            str(node),
            "--main_process_ip",
            "gpu07",
            "--main_process_port",
            "34567",
            "--rdzv_backend",
            "c10d",
            *words,
        ]


def test_slurm_words_are_what_accelerate_takes(tmp_path):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    for number, name in enumerate(("several_nodes", "fsdp2")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "notebooks").symlink_to(HARDWARE.parents[1])
        submit(folder, "-m", "rorem_lib.remover", "--seed", "4", HARDWARE=name)
        words = (folder / "words-1.txt").read_text().splitlines()[1:]
        words[1] = str(HARDWARE / f"{name}.yaml")
        options, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        assert (options.num_processes, options.num_machines, options.machine_rank) == (8, 2, 1)
        assert options.main_process_ip == "gpu07" and options.main_process_port == 34567
        assert options.rdzv_backend == "c10d" and not options.same_network
        assert options.use_fsdp == (name == "fsdp2")
        assert options.training_script == "rorem_lib.remover" and options.module
        assert options.training_script_args == ["--seed", "4"]


def test_slurm_says_what_is_wrong(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    elsewhere = submit(tmp_path / "elsewhere", "-m", "rorem_lib.remover")
    assert elsewhere.returncode == 2 and "run sbatch in the repository's folder" in elsewhere.stderr
    for name, words, more in (("empty", [], {}), ("failing", ["-m", "x"], {"FAIL": "3"})):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "notebooks").symlink_to(HARDWARE.parents[1])
        done = submit(folder, *words, **more)
        assert done.returncode == (2 if name == "empty" else 3)
        assert ("nothing to train" in done.stderr) == (name == "empty")
    plain = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    alone = subprocess.run(["bash", str(SLURM), "x"], env=plain, capture_output=True, text=True)
    assert alone.returncode and "start this with sbatch" in alone.stderr


def test_slurm_script_is_sound():
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    head = SLURM.read_text().split("set -euo")[0].splitlines()
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in head
        if line.startswith("#SBATCH")
    )
    file = yaml.safe_load((HARDWARE / "several_nodes.yaml").read_text())
    assert int(asked["nodes"]) == file["num_machines"]
    assert int(asked["nodes"]) * int(asked["gpus-per-node"]) == file["num_processes"]
    assert asked["ntasks-per-node"] == "1" and "requeue" in asked
