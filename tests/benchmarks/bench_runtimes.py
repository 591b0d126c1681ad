"""How fast a removal in 4 steps is on one thread of a processor: PyTorch, onnxruntime, OpenVINO.

Baseline: the stock pipeline on the same images at equal steps, called as a model's card says. All
take turns image by image, so that what else the machine does hits all alike; seconds of the
processor are counted beside those of the clock. Then whether OpenVINO's removals are as good: the
success on test scenes by the simulated annotator.

    python tests/benchmarks/bench_runtimes.py REMOVER ASSEMBLED [--scenes 500] [--busy]

REMOVER is a trained model's folder, ASSEMBLED a folder of stage 01 with `test/` and `hidden/test/`.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch

import argparse  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoPipelineForInpainting  # noqa: E402
from measuring import require_idle, save_result  # noqa: E402
from PIL import Image  # noqa: E402

from rorem_lib.builtin.judge import judge_removal  # noqa: E402
from rorem_lib.builtin.sets import read_truth  # noqa: E402
from rorem_lib.data.triplets import load_images, read_triplets  # noqa: E402
from rorem_lib.models import sdxl  # noqa: E402
from rorem_lib.models.export import export_model  # noqa: E402
from rorem_lib.models.inpainting import ObjectRemover  # noqa: E402

STEPS = 4
WHOLE = {"mode": "full", "crop": False, "num_inference_steps": STEPS}


def open_methods(model: str, folder: Path) -> dict:
    """name -> (image, mask) -> removal, arrays."""
    with sdxl.silence_libraries():
        stock = AutoPipelineForInpainting.from_pretrained(sdxl.resolve_model(model))
    stock.set_progress_bar_config(disable=True)
    size = sdxl.get_resolution(stock)

    def remove_stock(image, mask):
        return np.array(
            stock(
                prompt="",
                image=Image.fromarray(image),
                mask_image=Image.fromarray(mask),
                height=size,
                width=size,
                num_inference_steps=STEPS,
                strength=1.0,
                guidance_scale=1.0,
            ).images[0]
        )

    def open_remover(runtime):
        remover = ObjectRemover.from_pretrained(
            model if runtime == "torch" else str(folder), runtime=runtime, device="cpu"
        )
        return lambda image, mask: remover(image, mask, **WHOLE)

    return {"stock": remove_stock} | {
        runtime: open_remover(runtime) for runtime in ("torch", "onnx", "openvino")
    }


def time_methods(methods: dict, scenes: list, rounds: int) -> dict:
    """Median milliseconds a removal of each method, by the clock and of the processor."""
    seconds = {name: [] for name in methods}
    for number in range(-1, rounds):  # the first round is not counted
        image, mask = scenes[number % len(scenes)]
        for name, method in methods.items():
            clock, processor = time.perf_counter(), time.process_time()
            method(image, mask)
            if number >= 0:
                seconds[name].append((time.perf_counter() - clock, time.process_time() - processor))
    medians = {name: np.median(found, axis=0) * 1e3 for name, found in seconds.items()}
    least = {name: np.min(found, axis=0) * 1e3 for name, found in seconds.items()}
    result = {}
    for name in methods:
        ratios = np.array(seconds["stock"]) / np.array(seconds[name])
        result[name] = {
            "milliseconds": round(float(medians[name][0]), 1),
            "processor_milliseconds": round(float(medians[name][1]), 1),
            "least_milliseconds": round(float(least[name][0]), 1),
            "times_as_fast": round(float(np.median(ratios[:, 0])), 2),
            "times_as_fast_processor": round(float(np.median(ratios[:, 1])), 2),
        }
    return result


def count_success(method, triplets, hidden: Path) -> list[bool]:
    """Whether the simulated annotator takes each triplet's removal."""
    found = []
    for triplet in triplets:
        images = load_images(triplet)
        removed = method(images["source"], images["mask"])
        truth = read_truth(hidden, triplet.id)
        found.append(judge_removal(images["source"], images["mask"], removed, truth).accept)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("remover")
    parser.add_argument("assembled", type=Path)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--busy", action="store_true", help="measure beside other programs")
    options = parser.parse_args()
    if not options.busy:
        require_idle()
    torch.set_num_threads(1)
    path = options.assembled / "test" / "meta.json"
    triplets = read_triplets(path, require_gt=False)[: options.scenes]
    scenes = [(i["source"], i["mask"]) for i in map(load_images, triplets[:20])]
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        export_model(options.remover, Path(folder) / "export", progress=print)
        seconds = time.process_time() - began
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
        methods = open_methods(options.remover, Path(folder) / "export")
        speed = time_methods(methods, scenes, options.rounds)
        hidden = options.assembled / "hidden" / "test"
        good = {n: count_success(methods[n], triplets, hidden) for n in ("torch", "openvino")}
    success = {name: round(100 * float(np.mean(found)), 1) for name, found in good.items()}
    result = {
        "what": f"one removal of {scenes[0][0].shape[1]} px in {STEPS} steps, one thread",
        "busy": options.busy,
        "export": {"processor_seconds": round(seconds), "megabytes": round(size / 1e6, 1)},
        "speed": speed,
        "success": success
        | {
            "scenes": len(triplets),
            "judged_alike": int(np.sum(np.equal(good["torch"], good["openvino"]))),
            "points_apart": round(abs(success["torch"] - success["openvino"]), 1),
        },
        "wanted": {"onnx": 2, "openvino": 4, "torch": 1.3, "points_apart": 1},
    }
    save_result("runtimes", result, "torch", "diffusers", "onnxruntime", "openvino")


if __name__ == "__main__":
    main()
