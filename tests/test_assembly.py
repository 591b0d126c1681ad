"""Assembly: what goes in, what is rejected and why, kills, full disks, provenance, splits."""

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
from PIL import Image

from rorem_lib.data import conversion, pictures
from rorem_lib.data.assembly import assemble_sets, open_examples
from rorem_lib.data.check import check_set
from rorem_lib.data.filters import FilterConfig
from rorem_lib.data.items import SourceError
from rorem_lib.data.pictures import TripletError, load_image, save_image
from rorem_lib.data.triplets import load_images, read_triplets
from rorem_lib.data.writer import TripletWriter
from rorem_lib.sources.paired import PairedSource
from rorem_lib.sources.upstream import UpstreamSource

SIZE = 96


def _texture(seed, size=SIZE):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)


def _mask(size=SIZE):
    mask = np.zeros((size, size), np.uint8)
    mask[30:60, 20:50] = 255
    return mask


def _remove(source, mask):
    gt = source.copy()
    gt[mask > 0] = (90, 120, 30)
    return gt


def _write_raw(folder, names, seed=0):
    """A set as the authors publish them; returns its records."""
    for part in ("source", "mask", "GT"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    records = []
    for number, name in enumerate(names):
        source, mask = _texture(seed + number), _mask()
        for part, picture in (("source", source), ("mask", mask), ("GT", _remove(source, mask))):
            save_image(folder / part / f"{name}.png", picture)
        records.append({part: f"{part}/{name}.png" for part in ("source", "mask", "GT")})
    _write_meta(folder, records)
    return records


def _write_meta(folder, records):
    (folder / "meta.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")


def _reasons(folder):
    lines = (folder / "rejected.jsonl").read_text().splitlines()
    return {record["id"]: record for record in map(json.loads, lines)}


def _hash_tree(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_triplets_carry_their_provenance_and_files_are_taken_over(tmp_path):
    records = _write_raw(tmp_path / "raw", ["a", "照片 1"])
    records[0] |= {"group": "video 3", "license": "CC0-1.0", "score": 1}
    _write_meta(tmp_path / "raw", records)
    result = assemble_sets(UpstreamSource(str(tmp_path / "raw")), tmp_path / "out")
    assert result.counts == {"labelled": 2} and result.reasons == {}
    first, second = read_triplets(result.sets["labelled"])
    assert (first.id, first.group, second.id) == ("a", "video 3", "照片 1")
    assert os.path.samefile(first.source, tmp_path / "raw/source/a.png")
    extra = first.extra
    assert (extra["origin"], extra["license"], extra["file"]) == (
        "RORem_dataset",
        "CC0-1.0",
        "source/a.png",
    )
    raw = (tmp_path / "raw/source/a.png").read_bytes()
    assert extra["sha256"] == hashlib.sha256(raw).hexdigest()
    assert extra["mask_area"] == pytest.approx(900 / SIZE**2, abs=1e-5)
    difference = np.abs(_texture(0).astype(int) - (90, 120, 30))[_mask() > 0]
    grey = difference @ (0.299, 0.587, 0.114)
    assert extra["change_inside"] == pytest.approx(grey.mean(), abs=0.6)
    assert extra["change_outside"] == 0 and len(extra["phash"]) == 16
    assert (extra["width"], extra["height"], extra["score"]) == (SIZE, SIZE, 1)
    assert check_set(tmp_path / "out" / "labelled") == []


@pytest.fixture
def faulty(tmp_path):
    """A raw set in which every item but `good` and the odd-but-sound ones has a fault."""
    raw = tmp_path / "raw"
    names = [
        "good",
        "truncated",
        "missing",
        "zero",
        "cmyk",
        "deep",
        "turned",
        "palette",
        "other",
        "empty",
        "white",
        "speck",
        "unchanged",
        "moved",
        "elsewhere",
        "text",
    ]
    records = _write_raw(raw, names)
    data = (raw / "GT/truncated.png").read_bytes()
    (raw / "GT/truncated.png").write_bytes(data[: len(data) // 2])
    (raw / "mask/missing.png").unlink()
    (raw / "source/zero.png").write_bytes(b"")
    (raw / "source/text.png").write_text("<html>404</html>")
    smooth = cv2.GaussianBlur(_texture(4), (0, 0), 4)
    for part, picture in (("source", smooth), ("GT", _remove(smooth, _mask()))):
        Image.fromarray(picture).convert("CMYK").save(raw / part / "cmyk.jpg", quality=95)
        (raw / part / "cmyk.png").unlink()
    records[4] |= {"source": "source/cmyk.jpg", "GT": "GT/cmyk.jpg"}
    deep = cv2.cvtColor(load_image(raw / "source/deep.png"), cv2.COLOR_RGB2GRAY)
    Image.fromarray(deep.astype(np.uint16) * 257).save(raw / "source/deep.png")
    grey = np.repeat(deep[..., None], 3, axis=2)
    save_image(raw / "GT/deep.png", _remove(grey, _mask()))
    exif = Image.Exif()
    exif[0x0112] = 6
    for part in ("source", "GT"):  # stored lying, meant upright
        picture = cv2.rotate(
            cv2.resize(load_image(raw / part / "turned.png"), (80, 120)),
            cv2.ROTATE_90_COUNTERCLOCKWISE,
        )
        Image.fromarray(picture).save(raw / part / "turned.jpg", exif=exif, quality=95)
        (raw / part / "turned.png").unlink()
    records[6] |= {"source": "source/turned.jpg", "GT": "GT/turned.jpg"}
    save_image(raw / "mask/turned.png", cv2.resize(_mask(), (80, 120)))
    palette = Image.fromarray((_mask() > 0).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.save(raw / "mask/palette.png")
    save_image(raw / "mask/other.png", _mask(SIZE + 8))
    save_image(raw / "mask/empty.png", _mask() * 0)
    save_image(raw / "mask/white.png", _mask() * 0 + 255)
    speck = _mask() * 0
    speck[5, 5:7] = 255
    save_image(raw / "mask/speck.png", speck)
    save_image(raw / "GT/unchanged.png", load_image(raw / "source/unchanged.png"))
    save_image(raw / "GT/moved.png", np.roll(load_image(raw / "GT/moved.png"), 3, axis=1))
    save_image(raw / "GT/elsewhere.png", _texture(99))
    _write_meta(raw, [*records, "nonsense"])
    return raw


def test_each_fault_is_rejected_with_its_reason_and_file_and_none_ends_the_run(faulty, tmp_path):
    result = assemble_sets(
        UpstreamSource(str(faulty)),
        tmp_path / "out",
        filters=FilterConfig(min_mask_area=0.001),
        workers=2,
    )
    found = _reasons(tmp_path / "out")
    assert {name: record["reason"] for name, record in found.items()} == {
        "truncated": "unreadable",
        "missing": "missing file",
        "zero": "unreadable",
        "text": "unreadable",
        "other": "sizes differ",
        "empty": "empty mask",
        "white": "white mask",
        "speck": "mask area",
        "unchanged": "unchanged",
        "moved": "misaligned",
        "elsewhere": "changed outside",
        "record17": "bad record",
    }
    assert sum(result.reasons.values()) == len(found) and result.reasons["unreadable"] == 3
    for name, file in (
        ("truncated", "GT/truncated.png"),
        ("missing", "mask/missing.png"),
        ("zero", "source/zero.png"),
        ("text", "source/text.png"),
    ):
        assert file in found[name]["message"]
    assert "104x104" in found["other"]["message"]
    assert float(found["moved"]["message"].split()[4]) == pytest.approx(3, abs=0.5)
    kept = {triplet.id: load_images(triplet) for triplet in read_triplets(result.sets["labelled"])}
    assert sorted(kept) == ["cmyk", "deep", "good", "palette", "turned"]
    assert kept["turned"]["source"].shape == (120, 80, 3)
    assert (
        np.abs(kept["cmyk"]["source"].astype(int) - cv2.GaussianBlur(_texture(4), (0, 0), 4)).mean()
        < 3
    )
    assert np.array_equal(kept["palette"]["mask"], _mask())
    # What programs read in ways of their own was encoded plainly.
    for name, part in (
        ("turned", "source"),
        ("cmyk", "source"),
        ("deep", "source"),
        ("palette", "mask"),
    ):
        with Image.open(tmp_path / f"out/labelled/{part}/{name}.png") as image:
            assert image.mode in ("RGB", "L") and not image.getexif()
    assert check_set(tmp_path / "out" / "labelled") == []


def test_a_name_that_is_no_utf_8_is_rejected_by_its_escaped_name(tmp_path):
    raw = tmp_path / "raw"
    _write_raw(raw, ["a", "b", "c", "d", "e"])
    for part in ("source", "mask", "GT"):
        os.rename(raw / part / "c.png", os.fsencode(raw / part) + b"/caf\xe9.png")
    patterns = {"source": "source/{name}.*", "mask": "mask/{name}.*", "gt": "GT/{name}.*"}
    result = assemble_sets(PairedSource(str(raw), **patterns), tmp_path / "out", workers=0)
    assert result.counts == {"labelled": 4} and result.reasons == {"bad name": 1}
    (found,) = _reasons(tmp_path / "out").values()
    assert found["id"] == "caf\\xe9" and "source/caf\\xe9.png" in found["message"]
    again = assemble_sets(PairedSource(str(raw), **patterns), tmp_path / "out", workers=0)
    assert again.counts == {"labelled": 4} and again.reasons == {"bad name": 1}


def test_a_record_that_no_file_can_hold_is_rejected_and_the_others_go_on(tmp_path):
    raw = tmp_path / "raw"
    records = _write_raw(raw, ["a", "b", "nul", "half", "word", "nan", "deep", "digits", "suffix"])
    long = "x." + "s" * 240
    os.rename(raw / "source/suffix.png", raw / "source" / long)
    deep = 1
    for _ in range(60):
        deep = [deep]
    for number, changes in {
        2: {"id": "nu\0l"},
        3: {"id": "hal\ud800f"},
        4: {"id": "word", "caption": "a \ud800"},
        5: {"id": "nan", "score": 1e999},
        6: {"id": "deep", "list": deep},
        7: {"id": "digits", "number": "DIGITS"},
        8: {"id": "suffix" * 10, "source": f"source/{long}"},
    }.items():
        records[number] |= changes
    text = json.dumps(records).replace('"DIGITS"', "1" * 6000).replace("Infinity", "1e999")
    (raw / "meta.json").write_text(text)
    result = assemble_sets(UpstreamSource(str(raw)), tmp_path / "out", workers=0)
    found = _reasons(tmp_path / "out")
    # a number that Python makes none of stays a text, half a character of JSON's becomes a ?
    assert result.counts == {"labelled": 5}
    assert {name[:6]: record["reason"] for name, record in found.items()} == {
        "nu\0l": "bad record",
        "nan": "bad record",
        "deep": "bad record",
        "suffix": "bad name",
    }
    kept = {triplet.id: triplet.extra for triplet in read_triplets(result.sets["labelled"])}
    assert sorted(kept) == ["a", "b", "digits", "hal?f", "word"]
    assert kept["digits"]["number"] == "1" * 6000


class Deadly(UpstreamSource):
    """Its items end their process, or never end themselves, by their names."""

    def load_item(self, item):
        if item.id == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if item.id == "hang":
            re.match(r"(a+)+b", "a" * 60)
        return super().load_item(item)


@pytest.mark.slow
def test_an_item_at_which_its_process_dies_or_hangs_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setenv("ROREM_ITEM_SECONDS", "1")
    _write_raw(tmp_path / "raw", ["a", "crash", "c", "hang", "e"])
    source = Deadly(str(tmp_path / "raw"))
    result = assemble_sets(source, tmp_path / "out", workers=1)
    assert result.counts == {"labelled": 3} and result.reasons == {"process died": 2}
    found = _reasons(tmp_path / "out")
    assert (
        "source/crash.png" in found["crash"]["message"] and "SIGSEGV" in found["crash"]["message"]
    )
    assert "source/hang.png" in found["hang"]["message"]
    assert "ROREM_ITEM_SECONDS" in found["hang"]["message"]
    assert sorted(open_examples(source, 4)) == ["a", "c", "e"]


def test_near_duplicates_are_found_within_the_set_and_against_evaluation_sets(tmp_path):
    raw = tmp_path / "raw"
    records = _write_raw(raw, ["a", "b", "c", "d", "e"])
    twin = Image.fromarray(cv2.resize(_texture(0), (80, 80)))  # of a, smaller and as JPEG
    twin.save(raw / "source/d.jpg", quality=70)
    save_image(raw / "mask/d.png", _mask(80))
    save_image(raw / "GT/d.png", _remove(np.array(twin), _mask(80)))
    records[3]["source"] = "source/d.jpg"
    for name in "ce":  # two masks over one image: one group, no duplicates of each other
        save_image(raw / f"source/{name}.png", _texture(2))
        save_image(raw / f"GT/{name}.png", _remove(_texture(2), _mask()))
    records[2]["group"] = records[4]["group"] = "image 2"
    _write_meta(raw, records)
    with TripletWriter(tmp_path / "evaluation") as writer:
        writer.add(id="x", source=cv2.resize(_texture(1), (160, 160)), mask=_mask(160))
    for _ in range(2):  # the second run finds the first one's result
        result = assemble_sets(
            UpstreamSource(str(raw)), tmp_path / "out", evaluation_sets=[tmp_path / "evaluation"]
        )
        assert [t.id for t in read_triplets(result.sets["labelled"])] == ["a", "c", "e"]
        found = _reasons(tmp_path / "out")
        assert {name: r["reason"] for name, r in found.items()} == dict.fromkeys(
            "bd", "near-duplicate"
        )
        assert "looks like a of labelled" in found["d"]["message"]
        assert "evaluation/source/x.png, an image of an evaluation set" in found["b"]["message"]
        assert sorted(p.name for p in (tmp_path / "out/labelled/source").iterdir()) == [
            "a.png",
            "c.png",
            "e.png",
        ]
    result = assemble_sets(
        UpstreamSource(str(raw)), tmp_path / "out", filters=FilterConfig(duplicate_distance=-1)
    )
    assert result.counts == {"labelled": 5}


@pytest.mark.slow
def test_splits_follow_groups_and_stay_when_the_source_grows(tmp_path):
    records = _write_raw(tmp_path / "raw", [f"{n:02d}" for n in range(60)])
    for number, record in enumerate(records):
        record["group"] = f"scene {number // 3}"
    _write_meta(tmp_path / "raw", records[:45])
    config = {"test_share": 0.3, "seed": 1, "filters": FilterConfig(duplicate_distance=-1)}
    source = UpstreamSource(str(tmp_path / "raw"))
    assemble_sets(source, tmp_path / "out", **config)
    before = {t.id for t in read_triplets(tmp_path / "out/test")}
    _write_meta(tmp_path / "raw", records)
    result = assemble_sets(source, tmp_path / "out", **config)
    train, test = (read_triplets(result.sets[name]) for name in ("labelled", "test"))
    assert len(train) + len(test) == 60 and 9 <= len(test) <= 30
    assert not {t.group for t in train} & {t.group for t in test}
    assert before and before == {t.id for t in test if int(t.id) < 45}
    records[0]["split"] = "test"  # the source's own split wins
    _write_meta(tmp_path / "raw", records[:2])
    result = assemble_sets(source, tmp_path / "own")
    assert [t.id for t in read_triplets(result.sets["test"])] == ["00"]


def test_other_settings_begin_anew_and_a_foreign_set_is_left_alone(tmp_path):
    _write_raw(tmp_path / "raw", ["a", "b", "c"])
    source = UpstreamSource(str(tmp_path / "raw"))
    assert assemble_sets(source, tmp_path / "out").counts == {"labelled": 3}
    again = assemble_sets(source, tmp_path / "out", limit=2, max_side=48)
    assert again.counts == {"labelled": 2}
    assert [p.name for p in sorted((tmp_path / "out/labelled/mask").iterdir())] == [
        "a.png",
        "b.png",
    ]
    pictures = load_images(read_triplets(again.sets["labelled"])[0])
    assert pictures["gt"].shape == (48, 48, 3) and pictures["mask"].sum() == 225 * 255
    with TripletWriter(tmp_path / "mine" / "labelled") as writer:
        writer.add(id="x", source=_texture(1), mask=_mask(), gt=_texture(2))
    with pytest.raises(TripletError, match="not assembled here: choose another folder"):
        assemble_sets(source, tmp_path / "mine")
    assert len(read_triplets(tmp_path / "mine/labelled")) == 1


@pytest.mark.parametrize(
    "place, assembled",
    [
        *((x, False) for x in ("test", "labelled", "pool", "rejected.jsonl", "assembly.json")),
        *((x, True) for x in ("test", "pool")),
    ],
)
def test_what_others_keep_in_the_output_folder_is_left_alone(tmp_path, place, assembled):
    """RORD's third layout keeps raw images in `test/`; an output folder may be anything."""
    _write_raw(tmp_path / "raw", ["a"])
    out, source = tmp_path / "out", UpstreamSource(str(tmp_path / "raw"))
    if assembled:
        assemble_sets(source, out)
    if "." in place:
        out.mkdir()
        (out / place).write_text('{"mine": 1}')
    else:
        _write_raw(out / place / "scene", ["0001"])
    before = _hash_tree(out)
    for changes in ({}, {"max_side": 48}):
        with pytest.raises(TripletError, match=f"{place} was not assembled here"):
            assemble_sets(source, out, **changes)
    assert _hash_tree(out) == before


@pytest.mark.parametrize("out", [".", "raw", "raw/../raw", "link"])
def test_an_output_that_is_or_holds_an_input_is_refused(tmp_path, out):
    raw = tmp_path / "raw" if out != "." else tmp_path / "labelled"
    _write_raw(raw, ["a"])
    (tmp_path / "link").symlink_to(raw)
    before = _hash_tree(tmp_path)
    with pytest.raises(TripletError, match="choose an output folder outside"):
        assemble_sets(UpstreamSource(str(raw)), tmp_path / out)
    assert _hash_tree(tmp_path) == before
    with pytest.raises(TripletError, match="choose an output folder outside"):  # nor test against
        assemble_sets(
            UpstreamSource(str(_make_raw(tmp_path))),
            tmp_path / "out",
            evaluation_sets=[str(tmp_path / "out/test/meta.json")],
        )


def _make_raw(folder):
    _write_raw(folder / "another", ["a"])
    return folder / "another"


def test_what_others_put_into_a_set_stays_when_it_is_assembled_anew(tmp_path):
    _write_raw(tmp_path / "raw", ["a", "b"])
    source = UpstreamSource(str(tmp_path / "raw"))
    assemble_sets(source, tmp_path / "out")
    for name in ("notes.txt", "source/mine.txt"):
        (tmp_path / "out/labelled" / name).write_text("mine")
    assert assemble_sets(source, tmp_path / "out", limit=1).counts == {"labelled": 1}
    for name in ("notes.txt", "source/mine.txt"):
        assert (tmp_path / "out/labelled" / name).read_text() == "mine"
    assert not (tmp_path / "out/labelled/source/b.png").exists()


def test_two_assemblies_into_one_folder_at_once(tmp_path):
    _write_raw(tmp_path / "raw", ["a"])
    source = UpstreamSource(str(tmp_path / "raw"))

    def begin_another(_):
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on .*/out"):
            assemble_sets(source, tmp_path / "out")
        seen.append(True)

    seen = []
    assert assemble_sets(source, tmp_path / "out", progress=begin_another).counts["labelled"] == 1
    assert seen == [True]


@pytest.mark.slow
def test_what_a_lost_power_emptied_is_assembled_anew(tmp_path, caplog):
    _write_raw(tmp_path / "raw", [f"{n:02d}" for n in range(20)])
    source = UpstreamSource(str(tmp_path / "raw"))
    config = {"max_side": 48, "filters": FilterConfig(duplicate_distance=-1)}
    assemble_sets(source, tmp_path / "out", **config)
    whole = _hash_tree(tmp_path / "out")
    for n in range(19):  # all but one, a part of each
        part = ("source", "mask", "GT")[n % 3]
        os.truncate(tmp_path / f"out/labelled/{part}/{n:02d}.png", 0)
    assert assemble_sets(source, tmp_path / "out", **config).counts == {"labelled": 20}
    assert "files of 19 triplets are not what was written" in caplog.text
    assert _hash_tree(tmp_path / "out") == whole
    assert check_set(tmp_path / "out/labelled", hashes=True) == []


def test_nan_in_a_record_is_no_value_and_infinity_is_a_bad_record(tmp_path, caplog):
    records = _write_raw(tmp_path / "raw", ["a", "b", "c"])
    _write_meta(tmp_path / "raw", records)

    class Scored(UpstreamSource):
        def load_item(self, item):
            pictures = super().load_item(item)
            score = {"a": float("nan"), "b": np.float64("inf"), "c": 0.5}[item.id]
            pictures.extra |= {"score": score, "deep": [1.0]}
            return pictures

    for _ in range(2):  # and again, when it is finished
        result = assemble_sets(Scored(str(tmp_path / "raw")), tmp_path / "out", workers=0)
        found = {t.id: t.extra.get("score") for t in read_triplets(result.sets["labelled"])}
        assert found == {"a": None, "c": 0.5}
        assert result.reasons == {"bad record": 1}
        assert "score is inf" in _reasons(tmp_path / "out")["b"]["message"]
    assert caplog.text.count("score is NaN in 1 records") == 1


def test_an_id_that_cannot_name_files_is_a_rejection(tmp_path):
    records = _write_raw(tmp_path / "raw", ["a", "b"])
    records[0]["id"] = "字" * 80
    _write_meta(tmp_path / "raw", records)
    result = assemble_sets(UpstreamSource(str(tmp_path / "raw")), tmp_path / "out")
    assert sum(result.counts.values()) + sum(result.reasons.values()) == 2
    assert check_set(tmp_path / "out/labelled") == []


def test_shrunk_masks_keep_thin_lines(tmp_path):
    _write_raw(tmp_path / "raw", ["a"])
    thin = _mask() * 0
    thin[40, 10:90] = 255
    save_image(tmp_path / "raw/mask/a.png", thin)
    gt = _texture(0)
    gt[40, 10:90] = 0
    save_image(tmp_path / "raw/GT/a.png", gt)
    result = assemble_sets(UpstreamSource(str(tmp_path / "raw")), tmp_path / "out", max_side=32)
    mask = load_image(read_triplets(result.sets["labelled"])[0].mask, "L")
    assert set(np.unique(mask)) == {0, 255} and (mask[13] > 0).sum() >= 26


def test_a_folder_that_went_away_ends_the_run_instead_of_rejecting_everything(tmp_path):
    _write_raw(tmp_path / "raw", ["a", "b"])

    class Vanishing(UpstreamSource):
        def load_item(self, item):
            if (tmp_path / "raw").exists():
                (tmp_path / "raw").rename(tmp_path / "gone")
            return super().load_item(item)

    with pytest.raises(SourceError, match="raw is gone: mount it again"):
        assemble_sets(Vanishing(str(tmp_path / "raw")), tmp_path / "out", workers=0)


def test_progress_tells_the_rest_of_the_time(tmp_path):
    _write_raw(tmp_path / "raw", [f"{n:02d}" for n in range(40)])
    (tmp_path / "raw/mask/07.png").unlink()
    seen = []
    assemble_sets(
        UpstreamSource(str(tmp_path / "raw")),
        tmp_path / "out",
        progress=lambda p: seen.append((p.done, p.total, p.rate, str(p))),
    )
    assert [row[:2] for row in seen] == [(16, 40), (32, 40), (40, 40)] and seen[0][2] > 0
    assert "left" in seen[0][3] and seen[-1][3] == "items: 40 of 40, 1 rejected"


# --------------------------------------------------------------------------- kills, full disks


def _start(raw, out):
    code = textwrap.dedent("""
        import sys
        from rorem_lib.data.assembly import assemble_sets
        from rorem_lib.sources.upstream import UpstreamSource
        if __name__ == "__main__":
            assemble_sets(UpstreamSource(sys.argv[1]), sys.argv[2], workers=2, test_share=0.3,
                          progress=lambda p: print(p.done, flush=True))
    """)
    script = raw.parent / "run.py"
    script.write_text(code)
    root = Path(__file__).resolve().parents[1]
    return subprocess.Popen(
        [sys.executable, script, raw, out],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )


@pytest.mark.slow
def test_killed_and_started_again_gives_the_undisturbed_result(tmp_path):
    raw = tmp_path / "raw"
    records = _write_raw(raw, [f"{n:03d}" for n in range(400)])
    for n in range(0, 400, 25):  # rejections and late duplicates must survive a kill too
        (raw / f"mask/{n:03d}.png").write_bytes(b"")
        save_image(raw / f"source/{n + 7:03d}.png", _texture(n + 3))
        save_image(raw / f"GT/{n + 7:03d}.png", _remove(_texture(n + 3), _mask()))
    _write_meta(raw, records)
    assert _start(raw, tmp_path / "whole").wait() == 0
    for lines in (1, 2, 3):  # killed three times, each time further on
        process = _start(raw, tmp_path / "out")
        for _ in range(lines):
            line = process.stdout.readline()
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert line and not (tmp_path / "out/labelled/meta.json").exists()
        assert not psutil.wait_procs(workers, timeout=10)[1], "a worker outlived its parent"
    half = len((tmp_path / "out/labelled/meta.jsonl.partial").read_text().splitlines())
    process = _start(raw, tmp_path / "out")
    first = int(process.stdout.readline())
    process.stdout.read()
    assert process.wait() == 0 and first > half > 0
    whole = _hash_tree(tmp_path / "whole")
    assert _hash_tree(tmp_path / "out") == whole
    assert (
        len(read_triplets(tmp_path / "out/labelled")) + len(read_triplets(tmp_path / "out/test"))
        == 400 - 32
    )
    assert not any("partial" in name or "old" in name for name in whole)


def test_a_full_disk_is_waited_for_then_named_and_nothing_is_lost(tmp_path, monkeypatch):
    _write_raw(tmp_path / "raw", ["a", "b", "c"])
    source = UpstreamSource(str(tmp_path / "raw"))
    real, full = os.link, []

    def link(original, beside):
        if "/b.png" in str(original) and full:
            full.pop()
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(original, beside)

    def copy(original, beside):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pictures.os, "link", link)
    monkeypatch.setattr(pictures.shutil, "copyfile", copy)
    monkeypatch.setattr(conversion.time, "sleep", lambda seconds: None)
    full[:] = [1] * 1000
    with pytest.raises(OSError, match=r"b\.png"):
        assemble_sets(source, tmp_path / "out", patience=0, workers=0)
    assert not (tmp_path / "out/labelled/meta.json").exists()
    full[:] = [1] * 3  # space comes back while it waits
    result = assemble_sets(source, tmp_path / "out", patience=600, workers=0)
    assert result.counts == {"labelled": 3} and not full
    assert check_set(tmp_path / "out/labelled") == []


@pytest.mark.slow
def test_a_really_full_disk(tmp_path):
    """On a file system of 256 KB; needs the right to mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        _write_raw(tmp_path / "raw", [f"{n:02d}" for n in range(40)])
        source = UpstreamSource(str(tmp_path / "raw"))
        with pytest.raises(OSError, match="cannot write .*No space left on device"):
            assemble_sets(source, place / "out", patience=0)
        assert not list(place.rglob("meta.json"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
        assert assemble_sets(source, place / "out", patience=0).counts == {"labelled": 40}
        assert check_set(place / "out/labelled") == []
    finally:
        subprocess.run(["umount", str(place)], check=True)
