"""What a triplet set holds, in one pass over its records: sources, licences, classes, masks."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from rorem_lib.data.pictures import load_mask
from rorem_lib.data.triplets import Triplet, iter_triplets

CLASS_KEYS = ("class", "classes", "kind")  # whatever an importer calls what was removed


@dataclass
class SetSummary:
    """Counts and measures of one set; its size does not grow with the records.

    Attributes:
        count: triplets.
        groups: different groups.
        origins: triplets by (origin, license).
        classes: triplets by the class of what is removed, where records name one.
        sizes: triplets by (width, height) in px, where records name them.
        mask_areas: [N] share of each image that is masked, 0 to 1.
        change_inside, change_outside: [N] grey levels, where the filters measured them.
        sample: some triplets, drawn at random without replacement.
    """

    count: int = 0
    groups: int = 0
    origins: Counter = field(default_factory=Counter)
    classes: Counter = field(default_factory=Counter)
    sizes: Counter = field(default_factory=Counter)
    mask_areas: array = field(default_factory=lambda: array("f"))
    change_inside: array = field(default_factory=lambda: array("f"))
    change_outside: array = field(default_factory=lambda: array("f"))
    sample: list[Triplet] = field(default_factory=list)


def summarise_set(meta: str | Path, *, sample: int = 64, seed: int = 0) -> SetSummary:
    """Read a set's records once; masks are opened only where no record says their area.

    Args:
        meta: what `resolve_meta` takes.
        sample: how many triplets to draw.
        seed: another seed, another draw.

    Raises:
        TripletError: the set or a record is unsound.
    """
    found, rng, groups = SetSummary(), np.random.default_rng(seed), set()
    for triplet in iter_triplets(meta, require_gt=False, look=False):
        extra = triplet.extra
        found.count += 1
        groups.add(hash(triplet.group))
        found.origins[extra.get("origin", "not named"), extra.get("license", "not named")] += 1
        name = next((extra[key] for key in CLASS_KEYS if extra.get(key)), None)
        for one in name if isinstance(name, list) else [name] * bool(name):
            found.classes[str(one)] += 1
        if "width" in extra and "height" in extra:
            found.sizes[extra["width"], extra["height"]] += 1
        area = extra.get("mask_area")
        found.mask_areas.append((load_mask(triplet.mask) >= 128).mean() if area is None else area)
        for key in ("change_inside", "change_outside"):
            if extra.get(key) is not None:
                getattr(found, key).append(extra[key])
        if len(found.sample) < sample:
            found.sample.append(triplet)
        elif (place := int(rng.integers(found.count))) < sample:  # reservoir sampling
            found.sample[place] = triplet
    found.groups = len(groups)
    return found


def tabulate_origins(summaries: Mapping[str, SetSummary]) -> pd.DataFrame:
    """Triplets by origin and licence, a column a set."""
    table = (
        pd.DataFrame(
            {name: pd.Series(dict(s.origins), dtype=float) for name, s in summaries.items()}
        )
        .fillna(0)
        .astype(int)
    )
    table.index = pd.MultiIndex.from_tuples(list(table.index), names=["origin", "license"])
    return table


def tabulate_classes(summaries: Mapping[str, SetSummary], *, top: int = 20) -> pd.DataFrame:
    """Triplets by class, the most frequent ones first, a column a set."""
    table = (
        pd.DataFrame(
            {name: pd.Series(dict(s.classes), dtype=float) for name, s in summaries.items()}
        )
        .fillna(0)
        .astype(int)
    )
    order = table.sum(axis=1).sort_values(ascending=False, kind="stable").index[:top]
    return table.loc[order].rename_axis("class")
