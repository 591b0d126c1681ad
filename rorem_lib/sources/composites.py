"""Cut-outs over backgrounds: triplets that show an object together with its shadow or reflection.

The source is a background with a cut-out laid over it, relit, with what it does to the ground; the
GT is the plain background. Some masks leave the effect out (`effect_masks`): these teach a remover
that a shadow goes with its object. Pasting objects over whole images is Syn4Removal's way
(SmartEraser, CVPR 2025), which has no effects.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from PIL import Image, ImageOps

from rorem_lib.data.items import SUFFIXES, Item, Picture, Pictures, Rejected, Source, SourceError
from rorem_lib.data.masks import dilate_mask
from rorem_lib.data.pictures import TripletError, load_image, open_image, turn_upright
from rorem_lib.data.writer import OWNED
from rorem_lib.sources.compositing import (
    FAINTEST,
    clean_rim,
    cut_around,
    draw_effect,
    draw_light,
    relight,
    shift,
    warp,
)

CUTOUT_TYPES = (".png", ".webp", ".tif", ".tiff")
MOST_ENLARGED = 1.5  # a cut-out blown up further looks softer than its background
_HAZE = 8  # alpha below is the noise of a matting model, not an object


@dataclass(frozen=True)
class CompositesSource(Source):
    """Composites of any cut-outs over any backgrounds.

    Attributes:
        folder: cut-outs: PNG, WebP or TIFF with transparency, in it, in its folder `cutouts` if
            there is one, or in folders below, whose names become the record's `class`.
        backgrounds: folder of images without such objects, relative to `folder` or absolute;
            default `backgrounds` in `folder`.
        count: triplets; those with a refused file drop out.
        seed: fixes every triplet, together with its number and its two files.
        size: side of the square triplets in px. Backgrounds are cropped and made smaller, never
            larger: one with a shorter side is refused.
        min_scale, max_scale: the object's longer side as a share of `size`, 0..1.
        max_rotation: degrees to either side.
        relight: 0 keeps the object's colours; 1 gives it the mean and contrast, in Lab, of the
            background around it and a strong shading from the side of the light.
        shadow, reflection: shares of triplets with a contact and cast shadow, and with a mirrored
            reflection and contact shadow; the rest has no effect.
        effect_masks: share, among the triplets with an effect, of masks that cover the effect too.
        dilate: side of the square kernel in px that widens every mask; 5 adds 2 px all around.
        edge_margin: share of the object's area that may leave the image.
        feather: sigma in px of the blur of the object's edge.
        license: what the collections' publishers state.
    """

    folder: str
    backgrounds: str = ""
    count: int = 1000
    seed: int = 4
    size: int = 512
    min_scale: float = 0.2
    max_scale: float = 0.6
    max_rotation: float = 10.0
    relight: float = 0.35
    shadow: float = 0.8
    reflection: float = 0.1
    effect_masks: float = 0.5
    dilate: int = 5
    edge_margin: float = 0.2
    feather: float = 0.5
    license: str = "unknown: see the sources"

    name = "composites"
    origin = "composites"
    layout = (
        "cutouts/ (or folders named by class) with PNG, WebP or TIFF files with "
        "transparency, and backgrounds/ with images"
    )

    limits = {
        "count": (1, 10**6),
        "seed": (0, 2**63),
        "size": (32, 4096),
        "min_scale": (0.01, 1),
        "max_scale": (0.01, 1),
        "max_rotation": (0, 180),
        "dilate": (0, 200),
        "edge_margin": (0, 0.5),
        "feather": (0, 10),
    }

    def __post_init__(self):
        super().__post_init__()
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale {self.min_scale} is above max_scale {self.max_scale}")
        if self.shadow + self.reflection > 1:
            raise ValueError(
                f"a triplet has one effect: shadow {self.shadow} and reflection "
                f"{self.reflection} together are at most 1"
            )

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return (folder / "cutouts").is_dir() and (folder / "backgrounds").is_dir()

    def list_items(self) -> Iterator[Item]:
        """Number the triplets; each file is used once before any is used again.

        The group is the background: one GT must not be in two splits. A cut-out may be, since no GT
        shows it; groups by both would soon join all triplets into one.
        """
        cutout_folder, background_folder = self._folders()
        if cutout_folder.resolve() == background_folder.resolve():
            raise SourceError(
                f"{cutout_folder} is given for the cut-outs and the backgrounds: put "
                "them in two folders"
            )
        what = f"folder takes a folder of cut-outs with transparency ({', '.join(CUTOUT_TYPES)})"
        cutouts = _list_images(cutout_folder, CUTOUT_TYPES, what, background_folder)
        what = f"backgrounds takes a folder of images ({', '.join(SUFFIXES)})"
        backgrounds = _list_images(background_folder, SUFFIXES, what, cutout_folder)
        walks = _walk(cutouts, self.seed, 1), _walk(backgrounds, self.seed, 2)
        for index, cutout, background in zip(range(self.count), *walks):
            yield Item(f"composite-{index:06d}", background, (index, cutout, background))

    def load_item(self, item: Item) -> Pictures:
        """Render one triplet, the same bytes whichever were rendered before.

        Source and GT are equal wherever neither the object nor its effect is. The record's further
        keys are `cutout` and `background` (names in their folders), `class`, `effect` ("none",
        "shadow" or "reflection"), `mask_kind` ("object" or "with_effect") and `mask_object_share`,
        the object's share of the mask's white, 0..1.

        Raises:
            Rejected: "no alpha", "small cut-out", "small background".
            TripletError: a file cannot be read.
        """
        index, cutout, background = item.place
        cutout_folder, background_folder = self._folders()
        rng = np.random.default_rng([self.seed, index])
        draw, covers_effect = rng.random(), rng.random() < self.effect_masks
        effect = "reflection" if draw < self.shadow + self.reflection else "none"
        effect = "shadow" if draw < self.shadow else effect
        gt = self._crop_background(background_folder / background, rng)
        colour, alpha = self._fit_cutout(cutout_folder / cutout, rng)
        x, y = self._choose_place(alpha, rng, on_ground=effect != "none")
        light = draw_light(rng)
        colour = relight(colour, alpha, cut_around(gt, x, y, alpha.shape), light, self.relight)
        placed = warp(np.dstack([colour * alpha[..., None], alpha]), shift(x, y), self.size)
        object_colour, object_alpha = placed[..., :3], placed[..., 3]

        ground, strength = draw_effect(gt, colour, alpha, x, y, effect, light, rng)
        bare = object_alpha == 0
        if effect != "none" and not (strength[bare] > 0.1).any():
            effect = "none"  # hidden behind the object, or out of the image
            ground, strength = gt.astype(np.float32), np.zeros_like(strength)
        blend = ground * (1 - object_alpha[..., None]) + object_colour * 255
        blend = np.clip(blend + 0.5, 0, 255).astype(np.uint8)
        source = np.where((bare & (strength == 0))[..., None], gt, blend)

        mask_kind = "with_effect" if covers_effect and effect != "none" else "object"
        white = ~bare
        if mask_kind == "with_effect":
            change = cv2.absdiff(source, gt).max(axis=2)
            white = white | (strength > 0.03) | (change > 8)
        mask = dilate_mask(white.astype(np.uint8) * 255, self.dilate)
        extra = {
            "cutout": cutout,
            "background": background,
            "mask_kind": mask_kind,
            "effect": effect,
            "mask_object_share": round(float((~bare).sum() / max(1, (mask > 0).sum())), 4),
        }
        if kind := PurePosixPath(cutout).parent.name:
            extra["class"] = kind
        return Pictures(
            Picture(source), Picture(mask), Picture(gt), background_folder / background, extra
        )

    def _folders(self) -> tuple[Path, Path]:
        folder = Path(self.folder).expanduser()
        within = folder / "cutouts"
        backgrounds = folder / Path(self.backgrounds or "backgrounds").expanduser()
        return within if within.is_dir() else folder, backgrounds

    def _crop_background(self, path: Path, rng) -> np.ndarray:
        """A random square [size, size, 3] uint8 of the file."""
        picture = load_image(path)
        height, width = picture.shape[:2]
        if min(height, width) < self.size:
            raise Rejected(
                "small background",
                f"{path} is {width}x{height} px: a background is at "
                f"least {self.size} px high and wide (size)",
            )
        side = int(rng.integers(self.size, min(height, width) + 1))
        top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
        square = picture[top : top + side, left : left + side]
        return cv2.resize(square, (self.size, self.size), interpolation=cv2.INTER_AREA)

    def _fit_cutout(self, path: Path, rng) -> tuple[np.ndarray, np.ndarray]:
        """The cut-out scaled and turned: colour [h, w, 3] and alpha [h, w], float32 0..1."""
        image = _open_cutout(path)
        angle = rng.uniform(-self.max_rotation, self.max_rotation)
        longer = rng.uniform(self.min_scale, self.max_scale) * self.size
        if rng.random() < 0.5:
            image = ImageOps.mirror(image)
        sine, cosine = abs(np.sin(np.deg2rad(angle))), abs(np.cos(np.deg2rad(angle)))
        width, height = image.size
        turned = max(width * cosine + height * sine, width * sine + height * cosine)
        scale = min(longer / turned, MOST_ENLARGED)
        if scale * turned < self.min_scale * self.size - 1:
            raise Rejected(
                "small cut-out",
                f"{path} shows an object of {width}x{height} px: too "
                f"small for min_scale {self.min_scale} of {self.size} "
                "px",
            )
        size = max(2, round(width * scale)), max(2, round(height * scale))
        # Pillow weighs colours by alpha in both, so that hidden colours do not bleed in.
        image = image.resize(size, Image.Resampling.HAMMING, reducing_gap=3)
        if angle:
            image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        rgba = np.asarray(image.crop(image.getchannel("A").getbbox()), np.float32) / 255
        margin = int(np.ceil(3 * self.feather))
        rgba = np.pad(rgba, ((margin, margin), (margin, margin), (0, 0)))
        alpha = rgba[..., 3]
        colour = clean_rim(rgba[..., :3], alpha)
        if self.feather:
            alpha = cv2.GaussianBlur(alpha, (0, 0), self.feather)
        if not (alpha > 0.5).any():
            raise Rejected(
                "small cut-out",
                f"{path} shows so thin an object that nothing solid is "
                f"left when it is {longer:.0f} px long, with feather "
                f"{self.feather}",
            )
        return colour, np.where(alpha < FAINTEST, 0, alpha)

    def _choose_place(self, alpha, rng, on_ground: bool) -> tuple[int, int]:
        """Where the object's left upper corner goes, px."""
        height, width = alpha.shape
        over_x, over_y = self.edge_margin * width, self.edge_margin * height
        low = -over_y
        high = self.size - height + over_y
        if on_ground:  # it stands in the lower half, where photographs have their ground
            high = 0.95 * self.size - height
            low = min(max(low, 0.5 * self.size - height), high)
        x = -over_x + (self.size - width + 2 * over_x) * rng.random()
        y = low + (high - low) * rng.random()
        x, y = round(x), round(y)
        inside = alpha[max(0, -y) : max(0, self.size - y), max(0, -x) : max(0, self.size - x)]
        if inside.sum() < (1 - self.edge_margin) * alpha.sum():
            x = min(max(x, 0), max(0, self.size - width))
            y = min(max(y, 0), max(0, self.size - height))
        return x, y


# ------------------------------------------------------------------------------------------- files


def _list_images(folder: Path, types: tuple[str, ...], expected: str, other: Path) -> list[str]:
    """Names of the images below a folder but for those in `other`, relative, with `/`, sorted."""
    expected += ", in it or in folders below"
    if not folder.is_dir():
        raise SourceError(f"{folder} is no folder: {expected}")
    other = other.resolve()
    found, others = [], Counter()
    for parent, folders, files in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__MACOSX"))
            and Path(parent, name).resolve() != other
            and not Path(parent, name, OWNED).exists()  # what an assembly writes below its input
        ]
        for name in files:
            kind = os.path.splitext(name)[1].lower()
            if kind in types and not name.startswith("."):
                found.append(Path(parent, name).relative_to(folder).as_posix())
            else:
                others[kind or name] += 1
    if not found:
        there = ", ".join(f"{n} {kind}" for kind, n in others.most_common(4)) or "nothing"
        raise SourceError(f"{folder} has none: {expected}; it holds {there}")
    return sorted(found)


def _walk(names: list[str], seed: int, kind: int) -> Iterator[str]:
    """The names without end, all of them once in each round, every round in another order."""
    turn = 0
    while True:
        # Ends in 1 or 2, while a triplet's own [seed, index] counts as ending in 0.
        order = np.random.default_rng([seed, turn, kind]).permutation(len(names))
        yield from (names[i] for i in order)
        turn += 1


def _open_cutout(path: Path) -> Image.Image:
    """The file as RGBA, upright, cut to what is visible."""
    with open_image(path) as opened:
        opened.load()
        try:
            image = turn_upright(opened).convert("RGBA") if opened.has_transparency_data else None
        except ValueError as error:
            raise TripletError(
                f"{path} cannot be read with its transparency ({error}): save it as an 8-bit RGBA "
                "PNG",
                file=path,
            ) from None
    if image is None:
        raise Rejected("no alpha", f"{path} has no transparency: it is no cut-out")
    alpha = image.getchannel("A").point([0] * _HAZE + list(range(_HAZE, 256)))
    faintest, strongest = alpha.getextrema()
    if faintest >= 250 or strongest < 128:
        state = "opaque everywhere" if faintest >= 250 else "empty: nothing is half opaque"
        raise Rejected("no alpha", f"{path} is no cut-out, its alpha is {state}")
    image.putalpha(alpha)
    return image.crop(alpha.getbbox())
