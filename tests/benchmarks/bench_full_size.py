"""SDXL-inpainting at full size, with random weights: a folder opened, an object removed on a CPU.

    python tests/benchmarks/bench_full_size.py --folder /data/random_sdxl

The folder is written if it is not there (7 GB in fp16, a minute) and stays. Its UNet and VAE are
SDXL-inpainting's, so memory and time are too; what it paints is noise. The image has 12 megapixels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from measuring import save_result
from random_training import UNET, VAE, check_architecture

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def write_model(folder: Path) -> None:
    """A pipeline folder in fp16 whose networks are SDXL's: random weights, its usual spread."""
    from diffusers import AutoencoderKL, StableDiffusionXLInpaintPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from rorem_lib.models import sdxl

    small, parts = sdxl.load_pipeline("builtin"), {}
    vocabulary = small.text_encoder.config.vocab_size
    for name, cls, width, layers, heads, act in (
        ("text_encoder", CLIPTextModel, 768, 12, 12, "quick_gelu"),
        ("text_encoder_2", CLIPTextModelWithProjection, 1280, 32, 20, "gelu"),
    ):
        config = CLIPTextConfig(
            vocab_size=max(49408, vocabulary), hidden_size=width, intermediate_size=4 * width,
            num_hidden_layers=layers, num_attention_heads=heads, projection_dim=width,
            hidden_act=act, bos_token_id=small.text_encoder.config.bos_token_id,
            eos_token_id=small.text_encoder.config.eos_token_id,
        )  # fmt: skip
        parts[name] = _fill(cls, config)
    parts["unet"] = _fill(UNet2DConditionModel, **UNET)
    parts["vae"] = _fill(AutoencoderKL, **VAE)
    pipe = StableDiffusionXLInpaintPipeline(**small.components | parts)
    pipe.save_pretrained(folder)


def _fill(cls, *arguments, **options):
    """A module in fp16 of normal weights with the spread of PyTorch's own, made without float32."""
    with torch.device("meta"):
        module = cls(*arguments, **options)
    module = module.to(torch.float16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, values in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith("position_ids"):
            values.data.copy_(torch.arange(values.numel()).view_as(values))
        elif values.dim() < 2:
            values.data.fill_(float("norm" in name and name.endswith("weight")))
        else:
            fan = values[0].numel()
            values.data.normal_(0, (1 / (3 * fan)) ** 0.5, generator=generator)
    return module.eval()


def make_photo() -> tuple[np.ndarray, np.ndarray]:
    """A 4000x3000 image of soft noise, and the mask of an object of 600 px in it."""
    import cv2

    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (30, 40, 3), np.uint8), (4000, 3000))
    mask = np.zeros((3000, 4000), np.uint8)
    mask[1200:1800, 1700:2300] = 255
    return image, mask


def measure(folder: Path, dtype: str, steps: int, resolution: int) -> dict:
    """What one process needs to open the model and to remove an object twice."""
    from rorem_lib.models.inpainting import ObjectRemover

    process, peak, stop = psutil.Process(), [0], threading.Event()

    def watch():
        while not stop.wait(0.05):
            peak[0] = max(peak[0], process.memory_info().rss)

    threading.Thread(target=watch, daemon=True).start()
    image, mask = make_photo()
    before, began = process.memory_info().rss, time.monotonic()
    remover = ObjectRemover.from_pretrained(str(folder), device="cpu", dtype=dtype)
    opened = time.monotonic() - began
    loaded, while_opening, peak[0] = process.memory_full_info(), peak[0], 0
    seconds = []
    for _ in range(2):
        began = time.monotonic()
        removal = remover.remove(image, mask, num_inference_steps=steps, resolution=resolution)
        seconds.append(round(time.monotonic() - began, 1))
    stop.set()
    outside = removal.effect == 0
    return {
        "dtype": dtype,
        "resolution": resolution,
        "steps": steps,
        "seconds_to_open": round(opened, 1),
        "opened_gb": round((loaded.rss - before) / 1e9, 2),
        "opened_anonymous_gb": round(_read_anonymous() / 1e9, 2),
        "peak_while_opening_gb": round((while_opening - before) / 1e9, 2),
        "peak_while_removing_gb": round((peak[0] - before) / 1e9, 2),
        "seconds_first_and_second": seconds,
        "outside_equal": bool((np.asarray(removal.image)[outside] == image[outside]).all()),
        "threads": torch.get_num_threads(),
    }


def _read_anonymous() -> int:
    """This process's memory that no file backs, in bytes."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the model is or goes")
    parser.add_argument("--dtypes", nargs="+", default=["no", "fp16"])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    check_architecture()
    if options.one:
        print(json.dumps(measure(options.folder, options.one, options.steps, options.resolution)))
        return
    if not (options.folder / "model_index.json").is_file():
        write_model(options.folder)
    rows = []
    for dtype in options.dtypes:
        words = [sys.executable, *sys.argv, "--one", dtype]
        done = subprocess.run(words, text=True, capture_output=True, env=os.environ, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    save_result("full_size", {"rows": rows}, "torch", "diffusers")


if __name__ == "__main__":
    main()
