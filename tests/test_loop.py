"""The training loop: batches, clipping, stopped and resumed runs, EMA. See also `test_resume`."""

import copy
import dataclasses
import errno
import itertools
import json
import logging
import os
import resource
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState, debug_launcher
from accelerate.state import AcceleratorState
from resume_job import train
from safetensors.torch import load_file
from torch.utils.data import Dataset

from rorem_lib.files import LOCK, lock_folder
from rorem_lib.remover import RemoverConfig
from rorem_lib.training import checkpoints, loop, tracking
from rorem_lib.training.config import LoopConfig


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
    given = {
        "max_train_steps": 10,
        "train_batch_size": 4,
        "learning_rate": 1e-2,
        "ema_decay": 0.9,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 0,
        "checkpointing_steps": 3,
        "checkpoints_total_limit": 2,
        "logging_steps": 1,
        "mixed_precision": "no",
        "output_dir": str(folder),
    }
    return LoopConfig(**given | changes)


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


def read_lines(folder, file="metrics.jsonl"):
    return [json.loads(x) for x in (Path(folder) / file).read_text().splitlines()]


def test_epochs_are_counted_where_no_steps_are_given(tmp_path):
    config = make_config(tmp_path / "a", max_train_steps=0, num_train_epochs=3)
    objective = Regression(config)
    objective.metrics["train_size"] = 10
    assert loop.train(objective, config)["steps"] == 8  # 30 samples in batches of 4
    with pytest.raises(ValueError, match="both 0: set one of them"):
        run_toy(make_config(tmp_path / "b", max_train_steps=0))
    with pytest.raises(ValueError, match="max_train_steps"):
        run_toy(make_config(tmp_path / "c", max_train_steps=0, num_train_epochs=1))


def test_a_second_training_in_one_process_may_have_another_precision(tmp_path):
    lines = {}
    for precision in ("no", "bf16"):
        run_toy(make_config(tmp_path / precision, mixed_precision=precision))
        lines[precision] = read_lines(tmp_path / precision)
    assert lines["no"][0]["loss"] == pytest.approx(lines["bf16"][0]["loss"], rel=0.1)
    assert lines["no"][0]["loss"] != lines["bf16"][0]["loss"]


def test_no_checkpoints_and_lines_where_their_steps_are_0(tmp_path):
    run_toy(make_config(tmp_path, checkpointing_steps=0, logging_steps=0))
    assert not list(tmp_path.glob("checkpoint-*"))
    assert [line["step"] for line in read_lines(tmp_path)] == [10]


def test_a_full_disk_at_the_end_leaves_the_checkpoints(tmp_path):
    class Full(Regression):
        def save_model(self, model, folder):
            (folder / "model.pt").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    config = make_config(tmp_path)
    with pytest.raises(OSError, match="no space left for model in .*checkpoint-9 is intact"):
        loop.train(Full(config), config)
    assert not (tmp_path / ".model.partial").exists() and not (tmp_path / "model.pt").exists()
    resumed, objective = run_toy(config)
    assert len(objective.seen) == 1  # from checkpoint-9
    assert_same(resumed, run_toy(make_config(tmp_path.with_name("whole")))[0])


def test_accumulated_small_batches_train_like_a_large_one(tmp_path):
    whole, _ = run_toy(make_config(tmp_path / "a", train_batch_size=8), noise=0)
    parts, _ = run_toy(
        make_config(tmp_path / "b", train_batch_size=4, gradient_accumulation_steps=2), noise=0
    )
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_clipped_and_their_norm_before_is_what_is_logged(
    tmp_path, monkeypatch, accumulate
):
    seen, make_optimizer = [], loop.make_optimizer

    def make_watched(*given):
        optimizer = make_optimizer(*given)
        optimizer.register_step_pre_hook(
            lambda *_: seen.append(
                torch.stack(
                    [p.grad.norm() for group in optimizer.param_groups for p in group["params"]]
                )
                .norm()
                .item()
            )
        )
        return optimizer

    monkeypatch.setattr(loop, "make_optimizer", make_watched)
    logged = {}
    for limit in (0, 1e-3, 1e6):
        seen.clear()
        run_toy(
            make_config(
                tmp_path / str(limit),
                max_grad_norm=limit,
                max_train_steps=3,
                gradient_accumulation_steps=accumulate,
            )
        )
        norms = logged[limit] = [line["grad_norm"] for line in read_lines(tmp_path / str(limit))]
        assert len(seen) == 3, "the optimizer steps once a global batch"
        assert seen == pytest.approx([1e-3] * 3 if limit == 1e-3 else norms, rel=1e-3)
        assert min(norms) > 0.1
    assert logged[1e-3][0] == logged[0][0] and logged[0] == logged[1e6]


@pytest.mark.parametrize(
    ("size", "steps", "times"),
    [(10, 5, 2), (3, 3, 4)],
    ids=["not divided by the batch", "smaller than a batch"],
)
def test_every_batch_is_whole_and_every_sample_is_seen_as_often(
    tmp_path, tiny_model, tiny_set, size, steps, times
):
    metrics = train(
        RemoverConfig(
            output_dir=str(tmp_path),
            meta_path=[str(tiny_set)],
            max_train_samples=size,
            resolution=32,
            pretrained_model_name_or_path=str(tiny_model),
            train_batch_size=4,
            max_train_steps=steps,
            validation_steps=0,
            dataloader_num_workers=0,
            mixed_precision="no",
        )
    )
    batches = [x["index"] for x in read_lines(tmp_path, "seen-0.jsonl")]
    assert [len(batch) for batch in batches] == [4] * steps
    seen = sum(batches, [])
    assert Counter(seen) == dict.fromkeys(range(size), times)
    assert all(len(set(seen[n : n + size])) == size for n in range(0, len(seen), size))
    assert metrics["train_size"] == size and metrics["images"] == size * times


# ---------------------------------------------------------------------------------------- memory


class Recomputing(torch.nn.Sequential):
    recomputes = False

    def enable_gradient_checkpointing(self):
        self.recomputes = True


class Growing(Numbers):
    """Samples that are larger from the 21st on, which is the first of the sixth step."""

    def __getitem__(self, position):
        return super().__getitem__(position) | {"picture": np.zeros(1 + (position >= 20))}


class Short(Regression):
    """Memory runs out, half-way through the backward pass, as long as activations are kept."""

    def __init__(self, config, is_short, **options):
        super().__init__(config, **options)
        self.recomputes, self.is_short, self.trials = None, is_short, 0

    def build_model(self):
        model = Recomputing(*super().build_model())

        def run_out(gradient):
            if not model.recomputes and self.is_short(self):
                assert model[2].weight.grad is not None and model[0].weight.grad is None
                self.trials += 1
                raise torch.OutOfMemoryError("CUDA out of memory")

        model[1].register_forward_hook(lambda _, __, output: output.register_hook(run_out) and None)
        return model

    def make_dataset(self):
        return Growing()

    def compute_loss(self, model, batch):
        self.size = batch["picture"].shape[1]
        return super().compute_loss(model, batch)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "is_short",
    [
        lambda self: True,
        lambda self: self.calls > 2 * self.config.gradient_accumulation_steps,
        lambda self: self.size == 2,
    ],
    ids=["from the first step", "once the optimizer has its states", "at a larger shape"],
)
def test_where_memory_runs_out_activations_are_recomputed_with_the_same_numbers(
    tmp_path, caplog, accumulate, is_short
):
    changes = {"train_batch_size": 4 // accumulate, "gradient_accumulation_steps": accumulate}
    whole, _ = run_toy(make_config(tmp_path / "whole", **changes))
    config = make_config(tmp_path / "short", **changes)
    objective = Short(config, is_short)
    with caplog.at_level(logging.INFO):
        loop.train(objective, config)
    assert objective.recomputes is True and objective.trials == 1
    assert caplog.text.count("gradient_checkpointing is turned on") == 1
    assert_same(whole, torch.load(tmp_path / "short" / "model.pt", weights_only=True))
    assert [x["loss"] for x in read_lines(tmp_path / "short")] == [
        x["loss"] for x in read_lines(tmp_path / "whole")
    ]


def test_where_memory_suffices_each_shape_is_tried_and_nothing_is_recomputed(tmp_path):
    whole, _ = run_toy(make_config(tmp_path / "whole"))
    config = make_config(tmp_path / "enough")
    objective = Short(config, lambda self: False)
    loop.train(objective, config)
    assert objective.recomputes is None and objective.calls == 10 + 3  # first, second, larger
    assert_same(whole, torch.load(tmp_path / "enough" / "model.pt", weights_only=True))


def test_an_error_in_a_trial_that_is_none_of_memory_stays_what_it_is(tmp_path):
    config = make_config(tmp_path)
    objective = Short(config, lambda self: False, stop_at=0)
    with pytest.raises(Stop):
        loop.train(objective, config)


def _train_on_two(folder, short):
    AcceleratorState._reset_state(True)  # of the process that was forked
    config = make_config(folder, train_batch_size=2, checkpointing_steps=0)
    objective = Short(config, lambda self: self.accelerator.process_index == short)
    loop.train(objective, config)
    result = {"recomputes": objective.recomputes, "trials": objective.trials}
    Path(folder, f"{PartialState().process_index}.json").write_text(json.dumps(result))


@pytest.mark.slow
def test_one_process_that_is_short_of_memory_decides_for_all(tmp_path):
    weights = {}
    for name, short in (("enough", None), ("short", 1)):
        debug_launcher(_train_on_two, (str(tmp_path / name), short), num_processes=2)
        weights[name] = torch.load(tmp_path / name / "model.pt", weights_only=True)
        assert [json.loads((tmp_path / name / f"{n}.json").read_text()) for n in (0, 1)] == [
            {"recomputes": True if short else None, "trials": int(n == short)} for n in (0, 1)
        ]
        assert (
            json.loads((tmp_path / name / "train_metrics.json").read_text())["num_processes"] == 2
        )
    assert_same(weights["enough"], weights["short"])
    debug_launcher(_train_on_two, (str(tmp_path / "short"), 1), num_processes=2)
    assert json.loads((tmp_path / "short" / "1.json").read_text())["trials"] == 0, "made again"


# ---------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("step", [2, 3, 8])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, step):
    whole, undisturbed = run_toy(make_config(tmp_path / "whole"))
    config = make_config(tmp_path / "stopped")
    stop_toy(config, step)
    resumed, objective = run_toy(config)
    assert_same(whole, resumed)
    assert objective.seen == undisturbed.seen[step // 3 * 3 :]
    times = ("images_per_second", "seconds_left")
    first, second = (
        [{k: v for k, v in line.items() if k not in times} for line in read_lines(tmp_path / name)]
        for name in ("whole", "stopped")
    )
    assert first == second


def test_lines_after_the_checkpoint_are_trimmed(tmp_path):
    config = make_config(tmp_path)
    stop_toy(config, 8)
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 9, "lo')  # a torn last line
    assert [
        line["step"]
        for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1])
    ] == list(range(1, 9))
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
    with pytest.raises(ValueError, match="learning_rate.*0.01.*0.001"):
        run_toy(changed)
    longer = make_config(tmp_path, max_train_steps=12, logging_steps=2)
    _, objective = run_toy(longer)
    assert len(objective.seen) == 9  # from step 3 to 12


def test_a_named_checkpoint_is_taken_or_missed_loudly(tmp_path):
    stop_toy(make_config(tmp_path / "a"), 8)
    named = str(tmp_path / "a" / "checkpoint-3")
    _, objective = run_toy(
        make_config(tmp_path / "b", learning_rate=1e-3, resume_from_checkpoint=named)
    )
    assert len(objective.seen) == 7
    with pytest.raises(FileNotFoundError, match="checkpoint-99 is not a complete checkpoint"):
        run_toy(
            make_config(
                tmp_path / "c", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-99")
            )
        )


def read_files(folder):
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != LOCK]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def test_a_finished_training_is_not_made_again(tmp_path, caplog):
    config = make_config(tmp_path)
    first = loop.train(Regression(config), config)
    before = read_files(tmp_path)
    (tmp_path / "train_metrics.json").unlink()  # as a notebook does that starts the job again
    again = make_config(tmp_path, logging_steps=5, checkpointing_steps=1)
    with caplog.at_level(logging.INFO):
        assert loop.train(Regression(again, stop_at=0), again) == first
    assert "came to its end before" in caplog.text and read_files(tmp_path) == before


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"learning_rate": 1e-3}, "learning_rate was 0.01 and is 0.001"),
        ({"max_train_steps": 4}, "max_train_steps was 10 and is 4"),
        ({"train_batch_size": 2}, "global_batch was 4 and is 2"),
        ({"resume_from_checkpoint": "none"}, ""),
    ],
)
def test_another_training_sets_the_finished_one_aside(tmp_path, caplog, changes, words):
    run_toy(make_config(tmp_path))
    (tmp_path / "checkpoint-9" / "unet").mkdir(parents=True)
    (tmp_path / "checkpoint-9" / "unet" / "weights").write_text("kept")
    before = read_files(tmp_path)
    with caplog.at_level(logging.INFO):
        stop_toy(make_config(tmp_path, **changes), 2)
    (aside,) = tmp_path.glob("finished-*")
    assert read_files(aside) == before and words in caplog.text and str(aside) in caplog.text
    run_toy(make_config(tmp_path, **changes))
    assert read_files(aside) == before and (tmp_path / "model.pt").is_file()
    assert list(tmp_path.glob("finished-*")) == [aside]


def test_a_set_with_another_content_is_another_training(tmp_path):
    @dataclasses.dataclass
    class Config(LoopConfig):
        meta_path: list[str] = dataclasses.field(default_factory=list)

    given = dataclasses.asdict(make_config(tmp_path / "out", max_train_steps=1))
    for name, text in (("a", "[]"), ("b", "[]"), ("c", "[ ]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text(text)
        run_toy(Config(**given, meta_path=[str(tmp_path / name)]))
        assert len(list((tmp_path / "out").glob("finished-*"))) == (name == "c")


def test_a_folder_is_trained_in_by_one_process_at_a_time(tmp_path):
    config, built = make_config(tmp_path), []

    class Noting(Regression):
        def build_model(self):
            built.append(1)
            return super().build_model()

    with lock_folder(tmp_path):
        with pytest.raises(BlockingIOError, match=str(os.getpid())):
            loop.train(Noting(config), config)
    assert not built and list_names(tmp_path) == [LOCK]
    loop.train(Noting(config), config)
    assert built and (tmp_path / "model.pt").is_file()


def list_names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_half_done_training_whose_folder_was_moved_goes_on(tmp_path):
    """Its model was in the folder too: its content decides, not where it lies."""

    @dataclasses.dataclass
    class Config(LoopConfig):
        init_from: str = ""

    def make(folder):
        (folder / "base").mkdir(parents=True, exist_ok=True)
        (folder / "base" / "config.json").write_text("{}")
        given = dataclasses.asdict(make_config(folder / "out"))
        return Config(**given, init_from=str(folder / "base"))

    whole, _ = run_toy(make(tmp_path / "whole"))
    stop_toy(make(tmp_path / "before"), 5)
    (tmp_path / "before").rename(tmp_path / "after")
    moved = make(tmp_path / "after")
    (tmp_path / "after" / "base" / "config.json").write_text("{} ")
    with pytest.raises(ValueError, match="init_from"):
        run_toy(moved)
    resumed, objective = run_toy(make(tmp_path / "after"))
    assert len(objective.seen) == 7
    assert_same(whole, resumed)


def test_a_clock_that_is_set_back_takes_no_seconds_away(tmp_path, monkeypatch):
    moments = itertools.count(2e9, -3600)
    monkeypatch.setattr("time.time", lambda: next(moments))
    config = make_config(tmp_path)
    assert 0 < loop.train(Regression(config), config)["seconds"] < 600
    assert all(line["seconds_left"] >= 0 for line in read_lines(tmp_path))


def test_a_model_of_an_earlier_release_is_set_aside(tmp_path):
    run_toy(make_config(tmp_path, max_train_steps=2))
    model = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "training.json").unlink()
    run_toy(make_config(tmp_path, max_train_steps=3))
    (aside,) = tmp_path.glob("model.pt.*")
    assert aside.read_bytes() == model
    assert json.loads(next(tmp_path.glob("finished-*/train_metrics.json")).read_text())


@pytest.mark.parametrize(
    "changes",
    [
        {"max_train_steps": -5},
        {"train_batch_size": 0},
        {"ema_decay": 1.5},
        {"mixed_precision": "fp32"},
        {"checkpointing_steps": -1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_that_make_no_sense_are_named(tmp_path, changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"{name} is '?{value}'?: take "):
        make_config(tmp_path, **changes)


class Watched(Regression):
    """Notes the weights that each step sees, and those that are validated."""

    def __init__(self, config):
        super().__init__(config)
        config.validation_steps, self.trained, self.validated = 5, [], []

    def compute_loss(self, model, batch):
        self.trained.append(copy.deepcopy(model.state_dict()))
        return super().compute_loss(model, batch)

    def make_validation(self):
        def validate(model, step):
            self.validated.append((step, copy.deepcopy(model.state_dict())))
            return {}

        return validate


def test_what_is_validated_and_saved_is_the_moving_average(tmp_path):
    config = make_config(tmp_path / "a", ema_decay=0.7)
    objective = Watched(config)
    loop.train(objective, config)
    saved = torch.load(tmp_path / "a" / "model.pt", weights_only=True)
    last, _ = run_toy(make_config(tmp_path / "b", ema_decay=0.0))
    steps = [*objective.trained[1:], last]  # the weights after each step
    mean = steps[0]
    for number, weights in enumerate(steps[1:], 1):  # Karras' warm-up, as diffusers has it
        decay = min(0.7, 1 - (1 + number) ** -0.75)
        mean = {n: decay * mean[n] + (1 - decay) * weights[n] for n in mean}
        if number == 4:
            half = mean
    assert [step for step, _ in objective.validated] == [0, 5, 10]
    assert_same(objective.validated[0][1], objective.trained[0])
    for found, wanted in (
        (objective.validated[1][1], half),
        (objective.validated[2][1], mean),
        (saved, mean),
    ):
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)
    assert any((saved[n] - last[n]).abs().max() > 1e-3 for n in last)


def test_a_line_that_finds_no_room_is_missed_and_nothing_else(tmp_path, caplog, monkeypatch):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    append = tracking._append_line

    def append_short(path, line):
        if line["step"] == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limit[1]))
        try:
            append(path, line)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    monkeypatch.setattr(tracking, "_append_line", append_short)
    run_toy(make_config(tmp_path))
    assert "no line of step 5" in caplog.text
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3, 4, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("logging_steps", [1, 5])
def test_a_loss_that_is_no_number_stops_before_it_is_kept(tmp_path, logging_steps):
    config = make_config(tmp_path, logging_steps=logging_steps)
    with pytest.raises(FloatingPointError, match="learning_rate"):
        run_toy(config, nan_at=5)
    (checkpoint,) = checkpoints.list_checkpoints(tmp_path)
    assert checkpoint.name == "checkpoint-3"
    assert all(w.isfinite().all() for w in load_file(checkpoint / "model.safetensors").values())


def test_too_little_shared_memory_names_the_setting():
    def fail(words):
        yield 1
        raise RuntimeError(words)

    words = "unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device"
    batches = loop._name_shared_memory(fail(words))
    assert next(batches) == 1
    with pytest.raises(RuntimeError, match="dataloader_num_workers 0.*unable to allocate"):
        next(batches)
    with pytest.raises(RuntimeError, match="^out of luck$"):
        list(loop._name_shared_memory(fail("out of luck")))
