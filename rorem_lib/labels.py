"""Human decisions about removals: votes, agreement, the order of the queue, import and export.

Annotators say yes or no to source, mask and removal; the accepted ones train the remover, all of
them train the discriminator (RORem, sec. 3.2; CVPR 2025, arXiv 2501.00740). The log itself is in
`label_log`, other formats in `label_exchange`; what is public there is reachable from here.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import numbers
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import krippendorff
import numpy as np
from sklearn.metrics import cohen_kappa_score

from rorem_lib.label_exchange import (
    export_dataset,
    export_labels,
    import_labels,
    write_scored_set,
)
from rorem_lib.label_log import (
    DECISIONS,
    PREFERENCES,
    REASONS,
    Label,
    LabelError,
    LabelLog,
    LabelsMissing,
    hash_content,
    read_labels,
    split_stale,
)
from rorem_lib.triplets import Triplet, load_image

__all__ = [
    "ADJUDICATION", "DECISIONS", "ORDERS", "POLICIES", "REASONS", "Label", "LabelError",
    "LabelLog", "LabelsMissing", "QueueItem", "collect_orders", "compute_agreement",
    "count_missing", "export_dataset", "export_labels", "find_conflicts", "find_fair",
    "hash_content",
    "import_labels", "list_adjudication", "merge_votes", "order_items", "read_labels",
    "require_labels", "split_stale", "stratify_items", "write_scored_set",
]  # fmt: skip

ORDERS = ("random", "uncertainty", "stratified")
POLICIES = ("majority", "unanimous", "single")
ADJUDICATION = "adjudication"  # a label's order, where it settles a conflict


# ------------------------------------------------------------------------- votes, agreement


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


def find_conflicts(labels: Iterable[Label]) -> list[str]:
    """Ids on which annotators disagree and no adjudicator has decided."""
    labels = list(labels)
    settled = {x.id for x in labels if x.order == ADJUDICATION and x.label != "skip"}
    return [item_id for item_id, given in _collect_votes(labels).items()
            if len({x.label for x in given}) > 1 and item_id not in settled]


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
    mine = sorted(item_id for item_id in open_here
                  if annotator not in {x.annotator for x in votes[item_id]})
    told = {item_id: ", ".join(f"{x.annotator} {x.reason or x.label}" for x in votes[item_id])
            for item_id in mine}
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
    """The decided items that are a fair sample of the candidates.

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


def count_missing(
    labels: Iterable[Label], ids: Collection[str], *, wanted: int = 0, policy: str = "majority"
) -> int:
    """How many decisions are still to be made before `wanted` (0: all of `ids`) are there.

    An item that was skipped, or on which the annotators disagree, has been handled: it is not
    missing once nothing untouched is left to replace it.

    Raises:
        ValueError: `wanted` is negative.
    """
    if wanted < 0:
        raise ValueError(f"labels wanted: {wanted} is no number of labels; 0 wants all")
    ids = set(ids)
    labels = [label for label in labels if label.id in ids]
    untouched = len(ids - {label.id for label in labels})
    goal = min(wanted, len(ids)) if wanted else len(ids)
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
    goal = min(wanted, len(ids)) if wanted else len(ids)
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


# --------------------------------------------------------------------------------- the queue


@dataclass(frozen=True)
class QueueItem:
    """One place in an annotator's queue.

    Attributes:
        id: the candidate's.
        order: how it was drawn.
        repeat: shown for the second time, silently.
        shared: everybody is asked; others' labels do not take it out of this queue.
    """

    id: str
    order: str
    repeat: bool = False
    shared: bool = False


def order_items(
    ids: Iterable[str],
    *,
    order: str = "random",
    scores: Mapping[str, float] | None = None,
    strata: Mapping[str, str] | None = None,
    audit_share: float = 0.15,
    overlap_share: float = 0.1,
    repeat_share: float = 0.02,
    annotator: str = "",
    labels: Iterable[Label] = (),
    seed: int = 0,
) -> list[QueueItem]:
    """The queue of one annotator.

    What somebody else has labelled is left out, except the overlap. Which items are overlap or
    audit depends on the seed alone, so annotators who never talk to each other agree about it;
    the order differs from annotator to annotator.

    Args:
        ids: all candidates.
        order: "random"; "uncertainty" (scores nearest 0.5 first) or "stratified" (round-robin over
            `strata`), both with a random `audit_share` mixed in (see `find_fair`).
        scores: id -> probability (0..1) that the removal is good, for "uncertainty".
        strata: id -> name of its stratum, for "stratified" (see `stratify_items`).
        audit_share: 0..1, share of random items in an order that is not; the overlap is part of it.
        overlap_share: 0..1, share of items that every annotator sees.
        repeat_share: 0..1, share of items that an annotator sees twice without being told, as far
            as 15 others or more can come between.
        annotator: whose queue.
        labels: everybody's labels so far.
        seed: one for all annotators of the set.

    Raises:
        ValueError: unknown order, a share or score outside 0..1, scores or strata missing.
    """
    ids = sorted(set(ids))
    for share in (audit_share, overlap_share, repeat_share):
        if not 0 <= share <= 1:
            raise ValueError(f"audit, overlap and repeat share lie between 0 and 1, not {share}")
    common, own = _make_generator(seed, ""), _make_generator(seed, annotator)
    drawn = [ids[i] for i in common.permutation(len(ids))]
    overlap = dict.fromkeys(drawn[: round(overlap_share * len(ids))])
    audit = set(drawn[: max(len(overlap), round(audit_share * len(ids)))])
    shuffled = [ids[i] for i in own.permutation(len(ids))]
    taken = {x.id for x in labels if x.annotator != annotator} - overlap.keys()
    if order == "random":
        ranked = shuffled
    elif order == "uncertainty":
        _require_all(scores, ids, "a score")
        _check_scores(scores, ids)
        ranked = sorted(
            (x for x in shuffled if x not in audit), key=lambda x: abs(scores[x] - 0.5)
        )
    elif order == "stratified":
        _require_all(strata, ids, "a stratum")
        groups: dict[str, list[str]] = defaultdict(list)
        for item_id in shuffled:
            if item_id not in audit:
                groups[strata[item_id]].append(item_id)
        rounds = itertools.zip_longest(*(groups[name] for name in sorted(groups)))
        ranked = [x for row in rounds for x in row if x is not None]
    else:
        raise ValueError(f"order {order!r} is unknown: choose one of {', '.join(ORDERS)}")
    if order != "random":
        chance = [x for x in shuffled if x in audit and x not in overlap]
        ranked = _interleave(ranked, chance, len(chance) / max(1, len(ranked) + len(chance)))
    waiting = [x for x in ranked if x not in taken and x not in overlap]
    # Everybody meets the overlap at the same early pace, so that it is shared when all stop early.
    ranked = _interleave(waiting, list(overlap), max(0.1, overlap_share))
    tag = {x: "audit" if order != "random" and x in audit else order for x in ranked}
    queue = [QueueItem(x, tag[x], shared=x in overlap) for x in ranked]
    # Drawn from all ids: what others label meanwhile changes nobody's repeats.
    again = [ids[i] for i in own.permutation(len(ids))]
    gaps = dict(zip(again, own.integers(15, 40, size=len(ids)).tolist(), strict=True))
    places = {item.id: place for place, item in enumerate(queue)}
    fitting = [places[x] for x in again if places.get(x, math.inf) + gaps[x] <= len(queue)]
    for place in sorted(fitting[: round(repeat_share * len(queue))], reverse=True):
        first = queue[place]
        queue.insert(place + gaps[first.id], replace(first, repeat=True))
    return queue


def _make_generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def _require_all(table: Mapping | None, ids: list[str], what: str) -> None:
    lacking = [x for x in ids if x not in (table or {})]
    if lacking:
        raise ValueError(
            f"{len(lacking)} of {len(ids)} candidates have not got {what} (first: {lacking[0]}): "
            'give one for each, or choose order "random"'
        )


def _check_scores(scores: Mapping[str, float], ids: list[str]) -> None:
    for item_id in ids:
        score = scores[item_id]
        if not (isinstance(score, numbers.Real) and 0 <= score <= 1):
            raise ValueError(
                f"the score of {item_id} is {score!r}, not a probability between 0 and 1"
            )


def _interleave(many: list[str], few: list[str], rate: float) -> list[str]:
    many, few, mixed = iter(many), iter(few), []
    for place in itertools.count(1):
        due = int(place * rate + 1e-9) > int((place - 1) * rate + 1e-9)
        item = next(itertools.chain(few, many) if due else itertools.chain(many, few), None)
        if item is None:
            return mixed
        mixed.append(item)


def stratify_items(
    triplets: Iterable[Triplet], *, bins: int = 3, key: str = "kind"
) -> dict[str, str]:
    """Name the stratum of each candidate: mask size and, where the set says it, object class.

    Args:
        triplets: the candidates; their masks are opened.
        bins: number of size classes of equal frequency.
        key: the record's key that holds the class.

    Returns:
        id -> stratum, such as "mug size 2" (2: the largest third).
    """
    triplets = list(triplets)
    shares = [float((load_image(triplet.mask, "L") >= 128).mean()) for triplet in triplets]
    edges = np.quantile(shares, np.linspace(0, 1, bins + 1)[1:-1]) if shares else []
    sizes = np.searchsorted(edges, shares, "right")
    return {
        triplet.id: f"{triplet.extra.get(key, '')} size {size}".strip()
        for triplet, size in zip(triplets, sizes, strict=True)
    }
