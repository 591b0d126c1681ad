"""Work in parallel over processes: in order, with little queued, and no process left behind.

Also how far long work is.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

logger = logging.getLogger(__name__)

_AHEAD = 4  # arguments queued a process: enough to keep it busy, few enough to stay small


def map_processes(function: Callable, arguments: Iterable, *, workers: int = 1) -> Iterator:
    """`map` over processes: results in the arguments' order, arguments taken as they are needed.

    joblib's generator takes arguments without bound while its taker is slow, and its processes
    outlive a parent that is killed.

    Args:
        function: a module's function (it is named, not sent).
        arguments: small and picklable; may be endless.
        workers: processes; 1 works in this one.

    Raises:
        RuntimeError: a process died, by a signal or for want of memory.
        Exception: what `function` raised; what was queued is dropped.
    """
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, not {workers}")
    if workers == 1:
        yield from map(function, arguments)
        return
    # spawn: a notebook's kernel has threads, which a forked child would inherit half-dead
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(),))
    arguments, queue = iter(arguments), deque()
    try:
        for argument in itertools.islice(arguments, _AHEAD * workers):
            queue.append(executor.submit(function, argument))
        while queue:
            result = queue.popleft().result()
            for argument in itertools.islice(arguments, 1):
                queue.append(executor.submit(function, argument))
            yield result
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died, killed or out of memory: take fewer workers; "
            "started again, the work goes on"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def group_chunks(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def _start_worker(parent: int) -> None:
    import cv2

    cv2.setNumThreads(1)  # the processes are the parallelism
    threading.Thread(target=_follow_parent, args=(parent,), daemon=True).start()


def _follow_parent(parent: int) -> None:
    """End when the parent was killed, instead of waiting for work for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


class Progress:
    """How far counted work is, how fast, how long still: `str` makes a line of it.

    Args:
        what: what is counted, the line's beginning.
        total: how many there are.
        done: how many were there before; they do not count for the rate.
        active: log the line every ten seconds.

    Attributes:
        done, total: as given, `done` as it grows.
        note: what the line says besides.
    """

    def __init__(self, what: str, total: int, *, done: int = 0, active: bool = True):
        self.what, self.total, self.done, self.active, self.note = what, total, done, active, ""
        self.before, self.began = done, time.monotonic()
        self.logged = self.began

    def add(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        if self.active and time.monotonic() - self.logged >= 10:
            self.logged = time.monotonic()
            logger.info("%s", self)

    @property
    def rate(self) -> float:
        """Items per second of this run."""
        return (self.done - self.before) / max(time.monotonic() - self.began, 1e-9)

    def __str__(self):
        line = f"{self.what}: {self.done:,} of {self.total:,}{self.note}"
        if self.done >= self.total:
            return line
        left = (self.total - self.done) / max(self.rate, 1e-9)
        left = f"{left:.0f} s" if left < 90 else f"{left / 60:,.0f} min"
        return f"{line}, {self.rate:.4g} per second, {left} left"
