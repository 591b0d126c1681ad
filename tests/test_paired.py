"""Folders whose files belong together by patterns: anybody's, and those of other groups."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from rorem_lib.data.assembly import assemble_sets
from rorem_lib.data.filters import FilterConfig
from rorem_lib.data.items import Rejected, SourceError
from rorem_lib.data.pictures import TripletError
from rorem_lib.data.triplets import load_images, read_triplets
from rorem_lib.sources.paired import (
    CorneSource,
    OmniEraserSource,
    PairedSource,
    RemovalBenchSource,
    SmartEraserSource,
)
from rorem_lib.sources.registry import open_source

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
    """RemovalBench: two images, and the results that lie beside them."""
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
    _save(bench / "gt" / "0001.jpg", _picture(6))
    source = RemovalBenchSource(str(bench))
    items = list(source.list_items())
    assert [i.id for i in items] == ["0001", "0001~2", "照片 2"]
    assert [i.place[1] for i in items[:2]] == [("images/0001.jpg",), ("images/0001.png",)]
    # each has the GT of its own suffix
    assert [source.load_item(i).gt.file.name for i in items[:2]] == ["0001.jpg", "0001.png"]


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
    with pytest.raises(SourceError, match="result.json.*JSON"):
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
    with pytest.raises(ValueError, match="'both'"):
        CorneSource(str(corne), mask="both")


def test_an_object_without_an_effect_has_no_mask_of_its_own(corne):
    (corne / "mask_sam" / "000001.png").unlink()
    source = CorneSource(str(corne))
    first, second, _ = source.list_items()
    assert np.array_equal(source.load_item(first).mask.array, _mask(1))
    with pytest.raises(Rejected, match="mask_sam/000001.png") as error:
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
    with pytest.raises(SourceError, match="shot_list.txt.*2.*bg_list.txt.*1 lines"):
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
    with pytest.raises(Rejected, match="masks/0001.png"):
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


# -------------------------------------------------------------------------- patterns of one's own


SCENES = {
    "source": "{scene}/images/{name}.jpg",
    "mask": "{scene}/masks/{name}_{class}.png",
    "gt": "{scene}/gt/{name}.*",
}


@pytest.fixture
def scenes(tmp_path):
    """Two scenes; the first image of the first one has two masks, one image of the other none."""
    for number, (scene, name) in enumerate((("loft", "0_1"), ("loft", "2"), ("shed [b]", "2"))):
        picture = np.full((40, 60, 3), 60 + 40 * number, np.uint8)
        _save(tmp_path / scene / "images" / f"{name}.jpg", picture, quality=95)
        _save(tmp_path / scene / "gt" / f"{name}.webp", picture + 8, lossless=True)
        for side, kind in enumerate(("chair", "table")[: 2 - number]):
            _save(tmp_path / scene / "masks" / f"{name}_{kind}.PNG", _mask(5 + 4 * side, 40, 60))
    (tmp_path / "loft/images/notes.txt").write_text("no image")
    return tmp_path


def test_masks_that_are_black_where_to_remove_are_inverted(scenes):
    plain = open_source("paired", scenes, **SCENES)
    inverted = open_source("paired", scenes, **SCENES, invert_masks=True)
    item = next(iter(plain.list_items()))
    first, turned = plain.load_item(item).mask, inverted.load_item(item).mask
    assert np.array_equal(turned.array, 255 - first.array) and turned.file is None


def test_each_mask_of_an_image_is_a_triplet_of_its_scene(scenes):
    source = open_source("paired", scenes, **SCENES, group="{scene}", license="CC0-1.0")
    filters = FilterConfig(duplicate_distance=-1)
    result = assemble_sets(source, scenes / "out", filters=filters)
    found = {t.id: t for t in read_triplets(result.sets["labelled"])}
    assert list(found) == ["loft-0_1-chair", "loft-0_1-table", "loft-2-chair"]
    assert {t.group for t in found.values()} == {"loft"}
    first, second, _ = map(load_images, found.values())
    assert np.array_equal(first["source"], second["source"])
    assert np.array_equal(first["mask"], _mask(5, 40, 60))
    assert np.array_equal(second["mask"], _mask(9, 40, 60))
    assert abs(int(first["gt"][0, 0, 0]) - 68) < 2
    extra = found["loft-0_1-table"].extra
    assert (extra["scene"], extra["class"], extra["origin"], extra["license"], extra["file"]) == (
        "loft",
        "table",
        "paired folders",
        "CC0-1.0",
        "loft/images/0_1.jpg",
    )
    (line,) = (scenes / "out/rejected.jsonl").read_text().splitlines()
    assert json.loads(line) | {"message": ""} == {
        "id": "shed [b]-2",
        "group": "shed [b]",
        "set": "labelled",
        "reason": "missing file",
        "message": "",
    }
    assert f"{scenes}/shed [b]/masks/2_*.png is missing" in json.loads(line)["message"]


def test_by_default_an_image_with_all_its_masks_is_a_group(scenes):
    items = list(PairedSource(str(scenes), **SCENES).list_items())
    assert [(item.id, item.group, item.split) for item in items] == [
        ("loft-0_1-chair", "loft-0_1", None),
        ("loft-0_1-table", "loft-0_1", None),
        ("loft-2-chair", "loft-2", None),
        ("shed [b]-2", "shed [b]-2", None),
    ]
    clone = pickle.loads(pickle.dumps(PairedSource(str(scenes), **SCENES)))
    assert list(clone.list_items()) == items
    assert np.array_equal(clone.load_item(items[1]).mask.array, _mask(9, 40, 60))


def test_all_files_may_lie_in_one_folder(tmp_path):
    for name, array in (("a", _picture(1)), ("a_gt", _picture(2)), ("a_mask", _mask(3))):
        _save(tmp_path / "[raw] 1" / f"{name}.png", array)
    source = PairedSource(
        str(tmp_path), "[raw] 1/{name}.png", "[raw] 1/{name}_mask.png", "[raw] 1/{name}_gt.png"
    )
    (item,) = source.list_items()
    found = source.load_item(item)
    assert item.id == "a" and found.extra == {} and source.gives_gt
    assert np.array_equal(found.source.array, _picture(1))
    assert np.array_equal(found.gt.array, _picture(2))
    assert np.array_equal(found.mask.array, _mask(3))


def test_one_mask_and_one_plate_serve_a_whole_scene_and_folders_say_the_split(tmp_path):
    for split in ("train", "val"):
        for name in ("I-210614_O04019_W01_F0001", "b"):
            _save(tmp_path / split / "7" / f"{name}.jpg", _picture(1))
        _save(tmp_path / split / "7" / "plate.png", _picture(2))
        _save(tmp_path / "masks" / "7.png", _mask(3))
    masks = f"{tmp_path}/masks/{{scene}}.png"
    source = PairedSource(
        str(tmp_path), "{split}/{scene}/{name}.*", masks, "{split}/{scene}/plate.png"
    )
    items = list(source.list_items())
    assert [(item.id, item.group, item.split) for item in items] == [
        ("train-7-I-210614_O04019_W01_F0001", "I-210614_O04019_W01", "train"),
        ("train-7-b", "train-7-b", "train"),
        ("val-7-I-210614_O04019_W01_F0001", "I-210614_O04019_W01", "test"),
        ("val-7-b", "val-7-b", "test"),
    ]
    found = source.load_item(items[3])
    assert np.array_equal(found.gt.array, _picture(2)) and found.extra["split"] == "val"
    assert np.array_equal(found.mask.array, _mask(3))


def test_a_suffix_in_a_pattern_is_binding(tmp_path):
    _save(tmp_path / "a.jpg", _picture(1))
    _save(tmp_path / "b.PNG", _picture(2))
    _save(tmp_path / "m/b.png", _mask(3))
    (item,) = PairedSource(str(tmp_path), "{name}.png", "m/{name}.jpg").list_items()
    assert item.id == "b"
    _save(tmp_path / "n/b.PNG", _mask(5))  # upper and lower case are the same
    upper = PairedSource(str(tmp_path), "{name}.png", "n/{name}.png")
    (found,) = _load(upper).values()
    assert np.array_equal(found.mask.array, _mask(5))
    with pytest.raises(Rejected, match=r"m/b\.jpg"):
        PairedSource(str(tmp_path), "{name}.png", "m/{name}.jpg").load_item(item)


def test_without_a_pattern_of_the_gt_it_is_a_pool(scenes):
    source = PairedSource(str(scenes), "{scene}/images/{name}.*", SCENES["mask"])
    assert not source.gives_gt and PairedSource(str(scenes), **SCENES).gives_gt
    assert source.load_item(next(source.list_items())).gt is None
    result = assemble_sets(source, scenes / "out", filters=FilterConfig(duplicate_distance=-1))
    assert result.counts == {"pool": 3}


@pytest.mark.parametrize(
    "patterns, words",
    [
        ({}, "source_options = .*it holds loft, shed"),
        (SCENES | {"source": "{scene}/image/{name}.jpg"}, r"expected \{scene\}/image/.*holds loft"),
        (SCENES | {"mask": "masks/{name}.png"}, r"expected .*, masks/\{name\}.png, .*holds loft"),
    ],
)
def test_patterns_that_fit_nothing_are_named_with_what_is_there(scenes, patterns, words):
    with pytest.raises(SourceError, match=f"(?s){scenes}.*{words}"):
        list(open_source("paired", scenes, **patterns).list_items())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"gt": "gt/{number}.png"}, "gt has a field that is not scene or name or class"),
        ({"group": "{class}"}, "group has a field that is not scene or name"),
        ({"source": "images/{na me}.png"}, "source"),
        ({"source": "images/{name.png"}, "source"),
        ({"mask": "masks/{name}{.png"}, "mask has a field"),
        ({"source": "photo.png", "gt": "gt.png"}, "a source with a field, such as {name}"),
        ({"mask": ""}, "and a mask"),
        ({"gt": "gt/{name}"}, r"gt must end in \.\* or \.png"),
        ({"mask": "masks/{name}_{origin}.png"}, "fields must not be called origin"),
        ({"source": 3}, "source must be a text"),
        ({"mask": "masks/{name}_{score}.png"}, "fields must not be called score"),
        ({"mask": "masks/{name}_{accepted_by}.png"}, "fields must not be called accepted_by"),
        ({"group": "{scene.x}"}, "group has a field that is not scene or name"),
        ({"group": "scene"}, "group has no field in braces"),
        ({"gt": SCENES["source"]}, "two patterns are the same"),
        ({"mask": "{Scene}/masks/{name}.png"}, "upper and lower case alone: Scene, scene"),
        ({"mask": "masks/{number}.png", "gt": ""}, "mask has none of the source's fields"),
    ],
)
def test_patterns_that_mean_nothing_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        PairedSource("x", **SCENES | change)
