"""Evaluation: every method on the same images, judged by hidden truth; audits feed nothing."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from rorem_lib.acceptance import Calibration
from rorem_lib.builtin.sets import hidden_of, read_truth, write_scene_sets
from rorem_lib.data.pictures import load_image, save_image
from rorem_lib.data.triplets import load_images, read_triplets
from rorem_lib.data.writer import TripletWriter
from rorem_lib.evaluation import evaluate as evaluation
from rorem_lib.evaluation.evaluate import audit_acceptance, collect_cases, evaluate
from rorem_lib.evaluation.methods import BASELINES, Method, MethodRun, make_methods
from rorem_lib.files import read_json
from rorem_lib.intervals import wilson_interval
from rorem_lib.plots import plot_grid

COUNT = 12


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A pool and a test set of built-in scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scene_sets(folder, labelled=0, pool=COUNT, high_resolution=0, test=COUNT)
    return folder


@pytest.fixture
def meta_path(sets):
    return sets / "test" / "meta.json"


def make_oracle(sets, folder):
    """Removals that are the truth, as a finished run of a method."""
    paths = {}
    for path in sorted((sets / "hidden/test/truth").glob("*.png")):
        paths[path.stem] = folder / path.name
        save_image(folder / path.name, load_image(path))
    return MethodRun(paths, 0.5, 20.0)


def test_truth_succeeds_and_the_untouched_source_fails(sets, meta_path, tmp_path, monkeypatch):
    (tmp_path / "oracle").mkdir()
    oracle, real = make_oracle(sets, tmp_path / "oracle"), evaluation.run_method
    untouched = MethodRun(
        {t.id: t.source for t in read_triplets(meta_path, require_gt=False)}, None, None
    )
    fakes = {"oracle": oracle, "untouched": untouched}
    monkeypatch.setattr(
        evaluation,
        "run_method",
        lambda m, *a, **k: fakes[m.name] if m.name in fakes else real(m, *a, **k),
    )
    found = evaluate(
        [Method("oracle"), Method("Telea", kind="telea"), Method("untouched")],
        meta_path,
        hidden_of(meta_path),
        tmp_path,
    )
    best, telea, worst = found.methods
    assert best["success_rate"] == 1 and worst["success_rate"] == 0
    assert 0 <= telea["success_rate"] < 1
    assert best["psnr_hole"] is None and best["failures"] == {}
    assert best["identical"]["psnr_hole"] == best["identical"]["psnr_background"] == COUNT
    assert telea["identical"] == {**found.source["identical"], "psnr_hole": 0}
    assert sum(telea["failures"].values()) + telea["success_rate"] * COUNT == pytest.approx(COUNT)
    assert (best["seconds_per_image"], best["unet_calls"], telea["unet_calls"]) == (0.5, 20, 0)
    assert found.source["psnr_shadow"] == worst["psnr_shadow"] == telea["psnr_shadow"]
    assert found.source["psnr_hole"] < telea["psnr_hole"]
    assert best["n"] == COUNT and 0 < best["n_shadow"] < COUNT


def test_results_stand_in_the_files(meta_path, tmp_path):
    found = evaluate(
        [Method("Telea", kind="telea"), Method("NS", kind="ns")],
        meta_path,
        hidden_of(meta_path),
        tmp_path,
        limit=5,
    )
    results = pd.read_csv(tmp_path / "results.csv")
    assert results.groupby("method").size().to_dict() == {"source": 5, "Telea": 5, "NS": 5}
    assert results.accept[results.method == "source"].isna().all()  # nobody judges the source
    assert {
        "method",
        "id",
        "family",
        "effect",
        "accept",
        "reason",
        "psnr_hole",
        "psnr_shadow",
        "psnr_background",
        "judge_residue",
    } <= set(results)
    assert results.family.notna().all()
    written = read_json(tmp_path / "methods.json")
    assert [m["name"] for m in written] == ["Telea", "NS"] and written == found.methods
    assert written[0]["success_interval"][0] <= written[0]["success_rate"]
    assert written[0]["n_groups"] == 5 and {"group", "judge_rest"} <= set(results)


def test_images_of_one_scene_count_as_a_group():
    rng = np.random.default_rng(0)
    scenes = rng.random(50) < 0.6
    rows = pd.DataFrame(
        {
            "group": [f"scene {n // 10}" for n in range(500)],
            "accept": np.repeat(scenes, 10).astype(object),
            "accept_discriminator": np.repeat(scenes, 10).astype(float),
            "reason": None,
            **{name: np.nan for name in evaluation.MEASURES},
        }
    )
    grouped = evaluation.summarise_method(rows)
    alone = evaluation.summarise_method(rows.assign(group=[str(n) for n in range(500)]))
    assert (grouped["n"], grouped["n_groups"], alone["n_groups"]) == (500, 50, 500)
    assert alone["success_interval"] == pytest.approx(wilson_interval(10 * scenes.sum(), 500))
    for key in ("success_interval", "discriminator_interval"):
        widths = [np.diff(summary[key])[0] for summary in (alone, grouped)]
        assert widths[1] > 2.5 * widths[0]


def test_measures_match_the_pictures(meta_path, tmp_path):
    found = evaluate(
        [Method("Telea", kind="telea")], meta_path, hidden_of(meta_path), tmp_path, limit=3
    )
    for triplet in read_triplets(meta_path, require_gt=False)[:3]:
        row = found.results[(found.results.method == "Telea") & (found.results.id == triplet.id)]
        removal = load_image(found.paths["Telea"][triplet.id])
        truth, mask = read_truth(hidden_of(meta_path), triplet.id), load_image(triplet.mask, "L")
        hole = mask >= 128
        error = (removal.astype(float) - truth.truth)[hole]
        assert row.psnr_hole.item() == pytest.approx(10 * np.log10(255**2 / (error**2).mean()))


def test_without_hidden_truth_nothing_is_judged(sets, meta_path, tmp_path):
    found = evaluate([Method("Telea", kind="telea")], meta_path, None, tmp_path, limit=3)
    assert found.methods[0]["success_rate"] is None and found.methods[0]["psnr_hole"] is None
    with TripletWriter(tmp_path / "paired") as writer:  # a set with GT has its own truth
        for triplet in read_triplets(meta_path, require_gt=False)[:3]:
            pictures = load_images(triplet)
            writer.add(
                id=triplet.id,
                source=pictures["source"],
                mask=pictures["mask"],
                gt=read_truth(hidden_of(meta_path), triplet.id).truth,
            )
    found = evaluate([Method("Telea", kind="telea")], tmp_path / "paired", None, tmp_path / "e")
    assert found.methods[0]["success_rate"] is None and found.methods[0]["psnr_hole"] > 5


def test_discriminator_scores_are_calibrated_and_thresholded(meta_path, tmp_path, monkeypatch):
    scores = np.linspace(0.1, 0.9, COUNT)
    seen = []
    monkeypatch.setattr(
        "rorem_lib.discriminator.score_triplets",
        lambda model, triplets: seen.append(triplets) or scores,
    )
    found = evaluate(
        [Method("Telea", kind="telea"), Method("NS", kind="ns")],
        meta_path,
        hidden_of(meta_path),
        tmp_path,
        discriminator=object(),
        calibration=Calibration("platt", 2.0, 0.0),
        success_threshold=0.8,
        accept_rates=(0.9, 0.1),
    )
    expected = scores**2 / (scores**2 + (1 - scores) ** 2)  # twice the logit
    rows = found.results[found.results.method == "NS"]
    assert rows.probability.to_numpy() == pytest.approx(expected)
    share = (expected >= 0.8).mean()
    assert found.methods[1]["share_discriminator"] == pytest.approx(share) and share > 0.1
    assert found.methods[1]["success_rate_discriminator"] == pytest.approx((share - 0.1) / 0.8)
    low, high = found.methods[1]["discriminator_interval"]
    assert low <= found.methods[1]["success_rate_discriminator"] <= high
    assert seen[1][0].gt == found.paths["NS"][seen[1][0].id]  # it scored this method's removals
    assert rows.id.tolist() == [t.id for t in seen[1]]


def test_cases_show_source_mask_methods_and_truth(meta_path, tmp_path):
    found = evaluate(make_methods(BASELINES[:2]), meta_path, hidden_of(meta_path), tmp_path)
    triplets = read_triplets(meta_path, require_gt=False)
    ids = [triplets[3].id, triplets[1].id]
    grid = collect_cases(found, triplets, hidden_of(meta_path), ids, ["Navier-Stokes", "Telea"])
    assert grid["column_titles"] == ["source", "mask", "Navier-Stokes", "Telea", "truth"]
    assert np.array_equal(grid["pictures"][0][3], load_image(found.paths["Telea"][ids[0]]))
    assert np.array_equal(grid["pictures"][1][-1], read_truth(hidden_of(meta_path), ids[1]).truth)
    row = found.results[(found.results.method == "Telea") & (found.results.id == ids[0])]
    assert grid["frames"][0] == [None, None, grid["frames"][0][2], row.accept.item(), None]
    assert f"{row.psnr_hole.item():.1f} dB" in grid["captions"][0][3]
    assert row.accept.item() or row.reason.item() in grid["captions"][0][3]
    plot_grid(**grid)
    blind = evaluate(make_methods(BASELINES[:1]), meta_path, None, tmp_path / "blind")
    grid = collect_cases(blind, triplets, None, ids, ["Telea"])
    assert grid["frames"][0] == [None] * 4 and "truth" not in grid["column_titles"]
    plot_grid(**grid)


def test_nothing_to_evaluate_is_an_error(meta_path, tmp_path):
    with pytest.raises(ValueError, match="0 methods"):
        evaluate([], meta_path, None, tmp_path)


def make_candidates(sets, folder, good):
    """Candidates of the pool: the truth for ids in `good`, the untouched source for others."""
    pool = sets / "pool" / "meta.json"
    with TripletWriter(folder / "candidates") as writer:
        for triplet in read_triplets(pool, require_gt=False):
            pictures = load_images(triplet)
            truth = read_truth(hidden_of(pool), triplet.id).truth
            for seed in range(2):
                writer.add(
                    id=f"{triplet.id}-s{seed}",
                    source=triplet.source,
                    mask=triplet.mask,
                    gt=truth if triplet.id in good else pictures["source"],
                    group=triplet.group,
                )
    return folder / "candidates" / "meta.json", hidden_of(pool)


def test_audit_finds_what_acceptance_is_worth(sets, tmp_path):
    ids = [t.id for t in read_triplets(sets / "pool" / "meta.json", require_gt=False)]
    good = set(ids[:4])
    meta, hidden = make_candidates(sets, tmp_path, good)
    before = sorted(p.name for p in meta.parent.parent.rglob("*"))
    accepted = [f"{i}-s0" for i in ids[:4]] + [f"{ids[5]}-s1"]
    audit = audit_acceptance(meta, hidden, accepted, sample=1000)
    assert audit["candidates_success_rate"] == pytest.approx(4 / COUNT)
    assert audit["accepted_precision"] == pytest.approx(4 / 5)
    assert (audit["candidates_success_rate_n"], audit["accepted_precision_n"]) == (2 * COUNT, 5)
    low, high = audit["accepted_precision_interval"]
    assert low < 0.8 < high and audit["judged_by"] == "simulated annotator"
    assert sorted(p.name for p in meta.parent.parent.rglob("*")) == before  # nothing was written
    few = audit_acceptance(read_triplets(meta), hidden, accepted, sample=3, seed=1)
    assert few["candidates_success_rate_n"] == few["accepted_precision_n"] == 3


def test_audit_of_nothing_accepted(sets, tmp_path):
    meta, hidden = make_candidates(sets, tmp_path, set())
    audit = audit_acceptance(meta, hidden, [], sample=4)
    assert audit["accepted_precision"] is None and audit["candidates_success_rate"] == 0


def test_judged_pictures_are_the_candidates_own(sets, tmp_path, monkeypatch):
    """The audit judges the candidate's GT, not anything else of the same scene."""
    meta, hidden = make_candidates(sets, tmp_path, set())
    triplets = read_triplets(meta)
    truth = read_truth(hidden, triplets[0].id).truth
    save_image(tmp_path / "better.png", truth)
    triplets = [replace(triplets[0], gt=tmp_path / "better.png"), *triplets[1:]]
    audit = audit_acceptance(triplets, hidden, [triplets[0].id])
    assert audit["accepted_precision"] == 1
