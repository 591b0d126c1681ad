"""Which importer a folder is for: every layout is found, at the top and a few folders down."""

import dataclasses
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rorem_lib.data.items import Source, SourceError
from rorem_lib.sources import registry
from rorem_lib.sources.registry import CLASSES, discover_source, open_source


def _touch(root, *names):
    """Small images, by path."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 200, np.uint8)).save(path)


def _write(root, name, text):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")


def _write_parquet(root, name, *columns):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    value = {"bytes": b"x", "path": "0001.jpg"}
    pq.write_table(
        pa.table(
            {column: ["train" if column in ("subset", "split") else value] for column in columns}
        ),
        root / name,
    )


def _rord_raw(root):
    _touch(
        root,
        "Training/jpg/I-210618_I01001_W01/I-210618_I01001_W01_F0001.jpg",
        "Training/jpg/I-210618_I01001_W01/I-210618_I01001_W01_F0002.jpg",
    )
    _write(root, "Training/M/I-210618_I01001_W01/I-210618_I01001_W01_F0001_M.json", "{}")


def _rord_mirror(root):
    scene = "I-210618_I01001_W01"
    _touch(
        root,
        f"train/img/{scene}/{scene}_F0001.jpg",
        f"train/img/{scene}/{scene}_G0001.jpg",
        f"train/gt/{scene}/{scene}_F0001.jpg",
        f"train/mask/{scene}/{scene}_F0001_M.png",
    )


def _rord_flat(root):
    _touch(
        root,
        *(
            f"{split}/{part}/I-210618_I01001_W01_F0001.png"
            for split in ("train", "test")
            for part in ("img", "gt", "mask")
        ),
    )


def _mulan(root):
    _touch(root, *(f"000000000139-layer_{number}.png" for number in range(2)))


def _open_images(root):
    name = "0a1b2c3d4e5f6071_m0k4j_9a041d52.png"
    _write(
        root,
        "train-annotations-object-segmentation.csv",
        "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks\n"
        f"{name},0a1b2c3d4e5f6071,/m/0k4j,9a041d52,0.2,0.7,0.2,0.7,0.8,0.9 0.6 1\n",
    )
    _write(root, "class-descriptions.csv", "/m/0k4j,Car\n")
    _touch(root, f"train-masks-0/{name}", "train/0a1b2c3d4e5f6071.jpg")


def _high_resolution(root):
    _touch(
        root,
        "DIV2K_train_HR/0001.png",
        "Flickr2K/Flickr2K_HR/000001.png",
        "masks/0001.png",
        "masks/000001.png",
    )


def _composites(root):
    _touch(root, "cutouts/dog/1.png", "backgrounds/1.jpg")


def _upstream(root):
    _touch(root, *(f"{part}/x.png" for part in ("source", "mask", "GT")))
    _write(
        root,
        "meta.json",
        json.dumps([{part: f"{part}/x.png" for part in ("source", "mask", "GT")}]),
    )


def _parquet(root):
    _write_parquet(root, "data/train-00000-of-00001.parquet", "source", "mask", "GT")


def _ober(root):
    _write_parquet(
        root,
        "data/train-00000-of-00001.parquet",
        "input",
        "gt",
        "object_mask",
        "object_effect_mask",
        "subset",
        "split",
    )


def _ober_older(root):
    _touch(
        root,
        *(
            f"0001/{part}_1.{kind}"
            for part, kind in (
                ("input", "jpg"),
                ("gt", "jpg"),
                ("mask", "png"),
                ("shadow_mask", "png"),
            )
        ),
    )


def _peer(*parts):
    return lambda root: _touch(root, *(f"{part}/x.png" for part in parts))


LAYOUTS = {
    "rord raw": _rord_raw,
    "rord mirror": _rord_mirror,
    "rord flat": _rord_flat,
    "mulan": _mulan,
    "open_images": _open_images,
    "high_resolution": _high_resolution,
    "composites": _composites,
    "upstream": _upstream,
    "parquet": _parquet,
    "ober": _ober,
    "ober older": _ober_older,
    "syn4removal": _peer("paste", "mask", "gt"),
    "removal_bench": _peer("images", "gt", "masks"),
    "omnieraser": _peer("img", "gt_new", "sam_mask"),
    "corne": _peer("shot", "bg", "mask_sam"),
}


def test_every_importer_has_a_layout_here():
    known = {name.split()[0] for name in LAYOUTS}
    assert known == CLASSES.keys() - {"paired"}  # it is found by patterns, not by its layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_found_at_the_top_and_up_to_three_folders_down(layout, tmp_path):
    name = layout.split()[0]
    ids = None
    for depth, inner in enumerate(("", "解压 1", "a/raw data", "a/b/c")):
        top = tmp_path / str(depth)
        root = top / inner
        LAYOUTS[layout](root)
        (top / "readme.txt").write_text("by the way")
        found, place = discover_source(top)
        assert found == name
        assert place.is_relative_to(top) and root.is_relative_to(place)
        source = open_source("auto", top)
        assert type(source) is CLASSES[name] and source.folder == str(place)
        listed = [item.id.split("-")[-1] for item in source.list_items()]
        assert listed and listed == (ids or listed)
        ids = listed
        named = open_source(name, top)
        assert dataclasses.asdict(named) == dataclasses.asdict(source)
    _touch(tmp_path / "too deep/a/b/c/d", "x.png")
    LAYOUTS[layout](tmp_path / "too deep/a/b/c/d/e")
    with pytest.raises(SourceError, match="has none of the layouts"):
        discover_source(tmp_path / "too deep")


def test_a_folder_with_two_of_them_asks_for_one(tmp_path):
    _composites(tmp_path / "mine")
    _composites(tmp_path / "yours")
    with pytest.raises(SourceError) as caught:
        discover_source(tmp_path)
    text = str(caught.value)
    assert "can be read in 2 ways: say which source and which folder" in text
    assert f"source=composites, {tmp_path / 'mine'}; " in text
    assert f"source=composites, {tmp_path / 'yours'}" in text
    assert discover_source(tmp_path / "yours") == ("composites", tmp_path / "yours")
    assert discover_source(tmp_path, "composites") == ("composites", tmp_path)  # says what it lacks


def test_the_nearest_level_wins(tmp_path):
    _composites(tmp_path)
    _peer("images", "gt", "masks")(tmp_path / "extra/deep/RemovalBench")
    assert discover_source(tmp_path) == ("composites", tmp_path)


def test_what_is_known_is_listed_where_nothing_is_found(tmp_path):
    _touch(tmp_path, "photos/1.jpg", "b.png")
    with pytest.raises(SourceError) as caught:
        open_source("auto", tmp_path)
    text = str(caught.value)
    assert f"{tmp_path} has none of the layouts" in text and "it holds b.png, photos." in text
    assert text.splitlines()[1:] == [f"  {name}: {kind.layout}" for name, kind in CLASSES.items()]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(SourceError, match="it holds nothing"):
        open_source("auto", tmp_path / "nothing")
    for place in (tmp_path / "gone", tmp_path / "b.png"):
        with pytest.raises(SourceError, match=f"{place}"):
            open_source("auto", place)


def test_a_clone_without_its_large_files_is_called_so(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("A set")
    pointer = tmp_path / "data/train-00000-of-00001.parquet"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(SourceError, match=r"train-00000-of-00001\.parquet is a Git-LFS pointer"):
        discover_source(tmp_path)


def test_a_named_importer_says_itself_what_it_misses(tmp_path):
    _touch(tmp_path, "photos/1.jpg")
    source = open_source("removal_bench", tmp_path)
    with pytest.raises(SourceError, match="RemovalBench:.*images/, gt/"):
        list(source.list_items())


def test_only_so_many_folders_are_looked_into(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        registry,
        "CLASSES",
        {
            "mulan": type(
                "Spy",
                (CLASSES["mulan"],),
                {"recognises": classmethod(lambda kind, folder: seen.append(folder))},
            )
        },
    )
    for number in range(300):
        (tmp_path / f"{number:03d}/a/b").mkdir(parents=True)
    with pytest.raises(SourceError, match="none of the layouts"):
        discover_source(tmp_path)
    assert len(seen) == 1 + 200 + 200 + 200


def test_an_unknown_source_or_option_is_answered_with_what_there_is(tmp_path):
    _peer("shot", "bg", "mask_sam")(tmp_path)
    with pytest.raises(SourceError, match="'rords'"):
        open_source("rords", tmp_path)
    with pytest.raises(SourceError) as caught:
        open_source("auto", tmp_path, masks="object", depth=3)
    assert str(caught.value) == (
        "the source corne has no option depth, masks; it has mask='object'"
    )
    with pytest.raises(SourceError, match="corne has no option Folder"):
        open_source("auto", tmp_path, Folder="x")
    with pytest.raises(ValueError, match="with_effect|mask"):
        open_source("auto", tmp_path, mask="all")
    _peer("images", "gt", "masks")(tmp_path / "bench")
    with pytest.raises(SourceError, match="removal_bench"):
        open_source("removal_bench", tmp_path / "bench", mask="object")


def test_lists_of_a_recipe_become_tuples(tmp_path, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Own(CLASSES["omnieraser"]):
        words: tuple[str, ...] = ()
        name = "own"

    monkeypatch.setitem(CLASSES, "own", Own)
    assert open_source("own", tmp_path, words=["a", "b"]) == Own(str(tmp_path), ("a", "b"))
    _rord_raw(tmp_path)
    source = open_source("rord", tmp_path, classes=["F38", "BO"], size=[480, 270], frames=5)
    assert (source.classes, source.size, source.frames) == (("F38", "BO"), (480, 270), 5)
    assert hash(source) == hash(pickle.loads(pickle.dumps(source)))


@dataclasses.dataclass(frozen=True)
class Options(CLASSES["omnieraser"]):
    flag: bool = False
    count: int = 1
    part: float = 0.5
    angle: float = 10.0
    words: tuple[str, ...] = ()
    text: str = ""
    way: str = "up"
    choices = {"way": ("up", "down")}
    limits = {"angle": (-90, 90), "count": (1, 9)}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"flag": 1}, "flag must be true or false, not 1"),
        ({"flag": "false"}, "flag must be true or false"),
        ({"count": 0}, "count must be a whole number from 1 to 9, not 0"),
        ({"count": True}, "count must be"),
        ({"count": 2.0}, "count must be"),
        ({"part": 1.1}, "part must be a number from 0 to 1"),
        ({"part": float("nan")}, "part must be"),
        ({"part": "0.5"}, "part must be"),
        ({"angle": -91}, "angle must be a number from -90 to 90"),
        ({"words": "a"}, "words must be a list"),
        ({"words": ["a", ""]}, "words must be a list"),
        ({"text": None}, "text must be a text"),
        ({"way": "left"}, "way must be up or down, not 'left'"),
    ],
)
def test_options_are_checked_by_their_defaults(options, words):
    with pytest.raises(ValueError, match=words):
        Options("x", **options)


def test_options_at_their_limits_pass():
    made = Options("x", True, 9, 1, -90, ["a", "b"], "text", "down")
    assert made.words == ("a", "b") and made == Options(
        "x", True, 9, 1.0, -90.0, ("a", "b"), "text", "down"
    )


@pytest.mark.parametrize("name", CLASSES)
def test_every_importer_keeps_to_the_interface(name, tmp_path):
    kind = CLASSES[name]
    assert issubclass(kind, Source) and kind.name == name and name != "auto"
    for attribute in ("name", "origin", "license", "layout"):
        value = getattr(kind, attribute)
        assert isinstance(value, str) and value.strip() == value != "", attribute
    assert isinstance(kind.has_gt, bool) and kind.__dataclass_params__.frozen
    first, *options = dataclasses.fields(kind)
    assert first.name == "folder" and first.default is dataclasses.MISSING
    assert all(option.default is not dataclasses.MISSING for option in options)
    source = kind(str(tmp_path))  # before anything is there
    assert pickle.loads(pickle.dumps(source)) == source
    hash(source)
    assert source.summarise() == {} and not kind.recognises(tmp_path)
    with pytest.raises(SourceError) as caught:
        list(source.list_items())
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(SourceError):
        list(kind(str(tmp_path / "gone")).list_items())
