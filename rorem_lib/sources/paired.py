"""Importers of folders whose files belong together by the patterns of their paths.

A pattern is a path with fields in braces, for example `{scene}/images/{name}.*`. A field stands for
a part of one file's or folder's name, the same wherever it occurs; `.*` is any suffix of an image.
`PairedSource` takes patterns of yours. The other classes are sets of other groups, whose patterns
are in `LAYOUTS`; what no pattern says of them stands in their class.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import logging
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ijson

from rorem_lib.data.items import (
    SUFFIXES,
    UNKNOWN_LICENSE,
    Item,
    Picture,
    Pictures,
    Rejected,
    Source,
    SourceError,
    list_folders,
    make_id,
    name_once,
    open_picture,
    read_split,
)
from rorem_lib.data.pictures import AGAIN, TripletError, decode_image, decode_mask
from rorem_lib.sources.parquet import check_columns, has_columns, list_rows, list_shards, read_row

logger = logging.getLogger(__name__)


class Patterns(NamedTuple):
    """Where a layout has its files.

    Attributes:
        source, gt: patterns of the images.
        masks: patterns of the masks by kind: of the "object" alone, or with its "effect", shadow
            and reflection. Of several, the first counts whose file is there.
    """

    source: str
    gt: str
    masks: dict[str, tuple[str, ...]]


# Each below the folder that is given, and below every folder in it (train, val_rord, CORNE-Val).
LAYOUTS = {
    "removal_bench": Patterns("images/{name}.*", "gt/{name}.*", {"object": ("masks/{name}.*",)}),
    "syn4removal": Patterns("paste/{name}.*", "gt/{name}.*", {"object": ("mask/{name}.*",)}),
    "omnieraser": Patterns("img/{name}.*", "gt_new/{name}.*", {"object": ("sam_mask/{name}.*",)}),
    "corne": Patterns(
        "shot/{name}.*",
        "bg/{name}.*",
        {
            "object": ("mask_sam/{name}.*", "mask_sam/mask_{name}.*"),
            "effect": ("mask_eff/{name}.*", "masks/mask_{name}.*", "masks/{name}.*"),
        },
    ),
    "ober": Patterns(
        "{scene}/input_{name}.*",
        "{scene}/gt_{name}.*",
        {"object": ("{scene}/mask_{name}.*",), "effect": ("{scene}/shadow_mask_{name}.*",)},
    ),
}
MASK_KINDS = {"object": "object", "effect": "with_effect"}  # as records call them
_FIELD = re.compile(r"\{([A-Za-z_]\w*)\}", re.ASCII)
_RORD_SCENE = re.compile(r"I-\d+_[A-Z0-9]+_[TW]\d+(?=_F\d)")
_KEYS_OF_RECORDS = frozenset(
    "id group origin license file sha256 width height source mask GT gt inpaint mask_area phash "
    "change_inside change_outside score accepted_by remover round seed dilate".split()
)


# -------------------------------------------------------------------------------- patterns, files


def list_files(root: Path, pattern: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The path below `root` and the fields of each image that a pattern fits, ordered by path."""
    stem = os.path.splitext(pattern)[0]
    for path in sorted(glob.iglob(_FIELD.sub("*", glob.escape(stem)) + ".*", root_dir=root)):
        if (fields := _match(pattern, path)) is not None:
            yield path, fields


def _match(pattern: str, path: str) -> dict[str, str] | None:
    (stem, suffix), (start, ending) = os.path.splitext(pattern), os.path.splitext(path)
    suffixes = SUFFIXES if suffix == ".*" else (suffix.lower(),)
    found = ending.lower() in suffixes and _compile(stem).fullmatch(start)
    return found.groupdict() if found else None


@functools.lru_cache
def _compile(stem: str) -> re.Pattern:
    text, seen = "", set()
    for place, part in enumerate(_FIELD.split(stem)):  # text, field, text, field, ..., text
        field = f"(?P={part})" if part in seen else f"(?P<{part}>[^/]+)"
        text += field if place % 2 else re.escape(part)
        seen |= {part} if place % 2 else set()
    return re.compile(text)


def find_file(folder: Path, names: Sequence[str], suffix: str = "") -> Path:
    """The first of `names` that is in a folder.

    Args:
        names: below the folder; `.*` stands for the suffix of any image.
        suffix: the one to try first.

    Raises:
        Rejected: none is there; names the first.
    """
    for name in names:
        stem, own = os.path.splitext(name)
        spellings = (suffix, *SUFFIXES, *map(str.upper, SUFFIXES))
        for ending in spellings if own == ".*" else (own, own.lower(), own.upper()):
            found = folder / (stem + ending)
            if os.path.isfile(found):  # False, where Path.is_file raises: a name too long
                return found
    missing, own = os.path.splitext(folder / names[0])
    raise Rejected(
        "missing file",
        f"{missing}{suffix if own == '.*' else own} is missing"
        f"{', under any suffix of an image' * (own == '.*')}: "
        "download it again, or leave the item out",
    )


def _name_group(path: str, default: str) -> str:
    """The RORD scene of a frame that was taken from RORD, so that no split cuts it."""
    found = _RORD_SCENE.search(path)
    return found[0] if found else default


def _begins(root: Path, pattern: str) -> bool:
    """Whether the folder is there in which a pattern's first field is."""
    return (root / _get_folder(pattern)).is_dir()


def _get_folder(pattern: str) -> str:
    return os.path.dirname(pattern.split("{")[0])


# -------------------------------------------------------------------------------- any such folders


class _Row(NamedTuple):
    """One item: the fields of its source, those that its mask alone has, further keys of its
    record; and where its files may be, below the folder.
    """

    fields: dict[str, str]
    own: dict[str, str]
    extra: dict
    sources: Sequence[str]
    masks: Sequence[str]
    gts: Sequence[str]


@dataclass(frozen=True)
class _Paired(Source):
    folder: str
    patterns = Patterns("", "", {})
    mask = "object"  # a field where there is a choice
    invert_masks = False  # a field where files are of anyone's making
    group = ""  # the fields that name the group; without, each image is one

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        source, gt, kinds = cls.patterns
        return any(
            _begins(root, source) and _begins(root, gt) and any(_begins(root, x) for x in masks)
            for root in (folder, *list_folders(folder))
            for masks in kinds.values()
        )

    def _list_roots(self) -> list[Path]:
        return [Path(self.folder), *list_folders(Path(self.folder))]

    def list_items(self) -> Iterator[Item]:
        seen: set[str] = set()
        source, gt, kinds = self.patterns
        for root in self._list_roots():
            masks = [mask for mask in kinds[self.mask] if _begins(root, mask)]
            if not (masks and _begins(root, source) and _begins(root, gt)):
                continue
            prefix = () if root == Path(self.folder) else (root.name,)
            for number, row in enumerate(self._list_rows(root, masks), 1):
                image = (*prefix, *row.fields.values())
                name = name_once(make_id(*image, *row.own.values()), number, seen)
                yield Item(
                    name,
                    make_id(*prefix, self.group.format(**row.fields))
                    if self.group
                    else _name_group(row.sources[0], make_id(*image) if row.own else name),
                    (prefix, row.sources, row.masks, row.gts, self._describe(prefix, row)),
                    self._get_split(root, row.fields),
                )
        if not seen:
            raise self.refuse_layout()

    def _list_rows(self, root: Path, masks: list[str]) -> Iterator[_Row]:
        for path, fields in list_files(root, self.patterns.source):
            paths = [mask.format(**fields) for mask in masks]
            yield _Row(fields, {}, {}, (path,), paths, (self.patterns.gt.format(**fields),))

    def _describe(self, prefix: tuple[str, ...], row: _Row) -> dict:
        return row.extra | ({"set": prefix[0]} if prefix else {})

    def _get_split(self, root: Path, fields: dict[str, str]) -> str | None:
        return read_split(os.path.basename(os.path.abspath(root)))

    def load_item(self, item: Item) -> Pictures:
        prefix, sources, masks, gts, extra = item.place
        root = Path(self.folder, *prefix)
        source = find_file(root, sources)
        mask, gt = find_file(root, masks, source.suffix), self._find_gt(root, gts, source)
        if len(self.patterns.masks) > 1:
            extra = extra | {"mask_kind": MASK_KINDS[self.mask]}
        mask, gt = open_picture(mask, "L"), gt and open_picture(gt)
        if self.invert_masks:
            mask = Picture(255 - mask.array)
        return Pictures(open_picture(source), mask, gt, source, extra)

    def _find_gt(self, root: Path, gts: Sequence[str], source: Path) -> Path | None:
        return find_file(root, gts, source.suffix) if gts else None


@dataclass(frozen=True)
class PairedSource(_Paired):
    """Folders of yours, described by patterns.

    With `source: "{scene}/images/{name}.jpg", mask: "{scene}/masks/{name}_{part}.png", gt:
    "{scene}/gt/{name}.jpg"`, the image `attic/images/0001.jpg` becomes a triplet with each of the
    masks `attic/masks/0001_chair.png` and `attic/masks/0001_table.png`. A field takes as much of a
    name as it can: `{name}_{part}` takes `a_b` and `1` of `a_b_1`. What fits the pattern of the
    mask or of the GT is no source, so all files may lie in one folder. An id is the fields of the
    image and those that its mask alone has; records keep all of them but `name`.

    Args:
        folder: where the patterns begin; a pattern may also be absolute.
        source: pattern of the images with the object. Of its fields, `split` says what they are
            for: training where it begins with train, test where it begins with test or val.
        mask: pattern of the masks, white where to remove. Fields that the source has not give an
            image several masks.
        gt: pattern of the images without the object; empty makes a pool.
        group: fields of the source that name what no split may cut, for example "{scene}"; by
            default each image is a group, with all its masks.
        invert_masks: masks are black where to remove.
        origin, license: what records say.
    """

    source: str = ""
    mask: str = ""
    gt: str = ""
    group: str = ""
    invert_masks: bool = False
    origin: str = "paired folders"
    license: str = UNKNOWN_LICENSE

    name = "paired"
    layout = (
        'files that belong together by patterns of yours: source_options = {"source": '
        '"{scene}/images/{name}.jpg", "mask": "{scene}/masks/{name}.png", "gt": ...}'
    )

    def __post_init__(self):
        super().__post_init__()
        patterns = Patterns(self.source, self.gt, {self.mask: (self.mask,)})
        object.__setattr__(self, "patterns", patterns)
        fields, own = _FIELD.findall(self.source), _FIELD.findall(self.mask)
        if any((self.source, self.mask, self.gt)) and not (fields and self.mask):
            raise ValueError("give a source with a field, such as {name}, and a mask")
        if fields and (self.source in (self.mask, self.gt) or self.mask == self.gt):
            raise ValueError(
                f"source, mask and gt are files of their own, two patterns are the same: "
                f"{self.source!r}, {self.mask!r}, {self.gt!r}"
            )
        for option in ("source", "mask", "gt"):
            pattern = getattr(self, option)
            if pattern and not pattern.lower().endswith((".*", *SUFFIXES)):
                raise ValueError(f"{option} must end in .* or {', '.join(SUFFIXES)}: {pattern!r}")
        known_fields = {"source": fields, "mask": own, "gt": fields + own, "group": fields}
        for option, known in known_fields.items():
            try:
                getattr(self, option).format(**dict.fromkeys(known, ""))
            except (LookupError, ValueError, AttributeError):
                raise ValueError(
                    f"{option} has a field that is not {' or '.join(dict.fromkeys(known))}: "
                    f"{getattr(self, option)!r}"
                ) from None
        if self.group and not _FIELD.search(self.group):
            raise ValueError(
                f"group has no field in braces: {self.group!r} would be one group of all images"
            )
        every = sorted({*fields, *own})
        if twins := [name for name in every if [f.lower() for f in every].count(name.lower()) > 1]:
            raise ValueError(f"fields differ in upper and lower case alone: {', '.join(twins)}")
        if own and not set(own) & set(fields):
            raise ValueError(
                f"mask has none of the source's fields ({', '.join(fields)}): each mask would go "
                f"with each image: {self.mask!r}"
            )
        if taken := sorted(_KEYS_OF_RECORDS.intersection(every)):
            raise ValueError(f"fields must not be called {', '.join(taken)}: records have these")

    @property
    def gives_gt(self) -> bool:
        return bool(self.gt)

    def refuse_layout(self) -> SourceError:
        return super().refuse_layout(", ".join(filter(None, (self.source, self.mask, self.gt))))

    def _list_roots(self) -> list[Path]:
        return [Path(self.folder)] if self.source else []

    def _list_rows(self, root: Path, masks: list[str]) -> Iterator[_Row]:
        names, of_image = _FIELD.findall(self.source), defaultdict(list)
        own = [field for field in _FIELD.findall(self.mask) if field not in names]
        common = [field for field in _FIELD.findall(self.mask) if field in names]
        for path, fields in list_files(root, self.mask) if own else ():
            key = tuple(fields[field] for field in common)
            of_image[key].append((path, {field: fields[field] for field in own}))
        for path, fields in list_files(root, self.source):
            if any(_match(pattern, path) is not None for pattern in (self.mask, self.gt)):
                continue
            any_own = dict.fromkeys(own, "*")
            none = [(self.mask.format(**fields, **any_own), {})]
            for mask, more in of_image.get(tuple(fields[field] for field in common), none):
                gts = [self.gt.format(**fields | any_own | more)] if self.gt else []
                yield _Row(fields, more, {}, (path,), (mask,), gts)

    def _describe(self, prefix: tuple[str, ...], row: _Row) -> dict:
        return {key: value for key, value in (row.fields | row.own).items() if key != "name"}

    def _get_split(self, root: Path, fields: dict[str, str]) -> str | None:
        return read_split(fields.get("split", ""))


# ------------------------------------------------------------------------------ other groups' sets


@dataclass(frozen=True)
class RemovalBenchSource(_Paired):
    """RemovalBench (OmniEraser, arXiv 2501.07397): about 70 photographs, for evaluation alone."""

    patterns = LAYOUTS["removal_bench"]
    name = "removal_bench"
    origin = "RemovalBench"
    license = UNKNOWN_LICENSE
    layout = "images/, gt/ and masks/ with equal names"

    def _get_split(self, root: Path, fields: dict[str, str]) -> str:
        return "test"


@dataclass(frozen=True)
class OmniEraserSource(_Paired):
    """OmniEraser's training set, Video4Removal (arXiv 2501.07397): pairs of video frames.

    What in a name tells the video is not published: each image is a group.
    """

    patterns = LAYOUTS["omnieraser"]
    name = "omnieraser"
    origin = "Video4Removal"
    license = UNKNOWN_LICENSE
    layout = "img/, gt_new/ and sam_mask/ with equal names"


@dataclass(frozen=True)
class SmartEraserSource(_Paired):
    """Syn4Removal as SmartEraser's pipeline writes it, and SmartEraser's val sets (CVPR 2025).

    `result.json` (the pasted object's class and box), where it is there, goes into the records as
    `class` and `box_xywh` (x, y, width, height in px). Masks are often JPEG: grey at the edge.
    """

    patterns = LAYOUTS["syn4removal"]
    name = "syn4removal"
    origin = "Syn4Removal"
    license = UNKNOWN_LICENSE
    layout = "paste/, mask/ and gt/ with equal names, in it or in train/ or val_rord/ below it"

    def _list_rows(self, root: Path, masks: list[str]) -> Iterator[_Row]:
        details = _read_details(root / "result.json")
        for row in super()._list_rows(root, masks):
            found = details.get(os.path.basename(row.sources[0]))
            yield row._replace(extra=dict(zip(("class", "box_xywh"), found))) if found else row


def _read_details(path: Path) -> dict[str, tuple[str, list]]:
    """Class and box by file name; a million entries, kept as small as they can be."""
    details = {}
    try:
        with open(path, "rb") as stream:
            for name, value in ijson.kvitems(stream, "", use_float=True):
                match value:
                    case [str(kind), list(box), *_]:
                        details[name] = (sys.intern(kind), box)
    except FileNotFoundError:
        pass
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{path} is no JSON ({str(error).splitlines()[0]}): {AGAIN}; "
            "without it, records have no class and box"
        ) from None
    return details


@dataclass(frozen=True)
class CorneSource(_Paired):
    """CORNE and CORNE-Val (OSOR, arXiv 2606.28094): edited images, verified.

    Where `shot_list.txt`, `bg_list.txt` and the masks' list are there, they say which files belong
    together, line by line; else the names do.

    Args:
        folder: holds `shot/`, `bg/` and masks, or sub folders that do.
        mask: "object": `mask_sam/`, the object alone; "effect": `masks/` or, in CORNE-Val,
            `mask_eff/`, with its shadow and reflection.
    """

    mask: str = "object"

    patterns = LAYOUTS["corne"]
    name = "corne"
    origin = "CORNE"
    license = "Apache-2.0"
    layout = "shot/, bg/ and mask_sam/ (mask: object) or masks/ or mask_eff/ (mask: effect)"
    choices = {"mask": tuple(MASK_KINDS)}

    def _get_split(self, root: Path, fields: dict[str, str]) -> str:
        return "test" if (root / "mask_eff").is_dir() else "train"

    def _list_rows(self, root: Path, masks: list[str]) -> Iterator[_Row]:
        kind = {"object": "mask_sam", "effect": "mask"}[self.mask]
        lists = [root / f"{name}_list.txt" for name in ("shot", kind, "bg")]
        if not all(path.is_file() for path in lists):
            yield from super()._list_rows(root, masks)
            return
        counts = [sum(1 for _ in _read_lines(path)) for path in lists]
        if len(set(counts)) > 1:
            raise SourceError(
                "the lists are not aligned: "
                + ", ".join(f"{path} has {count} lines" for path, count in zip(lists, counts))
                + f": {AGAIN}; without them files are matched by name"
            )
        places = self.patterns.source, masks[0], self.patterns.gt
        for lines in zip(*map(_read_lines, lists)):
            paths = [_locate_line(root, _get_folder(p), line) for p, line in zip(places, lines)]
            yield _Row({"name": Path(paths[0][0]).stem}, {}, {}, *paths)


def _read_lines(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig") as stream:
            yield from filter(None, map(str.strip, stream))
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is no UTF-8 text (byte {error.start}): {AGAIN}") from None


def _locate_line(root: Path, folder: str, line: str) -> list[str]:
    """Where a list's line may be below `root`: as it says, else in the layout's own folder.

    Lists carry the folders of the machine that wrote them; nothing outside `root` is opened.
    """
    base = os.path.abspath(root)
    full = os.path.normpath(os.path.join(base, line))
    here, inside = f"{folder}/{os.path.basename(full)}", os.path.relpath(full, base)
    paths = [here] if inside.startswith("..") or inside == here else [inside, here]
    return [name for path in paths for name in (path, os.path.splitext(path)[0] + ".*")]


@dataclass(frozen=True)
class OberSource(_Paired):
    """OBER (ObjectClear, arXiv 2505.22636), sczhou/OBERDataset_ObjectClear on the Hub, gated.

    Parquet files whose columns `input`, `gt`, `object_mask` and `object_effect_mask` hold the
    images' bytes; an older release has a folder an image. Crops of one image (`0427_1.jpg`,
    `0427_2.jpg`) are one group.

    Args:
        folder: the dataset's folder, its `data/`, or the folder of the older release.
        mask: "object": the object alone, as ObjectClear is given it, while the GT also lacks its
            shadow and reflection; "effect": with them.
        subset: take this subset alone (`OBER-Test`, `OBER-Wild`, `RORD-Val-343`, ...).
        require_gt: refuse rows without GT (`OBER-Wild` has none); false makes a pool.
    """

    mask: str = "object"
    subset: str = ""
    require_gt: bool = True

    patterns = LAYOUTS["ober"]
    name = "ober"
    origin = "OBER"
    license = "S-Lab License 1.0 (non-commercial)"
    layout = (
        "data/train-*.parquet and data/test-*.parquet, or <id>/input_*.jpg with gt_*.jpg, "
        "mask_*.png and shadow_mask_*.png"
    )
    choices = {"mask": tuple(MASK_KINDS)}
    group = "{scene}"

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        if list_shards(folder):
            return has_columns(folder, ("input", *_OBER_MASKS.values()))
        few = list_folders(folder)[:3]
        few += [inner for outer in few for inner in list_folders(outer)[:3]]
        return any(True for place in few for _ in list_files(place, "input_{name}.*"))

    def list_items(self) -> Iterator[Item]:
        if shards := list_shards(Path(self.folder)):
            yield from self._list_shard_items(shards)
            return
        if self.subset and self.recognises(Path(self.folder)):
            raise SourceError(
                f"{self.folder} is the older release, which names no subsets: leave subset empty"
            )
        yield from super().list_items()

    def _describe(self, prefix: tuple[str, ...], row: _Row) -> dict:
        return {}

    def _get_split(self, root: Path, fields: dict[str, str]) -> str | None:
        return read_split(fields["scene"] if root == Path(self.folder) else root.name)

    def _list_shard_items(self, shards: list[Path]) -> Iterator[Item]:
        try:
            for shard in shards:  # all of them first: a run is not to stop half-way for one
                check_columns(shard, ("input", "gt", *_OBER_MASKS.values()))
        except TripletError as error:
            raise SourceError(str(error)) from None
        _warn_of_gaps(shards)
        seen: set[str] = set()
        subsets: set[str] = set()
        for shard in shards:
            for group, row, values in list_rows(shard, ["input.path", "subset", "split"]):
                subset = str(values.get("subset") or "")
                subsets.add(subset)
                if self.subset not in ("", subset):
                    continue
                path = (values.get("input") or {}).get("path")
                stem = Path(path).stem if path else f"{shard.stem}-{group}-{row}"
                image = re.sub(r"_\d+$", "", stem) if path else stem
                parts = (subset,) if subset else ()
                yield Item(
                    name_once(make_id(*parts, stem), len(seen) + 1, seen),
                    _name_group(stem, make_id(*parts, image)),
                    (str(shard.relative_to(self.folder)), group, row),
                    read_split(str(values.get("split") or shard.stem)),
                )
        if self.subset and self.subset not in subsets:
            raise SourceError(
                f"{self.folder} has no subset {self.subset!r}: take one of "
                + ", ".join(sorted(subsets))
            )

    def load_item(self, item: Item) -> Pictures:
        if isinstance(item.place[1], int):
            return self._load_row(*item.place)
        return super().load_item(item)

    def _load_row(self, file: str, group: int, row: int) -> Pictures:
        shard = Path(self.folder, file)
        where = f"{shard}, row {row} of row group {group}"
        columns = ("input", "gt", _OBER_MASKS[self.mask])
        values = read_row(shard, group, row, (*columns, "subset"))
        data = {name: (values.get(name) or {}).get("bytes") for name in columns}
        if not data["gt"] and self.require_gt:
            raise _refuse_lack_of_gt(where)
        for name in ("input", columns[2]):
            if not data[name]:
                raise Rejected("missing image", f"{where}: the column {name} is empty")
        source, gt, mask = (
            data[name] and Picture(decode(f"{where}, {name}", data=data[name])[0])
            for name, decode in zip(columns, (decode_image, decode_image, decode_mask))
        )
        # the image's own hash: the file's says nothing, and takes a second an item
        extra = {
            "subset": values.get("subset"),
            "path": values["input"].get("path"),
            "mask_kind": MASK_KINDS[self.mask],
            "sha256": hashlib.sha256(data["input"]).hexdigest(),
        }
        return Pictures(source, mask, gt or None, origin_file=shard, extra=extra)

    def _find_gt(self, root: Path, gts: Sequence[str], source: Path) -> Path | None:
        try:
            return super()._find_gt(root, gts, source)
        except Rejected:
            if self.require_gt:
                raise _refuse_lack_of_gt(source) from None
            return None


_OBER_MASKS = {"object": "object_mask", "effect": "object_effect_mask"}  # columns


def _refuse_lack_of_gt(where: str | Path) -> Rejected:
    return Rejected("no GT", f"{where} has no GT: take it into a pool (require_gt: false)")


def _warn_of_gaps(files: list[Path]) -> None:
    """A part of the files is a fair choice, or a download that broke off."""
    there = Counter(
        found.groups()
        for file in files
        if (found := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})", file.stem))
    )
    for (name, count), number in there.items():
        if number < int(count):
            logger.warning(
                "%s: %d of %d files of %s are there", files[0].parent, number, int(count), name
            )
