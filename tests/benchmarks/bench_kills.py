"""Jobs that are killed again and again, and what they end with, against an undisturbed run.

Each job is killed (SIGKILL) at random moments and started again in the same folder, until it was
killed often enough; a run that comes to its end is compared, and the next one begins in a new
folder. Every second kill hits the process that was started, the others any of its processes.
Counted are

    killed        kills that hit a running job
    runs          runs that came to their end in spite of them, and were compared
    differing     files of these runs that are not as in the undisturbed run, times and paths aside
    orphans       processes alive 20 s after the one that was killed
    lost          labels that were acknowledged and are not there (labelling)
    failed        starts after a kill that ended with an error, no other kill being the cause

    python tests/benchmarks/bench_kills.py [--kills 20] [--only training ...] [--seed 4]

`make test` does not run it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from measuring import RESULTS, save_result

ROOT = Path(__file__).resolve().parents[2]
MARK = "ROREM_BENCH_KILLS"  # in the environment of all that a job starts
PATIENCE = 20  # seconds that processes have to follow the one that was killed
LABELS = 300
# Values of JSON that hold times, and names of files that hold nothing but what was seen on the way.
CLOCKS = re.compile(
    r'("[a-z_]*(?:seconds|time|started|finished|date|per_second|memory|rss)[a-z_0-9]*": )'
    r'(?:"[^"]*"|\[[^]]*\]|\{[^}]*\}|[-+.\deE]+|null)'
)
INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[.\d]*(?:\+00:00|Z)?")
DIGEST = re.compile(r"\b[0-9a-f]{64}\b")
NOT_COMPARED = re.compile(
    r"\.(?:log|png\.tmp|partial|lock)$|notebook\.ipynb$|report\.html$|^\.|/\.|/figures/"
)
# Of these only that they are there: the runner's records hold pids and how often it was started,
# the tables seconds per image and when each label was made.
RECORDS = re.compile(
    r"(?:^|/)(?:stage(?:\.started)?\.json|DONE|run\.json|labels\.parquet|timing\.json|methods\.csv)$"
)
# What a job read, as hashes of files in which the run's path and times stand.
READ = re.compile(r"(?:^|/)(?:training|settings)\.json$")


# ------------------------------------------------------------------------------- what is killed


def write_scenes(folder: Path, count: int) -> Path:
    """A triplet set of built-in scenes: what the jobs read; its folder."""
    from rorem_lib.builtin.scenes import render_scene
    from rorem_lib.data.writer import TripletWriter

    with TripletWriter(folder) as writer:
        for number in range(count):
            scene = render_scene([7, number], role="rord", size=64)
            writer.add(id=f"{number:05d}", source=scene.image, mask=scene.mask, gt=scene.truth)
    return folder


def train(inputs: Path, folder: Path) -> None:
    """Notebook 02's way to start a training, on two processes."""
    from rorem_lib.remover import RemoverConfig
    from rorem_lib.runner.launch import launch_job

    config = RemoverConfig(
        output_dir=str(folder),
        meta_path=[str(inputs)],
        pretrained_model_name_or_path="builtin",
        resolution=64,
        max_train_steps=60,
        train_batch_size=4,
        gradient_accumulation_steps=1,
        checkpointing_steps=10,
        checkpoints_total_limit=2,
        logging_steps=5,
        ema_decay=0.9,
        validation_steps=0,
        dataloader_num_workers=1,
        latent_cache_dir=str(folder / "latents"),
    )
    launch_job("remover", config, hardware="cpu_two_processes")


def cache_latents(inputs: Path, folder: Path) -> None:
    from rorem_lib.data.triplets import read_triplets
    from rorem_lib.models import sdxl
    from rorem_lib.training.latent_cache import open_store
    from rorem_lib.training.latents import CacheSpec

    triplets = read_triplets(inputs)
    vae = sdxl.load_pipeline("builtin", device="cpu").vae
    spec = CacheSpec(flipped=True, mask_variants=2)
    sizes = [(128, 128)] * len(triplets)
    open_store(triplets, vae, sizes=sizes, spec=spec, root=folder, shard_size=16)


def assemble(inputs: Path, folder: Path) -> None:
    from rorem_lib.data.assembly import assemble_sets
    from rorem_lib.sources.upstream import UpstreamSource

    assemble_sets(UpstreamSource(str(inputs)), folder, workers=2, test_share=0.1)


def generate(inputs: Path, folder: Path) -> None:
    from rorem_lib import removal
    from rorem_lib.training.config import run_job

    config = removal.GenerateConfig(
        output_dir=str(folder),
        meta_path=[str(inputs)],
        pretrained_model_name_or_path="builtin",
        also=["telea"],
        num_inference_steps=2,
        batch_size=8,
    )
    run_job(removal.generate_candidates, config)


def evaluate(inputs: Path, folder: Path) -> None:
    from rorem_lib.evaluation.evaluate import evaluate as run
    from rorem_lib.evaluation.methods import make_methods

    rows = [
        {"name": "Telea", "kind": "telea"},
        {"name": "base", "model": "builtin", "num_inference_steps": 2},
        {"name": "base again", "model": "builtin", "num_inference_steps": 1},
    ]
    run(make_methods(rows), inputs, None, folder, limit=60, batch_size=4)


def label(inputs: Path, folder: Path) -> None:
    """Labels as the widget writes them; each that is acknowledged is printed."""
    from rorem_lib.labels.log import LabelLog

    log = LabelLog(folder, "anna")
    done = {label.id for label in log.read()}
    for number in range(LABELS):
        if (name := f"item-{number:04d}") not in done:
            log.append(name, "accept" if number % 3 else "reject", ms=number)
            with open(folder.parent / f"{folder.name}-acknowledged.txt", "a") as stream:
                stream.write(name + "\n")
            time.sleep(0.01)


@dataclass(frozen=True)
class Case:
    """A job.

    Attributes:
        scenes: how many it reads.
        work: what does it, (inputs, folder) -> None; None is `rorem run smoke`.
        only: what of its folder is compared, as a glob.
    """

    scenes: int
    work: Callable[[Path, Path], None] | None
    only: str = "**/*"


CASES = {
    "rorem run smoke": Case(0, None),
    "training": Case(64, train, "remover/**/*"),
    "assembly": Case(600, assemble),
    "latent cache": Case(600, cache_latents),
    "candidates": Case(200, generate),
    "evaluation": Case(60, evaluate),
    "labelling": Case(0, label),
}


# ------------------------------------------------------------------------------------- killing


def start(name: str, inputs: Path, folder: Path, log: Path) -> tuple[subprocess.Popen, str]:
    """Begin or go on with a job; its process, and the mark by which its descendants are found."""
    if CASES[name].work is None:
        words = ["-m", "rorem_lib.runner.cli", "run", "smoke", "--runs-dir", str(folder), "--yes"]
    else:
        words = [__file__, "--do", name, str(inputs), str(folder)]
    mark = uuid.uuid4().hex
    environment = os.environ | {
        MARK: mark,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "ROREM_CACHE": str(inputs.parent / "cache"),
    }
    with open(log, "ab") as stream:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process, mark


def list_marked(mark: str) -> list[psutil.Process]:
    """What a job has running, whoever its parents are by now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def kill_one(process: subprocess.Popen, mark: str, dice: random.Random, root: bool) -> int:
    """Kill the job's first process or any of them; processes left when all should have ended."""
    found = list_marked(mark)
    victim = psutil.Process(process.pid) if root or not found else dice.choice(found)
    with contextlib.suppress(psutil.Error):
        victim.kill()
    whole = victim.pid == process.pid
    # another process's death may end in an error, or be put right: then the job goes on
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE if whole else 300)
    end = time.monotonic() + PATIENCE
    while (left := list_marked(mark)) and time.monotonic() < end:
        time.sleep(0.2)
    for other in left:
        with contextlib.suppress(psutil.Error):
            other.kill()
    process.wait()
    return len(left)


# ----------------------------------------------------------------------------------- comparing


def hash_results(folder: Path, only: str) -> dict[str, str]:
    """By path: the SHA-256 of each file that a run left, times and the run's own path aside."""
    found = {}
    for path in sorted(p for p in folder.glob(only) if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if NOT_COMPARED.search(name):
            continue
        data = path.read_bytes().replace(str(folder).encode(), b"RUN")
        if RECORDS.search(name):
            data = b""
        elif path.suffix in {".json", ".jsonl", ".yaml", ".csv", ".md"}:
            text = INSTANT.sub("CLOCK", CLOCKS.sub(r"\1CLOCK", data.decode(errors="replace")))
            data = (DIGEST.sub("READ", text) if READ.search(name) else text).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def measure(name: str, kills: int, folder: Path, dice: random.Random) -> dict:
    """Kill a job `kills` times; the counts of this file's head."""
    case, inputs = CASES[name], folder / "inputs"
    inputs.parent.mkdir(parents=True, exist_ok=True)
    if case.scenes:
        write_scenes(inputs, case.scenes)
    log = folder / "log.txt"
    began = time.monotonic()
    process, _ = start(name, inputs, folder / "undisturbed", log)
    if process.wait():
        raise RuntimeError(f"{name} failed undisturbed: {log.read_text()[-3000:]}")
    seconds = time.monotonic() - began
    wanted = hash_results(folder / "undisturbed", case.only)
    counts = {"killed": 0, "runs": 0, "differing": 0, "orphans": 0, "lost": 0, "failed": 0}
    counts |= {"files": len(wanted), "seconds": round(seconds, 1), "names": []}
    number = 0
    run = folder / "run-0"
    while True:
        process, mark = start(name, inputs, run, log)
        last = counts["killed"] >= kills
        try:
            code = process.wait(None if last else dice.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            root = counts["killed"] % 2 == 0
            counts["killed"] += 1
            counts["orphans"] += kill_one(process, mark, dice, root)
            continue
        if code:
            counts["failed"] += 1
            counts["names"].append(f"exit code {code}, see {log}")
            if last or counts["failed"] > 5:
                break
            continue
        found = hash_results(run, case.only)
        different = {x for x in wanted.keys() | found.keys() if wanted.get(x) != found.get(x)}
        counts["runs"] += 1
        counts["differing"] += len(different)
        counts["names"] += sorted(different)[:10]
        acknowledged = run.parent / f"{run.name}-acknowledged.txt"
        if acknowledged.is_file():
            counts["lost"] += count_lost(acknowledged, run)
        if last:
            break
        number += 1
        run = folder / f"run-{number}"
    return counts


def count_lost(acknowledged: Path, folder: Path) -> int:
    """Labels that were acknowledged and that no reader finds."""
    from rorem_lib.labels.log import read_labels

    kept = {label.id for label in read_labels(folder)}
    return len(set(acknowledged.read_text().split()) - kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of each job")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--folder", help="where the runs go and stay; default: a temporary folder")
    parser.add_argument("--do", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.do:
        name, inputs, folder = given.do
        CASES[name].work(Path(inputs), Path(folder))
        return
    place = Path(given.folder or tempfile.mkdtemp())
    dice = random.Random(given.seed)
    saved = RESULTS / "kills.json"
    jobs = json.loads(saved.read_text())["jobs"] if saved.is_file() else {}
    for name in given.only:  # job by job: the whole takes hours
        jobs[name] = measure(name, given.kills, place / name.replace(" ", "-"), dice)
        save_result("kills", {"jobs": jobs}, "torch", "accelerate")
    if not given.folder:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
