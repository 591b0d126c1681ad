"""Picture files: read whatever people have, write PNG that is never half there."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

AGAIN = "delete it or download it again"


class TripletError(ValueError):
    """A triplet set is unsound; the message names the file and how to mend it.

    Attributes:
        file: the file at fault, where it is one file.
    """

    def __init__(self, message: str, *, file: Path | None = None):
        super().__init__(message)
        self.file = file


def load_image(path: str | Path, mode: str = "RGB") -> np.ndarray:
    """Open one picture, turned as its EXIF says, whatever its format holds.

    Args:
        path: any format that Pillow reads; palette, CMYK, alpha and 16-bit files are converted.
        mode: "RGB" drops an alpha channel; "L" lays it over black (a mask drawn on a transparent
            layer).

    Returns:
        uint8, [H, W, 3] for "RGB", [H, W] for "L".

    Raises:
        TripletError: missing, empty, no picture, truncated, or of a floating-point format.
    """
    return decode_image(path, mode)[0]


def decode_image(path: str | Path, mode: str = "RGB", *,
                 data: bytes | None = None) -> tuple[np.ndarray, bool]:
    """As `load_image`, and whether the file is plain: upright, 8 bits a channel, RGB or grey.

    Every program sees the same pixels in a plain file; others convert the rest in ways of their
    own.

    Args:
        data: the file's bytes, where they lie in a container; `path` then names them in errors.
    """
    if mode not in ("RGB", "L"):
        raise ValueError(f"unknown mode {mode!r}: take RGB or L")
    path = Path(path)
    file = path if data is None else None  # a place in a container is no file
    try:
        data = path.read_bytes() if data is None else data
        if not data:
            raise TripletError(f"{path} is empty (0 bytes): {AGAIN}", file=file)
        image = Image.open(io.BytesIO(data))
        array = _decode_plain(image, data, mode)
        if array is not None:
            return array, True
        image.load()
    except TripletError:
        raise
    except UnidentifiedImageError:
        raise TripletError(f"{path} is no picture, or its beginning is damaged: {AGAIN}",
                           file=file) from None
    except FileNotFoundError:
        raise TripletError(f"{path} does not exist", file=file) from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        if getattr(error, "errno", None):  # the file system's word, not the decoder's
            raise TripletError(f"{path} cannot be read: {error.strerror}", file=file) from None
        raise TripletError(f"{path} is truncated or damaged ({error}): {AGAIN}",
                           file=file) from None
    plain = (image.mode in ("RGB", "L") and image.format in ("PNG", "JPEG", "WEBP", "BMP")
             and not image.has_transparency_data
             and image.getexif().get(ExifTags.Base.Orientation, 1) == 1)
    return _to_array(ImageOps.exif_transpose(image), mode, path), plain


def _decode_plain(image: Image.Image, data: bytes, mode: str) -> np.ndarray | None:
    """The picture by OpenCV, up to twice as fast as by Pillow, where both give the same pixels.

    That is so for whole 8-bit RGB and grey PNG and JPEG files without orientation; what is cut
    short is left to Pillow, which says so, while OpenCV fills it up.
    """
    if image.mode not in ("RGB", "L") or (mode == "L" and image.mode != "L"):
        return None
    if image.format == "PNG":
        whole = data.endswith(b"IEND\xaeB`\x82")
        # Pillow has read what stands before the pixels; orientation may stand behind them too
        odd = (image.has_transparency_data or "exif" in image.info
               or "Raw profile type exif" in image.info or b"eXIf" in data[-2**17:])
    else:
        whole = data.endswith(b"\xff\xd9")
        odd = image.format != "JPEG" or image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    if odd or not whole:
        return None
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        return None  # Pillow refuses or warns
    flag = cv2.IMREAD_GRAYSCALE if mode == "L" else cv2.IMREAD_COLOR_RGB
    return cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)


def _to_array(image: Image.Image, mode: str, path: Path) -> np.ndarray:
    if image.mode == "F":
        raise TripletError(f"{path} holds floating-point values: save it with 8 bits a channel",
                           file=path)
    if image.mode.startswith("I"):  # 16 bits; a plain conversion would clip at 255
        grey = np.clip(np.asarray(image).astype(np.float32) / 257 + 0.5, 0, 255).astype(np.uint8)
        return grey if mode == "L" else np.repeat(grey[..., None], 3, axis=2)
    if mode == "L" and image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"), np.float32) / 255
        return (np.asarray(image.convert("RGB").convert("L")) * alpha + 0.5).astype(np.uint8)
    return np.array(image.convert(mode))


def save_image(path: str | Path, image: np.ndarray) -> None:
    """Write [H, W, 3] or [H, W] uint8 as PNG, fast compression, never half-written.

    Raises:
        TripletError: another type or shape.
        OSError: the file cannot be written; names it.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise TripletError(f"{path}: a picture is uint8 [H, W, 3] or [H, W], not {image.dtype} "
                           f"{list(image.shape)}")
    image = np.ascontiguousarray(image[..., ::-1] if image.ndim == 3 else image)  # cv2 has BGR
    data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
    _put_file(Path(path), lambda beside: beside.write_bytes(data))


def link_file(original: str | Path, path: Path) -> None:
    """Make `path` the same file as `original` without a second copy where that is possible."""
    real = os.path.realpath(original)  # a link to a link would dangle
    with contextlib.suppress(OSError):
        os.link(real, path)  # there at once, or not at all
        return
    _put_file(path, lambda beside: _link(real, beside))  # something is there, or no links are


def _link(real: str, beside: Path) -> None:
    try:
        os.link(real, beside)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(real, beside)


def _put_file(path: Path, make) -> None:
    """Let `make` write a file beside `path`, then take its place."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        beside.unlink(missing_ok=True)
        make(beside)
        os.replace(beside, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
    finally:
        beside.unlink(missing_ok=True)  # os.replace leaves it if both are one file already
