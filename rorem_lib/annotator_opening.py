"""Opening the widget: one annotator's queue, behind a field for the name where none is given."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import ipywidgets as widgets

from rorem_lib.annotator import Annotator
from rorem_lib.data.triplets import Triplet
from rorem_lib.label_log import LabelError, LabelLog, read_labels, split_stale
from rorem_lib.labels import list_adjudication, order_items


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
        ordering: as for `label_queue.order_items`.

    Raises:
        LabelError: the name cannot name a file, or the folder cannot be made.
        ValueError: see `Annotator` and `label_queue.order_items`.
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
