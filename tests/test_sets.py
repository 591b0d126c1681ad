"""What a parameter names becomes a set's meta.json."""

import pytest

from rorem_lib import sets
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
