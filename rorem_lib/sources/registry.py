"""Which importers there are, and which of them a folder is for."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

from rorem_lib.data.items import Source, SourceError, list_folders
from rorem_lib.data.pictures import describe_content, read_head
from rorem_lib.sources.composites import CompositesSource
from rorem_lib.sources.high_resolution import HighResolutionSource
from rorem_lib.sources.mulan import MulanSource
from rorem_lib.sources.open_images import OpenImagesSource
from rorem_lib.sources.paired import (
    CorneSource,
    OberSource,
    OmniEraserSource,
    PairedSource,
    RemovalBenchSource,
    SmartEraserSource,
)
from rorem_lib.sources.parquet import ParquetSetSource
from rorem_lib.sources.rord import RordSource
from rorem_lib.sources.upstream import UpstreamSource

CLASSES: dict[str, type[Source]] = {
    kind.name: kind
    for kind in (
        RordSource,
        MulanSource,
        OpenImagesSource,
        HighResolutionSource,
        CompositesSource,
        UpstreamSource,
        ParquetSetSource,
        OberSource,
        SmartEraserSource,
        RemovalBenchSource,
        OmniEraserSource,
        CorneSource,
        PairedSource,
    )
}
_DEPTH = 3  # levels of folders that are searched for a layout
_MOST_FOLDERS = 200  # on a level: a layout begins among few folders


def discover_source(folder: str | Path, name: str = "auto") -> tuple[str, Path]:
    """Which importer a folder is for, and where in it the layout begins.

    Archives often hold their data a few folders down, so up to three levels are searched.

    Args:
        folder: raw data.
        name: look for the layout of this importer alone.

    Returns:
        (the importer's name, the folder to give it).

    Raises:
        SourceError: no layout is found, or several on one level; says what each expects.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SourceError(f"{folder} is no folder: give the folder of the raw data")
    kinds = CLASSES if name == "auto" else {name: CLASSES[name]}
    level = [folder]
    for _ in range(_DEPTH + 1):
        found = [
            (kind, place)
            for place in level
            for kind, importer in kinds.items()
            if importer.recognises(place)
        ]
        if len(found) == 1:
            return found[0]
        if found and name == "auto":
            listed = "; ".join(f"source={kind}, {place}" for kind, place in found[:6])
            raise SourceError(
                f"{folder} can be read in {len(found)} ways: say which source and "
                f"which folder: {listed}"
            )
        level = [inner for place in level for inner in list_folders(place)][:_MOST_FOLDERS]
    if name != "auto":
        return name, folder  # the importer itself says best what it misses
    for path in itertools.islice(folder.rglob("*"), _MOST_FOLDERS):
        if (head := read_head(path)).startswith(b"version https://git-lfs"):  # a clone without it
            raise SourceError(f"{path} is {describe_content(head)}")
    shown = sorted(path.name for path in folder.iterdir())
    layouts = "\n".join(f"  {kind}: {importer.layout}" for kind, importer in kinds.items())
    raise SourceError(
        f"{folder} has none of the layouts that can be imported; it holds "
        f"{', '.join(shown[:8]) or 'nothing'}. Known are\n{layouts}"
    )


def open_source(name: str, folder: str | Path, **options) -> Source:
    """An importer with its options.

    Args:
        name: one of `CLASSES`, or "auto" to look at the folder.
        folder: the raw data.
        options: the importer's own, see its docstring.

    Raises:
        SourceError: no such importer, no such folder, or an option it has not.
        ValueError: an option's value is out of its range.
    """
    if name not in ("auto", *CLASSES):
        raise SourceError(f"there is no source {name!r}: take auto, or one of {', '.join(CLASSES)}")
    name, folder = discover_source(folder, name)
    kind = CLASSES[name]
    known = {
        field.name: field.default for field in dataclasses.fields(kind) if field.name != "folder"
    }
    unknown = options.keys() - known.keys()
    if unknown:
        listed = ", ".join(f"{key}={value!r}" for key, value in known.items())
        raise SourceError(
            f"the source {name} has no option {', '.join(sorted(unknown))}; it has "
            f"{listed or 'none'}"
        )
    return kind(str(folder), **options)
