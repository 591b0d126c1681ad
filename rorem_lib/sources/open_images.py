"""OpenImages V7: images and masks of single objects; a pool without GT.

The files are those of the download page of the Open Images Dataset V7, "Segmentations": a CSV of
masks a split, the masks in 16 archives by the first digit of the image's id, the class names. A
mask's non-zero pixels are the object; it is seldom of its image's size and is resized to it with
nearest neighbours. RORem takes these masks, without the classes of clothes and of body parts, at
most 500 a class; how it chose among them is not said, here a hash does. What became of every row
of the CSV is counted: see `OpenImagesSource.summary`.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import cv2
import numpy as np
import pandas as pd

from rorem_lib.data.items import (
    Item,
    Picture,
    Pictures,
    Rejected,
    Source,
    SourceError,
    check_shape,
    make_id,
    open_picture,
    read_split,
)
from rorem_lib.data.masks import dilate_mask, resize_mask
from rorem_lib.data.pictures import AGAIN

# Both are read off the hierarchy of the 600 classes with boxes (the 350 with masks are among them).
# What is below Clothing, but for bags and umbrellas: these are things of their own.
CLOTHES = frozenset(
    (
        "Baseball glove, Belt, Bicycle helmet, Boot, Brassiere, Clothing, Coat, Cowboy hat, Crown, "
        "Dress, Earrings, Fashion accessory, Fedora, Football helmet, Footwear, Glasses, Glove, "
        "Goggles, Hat, Helmet, High heels, Jacket, Jeans, Miniskirt, Necklace, Roller skates, "
        "Sandal, Scarf, Shirt, Shorts, Skirt, Sock, Sombrero, Sports uniform, Suit, Sun hat, "
        "Sunglasses, Swim cap, Swimwear, Tiara, Tie, Trousers, Watch"
    ).split(", ")
)
# The parts of Person.
BODY_PARTS = frozenset(
    (
        "Human arm, Human beard, Human body, Human ear, Human eye, Human face, Human foot, Human "
        "hair, Human hand, Human head, Human leg, Human mouth, Human nose, Skull"
    ).split(", ")
)

_SPLITS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
_TABLE = "annotations-object-segmentation"
# Where people put a split's masks and images, and the folders in there by the ids' first digits.
_LAYOUTS = {
    "masks": (
        "{name}/labels/masks|{name}/labels|{name}/masks|{name}|{name}-masks|masks/{name}|masks|",
        "{name}-masks-{{c}}|{{C}}|{{c}}|",
    ),
    "images": (
        "{name}/data|{name}/images|{name}|images/{name}|images|data|",
        "{name}_{{c}}|{{c}}|",
    ),
}
_PLACES = (".", "annotations", "metadata")  # where people put the CSV files
_TEXTS = ["MaskPath", "ImageID", "LabelName", "BoxID"]
_NUMBERS = ["BoxXMin", "BoxXMax", "BoxYMin", "BoxYMax", "PredictedIoU"]
_CHUNK = 200_000  # rows in memory at a time; the CSV of the training split has 2.7 million
_SPARE = 3  # times `per_class` masks are kept of a class until `per_image` has taken its share


class _Folder(NamedTuple):
    """Where files lie; `leaf` has {c} or {C} where folders are named after ids' first digits."""

    base: str
    leaf: str

    def of(self, image_id: str) -> Path:
        return Path(self.base, self.leaf.format(c=image_id[0], C=image_id[0].upper()))


class _Place(NamedTuple):
    mask: str
    image: str
    label: str
    box: str
    name: str
    mask_folders: tuple[_Folder, ...]
    image_folders: tuple[_Folder, ...]


@dataclass(frozen=True)
class OpenImagesSource(Source):
    """Images of OpenImages, each with the mask of one object.

    Of all masks that pass, those with the smallest hash of (seed, image, box) are taken, split by
    split: neither the order of the CSV nor another split's file changes the choice, and of a longer
    CSV the same masks are taken as long as no new one comes before them.

    Attributes:
        folder: what was downloaded, in one of the layouts of `layout`.
        annotations, masks, images, class_names: the CSV of the masks, the folder of the masks, that
            of the images, the CSV of the class names, where they lie elsewhere; below `folder` or
            absolute.
        exclude: display names of classes that are left out; upper and lower case are the same.
        per_class: at most so many masks of a class; 0 takes all, and then all are held in memory.
        per_image: at most so many masks of an image; 0 takes all.
        min_area, max_area: the share of the image that the mask's box covers, 0..1.
        min_iou: the least PredictedIoU, 0..1; masks without one (drawn, not predicted) pass.
        max_size: images are made smaller until no side has more pixels; 0 keeps them.
        dilate: widens the masks as `masks.dilate_mask`, in pixels.
        downloaded_only: choose among the images that are there, for a download of a part.
        seed: another one chooses other masks.
    """

    folder: str
    annotations: str = ""
    masks: str = ""
    images: str = ""
    class_names: str = ""
    exclude: tuple[str, ...] = tuple(sorted(CLOTHES | BODY_PARTS))
    per_class: int = 500
    per_image: int = 1
    min_area: float = 0.0
    max_area: float = 1.0
    min_iou: float = 0.0
    max_size: int = 0
    dilate: int = 0
    downloaded_only: bool = False
    seed: int = 0

    name: ClassVar[str] = "open_images"
    origin: ClassVar[str] = "OpenImages V7"
    license: ClassVar[str] = "images CC-BY-2.0, annotations CC-BY-4.0"
    layout: ClassVar[str] = (
        "<split>-annotations-object-segmentation.csv and class-descriptions.csv, masks in "
        "<split>-masks-<0-f>/ and images in <split>/ (or all flat), or <split>/{data,labels,"
        "metadata} as FiftyOne writes them; <split> is train, validation or test"
    )
    has_gt: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "_counts", Counter())  # of the listing; no option
        if self.min_area >= self.max_area:
            raise ValueError(
                f"min_area must be below max_area, not {self.min_area} and {self.max_area}"
            )

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        folder = Path(folder)
        return bool(_glob(folder, *(f"{place}/*{_TABLE}*.csv" for place in _PLACES))) or any(
            (folder / name / "labels").is_dir() and (folder / name / "metadata").is_dir()
            for names in _SPLITS.values()
            for name in names
        )

    # ------------------------------------------------------------------------------------ listing

    def list_items(self) -> Iterator[Item]:
        tables = self._find_tables()
        if not tables:
            raise self.refuse_layout()
        names = self._read_names()
        folders = {
            split: (self._find_folders(split, "masks"), self._find_folders(split, "images"))
            for split in tables
        }
        counts = Counter()
        object.__setattr__(self, "_counts", counts)
        for split, paths in tables.items():
            present = _list_ids(folders[split][1]) if self.downloaded_only else None
            chosen = self._choose(paths, names, present, counts)
            counts["listed"] += len(chosen)
            for row in chosen[[*_TEXTS, "name"]].itertuples(index=False):
                place = _Place(*row, *folders[split])
                name = make_id(place.mask.rsplit(".", 1)[0])
                yield Item(name, place.image, place, split and read_split(split))

    def summarise(self) -> dict[str, int]:
        """What became of the rows of the CSV, once `list_items` has run to its end; else empty.

        Returns:
            `rows`, `listed` and, where there were any, the rows left out by their reason: `damaged
            row`, `class without a name`, `excluded class`, `small box`, `large box`, `low IoU`,
            `image not there`, `row given twice`, `over the cap`, `another mask of its image`.
            `rows` is the sum of all others.
        """
        return {reason: count for reason, count in self._counts.items() if count}

    def _find_tables(self) -> dict[str | None, list[Path]]:
        """The CSV files of masks by split; None is an unknown split."""
        root = Path(self.folder)
        if self.annotations:
            path = self._named("annotations")
            words = [*re.split("[-_.]", path.name), *path.parts[-2:-4:-1]]
            found = (split for word in words for split, x in _SPLITS.items() if word in x)
            return {next(found, None): [path]}
        tables = {}
        for split, names in _SPLITS.items():
            places = [(name, place) for name in names for place in (*_PLACES, name)]
            found = _glob(root, *(f"{place}/*{name}-{_TABLE}*.csv" for name, place in places))
            # FiftyOne has it as labels/segmentations.csv, SmartEraser among the metadata
            others = (f"{name}/{place}/*.csv" for name in names for place in ("labels", "metadata"))
            tables[split] = found or [
                x for x in _glob(root, *others) if "MaskPath" in _read_header(x)
            ]
        return {split: found for split, found in tables.items() if found}

    def _read_names(self) -> dict[str, str] | None:
        """Display names by label; None where nothing needs them and they are not there."""
        root = Path(self.folder)
        places = [*_PLACES, *(f"{name}/metadata" for names in _SPLITS.values() for name in names)]
        patterns = ("*class-descriptions*.csv", "classes.csv")
        files = [self._named("class_names")] if self.class_names else []
        files = files or _glob(root, *(f"{place}/{x}" for place in places for x in patterns))
        names: dict[str, str] = {}
        for path in files:
            with open(path, newline="", encoding="utf-8-sig", errors="replace") as stream:
                for row in csv.reader(stream):  # a header's first cell is no label
                    if len(row) > 1 and row[0].startswith("/"):
                        names.setdefault(row[0], row[1])
        if not names and self.exclude:
            raise SourceError(
                f"{', '.join(map(str, files)) or root} holds no class names, so no class can be "
                "left out: download class-descriptions.csv (LabelName,DisplayName) into "
                f"{root}, name the file with class_names, or set exclude to an empty list"
            )
        known = {name.casefold() for name in names.values()}
        wrong = [
            name
            for name in self.exclude
            if name not in CLOTHES | BODY_PARTS and name.casefold() not in known
        ]
        if wrong:
            raise SourceError(
                f"exclude names {', '.join(wrong)}, but no class in "
                f"{', '.join(map(str, files))} is called so: mend the spelling"
            )
        return names or None

    def _named(self, option: str) -> Path:
        path = Path(self.folder, getattr(self, option))
        if not path.exists():
            raise SourceError(f"{path} does not exist: mend the option {option}")
        return path

    def _find_folders(self, split: str | None, kind: str) -> tuple[_Folder, ...]:
        """Where a split's masks or images lie: every folder that holds some."""
        root = Path(self.folder)
        masks, found = kind == "masks", []
        for name in _SPLITS.get(split, ("train",)):
            bases, leaves = (text.format(name=name).split("|") for text in _LAYOUTS[kind])
            bases = [root / base for base in bases]
            if getattr(self, kind):
                bases = [self._named(kind), self._named(kind) / name]
            found += [
                folder
                for base in bases
                if base.is_dir()
                for folder in (_Folder(str(base), leaf) for leaf in leaves)
                if any(_holds(path, ".png" if masks else ".jpg") for path in _expand(folder))
            ]
        if not found:
            what = (
                f"masks (unzip {name}-masks-0.zip to -f.zip into folders of these names)"
                if masks
                else f"images (<ImageID>.jpg in {name}/)"
            )
            raise SourceError(
                f"{root} has a CSV of {split or 'masks'} but holds no {what}: add "
                f"them, name their folder with {kind}, or move the CSV away"
            )
        return tuple(dict.fromkeys(found))

    # ----------------------------------------------------------------------------------- choosing

    def _choose(
        self,
        paths: list[Path],
        names: dict[str, str] | None,
        present: set[str] | None,
        counts: Counter,
    ) -> pd.DataFrame:
        """The rows to take of one split's CSV, sorted by MaskPath; counts the others."""
        kept = []
        room = self.per_class * (_SPARE if self.per_image else 1)
        for path in paths:
            for rows in _read_chunks(path):
                counts["rows"] += len(rows)
                rows = self._filter(rows, names, present, counts)
                rows["hash"] = pd.util.hash_array(
                    (rows["ImageID"] + " " + rows["BoxID"]).to_numpy(object),
                    categorize=False,
                    hash_key=hashlib.sha256(str(self.seed).encode()).hexdigest()[:16],
                )
                rows = pd.concat([*kept, rows[[*_TEXTS, "name", "hash"]]], ignore_index=True)
                rows = _drop(rows, ~rows["MaskPath"].duplicated(), "row given twice", counts)
                rows = rows.sort_values(["hash", "MaskPath"])
                if self.per_class:
                    rank = rows.groupby("LabelName").cumcount()
                    rows = _drop(rows, rank < room, "over the cap", counts)
                kept = [rows]
        rows = kept[0]
        of_class, of_image, taken = Counter(), Counter(), []
        for label, image in zip(rows["LabelName"], rows["ImageID"]):
            full = self.per_class and of_class[label] >= self.per_class
            twice = self.per_image and of_image[image] >= self.per_image
            counts["over the cap"] += bool(full)
            counts["another mask of its image"] += bool(twice and not full)
            taken.append(not full and not twice)
            of_class[label] += taken[-1]
            of_image[image] += taken[-1]
        return rows[np.array(taken, bool)].sort_values("MaskPath")

    def _filter(
        self,
        rows: pd.DataFrame,
        names: dict[str, str] | None,
        present: set[str] | None,
        counts: Counter,
    ) -> pd.DataFrame:
        sound = rows[_TEXTS].notna().all(axis=1)
        for column in ("MaskPath", "ImageID"):  # they become paths
            sound &= rows[column].str.fullmatch(r"[\w-][\w.-]*", na=False)
        rows = _drop(rows, sound, "damaged row", counts).copy()
        rows["name"] = rows["LabelName"].map(names) if names else rows["LabelName"]
        rows = _drop(rows, rows["name"].notna(), "class without a name", counts)
        excluded = {name.casefold() for name in self.exclude}
        rows = _drop(rows, ~rows["name"].str.casefold().isin(excluded), "excluded class", counts)
        for reason, is_out in (
            ("small box", lambda rows: _box_area(rows) < self.min_area),
            ("large box", lambda rows: _box_area(rows) > self.max_area),
            ("low IoU", lambda rows: rows["PredictedIoU"] < self.min_iou),
        ):
            rows = _drop(rows, ~is_out(rows), reason, counts)
        if present is not None:
            there = np.fromiter((image in present for image in rows["ImageID"]), bool, len(rows))
            rows = _drop(rows, there, "image not there", counts)
        return rows.copy()

    # ------------------------------------------------------------------------------------ opening

    def load_item(self, item: Item) -> Pictures:
        place = _Place(*item.place)
        path = _find_file(place.image_folders, place.image, f"{place.image}.jpg")
        mask_path = _find_file(place.mask_folders, place.image, place.mask)
        picture, mask = open_picture(path), open_picture(mask_path, "L").array
        check_shape(mask, picture.array, mask_path)
        mask = np.where(mask > 0, 255, 0).astype(np.uint8)
        height, width = picture.array.shape[:2]
        if self.max_size and max(height, width) > self.max_size:
            scale = self.max_size / max(height, width)
            height, width = (max(1, round(side * scale)) for side in (height, width))
            small = cv2.resize(picture.array, (width, height), interpolation=cv2.INTER_AREA)
            picture = Picture(small)
        mask = dilate_mask(resize_mask(mask, height, width), self.dilate)
        extra = {"class": place.name, "label": place.label, "box": place.box}
        return Pictures(picture, Picture(mask), None, path, extra)


def _box_area(rows: pd.DataFrame) -> pd.Series:
    return (rows["BoxXMax"] - rows["BoxXMin"]) * (rows["BoxYMax"] - rows["BoxYMin"])


def _drop(rows: pd.DataFrame, good, reason: str, counts: Counter) -> pd.DataFrame:
    left = rows[good]
    counts[reason] += len(rows) - len(left)
    return left


def _glob(root: Path, *patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted(root.glob(pattern))]


def _read_header(path: Path) -> list[str]:
    with open(path, encoding="utf-8-sig", errors="replace") as stream:
        return stream.readline(10_000).strip().split(",")


def _read_chunks(path: Path) -> Iterator[pd.DataFrame]:
    """The columns in use, some rows at a time; PredictedIoU may be missing."""
    missing = [column for column in _TEXTS + _NUMBERS[:4] if column not in _read_header(path)]
    if missing:
        raise SourceError(
            f"{path} has no column {', '.join(missing)}: expected the CSV of the "
            f"object segmentations ({','.join(_TEXTS + _NUMBERS)},Clicks)"
        )
    types = {column: str for column in _TEXTS} | {column: np.float32 for column in _NUMBERS}
    try:
        for rows in pd.read_csv(
            path,
            usecols=lambda column: column in types,
            dtype=types,
            chunksize=_CHUNK,
            encoding="utf-8-sig",
        ):
            yield rows.reindex(columns=[*types])
    except (ValueError, pd.errors.ParserError) as error:
        raise SourceError(f"{path} is damaged ({error}): {AGAIN}") from None


def _expand(folder: _Folder) -> list[Path]:
    return sorted({folder.of(digit) for digit in "0123456789abcdef"})


def _holds(folder: Path, ending: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.name.endswith(ending) for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _list_ids(folders: tuple[_Folder, ...]) -> set[str]:
    return {
        name[:-4]
        for folder in folders
        for path in _expand(folder)
        if path.is_dir()
        for name in os.listdir(path)
        if name.endswith(".jpg")
    }


def _find_file(folders: tuple[_Folder, ...], image_id: str, name: str) -> Path:
    paths = [folder.of(image_id) / name for folder in folders]
    for path in paths:
        if path.is_file():
            return path
    raise Rejected(
        "missing file",
        f"{paths[0]} does not exist"
        + (f", nor is it in {', '.join(str(path.parent) for path in paths[1:])}" * (len(paths) > 1))
        + ": download it, or set downloaded_only if only a part was downloaded",
    )
