import pickle

import numpy as np
import pytest
from PIL import Image

from rorem_lib.data.items import Rejected, SourceError
from rorem_lib.sources.high_resolution import HighResolutionSource


def _picture(width, height):
    """Every pixel tells where it is: red is x, green is y, blue counts their 256s."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x % 256, y % 256, x // 256 + 16 * (y // 256)], axis=2).astype(np.uint8)


def _where(array):
    """The x and y of pixels of `_picture`."""
    red, green, blue = (array[..., n].astype(int) for n in range(3))
    return red + 256 * (blue % 16), green + 256 * (blue // 16)


def _mask(width, height, box):
    mask = np.zeros((height, width), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 255
    return mask


def _save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def root(tmp_path):
    """DIV2K and Flickr2K as they are unpacked, with small images and some masks."""
    root = tmp_path / "高清 图像"
    for name in (
        "DIV2K_train_HR/0001",
        "DIV2K_train_HR/0002",
        "DIV2K_valid_HR/0801",
        "Flickr2K/Flickr2K_HR/000001",
    ):
        _save(root / f"{name}.png", _picture(400, 300))
    for name, box in (
        ("0001", (300, 20, 340, 60)),
        ("0001_1", (0, 0, 30, 30)),
        ("0001-2", (380, 280, 400, 300)),
        ("0801", (150, 100, 250, 180)),
        ("000001", (10, 200, 90, 290)),
    ):
        _save(root / "masks" / f"{name}.png", _mask(400, 300, box))
    return root


def _open(folder, number=0, **options):
    source = HighResolutionSource(
        str(folder), **{"size": 128, "margin": 16, "min_side": 0, **options}
    )
    source = pickle.loads(pickle.dumps(source))
    item = list(source.list_items())[number]
    return source.load_item(pickle.loads(pickle.dumps(item)))


# ---------------------------------------------------------------------------------------- listing


def test_every_picture_with_each_of_its_masks_is_an_item(root):
    assert HighResolutionSource.recognises(root)
    source = HighResolutionSource(str(root))
    items = list(source.list_items())
    assert [(item.id, item.group, item.split) for item in items] == [
        ("DIV2K-0001-2", "DIV2K-0001", "train"),
        ("DIV2K-0001", "DIV2K-0001", "train"),
        ("DIV2K-0001_1", "DIV2K-0001", "train"),
        ("DIV2K-0002", "DIV2K-0002", "train"),
        ("DIV2K-0801", "DIV2K-0801", "test"),
        ("Flickr2K-000001", "Flickr2K-000001", None),
    ]
    with pytest.raises(Rejected, match=r"DIV2K_train_HR/0002\.png") as caught:
        source.load_item(items[3])
    assert caught.value.reason == "no mask"


def test_records_name_the_dataset_and_its_licence(root):
    div2k, flickr2k = _open(root), _open(root, 5)
    assert div2k.gt is None and div2k.origin_file == root / "DIV2K_train_HR" / "0001.png"
    assert (div2k.extra["dataset"], div2k.extra["origin"]) == ("DIV2K", "DIV2K")
    assert "academic research only" in div2k.extra["license"]
    assert flickr2k.extra["origin"] == "Flickr2K" and "none stated" in flickr2k.extra["license"]


@pytest.mark.parametrize("place", ["DIV2K", ""])
def test_folders_lie_in_their_datasets_or_are_given_themselves(tmp_path, place):
    folder = tmp_path / place / "DIV2K_valid_HR"
    _save(folder / "0801.png", _picture(40, 30))
    _save(tmp_path / "masks" / "DIV2K_valid_HR" / "0801.png", _mask(40, 30, (5, 5, 9, 9)))
    _save(tmp_path / "masks" / "0801.png", _mask(40, 30, (0, 0, 2, 2)))  # the nearer one is taken
    for given in (tmp_path, folder):
        assert HighResolutionSource.recognises(given)
        source = HighResolutionSource(str(given), masks=str(tmp_path / "masks"), min_side=0)
        (item,) = source.list_items()
        assert source.load_item(item).mask.array.sum() == 255 * 16
    assert not HighResolutionSource.recognises(tmp_path / "masks" / "DIV2K")


def test_another_folder_of_pictures_can_be_named(tmp_path):
    _save(tmp_path / "mine" / "val 照片" / "a_1.jpg", _picture(40, 30))
    _save(tmp_path / "mine" / "val 照片" / "a.png", _picture(40, 30))
    _save(tmp_path / "m" / "a_1.png", _mask(40, 30, (5, 5, 9, 9)))
    source = HighResolutionSource(str(tmp_path), images="mine/val 照片", masks="m", min_side=0)
    items = list(source.list_items())
    assert [item.id for item in items] == ["val 照片-a", "val 照片-a_1"]  # its own, not a's
    assert items[1].split == "test"
    extra = source.load_item(items[1]).extra
    assert extra["dataset"] == "val 照片" and "license" not in extra


def test_masks_of_no_picture_are_refused_not_forgotten(root):
    _save(root / "masks" / "0999.png", _mask(40, 30, (5, 5, 9, 9)))
    source = HighResolutionSource(str(root))
    *_, item = source.list_items()
    with pytest.raises(Rejected, match=r"masks/0999\.png"):
        source.load_item(item)


# ---------------------------------------------------------------------------------------- cropping


@pytest.mark.parametrize(
    "number, box",
    [
        (0, (380, 280, 400, 300)),
        (1, (300, 20, 340, 60)),
        (2, (0, 0, 30, 30)),
        (4, (150, 100, 250, 180)),
    ],
)
def test_the_square_holds_the_mask_with_its_margin_at_native_resolution(root, number, box):
    pictures = _open(root, number)
    x, y = _where(pictures.source.array)
    left, top, right, bottom = pictures.extra["crop"]
    side = 132 if number == 4 else 128  # 100 px and two margins
    assert (right - left, bottom - top) == (side, side)
    if number == 4:
        assert pictures.source.array.shape == (128, 128, 3)
    else:
        assert np.array_equal(x[0], np.arange(left, right)) and pictures.source.file is None
        assert np.array_equal(y[:, 0], np.arange(top, bottom))
        assert np.array_equal(pictures.mask.array, _mask(400, 300, box)[top:bottom, left:right])
    assert left <= max(0, box[0] - 16) and top <= max(0, box[1] - 16)
    assert right >= min(400, box[2] + 16) and bottom >= min(300, box[3] + 16)
    assert 0 <= left and 0 <= top and right <= 400 and bottom <= 300


def test_the_square_is_the_same_each_time_and_not_always_around_the_middle(tmp_path):
    for number in range(12):
        _save(tmp_path / "DIV2K_train_HR" / f"{number:04d}.png", _picture(300, 300))
        _save(tmp_path / "masks" / f"{number:04d}.png", _mask(300, 300, (140, 140, 160, 160)))
    crops = [tuple(_open(tmp_path, number).extra["crop"]) for number in range(12)]
    assert crops == [tuple(_open(tmp_path, number).extra["crop"]) for number in range(12)]
    assert len(set(crops)) > 6


def test_a_large_object_gets_a_larger_cut_that_is_shrunk_with_its_mask(tmp_path):
    _save(tmp_path / "DIV2K_train_HR" / "0001.png", _picture(512, 256))
    _save(tmp_path / "masks" / "0001.png", _mask(512, 256, (100, 64, 356, 192)))
    pictures = _open(tmp_path, margin=0)  # 256 px wide: the cut is the image's whole height
    left, top, right, bottom = pictures.extra["crop"]
    assert (top, bottom, right - left) == (0, 256, 256) and left == 100
    assert pictures.source.array.shape == (128, 128, 3)
    assert np.array_equal(pictures.mask.array, _mask(128, 128, (0, 32, 128, 96)))
    whole = _open(tmp_path, margin=64, size=64)  # 384 px with the margins, but only 256 px high
    assert whole.extra["crop"][1::2] == [0, 256] and whole.source.array.shape == (64, 96, 3)
    rows, columns = np.nonzero(whole.mask.array)
    assert (rows.min(), rows.max(), columns.max() - columns.min()) == (16, 47, 63)


def test_nothing_is_enlarged_and_a_whole_small_picture_is_taken_over(tmp_path):
    file = tmp_path / "DIV2K_train_HR" / "0001.png"
    _save(file, _picture(100, 80))
    _save(tmp_path / "masks" / "0001.png", _mask(100, 80, (10, 10, 20, 20)))
    for crop in ("mask", "none"):
        pictures = _open(tmp_path, crop=crop)
        assert pictures.source.file == file and pictures.extra["crop"] == [0, 0, 100, 80]
        assert pictures.mask.array.shape == (80, 100)
    with pytest.raises(Rejected, match=r"is 100x80 px, below 81") as caught:
        _open(tmp_path, min_side=81)
    assert caught.value.reason == "small image"


def test_the_whole_picture_or_its_middle_can_be_taken(root):
    whole = _open(root, 4, crop="none", size=150)
    assert whole.source.array.shape == (150, 200, 3) and whole.extra["crop"] == [0, 0, 400, 300]
    assert np.array_equal(whole.mask.array, _mask(200, 150, (75, 50, 125, 90)))
    middle = _open(root, 4, crop="center", size=300)
    assert middle.extra["crop"] == [50, 0, 350, 300]
    assert np.array_equal(middle.source.array, _picture(400, 300)[:, 50:350])
    assert np.array_equal(middle.mask.array, _mask(300, 300, (100, 100, 200, 180)))


def test_masks_of_another_size_are_resized_to_their_picture_first(root):
    _save(root / "masks" / "0801.png", _mask(200, 150, (75, 50, 125, 90)))  # half the size
    left, top, right, bottom = (pictures := _open(root, 4, size=140)).extra["crop"]
    expected = _mask(400, 300, (150, 100, 250, 180))[top:bottom, left:right]
    assert np.array_equal(pictures.mask.array, expected)


# ---------------------------------------------------------------------------------------- bad input


def test_a_mask_of_another_shape_and_one_without_white_are_refused(root):
    _save(root / "masks" / "0801.png", _mask(300, 400, (75, 50, 125, 90)))
    with pytest.raises(Rejected, match=r"0801\.png is 300x400 px") as caught:
        _open(root, 4)
    assert caught.value.reason == "mask of another shape"
    _save(root / "masks" / "0801.png", _mask(400, 300, (75, 50, 125, 90)) // 127)
    with pytest.raises(Rejected, match=r"nowhere white \(its brightest pixel has 2") as caught:
        _open(root, 4)
    assert caught.value.reason == "empty mask"


def test_missing_masks_are_explained(root):
    with pytest.raises(
        SourceError,
        match=r"holds no mask .*draw them, or let any segmentation "
        r"model.*0001_1\.png",
    ):
        next(HighResolutionSource(str(root), masks="nowhere").list_items())
    with pytest.raises(SourceError, match="given for the images and for the masks"):
        next(HighResolutionSource(str(root / "DIV2K_train_HR"), masks=".").list_items())


def test_missing_and_doubled_pictures_are_explained(root, tmp_path):
    with pytest.raises(SourceError, match="DIV2K_train_HR/0001.png"):
        next(HighResolutionSource(str(root / "masks")).list_items())
    with pytest.raises(SourceError, match="nowhere is no folder: mend the option images"):
        next(HighResolutionSource(str(root), images="nowhere").list_items())
    _save(root / "DIV2K_train_HR" / "0001.jpg", _picture(40, 30))
    with pytest.raises(SourceError, match=r"0001\.png.*0001\.jpg"):
        next(HighResolutionSource(str(root)).list_items())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"size": 32}, "size must be a whole number, 64 or more, not 32"),
        ({"crop": "top"}, "crop must"),
        ({"margin": -1}, "margin must"),
        ({"min_side": 0.5}, "min_side must"),
        ({"masks": ""}, "masks"),
    ],
)
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        HighResolutionSource("x", **options)
