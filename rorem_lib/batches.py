"""Batches of opened triplets, decoded ahead of whoever takes them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def read_batches(
    load: Callable[..., Mapping[str, np.ndarray | None]],
    chunks: Iterable[Sequence],
    *,
    threads: int | None = None,
    ahead: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """Open triplets in order, batch by batch, by default two batches ahead of the taker.

    Decoding and resizing leave Python's lock, so threads are enough to use all cores.

    Args:
        load: opens one item, for example `partial(load_images, size=512)`.
        chunks: the items of each batch; all pictures of one are brought to one size.
        threads: by default one a core.
        ahead: batches that are decoded in advance; 0 for a taker that needs all cores itself.

    Yields:
        What `load` gave for the items of a chunk, stacked: of `load_images` `source` and `gt`
        [B, h, w, 3] uint8 and `mask` [B, h, w] uint8 0 or 255; without `gt` in a pool.

    Raises:
        TripletError: a picture cannot be read, or sizes differ.
    """
    pool = ThreadPoolExecutor(threads or os.cpu_count())
    waiting: deque[list] = deque()
    try:
        for chunk in chunks:
            waiting.append([pool.submit(load, item) for item in chunk])
            if len(waiting) > ahead:
                yield _stack(waiting.popleft())
        while waiting:
            yield _stack(waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _stack(futures: list) -> dict[str, np.ndarray]:
    pictures = [future.result() for future in futures]
    return {
        part: np.stack([p[part] for p in pictures])
        for part, first in pictures[0].items()
        if first is not None
    }
