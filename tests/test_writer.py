"""Sets: files of others are left alone; what a lost power leaves; what JSON can hold; ids."""

import json
import os

import numpy as np
import pytest

from rorem_lib.data import writer as writing
from rorem_lib.data.check import check_set
from rorem_lib.data.journal import Journal, JournalIndex, write_list
from rorem_lib.data.pictures import TripletError, load_image, save_image
from rorem_lib.data.triplets import read_triplets
from rorem_lib.data.writer import OWNED, TripletWriter, clear_set, merge_sets
from rorem_lib.files import hash_file, lock_folder, read_json, write_json


def _picture(seed=0, size=24):
    return np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)


def _mask(size=24):
    mask = np.zeros((size, size), np.uint8)
    mask[6:12, 6:15] = 255
    return mask


def _write_set(folder, *names, seed=0):
    with TripletWriter(folder) as writer:
        for number, name in enumerate(names):
            writer.add(id=name, source=_picture(seed + number), mask=_mask(), gt=_picture(50))
    return folder


def _read_tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _write_foreign_set(folder):
    """A set as somebody else wrote it."""
    _write_set(folder, "a", "b")
    (folder / OWNED).unlink()
    return folder


# ------------------------------------------------------------------------------ files of others


def _put_images(folder):
    (folder / "source").mkdir(parents=True)
    save_image(folder / "source" / "a.png", _picture(7))


def _put_journal(folder):
    folder.mkdir()
    (folder / "meta.jsonl.partial").write_text('{"id": "x", "source": "../home/x.png"}\n')


@pytest.mark.parametrize("put", [_write_foreign_set, _put_images, _put_journal])
@pytest.mark.parametrize("restart", [False, True])
def test_what_a_writer_did_not_write_is_refused_and_stays(tmp_path, put, restart):
    put(tmp_path / "set")
    before = _read_tree(tmp_path)
    with pytest.raises(TripletError, match="choose another folder"):
        TripletWriter(tmp_path / "set", restart=restart)
    with pytest.raises(TripletError, match="choose another folder"):
        writing.write_files(tmp_path / "set", id="a", source=_picture(), mask=_mask())
    with pytest.raises(TripletError, match="choose another folder"):
        merge_sets([_write_set(tmp_path / "one", "a")], tmp_path / "set")
    after = {name: data for name, data in _read_tree(tmp_path).items() if "one/" not in name}
    assert after == before


def test_nothing_is_written_through_a_link(tmp_path):
    _put_images(tmp_path / "precious")
    before = _read_tree(tmp_path / "precious")
    _write_set(tmp_path / "set", "b")
    for path in (tmp_path / "set/source").iterdir():
        path.unlink()
    (tmp_path / "set/source").rmdir()
    (tmp_path / "set/source").symlink_to(tmp_path / "precious/source")
    with pytest.raises(TripletError, match="is a link"):
        TripletWriter(tmp_path / "set", restart=True)
    with pytest.raises(TripletError, match="is a link"):
        clear_set(tmp_path / "set")
    assert _read_tree(tmp_path / "precious") == before


@pytest.mark.parametrize("how", ["restart", "drop", "clear", "replace"])
def test_records_from_elsewhere_delete_nothing_but_the_sets_own_files(tmp_path, how):
    """The mark travels with a copied folder, and its records may name anything."""
    folder = _write_set(tmp_path / "set", "good")
    (tmp_path / "home").mkdir()
    precious = [tmp_path / "home" / f"{name}.txt" for name in ("precious", "absolute")]
    precious += [folder / "notes.txt", folder / "source" / "mine.png", folder / "mask" / "x"]
    for path in precious:
        path.write_text("mine")
    records = read_json(folder / "meta.json")
    records += [
        {"id": "precious", "source": "../home/precious.txt", "mask": "mask/x", "GT": "GT/../x"},
        {"id": "absolute", "source": str(precious[1]), "mask": "mask/../../home/absolute.txt"},
        {"id": "notes", "source": "notes.txt", "mask": "source/mine.png"},
        {"id": "../../home/precious", "source": "source/../../home/precious.txt"},
    ]
    write_list(folder / "meta.json", records)
    if how == "restart":
        merge_sets([_write_set(tmp_path / "one", "new")], folder)
        assert [t.id for t in read_triplets(folder)] == ["new"]
    elif how == "drop":
        TripletWriter(folder).close(drop={record["id"] for record in records})
    elif how == "clear":
        clear_set(folder)
    else:
        with TripletWriter(folder) as writer:
            for record in records:
                writer.add_record({"id": record["id"], "source": "source/other.png"})
    assert [path.read_text() for path in precious] == ["mine"] * len(precious)
    assert not (folder / "source/good.png").exists()


def test_a_cleared_set_is_gone_but_for_what_others_put_there(tmp_path):
    folder = _write_set(tmp_path / "set", "a", "b")
    clear_set(folder)
    assert not folder.exists()
    _write_set(folder, "a")
    (folder / "source" / "mine.txt").write_text("mine")
    clear_set(folder)
    assert {name for name in _read_tree(folder)} == {OWNED, "source/mine.txt"}
    _write_set(folder, "c")  # it is still the writer's folder
    assert [t.id for t in read_triplets(folder)] == ["c"]


def test_two_merges_into_one_folder_at_once(tmp_path):
    first = _write_set(tmp_path / "one", "a")
    with lock_folder(merge_sets([first], tmp_path / "all").parent):
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on "):
            merge_sets([_write_set(tmp_path / "two", "b")], tmp_path / "all")
    assert [t.id for t in read_triplets(tmp_path / "all")] == ["a"]


def test_a_set_is_not_made_of_its_own_files_while_they_are_replaced(tmp_path):
    folder = _write_set(tmp_path / "set", "a", "b")
    (first, _) = read_triplets(folder)
    with pytest.raises(TripletError, match="another folder"):
        with TripletWriter(folder, restart=True) as writer:
            writer.add_triplet(first)
    assert [t.id for t in read_triplets(folder)] == ["a", "b"] and check_set(folder) == []


def test_a_kept_record_keeps_its_file_however_it_is_spelt(tmp_path):
    folder = _write_set(tmp_path / "set", "a", "b")
    records = read_json(folder / "meta.json")
    records[1]["source"] = "./source/../source/a.png"
    write_list(folder / "meta.json", records)
    TripletWriter(folder).close(drop={"a"})
    assert np.array_equal(load_image(read_triplets(folder)[0].source), _picture(0))


# --------------------------------------------------------------------------------- a lost power


def test_files_are_flushed_before_what_promises_them(tmp_path, monkeypatch):
    done = []
    real = writing.write_list
    monkeypatch.setattr(writing, "flush_disk", lambda folder: done.append(f"flush {folder.name}"))
    monkeypatch.setattr(
        writing, "write_list", lambda path, x: (done.append(path.name), real(path, x))
    )
    _write_set(tmp_path / "set", "a")
    assert done == ["flush set", "meta.json"]
    writer = TripletWriter(tmp_path / "set", part="rank1")
    writer.add(id="b", source=_picture(), mask=_mask())
    writer.close()  # another machine's writer: nobody else can flush what it wrote
    assert done[2:] == ["flush set"]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("part", ["source", "mask", "GT"])
def test_what_a_lost_power_emptied_is_made_anew(tmp_path, finished, part, caplog):
    writer = TripletWriter(tmp_path)
    for name in "abc":
        writer.add(id=name, source=_picture(), mask=_mask(), gt=_picture(1))
    if finished:
        writer.close()
    os.truncate(tmp_path / part / "b.png", 0)
    again = TripletWriter(tmp_path)
    assert again.done_ids == {"a", "c"}
    assert "files of 1 triplets" in caplog.text and "such as b" in caplog.text
    again.add(id="b", source=_picture(), mask=_mask(), gt=_picture(1))
    again.close()
    assert check_set(tmp_path, hashes=True) == []
    assert TripletWriter(tmp_path).done_ids == {"a", "b", "c"}


def test_the_last_files_before_a_lost_power_are_read_not_only_measured(tmp_path):
    writer = TripletWriter(tmp_path)
    for name in "abc":
        writer.add(id=name, source=_picture(), mask=_mask())
    for name in "ab":
        path = tmp_path / "source" / f"{name}.png"
        path.write_bytes(bytes(path.stat().st_size))  # of its size, and of zeros
    os.utime(tmp_path / "source/a.png", (1, 1))  # long before: it was flushed
    assert TripletWriter(tmp_path).done_ids == {"a", "c"}


def test_of_two_journals_the_one_written_last_counts(tmp_path):
    """As many processes as before need not be at work after a lost power."""
    for part, seed in (("rank3", 1), ("rank0", 2)):
        writer = TripletWriter(tmp_path, part=part)
        writer.add(id="a", source=_picture(seed), mask=_mask())
        writer.close()
        os.utime(writer._journal.path, (seed, seed))
    TripletWriter(tmp_path).close()
    assert TripletWriter(tmp_path).done_ids == {"a"} and check_set(tmp_path, hashes=True) == []


def test_records_say_what_their_files_hold_and_sets_made_of_them_too(tmp_path):
    first = _write_set(tmp_path / "one", "a")
    (triplet,) = read_triplets(first)
    files = (triplet.source, triplet.mask, triplet.gt)
    wanted = " ".join(f"{path.stat().st_size}-{hash_file(path)[:16]}" for path in files)
    assert triplet.bytes_sha256 == wanted and "bytes_sha256" not in triplet.extra
    (merged,) = read_triplets(merge_sets([first], tmp_path / "all"))
    assert merged.bytes_sha256 == wanted
    with TripletWriter(tmp_path / "candidates") as writer:
        writer.add_triplet(triplet, gt=_picture(9))
        writer.add(id="bare", source=triplet.source, mask=triplet.mask)
    made, bare = read_triplets(tmp_path / "candidates", require_gt=False)
    assert made.bytes_sha256.split()[:2] == wanted.split()[:2]
    assert made.bytes_sha256.split()[2].endswith(hash_file(made.gt)[:16])
    sizes = [str(path.stat().st_size) for path in files[:2]]
    assert bare.bytes_sha256.split() == sizes  # linked, not read


# ----------------------------------------------------------------------------------- strict JSON


@pytest.mark.parametrize("value", [float("nan"), np.float32("inf"), [1.0, float("-inf")]])
def test_no_set_holds_a_number_that_json_has_not(tmp_path, value):
    writer = TripletWriter(tmp_path)
    with pytest.raises(TripletError, match="a: score is"):
        writer.add(id="a", source=_picture(), mask=_mask(), score=value)
    assert not list(tmp_path.rglob("*.png"))
    with pytest.raises(ValueError, match="record a"):
        Journal(tmp_path / "x.jsonl").append({"id": "a", "score": value})
    assert not (tmp_path / "x.jsonl").exists()
    with pytest.raises(ValueError, match="record a"):
        write_list(tmp_path / "list.json", [{"id": "a", "score": value}])
    with pytest.raises(ValueError, match="plain.json"):
        write_json(tmp_path / "plain.json", {"score": [float("nan")]})
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("layout", ["list", "lines"])
def test_a_reader_that_meets_nan_says_in_which_record(tmp_path, layout):
    folder = _write_set(tmp_path / "set", "a", "b", "c")
    records = read_json(folder / "meta.json")
    records[1]["score"] = float("nan")
    text = json.dumps(records) if layout == "list" else "\n".join(map(json.dumps, records))
    (folder / "meta.json").write_text(text)
    for read in (read_triplets, check_set):
        with pytest.raises(TripletError, match="record 2: NaN is no JSON"):
            read(folder)
    (folder / "meta.json").write_text(text.replace("NaN", '"nan"'))
    with pytest.raises(TripletError, match="record 2: the score 'nan' is no number"):
        read_triplets(folder)


def test_nan_in_an_old_journal_costs_that_item_alone(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "a"}\n{"id": "b", "score": NaN}\n{"id": "c", "score": 1.0}\n')
    with JournalIndex([path]) as index:
        assert index.list_ids() == ["a", "c"]
    (tmp_path / "x.json").write_text('{"a": 1,\n "b": -Infinity}')
    with pytest.raises(ValueError, match=r"x\.json is not valid JSON \(line 2: -Infinity"):
        read_json(tmp_path / "x.json")


# ------------------------------------------------------------------------------------------ ids


@pytest.mark.parametrize("name", ["字" * 80, "a/b", ".a", "a\0b", "x" * 201])
def test_ids_have_one_rule_in_the_check_and_before_work(tmp_path, name):
    folder = _write_set(tmp_path / "set", "a", "b")
    records = read_json(folder / "meta.json")
    records[1]["id"] = name
    (folder / "meta.json").write_text(json.dumps(records))
    assert len(read_triplets(folder)) == 2  # to train on it, ids need not name files
    (problem,) = check_set(folder)
    assert problem.file == folder / "meta.json" and "record 2" in problem.reason
    assert "200 bytes" in problem.reason
    with pytest.raises(TripletError, match="cannot name a triplet's files"):
        merge_sets([folder], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_an_id_made_of_a_files_name_has_the_same_rule(tmp_path):
    folder = _write_set(tmp_path / "set", "a")
    long = "字" * 80
    (folder / "source/a.png").rename(folder / f"source/{long}.png")
    record = {"source": f"source/{long}.png", "mask": "mask/a.png", "GT": "GT/a.png"}
    (folder / "meta.json").write_text(json.dumps([record]))
    (problem,) = check_set(folder)
    assert "200 bytes" in problem.reason
