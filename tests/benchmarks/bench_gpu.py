"""How fast the remover is trained on a GPU, against the authors' configuration, and its memory.

The model is SDXL-inpainting's architecture with random weights; images and latents are random and
lie in memory, so that neither disks nor decoding are measured (`random_training`). Every number
comes from `loop.train` with `RemoverObjective`: the line of `metrics.jsonl` that it writes over the
last steps. Nothing else may use the GPU meanwhile.

    python tests/benchmarks/bench_gpu.py                     # all rows, 512 px
    python tests/benchmarks/bench_gpu.py --rows compiled     # this one and upstream's
    python tests/benchmarks/bench_gpu.py --batch 16          # all rows at this batch: minutes
    python tests/benchmarks/bench_gpu.py --tiny --device cpu # the built-in model: does it all run?

`upstream` is what `train_RORem.py` does at a step: fp16, both images encoded by a float32 VAE and
sampled from its posterior, gradient checkpointing on, AdamW as PyTorch has it by default, each
sample's prompt projected, the loss read after each step, xformers where it is installed. What it
reads and decodes is left out, in its favour. The other rows are ours, in bf16:

    uncached                images encoded by a bf16 VAE at every step, checkpointing on
    cached                  the same from cached latents (making them is in `encoding`)
    no_checkpointing        the same, all activations kept
    own_prompts             the same, keys and values of the prompt made for each sample
    xformers                no_checkpointing with xformers' attention, where it is installed
    compiled                no_checkpointing, repeated blocks compiled
    compiled_checkpointing  compiled, with checkpointing

Each runs with the largest batch that fits: doubled until the memory does not suffice, then bisected
to an eighth of it, with 5 % of the memory held back; or with the one given. Then the rows take
turns, `--repeats` times; a ratio is between runs of the same turn. MFU counts 3 forward passes an
image, 4.77 TFLOP at 512 px, whatever is computed twice, against `speed.get_peak_flops`. `memory`
has the peak at batch 16 of training all weights with AdamW and with 8-bit Adam (where bitsandbytes
is installed), and of a LoRA; checkpointing is chosen by the kit there. Every configuration, and
every batch that is tried, is a process of its own: what one leaves behind cannot disturb the next.

The result is printed, and at full size kept in `results/gpu.json` or `gpu_batch_<batch>.json`. A
row that cannot run says why: `skipped`, `out_of_memory` or `error`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from measuring import save_result
from random_training import (
    RESOLUTION,
    Case,
    check_architecture,
    describe_gpu,
    measure_case,
    measure_encoding,
)

LORA_RANK, MEMORY_BATCH = 64, 16
GOAL = {"ratio": 5.0, "mfu": 0.45}
LIMIT_SECONDS = 3600  # a configuration that takes longer hangs


def make_cases(*, has_xformers: bool) -> tuple[dict[str, Case], dict[str, Case]]:
    """The rows by name, and those of the memory at batch 16."""
    kept = {"gradient_checkpointing": False}
    less = {"gradient_checkpointing": True}
    xformers = {"enable_xformers_memory_efficient_attention": True}
    upstream = {
        **less,
        "mixed_precision": "fp16",
        "vae_precision": "fp32",
        "cache_latents": False,
        "channels_last": False,
        **(xformers if has_xformers else {}),
    }
    rows = {
        "upstream": Case(upstream, upstream=True, own_prompts=True),
        "uncached": Case({**less, "cache_latents": False}),
        "cached": Case(less),
        "no_checkpointing": Case(kept),
        "own_prompts": Case(kept, own_prompts=True),
        "xformers": Case({**kept, **xformers}, needs="xformers"),
        "compiled": Case({**kept, "torch_compile": True}),
        "compiled_checkpointing": Case({**less, "torch_compile": True}),
    }
    memory = {
        "adamw": Case(),
        "adamw_8bit": Case({"use_8bit_adam": True}, needs="bitsandbytes"),
        f"lora_{LORA_RANK}": Case({"lora_rank": LORA_RANK}),
    }
    return rows, memory


def _answer(path: str, function, arguments) -> None:
    os.dup2(2, 1)  # what libraries print is no part of the result
    try:
        result = function(*arguments)
    except Exception as error:  # a configuration that fails is a row that says so
        text = f"{type(error).__name__}: {error}"
        kind = "out_of_memory" if "out of memory" in text.lower() else "error"
        result = {kind: text[:2000]}
    Path(path).write_text(json.dumps(result))


def run_apart(function, *arguments) -> dict:
    """A function's result, from a process of its own; `{"error": …}` where it died.

    On CPUs the process is a fork of one that has the libraries loaded, which saves seconds. CUDA
    does not survive a fork of a process that has looked at it, as libraries may when loaded.
    """
    on_cpu = _is_on_cpu()
    context = multiprocessing.get_context("forkserver" if on_cpu else "spawn")
    if on_cpu:
        context.set_forkserver_preload(["rorem_lib.remover", "rorem_lib.training.validation"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        process = context.Process(target=_answer, args=(str(path), function, arguments))
        process.start()
        process.join(LIMIT_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            return {"error": f"not done after {LIMIT_SECONDS} s"}
        if not path.exists():
            return {"error": f"the process ended with {process.exitcode}"}
        return json.loads(path.read_text())


def _is_on_cpu() -> bool:
    """Whether the trainings were sent to the CPU; CUDA is not asked, since this process would then
    hold some of the GPU's memory."""
    return os.environ.get("ACCELERATE_USE_CPU") == "true"


def find_largest(fits, *, first: int, limit: int) -> int:
    """The largest batch that fits, to an eighth of it; 0 where not even one sample does.

    Args:
        fits: batch -> bool; what fits at a size fits at every smaller one.
        first: the batch to begin with, doubled while it fits, else halved.
        limit: the largest that is tried.
    """
    low, high, batch = 0, limit + 1, min(first, limit)
    while high - low > max(1, low // 8):
        if fits(batch):
            low = batch
        else:
            high = batch
        if high > limit:
            batch = min(2 * low, limit)
        else:
            batch = (low + high) // 2 if low else high // 2
    return low


def search_batch(case: Case, *, first: int, limit: int, run=run_apart) -> dict:
    """The largest batch of a configuration, or why there is none.

    Returns:
        `largest_batch` (0 where one sample is too much; on CPUs `limit`); `error` where something
        else than memory ended the search.
    """
    if _is_on_cpu():
        return {"largest_batch": limit}
    failed: dict = {}

    def fits(batch: int) -> bool:
        if failed:
            return False
        # the second step has the optimizer's states
        found = run(measure_case, replace(case, batch=batch, steps=1, memory_share=0.95))
        failed.update({k: v for k, v in found.items() if k == "error"})
        return "images_per_second" in found

    largest = find_largest(fits, first=first, limit=limit)
    return {"largest_batch": largest} | failed


def sum_up(runs: list[dict], base: list[dict]) -> dict:
    """A row of its repeats, and its ratios to upstream's of the same turns.

    Args:
        runs: what `measure_case` gave, a repeat each; at least one.
        base: upstream's.
    """
    if bad := next((r for r in runs if "images_per_second" not in r), None):
        return bad
    row = {
        name: round(float(np.median([run[name] for run in runs])), 4)
        for name in ("images_per_second", "mfu")
        if name in runs[0]
    }
    row |= {
        "memory_gb": max(run["memory_gb"] for run in runs),
        "gradient_checkpointing": runs[0]["gradient_checkpointing"],
    }
    if "skipped_steps" in runs[0]:
        row["skipped_steps"] = max(run["skipped_steps"] for run in runs)
    if all("images_per_second" in run for run in base):
        ratios = [
            run["images_per_second"] / other["images_per_second"] for run, other in zip(runs, base)
        ]
        row["ratio"] = {
            "median": round(float(np.median(ratios)), 3),
            "all": [round(ratio, 3) for ratio in ratios],
        }
    return row


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def say(name: str, result: dict) -> None:
    print(f"{name}: {json.dumps(result)}", file=sys.stderr, flush=True)


def run_all(options, gpu: dict, *, run=run_apart) -> dict:
    """The whole benchmark's result, as it is kept."""
    rows, memory = make_cases(has_xformers=is_installed("xformers"))
    chosen = ["upstream", *[name for name in options.rows or rows if name != "upstream"]]
    first, limit, batch = (2, 2, 2) if options.tiny else (8, 512, MEMORY_BATCH)
    shared = {"tiny": options.tiny, "steps": options.steps}
    result = {
        "gpu": gpu,
        "model": "built-in" if options.tiny else "SDXL-inpainting",
        "attention_of_upstream": "xformers" if is_installed("xformers") else "PyTorch",
        "resolution": 64 if options.tiny else RESOLUTION,
        "steps": options.steps,
        "repeats": options.repeats,
        "rows": {},
        "memory": {},
    }
    ready = {}
    for name in chosen:
        case = replace(rows[name], **shared)
        if case.needs and not is_installed(case.needs):
            result["rows"][name] = {"skipped": f"{case.needs} is not installed"}
            continue
        if options.batch:
            found = {"batch": options.batch}
        else:
            found = search_batch(case, first=first, limit=limit, run=run)
            say(name, found)
        result["rows"][name] = found
        if size := found.get("largest_batch", options.batch):
            ready[name] = replace(case, batch=size)
    runs: dict[str, list] = {name: [] for name in ready}
    for _ in range(options.repeats):
        for name, case in ready.items():
            runs[name].append(run(measure_case, case))
            say(name, runs[name][-1])
    for name, found in runs.items():
        result["rows"][name] |= sum_up(found, runs.get("upstream", [{}]))
    for name, case in memory.items():
        case = replace(case, **shared | {"steps": 1, "batch": batch})
        if case.needs and not is_installed(case.needs):
            result["memory"][name] = {"skipped": f"{case.needs} is not installed"}
            continue
        result["memory"][name] = run(measure_case, case)
        say(name, result["memory"][name])
    result["encoding"] = run(measure_encoding, Case(**shared, batch=batch))
    done = [row for row in result["rows"].values() if "images_per_second" in row]
    result["best"] = {
        "ratio": max((row["ratio"]["median"] for row in done if "ratio" in row), default=None),
        "mfu": max((row["mfu"] for row in done if "mfu" in row), default=None),
        "goal": GOAL,
    }
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tiny", action="store_true", help="the built-in model, one batch, one timed step"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", nargs="+", choices=tuple(make_cases(has_xformers=False)[0]))
    parser.add_argument("--batch", type=int, help="instead of each row's largest")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--steps", type=int, help="timed steps a run, after as many untimed ones")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        if not options.tiny:
            parser.error("the whole model is too slow on a CPU: add --tiny")
        os.environ["ACCELERATE_USE_CPU"] = "true"
    options.repeats = options.repeats or (1 if options.tiny else 3)
    options.steps = options.steps or (1 if options.tiny else 10)
    check_architecture()
    gpu = run_apart(describe_gpu)
    if "error" in gpu or (not gpu and options.device == "cuda"):
        parser.error(gpu.get("error", "there is no NVIDIA GPU here: see --tiny --device cpu"))
    result = run_all(options, gpu)
    if options.tiny or options.rows:  # some rows are no result to keep
        print(json.dumps(result, indent=1))
    else:
        extras = [name for name in ("xformers", "bitsandbytes") if is_installed(name)]
        name = f"gpu_batch_{options.batch}" if options.batch else "gpu"
        save_result(name, result, "torch", "diffusers", "accelerate", *extras)


if __name__ == "__main__":
    main()
