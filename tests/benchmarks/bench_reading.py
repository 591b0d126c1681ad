"""How fast training batches are read, against the way that the authors' trainer reads them.

Baseline: `datasets` with Image columns, opened by Pillow in the training process, each image and
the mask converted to RGB and resized to the training size, normalised in float32. Ours:
`batches.read_batches` on the same files, normalised the same way. The tensors of every batch are
compared: equal images, and equal masks after the trainer's threshold of one half.

    python tests/benchmarks/bench_reading.py [triplets]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bench_assembly import REPEATS, write_raw
from datasets import Dataset, Image
from measuring import save_result

from rorem_lib.data.pictures import load_image
from rorem_lib.data.triplets import load_images, read_triplets
from rorem_lib.models import sdxl
from rorem_lib.training.latent_cache import read_batches
from rorem_lib.workers import group_chunks

SIZE, BATCH = 512, 16


def write_jpeg(folder: Path) -> None:
    """The same set with JPEG images, as RORD and OpenImages have them."""
    import PIL.Image

    for path in [*folder.glob("source/*.png"), *folder.glob("GT/*.png")]:
        PIL.Image.fromarray(load_image(path)).save(path.with_suffix(".jpg"), quality=92)
        path.unlink()
    meta = folder / "meta.json"
    text = meta.read_text()
    for part in ("source", "GT"):
        for path in folder.glob(f"{part}/*.jpg"):
            text = text.replace(f"{part}/{path.stem}.png", f"{part}/{path.name}")
    meta.write_text(text)


def read_as_upstream(triplets):
    """Batches of (images [B, 6, S, S] -1..1, mask [B, 1, S, S] 0..1), float32."""
    rows = {
        "source": [str(t.source) for t in triplets],
        "gt": [str(t.gt) for t in triplets],
        "mask": [str(t.mask) for t in triplets],
    }
    data = Dataset.from_dict(rows)
    for name in rows:
        data = data.cast_column(name, Image())

    def prepare(batch):
        def open_all(name):
            return [
                np.array(image.convert("RGB").resize((SIZE, SIZE))).transpose(2, 0, 1)
                for image in batch[name]
            ]

        pictures = torch.tensor(
            np.concatenate([np.stack(open_all("source")), np.stack(open_all("gt"))], axis=1)
        )
        mask = torch.tensor(np.stack([x[:1] for x in open_all("mask")]))
        return {"pictures": list(2 * (pictures / 255) - 1), "mask": list(mask / 255)}

    loader = torch.utils.data.DataLoader(data.with_transform(prepare), batch_size=BATCH)
    for batch in loader:
        yield batch["pictures"], batch["mask"]


def read_as_here(triplets):
    """Batches of (source and GT [B, 3, S, S] -1..1, mask [B, 1, S, S] 0..1), float32."""
    load = partial(load_images, size=SIZE)
    for batch in read_batches(load, group_chunks(triplets, BATCH)):
        pictures = [sdxl.to_tensor(batch[part]) for part in ("source", "gt")]
        yield pictures, torch.from_numpy(batch["mask"])[:, None].float().div_(255)


def time_reading(read, triplets) -> float:
    """Triplets a second, the first batch (imports, caches) left out."""
    reader = read(triplets)
    next(reader)
    began = time.perf_counter()
    count = sum(len(mask) for _, mask in reader)
    return count / (time.perf_counter() - began)


def main(count: int = 320) -> None:
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        write_raw(raw, count)
        for kind in ("PNG", "JPEG"):
            if kind == "JPEG":
                write_jpeg(raw)
            triplets = read_triplets(raw)
            for (theirs, mask), (ours, hole) in zip(
                read_as_upstream(triplets[: 3 * BATCH]), read_as_here(triplets[: 3 * BATCH])
            ):
                # one divides by 255 and doubles, the other divides by 127.5
                assert torch.allclose(theirs, torch.cat(ours, 1), atol=2e-7, rtol=0)
                assert torch.equal(mask >= 0.5, hole >= 0.5), "the masks differ"
            rows = [
                (time_reading(read_as_upstream, triplets), time_reading(read_as_here, triplets))
                for _ in range(REPEATS)
            ]
            ratios = [ours / theirs for theirs, ours in rows]
            found[kind] = {
                "upstream": round(float(np.median([r[0] for r in rows])), 1),
                "read_batches": round(float(np.median([r[1] for r in rows])), 1),
                "ratio": {
                    "median": round(float(np.median(ratios)), 2),
                    "all": [round(r, 2) for r in ratios],
                },
            }
    save_result(
        "reading",
        {
            "triplets": count,
            "size": SIZE,
            "batch": BATCH,
            "threads": os.cpu_count(),
            "triplets_per_second": found,
        },
        "torch",
        "datasets",
        "pillow",
        "opencv-python-headless",
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
