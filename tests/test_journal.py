"""Journals and the work of processes: nothing lost, nothing left behind."""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from rorem_lib import journal, workers
from rorem_lib.journal import Journal, JournalIndex, write_lines, write_list
from rorem_lib.workers import group_chunks, map_processes


def _write(path, *records):
    writer = Journal(path)
    for record in records:
        writer.append(record)
    writer.close()


def test_a_torn_end_is_cut_off_and_a_torn_middle_is_passed_over(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    _write(path, {"id": "b", "x": 1})
    with open(path, "ab") as stream:
        stream.write(b'{"id": "c", "x\n{"no": "id"}\n{"id": "a"')
    _write(path, {"id": "照 片", "x": 2})
    assert path.read_bytes().count(b"\n") == 4
    with JournalIndex([path]) as index:
        assert index.list_ids() == ["b", "照 片"]
        assert [r["x"] for r in index.items()] == [1, 2]
    assert "torn line" in caplog.text


def test_later_lines_and_later_files_replace_earlier_ones(tmp_path):
    _write(tmp_path / "1", {"id": "a", "n": 1}, {"id": "b", "n": 2}, {"id": "a", "n": 3})
    _write(tmp_path / "2", {"id": "b", "n": 4})
    with JournalIndex([tmp_path / "1", tmp_path / "missing", tmp_path / "2"]) as index:
        assert [(r["id"], r["n"]) for r in index.items()] == [("a", 3), ("b", 4)]
        assert len(index) == 2 and "a" in index and "c" not in index


def test_positions_beyond_4_gb_fit(tmp_path):
    _write(tmp_path / "1", {"id": "a"})
    with JournalIndex([tmp_path / "1"]) as index:
        place = 3 << journal._SHIFT | 200 * 10**9
        assert place >> journal._SHIFT == 3
        assert place & ((1 << journal._SHIFT) - 1) == 200 * 10**9
        assert index["a"] == {"id": "a"}


def test_lists_are_plain_json_and_a_failure_leaves_the_old_one(tmp_path):
    path = tmp_path / "meta.json"
    write_list(path, iter([{"id": "a"}, {"id": "b", "ü": "é"}]))
    assert json.loads(path.read_text()) == [{"id": "a"}, {"id": "b", "ü": "é"}]
    assert "é" in path.read_text()

    def fail():
        yield {"id": "c"}
        raise RuntimeError

    for write in (write_list, write_lines):
        with pytest.raises(RuntimeError):
            write(path, fail())
    assert len(json.loads(path.read_text())) == 2 and len(list(tmp_path.iterdir())) == 1
    write_list(path, [])
    assert json.loads(path.read_text()) == []


# -------------------------------------------------------------------------------- processes


def _square(number):
    if number == 13:
        raise ValueError("13 brings no luck")
    return number * number, os.getpid()


def _die(number):
    os.kill(os.getpid(), signal.SIGKILL)


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
    before = set(psutil.Process().children())
    with pytest.raises(ValueError, match="13 brings no luck"):
        list(map_processes(_square, range(30), workers=number))
    after = {p for p in set(psutil.Process().children()) - before
             if "spawn_main" in " ".join(p.cmdline())}
    assert not after
    with pytest.raises(ValueError, match="1 or more"):
        list(map_processes(_square, [1], workers=0))


def test_a_killed_worker_is_told_as_such():
    with pytest.raises(RuntimeError, match="a worker process died.*take fewer workers"):
        list(map_processes(_die, range(8), workers=2))


def test_workers_end_with_their_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent("""
        import time
        from rorem_lib.workers import map_processes
        if __name__ == "__main__":
            results = map_processes(abs, iter(range(10**9)), workers=2)
            print(next(results), flush=True)
            time.sleep(60)
    """))
    root = Path(__file__).resolve().parents[1]
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": str(root)})
    parent.stdout.readline()
    children = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    assert children and not psutil.wait_procs(children, timeout=15)[1]


def test_chunks_cover_everything_once():
    assert list(group_chunks(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(group_chunks([], 2)) == []
    began = time.monotonic()
    assert next(group_chunks(itertools.count(), 3)) == [0, 1, 2] and time.monotonic() - began < 5
