"""How fast one removal is: `ObjectRemover(mode="full")` against the stock pipeline at equal steps.

    python tests/benchmarks/bench_removal_speed.py            # the miniature, one thread
    python tests/benchmarks/bench_removal_speed.py --gpu      # SDXL's sizes, random weights

Both make the same removals of one image in 4 steps, in turns, decoding included; the figure is the
median, on a CPU of the processor's time. Beside it: whether they are equal bit for bit, and how
many weights were cast. On a CPU the stock pipeline is given the text embedding (`stock`), or called
as a model's card says, with the empty prompt (`card`); on a GPU both compute in bf16, at 512 and
1024 px. Writes `results/removal_speed.json` (`removal_speed_gpu.json`).
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import time

import numpy as np
import torch
from measuring import save_result
from PIL import Image

from rorem_lib.models import denoising, presets, sdxl
from rorem_lib.models.attention import compile_unet
from rorem_lib.models.inpainting import ObjectRemover

STEPS = 4
GOALS = {"cpu": 1.3, 512: 60, 1024: 200}  # times as fast; ms on an H100


class CountCasts(torch.utils._python_dispatch.TorchDispatchMode):
    """How many weights a block casts to another type."""

    def __init__(self, *parts):
        super().__init__()
        self.weights = {p.data_ptr() for part in parts for p in part.parameters()}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        cast = func is torch.ops.aten._to_copy.default
        self.count += bool(cast and args[0].data_ptr() in self.weights)
        return func(*args, **kwargs or {})


def draw(side: int) -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    mask = np.zeros((side, side), np.uint8)
    mask[side // 3 : side // 2, side // 3 : side // 2] = 255
    return image, mask


def make_stock(pipe, side: int, prompt: dict):
    image, mask = draw(side)

    def stock() -> np.ndarray:
        removed = pipe(
            **prompt,
            image=Image.fromarray(image),
            mask_image=Image.fromarray(mask),
            height=side,
            width=side,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            strength=1.0,
            generator=denoising.make_generator(0, 0),
        )
        return np.asarray(removed.images[0])

    return stock


def make_ours(remover, side: int):
    image, mask = draw(side)
    options = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "strength": 1.0}
    return lambda: remover(image, mask, mode="full", crop=False, resolution=side, **options)


def measure(calls: dict, *, repeats: int, gpu: bool = False) -> dict[str, float]:
    """Median seconds of each call, made in turns after two that are not timed: of the wall clock
    on a GPU, of the processor on a CPU, where other processes would be measured too."""
    clock = time.perf_counter if gpu else time.process_time
    seconds = {name: [] for name in calls}
    for turn in range(repeats + 2):
        for name, call in calls.items():
            began = clock()
            call()
            if gpu:
                torch.cuda.synchronize()
            if turn >= 2:
                seconds[name].append(clock() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def run_cpu(repeats: int) -> dict:
    torch.set_num_threads(1)
    stock = sdxl.load_pipeline("builtin")
    presets.set_scheduler(stock, "lcm")
    remover = ObjectRemover.from_pretrained("builtin", device="cpu", dtype="no")
    presets.set_scheduler(remover.pipe, "lcm")
    recorded = ObjectRemover.from_pretrained("builtin", device="cpu", dtype="no", compile=True)
    presets.set_scheduler(recorded.pipe, "lcm")
    embeds, pooled = sdxl.encode_prompt(stock)
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    calls = {
        "ours": make_ours(remover, 64),
        "ours, compile=True": make_ours(recorded, 64),
        "stock": make_stock(stock, 64, given),
        "card": make_stock(stock, 64, {"prompt": ""}),
    }
    with CountCasts(remover.pipe.unet, remover.pipe.vae) as casts:
        calls["ours"]()
    seconds = measure(calls, repeats=repeats)
    expected = calls["stock"]()
    equal = {name: bool((calls[name]() == expected).all()) for name in calls}
    unet = measure({"unet": make_unet_call(remover)}, repeats=4 * repeats)["unet"]
    return {
        "ms": {name: round(1e3 * value, 2) for name, value in seconds.items()},
        "ms_of_four_unet_calls": round(4e3 * unet, 2),
        "times_as_fast_as_stock": {
            name: round(seconds["stock"] / seconds[name], 3) for name in calls if "ours" in name
        },
        "times_as_fast_as_the_card": {
            name: round(seconds["card"] / seconds[name], 3) for name in calls if "ours" in name
        },
        "bit_equal": equal,
        "weights_cast": casts.count,
        "goal": GOALS["cpu"],
    }


def make_unet_call(remover):
    networks = remover.networks
    given = (
        torch.randn(1, 9, 16, 16),
        torch.tensor(500),
        networks.embeds,
        networks.pooled,
        sdxl.make_time_ids(64, 64),
    )

    def call():
        with torch.no_grad():
            networks.predict(*given)

    return call


def run_gpu(repeats: int, *, compile_blocks: bool) -> dict:
    """SDXL's networks with random weights in bf16: the time does not depend on what they hold."""
    from random_training import make_pipeline

    pipe = make_pipeline(sdxl.load_pipeline("builtin"), "cuda")
    pipe.unet.to(torch.bfloat16)
    pipe.vae.to(torch.bfloat16)
    return compare(pipe, (512, 1024), repeats, compile_blocks=compile_blocks)


def compare(pipe, sides, repeats: int, *, compile_blocks: bool) -> dict:
    """Ours against the stock pipeline with one and the same `pipe`, by the side of the image."""
    gpu = pipe.unet.device.type == "cuda"
    presets.set_scheduler(pipe, "lcm")
    pipe.set_progress_bar_config(disable=True)
    remover, found = ObjectRemover(pipe), {}
    prompt = [tensor.to(pipe.unet.dtype) for tensor in sdxl.encode_prompt(pipe)]
    given = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), prompt))
    pipe.text_encoder_2.to(pipe.unet.dtype)  # the stock pipeline computes in this one's type
    for side in sides:
        calls = {"ours": make_ours(remover, side), "stock": make_stock(pipe, side, given)}
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = measure(calls, repeats=repeats, gpu=gpu)
        with CountCasts(pipe.unet, pipe.vae) as casts:
            calls["ours"]()
        found[str(side)] = {
            "ms": {name: round(1e3 * value, 1) for name, value in seconds.items()},
            "weights_cast": casts.count,
            "goal_ms": GOALS.get(side),
        }
        if gpu:
            found[str(side)]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if compile_blocks:
        compile_unet(pipe.unet)
        for side in sides:
            calls = {"ours": make_ours(remover, side)}
            seconds = measure(calls, repeats=repeats, gpu=gpu)
            found[str(side)]["ms"]["ours, compile=True"] = round(1e3 * seconds["ours"], 1)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="SDXL's sizes on a CUDA GPU")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled UNet out")
    options = parser.parse_args(arguments)
    if not options.gpu:
        result = run_cpu(options.repeats)
        name = "removal_speed"
    elif torch.cuda.is_available():
        result = run_gpu(options.repeats, compile_blocks=not options.no_compile)
        result["gpu"] = torch.cuda.get_device_name()
        name = "removal_speed_gpu"
    else:
        parser.error("--gpu needs a CUDA GPU, and there is none here")
    save_result(name, result, "torch", "diffusers")


if __name__ == "__main__":
    main()
