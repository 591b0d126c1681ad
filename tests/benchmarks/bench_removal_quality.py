"""What a removal leaves of the image: crops, what of them is kept, seams, detail, memory.

A remover of the demo removes objects of built-in scenes that it has not seen; the simulated
annotator, who knows the truth, says whether they are gone. Every row has its baseline from the same
removals: the whole frame for crops, the removal as it is (`full`) and a hard cut at the mask for
what is kept.

    rorem run demo
    python tests/benchmarks/bench_removal_quality.py --model runs/demo/initialization/remover \
        --scenes runs/demo/assemble [--count 500] [--mosaics 100] [--rows modes mosaics]

mosaics   an object in an image five times the model's side: 5 x 5 scenes, one object removed
modes     `full`, `effect`, `exact` and a hard cut on scenes: success; pixels outside of hole and
          shadow that are the source's; PSNR there; accepted removals that change something there
          by more than a person would pass (`BREAK` Lab units over 2 px of 64)
rims      step of the mean colour across the mask's rim, on photographs (scikit-image's)
detail    fine detail of the filling of a small object in a 4000x3000 image against its surroundings
large     memory and time of a 4000x3000 image against those of a 512x512 one

Writes `results/removal_quality.json`. `--cache` keeps removals, so that compositions are compared
without painting anew.
"""

from __future__ import annotations

import argparse
import gc
import threading
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import psutil
import torch
from measuring import save_result
from skimage import data as photographs

from rorem_lib.builtin.judge import judge_removal
from rorem_lib.builtin.sets import Truth, read_truth
from rorem_lib.data.triplets import load_images, read_triplets
from rorem_lib.models import composition, denoising
from rorem_lib.models.composition import compose
from rorem_lib.models.inpainting import ObjectRemover

ROWS = ("modes", "mosaics", "rims", "detail", "large")
BREAK = 8.0  # Lab units; the judge's own limit for what is wrong on a plain background
SIDE = 5  # scenes a side of a mosaic
PHOTOGRAPHS = ("coffee", "chelsea", "astronaut", "rocket")
LARGE = (3000, 4000)


# ------------------------------------------------------------------------------------ modes


def paint_scenes(remover, triplets, options, folder: Path | None):
    """Yields (triplet, source, mask, removal, round trip) of scenes, whole frames."""
    for begin in range(0, len(triplets), 10):
        part = list(enumerate(triplets))[begin : begin + 10]
        files = [folder / f"{t.id}.npz" if folder else None for _, t in part]
        if folder and all(f.is_file() for f in files):
            for (_, t), f in zip(part, files):
                with np.load(f) as z:
                    yield t, z["source"], z["mask"], z["removal"], z["round_trip"]
            continue
        images = [load_images(t) for _, t in part]
        sources = [x["source"] for x in images]
        masks = [x["mask"] for x in images]
        removals = denoising.paint(
            remover.networks,
            sources,
            masks,
            [i for i, _ in part],
            [t.id for _, t in part],
            num_inference_steps=options.steps,
            guidance_scale=1.0,
            strength=1.0,
            seed=4,
        )
        trips = denoising.round_trip(remover.networks, sources)
        for (_, t), f, *made in zip(part, files, sources, masks, removals, trips):
            if f:
                f.parent.mkdir(parents=True, exist_ok=True)
                np.savez(f, **dict(zip(("source", "mask", "removal", "round_trip"), made)))
            yield t, *made


def cut_hard(source, removal, mask):
    return np.where(mask[..., None] >= 128, removal, source)


def find_rest(mask, truth: Truth):
    """Where [H, W] nothing was to change: outside of hole, object and shadow."""
    return ~((mask >= 128) | (truth.object > 8) | (truth.shadow > 10))


def measure_rest(source, image, rest) -> dict:
    """How much of the rest is the source's, its PSNR, and its largest local change in Lab units."""
    same = (image == source).all(axis=2)[rest].mean()
    error = np.square(image[rest].astype(float) - source[rest]).mean()
    lab = [cv2.cvtColor(x.astype(np.float32) / 255, cv2.COLOR_RGB2LAB) for x in (source, image)]
    change = (lab[1] - lab[0]) * rest[..., None]
    local = cv2.GaussianBlur(change, (0, 0), 2.0 * source.shape[0] / 64)
    return {
        "same": float(same),
        "psnr": min(60.0, float(10 * np.log10(255**2 / max(error, 1e-9)))),
        "largest": float(np.linalg.norm(local, axis=2)[rest].max()),
    }


def measure_modes(remover, triplets, hidden: Path, options) -> dict:
    ways = {
        "full": lambda *made: compose(*made, "full")[0],
        "effect": lambda *made: compose(*made, "effect")[0],
        "exact": lambda *made: compose(*made, "exact")[0],
        "hard_cut": lambda source, removal, _, mask: cut_hard(source, removal, mask),
    }
    found = {name: [] for name in ways}
    for triplet, source, mask, removal, trip in paint_scenes(
        remover, triplets, options, options.cache
    ):
        truth = read_truth(hidden, triplet.id)
        rest = find_rest(mask, truth)
        for name, way in ways.items():
            image = way(source, removal, trip, mask)
            verdict = judge_removal(source, mask, image, truth)
            found[name].append((verdict, measure_rest(source, image, rest)))
    rows = {}
    for name, cases in found.items():
        accepted = [rest for verdict, rest in cases if verdict.accept]
        rows[name] = {
            "success": np.mean([verdict.accept for verdict, _ in cases]),
            "rest_bit_equal": np.mean([rest["same"] for _, rest in cases]),
            "rest_psnr": np.mean([rest["psnr"] for _, rest in cases]),
            "accepted": len(accepted),
            "accepted_that_break_the_rest": sum(r["largest"] > BREAK for r in accepted),
            "failures": dict(Counter(v.reason for v, _ in cases if not v.accept).most_common()),
        }
    return rows


# ---------------------------------------------------------------------------------- mosaics


def make_mosaic(images, target: int, rng, rows: int = SIDE, columns: int = SIDE):
    """An image of rows x columns scenes with the target's mask, and the target's place (y, x)."""
    side = images[0]["source"].shape[0]
    chosen = rng.choice(len(images), (rows, columns))
    y, x = int(rng.integers(rows)), int(rng.integers(columns))
    chosen[y, x] = target
    image = np.concatenate(
        [np.concatenate([images[i]["source"] for i in line], axis=1) for line in chosen]
    )
    mask = np.zeros(image.shape[:2], np.uint8)
    place = (slice(y * side, (y + 1) * side), slice(x * side, (x + 1) * side))
    mask[place] = images[target]["mask"]
    return image, mask, place


def measure_mosaics(remover, triplets, hidden: Path, options) -> dict:
    """Success on the same objects: in a mosaic by crops, in the shrunk mosaic, each scene alone."""
    triplets = triplets[: options.mosaics]
    images = [load_images(t) for t in triplets]
    rng = np.random.default_rng(7)
    ways = {"crop": {}, "whole": {"crop": False, "mode": "full"}}
    accepted = {name: [] for name in (*ways, "alone")}
    for begin in range(0, len(triplets), 10):
        part = range(begin, min(begin + 10, len(triplets)))
        mosaics = [make_mosaic(images, i, rng) for i in part]
        shared = {"num_inference_steps": options.steps, "seed": 4, "numbers": list(part)}
        results = {
            name: remover([m[0] for m in mosaics], [m[1] for m in mosaics], **shared, **way)
            for name, way in ways.items()
        }
        alone = remover(
            [images[i]["source"] for i in part], [images[i]["mask"] for i in part], **shared
        )
        for k, i in enumerate(part):
            truth = read_truth(hidden, triplets[i].id)
            parts = {name: made[k][mosaics[k][2]] for name, made in results.items()}
            for name, image in (*parts.items(), ("alone", alone[k])):
                verdict = judge_removal(images[i]["source"], images[i]["mask"], image, truth)
                accepted[name].append(verdict.accept)
    return {"objects": len(triplets), **{name: np.mean(x) for name, x in accepted.items()}}


# ------------------------------------------------------------------------------------- rims


def draw_blobs(shape, rng, count: int = 6) -> list[np.ndarray]:
    """Masks [H, W] of blobs as a hand would draw them, 8 to 20% of the short side."""
    masks = []
    for _ in range(count):
        radius = rng.uniform(0.08, 0.2) / 2 * min(shape)
        mask = np.zeros(shape, np.uint8)
        centre = [int(rng.uniform(2 * radius, side - 2 * radius)) for side in shape[::-1]]
        for _ in range(4):
            shift = rng.uniform(-radius / 2, radius / 2, 2)
            middle = tuple(int(v) for v in centre + shift)
            axes = tuple(int(radius * v) for v in rng.uniform(0.5, 1, 2))
            cv2.ellipse(mask, middle, axes, rng.uniform(0, 180), 0, 360, 255, -1)
        masks.append(mask)
    return masks


def measure_step(image, mask, width: int = 3) -> tuple[float, float]:
    """The step of the mean colour from a ring of `width` px inside the rim to one outside, grey
    levels: all around, and the mean over 16 sectors of their own steps."""
    inside = (mask >= 128).astype(np.uint8)
    depth = cv2.distanceTransform(inside, cv2.DIST_L2, 5)
    height = cv2.distanceTransform(1 - inside, cv2.DIST_L2, 5)
    rings = [(0 < depth) & (depth <= width), (0 < height) & (height <= width)]
    ys, xs = np.nonzero(inside)
    y, x = np.indices(mask.shape)
    sector = ((np.arctan2(y - ys.mean(), x - xs.mean()) / np.pi + 1) * 8).astype(int) % 16
    colours = image.astype(float)
    whole = np.abs(colours[rings[0]].mean(axis=0) - colours[rings[1]].mean(axis=0)).mean()
    steps = []
    for k in range(16):
        a, b = (ring & (sector == k) for ring in rings)
        if a.any() and b.any():
            steps.append(np.abs(colours[a].mean(axis=0) - colours[b].mean(axis=0)).mean())
    return float(whole), float(np.mean(steps))


def measure_rims(remover, options) -> dict:
    """On photographs: by this remover, and by Telea's filling through the autoencoder, discoloured.

    The second one is what a better model makes of a photograph it is not at home in: a filling that
    fits, a little blurred, all of it 12 grey levels off.
    """
    rng = np.random.default_rng(5)
    steps: dict[str, list] = {}
    outside = []
    for name in PHOTOGRAPHS:
        photo = np.ascontiguousarray(getattr(photographs, name)()[..., :3])
        for mask in draw_blobs(photo.shape[:2], rng):
            steps.setdefault("photo_untouched", []).append(measure_step(photo, mask))
            for mode in ("exact", "effect"):
                image = remover(photo, mask, mode=mode, num_inference_steps=options.steps)
                steps.setdefault(f"remover_{mode}", []).append(measure_step(image, mask))
            trip = denoising.round_trip(remover.networks, [cut_to_unit(photo, remover)])[0]
            part = photo[: trip.shape[0], : trip.shape[1]]
            hole = np.ascontiguousarray(mask[: trip.shape[0], : trip.shape[1]])
            filled = cv2.inpaint(trip, hole, 5, cv2.INPAINT_TELEA).astype(int)
            removal = np.clip(filled + (12, -8, 12), 0, 255).astype(np.uint8)
            for mode in ("exact", "effect"):
                image, effect = compose(part, removal, trip, hole, mode)
                steps.setdefault(f"telea_{mode}", []).append(measure_step(image, hole))
                if mode == "effect":
                    outside.append((effect[hole == 0] > 0).mean())
            hard = cut_hard(part, removal, hole)
            steps.setdefault("telea_hard_cut", []).append(measure_step(hard, hole))
    rows = {
        name: dict(zip(("around", "by_sector"), np.mean(cases, axis=0)))
        for name, cases in steps.items()
    }
    return rows | {"telea_effect_share_changed_outside": np.mean(outside)}


def cut_to_unit(image, remover):
    unit = remover.networks.unit
    height, width = (side // unit * unit for side in image.shape[:2])
    return np.ascontiguousarray(image[:height, :width])


# ----------------------------------------------------------------------------------- detail


def make_large(images, target: int, seed: int):
    """A 4000x3000 image of scenes side by side, the target's mask, and the target's place."""
    side = images[0]["source"].shape[0]
    rng = np.random.default_rng(seed)
    rows, columns = LARGE[0] // side, LARGE[1] // side
    image, mask, place = make_mosaic(images, target, rng, rows, columns)
    border = [(0, LARGE[0] - image.shape[0]), (0, LARGE[1] - image.shape[1])]
    return np.pad(image, (*border, (0, 0)), mode="edge"), np.pad(mask, border), place


def measure_detail(image, hole, ring) -> tuple[float, float]:
    """Rms of the fine detail (a high-pass of L, sigma 1.5 px) in a filling and around it."""
    light = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[..., 0]
    fine = np.square(light - cv2.GaussianBlur(light, (0, 0), 1.5))
    return float(np.sqrt(fine[hole].mean())), float(np.sqrt(fine[ring].mean()))


def measure_details(remover, triplets, options) -> dict:
    """Medians over objects on backgrounds that have detail; `truth` is what there is to reach."""
    hidden = options.hidden
    images = [load_images(t) for t in triplets[:60]]
    ratios: dict[str, list[float]] = {"crop": [], "whole": [], "truth": []}
    for target in range(60):
        truth = read_truth(hidden, triplets[target].id)
        mask = images[target]["mask"]
        hole = cv2.erode(mask, np.ones((3, 3), np.uint8), iterations=2) >= 128
        wide = cv2.dilate(mask, np.ones((3, 3), np.uint8), iterations=8) >= 128
        near = cv2.dilate(mask, np.ones((3, 3), np.uint8), iterations=2) >= 128
        ring = wide & ~near & (truth.shadow <= 10) & (truth.object <= 8)
        if hole.sum() < 30 or ring.sum() < 60:
            continue
        inner, outer = measure_detail(truth.truth, hole, ring)
        if outer < 1 or not 0.67 < inner / outer < 1.5:
            continue  # nothing to see around it, or an edge in only one of the two
        ratios["truth"].append(inner / outer)
        image, whole_mask, place = make_large(images, target, target)
        for name, way in (("crop", {}), ("whole", {"crop": False, "mode": "full"})):
            made = remover(image, whole_mask, num_inference_steps=options.steps, seed=4, **way)
            inner, outer = measure_detail(made[place], hole, ring)
            ratios[name].append(inner / outer)
        if len(ratios["crop"]) == options.details:
            break
    return {"objects": len(ratios["crop"])} | {
        name: {"median": np.median(x), "quartiles": list(np.percentile(x, (25, 75)))}
        for name, x in ratios.items()
    }


# ------------------------------------------------------------------------------------ large


class PeakMemory:
    """The most resident memory of this process above where it began, in 10^6 bytes."""

    def __enter__(self):
        gc.collect()
        self.process = psutil.Process()
        self.began = self.peak = self.process.memory_info().rss
        self.running = True
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self):
        while self.running:
            self.peak = max(self.peak, self.process.memory_info().rss)
            time.sleep(0.002)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()
        self.megabytes = (self.peak - self.began) / 1e6


def measure_large(remover, options) -> dict:
    """A 4000x3000 image and a 512x512 one, with one small object each."""
    rng = np.random.default_rng(0)
    rows = {}
    for name, (height, width) in (("small", (512, 512)), ("large", LARGE)):
        noise = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        image = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        mask = np.zeros((height, width), np.uint8)
        middle = (width // 2, height // 2)
        cv2.circle(mask, middle, 10, 255, -1)
        seconds = []
        for turn in range(4):
            with PeakMemory() as memory:
                began = time.monotonic()
                remover.remove(image, mask, num_inference_steps=options.steps)
                seconds.append(time.monotonic() - began)
            if turn == 0:
                first = memory.megabytes
        rows[name] = {"memory_mb": max(first, memory.megabytes), "seconds": min(seconds[1:])}
    rows["time_ratio"] = rows["large"]["seconds"] / rows["small"]["seconds"]
    return rows


# ------------------------------------------------------------------------------------- main


def shorten(value):
    if isinstance(value, dict):
        return {key: shorten(x) for key, x in value.items()}
    if isinstance(value, list):
        return [shorten(x) for x in value]
    return round(float(value), 4) if isinstance(value, (float, np.floating)) else value


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="the remover: a folder, or builtin")
    parser.add_argument("--scenes", required=True, type=Path, help="the demo's folder assemble")
    parser.add_argument("--count", type=int, default=500, help="scenes for the row modes")
    parser.add_argument("--mosaics", type=int, default=100)
    parser.add_argument("--details", type=int, default=12, help="objects for the row detail")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--cache", type=Path, help="keeps removals; one folder a model")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    remover = ObjectRemover.from_pretrained(options.model, device="cpu")
    triplets = read_triplets([options.scenes / "test" / "meta.json"], require_gt=False)
    triplets = triplets[: options.count]
    options.hidden = options.scenes / "hidden" / "test"
    measure = {
        "large": lambda: measure_large(remover, options),
        "modes": lambda: measure_modes(remover, triplets, options.hidden, options),
        "mosaics": lambda: measure_mosaics(remover, triplets, options.hidden, options),
        "rims": lambda: measure_rims(remover, options),
        "detail": lambda: measure_details(remover, triplets, options),
    }
    rows = {name: shorten(measure[name]()) for name in measure if name in options.rows}
    result = {
        "model": "/".join(Path(options.model).parts[-3:]),
        "scenes": len(triplets),
        "steps": options.steps,
        "limits": {k: v for k, v in vars(composition.LIMITS).items()},
        "rows": rows,
    }
    save_result("removal_quality", result, "torch", "diffusers", "opencv-python-headless")


if __name__ == "__main__":
    main()
