"""The annotation widget: removals judged by keyboard in JupyterLab and VS Code notebooks.

It shows what RORem's annotators saw, source and mask beside the removal (RORem, sec. 3.2), and
keeps nothing itself: each decision goes to the `LabelLog` it was given and the image moves only
after the log has it on the disk. The browser side is `widget.js` and `widget.css`.

Messages from the browser: `ready`, `want` (places), `label` (with the places wanted next: one
message a decision is what JupyterLab has time for; they come with the answer, or soon after it when
the browser is `calm`), `undo` (with the number of decisions it knows of: a second undo that waits
behind the first is none), `nudge` (only to hurry an answer, see widget.js). Messages to the
browser: `state` (where we are, figures), `item` (images of one place), `failed` (what was not
saved).
"""

from __future__ import annotations

import gc
import html
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import anywidget
import ipywidgets as widgets
import traitlets

from rorem_lib.data.triplets import Triplet
from rorem_lib.labels.keys import KEYS, PREFERENCE_KEYS, list_decisions, merge_keys
from rorem_lib.labels.log import (
    DECISIONS,
    PREFERENCES,
    Label,
    LabelError,
    LabelLog,
    hash_content,
    read_labels,
    split_stale,
)
from rorem_lib.labels.pictures import encode_item
from rorem_lib.labels.queue import QueueItem, order_items
from rorem_lib.labels.votes import ADJUDICATION, compute_agreement, count_wanted, list_adjudication

STYLES = (
    Path(__file__).parents[1] / "drawing" / "common.css",
    Path(__file__).with_name("widget.css"),
)
logger = logging.getLogger(__name__)

# A pause longer than this counts as this long in the rate.
PAUSE_MS = 60_000
RATE_WINDOW = 50
# Decisions between two looks at others' labels. After each one it would tell what others had said.
LOOK_EVERY = 25
# Seconds after an answer before images are made or sent that it would have to wait for: until it
# is on screen, and, of an annotator whose next key comes by then, until it has left.
SOON, AT_ONCE = 0.03, 0.003
ELSEWHERE = "another notebook has labelled under this name, and its labels are loaded now"


class Annotator(anywidget.AnyWidget):
    """Label the candidates of a queue by keyboard; reopening goes on at the first open item.

    Args:
        log: where decisions go; it decides what "saved" means.
        queue: the annotator's places, as `queue.order_items` returns them.
        triplets: the candidates (GT is the removal); must cover the queue.
        wanted: number of decisions aimed at; 0 is the whole queue.
        keys: action -> key, replaces single ones of `keys.KEYS`.
        prefetch: how many coming places the browser holds decoded.
        view_size: longest side in pixels of what the browser gets; a larger image's mask box
            comes at full resolution besides.
        divided: annotators share the work: what others have labelled meanwhile is not asked for,
            unless its place is `shared`, and counts as done.
        votes: id -> what others said of it, in words: told once it is decided, for adjudication.
        rivals: id -> the file of a second removal: the question is then which of the two, the
            candidate's on the left or the rival on the right, is better.

    Raises:
        ValueError: a place without its candidate, an unknown action, no key or one given twice, a
            negative `wanted`.
    """

    _esm = Path(__file__).with_name("widget.js")
    _css = "".join(path.read_text(encoding="utf-8") for path in STYLES)
    settings = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        log: LabelLog,
        queue: Sequence[QueueItem],
        triplets: Iterable[Triplet],
        *,
        wanted: int = 0,
        keys: Mapping[str, str] | None = None,
        prefetch: int = 8,
        view_size: int = 1024,
        divided: bool = False,
        votes: Mapping[str, str] | None = None,
        rivals: Mapping[str, Path] | None = None,
    ):
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="annotator")
        self._log = log
        self._queue = list(queue)
        self._triplets = {triplet.id: triplet for triplet in triplets}
        lacking = [item.id for item in self._queue if item.id not in self._triplets]
        if lacking:
            raise ValueError(f"{len(lacking)} queued ids are no candidates (first: {lacking[0]})")
        first_views = sum(not item.repeat for item in self._queue)
        total = len(self._triplets) if divided else first_views
        self._wanted = count_wanted(wanted, total)
        self._divided = divided
        self._theirs: set[str] = set()  # ids that others have decided
        self._taken: set[int] = set()  # places that others have seen to
        self._prefetch, self._view_size = prefetch, view_size
        self._votes, self._adjudicates = votes or {}, votes is not None
        self._rivals = rivals or {}
        self._choices = (*PREFERENCES, "skip") if rivals else DECISIONS
        self._agreement: dict | None = None
        self._unseen = 0  # decisions since others' labels were looked at
        self._note = ""  # of the decision that was just taken back
        self._contents: dict[int, str] = {}
        self._ahead: tuple[int, Future] | None = None  # a place and the message that shows it
        self._decided: dict[int, Label] = {}  # in the order of the decisions: undo takes the last
        self._counts: Counter[str] = Counter()  # of `_decided`, without silent repeats
        self._resume()
        self._look_at_others()
        self._place = self._find_open(0)
        super().__init__(
            settings={
                "keys": merge_keys(keys or {}, PREFERENCE_KEYS if rivals else KEYS),
                "panes": ["source", "left", "right"] if rivals else ["source", "removal"],
                "decisions": list_decisions(bool(rivals)),
                "annotator": log.annotator,
                "prefetch": prefetch,
            }
        )
        self.on_msg(lambda _, content, buffers: self.receive(content))
        # A full garbage collection goes through all that a notebook has imported and loaded, which
        # takes 0.1 s, two keys of a hurried annotator: what is here by now is left out of it.
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    def _resume(self) -> None:
        places = {(item.id, item.repeat): place for place, item in enumerate(self._queue)}
        self._decided.clear()
        labels, stale = split_stale(self._log.read(), self._triplets.values())
        if stale:
            logger.warning("%d labels of removals that are gone do not count", len(stale))
        for label in labels:
            if self._adjudicates and label.order != ADJUDICATION:
                continue  # a skip of before is no verdict
            if (label.id, label.repeat) in places:
                self._decided[places[label.id, label.repeat]] = label
        self._counts = Counter(x.label for x in self._decided.values() if not x.repeat)

    def _find_open(self, start: int) -> int | None:
        count = len(self._queue)
        around = ((start + step) % count for step in range(count))
        return next((place for place in around if self._is_open(place)), None)

    def _is_open(self, place: int) -> bool:
        return place not in self._decided and place not in self._taken

    def __repr__(self) -> str:  # what a notebook shows that is opened without its kernel
        return f"<labels of {self._log.annotator}: run the notebook to go on>"

    def close(self) -> None:
        """Close the widget and its workers.

        Until then garbage is collected only among what is younger than the widget: an older model
        that is deleted may keep its memory, where it refers to itself.
        """
        gc.unfreeze()
        self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()

    # ---------------------------------------------------------------------- messages

    def receive(self, content: dict) -> None:
        """Answer one message of the browser (see the module's head)."""
        kind = content.get("kind")
        if kind == "want":
            self._send_items(content["places"])
        elif kind == "ready":
            self._send_state()
        elif kind in ("label", "undo"):
            try:
                notice = self._label(content) if kind == "label" else self._undo(content)
            except LabelError as error:
                self.send({"kind": "failed", "message": str(error), "place": content.get("place")})
            else:
                self._send_state(notice)
            self._send_items(content.get("want", []), SOON if content.get("calm") else 0)
        if kind in ("ready", "label"):
            self._make_ahead(SOON if content.get("calm") else AT_ONCE)

    def _label(self, content: dict) -> str:
        place = content["place"]
        if place != self._place or content["id"] != self._queue[place].id:
            # The browser is behind, for example with two views open: nothing is written blindly.
            known = self._decided.get(place)
            return f"not saved: this image already has a label ({known.label})" if known else ""
        if self._log.was_continued():
            self._catch_up()
            return f"not saved: {ELSEWHERE}; decide this image again"
        if content["label"] not in self._choices:
            raise LabelError(f"{content['label']!r} is no decision")
        item = self._queue[place]
        label = self._log.append(
            item.id,
            content["label"],
            reason=content.get("reason"),
            note=content.get("note") or None,
            ms=int(content.get("ms", 0)),
            content=self._contents.get(place, ""),
            order=item.order,
            repeat=item.repeat,
        )
        self._decided[place] = label
        self._counts[label.label] += not label.repeat
        self._place, self._note = self._find_open(place), ""
        self._unseen += 1
        if self._unseen == LOOK_EVERY:
            self._unseen = 0
            self._pool.submit(self._look_at_others)
        told = self._votes.get(item.id)
        return f"saved: {label.reason or label.label}; others said: {told}" if told else ""

    def _catch_up(self) -> None:
        """With what this name has labelled in another notebook."""
        self._resume()
        self._place, self._note = self._find_open(0), ""

    def _undo(self, content: dict) -> str:
        if content["decided"] != len(self._decided):
            return ""  # pressed again before the first answer came
        if self._log.was_continued():
            self._catch_up()
            return f"nothing taken back: {ELSEWHERE}"
        if not self._decided:
            return "there is nothing to undo"
        place = next(reversed(self._decided))
        self._log.undo(self._decided[place])
        was = self._decided.pop(place)
        self._counts[was.label] -= not was.repeat
        self._place, self._note = place, was.note or ""
        return f"taken back: {was.label}"

    def _send_state(self, notice: str = "") -> None:
        state = {"kind": "state", "notice": notice, "note": self._note}
        self.send(state | self.measure_progress())

    def _look_at_others(self) -> None:
        """Whose labels are in the folder by now: how far we agree, and what is left to do."""
        if set(self._log.folder.glob("labels-*.jsonl")) <= {self._log.path}:
            return  # alone: nothing to read, over and over
        labels = [label for label in read_labels(self._log.folder) if not label.simulated]
        labels, _ = split_stale(labels, self._triplets.values())
        name = self._log.annotator
        mine = {x.id for x in labels if x.annotator == name}
        shared = compute_agreement(x for x in labels if x.id in mine)
        pairs = [x for x in shared["pairs"] if name in x["annotators"]]
        self._agreement = {"alpha": shared["alpha"], "n": shared["n_shared"]} if pairs else None
        if self._divided:
            new = {x.id for x in labels if x.annotator != name} - mine
            self._taken = {
                place
                for place, item in enumerate(self._queue)
                if item.id in new and not item.shared
            }
            self._theirs = {x.id for x in labels if x.annotator != name and x.label != "skip"}

    def _send_items(self, places: Iterable[int], wait: float = 0) -> None:
        for place in places:
            if self._ahead and self._ahead[0] == place and self._ahead[1].done() and not wait:
                self.send(*self._ahead[1].result())
            else:
                self._pool.submit(lambda place=place: self.send(*self._make_item(place, wait)))

    def _make_ahead(self, wait: float) -> None:
        """Make what the next decision will ask for: it goes with the answer."""
        for place in self._list_upcoming()[self._prefetch :]:
            if self._ahead is None or self._ahead[0] != place:
                self._ahead = place, self._pool.submit(self._make_item, place, wait)

    def _make_item(self, place: int, wait: float = 0) -> tuple[dict, list[bytes]]:
        """The message and the images that the browser needs to show a place."""
        time.sleep(wait)
        item = self._queue[place]
        message = {"kind": "item", "place": place, "id": item.id}
        try:
            triplet = self._triplets[item.id]
            self._contents[place] = hash_content(triplet.gt)
            info, pictures = encode_item(
                triplet, self._rivals.get(item.id), view_size=self._view_size
            )
        except Exception as error:  # a broken file must not stop the other 9,999
            logger.warning("cannot show %s: %s", item.id, error)
            return message | {"error": str(error)}, []
        return message | info, pictures

    def measure_progress(self) -> dict:
        """Where the session stands.

        Returns:
            place and id on show (None when all is done), upcoming places (what the browser holds
            and one more), `done` and `wanted` (with shared work everybody's, `own` one's own part),
            `decided` places (repeats and skips included), counts of decisions, rate a minute,
            seconds left, the last decision, and `agreement` with others (`alpha`, Krippendorff's,
            None where undefined; `n` items), None without others.
        """
        counts = self._counts
        recent = itertools.islice(reversed(self._decided.values()), RATE_WINDOW)
        recent = [min(x.ms, PAUSE_MS) for x in recent if x.ms]
        rate = 60_000 * len(recent) / sum(recent) if recent else None
        own = counts.total() - counts["skip"]
        decided = (self._queue[p].id for p, x in self._decided.items() if x.label != "skip")
        done = own + len(self._theirs.difference(decided)) if self._theirs else own
        left = max(0, self._wanted - done)
        last = next(reversed(self._decided.values()), None)
        place = self._place
        return {
            "place": place,
            "id": None if place is None else self._queue[place].id,
            "upcoming": self._list_upcoming(),
            "done": done,
            "own": own,
            "decided": len(self._decided),
            "wanted": self._wanted,
            "accepted": counts["accept"],
            "rejected": counts["reject"],
            "skipped": counts["skip"],
            "rate": rate,
            "seconds_left": 60 * left / rate if rate else None,
            "last": last and {"label": last.label, "reason": last.reason},
            "agreement": self._agreement,
            "file": str(self._log.path),
        }

    def _list_upcoming(self) -> list[int]:
        """The open places after the one on show: what the browser holds, and one more."""
        start = 0 if self._place is None else self._place + 1
        opened = (place for place in range(start, len(self._queue)) if self._is_open(place))
        return list(itertools.islice(opened, self._prefetch + 1))


def open_annotator(
    folder: str | Path,
    triplets: Iterable[Triplet],
    annotator: str = "",
    *,
    adjudicate: bool = False,
    wanted: int = 0,
    keys: Mapping[str, str] | None = None,
    **ordering,
) -> Annotator | widgets.VBox:
    """The widget of one annotator, behind a field for the name where none is given.

    Args:
        folder: the label folder.
        triplets: the candidates.
        annotator: whose labels these are.
        adjudicate: show only what others disagree about, and their votes after each decision.
        wanted, keys: as for `Annotator`.
        ordering: as for `queue.order_items`.

    Raises:
        LabelError: the name cannot name a file, or the folder cannot be made.
        ValueError: see `Annotator` and `queue.order_items`.
    """
    triplets = list(triplets)
    if not annotator:
        given = {"adjudicate": adjudicate, "wanted": wanted, "keys": keys, **ordering}
        return ask_name(lambda name: open_annotator(folder, triplets, name, **given))
    log = LabelLog(folder, annotator)
    people = [label for label in read_labels(folder) if not label.simulated]
    people, _ = split_stale(people, triplets)
    if adjudicate:
        queue, votes = list_adjudication(people, annotator)
        return Annotator(log, queue, triplets, keys=keys, votes=votes)
    ids = [triplet.id for triplet in triplets]
    queue = order_items(ids, annotator=annotator, labels=people, **ordering)
    return Annotator(log, queue, triplets, wanted=wanted, keys=keys, divided=True)


def ask_name(open_widget: Callable[[str], Annotator]) -> widgets.VBox:
    """A field for a name, in whose place the widget comes that is opened with it."""
    name = widgets.Text(placeholder="such as anna.m", description="Your name")
    start = widgets.Button(description="Start", button_style="primary")
    trouble = widgets.HTML()
    box = widgets.VBox([widgets.HBox([name, start]), trouble])

    def start_labelling(_) -> None:
        try:
            if not name.value.strip():
                raise LabelError("Enter your name: it names the file that your labels go to.")
            widget = open_widget(name.value.strip())
            widget.settings = widget.settings | {"focus": True}
            box.children = [widget]
        except (LabelError, ValueError) as error:
            trouble.value = f"<b>{html.escape(str(error))}</b>"

    start.on_click(start_labelling)
    name.on_msg(lambda field, told, _: told.get("event") == "submit" and start_labelling(field))
    return box
