"""Work in parallel over processes: in order, with little queued, and no process left behind."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

_AHEAD = 4  # arguments queued a process: enough to keep it busy, few enough to stay small


def map_processes(function: Callable, arguments: Iterable, *, workers: int = 1) -> Iterator:
    """`map` over processes: results in the arguments' order, arguments taken as they are needed.

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
        raise RuntimeError("a worker process died, killed or out of memory: take fewer workers; "
                           "started again, the work goes on") from error
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
