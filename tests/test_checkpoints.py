"""Checkpoints: their layout, other numbers of processes, killed writers, full disks, their end."""

import errno
import json
import logging
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from forked import Job, run_job
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sharded_job import build_model, run
from test_sharding import launch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from rorem_lib import files
from rorem_lib.training import checkpoints
from rorem_lib.training.config import LoopConfig

ROOT = Path(__file__).resolve().parents[1]


def make_run(folder, **changes):
    """A training of one process: 6 steps of 4 samples, a checkpoint every second step."""
    given = {
        "kind": "one",
        "output_dir": str(folder),
        "max_train_steps": 6,
        "train_batch_size": 4,
        "mixed_precision": "no",
        "ema_decay": 0.9,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 2,
        "learning_rate": 1e-3,
    }
    return given | changes


def make_config(folder, **changes):
    return LoopConfig(**{k: v for k, v in make_run(folder, **changes).items() if k != "kind"})


def list_names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def list_files(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


def load(folder, file="after"):
    return load_file(Path(folder) / f"{file}.safetensors")


def assert_same(one, other):
    for file in ("after", "whole"):
        a, b = load(one, file), load(other, file)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an undisturbed training, all of whose checkpoints are kept."""
    folder = tmp_path_factory.mktemp("whole")
    run(make_run(folder, checkpoints_total_limit=0))
    return folder


# ----------------------------------------------------------------------------------------- layout


def test_a_unet_is_kept_in_diffusers_layout(whole):
    assert [p.name for p in checkpoints.list_checkpoints(whole)] == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    assert list_files(whole / "checkpoint-6") == [
        "ema.safetensors",
        "optimizer.bin",
        "random_states_0.pkl",
        "step.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    unet = UNet2DConditionModel.from_pretrained(whole / "checkpoint-6" / "unet")
    after = load(whole)
    assert all(torch.equal(w, after[k]) for k, w in unet.state_dict().items())
    record = json.loads((whole / "checkpoint-6" / "step.json").read_text())
    assert (record["step"], record["num_processes"], record["global_batch"]) == (6, 1, 4)
    assert (record["precision"], record["train_size"]) == ("no", 24)
    assert record["config"]["learning_rate"] == 1e-3
    assert set(record["files"]) == set(list_files(whole / "checkpoint-6")) - {"step.json"}


def test_other_models_are_kept_under_their_own_names(tmp_path):
    run(make_run(tmp_path, model="plain"))
    weights = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    after = load(tmp_path)
    assert weights.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert all(torch.equal(w, after[k]) for k, w in weights.items())
    resumed = run(
        make_run(
            tmp_path / "on", model="plain", resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )
    )
    assert resumed["first"] == 4
    assert_same(tmp_path, tmp_path / "on")


def test_of_adapters_the_frozen_base_is_not_kept(tmp_path):
    run(make_run(tmp_path, model="lora"))
    weights = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert weights and all("lora_" in name for name in weights)
    run(
        make_run(
            tmp_path / "on", model="lora", resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )
    )
    assert_same(tmp_path, tmp_path / "on")
    weights.popitem()
    file = tmp_path / "checkpoint-4" / "model.safetensors"
    save_file(weights, file)
    record = json.loads((tmp_path / "checkpoint-4" / "step.json").read_text())
    record["files"]["model.safetensors"] = file.stat().st_size
    (tmp_path / "checkpoint-4" / "step.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"model\.safetensors .* 0 are unexpected .* 1 are miss"):
        run(
            make_run(
                tmp_path / "no", model="lora", resume_from_checkpoint=str(tmp_path / "checkpoint-4")
            )
        )


# ------------------------------------------------------------------------- numbers of processes


@pytest.fixture(scope="module")
def pair(tmp_path_factory, whole):
    """Trainings of two processes: undisturbed, resumed from a checkpoint of one process, and one
    that ends at its second checkpoint, where the other than the main process cannot write."""
    folder = tmp_path_factory.mktemp("pair")
    two = {"train_batch_size": 2, "checkpoints_total_limit": 0}
    job = launch(
        "DDP",
        [
            make_run(folder / "two", **two),
            make_run(
                folder / "from_one", **two, resume_from_checkpoint=str(whole / "checkpoint-2")
            ),
            make_run(folder / "full", **two, full=[1, 1000]),
        ],
        folder,
    )
    assert (folder / "from_one" / "result.json").exists(), job.read_log()[-4000:]
    return folder, job


def assert_near(one, other, start, share=0.05):
    one, other, start = load(one), load(other), load(start, "before")
    apart = sum((one[k] - other[k]).square().sum() for k in one).sqrt()
    moved = sum((one[k] - start[k]).square().sum() for k in one).sqrt()
    assert apart < share * moved, f"moved {moved}, apart {apart}"


@pytest.mark.slow
def test_two_processes_checkpoint_opens_on_one_and_the_other_way(pair, whole, tmp_path, caplog):
    pair, _ = pair
    assert list_files(pair / "two" / "checkpoint-4") == [
        *list_files(whole / "checkpoint-4")[:3],
        "random_states_1.pkl",
        *list_files(whole / "checkpoint-4")[3:],
    ]
    start = load(pair / "from_one", "before")
    unet = load_file(whole / "checkpoint-2" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(start[k], unet[k]) for k in unet)
    assert_near(pair / "from_one", whole, whole)
    (tmp_path / "checkpoint-2").symlink_to(pair / "two" / "checkpoint-2")
    with caplog.at_level(logging.WARNING):  # batch 2 x 2 accumulated x 1 process: the same 4
        resumed = run(
            make_run(
                tmp_path,
                train_batch_size=2,
                gradient_accumulation_steps=2,
                checkpoints_total_limit=0,
            )
        )
    assert "made by 2 processes, these are 1: torch's random state begins anew" in caplog.text
    assert resumed["first"] == 2 and len(resumed["losses"]) == 8 and len(resumed["norms"]) == 4
    assert_near(tmp_path, whole, whole)


def test_other_settings_are_refused_unless_the_checkpoint_is_named(whole, tmp_path, caplog):
    (tmp_path / "checkpoint-4").symlink_to(whole / "checkpoint-4")
    with pytest.raises(ValueError, match=r"the global batch .* was 4 and is 8"):
        run(make_run(tmp_path, train_batch_size=8))
    with pytest.raises(ValueError, match=r"learning_rate.*0.001.*0.1"):
        run(make_run(tmp_path, learning_rate=0.1))
    free = {"logging_steps": 7, "logging_dir": "x", "report_to": "none", "max_train_steps": 4}
    assert run(make_run(tmp_path, **free))["first"] == 4
    named = {"max_train_steps": 5, "resume_from_checkpoint": str(tmp_path / "checkpoint-4")}
    with caplog.at_level(logging.WARNING):
        assert run(make_run(tmp_path / "b", train_batch_size=8, **named))["first"] == 4
    assert "was 4 and is 8): it goes on all the same; learning rate and" in caplog.text
    with pytest.raises(ValueError, match="ema_decay.*0.9.*0.0"):
        run(make_run(tmp_path / "c", ema_decay=0.0, **named))


@pytest.mark.parametrize(
    ("name", "before", "words"),
    [
        ("precision", "fp16", "the precision was fp16 and is no"),
        ("train_size", 20, "the number of samples was 20 and is 24"),
    ],
)
def test_what_no_option_says_is_compared_too(whole, tmp_path, name, before, words):
    shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4")
    file = tmp_path / "checkpoint-4" / "step.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: before}))
    with pytest.raises(ValueError, match=words):
        run(make_run(tmp_path))


def test_a_checkpoint_without_a_scaler_goes_on_in_fp16(whole, tmp_path):
    scaler = torch.amp.GradScaler("cpu")

    class Scaled(Accelerator):
        def __init__(self):
            super().__init__()
            self.scaler = scaler

    AcceleratorState._reset_state()
    accelerator = Scaled()
    model = build_model("unet")
    _, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    config = make_config(whole, resume_from_checkpoint=str(whole / "checkpoint-4"), ema_decay=0.9)
    states = {"scheduler": Anything(), "ema": Anything()}
    kept = {"states": states, "train_size": 24}
    assert checkpoints.load_checkpoint(accelerator, config, optimizer, **kept) == 4
    assert accelerator.scaler is scaler


class Anything:
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state


def test_a_process_that_does_not_see_the_checkpoint_says_so(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(
        checkpoints.distributed, "broadcast_object_list", lambda _: [tmp_path / "checkpoint-4"]
    )
    with pytest.raises(FileNotFoundError, match="process 0 does not see .* processes share"):
        run(make_run(whole))


@pytest.mark.parametrize("first", [True, False])
def test_moments_are_laid_out_as_the_weights_are_now(tmp_path, first):
    def make(folder, last, **more):
        return make_run(folder, checkpoints_total_limit=0, fused=True, channels_last=last, **more)

    run(make(tmp_path / "whole", first))
    run(
        make(
            tmp_path / "on",
            not first,
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"),
        )
    )
    assert_near(tmp_path / "on", tmp_path / "whole", tmp_path / "whole", share=1e-3)


@pytest.mark.parametrize(
    ("kind", "count", "words"),
    [
        ("FSDP2", 1, "made by FSDP2, this is one: start it with the hardware file"),
        ("ZeRO-2", 1, "made by ZeRO-2, this is one"),
    ],
)
def test_divided_checkpoints_are_not_taken_for_whole_ones(whole, tmp_path, kind, count, words):
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    record = json.loads((whole / "checkpoint-4" / "step.json").read_text())
    (folder / "step.json").write_text(json.dumps(record | {"kind": kind, "files": {}}))
    with pytest.raises(ValueError, match=words):
        run(make_run(tmp_path))


def test_zero_goes_on_with_its_number_of_processes_only():
    with pytest.raises(ValueError, match="made by 8 processes: ZeRO goes on with that many"):
        checkpoints._compare_kind(
            Path("c"), {"kind": "ZeRO-2", "num_processes": 8}, "ZeRO-2", same=False
        )


# ------------------------------------------------------------------------------- code in pickles


class Planted:
    """What a pickle can ask for: here that a folder is made."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def plant(checkpoint, name, write):
    """A checkpoint that is whole, but for one file that calls a function."""
    path, mark = checkpoint / name, checkpoint.parent / "called"
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as stream:
        write({"state": Planted(mark)}, stream)
    file = checkpoint / "step.json"
    record = json.loads(file.read_text())
    record["files"][name] = path.stat().st_size
    file.write_text(json.dumps(record))
    return mark


@pytest.mark.parametrize("write", [torch.save, pickle.dump], ids=["torch", "pickle"])
@pytest.mark.parametrize(
    "name",
    [
        "optimizer.bin",
        "scheduler.bin",
        "scaler.pt",
        "random_states_0.pkl",
        "custom_checkpoint_0.pkl",
        "pytorch_model/mp_rank_00_model_states.pt",
        "optimizer_0/.metadata",
    ],
)
def test_a_checkpoint_with_code_in_it_is_refused_before_anything_is_loaded(
    whole, tmp_path, name, write
):
    shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4")
    mark = plant(tmp_path / "checkpoint-4", name, write)
    with pytest.raises(ValueError, match=re.escape(name)):
        run(make_run(tmp_path))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["optimizer.bin", "custom_checkpoint_0.pkl"])
def test_what_is_loaded_cannot_run_code_either(whole, tmp_path, monkeypatch, name):
    """accelerate itself opens `custom_checkpoint_0.pkl` in a way that runs what it names."""
    write_as_before(whole / "checkpoint-4", tmp_path / "checkpoint-4")
    mark = plant(tmp_path / "checkpoint-4", name, torch.save)
    monkeypatch.setattr(checkpoints.pickles, "check_pickles", lambda folder: None)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(pickle.UnpicklingError):
        run(make_run(tmp_path))
    assert not mark.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


def write_as_before(checkpoint, folder):
    """A checkpoint as earlier releases wrote it: schedule and averages in accelerate's pickles."""
    shutil.copytree(checkpoint, folder)
    record = json.loads((folder / "step.json").read_text())
    states = record.pop("states")
    averages = load_file(folder / "ema.safetensors")
    (folder / "ema.safetensors").unlink()
    states["ema"]["shadow_params"] = [averages[str(n)] for n in range(len(averages))]
    del record["inputs"], record["files"]["ema.safetensors"]
    for number, name in enumerate(("scheduler", "ema")):
        path = folder / f"custom_checkpoint_{number}.pkl"
        torch.save(states[name], path)
        record["files"][path.name] = path.stat().st_size
    (folder / "step.json").write_text(json.dumps(record))


def test_a_checkpoint_of_an_earlier_release_goes_on_bit_for_bit(whole, tmp_path):
    write_as_before(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    assert run(make_run(tmp_path, checkpoints_total_limit=0))["first"] == 2
    assert_same(tmp_path, whole)
    assert list_files(tmp_path / "checkpoint-6") == list_files(whole / "checkpoint-6")


def test_divided_weights_and_their_list_are_no_code(tmp_path):
    model = build_model("unet")
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "optimizer_0"))
    checkpoints.pickles.check_pickles(tmp_path)
    with checkpoints.pickles.refusing_code():
        dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "optimizer_0"))


# ------------------------------------------------------------------------------------------ names


def test_names_by_which_a_checkpoint_is_found(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_config(whole)
    for wish, step in (("latest", 6), ("checkpoint-4", 4), (str(whole / "checkpoint-2"), 2)):
        found = checkpoints.find_checkpoint(replace(config, resume_from_checkpoint=wish))
        assert found == whole / f"checkpoint-{step}"
    for wish in ("none", "", None):
        assert checkpoints.find_checkpoint(replace(config, resume_from_checkpoint=wish)) is None
    with pytest.raises(FileNotFoundError, match="checkpoint-5 is not a complete checkpoint"):
        checkpoints.find_checkpoint(replace(config, resume_from_checkpoint="checkpoint-5"))
    for folder in (whole / "unet", whole):  # a UNet, and a folder with one in it
        with pytest.raises(ValueError, match=f"--pretrained_unet {folder}"):
            checkpoints.find_checkpoint(replace(config, resume_from_checkpoint=str(folder)))


def test_a_truncated_file_is_found_before_anything_is_loaded(whole, tmp_path, caplog):
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        subprocess.run(["cp", "-r", str(whole / folder.name), str(folder)], check=True)
    file = tmp_path / "checkpoint-4" / "unet" / "diffusion_pytorch_model.safetensors"
    with open(file, "r+b") as stream:
        stream.truncate(1000)
    with caplog.at_level(logging.WARNING):
        assert run(make_run(tmp_path))["first"] == 2
    assert f"skipping {tmp_path / 'checkpoint-4'}: {file} is truncated (1000 of" in caplog.text
    assert_same(tmp_path, whole)


# ------------------------------------------------------------------------------- killed, full disk


PLACES = {"in save_state": 2, "before rename": 2, "in removal": 4}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders of trainings that killed themselves at places in their second checkpoint."""
    jobs = {}
    for place in PLACES:
        folder = tmp_path_factory.mktemp("killed")
        given = make_run(folder, checkpoints_total_limit=1, die=place)
        (folder / "runs.json").write_text(json.dumps([given]))
        jobs[place] = (
            folder,
            Job(run_job, "sharded_job", [str(folder / "runs.json")], log=folder / "job.log"),
        )
    for _, job in jobs.values():
        assert job.wait() == -signal.SIGKILL, job.read_log()
    return {place: folder for place, (folder, _) in jobs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_killed_in_a_checkpoint_it_goes_on_bit_for_bit(whole, killed, place):
    folder = killed[place]
    assert any(p.suffix in (".partial", ".old") for p in folder.iterdir())
    assert run(make_run(folder, checkpoints_total_limit=1))["first"] == PLACES[place]
    assert [n for n in list_names(folder) if n.startswith("checkpoint")] == ["checkpoint-6"]
    assert_same(folder, whole)


@pytest.mark.parametrize("size", [1_000, 300_000], ids=["first file", "a later file"])
def test_a_full_disk_leaves_the_last_good_checkpoint(whole, tmp_path, size):
    given, limits = make_run(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError) as caught:
            run(given | {"full": [0, size]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.ENOSPC
    text = str(caught.value)
    assert f"no space left for checkpoint-4 in {tmp_path}" in text
    assert f"{tmp_path / 'checkpoint-2'} is intact" in text and "start the same command" in text
    assert list_names(tmp_path) == ["checkpoint-2"]
    assert run(given)["first"] == 2
    assert_same(tmp_path, whole)


@pytest.mark.slow
def test_a_process_whose_disk_is_full_stops_both(pair):
    folder, job = pair
    assert [process.exitcode for process in job.processes] == [1, 1]
    said = re.findall(r"OSError: .* no space left for checkpoint-4", job.read_log())
    assert len(said) == 2
    assert list_names(folder / "full") == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (OSError(errno.EACCES, "x"), False),
        (RuntimeError("size mismatch"), False),
        (
            RuntimeError(
                "[enforce fail at inline_container.cc:778] . PytorchStreamWriter failed writing "
                "file data/0: file write failed"
            ),
            True,
        ),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
        (SafetensorError("Error while serializing: InvalidHeader"), False),
    ],
)
def test_what_a_full_disk_looks_like(error, full):
    assert files.is_full(error) is full


# ---------------------------------------------------------------------------- limits and the end


def test_the_limit_is_kept_and_an_abandoned_future_goes(whole, tmp_path, caplog):
    run(make_run(tmp_path))
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == [
        "checkpoint-4",
        "checkpoint-6",
    ]
    with caplog.at_level(logging.WARNING):
        run(make_run(tmp_path, resume_from_checkpoint="none", max_train_steps=2))
    assert "removing" in caplog.text and "checkpoint-6: it is of an earlier run" in caplog.text
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-2"]


def test_in_the_end_the_newest_unets_stay_and_are_not_resumed(tmp_path, caplog):
    run(make_run(tmp_path, checkpoints_total_limit=0))
    (tmp_path / "checkpoint-5.partial").mkdir()
    config = make_config(tmp_path)
    checkpoints.finish_checkpoints(config)
    assert [n for n in list_names(tmp_path) if n.startswith("checkpoint")] == [
        "checkpoint-4",
        "checkpoint-6",
    ]
    assert list_files(tmp_path / "checkpoint-6") == [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    UNet2DConditionModel.from_pretrained(tmp_path / "checkpoint-4", subfolder="unet")
    with caplog.at_level(logging.INFO):
        assert checkpoints.find_checkpoint(config) is None
    assert "a training that came to its end: it is not resumed" in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    checkpoints.finish_checkpoints(replace(config, checkpoints_total_limit=1))
    assert not (tmp_path / "checkpoint-4").exists() and (tmp_path / "checkpoint-6").exists()


def test_in_the_end_other_models_checkpoints_go(tmp_path):
    run(make_run(tmp_path, model="plain"))
    checkpoints.finish_checkpoints(make_config(tmp_path))
    assert not [n for n in list_names(tmp_path) if n.startswith("checkpoint")]


def test_step_json_is_written_when_all_else_is_on_the_disk(tmp_path, monkeypatch):
    """A machine that loses its power must not leave `step.json` beside files of zeros."""
    order, flush, write = [], files.flush, checkpoints.write_json
    monkeypatch.setattr(files, "flush", lambda path: (order.append(path.name), flush(path)))
    monkeypatch.setattr(
        checkpoints, "write_json", lambda path, value: (order.append(path.name), write(path, value))
    )
    run(make_run(tmp_path, max_train_steps=2, model="plain"))
    written = set(list_files(tmp_path / "checkpoint-2")) - {"step.json"}
    assert set(order[: len(written)]) == written
    assert order[len(written) :] == [
        "checkpoint-2.partial",
        "step.json",
        "checkpoint-2.partial",
        tmp_path.name,
    ]
