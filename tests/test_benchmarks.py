"""The benchmark for GPUs: that each row runs, and how it counts what does not; how the one for
orders counts labels."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(FOLDER))

import bench_gpu  # noqa: E402
import bench_orders  # noqa: E402
import bench_removal_speed  # noqa: E402
import random_training  # noqa: E402

from rorem_lib.models import sdxl  # noqa: E402
from rorem_lib.models.attention import SharedPromptAttention  # noqa: E402
from rorem_lib.training import loop  # noqa: E402

ROWS = {
    "upstream": True,
    "uncached": True,
    "cached": True,
    "no_checkpointing": False,
    "own_prompts": False,
    "compiled": False,
    "compiled_checkpointing": True,
}


@pytest.fixture(autouse=True)
def not_sent_to_the_cpu(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


@pytest.fixture(scope="module")
def tiny_result():
    """What `--tiny --device cpu` prints."""
    done = subprocess.run(
        [sys.executable, FOLDER / "bench_gpu.py", "--tiny", "--device", "cpu"],
        text=True,
        capture_output=True,
        timeout=500,
        env=os.environ | {"ROREM_PEAK_TFLOPS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture
def small_sdxl(monkeypatch):
    """SDXL's kinds of layers and widths of its inputs, but few channels."""
    monkeypatch.setattr(
        random_training,
        "UNET",
        random_training.UNET
        | {
            "block_out_channels": (32, 64, 64),
            "transformer_layers_per_block": [1, 1, 1],
            "attention_head_dim": [1, 2, 2],
        },
    )
    monkeypatch.setattr(
        random_training,
        "VAE",
        random_training.VAE | {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
    )
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ROREM_PEAK_TFLOPS", "1")


def make_case(name, **changes):
    case = bench_gpu.make_cases(has_xformers=False)[0][name]
    return replace(case, steps=1, batch=2, options=case.options | {"resolution": 64} | changes)


@pytest.mark.slow
@pytest.mark.benchmark
def test_every_row_trains_the_built_in_model(tiny_result):
    rows = tiny_result["rows"]
    for name, checkpointing in ROWS.items():
        row = rows[name]
        assert row["largest_batch"] == 2, name
        assert row["gradient_checkpointing"] is checkpointing, name
        assert 0 < row["ratio"]["median"] < math.inf, name
        assert 0 < row["mfu"] < 1 and row["memory_gb"] > 0, name
        assert row["images_per_second"] / rows["upstream"]["images_per_second"] == pytest.approx(
            row["ratio"]["median"], abs=1e-3
        ), name
    assert rows["upstream"]["ratio"]["all"] == [1.0]
    assert tiny_result["best"]["ratio"] == max(rows[n]["ratio"]["median"] for n in ROWS)
    assert tiny_result["best"]["mfu"] == max(rows[n]["mfu"] for n in ROWS)
    assert all(speed > 0 for speed in tiny_result["encoding"].values())


@pytest.mark.slow
@pytest.mark.benchmark
def test_what_is_not_installed_is_skipped_and_said(tiny_result):
    for table, name, package in (
        ("rows", "xformers", "xformers"),
        ("memory", "adamw_8bit", "bitsandbytes"),
    ):
        row = tiny_result[table][name]
        if bench_gpu.is_installed(package):  # xformers trains on GPUs alone
            assert "images_per_second" in row or "needs an NVIDIA GPU" in row["error"]
        else:
            assert row == {"skipped": f"{package} is not installed"}


@pytest.mark.slow
@pytest.mark.benchmark
def test_memory_is_of_all_weights_and_of_a_lora(tiny_result):
    memory = tiny_result["memory"]
    assert set(memory) == {"adamw", "adamw_8bit", "lora_64"}
    assert memory["adamw"]["memory_gb"] > 0 and memory["lora_64"]["memory_gb"] > 0
    assert memory["adamw"]["batch"] == tiny_result["rows"]["cached"]["largest_batch"]


def test_the_whole_model_is_refused_on_a_cpu(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_gpu.main(["--device", "cpu"])
    assert stopped.value.code == 2
    assert "add --tiny" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.benchmark
def test_the_configs_are_those_of_sdxl_inpainting(monkeypatch):
    random_training.check_architecture()
    monkeypatch.setattr(random_training, "UNET", random_training.UNET | {"in_channels": 4})
    with pytest.raises(ValueError, match="UNet has 2567463684 parameters"):
        random_training.check_architecture()


@pytest.mark.slow
@pytest.mark.benchmark
def test_a_full_size_row_trains_with_sdxl_s_kind_of_vae_and_prompt(small_sdxl, monkeypatch):
    optimizers = []

    original, stock = loop.make_optimizer, random_training.make_stock_optimizer

    def make_optimizer(*arguments):
        optimizers.append(stock(*arguments))
        return optimizers[-1]

    with monkeypatch.context() as patch:
        patch.setattr(random_training, "make_stock_optimizer", make_optimizer)
        found = random_training.measure_case(make_case("upstream"))
    assert found["images_per_second"] > 0 and found["gradient_checkpointing"] is True
    assert not optimizers[0].defaults["fused"]
    assert loop.make_optimizer is original, "the kit's own optimizer is not back"
    ours = random_training.measure_case(make_case("uncached"))
    assert ours["images_per_second"] > 0 and ours["mfu"] > 0


def test_upstream_samples_both_latents_and_ours_takes_the_mode(small_sdxl):
    pipe = random_training.make_pipeline(sdxl.load_pipeline(), "cpu")
    pictures = {
        name: torch.stack(2 * [x])
        for name, x in random_training.RandomReader((64, 64), 0, torch.float16).read(3).items()
    }
    found = {}
    for name, cls in (
        ("upstream", random_training.UpstreamObjective),
        ("uncached", random_training.RandomObjective),
    ):
        case = make_case(name)
        objective = cls(case.make_config(Path("unused")), case)
        objective.pipe = pipe
        objective.accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
        found[name] = objective.encode_batch(pictures)
        assert {k: tuple(v.shape) for k, v in found[name].items()} == {
            "gt": (2, 4, 8, 8),
            "masked": (2, 4, 8, 8),
            "mask": (2, 1, 8, 8),
        }
        assert found[name]["mask"].unique().tolist() == [0, 1]
    for part in ("gt", "masked"):  # the two samples are of the same image
        assert not torch.equal(*found["upstream"][part])
        assert torch.equal(*found["uncached"][part])
    assert torch.equal(found["upstream"]["mask"], found["uncached"]["mask"])


@pytest.mark.slow
@pytest.mark.benchmark
def test_each_row_projects_the_prompt_as_it_says(small_sdxl, tmp_path):
    for name, shared in (("own_prompts", False), ("no_checkpointing", True)):
        case = make_case(name)
        objective = random_training.RandomObjective(case.make_config(tmp_path), case)
        objective.accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
        with random_training.replaced(case):
            unet = objective.build_model()
        kinds = {type(processor) for processor in unet.attn_processors.values()}
        assert (SharedPromptAttention in kinds) is shared


def test_too_little_memory_is_a_result_and_not_an_error(small_sdxl, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(random_training.RandomObjective, "compute_loss", fail)
    found = random_training.measure_case(make_case("no_checkpointing"))
    assert set(found) == {"batch", "out_of_memory"}
    assert "gradient_checkpointing" in found["out_of_memory"]


@pytest.mark.parametrize(
    ("most", "tried", "least"),
    [
        (0, 4, 0),
        (1, 5, 1),
        (5, 5, 5),
        (8, 6, 8),
        (13, 6, 13),
        (100, 9, 89),
        (512, 7, 512),
        (10**9, 7, 512),
    ],
)
def test_the_largest_batch_is_found_to_an_eighth(most, tried, least):
    asked = []

    def fits(batch):
        asked.append(batch)
        return batch <= most

    found = bench_gpu.find_largest(fits, first=8, limit=512)
    assert least <= found <= most
    assert len(asked) <= tried and len(set(asked)) == len(asked)
    assert all(1 <= batch <= 512 for batch in asked)


def test_rows_take_turns_and_ratios_are_of_one_turn():
    calls, most = [], {"upstream": 10, "cached": 40, "compiled": 0}

    def run(function, case):
        if function is not random_training.measure_case:
            return {}
        name = (
            "upstream"
            if case.upstream
            else "compiled"
            if case.options.get("torch_compile")
            else "cached"
        )
        if case.memory_share < 1:  # the search
            return (
                {"images_per_second": 1.0} if case.batch <= most[name] else {"out_of_memory": "…"}
            )
        calls.append((name, case.batch))
        turn = len(calls)  # the machine gets slower
        return {
            "images_per_second": (2.0 if case.upstream else 6.0) / ((turn + 1) // 2),
            "mfu": 0.1,
            "memory_gb": float(turn),
            "gradient_checkpointing": True,
        }

    options = SimpleNamespace(
        tiny=False, repeats=3, steps=10, rows=["cached", "compiled"], batch=None
    )
    result = bench_gpu.run_all(options, {"name": "none"}, run=run)
    assert calls[:6] == 3 * [("upstream", 10), ("cached", calls[1][1])]
    assert 36 <= calls[1][1] <= 40
    rows = result["rows"]
    assert rows["cached"]["ratio"] == {"median": 3.0, "all": [3.0, 3.0, 3.0]}
    assert rows["cached"]["memory_gb"] == 6.0
    assert rows["compiled"] == {"largest_batch": 0}
    assert result["best"]["ratio"] == 3.0 and result["memory"]["adamw"]["memory_gb"] == 7.0


def test_a_batch_that_is_given_is_not_searched():
    def run(function, case):
        if function is not random_training.measure_case:
            return {}
        assert case.memory_share == 1 and case.batch == 16
        return (
            {"batch": 16, "out_of_memory": "…"}
            if case.options.get("torch_compile")
            else {
                "images_per_second": 2.0,
                "mfu": 0.1,
                "memory_gb": 1.0,
                "gradient_checkpointing": True,
            }
        )

    options = SimpleNamespace(
        tiny=False, repeats=1, steps=10, rows=["cached", "compiled"], batch=16
    )
    rows = bench_gpu.run_all(options, {"name": "none"}, run=run)["rows"]
    assert rows["cached"]["batch"] == 16 and rows["cached"]["ratio"]["median"] == 1.0
    assert rows["compiled"] == {"batch": 16, "out_of_memory": "…"}


def test_an_error_that_is_none_of_memory_ends_the_search():
    calls = []

    def run(function, case):
        calls.append(case.batch)
        return {"error": "ValueError: no"}

    found = bench_gpu.search_batch(make_case("cached"), first=8, limit=64, run=run)
    assert found == {"largest_batch": 0, "error": "ValueError: no"} and calls == [8]


@pytest.mark.slow
@pytest.mark.benchmark
def test_a_process_that_dies_is_a_row_that_says_so():  # a fresh one, as with CUDA
    assert bench_gpu.run_apart(os._exit, 9) == {"error": "the process ended with 9"}


def test_what_a_configuration_raises_is_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "dup2", lambda *_: None)

    def fail(text):
        raise RuntimeError(text)

    for text, kind in (("no kernel", "error"), ("CUDA out of memory", "out_of_memory")):
        bench_gpu._answer(tmp_path / "result.json", fail, (text,))
        assert json.loads((tmp_path / "result.json").read_text()) == {kind: f"RuntimeError: {text}"}


# ------------------------------------------------------------------------------ orders of labels


@pytest.mark.parametrize(
    "curve, target, labels",
    [
        ([0.5, 0.6, 0.7, 0.8], 0.7, 300),
        ([0.5, 0.6, 0.7, 0.8], 0.65, math.sqrt(150 * 300)),  # half way, in doublings
        ([0.5, 0.6, 0.7, 0.8], 0.4, 75),
        ([0.5, 0.6, 0.7, 0.8], 0.85, math.inf),
        ([0.5, 0.7, 0.6, 0.8], 0.575, math.sqrt(75 * 150)),  # 0.7 and 0.6 count as 0.65 twice
    ],
)
def test_labels_needed_for_a_quality(curve, target, labels):
    assert bench_orders.count_needed(np.array(curve), target) == pytest.approx(labels)


@pytest.mark.slow
def test_removals_are_timed_beside_the_stock_pipelines(tiny_model):
    """The GPU's part of the benchmark, on what there is here."""
    pipe = sdxl.load_pipeline(str(tiny_model), dtype=torch.bfloat16)
    found = bench_removal_speed.compare(pipe, (64,), 1, compile_blocks=False)
    assert found.keys() == {"64"} and found["64"]["weights_cast"] == 0
    assert all(value > 0 for value in found["64"]["ms"].values())
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            bench_removal_speed.main(["--gpu"])
