"""Figures of triplet sets: sheets of them, masks, changes, what was rejected.

The rest of the figures is `rorem_lib.figures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rorem_lib.figures import BLUE, ORANGE, SKY, VERMILION, make_axes, plot_grid
from rorem_lib.masks import outline_mask
from rorem_lib.records import Triplet, load_images
from rorem_lib.sources.base import Pictures


def plot_sheet(triplets: Sequence[Triplet], *, columns: int = 8, cell: int = 72) -> Figure:
    """A sheet of triplets: the source with the mask's outline and, where there is one, the GT.

    Args:
        triplets: what to show; at least one.
        columns: triplets in a row.
        cell: side of a picture in px.
    """
    shown = []
    for triplet in triplets:
        x = load_images(triplet)
        shown.append([outline_mask(x["source"], x["mask"])] + [x["gt"]] * (triplet.gt is not None))
    return plot_grid([sum(shown[row:row + columns], []) for row in range(0, len(shown), columns)],
                     cell=cell)


def plot_items(items: Mapping[str, Pictures], *, cell: int = 150) -> Figure:
    """What an importer reads: source, mask, GT and the change between source and GT.

    Args:
        items: by a short name, what `Source.load_item` returned; at least one.
        cell: side of a picture in px.
    """
    rows = []
    for pictures in items.values():
        source, mask = pictures.source.array, pictures.mask.array
        row = [source, outline_mask(source, mask) if mask.shape == source.shape[:2] else None, mask]
        gt = pictures.gt and pictures.gt.array
        if gt is not None and gt.shape == source.shape:
            change = np.abs(source.astype(np.int16) - gt).max(axis=2)
            row += [gt, np.clip(change * 3, 0, 255).astype(np.uint8)]
        rows.append(row)
    titles = ["source", "mask, outlined", "mask", "GT", "change (3 times)"]
    return plot_grid(rows, row_titles=[name[-14:] for name in items], cell=cell,
                     column_titles=titles[:max(map(len, rows))])


def plot_rejections(reasons: Mapping[str, int], *, kept: int) -> Figure:
    """How many items became triplets, and why the others did not."""
    names = ["kept", *reasons]
    counts = [kept, *reasons.values()]
    figure, (axis,) = make_axes(7, 0.32 * len(names) + 0.9)
    axis.barh(names, counts, color=[BLUE] + [VERMILION] * len(reasons))
    for place, count in enumerate(counts):
        axis.annotate(f"{count:,}  ({count / max(1, sum(counts)):.1%})", (count, place),
                      xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axis.margins(x=0.2)
    axis.invert_yaxis()
    axis.set_xlabel("items", fontsize=9)
    return figure


def plot_changes(inside: Sequence[float], outside: Sequence[float], *, min_change: float,
                 max_change_outside: float) -> Figure:
    """How much source and GT differ inside of the masks, and outside, with the filters' limits.

    Args:
        inside: [N] mean difference inside of each mask, grey levels.
        outside: [N] median difference outside, grey levels.
        min_change, max_change_outside: the limits, drawn as lines.
    """
    figure, axes = make_axes(7, 2.3, 2)
    for axis, values, limit, side, colour in (
            (axes[0], inside, min_change, "inside", SKY),
            (axes[1], outside, max_change_outside, "outside", ORANGE)):
        axis.hist(np.asarray(values, dtype=float), 40, color=colour)
        axis.axvline(limit, color=VERMILION, linewidth=1.4)
        axis.set_xlabel(f"change {side} of the mask, grey levels", fontsize=9)
    axes[0].set_ylabel("triplets", fontsize=9)
    return figure


def plot_mask_areas(areas: Mapping[str, Sequence[float]], *, bins: int = 24) -> Figure:
    """How much of their pictures the masks of each set cover, a panel a set on one scale.

    Args:
        areas: by set, the share of each picture that is masked, 0..1.
        bins: bars a panel.
    """
    if not areas:
        raise ValueError("there are no masks to measure")
    figure, axes = make_axes(2.5 * len(areas) + 0.6, 2.2, len(areas), sharex=True)
    top = max(float(np.max(values)) for values in areas.values())
    edges = np.linspace(0, top * 1.02, bins + 1)
    for axis, (name, values) in zip(axes, areas.items(), strict=True):
        axis.hist(values, edges, color=SKY)
        median = float(np.median(values))
        axis.axvline(median, color=BLUE, linewidth=1.4)
        axis.set_title(f"{name}: {len(values)}, median {median:.1%}", fontsize=9)
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.supxlabel("share of the picture that is masked", fontsize=9)
    axes[0].set_ylabel("pictures", fontsize=9)
    return figure
