import hashlib
import io
import logging
import pickle

import datasets
import numpy as np
import pytest
from PIL import Image

from rorem_lib.data.items import Rejected, SourceError
from rorem_lib.data.pictures import TripletError
from rorem_lib.sources import parquet
from rorem_lib.sources.paired import OberSource

FEATURES = datasets.Features(
    {
        "input": datasets.Image(),
        "subset": datasets.Value("string"),
        "split": datasets.Value("string"),
        "gt": datasets.Image(),
        "object_mask": datasets.Image(),
        "object_effect_mask": datasets.Image(),
    }
)


def _picture(seed):
    return np.random.default_rng(seed).integers(0, 255, (12, 16, 3), np.uint8)


def _mask(width):
    mask = np.zeros((12, 16), np.uint8)
    mask[2:6, 1 : 1 + width] = 255
    return mask


def _encode(array, format="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format, **options)
    return stream.getvalue()


def _row(seed, path, subset, split="train", gt=True, **changes):
    row = {
        "input": {"bytes": _encode(_picture(seed)), "path": path},
        "subset": subset,
        "split": split,
        "gt": {"bytes": _encode(_picture(seed + 50)), "path": path},
        "object_mask": {"bytes": _encode(_mask(3)), "path": path},
        "object_effect_mask": {"bytes": _encode(_mask(9)), "path": path},
    }
    return {**row, **({} if gt else {"gt": None}), **changes}


def _write(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    # two rows a row group, as large files have some hundred
    datasets.Dataset.from_list(rows, FEATURES).to_parquet(folder / name, batch_size=2)


@pytest.fixture
def released(tmp_path):
    """The published files: two of training, one of testing, several row groups in each."""
    folder = tmp_path / "OBER 数据"
    _write(
        folder / "data",
        "train-00000-of-00002.parquet",
        [
            _row(0, "0427_1.jpg", "OBER-Cap"),
            _row(1, "0427_2.jpg", "OBER-Cap"),
            _row(2, "0428_1.jpg", "OBER-Cap"),
        ],
    )
    _write(
        folder / "data",
        "train-00001-of-00002.parquet",
        [
            _row(3, "0427_1.jpg", "OBER-Sim"),
            _row(4, "0427_1.jpg", "OBER-Sim"),
            _row(5, None, "OBER-Sim"),
        ],
    )
    _write(
        folder / "data",
        "test-00000-of-00001.parquet",
        [
            _row(6, "0001.jpg", "OBER-Test", "test"),
            _row(7, "0002.jpg", "OBER-Wild", "test", gt=False),
            _row(8, "I-210614_O04019_W01_F0109.jpg", "RORD-Val-343", "test"),
        ],
    )
    return folder


@pytest.fixture
def older(tmp_path):
    for number, (place, name) in enumerate((("0001", "1"), ("0001", "2_full"), ("0002", "1"))):
        folder = tmp_path / "train" / place
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_picture(number)).save(folder / f"input_{name}.jpg", quality=95)
        Image.fromarray(_picture(number + 50)).save(folder / f"gt_{name}.jpg", quality=95)
        Image.fromarray(_mask(3)).save(folder / f"mask_{name}.png")
        Image.fromarray(_mask(9)).save(folder / f"shadow_mask_{name}.png")
    return tmp_path


# ------------------------------------------------------------------------------------ parquet


def test_crops_of_one_picture_are_one_group_in_its_subset(released):
    items = list(OberSource(str(released)).list_items())
    assert [(i.id, i.group, i.split) for i in items] == [
        ("OBER-Test-0001", "OBER-Test-0001", "test"),
        ("OBER-Wild-0002", "OBER-Wild-0002", "test"),
        ("RORD-Val-343-I-210614_O04019_W01_F0109", "I-210614_O04019_W01", "test"),
        ("OBER-Cap-0427_1", "OBER-Cap-0427", "train"),
        ("OBER-Cap-0427_2", "OBER-Cap-0427", "train"),
        ("OBER-Cap-0428_1", "OBER-Cap-0428", "train"),
        ("OBER-Sim-0427_1", "OBER-Sim-0427", "train"),
        ("OBER-Sim-0427_1~8", "OBER-Sim-0427", "train"),
        ("OBER-Sim-train-00001-of-00002-1-0", "OBER-Sim-train-00001-of-00002-1-0", "train"),
    ]
    assert items[5].place == ("data/train-00000-of-00002.parquet", 1, 0)


def test_each_row_gives_its_own_pictures(released):
    source = OberSource(str(released))
    items = {item.id: item for item in source.list_items()}
    for name, seed in (
        ("OBER-Cap-0427_2", 1),
        ("OBER-Cap-0428_1", 2),
        ("OBER-Sim-0427_1", 3),
        ("OBER-Test-0001", 6),
    ):
        found = source.load_item(items[name])
        assert np.array_equal(found.source.array, _picture(seed)), name
        assert np.array_equal(found.gt.array, _picture(seed + 50)), name
        assert np.array_equal(found.mask.array, _mask(3)), name
    assert found.extra == {
        "subset": "OBER-Test",
        "path": "0001.jpg",
        "mask_kind": "object",
        "sha256": hashlib.sha256(_encode(_picture(6))).hexdigest(),
    }
    assert found.origin_file == released / "data" / "test-00000-of-00001.parquet"
    assert found.source.file is None


def test_the_mask_with_the_effect_is_chosen(released):
    source = OberSource(str(released), mask="effect")
    found = source.load_item(next(iter(source.list_items())))
    assert np.array_equal(found.mask.array, _mask(9))
    assert found.extra["mask_kind"] == "with_effect"


def test_listing_reads_no_picture(released, monkeypatch):
    read = []
    real = parquet.pq.ParquetFile.iter_batches

    def spy(self, *args, **options):
        for batch in real(self, *args, **options):
            read.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(parquet.pq.ParquetFile, "iter_batches", spy)
    assert len(list(OberSource(str(released)).list_items())) == 9
    assert len(read) == 6 and max(read) < 300 < len(_encode(_picture(0)))


def test_rows_in_order_read_each_row_group_once(released):
    source = OberSource(str(released))
    items = list(source.list_items())
    parquet.read_group.cache_clear()
    for item in items[3:8]:  # rows 0 and 1, 0, 0 and 1
        source.load_item(item)
    info = parquet.read_group.cache_info()
    assert (info.misses, info.hits, info.currsize) == (3, 2, 1)


def test_a_pool_without_gt_only_when_asked_for(released):
    source = OberSource(str(released), subset="OBER-Wild")
    (item,) = source.list_items()
    with pytest.raises(Rejected, match="1.*0.*GT.*require_gt") as error:
        source.load_item(item)
    assert error.value.reason == "no GT" and source.gives_gt
    pool = OberSource(str(released), subset="OBER-Wild", require_gt=False)
    found = pool.load_item(item)
    assert found.gt is None and not pool.gives_gt
    assert np.array_equal(found.source.array, _picture(7))
    assert not pickle.loads(pickle.dumps(pool)).gives_gt


def test_an_unknown_subset_is_refused_with_those_there_are(released):
    with pytest.raises(SourceError, match="'OBER':.*OBER-Cap, OBER-Sim, OB"):
        list(OberSource(str(released), subset="OBER").list_items())


def test_pictures_in_bytes_are_converted_as_files_are(tmp_path):
    picture = np.zeros((12, 16, 3), np.uint8)
    picture[:, :8] = (200, 40, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    stream = io.BytesIO()
    Image.fromarray(picture).convert("CMYK").save(stream, "JPEG", quality=95, exif=exif)
    layer = np.full((12, 16, 4), 255, np.uint8)  # a white brush on a transparent layer
    layer[..., 3] = _mask(4)
    _write(
        tmp_path,
        "test-00000-of-00001.parquet",
        [
            _row(
                0,
                "a.jpg",
                "x",
                input={"bytes": stream.getvalue(), "path": "a.jpg"},
                object_mask={"bytes": _encode(layer), "path": "a.png"},
            ),
            _row(0, "b.jpg", "x", input={"bytes": _encode(_picture(0))[:200], "path": "b.jpg"}),
            _row(0, "c.jpg", "x", input={"bytes": b"version https://git-lfs", "path": "c.jpg"}),
            _row(0, "d.jpg", "x", object_mask=None),
        ],
    )
    source = OberSource(str(tmp_path))
    good, cut, text, lacking = source.list_items()
    found = source.load_item(good)
    assert found.source.array.shape == (16, 12, 3)
    assert np.abs(found.source.array[2, 5].astype(int) - (200, 40, 40)).max() < 12
    assert np.array_equal(found.mask.array, _mask(4))
    with pytest.raises(TripletError, match="row 1 of row group 0, input is truncated") as error:
        source.load_item(cut)
    assert "test-00000-of-00001.parquet" in str(error.value) and error.value.file is None
    with pytest.raises(TripletError, match="row 0 of row group 1, input is no image"):
        source.load_item(text)
    with pytest.raises(Rejected, match="1.*1:.*object_mask"):
        source.load_item(lacking)


def test_damaged_and_foreign_files_are_named_before_the_run(released):
    path = released / "data" / "train-00001-of-00002.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(SourceError, match="train-00001-of-00002.parquet"):
        next(iter(OberSource(str(released)).list_items()))
    datasets.Dataset.from_dict({"image": ["x"], "gt": ["y"]}).to_parquet(path)
    with pytest.raises(SourceError, match="object_mask.*object_effect_ma"):
        next(iter(OberSource(str(released)).list_items()))


def test_a_file_that_is_damaged_later_rejects_its_items(released):
    source = OberSource(str(released))
    item = list(source.list_items())[6]
    path = released / "data" / "train-00001-of-00002.parquet"
    path.write_bytes(b"PAR1" + bytes(500))
    with pytest.raises(TripletError, match="train-00001-of-00002.parquet") as error:
        source.load_item(item)
    assert error.value.file == path
    path.unlink()
    with pytest.raises(TripletError, match="train-00001-of-00002.parquet"):
        source.load_item(item)


def test_a_part_of_the_files_is_told(released, caplog):
    (released / "data" / "train-00000-of-00002.parquet").unlink()
    with caplog.at_level(logging.WARNING):
        assert len(list(OberSource(str(released)).list_items())) == 6
    assert "1 of 2 files of train are there" in caplog.text
    assert "of test" not in caplog.text


# --------------------------------------------------------------------------- the older release


def test_the_older_folders_are_read(older):
    source = OberSource(str(older))
    items = list(source.list_items())
    assert [(i.id, i.group, i.split) for i in items] == [
        ("train-0001-1", "train-0001", "train"),
        ("train-0001-2_full", "train-0001", "train"),
        ("train-0002-1", "train-0002", "train"),
    ]
    found = source.load_item(items[1])
    assert found.origin_file == older / "train" / "0001" / "input_2_full.jpg"
    assert np.array_equal(
        found.source.array, np.array(Image.open(found.origin_file).convert("RGB"))
    )
    assert found.gt.file == older / "train" / "0001" / "gt_2_full.jpg"
    assert np.array_equal(found.mask.array, _mask(3)) and found.extra == {"mask_kind": "object"}
    effect = OberSource(str(older), mask="effect")
    assert np.array_equal(effect.load_item(list(effect.list_items())[1]).mask.array, _mask(9))
    (older / "train" / "0001" / "gt_2_full.jpg").unlink()
    with pytest.raises(Rejected, match="input_2_full.jpg has no GT"):
        source.load_item(items[1])
    assert OberSource(str(older), require_gt=False).load_item(items[1]).gt is None


def test_folders_without_a_split_above_are_read_and_have_no_subsets(older):
    items = OberSource(str(older / "train")).list_items()
    assert [i.id for i in items] == ["0001-1", "0001-2_full", "0002-1"]
    with pytest.raises(SourceError, match="names no subsets"):
        list(OberSource(str(older), subset="OBER-Test").list_items())


# ------------------------------------------------------------------------------------- both


def test_a_folder_is_recognised_by_its_columns_or_names(released, older, tmp_path):
    assert OberSource.recognises(released) and OberSource.recognises(released / "data")
    assert OberSource.recognises(older) and OberSource.recognises(older / "train")
    other = tmp_path / "other"
    (other / "data").mkdir(parents=True)
    datasets.Dataset.from_dict({"image": ["x"]}).to_parquet(
        other / "data" / "train-00000-of-00001.parquet"
    )
    assert not OberSource.recognises(other)
    assert not OberSource.recognises(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="data/train.*0001, 0002"):
        (older / "train" / "b").write_text("")
        for path in (older / "train").glob("*/input_*"):
            path.unlink()
        list(OberSource(str(older / "train")).list_items())


def test_options_say_what_is_allowed():
    for options, words in (
        ({"mask": "shadow"}, "mask must be object or effect"),
        ({"subset": None}, "subset must be"),
        ({"require_gt": "false"}, "require_gt must be true or false"),
    ):
        with pytest.raises(ValueError, match=words):
            OberSource("x", **options)
