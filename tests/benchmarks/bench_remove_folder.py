"""`rorem remove` on a folder with bad files that is killed on the way, and what it costs.

A folder of images with five bad ones (cut short, text, no bytes, its mask missing, a mask of
another shape) is killed (SIGKILL) when about half of it is done, then started again. Counted are
the results, those that were made twice, those that differ from an undisturbed run, the exit code,
and how many of the bad files are named.

Then, undisturbed: seconds per image, against a process for each image as a shell's loop has it; and
the peak of memory with few and with many photographs of 12 megapixels.

    python tests/benchmarks/bench_remove_folder.py [--images 100] [--photos 4 16] [--kills 1]

Fails where the folder is not whole at the end. `make test` does not run it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
from measuring import run_watched, save_result
from PIL import Image

from rorem_lib.builtin.scenes import render_scene

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "rorem_lib.runner.cli", "remove"]
SETTINGS = ["--model", "builtin", "--steps", "4"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
BAD = ("photo 003.png", "photo 021.png", "photo 048.png", "photo 070.png", "photo 099.png")


def write_folder(folder: Path, count: int) -> list[str]:
    """Built-in scenes with their masks, five of them bad; the bad ones' names."""
    photos, masks = folder / "photos", folder / "masks"
    for place in (photos, masks):
        place.mkdir(parents=True)
    for number in range(count):
        scene = render_scene([7, number], role="rord", size=64)
        Image.fromarray(scene.image).save(photos / f"photo {number:03d}.png")
        Image.fromarray(scene.mask).save(masks / f"photo {number:03d}.png")
    bad = [name if (photos / name).exists() else f"photo {n:03d}.png" for n, name in enumerate(BAD)]
    (photos / bad[0]).write_bytes((photos / bad[0]).read_bytes()[:900])
    (photos / bad[1]).write_text("this is no image")
    (photos / bad[2]).write_bytes(b"")
    (masks / bad[3]).unlink()
    Image.new("L", (64, 20), 255).save(masks / bad[4])
    return bad


def write_photos(folder: Path, count: int) -> Path:
    """Photographs as cameras write them: 4000x3000 px, JPEG; one box for all."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        small = rng.integers(0, 255, (30, 40, 3), np.uint8)
        image = cv2.resize(small, (4000, 3000), interpolation=cv2.INTER_CUBIC)
        noise = rng.integers(0, 12, (3000, 4000, 1), np.uint8)
        Image.fromarray(cv2.add(image, np.repeat(noise, 3, 2))).save(folder / f"{number:03d}.jpg")
    return folder


def list_results(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def measure_kills(folder: Path, count: int, kills: int, dice: random.Random) -> dict:
    """The folder killed and started again; the counts of this file's head."""
    bad = write_folder(folder, count)
    words = [*COMMAND, "photos", "--mask", "masks", *SETTINGS, "-o"]
    options = {"cwd": folder, "env": ENVIRONMENT, "capture_output": True, "text": True}
    began = time.monotonic()
    subprocess.run([*words, "undisturbed"], **options)
    seconds = time.monotonic() - began
    expected, out, seen = list_results(folder / "undisturbed"), folder / "killed", []
    for kill in range(kills):
        goal = count * (kill + 1) // (kills + 1) + dice.randint(-2, 2)
        process = subprocess.Popen(
            [*words, out.name],
            cwd=folder,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while len(list(out.glob("*.png"))) < goal and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append(len(list(out.glob("*.png"))))
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    last = subprocess.run([*words, out.name], **options)
    found = list_results(out)
    lines = (out / ".rorem" / "removals.jsonl").read_text().splitlines()
    made = Counter(json.loads(line)["id"] for line in lines)
    again = [n for n, stamp in stamps.items() if (out / n).stat().st_mtime_ns != stamp]
    return {
        "images": count,
        "bad": len(bad),
        "kills": kills,
        "done_when_killed": seen,
        "results": len(found),
        "made_twice": len({*again, *(name for name, times in made.items() if times > 1)}),
        "differing_from_undisturbed": sum(found[n] != expected.get(n) for n in found),
        "exit_code": last.returncode,
        "bad_files_named": sum(name in last.stderr for name in bad),
        "seconds_undisturbed": round(seconds, 1),
    }


def measure_loop(folder: Path, images: int = 3) -> float:
    """Seconds per image of a process for each, as `for f in *.png; do rorem remove ...` has it."""
    began = time.monotonic()
    for number in range(4, 4 + images):
        name = f"photo {number:03d}.png"
        words = [f"photos/{name}", "--mask", f"masks/{name}", *SETTINGS, "-o", "loop"]
        subprocess.run([*COMMAND, *words], cwd=folder, env=ENVIRONMENT, capture_output=True)
    return (time.monotonic() - began) / images


def measure_memory(folder: Path, counts: list[int]) -> dict:
    """Peak memory in MB, and seconds, by how many 12-megapixel photographs a folder has."""
    found = {}
    for count in counts:
        photos = write_photos(folder / f"photos-{count}", count)
        words = [photos, "--box", "1000,900,1400,1300", *SETTINGS, "-o", folder / f"out-{count}"]
        measured = run_watched([*COMMAND, *words], folder / "log.txt", env=ENVIRONMENT)
        found[str(count)] = {k: round(v, 1) for k, v in measured.items()}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--photos", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = measure_kills(
            folder / "a", options.images, options.kills, random.Random(options.seed)
        )
        result["seconds_per_image"] = round(result["seconds_undisturbed"] / options.images, 2)
        result["seconds_per_image_one_process_each"] = round(measure_loop(folder / "a"), 2)
        result["memory_12_megapixels"] = measure_memory(folder, options.photos)
    save_result("remove_folder", result, "torch", "diffusers", "pillow")
    whole = result["results"] == result["images"] - result["bad"] and result["exit_code"] == 1
    sound = not result["made_twice"] and not result["differing_from_undisturbed"]
    return 0 if whole and sound and result["bad_files_named"] == result["bad"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
