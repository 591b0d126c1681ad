"""Tables: who judged is named, pairs are the ones that matter, cases are spread over families."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from rorem_lib.evaluation import tables

METHODS = [
    {"name": "Telea", "kind": "telea"},
    {"name": "NS", "kind": "ns"},
    {"name": "base", "kind": "remover", "row": "base"},
    {"name": "initialization", "kind": "remover", "row": "initialization"},
    {"name": "human 1", "kind": "remover", "row": "human 1"},
    {"name": "final", "kind": "remover", "row": "high resolution"},
    {"name": "control", "kind": "remover", "row": "control", "control": True},
    {"name": "4 steps, LCM only", "kind": "remover", "scheduler": "lcm"},
    {"name": "4 steps, LoRA", "kind": "remover", "scheduler": "lcm", "lora": "x"},
    {
        "name": "own scheduler 1 step",
        "kind": "remover",
        "num_inference_steps": 1,
        "row": "distillation",
        "control": True,
    },
]


def make_results(rates, n=200, scene=1):
    rng, rows = np.random.default_rng(0), []
    for method, rate in {"source": None, **rates}.items():
        for k in range(n):
            rows.append(
                {
                    "method": method,
                    "id": f"s{k}",
                    "group": f"g{k // scene}",
                    "accept": None if rate is None else bool(rng.random() < rate),
                    "family": ("tiles", "wood", "noise", "bricks")[k % 4],
                    "psnr_hole": 20 + 10 * (rate or 0) + rng.normal(),
                    "psnr_shadow": None if k % 2 else 18 + 5 * (rate or 0) + rng.normal(),
                    "psnr_background": 36 - 2 * (rate or 0) + rng.normal(),
                }
            )
    return pd.DataFrame(rows)


def test_rounds_and_final_leave_controls_and_fast_variants_out():
    assert [m["name"] for m in tables.list_rounds(METHODS)] == [
        "base",
        "initialization",
        "human 1",
        "final",
    ]
    assert tables.choose_final(METHODS)["name"] == "final"
    assert tables.choose_final(METHODS[:3])["name"] == "base"
    assert tables.choose_final([{"name": "mine", "kind": "remover"}])["name"] == "mine"
    assert tables.choose_final(METHODS[:2]) is None and tables.list_pairs(METHODS[:2]) == []


def test_pairs_hold_every_question_of_the_report():
    pairs = tables.list_pairs(METHODS)
    assert {
        ("final", "control"),
        ("final", "Telea"),
        ("final", "initialization"),
        ("initialization", "base"),
        ("human 1", "initialization"),
        ("final", "human 1"),
        ("4 steps, LoRA", "4 steps, LCM only"),
        ("4 steps, LoRA", "final"),
        ("4 steps, LoRA", "own scheduler 1 step"),
    } <= set(pairs)
    assert ("final", "own scheduler 1 step") not in pairs  # of few steps the LoRA is the question
    assert len(pairs) == len(set(pairs)) and all(a != b for a, b in pairs)


def test_comparisons_are_paired_by_picture():
    results = make_results({"a": 0.9, "b": 0.4})
    shuffled = results.sample(frac=1, random_state=1)
    (first,) = tables.compare_methods(results, [("a", "b")])
    assert tables.compare_methods(shuffled, [("a", "b")]) == [first]
    rates = results[results.accept.notna()].groupby("method").accept.mean()
    assert first["difference"] == pytest.approx(100 * (rates["a"] - rates["b"]))
    assert first["significant"] and first["n"] == 200
    assert tables.compare_methods(results, [("a", "nobody"), ("a", "source")]) == []


def test_images_of_one_scene_are_compared_as_groups():
    results = make_results({"a": 0.6, "b": 0.5}, scene=10)
    first = {(m, i): x for m, i, x in zip(results.method, results.id, results.accept)}
    results["accept"] = [  # as alike as they can be
        first[method, f"s{int(name[1:]) // 10 * 10}"]
        for method, name in zip(results.method, results.id)
    ]
    (grouped,) = tables.compare_methods(results, [("a", "b")])
    (alone,) = tables.compare_methods(results.drop(columns="group"), [("a", "b")])
    assert (grouped["n"], grouped["n_groups"], alone["n_groups"]) == (200, 20, 200)
    assert grouped["high"] - grouped["low"] > 2.5 * (alone["high"] - alone["low"])
    assert grouped["difference"] == alone["difference"]


def test_a_tables_comparisons_are_one_family():
    rng = np.random.default_rng(0)
    rates = {f"m{n}": 0.5 for n in range(12)}
    pairs = [("m0", name) for name in list(rates)[1:]]
    false, single, results = 0, 0, make_results(rates, n=60)
    for _ in range(40):
        results["accept"] = [None if m == "source" else rng.random() < 0.5 for m in results.method]
        found = tables.compare_methods(results, pairs)
        false += any(c["significant"] for c in found)
        single += any(c["p_value"] < 0.05 for c in found)
    assert false <= 5 < single  # of 40 tables of equal methods


def test_a_difference_that_cannot_be_told_is_called_not_separable():
    results = make_results({"a": 0.9, "b": 0.4, "c": 0.42})
    found = tables.compare_methods(results, [("a", "b"), ("b", "c")])
    assert found[1]["p_adjusted"] >= found[1]["p_value"] > 0.05
    cells = tables.make_comparison_table(found)["difference"].tolist()
    assert "not separable" not in cells[0] and cells[1].endswith("points, not separable")


def test_identical_images_are_left_out_of_psnr_comparisons():
    results = make_results({"a": 0.9, "b": 0.4})
    results.loc[(results.method == "a") & results.id.isin(["s0", "s1"]), "psnr_hole"] = np.inf
    (found,) = tables.compare_methods(results, [("a", "b")], measure="psnr_hole")
    assert found["n"] == 198 and abs(found["difference"] - 5) < 1
    rows = {"identical": {"psnr_hole": 3, "psnr_shadow": 0, "psnr_background": 9}}
    rows |= {"psnr_hole": 21.234, "psnr_shadow": 20.0, "psnr_background": None}
    assert tables.format_psnr(rows, "psnr_hole") == "21.23 (3 identical)"
    assert tables.format_psnr(rows, "psnr_shadow") == "20.00"
    assert tables.format_psnr(rows, "psnr_background") == "identical (9)"
    assert tables.format_psnr({"psnr_hole": None}, "psnr_hole") == "–"


def test_the_rounds_cost_of_the_background_is_compared():
    methods = [METHODS[2], METHODS[3], METHODS[5]]
    results = make_results({"base": 0.1, "initialization": 0.3, "final": 0.7})
    evaluation = SimpleNamespace(methods=methods, results=results)
    (found,) = [c for c in tables.compare_all(evaluation) if c["measure"] == "psnr_background"]
    assert (found["first"], found["second"]) == ("final", "initialization")
    assert found["difference"] == pytest.approx(-0.8, abs=0.4) and found["significant"]


def test_all_comparisons_include_the_shadow_against_the_source():
    methods = [{"name": "Telea", "kind": "telea"}, {"name": "base", "kind": "remover"}]
    evaluation = SimpleNamespace(methods=methods, results=make_results({"Telea": 0.2, "base": 0.6}))
    found = {(c["first"], c["second"], c["measure"]): c for c in tables.compare_all(evaluation)}
    assert set(found) == {
        ("base", "Telea", "accept"),
        ("base", "Telea", "psnr_hole"),
        ("base", "source", "psnr_shadow"),
    }
    shadow = found["base", "source", "psnr_shadow"]
    assert shadow["n"] == 100 and shadow["difference"] == pytest.approx(3, abs=0.4)
    text = tables.make_comparison_table(list(found.values())).to_string()
    assert "points" in text and "dB" in text and "p (Holm)" in text


def test_tables_name_the_simulated_annotator():
    measured = {
        **METHODS[0],
        "success_rate": 0.418,
        "success_interval": [0.375, 0.462],
        "success_rate_discriminator": None,
        "psnr_hole": 21.234,
        "psnr_shadow": None,
        "psnr_background": None,
        "identical": {"psnr_background": 500},
        "ssim_hole": 0.5,
        "seconds_per_image": 0.0012,
        "unet_calls": 0.0,
    }
    table = tables.make_method_table([measured], {"psnr_shadow": 17.6})
    assert "success, simulated annotator (%)" in table.columns
    assert table.loc["Telea", tables.SUCCESS] == "41.8 (37.5 to 46.2)"
    assert table.loc["Telea", tables.GUESSED] == "–"
    assert table.loc["Telea", "PSNR background (dB)"] == "identical (500)"
    assert table.loc["source (untouched)", "PSNR shadow (dB)"] == "17.60"
    assert table.loc["source (untouched)", tables.SUCCESS] == "–"
    assert "LPIPS hole" not in table.columns
    rounds = tables.make_round_table(
        [
            {"name": "base"},
            {
                "name": "human 1",
                "candidates": 10000,
                "accepted": 4182,
                "train_size": 65747,
                **{k: measured[k] for k in ("success_rate", "success_interval")},
            },
        ]
    )
    assert tables.SUCCESS in rounds.columns
    assert rounds.loc["human 1", "accepted"] == "4,182 (42%)"
    assert rounds.loc["base"].tolist() == ["–"] * 7
    assert tables.make_round_table([]).empty


def test_families_are_split_into_known_and_new():
    results = make_results({"a": 0.9, "b": 0.4}, n=40)
    table = tables.make_family_table(results, [{"name": "b"}, {"name": "a"}])
    assert table.index.tolist() == ["b", "a"]
    assert table.columns[:2].tolist() == ["known (20)", "new (20)"]
    assert "wood * (10)" in table.columns
    judged = results[(results.method == "a") & results.family.isin(["wood", "bricks"])]
    assert table.loc["a", "new (20)"] == pytest.approx(judged.accept.astype(bool).mean())
    split = tables.split_success(results, "a")
    assert split["new"]["success_rate"] == table.loc["a", "new (20)"] and split["known"]["n"] == 20


def test_cases_are_spread_over_families_and_never_repeated():
    results = make_results({"a": 0.5}, n=60)
    cases = tables.choose_cases(results, "a", count=3)
    rows = results[results.method == "a"].set_index("id")
    ids = [i for part in cases.values() for i in part]
    assert len(ids) == len(set(ids)) == 9
    for part in cases.values():
        assert rows.loc[part].family.nunique() == 3
    psnr = rows.psnr_hole
    assert psnr[cases["best"][0]] == psnr.max() and psnr[cases["worst"][0]] == psnr.min()
    assert psnr[cases["worst"]].max() < psnr[cases["median"]].min()
    few = tables.choose_cases(results[results.id.isin(["s0", "s1"])], "a")
    assert sorted(sum(few.values(), [])) == ["s0", "s1"]


def test_no_name_in_a_csv_is_taken_for_a_formula(tmp_path):
    table = pd.DataFrame(
        {"=1+1": ["@a", "+0.4 points, not separable"], "rate": [-0.5, None]},
        index=pd.Index(["-1+cmd|' /C calc'!A0", "b"], name="method"),
    )
    tables.write_csv(table, tmp_path / "table.csv", index=True)
    assert (tmp_path / "table.csv").read_text().splitlines() == [
        "method,'=1+1,rate",
        "'-1+cmd|' /C calc'!A0,'@a,-0.5",
        'b,"+0.4 points, not separable",',
    ]
    measured = ["-2.8 to +3.6", "+0.4 dB", "-0.01", "+50.0 points"]
    tables.write_csv(pd.DataFrame({"difference": measured}), tmp_path / "measured.csv")
    assert pd.read_csv(tmp_path / "measured.csv").difference.tolist() == measured
