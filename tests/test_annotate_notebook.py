"""The annotation notebook in batch: it waits for nobody, and goes on when labels are there."""

import json

import numpy as np
import pytest
from cells import CellFailed, run_cells

from rorem_lib.data.triplets import read_triplets
from rorem_lib.data.writer import TripletWriter
from rorem_lib.files import ROOT
from rorem_lib.labels.log import LabelLog, LabelsMissing


@pytest.fixture
def candidates(tmp_path):
    random = np.random.default_rng(0)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 5:11] = 255
    with TripletWriter(tmp_path / "candidates") as writer:
        for place in range(6):
            source, removal = random.integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)
            writer.add(id=f"c{place}", source=source, mask=mask, gt=removal)
    return tmp_path / "candidates"


def test_the_accept_share_is_estimated_without_what_was_drawn_by_uncertainty(candidates, tmp_path):
    stage = tmp_path / "stage"
    log = LabelLog(stage / "labels", "anna")
    for place, (label, order) in enumerate(
        [("accept", "audit"), ("reject", "audit")] + [("reject", "uncertainty")] * 3
    ):
        log.append(f"c{place}", label, order=order)
    with TripletWriter(tmp_path / "scores") as writer:
        for triplet in read_triplets(candidates):
            writer.add_triplet(triplet, score=0.5)
    run_cells(
        ROOT / "notebooks" / "04_annotate.ipynb",
        tmp_path / "done.ipynb",
        {
            "output_dir": str(stage),
            "candidates": str(candidates),
            "annotator": "anna",
            "order": "uncertainty",
            "scores": str(tmp_path / "scores"),
            "labels_wanted": 5,
        },
    )
    metrics = json.loads((stage / "metrics.json").read_text())
    assert (metrics["accept_share"], metrics["n_labelled"]) == (0.5, 5)
    drawn = [x.extra["label_order"] for x in read_triplets(stage / "scored")]
    assert drawn == ["audit"] * 2 + ["uncertainty"] * 3
    assert [x.extra["fair_sample"] for x in read_triplets(stage / "scored")] == [True] * 2 + [
        False
    ] * 3


def test_batch_run_stops_for_labels_and_goes_on_when_they_are_there(candidates, tmp_path):
    stage = tmp_path / "stage"
    parameters = {"output_dir": str(stage), "candidates": str(candidates)}
    parameters |= {"annotator": "anna", "labels_wanted": 5, "overlap_share": 0.0}
    parameters |= {"keys": {"accept": "j"}}

    def run(**changes):
        notebook = ROOT / "notebooks" / "04_annotate.ipynb"
        given = parameters | changes
        run_cells(notebook, tmp_path / "done.ipynb", given)
        return json.loads((stage / "metrics.json").read_text())

    log = LabelLog(stage / "labels", "anna")
    triplets = read_triplets(candidates)
    log.append("c0", "accept", content_file=triplets[0].gt, ms=60_000)
    with pytest.raises(CellFailed) as failure:
        run()
    assert isinstance(failure.value.__cause__, LabelsMissing)
    assert "4 of 5 labels are missing: open notebooks/04_annotate.ipynb" in str(failure.value)
    assert str(candidates) in str(failure.value) and not (stage / "metrics.json").exists()
    for words in (
        "mode = 'interactive'",
        "overlap_share = 0.0",
        "keys = {'accept': 'j'}",
        "audit_share = 0.15",
        "policy = 'majority'",
    ):
        assert words in str(failure.value)

    for place, label in enumerate(["reject", "accept", "skip", "reject"], 1):
        log.append(f"c{place}", label, content_file=triplets[place].gt)
    imported = tmp_path / "ben.csv"
    imported.write_text("id,label,annotator\nc5,1,ben\nc0,0,ben\nc1,no,ben\n")
    metrics = run(mode="import", import_path=str(imported), policy="single", labels_wanted=0)
    assert metrics["n_labelled"] == 5 and metrics["n_annotators"] == 2
    assert metrics["n_accepted"] == 2 and metrics["conflicts"] == 1
    assert metrics["simulated"] is False and metrics["minutes"] == 1
    scored = {x.id: x.extra["score"] for x in read_triplets(stage / "scored")}
    assert scored == {"c0": 0, "c1": 0, "c2": 1, "c4": 0, "c5": 1}
    accepted = read_triplets(stage / "accepted")
    assert [(x.id, x.extra["accepted_by"]) for x in accepted] == [
        ("c2", "anna,ben"),
        ("c5", "anna,ben"),
    ]
