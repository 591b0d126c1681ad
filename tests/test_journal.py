"""Journals, and the sets that are folded from them: nothing is lost, whatever the order."""

import contextlib
import errno
import itertools
import json
import resource

import numpy as np
import pytest

from rorem_lib.data import journal
from rorem_lib.data.check import check_set
from rorem_lib.data.journal import Journal, JournalIndex, write_lines, write_list
from rorem_lib.data.pictures import load_image, save_image
from rorem_lib.data.triplets import read_triplets
from rorem_lib.data.writer import TripletWriter, write_files


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


@pytest.mark.parametrize(
    "torn", [b"", b'{"id": "c"', b'{"id": "' + b"c" * 200_000, b"c" * 65535]
)  # with the newline before it what is read at once
def test_appending_goes_on_behind_the_last_whole_line(tmp_path, torn):
    path = tmp_path / "a.jsonl"
    for before in (b"", b'{"id": "a"}\n'):
        path.write_bytes(before + torn)
        writer = Journal(path)
        returned = writer.append({"id": "b", "x": np.float32(0.5), "n": np.int64(3), "t": (1, 2)})
        assert returned == {"id": "b", "x": 0.5, "n": 3, "t": [1, 2]}
        assert path.read_bytes() == before + json.dumps(returned).encode() + b"\n"
        writer.close()
        writer.append({"id": "c"})
        writer.close()
        writer.close()
        with JournalIndex([path]) as index:
            assert index.list_ids() == ["a", "b", "c"][not before :]
            assert index["b"] == returned


def test_positions_beyond_4_gb_are_found_in_each_of_several_files(tmp_path, monkeypatch):
    places = {"1": 5 * 2**30, "2": 2**32, "3": 0}
    for name, place in places.items():
        with open(tmp_path / name, "wb") as stream:  # what is not written takes no space
            stream.seek(place)
            stream.write(b'{"id": "of %s"}\n' % name.encode())
    monkeypatch.setattr(
        journal, "read_lines", lambda path: [(places[path.name], {"id": f"of {path.name}"})]
    )
    with JournalIndex([tmp_path / name for name in places]) as index:
        assert list(index.items()) == [{"id": f"of {name}"} for name in places]


@contextlib.contextmanager
def _limit_files(size):
    """Files cannot grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_whole_lines_and_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    writer = Journal(path)
    writer.append({"id": "a"})
    for size in (20, 12):  # there is space for half a line, and for none
        with _limit_files(size):
            with pytest.raises(OSError, match=f"cannot write {path}: ") as caught:
                writer.append({"id": "a longer one"})
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
        assert path.read_bytes() == b'{"id": "a"}\n'
    writer.append({"id": "b"})
    assert path.read_bytes() == b'{"id": "a"}\n{"id": "b"}\n'


@pytest.mark.parametrize("write", [write_list, write_lines])
def test_a_list_that_does_not_fit_leaves_the_old_one_and_is_named(tmp_path, write):
    path = tmp_path / "meta.json"
    write(path, [{"id": "old"}])
    old = path.read_bytes()
    with _limit_files(1000):
        with pytest.raises(OSError, match=f"cannot write {path}: "):
            write(path, ({"id": str(n)} for n in range(100_000)))
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


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


# ------------------------------------------------------------------------- sets out of journals


def _picture(seed):
    return np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)


def _mask():
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 4:9] = 255
    return mask


def _write_set(folder, *names):
    with TripletWriter(folder) as writer:
        for number, name in enumerate(names):
            writer.add(id=name, source=_picture(number), mask=_mask(), gt=_picture(number + 50))
    return folder


def _list_files(folder):
    """The files of a set, but for the mark that it is the writer's."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("[!.]*") if path.is_file())


def _files_of(*names):
    return sorted(
        [f"{part}/{name}.png" for part in ("source", "mask", "GT") for name in names]
        + ["meta.json"]
    )


def test_a_set_is_the_same_whatever_the_order_the_journals_and_the_interruptions(tmp_path):
    folds = set()
    for number, order in enumerate(itertools.permutations("abc")):
        folder = tmp_path / str(number)
        folder.mkdir()
        for place, name in enumerate(order):
            record = write_files(
                folder, id=name, source=_picture(ord(name)), mask=_mask(), round=ord(name)
            )
            writer = TripletWriter(folder, part=str(place) if number % 2 else "")
            assert name not in writer.done_ids  # written, and not in the set yet
            writer.add_record(record)
            assert name in writer.done_ids
            if number % 3 == 0:
                writer.close()
        TripletWriter(folder).close()
        folds.add((folder / "meta.json").read_bytes())
        assert sorted(p.name for p in folder.glob("[!.]*")) == ["mask", "meta.json", "source"]
    assert len(folds) == 1
    assert [record["round"] for record in json.loads(folds.pop())] == [97, 98, 99]


def test_an_index_holds_what_the_set_and_its_journals_say_the_newest_first(tmp_path):
    _write_set(tmp_path, "a", "b")
    writer = TripletWriter(tmp_path)
    for name in "bc":
        writer.add(id=name, source=_picture(8), mask=_mask(), round=2)
    with writer.open_index() as index:
        assert index.list_ids() == ["a", "b", "c"]
        assert [record.get("round") for record in index.items()] == [None, 2, 2]
    writer.close()
    again = TripletWriter(tmp_path, restart=True)
    with again.open_index() as index:
        assert len(index) == 0
    again.add(id="z", source=_picture(8), mask=_mask())
    with again.open_index() as index:
        assert index.list_ids() == ["z"]
    again.close()
    assert _list_files(tmp_path) == ["mask/z.png", "meta.json", "source/z.png"]


def test_what_is_dropped_is_gone_with_its_files_and_nothing_else(tmp_path):
    _write_set(tmp_path, "a", "b")
    writer = TripletWriter(tmp_path)
    for number, name in enumerate("cd"):
        writer.add(id=name, source=_picture(9), mask=_mask(), gt=_picture(60 + number))
    writer.close(drop={"b", "c", "never there"})
    assert [triplet.id for triplet in read_triplets(tmp_path)] == ["a", "d"]
    assert _list_files(tmp_path) == _files_of("a", "d")
    assert check_set(tmp_path) == []


def test_a_file_of_two_records_stays_when_one_is_dropped(tmp_path):
    _write_set(tmp_path, "a", "b")
    records = json.loads((tmp_path / "meta.json").read_text())
    records[1]["source"] = "source/a.png"  # two masks over one image
    write_list(tmp_path / "meta.json", records)
    TripletWriter(tmp_path).close(drop={"a"})
    (triplet,) = read_triplets(tmp_path)
    assert np.array_equal(load_image(triplet.source), _picture(0))


@pytest.mark.parametrize("keys", [("source", "mask", "GT"), ("gt", "mask", "inpaint")])
def test_records_without_ids_survive_a_writer(tmp_path, keys):
    _write_set(tmp_path, "a", "b")
    for number, folder in enumerate("xy"):
        (tmp_path / folder).mkdir()
        save_image(tmp_path / folder / "0.png", _picture(number))
    write_list(
        tmp_path / "meta.json",
        [dict(zip(keys, (f"{folder}/0.png", "mask/a.png", "GT/a.png"))) for folder in "xy"],
    )
    before = [(t.id, t.source) for t in read_triplets(tmp_path)]
    TripletWriter(tmp_path).close()
    assert [(t.id, t.source) for t in read_triplets(tmp_path)] == before
    assert [load_image(source).tolist() for _, source in before] == [
        _picture(number).tolist() for number in range(2)
    ]
