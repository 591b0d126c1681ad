"""What a remover takes, and the kind, mode, depth and size in which its results come back."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms

from rorem_lib.models.inpainting import ObjectRemover
from rorem_lib.models.inputs import read_inputs

SIZE = (24, 40)  # height, width


@pytest.fixture(scope="module")
def remover(tiny_model):
    return ObjectRemover.from_pretrained(str(tiny_model), device="cpu", dtype="no")


def draw():
    """[H, W, 3] uint8 and a mask."""
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    mask = np.zeros(SIZE, np.uint8)
    mask[8:16, 10:20] = 255
    return image, mask


def make_images():
    image, _ = draw()
    alpha = np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8)
    grey, deep = image[..., 0], image[..., 0].astype(np.uint16) * 256 + 77
    return {
        "RGB": Image.fromarray(image),
        "L": Image.fromarray(grey),
        "RGBA": Image.fromarray(np.dstack([image, alpha])),
        "LA": Image.fromarray(np.dstack([grey, alpha])),
        "I;16": Image.fromarray(deep),
        "array": image,
        "array grey": grey,
        "array [H, W, 1]": grey[..., None],
        "array RGBA": np.dstack([image, alpha]),
        "array uint16": image.astype(np.uint16) * 256 + 77,
        "array float": (image / 255 + 0.001).clip(0, 1).astype(np.float32),
        "tensor": torch.from_numpy(image.transpose(2, 0, 1) / 255).float(),
        "tensor half": torch.from_numpy(image.transpose(2, 0, 1) / 255).half(),
        "tensor uint8": torch.from_numpy(image.transpose(2, 0, 1).copy()),
        "tensor grey": torch.from_numpy(grey / 255),
    }


def as_array(image):
    if isinstance(image, torch.Tensor):
        return image.movedim(0, -1).numpy() if image.ndim == 3 else image.numpy()
    return np.asarray(image)


@pytest.mark.parametrize("kind", make_images())
def test_results_are_of_the_kind_mode_and_depth_that_was_given(remover, kind):
    given = make_images()[kind]
    mask = draw()[1]
    result = remover.remove(given, mask, mode="exact", num_inference_steps=1)
    made, before = result.image, given.copy() if hasattr(given, "copy") else given.clone()
    assert type(made) is type(given) or isinstance(given, Image.Image)
    for name in ("mode", "size") if isinstance(given, Image.Image) else ("dtype", "shape"):
        assert getattr(made, name) == getattr(given, name), name
    old, new = as_array(before), as_array(made)
    kept, hole = result.effect == 0, mask > 0
    assert kept.any() and np.array_equal(new[kept], old[kept]), "bit for bit outside"
    assert not np.array_equal(new[hole], old[hole])
    if new.ndim == 3 and new.shape[2] in (2, 4):
        assert np.array_equal(new[..., -1], old[..., -1]), "alpha is kept"
    assert np.array_equal(as_array(given), old), "the caller's own is left alone"


@pytest.mark.parametrize("kind", make_images())
def test_an_empty_mask_gives_the_image_back_with_a_warning(remover, kind, caplog):
    given = make_images()[kind]
    result = remover.remove(given, np.zeros(SIZE, np.uint8), names=["lake"])
    assert np.array_equal(as_array(result.image), as_array(given)) and not result.effect.any()
    assert "lake" in caplog.text and "empty" in caplog.text


def test_palettes_become_rgb_and_keep_their_transparency():
    image, mask = draw()
    palette = Image.fromarray(image).quantize(16)
    made = read_inputs(palette, mask, "p")
    assert made.restore(made.image).mode == "RGB"
    assert np.array_equal(np.asarray(palette.convert("RGB")), made.image)
    palette.info["transparency"] = 0
    made = read_inputs(palette, mask, "p")
    restored = made.restore(made.image)
    assert restored.mode == "RGBA"
    assert np.array_equal(np.asarray(restored), np.asarray(palette.convert("RGBA")))


def test_files_are_turned_upright_and_keep_profile_and_exif(remover, tmp_path):
    image, mask = draw()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Artist] = "Anna"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = tmp_path / "photo.png"
    Image.fromarray(np.rot90(image).copy()).save(path, exif=exif, icc_profile=profile)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for given in (path, str(path), Image.open(path)):
        made = remover(given, tmp_path / "mask.png", mode="exact", num_inference_steps=1)
        assert made.size == (SIZE[1], SIZE[0])
        assert np.array_equal(np.asarray(made)[:2], image[:2])
        assert made.info["icc_profile"] == profile
        kept = Image.Exif()
        kept.load(made.info["exif"])
        assert kept[ExifTags.Base.Artist] == "Anna" and kept[ExifTags.Base.Orientation] == 1


@pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is None, reason="no pillow-heif")
def test_heic_files_open(tmp_path):
    import pillow_heif

    pillow_heif.register_heif_opener()
    image = np.full((64, 64, 3), 90, np.uint8)
    Image.fromarray(image).save(tmp_path / "photo.heic", quality=90)
    found = read_inputs(tmp_path / "photo.heic", np.full((64, 64), 255, np.uint8), "h")
    assert np.abs(found.image.astype(int) - 90).max() < 8


def make_masks():
    _, mask = draw()
    hole = mask > 0
    return {
        "uint8": mask,
        "bool": hole,
        "0 and 1": hole.astype(np.uint8),
        "int64 of 0 and 1": hole.astype(np.int64),
        "float": hole.astype(np.float32),
        "uint16": hole.astype(np.uint16) * 65535,
        "[H, W, 1]": mask[..., None],
        "[H, W, 3]": np.repeat(mask[..., None], 3, 2),
        "red on black": mask[..., None] * np.array([1, 0, 0], np.uint8),
        "tensor": torch.from_numpy(hole)[None].float(),
        "tensor bool": torch.from_numpy(hole),
        "PIL": Image.fromarray(mask),
        "PIL 1": Image.fromarray(hole),
        "PIL of a transparent hole": Image.fromarray(np.dstack([draw()[0] // 2, 255 - mask])),
        "twice as large": np.kron(mask, np.ones((2, 2), np.uint8)),
        "half as large": mask[::2, ::2],
    }


@pytest.mark.parametrize("kind", make_masks())
def test_masks_of_any_kind_mean_the_same(kind):
    image, mask = draw()
    found = read_inputs(image, make_masks()[kind], "x").mask
    assert found.dtype == np.uint8 and np.array_equal(found, mask)


def test_masks_are_inverted_on_request():
    image, mask = draw()
    for given in (255 - mask, mask == 0, Image.fromarray(255 - mask)):
        assert np.array_equal(read_inputs(image, given, "x", invert=True).mask, mask)


@pytest.mark.parametrize(
    "image, mask, text",
    [
        ("good", np.zeros((24, 24), np.uint8), "lake.*24x24 px.*40x24 px"),
        ("good", np.zeros((24, 40, 2), np.uint8), r"lake.*mask.*\[24, 40, 2\]"),
        ("good", None, "lake.*mask.*NoneType.*PIL"),
        (np.zeros((2, 24, 40, 3)), "good", r"lake.*\[2, 24, 40, 3\]"),
        (np.full((24, 40, 3), 200.0), "good", "lake.*float64.*200.*divide by 255"),
        (np.full((24, 40, 3), np.nan), "good", "lake.*floats count from 0 to 1"),
        (np.zeros((24, 40, 3), np.int32), "good", "lake is int32: give uint8"),
        (7, "good", "lake is a int: give a path"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_named_with_the_mend(image, mask, text):
    good = draw()
    image = good[0] if isinstance(image, str) else image
    mask = good[1] if isinstance(mask, str) else mask
    with pytest.raises(ValueError, match=text):
        read_inputs(image, mask, "lake")


def test_a_file_is_named_by_its_path(tmp_path):
    path = tmp_path / "photo.png"
    with pytest.raises(ValueError, match=f"{path} does not exist"):
        read_inputs(path, draw()[1], "x")
    Image.fromarray(draw()[0]).save(path)
    with pytest.raises(ValueError, match=f"{path}.*24x24 px"):
        read_inputs(Path(path), np.zeros((24, 24), np.uint8), "x")
