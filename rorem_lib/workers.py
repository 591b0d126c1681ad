"""Work in parallel over processes: in order, with little queued, and no process left behind.

Also how far long work is, and how processes that share only a folder wait for each other.
"""

from __future__ import annotations

import contextlib
import errno
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
from pathlib import Path

logger = logging.getLogger(__name__)

PATIENCE = 120.0  # seconds without a sign of life after which a process counts as gone
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
    """A log line every ten seconds of a long piece of work: how far, how fast, how long still.

    Args:
        what: the line's beginning, for example "latents of triplets".
        total: how many there are.
        active: False never logs.
    """

    def __init__(self, what: str, total: int, *, active: bool = True):
        self.what, self.total, self.active = what, total, active
        self.done, self.began = 0, time.monotonic()
        self.logged = self.began

    def add(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        now = time.monotonic()
        if not self.active or now - self.logged < 10:
            return
        self.logged, rate = now, self.done / (now - self.began)
        logger.info(
            "%s: %s of %s, %.4g a second, %s left",
            self.what,
            f"{self.done:,}",
            f"{self.total:,}",
            rate,
            _format_time((self.total - self.done) / rate),
        )


def _format_time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


class Heartbeat:
    """While the block runs, changes a file that other processes watch: this one is alive.

    Args:
        path: the file; its folder is made, and it is removed at the end.
        active: False does nothing, where there is no other process.
    """

    def __init__(self, path: Path, *, active: bool = True):
        self.path, self.active, self._end = path, active, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self):
        if self.active:
            self._thread.start()
        return self

    def _beat(self):
        while not self._end.is_set():
            with contextlib.suppress(OSError):  # a full disk is for the work itself to report
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text(str(time.time_ns()))
            self._end.wait(min(5, PATIENCE / 10))

    def __exit__(self, *error):
        self._end.set()
        if self.active:
            self._thread.join()
            self.path.unlink(missing_ok=True)


def wait_for(list_waited: Callable[[], Iterable[Path]]) -> None:
    """Wait until work is done that processes, maybe on other machines, were seen to be at.

    There is no message and no barrier: the work shows in files, and so does who is alive.

    Args:
        list_waited: the `Heartbeat` files of those whose work is missing; empty ends the wait.

    Raises:
        TimeoutError: one of them did not change for `PATIENCE` seconds; `filename` names it.
    """
    seen: dict[Path, tuple[str, float]] = {}
    pause = 0.02
    while waited := set(list_waited()):
        for path in waited:
            try:
                beat = path.read_text()
            except OSError:
                beat = seen.get(path, ("",))[0]
            if path not in seen or beat != seen[path][0]:
                seen[path] = beat, time.monotonic()
            elif time.monotonic() - seen[path][1] > PATIENCE:
                raise TimeoutError(
                    errno.ETIMEDOUT, f"no sign of life for {PATIENCE:.0f} s", str(path)
                )
        time.sleep(pause)
        pause = min(2, 1.5 * pause)
