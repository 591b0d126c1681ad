"""Who is shown which candidate and when: orders, random audit share, overlap, silent repeats."""

from __future__ import annotations

import hashlib
import itertools
import math
import numbers
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from rorem_lib.data.pictures import load_mask
from rorem_lib.data.triplets import Triplet
from rorem_lib.labels.log import Label

ORDERS = ("random", "uncertainty", "stratified")


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
            `strata`), both with a random `audit_share` mixed in (see `votes.find_fair`).
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
    for fraction in (audit_share, overlap_share, repeat_share):
        if not 0 <= fraction <= 1:
            raise ValueError(f"audit, overlap and repeat share lie between 0 and 1, not {fraction}")
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
        ranked = sorted((x for x in shuffled if x not in audit), key=lambda x: abs(scores[x] - 0.5))
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
    shares = [float((load_mask(triplet.mask) >= 128).mean()) for triplet in triplets]
    edges = np.quantile(shares, np.linspace(0, 1, bins + 1)[1:-1]) if shares else []
    sizes = np.searchsorted(edges, shares, "right")
    return {
        triplet.id: f"{triplet.extra.get(key, '')} size {size}".strip()
        for triplet, size in zip(triplets, sizes, strict=True)
    }
