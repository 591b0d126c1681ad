"""Labels in and out: CSV, Label Studio, scored triplet sets; and the set that labels make."""

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
from rorem_lib.files import read_json, write_json, write_text
from rorem_lib.labels.log import (
    Label,
    LabelError,
    LabelLog,
    check_name,
    hash_content,
    read_events,
    replay_events,
)

WORDS = {
    "accept": {"accept", "accepted", "1", "1.0", "yes", "true", "good", "success"},
    "reject": {"reject", "rejected", "0", "0.0", "no", "false", "bad", "failure"},
    "skip": {"skip", "skipped", "unsure", ""},
}


def import_labels(
    path: str | Path, folder: str | Path, annotator: str = "imported", *, triplets: Iterable = ()
) -> dict[str, int]:
    """Take over labels that were made elsewhere; what is there already is not written twice.

    Args:
        path: `.jsonl` (label logs), `.csv` (columns `id`, `label`, optionally `annotator`,
            `reason`, `note`, `time` in ISO 8601, UTC where it does not say, `ms`), or `.json`: a
            triplet set's `meta.json` with `score` (0..1, at least 0.5 is an acceptance) or a Label
            Studio export (JSON or JSON-MIN).
        folder: the label folder.
        annotator: who it was, where the file does not say.
        triplets: the candidates; labels of others are left out and counted. Empty: all are kept.

    Returns:
        read, written and unknown: numbers of labels.

    Raises:
        LabelError: the file is of no known form, holds no label or a value that is none, or none of
            its labels fits the candidates. Nothing is written then.
    """
    path, ending = Path(path), Path(path).suffix.lower()
    try:
        if ending == ".jsonl":
            if not path.exists():
                raise FileNotFoundError(f"{path} does not exist")
            found = [asdict(label) for label in replay_events(read_events(path))]
        elif ending == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as stream:
                found = list(csv.DictReader(stream))
        elif ending == ".json":
            found = [row for entry in read_json(path) for row in _read_entry(entry)]
        else:
            raise ValueError(f"a file that ends in {ending!r}: is import_path set?")
        if not found:
            raise ValueError("there is no label in it")
        labels = [_make_label(row, annotator, place) for place, row in enumerate(found, 1)]
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise LabelError(
            f"cannot import {path}: {error!r}. Wanted is a label log (.jsonl), a CSV with id and "
            "label, a meta.json with score, or a Label Studio export"
        ) from error
    contents = {triplet.id: hash_content(triplet.gt) for triplet in triplets}
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
    for name, given in fresh.items():
        LabelLog(folder, name).append_many(sorted(given, key=lambda label: label.time))
    written = sum(map(len, fresh.values()))
    return {"read": len(labels), "written": written, "unknown": len(labels) - len(known)}


def _name_event(event: dict) -> tuple:
    return tuple(event.get(x) for x in ("annotator", "id", "label", "reason", "repeat", "content"))


def _read_entry(entry: dict) -> list[dict]:
    """One entry of a JSON list: of a triplet set, or a Label Studio task (JSON or JSON-MIN)."""
    data = entry.get("data", entry)
    item_id = data.get("candidate") or data.get("id") or Path(data["source"]).stem
    if "annotations" not in entry:
        label = next((data[x] for x in ("score", "decision", "choice") if x in data), None)
        row = {**data, "id": item_id, "label": label}
        if "lead_time" in data:  # JSON-MIN
            row |= {"ms": 1000 * (data["lead_time"] or 0), "time": data.get("created_at")}
        return [row]
    rows = []
    for given in entry["annotations"]:
        who = given.get("completed_by")
        who = who.get("email") or who.get("id") if isinstance(who, dict) else who
        row = {"id": item_id, "ms": 1000 * (given.get("lead_time") or 0), "label": "skip"}
        row |= {"annotator": who, "time": given.get("created_at"), **(given.get("meta") or {})}
        results = given.get("result", []) if not given.get("was_cancelled") else []
        for result in results:
            row["note"] = " ".join(result["value"].get("text", [])) or row.get("note")
        rows.append(row | _read_choices(results, item_id))
    return rows


def _read_choices(results: list[dict], item_id: str) -> dict:
    """Label and reason among the choices of one annotation; neither where none was made."""
    given = [
        (result.get("from_name"), choice)
        for result in results
        for choice in result["value"].get("choices", [])
    ]
    said = [choice for name, choice in given if name == "decision"]
    said = said or [x for name, x in given if name != "reason" and _find_word(x)]
    if given and not said:
        raise ValueError(f"the choices for {item_id}, {[x for _, x in given]}, hold no decision")
    reasons = [choice for name, choice in given if choice not in said]
    return ({"label": said[0]} if said else {}) | ({"reason": reasons[-1]} if reasons else {})


def _find_word(value) -> str | None:
    word = str(value).strip().lower()
    return next((label for label, words in WORDS.items() if word in words), None)


def _make_label(row: Mapping, annotator: str, place: int) -> Label:
    label, time = _find_word(row["label"]), row.get("time") or ""
    try:
        if label is None:
            score = float(row["label"])
            if not 0 <= score <= 1:
                raise ValueError(f"{row['label']} is no score between 0 and 1")
            label = "accept" if score >= 0.5 else "reject"
        if not row["id"]:
            raise ValueError("the id is empty")
        if time:
            moment = datetime.fromisoformat(time)
            moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            time = moment.astimezone(UTC).isoformat(timespec="microseconds")
    except (TypeError, ValueError) as error:
        raise ValueError(f"label {place} in the file ({row['id']}): {error}") from error
    return Label(
        id=str(row["id"]),
        label=label,
        annotator=str(row.get("annotator") or annotator),
        reason=row.get("reason") or None,
        note=row.get("note") or None,
        time=time,
        ms=round(float(row.get("ms") or 0)),
        content=row.get("content") or "",
        order=row.get("order") or row.get("label_order") or "imported",
        simulated=str(row.get("simulated")).lower() == "true",
        repeat=str(row.get("repeat")).lower() == "true",
    )


def export_labels(labels: Iterable[Label], path: str | Path, *, triplets: Iterable = ()) -> Path:
    """Write labels as `.csv`, or as `.json` in Label Studio's form (one task an item).

    Args:
        labels: labels that stand.
        path: the file to write, atomically; its ending chooses the form.
        triplets: candidates whose image paths go into the Label Studio tasks.
    """
    path, rows = Path(path), [asdict(label) for label in labels]
    if path.suffix == ".csv":
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(
            stream, [field.name for field in fields(Label)], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)
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
