"""The discriminator: learns from people's labels whether a removal succeeded (RORem, sec. 3.2).

    # one GPU: the same 256 images a step, in eight parts
    python -m rorem_lib.discriminator --meta_path scored/meta.json --output_dir runs/mine \
        --gradient_accumulation_steps 8
    # eight GPUs
    accelerate launch --multi_gpu --num_processes 8 -m rorem_lib.discriminator \
        --meta_path scored/meta.json --output_dir runs/mine

Reads scored sets, triplets whose GT is a removal and whose `score` is people's answer, and a model.
Writes in `output_dir` the folder `discriminator/`, `metrics.jsonl`, `train_metrics.json` and
`checkpoint-<step>/`. Started again, it goes on from the latest checkpoint; a finished training is
not made again.

The frozen down and mid blocks of an SDXL-inpainting UNet, with LoRA, read [removal's latents |
mask | source's latents] at timestep 0; a small convolutional head turns their features into one
logit. Differences from upstream, each on purpose: the head is trained (upstream freezes it by
accident), the loss is binary cross-entropy (a sigmoid is a probability, softplus is not), the head
reads the first block's features beside the mid block's (blur and seams are small) and pools over
the image and over the hole, so that any image size has one score.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset

from rorem_lib.data.pictures import fit_triplet
from rorem_lib.data.triplets import Triplet, load_images, read_triplets
from rorem_lib.files import read_json, write_json
from rorem_lib.models import sdxl
from rorem_lib.models.lora import LORA_FILE, check_keys
from rorem_lib.parameters import option
from rorem_lib.sets import resolve_all
from rorem_lib.training import distributed, latent_cache, loop
from rorem_lib.training.config import (
    LoopConfig,
    check_at_least,
    parse_config,
    require_sets,
    run_job,
)
from rorem_lib.training.latents import CacheSpec
from rorem_lib.training.sampler import ShuffledOrder

VERSION = 1  # raise it when the same settings train other weights
HEAD_FILE = "head.safetensors"


@dataclass
class DiscriminatorConfig(LoopConfig):
    """Train the discriminator on labelled removals; the defaults are upstream's."""

    output_dir: str = option(
        "runs/alone/05_train_discriminator", "folder for the model, checkpoints and metrics.jsonl"
    )
    meta_path: list[str] = option([], "scored sets (score 1 accepted, 0 rejected), required")
    pretrained_model_name_or_path: str = option(
        "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
        "whose UNet's down and mid blocks are used: builtin, a folder or a Hub id",
    )
    revision: str = option("", "the model's Hub revision")
    resolution: int = option(512, "side of the images, px")
    random_flip: bool = option(False, "mirror each sample with probability one half")
    random_shift: bool = option(
        False,
        "shift each sample, round the edges, by a random distance: a few thousand labels are "
        "otherwise learnt by heart",
    )
    rank: int = option(4, "LoRA rank (and alpha)")
    lora_targets: list[str] = option(
        ["to_k", "to_q", "to_v", "to_out.0"], "names of the layers that get LoRA"
    )
    head_channels: int = option(128, "width of the convolutional head")
    untouched_share: float = option(
        0.0,
        "fraction of the samples in which the source itself is shown as a failed removal, so that "
        "an untouched object is always known",
    )
    balance_classes: bool = option(
        False, "weigh accepted and rejected equally whatever their counts"
    )
    latent_cache_dir: str = option("", "where latents are cached; empty is $ROREM_CACHE/latents")
    max_train_steps: int = option(15_000, "optimizer steps in all; 0 takes num_train_epochs")
    train_batch_size: int = option(32, "samples a process and micro-batch")
    learning_rate: float = option(1e-5, "AdamW's peak rate")
    checkpointing_steps: int = option(1000, "steps between checkpoints; 0 writes none")
    seed: int = option(20240421, "fixes initialisation, order, noise and flips")

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, "resolution", 8)


class _Head(nn.Module):
    """One logit from features at the latents' full resolution and from the mid block's."""

    def __init__(self, fine_width: int, coarse_width: int, channels: int):
        super().__init__()

        def convolve(width):
            return nn.Sequential(
                nn.Conv2d(width, channels, 3, padding=1),
                nn.GroupNorm(min(32, channels // 4), channels),
                nn.SiLU(),
            )

        self.fine, self.coarse = convolve(fine_width), convolve(coarse_width)
        self.mix = nn.Sequential(convolve(2 * channels), convolve(channels))
        self.classify = nn.Linear(3 * channels, 1)

    def forward(self, fine, coarse, mask):
        coarse = F.interpolate(self.coarse(coarse), size=fine.shape[-2:])
        features = self.mix(torch.cat([coarse, self.fine(fine)], dim=1))
        hole = F.max_pool2d(mask, 3, stride=1, padding=1)  # its rim shows the seams
        in_hole = (features * hole).sum(dim=(2, 3)) / hole.sum(dim=(2, 3)).clamp(min=1)
        pooled = [features.mean(dim=(2, 3)), features.amax(dim=(2, 3)), in_hole]
        return self.classify(torch.cat(pooled, dim=1))[:, 0]


class Discriminator(nn.Module):
    """Down and mid blocks with LoRA and a trained head; `forward` gives logits.

    Args:
        pipe: the pipeline whose UNet is used; its up blocks are dropped.
        rank: LoRA rank.
        lora_targets: layers with LoRA.
        head_channels: the head's width.
        origin: what to write into the saved config as the base model.
    """

    def __init__(
        self, pipe, *, rank: int, lora_targets: list[str], head_channels: int, origin: dict
    ):
        super().__init__()
        self.settings = {
            "rank": rank,
            "lora_targets": list(lora_targets),
            "head_channels": head_channels,
            **origin,
        }
        self.place = f"the discriminator on {origin.get('base_model')}"  # for messages
        self.pipe = [pipe]  # in a list: its other parts are not this module's parameters
        unet = pipe.unet
        unet.up_blocks = nn.ModuleList()
        unet.conv_norm_out = None
        unet.conv_out = nn.Identity()  # the UNet's own forward now ends with the mid features
        unet.requires_grad_(False)
        unet.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=rank,
                init_lora_weights="gaussian",
                target_modules=list(lora_targets),
            )
        )
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_("lora_" in name)
        self.unet = unet
        unet.down_blocks[0].register_forward_hook(self._keep_fine_features)
        widths = unet.config.block_out_channels
        self.head = _Head(widths[0], widths[-1], head_channels)
        embeds, pooled = sdxl.encode_prompt(pipe)
        self.register_buffer("embeds", embeds, persistent=False)
        self.register_buffer("pooled", pooled, persistent=False)

    def _keep_fine_features(self, block, inputs, output):
        """The first block's last features before it halves the resolution."""
        states = output[1]
        self._fine = [x for x in states if x.shape == states[0].shape][-1]

    @property
    def vae(self):
        """The frozen autoencoder that makes this model's inputs."""
        return self.pipe[0].vae

    def forward(self, removal, mask, source):
        """Logits [B] from latents removal, source [B, 4, h, w] and mask [B, 1, h, w] in {0, 1}."""
        count = len(removal)
        side = removal.shape[-1] * self.pipe[0].vae_scale_factor
        added = {
            "text_embeds": self.pooled.expand(count, -1),
            "time_ids": sdxl.make_time_ids(side, side, count, device=removal.device),
        }
        features = self.unet(
            torch.cat([removal, mask, source], dim=1),
            torch.zeros(count, dtype=torch.long, device=removal.device),
            self.embeds.expand(count, -1, -1),
            added_cond_kwargs=added,
        ).sample
        return self.head(self._fine, features, mask)

    def save_pretrained(self, folder) -> None:
        """Write LoRA, head and `config.json`; the frozen blocks stay with their base model."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.contiguous() for k, v in get_peft_model_state_dict(self.unet).items()},
            folder / LORA_FILE,
        )
        save_file(self.head.state_dict(), folder / HEAD_FILE)
        write_json(folder / "config.json", self.settings)

    @classmethod
    def from_pretrained(
        cls, model_id: str, *, device=None, revision: str | None = None
    ) -> Discriminator:
        """Open a discriminator that `save_pretrained` wrote (a folder or a Hub id).

        Args:
            device: by default the GPU where there is one.

        Raises:
            FileNotFoundError: the folder is not a discriminator's.
            ValueError: its adapters do not fit its settings.
        """
        folder = Path(model_id)
        if not folder.is_dir() and not folder.is_absolute() and str(model_id).count("/") == 1:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(model_id, revision=revision))
        if not (folder / HEAD_FILE).is_file():
            raise FileNotFoundError(f"{folder} holds no discriminator (no {HEAD_FILE})")
        settings = read_json(folder / "config.json")
        model = cls(
            sdxl.load_pipeline(
                settings["base_model"],
                revision=settings.get("revision") or None,
                text_encoders=False,
            ),
            rank=settings["rank"],
            lora_targets=settings["lora_targets"],
            head_channels=settings["head_channels"],
            origin={k: settings.get(k) for k in ("base_model", "revision", "resolution")},
        )
        adapters = load_file(folder / LORA_FILE)
        check_keys(folder / LORA_FILE, adapters, get_peft_model_state_dict(model.unet))
        set_peft_model_state_dict(model.unet, adapters)
        model.head.load_state_dict(load_file(folder / HEAD_FILE))
        model.place = str(model_id)
        device = device or distributed.get_device()
        model.pipe[0].vae.to(device)
        return model.to(device).eval()


class _ScoredLatents(Dataset):
    """Labelled removals by global position: removal, mask, source latents and label."""

    def __init__(self, store, labels, config):
        self.store, self.labels, self.config = store, labels, config
        self.order = ShuffledOrder(len(labels), config.seed)

    def __len__(self):
        return sys.maxsize

    def __getitem__(self, position):
        rng = np.random.default_rng([self.config.seed, 3, position])
        index = self.order.get_index(position)
        flipped = int(self.config.random_flip and rng.random() < 0.5)
        sample = {
            name: x.float().numpy() for name, x in self.store.read(index, flipped=flipped).items()
        }
        if self.config.random_shift:
            shift = rng.integers(0, sample["gt"].shape[1:])
            sample = {name: np.roll(x, shift, axis=(1, 2)) for name, x in sample.items()}
        label = self.labels[index]
        if rng.random() < self.config.untouched_share:
            sample["gt"], label = sample["source"], 0.0
        return {**sample, "label": np.float32(label)}


class DiscriminatorObjective(loop.Objective):
    """Binary cross-entropy on people's decisions."""

    content = None

    def list_scored(self) -> list[Triplet]:
        """The triplets that people have judged."""
        metas = resolve_all(self.config.meta_path)
        return [t for t in read_triplets(metas) if t.extra.get("score") is not None]

    def hash_images(self):
        """Of the judged triplets; their hashes are kept for the latent cache."""
        triplets = self.list_scored()
        self.content = latent_cache.hash_triplets(triplets, self.config.latent_cache_dir)
        return latent_cache.summarise_content(triplets, self.content)

    def build_model(self):
        config = self.config
        pipe = sdxl.load_pipeline(
            config.pretrained_model_name_or_path,
            device=self.device,
            revision=config.revision or None,
            text_encoders=False,
        )
        origin = {
            "base_model": config.pretrained_model_name_or_path,
            "revision": config.revision,
            "resolution": config.resolution,
        }
        self.vae = pipe.vae
        model = Discriminator(
            pipe,
            rank=config.rank,
            lora_targets=config.lora_targets,
            head_channels=config.head_channels,
            origin=origin,
        )
        return model.train()

    def make_dataset(self):
        config, triplets = self.config, self.list_scored()
        labels = np.array([float(t.extra["score"] >= 0.5) for t in triplets])
        if len(set(labels.tolist())) < 2:
            raise ValueError(
                f"{config.meta_path}: a discriminator learns from accepted and "
                f"rejected removals; of {len(labels)} labelled ones "
                f"{int(labels.sum())} are accepted"
            )
        rejected = (1 - labels.mean()) / labels.mean() if config.balance_classes else 1.0
        self.positive_weight = torch.tensor(rejected, dtype=torch.float32, device=self.device)
        self.metrics |= {"train_size": len(labels), "accepted_share": float(labels.mean())}
        store = latent_cache.open_store(
            triplets,
            self.vae,
            sizes=[(config.resolution, config.resolution)] * len(triplets),
            spec=CacheSpec(
                parts=("gt", "source"), resize_mode="squash", flipped=config.random_flip
            ),
            root=config.latent_cache_dir,
            content=self.content,
        )
        self.content = None
        return _ScoredLatents(store, labels, config)

    def compute_loss(self, model, batch):
        """Binary cross-entropy of the logit l [B] and people's answer y [B] in {0, 1}.

        -(w y log sigmoid(l) + (1 - y) log(1 - sigmoid(l))), w = rejected / accepted where classes
        are balanced, else 1. Upstream's is (softplus(l) - y)^2, whose score is no probability.

        Args:
            model: the discriminator.
            batch: latents `gt` (the removal), `source` [B, 4, h, w], `mask` [B, 1, h, w], `label`
                [B].
        """
        logits = model(batch["gt"], batch["mask"], batch["source"]).float()
        loss = F.binary_cross_entropy_with_logits(
            logits, batch["label"], pos_weight=self.positive_weight
        )
        hits = ((logits > 0) == (batch["label"] > 0.5)).float().mean()
        return loss, {"accuracy": hits}

    def save_model(self, model, folder):
        model.save_pretrained(folder / "discriminator")


def score_triplets(
    discriminator: Discriminator, triplets: list[Triplet], *, batch_size: int = 0
) -> np.ndarray:
    """Uncalibrated probability 0..1 that each removal (a triplet's GT) succeeded, [N] float32.

    Args:
        batch_size: removals a forward pass; 0 takes the pixels of 8 at 512 px, at most 64 removals.

    Raises:
        FloatingPointError: a score is not a number; names the discriminator and the removal.
    """
    size = discriminator.settings["resolution"]
    return _score(
        discriminator,
        len(triplets),
        lambda number: load_images(triplets[number], size=size),
        lambda number: triplets[number].gt,
        batch_size,
    )


def score_images(
    discriminator: Discriminator, sources, masks, removals, *, batch_size: int = 0
) -> np.ndarray:
    """As `score_triplets`, of images at hand: lists of [H, W, 3], [H, W] and [H, W, 3] uint8."""
    size = discriminator.settings["resolution"]

    def fit(number: int) -> dict:
        pictures = {"source": sources[number], "mask": masks[number], "gt": removals[number]}
        return fit_triplet(pictures, (size, size), mode="squash")

    name = "removal {}".format
    return _score(discriminator, len(removals), fit, name, batch_size)


@torch.no_grad()
def _score(
    discriminator: Discriminator,
    count: int,
    load: Callable[[int], dict],
    name: Callable[[int], object],
    batch_size: int,
) -> np.ndarray:
    """Scores [count] of the removals that `load` opens, and `name` names, by their number."""
    device = discriminator.embeds.device
    size = discriminator.settings["resolution"]
    batch_size = batch_size or max(1, min(64, 8 * 512**2 // size**2))
    scores = []
    for begin in range(0, count, batch_size):
        part = range(begin, min(begin + batch_size, count))
        pictures = [load(number) for number in part]
        source, removal = (
            sdxl.encode_images(
                discriminator.vae,
                sdxl.to_tensor(np.stack([p[part_name] for p in pictures])).to(device),
            )
            for part_name in ("source", "gt")
        )
        mask = torch.as_tensor(np.stack([p["mask"] for p in pictures]) >= 128)[:, None]
        mask = sdxl.shrink_mask(mask.to(device), source)
        scores.append(torch.sigmoid(discriminator(removal, mask, source)).cpu())
        if not (sound := scores[-1].isfinite()).all():
            bad = name(part[int(sound.int().argmin())])
            raise FloatingPointError(
                f"{discriminator.place} gives {bad} no score but NaN: its weights are damaged, "
                "train it again or take another one"
            )
    return torch.cat(scores).numpy() if scores else np.zeros(0, np.float32)


def train_discriminator(config: DiscriminatorConfig) -> dict:
    """Train and write `<output_dir>/discriminator`; returns `loop.train`'s metrics.

    Raises:
        ValueError: there is no `meta_path`, or the labels are all of one kind.
    """
    require_sets(config)
    return loop.train(DiscriminatorObjective(config), config)


def main(arguments: list[str] | None = None) -> None:
    run_job(train_discriminator, parse_config(DiscriminatorConfig, arguments))


if __name__ == "__main__":
    main()
