"""Image files: read whatever people have, write PNG that is never half there.

`open_image` is the one door to Pillow. It takes an allow-list of formats (EPS, for one, would be
handed to Ghostscript), looks at the size before it decodes, and names the file in every error.
Its limits are environment variables: `ROREM_MAX_MEGAPIXELS` (500) and, for what decodes to more
than 300 MB, `ROREM_MAX_IMAGE_RATIO` (400), bytes decoded for each byte of the file.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from rorem_lib.data.masks import binarise_mask, fit_mask, interpret_mask
from rorem_lib.files import read_limit

logger = logging.getLogger(__name__)

AGAIN = "delete it or download it again"
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "HEIF")
_SMALL = 300_000_000  # bytes decoded: below it a flat image may be as small a file as it likes
_SUBFILE, _NO_PAGE = 254, 1 | 4  # a TIFF's tag; a smaller copy of a page, or its mask
_TURNS = {  # EXIF's orientations; any other value is upright, as for other readers
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_NO_DATA = (  # how a file begins that holds something else than its name says, and what it is
    (
        rb"version https://git-lfs",
        "a Git-LFS pointer, the file itself was not downloaded: run `git lfs pull` in its "
        "repository",
    ),
    (
        rb"\s*(<!doctype html|<html|<head)",
        "a web page (HTML) under another name: the link wants a login or has moved; open it in a "
        "browser and save the file itself",
    ),
    (
        rb"\s*<\?xml(?!.{0,400}<svg)|\s*\{\s*\"(error|message|detail)",
        "a server's answer in text under another name: read it, then download the file again",
    ),
    (rb"\0{64}", f"nothing but zeros at its beginning, as a broken download is: {AGAIN}"),
)
_OTHER_IMAGES = (
    (
        rb"....ftyp(hei[cmsx]|hev[cmx]|mif1|msf1)",
        "a HEIC photograph: `pip install pillow-heif` to read such files, or save it as JPEG",
    ),
    (rb"....ftypavi[fs]", "an AVIF image, which this Pillow cannot read: save it as PNG or JPEG"),
    (rb"....ftyp", "a video: save the frame that you mean as PNG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript (EPS), which is never run here: save it as PNG"),
    (rb"%PDF", "a PDF document: save the image in it as PNG"),
    (rb"8BPS", "a Photoshop document: save it as PNG"),
    (rb"\s*(<\?xml.{0,400})?<svg", "a drawing (SVG): save it as PNG"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000, which is not read here: save it as PNG"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL, which is not read here: save it as PNG"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!", "an archive: unpack it"),
)


class TripletError(ValueError):
    """A triplet set is unsound; the message names the file and how to mend it.

    Attributes:
        file: the file at fault, where it is one file.
    """

    def __init__(self, message: str, *, file: Path | None = None):
        super().__init__(message)
        self.file = file


# ---------------------------------------------------------------------------- opening a file


@contextlib.contextmanager
def open_image(path: str | Path, *, data: bytes | None = None) -> Iterator[Image.Image]:
    """A block with an image file whose header was read, and its pixels not yet.

    Args:
        data: the file's bytes, where they lie in a container; `path` then names them in errors.

    Raises:
        TripletError: missing, empty, none of the formats, too large, or whatever goes wrong in
            the block: it is for what Pillow and OpenCV do alone.
    """
    path = Path(path)
    limits = read_limit("ROREM_MAX_MEGAPIXELS", 500), read_limit("ROREM_MAX_IMAGE_RATIO", 400)
    Image.MAX_IMAGE_PIXELS = int(1e6 * limits[0])  # Pillow's own warns at 89 megapixels
    try:
        with contextlib.ExitStack() as stack:
            if data is None:
                stream = stack.enter_context(open(path, "rb"))
                count = os.fstat(stream.fileno()).st_size
            else:
                stream, count = io.BytesIO(data), len(data)
            image = stack.enter_context(Image.open(stream, formats=_list_formats()))
            if why := _weigh(image, count, *limits):
                raise TripletError(f"{path} is {why}", file=path if data is None else None)
            yield image
    except TripletError:
        raise
    except Exception as error:  # a damaged file fails in every way there is
        raise _explain_fault(path, data, error) from None


@contextlib.contextmanager
def open_still(path: str | Path) -> Iterator[Image.Image]:
    """As `open_image`, of what holds one image: no animation, no document of several pages.

    What cameras and editors put beside a photo is none: previews (MPO, HEIC), and in a TIFF the
    smaller copies and masks of its page.

    Raises:
        TripletError: as `open_image`; or there are several, and all but the first would be lost.
    """
    with open_image(path) as image:
        count = getattr(image, "n_frames", 1)
        if image.format in ("MPO", "HEIF"):
            count = 1
        elif image.format == "TIFF" and count > 1:
            count = 0
            for number in range(image.n_frames):
                image.seek(number)
                count += not image.tag_v2.get(_SUBFILE, 0) & _NO_PAGE
            image.seek(0)
        if count > 1:
            raise TripletError(
                f"{path} has {count} frames or pages: save the one that you mean as PNG",
                file=Path(path),
            )
        yield image


@functools.cache
def _list_formats() -> tuple[str, ...]:
    """The formats read here that this Pillow knows; HEIC where pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _weigh(image: Image.Image, count: int, megapixels: float, ratio: float) -> str | None:
    """Why an image is too large, at all or for its file of `count` bytes; None where it is not."""
    width, height = image.size
    shown = f"{width}x{height} px, {width * height / 1e6:.0f} megapixels"
    if width * height > 1e6 * megapixels:
        return f"{shown}: make it smaller, or set ROREM_MAX_MEGAPIXELS above {megapixels:g}"
    decoded = width * height * (4 if image.mode[0] in "IF" else len(image.getbands()))
    if decoded > max(_SMALL, ratio * count):
        return (
            f"{shown}, {decoded / 1e6:,.0f} MB of a file of {count:,} bytes, as no photograph is: "
            f"make it smaller, or set ROREM_MAX_IMAGE_RATIO above {ratio:g} if you trust it"
        )
    return None


def _explain_fault(path: Path, data: bytes | None, error: Exception) -> TripletError:
    """What a file is and what to do, where opening it failed."""
    file = path if data is None else None
    if isinstance(error, FileNotFoundError):
        return TripletError(f"{path} does not exist", file=file)
    if getattr(error, "errno", None):  # the file system's word, not the decoder's
        return TripletError(f"{path} cannot be read: {error.strerror}", file=file)
    if isinstance(error, MemoryError):
        return TripletError(f"{path} takes more memory than there is: make it smaller", file=file)
    if isinstance(error, Image.DecompressionBombError):
        return TripletError(
            f"{path} is far above the limit of ROREM_MAX_MEGAPIXELS ({error}): make it smaller, or "
            "set the variable",
            file=file,
        )
    head = read_head(path) if data is None else data[:512]
    if not head:
        return TripletError(f"{path} is empty (0 bytes): {AGAIN}", file=file)
    if what := describe_content(head) or _match(head, _OTHER_IMAGES):
        return TripletError(f"{path} is no image that can be read but {what}", file=file)
    if isinstance(error, UnidentifiedImageError):
        return TripletError(
            f"{path} is no image of a known format ({', '.join(_list_formats())}), or its "
            f"beginning is damaged: {AGAIN}",
            file=file,
        )
    return TripletError(f"{path} is truncated or damaged ({error}): {AGAIN}", file=file)


def read_head(path: str | Path) -> bytes:
    """A file's first 512 bytes; none where it cannot be read."""
    try:
        with open(path, "rb") as stream:
            return stream.read(512)
    except OSError:
        return b""


def describe_content(head: bytes) -> str | None:
    """What a file is that begins so and is not what its name says: no data, but words about it."""
    return _match(head, _NO_DATA)


def _match(head: bytes, kinds: tuple[tuple[bytes, str], ...]) -> str | None:
    found = (what for start, what in kinds if re.match(start, head, re.IGNORECASE | re.DOTALL))
    return next(found, None)


# ---------------------------------------------------------------------------- pixels of a file


def load_image(path: str | Path, mode: str = "RGB") -> np.ndarray:
    """Open one image, turned as its EXIF says, whatever its format holds.

    Args:
        path: JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF, HEIC (with pillow-heif); palette, CMYK, alpha
            and 16-bit files are converted.
        mode: "RGB" drops an alpha channel; "L" lays it over black. Masks are `load_mask`'s.

    Returns:
        uint8, [H, W, 3] for "RGB", [H, W] for "L".

    Raises:
        TripletError: missing, empty, no image, truncated, too large, or of a floating-point format.
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
    with open_image(path, data=data) as image:
        array = _decode_plain(image, path, data, mode)
        if array is not None:
            return array, True
        image.load()
        return to_array(turn_upright(image), mode, path), _is_plain(image)


def load_mask(
    path: str | Path, size: tuple[int, int] | None = None, *, invert: bool = False
) -> np.ndarray:
    """Open a mask of any kind that people have; `masks.interpret_mask` says which.

    Args:
        size: (height, width) px of its image, which the mask is brought to.
        invert: black is to be removed, not white.

    Returns:
        [H, W] uint8, white (at least 128) is to be removed; with `size` 0 or 255.

    Raises:
        TripletError: as `load_image`; or it is no mask, can be read in two ways, or has another
            shape than `size`.
    """
    mask = decode_mask(path)[0]
    mask = 255 - mask if invert else mask
    try:
        return mask if size is None else fit_mask(mask, *size)
    except ValueError as error:
        raise TripletError(f"{path}: {error}", file=Path(path)) from None


def decode_mask(path: str | Path, *, data: bytes | None = None) -> tuple[np.ndarray, bool]:
    """As `load_mask`, and whether the file is plain and every program sees this mask in it."""
    with open_image(path, data=data) as image:
        stored = "L" if image.mode == "L" else "RGB"
        array = _decode_plain(image, path, data, stored)
        plain = array is not None
        if not plain:
            image.load()
            plain = _is_plain(image)
            array = keep_bands(turn_upright(image), path)
    try:
        mask, as_stored = interpret_mask(array)
    except ValueError as error:
        file = Path(path) if data is None else None
        raise TripletError(f"{path}, given as a mask, {error}", file=file) from None
    return mask, plain and as_stored


def read_size(path: str | Path) -> tuple[int, int]:
    """(height, width) in px of an image as `load_image` gives it, from the file's header alone.

    A PNG whose orientation stands behind its pixels is taken as upright.

    Raises:
        TripletError: missing, or no image.
    """
    with open_image(path) as image:
        return image.size if get_orientation(image, in_head=True) >= 5 else image.size[::-1]


def get_orientation(image: Image.Image, *, in_head: bool = False) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none, or text, or another number.

    Args:
        in_head: look at what stands before the pixels; a PNG is decoded to see the rest.
    """
    try:
        exif = Image.Image.getexif(image) if in_head else image.getexif()
        found = exif.get(ExifTags.Base.Orientation, 1)
        return int(found) if found in _TURNS else 1
    except OSError:  # the pixels' fault
        raise
    except Exception:  # EXIF that cannot be read turns nothing
        return 1


def turn_upright(image: Image.Image) -> Image.Image:
    """An image as its EXIF says that it is to be seen; itself where it is upright."""
    turn = _TURNS.get(get_orientation(image))
    return image if turn is None else image.transpose(turn)


def _is_plain(image: Image.Image) -> bool:
    return (
        image.mode in ("RGB", "L")
        and image.format in ("PNG", "JPEG", "WEBP", "BMP")
        and not image.has_transparency_data
        and get_orientation(image) == 1
    )


def _decode_plain(
    image: Image.Image, path: str | Path, data: bytes | None, mode: str
) -> np.ndarray | None:
    """The image by OpenCV, up to twice as fast as by Pillow, where both give the same pixels.

    That is so for whole 8-bit RGB and grey PNG and JPEG files without orientation; what is cut
    short is left to Pillow, which says so, while OpenCV fills it up.
    """
    if image.mode not in ("RGB", "L") or (mode == "L" and image.mode != "L"):
        return None
    if image.format not in ("PNG", "JPEG") or image.width * image.height > 2**30:  # OpenCV's limit
        return None
    data = Path(path).read_bytes() if data is None else data
    if image.format == "PNG":
        whole = data.endswith(b"IEND\xaeB`\x82")
        # Pillow has read what stands before the pixels; orientation may stand behind them too
        odd = (
            image.has_transparency_data
            or "exif" in image.info
            or "Raw profile type exif" in image.info
            or data.find(b"eXIf", max(0, len(data) - 2**17)) >= 0
        )
    else:
        whole, odd = data.endswith(b"\xff\xd9"), get_orientation(image) != 1
    if odd or not whole:
        return None
    flag = cv2.IMREAD_GRAYSCALE if mode == "L" else cv2.IMREAD_COLOR_RGB
    return cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)


def to_array(image: Image.Image, mode: str, path: str | Path) -> np.ndarray:
    if image.mode == "F":
        raise TripletError(
            f"{path} holds floating-point values: save it with 8 bits a channel", file=Path(path)
        )
    if image.mode.startswith("I"):  # 16 bits; a plain conversion would clip at 255
        grey = np.clip(np.asarray(image).astype(np.float32) / 257 + 0.5, 0, 255).astype(np.uint8)
        return grey if mode == "L" else np.repeat(grey[..., None], 3, axis=2)
    if mode == "L" and image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"), np.float32) / 255
        return (np.asarray(image.convert("RGB").convert("L")) * alpha + 0.5).astype(np.uint8)
    return np.array(image.convert(mode))


def keep_bands(image: Image.Image, path: str | Path) -> np.ndarray:
    """A mask file's pixels with all that tells what they mean: [H, W], [H, W, 3] or [H, W, 4]."""
    if image.mode.startswith("I") and (values := np.asarray(image)).max() == 1:
        return values.astype(np.uint8)  # 16 bits of 0 and 1
    if image.has_transparency_data:
        return np.array(image.convert("RGBA"))
    grey = image.mode in ("1", "L", "F") or image.mode.startswith("I")
    return to_array(image, "L" if grey else "RGB", path)


# ------------------------------------------------------------------------------ what goes along

_KEPT_TAGS = (  # of EXIF, for an image made of another: not where its bytes lay, nor a thumbnail
    *("ImageDescription", "Make", "Model", "Software", "DateTime", "Artist", "HostComputer"),
    *("XResolution", "YResolution", "ResolutionUnit", "Copyright"),
)


def read_metadata(path: str | Path) -> dict[str, bytes]:
    """What a copy of an image's upright RGB pixels takes over: its colour profile and EXIF.

    Returns:
        `icc_profile` and `exif` as `Image.save` takes them, those that there are. The orientation
        is 1; the thumbnail, which would still show what was removed, is left out.

    Raises:
        TripletError: as `load_image`.
    """
    with open_image(path) as image:
        return collect_metadata(image, path)


def collect_metadata(image: Image.Image, name="the image") -> dict[str, bytes]:
    """As `read_metadata`, of an image that Pillow has opened; `name` stands in warnings."""
    found, kept = {}, Image.Exif()
    profile = image.info.get("icc_profile") or b""
    if profile[16:20] == b"RGB ":  # others are for the pixels before they were converted
        found["icc_profile"] = profile
    try:
        exif = image.getexif()
        names = {getattr(ExifTags.Base, tag) for tag in _KEPT_TAGS}
        kept.update({tag: value for tag, value in exif.items() if tag in names})
        for part in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            inner = dict(exif.get_ifd(part))
            inner.pop(ExifTags.Base.MakerNote, None)  # its addresses are those of the old file
            inner.pop(ExifTags.IFD.Interop, None)
            if inner:
                kept[part] = inner
        if exif:
            kept[ExifTags.Base.Orientation] = 1
            found["exif"] = kept.tobytes()
    except Exception as error:
        logger.warning("%s: its EXIF cannot be read (%s) and is not kept", name, error)
    return found


# ------------------------------------------------------------------------------ sizes of triplets


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


def save_image(
    path: str | Path,
    image: np.ndarray | Image.Image,
    metadata: Mapping[str, bytes] | None = None,
) -> bytes:
    """Write an image as PNG, fast compression, never half-written.

    Args:
        image: [H, W, 3] or [H, W] uint8, or a PIL image, which keeps its mode and depth.
        metadata: what `read_metadata` found in the image that this one was made of.

    Returns:
        The file's bytes.

    Raises:
        TripletError: another type or shape.
        OSError: the file cannot be written; names it.
    """
    is_array = not isinstance(image, Image.Image)
    if is_array and (
        image.dtype != np.uint8 or image.shape[2:] not in ((), (3,)) or image.ndim < 2
    ):
        raise TripletError(
            f"{path}: an image is uint8 [H, W, 3] or [H, W], not {image.dtype} {list(image.shape)}"
        )
    if metadata or not is_array:
        stream, opened = io.BytesIO(), Image.fromarray(image) if is_array else image
        opened.save(stream, "PNG", compress_level=1, **(metadata or {}))
        data = stream.getvalue()
    else:
        image = np.ascontiguousarray(image[..., ::-1] if image.ndim == 3 else image)  # cv2 has BGR
        data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
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
