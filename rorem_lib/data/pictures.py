"""Image files: read whatever people have, write PNG that is never half there."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from rorem_lib.data.masks import binarise_mask

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
    """Open one image, turned as its EXIF says, whatever its format holds.

    Args:
        path: any format that Pillow reads; palette, CMYK, alpha and 16-bit files are converted.
        mode: "RGB" drops an alpha channel; "L" lays it over black (a mask drawn on a transparent
            layer).

    Returns:
        uint8, [H, W, 3] for "RGB", [H, W] for "L".

    Raises:
        TripletError: missing, empty, no image, truncated, or of a floating-point format.
    """
    return decode_image(path, mode)[0]


def decode_image(
    path: str | Path, mode: str = "RGB", *, data: bytes | None = None
) -> tuple[np.ndarray, bool]:
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
    with _name_faults(path, file):
        data = path.read_bytes() if data is None else data
        if not data:
            raise TripletError(f"{path} is empty (0 bytes): {AGAIN}", file=file)
        image = Image.open(io.BytesIO(data))
        array = _decode_plain(image, data, mode)
        if array is not None:
            return array, True
        image.load()
    plain = (
        image.mode in ("RGB", "L")
        and image.format in ("PNG", "JPEG", "WEBP", "BMP")
        and not image.has_transparency_data
        and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    )
    return _to_array(ImageOps.exif_transpose(image), mode, path), plain


def read_size(path: str | Path) -> tuple[int, int]:
    """(height, width) in px of an image as `load_image` gives it, from the file's header alone.

    A PNG whose orientation stands behind its pixels is taken as upright.

    Raises:
        TripletError: missing, or no image.
    """
    path = Path(path)
    with _name_faults(path, path), Image.open(path) as image:
        exif = Image.Image.getexif(image)  # a PNG's own method decodes the image first
        turned = exif.get(ExifTags.Base.Orientation, 1) >= 5
        return image.size if turned else image.size[::-1]


@contextlib.contextmanager
def _name_faults(path: Path, file: Path | None):
    """A block that opens an image: what goes wrong becomes a TripletError that names it."""
    try:
        yield
    except TripletError:
        raise
    except UnidentifiedImageError:
        raise TripletError(
            f"{path} is no image, or its beginning is damaged: {AGAIN}", file=file
        ) from None
    except FileNotFoundError:
        raise TripletError(f"{path} does not exist", file=file) from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        if getattr(error, "errno", None):  # the file system's word, not the decoder's
            raise TripletError(f"{path} cannot be read: {error.strerror}", file=file) from None
        raise TripletError(
            f"{path} is truncated or damaged ({error}): {AGAIN}", file=file
        ) from None


def _decode_plain(image: Image.Image, data: bytes, mode: str) -> np.ndarray | None:
    """The image by OpenCV, up to twice as fast as by Pillow, where both give the same pixels.

    That is so for whole 8-bit RGB and grey PNG and JPEG files without orientation; what is cut
    short is left to Pillow, which says so, while OpenCV fills it up.
    """
    if image.mode not in ("RGB", "L") or (mode == "L" and image.mode != "L"):
        return None
    if image.format == "PNG":
        whole = data.endswith(b"IEND\xaeB`\x82")
        # Pillow has read what stands before the pixels; orientation may stand behind them too
        odd = (
            image.has_transparency_data
            or "exif" in image.info
            or "Raw profile type exif" in image.info
            or b"eXIf" in data[-(2**17) :]
        )
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
        raise TripletError(
            f"{path} holds floating-point values: save it with 8 bits a channel", file=path
        )
    if image.mode.startswith("I"):  # 16 bits; a plain conversion would clip at 255
        grey = np.clip(np.asarray(image).astype(np.float32) / 257 + 0.5, 0, 255).astype(np.uint8)
        return grey if mode == "L" else np.repeat(grey[..., None], 3, axis=2)
    if mode == "L" and image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"), np.float32) / 255
        return (np.asarray(image.convert("RGB").convert("L")) * alpha + 0.5).astype(np.uint8)
    return np.array(image.convert(mode))


def fit_triplet(
    pictures: Mapping[str, np.ndarray | None],
    size: tuple[int, int],
    *,
    mode: str = "crop",
    center: bool = False,
) -> dict[str, np.ndarray | None]:
    """Bring the images of a triplet to one size, all of them in the same way.

    Args:
        pictures: `source`, `gt` [H, W, 3] and `mask` [H, W] uint8; a part may be None.
        size: (height, width) in px.
        mode: "crop" keeps the aspect and cuts off what is too much, where it costs the fewest mask
            pixels (of equal places the one next to the centre; a window that would be white all
            over is avoided); "squash" resizes straight, as the authors' trainer does.
        center: crop the centre; as without it where no mask pixel lies there, since the sample
            would teach to remove what nobody asked for.

    Returns:
        The same parts, [h, w, 3] and [h, w]; the mask is 0 or 255 and never loses its last pixel.
    """
    if mode not in ("crop", "squash"):
        raise ValueError(f"unknown resize_mode {mode!r}: take crop or squash")
    mask = pictures["mask"]
    (height, width), (high, wide) = mask.shape, size
    if (height, width) == (high, wide):
        return {**pictures, "mask": binarise_mask(mask)}
    top = left = 0
    if mode == "crop":  # the window that will fill the new size, in px of the old one
        window_high = min(height, high * width / wide)
        window_wide = min(width, wide * height / high)
        white = mask >= 128
        top = _place_window(white.mean(axis=1), window_high, center)
        left = _place_window(white.mean(axis=0), window_wide, center)
        box = (left, top, left + window_wide, top + window_high)
    else:
        box = (0, 0, width, height)
    fitted = {
        part: None
        if x is None
        else np.array(Image.fromarray(x).resize((wide, high), Image.Resampling.BICUBIC, box))
        for part, x in pictures.items()
    }
    small = fitted["mask"]
    if small.max() < 128:  # a thin mask that faded away is still one
        small = np.where(small > 0, 255, 0).astype(np.uint8)
        if not small.any():
            rows, columns = np.nonzero(mask >= 128)
            rows = np.int64((rows + 0.5 - top) * high / (box[3] - box[1]))
            columns = np.int64((columns + 0.5 - left) * wide / (box[2] - box[0]))
            inside = (0 <= rows) & (rows < high) & (0 <= columns) & (columns < wide)
            small[rows[inside], columns[inside]] = 255
    return fitted | {"mask": binarise_mask(small)}


def _place_window(shares: np.ndarray, length: float, center: bool) -> int:
    """Where a window of `length` px begins; `shares` [n] is how white each row or column is."""
    room = len(shares) - length
    middle = int(room / 2 + 0.5)
    if room < 1:
        return middle
    inner = int(length)
    total = np.concatenate([[0], np.cumsum(shares)])
    held = total[inner:] - total[: len(total) - inner]  # [n - inner + 1], by the first px
    held = held[: int(room) + 1]
    if center and held[middle] > 0:
        return middle
    held = np.where(held > inner - 1e-6, -1, held)
    best = np.flatnonzero(held > held.max() - 1e-9)
    return int(best[np.argmin(np.abs(best - room / 2))])


def save_image(path: str | Path, image: np.ndarray) -> np.ndarray:
    """Write [H, W, 3] or [H, W] uint8 as PNG, fast compression, never half-written.

    Returns:
        The file's bytes, [N] uint8.

    Raises:
        TripletError: another type or shape.
        OSError: the file cannot be written; names it.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise TripletError(
            f"{path}: an image is uint8 [H, W, 3] or [H, W], not {image.dtype} {list(image.shape)}"
        )
    image = np.ascontiguousarray(image[..., ::-1] if image.ndim == 3 else image)  # cv2 has BGR
    data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
    _put_file(Path(path), lambda tmp_path: tmp_path.write_bytes(data))
    return data


def link_file(original: str | Path, path: Path) -> None:
    """Make `path` the same file as `original` without a second copy where that is possible."""
    real = os.path.realpath(original)  # a link to a link would dangle
    with contextlib.suppress(OSError):
        os.link(real, path)  # there at once, or not at all
        return
    _put_file(path, lambda tmp_path: _link(real, tmp_path))  # something is there, or no links are


def _link(real: str, tmp_path: Path) -> None:
    try:
        os.link(real, tmp_path)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(real, tmp_path)


def _put_file(path: Path, make) -> None:
    """Let `make` write a file beside `path`, then take its place."""
    tmp_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        tmp_path.unlink(missing_ok=True)
        make(tmp_path)
        os.replace(tmp_path, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
    finally:
        tmp_path.unlink(missing_ok=True)  # os.replace leaves it if both are one file already
