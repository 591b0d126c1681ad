import io
import json
import os
import signal
import subprocess
import sys
import textwrap

import cv2
import numpy as np
import pytest
from PIL import Image

from rorem_lib.data import triplets as triplets_module
from rorem_lib.data.check import check_set
from rorem_lib.data.pictures import (
    TripletError,
    decode_image,
    fit_triplet,
    load_image,
    read_size,
    save_image,
)
from rorem_lib.data.triplets import (
    HIDDEN_MARK,
    load_images,
    read_records,
    read_triplets,
    resolve_meta,
)
from rorem_lib.data.writer import TripletWriter, merge_sets
from rorem_lib.files import Shallow, hash_file, read_json


def _picture(seed=0, size=24):
    return np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)


def _mask(size=24):
    mask = np.zeros((size, size), np.uint8)
    mask[6:12, 6:15] = 255
    return mask


@pytest.fixture
def made(tmp_path):
    """A folder with two triplets' files, as the authors lay them out, and no meta file."""
    for folder in ("source", "mask", "GT"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    for name in ("a", "b"):
        save_image(tmp_path / "set" / "source" / f"{name}.png", _picture(1))
        save_image(tmp_path / "set" / "mask" / f"{name}.png", _mask())
        save_image(tmp_path / "set" / "GT" / f"{name}.png", _picture(2))
    return tmp_path / "set"


def _record(name="a", **changes):
    record = {"source": f"source/{name}.png", "mask": f"mask/{name}.png", "GT": f"GT/{name}.png"}
    return {k: v for k, v in {**record, **changes}.items() if v is not None}


def _write_meta(folder, value, name="meta.json"):
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


# --------------------------------------------------------------------------- what loads unchanged


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([_record("a"), _record("b")]),
        json.dumps(_record("a")) + "\n" + json.dumps(_record("b")) + "\n\n",
        "\ufeff" + json.dumps([_record("a"), _record("b")]),
    ],
    ids=["list", "lines", "byte-order mark"],
)
def test_the_authors_forms_of_meta_load(made, text):
    triplets = read_triplets(_write_meta(made, text))
    assert [t.id for t in triplets] == [t.group for t in triplets] == ["a", "b"]
    assert triplets[1].gt == made / "GT" / "b.png"
    assert np.array_equal(load_images(triplets[0])["source"], _picture(1))


def test_a_single_object_loads(made):
    _write_meta(made, _record("b"))
    assert [t.id for t in read_triplets(made)] == ["b"]


def test_scores_become_floats_and_other_keys_are_kept(made):
    _write_meta(made, [_record("a", score="1", origin="x", group="g"), _record("b", score=0)])
    first, second = read_triplets(made)
    assert (first.extra, first.group) == ({"score": 1.0, "origin": "x"}, "g")
    assert isinstance(second.extra["score"], float)


def test_the_older_keys_are_understood(made):
    _write_meta(
        made,
        [
            {
                "gt": "source/a.png",
                "inpaint": "GT/a.png",
                "mask": "mask/a.png",
                "text": {"label": {"name": "dog"}},
            }
        ],
    )
    (triplet,) = read_triplets(made)
    assert triplet.source == made / "source" / "a.png"
    assert triplet.gt == made / "GT" / "a.png"
    assert triplet.extra == {"text": {"label": {"name": "dog"}}}


def test_several_sets_are_read_in_order(made):
    first = _write_meta(made, [_record("b")], "one.json")
    second = _write_meta(made, [_record("a")], "two.json")
    assert [t.id for t in read_triplets([first, str(second)])] == ["b", "a"]


def test_equal_file_names_get_ids_of_their_own(made):
    (made / "more").mkdir()
    save_image(made / "more" / "a.png", _picture(5))
    _write_meta(made, [_record("a"), _record("a", source="more/a.png")])
    assert [t.id for t in read_triplets(made)] == ["a", "a~2"]


def test_a_pool_has_no_gt(made):
    _write_meta(made, [_record("a", GT=None)])
    (triplet,) = read_triplets(made, require_gt=False)
    assert triplet.gt is None and load_images(triplet)["gt"] is None
    with pytest.raises(TripletError, match="record 1 has no GT .*generate removals"):
        read_triplets(made)


def test_names_in_other_scripts_and_with_spaces(tmp_path):
    with TripletWriter(tmp_path / "集 合") as writer:
        writer.add(id="照片 1", source=_picture(), mask=_mask(), gt=_picture(1))
    (triplet,) = read_triplets(tmp_path / "集 合")
    assert triplet.source.name == "照片 1.png"
    assert load_images(triplet)["gt"].shape == (24, 24, 3)


# ----------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "record, words",
    [
        ({"source": "source/a.png"}, "record 1 has no mask and no GT"),
        (_record("a", GT=7), "a path must be a text, not 7"),
        (_record("a", source="source/gone.png"), "gone.png is missing .*record 1.*restore"),
        (_record("a", source="../set2/a.png"), "leaves the set's folder"),
        (_record("a", source="source/../../a.png"), "leaves the set's folder"),
        (_record("a", score="good"), "score 'good' is no number"),
        (["source/a.png"], "record 1 is no object"),
    ],
)
def test_bad_records_are_named(made, record, words):
    _write_meta(made, [record])
    with pytest.raises(TripletError, match=words):
        read_triplets(made)


def test_outside_and_absolute_paths_only_when_asked_for(made):
    save_image(made.parent / "a.png", _picture(3))
    _write_meta(made, [_record("a", source="../a.png")])
    assert read_triplets(made, allow_outside=True)[0].source == made.parent / "a.png"
    _write_meta(made, [_record("a", source=str(made / "source" / "a.png"))])
    with pytest.raises(TripletError, match="is an absolute path"):
        read_triplets(made)
    assert read_triplets(made, allow_absolute=True)[0].source == made / "source" / "a.png"


def test_hidden_truth_is_never_read(made):
    truth = made / "hidden" / "pool" / "truth"
    truth.mkdir(parents=True)
    (made / "hidden" / HIDDEN_MARK).touch()
    save_image(truth / "a.png", _picture(9))
    (made / "innocent").symlink_to(truth)
    for path in (
        "hidden/pool/truth/a.png",
        "innocent/a.png",
        "mask/../hidden/pool/truth/a.png",
        str(truth / "a.png"),
    ):
        _write_meta(made, [_record("a", GT=path)])
        with pytest.raises(TripletError, match="hidden"):
            read_triplets(made, allow_absolute=True, allow_outside=True)
    _write_meta(truth, [_record("a", source="a.png", mask="a.png", GT="a.png")])
    with pytest.raises(TripletError, match="hidden"):
        read_triplets(truth)
    writer = TripletWriter(made.parent / "new")
    with pytest.raises(TripletError, match="hidden"):
        writer.add(id="a", source=_picture(), mask=_mask(), gt=truth / "a.png")


def test_a_folder_is_hidden_by_its_mark_not_by_its_name(made):
    _write_meta(made, [_record("a")])
    folder = made.parent / "hidden" / "photos"
    made.rename(folder.parent.parent / "photos")
    folder.parent.mkdir()
    (made.parent / "photos").rename(folder)
    assert len(read_triplets(folder)) > 0
    with TripletWriter(made.parent / "new") as writer:
        writer.add_triplet(read_triplets(folder)[0])


def test_an_id_given_twice_is_refused(made):
    _write_meta(made, [_record("a", id="x"), _record("b", id="x")])
    with pytest.raises(TripletError, match="record 2: id x occurs twice .first in record 1"):
        read_triplets(made)


def test_missing_sets_are_named_with_what_is_near(made, tmp_path):
    with pytest.raises(TripletError, match="no triplet set at .*run the stage"):
        resolve_meta(tmp_path / "nowhere")
    _write_meta(made, [])
    with pytest.raises(TripletError, match="there is .*set"):
        resolve_meta(tmp_path)
    assert resolve_meta(made) == resolve_meta(str(made / "meta.json")) == made / "meta.json"


def test_a_damaged_meta_file_is_named(made):
    _write_meta(made, '[{"source": "a.png", \n "mask"')
    with pytest.raises(TripletError, match="meta.json.*JSON.*JSON.*2"):
        read_triplets(made)


@pytest.mark.parametrize("start", ["[" * 100_000, '[{"a":' * 5000, '{"id": ' * 5000])
def test_lists_in_lists_without_end_are_refused_before_they_fill_the_memory(made, start):
    (made / "meta.json").write_text(start)
    with pytest.raises(TripletError, match=r"meta\.json is nested deeper"):
        list(read_records(made / "meta.json"))
    with pytest.raises(ValueError, match=r"meta\.json is nested deeper"):
        read_json(made / "meta.json")


def test_brackets_in_texts_are_no_nesting(made, monkeypatch):
    texts = ["[" * 300, '\\"[' * 300, "\\" * 301 + "[" * 200, '"' + "{" * 200, "]}" * 300]
    records = [_record("a", caption=text, list=[[1], {"b": [2]}]) for text in texts * 40]
    (made / "meta.json").write_text(json.dumps(records))
    assert list(read_records(made / "meta.json")) == records
    assert read_json(made / "meta.json") == records
    lines = "\n".join(map(json.dumps, records))
    (made / "meta.json").write_text(lines)
    assert list(read_records(made / "meta.json")) == records
    stream = Shallow(io.BytesIO(lines.encode()), "x")
    while stream.read(7):  # texts and their backslashes cut anywhere
        pass


def test_a_record_without_end_is_refused(made, monkeypatch):
    monkeypatch.setattr(triplets_module, "_MOST_RECORD", 200_000)
    records = [_record("a", caption="x" * 50_000)] * 20
    _write_meta(made, records)
    assert len(list(read_records(made / "meta.json"))) == 20
    _write_meta(made, [*records, _record("b", caption="x" * 400_000)])
    with pytest.raises(TripletError, match=r"meta\.json has an object of more than 200,000"):
        list(read_records(made / "meta.json"))
    monkeypatch.setenv("ROREM_MAX_JSON_MB", "0.1")
    with pytest.raises(ValueError, match=r"meta\.json.*ROREM_MAX_JSON_MB"):
        read_json(made / "meta.json")


@pytest.mark.parametrize("form", [lambda rows: f"[{','.join(rows)}]", "\n".join])
def test_a_number_of_thousands_of_digits_stays_a_text(made, form):
    rows = [json.dumps(_record(name)) for name in "abc"]
    rows[1] = rows[1][:-1] + ', "n": ' + "7" * 6000 + "}"
    (made / "meta.json").write_text(form(rows))
    found = list(read_records(made / "meta.json"))
    assert [row["source"] for row in found] == [_record(name)["source"] for name in "abc"]
    assert found[1]["n"] == "7" * 6000
    with pytest.raises(ValueError, match=r"meta\.json"):
        read_json(made / "meta.json")


def test_a_pointer_in_the_place_of_the_records_is_called_so(made):
    (made / "meta.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(TripletError, match=r"meta\.json is a Git-LFS pointer"):
        read_triplets(made)


# ------------------------------------------------------------------------------------- images


def test_rotation_palette_cmyk_alpha_and_16_bits(tmp_path):
    picture = np.zeros((10, 20, 3), np.uint8)
    picture[:, :10] = (200, 40, 40)
    image = Image.fromarray(picture)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    image.quantize(4).save(tmp_path / "palette.png")
    image.convert("RGBA").save(tmp_path / "alpha.png")
    assert load_image(tmp_path / "turned.jpg").shape == (20, 10, 3)
    for name in ("cmyk.jpg", "palette.png", "alpha.png"):
        found = load_image(tmp_path / name).astype(int)
        assert np.abs(found[5, 4] - (200, 40, 40)).max() < 12, name
    deep = np.array([[0, 256, 32768, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png", "L").tolist() == [[0, 1, 128, 255]]
    assert load_image(tmp_path / "deep.png").shape == (1, 4, 3)


def test_the_fast_decoder_gives_pillows_pixels(tmp_path):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (12, 9, 3), dtype=np.uint8))
    picture = small.resize((131, 77), Image.Resampling.BICUBIC)
    path = tmp_path / "x"
    kinds = [{"format": "PNG"}, {"format": "PNG", "optimize": True}] + [
        {"format": "JPEG", "quality": quality, "subsampling": sampling, "progressive": progressive}
        for quality in (40, 92, 100)
        for sampling in ("4:4:4", "4:2:2", "4:2:0")
        for progressive in (False, True)
    ]
    for kind in kinds:
        for stored, mode in (("RGB", "RGB"), ("L", "RGB"), ("L", "L"), ("RGB", "L")):
            picture.convert(stored).save(path, **kind)
            found, plain = decode_image(path, mode)
            with Image.open(path) as image:
                assert np.array_equal(found, np.array(image.convert(mode))), (kind, stored, mode)
            assert plain and found.flags.writeable
    whole = path.read_bytes()
    for cut in (len(whole) // 2, len(whole) - 2):  # a JPEG of which the end is missing
        path.write_bytes(whole[:cut])
        with pytest.raises(TripletError, match="truncated"):
            load_image(path)


def test_masks_of_every_kind(tmp_path):
    mask = _mask()
    palette = Image.fromarray((mask > 0).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(mask > 0).save(tmp_path / "bits.png")
    layer = np.full((24, 24, 4), 255, np.uint8)  # white brush on a transparent white layer
    layer[..., 3] = mask
    Image.fromarray(layer).save(tmp_path / "layer.png")
    Image.fromarray(mask.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for name in ("palette", "bits", "layer", "deep"):
        assert np.array_equal(load_image(tmp_path / f"{name}.png", "L"), mask), name


def test_arrays_are_writable_and_png_keeps_every_value(tmp_path):
    save_image(tmp_path / "x.png", _picture(4))
    found = load_image(tmp_path / "x.png")
    assert found.flags.writeable and np.array_equal(found, _picture(4))
    with pytest.raises(TripletError, match="uint8"):
        save_image(tmp_path / "y.png", _picture().astype(np.float32))


def test_resizing_keeps_masks_binary_and_thin_masks_alive(tmp_path):
    mask = np.zeros((120, 80), np.uint8)
    mask[60, 20:50] = 255
    picture = np.zeros((120, 80, 3), np.uint8)
    with TripletWriter(tmp_path) as writer:
        writer.add(id="a", source=picture, mask=mask, gt=picture)
    found = load_images(read_triplets(tmp_path)[0], size=16)
    assert found["source"].shape == found["gt"].shape == (16, 16, 3)
    assert set(np.unique(found["mask"])) == {0, 255}


def _pictures(height, width, box=None, mask=None):
    """A triplet with a white box (top, left, bottom, right) in its mask."""
    if mask is None:
        mask = np.zeros((height, width), np.uint8)
        mask[box[0] : box[2], box[1] : box[3]] = 255
    source = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return {"source": source, "mask": mask, "gt": source // 2}


def test_squashing_gives_pillows_bytes_and_no_size_changes_nothing(tmp_path):
    grey = np.random.default_rng(1).integers(0, 256, (30, 41), dtype=np.uint8)
    grey[:10] = 0
    pictures = _pictures(30, 41, mask=grey)
    for size in ((24, 24), (16, 48)):
        found = fit_triplet(pictures, size, mode="squash")
        for part, value in pictures.items():
            wanted = np.array(Image.fromarray(value).resize(size[::-1], Image.Resampling.BICUBIC))
            if part == "mask":
                wanted = np.where(wanted >= 128, 255, 0)
            assert np.array_equal(found[part], wanted) and found[part].dtype == np.uint8, part
    with TripletWriter(tmp_path) as writer:
        writer.add(id="a", **pictures)
    triplet, squashed = read_triplets(tmp_path)[0], fit_triplet(pictures, (24, 24), mode="squash")
    for part, value in load_images(triplet, size=24).items():
        assert np.array_equal(value, squashed[part])
    for mode in ("crop", "squash"):
        same = load_images(triplet, size=(30, 41), mode=mode)
        assert np.array_equal(same["gt"], pictures["gt"])
        assert np.array_equal(same["mask"], np.where(grey >= 128, 255, 0))


@pytest.mark.parametrize(
    "box, left",
    [
        ((10, 80, 20, 96), 32),  # at the right edge
        ((10, 0, 20, 8), 0),  # at the left one
        ((10, 46, 20, 50), 16),  # in the middle
        ((10, 10, 20, 14), 10),  # no further from the centre than needed
        ((10, 5, 20, 91), 16),  # wider than the window: every window from 5 to 27 holds as much
    ],
)
def test_cropping_keeps_the_aspect_and_the_mask(box, left):
    pictures = _pictures(64, 96, box)
    found = fit_triplet(pictures, (64, 64))
    for part, value in pictures.items():
        assert np.array_equal(found[part], value[:, left : left + 64]), part
    turned = {part: x.swapaxes(0, 1) for part, x in pictures.items()}
    tall = fit_triplet({part: np.ascontiguousarray(x) for part, x in turned.items()}, (64, 64))
    assert all(np.array_equal(tall[part], found[part].swapaxes(0, 1)) for part in found)


def test_the_plain_centre_can_be_cropped():
    pictures = _pictures(64, 96, (10, 70, 20, 96))
    found = fit_triplet(pictures, (64, 64), center=True)
    assert np.array_equal(found["source"], pictures["source"][:, 16:80])
    beside = _pictures(64, 96, (10, 80, 20, 96))  # a hole that lies outside is not lost
    assert fit_triplet(beside, (64, 64), center=True)["mask"].any()


def test_a_circle_stays_a_circle_at_any_size():
    rows, columns = np.mgrid[:150, :400]
    disc = (((rows - 70) ** 2 + (columns - 300) ** 2) < 50**2).astype(np.uint8) * 255
    pictures = {"source": np.repeat(disc[..., None], 3, axis=2), "mask": disc, "gt": None}
    for size in ((64, 64), (48, 96), (96, 64), (300, 300)):
        found = fit_triplet(pictures, size)
        assert found["gt"] is None and found["source"].shape == (*size, 3)
        assert found["mask"].shape == size
        y, x = np.nonzero(found["mask"])
        scale = max(size[0] / 150, size[1] / 400)
        assert np.ptp(y) + 1 == pytest.approx(100 * scale, abs=2)
        assert np.ptp(x) + 1 == pytest.approx(100 * scale, abs=2)
        assert np.abs(found["source"][..., 0].astype(int) - found["mask"]).mean() < 3
    squashed = fit_triplet(pictures, (64, 64), mode="squash")["mask"]
    y, x = np.nonzero(squashed)
    assert np.ptp(y) > 2 * np.ptp(x)


def test_a_crop_is_neither_all_hole_nor_without_one():
    found = fit_triplet(_pictures(64, 128, (0, 0, 64, 70)), (64, 64))
    assert 0.9 < (found["mask"] > 0).mean() < 1
    for box in ((100, 700, 101, 701), (0, 0, 1, 1), (399, 1199, 400, 1200)):  # one px
        for mode in ("crop", "squash"):
            mask = fit_triplet(_pictures(400, 1200, box), (16, 16), mode=mode)["mask"]
            assert (mask > 0).sum() == 1, (box, mode)
    with pytest.raises(ValueError, match="take crop or squash"):
        fit_triplet(_pictures(8, 8, (1, 1, 2, 2)), (4, 4), mode="stretch")


def test_sizes_are_read_from_the_header_as_pictures_open(tmp_path):
    image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    exif = Image.Exif()
    for turn in (1, 3, 6, 8):
        exif[0x0112] = turn
        for name in ("x.jpg", "x.png", "x.webp"):
            image.save(tmp_path / name, exif=exif)
            assert read_size(tmp_path / name) == load_image(tmp_path / name).shape[:2], (name, turn)
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(whole[:-30])  # the pixels are not read
    assert read_size(tmp_path / "x.png") == (30, 20)
    for content in (b"", b"no image"):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(TripletError, match=r"x\.png is (no image|empty)"):
            read_size(tmp_path / "x.png")
    with pytest.raises(TripletError, match="does not exist"):
        read_size(tmp_path / "y.png")


def _truncate(path, share=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            lambda f: _truncate(f / "source/a.png"),
            r"source/a\.png is truncated .*download it again",
        ),
        (lambda f: (f / "GT/a.png").write_bytes(b""), r"GT/a\.png is empty \(0 bytes\)"),
        (lambda f: (f / "GT/a.png").write_bytes(b"no image"), r"GT/a\.png is no image"),
        (lambda f: (f / "mask/a.png").unlink(), r"mask/a\.png is missing"),
        (lambda f: save_image(f / "mask/a.png", _mask(30)), r"mask/a\.png is 30x30 px but .*24x24"),
        (lambda f: save_image(f / "GT/a.png", _picture(size=20)), r"GT/a\.png is 20x20 px"),
        (lambda f: save_image(f / "mask/a.png", _mask() * 0), r"mask/a\.png is an empty mask"),
        (lambda f: save_image(f / "mask/a.png", _mask() // 127), "spread its values to 0 and 255"),
        (
            lambda f: save_image(f / "mask/a.png", _mask() * 0 + 255),
            r"mask/a\.png is white everywhere",
        ),
    ],
    ids=[
        "truncated",
        "0 bytes",
        "text",
        "missing",
        "mask size",
        "GT size",
        "empty mask",
        "mask of twos",
        "white mask",
    ],
)
def test_each_fault_is_found_and_named_with_its_file(made, damage, words):
    _write_meta(made, [_record("a"), _record("b")])
    assert check_set(made) == []
    damage(made)
    (problem,) = check_set(made)
    with pytest.raises(TripletError, match=words):
        load_images(read_triplets(made)[0])
    file = words.split(r"\.")[0] if "/a" in words else "mask/a"
    assert problem.file == made / f"{file}.png"


def test_check_goes_on_after_bad_records_and_wants_gt_in_all_or_none(made):
    _write_meta(made, [_record("a"), "nonsense", _record("b", GT=None), _record("b", mask="x.png")])
    problems = check_set(made)
    assert [p.reason.split("record ")[1][0] for p in problems] == ["2", "3", "4"]
    _write_meta(made, [_record("a", GT=None), _record("b", GT=None)])
    assert check_set(made) == []


# A decoder that crashes at one file: in the place of a package that is imported where it is there.
DEADLY = """
import multiprocessing, os, signal
from pathlib import Path
from rorem_lib.data import pictures

decode = pictures._decode_plain

def die(image, path, *rest):
    if multiprocessing.parent_process() and Path(path).stem == "x3":
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode(image, path, *rest)

def register_heif_opener():
    pictures._decode_plain = die
"""


@pytest.mark.slow
def test_a_file_at_which_processes_die_is_named_and_the_others_are_checked(tmp_path, monkeypatch):
    with TripletWriter(tmp_path / "set") as writer:
        for n in range(5):
            writer.add(id=f"x{n}", source=_picture(n), mask=_mask(), gt=_picture(n + 9))
    (tmp_path / "set/mask/x4.png").write_bytes(b"")
    (tmp_path / "path").mkdir()
    (tmp_path / "path/pillow_heif.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(tmp_path / "path")
    seen = []
    problems = check_set(tmp_path / "set", workers=2, progress=seen.append)
    assert [p.file.name for p in problems] == ["x3.png", "x4.png"] and seen[-1] == 5
    assert "SIGSEGV" in problems[0].reason and "record 4" in problems[0].reason


def test_files_that_were_exchanged_are_found_by_their_hash(tmp_path):
    with TripletWriter(tmp_path / "set") as writer:
        for name in "abc":
            writer.add(id=name, source=_picture(), mask=_mask(), gt=_picture(1))
    assert check_set(tmp_path / "set", hashes=True) == []
    save_image(tmp_path / "set/source/a.png", _picture(9))  # another image, as sound as the first
    mask = tmp_path / "set/mask/c.png"
    moved = _mask()
    moved[20, 20] = 255
    save_image(mask, moved)
    assert check_set(tmp_path / "set") == []
    problems = check_set(tmp_path / "set", hashes=True)
    assert [p.file for p in problems] == [tmp_path / "set/source/a.png", mask]
    assert "record 3" in problems[1].reason


def test_the_sha256_of_a_foreign_record_is_that_of_its_source(made, caplog):
    records = [_record(n, sha256=hash_file(made / f"source/{n}.png")) for n in "ab"]
    _write_meta(made, records)
    assert check_set(made, hashes=True) == [] and "4 files have no hash" in caplog.text
    records[1]["sha256"] = "0" * 64
    _write_meta(made, records)
    (problem,) = check_set(made, hashes=True)
    assert problem.file == made / "source/b.png" and check_set(made) == []
    records[1]["file"] = "raw/b.tif"  # as the kit's own have it: the hash is of that raw file
    _write_meta(made, records)
    assert check_set(made, hashes=True) == []


def _scene(number, size=64):
    """A photo's noise, a box in it that is gone in the GT, and its mask, drawn a bit larger."""
    rng = np.random.default_rng(number)
    gt = np.clip(rng.normal(120, 20, (size, size, 3)), 0, 255).astype(np.uint8)
    top, left = rng.integers(4, size // 2, 2)
    source, mask = gt.copy(), np.zeros((size, size), np.uint8)
    source[top : top + 20, left : left + 24] = rng.integers(0, 256, 3)
    mask[top - 2 : top + 22, left - 2 : left + 26] = 255
    return source, mask, gt


def _write_scenes(folder, change, count=6, *, pool=False):
    with TripletWriter(folder) as writer:
        for number in range(count):
            source, mask, gt = change(number, *_scene(number))
            writer.add(id=str(number), source=source, mask=mask, gt=None if pool else gt)
    return folder


def test_inverted_masks_are_a_fault_of_the_set(tmp_path):
    folder = _write_scenes(tmp_path / "all", lambda n, s, m, g: (s, 255 - m, g))
    (problem,) = check_set(folder)
    assert problem.file == folder / "meta.json"
    assert "masks are inverted in 6 of 6 triplets" in problem.reason
    half = _write_scenes(tmp_path / "half", lambda n, s, m, g: (s, m if n % 2 else 255 - m, g))
    assert check_set(half) == []  # each of them alone may be meant


def test_exchanged_sources_and_masks_are_a_fault_of_the_set(tmp_path):
    def exchange(n, source, mask, gt):
        return np.repeat(mask[..., None], 3, axis=2), cv2.cvtColor(source, cv2.COLOR_RGB2GRAY), gt

    for pool in (False, True):
        folder = _write_scenes(tmp_path / f"pool-{pool}", exchange, pool=pool)
        problem, *files = check_set(folder)
        assert "6 of 6 sources are black and white" in problem.reason
        assert [p.file.parent.name for p in files] == ["mask"] * 6


def test_ordinary_sets_are_no_exchanged_or_inverted_ones(tmp_path, caplog):
    def grow(n, source, mask, gt):  # all but a corner
        large = np.full_like(mask, 255)
        large[:20, :20] = 0
        return source, large, gt

    def draw(n, source, mask, gt):  # a scanned page: black on white
        page = np.where(source > 140, 255, 0).max(axis=2, keepdims=True).astype(np.uint8)
        page = np.repeat(page, 3, axis=2)
        return page, mask, np.where(mask[..., None] > 0, 255, page).astype(np.uint8)

    def darken(n, source, mask, gt):  # another exposure all over
        return source, mask, gt // 2

    for change in (grow, draw, darken, lambda n, s, m, g: (s, m, s)):
        assert check_set(_write_scenes(tmp_path / f"set{id(change)}", change)) == []
    assert check_set(_write_scenes(tmp_path / "pool", grow, pool=True)) == []
    assert not caplog.text
    inverted = _write_scenes(tmp_path / "ring", lambda n, s, m, g: (s, 255 - m, g), pool=True)
    assert check_set(inverted) == []  # a pool has no GT to know it by: a word, and no fault
    assert "6 of 6 masks are white along the whole border" in caplog.text


# -------------------------------------------------------------------------------------- writing


def test_writer_keeps_extras_and_sorts_by_id(tmp_path):
    with TripletWriter(tmp_path) as writer:
        for name in ("c", "a", "b"):
            writer.add(
                id=name,
                source=_picture(),
                mask=_mask(),
                gt=_picture(1),
                group="g",
                score=np.float32(1),
                seed=np.int64(3),
                note=None,
            )
    assert [t.id for t in read_triplets(tmp_path)] == ["a", "b", "c"]
    assert read_triplets(tmp_path)[0].extra == {"score": 1.0, "seed": 3}
    assert sorted(p.name for p in tmp_path.glob("[!.]*")) == ["GT", "mask", "meta.json", "source"]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    "item, words",
    [
        ({"id": "../a"}, "cannot name"),
        ({"id": ".a"}, "cannot name"),
        ({"id": ""}, "cannot name"),
        ({"id": "x" * 201}, "cannot name"),
        ({"mask": _mask(12)}, "sizes differ"),
        ({"mask": _mask() * 0}, "empty mask"),
        ({"GT": "x"}, "cannot be extra keys"),
        ({"source": "nowhere.png"}, "nowhere.png is missing"),
    ],
)
def test_writer_refuses_what_would_make_an_unsound_set(tmp_path, item, words):
    writer = TripletWriter(tmp_path)
    with pytest.raises(TripletError, match=words):
        writer.add(**{"id": "a", "source": _picture(), "mask": _mask(), "gt": _picture()} | item)
    assert not writer.done_ids


def test_files_are_reused_and_a_set_never_leaves_its_folder(tmp_path):
    with TripletWriter(tmp_path / "one") as writer:
        writer.add(id="a", source=_picture(), mask=_mask(), gt=_picture(1), origin="here")
    (triplet,) = read_triplets(tmp_path / "one")
    with TripletWriter(tmp_path / "two") as writer:
        writer.add(id="a", source=triplet.source, mask=triplet.mask, gt=_picture(7))
        writer.add_triplet(triplet, id="b", score=1.0)
    first, second = read_triplets(tmp_path / "two")  # refuses paths outside of the folder
    assert os.path.samefile(first.source, triplet.source)
    assert second.extra == {"origin": "here", "score": 1.0} and second.group == "a"
    save_image(triplet.source, _picture(8))  # the other set's image is another file from now on
    assert np.array_equal(load_image(first.source), _picture())


def test_reusing_a_file_twice_leaves_nothing_beside(tmp_path):
    save_image(tmp_path / "x.png", _picture())
    for _ in range(2):
        with TripletWriter(tmp_path / "set") as writer:
            writer.add(id="a", source=tmp_path / "x.png", mask=_mask())
    assert [p.name for p in (tmp_path / "set" / "source").iterdir()] == ["a.png"]


def test_an_error_keeps_the_journal_and_the_next_writer_goes_on(tmp_path):
    with pytest.raises(RuntimeError), TripletWriter(tmp_path) as writer:
        writer.add(id="a", source=_picture(), mask=_mask())
        raise RuntimeError
    assert not (tmp_path / "meta.json").exists()
    with pytest.raises(TripletError, match="unfinished set: run again"):
        resolve_meta(tmp_path)
    with open(tmp_path / "meta.jsonl.partial", "a") as stream:
        stream.write('{"id": "b", "source": "sou')  # torn by a kill
    with TripletWriter(tmp_path) as writer:
        assert writer.done_ids == {"a"}
        writer.add(id="b", source=_picture(2), mask=_mask())
    assert [t.id for t in read_triplets(tmp_path, require_gt=False)] == ["a", "b"]


def test_a_finished_set_can_grow_and_replace(tmp_path):
    for name, value in (("a", 1), ("b", 2), ("a", 3)):
        with TripletWriter(tmp_path) as writer:
            writer.add(id=name, source=_picture(value), mask=_mask(), round=value)
    triplets = read_triplets(tmp_path, require_gt=False)
    assert [(t.id, t.extra["round"]) for t in triplets] == [("a", 3), ("b", 2)]
    assert np.array_equal(load_image(triplets[0].source), _picture(3))


def test_restart_drops_what_is_no_longer_there(tmp_path):
    with TripletWriter(tmp_path) as writer:
        for name in ("a", "b"):
            writer.add(id=name, source=_picture(), mask=_mask())
    with TripletWriter(tmp_path, restart=True) as writer:
        assert not writer.done_ids
        writer.add(id="b", source=_picture(1), mask=_mask())
    assert [t.id for t in read_triplets(tmp_path, require_gt=False)] == ["b"]
    assert [p.name for p in (tmp_path / "source").iterdir()] == ["b.png"]


def test_restart_takes_nothing_away_before_the_first_triplet_is_added(tmp_path):
    TripletWriter(tmp_path).add(id="a", source=_picture(), mask=_mask())
    writer = TripletWriter(tmp_path, restart=True)
    assert not writer.done_ids and not writer.list_known()
    assert TripletWriter(tmp_path).done_ids == {"a"}
    writer.add(id="b", source=_picture(1), mask=_mask())
    assert TripletWriter(tmp_path).done_ids == {"b"}
    writer.close()
    assert [t.id for t in read_triplets(tmp_path, require_gt=False)] == ["b"]


def test_parts_written_side_by_side_become_one_set(tmp_path):
    writers = [TripletWriter(tmp_path, part=str(n)) for n in range(2)]
    for n in range(6):
        writers[n % 2].add(id=f"x{n}", source=_picture(n), mask=_mask())
    for writer in writers:
        writer.close()
    assert TripletWriter(tmp_path).done_ids == {f"x{n}" for n in range(6)}
    assert not (tmp_path / "meta.json").exists()
    TripletWriter(tmp_path).close()
    assert [t.id for t in read_triplets(tmp_path, require_gt=False)] == [f"x{n}" for n in range(6)]
    assert not list(tmp_path.glob("*.partial"))


def test_a_killed_writer_loses_the_item_in_work_at_most(tmp_path):
    code = textwrap.dedent("""
        import itertools, sys
        import numpy as np
        from rorem_lib.data.writer import TripletWriter
        mask = np.zeros((24, 24), np.uint8)
        mask[4:9] = 255
        with TripletWriter(sys.argv[1]) as writer:
            for n in itertools.count():
                writer.add(id=f"{n:05d}", source=np.full((24, 24, 3), n % 256, np.uint8), mask=mask)
                print(n, flush=True)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    for _ in range(30):
        said = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    said = max([said, *(int(line) for line in process.stdout.read().split())])
    process.wait()
    with TripletWriter(tmp_path) as writer:
        assert writer.done_ids >= {f"{n:05d}" for n in range(said + 1)}
        assert len(writer.done_ids) <= said + 2
    assert check_set(tmp_path) == []


# ------------------------------------------------------------------------------- merging, splitting


def _write_set(folder, names, seed=0, **extra):
    with TripletWriter(folder) as writer:
        for n, name in enumerate(names):
            writer.add(id=name, source=_picture(seed + n), mask=_mask(), gt=_picture(50), **extra)
    return folder


def test_merged_ids_are_unique_and_groups_stay(tmp_path):
    first = _write_set(tmp_path / "one", ["a", "b"], origin="one")
    second = _write_set(tmp_path / "two", ["b", "c"], seed=10, origin="two")
    for _ in range(2):  # merging again gives the same set
        meta = merge_sets([first, second], tmp_path / "all")
        triplets = {t.id: t for t in read_triplets(meta)}
        assert list(triplets) == ["a", "b", "b~2", "c"]
        assert triplets["b~2"].group == triplets["b"].group == "b"
        assert triplets["b~2"].extra["origin"] == "two"
        assert np.array_equal(load_image(triplets["b~2"].source), _picture(10))
    assert check_set(meta) == []
