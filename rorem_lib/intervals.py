"""Uncertainty of what a test set measures: intervals of rates and of paired differences, tests.

500 test images leave about 4 points of chance in a success rate (95%), so no rate stands without
its interval, and two methods are compared image by image. Images of one scene (a *group*: RORD has
ten of each) resemble each other and are less than as many independent ones, so every interval takes
the groups as what was drawn at random. Where each image is a group of its own, the intervals are
Wilson's and Tango's as published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri, stdtr, stdtrit

LEVEL = 0.95  # of all intervals; what is tested at 1 - LEVEL agrees with them


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two methods on the same images.

    Attributes:
        difference: mean of the first minus mean of the second; points (0..100) for yes / no.
        low, high: 95% interval of the difference, same unit; NaN from a single group of measures.
        p_value: two-sided, 0..1, of the test that the interval inverts: 0 lies in the interval if
            and only if it is 0.05 or more.
        only_first, only_second: images on which one alone succeeds, a half vote as one half; None
            for measures that are not yes / no.
        n, n_groups: numbers of images and of groups.
    """

    difference: float
    low: float
    high: float
    p_value: float
    only_first: float | None
    only_second: float | None
    n: int
    n_groups: int

    @property
    def significant(self) -> bool:
        """Whether the test, taken alone, excludes equality; see `adjust_holm` for a table."""
        return self.p_value < 1 - LEVEL


# -------------------------------------------------------------------------------------- rates


def wilson_interval(k: float, n: float, *, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a rate `k` of `n`, both ends in 0..1; (0, 1) for n = 0.

    Args:
        k, n: successes and images; fractions where `n` is an effective number.

    Raises:
        ValueError: unless 0 <= k <= n.
    """
    if not 0 <= k <= n:
        raise ValueError(f"a rate needs 0 <= k <= n, not k={k} of n={n}")
    if n == 0:
        return 0.0, 1.0
    rate, z2 = k / n, ndtri((1 + level) / 2) ** 2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def rate_interval(values, groups=None, *, level: float = LEVEL) -> tuple[float, float]:
    """Interval of a success rate: Wilson's with the number of independent images in the groups.

    Args:
        values: [N], 0 or 1 an image, one half where annotators are even.
        groups: [N] names; None where each image is a group of its own.

    Returns:
        Both ends in 0..1; (0, 1) without values.

    Raises:
        ValueError: a value is not in 0..1, or the lengths differ.
    """
    values, groups = _check(values, groups)
    if not values.size:
        return 0.0, 1.0
    if values.min() < 0 or values.max() > 1:
        raise ValueError("a rate's values lie between 0 and 1")
    n = values.size / design_effect(values, groups, level=level)
    return wilson_interval(min(1.0, values.mean()) * n, n, level=level)


def design_effect(values, groups, *, level: float = LEVEL) -> float:
    """How many times more images the groups need for the precision of independent ones, >= 1.

    The variance of the mean over groups against that over images (Kish), and where there are few
    groups what their number costs in Student's t, as Korn and Graubard (1998) correct Wilson's
    interval. It is 1 where each image is a group, and images per group where all values are equal:
    then nothing is known of how alike a group's images are.
    """
    values, groups = _check(values, groups)
    sums, sizes = _sum_groups(values, groups)
    n, count = values.size, sizes.size
    if count in (0, n):
        return 1.0
    if count == 1:
        return float(n)
    spread = values.var(ddof=1) / n
    ratio = _variance_of_mean(sums, sizes) / spread if spread > 0 else n / count
    quantile = (1 + level) / 2
    return float(max(1.0, ratio) * (stdtrit(count - 1, quantile) / stdtrit(n - 1, quantile)) ** 2)


def _check(values, groups) -> tuple[np.ndarray, np.ndarray]:
    """Values as [N] float and groups as [N]; ValueError where they don't fit."""
    values = np.asarray(values, dtype=np.float64)
    groups = np.arange(values.size) if groups is None else np.asarray(groups)
    if values.ndim != 1 or values.shape != groups.shape:
        raise ValueError(f"{values.shape} values with {groups.shape} groups: give one an image")
    if not np.isfinite(values).all():
        raise ValueError("an interval needs finite values")
    return values, groups


def _sum_groups(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum [G] of the values of each group, and how many they are [G]."""
    _, places = np.unique(groups, return_inverse=True)
    return np.bincount(places, weights=values), np.bincount(places).astype(float)


def _variance_of_mean(sums: np.ndarray, sizes: np.ndarray) -> float:
    """Of a mean over images whose groups are independent, two or more."""
    n, count = sizes.sum(), sizes.size
    mean = sums.sum() / n
    return float(count / (count - 1) * np.square(sums - mean * sizes).sum() / n**2)


# -------------------------------------------------------------------------- paired differences


def compare_paired(a, b, groups=None) -> Comparison:
    """Compare two methods on the same images, in the same order.

    Args:
        a, b: [N] successes (0, 1, or one half where annotators are even), or [N] float measures
            such as PSNR in dB.
        groups: [N] names; None where each image is a group of its own.

    Returns:
        `compare_successes` or, where other values than these occur, `compare_measures`.

    Raises:
        ValueError: the lengths differ, there is nothing to compare, or a value is not finite.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    successes = np.isin(a, (0, 0.5, 1)).all() and np.isin(b, (0, 0.5, 1)).all()
    return (compare_successes if successes else compare_measures)(a, b, groups)


def compare_successes(a, b, groups=None) -> Comparison:
    """Difference of two success rates: McNemar's score test and Tango's interval, which inverts it.

    Both count images by `design_effect` of the differences. An exact test can't fall below
    2^(1 - m) where m groups differ; nor does this one: five groups or fewer tell nothing.

    Args:
        a, b: [N] in 0..1, how far each method succeeded on an image.
        groups: [N] names; None where each image is a group of its own.

    Raises:
        ValueError: see `compare_paired`.
    """
    difference, groups = _subtract(a, b, groups)
    sums, sizes = _sum_groups(difference, groups)
    first, second = difference.clip(min=0).sum(), (-difference).clip(min=0).sum()
    effect = design_effect(difference, groups)
    score = (first - second) / np.sqrt((first + second) * effect) if first + second else 0.0
    low, high = _invert_tango(first / effect, second / effect, difference.size / effect)
    least = min(1.0, 2.0 ** (1 - np.count_nonzero(~np.isclose(sums, 0))))
    if least >= 1 - LEVEL:
        low, high = min(low, 0.0), max(high, 0.0)
    return Comparison(
        100 * float(difference.mean()),
        100 * low,
        100 * high,
        float(max(least, 2 * ndtr(-abs(score)))),
        float(first),
        float(second),
        difference.size,
        sizes.size,
    )


def compare_measures(a, b, groups=None) -> Comparison:
    """Mean difference of a measure: Student's t over groups, test and interval.

    Args:
        a, b: [N] float, finite.
        groups: [N] names; None where each image is a group of its own.

    Raises:
        ValueError: see `compare_paired`.
    """
    difference, groups = _subtract(a, b, groups)
    sums, sizes = _sum_groups(difference, groups)
    low, high, p_value = _test_mean(sums, sizes)
    counts = difference.size, sizes.size
    return Comparison(float(difference.mean()), low, high, p_value, None, None, *counts)


def mean_interval(values) -> tuple[float, float]:
    """Student's t interval (95%) of the mean of independent values [N]; NaN for fewer than two."""
    values, _ = _check(values, None)
    return _test_mean(values, np.ones(values.size))[:2]


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values of a family of tests, in the order given (Holm 1979)."""
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values)
    stepped = p_values[order] * np.arange(p_values.size, 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(stepped))
    return adjusted.tolist()


def _subtract(a, b, groups) -> tuple[np.ndarray, np.ndarray]:
    """First minus second by image, and the groups; ValueError where they can't be compared."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(
            f"a paired comparison needs the same images on both sides, not "
            f"{a.shape} and {b.shape} values"
        )
    return _check(a - b, groups)


def _test_mean(sums: np.ndarray, sizes: np.ndarray) -> tuple[float, float, float]:
    """Low and high end of the mean over images, and p of its being 0, by t over the groups."""
    if sizes.size < 2:
        return np.nan, np.nan, 1.0
    mean, error = sums.sum() / sizes.sum(), np.sqrt(_variance_of_mean(sums, sizes))
    half = stdtrit(sizes.size - 1, (1 + LEVEL) / 2) * error
    if error == 0:
        p_value = float(mean == 0)
    else:
        p_value = 2 * stdtr(sizes.size - 1, -abs(mean) / error)
    return float(mean - half), float(mean + half), float(p_value)


def _invert_tango(first: float, second: float, n: float) -> tuple[float, float]:
    """Tango's score interval (1998) of (first - second) / n, ends in -1..1.

    Args:
        first, second: on how many of `n` images one alone succeeds; any numbers >= 0.
    """
    first, second, n = float(first), float(second), float(n)
    z, found = float(ndtri((1 + LEVEL) / 2)), (first - second) / n

    def exceed(difference: float, sign: int) -> float:
        # The second's lone successes as the likelihood has them where `difference` is the truth.
        linear = (2 * n - first + second) * difference - first - second
        root = linear * linear + 8 * n * second * difference * (1 - difference)
        lone = (math.sqrt(max(0.0, root)) - linear) / (4 * n)
        variance = n * (2 * lone + difference * (1 - difference))
        return first - second - n * difference - sign * z * math.sqrt(max(0.0, variance))

    beside = 1e-9  # where all images say the same, the difference itself is a root too
    low = -1.0 if found - beside <= -1 else brentq(exceed, -1, found - beside, args=(1,))
    high = 1.0 if found + beside >= 1 else brentq(exceed, found + beside, 1, args=(-1,))
    return float(low), float(high)
