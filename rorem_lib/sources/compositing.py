"""Compositing: a cut-out's rim, its light, and what it does to the ground: shadow, reflection.

The scene's geometry is not known: a cut-out is taken to stand upright, on what is lowest of it, and
on ground seen a little from above, which is all that its shadow falls on.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

FAINTEST = 1 / 255  # an effect below changes no pixel


class Light(NamedTuple):
    """Where a point `h` px above the ground casts its shadow: `side * h` px along the ground to the
    right, and `back * h` px up in the image.
    """

    side: float
    back: float


def draw_light(rng) -> Light:
    """A light from the left or the right, more often from the front than from behind."""
    side = rng.uniform(0.5, 1.4) * rng.choice([-1, 1])
    toward = rng.random() < 0.4  # light from behind: the shadow falls towards the camera
    return Light(side, -rng.uniform(0.2, 0.5) if toward else rng.uniform(0.15, 0.45))


def clean_rim(colour, alpha):
    """Give the rim the colour of the nearest surely opaque pixel: the old background shows there.

    Glass and the like, far from any opaque pixel, keep their colour.
    """
    opaque = (alpha > 0.95).astype(np.uint8)
    core = cv2.erode(opaque, np.ones((3, 3), np.uint8))
    core |= opaque & (1 - cv2.dilate(core, np.ones((5, 5), np.uint8)))  # thin parts have no inside
    if not core.any():
        return colour
    distance, label = cv2.distanceTransformWithLabels(
        1 - core, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    of_label = np.zeros((label.max() + 1, 3), np.float32)
    of_label[label[core > 0]] = colour[core > 0]
    nearest = cv2.blur(of_label[label], (3, 3))
    reach = max(3, 0.02 * max(alpha.shape))
    fraction = np.where(core > 0, 0, np.clip(2 - distance / reach, 0, 1))[..., None]
    return (colour * (1 - fraction) + nearest * fraction).astype(np.float32)


def cut_around(gt, x, y, shape):
    """What lies behind and around the object, for its light."""
    height, width = shape
    return gt[
        max(0, y - height // 4) : y + height + height // 4,
        max(0, x - width // 4) : x + width + width // 4,
    ]


def relight(colour, alpha, around, light: Light, strength: float):
    """Move the object's colours towards its surroundings' and shade it from the light's side."""
    if not strength:
        return colour
    own = cv2.cvtColor(np.ascontiguousarray(colour), cv2.COLOR_RGB2Lab)
    near = cv2.cvtColor(around.astype(np.float32) / 255, cv2.COLOR_RGB2Lab).reshape(-1, 3)
    visible = own[alpha > 0.5]
    mean, target = visible.mean(axis=0), near.mean(axis=0)
    contrast = (near[:, 0].std() + 5) / (visible[:, 0].std() + 5)
    gain = np.array([np.clip(contrast, 0.6, 1.6) ** strength, 1, 1], np.float32)
    lab = (own - mean) * gain + mean + strength * np.clip(target - mean, -40, 40)
    lit = np.clip(cv2.cvtColor(lab.astype(np.float32), cv2.COLOR_Lab2RGB), 0, 1)
    height, width = alpha.shape
    across = np.linspace(-1, 1, width, dtype=np.float32) * -np.sign(light.side)
    down = np.linspace(-1, 1, height, dtype=np.float32)[:, None] * -0.6  # light comes from above
    return np.clip(lit * (1 + 0.35 * strength * (across + down))[..., None], 0, 1)


# ---------------------------------------------------------------------------------------- effects


def shift(x, y):
    """The affine matrix [2, 3] that moves an image by x, y px."""
    return np.array([[1, 0, x], [0, 1, y]], np.float64)


def warp(picture, matrix, size: int):
    """An image moved by an affine matrix [2, 3] into a square of `size` px, bilinear."""
    return cv2.warpAffine(np.asarray(picture, np.float32), matrix, (size, size))


class Standing(NamedTuple):
    """An object with empty space around it, and the ground under it.

    Attributes:
        colour: [h, w, 3] float32 0..1.
        alpha: [h, w] float32 0..1.
        height: of the object, px.
        foot, slope: the ground meets column u in row foot + slope * u.
        above: [h, w], px over the ground.
        x, y: where the left upper corner lies in the image.
        size: the image's side.
    """

    colour: np.ndarray
    alpha: np.ndarray
    height: int
    foot: float
    slope: float
    above: np.ndarray
    x: int
    y: int
    size: int


def stand(colour, alpha, x, y, size: int) -> Standing:
    """Find the ground: the line below the object that comes nearest to its centre."""
    margin = 8 + max(alpha.shape) // 5
    alpha = cv2.copyMakeBorder(alpha, *[margin] * 4, cv2.BORDER_CONSTANT)
    colour = cv2.copyMakeBorder(colour, *[margin] * 4, cv2.BORDER_CONSTANT)
    rows, columns = np.nonzero(alpha > 0.5)
    lowest = np.zeros(alpha.shape[1])
    np.maximum.at(lowest, columns, rows + 1)
    at = np.flatnonzero(lowest)
    slopes = np.linspace(-0.35, 0.35, 29)
    feet = (lowest[at] - slopes[:, None] * at).max(axis=1)
    best = int(np.argmin(feet + slopes * columns.mean()))
    foot, slope = feet[best], slopes[best]
    v, u = np.mgrid[: alpha.shape[0], : alpha.shape[1]].astype(np.float32)
    above = np.float32(foot) + np.float32(slope) * u - v
    return Standing(
        colour, alpha, int(np.ptp(rows)) + 1, foot, slope, above, x - margin, y - margin, size
    )


def draw_effect(gt, colour, alpha, x, y, effect: str, light: Light, rng):
    """The background under the effect, float32 0..255, and the effect's strength, 0..1.

    Shadows multiply. A factor on light is its 2.2th root on the file's values.
    """
    size = len(gt)
    ground, strength = gt.astype(np.float32), np.zeros((size, size), np.float32)
    if effect == "none":
        return ground, strength
    standing = stand(colour, alpha, x, y, size)
    dark, blueness, gloss = rng.uniform(0.5, 0.8), rng.uniform(0, 0.12), rng.uniform(0.15, 0.35)
    strength = 0.8 * _contact_shadow(standing)
    if effect == "shadow":
        strength = 1 - (1 - strength) * (1 - dark * cast_shadow(standing, light))
    strength = np.where(strength <= FAINTEST, 0, strength).astype(np.float32)
    tint = np.array([1, 1 - blueness / 2, 1 - blueness], np.float32)  # the sky lights a shadow
    ground *= np.power(1 - strength[..., None] * tint, 1 / 2.2)
    if effect == "reflection":
        layer = _reflect(standing) * np.float32(gloss)
        layer[layer[..., 3] <= FAINTEST] = 0
        ground = ground * (1 - layer[..., 3:]) + layer[..., :3] * 255
        strength = np.maximum(strength, layer[..., 3])
    return ground, strength


def _contact_shadow(o: Standing):
    """Where the object touches the ground and no light gets in, 0..1."""
    solid = o.alpha > 0.5
    gap = np.where(solid, o.above, np.inf).min(axis=0)  # below each column of the object
    soft = max(1.0, 0.02 * max(np.ptp(np.flatnonzero(solid.any(axis=0))), o.height))
    band = solid & (o.above < gap + 2 * soft)
    band = cv2.GaussianBlur(
        band * np.exp(-np.maximum(gap, 0) / (3 * soft)), (0, 0), 1.5 * soft, sigmaY=soft
    )
    return warp(band / max(1e-6, band.max()), shift(o.x, o.y + soft), o.size)


def cast_shadow(o: Standing, light: Light):
    """The silhouette laid on the ground, softer and fainter the higher its part of it, 0..1."""
    fraction = np.clip(o.above / o.height, 0, 1)
    sigmas = 0.6 + o.height * np.array([0, 0.012, 0.03, 0.06])
    level = np.interp(0.6 + 0.06 * o.height * fraction, sigmas, np.arange(4))
    # A little taller than the object, since it has a depth: no lit line is left below its foot.
    blocked = cv2.dilate(o.alpha, np.ones((3 + 2 * (o.height // 100), 1), np.uint8))
    shadow = sum(
        cv2.GaussianBlur(blocked, (0, 0), sigma) * np.clip(1 - abs(level - k), 0, 1)
        for k, sigma in enumerate(sigmas)
    ) * (1 - 0.4 * fraction)
    side = light.side
    back = light.back - side * o.slope  # along the ground; else tilted ones shrink to a line
    matrix = np.array(
        [
            [1 + side * o.slope, -side, o.x + side * o.foot],
            [o.slope * (1 - back), back, o.y + o.foot * (1 - back)],
        ]
    )
    return warp(shadow, matrix, o.size)


def _reflect(o: Standing):
    """The object upside down below the ground, fading: colour times alpha and alpha, 0..1."""
    layer = np.dstack([o.colour * o.alpha[..., None], o.alpha])
    layer = cv2.GaussianBlur(layer, (0, 0), 0.6 + 0.004 * o.height, sigmaY=0.6 + 0.012 * o.height)
    layer *= np.exp(-np.clip(o.above / o.height, 0, 1) / 0.5)[..., None]
    return warp(layer, np.array([[1, 0, o.x], [2 * o.slope, -1, o.y + 2 * o.foot - 1]]), o.size)
