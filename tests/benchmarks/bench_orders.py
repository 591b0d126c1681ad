"""How many labels each order needs until the discriminator is as good as another order makes it.

The demo's first candidates (removals of the built-in scenes by the initialization remover) are the
pool, further ones of other images are the test. Labels come from the simulated annotator. Each
order draws from the pool as notebook 04 does, in rounds that double the number of labels; before
each round "uncertainty" gets the scores of a discriminator trained on the labels so far. Every
discriminator is trained alike, by the demo's settings but for half its steps. Quality is the area
under the ROC curve on the test.

    rorem run demo --only assemble; rorem run demo --only initialization
    python tests/benchmarks/bench_orders.py runs/demo work/orders [--workers 2]
    python tests/benchmarks/bench_orders.py --summarise work/orders
    python tests/benchmarks/bench_orders.py --draw

Goes on where it was stopped. The summary writes `results/orders.json` and
`papers/figures/orders.png`, which `--draw` draws again; the goal is one third of random order's
labels. The stratified order is measured without the random audit share that notebook 04 mixes in.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import yaml
from measuring import RESULTS, save_result
from scipy import stats
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import roc_auc_score

from rorem_lib import plots
from rorem_lib.files import ROOT, write_json
from rorem_lib.labels.log import read_labels
from rorem_lib.labels.queue import order_items, stratify_items
from rorem_lib.labels.votes import merge_votes
from rorem_lib.parameters import read_defaults, read_parameters

ORDERS = ("random", "uncertainty", "stratified")
BUDGETS = (75, 150, 300, 600)
SEEDS = range(5)
STEPS = 300
# The part of the demo's pool that no candidate was made of at this point of the demo.
TEST_START, TEST_PICTURES, POOL_PICTURES = 600, 250, 600


def read_demo(notebook: str, config: str) -> tuple[int, dict]:
    """The demo's seed, and what it gives to a notebook's config, its cell's values included."""
    recipe = yaml.safe_load((ROOT / "notebooks/recipes/demo.yaml").read_text())
    cell = read_parameters(ROOT / "notebooks" / f"{notebook}.ipynb")
    values = {name: parameter.default for name, parameter in cell.items()}
    values |= recipe["defaults"][notebook]
    return recipe["seed"], {k: v for k, v in values.items() if k in read_defaults(config)}


def make_candidates(run: Path, work: Path) -> None:
    """Pool and test candidates as the demo's recipe makes them, and their labels."""
    from rorem_lib.builtin.judge import simulate_labels
    from rorem_lib.removal import GenerateConfig, generate_candidates

    seed, given = read_demo("03_generate_removals", "removal.GenerateConfig")
    for name, start, count in (("pool", 0, POOL_PICTURES), ("test", TEST_START, TEST_PICTURES)):
        generate_candidates(
            GenerateConfig(
                **given
                | {
                    "output_dir": str(work / name),
                    "meta_path": [str(run / "assemble/pool")],
                    "start": start,
                    "pretrained_model_name_or_path": str(run / "initialization/remover"),
                    "count": count,
                    "seed": seed,
                }
            )
        )
        simulate_labels(
            work / name / "candidates/meta.json",
            run / "assemble/hidden/pool",
            work / name / "labels",
        )


def read_set(work: Path, name: str):
    """Triplets by id, and what the simulated annotator said: id -> accepted."""
    from rorem_lib.data.triplets import read_triplets

    decisions = merge_votes(read_labels(work / name / "labels"))
    triplets = {t.id: t for t in read_triplets(work / name / "candidates")}
    return triplets, {i: decision == "accept" for i, decision in decisions.items()}


def train(folder: Path, triplets, answers: dict, ids: list[str], seed: int):
    """A discriminator trained on these labels alone."""
    from rorem_lib.data.writer import TripletWriter
    from rorem_lib.discriminator import Discriminator, DiscriminatorConfig, train_discriminator

    _, given = read_demo("05_train_discriminator", "discriminator.DiscriminatorConfig")
    shutil.rmtree(folder, ignore_errors=True)
    with TripletWriter(folder / "labelled") as writer:
        for i in ids:
            writer.add_triplet(triplets[i], score=float(answers[i]))
    train_discriminator(
        DiscriminatorConfig(
            **{
                **given,
                "output_dir": str(folder),
                "meta_path": [str(folder / "labelled")],
                "max_train_steps": STEPS,
                "checkpointing_steps": STEPS,
                "seed": seed,
                "latent_cache_dir": str(folder / "cache"),
            }
        )
    )
    return Discriminator.from_pretrained(str(folder / "discriminator"))


def follow_order(work: Path, order: str, seed: int) -> None:
    """Label in one order from the smallest budget to the largest; a line a budget."""
    import torch

    from rorem_lib.discriminator import score_triplets

    torch.set_num_threads(1)
    logging.getLogger("rorem_lib").setLevel(logging.WARNING)
    found = work / "found" / f"{order}-{seed}.json"
    rows = json.loads(found.read_text()) if found.is_file() else []
    pool, answers = read_set(work, "pool")
    test, truth = read_set(work, "test")
    strata = stratify_items(pool.values()) if order == "stratified" else None
    done = rows[-1]["ids"] if rows else []
    scores = dict(rows[-1]["scores"]) if rows else None
    for budget in BUDGETS[len(rows) :]:
        # nothing is known before the first labels: they are drawn at random, as in notebook 04
        now = "random" if order == "uncertainty" and not done else order
        taken = set(done)
        queue = order_items(
            pool,
            order=now,
            scores=scores,
            strata=strata,
            overlap_share=0,
            audit_share=0 if now == "stratified" else 0.15,
            repeat_share=0,
            annotator="simulated",
            seed=seed,
        )
        done = done + [x.id for x in queue if x.id not in taken][: budget - len(done)]
        folder = work / "training" / f"{order}-{seed}"
        model = train(folder, pool, answers, done, seed)
        auc = roc_auc_score([truth[i] for i in test], score_triplets(model, list(test.values())))
        if order == "uncertainty" and budget < BUDGETS[-1]:
            scores = dict(zip(pool, score_triplets(model, list(pool.values())).astype(float)))
        accepted = float(np.mean([answers[i] for i in done]))
        rows.append(
            {
                "labels": budget,
                "auc": float(auc),
                "accepted": accepted,
                "ids": done,
                "scores": scores or {},
            }
        )
        write_json(found, rows)
        print(f"{order:12} seed {seed} {budget:5} labels  AUC {auc:.3f}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)


def count_needed(curve: np.ndarray, target: float) -> float:
    """Labels at which a rising curve [len(BUDGETS)] reaches the target; infinite if it does not."""
    rising = IsotonicRegression().fit_transform(np.log(BUDGETS), curve)
    if rising[-1] < target:
        return np.inf
    place = int(np.argmax(rising >= target))
    if not place:
        return float(BUDGETS[0])
    between = slice(place - 1, place + 1)
    return float(np.exp(np.interp(target, rising[between], np.log(BUDGETS[between]))))


def summarise(work: Path) -> None:
    """Ratios of labels, order to random order, with 95 % t intervals over the seeds' logarithms."""
    curves, accepted = {}, {}
    for order in ORDERS:
        rows = [json.loads((work / "found" / f"{order}-{seed}.json").read_text()) for seed in SEEDS]
        curves[order] = np.array([[row["auc"] for row in one] for one in rows])
        accepted[order] = np.array([[row["accepted"] for row in one] for one in rows])
    targets = {n: float(curves["random"][:, BUDGETS.index(n)].mean()) for n in (150, 300, 600)}
    result: dict = {"budgets": list(BUDGETS), "seeds": len(SEEDS), "steps": STEPS, "orders": {}}
    for order in ORDERS:
        mean, half = _find_interval(curves[order])
        result["orders"][order] = {
            "auc": np.round(mean, 4).tolist(),
            "auc_interval_half": np.round(half, 4).tolist(),
            "accepted_share": np.round(accepted[order].mean(axis=0), 3).tolist(),
        }
        for n, target in targets.items():
            needed = np.array([count_needed(curve, target) for curve in curves[order]])
            base = np.array([count_needed(curve, target) for curve in curves["random"]])
            both = np.isfinite(needed) & np.isfinite(base)
            row = {
                "target_auc": round(target, 4),
                "needed": [round(x) if np.isfinite(x) else None for x in needed],
            }
            if order != "random" and both.sum() > 1:
                mean, half = _find_interval(np.log(needed[both] / base[both])[:, None])
                row |= {
                    "seeds_reached": int(both.sum()),
                    "ratio": round(float(np.exp(mean[0])), 2),
                    "ratio_interval": [
                        round(float(np.exp(mean[0] + s * half[0])), 2) for s in (-1, 1)
                    ],
                }
            result["orders"][order][f"as_random_with_{n}"] = row
    save_result("orders", result, "torch", "scikit-learn")
    draw(result)


def draw(result: dict) -> None:
    """Left the quality that each order reaches; right the labels it needs, random order's as 1."""
    figure, (left, right) = plots.make_axes(9, 3.4, 2)
    budgets, looks = (
        np.array(result["budgets"]),
        dict(
            zip(
                ORDERS,
                ((plots.BLACK, "o"), (plots.BLUE, "s"), (plots.VERMILION, "^")),
                strict=True,
            )
        ),
    )
    for number, (order, (colour, marker)) in enumerate(looks.items()):
        found = result["orders"][order]
        moved = budgets * 1.03 ** (number - 1)  # or the bars hide each other
        left.errorbar(
            moved,
            found["auc"],
            yerr=found["auc_interval_half"],
            color=colour,
            marker=marker,
            markersize=5,
            capsize=3,
            linewidth=1.5,
            label=order,
        )
        for place, n in enumerate((150, 300, 600)):
            row = found[f"as_random_with_{n}"]
            if "ratio" not in row:
                continue
            low, high = row["ratio_interval"]
            at = place + 0.12 * (2 * number - 3)
            right.errorbar(
                [at],
                [row["ratio"]],
                yerr=[[row["ratio"] - low], [high - row["ratio"]]],
                color=colour,
                marker=marker,
                markersize=5,
                capsize=3,
            )
            right.annotate(
                f"{row['seeds_reached']}",
                (at, high),
                (0, 2),
                fontsize=8,
                textcoords="offset points",
                ha="center",
                color=colour,
            )
    left.set_xscale("log")
    left.set_xticks(budgets, [f"{n:,}" for n in budgets])
    left.set_xticks([], minor=True)
    left.set_xlabel("labels")
    left.set_ylabel("area under the ROC curve")
    left.legend(fontsize=9, frameon=False, title="order of the labels", title_fontsize=9)
    right.axhline(1, color=plots.BLACK, linewidth=1)
    right.axhline(1 / 3, color=plots.GREY, linewidth=1, linestyle="--")
    right.annotate(
        "goal: a third",
        (-0.45, 1 / 3),
        (0, 3),
        textcoords="offset points",
        fontsize=9,
        color=plots.GREY,
    )
    right.set_yscale("log")
    right.set_yticks([1 / 4, 1 / 3, 1 / 2, 1, 2, 4], ["1/4", "1/3", "1/2", "1", "2", "4"])
    right.set_yticks([], minor=True)
    right.set_ylim(0.14, 7)
    right.set_xlim(-0.5, 2.5)
    right.set_xticks(range(3), ["150", "300", "600"])
    right.set_xlabel("as good as with so many random labels")
    right.set_ylabel("labels needed, relative to random")
    right.set_title("above each bar: seeds of five that get there", fontsize=9)
    figure.savefig(ROOT / "papers/figures/orders.png", dpi=150)


def _find_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and half of the 95 % t interval over the first axis."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(axis=0, ddof=1) / len(values) ** 0.5
    return values.mean(axis=0), half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", help="a run of the demo's first two stages")
    parser.add_argument(
        "work", type=Path, nargs="?", help="folder for candidates and what was found"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--summarise", action="store_true")
    parser.add_argument("--draw", action="store_true", help="the figure of the kept result")
    options = parser.parse_args()
    if options.draw:
        return draw(json.loads((RESULTS / "orders.json").read_text()))
    if options.summarise:
        return summarise(options.work)
    make_candidates(options.run.absolute(), options.work.absolute())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        jobs = [
            pool.submit(follow_order, options.work.absolute(), order, seed)
            for seed in SEEDS
            for order in ORDERS
        ]
        for job in jobs:
            job.result()
    return summarise(options.work)


if __name__ == "__main__":
    main()
