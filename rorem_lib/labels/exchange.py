"""Labels in and out, and the set that labels make; `foreign` reads the files that people have."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from rorem_lib.data.triplets import read_triplets, resolve_meta
from rorem_lib.data.writer import TripletWriter
from rorem_lib.files import write_json, write_text
from rorem_lib.labels.foreign import find_word, guard_cell, read_rows
from rorem_lib.labels.log import (
    Label,
    LabelError,
    LabelLog,
    check_name,
    find_fault,
    hash_content,
    read_events,
)


def import_labels(
    path: str | Path, folder: str | Path, annotator: str = "imported", *, triplets: Iterable = ()
) -> dict[str, int]:
    """Take over labels that were made elsewhere; what is there already is not written twice.

    Args:
        path: a label log, a table, a scored triplet set, or what Label Studio or Prodigy exported:
            see `foreign.read_rows`. A score is 0..1, at least 0.5 is an acceptance; a time is ISO
            8601, UTC where it does not say. Of several reasons all are kept.
        folder: the label folder.
        annotator: who it was, where the file does not say.
        triplets: the candidates; labels of others are left out and counted. A file's ids may then
            be names of images, with or without their folder and `.png`. Empty: all are kept.

    Returns:
        read, written and unknown: numbers of labels.

    Raises:
        LabelError: the file is of no known form, holds no label or a value that no reader would
            take, or none of its labels fits the candidates. Nothing is written then.
    """
    path = Path(path)
    contents = {triplet.id: hash_content(triplet.gt) for triplet in triplets}
    try:
        rows = read_rows(path)
        if not rows:
            raise ValueError("there is no label in it")
        labels = [_make_label(row, annotator, contents, n) for n, row in enumerate(rows, 1)]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, OSError) as error:
        what = str(error) if isinstance(error, (ValueError, OSError)) else repr(error)
        raise LabelError(
            f"cannot import {path}: {what}. Read are label logs (.jsonl), tables (.csv) with an id "
            "and a label, meta.json with scores, and what Label Studio and Prodigy export"
        ) from error
    known = [x for x in labels if not contents or x.id in contents]
    if labels and not known:
        raise LabelError(
            f"none of the {len(labels)} labels in {path} belongs to these candidates "
            f"(first id in the file: {labels[0].id})"
        )
    # Compared with everything ever written: what was undone or changed since stays as it is.
    logs = Path(folder).glob("labels-*.jsonl")
    there = {_name_event(event) for log in logs for event in read_events(log)}
    fresh: dict[str, list[Label]] = defaultdict(list)
    for label in known:
        check_name(label.annotator)
        label = replace(label, content=label.content or contents.get(label.id, ""))
        if _name_event(asdict(label)) not in there:
            fresh[label.annotator].append(label)
    opened = {name: LabelLog(folder, name) for name in fresh}  # all of them, before one is written
    for name, given in fresh.items():
        opened[name].append_many(sorted(given, key=lambda label: label.time))
    written = sum(map(len, fresh.values()))
    return {"read": len(labels), "written": written, "unknown": len(labels) - len(known)}


def _name_event(event: dict) -> tuple:
    return tuple(event.get(x) for x in ("annotator", "id", "label", "reason", "repeat", "content"))


def _make_label(row: Mapping, annotator: str, known: Collection[str], place: int) -> Label:
    """A label as its log will hold it.

    Raises:
        ValueError: a value is none, or of a type that no reader takes.
    """
    name = next((x for x in row["names"] if x in known), row["names"][0])
    try:
        label = Label(
            id=name,
            label=find_word(row["label"]) or _judge_score(row["label"]),
            annotator=str(row.get("annotator") or annotator),
            reason=row.get("reasons") or None,
            note=row.get("note") or None,
            time=_read_time(row.get("time")),
            ms=round(float(row.get("ms") or 0)),
            content=row.get("content") or "",
            order=row.get("order") or row.get("label_order") or "imported",
            simulated=str(row.get("simulated")).lower() == "true",
            repeat=str(row.get("repeat")).lower() == "true",
        )
        if fault := find_fault({"event": "label", **asdict(label)}):
            raise ValueError(fault)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"label {place} in the file ({name}): {error}") from error
    return label


def _judge_score(value) -> str:
    score = float(str(value).replace(",", "."))  # as Excel writes it where the comma is decimal
    if not 0 <= score <= 1:
        raise ValueError(f"{value} is no score between 0 and 1")
    return "accept" if score >= 0.5 else "reject"


def _read_time(value) -> str:
    """A moment in ISO 8601 as UTC; "" where there is none."""
    if not value:
        return ""
    moment = datetime.fromisoformat(value)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def export_labels(labels: Iterable[Label], path: str | Path, *, triplets: Iterable = ()) -> Path:
    """Write labels as `.csv`, or as `.json` in Label Studio's form (one task an item).

    In the table a text that a spreadsheet would take for a formula begins with an apostrophe, which
    an import takes away again.

    Args:
        labels: labels that stand.
        path: the file to write, atomically; its ending chooses the form.
        triplets: candidates whose image paths go into the Label Studio tasks.
    """
    path, rows = Path(path), [asdict(label) for label in labels]
    if path.suffix == ".csv":
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, [field.name for field in fields(Label)])
        writer.writeheader()
        writer.writerows({name: guard_cell(x) for name, x in row.items()} for row in rows)
        return write_text(path, stream.getvalue())
    if path.suffix != ".json":
        raise ValueError(f"{path}: labels are exported as .csv or .json (Label Studio)")
    pictures = {
        x.id: {"source": str(x.source), "mask": str(x.mask), "removal": str(x.gt)} for x in triplets
    }
    tasks: dict[str, dict] = {}
    for row in rows:
        item_id = row["id"]
        data = {"candidate": item_id} | pictures.get(item_id, {})
        task = tasks.setdefault(item_id, {"data": data, "annotations": []})
        result = [_make_choice("decision", row["label"])]
        result += [_make_choice("reason", row["reason"])] if row["reason"] else []
        extra = {
            x: row[x] for x in ("annotator", "note", "content", "order", "simulated", "repeat")
        }
        given = {"created_at": row["time"], "lead_time": row["ms"] / 1000, "meta": extra}
        task["annotations"].append({"result": result, "was_cancelled": False, **given})
    return write_json(path, list(tasks.values()))


def _make_choice(name: str, value: str) -> dict:
    return {
        "from_name": name,
        "to_name": "removal",
        "type": "choices",
        "value": {"choices": [value]},
    }


def export_dataset(
    labels: Iterable[Label], decisions: Mapping[str, str], path: str | Path, *, triplets: Iterable
) -> Path:
    """Write what was judged and what was said as one Parquet file, for `datasets.load_dataset`.

    A row an item that has a label: `id`, the images `source`, `mask` and `removal`, embedded as
    their files are, `decision` ("accept", "reject", or None where the policy left it open) and
    `labels`, a list of all that annotators said, silent repeats and skips included.

    Args:
        labels: labels that stand.
        decisions: as `merge_votes` returns them.
        path: the file to write, atomically.
        triplets: the candidates.

    Raises:
        LabelError: there are no labels of these candidates.
        OSError: an image cannot be read, or the disk is full.
    """
    from datasets import Features, Image, Value

    from rorem_lib.data.publishing import write_parquet

    given: dict[str, list[dict]] = defaultdict(list)
    for label in labels:
        given[label.id].append({x: v for x, v in asdict(label).items() if x != "id"})
    judged = [triplet for triplet in triplets if triplet.id in given]
    if not judged:
        raise LabelError(f"{path} is not written: there are no labels to export")
    kinds = {"ms": "int64", "simulated": "bool", "repeat": "bool"}
    features = Features(
        {
            "id": Value("string"),
            "source": Image(),
            "mask": Image(),
            "removal": Image(),
            "decision": Value("string"),
            "labels": [
                {
                    field.name: Value(kinds.get(field.name, "string"))
                    for field in fields(Label)
                    if field.name != "id"
                }
            ],
        }
    )

    def make_row(triplet):
        files = {"source": triplet.source, "mask": triplet.mask, "removal": triplet.gt}
        images = {k: {"bytes": file.read_bytes(), "path": file.name} for k, file in files.items()}
        said = {"decision": decisions.get(triplet.id), "labels": given[triplet.id]}
        return {"id": triplet.id, **images, **said}

    return write_parquet(path, features, map(make_row, judged))


def write_scored_set(
    candidates_meta: str | Path,
    decisions: Mapping[str, str],
    folder: str | Path,
    *,
    accepted_only: bool = False,
    accepted_by: str = "human",
    orders: Mapping[str, str] | None = None,
    fair: Collection[str] | None = None,
    per_picture: int = 0,
    seed: int = 0,
) -> Path:
    """Write a triplet set with `score` (1 accepted, 0 rejected) that reuses the candidates' files.

    Args:
        candidates_meta: the candidates' `meta.json`, or its folder.
        decisions: id -> "accept" or "reject", as `merge_votes` returns them.
        folder: the new set's folder; what an earlier set there had besides is deleted.
        accepted_only: leave out what was rejected (a set to train the remover on).
        accepted_by: goes into the accepted entries' `accepted_by`.
        orders: id -> how the item was drawn (`votes.collect_orders`); becomes `label_order`.
        fair: ids of a fair sample (`votes.find_fair`); becomes `fair_sample`, true or false.
        per_picture: at most so many accepted removals of one image (a triplet's `group`), drawn
            by lot; 0 keeps all.
        seed: of the lot.

    Returns:
        The path of the new `meta.json`, written atomically.

    Raises:
        LabelError: a decision belongs to no candidate.
    """
    triplets = read_triplets(candidates_meta)
    foreign = set(decisions) - {triplet.id for triplet in triplets}
    if foreign:
        raise LabelError(
            f"{len(foreign)} decisions belong to no candidate of {candidates_meta} (first: "
            f"{min(foreign)}): use the labels of this set"
        )
    accepted = [t for t in triplets if decisions.get(t.id) == "accept"]
    counts, kept = Counter(), set()
    for place in np.random.default_rng(seed).permutation(len(accepted)):
        triplet = accepted[place]
        counts[triplet.group] += 1
        if not per_picture or counts[triplet.group] <= per_picture:
            kept.add(triplet.id)
    with TripletWriter(folder, restart=True) as writer:
        for triplet in triplets:
            decision = decisions.get(triplet.id)
            drawn = {"label_order": orders[triplet.id]} if triplet.id in (orders or {}) else {}
            drawn |= {} if fair is None else {"fair_sample": triplet.id in fair}
            if triplet.id in kept:
                writer.add_triplet(triplet, score=1.0, accepted_by=accepted_by, **drawn)
            elif decision == "reject" and not accepted_only:
                writer.add_triplet(triplet, score=0.0, accepted_by=None, **drawn)
    return resolve_meta(folder)
