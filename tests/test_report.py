"""The report: joins stages to rows, says what was not run, and holds no link to the outside."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rorem_lib.data.pictures import save_image
from rorem_lib.evaluation import report
from rorem_lib.files import read_json, write_json, write_text

STAGES = [  # name, notebook, row, parameters, metrics
    ("assemble", "01_assemble_dataset", "", {}, {"n": 900}),
    ("initialization", "02_train_remover", "initialization", {}, {"train_size": 600}),
    ("human_1_candidates", "03_generate_removals", "human 1", {}, {"n_images": 100}),
    (
        "human_1_labels",
        "04_annotate",
        "human 1",
        {},
        {"n_candidates": 120, "n_labelled": 100, "n_accepted": 40, "simulated": True},
    ),
    ("human_1", "02_train_remover", "human 1", {}, {"train_size": 640}),
    (
        "automation_1_discriminator",
        "05_train_discriminator",
        "automation 1",
        {},
        {"auc": 0.81, "auc_interval": [0.77, 0.85]},
    ),
    (
        "automation_1_accepted",
        "06_auto_annotate",
        "automation 1",
        {},
        {
            "n_candidates": 200,
            "n_removals": 400,
            "n_accepted": 80,
            "accepted_share": 0.4,
            "candidates_success_rate": 0.35,
            "accepted_precision": 0.8,
            "expected_precision": 0.9,
            "candidates_success_rate_interval": [0.3, 0.4],
            "accepted_precision_interval": [0.7, 0.9],
        },
    ),
    ("automation_1", "02_train_remover", "automation 1", {}, {"train_size": 720}),
    ("control", "02_train_remover", "control", {}, {"train_size": 600}),
    ("distillation", "07_distill_lora", "distillation", {}, {"steps": 10}),
    ("evaluation", "08_evaluate", "evaluation", {}, {}),
]


def make_method(name, rate, **more):
    return {
        "name": name,
        "kind": "remover",
        "row": "",
        "control": False,
        "lora": "",
        "scheduler": "default",
        "n": 100,
        "success_rate": rate,
        "success_interval": [rate - 0.1, rate + 0.1],
        "success_rate_discriminator": rate + 0.02,
        "psnr_hole": 20 + rate,
        "psnr_shadow": 19.0,
        "psnr_background": 36 - 2 * rate,
        "identical": {"psnr_hole": 0, "psnr_shadow": 0, "psnr_background": 3},
        "n_groups": 10,
        "ssim_hole": 0.7,
        "seconds_per_image": 0.1,
        "unet_calls": 20.0,
        "failures": {"blur": 4},
        **more,
    }


METHODS = [
    make_method("Telea", 0.2, kind="telea", unet_calls=0.0),
    make_method("base", 0.1, row="base"),
    make_method("initialization", 0.3, row="initialization"),
    make_method("human 1", 0.4, row="human 1"),
    make_method("automation 1 <final>", 0.5, row="automation 1"),
    make_method("control", 0.35, row="control", control=True),
    make_method("4-step", 0.45, row="distillation", lora="x", scheduler="lcm", unet_calls=4.0),
]
COMPARISONS = [
    {
        "first": "automation 1 <final>",
        "second": "control",
        "measure": "accept",
        "difference": 15.0,
        "low": 5.0,
        "high": 25.0,
        "p_value": 0.004,
        "only_first": 20,
        "only_second": 5,
        "n": 100,
        "n_groups": 10,
        "p_adjusted": 0.012,
        "significant": True,
    },
    {
        "first": "automation 1 <final>",
        "second": "initialization",
        "measure": "psnr_background",
        "difference": -0.4,
        "low": -0.5,
        "high": -0.3,
        "p_value": 1e-9,
        "only_first": None,
        "only_second": None,
        "n": 97,
        "n_groups": 10,
        "p_adjusted": 3e-9,
        "significant": True,
    },
    {
        "first": "automation 1 <final>",
        "second": "source",
        "measure": "psnr_shadow",
        "difference": 3.1,
        "low": 2.5,
        "high": 3.6,
        "p_value": 1e-7,
        "only_first": None,
        "only_second": None,
        "n": 40,
        "n_groups": 10,
        "p_adjusted": 2e-7,
        "significant": True,
    },
]


def make_recipe(stages=STAGES):
    rows = [
        SimpleNamespace(
            name=name, notebook=Path(f"/notebooks/{notebook}.ipynb"), row=row, parameters=parameters
        )
        for name, notebook, row, parameters, _ in stages
    ]
    return SimpleNamespace(name="small", description="A <small> run.", seed=4, stages=tuple(rows))


def write_run(folder, stages=STAGES, *, skip=()):
    for number, (name, notebook, _, _, metrics) in enumerate(stages):
        if name in skip:
            continue
        place = folder / name
        if notebook == "08_evaluate":
            metrics = {
                "methods": METHODS,
                "source": {"psnr_shadow": 17.0},
                "test_size": 100,
                "seed": 4,
                "comparisons": COMPARISONS,
                "judged_by": "simulated annotator",
            }
            (place / "figures").mkdir(parents=True)
            for title in ("cases_best", "cases_worst", "failures", "families"):
                save_image(place / "figures" / f"{title}.png", np.zeros((8, 8, 3), np.uint8))
        write_json(place / "metrics.json", metrics)
        write_json(
            place / "stage.json",
            {
                "seconds": 10.0 + number,
                "versions": {"torch": "2.13"},
                "commit": "abc",
                "dirty": True,
            },
        )
        write_text(place / "notebook.ipynb", "{}")
        if notebook in report.TRAINING:
            write_text(
                place / "metrics.jsonl",
                "".join(json.dumps({"step": n, "loss": 1 / n}) + "\n" for n in range(1, 9))
                + '{"step": 9',
            )
        if notebook == "05_train_discriminator":
            write_json(
                place / "calibration.json",
                {
                    "curve": {
                        "predicted": [0.2, 0.8],
                        "observed": [0.3, 0.7],
                        "low": [0.2, 0.6],
                        "high": [0.4, 0.8],
                        "count": [9, 9],
                    },
                    "roc": None,
                },
            )
        write_text(place / "DONE", "x\n")


class Links(HTMLParser):
    """Every address that a page would load or lead to, and whether its tags are closed."""

    def __init__(self, page):
        super().__init__()
        self.found, self.open = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return report.write_report(folder, make_recipe()), read_json(folder / "summary.json")


def test_summary_has_the_figures_of_every_round(finished):
    rounds = {r["name"]: r for r in finished[1]["rounds"]}
    assert list(rounds) == ["base", "initialization", "human 1", "automation 1"]
    keys = ("candidates", "accepted", "train_size", "success_rate")
    assert [rounds["base"][k] for k in keys] == [None, None, None, 0.1]
    assert [rounds["initialization"][k] for k in keys] == [600, 600, 600, 0.3]
    assert [rounds["human 1"][k] for k in keys] == [100, 40, 640, 0.4]
    assert [rounds["automation 1"][k] for k in keys] == [200, 80, 720, 0.5]
    assert rounds["human 1"]["success_rate_discriminator"] == pytest.approx(0.42)
    assert rounds["human 1"]["psnr_hole"] == pytest.approx(20.4)


def test_summary_has_methods_discriminator_and_times(finished):
    summary = finished[1]
    assert [m["name"] for m in summary["methods"]] == [m["name"] for m in METHODS]
    assert {
        "name",
        "success_rate",
        "success_rate_discriminator",
        "psnr_hole",
        "psnr_shadow",
        "seconds_per_image",
        "unet_calls",
    } <= set(summary["methods"][0])
    judge = {k: summary["discriminator"][k] for k in report.DISCRIMINATOR_KEYS}
    assert judge == {
        "auc": 0.81,
        "candidates_success_rate": 0.35,
        "accepted_precision": 0.8,
        "accepted_share": 0.4,
    }
    seconds = summary["wall_seconds"]
    assert seconds["assemble"] == 10 and seconds["total"] == sum(
        v for k, v in seconds.items() if k != "total"
    )
    assert (summary["test_size"], summary["seed"], summary["not_run"]) == (100, 4, [])


def test_page_is_whole_and_self_contained(finished):
    page = finished[0].read_text()
    links = Links(page)
    assert links.open == []
    outside = [x for x in links.found if not x.startswith(("data:image/png;base64,", "#"))]
    assert set(outside) == {"summary.json"} | {f"{s[0]}/notebook.ipynb" for s in STAGES}
    assert all((finished[0].parent / link).is_file() for link in outside)
    assert page.count("data:image/png") == 3 + 4 + 1 + 1  # drawn, of 08, calibration, losses
    assert "prefers-color-scheme: dark" in page and "not run" not in page


def test_page_says_what_a_reader_must_know(finished):
    page = finished[0].read_text()
    text = re.sub(r"\s+", " ", re.sub("<[^>]*>", "", page))
    assert "simulated annotator" in text and "success, simulated annotator (%)" in text
    assert "+15.0 points (+5.0 to +25.0), p = 0.012 adjusted" in text and "significant" in text
    assert "nearer the truth than the untouched source: +3.10 dB" in text
    assert "35.20 (3 identical)" in text and "p (Holm)" in text
    assert "labels and success rates come from a simulated annotator" in text
    assert "40 (40%)" in text and "with uncommitted changes" in text
    assert "automation 1 &lt;final&gt;" in page and "<final>" not in page  # names are escaped
    assert "A &lt;small&gt; run." in page


def test_no_name_becomes_markup(tmp_path, monkeypatch):
    bad = '"><img src=x onerror=alert(1)> # $\\foo{$ {{ 7 * 7 }}'
    monkeypatch.setitem(METHODS[4], "name", bad)
    monkeypatch.setitem(COMPARISONS[0], "first", bad)
    stages = [(*s[:2], bad if s[2] == "human 1" else s[2], *s[3:]) for s in STAGES]
    monkeypatch.setitem(METHODS[3], "row", bad)
    write_run(tmp_path, stages)
    recipe = make_recipe(stages)
    recipe.name = recipe.description = bad
    page = report.write_report(tmp_path, recipe).read_text()
    links = Links(page)
    assert links.open == [] and "x" not in links.found
    assert page.count("onerror=alert(1)&gt;") >= 6 and "<img src=x" not in page
    assert "{{ 7 * 7 }}" in page  # no template either


def test_the_page_says_if_the_background_falls_with_the_rounds(finished):
    summary = finished[1]
    said = [x for x in report.describe_findings(summary) if "background" in x]
    assert len(said) == 1 and "initialization 35.4, human 1 35.2, automation 1 35.0 dB" in said[0]
    assert "-0.40 dB, -0.50 to -0.30" in said[0]
    for change in ({"significant": False}, {"difference": 0.4}):
        changed = [
            c | change if c["measure"] == "psnr_background" else c for c in summary["comparisons"]
        ]
        other = report.describe_findings(summary | {"comparisons": changed})
        assert not [x for x in other if "background" in x]
    assert {r["name"]: r["psnr_background"] for r in summary["rounds"]}["base"] == 35.8


@pytest.mark.slow
def test_what_people_say_has_a_section_where_they_were_asked(finished, tmp_path):
    assert "What people say" not in finished[0].read_text()
    write_run(tmp_path)
    evaluation = tmp_path / "evaluation"
    rows = [
        {
            "name": "automation 1 <final>",
            "n": 20,
            "success_rate": 0.55,
            "success_interval": [0.34, 0.74],
            "simulated_rate": 0.5,
            "same_verdict": 0.85,
        }
    ]
    study = {
        "answers": 40,
        "annotators": 2,
        "trials": 20,
        "alpha": 0.61,
        "methods": rows,
        "preferences": [],
    }
    metrics = read_json(evaluation / "metrics.json")
    write_json(evaluation / "metrics.json", metrics | {"user_study": study})
    save_image(evaluation / "figures/user_study.png", np.zeros((8, 8, 3), np.uint8))
    page = report.write_report(tmp_path, make_recipe()).read_text()
    assert "What people say" in page and Links(page).open == []
    assert "55.0 (34.0 to 74.0)" in page and "85.0" in page and "No person judged" not in page
    assert page.count("data:image/png") == 3 + 4 + 1 + 1 + 1 and "0.61" in page
    write_json(evaluation / "metrics.json", metrics | {"user_study": study | {"answers": 0}})
    assert "What people say" not in report.write_report(tmp_path, make_recipe()).read_text()


def test_stages_that_were_not_run_are_named(tmp_path):
    write_run(tmp_path, skip=("automation_1_accepted", "automation_1", "evaluation"))
    page = report.write_report(tmp_path, make_recipe()).read_text()
    summary = read_json(tmp_path / "summary.json")
    assert summary["not_run"] == ["automation_1_accepted", "automation_1", "evaluation"]
    rounds = {r["name"]: r for r in summary["rounds"]}
    assert "control" not in rounds and rounds["human 1"]["accepted"] == 40
    assert rounds["automation 1"]["train_size"] is None
    assert summary["methods"] == [] and summary["test_size"] is None
    assert summary["discriminator"]["auc"] == 0.81
    assert summary["discriminator"]["accepted_precision"] is None
    assert "Evaluation: not run." in page and Links(page).open == []


def test_an_empty_run_and_a_small_recipe_have_a_report(tmp_path):
    page = report.write_report(tmp_path, make_recipe()).read_text()
    summary = read_json(tmp_path / "summary.json")
    assert "0 of 11" in page and summary["wall_seconds"] == {"total": 0}
    small = tmp_path / "small"
    write_run(small, [STAGES[0], STAGES[1], STAGES[-1]])
    report.write_report(small, make_recipe([STAGES[0], STAGES[1], STAGES[-1]]))
    summary = read_json(small / "summary.json")
    assert {r["name"] for r in summary["rounds"]} >= {"base", "initialization"}


def test_the_fuller_evaluation_counts(tmp_path):
    early = ("base_check", "08_evaluate", "base", {"methods": METHODS[:2]}, {})
    stages = [early, *STAGES]
    write_run(tmp_path, stages)
    write_json(tmp_path / "base_check/metrics.json", {"methods": METHODS[:2], "test_size": 20})
    summary = report.collect_summary(tmp_path, make_recipe(stages))
    assert summary["test_size"] == 100 and len(summary["methods"]) == len(METHODS)
    (tmp_path / "evaluation" / "DONE").unlink()
    summary = report.collect_summary(tmp_path, make_recipe(stages))
    assert summary["test_size"] == 20 and [m["name"] for m in summary["methods"]] == [
        "Telea",
        "base",
    ]


def test_a_torn_record_does_not_stop_the_report(tmp_path):
    write_run(tmp_path)
    (tmp_path / "human_1" / "metrics.json").write_text('{"train')
    (tmp_path / "human_1" / "stage.json").write_text("")
    report.write_report(tmp_path, make_recipe())
    rounds = {r["name"]: r for r in read_json(tmp_path / "summary.json")["rounds"]}
    assert rounds["human 1"]["train_size"] is None
