"""Figures of triplet sets: sheets of them, masks, changes, what was rejected.

The rest of the figures is `rorem_lib.plots`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rorem_lib.data.items import Pictures
from rorem_lib.data.masks import outline_mask
from rorem_lib.data.triplets import Triplet, load_images
from rorem_lib.plots import BLUE, GREY, ORANGE, SKY, VERMILION, PlainFigure, make_axes, plot_grid


def plot_sheet(triplets: Sequence[Triplet], *, title: str = "", columns: int = 8) -> Figure:
    """A sheet of triplets: the source with the mask's outline and, where there is one, the GT.

    Args:
        triplets: what to show; at least one.
        title: above the sheet.
        columns: triplets in a row, fewer where there are few.
    """
    if not triplets:
        raise ValueError("there are no triplets to show")
    few = len(triplets) <= 24
    columns, cell = (4, 140) if few else (columns, 72)
    shown = []
    for triplet in triplets:
        x = load_images(triplet)
        pair = [_outline_small(x["source"], x["mask"], cell)]
        shown.append(pair + [x["gt"]] * (triplet.gt is not None))
    columns = min(columns, len(shown))
    names = ["source", "GT"] if any(len(pair) == 2 for pair in shown) else ["source"]
    for pair in shown:
        pair += [None] * (len(names) - len(pair))
    figure = plot_grid(
        [sum(shown[row : row + columns], []) for row in range(0, len(shown), columns)],
        cell=cell,
        height=_get_height(sum(shown, []), cell),
        column_titles=names * columns,
    )
    if title:
        height = figure.get_figheight()
        figure.text(0.5, 1 + 0.12 / height, title, ha="center", va="bottom", fontsize=11)
    return figure


def _outline_small(source: np.ndarray, mask: np.ndarray, cell: int) -> np.ndarray:
    """The source at the size it is shown with the mask's outline: a line drawn on a large image
    is gone when that is shrunk."""
    if mask.shape != source.shape[:2]:
        return source
    scale = cell / max(mask.shape)
    if scale < 1:
        size = tuple(max(1, round(side * scale)) for side in mask.shape[::-1])
        source = cv2.resize(source, size, interpolation=cv2.INTER_AREA)
        mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
    return outline_mask(source, mask)


def plot_items(items: Mapping[str, Pictures], *, cell: int = 150) -> Figure:
    """What an importer reads: source, mask, GT and the change between source and GT.

    Args:
        items: by a short name, what `Source.load_item` returned; at least one.
        cell: side of an image in px.
    """
    rows = []
    for pictures in items.values():
        source, mask = pictures.source.array, pictures.mask.array
        row = [source, _outline_small(source, mask, cell), mask]
        gt = pictures.gt and pictures.gt.array
        if gt is not None and gt.shape == source.shape:
            change = np.abs(source.astype(np.int16) - gt).max(axis=2)
            row += [gt, np.clip(change * 3, 0, 255).astype(np.uint8)]
        rows.append(row)
    titles = ["source", "mask, outlined", "mask", "GT", "change x 3, clipped"]
    names = ["\n".join(textwrap.wrap(name, 13)[:4]) if "\n" not in name else name for name in items]
    return plot_grid(
        rows,
        row_titles=names,
        cell=cell,
        height=_get_height(sum(rows, []), cell),
        column_titles=titles[: max(map(len, rows))],
    )


def _get_height(pictures: Sequence[np.ndarray | None], cell: int) -> int:
    """How high cells have to be for images that are `cell` px wide, at most as high."""
    shapes = [picture.shape for picture in pictures if picture is not None]
    return round(cell * min(1, max(shape[0] / shape[1] for shape in shapes)))


def plot_rejections(reasons: Mapping[str, int], *, kept: int) -> Figure:
    """How many items became triplets, and why the others did not."""
    names = ["kept", *reasons]
    counts = [kept, *reasons.values()]
    figure, (axis,) = make_axes(7, 0.32 * len(names) + 0.9)
    axis.barh(names, counts, color=[BLUE] + [VERMILION] * len(reasons))
    for place, count in enumerate(counts):
        axis.annotate(
            f"{count:,}  ({count / max(1, sum(counts)):.1%})",
            (count, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axis.margins(x=0.2)
    axis.invert_yaxis()
    axis.set_xlabel("items", fontsize=9)
    return figure


def plot_changes(
    inside: Sequence[float],
    outside: Sequence[float],
    *,
    min_change: float,
    max_change_outside: float,
) -> Figure:
    """How much source and GT differ inside of the masks, and outside, with the filters' limits.

    Args:
        inside: [N] mean difference inside of each mask, grey levels.
        outside: [N] median difference outside, grey levels.
        min_change, max_change_outside: the limits, drawn as lines.
    """
    figure, axes = make_axes(7, 2.3, 2)
    for axis, values, limit, side, colour in (
        (axes[0], inside, min_change, "inside", SKY),
        (axes[1], outside, max_change_outside, "outside", ORANGE),
    ):
        values = np.asarray(values, dtype=float)
        # medians are whole grey levels: a bar for each
        bins = np.arange(-0.5, max(limit, values.max()) + 1.5) if side == "outside" else 40
        axis.hist(values, bins, color=colour)
        axis.axvline(limit, color=VERMILION, linewidth=1.4, label="limit")
        axis.set_xlabel(f"change {side} of the mask, grey levels", fontsize=9)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("triplets kept", fontsize=9)
    axes[1].legend(fontsize=8, frameon=False)
    return figure


def plot_mask_areas(areas: Mapping[str, Sequence[float]], *, bins: int = 24) -> Figure:
    """How much of their images the masks of each set cover, a panel a set on one scale.

    Args:
        areas: by set, the share of each image that is masked, 0..1.
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
    figure.supxlabel("share of the image that is masked", fontsize=9)
    axes[0].set_ylabel("images", fontsize=9)
    axes[0].yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def plot_candidates(
    triplets: Sequence, *, captions: Sequence[str] = (), pairs: int = 4, cell: int = 112
) -> Figure:
    """Candidates as annotators see them: the source with the mask's outline, then the removal.

    Args:
        triplets: candidates (GT is the removal); none gives a figure that says so.
        captions: a short text for each.
        pairs: candidates in a row.
        cell: side of an image in pixels.
    """
    if not triplets:
        figure = PlainFigure(figsize=(4, 0.5), facecolor="white")
        figure.text(0.5, 0.5, "there are none", ha="center", va="center", color=GREY)
        return figure
    shown = [load_images(triplet) for triplet in triplets]
    shown = [[outline_mask(x["source"], x["mask"]), x["gt"]] for x in shown]
    texts = [["", text] for text in captions]
    rows = range(0, len(shown), pairs)
    return plot_grid(
        [sum(shown[row : row + pairs], []) for row in rows],
        captions=[sum(texts[row : row + pairs], []) for row in rows] if texts else (),
        column_titles=["source", "removal"] * min(pairs, len(shown)),
        cell=cell,
    )
