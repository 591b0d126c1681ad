"""Evaluate removal methods on one test set: every method on the same images, with the same noise.

Success is what RORem reports (Table 2), judged here by the simulated annotator against the hidden
truth of the built-in scenes, and by the discriminator as in the paper. This module alone, with the
simulated annotator, reads hidden truth.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from rorem_lib import metrics
from rorem_lib.acceptance import estimate_rate
from rorem_lib.builtin.judge import judge_removal
from rorem_lib.builtin.sets import read_truth
from rorem_lib.data.pictures import load_image
from rorem_lib.data.triplets import Triplet, load_images, read_triplets
from rorem_lib.evaluation.methods import SOURCE, Method, MethodRun, run_method
from rorem_lib.evaluation.tables import write_csv
from rorem_lib.files import clean_metrics, write_json
from rorem_lib.intervals import rate_interval

logger = logging.getLogger(__name__)

VERSION = 2  # raise it when the same methods get other figures
MEASURES = ("psnr_hole", "psnr_shadow", "psnr_background", "ssim_hole", "lpips_hole")


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        results: one row a method and image (`results.csv`), the untouched source included.
        methods: one dict a method, rates from 0 to 1 (`methods.json`).
        source: the untouched source's measures, the zero of every PSNR, and `identical` (see
            `summarise_method`).
        paths: method name -> id -> removal's file.
    """

    results: pd.DataFrame
    methods: list[dict]
    source: dict
    paths: dict[str, dict[str, Path]]


def evaluate(
    methods: Sequence[Method],
    test_meta,
    hidden_dir,
    output_dir,
    *,
    discriminator=None,
    calibration=None,
    success_threshold: float | None = None,
    accept_rates: Sequence[float] = (1.0, 0.0),
    limit: int | None = None,
    batch_size: int = 8,
    lpips: str = "",
) -> Evaluation:
    """Run and measure all methods; write `results.csv` and `methods.json` to `output_dir`.

    Args:
        methods: from `make_methods`.
        test_meta: the test set; its GT, where it has one, stands in for a missing hidden truth.
        hidden_dir: hidden truth of the built-in scenes, or None: nothing is judged then.
        output_dir: removals go to its `removals/`.
        discriminator: a `Discriminator`, or None.
        calibration: an `acceptance.Calibration` of its scores, or None for raw scores.
        success_threshold: least probability that counts as a success (the stage's
            `rate_threshold`); 0.5 without it.
        accept_rates: shares of good and of bad removals at or above that threshold (the stage's
            `accept_rates`), from which `acceptance.estimate_rate` makes
            `success_rate_discriminator`; without them it is the plain share.
        limit: evaluate the first so many images only; None or 0 for all.
        batch_size: images a batch of every method; the default is for 512 px.
        lpips: the LPIPS network ("alex", "squeeze", "vgg"), "" for none.

    Raises:
        ValueError: there are no methods or no images.
    """
    output_dir = Path(output_dir)
    triplets = read_triplets(test_meta, require_gt=False)[: limit or None]
    if not methods or not triplets:
        raise ValueError(f"nothing to evaluate: {len(methods)} methods on {len(triplets)} images")
    if lpips and (reason := metrics.load_lpips(lpips)[1]):
        logger.warning(reason)
    runs = {
        m.name: run_method(m, triplets, output_dir / "removals", batch_size=batch_size)
        for m in methods
    }
    rows = []
    for triplet in triplets:
        rows += _measure_item(triplet, runs, hidden_dir, lpips)
    results = pd.DataFrame(rows)
    order = {name: n for n, name in enumerate([SOURCE, *runs])}
    results = results.sort_values(
        "method", key=lambda c: c.map(order), kind="stable", ignore_index=True
    )
    if discriminator is not None:
        _add_scores(results, triplets, runs, discriminator, calibration, success_threshold)
    summaries = [
        {
            **asdict(m),
            **summarise_method(results[results.method == m.name], accept_rates),
            "seconds_per_image": runs[m.name].seconds_per_image,
            "unet_calls": runs[m.name].unet_calls,
        }
        for m in methods
    ]
    source = summarise_method(results[results.method == SOURCE])
    write_csv(results, output_dir / "results.csv")
    write_json(output_dir / "methods.json", clean_metrics(summaries))
    return Evaluation(
        results,
        summaries,
        {k: source[k] for k in (*MEASURES, "identical")},
        {name: run.paths for name, run in runs.items()},
    )


def _measure_item(
    triplet: Triplet, runs: Mapping[str, MethodRun], hidden_dir, lpips: str
) -> list[dict]:
    """One image's rows: the source's and every method's."""
    pictures = load_images(triplet)
    source, mask = pictures["source"], pictures["mask"]
    truth = None if hidden_dir is None else read_truth(hidden_dir, triplet.id)
    target = pictures["gt"] if truth is None else truth.truth
    shadow = None if truth is None else truth.shadow
    rows = []
    for name in (SOURCE, *runs):
        result = source if name == SOURCE else load_image(runs[name].paths[triplet.id])
        row = {
            "method": name,
            "id": triplet.id,
            "group": triplet.group,
            "family": triplet.extra.get("family"),
            "effect": triplet.extra.get("effect"),
            "accept": None,
            "reason": None,
            **dict.fromkeys(MEASURES),
        }
        if target is not None:
            row["psnr_hole"] = metrics.psnr_hole(result, target, mask)
            row["psnr_background"] = metrics.psnr_background(result, target, mask, shadow)
            row["ssim_hole"] = metrics.ssim_hole(result, target, mask)
            if shadow is not None:
                row["psnr_shadow"] = metrics.psnr_shadow(result, target, shadow, mask)
            if lpips:
                row["lpips_hole"] = metrics.lpips_hole(result, target, mask, net=lpips)
        if truth is not None and name != SOURCE:
            verdict = judge_removal(source, mask, result, truth)
            row |= {
                "accept": bool(verdict.accept),
                "reason": verdict.reason,
                **{f"judge_{k}": v for k, v in verdict.measures.items()},
            }
        rows.append(row)
    return rows


def _add_scores(results, triplets, runs, discriminator, calibration, threshold) -> None:
    """Add the discriminator's `score`, `probability` and `accept_discriminator`, in place."""
    from rorem_lib.discriminator import score_triplets

    for name, run in runs.items():
        removals = [replace(t, gt=run.paths[t.id]) for t in triplets]
        scores = np.asarray(score_triplets(discriminator, removals), dtype=float)
        probabilities = scores if calibration is None else calibration.apply(scores)
        rows = results.index[results.method == name]  # in the triplets' order
        results.loc[rows, "score"] = scores
        results.loc[rows, "probability"] = probabilities
        accepted = probabilities >= (0.5 if threshold is None else threshold)
        results.loc[rows, "accept_discriminator"] = accepted.astype(float)


def summarise_method(rows: pd.DataFrame, accept_rates: Sequence[float] = (1.0, 0.0)) -> dict:
    """One method's rates (0..1) with 95% intervals over groups, and its measures' means.

    `share_discriminator` is what the discriminator accepts, `success_rate_discriminator` the rate
    that follows (`acceptance.estimate_rate`). A measure that no image has is None. The mean of a
    PSNR is over the images that differ from the truth; `identical` counts the others, by measure.
    """
    summary: dict = {"n": len(rows), "n_groups": rows["group"].nunique()}
    for key, column in (("success", "accept"), ("discriminator", "accept_discriminator")):
        judged = rows.dropna(subset=column) if column in rows else rows[:0]
        answers = judged[column].astype(float) if len(judged) else []
        found = float(answers.mean()) if len(judged) else None
        ends = rate_interval(answers, judged["group"]) if len(judged) else None
        if key == "success":
            summary["success_rate"] = found
        else:
            summary["share_discriminator"] = found
            summary["success_rate_discriminator"] = (
                None if found is None else estimate_rate(found, *accept_rates)
            )
            ends = ends and [estimate_rate(end, *accept_rates) for end in ends]
        summary[f"{key}_interval"] = ends and list(ends)
    summary["identical"] = {}
    for name in MEASURES:
        values = pd.to_numeric(rows[name]).dropna()
        if name.startswith("psnr"):
            summary[name], summary["identical"][name] = metrics.mean_psnr(values)
        else:
            summary[name] = float(values.mean()) if len(values) else None
    summary["n_shadow"] = int(pd.to_numeric(rows["psnr_shadow"]).notna().sum())
    summary["failures"] = {str(k): int(v) for k, v in rows["reason"].value_counts().items()}
    return summary


def collect_cases(
    evaluation: Evaluation,
    triplets: Sequence[Triplet],
    hidden_dir,
    ids: Sequence[str],
    names: Sequence[str],
) -> dict:
    """Images of some test scenes side by side, as `plots.plot_grid` takes them.

    Args:
        evaluation: what `evaluate` measured.
        triplets: the test set.
        hidden_dir: its hidden truth, or None.
        ids: which scenes, one a row.
        names: which methods, one a column.

    Returns:
        Keyword arguments: `pictures` (source, mask, methods, truth), `column_titles`,
        `row_titles`, `captions` (PSNR in the hole, why it was rejected), `frames` (the verdicts).
    """
    by_id = {t.id: t for t in triplets}
    results = evaluation.results.set_index(["method", "id"])
    grid: dict = {
        "pictures": [],
        "captions": [],
        "frames": [],
        "row_titles": [],
        "column_titles": ["source", "mask", *names],
    }
    for item in ids:
        pictures = load_images(by_id[item])
        truth = pictures["gt"] if hidden_dir is None else read_truth(hidden_dir, item).truth
        rows = [results.loc[(name, item)] for name in names]
        removals = [load_image(evaluation.paths[name][item]) for name in names]
        grid["pictures"].append([pictures["source"], pictures["mask"], *removals, truth])
        grid["captions"].append(["", "", *map(_describe_result, rows), ""])
        grid["frames"].append([None, None, *(row.accept for row in rows), None])
        grid["row_titles"].append(str(rows[0].family or "") if rows else "")
    if any(row[-1] is not None for row in grid["pictures"]):
        grid["column_titles"].append("truth")
    return grid


def _describe_result(row: pd.Series) -> str:
    words = [] if pd.isna(row.psnr_hole) else [f"{row.psnr_hole:.1f} dB"]
    words = ["identical"] if row.psnr_hole == np.inf else words
    return "\n".join(words + ([row.reason] if isinstance(row.reason, str) else []))


def audit_acceptance(candidates, hidden_dir, accepted, *, sample: int = 200, seed: int = 0) -> dict:
    """What automatic acceptance was worth, asked of the simulated annotator afterwards.

    It feeds nothing back: no label is written, no candidate is moved. Two random samples are
    judged, one of all candidates and one of the accepted.

    Args:
        candidates: triplets of a candidate set of the built-in scenes, or its meta path.
        hidden_dir: their hidden truth.
        accepted: ids of the accepted candidates.
        sample: removals judged in each of the two samples at most.
        seed: of the samples.

    Returns:
        `candidates_success_rate`, `accepted_precision` (0..1, None if nothing was accepted), each
        with `_interval` (95% Wilson) and `_n`; and `judged_by`: "simulated annotator".
    """
    if isinstance(candidates, (str, Path)):
        candidates = read_triplets(candidates)
    by_id, rng = {t.id: t for t in candidates}, np.random.default_rng(seed)
    verdicts: dict[str, bool] = {}
    audit: dict = {"judged_by": "simulated annotator"}
    for name, ids in (
        ("candidates_success_rate", list(by_id)),
        ("accepted_precision", [i for i in by_id if i in set(accepted)]),
    ):
        drawn = rng.permutation(len(ids))[:sample]
        for item in (ids[i] for i in drawn):
            if item not in verdicts:
                pictures = load_images(by_id[item])
                verdicts[item] = bool(
                    judge_removal(
                        pictures["source"],
                        pictures["mask"],
                        pictures["gt"],
                        read_truth(hidden_dir, item),
                    ).accept
                )
        answers = [verdicts[ids[i]] for i in drawn]
        audit |= {
            name: float(np.mean(answers)) if answers else None,
            f"{name}_interval": list(rate_interval(answers, [by_id[ids[i]].group for i in drawn])),
            f"{name}_n": len(answers),
        }
    return audit
