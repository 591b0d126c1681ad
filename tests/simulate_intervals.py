"""How often intervals hold the truth, on simulated test sets: `python tests/simulate_intervals.py`.

Each image has a latent difficulty, of which a part is its group's (images of one scene) and a part
both methods' own; the rates that it implies are known exactly.
"""

import sys
import time

import numpy as np
from scipy.special import ndtri

from rorem_lib.intervals import compare_measures, compare_successes, rate_interval

# Parts of the difficulty's variance: the group's; the group's, for one method alone; the image's;
# the rest is the image's for one method alone.
ALIKE = (0.3, 0.1, 0.4)
APART = (0.0, 0.0, 0.7)


def draw(rng, sizes, rates, parts):
    """Latent scores of two methods on the images of groups [G] of these sizes: groups, [2, N]."""
    shared, own, image = parts
    groups = np.repeat(np.arange(len(sizes)), sizes)
    latent = ndtri(rates)[:, None] + np.sqrt(shared) * rng.normal(size=len(sizes))[groups]
    latent = latent + np.sqrt(own) * rng.normal(size=(2, len(sizes)))[:, groups]
    latent = latent + np.sqrt(image) * rng.normal(size=groups.size)
    return groups, latent + np.sqrt(1 - sum(parts)) * rng.normal(size=(2, groups.size))


def measure_coverage(sizes, rates, parts, *, repeats: int, seed: int = 0) -> dict[str, float]:
    """Shares of the repeats in which the interval holds the truth.

    Args:
        sizes: images in each group, or a function of the generator that draws them.
        rates: the two methods' true success rates.
        parts: `ALIKE`, `APART` or others.

    Returns:
        `rate` (of the first), `difference` (of the rates), `measure` (mean latent difference);
        `agree`, in how many the test of the difference says what its interval says.
    """
    rng, held = np.random.default_rng(seed), np.zeros(4)
    for _ in range(repeats):
        drawn = sizes(rng) if callable(sizes) else sizes
        groups, latent = draw(rng, drawn, np.asarray(rates), parts)
        good = latent > 0
        low, high = rate_interval(good[0], groups)
        success = compare_successes(*good, groups)
        measure = compare_measures(*latent, groups)
        apart = ndtri(rates[0]) - ndtri(rates[1])
        held += (
            low <= rates[0] <= high,
            success.low <= 100 * (rates[0] - rates[1]) <= success.high,
            measure.low <= apart <= measure.high,
            success.significant == (success.low > 0 or success.high < 0),
        )
    return dict(zip(("rate", "difference", "measure", "agree"), held / repeats, strict=True))


def draw_sizes(count: int, most: int):
    """Groups of 1 to `most` images."""
    return lambda rng: rng.integers(1, most + 1, count)


CASES = {
    f"{name}, {first} and {second}": (sizes, (first, second), parts)
    for name, sizes, parts in (
        ("50 images", [1] * 50, APART),
        ("100 images", [1] * 100, APART),
        ("500 images", [1] * 500, APART),
        ("50 groups of 2", [2] * 50, ALIKE),
        ("50 groups of 10", [10] * 50, ALIKE),
        ("50 groups of 1 to 20", draw_sizes(50, 20), ALIKE),
        ("100 groups of 10", [10] * 100, ALIKE),
        ("50 groups of 10, not alike", [10] * 50, APART),
    )
    for first, second in ((0.5, 0.5), (0.7, 0.6), (0.9, 0.8))
}


if __name__ == "__main__":
    repeats, began = int(sys.argv[1]) if len(sys.argv) > 1 else 2000, time.monotonic()
    print(f"| {repeats} test sets each | rate | difference | measure |\n|---|---|---|---|")
    for name, case in CASES.items():
        found = measure_coverage(*case, repeats=repeats)
        cells = " | ".join(f"{100 * found[key]:.1f}" for key in ("rate", "difference", "measure"))
        print(f"| {name} | {cells} |", flush=True)
    print(f"{time.monotonic() - began:.0f} s")
