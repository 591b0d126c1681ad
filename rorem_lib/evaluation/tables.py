"""Tables of an evaluation: Table 1 and Table 2 of the paper in miniature, comparisons, families.

They take what `evaluation.evaluate` measured and return pandas DataFrames with the text a reader
sees. Whoever judged stands in the column's name: the simulated annotator is no person.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from rorem_lib.builtin.scenes import NEW
from rorem_lib.evaluation.figures import is_fast
from rorem_lib.evaluation.methods import SOURCE
from rorem_lib.files import write_text
from rorem_lib.intervals import LEVEL, adjust_holm, compare_paired, rate_interval
from rorem_lib.labels.foreign import guard_cell

SUCCESS = "success, simulated annotator (%)"
GUESSED = "success, discriminator (%)"
MISSING = "–"
# As "-2.8 to +3.6" and "+0.4 points, not separable": no formula.
_DIFFERENCE = re.compile(r"[-+][\d., to()%+-]*(points|dB)?(, not separable)?")


# -------------------------------------------------------------------------------- comparisons


def list_rounds(methods: Sequence[Mapping]) -> list[Mapping]:
    """The methods that are rows of Table 1, in their order: no controls, no few-step variants."""
    return [m for m in methods if m.get("row") and not m.get("control") and not is_fast(m)]


def choose_final(methods: Sequence[Mapping]) -> Mapping | None:
    """The final remover: the last round, or the last remover where no method is a round."""
    slow = [
        m for m in methods if m["kind"] == "remover" and not m.get("control") and not is_fast(m)
    ]
    return (list_rounds(methods) or slow or [None])[-1]


def list_pairs(methods: Sequence[Mapping]) -> list[tuple[str, str]]:
    """Which methods to compare: (first, second) names; "first minus second" is the question.

    The final model with Telea, Navier-Stokes, the controls, the base model and the initialization;
    each round with the one before; few-step variants with the final model and with each other.
    """
    rounds, final = list_rounds(methods), choose_final(methods)
    if final is None:
        return []
    name, pairs = final["name"], []
    pairs += [(name, m["name"]) for m in methods if m.get("control") and not is_fast(m)]
    pairs += [(name, m["name"]) for m in methods if m["kind"] != "remover"]
    pairs += [(name, m["name"]) for m in rounds[:2]]
    pairs += [(b["name"], a["name"]) for a, b in zip(rounds, rounds[1:], strict=False)]
    distilled = [m["name"] for m in methods if m.get("lora")]
    plain = [m["name"] for m in methods if is_fast(m) and not m.get("lora")]
    pairs += [(fast, other) for fast in distilled for other in (*plain, name)]
    return [p for p in dict.fromkeys(pairs) if p[0] != p[1]]


def compare_methods(
    results: pd.DataFrame, pairs: Sequence[tuple[str, str]], *, measure: str = "accept"
) -> list[dict]:
    """Paired comparisons on the images both methods have.

    Args:
        results: `evaluate`'s, one row a method and image; without a `group` each image is one.
        pairs: (first, second) names.
        measure: a column: "accept" (in points), or a measure such as "psnr_hole" (in dB), of which
            images that are identical to the truth are left out.

    Returns:
        One dict a pair: `first`, `second`, `measure`, the fields of `intervals.Comparison`, and as
        one family `p_adjusted` and `significant` (see `adjust_family`). Pairs without common images
        are left out.
    """
    columns = results.pivot(index="id", columns="method", values=measure).astype(float)
    columns = columns.replace(np.inf, np.nan)
    groups = results.assign(group=results.get("group", results["id"]))
    groups = groups.drop_duplicates("id").set_index("id")["group"]
    comparisons = []
    for first, second in pairs:
        if first not in columns or second not in columns:
            continue
        both = columns[[first, second]].dropna()
        if len(both):
            comparison = compare_paired(both[first], both[second], groups[both.index])
            comparisons.append(
                {"first": first, "second": second, "measure": measure, **asdict(comparison)}
            )
    return adjust_family(comparisons)


def adjust_family(comparisons: Sequence[dict]) -> list[dict]:
    """The comparisons of one table with Holm's `p_adjusted`, and whether that is `significant`."""
    adjusted = adjust_holm([c["p_value"] for c in comparisons])
    return [
        c | {"p_adjusted": p, "significant": p < 1 - LEVEL}
        for c, p in zip(comparisons, adjusted, strict=True)
    ]


def compare_all(evaluation) -> list[dict]:
    """The comparisons a report needs, one family: success of `list_pairs`, the final model's PSNRs.

    Args:
        evaluation: an `evaluate.Evaluation`.
    """
    methods, results = evaluation.methods, evaluation.results
    comparisons = compare_methods(results, list_pairs(methods))
    final = choose_final(methods)
    if final is not None:
        name, trained = final["name"], [m for m in list_rounds(methods) if m["row"] != "base"]
        others = [
            m["name"]
            for m in methods
            if m["kind"] != "remover" or (m.get("control") and not is_fast(m))
        ]
        comparisons += compare_methods(results, [(name, o) for o in others], measure="psnr_hole")
        comparisons += compare_methods(results, [(name, SOURCE)], measure="psnr_shadow")
        if len(trained) > 1:  # whether the rounds cost what should stay as it was
            pair = (trained[-1]["name"], trained[0]["name"])
            comparisons += compare_methods(results, [pair], measure="psnr_background")
    return adjust_family(comparisons)


# ------------------------------------------------------------------------------------- tables


def write_csv(table: pd.DataFrame, path: str | Path, *, index: bool = False) -> Path:
    """Write a table for spreadsheets: no name or text in it is taken for a formula."""

    def guard(value):
        own = isinstance(value, str) and _DIFFERENCE.fullmatch(value)
        return value if own else guard_cell(value)

    guarded = table.map(guard).rename(index=guard, columns=guard)
    return write_text(path, guarded.to_csv(index=index))


def format_rate(rate: float | None, interval: Sequence[float] | None = None) -> str:
    """A rate of 0..1 as "41.8 (37.5 to 46.2)"; a dash where it was not measured."""
    if rate is None:
        return MISSING
    ends = "" if interval is None else f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
    return f"{100 * rate:.1f}{ends}"


def format_number(value: float | None, digits: int = 2) -> str:
    """A number with fixed digits, thousands apart; a dash where it was not measured."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def format_psnr(row: Mapping, name: str) -> str:
    """A mean PSNR in dB with the number of identical images that it leaves out."""
    count = (row.get("identical") or {}).get(name)
    if not count:
        return format_number(row.get(name))
    mean = row.get(name)
    return f"identical ({count})" if mean is None else f"{mean:.2f} ({count} identical)"


def make_method_table(methods: Sequence[Mapping], source: Mapping | None = None) -> pd.DataFrame:
    """Table 2 in miniature: methods by metrics, the untouched source as the first row.

    Args:
        methods: `Evaluation.methods`.
        source: `Evaluation.source`.
    """
    rows = [] if source is None else [{"name": "source (untouched)", **source}]
    lpips = any(m.get("lpips_hole") is not None for m in methods)
    table = pd.DataFrame(
        [
            {
                "method": m["name"],
                SUCCESS: format_rate(m.get("success_rate"), m.get("success_interval")),
                GUESSED: format_rate(m.get("success_rate_discriminator")),
                "PSNR hole (dB)": format_psnr(m, "psnr_hole"),
                "PSNR shadow (dB)": format_psnr(m, "psnr_shadow"),
                "PSNR background (dB)": format_psnr(m, "psnr_background"),
                "SSIM hole": format_number(m.get("ssim_hole"), 3),
                **({"LPIPS hole": format_number(m.get("lpips_hole"), 4)} if lpips else {}),
                "s per image": format_number(m.get("seconds_per_image"), 4),
                "UNet calls": format_number(m.get("unet_calls"), 0),
            }
            for m in [*rows, *methods]
        ]
    )
    return table.set_index("method") if len(table) else table


def make_round_table(rounds: Sequence[Mapping]) -> pd.DataFrame:
    """Table 1 in miniature: what each round added and what it gained.

    Args:
        rounds: dicts with `name`, `candidates`, `accepted`, `train_size`, `success_rate`,
            `success_interval`, `success_rate_discriminator`, `psnr_hole`, `psnr_background` and
            `identical`; None or missing where a round has none.
    """
    table = pd.DataFrame(
        [
            {
                "round": r["name"],
                "candidates": format_number(r.get("candidates"), 0),
                "accepted": format_number(r.get("accepted"), 0)
                + (
                    f" ({100 * r['accepted'] / r['candidates']:.0f}%)"
                    if r.get("accepted") is not None and r.get("candidates")
                    else ""
                ),
                "training size": format_number(r.get("train_size"), 0),
                SUCCESS: format_rate(r.get("success_rate"), r.get("success_interval")),
                GUESSED: format_rate(r.get("success_rate_discriminator")),
                "PSNR hole (dB)": format_psnr(r, "psnr_hole"),
                "PSNR background (dB)": format_psnr(r, "psnr_background"),
            }
            for r in rounds
        ],
        columns=[
            "round",
            "candidates",
            "accepted",
            "training size",
            SUCCESS,
            GUESSED,
            "PSNR hole (dB)",
            "PSNR background (dB)",
        ],
    )
    return table.set_index("round")


MEASURE_NAMES = {
    "accept": "success, simulated annotator",
    "psnr_hole": "PSNR hole",
    "psnr_shadow": "PSNR shadow",
    "psnr_background": "PSNR background",
}


def make_comparison_table(comparisons: Sequence[Mapping]) -> pd.DataFrame:
    """Paired comparisons: differences with 95% intervals, p, and p adjusted for the table.

    A difference whose adjusted p is not below 0.05 is called "not separable" in its own cell.
    """
    return pd.DataFrame(
        [
            {
                "first": c["first"],
                "minus": c["second"],
                "measure": MEASURE_NAMES.get(c["measure"], c["measure"]),
                "difference": format_difference(c)
                + ("" if c["significant"] else ", not separable"),
                "95% interval": format_ends(c),
                "p": _format_p(c["p_value"]),
                "p (Holm)": _format_p(c.get("p_adjusted")),
                "only first / only second": MISSING
                if c["only_first"] is None
                else f"{c['only_first']:g} / {c['only_second']:g}",
                "images": c["n"],
            }
            for c in comparisons
        ]
    )


def format_difference(comparison: Mapping) -> str:
    """A difference with its unit: "+1.2 points" of success, "+0.25 dB" of a measure."""
    if comparison["only_first"] is None:
        return f"{comparison['difference']:+.2f} dB"
    return f"{comparison['difference']:+.1f} points"


def format_ends(comparison: Mapping) -> str:
    """A difference's interval, "-0.4 to +2.1"; a dash where a single group leaves none."""
    ends = comparison["low"], comparison["high"]
    if any(end is None or math.isnan(end) for end in ends):
        return MISSING
    digits = 2 if comparison["only_first"] is None else 1
    return " to ".join(f"{end:+.{digits}f}" for end in ends)


def make_study_table(study: Mapping) -> pd.DataFrame:
    """What people said in a user study, a row a method or a pair of methods.

    Args:
        study: what `user_study.summarise_study` returns.
    """
    if study["preferences"]:
        return pd.DataFrame(
            [
                {
                    "first": p["first"],
                    "second": p["second"],
                    "images": p["n"],
                    "answers": p["n_answers"],
                    "first better / same / second better (%)": " / ".join(
                        f"{100 * p[x]:.0f}" for x in ("prefers_first", "same", "prefers_second")
                    ),
                    "preference for the first (%)": format_rate(p["preference"], p["interval"]),
                    "p (sign test)": _format_p(p["p_value"]),
                }
                for p in study["preferences"]
            ]
        ).set_index("first")
    table = pd.DataFrame(
        [
            {
                "method": m["name"],
                "images": m["n"],
                "ties": m.get("ties", 0),
                "success, people (%)": format_rate(m["success_rate"], m["success_interval"]),
                SUCCESS: format_rate(m["simulated_rate"]),
                "both say the same (%)": format_rate(m["same_verdict"]),
            }
            for m in study["methods"]
        ],
        columns=[
            "method",
            "images",
            "ties",
            "success, people (%)",
            SUCCESS,
            "both say the same (%)",
        ],
    )
    return table.set_index("method")


def _format_p(value: float | None) -> str:
    return MISSING if value is None else "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def make_family_table(results: pd.DataFrame, methods: Sequence[Mapping]) -> pd.DataFrame:
    """Success rates (0..1) by background family; `known`, `new` and `all` are the first columns.

    Known families occur in the base model's pre-training and in the first triplets, new ones do
    not. Columns name their number of images. Families without a name are left out.
    """
    judged = results[results.accept.notna() & results.family.notna()]
    new = judged.family.isin(NEW)
    groups = {"known": judged[~new], "new": judged[new]}
    groups |= {
        f"{family}{' *' if family in NEW else ''}": rows
        for family, rows in judged.groupby("family")
    }
    names = [m["name"] for m in methods]
    table = pd.DataFrame(
        {
            f"{group} ({rows.id.nunique()})": rows.groupby("method").accept.agg(
                lambda c: float(np.mean(c.astype(bool)))
            )
            for group, rows in groups.items()
            if len(rows)
        },
        dtype=float,
    )
    table = table.reindex([n for n in names if n in table.index])
    table.attrs["methods"] = list(methods)
    return table


def split_success(results: pd.DataFrame, name: str) -> dict:
    """A method's success in known and in new families, each with count and 95% interval."""
    rows = results[(results.method == name) & results.accept.notna() & results.family.notna()]
    new, split = rows.family.isin(NEW), {}
    for title, part in (("known", rows[~new]), ("new", rows[new])):
        answers = part.accept.astype(float)
        split[title] = {
            "success_rate": float(answers.mean()) if len(part) else None,
            "n": len(part),
            "interval": list(rate_interval(answers, part.get("group"))),
        }
    return split


def choose_cases(results: pd.DataFrame, name: str, *, count: int = 3) -> dict[str, list[str]]:
    """Test images to show: ids under "best", "median" and "worst".

    Images are ranked by a method's PSNR in the hole. PSNR is a bad judge of success but the same
    ruler for every method; from each end, and around the middle, the nearest `count` images of
    families not yet shown there are taken, so that one easy family does not fill the sheet.
    """
    rows = results[results.method == name].dropna(subset=["psnr_hole"])
    rows = rows.sort_values("psnr_hole", ascending=False, kind="stable")
    middle = sorted(range(len(rows)), key=lambda place: abs(place - (len(rows) - 1) / 2))
    ranked = {
        "best": list(range(len(rows))),
        "median": middle,
        "worst": list(range(len(rows)))[::-1],
    }
    ids, families = rows.id.tolist(), rows.family.tolist()
    cases, shown = {}, set()
    for title, places in ranked.items():
        places = [p for p in places if ids[p] not in shown]
        fresh = [
            p for n, p in enumerate(places) if families[p] not in {families[q] for q in places[:n]}
        ]
        cases[title] = [ids[p] for p in (*fresh, *(q for q in places if q not in fresh))][:count]
        shown |= set(cases[title])
    return cases
