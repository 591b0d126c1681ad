"""Figures of an evaluation: success, rounds, failures, comparisons, preferences.

A colour belongs to a method in every figure: rounds go from light to dark blue, the base model is
black, controls are vermilion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rorem_lib.plots import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    REASON_COLOURS,
    VERMILION,
    make_axes,
    shorten,
)

FEW_STEPS = 4  # a distilled model's
_ROUNDS = ("#9bd0f2", "#00365a")  # the first round's blue and the last one's
_SPARE = ("#44AA99", "#882255", "#999933", "#AA4499", "#661100", "#88CCEE")


def assign_colours(methods: Sequence[Mapping]) -> dict[str, str]:
    """A colour for each method, by what it is: name -> hex.

    Args:
        methods: dicts with `name`, and where known `kind`, `row`, `control`, `lora`, `scheduler`.
    """
    rounds = [
        m["name"]
        for m in methods
        if m.get("row") and not m.get("control") and m["row"] != "base" and not is_fast(m)
    ]
    shades = _blend(*_ROUNDS, len(rounds))
    colours, spare = {}, list(_SPARE)
    for method in methods:
        name, kind = method["name"], method.get("kind", "remover")
        if name in rounds:
            colour = shades[rounds.index(name)]
        elif kind in ("telea", "ns"):
            colour = ORANGE if kind == "telea" else PURPLE
        elif is_fast(method):
            colour = GREEN if method.get("lora") else "#B8A500"
        elif method.get("control"):
            colour = VERMILION
        elif method.get("row") == "base":
            colour = BLACK
        else:
            colour = BLACK
        if colour in colours.values():  # a second control, a second model without a row, ...
            colour = spare.pop(0) if spare else GREY
        colours[name] = colour
    return colours


def is_fast(method: Mapping) -> bool:
    """Whether a method is a few-step variant of another model: a LoRA, LCM scheduling, or the
    model's own scheduler in at most `FEW_STEPS` as a control of these."""
    few = bool(method.get("control")) and (method.get("num_inference_steps") or 50) <= FEW_STEPS
    return few or bool(method.get("lora")) or method.get("scheduler") == "lcm"


def _blend(first: str, last: str, count: int) -> list[str]:
    ends = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (first, last)], float)
    steps = np.linspace(0, 1, count)[:, None] if count > 1 else np.ones((count, 1))
    return [
        "#" + "".join(f"{round(v):02x}" for v in row)
        for row in ends[0] * (1 - steps) + ends[1] * steps
    ]


def plot_success(methods: Sequence[Mapping], *, judge: str = "simulated annotator") -> Figure:
    """Success rates of all methods: an annotator (dot, 95%), the discriminator (diamond).

    Args:
        methods: dicts with `name`, `success_rate` and `success_interval` by the `judge`, and
            `success_rate_discriminator`; None where not measured.
        judge: who said what succeeded.
    """
    colours = assign_colours(methods)
    figure, (axis,) = make_axes(7, 0.34 * len(methods) + 1.3)
    for place, method in enumerate(methods):
        rate, interval = method.get("success_rate"), method.get("success_interval")
        if rate is not None:
            spread = [[max(0, rate - interval[0])], [max(0, interval[1] - rate)]]
            axis.errorbar(
                rate,
                place,
                xerr=spread,
                color=colours[method["name"]],
                marker="o",
                markersize=6,
                capsize=3,
                linewidth=1.6,
            )
        if method.get("success_rate_discriminator") is not None:
            axis.plot(
                method["success_rate_discriminator"],
                place,
                marker="D",
                markersize=6,
                markerfacecolor="none",
                markeredgecolor=GREY,
                linestyle="none",
            )
    axis.set_yticks(range(len(methods)), [m["name"] for m in methods])
    axis.set_ylim(len(methods) - 0.5, -0.5)
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_xlim(left=0)
    axis.plot([], [], "o-", color=BLACK, label=f"{judge}, 95% interval")
    if any(method.get("success_rate_discriminator") is not None for method in methods):
        axis.plot([], [], "D", color=GREY, markerfacecolor="none", label="discriminator")
    axis.set_xlabel("success rate")
    axis.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


def plot_rounds(rounds: Sequence[Mapping]) -> Figure:
    """Success and PSNR in the hole after each round.

    Args:
        rounds: dicts with `name`, `success_rate`, `success_interval`,
            `success_rate_discriminator` and `psnr_hole`; None where not measured.
    """
    figure, axes = make_axes(9, 3.2, 2)
    places = np.arange(len(rounds))
    shown = [
        (p, r) for p, r in zip(places, rounds, strict=True) if r.get("success_rate") is not None
    ]
    if shown:
        rates = np.array([r["success_rate"] for _, r in shown])
        ends = np.array([r.get("success_interval") or (r["success_rate"],) * 2 for _, r in shown])
        axes[0].errorbar(
            [p for p, _ in shown],
            rates,
            yerr=np.maximum(0, [rates - ends[:, 0], ends[:, 1] - rates]),
            color=BLUE,
            marker="o",
            capsize=3,
            label="simulated annotator, 95% interval",
        )
    guessed = [
        (p, r["success_rate_discriminator"])
        for p, r in zip(places, rounds, strict=True)
        if r.get("success_rate_discriminator") is not None
    ]
    if guessed:
        axes[0].plot(
            *zip(*guessed, strict=True),
            color=GREY,
            marker="D",
            markerfacecolor="none",
            linestyle="--",
            label="discriminator",
        )
    axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("success rate", fontsize=9)
    if shown or guessed:
        axes[0].legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    measured = [
        (p, r["psnr_hole"])
        for p, r in zip(places, rounds, strict=True)
        if r.get("psnr_hole") is not None
    ]
    if measured:
        axes[1].plot(*zip(*measured, strict=True), color=GREEN, marker="o")
    axes[1].set_ylabel("PSNR in the hole (dB)", fontsize=9)
    for axis in axes:
        axis.set_xticks(places, [r["name"] for r in rounds], rotation=35, ha="right", fontsize=8)
    return figure


def plot_failures(methods: Sequence[Mapping]) -> Figure:
    """Why each method's removals were rejected: stacked shares of all test images.

    Args:
        methods: dicts with `name`, `n` and `failures` (reason -> count).
    """
    reasons = [r for r in REASON_COLOURS if any(m["failures"].get(r) for m in methods)]
    reasons += sorted({r for m in methods for r in m["failures"]} - set(reasons))
    figure, (axis,) = make_axes(8, 0.34 * len(methods) + 1.1)
    left = np.zeros(len(methods))
    for number, reason in enumerate(reasons):
        fraction = np.array([m["failures"].get(reason, 0) / max(1, m["n"]) for m in methods])
        colour = REASON_COLOURS.get(reason, _SPARE[number % len(_SPARE)])
        axis.barh(
            range(len(methods)),
            fraction,
            left=left,
            color=colour,
            label=shorten(reason),
            edgecolor="white",
            linewidth=0.5,
        )
        left += fraction
    axis.set_yticks(range(len(methods)), [m["name"] for m in methods])
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_xlabel("rejected, by the first reason the simulated annotator gives")
    if reasons:
        axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_families(table) -> Figure:
    """Success by background family, a column a family, a colour a method.

    Args:
        table: DataFrame of success rates (0..1), index method names, columns family names;
            `attrs["methods"]` may hold the methods' dicts for their colours.
    """
    methods = table.attrs.get("methods") or [{"name": name} for name in table.index]
    colours = assign_colours(methods)
    figure, (axis,) = make_axes(max(6, 0.95 * len(table.columns)), 3.2)
    width = 0.8 / max(1, len(table.index))
    for number, name in enumerate(table.index):
        places = np.arange(len(table.columns)) + (number - (len(table.index) - 1) / 2) * width
        axis.bar(
            places,
            table.loc[name].to_numpy(float),
            width,
            color=colours.get(name, GREY),
            label=name,
        )
    axis.set_xticks(range(len(table.columns)), table.columns, rotation=25, ha="right", fontsize=8)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_ylabel("success, simulated annotator", fontsize=9)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_comparisons(comparisons: Sequence[Mapping]) -> Figure:
    """Paired differences in success with 95% intervals, in points.

    Args:
        comparisons: dicts with `first`, `second`, `difference`, `low`, `high` and `significant`.
    """
    figure, (axis,) = make_axes(7.5, 0.36 * len(comparisons) + 0.9)
    axis.axvline(0, color=GREY, linewidth=1)
    for place, item in enumerate(comparisons):
        colour = BLUE if item["significant"] else GREY
        axis.plot([item["low"], item["high"]], [place, place], color=colour, linewidth=1.8)
        axis.plot(item["difference"], place, "o", color=colour, markersize=6)
    axis.set_yticks(
        range(len(comparisons)),
        [f"{c['first']}  minus  {c['second']}" for c in comparisons],
        fontsize=8,
    )
    axis.set_ylim(len(comparisons) - 0.5, -0.5)
    axis.set_xlabel("difference in success, points (blue: p < 0.05, adjusted for the table)")
    return figure


def plot_preferences(preferences: Sequence[Mapping]) -> Figure:
    """Which of two methods people preferred: shares of the answers, a bar a pair.

    Args:
        preferences: what `user_study.summarise_preferences` returns.
    """
    figure, (axis,) = make_axes(7.5, 0.42 * len(preferences) + 1.1)
    left = np.zeros(len(preferences))
    for key, colour, label in (
        ("prefers_first", BLUE, "left one better"),
        ("same", "#d9d9d9", "equally good"),
        ("prefers_second", ORANGE, "right one better"),
    ):
        fraction = np.array([p[key] for p in preferences])
        axis.barh(range(len(preferences)), fraction, left=left, color=colour, label=label)
        left += fraction
    axis.set_yticks(range(len(preferences)), [p["first"] for p in preferences])
    axis.set_ylim(len(preferences) - 0.5, -0.5)
    other = axis.secondary_yaxis("right")
    other.set_yticks(range(len(preferences)), [p["second"] for p in preferences])
    other.tick_params(labelsize=9, length=0)
    other.spines["right"].set_visible(False)
    axis.axvline(0.5, color=BLACK, linewidth=0.8, linestyle="--")
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_xlabel("share of the answers")
    axis.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return figure


# ----------------------------------------------------------------------------------- labels
