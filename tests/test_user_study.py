"""The blind user study: what annotators can see, what is written, and what follows from it."""

import json
import os

import numpy as np
import pandas as pd
import pytest
from cells import run_cells
from test_annotator import Session, write_candidates

from rorem_lib.data.pictures import save_image
from rorem_lib.data.triplets import read_triplets
from rorem_lib.evaluation import tables, user_study
from rorem_lib.evaluation.methods import make_methods, run_method
from rorem_lib.evaluation.user_study import (
    Trial,
    collect_successes,
    make_trials,
    open_study,
    read_answers,
    summarise_preferences,
    summarise_study,
    summarise_successes,
)
from rorem_lib.files import ROOT
from rorem_lib.labels.keys import PREFERENCE_KEYS
from rorem_lib.labels.log import Label, LabelError, LabelLog
from rorem_lib.sets import resolve

pytestmark = pytest.mark.usefixtures("quick_widgets")

METHODS = ("Telea", "human 1", "final model")


@pytest.fixture
def triplets(tmp_path):
    return write_candidates(tmp_path / "test")


@pytest.fixture
def removals(tmp_path, triplets):
    """method -> id -> a file whose folder tells the method, as the evaluation writes them."""
    random, paths = np.random.default_rng(1), {}
    for name in METHODS:
        (tmp_path / "removals" / name).mkdir(parents=True)
        paths[name] = {t.id: tmp_path / "removals" / name / f"{t.id}.png" for t in triplets}
        for path in paths[name].values():
            save_image(path, random.integers(0, 255, (32, 32, 3), dtype=np.uint8))
    return paths


@pytest.fixture
def results(triplets):
    """What an evaluation says of them: the simulated annotator likes the final model alone."""
    return pd.DataFrame(
        [
            {"id": t.id, "method": name, "accept": name == "final model"}
            for t in triplets
            for name in METHODS
        ]
    )


def open_session(folder, trials, triplets, **options):
    widget = open_study(folder, trials, triplets, "anna", repeat_share=0.0, **options)
    return Session(folder, triplets, widget=widget)


def answer_all(session, trials, choose):
    """Answer each trial as `choose` says of it."""
    by_id = {trial.id: trial for trial in trials}
    while session.state["id"]:
        session.fetch([session.state["place"]])
        session.press(choose(by_id[session.state["id"]]))


@pytest.mark.parametrize("kind, label", [("success", "accept"), ("preference", "left")])
def test_nothing_that_reaches_the_annotator_or_the_log_tells_the_method(
    tmp_path, triplets, removals, kind, label
):
    folder = tmp_path / "study"
    trials = make_trials(removals, kind)
    session = open_session(folder, trials, triplets)
    answer_all(session, trials, lambda trial: label)
    assert len(session.log.read()) == len(trials) == 3 * len(triplets)
    seen = json.dumps([content for content, _ in session.sent])
    seen += json.dumps(session.widget.get_state(), default=str) + session.log.path.read_text()
    for word in (*METHODS, *(f'"{t.id}"' for t in triplets), "removals/"):
        assert word not in seen, word
    shown = {
        content["id"]: pictures for content, pictures in session.sent if content["kind"] == "item"
    }
    for trial in trials:  # and yet each image is the one that was asked for
        sent = shown[trial.id][1:]
        assert [bytes(x) for x in sent] == [path.read_bytes() for path in trial.removals]


def test_what_each_trial_is_about_is_on_the_disk_before_the_first_answer(
    tmp_path, triplets, removals
):
    trials = make_trials(removals, "success")
    session = open_session(tmp_path / "study", trials, triplets)
    assert session.log.read() == []
    told = json.loads((tmp_path / "study" / "trials.json").read_text())
    assert {key: (x["picture"], tuple(x["methods"])) for key, x in told.items()} == {
        t.id: (t.picture, t.methods) for t in trials
    }
    more = make_trials(removals, "preference")
    open_session(tmp_path / "study", more, triplets)  # adds to it, and loses nothing
    told = json.loads((tmp_path / "study" / "trials.json").read_text())
    assert told.keys() == {t.id for t in trials + more}


def test_each_pair_is_asked_with_sides_by_lot(tmp_path, triplets, removals):
    trials = make_trials(removals, "preference")
    pairs = {(t.picture, frozenset(t.methods)) for t in trials}
    assert len(pairs) == len(trials) == 3 * len(triplets)
    lefts = {name: sum(t.methods[0] == name for t in trials) for name in METHODS}
    assert all(0 < count < 2 * len(triplets) for count in lefts.values()), lefts
    assert trials == make_trials(removals, "preference")
    assert {t.id for t in trials}.isdisjoint(
        t.id for t in make_trials(removals, "preference", seed=1)
    )
    few = make_trials(removals, "success", pictures=2, methods=["Telea", "human 1"])
    assert len(few) == 4 and len({t.picture for t in few}) == 2
    for picture in {t.picture for t in few}:
        asked = sorted(t.methods for t in few if t.picture == picture)
        assert asked == [("Telea",), ("human 1",)]


def test_annotators_see_the_same_trials_in_orders_of_their_own(tmp_path, triplets, removals):
    trials = make_trials(removals, "success")
    queues = [
        [item.id for item in open_study(tmp_path, trials, triplets, name)._queue if not item.repeat]
        for name in ("anna", "ben")
    ]
    assert sorted(queues[0]) == sorted(queues[1]) == sorted(t.id for t in trials)
    assert queues[0] != queues[1]


def test_success_rates_are_the_majoritys(tmp_path, triplets, removals, results):
    folder = tmp_path / "study"
    trials = make_trials(removals, "success")
    good = {"final model": {"c0", "c1", "c2", "c3"}, "human 1": {"c0"}, "Telea": set()}
    answer_all(
        open_session(folder, trials, triplets),
        trials,
        lambda t: "accept" if t.picture in good[t.methods[0]] else "reject",
    )
    ben, cleo = LabelLog(folder, "ben"), LabelLog(folder, "cleo")
    first = next(t for t in trials if (t.picture, t.methods) == ("c0", ("human 1",)))
    tie = next(t for t in trials if (t.picture, t.methods) == ("c5", ("Telea",)))
    for log in (ben, cleo):
        log.append(first.id, "reject")  # outvotes anna
    ben.append(tie.id, "accept")  # nobody is right
    ben.append("0123456789abcdef", "accept")  # a removal that has been made anew since
    LabelLog(folder, "program").append(tie.id, "accept", simulated=True)  # is not people
    study = summarise_study(folder, trials, results)
    rows = {row["name"]: row for row in study["methods"]}
    assert [row["name"] for row in study["methods"]][0] == "final model"
    assert {name: (row["n"], row["success_rate"]) for name, row in rows.items()} == {
        "final model": (6, pytest.approx(4 / 6)),
        "human 1": (6, 0),
        "Telea": (6, pytest.approx(0.5 / 6)),  # the tie is half a success
    }
    low, high = rows["final model"]["success_interval"]
    assert low == pytest.approx(0.300, abs=1e-3) and high == pytest.approx(0.903, abs=1e-3)
    assert rows["final model"]["simulated_rate"] == 1
    assert rows["final model"]["same_verdict"] == pytest.approx(4 / 6)
    assert rows["Telea"]["same_verdict"] == 1 and rows["Telea"]["ties"] == 1
    assert (study["lost"], study["annotators"], study["answers"]) == (2, 3, 18 + 3)
    assert study["alpha"] is not None and study["preferences"] == []
    compared = {(c["first"], c["second"]): c for c in study["comparisons"]}
    against = compared["final model", "human 1"]
    assert against["difference"] == pytest.approx(100 * 4 / 6) and against["n"] == 6
    table = tables.make_study_table(study)
    assert table.loc["final model", "success, people (%)"] == "66.7 (30.0 to 90.3)"
    assert tables.make_comparison_table(study["comparisons"])["measure"].unique() == [
        "success, people"
    ]


def test_two_equal_methods_stay_equal_where_annotators_are_even():
    """At 70 %, people agree about one method's removals and are divided about the other's."""
    rng, trials, labels = np.random.default_rng(0), [], []
    for name, divided in (("agreed", 0.02), ("disputed", 0.25)):
        for n in range(4000):
            trials.append(Trial(f"{name}{n}", f"c{n}", (name,), ()))
            good = rng.random() < (0.7 - divided) / (1 - 2 * divided)
            for annotator in ("ben", "cleo"):
                yes = good != (rng.random() < divided)
                labels.append(Label(trials[-1].id, ("reject", "accept")[yes], annotator))
    rates = collect_successes(trials, labels).groupby("method")["accept"].mean()
    assert rates["agreed"] == pytest.approx(0.7, abs=0.02)
    assert rates["disputed"] == pytest.approx(0.7, abs=0.02)


def test_images_of_one_scene_are_not_as_many_independent_ones():
    trials = [Trial(f"t{n}", f"p{n}", ("A",), ()) for n in range(200)]
    labels = [Label(t.id, "accept" if n // 10 % 2 else "reject") for n, t in enumerate(trials)]
    successes = collect_successes(trials, labels)
    results = pd.DataFrame({"id": [t.picture for t in trials], "method": "A", "accept": None})
    (alone,) = summarise_successes(successes, results)
    scenes = successes.assign(group=[f"scene {n // 10}" for n in range(200)])
    (grouped,) = summarise_successes(scenes, results)
    widths = [np.diff(row["success_interval"])[0] for row in (alone, grouped)]
    assert widths[1] > 2.5 * widths[0] and alone["success_rate"] == grouped["success_rate"] == 0.5


def test_a_removal_made_anew_is_asked_about_anew(tmp_path, triplets, removals, results):
    folder = tmp_path / "study"
    trials = make_trials(removals, "success")
    answer_all(open_session(folder, trials, triplets), trials, lambda t: "accept")
    path = removals["Telea"]["c2"]
    save_image(path, np.zeros((32, 32, 3), np.uint8))
    later = make_trials(removals, "success")
    assert len({t.id for t in later} - {t.id for t in trials}) == 1
    session = open_session(folder, later, triplets)
    by_id = {t.id: t for t in later}
    trial = by_id[session.state["id"]]
    assert (trial.picture, trial.methods) == ("c2", ("Telea",))
    assert session.state["done"] == len(trials) - 1
    assert summarise_study(folder, later, results)["lost"] == 1


def test_preferences_follow_the_method_and_not_the_side(tmp_path, triplets, removals, results):
    folder = tmp_path / "study"
    trials = make_trials(removals, "preference")

    def choose(trial):
        if set(trial.methods) == {"Telea", "human 1"}:
            return "same"
        if "final model" in trial.methods and trial.picture != "c0":
            return ("left", "right")[trial.methods.index("final model")]
        return "skip"

    session = open_session(folder, trials, triplets)
    assert session.widget.settings["keys"] == PREFERENCE_KEYS
    assert session.widget.settings["panes"] == ["source", "left", "right"]
    answer_all(session, trials, choose)
    assert (session.state["done"], session.state["skipped"]) == (16, 2)
    study = summarise_study(folder, trials, results)
    rows = {(p["first"], p["second"]): p for p in study["preferences"]}
    assert rows.keys() == {
        ("Telea", "final model"),
        ("Telea", "human 1"),
        ("final model", "human 1"),
    }
    final = rows["final model", "human 1"]
    assert (final["n"], final["n_answers"], final["prefers_first"]) == (5, 5, 1)
    assert final["preference"] == 1 and final["p_value"] == pytest.approx(2 / 2**5)
    assert rows["Telea", "final model"]["prefers_second"] == 1
    equal = rows["Telea", "human 1"]
    assert (equal["same"], equal["preference"], equal["p_value"]) == (1, 0.5, 1)
    assert study["methods"] == study["comparisons"] == []
    table = tables.make_study_table(study)
    assert table.iloc[1]["first better / same / second better (%)"] == "0 / 100 / 0"


def test_many_annotators_are_not_many_pictures():
    answers = pd.DataFrame(
        [
            {
                "trial": f"t{p}",
                "picture": f"p{p}",
                "annotator": f"a{n}",
                "first": "A",
                "second": "B",
                "label": "left",
            }
            for p in range(4)
            for n in range(25)
        ]
    )
    (row,) = summarise_preferences(answers)
    assert (row["n"], row["n_answers"], row["p_value"]) == (4, 100, pytest.approx(2 / 2**4))
    low, high = row["interval"]
    assert low == pytest.approx(0.5) and high == 1  # as p says: four images tell nothing
    (row,) = summarise_preferences(answers, dict.fromkeys(["p0", "p1", "p2", "p3"], "scene"))
    assert row["p_value"] == 1  # nor do four of one scene


def test_agreement_about_preferences(tmp_path, triplets, removals, results):
    trials = make_trials(removals, "preference")
    for name in ("ben", "cleo"):
        log = LabelLog(tmp_path, name)
        log.append(trials[0].id, "left")
        log.append(trials[1].id, "right")
        log.append(trials[2].id, "same")
        log.append(trials[0].id, "right", repeat=True)
    study = summarise_study(tmp_path, trials, results)
    assert study["alpha"] == 1.0
    assert study["self_consistency"]["ben"] == {"n": 1, "agree": 0.0}


def test_a_study_answers_only_what_it_asks(tmp_path, triplets, removals):
    session = open_session(tmp_path / "a", make_trials(removals, "preference"), triplets)
    assert "'accept' is no decision" in session.press("accept")["message"]
    session = open_session(tmp_path / "b", make_trials(removals, "success"), triplets)
    assert "'left' is no decision" in session.press("left")["message"]


def test_without_answers_there_is_an_empty_table(tmp_path, triplets, removals, results):
    for trials in ([], make_trials(removals, "success")):
        study = summarise_study(tmp_path / "nowhere", trials, results)
        assert study["answers"] == study["lost"] == 0 and study["alpha"] is None
        assert len(tables.make_study_table(study)) == 0
    answers, labels = read_answers(tmp_path / "nowhere", [])
    assert len(answers) == 0 and labels == []


def test_without_hidden_truth_people_are_the_only_judges(tmp_path, triplets, removals, results):
    trials = [Trial("t", "c0", ("Telea",), (removals["Telea"]["c0"],))]
    LabelLog(tmp_path, "ben").append("t", "accept")
    successes = collect_successes(trials, LabelLog(tmp_path, "ben").read())
    (row,) = summarise_successes(successes, results.assign(accept=None))
    assert (row["success_rate"], row["simulated_rate"], row["same_verdict"]) == (1, None, None)


def test_what_cannot_be_asked(tmp_path, triplets, removals):
    for given, message in [
        (dict(kind="beauty"), "success, preference, not 'beauty'"),
        (dict(kind="success", methods=["Magic"]), "no such methods: Magic; there are Telea"),
        (dict(kind="preference", methods=["Telea"]), "too few methods: Telea"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_trials(removals, **given)
    with pytest.raises(ValueError, match="no image has a removal of each method"):
        make_trials({"a": {"x": tmp_path}, "b": {"y": tmp_path}}, "success")
    with pytest.raises(ValueError, match="no trials"):
        open_study(tmp_path, [], triplets, "anna")
    with pytest.raises(ValueError, match=r"1 images are not in the test set \(first: c0\)"):
        open_study(tmp_path, make_trials(removals, "success"), triplets[1:], "anna")


def test_a_folder_that_cannot_be_written_is_told_before_anybody_answers(
    tmp_path, triplets, removals, monkeypatch
):
    def refuse(path, content):
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(user_study, "write_json", refuse)
    with pytest.raises(LabelError, match=r"trials\.json"):
        open_study(tmp_path / "study", make_trials(removals, "success"), triplets, "anna")


def test_without_a_name_it_is_asked_for(tmp_path, triplets, removals):
    box = open_study(tmp_path / "study", make_trials(removals, "preference"), triplets)
    name, start = box.children[0].children
    name.value = "anna"
    start.click()
    (widget,) = box.children
    assert widget.settings["annotator"] == "anna" and len(widget.settings["panes"]) == 3


@pytest.mark.slow
def test_the_evaluation_notebook_reads_the_answers_and_waits_for_nobody(tmp_path):
    stage = tmp_path / "stage"
    methods = [{"name": "Telea", "kind": "telea"}, {"name": "Navier-Stokes", "kind": "ns"}]
    triplets = read_triplets(resolve("builtin:test"), require_gt=False)[:4]
    paths = {
        m.name: run_method(m, triplets, stage / "removals").paths
        for m in make_methods(methods, seed=4)
    }
    trials = make_trials(paths, "success", pictures=3, seed=4)
    answer_all(
        open_session(stage / "user_study", trials, triplets),
        trials,
        lambda t: "accept" if t.methods == ("Telea",) else "reject",
    )
    run_cells(
        ROOT / "notebooks" / "08_evaluate.ipynb",
        tmp_path / "done.ipynb",
        {
            "output_dir": str(stage),
            "test_set": "builtin:test",
            "limit": 4,
            "seed": 4,
            "methods": methods,
            "user_study": "success",
            "study_pictures": 3,
        },
    )
    study = json.loads((stage / "metrics.json").read_text())["user_study"]
    assert [(m["name"], m["success_rate"]) for m in study["methods"]] == [
        ("Telea", 1),
        ("Navier-Stokes", 0),
    ]
    assert (study["trials"], study["answers"], study["lost"]) == (6, 6, 0)
    assert (stage / "figures" / "user_study.png").is_file()
