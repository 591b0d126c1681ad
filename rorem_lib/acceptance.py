"""From a discriminator's scores to decisions: calibration, thresholds, one removal per image.

RORem accepts what its discriminator scores above 0.9 (RORem, sec. 3.2). A raw score of 0.9 promises
nothing, so here scores are first calibrated on labels - by cross-validation, or the precision would
be measured on what it was fitted on - and the threshold is chosen for the precision it reaches.
Where no threshold reaches it, nothing is accepted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.special import expit, logit
from sklearn.base import clone
from sklearn.calibration import calibration_curve
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import StratifiedGroupKFold

from rorem_lib.files import read_json, write_json
from rorem_lib.intervals import wilson_interval
from rorem_lib.parameters import option

logger = logging.getLogger(__name__)

VERSION = 1  # raise it when the same scores are calibrated or accepted otherwise
CALIBRATION_FILE = "calibration.json"
METHODS = ("platt", "isotonic")
LEAST_LABELS = 10  # of each answer; below that a calibration is a guess
ACCEPT_NOTHING = 1.01  # a threshold above every probability
_EDGE = 1e-6  # scores this near 0 and 1 are moved there before the logit


@dataclass(frozen=True)
class AcceptanceConfig:
    """How a discriminator's scores become decisions; the defaults of all functions here."""

    test_share: float = option(0.25, "fraction of the labels, 0 to 1, held out for calibration")
    calibration_method: str = option(
        "platt", "platt (right for a few hundred labels) or isotonic (thousands)"
    )
    target_precision: float = option(0.9, "wanted fraction of right acceptances, 0 to 1")
    min_share: float = option(
        0.0,
        "least fraction of the removals to accept, 0 to 1, whatever their precision; 0 accepts "
        "nothing where the target is out of reach",
    )
    bound: str = option(
        "point",
        "what has to reach the target: point, the precision itself, or lower, the lower end of its "
        "95 per cent Wilson interval",
    )


@dataclass(frozen=True)
class Calibration:
    """A monotone map from raw scores to probabilities.

    Attributes:
        method: "platt" (a line through the logits), "isotonic" (steps) or "identity".
        slope, intercept: of the line, in logits; Platt only.
        scores, probabilities: the knots between which "isotonic" interpolates.
    """

    method: str = "identity"
    slope: float = 1.0
    intercept: float = 0.0
    scores: tuple[float, ...] = ()
    probabilities: tuple[float, ...] = ()

    def apply(self, scores) -> np.ndarray:
        """Raw scores [N] in 0..1 -> calibrated probabilities [N] in 0..1."""
        scores = _check_scores(scores)
        if self.method == "platt":
            return expit(self.slope * _to_logits(scores) + self.intercept)
        if self.method == "isotonic":
            return np.interp(scores, self.scores, self.probabilities)
        return scores


@dataclass(frozen=True)
class Threshold:
    """An acceptance threshold and what it was worth on the labels it was chosen on.

    Attributes:
        value: probabilities at or above it are accepted; `ACCEPT_NOTHING` is above them all.
        precision: share of the accepted that the annotators accepted too; None where none is.
        precision_interval: its 95% Wilson interval.
        share: share of all removals that is accepted.
        reached: False if no threshold reaches the wanted precision at the wanted share; `value`
            is then the one with the best precision at that share, or `ACCEPT_NOTHING`.
        wanted_precision, wanted_share: what was asked for.
        n: number of labels.
    """

    value: float
    precision: float | None
    precision_interval: tuple[float, float] | None
    share: float
    reached: bool
    wanted_precision: float
    wanted_share: float
    n: int


def _check_scores(scores) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or not np.isfinite(scores).all() or ((scores < 0) | (scores > 1)).any():
        raise ValueError("scores are a flat list of numbers from 0 to 1")
    return scores


def _check_pair(scores, labels) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = _check_scores(scores), np.asarray(labels)
    if labels.shape != scores.shape:
        raise ValueError(f"{scores.size} scores but {labels.size} labels")
    labels = labels.astype(bool)
    least = min(labels.sum(), (~labels).sum())
    if least == 0:
        raise ValueError(
            "all labels are the same: calibration needs accepted and rejected "
            "removals; label more, or check that the labels were read right"
        )
    return scores, labels


def _to_logits(scores: np.ndarray) -> np.ndarray:
    return logit(np.clip(scores, _EDGE, 1 - _EDGE))


def _fit_calibration(scores, labels, method: str) -> Calibration:
    if method == "platt":  # p = sigmoid(a logit(s) + b), a and b by maximum likelihood
        line = LogisticRegression(C=1e6).fit(_to_logits(scores)[:, None], labels)
        slope = float(line.coef_[0, 0])
        if slope <= 0:  # a falling line would accept what the discriminator likes least
            share = float(np.clip(labels.mean(), _EDGE, 1 - _EDGE))
            return Calibration("platt", 0.0, float(logit(share)))
        return Calibration("platt", slope, float(line.intercept_[0]))
    # p(s): the non-decreasing steps of least squared error to the labels
    steps = clone(_ISOTONIC).fit(scores, labels)
    return Calibration(
        "isotonic",
        scores=tuple(map(float, steps.X_thresholds_)),
        probabilities=tuple(map(float, steps.y_thresholds_)),
    )


_ISOTONIC = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")


def calibrate_scores(
    scores,
    labels,
    *,
    method: str = AcceptanceConfig.calibration_method,
    groups=None,
    folds: int = 5,
    seed: int = 0,
) -> tuple[Calibration, np.ndarray]:
    """Fit a calibration, and say what it gives on labels it has not seen.

    Args:
        scores: [N] raw discriminator scores, 0..1.
        labels: [N] bool, True where the annotators accepted.
        method: see `AcceptanceConfig.calibration_method`.
        groups: [N] source image of each removal; removals of one stay in one fold.
        folds: cross-validation folds.
        seed: of the folds.

    Returns:
        The `Calibration` fitted on everything, for use; and [N] probabilities, each from a fit
        that never saw its group, for choosing thresholds and drawing curves.

    Raises:
        ValueError: scores outside 0..1, labels all the same, or an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown calibration {method!r}: take one of {', '.join(METHODS)}")
    scores, labels = _check_pair(scores, labels)
    groups = np.arange(scores.size) if groups is None else np.asarray(groups)
    least = int(min(labels.sum(), (~labels).sum()))
    if least < LEAST_LABELS:
        logger.warning("only %d labels of the rarer answer: the calibration is a guess", least)
    whole = _fit_calibration(scores, labels, method)
    if whole.method == "platt" and whole.slope == 0:
        logger.warning(
            "the discriminator's scores don't rise with the labels: every removal gets "
            "the same probability; train it longer or on more labels"
        )
    folds = min(folds, least, len(np.unique(groups)))
    if folds < 2:
        logger.warning("too few labels to hold any out: precision is measured on the fit")
        return whole, whole.apply(scores)
    probabilities = np.full(scores.size, np.nan)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for fitted, held in splitter.split(scores[:, None], labels, groups):
        if held.size and len(np.unique(labels[fitted])) == 2:
            part = _fit_calibration(scores[fitted], labels[fitted], method)
            probabilities[held] = part.apply(scores[held])
    missing = np.isnan(probabilities)  # folds whose rest held one answer only
    probabilities[missing] = whole.apply(scores[missing])
    return whole, probabilities


def choose_threshold(
    probabilities,
    labels,
    *,
    target_precision: float = AcceptanceConfig.target_precision,
    min_share: float = AcceptanceConfig.min_share,
    bound: str = AcceptanceConfig.bound,
) -> Threshold:
    """The lowest threshold that reaches a precision while accepting enough.

    Args:
        probabilities: [N] calibrated, cross-validated, 0..1.
        labels: [N] bool, the annotators' answers.
        target_precision, min_share, bound: see `AcceptanceConfig`.

    Returns:
        A `Threshold`; where none reaches the target, one with `reached=False` that accepts nothing
        or, with a `min_share`, the one with the best precision among those that accept as much.
    """
    if bound not in ("point", "lower"):
        raise ValueError(f'bound is "point" or "lower", not {bound!r}')
    for name, value in (("target_precision", target_precision), ("min_share", min_share)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} lies between 0 and 1, not {value}")
    probabilities, labels = _check_pair(probabilities, labels)
    n = labels.size
    order = np.argsort(-probabilities, kind="stable")
    ranked, right = probabilities[order], np.cumsum(labels[order])
    last = np.append(ranked[1:] != ranked[:-1], True)  # equal probabilities go together
    taken = np.flatnonzero(last) + 1
    taken = taken[taken >= max(1, np.ceil(min_share * n - 1e-9))]
    right = right[taken - 1]
    reach = (
        right / taken
        if bound == "point"
        else np.array(
            [wilson_interval(int(k), int(m))[0] for k, m in zip(right, taken, strict=True)]
        )
    )
    good = np.flatnonzero(reach >= target_precision)
    reached = good.size > 0
    place = int(good[-1]) if reached else int(np.argmax(right / taken))
    k, m = int(right[place]), int(taken[place])
    if not reached:
        logger.warning(
            "no threshold reaches a precision of %.2f%s; the best reaches %.2f: %s",
            target_precision,
            f" while accepting {min_share:.0%}" if min_share else "",
            k / m,
            "it is taken" if min_share else "nothing is accepted (min_share would accept some)",
        )
    wanted = (target_precision, min_share, n)
    if not reached and not min_share:
        return Threshold(ACCEPT_NOTHING, None, None, 0.0, False, *wanted)
    return Threshold(float(ranked[m - 1]), k / m, wilson_interval(k, m), m / n, reached, *wanted)


def rate_threshold(probabilities, labels) -> float:
    """The threshold at which as large a share is accepted as the annotators accepted.

    With it and `estimate_rate` the discriminator can estimate a method's success rate: a threshold
    made for precision would count too few.
    """
    probabilities, labels = _check_pair(probabilities, labels)
    ranked, k = np.sort(probabilities)[::-1], int(labels.sum())
    return float((ranked[k - 1] + ranked[k]) / 2)


def accept_rates(probabilities, labels, threshold: float) -> tuple[float, float]:
    """Shares of the good and of the bad removals at or above the threshold."""
    probabilities, labels = _check_pair(probabilities, labels)
    taken = probabilities >= threshold
    return float(taken[labels].mean()), float(taken[~labels].mean())


def estimate_rate(share: float, true_accepts: float, false_accepts: float) -> float | None:
    """A method's success rate from the share of its removals that the discriminator accepts.

    A discriminator that errs pulls every method towards the rate of its own labels: it accepts
    `true_accepts` of the good and `false_accepts` of the bad. The adjusted count turns that round
    (Forman 2008, doi 10.1007/s10618-008-0097-y). It supposes that good and bad removals of this
    method look as those of the labels do.

    Args:
        share, true_accepts, false_accepts: 0..1; the latter two from `accept_rates`.

    Returns:
        0..1, or None from a discriminator that accepts bad removals as readily as good ones.
    """
    if true_accepts - false_accepts < 0.05:  # the quotient would be noise
        return None
    return float(np.clip((share - false_accepts) / (true_accepts - false_accepts), 0, 1))


def accept_candidates(
    scores: Mapping[Hashable, float],
    threshold: float,
    *,
    group_of: Mapping[Hashable, Hashable] | Callable | None = None,
) -> list:
    """Which candidates enter the training set.

    Args:
        scores: candidate id -> calibrated probability.
        threshold: least probability.
        group_of: candidate id -> its source image (a mapping or a function). Of several removals
            of one image only the best-scored is kept: the same image twice teaches nothing.

    Returns:
        Accepted ids in the order of `scores`.
    """
    if group_of is None:
        group_of = {name: name for name in scores}
    find_group = group_of if callable(group_of) else group_of.__getitem__
    best: dict = {}
    for name, score in scores.items():
        group = find_group(name)
        if score >= threshold and (group not in best or score > scores[best[group]]):
            best[group] = name
    kept = set(best.values())
    return [name for name in scores if name in kept]


def describe_curve(probabilities, labels, *, bins: int = 10) -> dict:
    """Reliability: in bins of equal count, what was predicted and what the annotators said.

    Returns:
        `{"predicted": [B], "observed": [B], "low": [B], "high": [B], "count": [B]}`; low and high
        are 95% Wilson intervals of observed.
    """
    probabilities, labels = _check_pair(probabilities, labels)
    bins = max(1, min(bins, labels.size // 5))
    observed, predicted = calibration_curve(labels, probabilities, n_bins=bins, strategy="quantile")
    # scikit-learn gives no counts: its own bins again, empty ones left out as it does.
    edges = np.percentile(probabilities, np.linspace(0, 1, bins + 1) * 100)
    counts = np.bincount(np.searchsorted(edges[1:-1], probabilities), minlength=bins)
    counts = counts[counts > 0]
    ends = [
        wilson_interval(round(o * int(c)), int(c)) for o, c in zip(observed, counts, strict=True)
    ]
    return {
        "predicted": predicted.tolist(),
        "observed": observed.tolist(),
        "low": [e[0] for e in ends],
        "high": [e[1] for e in ends],
        "count": counts.tolist(),
    }


def describe_roc(scores, labels) -> dict:
    """`{"false_accepts": [K], "true_accepts": [K], "thresholds": [K]}`, shares from 0 to 1."""
    scores, labels = _check_pair(scores, labels)
    false_accepts, true_accepts, thresholds = roc_curve(labels, scores)
    thresholds[0] = 1.0  # scikit-learn says infinity, which JSON can't
    return {
        "false_accepts": false_accepts.tolist(),
        "true_accepts": true_accepts.tolist(),
        "thresholds": thresholds.tolist(),
    }


def split_labels(
    answers, groups, fair, *, test_share: float = AcceptanceConfig.test_share, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Split labelled removals into training and test, by image, with alike shares accepted.

    The test is a fair sample: with active learning it is the random audit share alone.

    Args:
        answers: [N] bool, accepted.
        groups: [N] names of the images; no image is on both sides.
        fair: [N] bool, whether it belongs to a fair sample of the candidates (`votes.find_fair`).
        test_share: 0..1, wanted share of the labels in the test; less where fair ones are few.
        seed: of the lot.

    Returns:
        Indices into `answers`: training, test. What is not fair of a test image is in neither.

    Raises:
        ValueError: no label is fair, or none is left to train on.
    """
    answers, groups = np.asarray(answers, bool), np.asarray(groups)
    fair = np.asarray(fair, bool)
    if not fair.any():
        raise ValueError(
            f"none of the {len(fair)} labels is of a random item: no accuracy can be "
            "estimated from them; label with an audit_share of 0.1 to 0.2"
        )
    folds = round(fair.sum() / (test_share * len(fair)))
    outside = np.flatnonzero(fair)
    if folds > 1 or fair.all():
        splitter = StratifiedGroupKFold(max(2, folds), shuffle=True, random_state=seed)
        outside = outside[next(splitter.split(answers[fair], answers[fair], groups[fair]))[1]]
    inside = np.flatnonzero(~np.isin(groups, groups[outside]))
    if not len(inside):
        raise ValueError("no label is left to train on: each image has one in the audit share")
    return inside, outside


def measure_auc(
    scores, labels, *, seed: int = 0, resamples: int = 2000
) -> tuple[float, tuple[float, float]]:
    """Area under the ROC curve and its 95% bootstrap interval (both answers resampled apart)."""
    scores, labels = _check_pair(scores, labels)
    values = np.unique(scores)
    rng = np.random.default_rng(seed)
    shares = []
    for answer in (True, False):
        counts = np.bincount(
            np.searchsorted(values, scores[labels == answer]), minlength=values.size
        )
        n = counts.sum()
        shares.append(rng.multinomial(n, counts / n, size=resamples).astype(np.float32) / n)
    accepted, rejected = shares
    below = np.cumsum(rejected, axis=1) - rejected / 2  # ties count one half
    low, high = np.quantile((accepted * below).sum(axis=1), [0.025, 0.975])
    return float(roc_auc_score(labels, scores)), (float(low), float(high))


def write_calibration(
    folder,
    calibration: Calibration,
    *,
    accept: Threshold,
    rate_threshold: float,
    rates: tuple[float, float],
    curve: dict,
    roc: dict | None = None,
) -> Path:
    """Write `<folder>/calibration.json`, what stages 06 and 08 need of a discriminator.

    `rates` are `accept_rates` at `rate_threshold`.
    """
    return write_json(
        Path(folder) / CALIBRATION_FILE,
        {
            "accept_threshold": accept.value,
            "rate_threshold": rate_threshold,
            "accept_rates": list(rates),
            "curve": curve,
            "roc": roc,
            "accept": asdict(accept),
            "calibration": asdict(calibration),
        },
    )


def read_calibration(folder) -> tuple[Calibration, dict]:
    """The calibration of a discriminator's stage.

    Args:
        folder: the stage's folder, its `discriminator/` or the file itself.

    Returns:
        The `Calibration` (the identity where the file has none), and the file's content with at
        least `accept_threshold` and `rate_threshold`.

    Raises:
        FileNotFoundError: there is no calibration.
        ValueError: the file is torn or lacks a threshold.
    """
    folder = Path(folder)
    places = [folder, folder / CALIBRATION_FILE, folder.parent / CALIBRATION_FILE]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder} holds no {CALIBRATION_FILE}: run the notebook "
            "05_train_discriminator to its end"
        )
    content = read_json(path)
    for name in ("accept_threshold", "rate_threshold"):
        if not isinstance(content, dict) or not isinstance(content.get(name), (int, float)):
            raise ValueError(f"{path} lacks {name}: run the notebook 05_train_discriminator again")
    return Calibration(**(content.get("calibration") or {})), content
