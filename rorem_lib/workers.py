"""Work in parallel over processes: in order, with little queued, and no process left behind.

A process that dies or takes too long is known by what it was at, and replaced. Also how far long
work is.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.pool import ExceptionWithTraceback
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from rorem_lib.files import read_limit

logger = logging.getLogger(__name__)

_AHEAD = 4  # arguments taken for each process before the first result is wanted
_SMALL = 32768  # bytes of an argument that lies in a pipe while its process is at work
_READY = "ready"


def map_processes(
    function: Callable,
    arguments: Iterable,
    *,
    workers: int = 1,
    lost: Callable[[Any, str], Any] | None = None,
) -> Iterator:
    """`map` over processes: results in the arguments' order, arguments taken as they are needed.

    A process takes one argument at a time, so it is known what it died at. Of concurrent.futures
    and joblib, one death ends the work without a name; joblib's also outlive a parent that is
    killed.

    Args:
        function: a module's function (it is named, not sent).
        arguments: small and picklable; may be endless.
        workers: processes; 1 works in this one, unless there is `lost`.
        lost: makes the result of an argument at which its process died, or ran out of `limit_time`,
            twice: called with the argument and with what happened ("was ended by SIGSEGV").
            Without it a death ends the work.

    Raises:
        RuntimeError: a process died, by a signal or for want of memory, or cannot start.
        Exception: what `function` raised; what was queued is dropped.
    """
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, not {workers}")
    if workers == 1 and lost is None:
        yield from map(function, arguments)
        return
    crew, tasks = _Crew(function, workers), enumerate(arguments)
    answers, died = {}, set()  # by the arguments' numbers
    turn = taken = 0
    try:
        while True:
            while crew.has_room() and taken < turn + _AHEAD * workers:
                if (task := next(tasks, None)) is None:
                    break
                crew.give(*task)
                taken += 1
            if turn in answers:
                yield _open_answer(answers.pop(turn))
                turn += 1
            elif turn == taken:
                return
            else:
                for (number, argument), answer, why in crew.collect():
                    if answer is not None:
                        answers[number] = answer
                    elif lost is None:
                        raise RuntimeError(
                            f"a worker process died, it {why}: take fewer "
                            "workers; started again, the work goes on"
                        )
                    elif number in died:
                        answers[number] = True, lost(argument, why)
                    else:  # killed for what others took, or a disk that was away for a while
                        died.add(number)
                        crew.give(number, argument)
    finally:
        crew.close()


def _open_answer(answer: tuple[bool, Any]):
    sound, value = answer
    if sound:
        return value
    raise value


@dataclass
class _Worker:
    """A process, this end of its pipe, and the (number, argument) that it has: the first is the one
    that it is at."""

    process: BaseProcess
    pipe: Connection
    tasks: deque[tuple[int, Any]] = field(default_factory=deque)
    ready: bool = False

    def describe_end(self) -> str:
        code = self.process.exitcode or 0
        if code == -signal.SIGALRM:
            return "took too long (ROREM_ITEM_SECONDS sets the limit)"
        if code == -signal.SIGKILL:
            return "was killed, perhaps for want of memory"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended ({code})"


class _Crew:
    """At most `count` processes that call one function, by pipe.

    Each has one argument ahead, so that it does not wait while its last answer is taken.
    """

    def __init__(self, function: Callable, count: int):
        self._function, self._count = function, count
        self._workers: dict[Connection, _Worker] = {}
        self._waiting: deque[tuple[int, Any]] = deque()  # too large to lie in a pipe

    def has_room(self) -> bool:
        if self._waiting:
            return False
        workers = self._workers.values()
        return len(workers) < self._count or any(len(worker.tasks) < 2 for worker in workers)

    def give(self, number: int, argument) -> None:
        """Have a process call the function; one that was killed while idle is replaced."""
        data = ForkingPickler.dumps(argument)
        while True:
            worker = min(self._workers.values(), key=lambda w: len(w.tasks), default=None)
            if worker is None or (worker.tasks and len(self._workers) < self._count):
                worker = self._start()
            # both ends would wait for each other where neither's words fit into the pipe
            if worker.tasks and len(data) > _SMALL:
                self._waiting.append((number, argument))
                return
            worker.tasks.append((number, argument))
            try:
                worker.pipe.send_bytes(data)
                return
            except (BrokenPipeError, ConnectionResetError):
                if not worker.ready or len(worker.tasks) > 1:
                    return  # `collect` finds it dead
                self._remove(worker)

    def _start(self) -> _Worker:
        # spawn: a notebook's kernel has threads, which a forked child would inherit half-dead
        context = multiprocessing.get_context("spawn")
        pipe, end = context.Pipe()
        process = context.Process(target=_serve, args=(self._function, end, os.getpid()))
        process.daemon = True
        process.start()
        end.close()
        self._workers[pipe] = _Worker(process, pipe)
        return self._workers[pipe]

    def collect(self) -> list[tuple[tuple[int, Any], tuple[bool, Any] | None, str]]:
        """Wait for answers: what each is to, and, where it is None, how the process died at it."""
        found = []
        for pipe in wait([worker.pipe for worker in self._workers.values() if worker.tasks]):
            worker, answer, why = self._workers[pipe], None, ""
            try:
                answer = pipe.recv()
            except (EOFError, OSError):  # also in the middle of an answer
                worker.process.join()
                why = worker.describe_end()
                if not worker.ready:
                    raise RuntimeError(
                        f"a worker process cannot start, it {why}: a script that "
                        'starts some lies in a file and has `if __name__ == "__main__":`'
                    ) from None
            except Exception as error:  # a result that cannot be opened here
                answer = False, error
            if answer == _READY:
                worker.ready = True
                continue
            found.append((worker.tasks.popleft(), answer, why))
            if answer is None:
                self._remove(worker)
                self._waiting.extend(worker.tasks)  # it never was at them
        for _ in range(len(self._waiting)):
            self.give(*self._waiting.popleft())
        return found

    def _remove(self, worker: _Worker) -> None:
        del self._workers[worker.pipe]
        worker.pipe.close()
        worker.process.join()

    def close(self) -> None:
        for worker in self._workers.values():
            if worker.tasks:
                worker.process.terminate()
        for worker in list(self._workers.values()):
            self._remove(worker)  # the idle ones end when they find the pipe closed


def _serve(function: Callable, pipe: Connection, parent: int) -> None:
    """A worker process: answer arguments until the pipe is closed."""
    import cv2

    cv2.setNumThreads(1)  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _limit_memory()
    threading.Thread(target=_follow_parent, args=(parent,), daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pipe.send(_READY)
        while True:
            argument = pipe.recv()
            try:
                answer = True, function(argument)
            except Exception as error:
                answer = False, ExceptionWithTraceback(error, error.__traceback__)
            try:
                pipe.send(answer)
            except (OSError, EOFError):
                raise
            except Exception as error:  # it cannot be pickled
                pipe.send((False, RuntimeError(f"a result cannot be sent: {error}")))


def _limit_memory() -> None:
    """Let this process take `ROREM_ITEM_GB` (16, or the machine's memory) beyond what it has."""
    page = resource.getpagesize()
    try:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * page
    except OSError:  # no Linux
        return
    room = min(16, os.sysconf("SC_PHYS_PAGES") * page / 2**30)
    soft = taken + int(read_limit("ROREM_ITEM_GB", room) * 2**30)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or soft < hard:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """A block that ends its worker process where it takes longer, whatever code is running.

    Outside of `map_processes`' workers there is no limit.
    """
    if multiprocessing.parent_process() is None:
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _follow_parent(parent: int) -> None:
    """End when the parent was killed, instead of waiting for work for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def group_chunks(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


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
