"""DDP, ZeRO-2 and FSDP2: that they train the same, clip, average, resume and give whole models."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import UNet2DConditionModel
from forked import Job, read_launcher_environment, run_job
from safetensors.torch import load_file
from sharded_job import make_unet

from rorem_lib.runner.launch import HARDWARE
from rorem_lib.training import distributed, loop

pytestmark = pytest.mark.slow

FILES = {"DDP": "many_gpus", "FSDP2": "fsdp2", "ZeRO-2": "deepspeed_zero2"}


def launch(kind: str, runs: list[dict], folder: Path) -> Job:
    """`sharded_job` to its end, on two processes, as accelerate starts them by the kit's file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.json").write_text(json.dumps([run | {"kind": kind} for run in runs]))
    environment = read_launcher_environment(HARDWARE / f"{FILES[kind]}.yaml")
    if kind == "ZeRO-2":
        environment = environment | {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}
    words, log = [str(folder / "runs.json")], folder / "job.log"
    job = Job(run_job, "sharded_job", words, processes=2, log=log, environment=environment)
    job.wait()
    return job


class Runs:
    """The trainings of one kind, all done by one start of two processes."""

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder
        common = {
            "max_train_steps": 4,
            "train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "mixed_precision": "no",
            "checkpointing_steps": 100,
            "learning_rate": 1e-3,
        }
        runs = {
            "adam": {"ema_decay": 0.9, "checkpointing_steps": 2, "checkpoints_total_limit": 0},
            "resumed": {
                "ema_decay": 0.9,
                "resume_from_checkpoint": str(folder / "adam" / "checkpoint-2"),
            },
            "chunked": {"chunks": 2},
            "clipped": {"sgd": True, "max_train_steps": 1, "max_grad_norm": 0.01},
            "unclipped": {"sgd": True, "max_train_steps": 1, "max_grad_norm": 0},
            "bf16": {"mixed_precision": "bf16", "ema_decay": 0.9},
            "lora": {"model": "lora", "ema_decay": 0.9},
        }
        done = launch(
            kind,
            [common | {"output_dir": str(folder / name)} | run for name, run in runs.items()],
            folder,
        )
        assert done.poll() == 0, done.read_log()[-4000:]

    def read(self, name):
        return json.loads((self.folder / name / "result.json").read_text())

    def load(self, name, file):
        return load_file(self.folder / name / f"{file}.safetensors")

    def measure(self, name):
        """How far the weights of a run moved."""
        before, after = self.load(name, "before"), self.load(name, "after")
        return sum((after[k] - before[k]).square().sum() for k in before).sqrt().item()


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return Runs("DDP", tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module", params=["DDP", "FSDP2", "ZeRO-2"])
def runs(request, ddp, tmp_path_factory):
    if request.param == "DDP":
        return ddp
    if request.param == "ZeRO-2":
        pytest.importorskip("deepspeed")
    return Runs(request.param, tmp_path_factory.mktemp("divided"))


def assert_near(one, other, start, share):
    assert one.keys() == other.keys()
    apart = sum((one[k] - other[k]).square().sum() for k in one).sqrt()
    moved = sum((one[k] - start[k]).square().sum() for k in one).sqrt()
    assert moved > 0 and apart < share * moved, f"moved {moved}, apart {apart}"


def test_they_train_what_ddp_trains(runs, ddp):
    found, wanted = runs.read("adam"), ddp.read("adam")
    assert found["processes"] == 2 and found["count"] == wanted["count"] == sum(
        p.numel() for p in make_unet().parameters()
    )
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-4)
    assert found["rates"] == pytest.approx([0.99e-3, 0.98e-3, 0.97e-3, 0.96e-3])
    for file in ("after", "whole"):
        assert_near(
            runs.load("adam", file), ddp.load("adam", file), ddp.load("adam", "before"), 0.01
        )


def test_chunks_of_a_micro_batch_take_one_step(runs):
    chunked, adam = runs.read("chunked"), runs.read("adam")
    assert chunked["losses"] == pytest.approx(adam["losses"], rel=1e-5)
    assert chunked["norms"] == pytest.approx(adam["norms"], rel=1e-4)
    assert_near(
        runs.load("chunked", "after"), runs.load("adam", "after"), runs.load("adam", "before"), 0.01
    )


def test_clipping_clips_and_the_norm_is_the_one_before(runs):
    clipped, unclipped = runs.read("clipped"), runs.read("unclipped")
    assert clipped["norms"] == pytest.approx(unclipped["norms"], rel=1e-5)
    assert clipped["norms"][0] > 1
    assert runs.measure("clipped") == pytest.approx(0.01, rel=1e-3)
    assert runs.measure("unclipped") == pytest.approx(unclipped["norms"][0], rel=1e-3)


def test_a_resumed_run_is_the_undisturbed_one(runs):
    resumed, whole = runs.read("resumed"), runs.read("adam")
    assert resumed["first"] == 2
    assert resumed["losses"] == whole["losses"][4:]
    for file in ("after", "whole"):
        one, other = runs.load("resumed", file), runs.load("adam", file)
        assert all(torch.equal(one[k], other[k]) for k in one)


def test_the_whole_model_is_the_average_and_opens_in_diffusers(runs):
    after, whole = runs.load("adam", "after"), runs.load("adam", "whole")
    assert after.keys() == whole.keys() == make_unet().state_dict().keys()
    assert all(w.dtype == torch.float32 and w.shape == after[k].shape for k, w in whole.items())
    assert not all(torch.equal(after[k], whole[k]) for k in whole)
    unet = UNet2DConditionModel.from_pretrained(runs.folder / "adam" / "unet")
    assert all(torch.equal(w, whole[k]) for k, w in unet.state_dict().items())


def test_bf16_trains_about_the_same_and_keeps_float32(runs, ddp):
    found, wanted = runs.read("bf16"), ddp.read("adam")
    assert found["line"] == f"2 processes, {runs.kind}, bf16, global batch 8"
    assert found["losses"] == pytest.approx(wanted["losses"], rel=0.02)
    start = runs.load("bf16", "before")
    assert_near(runs.load("bf16", "after"), runs.load("adam", "after"), start, 0.7)
    small = [
        (w.to(torch.bfloat16).float() - w).abs().max() for w in runs.load("bf16", "whole").values()
    ]
    assert max(small) > 0, "the weights that are saved were rounded to bf16"


def test_lora_alone_moves_and_is_gathered(runs, ddp):
    before, after = runs.load("lora", "before"), runs.load("lora", "after")
    trained = {k for k in before if "lora_" in k}
    assert trained and runs.read("lora")["count"] == sum(before[k].numel() for k in trained)
    for name in before:
        assert torch.equal(before[name], after[name]) == (name not in trained), name
    assert runs.load("lora", "whole").keys() == after.keys()
    assert_near(after, ddp.load("lora", "after"), before, 0.03)  # Adam: signs of tiny gradients


# -------------------------------------------------------------------------------- without processes


def make_accelerator(kind=DistributedType.NO, **more):
    given = {
        "distributed_type": kind,
        "num_processes": 1,
        "mixed_precision": "no",
        "device": torch.device("cpu"),
        "prepare": lambda *parts: parts,
    }
    return SimpleNamespace(**given | more)


def test_the_first_line_says_what_trains():
    config = loop.LoopConfig(train_batch_size=16)
    assert distributed.describe(make_accelerator(), config) == "1 process, fp32, global batch 16"
    many = make_accelerator(
        DistributedType.MULTI_GPU,
        num_processes=8,
        mixed_precision="bf16",
        device=torch.device("cuda"),
    )
    assert distributed.describe(many, config) == "8 processes, DDP, bf16, global batch 128"
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2))
    zero = make_accelerator(
        DistributedType.DEEPSPEED, num_processes=8, mixed_precision="fp16", state=state
    )
    config = loop.LoopConfig(train_batch_size=4, gradient_accumulation_steps=2)
    assert distributed.describe(zero, config) == "8 processes, ZeRO-2, fp16, global batch 64"


def test_what_the_hardware_cannot_do_is_said(monkeypatch, caplog):
    config, half = loop.LoopConfig(), make_accelerator(mixed_precision="fp16")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with caplog.at_level(logging.WARNING):
        distributed.prepare(half, torch.nn.Linear(1, 1), None, config)
    assert "fp16 needs a GPU: this trains in float32" in caplog.text
    assert "asks for FSDP, which needs several GPUs" in caplog.text
    assert "fp32" in distributed.describe(half, config)
    for kind, state in (
        (DistributedType.FSDP, {"fsdp_plugin": SimpleNamespace(fsdp_version=1)}),
        (DistributedType.DEEPSPEED, {"deepspeed_plugin": SimpleNamespace(zero_stage=3)}),
    ):
        with pytest.raises(ValueError, match="fsdp_version.*2,.*zero_stage.*2"):
            distributed.prepare(
                make_accelerator(kind, state=SimpleNamespace(**state)), None, None, config
            )


def test_deepspeed_is_told_the_options_and_gets_inputs_in_its_precision():
    plugin = SimpleNamespace(zero_stage=2, deepspeed_config={"gradient_clipping": "auto"})
    accelerator = make_accelerator(
        DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin)
    )
    config = loop.LoopConfig(train_batch_size=3, gradient_accumulation_steps=2, max_grad_norm=0.5)
    seen = []

    class Model(torch.nn.Linear):
        def forward(self, x, *, times, more):
            seen.extend([x.dtype, times.dtype, more["a"].dtype, more["b"]])
            return super().forward(x)

    model = Model(2, 2).to(torch.bfloat16)
    distributed.prepare(accelerator, model, None, config)
    assert plugin.deepspeed_config == {
        "gradient_clipping": 0.5,
        "gradient_accumulation_steps": 2,
        "train_micro_batch_size_per_gpu": 3,
    }
    model(
        torch.ones(1, 2),
        times=torch.ones(1, dtype=torch.int64),
        more={"a": torch.ones(1), "b": None},
    )
    assert seen == [torch.bfloat16, torch.int64, torch.bfloat16, None]


def test_a_structure_has_no_weights_until_it_is_filled():
    model = make_unet()
    empty = distributed.copy_structure(make_accelerator(DistributedType.FSDP), model)
    assert all(p.is_meta for p in empty.parameters())
    assert not any(p.is_meta for p in model.parameters())
    assert distributed.copy_structure(make_accelerator(), model) is None
    empty.load_state_dict(model.state_dict(), assign=True)
    times, more = torch.tensor([3]), {"text_embeds": torch.ones(1, 8), "time_ids": torch.ones(1, 6)}
    given = (torch.ones(1, 9, 8, 8), times, torch.ones(1, 3, 8))
    assert torch.equal(
        empty(*given, added_cond_kwargs=more).sample, model(*given, added_cond_kwargs=more).sample
    )
