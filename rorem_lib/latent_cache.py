"""VAE latents computed once, read many times.

A training step needs the latents of GT and of the masked source; the VAE is frozen, so they never
change. Each triplet set has one cache folder, named by a hash of the VAE's weights, the size, the
preprocessing and the content of every file: a stale cache cannot be read, since its name differs.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from rorem_lib import sdxl
from rorem_lib.batches import read_batches
from rorem_lib.files import hash_file, write_json
from rorem_lib.triplets import Triplet

logger = logging.getLogger(__name__)

VERSION = 1  # raise it when preprocessing changes
NAMES = ("gt", "masked", "source")


def cache_root() -> Path:
    """Where caches live: `$ROREM_CACHE`, by default `~/.cache/rorem`."""
    return Path(os.environ.get("ROREM_CACHE", "~/.cache/rorem")).expanduser() / "latents"


def _fingerprint(triplets: list[Triplet], vae, size: int) -> str:
    kind = f"{type(vae).__name__} {vae.config.scaling_factor}"
    digest = hashlib.sha256(f"{VERSION} {size} {kind}".encode())
    for name, weight in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    with ThreadPoolExecutor(8) as pool:
        files = [path for t in triplets for path in (t.source, t.mask, t.gt)]
        for value in pool.map(hash_file, files):
            digest.update(value.encode())
    return digest.hexdigest()[:24]


class LatentCache:
    """Latents of one triplet set, each with its mirrored twin, memory-mapped.

    Attributes:
        gt, masked, source: [N, 2, 4, h, w] float16 scaled latents of GT, of the source with its
            hole blanked, and of the whole source; axis 1 is (as it is, mirrored).
        mask: [N, 2, 1, h, w] uint8 0/1, the hole at the latents' size.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        for name in (*NAMES, "mask"):
            setattr(self, name, np.load(folder / f"{name}.npy", mmap_mode="r"))

    def __len__(self):
        return len(self.mask)


@torch.no_grad()
def open_cache(triplets: list[Triplet], vae, *, size: int, root: Path | str = "",
               batch_size: int = 32) -> LatentCache:
    """Open the cache of `triplets`, computing it first where it does not exist.

    Args:
        triplets: with GT; pictures of another size are resized to `size` x `size`.
        vae: the frozen autoencoder, on the device that shall compute.
        size: side in px, divisible by the VAE's factor.
        root: the folder of all caches; `cache_root()` by default.
        batch_size: pictures an encoding.

    Raises:
        TripletError: a file is missing, truncated or of another size than its triplet.
    """
    root = Path(root) if root else cache_root()
    folder = root / _fingerprint(triplets, vae, size)
    if (folder / "done.json").is_file():
        return LatentCache(folder)
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    arrays = {}
    device = next(vae.parameters()).device
    for number, stack in enumerate(read_batches(triplets, size=size, batch_size=batch_size)):
        begin = number * batch_size
        for twin in (0, 1):
            turned = {k: v[:, :, ::-1].copy() if twin else v for k, v in stack.items()}
            source = sdxl.to_tensor(turned["source"]).to(device)
            mask = torch.as_tensor(turned["mask"] >= 128).float()[:, None].to(device)
            wanted = {"gt": sdxl.to_tensor(turned["gt"]).to(device), "source": source,
                      "masked": sdxl.mask_source(source, mask)}
            for name, batch in wanted.items():
                latents = sdxl.encode_images(vae, batch.to(vae.dtype)).float()
                _store(arrays, beside, name, len(triplets), begin, twin,
                       latents.cpu().numpy().astype(np.float16))
            small = sdxl.shrink_mask(mask, latents).cpu().numpy().astype(np.uint8)
            _store(arrays, beside, "mask", len(triplets), begin, twin, small)
    for array in arrays.values():
        array.flush()
    write_json(beside / "done.json", {"triplets": len(triplets), "size": size})
    try:
        beside.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(beside, ignore_errors=True)
        if not (folder / "done.json").is_file():
            raise
    logger.info("latents of %d triplets cached in %s", len(triplets), folder)
    return LatentCache(folder)


def _store(arrays, folder, name, count, begin, twin, values):
    if name not in arrays:
        shape = (count, 2, *values.shape[1:])
        arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+",
                                                 dtype=values.dtype, shape=shape)
    arrays[name][begin:begin + len(values), twin] = values
