"""The report over several trainings of one recipe: how far another seed moves its figures.

The intervals of one run say what other test images would have changed; a model trained again moves
too. `rorem run RECIPE --seeds 4 5 6` makes one run a seed, `runs/<recipe>-seed<seed>`, and this
module compares them. Nothing is shared: a seed fixes noise, order and weights, and built-in scenes
are rendered anew, so the spread is that of data, training and test images together. Files outside
of the runs, such as a recipe's own test set, are the same for each.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from rorem_lib.evaluation import report, tables
from rorem_lib.files import clean_metrics, format_time, read_json, write_json, write_text
from rorem_lib.intervals import mean_interval

FIGURES = {  # of a row or method: its title, by how much it is multiplied, and digits
    "success_rate": (tables.SUCCESS, 100, 1),
    "success_rate_discriminator": (tables.GUESSED, 100, 1),
    "psnr_hole": ("PSNR hole (dB)", 1, 2),
    "psnr_shadow": ("PSNR shadow (dB)", 1, 2),
    "psnr_background": ("PSNR background (dB)", 1, 2),
    "lpips_hole": ("LPIPS hole", 1, 4),
}


def collect_seeds(summaries: Mapping[int, Mapping]) -> dict:
    """What the trainings say together.

    Args:
        summaries: seed -> that run's `summary.json`.

    Returns:
        `seeds`; `rounds` and `methods`, one dict a row of Table 1 and 2: its `name` and for each of
        `FIGURES` a `describe_spread`; `comparisons`, one dict a pair and measure: `first`,
        `second`, `measure`, `only_first` (None where it is in dB), a `describe_spread` of the
        differences, `low` and `high` (95%, Student's t over trainings; NaN from one) and `agree`,
        how many trainings have the more frequent sign.
    """
    together = {"seeds": list(summaries)}
    for part in ("rounds", "methods"):
        rows = _gather([s[part] for s in summaries.values()], ("name",))
        together[part] = [
            {"name": name} | {key: describe_spread([r.get(key) for r in found]) for key in FIGURES}
            for (name,), found in rows.items()
        ]
    keys = ("first", "second", "measure")
    pairs = _gather([s["comparisons"] for s in summaries.values()], keys)
    together["comparisons"] = [
        dict(zip(keys, names, strict=True)) | _describe_differences(found)
        for names, found in pairs.items()
    ]
    return clean_metrics(together)


def _gather(runs: Sequence[Sequence[Mapping]], keys: tuple[str, ...]) -> dict[tuple, list]:
    """The rows of several runs that have the same keys, in the first run's order."""
    found: dict[tuple, list] = {}
    for rows in runs:
        for row in rows:
            found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def describe_spread(values: Sequence[float | None]) -> dict | None:
    """`mean`, standard deviation `sd` (None of one), `min`, `max` and `n`; None without values."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    spread = float(np.std(known, ddof=1)) if len(known) > 1 else None
    ends = {"min": float(min(known)), "max": float(max(known))}
    return {"mean": float(np.mean(known)), "sd": spread, **ends, "n": len(known)}


def _describe_differences(found: Sequence[Mapping]) -> dict:
    differences = [c["difference"] for c in found]
    low, high = mean_interval(differences)
    spread, signs = describe_spread(differences), np.sign(differences)
    agree = max(int((signs > 0).sum()), int((signs < 0).sum()))
    return {"only_first": found[0]["only_first"], **spread, "low": low, "high": high,
            "agree": agree}  # fmt: skip


def make_spread_table(rows: Sequence[Mapping], title: str) -> pd.DataFrame:
    """Rows of Table 1 or 2: mean, standard deviation, least and largest over the trainings.

    Args:
        rows: `rounds` or `methods` of `collect_seeds`.
        title: the column of their names.
    """
    table = pd.DataFrame(index=pd.Index([row["name"] for row in rows], name=title))
    for key, (column, scale, digits) in FIGURES.items():
        if any(row[key] for row in rows):
            table[column] = [_format_spread(row[key], scale, digits) for row in rows]
    return table


def _format_spread(spread: Mapping | None, scale: float, digits: int) -> str:
    """ "62.4 ± 1.8 (60.2 to 64.1)"; the mean alone of one training; a dash of none."""
    if spread is None:
        return tables.MISSING
    mean, low, high = (f"{scale * spread[key]:.{digits}f}" for key in ("mean", "min", "max"))
    if spread["sd"] is None:
        return mean
    return f"{mean} ± {scale * spread['sd']:.{digits}f} ({low} to {high})"


def make_difference_table(comparisons: Sequence[Mapping]) -> pd.DataFrame:
    """Mean paired differences with their interval over trainings, and how many agree in sign."""
    rows = []
    for c in comparisons:
        clear = c["low"] is not None and (c["low"] > 0 or c["high"] < 0)
        text = tables.format_difference(c | {"difference": c["mean"]})
        ends = tables.format_ends(c | {"low": c["min"], "high": c["max"]})
        rows.append(
            {
                "first": c["first"],
                "minus": c["second"],
                "measure": tables.MEASURE_NAMES.get(c["measure"], c["measure"]),
                "difference": text if clear else f"{text}, not separable",
                "95% interval over trainings": tables.format_ends(c),
                "least to largest": ends,
                "same sign": f"{c['agree']} of {c['n']}",
            }
        )
    return pd.DataFrame(rows)


def write_seeds_report(folder: Path, name: str, runs: Mapping[int, Path]) -> Path:
    """Write `seeds.json` and `report.html`.

    Args:
        folder: where to, made if it is missing.
        name: the recipe's.
        runs: seed -> the folder of that finished run, with its `summary.json`.

    Returns:
        The report's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    together = collect_seeds({s: read_json(r / report.SUMMARY_FILE) for s, r in runs.items()})
    links = {
        seed: Path(os.path.relpath(run / report.REPORT_FILE, folder)).as_posix()
        for seed, run in runs.items()
    }
    page = report.render_page(
        "seeds.html",
        name=name,
        links=links,
        written=format_time(),
        round_table=report.to_html(
            make_spread_table(together["rounds"], "round"), together["rounds"]
        ),
        method_table=report.to_html(
            make_spread_table(together["methods"], "method"), together["methods"]
        ),
        difference_table=report.to_html(
            make_difference_table(together["comparisons"]), together["comparisons"]
        ),
    )
    write_json(folder / "seeds.json", {"recipe": name, **together})
    return write_text(folder / report.REPORT_FILE, page)
