"""Which files `rorem remove` is asked for: each image's mask, and where its result goes."""

from __future__ import annotations

import functools
import glob
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rorem_lib.data.items import SUFFIXES, escape_text
from rorem_lib.runner.remove_results import list_results

READ = (*SUFFIXES, ".gif", ".avif", ".heic", ".heif")  # what a folder is searched for
WRITTEN = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MASK_ENDS = ("_mask", "-mask")  # what the stem of a mask may have more than its image's


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


def plan(
    words: Sequence[str], mask: str | None, *, output: str | None, suffix: str | None
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
    sources = list_images(words)
    if mask is not None and not Path(mask).exists():
        raise ValueError(f"there is no mask {mask}")
    per_image = mask is not None and Path(mask).is_dir()
    if per_image:  # masks may lie beside their images
        inside, named = os.path.realpath(mask), set(map(os.path.abspath, words))
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
        items = _add_masks(items, Path(mask))
    return folder, _find_collisions(items)


def list_images(words: Iterable[str]) -> list[Path]:
    """The images that the words name, each once: files, folders (not those in them), patterns.

    In folders and patterns, hidden files, files of other kinds and this command's own results are
    passed over. A file named in full is taken as it is, even where it does not exist.

    Raises:
        ValueError: a folder or a pattern has no image.
    """
    found: dict[str, Path] = {}
    list_own = functools.cache(list_results)
    for word in words:
        paths = [Path(word)]
        is_folder = paths[0].is_dir()
        if is_folder or (glob.has_magic(word) and not paths[0].exists()):
            paths = paths[0].iterdir() if is_folder else map(Path, glob.glob(word, recursive=True))
            paths = [p for p in sorted(paths) if _is_image(p)]
            paths = [p for p in paths if escape_text(p.name) not in list_own(p.parent)]
            if not paths:
                kind = "folder" if is_folder else "pattern"
                raise ValueError(f"the {kind} {word} has no image ({', '.join(READ)}) to work on")
        for path in paths:
            found.setdefault(os.path.abspath(path), path)
    return list(found.values())


def _is_image(path: Path) -> bool:
    """Whether a file is taken for an image, by its name."""
    return path.suffix.lower() in READ and not path.name.startswith(".") and not path.is_dir()


def _fold(text: str) -> str:
    """A name as all file systems compare it: composed and in small letters."""
    return unicodedata.normalize("NFC", text).casefold()


def _cut_end(stem: str) -> str:
    """A stem without what makes it a mask's."""
    end = next((end for end in MASK_ENDS if stem.casefold().endswith(end)), "")
    return stem[: len(stem) - len(end)]


def _add_masks(items: Sequence[Item], folder: Path) -> list[Item]:
    """The items with their masks, by name: `photo.png`, `photo_mask.png` or `photo.jpg.png`."""
    taken = {os.path.abspath(item.source) for item in items}
    masks: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if _is_image(path) and os.path.abspath(path) not in taken:
            for stem in {path.stem, _cut_end(path.stem)}:
                masks.setdefault(_fold(stem), []).append(path)

    def find(source: Path) -> dict:
        found = masks.get(_fold(source.name)) or masks.get(_fold(source.stem), [])
        for fits in (lambda p: p.name == source.name, lambda p: p.stem == source.stem):
            found = list(filter(fits, found)) or found
        if len(found) == 1:
            return {"mask": found[0]}
        if found:
            several = " and ".join(map(str, found))
            return {"fault": f"{source} has several masks, {several}: leave one"}
        return {
            "fault": f"{source} has no mask in {folder}: give it one named {source.stem}.png, "
            "white where something is to be removed"
        }

    return [replace(item, **find(item.source)) for item in items]


def _choose_output(
    source: Path | None, output: str | None, suffix: str | None
) -> tuple[Path, str | None, str]:
    """Folder and, for one image whose result is named, name of the results; their suffix."""
    chosen = suffix or ".png"
    if output is None:
        if source is None:
            return Path("removed"), None, chosen
        return source.parent, f"{source.stem}_removed{chosen}", chosen
    path, given = Path(output), Path(output).suffix.lower()
    if path.is_dir() or output.endswith(("/", os.sep)) or not given:
        return path, None, chosen
    if given not in WRITTEN:
        raise ValueError(
            f"{output}: results are written as {', '.join(WRITTEN)}; a new folder whose name has "
            f"a dot is named with a slash at its end, {output}/"
        )
    if source is None:
        raise ValueError(f"{output} is the name of one file: name a folder for several images")
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


def _find_collisions(items: Sequence[Item]) -> list[Item]:
    """The items; those whose results would have one name have a fault."""
    by_name: dict[str, list[Path]] = {}
    for item in items:
        by_name.setdefault(_fold(item.output), []).append(item.source)

    def check(item: Item) -> Item:
        sources = by_name[_fold(item.output)]
        if len(sources) == 1 or item.fault:
            return item
        fault = (
            f"{sources[0]} and {sources[1]} would both become {item.output}: work on one folder at "
            "a time, each with an -o of its own"
        )
        return replace(item, fault=fault)

    return [check(item) for item in items]
