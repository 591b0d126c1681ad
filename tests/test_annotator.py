"""The kernel's side of the widget: what is saved before the browser hears of it, resume, undo."""

import gc
import io
import json
import os
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
from PIL import ExifTags, Image

from rorem_lib.data.triplets import load_images, read_triplets
from rorem_lib.data.writer import TripletWriter
from rorem_lib.labels import log as label_log
from rorem_lib.labels import widget as annotator
from rorem_lib.labels.keys import KEYS
from rorem_lib.labels.log import LabelError, LabelLog, read_labels
from rorem_lib.labels.pictures import encode_item, trace_mask
from rorem_lib.labels.queue import QueueItem
from rorem_lib.labels.votes import merge_votes
from rorem_lib.labels.widget import Annotator, open_annotator

pytestmark = pytest.mark.usefixtures("quick_widgets")


def write_candidates(folder, *, count=6, side=32):
    random = np.random.default_rng(0)
    mask = np.zeros((side, side), np.uint8)
    mask[side // 4 : side // 2, side // 4 : side // 2 + 3] = 255
    with TripletWriter(folder) as writer:
        for place in range(count):
            source, removal = random.integers(0, 255, (2, side, side, 3), dtype=np.uint8)
            writer.add(id=f"c{place}", source=source, mask=mask, gt=removal, score=place / 9)
    return read_triplets(folder)


@pytest.fixture
def triplets(tmp_path):
    return write_candidates(tmp_path / "candidates")


class Session:
    """A widget whose browser is this test."""

    def __init__(self, folder, triplets, *, queue=None, widget=None, **options):
        queue = queue or [QueueItem(triplet.id, "random") for triplet in triplets]
        self.log = LabelLog(folder, "anna")
        self.widget = widget or Annotator(self.log, queue, triplets, **options)
        self.sent = []
        self.logged = []  # the log's lines at the moment each message left
        self.widget.send = self._take
        self.state = self.ask(kind="ready")

    def _take(self, content, buffers=None):
        self.sent.append((content, buffers))
        lines = self.log.path.read_text().splitlines() if self.log.path.is_file() else []
        self.logged.append([json.loads(line) for line in lines])

    def ask(self, **content):
        self.widget.receive(content)
        return self.sent[-1][0]

    def press(self, label, **values):
        """A decision about what the last state showed."""
        shown = {"place": self.state["place"], "id": self.state["id"], "ms": 500}
        answer = self.ask(kind="label", label=label, **{**shown, **values})
        self.state = answer if answer["kind"] == "state" else self.state
        return answer

    def undo(self):
        self.state = self.ask(kind="undo", decided=self.state["decided"])
        return self.state

    def fetch(self, places):
        """The `item` messages of some places."""
        before = len(self.sent)
        self.widget.receive({"kind": "want", "places": places})
        while len(self.sent) < before + len(places):
            time.sleep(0.01)
        return sorted(self.sent[before:], key=lambda sent: sent[0]["place"])


@pytest.fixture
def session(tmp_path, triplets):
    return Session(tmp_path / "labels", triplets)


def decisions(session):
    return [(x.id, x.label) for x in session.log.read()]


def test_label_is_in_the_log_before_the_next_picture_is_announced(session):
    session.fetch([0])
    session.press("reject", reason="blur", note="the left edge")
    event = session.logged[-1][-1]
    assert event["id"] == "c0" and event["reason"] == "blur" and event["note"] == "the left edge"
    assert event["ms"] == 500 and event["simulated"] is False and len(event["content"]) == 16
    assert session.state["place"] == 1 and session.state["id"] == "c1"
    assert session.state["upcoming"] == [2, 3, 4, 5]
    assert session.state["last"] == {"label": "reject", "reason": "blur"}


def test_only_the_picture_on_show_is_labelled(session):
    assert "already" not in session.press("accept")["notice"]
    for place, item_id in ((0, "c0"), (1, "c2"), (3, "c3"), (99, "c9")):
        answer = session.ask(kind="label", label="reject", place=place, id=item_id, ms=1)
        assert answer["kind"] == "state" and answer["place"] == 1
    assert decisions(session) == [("c0", "accept")]
    answer = session.ask(kind="label", label="reject", place=0, id="c0", ms=1)
    assert "already has a label (accept)" in answer["notice"]


def test_collecting_garbage_passes_over_what_is_older_than_the_widget(
    tmp_path, triplets, monkeypatch
):
    monkeypatch.setattr(annotator, "gc", gc)

    class Node:
        pass

    def make_ring():
        node = Node()
        node.itself = node
        return node

    old = make_ring()
    widget = Session(tmp_path / "labels", triplets).widget
    new = make_ring()
    alive = weakref.ref(old), weakref.ref(new)
    del old, new
    gc.collect()
    assert alive[0]() and not alive[1]()
    widget.close()
    gc.collect()
    assert not alive[0]()


def test_undo_goes_back_to_the_first_and_no_further(session):
    for label in ("accept", "reject", "skip"):
        session.press(label)
    for place in (2, 1, 0):
        session.undo()
        assert session.state["place"] == place
    assert session.state["notice"] == "taken back: accept"
    assert session.undo()["notice"] == "there is nothing to undo"
    assert decisions(session) == [] and len(session.logged[-1]) == 6
    session.press("reject")
    assert decisions(session) == [("c0", "reject")] and session.state["place"] == 1


def test_undo_brings_the_note_back_and_counts_once_if_pressed_twice(session):
    session.press("accept")
    session.press("reject", note="the left edge")
    known = session.state["decided"]
    session.undo()
    assert (session.state["id"], session.state["note"]) == ("c1", "the left edge")
    answer = session.ask(kind="undo", decided=known)  # sent while the kernel was busy
    assert answer["id"] == "c1" and decisions(session) == [("c0", "accept")]
    session.press("accept")
    assert session.state["note"] == ""


def test_reopening_goes_on_at_the_first_open_picture(session, tmp_path, triplets):
    for label in ("accept", "reject", "skip"):
        session.press(label)
    again = Session(tmp_path / "labels", triplets)
    assert again.state["place"] == 3 and again.state["done"] == 2 and again.state["skipped"] == 1
    again.undo()  # also what an earlier session decided
    assert again.state["id"] == "c2"
    triplets[0].gt.write_bytes(triplets[5].gt.read_bytes())  # c0 was generated anew
    third = Session(tmp_path / "labels", triplets)
    assert third.state["id"] == "c2"  # labels without a content hash are taken as they are


def test_label_of_a_removal_that_changed_is_asked_for_again(session, tmp_path, triplets):
    session.fetch([0, 1])
    session.press("accept")
    session.press("accept")
    triplets[0].gt.write_bytes(triplets[5].gt.read_bytes())
    assert Session(tmp_path / "labels", triplets).state["id"] == "c0"


def test_what_cannot_be_saved_does_not_move_the_picture(session, monkeypatch):
    session.press("accept")
    really_open = os.open
    monkeypatch.setattr(label_log.os, "open", lambda *_: really_open("/dev/full", os.O_RDWR))
    answer = session.press("reject")
    assert answer["kind"] == "failed" and "No space left" in answer["message"]
    assert session.widget.measure_progress()["place"] == 1
    monkeypatch.undo()
    aside = session.log.path.rename(session.log.path.with_suffix(".aside"))
    session.log.path.symlink_to(aside)
    answer = session.press("reject")
    assert answer["kind"] == "failed" and "symbolic link" in answer["message"]
    session.log.path.unlink()
    aside.rename(session.log.path)
    assert session.press("reject")["place"] == 2
    assert decisions(session) == [("c0", "accept"), ("c1", "reject")]


def test_silent_repeat_is_asked_and_marked_but_not_shown(tmp_path, triplets):
    queue = [QueueItem("c0", "audit"), QueueItem("c1", "random"), QueueItem("c0", "audit", True)]
    session = Session(tmp_path / "labels", triplets, queue=queue)
    assert session.state["wanted"] == 2
    for label in ("accept", "accept", "reject"):
        session.press(label)
    assert session.state["place"] is None and session.state["done"] == 2
    labels = read_labels(tmp_path / "labels")
    assert [(x.id, x.label, x.repeat, x.order) for x in labels] == [
        ("c0", "accept", False, "audit"),
        ("c1", "accept", False, "random"),
        ("c0", "reject", True, "audit"),
    ]
    assert Session(tmp_path / "labels", triplets, queue=queue).state["place"] is None
    session.undo()
    assert session.state["place"] == 2 and decisions(session) == [
        ("c0", "accept"),
        ("c1", "accept"),
    ]
    shown = json.dumps([content for content, _ in session.sent]) + json.dumps(
        session.widget.get_state(), default=str
    )
    assert '"repeat"' not in shown and '"score"' not in shown and "audit" not in shown


def test_an_adjudicator_hears_the_votes_after_the_decision(tmp_path, triplets):
    for name, answers in (("ben", "aax"), ("cleo", "axa")):
        for item, answer in zip(("c0", "c1", "c2"), answers):
            label = "accept" if answer == "a" else "reject"
            LabelLog(tmp_path / "labels", name).append(item, label)
    widget = open_annotator(tmp_path / "labels", triplets, "anna", adjudicate=True)
    session = Session(tmp_path / "labels", triplets, widget=widget)
    assert session.state["id"] == "c1" and session.state["wanted"] == 2
    session.fetch([0, 1])
    told = json.dumps([content for content, _ in session.sent]) + json.dumps(
        widget.get_state(), default=str
    )
    assert "ben" not in told and "cleo" not in told, "the votes are hidden until it is decided"
    session.press("reject", reason="blur")
    assert session.state["notice"] == "saved: blur; others said: ben accept, cleo reject"
    session.press("accept")
    assert session.state["place"] is None
    labels = read_labels(tmp_path / "labels")
    assert merge_votes(labels) == {"c0": "accept", "c1": "reject", "c2": "accept"}


def test_a_skip_of_before_is_no_verdict(tmp_path, triplets):
    for name, answer in (("ben", "accept"), ("cleo", "reject"), ("anna", "skip")):
        LabelLog(tmp_path / "labels", name).append("c1", answer)
    widget = open_annotator(tmp_path / "labels", triplets, "anna", adjudicate=True)
    session = Session(tmp_path / "labels", triplets, widget=widget)
    assert session.state["id"] == "c1" and session.undo()["notice"] == "there is nothing to undo"
    session.press("accept")
    assert session.state["place"] is None
    assert merge_votes(read_labels(tmp_path / "labels")) == {"c1": "accept"}


def test_a_log_that_vanished_is_told(session, tmp_path):
    session.press("accept")
    session.press("accept")
    (tmp_path / "labels").rename(tmp_path / "aside")  # as if its disk was unmounted
    (tmp_path / "labels").mkdir()
    for answer in (session.press("accept"), session.ask(kind="undo", decided=2)):
        assert answer["kind"] == "failed" and "is gone, or was cut" in answer["message"]
    (tmp_path / "labels").rmdir()
    (tmp_path / "aside").rename(tmp_path / "labels")
    assert session.press("reject")["place"] == 3 and len(decisions(session)) == 3


def test_a_name_at_work_in_two_places_is_noticed(tmp_path, triplets):
    first, second = (Session(tmp_path / "labels", triplets) for _ in range(2))
    first.press("accept")
    first.press("reject")
    answer = second.press("reject")  # c0, which the first has accepted
    assert answer["notice"].startswith("not saved: another notebook")
    assert answer["id"] == "c2" and decisions(second) == [("c0", "accept"), ("c1", "reject")]
    second.press("skip")
    second.undo()
    answer = first.undo()  # before it knows of what the second has done
    assert answer["notice"].startswith("nothing taken back: another notebook")
    assert decisions(first) == decisions(second) == [("c0", "accept"), ("c1", "reject")]
    assert first.undo()["id"] == "c1"


def test_agreement_with_others_is_told_from_time_to_time(tmp_path, triplets, monkeypatch):
    monkeypatch.setattr(annotator, "LOOK_EVERY", 3)
    for item, label in (("c0", "accept"), ("c1", "reject"), ("c5", "accept")):
        LabelLog(tmp_path / "labels", "ben").append(item, label)
    LabelLog(tmp_path / "labels", "program").append("c0", "reject", simulated=True)
    LabelLog(tmp_path / "labels", "old").append("c1", "accept", content="of another removal")
    session = Session(tmp_path / "labels", triplets)
    session.widget._pool = Now()
    for label in ("accept", "reject"):
        session.press(label)
        assert session.state["agreement"] is None, "it would tell what the other said"
    session.press("skip")
    assert session.state["agreement"] == {"alpha": 1.0, "n": 2}
    session.widget.close()


def test_what_others_have_done_meanwhile_is_not_asked_for(tmp_path, triplets, monkeypatch):
    monkeypatch.setattr(annotator, "LOOK_EVERY", 2)
    folder, ben = tmp_path / "labels", LabelLog(tmp_path / "labels", "ben")
    given = {"overlap_share": 0.2, "seed": 1}  # one of six
    widget = open_annotator(folder, triplets, "anna", wanted=5, **given)
    (shared,) = (item.id for item in widget._queue if item.shared)
    session = Session(folder, triplets, widget=widget)
    widget._pool = Now()
    theirs = [item.id for item in widget._queue[3:] if not item.shared][:2]
    for item_id in (*theirs, shared):
        ben.append(item_id, "accept")
    session.press("accept")
    assert (session.state["done"], session.state["own"]) == (1, 1), "not looked at after each"
    session.press("accept")
    assert (session.state["own"], session.state["wanted"]) == (2, 5)
    assert session.state["done"] == len({*theirs, shared, *(x for x, _ in decisions(session))})
    while session.state["place"] is not None:
        session.press("accept")
    assert {x for x, _ in decisions(session)} == {t.id for t in triplets} - set(theirs)
    again = Session(folder, triplets, widget=open_annotator(folder, triplets, "cleo", **given))
    assert [item.id for item in again.widget._queue] == [shared]
    assert (again.state["done"], again.state["own"], again.state["wanted"]) == (6, 0, 6)


def test_labels_of_removals_that_are_gone_take_nothing_from_the_queue(tmp_path, triplets):
    ben = LabelLog(tmp_path / "labels", "ben")
    for triplet in triplets:
        ben.append(triplet.id, "accept", content="of another removal")
    widget = open_annotator(tmp_path / "labels", triplets, "anna")
    assert widget.measure_progress()["place"] == 0 and len(widget._queue) == 6


class Now:
    """Does in this thread what a pool would do in another."""

    def submit(self, work, *given):
        work(*given)

    def shutdown(self, **given):
        pass


def test_without_a_name_it_is_asked_for(tmp_path, triplets):
    box = open_annotator(
        tmp_path / "labels",
        triplets,
        order="stratified",
        wanted=3,
        strata={t.id: "all" for t in triplets},
    )
    row, trouble = box.children
    name, start = row.children
    start.click()
    assert "Enter your name" in trouble.value
    name.value = "../anna"
    start.click()
    assert "cannot name a label file" in trouble.value
    assert not list((tmp_path / "labels").glob("*")) and len(box.children) == 2
    name.value = " anna "
    name._handle_custom_msg({"event": "submit"}, [])  # Enter in the field
    (widget,) = box.children
    assert widget.settings["focus"] is True
    assert widget.settings["annotator"] == "anna"
    assert widget.measure_progress()["wanted"] == 3


def test_progress(tmp_path, triplets):
    session = Session(tmp_path / "labels", triplets, wanted=4, prefetch=2)
    assert session.state["upcoming"] == [1, 2, 3] and session.state["rate"] is None
    session.press("accept", ms=1000)
    session.press("reject", ms=2000)
    session.press("skip", ms=600_000_000)  # went for lunch: counts as a minute
    assert session.state["rate"] == pytest.approx(3 / 63 * 60)
    assert session.state["seconds_left"] == pytest.approx(2 * 21)
    assert session.state["accepted"] == session.state["rejected"] == session.state["skipped"] == 1
    assert Session(tmp_path / "labels", triplets, wanted=99).state["wanted"] == 6


def test_items_are_sent_when_asked_for_and_a_broken_file_stops_nothing(session, triplets):
    triplets[1].gt.write_bytes(b"no image")
    (good, pictures), (bad, nothing) = session.fetch([0, 1])
    assert good["id"] == "c0" and good["size"] == [32, 32] and len(pictures) == 2
    assert triplets[1].gt.name in bad["error"] and nothing == []
    session.press("accept")
    assert session.press("skip")["place"] == 2
    session.widget.close()


def test_a_decision_brings_its_answer_and_then_the_picture_it_asked_for(session, monkeypatch):
    for place in (3, 4):
        answer = session.ask(
            kind="label", label="accept", place=place - 3, id=f"c{place - 3}", want=[place]
        )
        while answer["kind"] != "item":
            time.sleep(0.01)
            answer = session.sent[-1][0]
        assert [x["kind"] for x, _ in session.sent[-2:]] == ["state", "item"]
        assert answer["id"] == f"c{place}" and len(session.sent[-1][1]) == 2

    def fail(*_, **__):
        raise LabelError("no space")

    monkeypatch.setattr(session.log, "append", fail)
    answer = session.ask(kind="label", label="accept", place=2, id="c2", want=[5])
    while answer["kind"] != "item":
        time.sleep(0.01)
        answer = session.sent[-1][0]
    assert session.sent[-2][0]["kind"] == "failed" and answer["id"] == "c5"


def test_the_picture_after_those_asked_for_is_made_before_the_decision(tmp_path, triplets):
    session = Session(tmp_path / "labels", triplets, prefetch=2)
    place, made = session.widget._ahead
    made.result(timeout=10)
    assert place == session.state["upcoming"][-1] == 3
    before = len(session.sent)
    session.widget.receive(
        {"kind": "label", "label": "accept", "place": 0, "id": "c0", "want": [3]}
    )
    kinds = [x["kind"] for x, _ in session.sent[before:]]  # at once: nobody waited for it
    assert kinds == ["state", "item"] and session.sent[-1] == made.result()
    before, place = len(session.sent), session.sent[before][0]["upcoming"][-1]
    session.widget._ahead[1].result(timeout=10)
    session.widget.receive(
        {"kind": "label", "label": "accept", "place": 1, "id": "c1", "want": [place], "calm": True}
    )
    assert session.sent[before:] == [(session.sent[-1][0], None)]  # the answer alone: first of all
    while len(session.sent) < before + 2:
        time.sleep(0.01)
    assert session.sent[-1][0]["kind"] == "item" and session.sent[-1][0]["place"] == place == 4


def test_small_pictures_arrive_exactly(triplets):
    info, pictures = encode_item(triplets[0])
    original = load_images(triplets[0])
    assert info["types"] == ["image/png"] * 2 and "crop" not in info
    for data, part in zip(pictures, ("source", "gt"), strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), original[part])
    assert info["box"] == [8, 8, 19, 16]


def test_what_a_browser_would_show_otherwise_comes_as_training_reads_it(triplets):
    picture = Image.open(triplets[0].source)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/'
        b'22-rdf-syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        b'tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    camera = Image.Exif()
    camera[ExifTags.Base.Make] = "Eastman"
    for options, plain in (
        ({}, True),
        ({"exif": camera}, True),
        ({"exif": turned}, False),
        ({"xmp": xmp}, False),
        ({"transparency": (1, 2, 3)}, False),
    ):
        kind = "PNG" if "transparency" in options else "JPEG"
        picture.save(triplets[0].source, kind, **options)
        info, pictures = encode_item(triplets[0])
        assert (pictures[0] == triplets[0].source.read_bytes()) is plain, options
        if not plain:
            shown = np.asarray(Image.open(io.BytesIO(pictures[0])))
            assert np.array_equal(shown, load_images(triplets[0])["source"]), options


def test_large_pictures_come_smaller_with_the_mask_at_full_resolution(tmp_path):
    (triplet,) = write_candidates(tmp_path, count=1, side=1200)
    info, pictures = encode_item(triplet, view_size=400)
    images = [Image.open(io.BytesIO(data)) for data in pictures]
    assert info["types"] == ["image/jpeg"] * 4 and images[1].size == (400, 400)
    x0, y0, x1, y1 = info["crop"]
    assert images[2].size == images[3].size == (x1 - x0, y1 - y0)
    assert x0 < 300 and x1 > 603 and info["size"] == [1200, 1200]
    longest = max(info["box"][2] - info["box"][0], info["box"][3] - info["box"][1])
    for low, high, start, end in ((x0, x1, 0, 2), (y0, y1, 1, 3)):  # all that "zoom" shows
        assert low <= max(0, info["box"][start] - 0.3 * longest - 2)
        assert high >= min(1200, info["box"][end] + 0.3 * longest + 2)
    crop = load_images(triplet)["gt"][y0:y1, x0:x1].astype(float)
    assert np.abs(np.asarray(images[3]) - crop).mean() < 20 < np.abs(127 - crop).mean()


def test_outline_goes_round_the_mask():
    mask = np.zeros((8, 10), bool)
    mask[2:5, 3:7] = True
    mask[7, 9] = True
    outlines = trace_mask(mask)
    assert len(outlines) == 2
    (small, large) = sorted((np.reshape(x, (-1, 2)) for x in outlines), key=np.ptp)
    assert large.min(axis=0).tolist() == [3, 2] and large.max(axis=0).tolist() == [7, 5]
    assert small.min(axis=0).tolist() == [9, 7] and small.max(axis=0).tolist() == [10, 8]
    assert trace_mask(np.zeros((4, 4), bool)) == []
    assert np.reshape(trace_mask(np.ones((4, 6), bool))[0], (-1, 2)).max(axis=0).tolist() == [6, 4]


def test_keys_can_be_changed_but_not_doubled(tmp_path, triplets):
    session = Session(tmp_path / "labels", triplets, keys={"accept": "J"})
    assert session.widget.settings["keys"] == {**KEYS, "accept": "j"}
    with pytest.raises(ValueError, match="no such action: approve"):
        Session(tmp_path / "labels", triplets, keys={"approve": "j"})
    for key in ("space", "", "ctrl+j", 5, None):
        with pytest.raises(ValueError, match="cannot be the key for accept"):
            Session(tmp_path / "labels", triplets, keys={"accept": key})
    Session(tmp_path / "labels", triplets, keys={"accept": "ArrowLeft", "skip": "+"})
    with pytest.raises(ValueError, match="-2 is no number of labels"):
        Session(tmp_path / "labels", triplets, wanted=-2)
    with pytest.raises(ValueError, match="one key, two actions: 'x'"):
        Session(tmp_path / "labels", triplets, keys={"accept": "x"})


def test_queue_without_its_candidates_is_an_error(tmp_path, triplets):
    with pytest.raises(ValueError, match="1 queued ids are no candidates .first: c9"):
        Session(tmp_path / "labels", triplets, queue=[QueueItem("c9", "random")])


def test_empty_queue_says_so(tmp_path, triplets):
    widget = Annotator(LabelLog(tmp_path, "anna"), [], triplets)
    progress = widget.measure_progress()
    assert progress["place"] is None and progress["wanted"] == 0 and progress["upcoming"] == []


@pytest.mark.slow
def test_labels_import_no_widgets():
    command = "import sys, rorem_lib.labels.votes; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert "rorem_lib.labels.votes" in loaded.stdout.split()
    assert not {"anywidget", "ipywidgets", "IPython", "torch"} & set(loaded.stdout.split())
