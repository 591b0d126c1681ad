"""Acceptance: calibration is honest, thresholds mean what they say, one removal per image."""

import dataclasses
import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from rorem_lib import acceptance
from rorem_lib.acceptance import split_labels


def make_scores(n=2000, *, seed=0, sharpness=1.5, share=0.4):
    """Overconfident scores: the true probability's logit is `1 / sharpness` of the score's."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(np.log(share / (1 - share)), 1.5, n)
    labels = rng.random(n) < 1 / (1 + np.exp(-logits))
    return 1 / (1 + np.exp(-sharpness * logits)), labels


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_calibration_makes_probabilities_true(method):
    scores, labels = make_scores(sharpness=3)
    calibration, probabilities = acceptance.calibrate_scores(scores, labels, method=method)
    fresh, answers = make_scores(20_000, seed=1, sharpness=3)
    calibrated = calibration.apply(fresh)
    for low, high in ((0.1, 0.3), (0.4, 0.6), (0.7, 0.9)):
        inside = (calibrated > low) & (calibrated < high)
        assert answers[inside].mean() == pytest.approx(calibrated[inside].mean(), abs=0.05)
    raw = (fresh > 0.85) & (fresh < 0.95)
    assert abs(answers[raw].mean() - fresh[raw].mean()) > 0.1  # uncalibrated scores are not true
    assert np.corrcoef(probabilities, calibration.apply(scores))[0, 1] > 0.98


@pytest.mark.slow
def test_platt_finds_the_line():
    scores, labels = make_scores(20_000, sharpness=2)
    calibration, _ = acceptance.calibrate_scores(scores, labels)
    assert calibration.slope == pytest.approx(0.5, abs=0.05)
    assert calibration.intercept == pytest.approx(0, abs=0.1)


def test_precision_is_not_measured_on_what_it_was_fitted_on():
    rng = np.random.default_rng(3)
    scores, labels = rng.random(60), rng.random(60) < 0.5  # scores that mean nothing
    calibration, probabilities = acceptance.calibrate_scores(scores, labels, method="isotonic")
    assert roc_auc_score(labels, calibration.apply(scores)) > 0.55  # the fit flatters itself
    assert roc_auc_score(labels, probabilities) < 0.6


def test_removals_of_one_image_stay_in_one_fold():
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(30), 4)  # four equal removals of an image
    scores, labels = np.repeat(rng.random(30), 4), np.repeat(rng.random(30) < 0.5, 4)
    _, apart = acceptance.calibrate_scores(scores, labels, method="isotonic", groups=groups)
    _, leaky = acceptance.calibrate_scores(scores, labels, method="isotonic")
    assert roc_auc_score(labels, apart) < roc_auc_score(labels, leaky) - 0.1


def test_scores_that_fall_with_the_labels_give_the_base_rate(caplog):
    scores, labels = make_scores(500)
    calibration, _ = acceptance.calibrate_scores(1 - scores, labels)
    assert calibration.apply([0.1, 0.9]) == pytest.approx([labels.mean()] * 2)
    assert "don't rise" in caplog.text


def test_calibration_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="all labels are the same"):
        acceptance.calibrate_scores([0.1, 0.9], [True, True])
    with pytest.raises(ValueError, match="0 to 1"):
        acceptance.calibrate_scores([0.1, 2.0], [True, False])
    with pytest.raises(ValueError, match="3 scores but 2"):
        acceptance.calibrate_scores([0.1, 0.2, 0.3], [True, False])
    with pytest.raises(ValueError, match="unknown calibration"):
        acceptance.calibrate_scores([0.1, 0.9], [True, False], method="beta")


def test_two_labels_are_enough_to_go_on(caplog):
    calibration, probabilities = acceptance.calibrate_scores([0.1, 0.9], [False, True])
    assert probabilities.shape == (2,) and calibration.apply([0.5]).shape == (1,)
    assert "guess" in caplog.text


def test_threshold_is_the_lowest_that_reaches_the_precision():
    probabilities = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    labels = np.array([1, 1, 0, 1, 1, 0, 0, 0], bool)
    found = acceptance.choose_threshold(probabilities, labels, target_precision=0.8, min_share=0.2)
    assert found.reached and found.value == 0.5
    assert found.precision == pytest.approx(4 / 5) and found.share == pytest.approx(5 / 8)
    accepted = probabilities >= found.value
    assert labels[accepted].mean() == found.precision
    assert found.precision_interval[0] < found.precision < found.precision_interval[1]


def test_threshold_falls_back_to_the_best_precision_and_says_so(caplog):
    probabilities = np.array([0.9, 0.8, 0.7, 0.6])
    labels = np.array([0, 1, 1, 0], bool)
    found = acceptance.choose_threshold(probabilities, labels, target_precision=0.95, min_share=0.5)
    assert not found.reached and found.value == 0.7 and found.precision == pytest.approx(2 / 3)
    assert "no threshold reaches" in caplog.text


def test_where_no_threshold_reaches_the_precision_nothing_is_accepted(caplog, tmp_path):
    probabilities = np.array([1.0, 0.8, 0.7, 0.6])
    labels = np.array([0, 1, 1, 0], bool)
    found = acceptance.choose_threshold(probabilities, labels, target_precision=0.95)
    assert not found.reached and found.share == 0
    assert found.precision is None and found.precision_interval is None
    scores = dict(enumerate(probabilities))
    assert acceptance.accept_candidates(scores, found.value) == []
    assert "0.67" in caplog.text and "nothing is accepted" in caplog.text
    acceptance.write_calibration(
        tmp_path,
        acceptance.Calibration(),
        accept=found,
        rate_threshold=0.5,
        curve={},
        rates=(0.8, 0.3),
    )
    _, content = acceptance.read_calibration(tmp_path)
    assert acceptance.accept_candidates(scores, content["accept_threshold"]) == []


def test_the_defaults_of_the_functions_are_the_settings():
    settings = acceptance.AcceptanceConfig()
    scores, labels = make_scores(400)
    calibration, probabilities = acceptance.calibrate_scores(scores, labels)
    assert calibration.method == settings.calibration_method
    chosen = acceptance.choose_threshold(probabilities, labels)
    assert (chosen.wanted_precision, chosen.wanted_share) == (0.9, 0.0)
    given = dataclasses.asdict(settings)
    same = {name: given[name] for name in ("target_precision", "min_share", "bound")}
    assert acceptance.choose_threshold(probabilities, labels, **same) == chosen
    answers, groups, fair = labels, np.arange(400), np.ones(400, bool)
    one = split_labels(answers, groups, fair, test_share=settings.test_share)
    other = split_labels(answers, groups, fair)
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_threshold_keeps_to_the_least_share():
    probabilities, labels = np.linspace(1, 0, 100), np.arange(100) < 10
    found = acceptance.choose_threshold(probabilities, labels, target_precision=1, min_share=0.3)
    assert not found.reached and found.share == pytest.approx(0.3)


def test_lower_bound_is_stricter_than_the_point():
    scores, labels = make_scores(300)
    point = acceptance.choose_threshold(scores, labels, target_precision=0.7, min_share=0.05)
    lower = acceptance.choose_threshold(
        scores, labels, target_precision=0.7, min_share=0.05, bound="lower"
    )
    assert lower.value > point.value and lower.precision_interval[0] >= 0.7


def test_equal_probabilities_are_accepted_together():
    found = acceptance.choose_threshold(
        [0.5] * 4, [True, True, False, False], target_precision=0.5, min_share=0.2
    )
    assert found.share == 1


def test_rate_threshold_gives_the_annotators_share():
    scores, labels = make_scores(1000)
    share = (scores >= acceptance.rate_threshold(scores, labels)).mean()
    assert share == pytest.approx(labels.mean(), abs=0.002)


def test_only_the_best_removal_of_an_image_is_kept():
    scores = {"a-s0": 0.9, "a-s1": 0.95, "b-s0": 0.5, "b-s1": 0.6, "c-s0": 0.85}
    group_of = {name: name[0] for name in scores}
    assert acceptance.accept_candidates(scores, 0.8, group_of=group_of) == ["a-s1", "c-s0"]
    assert acceptance.accept_candidates(scores, 0.8, group_of=lambda n: n[0]) == ["a-s1", "c-s0"]
    assert acceptance.accept_candidates(scores, 0.8) == ["a-s0", "a-s1", "c-s0"]
    assert acceptance.accept_candidates({}, 0.8) == []


def test_equal_scores_keep_one():
    assert acceptance.accept_candidates({"x": 1.0, "y": 1.0}, 1.0, group_of=lambda _: 0) == ["x"]


def test_curve_counts_every_label_once():
    scores, labels = make_scores(503)
    curve = acceptance.describe_curve(scores, labels)
    assert sum(curve["count"]) == 503
    assert np.average(curve["observed"], weights=curve["count"]) == pytest.approx(labels.mean())
    for low, observed, high in zip(curve["low"], curve["observed"], curve["high"], strict=True):
        assert low <= observed <= high


def test_curve_survives_few_and_equal_scores():
    curve = acceptance.describe_curve([0.5] * 30, [True] * 10 + [False] * 20)
    assert curve["count"] == [30]
    json.dumps(acceptance.describe_roc([0.2, 0.7], [False, True]), allow_nan=False)


def test_auc_and_its_interval():
    scores, labels = make_scores(400)
    auc, (low, high) = acceptance.measure_auc(scores, labels)
    assert auc == pytest.approx(roc_auc_score(labels, scores))
    assert low < auc < high and 0.05 < high - low < 0.12
    assert acceptance.measure_auc(scores, labels) == (auc, (low, high))
    coarse, interval = acceptance.measure_auc(np.round(scores), labels)  # ties count half
    assert interval[0] < coarse < interval[1]


def test_the_adjusted_count_finds_the_rate_of_a_method_unlike_the_labels():
    rng = np.random.default_rng(3)

    def draw(n, rate):
        labels = rng.random(n) < rate
        return np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1), labels

    scores, labels = draw(4000, 0.4)
    threshold = acceptance.rate_threshold(scores, labels)
    rates = acceptance.accept_rates(scores, labels, threshold)
    assert rates[0] > 0.6 > 0.35 > rates[1]
    for rate in (0.05, 0.4, 0.8):
        share = float((draw(4000, rate)[0] >= threshold).mean())
        assert acceptance.estimate_rate(share, *rates) == pytest.approx(rate, abs=0.06)
        if rate != 0.4:
            assert abs(share - rate) > 0.1  # the plain share is pulled to 0.4
    assert acceptance.estimate_rate(0.02, *rates) == 0 and acceptance.estimate_rate(1, *rates) == 1
    assert acceptance.estimate_rate(0.3, 1.0, 0.0) == 0.3
    assert acceptance.estimate_rate(0.3, 0.52, 0.5) is None


def test_calibration_file_survives_the_round_trip(tmp_path):
    scores, labels = make_scores(300)
    for method in acceptance.METHODS:
        calibration, probabilities = acceptance.calibrate_scores(scores, labels, method=method)
        accept = acceptance.choose_threshold(probabilities, labels)
        path = acceptance.write_calibration(
            tmp_path,
            calibration,
            accept=accept,
            rate_threshold=acceptance.rate_threshold(probabilities, labels),
            curve=acceptance.describe_curve(probabilities, labels),
            roc=acceptance.describe_roc(scores, labels),
            rates=(0.8, 0.3),
        )
        for place in (tmp_path, tmp_path / "discriminator", path):
            read, content = acceptance.read_calibration(place)
            assert read.apply(scores) == pytest.approx(calibration.apply(scores))
            assert content["accept_threshold"] == accept.value
            assert content["accept_rates"] == [0.8, 0.3]


def test_reading_a_calibration_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="05_train_discriminator"):
        acceptance.read_calibration(tmp_path)
    (tmp_path / "calibration.json").write_text('{"accept_threshold": 0.5}')
    with pytest.raises(ValueError, match="rate_threshold"):
        acceptance.read_calibration(tmp_path)
    (tmp_path / "calibration.json").write_text('{"accept_threshold": 0.5, "rate_threshold": 0.4}')
    calibration, content = acceptance.read_calibration(tmp_path)
    assert calibration.apply([0.3]) == [0.3] and content["rate_threshold"] == 0.4


def test_labels_are_split_by_picture_with_alike_shares():
    answers, groups = np.arange(200) % 3 == 0, np.arange(200) // 2
    inside, outside = split_labels(answers, groups, [True] * 200, test_share=0.25, seed=1)
    assert sorted([*inside, *outside]) == list(range(200)) and 45 <= len(outside) <= 55
    assert not set(groups[inside]) & set(groups[outside])
    assert abs(answers[outside].mean() - answers.mean()) < 0.03


def test_accuracy_is_estimated_from_the_audit_share_alone():
    random = np.random.default_rng(0)
    groups, audit = np.arange(400) // 2, random.random(400) < 0.15
    answers = random.random(400) < 0.5
    inside, outside = split_labels(answers, groups, audit, test_share=0.25)
    assert set(outside) == set(np.flatnonzero(audit)), "all of it, and nothing else"
    assert not set(groups[inside]) & set(groups[outside])
    fair = audit | (np.arange(400) < 200)  # the first half is another round's, at random
    inside, outside = split_labels(answers, groups, fair, test_share=0.25)
    assert fair[outside].all() and 80 <= len(outside) <= 120
    assert not audit[outside].all() and fair[inside].any()


def test_without_a_fair_sample_there_is_no_accuracy():
    with pytest.raises(ValueError, match="none of the 4 labels is of a random item"):
        split_labels([True, False] * 2, range(4), [False] * 4)
    with pytest.raises(ValueError, match="no label is left to train on"):
        split_labels([True, False] * 5, [0] * 10, [False] * 9 + [True])
