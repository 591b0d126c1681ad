"""What needs a whole set: the safety checker's answers, and near-duplicates."""

from __future__ import annotations

import bisect
import contextlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

from rorem_lib.data import filters
from rorem_lib.data.journal import Journal, JournalIndex
from rorem_lib.data.pictures import load_image
from rorem_lib.data.triplets import iter_triplets
from rorem_lib.data.writer import TripletWriter
from rorem_lib.models.safety import SafetyChecker


def find_unsafe(
    writers: dict[str, TripletWriter], safety: SafetyChecker | None, answers: Journal
) -> Iterator[dict]:
    """Rejections of sources that the checker takes for unsafe.

    Args:
        writers: the sets so far, by name.
        safety: None finds none.
        answers: what the checker said before, so that no picture is looked at twice.
    """
    if safety is None:
        return
    with JournalIndex([answers.path]) as known:
        for writer in writers.values():
            with writer.open_index() as index:
                todo = [key for key in index.list_ids() if key not in known]
                pictures = (load_image(writer.folder / index[key]["source"]) for key in todo)
                for key, unsafe in zip(todo, safety.find_unsafe(pictures), strict=True):
                    answers.append({"id": key, "unsafe": bool(unsafe)})
    answers.close()
    with JournalIndex([answers.path]) as known:
        for name, writer in writers.items():
            with writer.open_index() as index:
                for key in index.list_ids():
                    if known[key]["unsafe"]:
                        yield {
                            "id": key,
                            "group": index[key]["group"],
                            "set": name,
                            "reason": "unsafe",
                            "message": "the safety checker takes the source for unsafe",
                        }


def find_duplicates(
    writers: dict[str, TripletWriter], *, distance: int, evaluation_sets: Iterable[str | Path] = ()
) -> Iterator[dict]:
    """Rejections of near-duplicates: of evaluation sets, in the test set, then in the rest.

    Args:
        writers: the sets so far, by name; their records have a `phash`.
        distance: see `filters.find_duplicates`; -1 finds none.
        evaluation_sets: sets of pictures that must not occur in these.
    """
    if distance < 0:
        return
    hashes, groups = array("Q"), array("q")
    files = []
    for triplet in iter_triplets(list(evaluation_sets), require_gt=False):
        files.append(triplet.source)
        hashes.append(
            int(triplet.extra.get("phash") or filters.hash_picture(load_image(triplet.source)), 16)
        )
        groups.append(-len(files))  # each is one of its own
    numbers: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        ids, starts, indices = [], [], []
        # The test set first: of a picture that is in both, the training set gives up its own.
        order = sorted(writers, key=lambda name: (name != "test", name))
        for name in order:
            index = stack.enter_context(writers[name].open_index())
            starts.append(len(ids))
            indices.append(index)
            ids += index.list_ids()
            for record in index.items():
                hashes.append(int(record["phash"], 16))
                groups.append(numbers.setdefault(record["group"], len(numbers)))

        def find(position: int) -> tuple[str, dict]:
            which = bisect.bisect_right(starts, position) - 1
            return order[which], indices[which][ids[position]]

        def locate(position: int) -> Path:
            if position < len(files):
                return files[position]
            name, record = find(position - len(files))
            return writers[name].folder / record["source"]

        for late, early in filters.find_duplicates(
            hashes, groups, locate, start=len(files), distance=distance
        ):
            name, record = find(late - len(files))
            twin = (
                f"{files[early]}, a picture of an evaluation set"
                if early < len(files)
                else "{1[id]} of {0}".format(*find(early - len(files)))
            )
            yield {
                "id": record["id"],
                "group": record["group"],
                "set": name,
                "reason": "near-duplicate",
                "message": f"looks like {twin}",
            }
