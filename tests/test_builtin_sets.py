import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import rorem_lib
from rorem_lib.builtin import sets
from rorem_lib.builtin.scenes import render_scene
from rorem_lib.builtin.sets import builtin_set, hidden_of, read_truth, write_scene_sets
from rorem_lib.data.check import check_set
from rorem_lib.data.pictures import TripletError
from rorem_lib.data.triplets import (
    HIDDEN_MARK,
    HIDDEN_PARTS,
    is_hidden,
    load_images,
    read_triplets,
)
from rorem_lib.data.writer import TripletWriter
from rorem_lib.files import hash_file, read_json, write_json

SMALL = {"labelled": 12, "pool": 8, "high_resolution": 3, "test": 5}
PACKAGE = Path(rorem_lib.__file__).parent


def _hashes(folder):
    return {
        str(p.relative_to(folder)): hash_file(p)
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    assert write_scene_sets(folder, seed=9, **SMALL) == SMALL
    return folder


def test_the_sets_are_sound_and_say_where_they_come_from(written):
    for name, count in SMALL.items():
        assert check_set(written / name) == []
        triplets = read_triplets(written / name, require_gt=name == "labelled")
        assert [t.id for t in triplets] == [f"{name}-{n:06d}" for n in range(count)]
        for triplet in triplets:
            assert triplet.group == triplet.id
            assert triplet.extra.keys() == {
                "origin",
                "license",
                "family",
                "kind",
                "mask_kind",
                "effect",
            }
            assert triplet.extra["license"] == "CC0-1.0"
    origins = [t.extra["origin"] for t in read_triplets(written / "labelled")]
    assert origins == ["scenes/rord", "scenes/mulan"] * 6


def test_only_the_labelled_set_has_gt_and_only_the_others_have_hidden_truth(written):
    assert (written / "labelled" / "GT").is_dir()
    for name in ("pool", "high_resolution", "test"):
        assert not (written / name / "GT").exists()
        assert all(t.gt is None for t in read_triplets(written / name, require_gt=False))
        assert hidden_of(written / name / "meta.json") == written / "hidden" / name
    assert hidden_of(written / "labelled" / "meta.json") is None


def test_truth_belongs_to_its_scene(written):
    for name in ("pool", "high_resolution", "test"):
        for index, triplet in enumerate(read_triplets(written / name, require_gt=False)):
            scene = render_scene([9, index], role=name)
            truth = read_truth(written / "hidden" / name, triplet.id)
            for part in ("truth", "object", "shadow"):
                assert np.array_equal(getattr(truth, part), getattr(scene, part))
            pictures = load_images(triplet)
            assert np.array_equal(pictures["source"], scene.image)
            assert np.array_equal(pictures["mask"], scene.mask)


def test_truth_of_a_removal_made_with_several_seeds(written):
    hidden = written / "hidden" / "pool"
    plain, second = read_truth(hidden, "pool-000002"), read_truth(hidden, "pool-000002-s1")
    assert np.array_equal(plain.truth, second.truth)
    for name in ("pool-000099", "labelled-000001", "pool-000002-sx"):
        with pytest.raises(TripletError, match=f"no hidden truth .*{name}.png"):
            read_truth(hidden, name)


def test_no_scene_is_in_two_sets(written):
    sources = [
        load_images(t)["source"].tobytes()
        for name in SMALL
        for t in read_triplets(written / name, require_gt=False)
    ]
    assert len(set(sources)) == len(sources)


def test_equal_seeds_give_equal_bytes_with_one_process_or_two(written, tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "_CHUNK", 7)
    reports = []
    write_scene_sets(
        tmp_path,
        seed=9,
        **SMALL,
        workers=2,
        progress=lambda done, total: reports.append((done, total)),
    )
    assert _hashes(tmp_path) == _hashes(written)
    assert reports == sorted(reports) and reports[-1] == (28, 28)


def test_another_seed_or_size_is_written_anew(tmp_path):
    write_scene_sets(tmp_path, seed=1, labelled=4, pool=3, high_resolution=0, test=0)
    before = _hashes(tmp_path)
    write_scene_sets(tmp_path, seed=1, labelled=4, pool=2, high_resolution=0, test=0)
    after = _hashes(tmp_path)
    assert "pool/source/pool-000002.png" not in after
    assert "hidden/pool/truth/pool-000002.png" not in after
    assert after["labelled/meta.json"] == before["labelled/meta.json"]
    write_scene_sets(tmp_path, seed=2, labelled=4, pool=2, high_resolution=0, test=0)
    assert _hashes(tmp_path)["pool/source/pool-000001.png"] != after["pool/source/pool-000001.png"]
    assert read_triplets(tmp_path / "test", require_gt=False) == []


def test_a_set_of_another_version_is_written_anew(tmp_path, monkeypatch):
    sizes = {"labelled": 2, "pool": 0, "high_resolution": 0, "test": 0}
    write_scene_sets(tmp_path, seed=1, **sizes)
    source = tmp_path / "labelled" / "source" / "labelled-000001.png"
    earlier = b"of an earlier version".ljust(source.stat().st_size)
    source.write_bytes(earlier)
    write_scene_sets(tmp_path, seed=1, **sizes)
    assert source.read_bytes() == earlier
    monkeypatch.setattr(sets, "VERSION", 99)
    write_scene_sets(tmp_path, seed=1, **sizes)
    assert source.read_bytes() != earlier


def test_a_set_of_another_kind_is_not_overwritten(tmp_path):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "meta.json").write_text("[]")
    with pytest.raises(TripletError, match="no scene set: choose another folder"):
        write_scene_sets(tmp_path, **SMALL)
    assert (tmp_path / "pool" / "meta.json").exists()


@pytest.mark.parametrize("place", ["test", "labelled", "hidden", "hidden/pool"])
def test_folders_of_others_are_left_alone(tmp_path, place):
    (tmp_path / place / "0001").mkdir(parents=True)
    (tmp_path / place / "0001" / "frame.png").write_bytes(b"raw")
    with pytest.raises(TripletError, match=f"{place.partition('/')[0]}.* choose another folder"):
        write_scene_sets(tmp_path, **SMALL)
    files = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()]
    assert files == [f"{place}/0001/frame.png"]


def test_what_others_put_into_a_set_of_scenes_stays_when_it_is_written_anew(tmp_path):
    sizes = {"labelled": 2, "pool": 2, "high_resolution": 0, "test": 0}
    write_scene_sets(tmp_path, seed=1, **sizes)
    mine = [tmp_path / "pool/notes.txt", tmp_path / "hidden/pool/truth/mine.png"]
    for path in mine:
        path.write_text("mine")
    write_scene_sets(tmp_path, seed=2, **sizes)
    assert [path.read_text() for path in mine] == ["mine"] * 2


def test_scenes_that_a_lost_power_emptied_are_rendered_anew(tmp_path):
    sizes = {"labelled": 2, "pool": 3, "high_resolution": 0, "test": 0}
    write_scene_sets(tmp_path, seed=1, **sizes)
    whole = _hashes(tmp_path)
    for path in (
        "labelled/GT/labelled-000001.png",
        "pool/mask/pool-000000.png",
        "hidden/pool/truth/pool-000002.png",
    ):
        os.truncate(tmp_path / path, 0)
    write_scene_sets(tmp_path, seed=1, **sizes)
    assert _hashes(tmp_path) == whole


@pytest.mark.parametrize("wrong", [{"pool": -1}, {"workers": 0}])
def test_sizes_make_sense(tmp_path, wrong):
    with pytest.raises(ValueError, match="0 or more"):
        write_scene_sets(tmp_path, **SMALL | wrong)


@pytest.mark.slow
def test_killed_half_way_it_goes_on_to_the_same_files(tmp_path):
    sizes = {"labelled": 40, "pool": 60, "high_resolution": 5, "test": 30}
    code = (
        "import sys; from rorem_lib.builtin.sets import write_scene_sets; "
        f"write_scene_sets(sys.argv[1], seed=3, **{sizes})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "killed")])
    target = tmp_path / "killed" / "pool" / "source"
    while process.poll() is None and len(list(target.glob("pool-*.png"))) < 20:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "test" / "meta.json").exists()  # it was half-way
    kept = hash_file(target / "pool-000003.png"), os.stat(target / "pool-000003.png").st_mtime_ns
    write_scene_sets(tmp_path / "killed", seed=3, **sizes)
    assert os.stat(target / "pool-000003.png").st_mtime_ns == kept[1]  # it was not made again
    write_scene_sets(tmp_path / "undisturbed", seed=3, **sizes)
    found = {k: v for k, v in _hashes(tmp_path / "killed").items() if ".partial" not in k}
    assert found == _hashes(tmp_path / "undisturbed")


# ----------------------------------------------------------------------------- sets on first use


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROREM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sets, "DEFAULT_SIZES", SMALL)
    return tmp_path / "cache"


def test_builtin_sets_are_rendered_once_whole_or_not_at_all(cache, monkeypatch):
    real = sets.write_scene_sets

    def fail_late(folder, **sizes):
        real(folder, **sizes)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sets, "write_scene_sets", fail_late)
    with pytest.raises(OSError, match="set ROREM_CACHE"):
        builtin_set("pool")
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(sets, "write_scene_sets", real)
    meta = builtin_set("pool")
    assert cache in meta.parents and len(read_triplets(meta, require_gt=False)) == 8
    made = meta.stat().st_mtime_ns
    assert hidden_of(builtin_set("test")).is_dir()
    assert meta.stat().st_mtime_ns == made


def test_another_version_has_another_cache(cache, monkeypatch):
    first = builtin_set("pool")
    monkeypatch.setattr(sets, "VERSION", 99)
    assert builtin_set("pool").parent.parent != first.parent.parent


def test_candidates_have_the_truth_of_the_scenes_they_were_drawn_from(cache, tmp_path):
    pool = builtin_set("pool")
    with TripletWriter(tmp_path / "candidates") as writer:
        for triplet in read_triplets(pool, require_gt=False):
            writer.add_triplet(triplet, gt=triplet.source)
    assert hidden_of(tmp_path / "candidates" / "meta.json") is None
    write_json(tmp_path / "candidates" / "settings.json", {"drawn_from": [str(pool)]})
    assert hidden_of(tmp_path / "candidates" / "meta.json") == hidden_of(pool) is not None


def test_a_folder_called_hidden_that_is_not_marked_is_somebodys_own(tmp_path):
    hidden = tmp_path / "hidden" / "test"
    hidden.mkdir(parents=True)
    assert hidden_of(tmp_path / "test" / "meta.json") is None and not is_hidden(hidden)
    for part in HIDDEN_PARTS:  # as earlier versions left it
        (hidden / part).mkdir()
    assert hidden_of(tmp_path / "test" / "meta.json") == hidden
    assert is_hidden(hidden / "truth") and not is_hidden(tmp_path / "hidden")


# ----------------------------------------------------------------------------- nothing leaks


def _names(tree):
    """Every name, attribute and imported name in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                yield from alias.name.split(".")


def _users(name):
    return {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if name in _names(ast.parse(path.read_text(encoding="utf-8")))
    }


@pytest.mark.slow
def test_only_the_simulated_annotator_and_the_evaluation_read_the_truth():
    allowed = {"builtin/judge.py", "evaluation/evaluate.py", "builtin/sets.py"}
    users = _users("read_truth") | _users("Truth")
    assert "evaluation/evaluate.py" in users  # the walk sees something
    assert users <= allowed, f"{users - allowed} must not read the hidden truth"


def test_only_pre_training_renders_scenes_besides_and_looks_at_the_pictures_alone():
    assert _users("render_scene") <= {"pretrain.py", "builtin/scenes.py", "builtin/sets.py"}
    tree = ast.parse((PACKAGE / "pretrain.py").read_text(encoding="utf-8"))
    seen = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "scene"
    }
    assert seen and seen <= {"image", "mask"}
    constants = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert "pretrain" in constants and "test" not in constants


def test_no_record_of_a_set_points_at_the_truth(written):
    assert all((folder / HIDDEN_MARK).is_file() for folder in (written / "hidden").glob("*/"))
    for name in SMALL:
        for record in read_json(written / name / "meta.json"):
            assert record.keys() & {"object", "shadow", "truth"} == set()
            assert not any("hidden" in str(value) for value in record.values())
