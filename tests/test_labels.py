"""The label log survives crashes; votes, agreement, order, import and export."""

import csv
import json
import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import datasets
import numpy as np
import pytest

from rorem_lib import plots
from rorem_lib.data.figures import plot_candidates
from rorem_lib.data.triplets import load_images, read_triplets
from rorem_lib.data.writer import TripletWriter
from rorem_lib.labels import log as label_log
from rorem_lib.labels.exchange import (
    export_dataset,
    export_labels,
    import_labels,
    write_scored_set,
)
from rorem_lib.labels.log import Label, LabelError, LabelLog, read_labels, split_stale
from rorem_lib.labels.queue import QueueItem, order_items, stratify_items
from rorem_lib.labels.votes import (
    ADJUDICATION,
    POLICIES,
    collect_orders,
    compute_agreement,
    count_missing,
    find_conflicts,
    find_fair,
    list_adjudication,
    merge_votes,
    score_votes,
)


def vote(item_id, answer, annotator="anna", **values):
    return Label(id=item_id, label=answer, annotator=annotator, **values)


def standing(folder):
    return [(x.annotator, x.id, x.label) for x in read_labels(folder)]


@pytest.fixture
def candidates(tmp_path):
    """Four candidates of 16 px in `tmp_path/candidates`."""
    random = np.random.default_rng(0)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 5:11] = 255
    folder = tmp_path / "candidates"
    with TripletWriter(folder) as writer:
        for place in range(4):
            source, removal = random.integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)
            writer.add(id=f"c{place}", source=source, mask=mask, gt=removal, group=f"g{place}")
    return folder


# ------------------------------------------------------------------------------------- the log


def test_log_keeps_every_field_and_undo_takes_back_the_last(tmp_path):
    log = LabelLog(tmp_path, "anna")
    log.append("c1", "reject", reason="blur", note="a\nnote — ü", ms=812, order="audit")
    log.append("c2", "accept")
    log.append("c1", "accept")
    lines = log.path.read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 3 and first["event"] == "label" and first["time"].endswith("+00:00")
    assert first["note"] == "a\nnote — ü" and first["reason"] == "blur" and first["ms"] == 812
    assert standing(tmp_path) == [("anna", "c2", "accept"), ("anna", "c1", "accept")]
    log.undo(log.read()[-1])
    assert standing(tmp_path) == [("anna", "c1", "reject"), ("anna", "c2", "accept")]
    for label in log.read():
        log.undo(label)
    assert standing(tmp_path) == []
    assert len(log.path.read_bytes().splitlines()) == 6  # nothing is ever rewritten
    log.append("c3", "accept")
    log.undo(label)  # of what does not stand: nothing else goes
    assert standing(tmp_path) == [("anna", "c3", "accept")]


def test_annotators_do_not_mix(tmp_path):
    anna, ben = LabelLog(tmp_path, "anna"), LabelLog(tmp_path, "ben")
    anna.append("c1", "accept")
    ben.append("c1", "reject")
    ben.undo(ben.read()[0])
    assert standing(tmp_path) == [("anna", "c1", "accept")]
    for name in ("", "a/b", "../x", ".hidden", "a b", "x" * 65):
        with pytest.raises(LabelError, match="cannot name a label file"):
            LabelLog(tmp_path, name)


def test_torn_last_line_is_skipped_and_never_glued(tmp_path, caplog):
    log = LabelLog(tmp_path, "anna")
    log.append("c1", "accept")
    whole = log.path.read_bytes()
    log.append("c2", "reject", note="ü")
    line = log.path.read_bytes()[len(whole) :]
    for cut in range(len(line)):
        log.path.write_bytes(whole + line[:cut])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            ids = [label.id for label in log.read()]
        assert ids == (["c1", "c2"] if cut == len(line) - 1 else ["c1"])  # less the line's end
        assert bool(caplog.records) == (0 < cut < len(line) - 1)
        log.append("c3", "accept")
        assert [label.id for label in log.read()] == [*ids, "c3"]
    log.path.write_bytes(whole + b"\0" * 100)  # what some file systems leave after a power cut
    log.append("c3", "accept")
    assert [label.id for label in log.read()] == ["c1", "c3"]


WRITER = """
import sys
from rorem_lib.labels.log import LabelLog
log = LabelLog(sys.argv[1], "anna")
for number in range(100_000):
    log.append(f"c{number}", "accept", note="x" * 300)
    print(number, flush=True)
"""


def test_killed_writer_loses_nothing_it_has_confirmed(tmp_path):
    for round_ in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path / str(round_))]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        confirmed = [int(writer.stdout.readline()) for _ in range(20 + 7 * round_)]
        os.kill(writer.pid, signal.SIGKILL)
        confirmed += [int(line) for line in writer.stdout.read().split("\n") if line]
        assert writer.wait() == -signal.SIGKILL
        log = LabelLog(tmp_path / str(round_), "anna")
        log.append("after", "reject")
        ids = [label.id for label in log.read()]
        assert ids[: len(confirmed)] == [f"c{number}" for number in confirmed]
        assert ids[-1] == "after" and len(ids) - 1 - len(confirmed) in (0, 1)


def test_full_disk_is_an_error_and_leaves_no_label(tmp_path, monkeypatch):
    full, really_open = LabelLog(tmp_path, "full"), os.open
    monkeypatch.setattr(label_log.os, "open", lambda *_: really_open("/dev/full", os.O_RDWR))
    with pytest.raises(LabelError, match="not saved.*No space left"):
        full.append("c1", "accept")


def test_a_log_that_is_a_link_is_never_written_through(tmp_path):
    diary = tmp_path / "diary.txt"
    diary.write_text("dear diary\n")
    log = LabelLog(tmp_path / "labels", "anna")
    log.append("c1", "accept")
    aside = log.path.rename(tmp_path / "aside.jsonl")
    log.path.symlink_to(diary)
    for write in (
        lambda: log.append("c2", "accept"),
        lambda: log.undo(vote("c1", "accept")),
        log.was_continued,
        lambda: LabelLog(tmp_path / "labels", "anna"),
    ):
        with pytest.raises(LabelError, match="labels-anna.jsonl is a symbolic link"):
            write()
    assert diary.read_text() == "dear diary\n"
    log.path.unlink()
    log.path.symlink_to(tmp_path / "nowhere")  # nor is its target made
    with pytest.raises(LabelError, match="symbolic link"):
        log.append("c2", "accept")
    assert not (tmp_path / "nowhere").exists()
    log.path.unlink()
    aside.rename(log.path)
    (tmp_path / "linked").symlink_to(tmp_path / "labels")  # folders may be on another disk
    LabelLog(tmp_path / "linked", "anna").append("c3", "accept")
    assert [x.id for x in log.read()] == ["c1", "c3"]


def test_disk_that_fills_up_within_a_line(tmp_path, monkeypatch):
    log = LabelLog(tmp_path, "anna")
    log.append("c1", "accept")
    before, write = log.path.read_bytes(), os.write

    def write_half(descriptor, data):
        if len(data) < 20:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(label_log.os, "write", write_half)
    with pytest.raises(LabelError, match="No space left"):
        log.append("c2", "accept")
    monkeypatch.undo()
    assert log.path.read_bytes() == before
    monkeypatch.setattr(label_log.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "I/O")))
    with pytest.raises(LabelError, match="I/O"):
        log.append("c2", "accept")
    assert log.path.read_bytes() == before

    def pretend(descriptor, data):  # as NFS does: that the disk is full shows with fsync
        write(descriptor, data[:20])
        return len(data)

    monkeypatch.setattr(label_log.os, "write", pretend)
    with pytest.raises(LabelError, match="I/O"):
        log.append("c2", "accept")
    assert log.path.read_bytes() == before
    monkeypatch.undo()
    assert [label.id for label in log.read()] == ["c1"]
    log.append("c2", "reject")
    assert [label.label for label in log.read()] == ["accept", "reject"]


def test_unwritable_folder_is_an_error(tmp_path, monkeypatch):
    log = LabelLog(tmp_path, "anna")

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(label_log.os, "open", refuse)
    with pytest.raises(LabelError, match="labels-anna.jsonl.*Read-only"):
        log.append("c1", "accept")
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(LabelError, match="cannot be written"):
        LabelLog(tmp_path / "file" / "labels", "anna")


def test_what_is_no_decision_is_refused(tmp_path):
    log = LabelLog(tmp_path, "anna")
    for item_id, answer in (("c1", "maybe"), ("", "accept"), (7, "accept")):
        with pytest.raises(LabelError, match="no decision"):
            log.append(item_id, answer)
    for unreadable in ({"note": 2024}, {"content": 5}, {"reason": ["blur"]}, {"ms": "12"}):
        with pytest.raises(LabelError, match=f"c1.*{next(iter(unreadable))}"):
            log.append("c1", "accept", **unreadable)
    assert not log.path.exists()


def test_label_of_a_regenerated_candidate_is_stale(candidates, tmp_path):
    triplets = read_triplets(candidates)
    log = LabelLog(tmp_path / "labels", "anna")
    for triplet in triplets[:3]:
        log.append(triplet.id, "accept", content_file=triplet.gt)
    log.append("gone", "accept")
    triplets[1].gt.write_bytes(triplets[3].gt.read_bytes())
    current, stale = split_stale(log.read(), triplets)
    assert [x.id for x in current] == ["c0", "c2"] and [x.id for x in stale] == ["c1", "gone"]
    triplets[0].gt.unlink()
    assert [x.id for x in split_stale(log.read(), triplets)[0]] == ["c2"]


def test_foreign_lines_and_words_harm_no_other_label(tmp_path, caplog):
    log = LabelLog(tmp_path, "anna")
    log.append("c1", "accept")
    good = {"event": "label", "id": "c2", "label": "accept", "annotator": "anna"}
    foreign = [
        good | change
        for change in (
            {"id": ["c2"]},
            {"annotator": None},
            {"ms": "12"},
            {"label": 1},
            {"reason": 3},
        )
    ]
    newer = [good | {"id": "c1", "label": "unsure"}, good | {"id": "c1", "event": "undo"}]
    with open(log.path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(event) + "\n" for event in [*foreign, *newer, good])
    assert [(x.id, x.label) for x in log.read()] == [("c1", "accept"), ("c2", "accept")]
    assert "5 torn or foreign line(s) skipped" in caplog.text


# ---------------------------------------------------------------------------- votes, agreement


def test_merge_policies():
    labels = [
        *(vote("both", "accept", who) for who in "ab"),
        vote("tie", "accept", "a", time="2"),
        vote("tie", "reject", "b", time="1"),
        *(vote("most", answer, who) for who, answer in zip("abc", ["reject", "accept", "reject"])),
        vote("skipped", "skip", "a"),
        vote("skipped", "reject", "b"),
        vote("both", "reject", "a", repeat=True),
    ]
    assert merge_votes(labels) == {"both": "accept", "most": "reject", "skipped": "reject"}
    assert merge_votes(labels, "unanimous") == {"both": "accept", "skipped": "reject"}
    single = merge_votes(labels, "single")
    assert single["tie"] == "accept" and len(single) == 4
    assert merge_votes(labels, min_votes=2).keys() == {"both", "most"}
    assert find_conflicts(labels) == ["tie", "most"]
    assert score_votes(labels) == {"both": 1, "tie": 0.5, "most": 0, "skipped": 0}
    assert score_votes(labels, "unanimous")["most"] == 0.5
    settled = [*labels, vote("tie", "reject", "c", order="adjudication")]
    assert score_votes(settled)["tie"] == 0
    with pytest.raises(ValueError, match="policy 'most' is unknown"):
        merge_votes(labels, "most")


def test_adjudication_settles_a_conflict_under_every_policy():
    votes = [
        vote("c0", "accept", "a"),
        vote("c0", "reject", "b", reason="blur"),
        vote("c1", "accept", "a"),
        vote("c1", "reject", "c"),
        vote("c2", "accept", "a"),
        vote("c2", "accept", "b"),
    ]
    queue, told = list_adjudication(votes, "judge")
    assert queue == [QueueItem("c0", ADJUDICATION), QueueItem("c1", ADJUDICATION)]
    assert told["c0"] == "a accept, b blur"
    assert [x.id for x in list_adjudication(votes, "b")[0]] == ["c1"], "b voted on c0"
    settled = [
        *votes,
        vote("c0", "reject", "judge", order=ADJUDICATION),
        vote("c1", "skip", "judge", order=ADJUDICATION),
    ]
    for policy in POLICIES:
        assert merge_votes(settled, policy)["c0"] == "reject"
    assert merge_votes(settled) == {"c0": "reject", "c2": "accept"}
    assert find_conflicts(settled) == ["c1"], "a skip settles nothing"
    # whoever decided goes on where they were; nobody else is asked again
    assert [x.id for x in list_adjudication(settled, "judge")[0]] == ["c0", "c1"]
    assert [x.id for x in list_adjudication(settled, "other")[0]] == ["c1"]
    assert compute_agreement(settled) == compute_agreement(votes), "conflicts alone are no sample"


def test_missing_labels():
    ids = [f"c{place}" for place in range(6)]
    labels = [vote("c0", "accept"), vote("c1", "reject"), vote("c2", "skip"), vote("x", "accept")]
    assert count_missing(labels, ids) == 3  # the skipped one has been handled
    assert count_missing(labels, ids, wanted=4) == 2
    assert count_missing(labels, ids, wanted=2) == 0
    labels += [vote(x, "skip") for x in ids[3:]]
    assert count_missing(labels, ids, wanted=4) == 0
    assert count_missing([], ids, wanted=99) == 6
    with pytest.raises(ValueError, match="-1 is no number of labels"):
        count_missing([], ids, wanted=-1)


def test_only_a_fair_sample_tells_the_accept_share():
    ids = [f"c{place}" for place in range(6)]
    at_random = [vote("c0", "accept"), vote("c1", "reject", order="imported"), vote("c2", "skip")]
    assert find_fair(at_random, ids) == {"c0", "c1"}
    for order in ("uncertainty", "stratified"):
        some = [*at_random, vote("c3", "accept", order=order)]
        assert find_fair(some, ids) == set(), "random ones among what another order left over"
        assert find_fair([*some, vote("c4", "accept", order="audit")], ids) == {"c4"}
    everything = [vote(x, "accept", order="uncertainty") for x in ids]
    assert find_fair(everything, ids) == set(ids)


def test_agreement_against_known_values():
    """Cohen's kappa and Krippendorff's alpha of a table worked by hand.

    a and b agree on 8 of 10, both say yes 5 times: chance 0.5, kappa (0.8 - 0.5) / 0.5. For two
    raters alpha = 1 - (2n - 1) * disagreement / (2 * yes * no) = 1 - 19 * 4 / (2 * 100).
    """
    a, b = "1111100000", "1111010000"
    labels = [
        vote(f"c{place}", "accept" if answer == "1" else "reject", who)
        for who, answers in (("a", a), ("b", b))
        for place, answer in enumerate(answers)
    ]
    labels += [vote("c0", "skip", "c"), vote("c1", "accept", "c")]
    labels += [vote("c0", "accept", "a", repeat=True), vote("c1", "reject", "a", repeat=True)]
    found = compute_agreement(labels)
    pair = next(pair for pair in found["pairs"] if pair["annotators"] == ("a", "b"))
    assert pair["n"] == 10 and pair["agree"] == 0.8 and pair["kappa"] == pytest.approx(0.6)
    assert found["self_consistency"] == {"a": {"n": 2, "agree": 0.5}}
    assert found["n_shared"] == 10
    two = compute_agreement([label for label in labels if label.annotator in "ab"])
    assert two["alpha"] == pytest.approx(1 - 19 * 4 / 200)


def test_agreement_is_none_where_it_is_undefined():
    assert compute_agreement([])["alpha"] is None
    alone = compute_agreement([vote("c0", "accept"), vote("c1", "reject")])
    assert alone["pairs"] == [] and alone["alpha"] is None
    same = compute_agreement([vote("c0", "accept", who) for who in "ab"])
    assert same["alpha"] is None and same["pairs"][0]["kappa"] is None
    json.dumps(same)


# ------------------------------------------------------------------------------------ the queue

IDS = [f"c{place:03}" for place in range(200)]


def test_every_order_is_complete_and_repeatable():
    scores = dict(zip(IDS, np.random.default_rng(1).random(200)))
    strata = {x: str(place % 3) for place, x in enumerate(IDS)}
    for order in ("random", "uncertainty", "stratified"):
        for overlap in (0, 0.1, 1):
            queues = [
                order_items(
                    IDS,
                    order=order,
                    scores=scores,
                    strata=strata,
                    overlap_share=overlap,
                    annotator=who,
                    seed=3,
                )
                for who in ("a", "a", "b")
            ]
            assert queues[0] == queues[1] != queues[2]
            assert sorted(x.id for x in queues[0] if not x.repeat) == IDS
            assert sum(x.repeat for x in queues[0]) == 4
    assert order_items(IDS, seed=1) != order_items(IDS, seed=2)
    assert order_items([]) == [] and len(order_items(["only"], repeat_share=1)) == 1


def test_uncertain_items_come_first_and_the_audit_is_random():
    scores = {x: place / 199 for place, x in enumerate(IDS)}
    queue = order_items(IDS, order="uncertainty", scores=scores, audit_share=0.2, repeat_share=0)
    assert Counter(x.order for x in queue) == {"uncertainty": 160, "audit": 40}
    doubt = [abs(scores[x.id] - 0.5) for x in queue if x.order == "uncertainty"]
    assert doubt == sorted(doubt)
    assert 5 <= sum(x.order == "audit" for x in queue[:50]) <= 15  # mixed in from the start
    audit = [scores[x.id] for x in queue if x.order == "audit"]
    assert abs(np.mean(audit) - 0.5) < 0.15 and np.std(audit) > 0.2
    other = order_items(IDS, order="uncertainty", scores=scores, audit_share=0.2, annotator="b")
    assert {x.id for x in other if x.order == "audit"} == {
        x.id for x in queue if x.order == "audit"
    }
    with pytest.raises(ValueError, match="199 of 200 candidates have not got a score"):
        order_items(IDS, order="uncertainty", scores={"c000": 0.5})
    for score in (None, float("nan"), 3.5, -0.1, "high"):
        with pytest.raises(ValueError, match="the score of c007 is .*not a probability"):
            order_items(IDS, order="uncertainty", scores=scores | {"c007": score})


def test_strata_take_turns(tmp_path):
    with TripletWriter(tmp_path) as writer:
        for place, item_id in enumerate(IDS[:16]):
            picture, mask = np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8)
            mask[: 1 + place // 2] = 255
            writer.add(id=item_id, source=picture, mask=mask, gt=picture, kind="ab"[place % 2])
    strata = stratify_items(read_triplets(tmp_path), bins=2)
    assert Counter(strata.values()) == {f"{k} size {s}": 4 for k in "ab" for s in (0, 1)}
    assert strata[IDS[0]] == "a size 0" and strata[IDS[15]] == "b size 1"
    given = {"order": "stratified", "strata": strata, "overlap_share": 0, "repeat_share": 0}
    queue = order_items(strata, audit_share=0, **given)
    for place in range(0, 16, 4):
        assert len({strata[x.id] for x in queue[place : place + 4]}) == 4
    queue = order_items(strata, audit_share=0.25, **given)
    assert Counter(x.order for x in queue) == {"stratified": 12, "audit": 4}
    assert sorted(x.id for x in queue) == sorted(strata)


def test_annotators_share_the_overlap_alone():
    first = order_items(IDS, annotator="a", repeat_share=0)
    labels = [vote(item.id, "accept", "a") for item in first[:100]]
    second = order_items(IDS, annotator="b", labels=labels, repeat_share=0)
    done = {label.id for label in labels}
    both = [item.id for item in second if item.id in done]
    assert len(both) == 10 and len(second) == 110  # every tenth item is from the overlap
    assert [item for item in first if item.id in {x.id for x in second}]
    mine = order_items(IDS, annotator="a", labels=labels, repeat_share=0)
    assert mine == first  # one's own labels move nothing: reopening finds the same queue


def test_silent_repeats_come_later():
    queue = order_items(IDS, repeat_share=0.1)
    places = {(item.id, item.repeat): place for place, item in enumerate(queue)}
    repeats = [item for item in queue if item.repeat]
    assert len(repeats) == 20
    for item in repeats:
        assert places[item.id, True] - places[item.id, False] >= 15
    labels = [vote(x.id, "accept", "b") for x in order_items(IDS, annotator="b")[:40]]
    later = order_items(IDS, repeat_share=0.1, labels=labels)
    again = {x.id for x in later if x.repeat}
    kept = {x.id for x in repeats} - {x.id for x in labels}
    assert len(kept - again) <= 4 and again <= kept | {x.id for x in queue}
    assert not [x for x in order_items(IDS[:15], repeat_share=1) if x.repeat], "no room"
    with pytest.raises(ValueError, match="between 0 and 1"):
        order_items(IDS, repeat_share=2)
    with pytest.raises(ValueError, match="order 'best' is unknown"):
        order_items(IDS, order="best")


# ----------------------------------------------------------------------------------- in and out


def test_scored_and_accepted_sets(candidates, tmp_path):
    decisions = {"c0": "accept", "c1": "reject", "c3": "accept"}
    meta = write_scored_set(candidates, decisions, tmp_path / "run" / "scored")
    scored = read_triplets(meta)
    assert {x.id: x.extra["score"] for x in scored} == {"c0": 1.0, "c1": 0.0, "c3": 1.0}
    assert [x.extra.get("accepted_by") for x in scored] == ["human", None, "human"]
    original = {x.id: x for x in read_triplets(candidates)}
    for triplet in scored:
        assert triplet.group == original[triplet.id].group
        assert triplet.gt.read_bytes() == original[triplet.id].gt.read_bytes()
    write_scored_set(candidates, decisions, tmp_path / "accepted", accepted_only=True)
    assert [x.id for x in read_triplets(tmp_path / "accepted")] == ["c0", "c3"]
    write_scored_set(candidates, {"c1": "accept"}, tmp_path / "accepted", accepted_only=True)
    assert [x.id for x in read_triplets(tmp_path / "accepted")] == ["c1"]  # nothing stays behind
    with pytest.raises(LabelError, match="1 decisions belong to no candidate"):
        write_scored_set(candidates, {"c9": "accept"}, tmp_path / "accepted")


def test_a_scored_set_says_how_each_item_was_drawn(candidates, tmp_path):
    given = [
        Label("c0", "accept", "a", order="audit"),
        Label("c1", "reject", "a", order="random"),
        Label("c1", "reject", "b", order="uncertainty"),
        Label("c2", "skip", "a"),
        Label("c3", "accept", "a", order="random"),
        Label("c3", "reject", "b", order="random"),
        Label("c3", "reject", "c", order="adjudication"),
    ]
    orders = collect_orders(given)
    assert orders == {"c0": "audit", "c1": "random", "c3": "random"}
    meta = write_scored_set(
        candidates, merge_votes(given), tmp_path / "scored", orders=orders, fair={"c0"}
    )
    assert {x.id: x.extra["label_order"] for x in read_triplets(meta)} == orders
    assert [x.id for x in read_triplets(meta) if x.extra["fair_sample"]] == ["c0"]
    found = import_labels(meta, tmp_path / "labels", "c", triplets=read_triplets(candidates))
    assert found["written"] == 3
    assert {x.id: x.order for x in read_labels(tmp_path / "labels")} == orders


def test_of_several_accepted_removals_of_a_picture_some_are_kept(candidates, tmp_path):
    with TripletWriter(tmp_path / "several") as writer:
        for triplet in read_triplets(candidates)[:2]:
            for k in range(4):
                writer.add_triplet(triplet, id=f"{triplet.id}-s{k}", group=triplet.id)
    decisions = {f"{c}-s{k}": "accept" for c in ("c0", "c1") for k in range(4)}
    decisions["c1-s0"] = "reject"

    def write(**rest):
        write_scored_set(
            tmp_path / "several", decisions, tmp_path / "kept", accepted_only=True, **rest
        )
        return [t.id for t in read_triplets(tmp_path / "kept")]

    assert len(write()) == 7
    drawn = {tuple(write(per_picture=1, seed=seed)) for seed in range(12)}
    assert len(drawn) > 3  # by lot, and the same lot for the same seed
    assert write(per_picture=1, seed=3) == write(per_picture=1, seed=3)
    for ids in drawn:
        assert [name[:2] for name in ids] == ["c0", "c1"] and "c1-s0" not in ids
    assert len(write(per_picture=2)) == 4


def test_export_and_import_keep_the_labels(candidates, tmp_path):
    triplets = read_triplets(candidates)
    log = LabelLog(tmp_path / "labels", "anna")
    log.append("c0", "accept", content_file=triplets[0].gt, ms=700)
    log.append("c1", "reject", content_file=triplets[1].gt, reason="blur", note='a "note", so')
    log.append("c2", "skip", content_file=triplets[2].gt, order="audit")
    log.append("c1", "accept", content_file=triplets[1].gt, repeat=True)
    LabelLog(tmp_path / "labels", "ben").append("c0", "reject", content_file=triplets[0].gt)
    labels = read_labels(tmp_path / "labels")
    for name in ("labels.csv", "tasks.json"):
        path = export_labels(labels, tmp_path / name, triplets=triplets)
        back = tmp_path / f"from {name}"
        counts = import_labels(path, back, triplets=triplets)
        assert counts == {"read": 5, "written": 5, "unknown": 0}
        assert read_labels(back) == labels
        assert import_labels(path, back, triplets=triplets)["written"] == 0
    import_labels(log.path, tmp_path / "copy")
    assert read_labels(tmp_path / "copy") == log.read()
    task = json.loads((tmp_path / "tasks.json").read_text())[1]
    assert task["data"]["candidate"] == "c1" and task["data"]["removal"].endswith(".png")
    assert len(task["annotations"]) == 2


def test_exported_dataset_has_pictures_and_all_that_was_said(candidates, tmp_path):
    triplets = read_triplets(candidates)
    labels = [
        vote("c1", "reject", reason="blur", ms=5),
        vote("c1", "accept", "ben"),
        vote("c3", "accept", order="audit"),
    ]
    decisions = merge_votes(labels)
    for _ in range(2):  # again over the first
        path = export_dataset(labels, decisions, tmp_path / "labels.parquet", triplets=triplets)
    rows = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows["id"] == ["c1", "c3"] and rows["decision"] == [None, "accept"]
    said = rows[0]["labels"]
    assert [(x["annotator"], x["label"], x["reason"], x["ms"]) for x in said] == [
        ("anna", "reject", "blur", 5),
        ("ben", "accept", None, 0),
    ]
    pictures = load_images(triplets[1])
    for name, part in (("source", "source"), ("mask", "mask"), ("removal", "gt")):
        assert np.array_equal(np.asarray(rows[0][name]), pictures[part])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "candidates", "labels.parquet"]
    for none in ([], [vote("elsewhere", "accept")]):
        with pytest.raises(LabelError, match="none.parquet"):
            export_dataset(none, {}, tmp_path / "none.parquet", triplets=triplets)


def test_import_of_foreign_files(candidates, tmp_path):
    triplets = read_triplets(candidates)
    meta = tmp_path / "meta.json"
    rows = [{"source": f"a/c{n}.png", "mask": "m", "GT": "g", "score": n / 3} for n in range(4)]
    meta.write_text(json.dumps([*rows, {"id": "other", "source": "o.png", "score": "1"}]))
    counts = import_labels(meta, tmp_path / "scores", "upstream", triplets=triplets)
    assert counts == {"read": 5, "written": 4, "unknown": 1}
    found = read_labels(tmp_path / "scores")
    assert [x.label for x in found] == ["reject", "reject", "accept", "accept"]
    assert split_stale(found, triplets)[0] == found and found[0].annotator == "upstream"

    studio = [
        {"id": 1, "data": {"id": "c0"}, "annotations": [
            {"completed_by": {"id": 3, "email": "x@y.org"}, "was_cancelled": False,
             "lead_time": 2.5,
             "result": [{"type": "choices", "value": {"choices": ["Reject", "blur"]}}]}]},
        {"id": 2, "data": {"id": "c1"}, "annotations": [{"was_cancelled": True, "result": []}]},
        {"id": 3, "data": {"id": "c2"}, "annotations": []},
    ]  # fmt: skip
    (tmp_path / "studio.json").write_text(json.dumps(studio))
    import_labels(tmp_path / "studio.json", tmp_path / "studio", "me")
    first, second = sorted(read_labels(tmp_path / "studio"), key=lambda x: x.id)
    assert (first.annotator, first.label, first.reason) == ("x@y.org", "reject", "blur")
    assert first.ms == 2500 and (second.annotator, second.label) == ("me", "skip")

    (tmp_path / "labels.csv").write_text("\ufeffid,label\nc0,yes\nc1,0\nc2,\n", encoding="utf-8")
    import_labels(tmp_path / "labels.csv", tmp_path / "csv", "me")
    assert [x.label for x in read_labels(tmp_path / "csv")] == ["accept", "reject", "skip"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "name,answer\nc0,yes\n"),
        ("labels.csv", "id,label\nc0,perhaps\n"),
        ("meta.json", '[{"id": "c0"}]'),
        ("meta.json", '{"c0": 1}'),
        ("meta.json", '[{"id": "c0", "score": 1'),
        ("meta.json", '[{"id": "c0", "score": NaN}]'),
        ("meta.json", "[]"),
        ("labels.csv", "id,label\nc0,yes\nc1,45\n"),
        ("labels.csv", "id,label\nc0,-0.5\n"),
        ("labels.csv", "id,label\nc0,yes\n,no\n"),
        ("labels.csv", "id,label\n"),
        ("labels.csv", "id,label,time\nc0,yes,yesterday\n"),
        ("labels.jsonl", "no label\n"),
        ("labels.txt", "c0 yes"),
        (
            "studio.json",
            '[{"data": {"id": "c0"}, "annotations": [{"result": [{"value": '
            '{"choices": ["Poor"]}}]}]}]',
        ),
        ("missing.json", None),
        ("missing.jsonl", None),
    ],
)
def test_import_of_a_bad_file_names_it(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(LabelError, match=f"cannot import .*{name}"):
        import_labels(tmp_path / name, tmp_path / "labels")
    assert read_labels(tmp_path / "labels") == []


def test_import_names_the_row_and_writes_all_or_nothing(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("id,label\nc0,yes\nc1,45\n")
    with pytest.raises(LabelError, match=r"label 2 in the file \(c1\): 45 is no score"):
        import_labels(table, tmp_path / "labels")
    table.write_text("id,label,annotator\nc0,yes,anna\nc1,yes,b/c\nc2,yes,d+1@x.org\n")
    with pytest.raises(LabelError, match="'b/c'"):
        import_labels(table, tmp_path / "labels")
    assert read_labels(tmp_path / "labels") == []
    table.write_text(table.read_text().replace("b/c", "b.c"))
    assert import_labels(table, tmp_path / "labels")["written"] == 3


def test_imported_times_are_brought_to_one_clock(tmp_path):
    table = tmp_path / "LABELS.CSV"
    table.write_text(
        "id,label,annotator,time\nc0,yes,a,2026-01-01T12:00:00+02:00\n"
        "c0,no,b,2026-01-01T11:00:00Z\nc1,no,b,2026-01-01 09:00\n"
    )
    import_labels(table, tmp_path / "labels")
    labels = read_labels(tmp_path / "labels")
    assert merge_votes(labels, "single")["c0"] == "reject"
    assert [x.time for x in labels] == [
        f"2026-01-01T{hour}:00:00.000000+00:00" for hour in ("10", "09", "11")
    ]


def test_label_studio_words_are_read_by_the_name_of_their_question(tmp_path):
    def annotate(**said):
        return [{"from_name": name, "value": {"choices": [word]}} for name, word in said.items()]

    tasks = [
        {"data": {"id": "c0"}, "annotations": [
            {"result": annotate(reason="unsure", decision="reject"), "completed_by": 7}]},
        {"data": {"id": "c1"}, "annotations": [{"result": [], "completed_by": 7}]},
    ]  # fmt: skip
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(tasks))
    import_labels(path, tmp_path / "labels")
    found = {x.id: (x.label, x.reason) for x in read_labels(tmp_path / "labels")}
    assert found == {"c0": ("reject", "unsure"), "c1": ("skip", None)}
    small = [
        {
            "id": 1,
            "candidate": "c0",
            "decision": "accept",
            "annotator": 3,
            "lead_time": 1.5,
            "created_at": "2026-01-01T12:00:00.5Z",
        }
    ]
    path.write_text(json.dumps(small))
    import_labels(path, tmp_path / "min")
    (label,) = read_labels(tmp_path / "min")
    assert (label.id, label.label, label.annotator, label.ms) == ("c0", "accept", "3", 1500)


EXCEL = """ID;Label;Reason;Note
c0;1,0;;ümlaut
c1;"0,25";blur;"=1+2, no more"
c2.png;;;
"""
STUDIO = """image,id,decision,reason,annotator,annotation_id,created_at,updated_at,lead_time
/data/upload/1/0a1b2c3d-c0.png,11,accept,,a@x.org,1,2026-01-01T12:00:00.5Z,2026-01-02T12:00:00Z,2.5
/data/local-files/?d=set/c1.png,12,reject,"{""choices"": [""blur"", ""shadow left""]}",a@x.org,2,,,1
/data/upload/1/0a1b2c3d-c2.png,13,,,b@x.org,3,,,1
"""
ONE_QUESTION = """candidate,choice,annotator,id,lead_time
c0,accept,a@x.org,1,2.5
c1,"{""choices"": [""reject"", ""blur"", ""shadow left""]}",a@x.org,2,1
c2,,b@x.org,3,1
"""
PRODIGY = [
    {"image": "data:image/png;base64,AAAA", "path": "set/GT/c0.png", "answer": "accept",
     "_task_hash": 1, "_annotator_id": "run-anna", "_timestamp": 1767268800},
    {"id": "c1", "answer": "accept", "_task_hash": 2, "accept": ["reject", "blur", "shadow left"],
     "options": [{"id": "reject", "text": "Reject"}]},
    {"image": "c2.png", "answer": "ignore", "_task_hash": 3},
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("excel.csv", EXCEL, "utf-8"),
        ("excel.csv", EXCEL, "utf-8-sig"),
        ("excel.csv", EXCEL, "utf-16"),
        ("excel.csv", f"sep=;\r\n{EXCEL}", "utf-8-sig"),
        ("unicode.TSV", EXCEL.replace(";", "\t"), "utf-16-le"),
        ("studio.csv", STUDIO, "utf-8"),
        ("question.csv", ONE_QUESTION, "utf-8"),
        ("prodigy.jsonl", "\n".join(map(json.dumps, PRODIGY)), "utf-8"),
        ("prodigy.jsonl", "\r\n".join(map(json.dumps, PRODIGY)) + "\r\n", "utf-16"),
        ("prodigy.json", json.dumps(PRODIGY), "utf-16"),
    ],
)
def test_label_files_that_people_have(candidates, tmp_path, name, text, encoding):
    (tmp_path / name).write_bytes(text.encode(encoding))
    triplets = read_triplets(candidates)
    counts = import_labels(tmp_path / name, tmp_path / "labels", "me", triplets=triplets)
    assert counts == {"read": 3, "written": 3, "unknown": 0}
    found = {x.id: x for x in read_labels(tmp_path / "labels")}
    assert {k: x.label for k, x in found.items()} == {"c0": "accept", "c1": "reject", "c2": "skip"}
    assert split_stale(found.values(), triplets)[1] == []
    if name.startswith(("excel", "unicode")):
        assert (found["c0"].note, found["c1"].note) == ("ümlaut", "=1+2, no more")
        assert [x.reason for x in found.values()] == [None, "blur", None]
    else:
        assert found["c1"].reason == "blur, shadow left"
    if name == "studio.csv":
        assert [x.annotator for x in found.values()] == ["a@x.org", "a@x.org", "b@x.org"]
        assert (found["c0"].time, found["c0"].ms) == ("2026-01-01T12:00:00.500000+00:00", 2500)
    if name.startswith("prodigy"):
        assert (found["c0"].annotator, found["c1"].annotator) == ("run-anna", "me")
        assert found["c0"].time == "2026-01-01T12:00:00.000000+00:00"


def test_prodigy_confirms_what_a_label_says(tmp_path):
    lines = [
        {"id": "c0", "label": "bad", "answer": "accept", "_task_hash": 1},
        {"id": "c1", "label": "bad", "answer": "reject", "_task_hash": 2},
        {"id": "c2", "label": "GOOD", "answer": "reject", "_task_hash": 3},
        {"id": "c3", "label": "REMOVED", "answer": "accept", "_task_hash": 4},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    import_labels(tmp_path / "p.jsonl", tmp_path / "labels")
    said = [x.label for x in read_labels(tmp_path / "labels")]
    assert said == ["reject", "accept", "reject", "accept"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.csv", b"name;verdict\nc0;yes\n", ["columns are name, verdict", "id", "label"]),
        ("a.csv", b"annotation_id,image,verdict\n1,c0.png,yes\n", ["image, verdict", "decision"]),
        ("a.csv", "id,label,note\nc0,yes,Gr\u00fcn\n".encode("cp1252"), ["byte 23 ", "UTF-8"]),
        ("a.json", b'[{"image": "c0.png", "verdict": "yes"}]', ["image, verdict", "decision"]),
        ("a.json", b'[{"label": "yes", "name": "c0"}]', ["label, name", "candidate"]),
        ("a.json", b"[" * 100_000, ["nested"]),
        ("a.jsonl", b'{"id": "c0", "label": "yes"}\n{"id": "c1", "la', ["record 2"]),
        ("a.csv", b'id,label\nc0,yes\n"' + b"x" * 200_000, ["no table"]),
        ("a.xlsx", b"PK\x03\x04", ["CSV"]),
    ],
)
def test_a_file_that_cannot_be_read_is_told_by_what_it_holds(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(LabelError) as caught:
        import_labels(tmp_path / name, tmp_path / "labels")
    message = str(caught.value)
    assert name in message and all(word in message for word in words), message
    assert len(message) < 500 + len(str(tmp_path))  # not the file's bytes
    assert read_labels(tmp_path / "labels") == []


def test_a_record_with_an_id_is_not_known_by_its_source(candidates, tmp_path):
    """`c0-s1` is another removal of the image that `c0` is one of."""
    rows = [{"id": "c0-s1", "source": "a/c0.png", "label": "no"}, {"id": "c1", "label": "yes"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    triplets = read_triplets(candidates)
    counts = import_labels(tmp_path / "a.json", tmp_path / "labels", triplets=triplets)
    assert counts == {"read": 2, "written": 1, "unknown": 1}
    assert [x.id for x in read_labels(tmp_path / "labels")] == ["c1"]


def test_what_an_import_reports_is_what_a_reader_finds(tmp_path):
    def bring(**more):
        row = {"id": "c1", "label": "no", "annotator": "ben"} | more
        path = tmp_path / "labels.json"
        path.write_text(json.dumps([{"id": "c0", "label": "yes"}, row]))
        return import_labels(path, tmp_path / "labels", "anna")["written"]

    for odd in ({"content": 5}, {"order": 3}, {"ms": 1e400}, {"ms": "soon"}, {"time": 5}):
        with pytest.raises(LabelError, match=r"label 2 in the file \(c1\)"):
            bring(**odd)
        assert not (tmp_path / "labels").exists()
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "labels-ben.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LabelError, match="symbolic link"):
        bring()
    assert standing(tmp_path / "labels") == []  # nor is anna's written
    (tmp_path / "labels" / "labels-ben.jsonl").unlink()
    assert bring(note=2024, reason=["blur", 7]) == 2
    anna, ben = read_labels(tmp_path / "labels")
    assert (anna.id, ben.note, ben.reason) == ("c0", "2024", "blur, 7")


def test_no_cell_of_an_exported_table_is_a_formula(tmp_path):
    texts = ["=1+2", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''=1", "'quoted'", "-"]
    labels = [vote(f"={n}", "reject", note=x, reason=x, ms=-5) for n, x in enumerate(texts)]
    path = export_labels(labels, tmp_path / "labels.csv")
    with open(path, newline="", encoding="utf-8") as stream:
        cells = [cell for line in csv.reader(stream) for cell in line]
    assert [x for x in cells if x[:1] in tuple("=+-@\t\r")] == ["-5"] * len(texts)  # a number
    assert "'quoted'" in cells and "'=1+2" in cells and "'=0" in cells
    import_labels(path, tmp_path / "labels")
    found = read_labels(tmp_path / "labels")
    assert [(x.id, x.note, x.reason) for x in found] == [(x.id, x.note, x.reason) for x in labels]


def test_import_again_after_the_candidates_were_made_anew(candidates, tmp_path):
    (tmp_path / "labels.csv").write_text("id,label\nc0,yes\nc1,no\n")
    triplets = read_triplets(candidates)

    def bring():
        return import_labels(tmp_path / "labels.csv", tmp_path / "labels", triplets=triplets)

    assert bring()["written"] == 2 and bring()["written"] == 0
    triplets[0].gt.write_bytes(triplets[3].gt.read_bytes())
    assert bring()["written"] == 1
    current, stale = split_stale(read_labels(tmp_path / "labels"), triplets)
    assert sorted(x.id for x in current) == ["c0", "c1"] and not stale


def test_import_does_not_bring_back_what_was_undone(tmp_path):
    (tmp_path / "labels.csv").write_text("id,label,annotator\nc0,yes,anna\nc1,yes,anna\n")
    import_labels(tmp_path / "labels.csv", tmp_path / "labels")
    log = LabelLog(tmp_path / "labels", "anna")
    log.undo(next(x for x in log.read() if x.id == "c0"))
    log.append("c1", "reject")
    import_labels(tmp_path / "labels.csv", tmp_path / "labels")
    assert standing(tmp_path / "labels") == [("anna", "c1", "reject")]


def test_import_of_labels_for_other_candidates_is_an_error(candidates, tmp_path):
    (tmp_path / "labels.csv").write_text("id,label\nx0,yes\n")
    with pytest.raises(LabelError, match="none of the 1 labels .* belongs to these candidates"):
        import_labels(tmp_path / "labels.csv", tmp_path / "l", triplets=read_triplets(candidates))


def test_time_tells_the_order_of_labels(tmp_path):
    log = LabelLog(tmp_path, "anna")
    for place in range(100):
        log.append(f"c{place}", "accept")
    times = [label.time for label in log.read()]
    assert times == sorted(set(times)) and len(times) == 100


def test_times_of_equal_labels_do_not_matter_for_reading(tmp_path):
    log = LabelLog(tmp_path, "anna")
    label = log.append("c0", "accept")
    assert log.read() == [label] == [replace(label)]


def test_figures_name_who_is_no_person(candidates):
    labels = [vote("c0", "accept"), vote("c1", "reject", reason="blur")]
    labels += [vote("c2", "skip", "robot", simulated=True)]
    figure = plots.plot_label_summary(labels)
    assert [x.get_text() for x in figure.axes[0].get_yticklabels()] == ["anna", "robot (simulated)"]
    assert [x.get_text() for x in figure.axes[0].get_legend().get_texts()][0] == "accept"
    shown = plot_candidates(read_triplets(candidates), captions=list("abcd"), pairs=3)
    assert [x.get_text() for x in shown.axes[0].texts if x.get_text() in "abcd"].count("d") == 1
    assert plot_candidates([]).texts[0].get_text() == "there are none"
