"""What of a removal is kept: how a model's output becomes the user's image again.

A diffusion model gives back every pixel anew, also those that it was to leave alone: through the
autoencoder, a little discoloured, now and then with another object changed. Three modes say how
much of it is kept; everything else is the source's own pixels, bit for bit:

`effect`   the hole, and what the removal changed beside it: a shadow or a reflection that went
           away. Found in the difference between the removal and what the autoencoder alone makes of
           the source: blurred, above the noise that is measured far from the hole, connected to it.
`exact`    the hole alone, a little wider. Shadows outside of it stay.
`full`     all of the crop, as the paper does it.

In `effect` and `exact` the seam lies inside of what is kept. The removal's colours are brought to
the source's there by a membrane: an offset u with laplace(u) = 0 inside and u = source - removal,
smoothed along the rim, on the rim (Perez et al., Poisson Image Editing, 2003).

Everything is found at the size at which the model worked and enlarged; the source's own detail
stays wherever the removal only changed its light.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

MODES = ("effect", "exact", "full")
# Rows, and columns, of the source that are composed at a time: no float copy of a large crop.
_BAND, _STRIP = 256, 64


@dataclass(frozen=True)
class Limits:
    """What counts as an effect, and how seams are made; chosen on scenes that no figure is of.

    Lengths are px of an image that was worked on at 64 px a side, and grow with the square root of
    that side; differences are grey levels of 0..255.

    Attributes:
        blur: sigma of the smoothing of the difference between removal and round trip.
        low: difference that counts as an effect where it is connected to the hole,
        noise: and how many times the median difference far from the hole it is at least.
        detail: how many times the smoothed change the fine one is at most, that the smoothing took
            away: a shadow goes smoothly, what breaks another object has its edges.
        reach: largest distance of an effect from the hole, as a multiple of the hole's size
            (the square root of its area).
        ring: the hole widened by so much is kept in any case; what is connected to it is its.
        grow: what is found is widened by so much.
        widen: by how much `exact` widens the hole.
        feather: width of the seam, inside of what is kept.
        rim: sigma of the smoothing along the rim of the offset between source and removal.
        fade: depth at which a third of that offset is left.
        faint, strong: changes beside the hole up to `faint` are laid over the source's own pixels,
            from `strong` on the removal takes their place.
    """

    blur: float = 2.0
    low: float = 2.5
    noise: float = 3.0
    detail: float = 1.2
    reach: float = 2.5
    ring: float = 2.0
    grow: float = 1.0
    widen: float = 4.0
    feather: float = 1.0
    rim: float = 2.0
    fade: float = 4.0
    faint: float = 0.0
    strong: float = 4.0


LIMITS = Limits()


def compose(
    source: np.ndarray,
    removal: np.ndarray,
    round_trip: np.ndarray | None,
    mask: np.ndarray,
    mode: str = "effect",
    *,
    keep: np.ndarray | None = None,
    canvas: np.ndarray | None = None,
    borders: tuple[bool, bool, bool, bool] = (True, True, True, True),
    limits: Limits = LIMITS,
) -> tuple[np.ndarray, np.ndarray]:
    """Compose a removal with its source.

    Args:
        source: [H, W, 3] uint8, the crop that was worked on, at its own size.
        removal: [h, w, 3] uint8, what the model made of it, at the size at which it worked.
        round_trip: [h, w, 3] uint8, the source after the autoencoder alone, at that size; `effect`
            cannot do without, `exact` is better with it, `full` does not read it.
        mask: [H, W] uint8, white (>= 128) is removed.
        mode: one of `MODES`.
        keep: [H, W] bool, pixels that stay as they are in every mode (holes of other crops).
        canvas: [H, W, 3] uint8, what the removal is laid over, by default the source; where other
            crops have been laid already it is theirs.
        borders: which sides (left, top, right, bottom) are the whole image's; beyond the others it
            goes on, and there has to be no seam.
        limits: what counts as an effect.

    Returns:
        The image [H, W, 3] uint8, and [H, W] uint8 how much of each pixel is the removal's: 0 where
        the source stands bit for bit, 255 where nothing of it is left.

    Raises:
        ValueError: an unknown mode, or `effect` without a round trip.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}: take one of {', '.join(MODES)}")
    if mode == "effect" and round_trip is None:
        raise ValueError("the mode effect needs the source's round trip through the autoencoder")
    canvas = source if canvas is None else canvas
    small, hole = shrink(source, mask, removal.shape[:2])
    if mode == "full":
        image = put_back(source, mask, small, removal)
        if keep is None:
            return image, np.full(mask.shape, 255, np.uint8)
        if image is removal:
            image = image.copy()
        image[keep] = canvas[keep]
        return image, np.where(keep, 0, 255).astype(np.uint8)
    change = removal.astype(np.float32) - (small if round_trip is None else round_trip)
    painted = removal.astype(np.float32)
    unit = get_unit(hole.shape)
    if mode == "exact":
        region = widen(hole, limits.widen * unit)
    else:
        barrier = None if keep is None else shrink_mask(keep, hole.shape)
        region = find_effect(change, hole, barrier, limits=limits)
    _clear_edges(region, borders)
    weight = feather(region, limits.feather * unit)
    strong = measure_strength(change, limits)
    painted += fit_membrane(small - painted, region, limits.rim * unit, limits.fade * unit)
    change += fit_membrane(-change, region, limits.rim * unit, limits.fade * unit)
    change = strong * (painted - small) + (1 - strong) * change
    return _lay(source, canvas, painted, change, weight, mask, keep)


def put_back(original, mask, small, removed) -> np.ndarray:
    """Bring all of a removal to the original's size without losing the original's detail.

    Inside the mask it is the enlarged removal; outside the original plus what the removal changed
    (a shadow that went away), which is smooth enough to be enlarged.

    Args:
        original: [H, W, 3] uint8, the image.
        mask: [H, W] uint8, white (>= 128) is removed.
        small, removed: [h, w, 3] uint8, the image at the model's size, before and after.
    """
    if removed.shape == original.shape:
        return removed
    height, width = mask.shape
    result = cv2.resize(removed, (width, height), interpolation=cv2.INTER_CUBIC)
    # Enlarged along x as a whole, along y in strips: as OpenCV goes about it.
    change = removed.astype(np.float32) - small
    change = cv2.resize(change, (width, len(change)), interpolation=cv2.INTER_CUBIC)
    for left in range(0, width, _STRIP):
        strip = np.s_[:, left : left + _STRIP]
        near = np.s_[:, max(0, left - 8) : left + _STRIP + 8]  # as far as the blur sees, and more
        soft = cv2.GaussianBlur((mask[near] >= 128).astype(np.float32), (0, 0), 1.5)
        inside, own = result[strip], original[strip]
        soft = soft[:, min(left, 8) :][:, : inside.shape[1], None]
        part = np.ascontiguousarray(change[strip])
        part = cv2.resize(part, inside.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        mixed = inside * soft + (own + part) * (1 - soft)
        result[strip] = np.clip(mixed + 0.5, 0, 255).astype(np.uint8)
    return result


def get_unit(shape: tuple[int, int]) -> float:
    """Scale of the lengths in `Limits` for an image worked on at `shape` (height, width)."""
    return max(1.0, min(shape) / 64) ** 0.5


def shrink(source: np.ndarray, mask: np.ndarray, shape: tuple[int, int]):
    """Source and mask at the size (height, width) at which the model works, the mask 0 or 255.

    A pixel of the hole does not get lost in a smaller mask: any part of it counts.
    """
    if source.shape[:2] == tuple(shape):
        return source, np.where(mask >= 128, 255, 0).astype(np.uint8)
    way = cv2.INTER_AREA if _is_smaller(shape, mask.shape) else cv2.INTER_CUBIC
    small = cv2.resize(source, shape[::-1], interpolation=way)
    return small, np.where(shrink_mask(mask >= 128, shape), 255, 0).astype(np.uint8)


def _is_smaller(shape, than) -> bool:
    """Whether a size is a smaller view of another, not just rounded on one side."""
    return min(shape) < min(than) or 1.5 * max(shape) < max(than)


def shrink_mask(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """[H, W] bool at another size (height, width): true where any part of it was."""
    if _is_smaller(shape, mask.shape):  # in float32, where no small share is rounded away
        return cv2.resize(mask.astype(np.float32), shape[::-1], interpolation=cv2.INTER_AREA) > 0
    white = mask.astype(np.uint8) * 255
    return cv2.resize(white, shape[::-1], interpolation=cv2.INTER_LINEAR) > 0


def widen(hole: np.ndarray, pixels: float) -> np.ndarray:
    """Where [H, W] bool the hole ([H, W], above 0) is at most `pixels` px away, as a disc."""
    inside = (np.asarray(hole) > 0).astype(np.uint8)
    if not inside.any():
        return inside > 0
    return cv2.distanceTransform(1 - inside, cv2.DIST_L2, 5) <= pixels


def find_effect(
    change: np.ndarray,
    hole: np.ndarray,
    barrier: np.ndarray | None = None,
    *,
    limits: Limits = LIMITS,
) -> np.ndarray:
    """The hole and what the removal changed beside it, [h, w] bool.

    Args:
        change: [h, w, 3] float32, removal - round trip, grey levels.
        hole: [h, w] uint8, above 0 is removed.
        barrier: [h, w] bool, where no effect is followed (holes of other crops).
    """
    unit = get_unit(hole.shape)
    outside = hole == 0
    distance = cv2.distanceTransform(outside.astype(np.uint8), cv2.DIST_L2, 5)
    reach = limits.reach * float(np.sqrt(hole.size - np.count_nonzero(outside)))
    size, fine, level = measure_change(change, outside, distance, reach, limits)
    near = (size > level) & (fine <= limits.detail * size) & (distance <= reach)
    if barrier is not None:
        near &= ~barrier
    ring = distance <= limits.ring * unit
    _, labels = cv2.connectedComponents((near | ring).astype(np.uint8), connectivity=8)
    own = np.unique(labels[~outside])
    found = near & np.isin(labels, own[own > 0])
    return widen(found, limits.grow * unit) | ring


def measure_change(change, outside, distance, reach, limits):
    """How large the change is outside of the hole, smoothed and what the smoothing took away (rms),
    both [h, w], and the level above which it counts."""
    far = outside & (distance > min(reach / 2, distance.max() / 2))
    known = outside.astype(np.float32)
    sigma = limits.blur * get_unit(outside.shape)
    weight = np.maximum(cv2.GaussianBlur(known, (0, 0), sigma), 1e-3)
    drift = np.median(change[far], axis=0) if far.any() else np.zeros(3, np.float32)
    change = (change - drift) * known[..., None]
    mean = cv2.GaussianBlur(change, (0, 0), sigma) / weight[..., None]
    rest = np.square(change - mean).sum(axis=2) * known
    fine = np.sqrt(cv2.GaussianBlur(rest, (0, 0), sigma) / weight)
    size = np.abs(mean).max(axis=2) * known
    noise = float(np.median(size[far])) if far.any() else 0.0
    return size, fine, max(limits.low, limits.noise * noise)


def measure_strength(change: np.ndarray, limits: Limits) -> np.ndarray:
    """Where a change [h, w, 3] is so large that the removal replaces the source, [h, w, 1] in 0..1.

    A faint change is laid over the source, whose detail the autoencoder would lose. A strong one is
    not: what the autoencoder left out of the source (a shadow's edge) would come back with it.
    """
    sigma = limits.blur * get_unit(change.shape[:2])
    size = np.abs(cv2.GaussianBlur(change, (0, 0), sigma)).max(axis=2, keepdims=True)
    return np.clip((size - limits.faint) / (limits.strong - limits.faint), 0, 1)


def feather(region: np.ndarray, pixels: float) -> np.ndarray:
    """[h, w] float32 weights: 0 outside of the region, 1 from `pixels` px inside of it on."""
    if region.all():
        return np.ones(region.shape, np.float32)
    depth = cv2.distanceTransform(region.astype(np.uint8), cv2.DIST_L2, 5)
    ramp = np.clip(depth / (pixels + 1), 0, 1)  # 1: the first pixel inside has some weight already
    return (ramp * ramp * (3 - 2 * ramp)).astype(np.float32)


def fit_membrane(
    difference: np.ndarray, region: np.ndarray, sigma: float, fade: float
) -> np.ndarray:
    """The smooth offset u [h, w, 3] that takes a difference's values around a region into it.

    u = d + exp(-depth / fade) v: d is the median of the difference, v that of a membrane:
    laplace(v) = 0 in the region, and outside the rest of the difference, smoothed over `sigma` px
    of what lies outside. It fades, or a shadow at the rim would darken all of the filling. Zero
    where nothing lies outside.
    """
    outside = ~region
    if not outside.any():
        return np.zeros_like(difference)
    level = np.median(difference[outside], axis=0)
    known = outside.astype(np.float32)
    mean = cv2.GaussianBlur((difference - level) * known[..., None], (0, 0), sigma)
    mean /= np.maximum(cv2.GaussianBlur(known, (0, 0), sigma), 1e-6)[..., None]
    depth = cv2.distanceTransform(region.astype(np.uint8), cv2.DIST_L2, 5)
    return level + np.exp(-depth / fade)[..., None] * _solve_laplace(mean, outside)


_CROSS = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], np.float32) / 4


def _solve_laplace(values: np.ndarray, known: np.ndarray, steps: int = 12) -> np.ndarray:
    """Fill [h, w, 3] where it is not `known` [h, w] by relaxation, from coarse to fine; no slope
    at the borders."""
    height, width = known.shape
    if known.all():
        return values
    if max(height, width) <= 2:
        return np.where(known[..., None], values, values[known].mean(axis=0))
    half = ((width + 1) // 2, (height + 1) // 2)
    share = cv2.resize(known.astype(np.float32), half, interpolation=cv2.INTER_AREA)
    coarse = cv2.resize(values * known[..., None], half, interpolation=cv2.INTER_AREA)
    coarse = _solve_laplace(coarse / np.maximum(share, 1e-6)[..., None], share > 0, steps)
    fixed = known[..., None]
    filled = np.where(fixed, values, cv2.resize(coarse, (width, height)))
    for _ in range(steps):
        relaxed = cv2.filter2D(filled, -1, _CROSS, borderType=cv2.BORDER_REPLICATE)
        filled = np.where(fixed, values, relaxed)
    return filled


def _clear_edges(region: np.ndarray, borders: tuple[bool, bool, bool, bool]) -> None:
    """Nothing of a region lies on an edge of the crop beyond which the image goes on."""
    for is_border, edge in zip(borders, (np.s_[:, :1], np.s_[:1], np.s_[:, -1:], np.s_[-1:])):
        if not is_border:
            region[edge] = False


def _lay(source, canvas, painted, change, weight, mask, keep):
    """Mix at the source's size: `painted` in the hole, the source plus `change` beside it."""
    height, width = source.shape[:2]
    result, effect = canvas.copy(), np.zeros((height, width), np.uint8)
    same = weight.shape == (height, width)
    soft = cv2.GaussianBlur((mask >= 128).astype(np.uint8) * 255, (0, 0), 1.5)
    rows = np.flatnonzero(weight.any(axis=1))
    if not rows.size:
        return result, effect
    scale = height / weight.shape[0]
    first = max(0, int((rows[0] - 2) * scale))
    last = min(height, int((rows[-1] + 3) * scale) + 1)
    for top in range(first, last, _BAND):
        band = slice(top, min(top + _BAND, last))
        part, new, added = (
            x[band] if same else _enlarge_rows(x, (height, width), band, way)
            for x, way in (
                (weight, cv2.INTER_LINEAR),
                (painted, cv2.INTER_CUBIC),
                (change, cv2.INTER_CUBIC),
            )
        )
        levels = (255 * part + 0.5).astype(np.uint8)
        # Between pixels of a crop, at a corner of the hole, it is a little less than all.
        levels[(mask[band] >= 128) & (part > 0.75)] = 255
        if keep is not None:
            levels[keep[band]] = 0
        own = source[band].astype(np.float32)
        inside = soft[band].astype(np.float32)[..., None] / 255
        new = new * inside + (own + added) * (1 - inside)
        below = canvas[band]
        mixed = below + levels[..., None] / np.float32(255) * (new - below)
        mixed = np.clip(mixed + 0.5, 0, 255).astype(np.uint8)
        result[band] = np.where(levels[..., None] > 0, mixed, below)
        effect[band] = levels
    return result, effect


def _enlarge_rows(small: np.ndarray, shape, band: slice, way: int) -> np.ndarray:
    """Rows of `small` resized to `shape` (height, width), without the rest of it."""
    (height, width), (h, w) = shape, small.shape[:2]
    x = ((np.arange(width, dtype=np.float32) + 0.5) * (w / width) - 0.5)[None]
    y = ((np.arange(band.start, band.stop, dtype=np.float32) + 0.5) * (h / height) - 0.5)[:, None]
    rows = band.stop - band.start
    x, y = np.broadcast_to(x, (rows, width)).copy(), np.broadcast_to(y, (rows, width)).copy()
    return cv2.remap(small, x, y, way, borderMode=cv2.BORDER_REPLICATE)
