"""RORD: videos of real scenes, each with a plate without the objects (BMVC 2022, Forty-lock/RORD).

Three layouts of it are around, and all are found from the folder, its `RORD` folder or one part:

1. the distributor's: `<part>/jpg/<scene>/*.jpg`, the last one the plate, with the labels
   `<part>/M/<scene>/<stem>_M.json`. The GT is blended here: each labelled polygon is filled with
   the plate's luma (Poisson), the chroma is the plate's everywhere;
2. 960x540: `{train,val}/{img,gt,mask,label}/<scene>/` with `<stem>.jpg`, a blended `<stem>.jpg`,
   a coarse `<stem>_M.png` and `<stem>.json`; `img/<scene>` also holds the plate `*G0001.jpg`;
3. 480x270: `{train,test}/{img,gt,mask}/<stem>.png`, what the authors' preprocessing writes.

The label's polygons are exact; the coarse masks of layout 2 include shadows. Layout 1 has labels
alone. Layout 3 has masks alone, drawn from the polygons of all classes.

Mask files of layouts 2 and 3 are published black = hole, but copies of either kind are around, so
the hole is recognised in each file: it is the side where source and GT differ more (mean absolute
difference). Where the two means are less than a grey level apart, which compression alone can do,
it is the smaller side. A file that had to be turned has `mask_inverted` true in its record.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import cv2
import numpy as np

from rorem_lib.data.items import (
    Item,
    Picture,
    Pictures,
    Rejected,
    Source,
    SourceError,
    list_folders,
    make_id,
    open_picture,
)
from rorem_lib.data.masks import dilate_mask
from rorem_lib.data.pictures import AGAIN, TripletError, describe_content, read_head

_SPLITS = {"train": "train", "val": "test", "test": "test"}
_ENDINGS = (".jpg", ".jpeg", ".png")
_EVIDENCE = 1.0  # grey levels; a smaller difference is compression noise
_FAR = 100_000  # px: where a corner may lie
_PADDING = 10  # px around the luma while it is inpainted, as the authors have it


class _Place(NamedTuple):
    part: str
    pictures: str  # "jpg" or "img"
    scene: str  # the folder below; empty in layout 3
    name: str
    plate: str | None


@dataclass(frozen=True)
class RordSource(Source):
    """Triplets of RORD; a scene's folder is a video and a group.

    Attributes:
        folder: the data, `RORD`'s parent, `RORD`, one distributor's part, or `train` or `val`.
        frames: 0 takes the middle frame of each video (RORem took one of each), n every n-th from
            the first on.
        mask: "label" (polygons) or "coarse" (with shadows); the other one where a frame lacks it.
            The record's `mask_kind` says which it was; layout 3 counts as "label".
        gt: "blended" or "plate" (drifts by 2 to 4 grey levels); the other one where a frame lacks
            it. The record's `gt_kind` says which it was; layout 3 has "blended" alone.
        classes: beginnings of the Class_ID to remove: `F*` are removable, `BO*` background. Mask
            files are not drawn anew for it.
        dilate: side of the kernel in px that widens the finished mask; 0 leaves it.
        size: width and height in px to resize to (images by area, masks nearest); None keeps.

    Raises:
        ValueError: an option has no such value.
    """

    folder: str
    frames: int = 0
    mask: str = "label"
    gt: str = "blended"
    classes: tuple[str, ...] = ("F",)
    dilate: int = 0
    size: tuple[int, int] | None = None

    name: ClassVar[str] = "rord"
    origin: ClassVar[str] = "RORD"
    license: ClassVar[str] = "AI-Hub terms of use"
    layout: ClassVar[str] = (
        "<part>/jpg/<scene>/*.jpg with <part>/M/<scene>/*_M.json, or "
        "{train,val}/{img,gt,mask,label}/<scene>/, or "
        "{train,test}/{img,gt,mask}/*.png"
    )
    choices = {"mask": ("label", "coarse"), "gt": ("blended", "plate")}

    def __post_init__(self):
        super().__post_init__()
        if not self.classes:
            raise ValueError("classes must be beginnings of class ids, such as ('F',), not empty")
        if self.size is not None and not (
            isinstance(self.size, tuple)
            and len(self.size) == 2
            and all(type(v) is int and v > 0 for v in self.size)
        ):
            raise ValueError(f"size must be (width, height) in px or None, not {self.size!r}")

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        bare = _find_parts(Path(folder), labelled=False)
        return bool(_find_parts(Path(folder)) or bare)

    def list_items(self) -> Iterator[Item]:
        parts = _find_parts(Path(self.folder))
        if bare := [] if parts else _find_parts(Path(self.folder), labelled=False):
            pictures = _pictures_of(bare[0])
            missing = "M/ with the labels" if pictures == "jpg" else "label/ or mask/"
            raise SourceError(
                f"{bare[0]} has {pictures}/ but not {missing}: RORD's masks are downloads of their "
                f"own, unpack them beside {pictures}/"
            )
        if not parts:
            raise self.refuse_layout()
        listed = False
        for part in parts:
            pictures = _pictures_of(part)
            split = _SPLITS.get(part.name.lower()) if pictures == "img" else None
            for group, scene, frames, plate in _list_videos(part / pictures):
                chosen = frames[:: self.frames] if self.frames else [frames[len(frames) // 2]]
                for frame in chosen:
                    listed = True
                    yield Item(
                        make_id(part.name, *filter(None, (scene, Path(frame).stem))),
                        group,
                        _Place(str(part), pictures, scene, frame, plate),
                        split,
                    )
        if not listed:
            raise SourceError(
                f"{self.folder} has the folders of RORD but no frame in them: unpack "
                f"the archives, so that there is {self.layout}"
            )

    def load_item(self, item: Item) -> Pictures:
        place: _Place = item.place
        part, stem = Path(place.part), Path(place.name).stem
        file = part / place.pictures / place.scene / place.name
        source = open_picture(file)
        height, width = source.array.shape[:2]
        raw = place.pictures == "jpg"
        label = _find(part / ("M" if raw else "label"), place.scene, stem, ("_M.json", ".json"))
        coarse = _find(part / "mask", place.scene, stem, ("_M.png", ".png"))
        if not (label or coarse):
            raise Rejected("no mask", f"{file} has no label" + " and no mask" * (not raw))
        if coarse and (self.mask == "coarse" or not label):
            label = None
        classes, polygons = _read_label(label, self.classes, height, width) if label else ([], [])
        if label and not polygons:
            raise Rejected(
                "no object", f"{label} has no polygon of the classes {', '.join(self.classes)}"
            )
        gt, gt_kind = self._open_gt(place, stem, source, polygons)
        extra = {"gt_kind": gt_kind}
        if label:
            mask = Picture(np.zeros((height, width), np.uint8))
            for polygon in polygons:
                cv2.fillPoly(mask.array, [polygon], 255)
            extra |= {"mask_kind": "label", "classes": classes}
        else:
            mask, inverted = _open_mask(coarse, source.array, gt.array)
            extra |= {"mask_kind": "coarse" if place.scene else "label", "mask_inverted": inverted}
        if number := re.search(r"_F(\d+)$", stem):
            extra["frame"] = int(number[1])
        # Unequal sizes stay unequal, so that they are found.
        if self.size and gt.array.shape[:2] == mask.array.shape == (height, width):
            source, gt = (_resize(picture, self.size, cv2.INTER_AREA) for picture in (source, gt))
            mask = _resize(mask, self.size, cv2.INTER_NEAREST)
        if self.dilate:
            mask = Picture(dilate_mask(mask.array, self.dilate))
        return Pictures(source, mask, gt, file, extra)

    def _open_gt(
        self, place: _Place, stem: str, source: Picture, polygons: list[np.ndarray]
    ) -> tuple[Picture, str]:
        part = Path(place.part)
        blended = _find(part / "gt", place.scene, stem, _ENDINGS)
        if blended and (self.gt == "blended" or not place.plate):
            return open_picture(blended), "blended"
        if not place.plate:
            raise Rejected(
                "no GT",
                f"{part / place.pictures / place.scene / place.name} has neither a GT nor a plate",
            )
        plate = open_picture(part / place.pictures / place.scene / place.plate)
        if place.pictures == "img" or self.gt == "plate" or plate.array.shape != source.array.shape:
            return plate, "plate"
        return Picture(_blend_plate(source.array, plate.array, polygons)), "blended"


# --------------------------------------------------------------------------------- finding files


def _find_parts(folder: Path, labelled: bool = True) -> list[Path]:
    """The folders that hold `jpg` and `M`, or `img` and `mask` or `label`; or images alone."""
    folder = folder.absolute()  # "." has no name
    roots = [folder, *(path for path in list_folders(folder) if "rord" in path.name.lower())]
    for root in roots:
        parts = [
            path
            for path in (root, *list_folders(root))
            if _pictures_of(path) == "jpg"
            or _pictures_of(path) == "img"
            and (path == root or path.name.lower() in _SPLITS)
        ]
        # A part that lacks its labels beside one that has them stays: its frames are refused.
        if not labelled and any(map(_has_scenes, parts)):
            return parts
        if any(
            (path / labels).is_dir()
            for path in parts
            for labels in (("M",) if _pictures_of(path) == "jpg" else ("mask", "label"))
        ):
            return parts
    return []


def _pictures_of(part: Path) -> str | None:
    return next((name for name in ("jpg", "img") if (part / name).is_dir()), None)


def _has_scenes(part: Path) -> bool:
    """Whether the images of a part, or their folders, are named as RORD's scenes are."""
    with os.scandir(part / _pictures_of(part)) as entries:
        return any(re.match(r"I-\d+_", entry.name) for entry in itertools.islice(entries, 50))


def _list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the folders and of the images in it, sorted."""
    with os.scandir(folder) as entries:
        seen = [(entry.name, entry.is_dir()) for entry in entries if entry.name[0] != "."]
    return (
        sorted(name for name, is_dir in seen if is_dir),
        sorted(name for name, is_dir in seen if not is_dir and name.endswith(_ENDINGS)),
    )


def _list_videos(pictures: Path) -> Iterator[tuple[str, str, list[str], str | None]]:
    """Group, folder, frames (one or more) and plate of each video in `jpg` or `img`."""
    scenes, names = _list_folder(pictures)
    for scene in scenes:
        found = _list_folder(pictures / scene)[1]
        plates = (
            found[-1:]
            if pictures.name == "jpg"
            else [name for name in found if Path(name).stem.endswith("G0001")]
        )
        if frames := [name for name in found if name not in plates]:
            yield scene, scene, frames, plates[-1] if plates else None
    if pictures.name == "img":

        def scene_of(name: str) -> str:  # all before the frame's number, or a video of one
            return re.sub(r"_F\d+$", "", Path(name).stem)

        for scene, found in itertools.groupby(
            sorted(names, key=lambda n: (scene_of(n), n)), scene_of
        ):
            yield scene, "", list(found), None


def _find(folder: Path, scene: str, stem: str, endings: tuple[str, ...]) -> Path | None:
    """The file of a frame, in its scene's folder or right in `folder`."""
    paths = (where / (stem + ending) for where in (folder / scene, folder) for ending in endings)
    return next((path for path in paths if path.is_file()), None)


# ------------------------------------------------------------------------------ labels and masks


def _read_label(
    path: Path, classes: tuple[str, ...], height: int, width: int
) -> tuple[list[str], list[np.ndarray]]:
    """The classes and the polygons (int32 [N, 2], px of the image) that are to be removed."""
    try:
        label = json.loads(path.read_text(encoding="utf-8-sig"))
        across, down = map(int, re.findall(r"\d+", label["Raw_Data_Info."]["Resolution"]))
        if not (down and 0.98 < across * height / (down * width) < 1.02):
            raise ValueError(f"drawn on {across}x{down} px, its image has {width}x{height}")
        found, polygons = set(), []
        for annotation in label["Learning_Data_Info."]["Annotation"]:
            points = annotation["segmentation"]
            if not annotation["Class_ID"].startswith(classes) or len(points) < 6:
                continue
            points = np.array(points, np.float64).reshape(-1, 2) * (width, height)
            points = np.clip(np.floor(points / (across, down)), -_FAR, _FAR)
            if not np.isfinite(points).all():
                raise ValueError("a corner is no number")
            points = points.astype(np.int32)
            if _draw(points, height, width).sum() > 1:
                found.add(annotation["Class_ID"])
                polygons.append(points)
    except OSError as error:
        raise TripletError(f"{path} cannot be read: {error.strerror}", file=path) from None
    except Exception as error:  # a damaged label fails in every way there is
        what = describe_content(read_head(path))
        why = what or f"no label of this image ({type(error).__name__}: {error}): {AGAIN}"
        raise TripletError(f"{path} is {why}", file=path) from None
    return sorted(found), polygons


def _draw(polygon: np.ndarray, height: int, width: int) -> np.ndarray:
    return cv2.fillPoly(np.zeros((height, width), np.uint8), [polygon], 1)


def _open_mask(path: Path, source: np.ndarray, gt: np.ndarray) -> tuple[Picture, bool]:
    """A mask file with its hole white, and whether it had to be turned for that."""
    mask = open_picture(path, "L")
    white = mask.array >= 128
    inverted = white.mean() > 0.5
    if white.shape == source.shape[:2] == gt.shape[:2] and white.any() and not white.all():
        change = cv2.absdiff(source, gt).mean(axis=2)
        gap = change[~white].mean() - change[white].mean()
        if abs(gap) >= _EVIDENCE:
            inverted = gap > 0
    if inverted:
        mask = Picture(np.where(white, 0, 255).astype(np.uint8))
    return mask, bool(inverted)


def _resize(picture: Picture, size: tuple[int, int], interpolation: int) -> Picture:
    if picture.array.shape[1::-1] == size:
        return picture
    return Picture(cv2.resize(picture.array, size, interpolation=interpolation))


# ------------------------------------------------------------------------------------ blended GT


def _blend_plate(frame: np.ndarray, plate: np.ndarray, polygons: list[np.ndarray]) -> np.ndarray:
    """The frame with the plate in its polygons, one after the other, as the authors blend them.

    Luma: what is around a polygon is continued into it, and the plate's is cloned over that.
    Chroma: the plate's, everywhere. Images are [H, W, 3] uint8 RGB. The authors' program stops
    at polygons that leave the image by some pixels or are under 3 px wide; here the first are
    cut at the border, and the latter get the plate's luma as it is.
    """
    height, width = frame.shape[:2]
    plate_yuv = cv2.cvtColor(plate, cv2.COLOR_RGB2YUV)
    plate_luma = plate_yuv[..., 0]
    gt = frame
    for polygon in polygons:
        hole = _draw(polygon, height, width)
        luma = _continue_luma(cv2.cvtColor(gt, cv2.COLOR_RGB2YUV)[..., 0], plate_luma, hole)
        # seamlessClone leaves out the outermost pixels and has no equation for less than 3 px.
        if min(cv2.boundingRect(hole[1:-1, 1:-1])[2:]) < 3:
            luma = np.where(hole, plate_luma, luma)
        else:
            x, y, w, h = cv2.boundingRect(hole)
            luma = cv2.seamlessClone(
                cv2.merge([plate_luma] * 3),
                cv2.merge([luma] * 3),
                hole * 255,
                (x + w // 2, y + h // 2),
                cv2.NORMAL_CLONE,
            )[..., 0]
        gt = cv2.cvtColor(np.dstack([luma, plate_yuv[..., 1:]]), cv2.COLOR_YUV2RGB)
    return gt


def _continue_luma(luma: np.ndarray, plate_luma: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Inpaint a hole; the plate's mirrored edge lies outside the image, for holes at its edge."""
    inner = slice(_PADDING, -_PADDING)
    padded = cv2.copyMakeBorder(plate_luma, *[_PADDING] * 4, cv2.BORDER_REFLECT)
    padded[inner, inner] = luma
    padded_hole = np.pad(hole, _PADDING)
    return cv2.inpaint(padded, padded_hole, 3, cv2.INPAINT_NS)[inner, inner]
