"""Uncertainty of what a test set measures: intervals of shares, paired differences, their tests.

500 test images leave about 4 points of chance in a success rate (95 %), so no rate stands without
its interval, and two methods are compared image by image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

RESAMPLES = 10_000  # bootstrap resamples; the ends of a 95 % interval then move by about 0.1 points
_CHUNK = 4_000_000  # numbers held at once while resampling


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two methods on the same images.

    Attributes:
        difference: mean of the first minus mean of the second; points (0..100) for yes / no.
        low, high: 95 % interval of the difference from a paired bootstrap, same unit.
        p_value: McNemar's exact two-sided test; None for measures that are not yes / no.
        only_first, only_second: images on which one alone succeeds; None as above.
        n: number of images.
    """

    difference: float
    low: float
    high: float
    p_value: float | None
    only_first: int | None
    only_second: int | None
    n: int

    @property
    def significant(self) -> bool:
        """Whether the test (yes / no) or the interval (other measures) excludes equality."""
        if self.p_value is not None:
            return self.p_value < 0.05
        return self.low > 0 or self.high < 0


def wilson_interval(k: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share `k` of `n`, both ends in 0..1; (0, 1) for n = 0.

    Raises:
        ValueError: unless 0 <= k <= n.
    """
    if not 0 <= k <= n:
        raise ValueError(f"a share needs 0 <= k <= n, not k={k} of n={n}")
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(int(k), int(n)).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_mean(
    values, *, seed: int = 0, resamples: int = RESAMPLES, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [N].

    Resampling N images is drawing how often each distinct value comes (multinomial), which is
    the same distribution and, for yes / no values, much less work.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError("a bootstrap interval needs at least one value, all of them finite")
    distinct, counts = np.unique(values, return_counts=True)
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // distinct.size)
    means = [
        rng.multinomial(values.size, counts / values.size, size=min(rows, resamples - start))
        @ distinct
        / values.size
        for start in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def compare_paired(a, b, *, seed: int = 0, resamples: int = RESAMPLES) -> Comparison:
    """Compare two methods on the same images, in the same order.

    Args:
        a, b: [N] bool (or 0 / 1) successes, or [N] float measures such as PSNR in dB.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Returns:
        A `Comparison`: in points for successes, in the measure's own unit otherwise.

    Raises:
        ValueError: the lengths differ, there is nothing to compare, or a value is not finite.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(
            f"a paired comparison needs the same images on both sides, not "
            f"{a.shape} and {b.shape} values"
        )
    binary = bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
    scale = 100.0 if binary else 1.0
    low, high = bootstrap_mean(a - b, seed=seed, resamples=resamples)
    p_value = only_first = only_second = None
    if binary:
        only_first, only_second = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
        discordant = only_first + only_second
        p_value = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return Comparison(
        float(scale * (a - b).mean()),
        scale * low,
        scale * high,
        p_value,
        only_first,
        only_second,
        int(a.size),
    )
