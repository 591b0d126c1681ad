"""Figures: each draws what it is given, bears missing values, and keeps a method's colour."""

import io

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from rorem_lib import plots
from rorem_lib.data.figures import plot_candidates, plot_mask_areas, plot_rejections
from rorem_lib.evaluation import figures
from rorem_lib.labels.log import Label

METHODS = [
    {"name": "Telea", "kind": "telea"},
    {"name": "NS", "kind": "ns"},
    {"name": "base", "kind": "remover", "row": "base"},
    {"name": "initialization", "kind": "remover", "row": "initialization"},
    {"name": "RORem", "kind": "remover", "row": "high resolution"},
    {"name": "control", "kind": "remover", "row": "control", "control": True},
    {"name": "4 steps", "kind": "remover", "scheduler": "lcm", "lora": "x", "row": "distillation"},
    {
        "name": "LCM alone",
        "kind": "remover",
        "scheduler": "lcm",
        "row": "distillation",
        "control": True,
    },
    *(
        {
            "name": f"own scheduler {steps}",
            "kind": "remover",
            "num_inference_steps": steps,
            "row": "distillation",
            "control": True,
        }
        for steps in (4, 2, 1)
    ),
]


def render(figure):
    """The figure's pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def shows(figure, colour):
    """Whether a pixel has this very colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(render(figure).astype(int) - wanted).sum(axis=2) < 6).any())


def test_every_method_has_a_colour_of_its_own():
    colours = figures.assign_colours(METHODS)
    assert list(colours) == [m["name"] for m in METHODS]
    assert len(set(colours.values())) == len(METHODS)
    assert colours["base"] == plots.BLACK and colours["control"] == plots.VERMILION
    many = [{"name": str(n), "kind": "remover"} for n in range(20)]
    assert len(figures.assign_colours(many)) == 20


def test_controls_of_the_distillation_are_few_step_variants():
    assert [figures.is_fast(m) for m in METHODS] == [False] * 6 + [True] * 5
    assert not figures.is_fast({"name": "base", "num_inference_steps": 2, "row": "base"})


def test_rounds_get_darker():
    rounds = [{"name": f"r{n}", "row": f"r{n}", "kind": "remover"} for n in range(5)]
    light = [int(c[3:5], 16) for c in figures.assign_colours(rounds).values()]
    assert light == sorted(light, reverse=True) and len(set(light)) == 5


def test_grid_shows_pictures_frames_and_gaps():
    red = np.zeros((64, 64, 3), np.uint8)
    red[..., 0] = 255
    mask = np.full((32, 64), 200, np.uint8)  # not square, one channel
    figure = plots.plot_grid(
        [[red, mask, None], [None, red, red]],
        column_titles=["source", "mask", "x"],
        row_titles=["a", "b"],
        captions=[["", "blur", ""], ["", "", "ok"]],
        frames=[[plots.BLUE, None, None], [None, None, None]],
    )
    assert shows(figure, "#ff0000") and shows(figure, plots.BLUE) and shows(figure, "#c8c8c8")
    with pytest.raises(ValueError, match="no images"):
        plots.plot_grid([])


def test_grid_shrinks_large_pictures():
    figure = plots.plot_grid([[np.full((1024, 512, 3), 90, np.uint8)]], cell=64)
    assert max(render(figure).shape) < 200 and shows(figure, "#5a5a5a")


def test_losses_leave_out_what_has_none():
    lines = [{"step": n, "loss": 1 / (n + 1)} for n in range(20)]
    figure = plots.plot_losses({"a": lines, "b": [{"step": 1}], "c": lines, "d": lines, "e": lines})
    titles = [axis.get_title() for axis in figure.axes if axis.axison]
    assert titles == ["a", "c", "d", "e"]
    with pytest.raises(ValueError, match="no losses"):
        plots.plot_losses({"b": []})


def test_success_and_failures_bear_missing_values():
    measured = [
        {
            **m,
            "n": 10,
            "success_rate": 0.5,
            "success_interval": [0.2, 0.8],
            "success_rate_discriminator": 0.4,
            "failures": {"blur": 3, "odd reason": 2},
        }
        for m in METHODS
    ]
    measured[0] |= {
        "success_rate": None,
        "success_interval": None,
        "failures": {},
        "success_rate_discriminator": None,
    }
    colours = figures.assign_colours(METHODS)
    success = figures.plot_success(measured)
    assert shows(success, colours["control"]) and not shows(success, colours["Telea"])
    for rate, judges in ((None, 1), (0.3, 2)):  # who says nothing is not in the legend
        some = [{**method, "success_rate_discriminator": rate} for method in measured]
        legend = figures.plot_success(some).axes[0].get_legend().get_texts()
        assert len(legend) == judges
    failures = figures.plot_failures(measured)
    legend = [text.get_text() for text in failures.axes[0].get_legend().get_texts()]
    assert legend == ["blur", "odd reason"] and shows(failures, plots.SKY)
    figures.plot_failures(measured[:1])


def test_rounds_bear_missing_values():
    rounds = [
        {
            "name": "base",
            "success_rate": 0.1,
            "success_interval": [0.05, 0.2],
            "success_rate_discriminator": None,
            "psnr_hole": 20.0,
        },
        {"name": "human 1", "success_rate": None, "psnr_hole": None},
    ]
    assert shows(figures.plot_rounds(rounds), plots.BLUE)
    render(figures.plot_rounds([{"name": "base"}]))


def test_scores_and_calibration():
    probabilities = np.linspace(0, 1, 200)
    for labels in (None, probabilities > 0.4):
        figure = plots.plot_scores(probabilities, 0.7, labels=labels, accepted=60)
        legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert "threshold 0.70: 60 of 200 accepted" in legend
    curve = {
        "predicted": [0.1, 0.8],
        "observed": [0.2, 0.7],
        "low": [0.1, 0.6],
        "high": [0.3, 0.8],
        "count": [50, 50],
    }
    roc = {"false_accepts": [0, 0.2, 1], "true_accepts": [0, 0.7, 1], "thresholds": [1, 0.5, 0]}
    assert len(plots.plot_calibration(curve, roc, auc=0.75, auc_interval=[0.7, 0.8]).axes) == 2
    assert len(plots.plot_calibration(curve).axes) == 1


def test_families_and_comparisons():
    table = pd.DataFrame(
        {"known (5)": [0.2, 0.8], "new (5)": [0.1, np.nan]}, index=["Telea", "RORem"]
    )
    table.attrs["methods"] = METHODS
    colours = figures.assign_colours(METHODS)
    assert shows(figures.plot_families(table), colours["RORem"])
    comparisons = [
        {
            "first": "a",
            "second": "b",
            "difference": 3.0,
            "low": 1.0,
            "high": 5.0,
            "significant": True,
        },
        {
            "first": "a",
            "second": "c",
            "difference": 0.0,
            "low": -2.0,
            "high": 2.0,
            "significant": False,
        },
    ]
    figure = figures.plot_comparisons(comparisons)
    assert shows(figure, plots.BLUE) and shows(figure, plots.GREY)


HOSTILE = r"a $\foo{ b $x_1$ _c_ <b>&amp; \alpha % #"


def test_names_and_reasons_are_never_formulas():
    """Each figure with a text that mathtext would choke on, or set as a formula."""
    name = HOSTILE
    method = METHODS[4] | {"name": name, "n": 10, "failures": {name: 3, f"_{name}": 1}}
    method |= {"success_rate": 0.5, "success_interval": [0.2, 0.8], "psnr_hole": 20.0}
    pair = {"first": name, "second": name, "difference": 1, "low": 0, "high": 2, "significant": 1}
    shares = {"prefers_first": 0.3, "same": 0.3, "prefers_second": 0.4}
    labels = [Label(f"c{n}", "reject", name, reason=reason) for n, reason in enumerate([name, "_"])]
    picture = np.zeros((8, 8, 3), np.uint8)
    drawn = [
        plots.plot_grid([[picture]], column_titles=[name], row_titles=[name], captions=[[name]]),
        plots.plot_losses({name: [{"step": 1, "loss": 1.0}]}),
        plots.plot_scores([0.5], 0.5, title=name),
        plots.plot_label_summary(labels),
        plot_rejections({name: 3}, kept=1),
        plot_mask_areas({name: [0.5, 0.6]}),
        plot_candidates([]),
        figures.plot_success([method]),
        figures.plot_rounds([method]),
        figures.plot_failures([method]),
        figures.plot_families(pd.DataFrame({name: [0.5]}, index=[name])),
        figures.plot_comparisons([pair]),
        figures.plot_preferences([pair | shares]),
    ]
    for figure in drawn:
        render(figure)
        figure.savefig(io.BytesIO(), bbox_inches="tight")
        texts = [text for text in figure.findobj(Text) if "foo" in text.get_text()]
        assert texts or figure is drawn[6]
        assert all("$" in text.get_text() and not text.get_parse_math() for text in texts)
    legend = drawn[3].axes[1].get_legend().get_texts()
    assert [text.get_text() for text in legend] == [plots.shorten(name), " _"]


def test_a_legend_names_the_most_frequent_reasons():
    """What people write themselves may be long, and as many texts as labels."""
    reasons = ["blur"] * 3 + [f"{n}\n" + "long " * 999 for n in range(40)]
    labels = [Label(f"c{n}", "reject", "anna", reason=x) for n, x in enumerate(reasons)]
    figure = plots.plot_label_summary(labels)
    legend = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert len(legend) == plots.MOST_REASONS + 1
    assert (legend[0], legend[-1]) == ("blur", plots.OTHERS)
    assert max(map(len, legend)) <= 60 and not any("\n" in text for text in legend)
    widths = [bar.get_width() for bars in figure.axes[1].containers for bar in bars]
    assert sum(widths) == pytest.approx(1)
    assert render(figure).shape[1] < 2000
