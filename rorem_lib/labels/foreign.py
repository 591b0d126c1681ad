"""Label files that people have, read into rows: tables, Label Studio, Prodigy, sets, label logs.

`exchange.import_labels` makes labels of the rows and writes them.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote

from rorem_lib.labels.log import parse_events, replay_events

WORDS = {
    "accept": {"accept", "accepted", "1", "1.0", "yes", "true", "good", "success"},
    "reject": {"reject", "rejected", "0", "0.0", "no", "false", "bad", "failure"},
    "skip": {"skip", "skipped", "unsure", "ignore", "ignored", ""},
}
# Where a record names its candidate: by its id, else by a file of it.
ID_KEYS = ("candidate", "id", "image_id")
FILE_KEYS = ("removal", "image", "file", "filename", "file_name", "path", "source")
LABEL_KEYS = ("label", "decision", "choice", "choices", "answer", "score")
FORMULA = re.compile(r"'*[=+\-@\t\r\n]")  # a cell that a spreadsheet would compute
_KEPT = ("time", "ms", "content", "order", "label_order", "simulated", "repeat")
_IMAGE = re.compile(r"\.(png|jpe?g|webp|bmp|tiff?|gif)\Z", re.IGNORECASE)
_UPLOAD = re.compile(r"\A[0-9a-f]{8}-")  # what Label Studio puts before an uploaded file's name


def read_rows(path: Path) -> list[dict]:
    """The labels of a file, a dict each.

    Args:
        path: `.csv` or `.tsv` (separated by commas, semicolons, tabs or `|`, UTF-8 or UTF-16),
            `.json` (a scored triplet set, Label Studio's JSON and JSON-MIN) or `.jsonl` (a label
            log, Prodigy, or a record a line).

    Returns:
        By row `names` (whom it may mean, the likeliest first), `label` and, where the file has
        them, `annotator`, `reasons`, `note`, `time`, `ms` and `Label`'s other fields.

    Raises:
        ValueError: it is none of these, or a record lacks its id or its label.
        OSError: it can't be read.
    """
    ending = path.suffix.lower()
    if ending not in (".csv", ".tsv", ".json", ".jsonl", ".ndjson"):
        raise ValueError(f"its name ends in {ending!r}: save a spreadsheet as CSV first")
    text = _decode(path.read_bytes())
    if ending in (".csv", ".tsv"):
        records = _read_table(text)
    elif ending == ".json":
        records = _parse_json(text)
    else:
        lines = text.split("\n")  # not splitlines: JSON may hold other ends of lines
        found = [_parse_line(line) for line in lines if line.strip()]
        if any(isinstance(record, dict) and "event" in record for record in found):
            labels = replay_events(parse_events(lines, path))
            return [asdict(x) | {"names": _list_names(x.id), "reasons": x.reason} for x in labels]
        records = found
    if not isinstance(records, list):
        raise ValueError("expected is a list of records")
    rows = [row for place, x in enumerate(records, 1) for row in _read_record(x, place)]
    if rows and not any("label" in row for row in rows):
        raise ValueError(
            f"no record says what was decided. Found: {_list_keys(records)}. Expected: one of "
            f"{', '.join(LABEL_KEYS)}"
        )
    # An annotation that was skipped has no answer in Label Studio's own tables.
    return [{"label": "skip", **row} for row in rows]


def find_word(value) -> str | None:
    """The decision that a word stands for; None where it is none."""
    word = str(value).strip().lower()
    return next((label for label, words in WORDS.items() if word in words), None)


def guard_cell(value):
    """A cell that no spreadsheet takes for a formula: an apostrophe goes before it."""
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value


def open_cell(value):
    """Takes `guard_cell`'s apostrophe away."""
    guarded = isinstance(value, str) and value.startswith("'") and FORMULA.match(value)
    return value[1:] if guarded else value


# --------------------------------------------------------------------------------------- files


def _decode(data: bytes) -> str:
    encoding = json.detect_encoding(data)  # by its first bytes, UTF-16 and a mark before UTF-8 too
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start} is no {encoding.upper()}: save it as UTF-8 (in Excel: CSV UTF-8)"
        ) from None


def _read_table(text: str) -> list[dict]:
    """A table with a header; whatever it is separated by, as the header shows."""
    stream = io.StringIO(text, newline="")
    head = stream.readline()
    if told := re.fullmatch(r"\"?sep=(.)\"?\s*", head):  # Excel's line that names the separator
        separator, start = told[1], stream.tell()
    else:
        bare = re.sub(r'"[^"]*"', "", head)
        separator, start = max(",;\t|", key=bare.count), 0
    stream.seek(start)
    try:
        head, *lines = (line for line in csv.reader(stream, delimiter=separator) if any(line))
    except csv.Error as error:
        raise ValueError(f"it is no table: {error}") from error
    except ValueError:
        return []
    names = [name.strip().lower() for name in head]
    lacks = [
        f"{what} ({', '.join(keys)})"
        for what, keys in (("an id", (*ID_KEYS, *FILE_KEYS)), ("a label", LABEL_KEYS))
        if not set(names) & set(keys)
    ]
    if lacks:
        raise ValueError(f"its columns are {', '.join(names)}. It lacks {' and '.join(lacks)}")
    return [dict(zip(names, map(open_cell, line))) for line in lines]


def _parse_json(text: str):
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} is not JSON: {error.msg}") from error


def _parse_line(line: str):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None  # in a log a torn line is left out; elsewhere `_read_record` refuses it


def _list_keys(records: Iterable[Mapping]) -> str:
    return ", ".join(dict.fromkeys(key for record in records for key in record)) or "nothing"


# ------------------------------------------------------------------------------------- records


def _read_record(record: dict, place: int) -> list[dict]:
    """The rows of one record: of a table, a triplet set, Label Studio or Prodigy."""
    if not isinstance(record, dict):
        raise ValueError(f"record {place} in the file has no keys: it is {str(record)[:40]!r}")
    if "annotations" in record or isinstance(record.get("data"), dict):
        return _read_task(record, place)
    if "answer" in record and not {"_timestamp", "_task_hash", "_input_hash"}.isdisjoint(record):
        return [_read_prodigy(record, place)]
    own = not {"annotation_id", "lead_time"}.isdisjoint(record)  # Label Studio's CSV and JSON-MIN
    names = _find_names(record, place, own)
    keys = ("score", *LABEL_KEYS) if "GT" in record else LABEL_KEYS
    key = next((key for key in keys if key in record), None)
    if key is None and not own:
        raise ValueError(
            f"record {place} in the file ({names[0]}) says nothing of what was decided. Found: "
            f"{', '.join(record)}. Expected: one of {', '.join(LABEL_KEYS)}"
        )
    row = {name: record[name] for name in _KEPT if name in record}
    row |= {"names": names, "annotator": _name_annotator(record.get("annotator"))}
    if own:
        row |= {"time": record.get("created_at"), "ms": _read_seconds(record.get("lead_time"))}
    row["note"] = " ".join(_list_choices(record.get("note"), own))
    given = [(key, choice) for choice in _list_choices(record[key], own)] if key else []
    given = given or [(key, "")] * bool(key)
    given += [("reason", choice) for choice in _list_choices(record.get("reason"), own)]
    return [row | _decide(given, names[0])]


def _read_task(task: dict, place: int) -> list[dict]:
    """A task of Label Studio's JSON: a row an annotation."""
    names, rows = _find_names(task.get("data", task), place), []
    for annotation in task.get("annotations", []):
        row = {"names": names, "label": "skip", "time": annotation.get("created_at")}
        row |= {"ms": _read_seconds(annotation.get("lead_time"))}
        row |= {"annotator": _name_annotator(annotation.get("completed_by"))}
        row |= annotation.get("meta") or {}
        results = annotation.get("result", []) if not annotation.get("was_cancelled") else []
        if notes := [text for x in results for text in _list_choices(x["value"].get("text"))]:
            row["note"] = " ".join(notes)
        given = [
            (result.get("from_name"), choice)
            for result in results
            for choice in _list_choices(result["value"].get("choices"))
        ]
        rows.append(row | _decide(given, names[0]))
    return rows


def _read_prodigy(record: dict, place: int) -> dict:
    """A line of Prodigy's JSONL: `answer` says whether its `label`, or the choice, is right."""
    meta = record.get("meta") if isinstance(record.get("meta"), dict) else {}
    names = _find_names({**meta, **record}, place)
    answer, chosen = find_word(record["answer"]), record.get("accept")
    if answer == "accept" and isinstance(chosen, list) and "options" in record:
        row = _decide([("choice", str(choice)) for choice in chosen] or [("choice", "")], names[0])
    elif find_word(record.get("label")) == "reject" and answer != "skip":  # "bad" was confirmed
        row = {"label": {"accept": "reject", "reject": "accept"}.get(answer, record["answer"])}
    else:
        row = {"label": record["answer"]}
    who = record.get("_annotator_id") or record.get("_session_id")
    row |= {"names": names, "annotator": _name_annotator(who)}
    row["note"] = " ".join(_list_choices(record.get("note")))
    if "_timestamp" in record:
        moment = datetime.fromtimestamp(float(record["_timestamp"]), UTC)
        row["time"] = moment.isoformat(timespec="microseconds")
    return row


def _decide(given: list[tuple[str | None, str]], item: str) -> dict:
    """`label` and `reasons` among an item's choices, (question, choice) each; empty without any."""
    asked = [choice for name, choice in given if name == "decision"]
    asked = asked or [choice for name, choice in given if name != "reason"]
    said = asked if len(asked) == 1 else [choice for choice in asked if find_word(choice)]
    shown = ", ".join(choice for _, choice in given)
    if given and not said:
        raise ValueError(f"the choices for {item} hold no decision: {shown}")
    if len({find_word(choice) for choice in said}) > 1:
        raise ValueError(f"the choices for {item} contradict each other: {shown}")
    reasons = [choice for name, choice in given if name == "reason" or choice not in said]
    return ({"label": said[0]} if said else {}) | {"reasons": ", ".join(reasons)}


def _list_choices(value, opened: bool = False) -> list[str]:
    """The texts of one or several choices.

    Args:
        value: a text, a number, a list, or Label Studio's `{"choices": [...]}` or `{"text": ...}`.
        opened: whether a text may hold one of these as JSON, as in Label Studio's CSV.
    """
    if opened and isinstance(value, str) and value[:1] in ("[", "{"):
        value = _parse_line(value) or value
    if isinstance(value, dict):
        value = value.get("choices", value.get("text"))
    if isinstance(value, list):
        return [text for part in value for text in _list_choices(part)]
    return [] if value is None else [str(value)]


def _find_names(record: Mapping, place: int, own: bool = False) -> list[str]:
    """Whom a record may mean, the likeliest first: its id as it stands, else a file's bare name.

    Args:
        own: its `id` is the number of Label Studio's task, which counts where there is no other.
    """
    keys = [key for key in (*ID_KEYS, *FILE_KEYS) if not (own and key == "id")] + ["id"]
    for key in keys:  # one of them alone: a removal's source may be the name of another candidate
        value = record.get(key)
        if isinstance(value, (str, int)) and value != "" and not str(value).startswith("data:"):
            return _list_names(str(value))[:: -1 if key in FILE_KEYS else 1]
    raise ValueError(
        f"record {place} in the file: the id is empty. Found: {', '.join(record)}. Expected: one "
        f"of {', '.join((*ID_KEYS, *FILE_KEYS))}"
    )


def _list_names(text: str) -> list[str]:
    """A name as it stands, and as it is without folders, Label Studio's prefix and `.png`."""
    file = unquote(text).replace("\\", "/").rpartition("/")[2]
    bare = _UPLOAD.sub("", file)
    names = [text, file, bare, _IMAGE.sub("", bare), _IMAGE.sub("", file)]
    return [name for name in dict.fromkeys(names) if name]


def _name_annotator(value) -> str:
    if isinstance(value, dict):
        value = value.get("email") or value.get("id")
    return "" if value is None else str(value)


def _read_seconds(value) -> float:
    """Label Studio's seconds in milliseconds."""
    return 1000 * float(value or 0)
