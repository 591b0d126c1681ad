"""`rorem remove`: which files it takes, what it writes, and that it survives whatever comes."""

import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hub_server import HubServer
from huggingface_hub import HfApi
from PIL import Image, ImageCms

from rorem_lib.builtin.scenes import render_scene
from rorem_lib.discriminator import Discriminator
from rorem_lib.files import ROOT, lock_folder
from rorem_lib.models import advice, runtimes, sdxl
from rorem_lib.models.inpainting import MODES, Removal
from rorem_lib.models.sdxl import BASE_MODEL, load_pipeline
from rorem_lib.runner import cli, remove_command, remove_job, remove_model

SIZE = 32
HOLE = (slice(8, 16), slice(8, 20))
FILL = 7


class Remover:
    """Fills holes with one grey. `calls` has what it was asked; images of `broken` names fail."""

    def __init__(self, seconds=0.0, broken=()):
        self.calls, self.seconds, self.broken = [], seconds, broken
        self.networks, self.parameters = SimpleNamespace(device="cpu"), 10**9
        weights = SimpleNamespace(numel=lambda: self.parameters)
        self.pipe = SimpleNamespace(unet=SimpleNamespace(parameters=lambda: [weights]))

    def remove(self, images, masks, *, names, **settings):
        self.calls.append({"names": [Path(n).name for n in names], "masks": masks, **settings})
        time.sleep(self.seconds * len(images))
        for name in names:
            if Path(name).name in self.broken:
                raise FloatingPointError(f"not finite for {name}")
        filled = [
            np.where(m[..., None] > 0, FILL, i).astype(np.uint8) for i, m in zip(images, masks)
        ]
        return [Removal(image, mask, [], 0.0) for image, mask in zip(filled, masks)]

    @property
    def seen(self):
        return [name for call in self.calls for name in call["names"]]


@pytest.fixture
def remover(monkeypatch, tmp_path):
    """The remover that every command of a test opens; the working folder is the test's."""
    fake = Remover()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remove_job, "open_remover", lambda options, tell: fake)
    return fake


def _pixels(seed=0, size=(SIZE, SIZE)):
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)


def _save(path, seed=0, mode="RGB", size=(SIZE, SIZE), **options):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(_pixels(seed, size))
    image = image if mode == "RGB" else image.convert(mode)
    image.save(path, **options)
    return path


def _mask(path="mask.png", size=(SIZE, SIZE), hole=HOLE):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(size, np.uint8)
    if hole:
        mask[hole] = 255
    Image.fromarray(mask).save(path)
    return path


def _folder(count, folder="photos"):
    for number in range(count):
        _save(f"{folder}/{number:02d}.png", number)
        _mask(f"masks/{number:02d}.png")
    return folder


def _run(*words, model="builtin"):
    return cli.main(["remove", *map(str, words), "--model", model])


def _read(path):
    return np.asarray(Image.open(path))


def _list(folder):
    return sorted(p.name for p in Path(folder).iterdir() if not p.name.startswith("."))


def _journal(folder):
    return [json.loads(x) for x in Path(folder, ".rorem/removals.jsonl").read_text().splitlines()]


def _check_removed(result, source, hole=HOLE):
    """Whether a result is filled in the hole, and as its source elsewhere."""
    result, expected = _read(result)[..., :3], np.array(source)
    expected[hole] = FILL
    np.testing.assert_array_equal(result, expected)


# ------------------------------------------------------------------------------------ one image


def test_one_image_is_written_beside_it(remover, capsys):
    _save("photo.png")
    assert _run("photo.png", "--mask", _mask()) == 0
    _check_removed("photo_removed.png", _pixels())
    assert "photo_removed.png" in capsys.readouterr().out


def test_boxes_join_and_may_leave_the_image(remover):
    _save("photo.png")
    assert _run("photo.png", "--box", "-5,-5.5,4,3.6", "--box", "30,30,99,99", "-o", "o.png") == 0
    (mask,) = remover.calls[0]["masks"]
    expected = np.zeros((SIZE, SIZE), bool)
    expected[:4, :4] = expected[30:, 30:] = True
    np.testing.assert_array_equal(mask > 0, expected)


def test_a_box_outside_the_image_names_both(remover, capsys):
    _save("photo.png")
    assert _run("photo.png", "--box", "50,50,60,60") == 1
    error = capsys.readouterr().err
    assert "photo.png" in error and "50" in error and f"{SIZE}x{SIZE}" in error
    assert not remover.calls


@pytest.mark.parametrize("box", ["1,2,3", "a,b,c,d", "9,9,3,20", "1,1,nan,4", ""])
def test_a_box_that_is_none_is_a_wrong_option(remover, box, capsys):
    with pytest.raises(SystemExit) as stop:
        _run("photo.png", "--box", box)
    assert stop.value.code == 2
    assert "--box" in capsys.readouterr().err


@pytest.mark.parametrize("strength", ["0", "0.0", "1.1", "nan", "-1"])
def test_a_strength_that_removes_nothing_is_a_wrong_option(remover, strength, capsys):
    with pytest.raises(SystemExit) as stop:
        _run("photo.png", "--box", "1,1,9,9", "--strength", strength)
    assert stop.value.code == 2
    assert "--strength" in capsys.readouterr().err


def test_mask_and_box_exclude_each_other_and_one_is_needed(remover):
    for words in (["--mask", "m.png", "--box", "1,1,5,5"], []):
        with pytest.raises(SystemExit) as stop:
            _run("photo.png", *words)
        assert stop.value.code == 2


def test_settings_that_are_not_given_are_left_to_the_model(remover):
    _save("photo.png")
    _run("photo.png", "--box", "1,1,9,9")
    assert set(remover.calls[0]) == {"names", "masks", "numbers", "seed", "candidates"}


def test_settings_reach_the_remover(remover):
    _save("photo.png")
    words = "--mode exact --no-crop --resolution 64 --steps 4 --guidance 2 --strength 0.5"
    _run("photo.png", "--box", "1,1,9,9", *words.split(), "--dilate", 3, "--seed", 5)
    expected = {"mode": "exact", "crop": False, "resolution": 64, "num_inference_steps": 4}
    expected |= {"guidance_scale": 2.0, "strength": 0.5, "dilate": 3, "seed": 5}
    assert expected.items() <= remover.calls[0].items()


def test_modes_are_those_of_the_remover():
    assert remove_command.MODES == MODES


def test_a_discriminator_that_is_not_there_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _save("photo.png")
    words = ("--candidates", 4, "--discriminator", "owner/judge")
    assert _run("photo.png", "--box", "1,1,9,9", *words) == 2
    assert "the discriminator owner/judge" in capsys.readouterr().err


def test_candidates_need_a_discriminator(remover, capsys):
    _save("photo.png")
    assert _run("photo.png", "--box", "1,1,9,9", "--candidates", 4) == 2
    assert "--discriminator" in capsys.readouterr().err
    assert _run("photo.png", "--box", "1,1,9,9", "--discriminator", "judge") == 2
    assert "--candidates" in capsys.readouterr().err


@pytest.mark.slow
def test_the_discriminator_chooses_among_candidates(monkeypatch, tmp_path, tiny_model, capsys):
    monkeypatch.chdir(tmp_path)
    _save("photo.png", size=(64, 64))
    words = ("photo.png", "--box", "8,8,40,40", "--steps", 2, "--resolution", 64, "--candidates", 3)
    assert _run(*words, "--discriminator", "judge", model=str(tiny_model)) == 2
    origin = {"base_model": str(tiny_model), "revision": "", "resolution": 32}
    pipe, how = load_pipeline(str(tiny_model)), {"rank": 2, "lora_targets": ["to_q"]}
    judge = Discriminator(pipe, **how, head_channels=8, origin=origin)
    judge.save_pretrained(tmp_path / "judge")
    capsys.readouterr()
    assert _run(*words, "--discriminator", "judge", model=str(tiny_model)) == 0, (
        capsys.readouterr().err
    )
    assert _run(*words[:-2], "-o", "first.png", model=str(tiny_model)) == 0


def test_an_inverted_mask(remover):
    _save("photo.png")
    _run("photo.png", "--mask", _mask(), "--invert-mask")
    assert not remover.calls[0]["masks"][0][HOLE].any()
    assert remover.calls[0]["masks"][0].mean() > 128


def test_an_empty_mask_copies_the_image_with_a_warning(remover, capsys):
    source = _save("photo.png")
    assert _run(source, "--mask", _mask(hole=None), "-o", "same.png") == 0
    assert Path("same.png").read_bytes() == source.read_bytes()
    assert _run(source, "--mask", "mask.png", "-o", "same.webp") == 0
    assert Image.open("same.webp").size == (SIZE, SIZE)
    assert not remover.calls
    assert "photo.png" in (error := capsys.readouterr().err) and "empty" in error


def test_before_and_after_side_by_side(remover):
    _save("photo.png", size=(SIZE, SIZE - 8))
    _run("photo.png", "--box", "1,1,9,9", "-o", "out.png", "--side-by-side")
    assert Image.open("out_side_by_side.png").size[0] > 2 * (SIZE - 8)
    assert Image.open("out_side_by_side.png").size[1] == SIZE
    calls = len(remover.calls)
    assert _run("photo.png", "--box", "1,1,9,9", "-o", "out.png", "--side-by-side") == 0
    assert len(remover.calls) == calls


# ---------------------------------------------------------------------------- kinds of images


def test_colour_profile_exif_and_transparency_are_kept(remover):
    exif = Image.Exif()
    exif[0x010F] = "Camera"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    alpha = np.full((SIZE, SIZE), 255, np.uint8)
    alpha[:4] = 30
    image = Image.fromarray(np.dstack([_pixels(), alpha]))
    image.save("photo.png", exif=exif, icc_profile=profile)
    for name in ("out.png", "out.webp"):
        assert _run("photo.png", "--box", "8,8,20,16", "-o", name) == 0
        found = Image.open(name)
        assert found.getexif()[0x010F] == "Camera"
        assert found.info["icc_profile"] == profile
        np.testing.assert_array_equal(np.asarray(found)[..., 3], alpha)
    _check_removed("out.png", _pixels())


def test_jpeg_refuses_transparency_and_keeps_the_rest(remover, capsys):
    _save("clear.png", mode="RGB")
    image = Image.open("clear.png")
    image.putalpha(100)
    image.save("clear.png")
    assert _run("clear.png", "--box", "8,8,20,16", "-o", "out.jpg") == 1
    assert "clear.png" in (error := capsys.readouterr().err) and "JPEG" in error
    exif = Image.Exif()
    exif[0x010F] = "Camera"
    smooth = np.full((64, 64, 3), 90, np.uint8)
    Image.fromarray(smooth).save("photo.jpg", exif=exif, quality=98)
    assert _run("photo.jpg", "--box", "8,8,20,16", "-o", "out.JPG") == 0
    found = Image.open("out.JPG")
    assert (found.format, found.getexif()[0x010F]) == ("JPEG", "Camera")
    assert abs(np.asarray(found).astype(int)[40:] - 90).max() <= 2


def test_a_turned_photo_is_upright_and_boxes_count_so(remover):
    exif = Image.Exif()
    exif[0x0112] = 6
    _save("photo.jpg", size=(32, 48), exif=exif)
    assert _run("photo.jpg", "--box", "0,0,8,40") == 0
    found = Image.open("photo_removed.png")
    assert found.size == (32, 48)
    assert found.getexif().get(0x0112, 1) == 1
    assert (np.asarray(found)[:40, :8] == FILL).all()


@pytest.mark.parametrize(
    ("mode", "suffix", "kind"),
    [("L", ".png", "L"), ("P", ".gif", "RGB"), ("CMYK", ".jpg", "RGB"), ("LA", ".png", "LA")]
    + [("1", ".png", "L"), ("RGB", ".TIF", "RGB"), ("RGB", ".bmp", "RGB")],
)
def test_images_of_all_kinds(remover, mode, suffix, kind):
    path = _save(f"photo{suffix}", mode=mode)
    if mode == "LA":
        image = Image.open(path)
        image.putpixel((0, 0), (9, 100))
        image.save(path)
    assert _run(path, "--box", "8,8,20,16", "-o", "out.png") == 0
    found = Image.open("out.png")
    assert (found.mode, found.size) == (kind, (SIZE, SIZE))
    source = np.asarray(Image.open(path).convert(kind))
    keep = np.ones((SIZE, SIZE), bool)
    keep[HOLE] = False
    np.testing.assert_array_equal(np.asarray(found)[keep], source[keep])
    if kind != "LA":
        assert (np.asarray(found)[HOLE] == FILL).all()


def test_a_16_bit_image(remover):
    values = np.random.default_rng(1).integers(0, 65535, (SIZE, SIZE)).astype(np.uint16)
    Image.fromarray(values).save("photo.png")
    assert _run("photo.png", "--box", "8,8,20,16", "-o", "out.png") == 0
    found = _read("out.png")
    np.testing.assert_array_equal(found[20:], values[20:])  # all bits, where nothing is removed
    assert (found[HOLE] == FILL * 257).all()
    assert _run("photo.png", "--box", "8,8,20,16", "-o", "out.jpg") == 0
    assert abs(_read("out.jpg")[20:] - values[20:] / 257).mean() < 6


@pytest.mark.parametrize("name", ["film.gif", "film.webp", "film.png", "pages.tif"])
def test_several_frames_or_pages_are_refused_by_name(remover, name, capsys):
    frames = [Image.fromarray(_pixels(n)) for n in range(3)]
    frames[0].save(name, save_all=True, append_images=frames[1:])
    assert _run(name, "--box", "8,8,20,16", "-o", "out/") == 1
    assert name in (error := capsys.readouterr().err) and "3 frames or pages" in error
    assert _list("out") == []


def test_previews_beside_a_photo_are_no_pages(remover):
    thumbnail = Image.fromarray(_pixels(1, (8, 8)))
    thumbnail.encoderinfo = {"tiffinfo": {254: 1}}
    Image.fromarray(_pixels()).save("photo.tif", save_all=True, append_images=[thumbnail])
    Image.fromarray(_pixels()).save("photo.mpo", save_all=True, append_images=[thumbnail])
    for name in ("photo.tif", "photo.mpo"):
        with Image.open(name) as image:
            assert image.n_frames == 2
        assert _run(name, "--box", "8,8,20,16", "-o", f"{name}.png") == 0
    _check_removed("photo.tif.png", _pixels())


# ------------------------------------------------------------------------------ many images


def test_a_folder_with_masks_by_name(remover, capsys):
    _folder(3)
    _mask("masks/extra.png")
    Path("masks/notes.txt").write_text("x")
    Path("photos/notes.txt").write_text("x")
    Path("photos/inner").mkdir()
    assert _run("photos", "--mask", "masks", "-o", "clean") == 0
    assert _list("clean") == ["00.png", "01.png", "02.png"]
    for number in range(3):
        _check_removed(f"clean/{number:02d}.png", _pixels(number))
    assert "3 made" in capsys.readouterr().out


def test_names_with_spaces_umlauts_and_uppercase_suffixes(remover):
    composed, apart = (unicodedata.normalize(form, "Grüße an Zoë") for form in ("NFC", "NFD"))
    assert composed != apart
    _save(f"photos/{composed}.JPG")
    _mask(f"masks/{apart}.PNG")
    _save("photos/Second.WEBP", lossless=True)
    _mask("masks/second_mask.png")
    odd = os.fsdecode(b"odd\xff")  # no UTF-8
    _save(f"photos/{odd}.png")
    _mask(f"masks/{odd}.png")
    for made in (3, 0):
        assert _run("photos", "--mask", "masks", "-o", "my results") == 0
        assert _list("my results") == sorted([f"{composed}.png", "Second.png", f"{odd}.png"])
        assert len(remover.seen) == 3, made


def test_equal_stems_have_results_and_masks_of_their_own(remover):
    for number, suffix in enumerate((".jpg", ".png", ".jpg.png")):
        _save(f"photos/photo{suffix}", number)
    _mask("masks/photo.jpg.png")
    _mask("masks/photo.png", hole=(slice(0, 2), slice(0, 2)))
    _mask("masks/photo.jpg.png_mask.png")
    assert _run("photos", "--mask", "masks", "-o", "out") == 0
    assert _list("out") == ["photo.jpg.png", "photo.jpg.png.png", "photo.png.png"]
    _check_removed("out/photo.png.png", _pixels(1), hole=(slice(0, 2), slice(0, 2)))
    _check_removed("out/photo.jpg.png.png", _pixels(2))


def test_equal_names_of_two_folders_are_refused(remover, capsys):
    for folder in ("a", "b"):
        _save(f"{folder}/photo.png")
    _save("a/other.png")
    assert _run("a", "b", "--box", "1,1,9,9", "-o", "out") == 1
    assert _list("out") == ["other.png"]
    error = capsys.readouterr().err
    assert "2 of 3" in error and "a/photo.png" in error and "b/photo.png" in error


def test_masks_beside_their_images(remover):
    _save("photos/one.jpg")
    _mask("photos/one_mask.png")
    _save("photos/two.jpg")
    _mask("photos/two-mask.png")
    assert _run("photos", "--mask", "photos", "-o", "photos/clean") == 0
    assert _list("photos/clean") == ["one.png", "two.png"]


def test_two_masks_for_an_image_are_refused(remover, capsys):
    _save("photos/one.jpg")
    _mask("masks/one.png")
    _mask("masks/one.bmp")
    assert _run("photos", "--mask", "masks", "-o", "out") == 1
    error = capsys.readouterr().err
    assert "masks/one.png" in error and "masks/one.bmp" in error


def test_patterns_and_an_image_that_is_named_twice(remover):
    _folder(3)
    _save("photos/deep/er/03.png")
    words = ("photos/**/*.png", "photos/01.png", "./photos/../photos/02.png")
    assert _run(*words, "--box", "8,8,20,16", "-o", "out") == 0
    assert _list("out") == ["00.png", "01.png", "02.png", "03.png"]
    assert len(remover.seen) == 4


@pytest.mark.parametrize(
    "words",
    [
        ("nothing*.png", "--box", "1,1,9,9"),
        ("empty", "--box", "1,1,9,9"),
        ("photos", "--mask", "nowhere"),
        ("photos", "--box", "1,1,9,9", "-o", "out.png"),
        ("photos/00.png", "--box", "1,1,9,9", "-o", "out.tif"),
        ("photos/00.png", "--box", "1,1,9,9", "-o", "out.xyz"),
        ("photos", "--box", "1,1,9,9", "-o", "results.v2"),
        ("photos/00.png", "--box", "1,1,9,9", "-o", "out.png", "--format", "jpg"),
    ],
)
def test_wrong_words_are_named_before_anything_is_opened(remover, words, capsys):
    _folder(2)
    Path("empty").mkdir()
    assert _run(*words) == 2
    wrong = words[0] if words[0] != "photos" and len(words) == 3 else words[-1]
    assert wrong in capsys.readouterr().err or "--format" in words
    assert not remover.calls and _list(".") == ["empty", "masks", "photos"]


def test_an_unknown_suffix_names_those_that_are_known(remover, capsys):
    _save("photo.png")
    words = ("photo.png", "--box", "8,8,20,16", "-o")
    assert _run(*words, "out.xyz") == 2
    error = capsys.readouterr().err
    assert all(suffix in error for suffix in (".png", ".jpg", ".webp", "out.xyz/"))
    assert _run(*words, "out.xyz/") == 0
    assert _run(*words, "out.xyz") == 0  # a folder that is there
    assert _run(*words, "plain/deep") == 0
    assert _list("out.xyz") == _list("plain/deep") == ["photo.png"]


def test_one_mask_for_all_fits_where_the_shape_agrees(remover, capsys):
    _save("photos/a.png")
    _save("photos/b.png", size=(2 * SIZE, 2 * SIZE))
    _save("photos/c.png", size=(SIZE, 2 * SIZE))
    assert _run("photos", "--mask", _mask(), "-o", "out", "--format", "webp") == 1
    assert _list("out") == ["a.webp", "b.webp"]
    error = capsys.readouterr().err
    assert "64x32" in error and "32x32" in error and "photos/c.png" in error


def test_bad_files_are_named_and_the_rest_is_done(remover, capsys):
    _folder(8)
    remover.broken = ("05.png",)
    Path("photos/00.png").write_bytes(Path("photos/00.png").read_bytes()[:600])
    Path("photos/01.png").write_text("this is no image")
    Path("photos/02.png").write_bytes(b"")
    Path("masks/03.png").unlink()
    _mask("masks/04.png", size=(20, 60))
    Path("photos/link.png").symlink_to("nowhere.png")
    _mask("masks/link.png")
    assert _run("photos", "--mask", "masks", "-o", "out") == 1
    assert _list("out") == ["06.png", "07.png"]
    error = capsys.readouterr().err
    assert "7 of 9" in error
    lines = [x for x in error.splitlines() if x.startswith("  ")]
    for name, line in zip((*(f"0{n}.png" for n in range(6)), "link.png"), lines, strict=True):
        assert name in line


# --------------------------------------------------------- what is done, and what is not touched


def test_what_is_done_is_not_made_again(remover, capsys):
    _folder(4)
    for _ in range(2):
        assert _run("photos", "--mask", "masks", "-o", "out") == 0
    assert sorted(remover.seen) == ["00.png", "01.png", "02.png", "03.png"]
    assert "0 made, 4 done before" in capsys.readouterr().out
    _save("photos/01.png", seed=99)  # another image
    _mask("masks/02.png", hole=(slice(1, 3), slice(1, 3)))
    Path("out/03.png").unlink()
    assert _run("photos", "--mask", "masks", "-o", "out") == 0
    assert remover.seen[4:] == ["01.png", "02.png", "03.png"]
    _check_removed("out/01.png", _pixels(99))
    assert _run("photos", "--mask", "masks", "-o", "out", "--seed", 1) == 0
    assert len(remover.seen) == 11  # other settings replace what this command wrote


def test_a_moved_or_copied_folder_of_results_is_known(remover):
    _folder(2)
    _run("photos", "--mask", "masks", "-o", "out")
    for path in Path("out").glob("*.png"):
        os.utime(path, (1, 1))
    Path("out").rename("moved")
    assert _run("photos", "--mask", "masks", "-o", "moved") == 0
    assert len(remover.seen) == 2


def test_other_files_are_not_written_over_without_a_word(remover, capsys):
    _folder(3)
    Path("out").mkdir()
    Path("out/00.png").write_text("mine")
    Path("elsewhere.png").write_text("also mine")
    Path("out/01.png").symlink_to("../elsewhere.png")
    assert _run("photos", "--mask", "masks", "-o", "out") == 1
    assert remover.seen == ["02.png"]
    assert Path("out/00.png").read_text() == "mine"
    assert "--overwrite" in capsys.readouterr().err
    assert _run("photos", "--mask", "masks", "-o", "out", "--overwrite") == 0
    _check_removed("out/00.png", _pixels(0))
    _check_removed("out/01.png", _pixels(1))
    assert Path("elsewhere.png").read_text() == "also mine"  # the link was replaced, not followed
    assert not Path("out/01.png").is_symlink()


def test_a_result_that_was_changed_since_is_not_ours(remover):
    _folder(2)
    _run("photos", "--mask", "masks", "-o", "out")
    Path("out/00.png").write_text("retouched")
    assert _run("photos", "--mask", "masks", "-o", "out", "--seed", 1) == 1
    assert Path("out/00.png").read_text() == "retouched"


def test_a_result_of_another_image_is_not_replaced(remover, capsys):
    _save("a/photo.png", 1)
    _save("b/photo.png", 2)
    assert _run("a/photo.png", "--box", "8,8,20,16", "-o", "out/") == 0
    assert _run("b/photo.png", "--box", "8,8,20,16", "-o", "out/") == 1
    _check_removed("out/photo.png", _pixels(1))


def test_images_and_masks_are_never_written_over(remover, capsys):
    _folder(2)
    before = {p: p.read_bytes() for p in (*Path("photos").iterdir(), *Path("masks").iterdir())}
    for place in ("photos", "masks"):
        assert _run("photos", "--mask", "masks", "-o", place, "--overwrite") == 1
    assert {p: p.read_bytes() for p in before} == before
    assert "photos/00.png" in capsys.readouterr().err


def test_a_folder_that_holds_its_own_results(remover):
    _folder(2, folder="photos")
    for name in ("00", "01"):
        Image.open(f"photos/{name}.png").save(f"photos/{name}.bmp")
        Path(f"photos/{name}.png").unlink()
    for _ in range(2):
        assert _run("photos", "--mask", "masks", "-o", "photos") == 0
    assert _list("photos") == ["00.bmp", "00.png", "01.bmp", "01.png"]
    assert len(remover.seen) == 2


def test_names_cannot_leave_the_folder_of_results(remover):
    _save("photos/...png", format="PNG")
    _save("photos/.. .png")
    _save("photos/-o.png")
    assert _run("photos/...png", "photos/.. .png", "photos", "--box", "1,1,9,9", "-o", "d/out") == 0
    found = sorted(p.name for p in Path("d/out").iterdir())
    assert found == ["-o.png", ".. .png", "...png", ".rorem"]
    assert _list("d") == ["out"] and _list(".") == ["d", "photos"]


def test_links_in_the_place_of_the_journal_are_refused(remover, capsys):
    _save("photo.png")
    Path("secret").mkdir()
    Path("out").mkdir()
    Path("out/.rorem").symlink_to("../secret")
    assert _run("photo.png", "--box", "1,1,9,9", "-o", "out") == 1
    assert "link" in capsys.readouterr().err
    assert not _list("secret") and not list(Path("secret").iterdir())


def test_two_runs_into_one_folder_are_refused(remover, capsys):
    _folder(2)
    context = multiprocessing.get_context("fork")
    ready, go = context.Event(), context.Event()

    def hold():
        with lock_folder("out/.rorem"):
            ready.set()
            go.wait(30)

    process = context.Process(target=hold)
    process.start()
    assert ready.wait(30)
    try:
        assert _run("photos", "--mask", "masks", "-o", "out") == 2
        assert str(process.pid) in capsys.readouterr().err
    finally:
        go.set()
        process.join()
    assert _run("photos", "--mask", "masks", "-o", "out") == 0


# --------------------------------------------------------------------------- stops and full disks


def test_killed_half_way_it_goes_on_and_makes_nothing_twice(remover):
    """The same at full size: tests/benchmarks/bench_remove_folder.py."""
    _folder(20)
    Path("photos/03.png").write_text("this is no image")
    remover.seconds = 0.05
    words = ("photos", "--mask", "masks", "-o", "out", "--batch-size", 2)
    process = multiprocessing.get_context("fork").Process(target=_run, args=words)
    process.start()
    end = time.monotonic() + 60
    while not Path("out").is_dir() or len(_list("out")) < 6:
        assert time.monotonic() < end
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = {name: Path("out", name).stat().st_mtime_ns for name in _list("out")}
    assert 6 <= len(before) < 19
    remover.seconds = 0
    assert _run(*words) == 1
    assert len(_list("out")) == 19
    assert {name: Path("out", name).stat().st_mtime_ns for name in before} == before
    assert not set(remover.seen) & set(before)
    assert len(remover.seen) == 19 - len(before)
    assert not Path("out/.rorem/unfinished").exists()
    for number in set(range(20)) - {3}:
        _check_removed(f"out/{number:02d}.png", _pixels(number))


@pytest.mark.parametrize("place", ["replace", "fsync"])
def test_a_kill_between_any_two_steps_of_writing(remover, monkeypatch, place):
    _folder(2)
    own, calls = getattr(os, place), []

    def die(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise SystemExit("killed")
        return own(*arguments)

    monkeypatch.setattr(os, place, die)
    with pytest.raises(SystemExit):
        _run("photos", "--mask", "masks", "-o", "out")
    monkeypatch.setattr(os, place, own)
    assert _run("photos", "--mask", "masks", "-o", "out") == 0
    assert _list("out") == ["00.png", "01.png"]
    assert _run("photos", "--mask", "masks", "-o", "out") == 0


def test_a_full_disk_stops_it_and_it_goes_on(remover, monkeypatch, capsys):
    _folder(4)
    own, calls = os.fsync, []

    def fill(number):
        calls.append(number)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        own(number)

    monkeypatch.setattr(os, "fsync", fill)
    words = ("photos", "--mask", "masks", "-o", "out", "--batch-size", 1)
    assert _run(*words) == 1
    assert "disk is full" in (error := capsys.readouterr().err) and "out/" in error
    done = _list("out")
    assert 1 <= len(done) < 4
    monkeypatch.setattr(os, "fsync", own)
    assert _run(*words) == 0
    assert len(_list("out")) == 4
    assert len(_journal("out")) >= 4


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user")
def test_a_folder_that_cannot_be_written(remover, tmp_path):
    _save("photo.png")
    Path("out").mkdir(mode=0o755)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(writer, 2)
            sys.stderr = os.fdopen(2, "w")
            for path in (tmp_path, *tmp_path.parents):
                if path.is_relative_to("/tmp/") and path != Path("/tmp"):  # which is everybody's
                    path.chmod(0o755)
            os.setgid(54321)
            os.setuid(54321)
            os._exit(_run("photo.png", "--box", "1,1,9,9", "-o", "out"))
        finally:
            os._exit(9)
    os.close(writer)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    with os.fdopen(reader) as stream:
        assert "cannot write into out" in stream.read()


def test_an_interruption_keeps_what_is_done(remover, monkeypatch, capsys):
    _folder(6)
    own = remover.remove

    def remove(images, masks, **settings):
        if len(remover.calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return own(images, masks, **settings)

    monkeypatch.setattr(remover, "remove", remove)
    words = ("photos", "--mask", "masks", "-o", "out", "--batch-size", 2)
    assert _run(*words) == 130
    assert "interrupted" in capsys.readouterr().err
    monkeypatch.setattr(remover, "remove", own)
    assert _run(*words) == 0
    assert sorted(remover.seen) == [f"{n:02d}.png" for n in range(6)]


def test_one_image_that_fails_in_a_group_is_told_from_the_rest(remover, capsys):
    _folder(5)
    remover.broken = ("02.png",)
    assert _run("photos", "--mask", "masks", "-o", "out") == 1
    assert len(_list("out")) == 4
    assert "not finite" in capsys.readouterr().err


def test_too_little_memory_for_a_group_works_one_by_one(remover, monkeypatch):
    import torch

    _folder(5)
    own = remover.remove

    def remove(images, masks, **settings):
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(images, masks, **settings)

    monkeypatch.setattr(remover, "remove", remove)
    assert _run("photos", "--mask", "masks", "-o", "out") == 0
    assert [call["batch_size"] for call in remover.calls] == [1] * 5


@pytest.mark.parametrize("device, mend", [("cpu", "bf16"), ("cuda", "--offload")])
def test_too_little_memory_names_the_device(remover, monkeypatch, device, mend, capsys):
    def remove(images, masks, **settings):
        raise MemoryError

    monkeypatch.setattr(remover, "remove", remove)
    remover.networks.device = device
    _save("photo.png")
    assert _run("photo.png", "--box", "1,1,9,9") == 1
    error = capsys.readouterr().err
    assert f"the memory of {device} is too small" in error and mend in error


def test_few_images_are_in_memory_at_a_time(remover, monkeypatch):
    monkeypatch.setattr(remove_job, "GROUP_PIXELS", 3 * SIZE**2)
    _folder(14)
    assert _run("photos", "--mask", "masks", "-o", "out") == 0
    assert max(len(call["names"]) for call in remover.calls) == 3
    assert len(_list("out")) == 14


def test_progress_in_a_log_has_the_time_that_is_left(remover, monkeypatch, capsys):
    monkeypatch.setattr(remove_job, "LOG_SECONDS", 0)
    _folder(3)
    _run("photos", "--mask", "masks", "-o", "out", "--batch-size", 1)
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("2 of 3")]
    assert len(lines) == 1 and re.search(r"\ds/image, [\d:]+ left", lines[0])


# ---------------------------------------------------------------------------------- the model


def test_the_miniature_removes(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    scene = render_scene([7, 1], role="rord", size=64)
    Image.fromarray(scene.image).save("scene.png")
    Image.fromarray(scene.mask).save("mask.png")
    words = ("scene.png", "--mask", "mask.png", "--steps", 2)
    assert _run(*words) == 0
    alone = _read("scene_removed.png")
    assert "rendered scenes" in capsys.readouterr().err
    inside = scene.mask > 0
    assert (alone[inside] != scene.image[inside]).any()
    Image.fromarray(np.roll(scene.image, 9, axis=0)).save("another.png")
    assert _run("another.png", *words, "-o", "both") == 0
    # The miniature's arithmetic in a batch of two may round differently.
    difference = abs(_read("both/scene.png").astype(int) - alone)
    assert difference.max() <= 1


def test_without_a_network_it_says_how_to_get_a_model(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    _save("photo.png")
    assert cli.main(["remove", "photo.png", "--box", "1,1,9,9"]) == 2
    error = capsys.readouterr().err
    for word in ("LetsThink/RORem", "GB", "Apache-2.0", "hf download", "--model builtin"):
        assert word in error, word
    assert not Path("photo_removed.png").exists()
    assert _run("photo.png", "--box", "1,1,9,9", model="./nowhere") == 2
    error = capsys.readouterr().err
    assert "nowhere" in error and "hf download" not in error


def test_a_network_that_is_down_is_told_at_once(monkeypatch, tmp_path, capsys):
    """Not after half a minute, in which the client tries again and again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(remove_model, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    _save("photo.png")
    began = time.monotonic()
    assert cli.main(["remove", "photo.png", "--box", "1,1,9,9"]) == 2
    assert time.monotonic() - began < 10
    error = capsys.readouterr().err
    assert "hf download" in error and "Traceback" not in error
    assert _run("photo.png", "--box", "1,1,9,9", model="mine/remover") == 2
    assert "mine/remover" in (error := capsys.readouterr().err) and "network" in error


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named(monkeypatch, tmp_path, capsys, device):
    monkeypatch.chdir(tmp_path)
    _save("photo.png")
    assert _run("photo.png", "--box", "1,1,9,9", "--device", device) == 2
    assert device in capsys.readouterr().err


def test_a_model_that_is_in_the_cache_is_not_said_to_be_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remove_model, "measure_download", lambda *_: None)
    Path("lora").mkdir()
    _save("photo.png")

    def fail(kind, text, *words, cached):
        def open_model(*_, **__):
            raise kind(text)

        identify = {"absent": None, "there": "model@1"}[cached]
        monkeypatch.setattr(sdxl, "load_pipeline", open_model)
        monkeypatch.setattr(advice, "_is_cached", lambda *_: identify is not None)
        monkeypatch.setattr(
            remove_model,
            "identify_model",
            lambda model, revision=None: None if "lora" in model else identify,
        )
        assert cli.main(["remove", "photo.png", "--box", "1,1,9,9", *words]) == 2
        return capsys.readouterr().err

    words = ("--lora", "./lora", "--model", "builtin")
    error = fail(AssertionError, "it is opened", *words, cached="there")
    assert "./lora holds no LoRA" in error and "hf download" not in error
    error = fail(FileNotFoundError, "no weights", cached="absent")
    assert error.count("could not be downloaded") == 1
    error = fail(FileNotFoundError, "no weights", cached="there")
    assert "could not be downloaded" not in error
    error = fail(FileNotFoundError, "not in the cache", "--lora", "owner/lora", cached="there")
    assert "owner/lora" in error and "hf download" not in error
    error = fail(FileNotFoundError, f"{BASE_MODEL} is not in the cache", cached="there")
    assert f"hf download {BASE_MODEL}" in error and "hf download LetsThink" not in error


@pytest.mark.parametrize("installed", [True, False])
def test_another_runtime_wants_an_exported_folder(monkeypatch, tmp_path, installed, capsys):
    monkeypatch.chdir(tmp_path)
    _save("photo.png")
    if installed:
        monkeypatch.setattr(runtimes, "require_packages", lambda *_: None)
    else:
        monkeypatch.setitem(runtimes.RUNTIMES, "onnx", "no-package-of-this-name")
    words = ("remove", "photo.png", "--box", "1,1,9,9", "--runtime", "onnx")
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and "hf download" not in error
    assert ("rorem export" if installed else "requirements/export.txt") in error


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--device", "cuda"], "--device"),
        (["--offload"], "--offload"),
        (["--revision", "main"], "--revision"),
        (["--lora", "o/lora"], "--lora"),
        (["--dtype", "bf16"], "--dtype"),
    ],
)
def test_what_another_runtime_cannot_honour_is_refused(remover, words, named, capsys):
    _save("photo.png")
    words = ("photo.png", "--box", "1,1,9,9", *words)
    assert _run(*words, "--runtime", "onnx") == 2
    error = capsys.readouterr().err
    assert "--runtime onnx" in error and named in error
    assert not remover.calls and _list(".") == ["photo.png"]
    assert _run(*words[:3], "--runtime", "onnx", "--device", "cpu") == 0


def test_a_unet_here_downloads_the_base_model_alone(monkeypatch, tmp_path):
    asked = []

    class Api:
        def model_info(self, repo, **_):
            asked.append(repo)
            names = ("vae/diffusion_pytorch_model.safetensors", "unet/other.safetensors")
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n, size=7) for n in names])

    monkeypatch.setattr(remove_model, "HfApi", Api)
    (tmp_path / "config.json").write_text("{}")
    assert remove_model.measure_download(str(tmp_path)) == 7 and asked == [BASE_MODEL]
    (tmp_path / "model_index.json").write_text("{}")
    assert remove_model.measure_download(str(tmp_path)) is None and asked == [BASE_MODEL]


def test_what_is_not_in_the_cache_yet_has_the_same_key_later(remover, monkeypatch):
    cached = set()

    def open_remover(options, tell):
        cached.update((options.lora, options.discriminator))
        return remover

    def identify(model, revision=None):
        return f"{model}@1" if model == "builtin" or model in cached else None

    monkeypatch.setattr(remove_job, "open_remover", open_remover)
    monkeypatch.setattr(remove_model, "identify_model", identify)
    _save("photo.png")
    words = ("photo.png", "--box", "1,1,9,9", "--lora", "o/lora", "--discriminator", "o/judge")
    for _ in range(2):
        assert _run(*words, "--candidates", 3) == 0
        assert len(remover.seen) == 1


def test_reading_a_large_model_is_told_and_a_miniature_says_what_it_is(
    remover, monkeypatch, tiny_model, capsys
):
    monkeypatch.setattr(remove_model, "LARGE", 1000)
    remover.parameters = 4_000_000
    _save("photo.png")
    assert _run("photo.png", "--box", "1,1,9,9", model=str(tiny_model)) == 0
    told = capsys.readouterr().err
    assert told.index(f"{tiny_model} is read") < told.index("opened in")
    assert told.count("miniature of 4 million") == 1 and "photographs" in told


@pytest.mark.slow
def test_the_authors_model_is_fetched_once_after_its_size_is_told(tiny_model, tmp_path):
    """As it lies on the Hub: a UNet alone, and what else there is in SDXL-inpainting."""
    files = {
        path.relative_to(tiny_model).as_posix(): path.read_bytes()
        for path in tiny_model.rglob("*")
        if path.is_file()
    }
    unet = {name: data for name, data in files.items() if name.startswith("unet/")}
    _save(tmp_path / "photo.png", size=(64, 64))
    code = f"""
        from rorem_lib.runner import cli, remove_model
        show(remove_model.measure_download("LetsThink/RORem"))
        words = "remove photo.png --box 8,8,30,30 --steps 2 --resolution 64 --seed"
        os.chdir({str(tmp_path)!r})
        show([cli.main([*words.split(), str(seed)]) for seed in (0, 1, 1)])
    """
    with HubServer().run() as hub:
        hub.add("LetsThink/RORem", unet | {"README.md": b"x"})
        hub.add(BASE_MODEL, files | {"unet/other.safetensors": bytes(9_000_000)})
        size = sum(len(data) for name, data in files.items() if name.endswith(".safetensors"))
        assert hub.run_client(tmp_path, code) == [size, [0, 0, 0]]
        assert hub.errors.count(f"LetsThink/RORem is downloaded, {size / 1e9:.1f} GB") == 1
        assert not hub.select("GET", "unet/other.safetensors")
        requests = len(hub.log)
        offline = hub.run_client(tmp_path, code.replace("(0, 1, 1)", "(1, 2)"), HF_HUB_OFFLINE="1")
        assert offline == [None, [0, 0]] and len(hub.log) == requests
    keys = [(entry["key"], entry["id"]) for entry in _journal(tmp_path)]
    assert len(set(keys)) == len(keys) == 3
    assert "downloaded" not in hub.errors


def test_other_commands_stay_without_the_libraries():
    code = "import sys, rorem_lib.runner.cli as cli; cli.build_parser(); print(sorted(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert not {"torch", "cv2", "diffusers", "numpy", "PIL"} & set(eval(done.stdout))
