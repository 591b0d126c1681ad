"""What a parameter names becomes a set's meta.json."""

import os
import shutil
import stat
import tempfile

import pytest

from rorem_lib import files, sets
from rorem_lib.data.pictures import TripletError
from rorem_lib.data.triplets import read_triplets


def test_folders_files_and_built_in_sets_are_found(tiny_set, monkeypatch):
    assert sets.resolve(tiny_set) == sets.resolve(tiny_set.parent) == tiny_set
    monkeypatch.chdir(tiny_set.parents[1])
    assert sets.resolve(tiny_set.parent.name).samefile(tiny_set), "from the working folder"
    monkeypatch.setattr(sets, "builtin_set", lambda role: tiny_set.with_name(role))
    assert sets.resolve("builtin:pool").name == "pool"
    assert sets.resolve_all(str(tiny_set)) == sets.resolve_all([tiny_set]) == [tiny_set]
    assert len(read_triplets(sets.resolve_all([tiny_set]))) == 10


def test_a_relative_path_counts_from_the_repository_where_there_is_none(tiny_set, monkeypatch):
    monkeypatch.setattr(sets, "resolve_path", lambda path: tiny_set.parents[1] / path)
    assert sets.resolve(tiny_set.parent.name) == tiny_set


def test_a_notebook_that_has_not_run_yet_is_named():
    with pytest.raises(TripletError, match="notebooks/03_nothing.ipynb"):
        sets.resolve("runs/alone/03_nothing/candidates")
    with pytest.raises(TripletError, match="take one of builtin:labelled"):
        sets.resolve("builtin:candidates")


def test_the_preview_is_of_the_test_set_beside_the_training_set(tmp_path):
    for name in ("labelled", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text("[]")
    meta = tmp_path / "labelled" / "meta.json"
    assert sets.choose_preview(meta) == tmp_path / "test" / "meta.json"
    (tmp_path / "test" / "meta.json").unlink()
    assert sets.choose_preview(meta) == meta


# ----------------------------------------------------------------------------------- the cache


@pytest.fixture
def homeless(monkeypatch):
    monkeypatch.delenv("ROREM_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/proc/nowhere")
    files._make_temporary_cache.cache_clear()
    yield monkeypatch
    files._make_temporary_cache.cache_clear()


def test_where_no_cache_can_be_written_there_is_a_temporary_one(homeless, tmp_path, caplog):
    homeless.setattr(tempfile, "tempdir", str(tmp_path))
    found = files.find_cache()
    assert found == tmp_path / f"rorem-{os.getuid()}"
    assert stat.S_IMODE(found.stat().st_mode) == 0o700 and "ROREM_CACHE" in caplog.text
    homeless.setenv("ROREM_CACHE", str(tmp_path / "mine"))
    assert files.find_cache() == tmp_path / "mine"
    homeless.setenv("ROREM_CACHE", "/proc/mine")
    assert files.find_cache() == found and "/proc/mine" in caplog.text
    homeless.setenv("ROREM_CACHE", str(tmp_path / "mine"))
    homeless.setattr(os, "access", lambda path, mode: "mine" not in str(path))  # read-only
    assert files.find_cache() == found and f"{tmp_path}/mine" in caplog.text


def test_where_nothing_can_be_written_the_variables_are_named(homeless, tmp_path):
    homeless.setattr(tempfile, "tempdir", "/proc/nowhere")
    with pytest.raises(OSError, match="ROREM_CACHE.*TMPDIR"):
        files.find_cache()
    homeless.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"rorem-{os.getuid()}").symlink_to(tmp_path)  # another user's trap
    with pytest.raises(PermissionError, match="ROREM_CACHE"):
        files.find_cache()


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user")
def test_a_user_without_a_name_and_a_home_has_a_cache(homeless):
    homeless.setattr(tempfile, "tempdir", "/tmp")
    homeless.delenv("HOME")
    child = os.fork()
    if child == 0:
        try:
            os.setgid(54321)
            os.setuid(54321)
            os._exit(0 if files.find_cache().stat().st_uid == 54321 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    shutil.rmtree("/tmp/rorem-54321")
