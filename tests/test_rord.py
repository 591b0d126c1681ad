import json
import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from rorem_lib.data.items import Rejected, SourceError
from rorem_lib.data.pictures import TripletError
from rorem_lib.sources.registry import discover_source
from rorem_lib.sources.rord import RordSource

WIDTH, HEIGHT = 96, 54
SCENE = "I-210618_I01001_W01"
BOX = [60, 30, 119, 30, 119, 79, 60, 79]  # on 192x108: x 30..59, y 15..39 of the images here


def _plate(seed=0, width=WIDTH, height=HEIGHT):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    smooth = cv2.GaussianBlur(noise, (0, 0), width / 24)
    return cv2.normalize(smooth, None, 60, 190, cv2.NORM_MINMAX)


def _frame(plate, *boxes, colour=(230, 20, 40)):
    frame = plate.copy()
    for x0, y0, x1, y1 in boxes or [(30, 15, 60, 40)]:
        frame[y0:y1, x0:x1] = colour
    return frame


def _hole(x0=30, y0=15, x1=60, y1=40):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y0:y1, x0:x1] = 255
    return mask


def _save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, quality=95)


def _label(path, *polygons, resolution="192, 108"):
    """Polygons are (Class_ID, [x, y, ...])."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "Raw_Data_Info.": {"Raw_Data_ID": "영상", "Resolution": resolution},
                "Learning_Data_Info.": {
                    "Annotation": [
                        {"Class_ID": name, "segmentation": points} for name, points in polygons
                    ]
                },
            },
            ensure_ascii=False,
        ),
        encoding="utf-8",
    )


def _opened(path, mode="RGB"):
    return np.array(Image.open(path).convert(mode))


def _load(source, **filters):
    """All items' images by their frame's stem."""
    return {
        item.place.name.rsplit(".", 1)[0]: source.load_item(item) for item in source.list_items()
    }


def _low_resolution(root, scene=SCENE, split="train", count=3, inverted=True):
    part = root / split
    plate = _plate()
    _save(part / "img" / scene / f"{scene}_G0001.jpg", plate)
    for number in range(1, count + 1):
        stem = f"{scene}_F{number:04d}"
        _save(part / "img" / scene / f"{stem}.jpg", _frame(plate + np.uint8(number)))
        _save(part / "gt" / scene / f"{stem}.jpg", plate + np.uint8(number))
        mask = _hole(25, 12, 70, 45)  # with the shadow
        _save(part / "mask" / scene / f"{stem}_M.png", 255 - mask if inverted else mask)
        _label(part / "label" / scene / f"{stem}.json", ("F38", BOX))
    return root


def _raw(root, scene=SCENE, count=3, part="S1"):
    plate = _plate()
    for number in range(1, count + 1):
        stem = f"{scene}_F{number:04d}"
        _save(root / part / "jpg" / scene / f"{stem}.jpg", _frame(plate + np.uint8(number)))
        _label(root / part / "M" / scene / f"{stem}_M.json", ("F38", BOX))
    _save(root / part / "jpg" / scene / f"{scene}_G0001.jpg", plate)
    return root


def _preprocessed(root, stems, split="train", inverted=True):
    plate = _plate()
    for stem in stems:
        _save(root / split / "img" / f"{stem}.png", _frame(plate))
        _save(root / split / "gt" / f"{stem}.png", plate)
        _save(root / split / "mask" / f"{stem}.png", 255 - _hole() if inverted else _hole())
    return root


# ----------------------------------------------------------------------- the authors' preprocessing


def _preprocess_as_authors(image_path, plate_path, label_path, size=(480, 270)):
    """What the authors' program writes for a frame: BGR img and gt, mask with 0 = hole."""
    image, plate = cv2.imread(str(image_path)), cv2.imread(str(plate_path))
    rows, columns = image.shape[:2]
    mask = np.zeros((rows, columns), np.uint8)
    gt = image.copy()
    label = json.loads(Path(label_path).read_text(encoding="utf-8"))
    for annotation in label["Learning_Data_Info."]["Annotation"]:
        corners = annotation["segmentation"]
        if len(corners) < 6:
            continue
        corners = np.array(corners).reshape(-1, 2)
        one = np.zeros((rows, columns), np.uint8)
        cv2.fillPoly(one, [corners], 1)
        if one.sum() <= 1:
            continue
        left, top, across, down = cv2.boundingRect(corners)
        mask[one == 1] = 1
        plate_yuv = cv2.cvtColor(plate, cv2.COLOR_BGR2YUV)
        plate_y = plate_yuv[:, :, 0]
        framed = cv2.copyMakeBorder(plate_y, 10, 10, 10, 10, cv2.BORDER_REFLECT)
        framed[10:-10, 10:-10] = cv2.cvtColor(gt, cv2.COLOR_BGR2YUV)[:, :, 0]
        framed_one = cv2.copyMakeBorder(one, 10, 10, 10, 10, cv2.BORDER_CONSTANT, value=0)
        continued = cv2.inpaint(framed, framed_one, 3, cv2.INPAINT_NS)[10:-10, 10:-10]
        cloned = cv2.seamlessClone(
            np.repeat(plate_y[:, :, None], 3, axis=2),
            np.repeat(continued[:, :, None], 3, axis=2),
            one * 255,
            (left + across // 2, top + down // 2),
            cv2.NORMAL_CLONE,
        )
        yuv = np.concatenate((cloned[:, :, :1], plate_yuv[:, :, 1:]), axis=2)
        gt = cv2.cvtColor(yuv, cv2.COLOR_YUV2BGR)
    return (
        cv2.resize(image, size, interpolation=cv2.INTER_AREA),
        cv2.resize(gt, size, interpolation=cv2.INTER_AREA),
        cv2.resize(255 - 255 * mask, size, interpolation=cv2.INTER_NEAREST),
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A raw video of 960x540 with polygons of every kind."""
    folder = tmp_path_factory.mktemp("raw") / "S1"
    plate = _plate(3, 960, 540)
    polygons = [
        ("F38", [200, 100, 330, 80, 350, 260, 210, 300]),
        ("F02", [10, 10, 20, 20]),
        ("F38", [300, 200, 420, 190, 440, 330, 310, 340]),  # over the first one
        ("F40", [500, 500, 500, 500, 500, 500]),  # a single pixel
        ("F12", [860, 200, 960, 210, 960, 420, 870, 400]),  # a column over the border
        ("F12", [0, 420, 130, 440, 120, 539, 0, 539]),
    ]
    for number in (1, 2):
        frame = plate + np.uint8(2 * number)  # the light drifts
        for (_, points), colour in zip(
            polygons,
            [(220, 30, 30), (0, 0, 0), (30, 40, 210), (0, 0, 0), (240, 240, 60), (20, 90, 20)],
        ):
            cv2.fillPoly(frame, [np.array(points).reshape(-1, 2) - number], colour)
        stem = f"{SCENE}_F{number:04d}"
        _save(folder / "jpg" / SCENE / f"{stem}.jpg", frame)
        _label(folder / "M" / SCENE / f"{stem}_M.json", *polygons, resolution="960, 540")
    _save(folder / "jpg" / SCENE / f"{SCENE}_G0001.jpg", plate)
    return folder


def test_raw_frames_become_what_the_authors_preprocessing_writes(large):
    source = RordSource(str(large.parent), frames=1, size=(480, 270))
    items = list(source.list_items())
    assert len(items) == 2
    for item in items:
        found = source.load_item(item)
        stem = item.place.name.removesuffix(".jpg")
        image, gt, mask = _preprocess_as_authors(
            large / "jpg" / SCENE / f"{stem}.jpg",
            large / "jpg" / SCENE / f"{SCENE}_G0001.jpg",
            large / "M" / SCENE / f"{stem}_M.json",
        )
        assert np.array_equal(found.source.array, image[..., ::-1])
        assert np.array_equal(found.gt.array, gt[..., ::-1])
        assert np.array_equal(found.mask.array, 255 - mask)
        assert 0.05 < (mask == 0).mean() < 0.25
        assert found.source.file is found.mask.file is found.gt.file is None
        assert found.extra == {
            "gt_kind": "blended",
            "mask_kind": "label",
            "frame": int(stem[-1]),
            "classes": ["F12", "F38"],
        }


def test_what_is_written_for_layout_3_loads_as_the_raw_frame_does(large, tmp_path):
    stem = f"{SCENE}_F0001"
    image, gt, mask = _preprocess_as_authors(
        large / "jpg" / SCENE / f"{stem}.jpg",
        large / "jpg" / SCENE / f"{SCENE}_G0001.jpg",
        large / "M" / SCENE / f"{stem}_M.json",
    )
    for name, array in (("img", image[..., ::-1]), ("gt", gt[..., ::-1]), ("mask", mask)):
        _save(tmp_path / "train" / name / f"{stem}.png", array)
    ours = _load(RordSource(str(large), frames=1, size=(480, 270)))[stem]
    written = _load(RordSource(str(tmp_path)))[stem]
    for part in ("source", "gt", "mask"):
        assert np.array_equal(getattr(written, part).array, getattr(ours, part).array)
    assert written.extra == {
        "gt_kind": "blended",
        "mask_kind": "label",
        "mask_inverted": True,
        "frame": 1,
    }


def test_background_polygons_are_left_in_the_mask_and_in_the_gt(tmp_path):
    _raw(tmp_path, count=1)
    frame = tmp_path / "S1" / "jpg" / SCENE / f"{SCENE}_F0001.jpg"
    _save(frame, _frame(_plate(), (30, 15, 60, 40), (70, 10, 90, 30), colour=(40, 40, 40)))
    _label(
        tmp_path / "S1" / "M" / SCENE / f"{SCENE}_F0001_M.json",
        ("F38", BOX),
        ("BO07", [140, 20, 179, 20, 179, 59, 140, 59]),
    )
    (found,) = _load(RordSource(str(tmp_path))).values()
    assert np.array_equal(found.mask.array, _hole())
    assert found.extra["classes"] == ["F38"]
    luma = [
        cv2.cvtColor(x, cv2.COLOR_RGB2YUV)[..., 0].astype(int)
        for x in (found.gt.array, found.source.array, _plate())
    ]
    kept = np.s_[12:28, 72:88]
    assert np.abs(luma[0] - luma[1])[kept].mean() < 12  # clipped where the chroma is the plate's
    assert np.abs(luma[0] - luma[2])[kept].mean() > 40
    assert np.abs(luma[0] - luma[2])[17:38, 32:58].mean() < 6

    (both,) = _load(RordSource(str(tmp_path), classes=("F", "BO"))).values()
    assert np.array_equal(both.mask.array, _hole() | _hole(70, 10, 90, 30))
    assert both.extra["classes"] == ["BO07", "F38"]


@pytest.mark.parametrize(
    "points, box",
    [
        ([-30, -20, 60, -20, 60, 80, -30, 80], (0, 0, 31, 41)),
        ([150, 60, 300, 60, 300, 200, 150, 200], (75, 30, 96, 54)),
        ([-40, 40, 400, 40, 400, 80, -40, 80], (0, 20, 96, 41)),
    ],
)
def test_polygons_that_leave_the_picture_are_blended_in_place(tmp_path, points, box):
    _raw(tmp_path, count=1)
    _save(tmp_path / "S1" / "jpg" / SCENE / f"{SCENE}_F0001.jpg", _frame(_plate(), box))
    _label(tmp_path / "S1" / "M" / SCENE / f"{SCENE}_F0001_M.json", ("F38", points))
    (found,) = _load(RordSource(str(tmp_path))).values()
    assert np.array_equal(found.mask.array, _hole(*box))
    difference = np.abs(found.gt.array.astype(int) - _plate())[found.mask.array > 0]
    assert (
        difference.mean()
        < 25
        < np.abs(found.source.array.astype(int) - _plate())[found.mask.array > 0].mean()
    )


@pytest.mark.parametrize(
    "points",
    [
        [80, 40, 83, 40, 83, 43, 80, 43],
        [80, 40, 120, 40, 100, 40],
        [80, 40, 81, 40, 81, 90, 80, 90],
        [0, 0, 8, 0, 8, 4, 0, 4],
    ],
)
def test_polygons_too_thin_to_blend_get_the_plate(tmp_path, points):
    _raw(tmp_path, count=1)
    label = tmp_path / "S1" / "M" / SCENE / f"{SCENE}_F0001_M.json"
    _label(label, ("F38", points))
    (found,) = _load(RordSource(str(tmp_path))).values()
    hole = found.mask.array > 0
    assert 1 < hole.sum() < 60
    plate = _opened(tmp_path / "S1" / "jpg" / SCENE / f"{SCENE}_G0001.jpg")
    assert np.abs(found.gt.array.astype(int) - plate)[hole].max() <= 3


# ---------------------------------------------------------------------------------- three layouts


def test_960x540_takes_the_label_and_the_blended_gt(tmp_path):
    _low_resolution(tmp_path)
    source = RordSource(str(tmp_path))
    (item,) = source.list_items()
    found = source.load_item(pickle.loads(pickle.dumps(item)))
    part, stem = tmp_path / "train", f"{SCENE}_F0002"
    assert (item.group, item.split, item.id) == (SCENE, "train", f"train-{SCENE}-{stem}")
    assert found.source.file == found.origin_file == part / "img" / SCENE / f"{stem}.jpg"
    assert found.gt.file == part / "gt" / SCENE / f"{stem}.jpg"
    assert np.array_equal(found.gt.array, _opened(found.gt.file))
    assert np.array_equal(found.mask.array, _hole()) and found.mask.file is None
    assert found.extra == {
        "gt_kind": "blended",
        "mask_kind": "label",
        "classes": ["F38"],
        "frame": 2,
    }


def test_raw_takes_the_last_picture_as_plate(tmp_path):
    _raw(tmp_path)
    source = RordSource(str(tmp_path), frames=1, gt="plate")
    items = list(source.list_items())
    assert [item.place.name for item in items] == [f"{SCENE}_F000{n}.jpg" for n in (1, 2, 3)]
    assert {(item.group, item.split) for item in items} == {(SCENE, None)}
    found = source.load_item(items[0])
    assert found.gt.file == tmp_path / "S1" / "jpg" / SCENE / f"{SCENE}_G0001.jpg"
    assert np.array_equal(found.gt.array, _opened(found.gt.file))
    assert np.array_equal(found.mask.array, _hole())
    assert found.extra["gt_kind"] == "plate"


def test_preprocessed_pictures_are_grouped_by_the_scene_in_their_names(tmp_path):
    stems = [f"I-210618_I01001_W01_F000{n}" for n in (1, 2, 3)] + [
        "I-210618_I01001_W01_F0002b",
        "I-210618_I01001_W02_F0001",
        "I-210701_O02003_T11_F0001",
        "单 张",
    ]
    _preprocessed(tmp_path, stems)
    _preprocessed(tmp_path, ["I-210702_I01001_W09_F0001"], "test", inverted=False)
    source = RordSource(str(tmp_path))
    assert [(item.group, item.place.name, item.split) for item in source.list_items()] == [
        ("I-210702_I01001_W09", "I-210702_I01001_W09_F0001.png", "test"),
        ("I-210618_I01001_W01", "I-210618_I01001_W01_F0002.png", "train"),
        ("I-210618_I01001_W01_F0002b", "I-210618_I01001_W01_F0002b.png", "train"),
        ("I-210618_I01001_W02", "I-210618_I01001_W02_F0001.png", "train"),
        ("I-210701_O02003_T11", "I-210701_O02003_T11_F0001.png", "train"),
        ("单 张", "单 张.png", "train"),
    ]
    for stem, found in _load(source).items():
        assert np.array_equal(found.mask.array, _hole())
        assert found.extra["mask_inverted"] is ("W09" not in stem)
        assert ("frame" in found.extra) is (stem[-1] not in "张b")
        assert np.array_equal(found.source.array, _frame(_plate()))
        assert np.array_equal(found.gt.array, _plate())


@pytest.mark.parametrize(
    "make",
    [_low_resolution, _raw, lambda root: _preprocessed(root, ["a"])],
    ids=["960x540", "raw", "preprocessed"],
)
def test_a_folder_is_found_one_level_up_and_one_level_down(tmp_path, make, monkeypatch):
    root = make(tmp_path / "data" / "RORD")
    (part,) = [path for path in root.iterdir()]
    ids = []
    for folder in (tmp_path / "data", root, part):
        assert RordSource.recognises(folder)
        ids.append([item.id for item in RordSource(str(folder), frames=1).list_items()])
    monkeypatch.chdir(part)
    ids.append([item.id for item in RordSource(".", frames=1).list_items()])
    assert ids[0] and ids[0] == ids[1] == ids[2] == ids[3]
    assert len(set(ids[0])) == len(ids[0])


def test_val_is_test(tmp_path):
    _low_resolution(_low_resolution(tmp_path), scene="I-210619_I01001_T02", split="val")
    assert [(item.group, item.split) for item in RordSource(str(tmp_path)).list_items()] == [
        (SCENE, "train"),
        ("I-210619_I01001_T02", "test"),
    ]


def test_names_in_other_scripts_and_with_spaces(tmp_path):
    folder = tmp_path / "数据 集"
    _low_resolution(folder, scene="场景 一", count=1)
    _raw(tmp_path / "原始 数据", scene="场景 二", count=1, part="部分 1")
    for given, scene in ((folder, "场景 一"), (tmp_path / "原始 数据", "场景 二")):
        source = RordSource(str(given))
        (item,) = source.list_items()
        assert item.group == scene and item.id.endswith(f"{scene}-{scene}_F0001")
        assert np.array_equal(source.load_item(item).mask.array, _hole())


def test_an_unknown_layout_says_what_was_expected_and_found(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "img").mkdir()  # alone it is nobody's
    assert not RordSource.recognises(tmp_path)
    with pytest.raises(SourceError, match="/jpg/"):
        list(RordSource(str(tmp_path)).list_items())
    assert not RordSource.recognises(tmp_path / "none")
    with pytest.raises(SourceError, match="none is no folder"):
        list(RordSource(str(tmp_path / "none")).list_items())


def test_folders_without_frames_are_an_error(tmp_path):
    for name in ("img", "gt", "mask"):
        (tmp_path / "train" / name / SCENE).mkdir(parents=True)
    _save(tmp_path / "train" / "img" / SCENE / f"{SCENE}_G0001.jpg", _plate())
    with pytest.raises(SourceError, match="no frame in them: unpack the archives"):
        list(RordSource(str(tmp_path)).list_items())


# ------------------------------------------------------------------------------------------ masks


def test_inverted_and_other_masks_in_one_folder_are_told_apart(tmp_path):
    _low_resolution(tmp_path, count=4)
    masks = tmp_path / "train" / "mask" / SCENE
    hole = _hole(25, 12, 70, 45)
    _save(masks / f"{SCENE}_F0002_M.png", hole)
    _save(masks / f"{SCENE}_F0003_M.png", np.where(hole, 0, 200).astype(np.uint8))
    # A hole of most of the image: what changed says so, the area would not.
    wide = _hole(2, 2, 94, 50)
    _save(masks / f"{SCENE}_F0004_M.png", wide)
    _save(
        tmp_path / "train" / "img" / SCENE / f"{SCENE}_F0004.jpg", _frame(_plate(), (2, 2, 94, 50))
    )
    found = list(_load(RordSource(str(tmp_path), frames=1, mask="coarse")).values())
    assert [f.extra["mask_inverted"] for f in found] == [True, False, True, False]
    for pictures, expected in zip(found, (hole, hole, hole, wide)):
        assert np.array_equal(pictures.mask.array, expected)
        assert pictures.extra["mask_kind"] == "coarse" and "classes" not in pictures.extra
    assert found[1].mask.file == masks / f"{SCENE}_F0002_M.png" and found[0].mask.file is None


@pytest.mark.parametrize("inverted", [True, False])
def test_the_smaller_side_is_the_hole_where_the_pictures_say_nothing(tmp_path, inverted):
    _preprocessed(tmp_path, ["a"], inverted=inverted)
    same = _plate()
    same[:10] ^= 1  # compression noise elsewhere must not decide
    _save(tmp_path / "train" / "img" / "a.png", same)
    (found,) = _load(RordSource(str(tmp_path))).values()
    assert np.array_equal(found.mask.array, _hole())
    assert found.extra["mask_inverted"] is inverted


def test_polygons_are_rescaled_from_the_label_s_resolution(tmp_path):
    _low_resolution(tmp_path, count=1)
    label = tmp_path / "train" / "label" / SCENE / f"{SCENE}_F0001.json"
    # 1920x1080 on 96x54: 20 px of the label are one of the image.
    _label(label, ("F38", [200, 100, 419, 100, 419, 319, 200, 319]), resolution="1920, 1080")
    (found,) = _load(RordSource(str(tmp_path))).values()
    assert np.array_equal(found.mask.array, _hole(10, 5, 21, 16))


def test_frames_without_a_label_take_the_coarse_mask_and_the_other_way_round(tmp_path):
    _low_resolution(tmp_path)
    part = tmp_path / "train"
    (part / "label" / SCENE / f"{SCENE}_F0001.json").unlink()
    (part / "mask" / SCENE / f"{SCENE}_F0002_M.png").unlink()
    for wanted, kinds in (
        ("label", ["coarse", "label", "label"]),
        ("coarse", ["coarse", "label", "coarse"]),
    ):
        found = list(_load(RordSource(str(tmp_path), frames=1, mask=wanted)).values())
        assert [f.extra["mask_kind"] for f in found] == kinds
        for pictures, kind in zip(found, kinds):
            expected = _hole() if kind == "label" else _hole(25, 12, 70, 45)
            assert np.array_equal(pictures.mask.array, expected)


@pytest.mark.parametrize(
    "make, lost",
    [
        (_raw, f"S1/M/{SCENE}/{SCENE}_F0002_M.json"),
        (_low_resolution, f"train/label/{SCENE}/{SCENE}_F0002.json"),
    ],
)
def test_a_frame_without_label_and_mask_is_refused(tmp_path, make, lost):
    make(tmp_path)
    (tmp_path / lost).unlink()
    for path in tmp_path.rglob(f"mask/{SCENE}/{SCENE}_F0002_M.png"):
        path.unlink()
    with pytest.raises(Rejected, match=r"F0002\.jpg has no label") as caught:
        _load(RordSource(str(tmp_path)))
    assert caught.value.reason == "no mask"


def test_a_frame_with_nothing_removable_is_refused(tmp_path):
    _low_resolution(tmp_path, count=1)
    _label(
        tmp_path / "train" / "label" / SCENE / f"{SCENE}_F0001.json",
        ("BO02", BOX),
        ("F38", [10, 10, 40, 40]),
    )
    with pytest.raises(Rejected, match=r"F0001\.json") as caught:
        _load(RordSource(str(tmp_path)))
    assert caught.value.reason == "no object"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"Raw_Data_Info.": {"Resolution": "192, 108"}, "Learning_Data_Info.": {"Annotation": [{'
        '"Class_ID": "F38", "segmentation": [NaN, 1, 5, 5, 9, 1]}]}}',
        '{"Raw_Data_Info.": {"Resolution": "192, 108"}, "Learning_Data_Info.": {"Annotation": [{'
        '"Class_ID": "F38", "segmentation": [1, 1, 5, 5, 9, 1' + "0" * 5000 + "]}]}}",
    ],
    ids=["nesting", "no number", "digits"],
)
def test_a_hostile_label_is_named(tmp_path, text):
    _low_resolution(tmp_path, count=1)
    path = tmp_path / "train" / "label" / SCENE / f"{SCENE}_F0001.json"
    path.write_text(text)
    with pytest.raises(TripletError, match="no label of this image") as caught:
        _load(RordSource(str(tmp_path)))
    assert caught.value.file == path


def test_images_without_masks_say_what_is_still_to_be_downloaded(tmp_path):
    _low_resolution(tmp_path, count=1)
    for name in ("label", "mask"):
        shutil.rmtree(tmp_path / "train" / name, ignore_errors=True)
    assert discover_source(tmp_path)[0] == "rord"
    with pytest.raises(SourceError, match="train has img/ but not label/ or mask/"):
        list(RordSource(str(tmp_path)).list_items())


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"Learning_Data_Info.": {"Annot', "Unterminated"),
        ("[]", "list indices"),
        ('{"Raw_Data_Info.": {"Resolution": "192, 108"}}', "KeyError: 'Learning_Data_Info.'"),
        (
            '{"Raw_Data_Info.": {"Resolution": "1080"}, "Learning_Data_Info.": {"Annotation": []}}',
            "not enough values",
        ),
        (
            '{"Raw_Data_Info.": {"Resolution": "108, 192"}, '
            '"Learning_Data_Info.": {"Annotation": []}}',
            "drawn on 108x192 px, its image has 96x54",
        ),
        (
            '{"Raw_Data_Info.": {"Resolution": "192, 108"}, '
            '"Learning_Data_Info.": {"Annotation": [{'
            '"Class_ID": "F38", "segmentation": [1, 2, 3, 4, 5, 6, 7]}]}}',
            "reshape",
        ),
        (b"\xff\xfe\x00", "UnicodeDecodeError"),
    ],
)
def test_a_broken_label_is_named(tmp_path, text, words):
    _low_resolution(tmp_path, count=1)
    path = tmp_path / "train" / "label" / SCENE / f"{SCENE}_F0001.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TripletError, match=words) as caught:
        _load(RordSource(str(tmp_path)))
    assert caught.value.file == path and str(path) in str(caught.value)


def test_a_byte_order_mark_in_a_label_is_no_fault(tmp_path):
    _low_resolution(tmp_path, count=1)
    path = tmp_path / "train" / "label" / SCENE / f"{SCENE}_F0001.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (found,) = _load(RordSource(str(tmp_path))).values()
    assert np.array_equal(found.mask.array, _hole())


# -------------------------------------------------------------------------------------------- GTs


def test_frames_without_a_gt_take_the_plate_and_say_so(tmp_path):
    _low_resolution(tmp_path)
    (tmp_path / "train" / "gt" / SCENE / f"{SCENE}_F0002.jpg").unlink()
    found = list(_load(RordSource(str(tmp_path), frames=1)).values())
    assert [f.extra["gt_kind"] for f in found] == ["blended", "plate", "blended"]
    plate = tmp_path / "train" / "img" / SCENE / f"{SCENE}_G0001.jpg"
    assert found[1].gt.file == plate
    assert np.array_equal(found[1].gt.array, _opened(plate))
    plates = _load(RordSource(str(tmp_path), frames=1, gt="plate"))
    assert {f.gt.file for f in plates.values()} == {plate}

    plate.unlink()
    found = _load(RordSource(str(tmp_path), frames=3, gt="plate"))
    assert [f.extra["gt_kind"] for f in found.values()] == ["blended"]
    with pytest.raises(Rejected, match=r"F0002\.jpg.*GT") as caught:
        _load(RordSource(str(tmp_path)))
    assert caught.value.reason == "no GT"


def test_a_damaged_picture_is_named(tmp_path):
    _low_resolution(tmp_path, count=1)
    path = tmp_path / "train" / "gt" / SCENE / f"{SCENE}_F0001.jpg"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(TripletError, match=r"F0001\.jpg") as caught:
        _load(RordSource(str(tmp_path)))
    assert caught.value.file == path


def test_sizes_that_differ_are_not_resized_away(tmp_path):
    _low_resolution(tmp_path, count=1)
    _save(tmp_path / "train" / "gt" / SCENE / f"{SCENE}_F0001.jpg", _plate(0, 48, 27))
    (found,) = _load(RordSource(str(tmp_path), size=(32, 18))).values()
    assert found.source.array.shape[:2] == (54, 96) and found.gt.array.shape[:2] == (27, 48)
    _raw(tmp_path / "raw", count=1)
    _save(tmp_path / "raw" / "S1" / "jpg" / SCENE / f"{SCENE}_G0001.jpg", _plate(0, 48, 27))
    (found,) = _load(RordSource(str(tmp_path / "raw"))).values()
    assert found.gt.array.shape[:2] == (27, 48) and found.extra["gt_kind"] == "plate"


# ---------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "frames, numbers", [(0, [4]), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 4, 7]), (9, [1])]
)
def test_frames_takes_the_middle_one_or_every_nth(tmp_path, frames, numbers):
    _low_resolution(tmp_path / "low", count=7)
    _raw(tmp_path / "raw", count=7)
    _preprocessed(tmp_path / "flat", [f"{SCENE}_F{n:04d}" for n in range(1, 8)])
    for kind in ("low", "raw", "flat"):
        names = [i.place.name for i in RordSource(str(tmp_path / kind), frames).list_items()]
        assert [int(name[-8:-4]) for name in names] == numbers


def test_size_and_dilate_shape_the_pictures(tmp_path):
    _low_resolution(tmp_path, count=1)
    (found,) = _load(RordSource(str(tmp_path), size=(32, 18), dilate=5, mask="coarse")).values()
    image = _opened(found.origin_file)
    assert np.array_equal(
        found.source.array, cv2.resize(image, (32, 18), interpolation=cv2.INTER_AREA)
    )
    assert found.gt.array.shape == (18, 32, 3)
    small = _hole(25, 12, 70, 45)[::3, ::3]
    assert np.array_equal(found.mask.array, cv2.dilate(small, np.ones((5, 5), np.uint8)))
    (same,) = _load(RordSource(str(tmp_path), size=[96, 54])).values()
    assert same.source.file == same.origin_file and same.gt.file is not None


def test_the_order_is_that_of_the_names(tmp_path):
    for scene in ("b", "a", "c"):
        _low_resolution(tmp_path, scene=scene, split="train", count=2)
        _low_resolution(tmp_path, scene=scene + "2", split="val", count=1)
    (tmp_path / "train" / "img" / ".DS_Store").touch()
    (tmp_path / "train" / "img" / "a" / "._a_F0001.jpg").touch()
    items = list(RordSource(str(tmp_path), frames=1).list_items())
    assert [item.place.name[:-4] for item in items] == [
        "a_F0001",
        "a_F0002",
        "b_F0001",
        "b_F0002",
        "c_F0001",
        "c_F0002",
        "a2_F0001",
        "b2_F0001",
        "c2_F0001",
    ]
    assert items == list(RordSource(str(tmp_path), frames=1).list_items())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"frames": -1}, "frames must be a whole number, 0 or more, not -1"),
        ({"frames": 1.5}, "frames must be"),
        ({"mask": "sam"}, "mask must be label or coarse, not 'sam'"),
        ({"gt": "none"}, "gt must be blended or plate, not 'none'"),
        ({"classes": "F"}, "classes must be a list"),
        ({"classes": ()}, "classes must be beginnings"),
        ({"classes": ("",)}, "classes must be a list"),
        ({"dilate": -2}, "dilate must be"),
        ({"size": (480,)}, r"size must be \(width, height\)"),
        ({"size": (480, 0)}, r"size must be \(width, height\)"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        RordSource("folder", **options)


def test_the_importer_itself_is_picklable():
    source = RordSource("folder", classes=["F38", "F4"], size=[480, 270])
    assert pickle.loads(pickle.dumps(source)) == source
    assert (source.classes, source.size) == (("F38", "F4"), (480, 270))
