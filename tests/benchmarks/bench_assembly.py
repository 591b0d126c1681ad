"""How fast triplets are validated and written, against nothing but decoding the same files.

Baseline: one process that decodes each file with OpenCV, the fastest decoder at hand (and, for
comparison, with Pillow). Ours: `assemble_sets` over the same files, with every filter, hashes,
provenance and the near-duplicate search, with one and with two processes.

    python tests/benchmarks/bench_assembly.py [triplets]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from measuring import save_result
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images

from rorem_lib.data.assembly import assemble_sets
from rorem_lib.data.filters import FilterConfig
from rorem_lib.data.triplets import read_triplets
from rorem_lib.data.writer import TripletWriter
from rorem_lib.sources.upstream import UpstreamSource

WIDTH, HEIGHT = 512, 384  # px, what fits into all photographs at hand
REPEATS = 3


def write_raw(folder: Path, count: int) -> None:
    """Triplets cut out of photographs, so that they decode and compress as photographs do."""
    photos = [*load_sample_images().images, data.coffee(), data.astronaut(), data.rocket()]
    rng = np.random.default_rng(0)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.ellipse(mask, (WIDTH // 2, HEIGHT // 2), (90, 60), 20, 0, 360, 255, -1)
    with TripletWriter(folder) as writer:
        for number in range(count):
            photo = photos[number % len(photos)]
            top = rng.integers(0, photo.shape[0] - HEIGHT + 1)
            left = rng.integers(0, photo.shape[1] - WIDTH + 1)
            source = photo[top : top + HEIGHT, left : left + WIDTH]
            source = cv2.flip(source, int(rng.integers(-1, 2)))
            gain = rng.uniform(0.8, 1.1, 3)
            source = np.clip(source * gain + rng.integers(-20, 20), 0, 255).astype(np.uint8)
            # a filmed GT: the same but for the object and the camera's noise
            gt = np.clip(source + rng.normal(0, 1.5, source.shape), 0, 255).astype(np.uint8)
            gt[mask > 0] = cv2.GaussianBlur(gt, (0, 0), 15)[mask > 0] // 2
            writer.add(id=f"{number:06d}", source=source, mask=mask, gt=gt)


def list_files(folder: Path) -> list[Path]:
    return [path for t in read_triplets(folder) for path in (t.source, t.mask, t.gt)]


def decode_cv2(files: list[Path]) -> None:
    cv2.setNumThreads(1)
    for file in files:
        assert cv2.imread(str(file), cv2.IMREAD_UNCHANGED) is not None


def decode_pillow(files: list[Path]) -> None:
    for file in files:
        with Image.open(file) as image:
            image.load()


def time_assembly(raw: Path, out: Path, workers: int) -> float:
    """Seconds from the first finished chunk to the last: without the start of processes."""
    shutil.rmtree(out, ignore_errors=True)
    marks = []
    # Cuts of five photographs look alike; the search itself runs, its answers are not wanted.
    result = assemble_sets(
        UpstreamSource(str(raw)),
        out,
        workers=workers,
        filters=FilterConfig(duplicate_distance=0),
        progress=lambda p: marks.append((time.perf_counter(), p.done)),
    )
    assert not result.reasons.keys() - {"near-duplicate"}, result.reasons
    (first, done), (last, total) = marks[0], marks[-1]
    return (last - first) / (total - done)


def main(count: int = 640) -> None:
    with tempfile.TemporaryDirectory() as folder:
        raw, out = Path(folder) / "raw", Path(folder) / "out"
        write_raw(raw, count)
        files = list_files(raw)
        rows = []
        for _ in range(REPEATS):  # side by side: the machine's mood changes
            row = {}
            for name, decode in (("decode_opencv", decode_cv2), ("decode_pillow", decode_pillow)):
                began = time.perf_counter()
                decode(files)
                row[name] = count / (time.perf_counter() - began)
            row["assemble_1"] = 1 / time_assembly(raw, out, 1)
            row["assemble_2"] = 1 / time_assembly(raw, out, 2)
            rows.append(row)
        rates = {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
        ratios = {
            "one core against OpenCV's decoding": [
                r["assemble_1"] / r["decode_opencv"] for r in rows
            ],
            "one core against Pillow's decoding": [
                r["assemble_1"] / r["decode_pillow"] for r in rows
            ],
            "two cores against one": [r["assemble_2"] / r["assemble_1"] for r in rows],
        }
        save_result(
            "assembly",
            {
                "triplets": count,
                "size": [WIDTH, HEIGHT],
                "format": "PNG of photographs",
                "repeats": REPEATS,
                "triplets_per_second": {k: round(v, 1) for k, v in rates.items()},
                "ratios": {
                    k: {"median": round(float(np.median(v)), 2), "all": [round(x, 2) for x in v]}
                    for k, v in ratios.items()
                },
            },
            "opencv-python-headless",
            "pillow",
            "numpy",
            "imagehash",
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
