import json
import pickle

import numpy as np
import pytest
from PIL import Image

from rorem_lib.data.items import Rejected, SourceError
from rorem_lib.data.pictures import TripletError
from rorem_lib.data.triplets import HIDDEN_MARK
from rorem_lib.data.writer import TripletWriter
from rorem_lib.sources.upstream import UpstreamSource


def _picture(seed):
    return np.random.default_rng(seed).integers(0, 255, (12, 16, 3), np.uint8)


def _mask(width):
    mask = np.zeros((12, 16), np.uint8)
    mask[2:6, 1 : 1 + width] = 255
    return mask


def _save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def _record(name="a", **changes):
    record = {"source": f"source/{name}.png", "mask": f"mask/{name}.png", "GT": f"GT/{name}.png"}
    return {k: v for k, v in {**record, **changes}.items() if v is not None}


def _write_set(folder, names=("a", "b"), seed=0, meta="meta.json", text=None, **changes):
    """A set as the authors publish it; the numbers of its images go on from `seed`."""
    for number, name in enumerate(names, seed):
        _save(folder / "source" / f"{name}.png", _picture(number))
        _save(folder / "mask" / f"{name}.png", _mask(3 + number % 10))
        _save(folder / "GT" / f"{name}.png", _picture(number + 100))
    text = json.dumps([_record(name, **changes) for name in names]) if text is None else text
    (folder / meta).write_text(text, encoding="utf-8")
    return folder


def _list(folder, **options):
    return list(UpstreamSource(str(folder), **options).list_items())


def _load(folder, **options):
    source = UpstreamSource(str(folder), **options)
    return [source.load_item(item) for item in source.list_items()]


# ------------------------------------------------------------------------------ what is understood


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([_record("a"), _record("b")]),
        json.dumps(_record("a")) + "\n" + json.dumps(_record("b")) + "\n",
        "\ufeff" + json.dumps([_record("a"), _record("b")], indent=2),
    ],
    ids=["list", "lines", "byte-order mark"],
)
def test_the_published_forms_of_meta_are_read(tmp_path, text):
    folder = _write_set(tmp_path / "最终 集", text=text)
    assert [(i.id, i.group, i.split) for i in _list(folder)] == [("a", "a", None), ("b", "b", None)]
    first, second = _load(folder)
    assert np.array_equal(second.source.array, _picture(1))
    assert np.array_equal(second.mask.array, _mask(4))
    assert np.array_equal(second.gt.array, _picture(101))
    assert first.source.file == first.origin_file == folder / "source" / "a.png"
    assert first.extra == {"set": "最终 集"}


def test_a_single_object_is_a_set_of_one(tmp_path):
    _write_set(tmp_path, text=json.dumps(_record("b")))
    assert [i.id for i in _list(tmp_path)] == ["b"]


def test_scores_become_numbers(tmp_path):
    _write_set(tmp_path, ["a"], score="1")
    assert _load(tmp_path)[0].extra["score"] == 1.0


def test_the_older_keys_name_the_picture_given_in_gt(tmp_path):
    _write_set(
        tmp_path,
        ["a"],
        text=json.dumps(
            [
                {
                    "gt": "source/a.png",
                    "inpaint": "GT/a.png",
                    "mask": "mask/a.png",
                    "text": {"label": {"name": "dog"}},
                }
            ]
        ),
    )
    (item,) = _list(tmp_path)
    (found,) = _load(tmp_path)
    assert item.id == "a"
    assert np.array_equal(found.source.array, _picture(0))
    assert np.array_equal(found.gt.array, _picture(100))
    assert found.extra == {"set": tmp_path.name, "text": {"label": {"name": "dog"}}}


def test_a_set_of_this_kit_comes_back_with_all_its_keys(tmp_path):
    with TripletWriter(tmp_path / "labelled") as writer:
        writer.add(
            id="rord-1",
            source=_picture(1),
            mask=_mask(3),
            gt=_picture(2),
            group="scene 7",
            origin="RORD",
            license="CC BY 4.0",
            score=0.0,
            width=999,
            height=999,
            phash="0f",
            file="img/scene 7/1.jpg",
            set="first",
        )
    (item,) = _list(tmp_path / "labelled")
    (found,) = _load(tmp_path / "labelled")
    assert (item.id, item.group) == ("rord-1", "scene 7")
    assert found.extra == {
        "origin": "RORD",
        "license": "CC BY 4.0",
        "score": 0.0,
        "phash": "0f",
        "file": "img/scene 7/1.jpg",
        "set": "first",
    }
    assert np.array_equal(found.gt.array, _picture(2))


# ------------------------------------------------------------------------------------ several sets


def test_all_sets_below_are_read_and_their_ids_stay_apart(tmp_path):
    _write_set(tmp_path / "Mulan", ["0", "1"], seed=0)
    _write_set(tmp_path / "data" / "RORD", ["0"], seed=5, group="scene")
    items = _list(tmp_path)
    assert [(i.id, i.group) for i in items] == [
        ("Mulan-0", "Mulan-0"),
        ("Mulan-1", "Mulan-1"),
        ("RORD-0", "scene"),
    ]
    found = _load(tmp_path)
    assert [f.extra["set"] for f in found] == ["Mulan", "Mulan", "RORD"]
    assert np.array_equal(found[2].source.array, _picture(5))


def test_sets_of_one_name_and_metas_of_one_folder_stay_apart_too(tmp_path):
    _write_set(tmp_path / "x" / "set", ["0"])
    _write_set(tmp_path / "y" / "set", ["0"])
    _write_set(tmp_path / "y" / "set", ["0"], meta="meta_b.json")
    assert [i.id for i in _list(tmp_path)] == ["x-set-meta-0", "y-set-meta-0", "y-set-meta_b-0"]


def test_equal_file_names_get_ids_of_their_own(tmp_path):
    _save(tmp_path / "more" / "a.png", _picture(7))
    _write_set(tmp_path, ["a"], text=json.dumps([_record("a"), _record(source="more/a.png")]))
    assert [(i.id, i.group) for i in _list(tmp_path)] == [("a", "a"), ("a~2", "a~2")]
    assert np.array_equal(_load(tmp_path)[1].source.array, _picture(7))


def test_metas_are_chosen_by_file_or_set(tmp_path):
    for name in ("Mulan", "RORD", "HR"):
        _write_set(tmp_path / name, ["0"])
    _write_set(tmp_path / "RORD", ["0", "1"], meta="one_frame.json")
    items = _list(tmp_path, metas=["HR", "RORD/one_frame.json"])
    assert [i.id for i in items] == ["HR-0", "RORD-0", "RORD-1"]
    with pytest.raises(SourceError, match="gone/meta.json"):
        _list(tmp_path, metas=["HR", "gone/meta.json"])


def test_other_json_files_count_where_there_is_no_meta_file(tmp_path):
    _write_set(tmp_path / "RORD_inpaint", ["0"], meta="RORD_one_frame_in_one_video.json")
    (tmp_path / "RORD_inpaint" / "classes.json").write_text('{"mask": 1, "source": 2}')
    (tmp_path / "RORD_inpaint" / "config.json").write_text("{broken")
    _write_set(tmp_path / "HR", ["0"])
    (tmp_path / "HR" / "train.json").write_text(json.dumps([_record("0")]))
    (tmp_path / "HR" / "metadata.json").write_text('{"name": "HR"}')
    assert [i.id for i in _list(tmp_path)] == ["HR-0", "RORD_inpaint-0"]


def test_deeper_and_hidden_folders_are_not_searched(tmp_path):
    _write_set(tmp_path / "1" / "2", ["a"])
    _write_set(tmp_path / "1" / "2" / "3", ["b"])
    _write_set(tmp_path / "source", ["c"])
    _write_set(tmp_path / ".old", ["d"])
    assert [i.id for i in _list(tmp_path)] == ["a"]


def test_a_test_set_is_not_for_training(tmp_path):
    _write_set(tmp_path / "testset_RORem", ["a"])
    _write_set(tmp_path / "labelled", ["a"])
    _write_set(tmp_path / "own", ["a"], split="train")
    assert [(i.id, i.split) for i in _list(tmp_path)] == [
        ("labelled-a", None),
        ("own-a", "train"),
        ("testset_RORem-a", "test"),
    ]


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "record, reason, words",
    [
        (_record(source="../secret.png"), "bad record", "record 1: ../secret.png leaves the set's"),
        (_record(source="source/../../secret.png"), "bad record", "leaves the set's folder"),
        (_record(mask=3), "bad record", "a path must be a text, not 3"),
        (_record(mask=None), "bad record", "record 1 has no mask"),
        (_record(score="good"), "bad record", "score 'good' is no number"),
        (["source/a.png"], "bad record", "record 1 is no object"),
        (_record(source="source/" + "x" * 400 + ".png"), "missing file", "is missing"),
        (_record(source="source/gone.png"), "missing file", "gone.png is missing .*restore it"),
        (_record(GT=None), "no GT", "record 1 has no GT.*require_gt: false"),
        (_record(source="hidden/a.png"), "bad record", "hidden folder"),
        (_record(source="a\0b/a.png"), "bad record", "record 1: .*null"),
    ],
)
def test_a_bad_record_is_rejected_and_the_rest_goes_on(tmp_path, record, reason, words):
    _save(tmp_path / "secret.png", _picture(9))
    folder = _write_set(
        tmp_path / "set", ["a", "b"], text=json.dumps([record, _record("b"), _record("a")])
    )
    (folder / "hidden").mkdir()
    (folder / "hidden" / HIDDEN_MARK).touch()
    source = UpstreamSource(str(folder))
    items = list(source.list_items())
    assert len({item.id for item in items}) == 3
    with pytest.raises(Rejected, match=words) as error:
        source.load_item(items[0])
    assert error.value.reason == reason and str(folder) in error.value.message
    assert np.array_equal(source.load_item(items[1]).source.array, _picture(1))
    assert np.array_equal(source.load_item(items[2]).source.array, _picture(0))


def test_paths_elsewhere_only_when_asked_for(tmp_path):
    _save(tmp_path / "x.png", _picture(9))
    folder = _write_set(tmp_path / "set", ["a"], source="../x.png")
    assert np.array_equal(_load(folder, allow_outside=True)[0].source.array, _picture(9))
    _write_set(folder, ["a"], source=str(tmp_path / "x.png"))
    with pytest.raises(Rejected, match="is an absolute path"):
        _load(folder, allow_outside=True)
    assert np.array_equal(_load(folder, allow_absolute=True)[0].source.array, _picture(9))


def test_a_broken_picture_is_the_readers_error(tmp_path):
    _write_set(tmp_path, ["a"])
    (tmp_path / "mask" / "a.png").write_bytes(b"no image")
    with pytest.raises(TripletError, match="mask/a.png is no image"):
        _load(tmp_path)


def test_a_pool_has_no_gt_and_says_so(tmp_path):
    _write_set(tmp_path, ["a", "b"], text=json.dumps([_record("a", GT=None), _record("b")]))
    pool = UpstreamSource(str(tmp_path), require_gt=False)
    first, second = (pool.load_item(item) for item in pool.list_items())
    assert first.gt is None and np.array_equal(second.gt.array, _picture(101))
    assert UpstreamSource(str(tmp_path)).gives_gt
    assert not pickle.loads(pickle.dumps(pool)).gives_gt


def test_a_damaged_meta_file_is_named(tmp_path):
    _write_set(tmp_path, ["a"], text="version https://git-lfs.github.com/spec/v1\noid 12")
    with pytest.raises(SourceError, match="meta.json is a Git-LFS pointer"):
        _list(tmp_path)
    cut = json.dumps([_record("a")] * 50)[:-40]
    _write_set(tmp_path, ["a"], text=cut)
    items = UpstreamSource(str(tmp_path)).list_items()
    assert next(items).id == "a"
    with pytest.raises(SourceError, match="meta.json.*JSON.*JSON"):
        list(items)


def test_a_folder_without_a_set_is_refused_with_what_is_there(tmp_path):
    (tmp_path / "RORem.tar.gz").write_bytes(b"x")
    with pytest.raises(SourceError, match="meta.json.*RORem.tar.gz"):
        _list(tmp_path)
    with pytest.raises(SourceError, match="is no folder"):
        _list(tmp_path / "gone")


def test_a_set_and_a_folder_of_sets_are_recognised(tmp_path):
    _write_set(tmp_path / "sets" / "Mulan", ["a"])
    assert UpstreamSource.recognises(tmp_path / "sets")
    assert UpstreamSource.recognises(tmp_path / "sets" / "Mulan")
    assert not UpstreamSource.recognises(tmp_path)
    assert not UpstreamSource.recognises(tmp_path / "gone")


def test_options_say_what_is_allowed():
    for options, words in (
        ({"metas": "meta.json"}, "metas must be a list"),
        ({"metas": [3]}, "metas must be a list"),
        ({"allow_absolute": "no"}, "allow_absolute must be true or false"),
    ):
        with pytest.raises(ValueError, match=words):
            UpstreamSource("x", **options)
    assert UpstreamSource("x", metas=["a"]).metas == ("a",)
