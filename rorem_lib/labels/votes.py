"""Human decisions about removals: votes, agreement, what is missing and what is a fair sample.

Annotators say yes or no to source, mask and removal; the accepted ones train the remover, all of
them train the discriminator (RORem, sec. 3.2). The log itself is in
`log`, who sees what and when in `queue`, other formats in `exchange`.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping

import krippendorff
import numpy as np
from sklearn.metrics import cohen_kappa_score

from rorem_lib.labels.log import (
    DECISIONS,
    PREFERENCES,
    Label,
    LabelsMissing,
)
from rorem_lib.labels.queue import QueueItem

VERSION = 1  # raise it when the same labels give other sets
POLICIES = ("majority", "unanimous", "single")
ADJUDICATION = "adjudication"  # a label's order, where it settles a conflict


def merge_votes(
    labels: Iterable[Label], policy: str = "majority", *, min_votes: int = 1
) -> dict[str, str]:
    """Final decision of each item: id -> "accept" or "reject".

    Skips and silent repeats are no votes. An item that the policy leaves open is not in the
    result (see `find_conflicts`), unless an adjudicator decided it: that decides under any policy.

    Args:
        labels: labels that stand, as `read_labels` returns them.
        policy: "majority" (a tie is open), "unanimous" (any dissent is open) or "single" (the
            latest vote decides).
        min_votes: items with fewer votes are open.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is unknown: choose one of {', '.join(POLICIES)}")
    labels, decided = list(labels), {}
    for item_id, votes in _collect_votes(labels).items():
        counts = Counter(vote.label for vote in votes)
        if len(votes) < min_votes:
            continue
        if policy == "single":
            decided[item_id] = max(votes, key=lambda vote: vote.time).label
        elif policy == "unanimous" and len(counts) == 1:
            decided[item_id] = votes[0].label
        elif policy == "majority" and counts["accept"] != counts["reject"]:
            decided[item_id] = counts.most_common(1)[0][0]
    last_words = (x for x in labels if x.order == ADJUDICATION and x.label != "skip")
    return decided | {x.id: x.label for x in sorted(last_words, key=lambda x: x.time)}


def score_votes(labels: Iterable[Label], policy: str = "majority") -> dict[str, float]:
    """How far each item with votes was accepted: id -> 1, 0, or one half where it is left open.

    Rates are estimated from these. Left out, the items on which people are even would flatter a
    method whose removals divide them: with two annotators, two methods at 70% show 80 and 85%.

    Args:
        labels, policy: as for `merge_votes`.
    """
    labels = list(labels)
    decided = merge_votes(labels, policy)
    voted = dict.fromkeys([*_collect_votes(labels), *decided])
    return {x: float(decided[x] == "accept") if x in decided else 0.5 for x in voted}


def find_conflicts(labels: Iterable[Label]) -> list[str]:
    """Ids on which annotators disagree and no adjudicator has decided."""
    labels = list(labels)
    settled = {x.id for x in labels if x.order == ADJUDICATION and x.label != "skip"}
    return [
        item_id
        for item_id, given in _collect_votes(labels).items()
        if len({x.label for x in given}) > 1 and item_id not in settled
    ]


def list_adjudication(labels: Iterable[Label], annotator: str) -> tuple[list[QueueItem], dict]:
    """The conflicts that are this annotator's to decide.

    Who voted on an item does not adjudicate it: the vote would be lost, and somebody who has not
    seen it is the fairer judge.

    Returns:
        The queue, and id -> the votes in words, which the widget tells after the decision.
    """
    labels = list(labels)
    own = {x.id for x in labels if x.annotator == annotator and x.order == ADJUDICATION}
    votes = _collect_votes(labels)
    open_here = {*find_conflicts(labels), *(own & votes.keys())}
    mine = sorted(
        item_id for item_id in open_here if annotator not in {x.annotator for x in votes[item_id]}
    )
    told = {
        item_id: ", ".join(f"{x.annotator} {x.reason or x.label}" for x in votes[item_id])
        for item_id in mine
    }
    return [QueueItem(item_id, ADJUDICATION) for item_id in mine], told


def _collect_votes(labels: Iterable[Label]) -> dict[str, list[Label]]:
    votes: dict[str, list[Label]] = defaultdict(list)
    for label in labels:
        if not label.repeat and label.label != "skip" and label.order != ADJUDICATION:
            votes[label.id].append(label)
    return dict(votes)


def collect_orders(labels: Iterable[Label]) -> dict[str, str]:
    """How each item was drawn: id -> order; "audit" if it was so for anybody."""
    orders: dict[str, str] = {}
    for item_id, votes in _collect_votes(labels).items():
        drawn = [vote.order for vote in votes]
        orders[item_id] = "audit" if "audit" in drawn else drawn[0]
    return orders


def find_fair(labels: Iterable[Label], ids: Collection[str]) -> set[str]:
    """The items with votes that are a fair sample of the candidates.

    Accept shares and a discriminator's accuracy are estimated from these alone. They are all
    items, where every candidate was labelled or all were drawn at random. Once uncertainty or
    strata have drawn some, the rest is no fair sample either: then it is the random audit share.

    Args:
        labels: labels that stand, as `read_labels` returns them.
        ids: all candidates.
    """
    labels = list(labels)
    orders = collect_orders(labels)
    complete = set(ids) <= {label.id for label in labels}
    if complete or set(orders.values()) <= {"random", "imported"}:
        return set(orders)
    return {item_id for item_id, order in orders.items() if order == "audit"}


def count_wanted(wanted: int, available: int) -> int:
    """How many decisions are aimed at: `wanted`, or all where that is 0 or more than there are.

    Raises:
        ValueError: `wanted` is negative.
    """
    if wanted < 0:
        raise ValueError(f"labels wanted: {wanted} is no number of labels; 0 wants all")
    return min(wanted, available) if wanted else available


def count_missing(
    labels: Iterable[Label], ids: Collection[str], *, wanted: int = 0, policy: str = "majority"
) -> int:
    """How many decisions are still to be made before `wanted` (0: all of `ids`) are there.

    An item that was skipped, or on which the annotators disagree, has been handled: it is not
    missing once nothing untouched is left to replace it.

    Raises:
        ValueError: `wanted` is negative.
    """
    ids = set(ids)
    labels = [label for label in labels if label.id in ids]
    untouched = len(ids - {label.id for label in labels})
    goal = count_wanted(wanted, len(ids))
    return max(0, min(goal - len(merge_votes(labels, policy)), untouched))


def require_labels(
    labels: Iterable[Label],
    ids: Collection[str],
    *,
    wanted: int = 0,
    policy: str = "majority",
    parameters: Mapping | None = None,
) -> None:
    """Stop a notebook that has fewer decisions than `count_missing` asks for.

    Args:
        labels, ids, wanted, policy: as for `count_missing`.
        parameters: what to set in the annotation notebook, told to whoever runs a recipe (less
            what is empty or False, as it is there); None where the widget is on the same page.

    Raises:
        LabelsMissing: says how many are missing and what to do.
    """
    missing = count_missing(labels, ids, wanted=wanted, policy=policy)
    if not missing:
        return
    if parameters is None:
        mend = (
            "label them in the widget above, then run this cell and those below it (where "
            "papermill ran this notebook, open what it wrote and run that first)"
        )
    else:
        set_here = {k: v for k, v in parameters.items() if v not in ("", {}) and v is not False}
        given = ", ".join(f"{name} = {value!r}" for name, value in set_here.items())
        mend = (
            f"open notebooks/04_annotate.ipynb, set {given}, run it and label; then run this again"
        )
    goal = count_wanted(wanted, len(ids))
    raise LabelsMissing(f"{missing} of {goal} labels are missing: {mend}")


def compute_agreement(labels: Iterable[Label]) -> dict:
    """Agreement between annotators, and of each annotator with their own earlier answers.

    Returns:
        pairs: one dict a pair with `annotators`, `n` (items both decided), `agree` (share),
            `kappa` (Cohen's; None if undefined because only one answer occurs).
        alpha: Krippendorff's alpha (nominal) over all annotators, or None if undefined.
        n_shared: items that two or more annotators decided.
        self_consistency: annotator -> `n` repeats and the share `agree` answered as before.
    """
    labels = list(labels)
    answers: dict[str, dict[str, str]] = defaultdict(dict)
    for votes in _collect_votes(labels).values():
        for vote in votes:
            answers[vote.annotator][vote.id] = vote.label
    pairs = []
    for first, second in itertools.combinations(sorted(answers), 2):
        both = sorted(answers[first].keys() & answers[second].keys())
        if both:
            a, b = ([answers[who][item_id] for item_id in both] for who in (first, second))
            kappa = float(cohen_kappa_score(a, b)) if len({*a, *b}) > 1 else None
            pair = {"annotators": (first, second), "n": len(both), "kappa": kappa}
            pairs.append(pair | {"agree": float(np.mean(np.equal(a, b)))})
    counts = Counter(item_id for given in answers.values() for item_id in given)
    shared = sorted(item_id for item_id, n in counts.items() if n > 1)
    codes = {label: code for code, label in enumerate(DECISIONS + PREFERENCES)}
    table = np.array(
        [[codes.get(answers[x].get(i), np.nan) for i in shared] for x in sorted(answers)]
    )
    alpha = None
    if len(np.unique(table[~np.isnan(table)])) > 1:
        alpha = float(krippendorff.alpha(reliability_data=table, level_of_measurement="nominal"))
    again: dict[str, list[bool]] = defaultdict(list)
    for label in labels:
        if label.repeat and label.label != "skip" and label.id in answers[label.annotator]:
            again[label.annotator].append(answers[label.annotator][label.id] == label.label)
    steady = {who: {"n": len(x), "agree": float(np.mean(x))} for who, x in again.items()}
    return {"pairs": pairs, "alpha": alpha, "n_shared": len(shared), "self_consistency": steady}
