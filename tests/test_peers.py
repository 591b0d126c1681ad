import json
import pickle

import numpy as np
import pytest
from PIL import Image

from rorem_lib.data.items import Rejected, SourceError
from rorem_lib.data.pictures import TripletError
from rorem_lib.sources.peers import (
    CorneSource,
    OmniEraserSource,
    RemovalBenchSource,
    SmartEraserSource,
)

ALL = (RemovalBenchSource, SmartEraserSource, OmniEraserSource, CorneSource)


def _picture(seed, height=12, width=16):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


def _mask(column, height=12, width=16):
    mask = np.zeros((height, width), np.uint8)
    mask[3:7, column : column + 3] = 255
    return mask


def _save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def _load(source):
    return {item.id: source.load_item(item) for item in source.list_items()}


@pytest.fixture
def bench(tmp_path):
    """RemovalBench: two pictures, and the results that lie beside them."""
    folder = tmp_path / "移除 基准"
    for number, name in enumerate(("0001", "照片 2")):
        _save(folder / "images" / f"{name}.png", _picture(number))
        _save(folder / "gt" / f"{name}.png", _picture(number + 10))
        _save(folder / "masks" / f"{name}.png", _mask(number + 2))
    _save(folder / "results_omnieraser_base" / "0001.png", _picture(99))
    return folder


@pytest.fixture
def corne(tmp_path):
    """CORNE as SAVP writes it: masks with effects, named mask_<stem>, and masks of the object."""
    folder = tmp_path / "corne"
    for number in range(3):
        name = f"{number:06d}.png"
        _save(folder / "shot" / name, _picture(number))
        _save(folder / "bg" / name, _picture(number + 10))
        _save(folder / "masks" / f"mask_{name}", _mask(number + 5))
        _save(folder / "mask_sam" / name, _mask(number + 1))
    return folder


# ----------------------------------------------------------------------------- each one's layout


def test_removal_bench_is_a_test_set_matched_by_name(bench):
    source = RemovalBenchSource(str(bench))
    items = list(source.list_items())
    assert [(i.id, i.group, i.split) for i in items] == [
        ("0001", "0001", "test"),
        ("照片 2", "照片 2", "test"),
    ]
    found = source.load_item(items[1])
    assert np.array_equal(found.source.array, _picture(1))
    assert np.array_equal(found.gt.array, _picture(11))
    assert np.array_equal(found.mask.array, _mask(3))
    assert found.source.file == found.origin_file == bench / "images" / "照片 2.png"
    assert found.extra == {}


def test_the_files_suffixes_may_differ(bench):
    _save(bench / "gt" / "0001.BMP", _picture(10))
    (bench / "gt" / "0001.png").unlink()
    found = _load(RemovalBenchSource(str(bench)))["0001"]
    assert found.gt.file == bench / "gt" / "0001.BMP"
    assert np.array_equal(found.gt.array, _picture(10))


def test_two_pictures_of_one_stem_have_ids_of_their_own(bench):
    _save(bench / "images" / "0001.jpg", _picture(5))
    items = list(RemovalBenchSource(str(bench)).list_items())
    assert [i.id for i in items] == ["0001", "0001~2", "照片 2"]
    assert [i.place[1] for i in items[:2]] == [("images/0001.jpg",), ("images/0001.png",)]


def test_files_that_are_no_pictures_are_left_out(bench):
    (bench / "images" / "Thumbs.db").write_bytes(b"x")
    (bench / "images" / "._0001.png").write_bytes(b"x")
    assert len(list(RemovalBenchSource(str(bench)).list_items())) == 2


def test_omnieraser_reads_the_new_gt(tmp_path):
    _save(tmp_path / "img" / "a.png", _picture(1))
    _save(tmp_path / "gt_new" / "a.png", _picture(2))
    _save(tmp_path / "gt" / "a.png", _picture(3))
    _save(tmp_path / "sam_mask" / "a.png", _mask(4))
    found = _load(OmniEraserSource(str(tmp_path)))["a"]
    assert np.array_equal(found.source.array, _picture(1))
    assert np.array_equal(found.gt.array, _picture(2))
    assert np.array_equal(found.mask.array, _mask(4))


def _make_smarteraser(folder, split, names):
    for number, name in enumerate(names):
        _save(folder / split / "paste" / name, _picture(number, 24, 24))
        _save(folder / split / "gt" / name, _picture(number + 10, 24, 24))
        _save(folder / split / "mask" / name, _mask(8, 24, 24), quality=95)


def test_syn4removal_keeps_class_and_box_of_what_was_pasted(tmp_path):
    _make_smarteraser(tmp_path, "train", ["b.png", "a.png"])
    (tmp_path / "train" / "result.json").write_text(
        json.dumps({"a.png": ["Traffic light", [8, 3, 3, 4], [24, 24]], "b.png": [], "c.png": None})
    )
    source = SmartEraserSource(str(tmp_path))
    assert [(i.id, i.split) for i in source.list_items()] == [
        ("train-a", "train"),
        ("train-b", "train"),
    ]
    found = _load(source)
    assert found["train-a"].extra == {
        "class": "Traffic light",
        "box_xywh": [8, 3, 3, 4],
        "set": "train",
    }
    assert found["train-b"].extra == {"set": "train"}
    assert np.array_equal(found["train-a"].source.array, _picture(1, 24, 24))
    assert np.array_equal(found["train-a"].mask.array, _mask(8, 24, 24))


def test_a_split_folder_alone_is_a_set_too(tmp_path):
    _make_smarteraser(tmp_path, "train", ["a.png"])
    (item,) = SmartEraserSource(str(tmp_path / "train")).list_items()
    assert (item.id, item.split) == ("a", "train")


def test_the_val_sets_are_for_testing_and_rord_frames_are_grouped_by_scene(tmp_path):
    _make_smarteraser(
        tmp_path, "val_rord", ["I-210614_O04019_W01_F0109.jpg", "I-210614_O04019_W01_F0200.jpg"]
    )
    _make_smarteraser(tmp_path, "val_paste", ["000000006818.jpg"])
    items = list(SmartEraserSource(str(tmp_path)).list_items())
    assert [(i.id, i.group, i.split) for i in items] == [
        ("val_paste-000000006818", "val_paste-000000006818", "test"),
        ("val_rord-I-210614_O04019_W01_F0109", "I-210614_O04019_W01", "test"),
        ("val_rord-I-210614_O04019_W01_F0200", "I-210614_O04019_W01", "test"),
    ]
    mask = SmartEraserSource(str(tmp_path)).load_item(items[0]).mask.array
    assert np.array_equal(mask >= 128, _mask(8, 24, 24) >= 128)  # JPEG: grey at the edge


def test_a_damaged_list_of_results_is_named(tmp_path):
    _make_smarteraser(tmp_path, "train", ["a.png"])
    (tmp_path / "train" / "result.json").write_text('{"a.png": ["Dog", [1, 2')
    with pytest.raises(SourceError, match="result.json is no JSON .*download it again"):
        list(SmartEraserSource(str(tmp_path)).list_items())


# ------------------------------------------------------------------------------------------ CORNE


def test_corne_has_masks_of_the_object_and_with_its_effect(corne):
    first = _load(CorneSource(str(corne)))["000002"]
    other = _load(CorneSource(str(corne), mask="effect"))["000002"]
    assert np.array_equal(first.mask.array, _mask(3))
    assert np.array_equal(other.mask.array, _mask(7))
    assert (first.extra, other.extra) == ({"mask_kind": "object"}, {"mask_kind": "with_effect"})
    assert np.array_equal(other.gt.array, _picture(12))
    assert {item.split for item in CorneSource(str(corne)).list_items()} == {"train"}
    with pytest.raises(ValueError, match="mask must be object or effect, not 'both'"):
        CorneSource(str(corne), mask="both")


def test_an_object_without_an_effect_has_no_mask_of_its_own(corne):
    (corne / "mask_sam" / "000001.png").unlink()
    source = CorneSource(str(corne))
    first, second, _ = source.list_items()
    assert np.array_equal(source.load_item(first).mask.array, _mask(1))
    with pytest.raises(Rejected, match="mask_sam/000001.png is missing") as error:
        source.load_item(second)
    assert error.value.reason == "missing file"


def _write_lists(folder, **lists):
    for name, lines in lists.items():
        (folder / f"{name}_list.txt").write_text("\n".join(lines) + "\n\n", encoding="utf-8")


def test_the_lists_of_corne_say_what_belongs_together(corne):
    _write_lists(
        corne,
        shot=["shot/000000.png", "/data/me/corne/shot/000002.png"],
        bg=["bg/000001.png", "/data/me/corne/bg/000000.png"],
        mask=["masks/mask_000002.png", "corne/masks/mask_000001.png"],
        mask_sam=["mask_sam/000000.png", "mask_sam/000002.png"],
    )
    found = _load(CorneSource(str(corne), mask="effect"))
    assert list(found) == ["000000", "000002"]
    assert np.array_equal(found["000000"].gt.array, _picture(11))
    assert np.array_equal(found["000000"].mask.array, _mask(7))
    assert np.array_equal(found["000002"].source.array, _picture(2))
    assert np.array_equal(found["000002"].gt.array, _picture(10))
    assert np.array_equal(found["000002"].mask.array, _mask(6))


def test_a_list_never_opens_what_lies_outside(corne):
    _save(corne.parent / "secret.png", _picture(7))
    _write_lists(
        corne, shot=["../secret.png"], bg=["bg/000000.png"], mask_sam=["mask_sam/000000.png"]
    )
    source = CorneSource(str(corne))
    (item,) = source.list_items()
    with pytest.raises(Rejected, match="shot/secret.png is missing"):
        source.load_item(item)


def test_lists_that_are_not_aligned_are_refused(corne):
    _write_lists(
        corne,
        shot=["shot/000000.png", "shot/000001.png"],
        bg=["bg/000000.png"],
        mask_sam=["mask_sam/000000.png", "mask_sam/000001.png"],
    )
    with pytest.raises(SourceError, match="shot_list.txt has 2 lines.*bg_list.txt has 1 lines"):
        list(CorneSource(str(corne)).list_items())


def test_corne_val_is_for_testing(corne):
    val = corne / "CORNE-Val"
    _save(val / "shot" / "7.png", _picture(20))
    _save(val / "bg" / "7.png", _picture(21))
    _save(val / "mask_sam" / "7.png", _mask(9))
    _save(val / "mask_eff" / "7.png", _mask(11))
    items = {item.id: item for item in CorneSource(str(corne)).list_items()}
    assert [(name, item.split) for name, item in items.items()] == [
        ("000000", "train"),
        ("000001", "train"),
        ("000002", "train"),
        ("CORNE-Val-7", "test"),
    ]
    found = CorneSource(str(corne), mask="effect").load_item(
        list(CorneSource(str(corne), mask="effect").list_items())[3]
    )
    assert np.array_equal(found.mask.array, _mask(11))
    assert found.extra == {"set": "CORNE-Val", "mask_kind": "with_effect"}


# ------------------------------------------------------------------------------------- all of them


def test_missing_and_broken_files_reject_an_item_not_the_run(bench):
    (bench / "masks" / "0001.png").unlink()
    (bench / "gt" / "照片 2.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    source = RemovalBenchSource(str(bench))
    first, second = source.list_items()
    with pytest.raises(Rejected, match="masks/0001.png is missing.*download it again"):
        source.load_item(first)
    with pytest.raises(TripletError, match="照片 2.png"):
        source.load_item(second)


def test_masks_of_another_size_are_left_to_the_filters(bench):
    _save(bench / "masks" / "0001.png", _mask(2, 24, 32))
    assert _load(RemovalBenchSource(str(bench)))["0001"].mask.array.shape == (24, 32)


def test_no_source_takes_anothers_folder(bench, corne, tmp_path):
    _make_smarteraser(tmp_path / "syn", "train", ["a.png"])
    for name in ("img", "gt_new", "sam_mask"):
        (tmp_path / "omni" / name).mkdir(parents=True)
    folders = {
        RemovalBenchSource: bench,
        SmartEraserSource: tmp_path / "syn",
        OmniEraserSource: tmp_path / "omni",
        CorneSource: corne,
    }
    for source, folder in folders.items():
        assert [other for other in ALL if other.recognises(folder)] == [source]
    assert not any(source.recognises(tmp_path / "nowhere") for source in ALL)


@pytest.mark.parametrize("source", ALL)
def test_another_layout_is_refused_with_what_is_there(tmp_path, source):
    (tmp_path / "frames").mkdir()
    with pytest.raises(SourceError, match="expected .*it holds frames"):
        list(source(str(tmp_path)).list_items())
    with pytest.raises(SourceError, match="is no folder"):
        list(source(str(tmp_path / "gone")).list_items())


def test_importers_and_items_go_to_other_processes(corne):
    source = pickle.loads(pickle.dumps(CorneSource(str(corne), mask="effect")))
    item = pickle.loads(pickle.dumps(next(iter(source.list_items()))))
    assert np.array_equal(source.load_item(item).mask.array, _mask(5))
    assert item == next(iter(CorneSource(str(corne), mask="effect").list_items()))
