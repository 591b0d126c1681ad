"""Image files: what is opened and what is refused, with which words; what a copy takes over."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, ExifTags, Image, ImageCms, ImageOps

from rorem_lib.data import pictures
from rorem_lib.data.pictures import (
    TripletError,
    decode_image,
    load_image,
    load_mask,
    read_metadata,
    read_size,
    save_image,
)


def _photo(height=40, width=60, seed=0):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8))
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC))


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _write_png(path, width, height, kind=2):
    """A PNG of a few bytes that says it is so large; `kind` 2 is RGB, 0 grey."""
    head = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    data = _chunk(b"IHDR", head) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def _make_exif(orientation):
    """EXIF with one tag, the orientation, of bytes: as a text."""
    entry = struct.pack("<HHI", 0x0112, 2, len(orientation)) + orientation.ljust(4, b"\0")
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4)


# ------------------------------------------------------------------------------------ formats


def test_postscript_is_never_run_whatever_its_name(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: ran.append(a))
    path = tmp_path / "x.png"
    Image.fromarray(_photo()).save(path, "EPS")
    for read in (load_image, load_mask, read_size, read_metadata):
        with pytest.raises(TripletError, match=r"x\.png .*PostScript") as caught:
            read(path)
        assert caught.value.file == path
    assert not ran


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF"])
def test_formats_that_people_have_are_opened_by_their_content(tmp_path, kind):
    path = tmp_path / "x.dat"
    Image.fromarray(_photo()).save(path, kind)
    assert np.abs(load_image(path).astype(int) - _photo()).mean() < 12
    assert read_size(path) == (40, 60)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body>", "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "server's answer"),
        (b'{"error": "not found"}', "server's answer"),
        (bytes(5000), "zeros"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "pip install pillow-heif"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2mp41", "video"),
        (b"%PDF-1.4\n", "PDF"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"8BPS\0\1", "Photoshop"),
        (b"\xff\x0a" + bytes(40), "JPEG XL"),
        (b"PK\3\4" + bytes(40), "archive"),
    ],
)
def test_what_is_no_image_is_called_what_it_is(tmp_path, content, words):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(TripletError, match=words) as caught:
        load_image(path)
    assert str(path) in str(caught.value) and "truncated" not in str(caught.value)
    with pytest.raises(TripletError, match=words):  # in a container
        decode_image("row 3", data=content)


# ------------------------------------------------------------------------------------- limits


def test_an_image_above_the_limit_is_refused_by_its_header(tmp_path, monkeypatch):
    path = _write_png(tmp_path / "x.png", 30_000, 20_000)
    for read in (load_image, load_mask, read_size):
        with pytest.raises(TripletError, match=r"x\.png.*30000x20000.*ROREM_MAX_MEGAPIXELS"):
            read(path)
    with pytest.raises(TripletError, match="ROREM_MAX_MEGAPIXELS"):  # Pillow's own words
        load_image(_write_png(tmp_path / "y.png", 60_000, 60_000))
    monkeypatch.setenv("ROREM_MAX_MEGAPIXELS", "601")
    monkeypatch.setenv("ROREM_MAX_IMAGE_RATIO", "1e9")
    assert read_size(path) == (20_000, 30_000)
    monkeypatch.setenv("ROREM_MAX_MEGAPIXELS", "many")
    with pytest.raises(ValueError, match="ROREM_MAX_MEGAPIXELS"):
        load_image(path)


def test_a_small_file_is_no_large_image(tmp_path, monkeypatch):
    path = _write_png(tmp_path / "x.png", 13_300, 13_300)
    with pytest.raises(TripletError, match=r"x\.png.*13300x13300.*ROREM_MAX_IMAGE_RATIO"):
        load_image(path)
    monkeypatch.setenv("ROREM_MAX_IMAGE_RATIO", "1e9")
    assert read_size(path) == (13_300, 13_300)
    monkeypatch.delenv("ROREM_MAX_IMAGE_RATIO")
    assert read_size(_write_png(path, 10_000, 9_000)) == (9_000, 10_000)  # a drawing may be
    assert read_size(_write_png(path, 16_000, 16_000, kind=0)) == (16_000, 16_000)  # a mask too


def test_a_tiff_of_a_few_bytes_is_no_large_image(tmp_path):
    path = tmp_path / "x.tif"
    Image.new("1", (64, 64)).save(path, compression="group4")
    data = bytearray(path.read_bytes())
    start = struct.unpack_from("<I", data, 4)[0]
    for number in range(struct.unpack_from("<H", data, start)[0]):
        at = start + 2 + 12 * number
        if struct.unpack_from("<H", data, at)[0] in (256, 257):  # width, height
            struct.pack_into("<HI", data, at + 2, 4, 1)
            struct.pack_into("<I", data, at + 8, 20_000)
    path.write_bytes(data)
    with pytest.raises(TripletError, match=r"x\.tif.*20000x20000.*ROREM_MAX_IMAGE_RATIO"):
        load_image(path)


def test_a_photograph_of_200_megapixels_passes_the_limits(tmp_path):
    path = tmp_path / "x.jpg"
    Image.fromarray(_photo()).save(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, at + 5, 10_000, 20_000)  # SOF0: height, width
    path.write_bytes(bytes(data) + bytes(20_000_000))
    assert read_size(path) == (10_000, 20_000)


@pytest.mark.slow
def test_a_photograph_of_200_megapixels_opens(tmp_path):
    path = tmp_path / "x.jpg"
    tile = np.tile(_photo(1000, 1000), (10, 20, 1))
    Image.fromarray(tile).save(path, quality=90)
    found = load_image(path)
    assert found.shape == (10_000, 20_000, 3)
    assert np.abs(found[::97, ::89].astype(int) - tile[::97, ::89]).mean() < 6


# -------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("exif", [9, 0, b"6\0", b"upright\0", b"garbage"])
def test_an_orientation_that_there_is_not_turns_nothing(tmp_path, suffix, exif):
    path = tmp_path / f"x.{suffix}"
    if isinstance(exif, int):
        written = Image.Exif()
        written[ExifTags.Base.Orientation] = exif
        exif = written.tobytes()
    else:
        exif = _make_exif(exif) if exif != b"garbage" else b"Exif\0\0II*\0\xff\xff"
    Image.fromarray(_photo()).save(path, exif=exif)
    assert load_image(path).shape == (40, 60, 3)
    assert read_size(path) == (40, 60)


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_turns_image_size_and_mask_alike(tmp_path, turn):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    upright = _photo(24, 24) // 3
    upright[:4, :10] = 255
    path = tmp_path / "x.png"
    Image.fromarray(upright).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.array(ImageOps.exif_transpose(image))
    assert np.array_equal(load_image(path), expected)
    assert read_size(path) == expected.shape[:2]
    assert np.array_equal(load_mask(path) >= 128, expected.min(axis=2) >= 128)


# ----------------------------------------------------------------------- profile and EXIF kept


def test_a_copy_has_the_profile_and_the_exif_of_its_image_upright(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "Camera"
    exif[ExifTags.IFD.Exif] = {
        ExifTags.Base.DateTimeOriginal: "2026:01:02 03:04:05",
        ExifTags.Base.MakerNote: b"secret",
    }
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: "N"}
    Image.fromarray(_photo()).save(tmp_path / "x.jpg", icc_profile=profile, exif=exif)
    image = load_image(tmp_path / "x.jpg")
    assert image.shape == (60, 40, 3)
    save_image(tmp_path / "y.png", image, read_metadata(tmp_path / "x.jpg"))
    with Image.open(tmp_path / "y.png") as found:
        assert found.info["icc_profile"] == profile
        kept = found.getexif()
        assert kept[ExifTags.Base.Orientation] == 1 and kept[ExifTags.Base.Make] == "Camera"
        inner = kept.get_ifd(ExifTags.IFD.Exif)
        assert inner[ExifTags.Base.DateTimeOriginal] == "2026:01:02 03:04:05"
        assert ExifTags.Base.MakerNote not in inner
        assert kept.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"
        assert not kept.get_ifd(ExifTags.IFD.IFD1)
    assert np.array_equal(load_image(tmp_path / "y.png"), image)


def test_a_profile_for_other_pixels_and_broken_exif_are_left_out(tmp_path):
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[16:20] = b"CMYK"
    image = Image.fromarray(_photo())
    image.convert("CMYK").save(tmp_path / "x.jpg", icc_profile=bytes(profile))
    assert read_metadata(tmp_path / "x.jpg") == {}
    image.save(tmp_path / "y.jpg", exif=b"Exif\0\0nonsense")
    assert read_metadata(tmp_path / "y.jpg") == {}
    save_image(tmp_path / "z.png", _photo(), {})
    assert np.array_equal(load_image(tmp_path / "z.png"), _photo())


def test_a_decoder_that_fails_in_any_way_names_the_file(tmp_path, monkeypatch):
    save_image(tmp_path / "x.png", _photo())

    def fail(*_):
        raise TypeError("a list was expected")

    monkeypatch.setattr(pictures, "_decode_plain", fail)
    with pytest.raises(TripletError, match=r"x\.png is .*damaged.*a list was expected"):
        load_image(tmp_path / "x.png")
    buffer = io.BytesIO()
    Image.fromarray(_photo()).save(buffer, "PNG")
    with pytest.raises(TripletError, match="row 3 is .*damaged"):
        decode_image("row 3", data=buffer.getvalue())
