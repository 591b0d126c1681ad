"""The remover: SDXL-inpainting fine-tuned on triplets (RORem, sec. 3.2).

    python -m rorem_lib.remover --meta_path A/meta.json B/meta.json --output_dir runs/mine
    accelerate launch --multi_gpu --num_processes 8 -m rorem_lib.remover …

The UNet sees [noisy GT latents | mask | latents of the source with its hole blanked] and learns
to predict the noise (or velocity, as the model's scheduler says) of GT: the picture without the
object, its shadow gone. The prompt is always empty.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch.utils.data import Dataset

from rorem_lib import latent_cache, loop, options, sdxl
from rorem_lib.order import Order
from rorem_lib.triplets import read_triplets


@dataclass
class RemoverConfig(loop.LoopConfig):
    """Train the remover on triplet sets.

    Attributes:
        meta_path: the triplet sets' `meta.json` files; `score` below 0.5 is left out.
        high_resolution_meta_path: sets that are trained at `high_resolution` (RORem-mixed).
        pretrained_model_name_or_path: what is fine-tuned: `builtin`, a folder or a Hub id.
        revision: the Hub revision.
        resolution: side of the square training pictures, px.
        high_resolution: side for `high_resolution_meta_path`, px.
        high_resolution_share: share of the batches that are of high resolution.
        random_flip: mirror each sample with probability one half.
        mask_weight: how much more an error in the hole counts; 0 is upstream's plain MSE.
        removal_min_timestep: below this timestep the holes of triplets whose GT is a removal
            (`accepted_by` says so) do not count. What is painted is decided above it; how sharp it
            gets is then learnt from true GT alone, or each round is blurrier than the last.
        snr_gamma: min-SNR loss weighting (arXiv 2303.09556); 0 is off.
        latent_cache_dir: where latents are cached; empty is `$ROREM_CACHE/latents`.
    """

    output_dir: str = "runs/alone/02_train_remover"
    meta_path: list[str] = field(default_factory=lambda: ["builtin:labelled"])
    high_resolution_meta_path: list[str] = field(default_factory=list)
    pretrained_model_name_or_path: str = "builtin"
    revision: str = ""
    resolution: int = 64
    high_resolution: int = 96
    high_resolution_share: float = 0.3
    random_flip: bool = True
    mask_weight: float = 0.0
    removal_min_timestep: int = 0
    snr_gamma: float = 0.0
    latent_cache_dir: str = ""
    max_train_steps: int = 200
    ema_decay: float = 0.99


class CachedLatents(Dataset):
    """Samples of one or several caches by global position; see `loop` for what that buys.

    Each item: `gt`, `masked`, `source` [4, h, w], `mask` [1, h, w], `noise` [4, h, w] float32,
    `timestep`, `least`, `index` int64.
    """

    def __init__(self, caches, *, seed: int, flip: bool, timesteps: int = 1000, least=None):
        self.caches, self.seed, self.flip, self.timesteps = caches, seed, flip, timesteps
        ends = np.cumsum([len(cache) for cache in caches])
        # [N] the timestep below which a sample's hole does not count
        self.least = least or [0] * int(sum(map(len, caches)))
        self.ends, self.order = ends, Order(int(ends[-1]) if len(ends) else 0, seed)

    def __len__(self):
        return sys.maxsize

    def __getitem__(self, position):
        rng = np.random.default_rng([self.seed, 1, position])
        index = self.order.find_index(position)
        twin = int(self.flip and rng.random() < 0.5)
        which = int(np.searchsorted(self.ends, index, side="right"))
        place = index - (self.ends[which - 1] if which else 0)
        cache = self.caches[which]
        sample = {name: np.array(getattr(cache, name)[place, twin], dtype=np.float32)
                  for name in (*latent_cache.NAMES, "mask")}
        sample["noise"] = rng.standard_normal(sample["gt"].shape, dtype=np.float32)
        sample["timestep"] = np.int64(rng.integers(0, self.timesteps))
        sample["least"] = np.int64(self.least[index])
        sample["index"] = np.int64(index)
        return sample


class _TwoSizes(Dataset):
    """Whole batches of the normal or of the high resolution, chosen by the batch's number."""

    def __init__(self, normal, high, *, share: float, batch: int, seed: int):
        self.parts, self.share, self.batch, self.seed = (normal, high), share, batch, seed

    def __len__(self):
        return sys.maxsize

    def __getitem__(self, position):
        rng = np.random.default_rng([self.seed, 2, position // self.batch])
        return self.parts[int(rng.random() < self.share)][position]


class RemoverObjective(loop.Objective):
    """Noise (or velocity) prediction on GT latents, conditioned on mask and blanked source."""

    def build_model(self):
        config = self.config
        self.pipe = sdxl.load_pipeline(config.pretrained_model_name_or_path,
                                       revision=config.revision or None, device=self.device)
        # Not the pipeline's own scheduler: an Euler one adds noise in another scaling.
        self.noise_schedule = DDPMScheduler.from_config(self.pipe.scheduler.config)
        self.embeds, self.pooled = sdxl.encode_prompt(self.pipe)
        return sdxl.prepare_training(self.pipe.unet)

    def _open(self, meta_paths, size, seed):
        """The samples of some sets at one size; their number is added to `train_size`."""
        config, caches, least = self.config, [], []
        for path in meta_paths:
            triplets = [t for t in read_triplets(path)
                        if t.extra.get("score") is None or t.extra["score"] >= 0.5]
            if triplets:
                caches.append(latent_cache.open_cache(
                    triplets, self.pipe.vae, size=size, root=config.latent_cache_dir))
                least += [config.removal_min_timestep if t.extra.get("accepted_by") else 0
                          for t in triplets]
        self.metrics["train_size"] = self.metrics.get("train_size", 0) + len(least)
        return CachedLatents(caches, seed=seed, flip=config.random_flip, least=least,
                             timesteps=self.noise_schedule.config.num_train_timesteps)

    def make_dataset(self):
        config = self.config
        normal = self._open(config.meta_path, config.resolution, config.seed)
        if not config.high_resolution_meta_path:
            return normal
        high = self._open(config.high_resolution_meta_path, config.high_resolution,
                          config.seed + 1)
        return _TwoSizes(normal, high, share=config.high_resolution_share,
                         batch=config.train_batch_size, seed=config.seed)

    def compute_loss(self, model, batch):
        scheduler, config = self.noise_schedule, self.config
        clean, noise, t = batch["gt"], batch["noise"], batch["timestep"]
        noisy = scheduler.add_noise(clean, noise, t)
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(clean, noise, t) if velocity else noise
        inputs = torch.cat([noisy, batch["mask"], batch["masked"]], dim=1)
        side = clean.shape[-1] * self.pipe.vae_scale_factor
        added = {"text_embeds": self.pooled.expand(len(clean), -1),
                 "time_ids": sdxl.make_time_ids(side, side, len(clean), device=clean.device)}
        predicted = model(inputs, t,
                          self.embeds.expand(len(clean), -1, -1),
                          added_cond_kwargs=added).sample.float()
        error = (predicted - target).square()
        counts = (t >= batch["least"])[:, None, None, None]
        weight = torch.where(counts, 1 + config.mask_weight * batch["mask"], 1 - batch["mask"])
        error = (weight * error).mean(dim=(1, 2, 3)) / weight.mean(dim=(1, 2, 3)).clamp(min=1e-3)
        if config.snr_gamma:
            snr = compute_snr(scheduler, t).clamp(min=1e-4)
            error = error * snr.clamp(max=config.snr_gamma) / (snr + 1 if velocity else snr)
        return error.mean(), {}

    def save_model(self, model, folder):
        self.pipe.unet = model.eval()
        with sdxl.silence_libraries():
            self.pipe.save_pretrained(folder / "remover")


def train_remover(config: RemoverConfig) -> dict:
    """Train and write `<output_dir>/remover`, a pipeline stock diffusers opens.

    Returns:
        `loop.train`'s metrics and `train_size`, the number of triplets.
    """
    return loop.train(RemoverObjective(config), config)


def main(arguments: list[str] | None = None) -> None:
    options.run_job(train_remover, options.parse_config(RemoverConfig, arguments))


if __name__ == "__main__":
    main()
