"""Intervals and paired tests: against known values, and their coverage."""

import numpy as np
import pytest
from scipy.stats import binomtest

from rorem_lib.intervals import bootstrap_mean, compare_paired, wilson_interval


def test_wilson_interval_has_the_published_values():
    low, high = wilson_interval(381, 500)  # RORem's 76.2 %
    assert (low, high) == (pytest.approx(0.7227, abs=1e-3), pytest.approx(0.7974, abs=1e-3))
    assert wilson_interval(0, 10) == (0, pytest.approx(0.2775, abs=1e-3))
    assert wilson_interval(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="0 <= k <= n"):
        wilson_interval(5, 4)


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_mean(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == (
        pytest.approx(values.mean() - half, abs=0.03),
        pytest.approx(values.mean() + half, abs=0.03),
    )
    assert bootstrap_mean(values) == (low, high)
    assert bootstrap_mean([2.0] * 5) == (2, 2)
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean([1.0, np.nan])
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_mean([])


def test_paired_comparison_of_successes_is_in_points():
    a = np.array([1] * 60 + [0] * 40, bool)
    b = np.array([1] * 40 + [0] * 20 + [1] * 5 + [0] * 35, bool)
    found = compare_paired(a, b)
    assert found.difference == pytest.approx(15)
    assert (found.only_first, found.only_second, found.n) == (20, 5, 100)
    assert found.p_value == pytest.approx(binomtest(20, 25).pvalue)
    assert found.low < 15 < found.high and found.significant
    back = compare_paired(b, a)
    assert back.difference == -found.difference and back.p_value == pytest.approx(found.p_value)


def test_pairing_sees_what_unpaired_rates_hide():
    rng = np.random.default_rng(1)
    b = rng.random(500) < 0.5
    a = b.copy()
    a[np.flatnonzero(~b)[:15]] = True  # 3 points better, never worse
    assert compare_paired(a, b).significant
    low, high = wilson_interval(int(a.sum()), 500)
    assert low < b.mean() < high  # unpaired, nobody would see it


def test_equal_methods_are_not_significant():
    found = compare_paired([True, False, True], [True, False, True])
    assert (found.difference, found.p_value, found.low, found.high) == (0, 1, 0, 0)
    assert not found.significant


def test_paired_comparison_of_measures_is_in_their_unit():
    rng = np.random.default_rng(2)
    b = rng.normal(20, 5, 300)
    found = compare_paired(b + 2 + rng.normal(0, 1, 300), b)
    assert found.difference == pytest.approx(2, abs=0.2) and found.p_value is None
    assert found.significant and found.low > 1.7
    assert not compare_paired(b, b + rng.normal(0, 1, 300)).significant


def test_interval_covers_the_truth_about_95_times_of_100():
    rng, covered = np.random.default_rng(3), 0
    for seed in range(200):
        a, b = rng.random(200) < 0.6, rng.random(200) < 0.5
        found = compare_paired(a, b, seed=seed, resamples=1000)
        covered += found.low <= 10 <= found.high
    assert 180 <= covered <= 199


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="same images"):
        compare_paired([True], [True, False])
