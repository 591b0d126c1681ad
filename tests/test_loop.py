"""The training loop: positions, checkpoints, resume, EMA, one or two processes, command lines."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils.data import Dataset

from rorem_lib import checkpoints, loop, options
from rorem_lib.order import Order, Positions
from rorem_lib.remover import RemoverConfig, train_remover

ROOT = Path(__file__).resolve().parents[1]


class Stop(RuntimeError):
    """Ends a training from outside, at a step of the test's choice."""


class Numbers(Dataset):
    """Samples that are functions of their global position alone."""

    def __len__(self):
        return sys.maxsize

    def __getitem__(self, position):
        rng = np.random.default_rng(position)
        return {"x": rng.standard_normal(4, dtype=np.float32), "position": np.int64(position)}


class Regression(loop.Objective):
    """A small regression with noise of torch's own generator; notes the positions it saw."""

    def __init__(self, config, *, stop_at=None, nan_at=None, noise=0.1):
        super().__init__(config)
        self.stop_at, self.nan_at, self.noise, self.calls, self.seen = stop_at, nan_at, noise, 0, []

    def build_model(self):
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def make_dataset(self):
        return Numbers()

    def compute_loss(self, model, batch):
        if self.calls == self.stop_at:
            raise Stop
        self.calls += 1
        self.seen.append(batch["position"].tolist())
        x = batch["x"] + self.noise * torch.randn_like(batch["x"])
        loss = (model(x)[:, 0] - batch["x"].sum(dim=1)).square().mean()
        if self.nan_at is not None and self.calls > self.nan_at:
            loss = loss * float("nan")
        return loss, {"size": batch["x"].norm()}

    def save_model(self, model, folder):
        torch.save(model.state_dict(), folder / "model.pt")


def make_config(folder, **changes):
    given = {"max_train_steps": 10, "train_batch_size": 4, "learning_rate": 1e-2, "ema_decay": 0.9,
             "lr_scheduler": "cosine", "checkpointing_steps": 3, "logging_steps": 1,
             "mixed_precision": "no", "output_dir": str(folder)}
    return loop.LoopConfig(**given | changes)


def run_toy(config, **options):
    objective = Regression(config, **options)
    loop.train(objective, config)
    return torch.load(Path(config.output_dir) / "model.pt", weights_only=True), objective


def stop_toy(config, step, **options):
    with pytest.raises(Stop):
        run_toy(config, stop_at=step, **options)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs"


def read_lines(folder):
    return [json.loads(x) for x in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------- positions


def test_order_visits_everything_once_an_epoch_and_shuffles_each_anew():
    order = Order(7, seed=1)
    epochs = [[order.find_index(p) for p in range(e * 7, e * 7 + 7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[1] == [Order(7, seed=1).find_index(p) for p in range(7, 14)]
    assert epochs[0] != [Order(7, seed=2).find_index(p) for p in range(7)]


def test_order_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="training set is empty"):
        Order(0, seed=1)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_a_global_batch_without_gap_or_overlap(world):
    config = loop.LoopConfig(train_batch_size=8 // world, gradient_accumulation_steps=2,
                             max_train_steps=5)
    ranks = [list(Positions(config, SimpleNamespace(process_index=r, num_processes=world), 2))
             for r in range(world)]
    steps = [sum((ranks[r][n] for r in range(world)), []) for n in range(len(ranks[0]))]
    assert steps == [list(range(8 * n, 8 * n + 8)) for n in range(4, 10)]


def test_accumulated_small_batches_train_like_a_large_one(tmp_path):
    whole, _ = run_toy(make_config(tmp_path / "a", train_batch_size=8), noise=0)
    parts, _ = run_toy(make_config(tmp_path / "b", train_batch_size=4,
                                   gradient_accumulation_steps=2), noise=0)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("step", [2, 3, 8])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, step):
    whole, undisturbed = run_toy(make_config(tmp_path / "whole"))
    config = make_config(tmp_path / "stopped")
    stop_toy(config, step)
    resumed, objective = run_toy(config)
    assert_same(whole, resumed)
    assert objective.seen == undisturbed.seen[step // 3 * 3:]
    times = ("images_per_second", "seconds_left")
    first, second = ([{k: v for k, v in line.items() if k not in times}
                      for line in read_lines(tmp_path / name)] for name in ("whole", "stopped"))
    assert first == second


def test_lines_after_the_checkpoint_are_trimmed(tmp_path):
    config = make_config(tmp_path)
    stop_toy(config, 8)
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 9, "lo')  # a torn last line
    assert [line["step"] for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text()
                                         .splitlines()[:-1])] == list(range(1, 9))
    run_toy(config)
    assert [line["step"] for line in read_lines(tmp_path)] == list(range(1, 11))


def test_a_run_without_resuming_starts_its_record_anew(tmp_path):
    stop_toy(make_config(tmp_path), 8)
    _, objective = run_toy(make_config(tmp_path, resume_from_checkpoint="none"))
    assert len(objective.seen) == 10
    assert [line["step"] for line in read_lines(tmp_path)] == list(range(1, 11))


def test_only_the_newest_checkpoints_are_kept_and_none_in_the_end(tmp_path):
    config = make_config(tmp_path, checkpointing_steps=2, checkpoints_total_limit=2)
    stop_toy(config, 9)
    kept = [p.name for p in checkpoints.list_checkpoints(tmp_path)]
    assert kept == ["checkpoint-6", "checkpoint-8"]
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    metrics = loop.train(Regression(config), config)
    assert not list(tmp_path.glob("checkpoint-*"))
    assert metrics["resumed_at"] == 8 and metrics["steps"] == 10
    assert metrics == json.loads((tmp_path / "train_metrics.json").read_text())


@pytest.mark.parametrize("tear", ["truncated", "unfinished", "partial", "no JSON"])
def test_a_torn_checkpoint_is_skipped_with_a_warning(tmp_path, caplog, tear):
    whole, _ = run_toy(make_config(tmp_path / "whole"))
    config = make_config(tmp_path / "torn")
    stop_toy(config, 8)
    newest = tmp_path / "torn" / "checkpoint-6"
    if tear == "truncated":
        with open(newest / "optimizer.bin", "r+b") as stream:
            stream.truncate(200)
    elif tear == "unfinished":
        (newest / "step.json").unlink()
    elif tear == "partial":
        newest.rename(newest.with_name("checkpoint-6.partial"))
    else:
        (newest / "step.json").write_text('{"step": ')
    with caplog.at_level(logging.WARNING):
        resumed, objective = run_toy(config)
    assert_same(whole, resumed)
    assert len(objective.seen) == 7, "it should have gone on from checkpoint-3"
    assert "checkpoint-6" in caplog.text


def test_where_every_checkpoint_is_torn_nothing_of_them_is_in_the_model(tmp_path):
    whole, _ = run_toy(make_config(tmp_path / "whole"))
    config = make_config(tmp_path / "torn", checkpoints_total_limit=1)
    stop_toy(config, 8)
    with open(tmp_path / "torn" / "checkpoint-6" / "optimizer.bin", "r+b") as stream:
        stream.truncate(200)
    resumed, objective = run_toy(config)
    assert len(objective.seen) == 10
    assert_same(whole, resumed)


def test_other_settings_do_not_creep_into_a_stopped_run(tmp_path):
    stop_toy(make_config(tmp_path), 5)
    changed = make_config(tmp_path, learning_rate=1e-3)
    with pytest.raises(ValueError, match="learning_rate was 0.01 and is 0.001"):
        run_toy(changed)
    longer = make_config(tmp_path, max_train_steps=12, logging_steps=2)
    _, objective = run_toy(longer)
    assert len(objective.seen) == 9  # from step 3 to 12


def test_a_named_checkpoint_is_taken_or_missed_loudly(tmp_path):
    stop_toy(make_config(tmp_path / "a"), 8)
    named = str(tmp_path / "a" / "checkpoint-3")
    _, objective = run_toy(make_config(tmp_path / "b", learning_rate=1e-3,
                                       resume_from_checkpoint=named))
    assert len(objective.seen) == 7
    with pytest.raises(FileNotFoundError, match="checkpoint-99 is not a complete checkpoint"):
        run_toy(make_config(tmp_path / "c", resume_from_checkpoint=str(
            tmp_path / "a" / "checkpoint-99")))


def test_what_is_saved_is_the_moving_average(tmp_path):
    averaged, _ = run_toy(make_config(tmp_path / "a", ema_decay=0.99))
    last, _ = run_toy(make_config(tmp_path / "b", ema_decay=0.0))
    assert any(not torch.allclose(averaged[n], last[n], atol=1e-4) for n in last)


@pytest.mark.parametrize("logging_steps", [1, 5])
def test_a_loss_that_is_no_number_stops_before_it_is_kept(tmp_path, logging_steps):
    config = make_config(tmp_path, logging_steps=logging_steps)
    with pytest.raises(FloatingPointError, match="nan at step .*lower learning_rate"):
        run_toy(config, nan_at=5)
    checkpoint, = checkpoints.list_checkpoints(tmp_path)
    assert checkpoint.name == "checkpoint-3"
    assert all(w.isfinite().all() for w in load_file(checkpoint / "model.safetensors").values())


# ------------------------------------------------------------------------------ the command line


@dataclass
class Options(loop.LoopConfig):
    """Options of a test."""

    meta_path: list[str] = field(default_factory=lambda: ["builtin:labelled"])
    random_flip: bool = True
    rank: int = 4


def test_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("rank: 8\nlearning_rate: 1e-4\nmax_train_steps: 2.0e+3\nmeta_path: [a, b]\n"
                    "random_flip: false\n")
    config = options.parse_config(Options, ["--config", str(path), "--rank", "16"])
    assert config == Options(rank=16, learning_rate=1e-4, max_train_steps=2000,
                             meta_path=["a", "b"], random_flip=False)
    assert isinstance(config.learning_rate, float)  # YAML itself reads 1e-4 as text
    assert isinstance(config.max_train_steps, int)
    assert options.parse_config(Options, []) == Options()


def test_lists_and_switches_on_the_command_line():
    config = options.parse_config(Options, ["--meta_path", "a", "b", "c", "--no-random_flip",
                                         "--learning_rate", "1e-3"])
    assert config.meta_path == ["a", "b", "c"]
    assert config.random_flip is False and config.learning_rate == 1e-3


@pytest.mark.parametrize("words", [["--learning_rte", "1"], ["--learning", "1"],
                                   ["--rank", "four"], ["stray"]])
def test_mistyped_options_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        options.parse_config(Options, words)
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize("line, complaint", [
    ("learning_rte: 1", "unknown option learning_rte"), ("rank: four", "rank: expected int"),
    ("random_flip: 'yes'", "random_flip: expected bool"), ("meta_path: a", "meta_path: expected")])
def test_mistyped_files_are_refused(tmp_path, line, complaint):
    (tmp_path / "config.yaml").write_text(line)
    with pytest.raises(ValueError, match=complaint):
        options.parse_config(Options, ["--config", str(tmp_path / "config.yaml")])


# --------------------------------------------------------------------- real trainings, killed


STEPS = 8


def make_remover_config(folder, model, meta, cache, **changes):
    given = {"output_dir": str(folder), "meta_path": [str(meta)], "resolution": 32,
             "pretrained_model_name_or_path": str(model), "max_train_steps": STEPS,
             "train_batch_size": 4, "learning_rate": 1e-3, "ema_decay": 0.9, "logging_steps": 1,
             "checkpointing_steps": 2, "mixed_precision": "no", "latent_cache_dir": str(cache)}
    return RemoverConfig(**given | changes)


def start_job(config, processes):
    """`rorem_lib.remover` as a user starts it, alone or with two processes."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(vars(config)))
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
                    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
                    "--main_process_port", "0", "-m"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo",
                                "OMP_NUM_THREADS": "1"}
    with open(folder / "job.log", "a") as log:
        return subprocess.Popen(
            [*command, "rorem_lib.remover", "--config", str(folder / "config.yaml")], cwd=ROOT,
            env=environment, stdout=log, stderr=subprocess.STDOUT)


def finish_job(config, processes):
    job = start_job(config, processes)
    folder = Path(config.output_dir)
    assert job.wait(timeout=300) == 0, (folder / "job.log").read_text()[-3000:]
    return json.loads((folder / "train_metrics.json").read_text())


def kill_job(config, processes):
    """Start it and kill it, with all that it started, after a step of chance."""
    step = random.randint(3, STEPS - 2)
    job = start_job(config, processes)
    lines = Path(config.output_dir) / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 300
        while not lines.exists() or lines.read_text().count("\n") < step:
            assert job.poll() is None, (lines.parent / "job.log").read_text()[-3000:]
            assert time.monotonic() < deadline, "the job does not come on"
            time.sleep(0.005)
    finally:
        parent = psutil.Process(job.pid)
        for process in [parent, *parent.children(recursive=True)]:
            process.send_signal(signal.SIGKILL)
        job.wait()
    assert not (lines.parent / "train_metrics.json").exists(), "it ended before it was killed"
    assert not (lines.parent / "remover").exists()
    return step


def read_weights(config):
    return load_file(Path(config.output_dir) / "remover" / "unet"
                     / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("latents")


def check_resumed(whole, killed, metrics, step):
    assert 2 <= metrics["resumed_at"] <= STEPS - 2, f"killed after step {step}"
    assert_same(read_weights(whole), read_weights(killed))
    first, second = (read_lines(config.output_dir) for config in (whole, killed))
    assert [line["step"] for line in second] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in first] == [line["loss"] for line in second]


def test_a_killed_remover_training_goes_on_bit_for_bit(tmp_path, tiny_model, tiny_set, cache):
    whole, killed = (make_remover_config(tmp_path / name, tiny_model, tiny_set, cache,
                                         mixed_precision="auto") for name in ("whole", "killed"))
    train_remover(whole)
    step = kill_job(killed, 1)
    check_resumed(whole, killed, train_remover(killed), step)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_model, tiny_set, cache):
    """A finished training on two processes."""
    config = make_remover_config(tmp_path_factory.mktemp("pair"), tiny_model, tiny_set, cache)
    metrics = finish_job(config, 2)
    assert metrics["num_processes"] == 2
    return config


def test_killed_on_two_processes_it_goes_on_bit_for_bit(tmp_path, pair):
    killed = replace(pair, output_dir=str(tmp_path))
    step = kill_job(killed, 2)
    metrics = finish_job(killed, 2)
    assert metrics["num_processes"] == 2
    check_resumed(pair, killed, metrics, step)


def test_two_processes_train_what_one_trains_on_the_same_global_batch(tmp_path, pair, tiny_model):
    alone = replace(pair, output_dir=str(tmp_path), train_batch_size=8)
    metrics = train_remover(alone)
    assert metrics["num_processes"] == 1 and metrics["images"] == 8 * STEPS
    one, two, start = read_weights(alone), read_weights(pair), load_file(
        tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    moved = sum((one[n] - start[n]).square().sum() for n in one).sqrt()
    apart = sum((one[n] - two[n]).square().sum() for n in one).sqrt()
    assert apart < 0.02 * moved, f"moved {moved:.4f}, apart {apart:.4f}"
    losses = [[line["loss"] for line in read_lines(c.output_dir)] for c in (alone, pair)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
