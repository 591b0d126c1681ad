"""The files of `rorem remove`: which image has which mask, how they are read, results encoded."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from rorem_lib.data import masks
from rorem_lib.data.items import SUFFIXES, escape_text
from rorem_lib.data.pictures import open_image, read_size
from rorem_lib.files import hash_file
from rorem_lib.models.inputs import Given, read_inputs
from rorem_lib.runner.remove_results import Unusable, list_results

READ = (*SUFFIXES, ".gif", ".avif", ".heic", ".heif")  # what a folder is searched for
WRITTEN = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MASK_ENDS = ("_mask", "-mask")  # what the stem of a mask may have more than its image's
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")  # formats whose frames are a film, not pages


@dataclass(frozen=True)
class Item:
    """One image to work on.

    Attributes:
        source: its file.
        mask: its mask's; None where boxes say what is removed, or there is a fault.
        output: name of the result in the folder of the results.
        fault: why it cannot be worked on; "" as far as the names tell.
    """

    source: Path
    mask: Path | None = None
    output: str = ""
    fault: str = ""


# ----------------------------------------------------------------------- which files are meant


def list_images(words: Iterable[str]) -> list[Path]:
    """The images that the words name, each once: files, folders (not those in them), patterns.

    In folders and patterns, hidden files, files of other kinds and this command's own results are
    passed over. A file named in full is taken as it is, even where it does not exist.

    Raises:
        ValueError: a folder or a pattern has no image.
    """
    found: dict[str, Path] = {}
    own: dict[Path, set[str]] = {}
    for word in words:
        path = Path(word)
        if path.is_dir():
            paths, what = sorted(path.iterdir()), f"the folder {word}"
        elif not path.exists() and glob.has_magic(word):
            paths, what = sorted(map(Path, glob.glob(word, recursive=True))), f"the pattern {word}"
        else:
            found.setdefault(os.path.abspath(path), path)
            continue
        count = len(found)
        for path in paths:
            if path.parent not in own:
                own[path.parent] = list_results(path.parent)
            hidden = path.name.startswith(".") or escape_text(path.name) in own[path.parent]
            if not hidden and path.suffix.lower() in READ and not path.is_dir():
                found.setdefault(os.path.abspath(path), path)
        if len(found) == count and not any(os.path.abspath(p) in found for p in paths):
            raise ValueError(f"{what} has no image ({', '.join(READ)}) to work on")
    return list(found.values())


def _fold(text: str) -> str:
    """A name as all file systems compare it: composed and in small letters."""
    return unicodedata.normalize("NFC", text).casefold()


def _cut_end(stem: str) -> str:
    """A stem without what makes it a mask's."""
    end = next((end for end in MASK_ENDS if stem.casefold().endswith(end)), "")
    return stem[: len(stem) - len(end)]


class MaskFolder:
    """Finds the mask of an image by its name: `photo.png`, `photo_mask.png` or `photo.jpg.png`."""

    def __init__(self, folder: str | Path, sources: Sequence[Path]):
        self.folder = Path(folder)
        taken = {os.path.abspath(path) for path in sources}
        self._masks: dict[str, list[Path]] = {}
        for path in sorted(self.folder.iterdir()):
            usable = path.suffix.lower() in READ and not path.name.startswith(".")
            if usable and os.path.abspath(path) not in taken and not path.is_dir():
                for stem in {path.stem, _cut_end(path.stem)}:
                    self._masks.setdefault(_fold(stem), []).append(path)

    def find(self, source: Path) -> Path:
        """The mask of an image.

        Raises:
            Unusable: there is none, or there are several of equal right.
        """
        found = self._masks.get(_fold(source.name)) or self._masks.get(_fold(source.stem), [])
        for key in (lambda p: p.name == source.name, lambda p: p.stem == source.stem):
            found = [path for path in found if key(path)] or found
        if not found:
            raise Unusable(
                f"{source} has no mask in {self.folder}: give it one named {source.stem}.png, "
                "white where something is to be removed"
            )
        if len(found) > 1:
            raise Unusable(
                f"{source} has several masks, {' and '.join(map(str, found))}: leave one"
            )
        return found[0]


def plan(
    words: Iterable[str], mask: str | None, *, output: str | None, suffix: str | None
) -> tuple[Path, list[Item]]:
    """What is to be done: the folder of the results, and an item for each image.

    Args:
        words: files, folders, patterns.
        mask: a file for all of them, a folder with one for each, or None for boxes.
        output: a file for the one image, or a folder; None takes `<stem>_removed.png` beside the
            one image, or the folder `removed` in the working folder.
        suffix: format of the results, such as ".png"; None takes that of `output`, else PNG.

    Raises:
        ValueError: there is nothing to do, or the words contradict each other.
    """
    words = list(words)
    sources = list_images(words)
    if mask is not None and not Path(mask).exists():
        raise ValueError(f"there is no mask {mask}")
    per_image = mask is not None and Path(mask).is_dir()
    if per_image:  # masks may lie beside their images
        inside = os.path.realpath(mask)
        named = {os.path.abspath(word) for word in words}
        sources = [
            path
            for path in sources
            if os.path.abspath(path) in named
            or _cut_end(path.stem) == path.stem
            or os.path.realpath(path.parent) != inside
        ]
        if not sources:
            raise ValueError(f"there are masks alone in {', '.join(words)}")
    single = len(words) == len(sources) == 1 and not Path(words[0]).is_dir()
    folder, name, suffix = _choose_output(sources[0] if single else None, output, suffix)
    names = [name] if name else _name_results(sources, suffix)
    shared = None if mask is None or per_image else Path(mask)
    items = [Item(source, shared, name) for source, name in zip(sources, names)]
    if per_image:
        index = MaskFolder(mask, sources)
        items = [_add_mask(item, index) for item in items]
    return folder, _find_collisions(items)


def _add_mask(item: Item, index: MaskFolder) -> Item:
    try:
        return replace(item, mask=index.find(item.source))
    except Unusable as error:
        return replace(item, fault=str(error))


def _choose_output(
    source: Path | None, output: str | None, suffix: str | None
) -> tuple[Path, str | None, str]:
    """Folder and, for one image whose result is named, name of the results; their suffix."""
    if output is None:
        chosen = suffix or ".png"
        if source is None:
            return Path("removed"), None, chosen
        return source.parent, f"{source.stem}_removed{chosen}", chosen
    path, given = Path(output), Path(output).suffix.lower()
    is_folder = path.is_dir() or output.endswith(("/", os.sep)) or given not in (*READ, *WRITTEN)
    if is_folder:
        return path, None, suffix or ".png"
    if source is None:
        raise ValueError(f"{output} is the name of one file: name a folder for several images")
    if given not in WRITTEN:
        raise ValueError(f"{output}: results are written as {', '.join(WRITTEN)}")
    if suffix and WRITTEN[suffix] != WRITTEN[given]:
        raise ValueError(f"{output} is no {suffix} file: leave --format out, or rename it")
    return path.parent, path.name, given


def _name_results(sources: Sequence[Path], suffix: str) -> list[str]:
    """A name for each result: the image's stem; all of its name where a stem comes twice."""
    names = [path.stem + suffix for path in sources]
    for _ in range(2):  # photo.jpg.png may be a name already
        counts = Counter(map(_fold, names))
        names = [
            name if counts[_fold(name)] == 1 else path.name + suffix
            for name, path in zip(names, sources)
        ]
    return names


def _find_collisions(items: list[Item]) -> list[Item]:
    """The items; those whose results would have one name have a fault."""
    by_name: dict[str, list[Item]] = {}
    for item in items:
        by_name.setdefault(_fold(item.output), []).append(item)
    checked = []
    for item in items:
        others = [o for o in by_name[_fold(item.output)] if o is not item]
        if others and not item.fault:
            fault = (
                f"{item.source} and {others[0].source} would both become {item.output}: work on "
                "one folder at a time, each with an -o of its own"
            )
            item = replace(item, fault=fault)
        checked.append(item)
    return checked


# -------------------------------------------------------------------------------- what is read


@dataclass
class Loaded:
    """An image that was read.

    Attributes:
        item: which.
        key: SHA-256 over its bytes, its mask's and the settings.
        given: the image, its mask, and how a result becomes an image of its kind.
        format: of its file, as Pillow names it.
    """

    item: Item
    key: str
    given: Given
    format: str


def make_key(item: Item, settings: Mapping) -> str:
    """SHA-256 of all that decides a result: the bytes of image and mask, and the settings.

    Raises:
        Unusable: a file cannot be read.
    """
    parts = []
    for path in filter(None, (item.source, item.mask)):
        try:
            if not path.is_file():  # a pipe would be waited for
                raise Unusable(f"{path} {'is no file' if path.exists() else 'does not exist'}")
            parts.append(hash_file(path))
        except OSError as error:
            raise Unusable(f"{path} cannot be read: {error.strerror}") from None
    text = json.dumps([*parts, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def load_item(item: Item, key: str, *, boxes: Sequence, invert: bool = False) -> Loaded:
    """Read an image and its mask.

    Args:
        boxes: (x0, y0, x1, y1) in px of the upright image, where there is no mask.
        invert: what the mask or the boxes leave is removed.

    Raises:
        ValueError: one of them cannot be read, or they do not fit; names the file.
    """
    with open_image(item.source) as opened:
        kind, frames = opened.format, getattr(opened, "n_frames", 1)
    if frames > 1 and kind in _ANIMATED:
        raise Unusable(
            f"{item.source} is an animation of {frames} frames: save the one that you mean as PNG"
        )
    mask = item.mask
    if mask is None:
        size = read_size(item.source)
        try:
            mask = np.maximum.reduce([masks.draw_box_mask(*size, box) for box in boxes])
        except ValueError as error:
            raise Unusable(f"{item.source}: {error}") from None
    given = read_inputs(item.source, mask, str(item.source), invert=invert)
    return Loaded(item, key, given, kind)


# ----------------------------------------------------------------------------- what is written


def encode_result(loaded: Loaded, image: np.ndarray, suffix: str) -> bytes:
    """The bytes of a result's file: the image's own mode, transparency, colour profile and EXIF.

    Args:
        image: [H, W, 3] uint8.
        suffix: one of `WRITTEN`.

    Raises:
        Unusable: the format cannot hold it.
    """
    made, kind = loaded.given.restore(image), WRITTEN[suffix]
    if kind == "JPEG" and made.mode.endswith("A"):
        if made.getchannel("A").getextrema()[0] < 255:
            raise Unusable(
                f"{loaded.item.source} has transparency, which JPEG cannot keep: take .png or .webp"
            )
        made = _convert(made, made.mode[:-1])
    if kind != "PNG" and made.mode.startswith("I"):  # 16 bits
        made = _convert(Image.fromarray(image), "L", made.info)
    return _encode(loaded, made, kind)


def encode_side_by_side(loaded: Loaded, image: np.ndarray, suffix: str) -> bytes:
    """The bytes of a file with the image, its mask's outline in it, and the result.

    They lie beside each other, or one below the other where the image is wider than tall.
    """
    source, mask = loaded.given.image, loaded.given.mask
    axis = 0 if source.shape[1] > source.shape[0] else 1
    shape = list(source.shape)
    shape[axis] = max(2, min(shape[:2]) // 100)
    gap = np.full(shape, 255, np.uint8)
    joined = np.concatenate([masks.outline_mask(source, mask), gap, image], axis=axis)
    return _encode(loaded, Image.fromarray(joined), WRITTEN[suffix])


def _convert(image: Image.Image, mode: str, info: Mapping | None = None) -> Image.Image:
    converted = image.convert(mode)
    converted.info |= image.info if info is None else info
    return converted


def _encode(loaded: Loaded, image: Image.Image, kind: str) -> bytes:
    kept = {name: image.info[name] for name in ("icc_profile", "exif") if image.info.get(name)}
    if image.mode[0] in "LI":
        kept.pop("icc_profile", None)  # of RGB
    options = {
        "PNG": {"compress_level": 1},
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"quality": 95, "exact": True},
    }[kind]
    stream = io.BytesIO()
    try:
        image.save(stream, kind, **options, **kept)
    except (ValueError, OSError) as error:  # WebP ends at 16383 px, JPEG's EXIF at 64 KB
        raise Unusable(f"{loaded.item.source} cannot be written as {kind} ({error})") from None
    return stream.getvalue()


def copy_source(loaded: Loaded, suffix: str) -> bytes:
    """The bytes of a result from which nothing is removed: its image's, in the same format."""
    if loaded.format == WRITTEN[suffix]:
        return loaded.item.source.read_bytes()
    return encode_result(loaded, loaded.given.image, suffix)


def name_side_by_side(output: str) -> str:
    """What the comparison beside a result is called."""
    path = Path(output)
    return f"{path.stem}_side_by_side{path.suffix}"
