import pickle

import numpy as np
import pytest
from PIL import Image

from rorem_lib.data.items import Rejected, SourceError
from rorem_lib.data.pictures import TripletError
from rorem_lib.sources.open_images import BODY_PARTS, CLOTHES, OpenImagesSource

HEADER = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
NAMES = {
    "/m/04yx4": "Man",
    "/m/09j2d": "Clothing",
    "/m/0k65p": "Human hand",
    "/m/01yrx": "Cat",
    "/m/0h8n5zk": "Kitchen & dining room table",
    "/m/0k4j": "Car",
}
CAR, CAT, MAN, CLOTHING, HAND = "/m/0k4j", "/m/01yrx", "/m/04yx4", "/m/09j2d", "/m/0k65p"
FIRST, SECOND = "0a1b2c3d4e5f6071", "f0e1d2c3b4a59687"


def _row(image=FIRST, label=CAR, box="9a041d52", area=(0.25, 0.75, 0.25, 0.75), iou="0.86864"):
    name = f"{image}_{label[1:].replace('/', '')}_{box}.png"
    return ",".join([name, image, label, box, *map(str, area), str(iou), "0.9 0.6 1;0.8 0.5 0"])


def _write_table(folder, rows, name="train-annotations-object-segmentation.csv"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join([HEADER, *rows]) + "\n", encoding="utf-8")


def _write_names(folder, name="class-descriptions.csv", header=""):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f'{label},"{text}"' if "," in text else f"{label},{text}" for label, text in NAMES.items()
    ]
    (folder / name).write_text(header + "\n".join(lines), encoding="utf-8")


def _write_image(folder, image=FIRST, size=(96, 64)):
    """An image with a red square in its middle half, on blue."""
    folder.mkdir(parents=True, exist_ok=True)
    width, height = size
    array = np.full((height, width, 3), (20, 40, 200), np.uint8)
    array[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = (220, 30, 30)
    Image.fromarray(array).save(folder / f"{image}.jpg", quality=95)


def _write_mask(folder, row, size=(48, 32), value=255):
    """The same square, in another size; a 1-bit PNG, as published, where `value` is 255."""
    folder.mkdir(parents=True, exist_ok=True)
    width, height = size
    array = np.zeros((height, width), np.uint8)
    array[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = value
    image = Image.fromarray(array)
    (image.convert("1") if value == 255 else image).save(folder / row.split(",")[0])


def _write_flat(folder, rows=None, **options):
    """The files as they are downloaded: a CSV, masks by digit, images by split."""
    rows = rows or [_row()]
    _write_table(folder, rows)
    _write_names(folder)
    for row in rows:
        _write_mask(folder / f"train-masks-{row[0]}", row, **options)
    for image in {row.split(",")[1] for row in rows}:
        _write_image(folder / "train", image)
    return folder


def _ids(source):
    return [item.id for item in source.list_items()]


# --------------------------------------------------------------------------------------- layouts


def _as_downloaded(root, row):
    _write_flat(root, [row])


def _all_flat(root, row):
    _write_table(root, [row])
    _write_names(root, "oidv7-class-descriptions.csv", "LabelName,DisplayName\n")
    _write_mask(root, row)
    _write_image(root, row.split(",")[1])


def _digit_archives(root, row):
    _write_table(root / "annotations", [row])
    _write_names(root / "annotations", "oidv7-class-descriptions-boxable.csv")
    _write_mask(root / "masks" / "train", row)
    _write_image(root / f"train_{row[0]}", row.split(",")[1])


def _fiftyone(root, row):
    _write_table(root / "train" / "labels", [row], "segmentations.csv")
    (root / "train" / "labels" / "detections.csv").write_text("ImageID,Source,LabelName\n")
    _write_names(root / "train" / "metadata", "classes.csv")
    _write_mask(root / "train" / "labels" / "masks" / row[0].upper(), row)
    _write_image(root / "train" / "data", row.split(",")[1])


def _smart_eraser(root, row):
    _write_table(root / "train" / "metadata", [row], "segmentation_metadata.csv")
    _write_names(root / "train" / "metadata", "classes.csv")
    _write_mask(root / "train" / "labels" / row[0].upper(), row)
    _write_image(root / "train" / "data", row.split(",")[1])


@pytest.mark.parametrize("image", [FIRST, SECOND])
@pytest.mark.parametrize(
    "write", [_as_downloaded, _all_flat, _digit_archives, _fiftyone, _smart_eraser]
)
def test_every_layout_gives_the_picture_and_its_resized_mask(tmp_path, write, image):
    root = tmp_path / "开放 图像 数据"
    write(root, _row(image))
    assert OpenImagesSource.recognises(root)
    source = pickle.loads(pickle.dumps(OpenImagesSource(str(root))))
    (item,) = source.list_items()
    assert item.id == f"{image}_m0k4j_9a041d52"
    assert (item.group, item.split) == (image, "train")
    pictures = source.load_item(pickle.loads(pickle.dumps(item)))
    assert pictures.gt is None and pictures.source.file == pictures.origin_file
    assert pictures.source.array.shape == (64, 96, 3)
    expected = np.zeros((64, 96), np.uint8)
    expected[16:48, 24:72] = 255
    assert np.array_equal(pictures.mask.array, expected)
    assert np.abs(pictures.source.array[32, 48].astype(int) - (220, 30, 30)).max() < 12
    assert pictures.extra == {"class": "Car", "label": CAR, "box": "9a041d52"}


def test_validation_and_test_are_the_test_split_and_keep_their_own_cap(tmp_path):
    root = _write_flat(tmp_path, [_row()])
    for number, name in enumerate(("validation", "test")):
        row = _row(f"{number + 1}" * 16)
        _write_table(root, [row], f"{name}-annotations-object-segmentation.csv")
        _write_mask(root / f"{name}-masks", row)
        _write_image(root / name, row.split(",")[1])
    source = OpenImagesSource(str(root), per_class=1)
    items = list(source.list_items())
    assert [item.split for item in items] == ["train", "test", "test"]
    assert all(source.load_item(item).mask.array.any() for item in items)
    assert source.summarise() == {"rows": 3, "listed": 3}


def test_unusual_places_can_be_named(tmp_path):
    row = _row()
    _write_table(tmp_path / "set" / "x", [row], "val.masks.csv")
    _write_names(tmp_path / "names", "labels.csv")
    _write_mask(tmp_path / "m {c}", row)
    _write_image(tmp_path / "set" / "p")
    options = {
        "annotations": "x/val.masks.csv",
        "masks": str(tmp_path / "m {c}"),
        "images": "p",
        "class_names": "../names/labels.csv",
    }
    source = OpenImagesSource(str(tmp_path / "set"), **options)
    (item,) = source.list_items()
    assert item.split == "test"
    assert source.load_item(item).mask.array.sum() == 255 * 32 * 48
    with pytest.raises(SourceError, match="nowhere does not exist: mend the option masks"):
        _ids(OpenImagesSource(str(tmp_path / "set"), **options | {"masks": "nowhere"}))


# --------------------------------------------------------------------------------------- images


def test_masks_of_ones_are_white_and_rounded_aspects_fit(tmp_path):
    row = _row()
    root = _write_flat(tmp_path, [row], size=(45, 31), value=1)  # 96x64 rounded, off by a pixel
    source = OpenImagesSource(str(root))
    mask = source.load_item(next(source.list_items())).mask.array
    assert mask.shape == (64, 96) and set(np.unique(mask)) == {0, 255}
    rows, columns = np.nonzero(mask)
    assert (
        np.abs(
            np.array([rows.min(), rows.max() + 1, columns.min(), columns.max() + 1])
            - (16, 48, 24, 72)
        ).max()
        <= 3
    )


def test_large_pictures_are_shrunk_with_their_mask_and_masks_widened(tmp_path):
    root = _write_flat(tmp_path)
    source = OpenImagesSource(str(root), max_size=48, dilate=5)
    pictures = source.load_item(next(source.list_items()))
    assert pictures.source.array.shape == (32, 48, 3) and pictures.source.file is None
    expected = np.zeros((32, 48), np.uint8)
    expected[8 - 2 : 24 + 2, 12 - 2 : 36 + 2] = 255
    assert np.array_equal(pictures.mask.array, expected)
    assert pictures.source.array[16, 24, 0] > 180 > pictures.source.array[4, 4, 0]
    same = OpenImagesSource(str(root), max_size=96)
    assert same.load_item(next(same.list_items())).source.file is not None


def test_what_cannot_be_opened_is_refused_one_by_one(tmp_path):
    rows = [_row(str(n) * 16) for n in range(5)]
    root = _write_flat(tmp_path, rows)
    (root / "train" / f"{'1' * 16}.jpg").unlink()
    (root / "train-masks-2" / rows[2].split(",")[0]).unlink()
    _write_mask(root / "train-masks-3", rows[3], size=(32, 48))  # of the image before it turned
    image = root / "train" / f"{'4' * 16}.jpg"
    image.write_bytes(image.read_bytes()[:500])
    source = OpenImagesSource(str(root))
    good, *bad = source.list_items()
    assert source.load_item(good).mask.array.any()
    for item, reason, words in (
        (bad[0], "missing file", r"1{16}\.jpg does not exist.*downloaded"),
        (bad[1], "missing file", r"2{16}_m0k4j_9a041d52\.png does not"),
        (bad[2], "mask of another shape", r"is 32x48 px.*96x64 px"),
    ):
        with pytest.raises(Rejected, match=words) as caught:
            source.load_item(item)
        assert caught.value.reason == reason
    with pytest.raises(TripletError, match="truncated or damaged"):
        source.load_item(bad[3])


# ---------------------------------------------------------------------------------------- choosing


def test_each_filter_drops_its_rows_and_the_summary_accounts_for_all(tmp_path):
    rows = [
        _row("1" * 16),
        _row("2" * 16, CLOTHING),
        _row("3" * 16, HAND),
        _row("4" * 16, MAN),
        _row("5" * 16, "/m/0unknown"),
        _row("6" * 16, area=(0, 0.05, 0, 0.05)),
        _row("7" * 16, area=(0, 1, 0, 0.99)),
        _row("8" * 16, iou=0.3),
        _row("9" * 16, iou=""),
        _row("../" * 5 + "a"),
        "aaaaaaaaaaaaaaaa_m0k4j",
        _row("1" * 16),
    ]
    root = _write_flat(tmp_path, [rows[0]])
    _write_table(root, rows)
    source = OpenImagesSource(
        str(root), exclude=[*CLOTHES, *BODY_PARTS, "mAn"], min_area=0.01, max_area=0.9, min_iou=0.5
    )
    assert source.summarise() == {}
    assert _ids(source) == [f"{n * 16}_m0k4j_9a041d52" for n in "19"]  # the 9 was drawn by hand
    assert source.summarise() == {
        "rows": 12,
        "listed": 2,
        "excluded class": 3,
        "class without a name": 1,
        "small box": 1,
        "large box": 1,
        "low IoU": 1,
        "damaged row": 2,
        "row given twice": 1,
    }
    everything = OpenImagesSource(str(root), exclude=())
    _ids(everything)
    assert everything.summarise()["listed"] == 8 and "excluded class" not in everything.summarise()


def test_the_default_leaves_out_what_is_worn_and_parts_of_people_alone(tmp_path):
    default = {name.casefold() for name in OpenImagesSource("x").exclude}
    assert {"human hair", "human face", "suit", "jeans", "sunglasses", "footwear"} <= default
    assert not {"man", "woman", "person", "handbag", "umbrella", "cat"} & default


def _big_table(folder, rows=50_000, images=6_000, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.choice([CAR, CAT, MAN, CLOTHING], rows, p=[0.5, 0.02, 0.3, 0.18])
    ids = [f"{int(n) * 2654435761 % 2**64:016x}" for n in rng.integers(1, images, rows)]
    lines = [_row(image, label, f"{n:08x}") for n, (image, label) in enumerate(zip(ids, labels))]
    _write_flat(folder, lines[:1])
    _write_table(folder, lines)
    return lines


def _count(source):
    items = list(source.list_items())
    classes, groups = {}, {}
    for item in items:
        label = item.id.split("_")[1]
        classes[label] = classes.get(label, 0) + 1
        groups[item.group] = groups.get(item.group, 0) + 1
    return [item.id for item in items], classes, groups


@pytest.mark.slow
def test_the_caps_hold_and_neither_the_order_nor_the_chunks_choose(tmp_path, monkeypatch):
    lines = _big_table(tmp_path)
    source = OpenImagesSource(str(tmp_path), per_class=300)
    ids, classes, groups = _count(source)
    assert classes == {"m0k4j": 300, "m01yrx": 300, "m04yx4": 300}  # what an image loses is made up
    assert max(groups.values()) == 1
    counts = source.summarise()
    assert counts["rows"] == 50_000 == sum(counts.values()) - counts["rows"]
    assert counts["another mask of its image"] > 0 and counts["listed"] == 900
    _write_table(tmp_path, [lines[n] for n in np.random.default_rng(1).permutation(len(lines))])
    monkeypatch.setattr("rorem_lib.sources.open_images._CHUNK", 7_001)
    assert _ids(source) == ids
    assert _ids(OpenImagesSource(str(tmp_path), per_class=300, seed=1)) != ids
    _, _, groups = _count(OpenImagesSource(str(tmp_path), per_class=0, per_image=2))
    assert max(groups.values()) == 2 and len(groups) > 5_000


def test_a_growing_file_keeps_its_choice(tmp_path):
    lines = _big_table(tmp_path, 6_000)
    options = {"per_class": 100, "per_image": 0}
    whole = set(_ids(OpenImagesSource(str(tmp_path), **options)))
    _write_table(tmp_path, lines[:5_000])
    part = set(_ids(OpenImagesSource(str(tmp_path), **options)))
    names = {line.split(".png")[0] for line in lines[:5_000]}
    assert whole & names <= part and len(whole & part) > 200


def test_a_partial_download_chooses_among_what_is_there(tmp_path):
    lines = _big_table(tmp_path, 5_000)
    there = sorted({line.split(",")[1] for line in lines})[:40]
    for image in there:
        _write_image(tmp_path / "train", image, (24, 16))
    (tmp_path / "train" / f"{lines[0].split(',')[1]}.jpg").unlink(missing_ok=True)
    source = OpenImagesSource(str(tmp_path), downloaded_only=True)
    _, _, groups = _count(source)
    assert 30 < len(groups) <= 40 and set(groups) <= set(there)
    counts = source.summarise()
    assert counts["image not there"] > 3_000 and sum(counts.values()) == 2 * counts["rows"]


# ---------------------------------------------------------------------------------------- bad input


def _remove_names(root):
    (root / "class-descriptions.csv").unlink()


def _empty_folder(path):
    for file in path.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            lambda r: (r / "train-annotations-object-segmentation.csv").unlink(),
            "does not look like OpenImages V7: expected <split>-annotations-object-segmentation",
        ),
        (_remove_names, "holds no class names.*class-descriptions.csv.*class_names"),
        (lambda r: _empty_folder(r / "train-masks-0"), "holds no masks .*train-masks-0.zip"),
        (lambda r: _empty_folder(r / "train"), r"holds no images .*<ImageID>\.jpg in train/"),
        (
            lambda r: (r / "train-annotations-object-segmentation.csv").write_text(
                "ImageID,Source\n"
            ),
            "segmentation.csv has no column MaskPath, LabelName, BoxID",
        ),
        (lambda r: _write_table(r, [_row(area=("a", 1, 0, 1))]), "segmentation.csv is damaged"),
    ],
    ids=["no table", "no names", "no masks", "no images", "other table", "no number"],
)
def test_faults_of_the_layout_are_named_with_the_mend(tmp_path, damage, words):
    root = _write_flat(tmp_path)
    damage(root)
    with pytest.raises(SourceError, match=words):
        _ids(OpenImagesSource(str(root)))


def test_without_names_the_labels_serve_where_nothing_is_excluded(tmp_path):
    root = _write_flat(tmp_path)
    _remove_names(root)
    source = OpenImagesSource(str(root), exclude=())
    assert source.load_item(next(source.list_items())).extra["class"] == CAR


def test_a_table_that_nothing_of_passes_lists_nothing(tmp_path):
    root = _write_flat(tmp_path, [_row(label=CLOTHING)])
    source = OpenImagesSource(str(root))
    assert _ids(source) == [] and source.summarise() == {"rows": 1, "excluded class": 1}
    _write_table(root, [])
    assert _ids(source) == [] and source.summarise() == {}


def test_a_misspelt_class_is_refused(tmp_path):
    root = _write_flat(tmp_path)
    with pytest.raises(SourceError, match="exclude names Catt, but no class"):
        _ids(OpenImagesSource(str(root), exclude=("cat", "Catt")))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"exclude": "Man"}, "exclude must be a list"),
        ({"per_class": -1}, "per_class must be"),
        ({"per_image": 1.5}, "per_image must be a whole number"),
        ({"dilate": -2}, "dilate must be"),
        ({"min_area": 0.5, "max_area": 0.5}, "min_area must be below max_area, not 0.5 and 0.5"),
        ({"min_iou": 2}, "min_iou must be a number from 0 to 1"),
        ({"max_size": True}, "max_size must be"),
    ],
)
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        OpenImagesSource("x", **options)


def test_other_folders_are_not_taken_for_it(tmp_path):
    (tmp_path / "train" / "img").mkdir(parents=True)
    assert not OpenImagesSource.recognises(tmp_path)
    assert not OpenImagesSource.recognises(tmp_path / "nowhere")
