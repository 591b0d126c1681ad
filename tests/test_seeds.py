"""The report over several trainings: mean, spread, and how many seeds agree."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp
from test_report import Links

from rorem_lib.evaluation import seeds, tables
from rorem_lib.files import read_json, write_json


def make_summary(rate, difference, **more):
    pair = {"first": "RORem", "second": "control", "only_first": 3.0, "significant": True}
    decibels = {"first": "RORem", "second": "source", "only_first": None, "measure": "psnr_shadow"}
    return {
        "rounds": [
            {"name": "base", "success_rate": 0.05, "psnr_background": None},
            {"name": "RORem <final>", "success_rate": rate, "psnr_background": 34 + rate},
        ],
        "methods": [{"name": "Telea", "success_rate": 0.09, "psnr_hole": 24.0}],
        "comparisons": [
            {**pair, "measure": "accept", "difference": difference},
            {**decibels, "difference": 8 + difference / 100},
        ],
        **more,
    }


SUMMARIES = {4: make_summary(0.60, 12.0), 5: make_summary(0.66, -2.0), 6: make_summary(0.63, 8.0)}


def test_rows_have_their_mean_and_spread():
    found = seeds.collect_seeds(SUMMARIES)
    assert found["seeds"] == [4, 5, 6]
    base, final = found["rounds"]
    assert final["success_rate"] == {
        "mean": pytest.approx(0.63),
        "sd": pytest.approx(0.03),
        "min": 0.60,
        "max": 0.66,
        "n": 3,
    }
    assert base["psnr_background"] is None and base["success_rate"]["sd"] < 1e-9
    table = seeds.make_spread_table(found["rounds"], "round")
    assert table.loc["RORem <final>", tables.SUCCESS] == "63.0 ± 3.0 (60.0 to 66.0)"
    assert table.loc["base", "PSNR background (dB)"] == "–"
    assert "LPIPS hole" not in table.columns


def test_differences_have_an_interval_over_trainings_and_say_how_many_agree():
    accept, shadow = seeds.collect_seeds(SUMMARIES)["comparisons"]
    interval = ttest_1samp([12.0, -2.0, 8.0], 0).confidence_interval()
    assert (accept["low"], accept["high"]) == pytest.approx((interval.low, interval.high))
    assert (accept["mean"], accept["agree"], accept["n"]) == (6, 2, 3)
    table = seeds.make_difference_table([accept, shadow])
    assert table["difference"].tolist() == ["+6.0 points, not separable", "+8.06 dB"]
    assert table["same sign"].tolist() == ["2 of 3", "3 of 3"]
    assert table["least to largest"][0] == "-2.0 to +12.0"


def test_what_a_training_lacks_is_left_out():
    without = make_summary(0.7, 5.0, methods=[], comparisons=[])
    found = seeds.collect_seeds({4: SUMMARIES[4], 5: without})
    assert found["methods"][0]["success_rate"]["n"] == 1
    assert found["comparisons"][0]["low"] is None  # one training says nothing of others
    cells = seeds.make_difference_table(found["comparisons"]).iloc[0]
    assert cells["95% interval over trainings"] == "–" and "not separable" in cells["difference"]
    assert seeds.make_spread_table(found["methods"], "method").iloc[0, 0] == "9.0"
    assert seeds.collect_seeds({4: make_summary(0.5, 1.0, rounds=[])})["rounds"] == []


def test_the_page_stands_beside_the_runs(tmp_path):
    runs = {}
    for seed, summary in SUMMARIES.items():
        runs[seed] = tmp_path / f"demo-seed{seed}"
        runs[seed].mkdir()
        write_json(runs[seed] / "summary.json", summary)
    page = seeds.write_seeds_report(tmp_path / "demo-seeds", "demo", runs).read_text()
    links = Links(page)
    wanted = {f"../demo-seed{seed}/report.html" for seed in runs} | {"seeds.json"}
    assert links.open == [] and set(links.found) == wanted
    assert "63.0 ± 3.0 (60.0 to 66.0)" in page and "2 of 3" in page and "<final>" not in page
    kept = read_json(tmp_path / "demo-seeds" / "seeds.json")
    assert kept["recipe"] == "demo" and np.isclose(kept["rounds"][1]["success_rate"]["mean"], 0.63)
    assert "Paired differences: not run" not in page
