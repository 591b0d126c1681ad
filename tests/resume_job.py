"""Trainings of the remover that note what they saw, or kill themselves at a place.

`main` trains one config after the other and notes each micro-batch in
`<output_dir>/seen-<rank>.jsonl`.
"""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from rorem_lib import remover
from rorem_lib.training import latent_cache, loop
from rorem_lib.training.config import parse_config, run_job
from rorem_lib.training.memory import tune_cpu


class NotingObjective(remover.RemoverObjective):
    """Notes samples, their timesteps and their size (latents'), as one process sees them."""

    def split_batch(self, batch):
        rank = self.accelerator.process_index
        seen = {
            "index": batch["index"].tolist(),
            "timestep": batch["timestep"].tolist(),
            "size": list(batch["noise"].shape[-2:]),
        }
        with open(Path(self.config.output_dir, f"seen-{rank}.jsonl"), "a") as stream:
            stream.write(json.dumps(seen) + "\n")
        return super().split_batch(batch)


def train(config) -> dict:
    return loop.train(NotingObjective(config), config)


def train_and_die(config, place: str, count: int = 1) -> None:
    """Train until SIGKILL.

    Args:
        place: "in checkpoint" (half of it is written), "before rename" of a checkpoint, "in model"
            (half of the model is written), or "in cache" (half of a shard is written).
        count: at which of them.
    """
    left = [count]

    def is_due(here):
        left[0] -= here == place
        return here == place and left[0] == 0

    def die():
        for child in multiprocessing.active_children():
            child.kill()
        os.kill(os.getpid(), signal.SIGKILL)

    def die_in(here, function):
        """`function`, after which the folder's files are cut in half."""

        def call(first, second, *rest):
            result = function(first, second, *rest)
            if is_due(here):
                files = sorted(
                    p for p in Path(rest[0] if rest else second).rglob("*") if p.is_file()
                )
                for path in files[1::2]:
                    path.unlink()
                for path in files[::4]:
                    os.truncate(path, path.stat().st_size // 2)
                die()
            return result

        return call

    def die_before(here, function):
        def call(*given):
            if is_due(here):
                die()
            return function(*given)

        return call

    def die_in_shard(shard, data, *rest):
        save_shard(shard, data[: len(data) // 2] if is_due("in cache") else data, *rest)

    def die_and_replace(old, new, **options):
        if place == "in cache" and left[0] == 0:
            die()
        replace(old, new, **options)

    save_shard, replace = latent_cache._save_shard, os.replace
    latent_cache._save_shard, os.replace = die_in_shard, die_and_replace
    Accelerator.save_state = die_in("in checkpoint", Accelerator.save_state)
    loop.checkpoints.replace_folder = die_before("before rename", loop.checkpoints.replace_folder)
    remover.RemoverObjective.save_model = die_in("in model", remover.RemoverObjective.save_model)
    tune_cpu()
    remover.train_remover(config)


def main() -> None:
    # it would part the processes after the first training
    Accelerator.end_training = lambda self: None
    for file in sys.argv[1:]:
        run_job(train, parse_config(remover.RemoverConfig, ["--config", file]))
    torch.distributed.destroy_process_group()
