import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from rorem_lib.pictures import decode_image
from rorem_lib.triplets import (
    TripletError,
    TripletWriter,
    check_set,
    load_image,
    load_images,
    merge_sets,
    read_triplets,
    resolve_meta,
    save_image,
    split_by_group,
)


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


@pytest.mark.parametrize("text", [
    json.dumps([_record("a"), _record("b")]),
    json.dumps(_record("a")) + "\n" + json.dumps(_record("b")) + "\n\n",
    "\ufeff" + json.dumps([_record("a"), _record("b")]),
], ids=["list", "lines", "byte-order mark"])
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
    _write_meta(made, [{"gt": "source/a.png", "inpaint": "GT/a.png", "mask": "mask/a.png",
                        "text": {"label": {"name": "dog"}}}])
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


@pytest.mark.parametrize("record, words", [
    ({"source": "source/a.png"}, "record 1 has no mask and no GT"),
    (_record("a", GT=7), "a path must be a text, not 7"),
    (_record("a", source="source/gone.png"), "gone.png is missing .*record 1.*restore"),
    (_record("a", source="../set2/a.png"), "leaves the set's folder"),
    (_record("a", source="source/../../a.png"), "leaves the set's folder"),
    (_record("a", score="good"), "score 'good' is no number"),
    (["source/a.png"], "record 1 is no object"),
])
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
    save_image(truth / "a.png", _picture(9))
    (made / "innocent").symlink_to(truth)
    for path in ("hidden/pool/truth/a.png", "innocent/a.png", "mask/../hidden/pool/truth/a.png",
                 str(truth / "a.png")):
        _write_meta(made, [_record("a", GT=path)])
        with pytest.raises(TripletError, match="hidden"):
            read_triplets(made, allow_absolute=True, allow_outside=True)
    _write_meta(truth, [_record("a", source="a.png", mask="a.png", GT="a.png")])
    with pytest.raises(TripletError, match="hidden"):
        read_triplets(truth)
    writer = TripletWriter(made.parent / "new")
    with pytest.raises(TripletError, match="hidden"):
        writer.add(id="a", source=_picture(), mask=_mask(), gt=truth / "a.png")


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
    with pytest.raises(TripletError, match="take one of builtin:labelled"):
        resolve_meta("builtin:everything")


def test_a_damaged_meta_file_is_named(made):
    _write_meta(made, '[{"source": "a.png", \n "mask"')
    with pytest.raises(TripletError, match="meta.json is neither JSON nor JSON lines .line 2"):
        read_triplets(made)


# ------------------------------------------------------------------------------------- pictures


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
        for quality in (40, 92, 100) for sampling in ("4:4:4", "4:2:2", "4:2:0")
        for progressive in (False, True)]
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


def _truncate(path, share=0.6):
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * share)])


@pytest.mark.parametrize("damage, words", [
    (lambda f: _truncate(f / "source/a.png"), r"source/a\.png is truncated .*download it again"),
    (lambda f: (f / "GT/a.png").write_bytes(b""), r"GT/a\.png is empty \(0 bytes\)"),
    (lambda f: (f / "GT/a.png").write_bytes(b"no picture"), r"GT/a\.png is no picture"),
    (lambda f: (f / "mask/a.png").unlink(), r"mask/a\.png is missing"),
    (lambda f: save_image(f / "mask/a.png", _mask(30)), r"mask/a\.png is 30x30 px but .*24x24"),
    (lambda f: save_image(f / "GT/a.png", _picture(size=20)), r"GT/a\.png is 20x20 px"),
    (lambda f: save_image(f / "mask/a.png", _mask() * 0), r"mask/a\.png is an empty mask"),
    (lambda f: save_image(f / "mask/a.png", _mask() // 255), "multiply its values by 255"),
    (lambda f: save_image(f / "mask/a.png", _mask() * 0 + 255), r"mask/a\.png is white everywhere"),
], ids=["truncated", "0 bytes", "text", "missing", "mask size", "GT size", "empty mask",
        "mask of ones", "white mask"])
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


# -------------------------------------------------------------------------------------- writing


def test_writer_keeps_extras_and_sorts_by_id(tmp_path):
    with TripletWriter(tmp_path) as writer:
        for name in ("c", "a", "b"):
            writer.add(id=name, source=_picture(), mask=_mask(), gt=_picture(1), group="g",
                       score=np.float32(1), seed=np.int64(3), note=None)
    assert [t.id for t in read_triplets(tmp_path)] == ["a", "b", "c"]
    assert read_triplets(tmp_path)[0].extra == {"score": 1.0, "seed": 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["GT", "mask", "meta.json", "source"]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("item, words", [
    ({"id": "../a"}, "cannot name"), ({"id": ".a"}, "cannot name"), ({"id": ""}, "cannot name"),
    ({"id": "x" * 201}, "cannot name"), ({"mask": _mask(12)}, "sizes differ"),
    ({"mask": _mask() * 0}, "empty mask"), ({"GT": "x"}, "cannot be extra keys"),
    ({"source": "nowhere.png"}, "nowhere.png is missing"),
])
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
    save_image(triplet.source, _picture(8))  # the other set's picture is another file from now on
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
        from rorem_lib.triplets import TripletWriter
        mask = np.zeros((24, 24), np.uint8)
        mask[4:9] = 255
        with TripletWriter(sys.argv[1]) as writer:
            for n in itertools.count():
                writer.add(id=f"{n:05d}", source=np.full((24, 24, 3), n % 256, np.uint8), mask=mask)
                print(n, flush=True)
    """)
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE,
                               text=True)
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


def test_splits_never_cut_a_group(tmp_path):
    with TripletWriter(tmp_path) as writer:
        for n in range(60):
            writer.add(id=f"{n:02d}", source=_picture(), mask=_mask(), gt=_picture(),
                       group=f"g{n % 20}")
    triplets = read_triplets(tmp_path)
    first, rest = split_by_group(triplets, 0.3, 1)
    assert not {t.group for t in first} & {t.group for t in rest}
    assert sorted(t.id for t in first + rest) == [t.id for t in triplets]
    assert 15 <= len(first) <= 21
    assert split_by_group(triplets[::-1], 0.3, 1)[0] == first[::-1]
    assert split_by_group(triplets, 0.3, 2)[0] != first
    assert not split_by_group(triplets, 0)[0] and not split_by_group(triplets, 1)[1]
    for share in (1e-6, 1 - 1e-6):
        assert all(split_by_group(triplets, share, 1))
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_by_group(triplets, 30)
