"""Trainings of the remover that are killed, run out of disk or change their processes, and go on.

They end with what an undisturbed one ends with: bit for bit, on as many processes.
"""

import json
import os
import random
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from forked import Job, run_job, run_launcher_forked
from resume_job import train, train_and_die
from safetensors.torch import load_file
from tiny import write_model

from rorem_lib.builtin.scenes import render_scene
from rorem_lib.data.writer import TripletWriter
from rorem_lib.files import LOCK
from rorem_lib.remover import RemoverConfig, train_remover
from rorem_lib.training import checkpoints, latent_cache
from rorem_lib.training.memory import tune_cpu

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
STEPS, GLOBAL_BATCH = 8, 8
UNET = "diffusion_pytorch_model.safetensors"
CLOCKS = {"images_per_second", "seconds_left", "memory_gb", "mfu"}


@pytest.fixture(scope="module", autouse=True)
def tuned():
    """Trainings in this process compute as those in processes of their own, to the last bit."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "rorem_lib.training.memory._KEEP_MEMORY", ()
        )  # changes no number, and could not be undone
        tune_cpu()
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """Of the same layers as everywhere, but narrow: what is tested does not go with the size."""
    unet = {"block_out_channels": (16, 32)}
    return write_model(tmp_path_factory.mktemp("models") / "narrow", unet=unet)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two sets: square and wide scenes, and squares for the high resolution."""
    folder = tmp_path_factory.mktemp("sets")
    for name, shapes in (("mixed", [(32, 32), (32, 48)] * 6), ("high", [(48, 48)] * 5)):
        with TripletWriter(folder / name) as writer:
            for number, (height, width) in enumerate(shapes):
                scene = render_scene([5, number], role="rord", size=64)
                rows, columns = [
                    min(max(0, int(x.mean()) - side // 2), 64 - side)
                    for x, side in zip(scene.mask.nonzero(), (height, width))
                ]
                part = (slice(rows, rows + height), slice(columns, columns + width))
                writer.add(
                    id=f"{name}-{number}",
                    source=scene.image[part].copy(),
                    mask=scene.mask[part].copy(),
                    gt=scene.truth[part].copy(),
                )
    return folder


@pytest.fixture(scope="module")
def make_config(tmp_path_factory, tiny_model, sets):
    """All that a resumed training could lose: micro-batches, shapes by the step, masks, averages,
    a worker, looks in between, a scheduler."""
    cache = tmp_path_factory.mktemp("latents")

    def make(folder, **changes):
        given = {
            "output_dir": str(folder),
            "meta_path": [str(sets / "mixed")],
            "resolution": 32,
            "high_resolution_meta_path": [str(sets / "high")],
            "high_resolution": 48,
            "high_resolution_share": 0.4,
            "aspect_buckets": True,
            "resize_mode": "crop",
            "random_flip": True,
            "mask_variants": 2,
            "pretrained_model_name_or_path": str(tiny_model),
            "max_train_steps": STEPS,
            "train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 3,
            "ema_decay": 0.9,
            "logging_steps": 1,
            "checkpointing_steps": 2,
            "checkpoints_total_limit": 2,
            "validation_steps": 3,
            "num_validation_images": 1,
            "dataloader_num_workers": 1,
            "mixed_precision": "auto",
            "latent_cache_dir": str(cache),
        }
        return RemoverConfig(**given | changes)

    return make


def write_config(config):
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(vars(config)))
    return str(folder / "config.yaml")


def start_remover(config, processes=1):
    """The job as a user starts it, what it prints in `job.log`."""
    words = ["--config", write_config(config)]
    log = Path(config.output_dir, "job.log")
    return Job(run_job, "rorem_lib.remover", words, processes=processes, log=log)


def launch_remover(config):
    """The same by accelerate's launcher, on two processes."""
    words = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision"]
    words += ["no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "rorem_lib.remover"]
    words += ["--config", write_config(config)]
    job = Job(run_launcher_forked, words, log=Path(config.output_dir, "job.log"), cwd=ROOT)
    assert job.wait(timeout=600) == 0, job.read_log()[-3000:]


def kill_remover(config, processes):
    """Start it and kill it, with all that it started, after a step of chance."""
    step = random.randint(3, STEPS - 3)
    job, folder = start_remover(config, processes), Path(config.output_dir)
    lines = folder / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 600
        while not lines.exists() or lines.read_text().count("\n") < step:
            assert job.poll() is None, job.read_log()[-3000:]
            assert time.monotonic() < deadline, "the job does not come on"
            time.sleep(0.005)
    finally:
        job.kill()
    assert not (folder / "train_metrics.json").exists(), "it ended before it was killed"
    assert not (folder / "remover").exists()
    return step


def read_lines(config, file="metrics.jsonl"):
    """The lines without what a clock or the memory says."""
    lines = map(json.loads, (Path(config.output_dir) / file).read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def read_metrics(config):
    return json.loads((Path(config.output_dir) / "train_metrics.json").read_text())


def read_weights(config):
    """The averaged weights at the end, the trained ones of the last checkpoint; by folder, name."""
    return {
        (folder, name): value
        for folder in ("remover", f"checkpoint-{STEPS - 2}")
        for name, value in load_file(Path(config.output_dir, folder, "unet", UNET)).items()
    }


def list_states(folder):
    """What a training writes in more than one go."""
    return sorted(
        p.name
        for p in Path(folder).iterdir()
        if p.name.startswith((".", "checkpoint", "remover", "train_metrics")) and p.name != LOCK
    )


def assert_same_run(config, whole, *, looks=True):
    """Weights, lines and (`looks`) validations equal an undisturbed run's; nothing is left over."""
    assert [line["step"] for line in read_lines(config)] == list(range(1, STEPS + 1))
    assert read_lines(config) == read_lines(whole)
    one, other = read_weights(config), read_weights(whole)
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]
    assert list_states(config.output_dir) == [
        "checkpoint-4",
        "checkpoint-6",
        "remover",
        "train_metrics.json",
    ]
    if looks:
        file = "validation_images/metrics.jsonl"
        assert read_lines(config, file) == read_lines(whole, file)
        assert [line["step"] for line in read_lines(config, file)] == [0, 3, 6, 8]


def assert_near_run(config, whole, start, rel=1e-4):
    """The same but for how sums are rounded."""
    for one, other in zip(read_lines(config), read_lines(whole), strict=True):
        assert one.keys() == other.keys()
        assert [one[k] for k in one] == pytest.approx([other[k] for k in one], rel=rel)
    one, other = read_weights(config), read_weights(whole)
    before = load_file(Path(start) / "unet" / UNET)
    moved = sum((other[k] - before[k[1]]).square().sum() for k in other).sqrt()
    apart = sum((other[k] - one[k]).square().sum() for k in other).sqrt()
    assert apart < rel * moved, f"moved {moved:.4f}, apart {apart:.4f}"


# ------------------------------------------------------------------------------------ one process


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make_config):
    """An undisturbed training of one process."""
    config = make_config(tmp_path_factory.mktemp("whole"))
    train(config)
    return config


def test_the_undisturbed_training_has_all_that_could_be_lost(whole):
    seen = read_lines(whole, "seen-0.jsonl")
    assert len({tuple(x["size"]) for x in seen}) == 3  # square, wide, high resolution
    assert len(seen) == 2 * STEPS and all(len(x["index"]) == 4 for x in seen)
    assert len(read_lines(whole)) == STEPS


def test_killed_at_a_step_of_chance_it_goes_on_bit_for_bit(tmp_path, whole):
    killed = replace(whole, output_dir=str(tmp_path))
    step = kill_remover(killed, 1)
    metrics = train_remover(killed)
    assert 2 <= metrics["resumed_at"] <= STEPS - 2, f"killed after step {step}"
    assert_same_run(killed, whole)


def test_looking_at_pictures_changes_nothing_of_the_training(tmp_path, whole):
    blind = replace(whole, output_dir=str(tmp_path), validation_steps=0)
    train_remover(blind)
    assert_same_run(blind, whole, looks=False)
    assert not (tmp_path / "validation_images").exists()


def die(config, place, count=1):
    """Train in a process of its own until it kills itself there."""
    job = Job(train_and_die, config, place, count)
    assert job.wait() == -signal.SIGKILL, f"it did not come to {place!r}"


def test_killed_while_it_writes_again_and_again_it_goes_on_bit_for_bit(tmp_path, whole):
    """Each time it goes on from the last checkpoint that is whole, and dies in the next write."""
    config = replace(whole, output_dir=str(tmp_path))
    die(config, "in checkpoint", 2)
    assert list_states(tmp_path) == ["checkpoint-2", "checkpoint-4.partial"]
    die(config, "before rename", 2)
    assert list_states(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6.partial"]
    die(config, "in model")
    assert list_states(tmp_path) == [".model.partial", "checkpoint-4", "checkpoint-6"]
    assert train_remover(config)["resumed_at"] == 6
    assert_same_run(config, whole)


def test_killed_while_latents_are_cached_it_makes_the_missing_ones(tmp_path, whole, monkeypatch):
    config = replace(whole, output_dir=str(tmp_path / "run"), latent_cache_dir=str(tmp_path / "c"))
    die(config, "in cache", 2)
    (first,) = (tmp_path / "c").glob("*/*/*.safetensors")
    (torn,) = (tmp_path / "c").glob("*/*/.*.partial")
    os.utime(torn, (time.time() - 3700,) * 2)  # a younger one may be in work
    before, written, save_shard = first.stat(), [], latent_cache._save_shard
    monkeypatch.setattr(
        latent_cache,
        "_save_shard",
        lambda shard, *rest: (written.append(shard.path), save_shard(shard, *rest)),
    )
    train_remover(config)
    assert len(written) == 2 and first not in written and not torn.exists()
    assert first.stat().st_mtime_ns == before.st_mtime_ns
    assert sorted([first, *written]) == sorted((tmp_path / "c").glob("*/*/*.safetensors"))
    assert_same_run(config, whole)


def test_a_full_disk_leaves_a_checkpoint_from_which_it_goes_on_bit_for_bit(
    tmp_path, whole, monkeypatch
):
    config, limits = (
        replace(whole, output_dir=str(tmp_path)),
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    save = checkpoints.save_checkpoint

    def fill_and_save(accelerator, config, step, **rest):
        if step == 4:  # room for the weights, not for the optimizer's moments
            size = (tmp_path / "checkpoint-2" / "unet" / UNET).stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, limits[1]))
        save(accelerator, config, step, **rest)

    monkeypatch.setattr(checkpoints, "save_checkpoint", fill_and_save)
    try:
        with pytest.raises(OSError, match="no space left for checkpoint-4") as caught:
            train_remover(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        monkeypatch.undo()
    assert f"{tmp_path / 'checkpoint-2'} is intact, and training goes on from it" in str(
        caught.value
    )
    assert list_states(tmp_path) == ["checkpoint-2"]
    assert train_remover(config)["resumed_at"] == 2
    assert_same_run(config, whole)


# ---------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def pair(tmp_path_factory, make_config):
    """Undisturbed trainings of two processes, with accumulation and without."""
    folder = tmp_path_factory.mktemp("pair")
    accumulated = make_config(folder / "2x2x2", train_batch_size=2, mixed_precision="no")
    large = replace(
        accumulated,
        output_dir=str(folder / "2x4"),
        train_batch_size=4,
        gradient_accumulation_steps=1,
        validation_steps=0,
    )
    words = [*map(write_config, (accumulated, large))]
    job = Job(run_job, "resume_job", words, processes=2, log=folder / "job.log")
    assert job.wait() == 0, job.read_log()[-3000:]
    assert [read_metrics(c)["num_processes"] for c in (accumulated, large)] == [2, 2]
    return accumulated, large


@pytest.fixture(scope="module")
def killed_pair(tmp_path_factory, pair):
    """The first of them, killed after a step of chance."""
    killed = replace(pair[0], output_dir=str(tmp_path_factory.mktemp("killed")))
    kill_remover(killed, 2)
    return killed


def test_what_two_processes_began_one_finishes(tmp_path, killed_pair, pair, tiny_model):
    shutil.copytree(killed_pair.output_dir, tmp_path / "alone")
    alone = replace(killed_pair, output_dir=str(tmp_path / "alone"), train_batch_size=4)
    metrics = train_remover(alone)
    assert metrics["num_processes"] == 1 and 2 <= metrics["resumed_at"] <= STEPS - 2
    assert_near_run(alone, pair[0], tiny_model)


def test_killed_on_two_processes_it_goes_on_bit_for_bit(tmp_path, killed_pair, pair):
    shutil.copytree(killed_pair.output_dir, tmp_path / "on")
    resumed = replace(killed_pair, output_dir=str(tmp_path / "on"))
    launch_remover(resumed)
    metrics = read_metrics(resumed)
    assert metrics["num_processes"] == 2 and 2 <= metrics["resumed_at"] <= STEPS - 2
    assert_same_run(resumed, pair[0])


def read_steps(config, processes):
    """What each optimizer step saw, in the order of global positions: samples, timesteps, size."""
    ranks = [read_lines(config, f"seen-{rank}.jsonl") for rank in range(processes)]
    micro = [x for at_once in zip(*ranks, strict=True) for x in at_once]
    count = len(micro) // STEPS
    steps = []
    for parts in (micro[n : n + count] for n in range(0, len(micro), count)):
        (size,) = {tuple(x["size"]) for x in parts}
        steps.append(
            (
                size,
                [i for x in parts for i in x["index"]],
                [t for x in parts for t in x["timestep"]],
            )
        )
    return steps


def test_the_same_global_batch_is_the_same_training_however_it_is_divided(
    tmp_path, pair, tiny_model
):
    alone = replace(pair[1], output_dir=str(tmp_path), train_batch_size=GLOBAL_BATCH)
    metrics = train(alone)
    assert metrics["num_processes"] == 1 and metrics["images"] == GLOBAL_BATCH * STEPS
    for config in pair:
        assert read_steps(config, 2) == read_steps(alone, 1)
        assert_near_run(config, alone, tiny_model)
