"""The report of a recipe's run: `report.html`, one self-contained page, and `summary.json`.

Everything is read from the stages' folders (`metrics.json`, `metrics.jsonl`, `calibration.json`,
`figures/`), so the report can be written again at any time and says what has not been run.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader

from rorem_lib import plots
from rorem_lib.acceptance import CALIBRATION_FILE
from rorem_lib.evaluation import figures, tables
from rorem_lib.files import clean_metrics, format_time, read_json, write_json, write_text

REPORT_FILE, SUMMARY_FILE = "report.html", "summary.json"
TRAINING = ("02_train_remover", "05_train_discriminator", "07_distill_lora")
METHOD_KEYS = (
    "name",
    "success_rate",
    "success_rate_discriminator",
    "psnr_hole",
    "psnr_shadow",
    "seconds_per_image",
    "unet_calls",
    "success_interval",
    "psnr_background",
    "identical",
    "ssim_hole",
    "lpips_hole",
    "kind",
    "row",
    "control",
    "num_inference_steps",
    "n",
    "n_groups",
)
DISCRIMINATOR_KEYS = ("auc", "candidates_success_rate", "accepted_precision", "accepted_share")


@dataclass(frozen=True)
class StageRecord:
    """A stage as found on the disk; `metrics` is empty and `done` False where it was not run."""

    name: str
    notebook: str
    row: str
    folder: Path
    parameters: Mapping
    metrics: dict
    seconds: float | None
    done: bool


def read_stages(run_dir: Path, recipe) -> list[StageRecord]:
    """All stages of a recipe, in its order, as they stand in `run_dir`."""
    stages = []
    for stage in recipe.stages:
        folder = run_dir / stage.name
        done = (folder / "DONE").is_file()
        metrics = _read(folder / "metrics.json") if done else {}
        seconds = _read(folder / "stage.json").get("seconds") if done else None
        stages.append(
            StageRecord(
                stage.name,
                Path(stage.notebook).stem,
                stage.row,
                folder,
                stage.parameters,
                metrics,
                seconds,
                done,
            )
        )
    return stages


def _read(path: Path) -> dict:
    """A JSON object; empty where it is missing or torn."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _take(stages: list[StageRecord], notebook: str, **requested) -> list[StageRecord]:
    """The finished stages of a notebook (and of a row)."""
    return [
        s
        for s in stages
        if s.done
        and s.notebook == notebook
        and all(getattr(s, key) == value for key, value in requested.items())
    ]


# -------------------------------------------------------------------------------- the figures


def get_evaluation(stages: list[StageRecord]) -> StageRecord | None:
    """The evaluation that counts: the last finished one, unless an earlier one has more methods."""
    found = [s for s in _take(stages, "08_evaluate") if s.metrics.get("methods")]
    return max(reversed(found), key=lambda s: len(s.metrics["methods"]), default=None)


def collect_rounds(stages: list[StageRecord]) -> list[dict]:
    """Rows of Table 1: what each added, its training set's size, and how its model did.

    A row is one that trains a remover, or that a method of the evaluation stands for; controls and
    few-step variants are none. Like the paper's, the initialization accepts all it is given.
    """
    evaluation = get_evaluation(stages)
    planned = [
        m for s in stages if s.notebook == "08_evaluate" for m in s.parameters.get("methods") or []
    ]
    aside = {m.get("row") for m in planned if m.get("control") or tables.is_fast(m)} | {"control"}
    measured = (
        {m["row"]: m for m in tables.list_rounds(evaluation.metrics["methods"])}
        if evaluation
        else {}
    )
    trained = [s.row for s in stages if s.notebook == "02_train_remover" and s.row]
    leading = [row for row in measured if row not in trained]  # base: nothing trains it
    rounds = []
    for name in dict.fromkeys([*leading, *trained]):
        if name in aside and name not in measured:
            continue
        chosen = _take(stages, "04_annotate", row=name) + _take(
            stages, "06_auto_annotate", row=name
        )
        trainings = _take(stages, "02_train_remover", row=name)
        size = trainings[-1].metrics.get("train_size") if trainings else None
        candidates = accepted = None
        if chosen:
            candidates = sum(
                s.metrics.get("n_labelled") or s.metrics.get("n_candidates") or 0 for s in chosen
            )
            accepted = sum(s.metrics.get("n_accepted") or 0 for s in chosen)
        elif trainings and not any(s.row == name and s not in trainings for s in stages):
            candidates = accepted = size
        method = measured.get(name, {})
        rounds.append(
            {
                "name": name,
                "candidates": candidates,
                "accepted": accepted,
                "train_size": size,
                **{
                    key: method.get(key)
                    for key in (
                        "success_rate",
                        "success_rate_discriminator",
                        "psnr_hole",
                        "psnr_background",
                        "identical",
                        "success_interval",
                    )
                },
            }
        )
    return rounds


def collect_discriminator(stages: list[StageRecord]) -> dict:
    """The last discriminator and what its automatic acceptance was worth; earlier ones by round."""
    by_round = []
    for accepted in _take(stages, "06_auto_annotate"):
        trained = [
            s
            for s in _take(stages, "05_train_discriminator")
            if stages.index(s) < stages.index(accepted)
        ]
        values = {**(trained[-1].metrics if trained else {}), **accepted.metrics}
        by_round.append(
            {
                "row": accepted.row,
                **{
                    key: values.get(key)
                    for key in (
                        *DISCRIMINATOR_KEYS,
                        "candidates_success_rate_interval",
                        "accepted_precision_interval",
                        "expected_precision",
                        "n_candidates",
                        "n_accepted",
                    )
                },
            }
        )
    last = {}
    for stage in _take(stages, "05_train_discriminator")[-1:]:
        last = {"auc": stage.metrics.get("auc"), "auc_interval": stage.metrics.get("auc_interval")}
    final = by_round[-1] if by_round else {}
    return {**{key: final.get(key) for key in DISCRIMINATOR_KEYS}, **last, "by_round": by_round}


def collect_summary(run_dir: Path, recipe, stages: list[StageRecord] | None = None) -> dict:
    """What `summary.json` holds; rates from 0 to 1, None where a stage was not run."""
    stages = read_stages(run_dir, recipe) if stages is None else stages
    evaluation = get_evaluation(stages)
    measured = evaluation.metrics if evaluation else {}
    seconds = {s.name: s.seconds for s in stages if s.seconds is not None}
    return clean_metrics(
        {
            "recipe": recipe.name,
            "rounds": collect_rounds(stages),
            "methods": [
                {key: m.get(key) for key in METHOD_KEYS} for m in measured.get("methods", [])
            ],
            "source": measured.get("source"),
            "comparisons": measured.get("comparisons", []),
            "discriminator": collect_discriminator(stages),
            "wall_seconds": {**seconds, "total": round(sum(seconds.values()), 2)},
            "test_size": measured.get("test_size"),
            "seed": recipe.seed if recipe.seed is not None else measured.get("seed"),
            "judged_by": measured.get("judged_by"),
            "user_study": study
            if (study := measured.get("user_study") or {}).get("answers")
            else None,
            "simulated_labels": any(s.metrics.get("simulated") for s in stages),
            "not_run": [s.name for s in stages if not s.done],
        }
    )


# ------------------------------------------------------------------------------- what it shows


def describe_findings(summary: Mapping) -> list[str]:
    """The run in sentences, each with its interval; only what was measured."""
    rounds = [r for r in summary["rounds"] if r["success_rate"] is not None]
    methods = {m["name"]: m for m in summary["methods"]}
    by_pair = {(c["first"], c["second"], c["measure"]): c for c in summary["comparisons"]}
    said = []
    if len(rounds) > 1:
        said.append(
            "Success after each round, judged by the simulated annotator: "
            + ", ".join(f"{r['name']} {100 * r['success_rate']:.1f}%" for r in rounds)
            + "."
        )
    for (first, second, measure), c in by_pair.items():
        other = methods.get(second, {})
        if (
            measure != "accept"
            or methods.get(first, {}).get("row") != (rounds or [{}])[-1].get("name")
            or not (other.get("control") or other.get("kind") == "telea")
        ):
            continue
        verdict = "significant" if c["significant"] else "not separable"
        p = c.get("p_adjusted", c["p_value"])
        said.append(
            f"{first} against {second}: {c['difference']:+.1f} points ({tables.format_ends(c)}), "
            f"p = {p:.2g} adjusted for all comparisons, {verdict}."
        )
    for (first, second, measure), c in by_pair.items():
        if measure == "psnr_shadow":
            side = "nearer" if c["difference"] > 0 else "further from"
            said.append(
                f"Where the shadow lies outside of the mask, {first} is {side} the truth "
                f"than the untouched {second}: {tables.format_difference(c)} "
                f"({tables.format_ends(c)})."
            )
    said += _describe_background(summary)
    gaps = [
        (abs(m["success_rate"] - m["success_rate_discriminator"]), m["name"])
        for m in methods.values()
        if None not in (m["success_rate"], m["success_rate_discriminator"])
    ]
    if gaps:
        said.append(
            f"The discriminator's success rate is within {100 * max(gaps)[0]:.1f} points "
            "of the simulated annotator's for every method (furthest: "
            f"{max(gaps)[1]})."
        )
    judge = summary["discriminator"]
    if judge["accepted_precision"] is not None and judge["candidates_success_rate"]:
        said.append(
            f"Automatic acceptance kept {100 * judge['accepted_share']:.0f}% of the last round's "
            f"candidates; {100 * judge['accepted_precision']:.0f}% of what it kept is good, of "
            f"all candidates {100 * judge['candidates_success_rate']:.0f}%."
        )
    return said


def _describe_background(summary: Mapping) -> list[str]:
    """That what should stay as it was falls from round to round, if it does."""
    measured = {
        r["name"]: r["psnr_background"]
        for r in summary["rounds"]
        if r.get("psnr_background") is not None and r["name"] != "base"
    }
    change = [c for c in summary["comparisons"] if c["measure"] == "psnr_background"]
    if not change or not change[0]["significant"] or change[0]["difference"] >= 0:
        return []
    values = ", ".join(f"{name} {value:.1f}" for name, value in measured.items())
    return [
        "Outside of hole and shadow the removals drift away from the source with the rounds: PSNR "
        f"of the background {values} dB ({change[0]['first']} against {change[0]['second']} "
        f"{tables.format_difference(change[0])}, {tables.format_ends(change[0])})."
    ]


def write_report(run_dir: Path, recipe) -> Path:
    """Write `summary.json` and `report.html` to `run_dir`.

    Args:
        run_dir: `runs/<recipe>`.
        recipe: a `recipes.Recipe`; its stages that were not run are named as such.

    Returns:
        The report's path.
    """
    run_dir = Path(run_dir)
    stages = read_stages(run_dir, recipe)
    summary = collect_summary(run_dir, recipe, stages)
    evaluation = get_evaluation(stages)
    methods = evaluation.metrics["methods"] if evaluation else []
    study = summary["user_study"]
    versions = next((_read(s.folder / "stage.json") for s in reversed(stages) if s.done), {})
    page = render_page(
        "report.html",
        recipe=recipe,
        summary=summary,
        written=format_time(),
        versions=versions,
        rate=tables.format_rate,
        number=tables.format_number,
        findings=describe_findings(summary),
        round_table=to_html(tables.make_round_table(summary["rounds"]), summary["rounds"]),
        method_table=to_html(tables.make_method_table(methods, summary["source"]), methods),
        comparison_table=to_html(
            tables.make_comparison_table(summary["comparisons"]), summary["comparisons"]
        ),
        study_table=to_html(tables.make_study_table(study), [study]) if study else "",
        study_figures=_embed_figures(evaluation, "user_study") if study else [],
        pictures=_draw_figures(summary, methods),
        cases=_embed_figures(evaluation, "cases_best", "cases_median", "cases_worst"),
        failures=_embed_figures(evaluation, "failures"),
        families=_embed_figures(evaluation, "families"),
        acceptances=[
            (s, _embed_figures(s, "scores", "best_accepted", "worst_accepted"))
            for s in _take(stages, "06_auto_annotate")
        ],
        calibrations=[(s, _draw_calibration(s)) for s in _take(stages, "05_train_discriminator")],
        losses=_draw_losses(stages),
        stages=[_describe_stage(s, run_dir) for s in stages],
    )
    write_json(run_dir / SUMMARY_FILE, summary)
    return write_text(run_dir / REPORT_FILE, page)


def render_page(template: str, **values) -> str:
    """A page from one of this folder's templates; what goes into it is escaped."""
    pages = Environment(
        loader=PackageLoader("rorem_lib.evaluation", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template(template).render(values)


def to_html(table, rows) -> str:
    """A table as HTML, its texts escaped; empty where there is nothing to show."""
    if not rows:
        return ""
    if "first" in table:
        table = table.set_index("first")
    return table.rename_axis(index=None).to_html(border=0, escape=True, classes="data")


def _encode(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _draw(figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, bbox_inches="tight", format="png")
    return _encode(buffer.getvalue())


def _draw_figures(summary: Mapping, methods: list[dict]) -> dict[str, str]:
    """Figures drawn from the summary: name -> data URI."""
    drawn = {}
    if any(r["success_rate"] is not None for r in summary["rounds"]):
        drawn["rounds"] = _draw(figures.plot_rounds(summary["rounds"]))
    if any(m.get("success_rate") is not None for m in methods):
        drawn["success"] = _draw(figures.plot_success(methods))
    success = [c for c in summary["comparisons"] if c["measure"] == "accept"]
    if success:
        drawn["comparisons"] = _draw(figures.plot_comparisons(success))
    return drawn


def _draw_calibration(stage: StageRecord) -> str:
    content = _read(stage.folder / CALIBRATION_FILE)
    if not (content.get("curve") or {}).get("predicted"):
        return ""
    return _draw(
        plots.plot_calibration(
            content["curve"],
            content.get("roc"),
            auc=stage.metrics.get("auc"),
            auc_interval=stage.metrics.get("auc_interval"),
        )
    )


def _draw_losses(stages: list[StageRecord]) -> str:
    histories = {}
    for stage in stages:
        if stage.notebook in TRAINING:
            lines = _read_history(stage.folder)
            if lines:
                histories[stage.name] = lines
    return _draw(plots.plot_losses(histories)) if histories else ""


def _read_history(folder: Path) -> list[dict]:
    """The logged steps of a stage's training; torn lines are left out."""
    path = next(
        (
            p
            for p in (folder / "metrics.jsonl", *sorted(folder.glob("*/metrics.jsonl")))
            if p.is_file()
        ),
        None,
    )
    if path is None:
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line and line.get("loss") is not None:
            lines.append(line)
    return lines


def _embed_figures(stage: StageRecord | None, *names: str) -> list[tuple[str, str]]:
    """Those of a stage's saved figures that are there: (title, data URI)."""
    paths = [] if stage is None else [stage.folder / "figures" / f"{n}.png" for n in names]
    return [
        (path.stem.replace("_", " "), _encode(path.read_bytes()))
        for path in paths
        if path.is_file()
    ]


def _describe_stage(stage: StageRecord, run_dir: Path) -> dict:
    notebook = stage.folder / "notebook.ipynb"
    return {
        "name": stage.name,
        "notebook": stage.notebook,
        "row": stage.row,
        "seconds": stage.seconds,
        "done": stage.done,
        "link": Path(os.path.relpath(notebook, run_dir)).as_posix() if notebook.is_file() else None,
    }
