"""Work in processes: in order, lazily, and no process stays behind."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time

import cv2
import psutil
import pytest

from rorem_lib import workers
from rorem_lib.files import ROOT
from rorem_lib.workers import Progress, group_chunks, limit_time, map_processes


def _square(number):
    if number == 13:
        raise ValueError("13 brings no luck")
    return number * number, os.getpid()


def _die(number):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def _wait(seconds):
    time.sleep(seconds)
    return seconds


def _count_threads(number):
    return cv2.getNumThreads()


def _fail_at(task):
    number, marker = task
    if number == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 5 and not marker.exists():  # dies once
        marker.touch()
        os._exit(7)
    if number == 7:
        with limit_time(0.5):
            hash(_nest())  # C code that ends on its own after ages
    return number


def _nest():
    value = ()
    for _ in range(60):
        value = (value, value)
    return value


def _give_a_function(number):
    return (lambda: number) if number == 2 else number


def _list_workers():
    return {
        child.pid
        for child in psutil.Process().children()
        if "spawn_main" in " ".join(child.cmdline())
    }


def test_results_come_in_order_from_several_processes_and_little_is_taken_ahead():
    taken = []

    def count():
        for number in itertools.count(20):
            taken.append(number)
            yield number

    results = map_processes(_square, count(), workers=2)
    found = [next(results) for _ in range(20)]
    assert [square for square, _ in found] == [n * n for n in range(20, 40)]
    assert len(taken) <= 20 + 2 * workers._AHEAD + 1
    pids = {pid for _, pid in found}
    assert os.getpid() not in pids and 1 <= len(pids) <= 2
    results.close()
    assert not any(map(psutil.pid_exists, pids))


@pytest.mark.parametrize("number", [1, 2])
def test_an_error_goes_through_and_no_process_stays(number):
    with pytest.raises(ValueError, match="13 brings no luck"):
        list(map_processes(_square, range(30), workers=number))
    assert not _list_workers()
    with pytest.raises(ValueError, match="1 or more"):
        list(map_processes(_square, [1], workers=0))


def test_an_error_of_the_arguments_goes_through_and_no_process_stays():
    def break_off():
        yield from range(20)
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="the disk went away"):
        list(map_processes(abs, break_off(), workers=2))
    assert not _list_workers()


def test_a_killed_worker_is_told_as_such_and_no_process_stays():
    with pytest.raises(RuntimeError, match="a worker process died.*take fewer workers"):
        list(map_processes(_die, range(8), workers=2))
    assert not _list_workers()


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_what_a_process_died_at_is_named_and_the_others_go_on(tmp_path, number):
    tasks = [(n, tmp_path / "marker") for n in range(10)]
    found = list(
        map_processes(_fail_at, tasks, workers=number, lost=lambda task, why: (task[0], why))
    )
    assert [n for n in found if not isinstance(n, tuple)] == [0, 1, 2, 4, 5, 6, 8, 9]
    assert found[3][0] == 3 and "SIGSEGV" in found[3][1]
    assert found[7][0] == 7 and "took too long" in found[7][1]
    assert not _list_workers()


def test_a_result_that_cannot_be_sent_is_an_error_and_no_hang():
    results = map_processes(_give_a_function, range(4), workers=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(RuntimeError, match="cannot be sent"):
        next(results)
    assert not _list_workers()


def test_a_process_that_cannot_start_ends_the_work_instead_of_losing_everything(monkeypatch):
    monkeypatch.setenv("ROREM_ITEM_GB", "none")
    with pytest.raises(RuntimeError, match="cannot start"):
        list(map_processes(abs, range(4), workers=2, lost=lambda task, why: None))


def test_memory_has_an_end(monkeypatch):
    monkeypatch.setenv("ROREM_ITEM_GB", "0.5")
    with pytest.raises(MemoryError):
        list(map_processes(bytes, [10, 2**30], lost=lambda task, why: why))


def test_slow_ones_keep_their_place():
    seconds = [0.4, 0, 0.1, 0, 0]
    assert list(map_processes(_wait, seconds, workers=2)) == seconds


def test_one_worker_is_this_process_and_takes_nothing_ahead():
    taken = []
    results = map_processes(_square, (taken.append(n) or n for n in itertools.count()), workers=1)
    assert [next(results) for _ in range(3)] == [(n * n, os.getpid()) for n in range(3)]
    assert taken == [0, 1, 2] and not _list_workers()


def test_a_worker_uses_one_core():
    assert set(map_processes(_count_threads, range(4), workers=2)) == {1}


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
        import time
        from rorem_lib.workers import map_processes
        if __name__ == "__main__":
            results = map_processes(abs, iter(range(10**9)), workers=2)
            print(next(results), flush=True)
            time.sleep(60)
    """)
    )
    parent = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    parent.stdout.readline()
    children = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    assert children and not psutil.wait_procs(children, timeout=15)[1]


def test_long_work_says_how_long_still(caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
    progress = Progress("latents", 2000)
    silent = Progress("latents", 2000, active=False)
    with caplog.at_level("INFO"):
        for _ in range(4):
            now[0] += 6
            progress.add(60)
            silent.add(60)
    assert [r.message for r in caplog.records] == [
        "latents: 120 of 2,000, 10 per second, 3 min left",
        "latents: 240 of 2,000, 10 per second, 3 min left",
    ]


def test_what_was_there_before_does_not_count_for_the_rate(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
    progress = Progress("items", 1000, done=900, active=False)
    assert "left" in str(progress)
    now[0] = 10.0
    progress.add(20)
    progress.note = ", 3 rejected"
    assert str(progress) == "items: 920 of 1,000, 3 rejected, 2 per second, 40 s left"
    progress.add(80)
    assert str(progress) == "items: 1,000 of 1,000, 3 rejected"


def test_chunks_cover_everything_once():
    assert list(group_chunks(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(group_chunks([], 2)) == []
    began = time.monotonic()
    assert next(group_chunks(itertools.count(), 3)) == [0, 1, 2] and time.monotonic() - began < 5
