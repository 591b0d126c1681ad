"""How much faster two processes train than one, where each has a core of its own.

Baseline: `rorem_lib.remover` bound to one core. Against it: the same job started by `accelerate
launch` as two processes, each bound to a core of its own, whose gradients travel through gloo. Each
process has one thread and the same batch, so that two processes train twice the images a step.
Images a second are those of `metrics.jsonl` (median over its lines, the first one left out);
latents are cached before.

    python tests/benchmarks/bench_scaling.py [--cores 0 1] [--repeats 3] …

Ends with 1 where a ratio's median misses the goal, with 2 where the machine is not idle or has too
few cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from bench_assembly import write_raw
from measuring import require_idle, run_watched, save_result, summarise_ratios

SIZE, BATCH, LINE = 64, 16, 5  # px, images a process, steps a line
GOAL = 1.7
ROOT = Path(__file__).parents[2]
# `python -m rorem_lib.remover` on the core of this process
PINNED_JOB = """
import os, runpy, sys
sys.path.insert(0, os.getcwd())
cores = sys.argv.pop(1).split(",")
os.sched_setaffinity(0, {int(cores[int(os.environ.get("LOCAL_RANK", 0))])})
runpy.run_module("rorem_lib.remover", run_name="__main__", alter_sys=True)
"""


def train(work: Path, precision: str, *, cores: list[int], steps: int) -> float:
    """Images a second of a training with one process a core."""
    out = Path(tempfile.mkdtemp(dir=work))
    job = out / "job.py"
    job.write_text(PINNED_JOB)
    command = [sys.executable]
    if len(cores) > 1:
        command += [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            len(cores),
            "--num_machines",
            1,
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            0,
        ]
    command += [
        job,
        ",".join(map(str, cores)),
        "--meta_path",
        work / "set/meta.json",
        "--pretrained_model_name_or_path",
        "builtin",
        "--resize_mode",
        "crop",
        "--random_flip",
        "--dataloader_num_workers",
        0,
        "--validation_steps",
        0,
        "--latent_cache_dir",
        work / "cache",
        "--output_dir",
        out / "out",
        "--resolution",
        SIZE,
        "--train_batch_size",
        BATCH,
        "--max_train_steps",
        steps,
        "--logging_steps",
        LINE,
        "--mixed_precision",
        precision,
        "--ema_decay",
        0,
        "--checkpointing_steps",
        1_000_000,
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        # accelerate's launcher starts several processes on a CPU only so
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    run_watched(command, out / "log", env=environment, cwd=ROOT, every=None)
    metrics = json.loads((out / "out/train_metrics.json").read_text())
    if metrics["num_processes"] != len(cores):
        raise RuntimeError(f"{metrics['num_processes']} processes trained, not {len(cores)}")
    lines = [json.loads(line) for line in (out / "out/metrics.jsonl").read_text().splitlines()]
    return float(np.median([line["images_per_second"] for line in lines[1:]]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--cores", nargs=2, type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=60, help=f"a multiple of {LINE}, at least two")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "no"])
    parser.add_argument("--busy", action="store_true", help="measure on a machine that is not idle")
    parser.add_argument("--name", default="scaling", help="of the file in results/")
    options = parser.parse_args()
    if options.steps % LINE or options.steps < 2 * LINE:
        parser.error(f"--steps must be a multiple of {LINE}, at least {2 * LINE}")
    if len(set(options.cores) & os.sched_getaffinity(0)) < 2:
        print(f"cores {options.cores} are not two that this program may use", file=sys.stderr)
        return 2
    if not options.busy:
        require_idle()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_raw(work / "set", 4 * BATCH)
        train(work, "no", cores=options.cores[:1], steps=2 * LINE)  # makes the cache
        for precision in options.precisions:
            rows = []
            for _ in range(options.repeats):  # side by side: the machine's mood changes
                rows.append(
                    [
                        train(work, precision, cores=options.cores[:count], steps=options.steps)
                        for count in (1, 2)
                    ]
                )
                print(f"{precision}: {rows[-1]} images/s", flush=True)
            found[precision] = {
                "one_process": round(float(np.median([one for one, _ in rows])), 1),
                "two_processes": round(float(np.median([two for _, two in rows])), 1),
                "ratio": summarise_ratios([two / one for one, two in rows]),
            }
    save_result(
        options.name,
        {
            "cores": options.cores,
            "threads_a_process": 1,
            "resolution": SIZE,
            "batch_a_process": BATCH,
            "steps": options.steps,
            "repeats": options.repeats,
            "images_per_second": found,
        },
        "torch",
        "accelerate",
        "diffusers",
    )
    ratios = [row["ratio"]["median"] for row in found.values()]
    print(f"ratios of images per second: {ratios}, the goal is {GOAL}")
    return int(min(ratios) < GOAL)


if __name__ == "__main__":
    sys.exit(main())
