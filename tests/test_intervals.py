"""Intervals and paired tests: against known values, and their coverage."""

import numpy as np
import pytest
from scipy.stats import norm, ttest_1samp
from simulate_intervals import CASES, measure_coverage

from rorem_lib.intervals import (
    adjust_holm,
    compare_measures,
    compare_paired,
    compare_successes,
    design_effect,
    mean_interval,
    rate_interval,
    wilson_interval,
)


def test_wilson_interval_has_the_published_values():
    low, high = wilson_interval(381, 500)  # RORem's 76.2 %
    assert (low, high) == (pytest.approx(0.7227, abs=1e-3), pytest.approx(0.7974, abs=1e-3))
    assert wilson_interval(0, 10) == (0, pytest.approx(0.2775, abs=1e-3))
    assert wilson_interval(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="0 <= k <= n"):
        wilson_interval(5, 4)


# ------------------------------------------------------------------------------------- groups


def test_images_that_are_their_own_groups_count_as_they_are():
    values = np.array([1] * 30 + [0] * 20)
    names = [f"scene {n}" for n in range(50)]
    assert design_effect(values, names) == 1
    assert rate_interval(values) == rate_interval(values, names) == wilson_interval(30, 50)
    other = np.roll(values, 7)
    assert compare_successes(values, other) == compare_successes(values, other, names)
    assert rate_interval([]) == (0, 1)


def test_copies_of_an_image_are_one_image():
    values = np.array([1] * 35 + [0] * 15)
    copies, groups = np.repeat(values, 10), np.repeat(np.arange(50), 10)
    low, high = rate_interval(copies, groups)
    assert (low, high) == pytest.approx(wilson_interval(35, 50), abs=0.006)  # t for the normal
    assert high - low > 3 * np.diff(wilson_interval(350, 500))[0]
    other = values.copy()
    other[:9], other[45:] = 0, 1
    alone = compare_successes(values, other)
    tenfold = compare_successes(copies, np.repeat(other, 10), groups)
    assert tenfold.p_value == pytest.approx(alone.p_value, abs=0.02) and alone.p_value > 0.2
    assert (tenfold.n, tenfold.n_groups, alone.n) == (500, 50, 50)
    measured = compare_measures(copies * 2.5, np.zeros(500), groups)
    assert measured.low == pytest.approx(mean_interval(values * 2.5)[0])


def test_where_nothing_varies_the_groups_count():
    groups = np.repeat(np.arange(50), 10)
    low, high = rate_interval(np.ones(500), groups)
    assert high == 1 and low == pytest.approx(wilson_interval(50, 50)[0], abs=0.005)
    assert design_effect([1, 0, 1], ["a"] * 3) == 3  # one scene says nothing of others


def test_what_is_no_rate_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        rate_interval([0.5, 1.5])
    with pytest.raises(ValueError, match="one an image"):
        rate_interval([0, 1], ["a"])


# -------------------------------------------------------------------------------------- means


def test_mean_interval_is_students():
    values = np.random.default_rng(0).normal(3, 2, 40)
    interval = ttest_1samp(values, 0).confidence_interval()
    assert mean_interval(values) == pytest.approx((interval.low, interval.high))
    assert mean_interval([2.0] * 5) == (2, 2)
    with pytest.raises(ValueError, match="finite"):
        mean_interval([1.0, np.nan])
    assert np.isnan(mean_interval([])).all() and np.isnan(mean_interval([1.0])).all()


def test_paired_comparison_of_measures_is_in_their_unit():
    rng = np.random.default_rng(2)
    b = rng.normal(20, 5, 300)
    a = b + 2 + rng.normal(0, 1, 300)
    found = compare_paired(a, b)
    assert found.difference == pytest.approx(2, abs=0.2) and found.only_first is None
    assert found.p_value == pytest.approx(ttest_1samp(a - b, 0).pvalue)
    assert found.significant and found.low > 1.7
    assert not compare_paired(b, b + rng.normal(0, 1, 300)).significant


# ---------------------------------------------------------------------------------- successes


def test_paired_comparison_of_successes_is_in_points():
    a = np.array([1] * 60 + [0] * 40, bool)
    b = np.array([1] * 40 + [0] * 20 + [1] * 5 + [0] * 35, bool)
    found = compare_paired(a, b)
    assert found.difference == pytest.approx(15)
    assert (found.only_first, found.only_second, found.n) == (20, 5, 100)
    assert found.p_value == pytest.approx(2 * norm.sf(15 / 5))  # McNemar's (20 - 5) / sqrt(25)
    assert found.low < 15 < found.high and found.significant
    back = compare_paired(b, a)
    assert back.difference == -found.difference and back.p_value == pytest.approx(found.p_value)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_tangos_interval_has_the_published_values():
    """Bentur et al. (2009) in Fagerland, Lydersen and Laake (2014): 1 and 7 of 21 differ."""
    a = [1] * 1 + [1] * 1 + [0] * 7 + [0] * 12
    b = [1] * 1 + [0] * 1 + [1] * 7 + [0] * 12
    found = compare_successes(a, b)
    assert (found.only_first, found.only_second) == (1, 7)
    assert (found.low, found.high) == pytest.approx((-51.7, -2.6), abs=0.06)
    assert found.p_value == pytest.approx(0.034, abs=5e-4)


def test_test_and_interval_say_the_same():
    rng = np.random.default_rng(5)
    for n in (4, 6, 9, 20, 60):
        for _ in range(60):
            a, b = rng.random(n) < rng.random(), rng.random(n) < rng.random()
            for groups in (None, rng.integers(0, max(3, n // 3), n)):
                found = compare_successes(a, b, groups)
                assert found.significant == (found.low > 0 or found.high < 0), (a, b, groups)
                assert -100 <= found.low <= found.difference <= found.high <= 100


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
    assert (found.difference, found.p_value) == (0, 1) and not found.significant
    assert found.low < 0 < found.high  # three images leave much open
    wide = compare_paired([True] * 500, [True] * 500)
    assert 0.5 < wide.high < 1


def test_five_images_tell_nothing():
    found = compare_successes([1] * 5, [0] * 5)
    assert found.p_value == 2 / 2**5 and not found.significant and found.low == 0
    assert compare_successes([1] * 6, [0] * 6).significant
    ten = compare_successes([1] * 50, [0] * 50, np.repeat(np.arange(5), 10))
    assert not ten.significant  # nor do five scenes of ten images


def test_ties_count_one_half():
    found = compare_paired([1, 0.5, 0.5, 1], [0, 0.5, 1, 0.5])
    assert found.difference == 25 and (found.only_first, found.only_second) == (1.5, 0.5)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="same images"):
        compare_paired([True], [True, False])
    with pytest.raises(ValueError, match="same images"):
        compare_paired([], [])
    with pytest.raises(ValueError, match="finite"):
        compare_paired([20.0, np.inf], [20.0, 21.0])


def test_holm_has_the_values_of_r():
    """p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")"""
    assert adjust_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust_holm([0.6, 0.9]) == [1, 1] and adjust_holm([]) == []


# ----------------------------------------------------------------------------------- coverage


def test_interval_covers_the_truth_about_95_times_of_100():
    found = measure_coverage([1] * 200, (0.6, 0.5), (0, 0, 0), repeats=300, seed=3)
    assert found["agree"] == 1
    for key in ("rate", "difference", "measure"):
        assert 0.91 <= found[key] <= 0.985, found


def test_with_ten_images_a_scene_images_alone_cover_far_less():
    rng, held = np.random.default_rng(0), np.zeros(2)
    for _ in range(300):
        scenes = rng.normal(size=50) * np.sqrt(0.4)
        good = np.repeat(scenes, 10) + rng.normal(size=500) * np.sqrt(0.6) > 0  # truly a half
        groups = np.repeat(np.arange(50), 10)
        for place, (low, high) in enumerate((rate_interval(good), rate_interval(good, groups))):
            held[place] += low <= 0.5 <= high
    assert held[0] / 300 < 0.8 and 0.91 <= held[1] / 300 <= 0.985


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_coverage_with_fifty_groups_or_more(name):
    found = measure_coverage(*CASES[name], repeats=1000)
    assert found["agree"] == 1
    for key in ("rate", "difference", "measure"):  # 92 to 97, and the chance of 1000 repeats
        assert 0.91 <= found[key] <= 0.98, (key, found)
