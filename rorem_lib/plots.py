"""Figures of arrays and records: images side by side, losses, scores, labels.

`data.figures` draws triplets and sets, `evaluation.figures` compares methods. Colours are
safe for colour-blind readers (Okabe and Ito).
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import PercentFormatter

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE, GREY = (
    "#1a1a1a",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#8a8a8a",
)
MOST_REASONS = 9  # that a figure names; people may write what they like
OTHERS = "other reasons"
REASON_COLOURS = {
    "incomplete removal": BLACK,
    "object left": BLACK,
    "wrong content": VERMILION,
    "something invented": VERMILION,
    "colour shift": ORANGE,
    "blur": SKY,
    "blurred": SKY,
    "shadow left": PURPLE,
    "rest changed": GREEN,
    "other": GREY,
    OTHERS: GREY,
}


class PlainFigure(Figure):
    """A figure whose texts are shown as they stand: names and reasons with `$` are no formulas."""

    def draw(self, renderer):
        with rc_context({"text.parse_math": False}):  # for the labels that drawing makes
            for text in self.findobj(Text):
                text.set_parse_math(False)
            super().draw(renderer)


def shorten(text: str) -> str:
    """What somebody wrote, for a legend: on one line, at most 60 characters."""
    text = textwrap.shorten(text, 60, placeholder=" …") or "…"
    return text if not text.startswith("_") else f" {text}"  # legends leave out such labels


def make_axes(width: float, height: float, columns: int = 1, rows: int = 1, **options):
    """A figure of inches and its bare axes [rows * columns]."""
    figure = PlainFigure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
        axis.grid(axis="both", color="#e6e6e6", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


# --------------------------------------------------------------------------------- images


def plot_grid(
    pictures: Sequence[Sequence[np.ndarray | None]],
    *,
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    frames: Sequence[Sequence[str | bool | None]] = (),
    cell: int = 128,
    height: int | None = None,
) -> Figure:
    """Rows of images side by side.

    Args:
        pictures: rows of uint8 [H, W, 3] or [H, W]; None leaves a cell empty.
        column_titles, row_titles: above and left of the grid.
        captions: a short text under each image, rows as in `pictures`.
        frames: around each image a colour, blue for True (accepted), vermilion for False
            (rejected), None for none.
        cell: side of a cell in pixels; small images are enlarged without smoothing.
        height: of a cell in pixels, where images are wider than high; `cell` if None.
    """
    if not pictures or not any(len(row) for row in pictures):
        raise ValueError("there are no images to show")
    rows, columns = len(pictures), max(len(row) for row in pictures)
    gap = max(6, cell // 16)
    lines = max((text.count("\n") + 1 for row in captions for text in row), default=0)
    foot = 8 + 12 * lines if lines else 0
    tall = height or cell
    step_x, step_y = cell + gap, tall + gap + foot
    canvas = np.full((rows * step_y, columns * step_x, 3), 255, np.uint8)
    for r, row in enumerate(pictures):
        for c, picture in enumerate(row):
            if picture is None:
                continue
            top, left = r * step_y + gap // 2, c * step_x + gap // 2
            frame = _choose_frame(frames[r][c]) if frames else None
            if frame:
                edge = max(2, gap // 2 - 1)
                canvas[top - edge : top + tall + edge, left - edge : left + cell + edge] = [
                    int(frame[i : i + 2], 16) for i in (1, 3, 5)
                ]
            canvas[top : top + tall, left : left + cell] = _fit_cell(picture, cell, tall)
    dpi, head, side = 100, 22 * bool(column_titles), 78 * bool(row_titles)
    height, width = canvas.shape[0] + head, canvas.shape[1] + side
    figure = PlainFigure(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor="white")
    axis = figure.add_axes((side / width, 0, canvas.shape[1] / width, canvas.shape[0] / height))
    axis.imshow(canvas, interpolation="none", aspect="auto")
    axis.set_axis_off()
    for c, title in enumerate(column_titles):
        axis.text(c * step_x + step_x / 2, -4, title, ha="center", va="bottom", fontsize=9)
    for r, title in enumerate(row_titles):
        axis.text(-6, r * step_y + (step_y - foot) / 2, title, ha="right", va="center", fontsize=9)
    for r, texts in enumerate(captions):
        for c, text in enumerate(texts):
            axis.text(
                c * step_x + step_x / 2,
                (r + 1) * step_y - foot,
                text,
                ha="center",
                va="top",
                fontsize=7,
                color="#444444",
            )
    return figure


def break_rows(items: Sequence, columns: int) -> list[list]:
    """A list as the rows of a grid that is not wider than `columns`."""
    return [list(items[start : start + columns]) for start in range(0, len(items), columns)]


def _choose_frame(mark) -> str | None:
    if mark is None or mark != mark:  # NaN is how a table says that nobody judged
        return None
    return mark if isinstance(mark, str) else BLUE if mark else VERMILION


def _fit_cell(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """Any image as [height, width, 3], its aspect kept on white."""
    picture = np.asarray(picture)
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=2)
    scale = min(height / picture.shape[0], width / picture.shape[1])
    size = [max(1, round(side * scale)) for side in picture.shape[1::-1]]
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    small = cv2.resize(np.ascontiguousarray(picture), size, interpolation=way)
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    fitted = np.full((height, width, 3), 255, np.uint8)
    fitted[top : top + size[1], left : left + size[0]] = small
    return fitted


# --------------------------------------------------------------------------------- training


def plot_losses(histories: Mapping[str, Sequence[Mapping]], *, smoothing: float = 0.8) -> Figure:
    """One small panel a training: its loss by step, raw (pale) and smoothed.

    Args:
        histories: title -> lines of `metrics.jsonl` (dicts with `step` and `loss`).
        smoothing: 0..1, weight of the past in the smoothed line.
    """
    histories = {
        title: [x for x in lines if x.get("loss") is not None] for title, lines in histories.items()
    }
    histories = {title: lines for title, lines in histories.items() if lines}
    if not histories:
        raise ValueError("there are no losses to show")
    columns = min(3, len(histories))
    rows = -(-len(histories) // columns)
    figure, axes = make_axes(3.6 * columns, 2.3 * rows, columns, rows)
    for axis, (title, lines) in zip(axes, histories.items(), strict=False):
        steps, loss = [x["step"] for x in lines], [float(x["loss"]) for x in lines]
        smooth = [loss[0]]
        for value in loss[1:]:
            smooth.append(smoothing * smooth[-1] + (1 - smoothing) * value)
        axis.plot(steps, loss, color=SKY, linewidth=0.8, alpha=0.6)
        axis.plot(steps, smooth, color=BLUE, linewidth=1.6)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
    for axis in axes[len(histories) :]:
        axis.set_axis_off()
    axes[0].set_ylabel("loss", fontsize=8)
    return figure


# -------------------------------------------------------------------- discriminator, acceptance


def plot_scores(
    probabilities, threshold: float, *, labels=None, accepted: int | None = None, title: str = ""
) -> Figure:
    """Histogram of calibrated probabilities with the acceptance threshold.

    Args:
        probabilities: [N] 0..1.
        threshold: drawn as a line; what lies right of it may be accepted.
        labels: [N] bool, where known: the histogram is then split into accepted and rejected.
        accepted: number of accepted removals, for the legend.
    """
    probabilities = np.asarray(probabilities, dtype=float)
    figure, (axis,) = make_axes(6, 2.8)
    bins = np.linspace(0, 1, 41)
    if labels is None:
        axis.hist(probabilities, bins, color=SKY)
    else:
        labels = np.asarray(labels, dtype=bool)
        axis.hist(
            [probabilities[labels], probabilities[~labels]],
            bins,
            stacked=True,
            color=[BLUE, ORANGE],
            label=["accepted by the annotators", "rejected"],
        )
    text = f"threshold {threshold:.2f}"
    if accepted is not None:
        text += f": {accepted} of {probabilities.size} accepted"
    axis.axvline(threshold, color=VERMILION, linewidth=1.6, label=text)
    axis.set(
        xlabel="calibrated probability that a removal is good",
        ylabel="removals",
        title=title,
        xlim=(0, 1),
    )
    axis.legend(fontsize=8, frameon=False)
    return figure


def _draw_reliability(axis, curve: Mapping) -> None:
    predicted, observed = np.array(curve["predicted"]), np.array(curve["observed"])
    spread = [observed - np.array(curve["low"]), np.array(curve["high"]) - observed]
    axis.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
    axis.errorbar(
        predicted,
        observed,
        yerr=np.maximum(spread, 0),
        color=BLUE,
        marker="o",
        markersize=4,
        linewidth=1.2,
        capsize=2,
    )
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axis.set_xlabel("predicted share of good removals", fontsize=8)
    axis.set_ylabel("observed", fontsize=8)


def plot_calibration(
    curve: Mapping,
    roc: Mapping | None = None,
    *,
    auc: float | None = None,
    auc_interval: Sequence[float] | None = None,
    title: str = "",
) -> Figure:
    """Reliability and, beside it, the ROC curve (`acceptance.describe_roc`)."""
    figure, axes = make_axes(7 if roc else 3.6, 3.4, 2 if roc else 1)
    _draw_reliability(axes[0], curve)
    axes[0].set_title("reliability", fontsize=9)
    if roc:
        axes[1].plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
        axes[1].plot(roc["false_accepts"], roc["true_accepts"], color=BLUE, linewidth=1.6)
        axes[1].set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes[1].set_xlabel("bad removals accepted", fontsize=8)
        axes[1].set_ylabel("good removals accepted", fontsize=8)
        text = "ROC" if auc is None else f"ROC, area {auc:.3f}"
        if auc_interval:
            text += f" ({auc_interval[0]:.3f} to {auc_interval[1]:.3f})"
        axes[1].set_title(text, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def plot_label_summary(labels: Sequence) -> Figure:
    """Each annotator's decisions, and the reasons for what they rejected.

    Args:
        labels: `Label`s that stand; an annotator who is no person is named as simulated.
    """
    people = sorted({label.annotator for label in labels})
    simulated = {label.annotator for label in labels if label.simulated}
    names = [
        name if name not in simulated or "simulated" in name else f"{name} (simulated)"
        for name in people
    ]
    figure, axes = make_axes(9.5, 0.34 * len(people) + 1.5, 2)
    answers = {"accept": GREEN, "reject": VERMILION, "skip": GREY}
    left = np.zeros(len(people))
    for answer, colour in answers.items():
        counts = [sum(x.label == answer for x in labels if x.annotator == who) for who in people]
        axes[0].barh(names, counts, left=left, color=colour, label=answer, edgecolor="white")
        left += counts
    rejected = [(x.annotator, x.reason or "no reason given") for x in labels if x.label == "reject"]
    common = [name for name, _ in Counter(name for _, name in rejected).most_common(MOST_REASONS)]
    given = Counter((who, name if name in common else OTHERS) for who, name in rejected)
    total = Counter(label.annotator for label in labels)
    left = np.zeros(len(people))
    for reason in [*common, OTHERS] if any(name == OTHERS for _, name in given) else common:
        fraction = np.array([given[who, reason] / total[who] for who in people])
        axes[1].barh(
            names,
            fraction,
            left=left,
            color=REASON_COLOURS.get(reason, YELLOW),
            label=shorten(reason),
            edgecolor="white",
        )
        left += fraction
    axes[0].set_xlabel("labels", fontsize=8)
    axes[1].set_xlabel("share of the annotator's labels rejected for", fontsize=8)
    axes[1].xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axis in axes:
        axis.invert_yaxis()
        if axis.get_legend_handles_labels()[0]:
            axis.legend(
                fontsize=7,
                frameon=False,
                loc="upper center",
                ncols=3,
                bbox_to_anchor=(0.5, -0.55 / (0.34 * len(people) + 0.6)),
            )
    return figure
