"""Batches of opened triplets, decoded ahead of whoever takes them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rorem_lib.records import Triplet, load_images
from rorem_lib.workers import group_chunks


def read_batches(triplets: Sequence[Triplet], *, size: int, batch_size: int,
                 threads: int | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Open triplets in order, batch by batch; two batches are decoded ahead.

    Decoding and resizing leave Python's lock, so threads are enough to use all cores.

    Args:
        triplets: all with GT, or all without.
        size: side in px that every picture is resized to.
        batch_size: triplets a batch; the last one is shorter.
        threads: by default one a core.

    Yields:
        `source` and `gt` [B, size, size, 3] uint8, `mask` [B, size, size] uint8 0 or 255; without
        `gt` in a pool.

    Raises:
        TripletError: a picture cannot be read, or sizes differ.
    """
    pool = ThreadPoolExecutor(threads or os.cpu_count())
    waiting: deque[list] = deque()
    try:
        for chunk in group_chunks(triplets, batch_size):
            waiting.append([pool.submit(load_images, triplet, size=size) for triplet in chunk])
            if len(waiting) > 2:
                yield _stack(waiting.popleft())
        while waiting:
            yield _stack(waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _stack(futures: list) -> dict[str, np.ndarray]:
    pictures = [future.result() for future in futures]
    return {part: np.stack([p[part] for p in pictures]) for part in ("source", "mask", "gt")
            if pictures[0][part] is not None}
