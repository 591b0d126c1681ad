"""Files and folders: locks, and what a killed process or a lost power leaves."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from rorem_lib import files


def test_a_folder_is_worked_in_by_one_process_at_a_time(tmp_path):
    folder = tmp_path / "job"
    code = (
        "import sys; from rorem_lib.files import lock_folder\nwith lock_folder(sys.argv[1]): pass"
    )
    with files.lock_folder(folder):
        second = subprocess.run(
            [sys.executable, "-c", code, str(folder)], capture_output=True, text=True
        )
        with pytest.raises(BlockingIOError):  # nor by one process twice
            with files.lock_folder(folder):
                pass
    assert second.returncode == 1
    last = second.stderr.splitlines()[-1]
    assert last.startswith("BlockingIOError")
    assert f"process {os.getpid()} on {socket.gethostname()}, since 20" in last
    assert str(folder) in last
    with pytest.raises(RuntimeError), files.lock_folder(folder):  # free again, after a fault too
        raise RuntimeError
    with files.lock_folder(folder):
        pass
    assert (folder / files.LOCK).read_bytes() == b""  # no trace of who was there


def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    """A data loader's processes may outlive a training that is killed or has failed."""
    with files.lock_folder(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        try:
            with pytest.raises(BlockingIOError), files.lock_folder(tmp_path):
                pass  # nor has its end of the file let go of it
        except BaseException:
            os.kill(child, signal.SIGKILL)
            raise
    try:
        with files.lock_folder(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with files.lock_folder(tmp_path):
        (tmp_path / "work").touch()
    assert str(tmp_path) in caplog.text
