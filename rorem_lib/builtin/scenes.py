"""The built-in scenes: a seeded renderer of small photograph-like images and their hidden truth.

A scene is a background of one family, one to three shaded objects with soft shadows (sometimes a
reflection), and a mask over the object that is to be removed. Everything is a function of
`(role, seed, index)`: any scene can be rendered again, alone, in any order, on any machine.

The roles mirror the paper's data (RORem, sec. 3.1 and Table 1):

==================  =============================================  ==============================
role                stands for                                     families, effects, masks
==================  =============================================  ==============================
`pretrain`          the images the base model has seen           KNOWN, shadows, no pairs
`rord`              RORD: the same scene with and without          a part of KNOWN, soft shadows,
                                                                   masks that cover them
`mulan`             MULAN: layers composited                       a part of KNOWN, no shadows
`pool`              OpenImages: unlabelled, wider                  KNOWN and NEW, all effects
`high_resolution`   DIV2K / Flickr2K                               as the pool, larger
`test`              the 500 test images                          as the pool
==================  =============================================  ==============================

The NEW families, new object kinds and reflections occur in no pre-training image and in no
initial triplet, and no initial triplet shows how a shadow goes that the mask does not cover (RORD's
masks cover it, MULAN's objects have none): that is the gap between public triplets and the open
world which the rounds with humans in the loop have to close.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

KNOWN = ("gradient", "noise", "stripes", "tiles", "landscape", "floor_wall")
NEW = ("wood", "bricks", "plaid")
LABELLED = {"rord": ("floor_wall", "landscape", "tiles"), "mulan": ("gradient", "noise", "stripes")}
KNOWN_OBJECTS = ("ball", "box", "polygon", "capsule")
NEW_OBJECTS = ("ring", "star", "mug")
_WIDE_EFFECTS = ("none", "contact", "cast", "cast", "reflection")
EFFECTS = {
    "pretrain": ("none", "contact", "cast"),
    "rord": ("contact",),
    "mulan": ("none",),
    "pool": _WIDE_EFFECTS,
    "high_resolution": _WIDE_EFFECTS,
    "test": _WIDE_EFFECTS,
}
MASK_KINDS = ("object", "with_shadow", "loose")
MASK_SHARES = (0.5, 0.25, 0.25)  # of the mask kinds
RORD_MASK_SHARES = (0.0, 1.0, 0.0)
ROLES = ("pretrain", "rord", "mulan", "pool", "high_resolution", "test")
SIZE = 64  # px, the built-in model's native side
HIGH_RESOLUTION_SIZE = 96  # px


@dataclass(frozen=True)
class Scene:
    """One rendered scene, all images `size` x `size`.

    Attributes:
        image: [H, W, 3] uint8, the image with the object (the triplet's source).
        truth: [H, W, 3] uint8, the same image had the object never been there (hidden).
        object: [H, W] uint8 0..255, the visible object's soft coverage (hidden).
        shadow: [H, W] uint8 0..255, how strongly the object's shadow or reflection changes each
            pixel outside the object (hidden).
        mask: [H, W] uint8, 0 or 255, what the user marked; it covers the whole object.
        family: the background's family, one of `KNOWN + NEW`.
        kind: the removed object's kind, one of `KNOWN_OBJECTS + NEW_OBJECTS`.
        mask_kind: one of `MASK_KINDS`.
        effect: "none", "contact", "cast" or "reflection".
    """

    image: np.ndarray
    truth: np.ndarray
    object: np.ndarray
    shadow: np.ndarray
    mask: np.ndarray
    family: str
    kind: str
    mask_kind: str
    effect: str


class _Canvas(NamedTuple):
    """What every drawing function needs: the generator, the side, pixels a unit, coordinates."""

    rng: np.random.Generator
    size: int
    unit: float  # pixels that one pixel of a 64 px image becomes
    x: np.ndarray  # [H, W] float32 pixel centres
    y: np.ndarray


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) + 0.5
    return x, y


_GRIDS = {size: _grid(size) for size in (SIZE, HIGH_RESOLUTION_SIZE, 128)}


def _colour(rng, low=0.25, high=0.85, saturation=0.35):
    grey = rng.uniform(low, high)
    return np.clip(grey + rng.uniform(-1, 1, 3) * saturation * min(grey, 1 - grey), 0.05, 0.95)


def _near(rng, colour, distance):
    """A colour that differs from `colour` mostly in lightness by `distance` (0..1)."""
    sign = -1 if colour.mean() > 0.55 else 1
    if 0.4 < colour.mean() < 0.6:
        sign = rng.choice((-1, 1))
    return np.clip(colour + sign * distance + rng.uniform(-0.04, 0.04, 3), 0.04, 0.96)


def _smooth_noise(c: _Canvas, cells: int) -> np.ndarray:
    """[H, W] smooth noise of about unit range with `cells` cells a side."""
    small = c.rng.standard_normal((cells + 3, cells + 3)).astype(np.float32)
    big = cv2.resize(
        small, (c.size + c.size // cells, c.size + c.size // cells), interpolation=cv2.INTER_CUBIC
    )
    return big[: c.size, : c.size]


def _fractal(c: _Canvas, octaves=(3, 6, 12), fall=0.5) -> np.ndarray:
    total, weight = np.zeros((c.size, c.size), np.float32), 1.0
    for cells in octaves:
        total += weight * _smooth_noise(c, cells)
        weight *= fall
    return total


def _mix(a, b, t):
    """Blend colours or images `a` and `b` by `t` [H, W] in 0..1 -> [H, W, 3]."""
    t = t[..., None]
    return (a * (1 - t) + b * t).astype(np.float32)


def _edge(distance, width=1.0):
    """Anti-aliased step: 0 below -width / 2, 1 above width / 2."""
    return np.clip(distance / width + 0.5, 0, 1)


def _turned(c: _Canvas, angle):
    return c.x * np.cos(angle) + c.y * np.sin(angle)


def _gradient(c):
    t = _turned(c, c.rng.uniform(0, 2 * np.pi)) / c.size
    t = (t - t.min()) / (t.max() - t.min())
    a = _colour(c.rng)
    return _mix(a, _near(c.rng, a, c.rng.uniform(0.1, 0.3)), t)


def _noise(c):
    a = _colour(c.rng)
    t = np.clip(0.5 + 0.28 * _fractal(c, (2, 4, 8), 0.45), 0, 1)
    return _mix(a, _near(c.rng, a, c.rng.uniform(0.12, 0.28)), t)


def _wave(phase):
    """Soft square wave of period 1 in 0..1."""
    return np.clip(0.5 + 0.9 * np.sin(2 * np.pi * phase), 0, 1)


def _stripes(c):
    period = c.rng.uniform(8, 16) * c.unit
    t = _wave(_turned(c, c.rng.uniform(0, np.pi)) / period + c.rng.uniform())
    a = _colour(c.rng)
    return _mix(a, _near(c.rng, a, c.rng.uniform(0.12, 0.3)), t)


def _joints(position, period, width):
    """1 on the joints of a periodic pattern, 0 between; all in pixels."""
    offset = np.mod(position, period)
    return 1 - _edge(np.minimum(offset, period - offset) - width / 2, width)


def _tiles(c):
    period = c.rng.uniform(12, 20) * c.unit
    x0, y0 = c.rng.uniform(0, period, 2)
    width = 1.6 * c.unit
    joint = np.maximum(_joints(c.x + x0, period, width), _joints(c.y + y0, period, width))
    a = _colour(c.rng)
    return _mix(a, _near(c.rng, a, c.rng.uniform(0.15, 0.3)), joint)


def _landscape(c):
    horizon = c.rng.uniform(0.3, 0.55) * c.size
    sky = np.array((0.55, 0.72, 0.92)) * c.rng.uniform(0.75, 1.0) + c.rng.uniform(-0.08, 0.08, 3)
    ground = np.array(c.rng.choice([(0.42, 0.52, 0.25), (0.62, 0.52, 0.36), (0.5, 0.48, 0.45)]))
    ground = np.clip(ground * c.rng.uniform(0.8, 1.3) + c.rng.uniform(-0.05, 0.05, 3), 0.08, 0.9)
    up = np.clip(c.y / max(horizon, 1), 0, 1)
    upper = _mix(np.clip(sky, 0, 1), np.clip(sky + 0.16, 0, 1), up)
    lower = _mix(ground, np.clip(ground * 0.72, 0, 1), np.clip((c.y - horizon) / c.size, 0, 1))
    lower = lower * (1 + 0.05 * _fractal(c, (4, 8))[..., None])
    line = horizon
    if c.rng.random() < 0.5:  # hills
        line = horizon - c.unit * (3 + 3 * _smooth_noise(c, 3)[c.size // 2])
        hills = _near(c.rng, ground, 0.12)
        upper = _mix(upper, hills, _edge(c.y - line))
    return _mix(upper, lower, _edge(c.y - horizon))


def _floor_wall(c):
    corner = c.rng.uniform(0.3, 0.5) * c.size
    wall = _colour(c.rng, 0.5, 0.9, 0.25)
    wall = _mix(wall, wall * 0.88, c.x / c.size)
    tone = _colour(c.rng, 0.3, 0.65, 0.4)
    depth = np.maximum(c.y - corner, 0) + 6 * c.unit
    vanishing = c.size * c.rng.uniform(0.3, 0.7)
    boards = (c.x - vanishing) / depth * c.rng.uniform(1.2, 2.2) + c.rng.uniform()
    offset = np.abs(np.mod(boards, 1) - 0.5)
    far = np.clip((c.y - corner) / (0.25 * c.size), 0, 1)  # far seams are too fine to be drawn
    seam = far * np.clip((offset - 0.44) / 0.06, 0, 1)
    floor = _mix(tone, tone * 0.78, seam)
    floor = floor * (0.9 + 0.12 * (c.y[..., None] / c.size))
    picture = _mix(wall, floor, _edge(c.y - corner))
    if c.rng.random() < 0.6:  # skirting board
        board = _edge(c.y - corner + 3 * c.unit) * (1 - _edge(c.y - corner))
        picture = _mix(picture, np.clip(_near(c.rng, tone, 0.2), 0, 1), board)
    return picture


def _wood(c):
    period = c.rng.uniform(11, 17) * c.unit
    along, across = (c.x, c.y) if c.rng.random() < 0.5 else (c.y, c.x)
    position = across + c.rng.uniform(0, period)
    tints = c.rng.uniform(-0.08, 0.08, 64).astype(np.float32)
    tint = tints[(position // period).astype(int)]
    grain = np.sin(across / c.unit * 0.7 + 1.5 * _smooth_noise(c, 3) + along / c.size * 2)
    brown = np.clip(np.array((0.62, 0.43, 0.26)) * c.rng.uniform(0.7, 1.3), 0, 0.95)
    boards = brown * (1 + tint + 0.06 * grain)[..., None]
    return _mix(boards, brown * 0.6, 0.8 * _joints(position, period, c.unit))


def _bricks(c):
    height = c.rng.uniform(8, 12) * c.unit
    length = height * c.rng.uniform(1.8, 2.2)
    y = c.y + c.rng.uniform(0, height)
    row = np.floor(y / height)
    x = c.x + c.rng.uniform(0, length) + np.mod(row, 2) * length / 2
    width = 1.6 * c.unit
    joint = np.maximum(_joints(y, height, width), _joints(x, length, width))
    a = np.clip(
        np.array((0.62, 0.33, 0.26)) * c.rng.uniform(0.75, 1.25) + c.rng.uniform(-0.06, 0.06, 3),
        0.05,
        0.9,
    )
    return _mix(a, np.clip(a + c.rng.uniform(0.14, 0.26), 0, 0.95), joint)


def _plaid(c):
    period = c.rng.uniform(12, 20) * c.unit
    x0, y0 = c.rng.uniform(0, 1, 2)
    a = _colour(c.rng)
    t = 0.5 * _wave(c.x / period + x0) + 0.5 * _wave(c.y / period + y0)
    return _mix(a, _near(c.rng, a, c.rng.uniform(0.2, 0.35)), t)


_BACKGROUNDS = {
    "gradient": _gradient,
    "noise": _noise,
    "stripes": _stripes,
    "tiles": _tiles,
    "landscape": _landscape,
    "floor_wall": _floor_wall,
    "wood": _wood,
    "bricks": _bricks,
    "plaid": _plaid,
}


class _Part(NamedTuple):
    """One object as drawn: colours [H, W, 3], coverage [H, W] 0..1, its effect on the floor."""

    colour: np.ndarray
    alpha: np.ndarray
    shade: np.ndarray  # [H, W] 0..1, how much of the floor's light the object takes
    glow: np.ndarray | None  # [H, W] coverage of the reflection, if the floor reflects
    kind: str
    bottom: float


def _outline(c, kind, x, y, radius, angle):
    """Signed distance-like field in pixels (positive inside) of an object's outline."""
    rng = c.rng
    if kind == "ball":
        stretch = rng.uniform(0.8, 1.0)
        return radius - np.hypot(x, y / stretch)
    if kind == "capsule":
        u = x * np.cos(angle) + y * np.sin(angle)
        v = -x * np.sin(angle) + y * np.cos(angle)
        length = radius * 0.55
        return radius * rng.uniform(0.45, 0.6) - np.hypot(u - np.clip(u, -length, length), v)
    if kind == "star":
        theta = np.arctan2(y, x) + angle
        return radius * (0.78 + 0.22 * np.cos(5 * theta)) - np.hypot(x, y)
    if kind == "ring":
        return radius * 0.26 - np.abs(np.hypot(x, y) - radius * 0.72)
    if kind == "mug":
        body = np.minimum(radius * 0.62 - np.abs(x), radius * 0.8 - np.abs(y))
        handle = radius * 0.14 - np.abs(np.hypot(x - radius * 0.68, y) - radius * 0.36)
        return np.maximum(body, handle)
    corners = 4 if kind == "box" else int(rng.integers(3, 7))
    angles = angle * (0.15 if kind == "box" else 1) + np.arange(corners) * 2 * np.pi / corners
    if kind == "polygon":
        angles = angles + rng.uniform(-0.3, 0.3, corners)
    reach = radius * (0.75 if kind == "box" else 0.8) * rng.uniform(0.8, 1.0, corners)
    return np.min([r - (x * np.cos(a) + y * np.sin(a)) for a, r in zip(angles, reach)], axis=0)


def _object_colour(c, backdrop):
    for _ in range(8):
        colour = np.clip(c.rng.uniform(0.08, 0.95, 3), 0, 1)
        if np.abs(colour - backdrop).max() > 0.3:
            break
    return colour


def _draw_object(c, kind, effect, light, backdrop, centre, radius) -> _Part:
    rng = c.rng
    x, y = c.x - centre[0], c.y - centre[1]
    angle = rng.uniform(0, 2 * np.pi)
    inside = _outline(c, kind, x, y, radius, angle)
    alpha = _edge(inside).astype(np.float32)
    colour = _object_colour(c, backdrop[int(centre[1]), int(centre[0])])
    lit = 0.85 + 0.3 * (x * light[0] + y * light[1]) / radius
    lit = lit - 0.25 * np.clip(1 - inside / (0.5 * radius), 0, 1) ** 2
    picture = colour * np.clip(lit, 0.3, 1.3)[..., None]
    if rng.random() < 0.35:  # bands or spots on the object
        t = _wave(_turned(c, angle) / (radius * rng.uniform(0.5, 0.8)))
        if rng.random() < 0.5:
            t = t * _wave(_turned(c, angle + np.pi / 2) / (radius * 0.6))
        picture = _mix(picture, picture * 0.55 + 0.1, t)
    floor = centre[1] + radius * 0.85
    shade, glow = np.zeros_like(alpha), None
    if effect == "contact":
        reach = np.hypot(
            (c.x - centre[0] + light[0] * radius * 0.5) / (1.25 * radius),
            (c.y - floor) / (0.42 * radius),
        )
        shade = np.clip(1.3 - reach, 0, 1) / 1.3
        shade = shade * shade * (3 - 2 * shade)
    elif effect == "cast":  # the outline, sheared away from the light and squashed on the floor
        squash, shear = 0.5, -np.sign(light[0]) * rng.uniform(0.6, 1.2)
        matrix = np.float32([[1, -shear, shear * floor], [0, squash, floor * (1 - squash)]])
        shade = cv2.warpAffine(alpha, matrix, (c.size, c.size))
        shade = cv2.GaussianBlur(shade, (0, 0), 1.3 * c.unit)
    elif effect == "reflection":
        matrix = np.float32([[1, 0, 0], [0, -1, 2 * floor]])
        glow = cv2.warpAffine(alpha, matrix, (c.size, c.size), flags=cv2.INTER_LINEAR)
        glow = glow * np.clip(1 - (c.y - floor) / (1.6 * radius), 0, 1) * (c.y > floor)
        glow = cv2.GaussianBlur(glow, (0, 0), 0.8 * c.unit)
    strength = rng.uniform(0.35, 0.6)
    return _Part(
        np.clip(picture, 0, 1).astype(np.float32),
        alpha,
        strength * shade,
        None if glow is None else 0.45 * glow,
        kind,
        centre[1] + radius,
    )


def _compose(backdrop, parts):
    """Lay the parts' effects, then the parts back to front, over the backdrop [H, W, 3]."""
    picture = backdrop
    for part in parts:
        picture = picture * (1 - part.shade[..., None])
        if part.glow is not None:
            tone = part.colour[part.alpha > 0.5].mean(axis=0) if part.alpha.max() > 0.5 else 0.5
            picture = _mix(picture, tone, part.glow)
    for part in parts:
        picture = _mix(picture, part.colour, part.alpha)
    return picture


def _to_bytes(picture):
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def _disc(pixels):
    side = 2 * max(1, round(pixels)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def _draw_mask(c, kind, coverage, shadow):
    """The user's mask, uint8 0/255: exact, with the shadow, or drawn loosely by hand."""
    mask = (coverage > 24).astype(np.uint8) * 255
    if kind == "with_shadow":
        mask = np.maximum(mask, (shadow > 8).astype(np.uint8) * 255)
    if kind == "loose":
        grown = cv2.dilate(mask, _disc(4 * c.unit)).astype(np.float32)
        wobble = cv2.GaussianBlur(grown, (0, 0), 2 * c.unit) + 40 * _smooth_noise(c, 6)
        near = cv2.dilate(grown, _disc(3 * c.unit)) > 0  # the noise draws no islands
        return np.maximum(
            ((wobble > 110) & near).astype(np.uint8) * 255, cv2.dilate(mask, _disc(c.unit))
        )
    return cv2.dilate(mask, _disc(c.rng.uniform(1, 2) * c.unit))


def render_scene(seed, *, role: str = "pool", size: int | None = None) -> Scene:
    """Render one scene.

    Args:
        seed: an int or a sequence of ints (run's seed, index); with `role` it fixes every pixel.
        role: one of `ROLES`; it decides families, object kinds and effects (see the module).
        size: side in pixels, at least 32; by default 64, or 96 for `high_resolution`.

    Returns:
        A `Scene`.

    Raises:
        ValueError: for an unknown role or a side under 32.
    """
    if role not in ROLES:
        raise ValueError(f"unknown scene role {role!r}: take one of {', '.join(ROLES)}")
    size = size or (HIGH_RESOLUTION_SIZE if role == "high_resolution" else SIZE)
    if size < 32:
        raise ValueError(f"scenes have at least 32 px a side, not {size}")
    rng = np.random.default_rng([ROLES.index(role), *np.atleast_1d(seed)])
    x, y = _GRIDS.get(size) or _grid(size)
    c = _Canvas(rng, size, size / SIZE, x, y)
    wide = role in ("pool", "high_resolution", "test")
    if wide:
        family = str(rng.choice(NEW if rng.random() < 0.5 else KNOWN))
    else:
        family = str(rng.choice(LABELLED.get(role, KNOWN)))
    kinds = KNOWN_OBJECTS + (NEW_OBJECTS if wide else ())
    effect = str(rng.choice(EFFECTS[role]))
    backdrop = np.clip(_BACKGROUNDS[family](c), 0, 1).astype(np.float32)
    backdrop = backdrop + rng.normal(0, 0.004, backdrop.shape).astype(np.float32)
    side = rng.choice((-1.0, 1.0))
    light = (side * rng.uniform(0.4, 0.9), -rng.uniform(0.4, 0.8))
    low = 0.45 if family in ("landscape", "floor_wall") else 0.25
    parts, discs = [], []
    for _ in range(int(rng.choice((1, 2, 3), p=(0.4, 0.4, 0.2)))):
        for _ in range(6):  # objects may touch and hide a part of each other, not lie stacked
            radius = rng.uniform(0.1, 0.2) * size
            centre = (rng.uniform(0.2, 0.8) * size, rng.uniform(low, 0.75) * size)
            if all(
                np.hypot(centre[0] - u, centre[1] - v) > 0.85 * (radius + r) for u, v, r in discs
            ):
                break
        else:
            continue
        discs.append((*centre, radius))
        kind = str(rng.choice(kinds))
        parts.append(_draw_object(c, kind, effect, light, backdrop, centre, radius))
    parts.sort(key=lambda part: part.bottom)  # lower in the image is nearer
    chosen, coverage = _choose_target(parts)
    image = _to_bytes(_compose(backdrop, parts))
    truth = _to_bytes(_compose(backdrop, parts[:chosen] + parts[chosen + 1 :]))
    change = np.abs(image.astype(np.int16) - truth).max(axis=2)
    coverage = (coverage * 255).astype(np.uint8)
    shadow = np.where(coverage > 8, 0, change).astype(np.uint8)
    mask_kind = str(rng.choice(MASK_KINDS, p=RORD_MASK_SHARES if role == "rord" else MASK_SHARES))
    mask = _draw_mask(c, mask_kind, coverage, shadow)
    return Scene(
        image, truth, coverage, shadow, mask, family, parts[chosen].kind, mask_kind, effect
    )


def _choose_target(parts):
    """The part seen best, and its visible coverage [H, W] 0..1 (nearer parts hide it)."""
    best = (-1.0, 0, parts[0].alpha)
    for number, part in enumerate(parts):
        seen = part.alpha.copy()
        for nearer in parts[number + 1 :]:
            seen = seen * (1 - nearer.alpha)
        fraction = seen.sum() / max(part.alpha.sum(), 1e-6)
        if fraction > best[0] + 1e-6:
            best = (fraction, number, seen)
    return best[1], best[2]
