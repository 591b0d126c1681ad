"""The blind user study: people judge several methods' removals, shuffled and unnamed.

RORem's Table 2 asks annotators whether each method's removal succeeded (sec. 4). A study asks that
("success"), or which of two methods' removals is better ("preference"). It is answered in the
annotation widget. A trial's name is a hash, so neither the screen nor the log tells the method;
`trials.json` beside the logs does, and is there before the first answer is. A removal that is made
anew makes a new trial: answers about the old one no longer count.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd

from rorem_lib.data.triplets import Triplet
from rorem_lib.evaluation.tables import compare_methods
from rorem_lib.files import read_json, write_json
from rorem_lib.intervals import compare_successes, rate_interval
from rorem_lib.labels.log import Label, LabelError, LabelLog, hash_content, read_labels
from rorem_lib.labels.queue import order_items
from rorem_lib.labels.votes import compute_agreement, score_votes
from rorem_lib.labels.widget import Annotator, ask_name

KINDS = ("success", "preference")
TRIALS_FILE = "trials.json"


@dataclass(frozen=True)
class Trial:
    """One question of a study.

    Attributes:
        id: what the annotator's log calls it, 16 hex characters.
        picture: the test image's id.
        methods: one name, or two: the left one's and the right one's.
        removals: their files.
    """

    id: str
    picture: str
    methods: tuple[str, ...]
    removals: tuple[Path, ...]


def make_trials(
    removals: Mapping[str, Mapping[str, Path]],
    kind: str,
    *,
    methods: Sequence[str] = (),
    pictures: int = 0,
    seed: int = 0,
) -> list[Trial]:
    """The questions of a study.

    Args:
        removals: method -> image's id -> the removal's file.
        kind: "success", one question a method and image; "preference", one per image and pair of
            methods, left and right by lot.
        methods: which of them to ask about; empty takes all.
        pictures: how many images are drawn of those that every method has; 0 takes all.
        seed: fixes the images and the sides.

    Raises:
        ValueError: an unknown kind or method, too few methods to compare, no common image.
        OSError: a removal cannot be read.
    """
    if kind not in KINDS:
        raise ValueError(f"a user study asks for one of {', '.join(KINDS)}, not {kind!r}")
    if unknown := set(methods) - removals.keys():
        raise ValueError(
            f"no such methods: {', '.join(sorted(unknown))}; there are {', '.join(removals)}"
        )
    removals = {name: paths for name, paths in removals.items() if not methods or name in methods}
    if len(removals) < (2 if kind == "preference" else 1):
        raise ValueError(f"a study of {kind} has too few methods: {', '.join(removals) or 'none'}")
    common = sorted(set.intersection(*(set(paths) for paths in removals.values())))
    if not common:
        raise ValueError(f"no image has a removal of each method: {', '.join(removals)}")
    drawn = [common[i] for i in np.random.default_rng(seed).permutation(len(common))]
    groups = [(name,) for name in sorted(removals)]
    if kind == "preference":
        groups = list(itertools.combinations(sorted(removals), 2))
    trials = []
    for picture in drawn[: pictures or None]:
        contents = {name: hash_content(paths[picture]) for name, paths in removals.items()}
        for names in groups:
            words = [str(seed), kind, picture, *names, *(contents[name] for name in names)]
            digest = hashlib.sha256("\n".join(words).encode()).digest()
            sides = names[::-1] if digest[-1] % 2 else names
            trials.append(
                Trial(
                    digest[:8].hex(),
                    picture,
                    sides,
                    tuple(Path(removals[name][picture]) for name in sides),
                )
            )
    return trials


def open_study(
    folder: str | Path,
    trials: Sequence[Trial],
    triplets: Iterable[Triplet],
    annotator: str = "",
    *,
    keys: Mapping[str, str] | None = None,
    repeat_share: float = 0.02,
    seed: int = 0,
) -> Annotator | widgets.VBox:
    """The widget of one annotator, who sees every trial, in an order of their own.

    Args:
        folder: where the logs and `trials.json` go.
        trials: as `make_trials` returns them.
        triplets: the test set; GT is not needed and never shown.
        annotator: whose answers these are; a field asks for the name where there is none.
        keys: action -> key, as for `Annotator`.
        repeat_share: 0..1, share of the trials that come back, for agreement with oneself.
        seed: of the orders.

    Raises:
        LabelError: the name cannot name a file, or the folder cannot be written.
        ValueError: there are no trials, an image is not in the test set, see `Annotator`.
    """
    by_id = {triplet.id: triplet for triplet in triplets}
    lacking = sorted({trial.picture for trial in trials} - by_id.keys())
    if lacking or not trials:
        raise ValueError(
            "there is nothing to ask: no trials"
            if not trials
            else f"{len(lacking)} images are not in the test set (first: {lacking[0]})"
        )
    if not annotator:
        return ask_name(
            lambda name: open_study(
                folder,
                trials,
                by_id.values(),
                name,
                keys=keys,
                repeat_share=repeat_share,
                seed=seed,
            )
        )
    log = LabelLog(folder, annotator)
    _keep_trials(log.folder / TRIALS_FILE, trials)
    queue = order_items(
        [t.id for t in trials],
        overlap_share=0,
        repeat_share=repeat_share,
        annotator=annotator,
        seed=seed,
    )
    shown = [replace(by_id[t.picture], id=t.id, gt=t.removals[0]) for t in trials]
    rivals = {t.id: t.removals[1] for t in trials if len(t.removals) > 1}
    return Annotator(log, queue, shown, keys=keys, rivals=rivals)


def _keep_trials(path: Path, trials: Sequence[Trial]) -> None:
    """Add to what is known: with earlier trials gone, earlier answers could not be read."""
    known = read_json(path) if path.is_file() else {}
    told = {t.id: {"picture": t.picture, "methods": list(t.methods)} for t in trials}
    if told.items() <= known.items():
        return
    try:
        write_json(path, known | told)
    except OSError as error:
        raise LabelError(
            f"{path} cannot be written ({error.strerror or error}): without it no "
            "answer could be read. Free some space or make the folder writable"
        ) from error


def read_answers(folder: str | Path, trials: Iterable[Trial]) -> tuple[pd.DataFrame, list[Label]]:
    """What people have answered so far to these trials; simulated labels are nobody's answers.

    Returns:
        A row an answer (no skips, no silent repeats): `trial`, `picture`, `annotator`, `label`
        and the methods, `first` and `second` (None in a study of success).
        And the labels behind it, skips and repeats among them.
    """
    known = {trial.id: trial for trial in trials}
    labels = [x for x in read_labels(folder) if x.id in known and not x.simulated]
    rows = [
        {
            "trial": x.id,
            "picture": known[x.id].picture,
            "annotator": x.annotator,
            "label": x.label,
            "first": known[x.id].methods[0],
            "second": known[x.id].methods[1] if len(known[x.id].methods) > 1 else None,
        }
        for x in labels
        if x.label != "skip" and not x.repeat
    ]
    columns = ["trial", "picture", "annotator", "label", "first", "second"]
    return pd.DataFrame(rows, columns=columns), labels


def summarise_study(folder: str | Path, trials: Sequence[Trial], results: pd.DataFrame) -> dict:
    """What people said, and whether the simulated annotator says the same.

    Args:
        folder: of the study.
        trials: as `make_trials` returns them.
        results: `evaluation.evaluate`'s, one row a method and image.

    Returns:
        `trials`; `answers` and `annotators` (counts); `lost`, labels in the folder that are no
        answers: of removals that are gone, of another study, or simulated; `alpha` and
        `self_consistency` of `votes.compute_agreement`; `methods` of `summarise_successes`,
        `comparisons` of each pair (`tables.compare_methods`) and `preferences` of
        `summarise_preferences`, each empty where nobody was asked for it.
    """
    answers, labels = read_answers(folder, trials)
    agreement = compute_agreement(labels)
    methods, comparisons, preferences = [], [], []
    if answers["second"].notna().any():
        preferences = summarise_preferences(answers, _read_groups(results))
    elif len(answers):
        successes, groups = collect_successes(trials, labels), _read_groups(results)
        successes = successes.assign(group=[groups.get(x, x) for x in successes["id"]])
        methods = summarise_successes(successes, results)
        pairs = list(itertools.combinations([row["name"] for row in methods], 2))
        measure = "success, people"
        comparisons = compare_methods(
            successes.rename(columns={"accept": measure}), pairs, measure=measure
        )
    return {
        "trials": len(trials),
        "answers": len(answers),
        "annotators": answers["annotator"].nunique(),
        "lost": len(read_labels(folder)) - len(labels),
        "alpha": agreement["alpha"],
        "self_consistency": agreement["self_consistency"],
        "methods": methods,
        "comparisons": comparisons,
        "preferences": preferences,
    }


def _read_groups(results: pd.DataFrame) -> dict[str, str]:
    """Image's id -> its group; what is missing there is a group of its own."""
    return dict(zip(results["id"], results["group"])) if "group" in results else {}


def collect_successes(trials: Iterable[Trial], labels: Iterable[Label]) -> pd.DataFrame:
    """The majority's verdicts: `id` of the image, `method`, `accept` (1, 0, a tie one half)."""
    scores = score_votes(labels)
    rows = [
        {"id": t.picture, "method": t.methods[0], "accept": scores[t.id]}
        for t in trials
        if t.id in scores
    ]
    return pd.DataFrame(rows, columns=["id", "method", "accept"])


def summarise_successes(successes: pd.DataFrame, results: pd.DataFrame) -> list[dict]:
    """Success rates (0..1) of the methods, as Table 2 has them.

    Args:
        successes: of `collect_successes`; with a `group` an image where these are known.
        results: `evaluation.evaluate`'s.

    Returns:
        One dict a method, best first: `name`, `n` (images), `ties` among them, `success_rate`,
        `success_interval` (95%, over groups); and on the same images the simulated annotator's
        `simulated_rate`, and on those without a tie how often it says the `same_verdict`, None
        without hidden truth.
    """
    judged = results[["id", "method", "accept"]].rename(columns={"accept": "simulated"})
    table, rows = successes.merge(judged, on=["id", "method"], how="left"), []
    for name, part in table.groupby("method"):
        known = part.dropna(subset="simulated").astype({"simulated": float})
        clear = known[known["accept"] != 0.5]
        same = clear["simulated"] == clear["accept"]
        rows.append(
            {
                "name": name,
                "n": len(part),
                "ties": int((part["accept"] == 0.5).sum()),
                "success_rate": float(part["accept"].mean()),
                "success_interval": list(rate_interval(part["accept"], part.get("group"))),
                "simulated_rate": float(known["simulated"].mean()) if len(known) else None,
                "same_verdict": float(same.mean()) if len(clear) else None,
            }
        )
    return sorted(rows, key=lambda row: -row["success_rate"])


def summarise_preferences(
    answers: pd.DataFrame, groups: Mapping[str, str] | None = None
) -> list[dict]:
    """How often each method was preferred to each other one.

    An image's answers are averaged first, so that many annotators are not many images.

    Args:
        answers: of `read_answers`.
        groups: image's id -> its group; an image that is not in it is a group of its own.

    Returns:
        One dict a pair, its methods in the alphabet's order: `first`, `second`, `n` (images),
        `n_answers`; the shares of the answers `prefers_first`, `same`, `prefers_second`;
        `preference` (0..1, mean over images with an equal one as one half), its
        `interval` (95%) and `p_value` of `intervals.compare_successes`, in which an image that is
        even counts for neither.
    """
    swapped = answers["first"] > answers["second"]
    left = answers["label"].map({"left": 1.0, "same": 0.5, "right": 0.0})
    table = pd.DataFrame(
        {
            "first": answers["first"].where(~swapped, answers["second"]),
            "second": answers["second"].where(~swapped, answers["first"]),
            "picture": answers["picture"],
            "score": left.where(~swapped, 1 - left),
        }
    )
    rows = []
    for (first, second), part in table.groupby(["first", "second"]):
        means = part.groupby("picture")["score"].mean()
        places = [(groups or {}).get(picture, picture) for picture in means.index]
        lead = compare_successes(means, 1 - means, places)
        rows.append(
            {
                "first": first,
                "second": second,
                "n": len(means),
                "n_answers": len(part),
                "prefers_first": float((part["score"] == 1).mean()),
                "same": float((part["score"] == 0.5).mean()),
                "prefers_second": float((part["score"] == 0).mean()),
                "preference": float(means.mean()),
                "interval": [(1 + end / 100) / 2 for end in (lead.low, lead.high)],
                "p_value": lead.p_value,
            }
        )
    return rows
