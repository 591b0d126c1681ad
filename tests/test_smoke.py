"""The whole chain on the smoke recipe, through the command a user types: every kind of stage.

One test, in parts: two processes that share the tests would each run the chain for themselves.
"""

import json

import pytest
from forked import Job, run_rorem_forked

from rorem_lib.files import ROOT

pytestmark = pytest.mark.slow

STAGES = (
    "assemble",
    "initialization",
    "human_1_candidates",
    "human_1_labels",
    "human_1",
    "automation_1_discriminator",
    "automation_1_candidates",
    "automation_1_accepted",
    "automation_1",
    "distillation",
    "evaluation",
)


def run(runs_dir, log):
    words = ["run", "smoke", "--runs-dir", str(runs_dir)]
    job = Job(run_rorem_forked, words, log=log, cwd=ROOT)
    assert job.wait(timeout=1500) == 0, job.read_log()[-6000:]
    return job.read_log()


def test_the_whole_chain(tmp_path):
    run(tmp_path, tmp_path / "first.log")
    finished = tmp_path / "smoke"
    check_every_stage_leaves_what_the_next_one_reads(finished)
    check_rounds_add_what_was_accepted(finished)
    check_the_summary_has_the_fields_that_are_promised(finished)
    check_the_report_stands_alone_and_says_simulated(finished)
    check_a_second_run_does_nothing(finished)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def check_every_stage_leaves_what_the_next_one_reads(finished):
    for name in STAGES:
        for file in ("DONE", "stage.json", "metrics.json", "notebook.ipynb"):
            assert (finished / name / file).is_file(), f"{name}/{file}"
    for name in ("initialization", "human_1", "automation_1"):
        assert (finished / name / "remover" / "model_index.json").is_file()
    assert (finished / "distillation/lora/pytorch_lora_weights.safetensors").is_file()
    assert (finished / "automation_1_discriminator/discriminator/head.safetensors").is_file()


def check_rounds_add_what_was_accepted(finished):
    labels = read(finished / "human_1_labels/metrics.json")
    assert labels["n_labelled"] == labels["n_candidates"] == 60 and labels["simulated"] is True
    accepted = read(finished / "human_1_labels/accepted/meta.json")
    assert len(accepted) == labels["n_accepted"] > 0
    sizes = [
        read(finished / name / "metrics.json")["train_size"]
        for name in ("initialization", "human_1", "automation_1")
    ]
    added = read(finished / "automation_1_accepted/metrics.json")["n_accepted"]
    assert sizes == [120, 120 + len(accepted), 120 + len(accepted) + added]


def check_the_summary_has_the_fields_that_are_promised(finished):
    summary = read(finished / "summary.json")
    names = [entry["name"] for entry in summary["rounds"]]
    assert names == ["base", "initialization", "human 1", "automation 1"]
    for entry in summary["rounds"]:
        assert {
            "candidates",
            "accepted",
            "train_size",
            "success_rate",
            "success_rate_discriminator",
            "psnr_hole",
        } <= set(entry)
    methods = {entry["name"]: entry for entry in summary["methods"]}
    assert methods["RORem 4-step"]["unet_calls"] == 4 and methods["Telea"]["unet_calls"] == 0
    for entry in methods.values():
        assert 0 <= entry["success_rate"] <= 1 and entry["seconds_per_image"] > 0
        assert {"success_rate_discriminator", "psnr_hole", "psnr_shadow"} <= set(entry)
    assert set(summary["discriminator"]) >= {
        "auc",
        "candidates_success_rate",
        "accepted_precision",
        "accepted_share",
    }
    assert summary["test_size"] == 12 and summary["seed"] == 4
    assert set(STAGES) < set(summary["wall_seconds"]) and summary["wall_seconds"]["total"] > 0


def check_the_report_stands_alone_and_says_simulated(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "simulated annotator" in page and "data:image/png;base64," in page
    assert 'src="http' not in page and "<script src" not in page


def check_a_second_run_does_nothing(finished):
    before = {name: (finished / name / "DONE").stat().st_mtime_ns for name in STAGES}
    again = run(finished.parent, finished.parent / "second.log")
    assert before == {name: (finished / name / "DONE").stat().st_mtime_ns for name in STAGES}
    assert "0 run" in again
