"""The remover: SDXL-inpainting fine-tuned on triplets (RORem, sec. 3.2).

    # one GPU: the same 128 images a step, in eight parts
    python -m rorem_lib.remover --meta_path A/meta.json B/meta.json --output_dir runs/mine \
        --random_flip --gradient_accumulation_steps 8
    # eight GPUs
    accelerate launch --multi_gpu --num_processes 8 -m rorem_lib.remover \
        --meta_path A/meta.json B/meta.json --output_dir runs/mine --random_flip

Reads the sets' meta.json with the images they name, and a model. Writes in `output_dir` the
pipeline `remover/`, `metrics.jsonl`, `train_metrics.json`, `checkpoint-<step>/` and
`validation_images/`. Started again, it goes on from the latest checkpoint; a finished training is
not made again.

The UNet sees [noisy GT latents | mask | latents of the source with its hole blanked] and learns
to predict the noise (or velocity, as the model's scheduler says) of GT: the image without the
object, its shadow gone. The prompt is always empty.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from rorem_lib.data.triplets import read_triplets
from rorem_lib.models import lora, presets, sdxl
from rorem_lib.models.attention import compile_unet, prepare_training
from rorem_lib.models.hub import write_card
from rorem_lib.parameters import option
from rorem_lib.sets import resolve
from rorem_lib.training import distributed, loop, tracking
from rorem_lib.training.config import (
    LoopConfig,
    check_at_least,
    parse_config,
    require_sets,
    run_job,
)
from rorem_lib.training.dataset import PictureReader, TrainingMix, TripletDataset, weigh_buckets
from rorem_lib.training.latent_cache import hash_triplets, open_store, summarise_content
from rorem_lib.training.latents import CacheSpec, encode_pictures
from rorem_lib.training.memory import count_flops
from rorem_lib.training.sampler import BucketSampler, split_chunks
from rorem_lib.training.validation import Validation

VERSION = 1  # raise it when the same settings train other weights


@dataclass
class RemoverConfig(LoopConfig):
    """Train the remover on triplet sets; the defaults are upstream's."""

    upstream_options: ClassVar[bool] = True  # see `training.config.parse_config`

    output_dir: str = option(
        "runs/alone/02_train_remover", "folder for the model, checkpoints and metrics.jsonl"
    )
    meta_path: list[str] = option(
        [], "the triplet sets' meta.json files, required; score below 0.5 is left out"
    )
    max_train_samples: int = option(0, "take the first so many triplets of meta_path; 0 takes all")
    pretrained_model_name_or_path: str = option(
        "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
        "what is fine-tuned: builtin, a folder or a Hub id",
    )
    pretrained_unet: str = option(
        "", "a UNet to put in its place (a folder or Hub id with or without unet/)"
    )
    pretrained_vae_model_name_or_path: str = option("", "a VAE in the place of the model's own")
    revision: str = option("", "the model's Hub revision")
    variant: str = option("", "the variant of its weight files, such as fp16")
    resolution: int = option(512, "side of the square training images, px")
    resize_mode: str = option(
        "squash",
        "squash resizes straight to the square, as upstream does; crop keeps the aspect and cuts "
        "where the mask is",
    )
    center_crop: bool = option(False, "crop in the middle of the image instead")
    crops_coords_top_left_h: int = option(0, "SDXL's crop conditioning, px from the top")
    crops_coords_top_left_w: int = option(0, "SDXL's crop conditioning, px from the left")
    aspect_buckets: bool = option(
        False,
        "train wide and tall images in shapes of about the same area instead of making all square",
    )
    bucket_step: int = option(
        0, "what the buckets' sides are multiples of, px; 0 takes an eighth of the side"
    )
    high_resolution_meta_path: list[str] = option(
        [], "sets that are trained at high_resolution (RORem-mixed)"
    )
    high_resolution: int = option(1024, "side for high_resolution_meta_path, px")
    high_resolution_share: float = option(
        0.3, "fraction of the optimizer steps that are of high resolution"
    )
    random_flip: bool = option(False, "mirror each sample with probability one half")
    mask_variants: int = option(0, "perturbed copies of each mask (widened, or drawn loosely)")
    mask_variant_share: float = option(
        0.5, "how often one of them is taken instead of the exact mask"
    )
    mask_dilate_max: float = option(
        0.04, "the widest a variant is dilated, as a fraction of the image's short side"
    )
    mask_loosen: float = option(1.0, "strength of the loose strokes, see masks.loosen_mask")
    mask_weight: float = option(
        0.0, "how much more an error in the hole counts; 0 is upstream's plain MSE"
    )
    removal_min_timestep: int = option(
        0,
        "below this timestep the holes of triplets whose GT is a removal (accepted_by says so) do "
        "not count: what is painted is decided above it, how sharp it gets is then learnt from "
        "true GT alone, or each round is blurrier than the last",
    )
    snr_gamma: float = option(0.0, "min-SNR loss weighting (arXiv 2303.09556); 0 is off")
    cache_latents: bool = option(
        True, "encode everything once before training, else each batch anew"
    )
    latent_cache_dir: str = option(
        "",
        "where latents are cached; empty is $ROREM_CACHE/latents. On several nodes it must be a "
        "folder that all of them see",
    )
    latent_dtype: str = option("fp16", "fp16 or bf16")
    vae_precision: str = option(
        "fp32",
        "fp32, bf16 or fp16; SDXL's own VAE overflows in fp16: such batches are encoded again in "
        "float32",
    )
    lora_rank: int = option(0, "train a LoRA of this rank in the place of all weights; 0 for all")
    trainable_modules: list[str] = option(
        [], "train only modules whose names end so; empty trains all"
    )
    gradient_checkpointing: bool | None = option(
        None,
        "recompute activations in the backward pass, which takes a third longer. None does so on "
        "GPUs alone: from the first step for which the memory does not suffice without, or always "
        "where weights or their states are divided (ZeRO-2, FSDP2)",
    )
    enable_xformers_memory_efficient_attention: bool = option(
        False, "xformers' attention in the place of PyTorch's"
    )
    torch_compile: bool = option(False, "compile the UNet's repeated blocks")
    channels_last: bool | None = option(
        None, "the weights' memory layout; None takes it on GPUs, FSDP2 takes none"
    )
    validation_steps: int = option(
        2000, "steps between removals of fixed scenes to look at; 0 makes none"
    )
    num_validation_images: int = option(4, "how many scenes")
    validation_meta_path: str = option(
        "",
        "the set they come from; empty takes the test set beside the first training set, or the "
        "training set itself",
    )
    dataloader_num_workers: int = option(
        8, "processes that read samples; 0 reads in the training process"
    )
    comments: str = option("", "a note that is kept with the run")

    def make_spec(self) -> CacheSpec:
        """How images become latents."""
        return CacheSpec(
            dtype=self.latent_dtype,
            resize_mode=self.resize_mode,
            center_crop=self.center_crop,
            flipped=self.random_flip,
            mask_variants=self.mask_variants,
            mask_dilate_max=self.mask_dilate_max,
            mask_loosen=self.mask_loosen,
            vae_precision=self.vae_precision,
        )

    def __post_init__(self):
        super().__post_init__()
        self.make_spec()  # which refuses what it cannot be
        check_at_least(self, "resolution", 8)
        if self.lora_rank and self.trainable_modules:
            raise ValueError(
                "lora_rank trains a LoRA and trainable_modules whole modules: take one of them"
            )
        if self.high_resolution_meta_path and self.high_resolution < self.resolution:
            raise ValueError(
                f"high_resolution is {self.high_resolution} px and resolution "
                f"{self.resolution}: set high_resolution, to 1024 for RORem-mixed"
            )
        for name in ("high_resolution_share", "mask_variant_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: take a share from 0 to 1")


class RemoverObjective(loop.Objective):
    """Noise (or velocity) prediction on GT latents, conditioned on mask and blanked source."""

    content = None

    def hash_images(self):
        """Of the triplets that are trained on; their hashes are kept for the latent cache."""
        triplets = [t for mix in self.list_mixes() for part in mix.sets for t in part]
        self.content = hash_triplets(triplets, self.config.latent_cache_dir)
        return summarise_content(triplets, self.content)

    def build_model(self):
        config = self.config
        self.pipe = sdxl.load_pipeline(
            config.pretrained_model_name_or_path,
            unet=config.pretrained_unet,
            vae=config.pretrained_vae_model_name_or_path,
            revision=config.revision or None,
            variant=config.variant or None,
            device=self.device,
        )
        sdxl.set_resolution(self.pipe, self.pipe.unet, config.resolution)
        # Not the pipeline's own scheduler: an Euler one adds noise in another scaling.
        self.noise_schedule = DDPMScheduler.from_config(self.pipe.scheduler.config)
        self.embeds, self.pooled = sdxl.encode_prompt(self.pipe)  # once: the prompt is constant
        self.time_ids: dict[tuple[int, ...], torch.Tensor] = {}
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        if half and self.device.type == "cuda":  # a later cast would make a copy for each sample
            self.embeds = self.embeds.to(half)
        unet = prepare_training(
            self.pipe.unet,
            channels_last=config.channels_last,
            xformers=config.enable_xformers_memory_efficient_attention,
        )
        if config.lora_rank:
            lora.add_lora(unet, config.lora_rank)
        elif config.trainable_modules:
            self._train_only(unet, tuple(config.trainable_modules))
        return unet

    @staticmethod
    def _train_only(unet, endings: tuple[str, ...]) -> None:
        unet.requires_grad_(False)
        chosen = [module for name, module in unet.named_modules() if name.endswith(endings)]
        for module in chosen:
            module.requires_grad_(True)
        if not any(p.requires_grad for p in unet.parameters()):
            raise ValueError(f"trainable_modules {list(endings)}: no module's name ends so")

    def list_mixes(self) -> list[TrainingMix]:
        """The triplets of each resolution; those scored below 0.5 and empty sets left out."""
        config = self.config
        given = [(config.meta_path, config.resolution, 1.0)]
        if config.high_resolution_meta_path:
            high = config.high_resolution_share
            given = [
                (config.meta_path, config.resolution, 1 - high),
                (config.high_resolution_meta_path, config.high_resolution, high),
            ]
        mixes = []
        for paths, resolution, fraction in given:
            sets = [
                [
                    t
                    for t in read_triplets(resolve(path))
                    if t.extra.get("score") is None or t.extra["score"] >= 0.5
                ]
                for path in paths
            ]
            if config.max_train_samples and not mixes:
                sets = _take(sets, config.max_train_samples)
            if sets := [part for part in sets if part]:
                mixes.append(TrainingMix(sets, resolution, fraction))
        if not mixes:
            raise ValueError(
                f"there is nothing to train on: the training set is empty "
                f"({', '.join(config.meta_path)})"
            )
        return mixes

    def make_dataset(self):
        config, spec = self.config, self.config.make_spec()
        mixes, readers, shapes, min_timestep = self.list_mixes(), [], [], []
        for mix in mixes:
            sizes = mix.assign_shapes(
                unit=sdxl.get_unit(self.pipe),
                buckets=config.aspect_buckets,
                step=config.bucket_step,
                min_images=max(1, self.global_batch // 4),
            )
            for part, of_part in zip(mix.sets, sizes):
                readers.append(self._read(part, of_part, spec))
                min_timestep += [
                    config.removal_min_timestep if t.extra.get("accepted_by") else 0 for t in part
                ]
            shapes.append([size for of_part in sizes for size in of_part])
        self.content = None  # of 200,000 triplets it takes 0.4 GB
        found, members, weights = weigh_buckets(mixes, shapes)
        self.shapes = dict.fromkeys(found, 0.0)  # (h, w) in px -> share of the steps
        for shape, weight in zip(found, weights):
            self.shapes[shape] += weight / sum(weights)
        self.metrics["train_size"] = len(min_timestep)
        return TripletDataset(
            readers,
            members=members,
            min_timestep=np.array(min_timestep),
            seed=config.seed,
            order=BucketSampler(
                [len(m) for m in members], weights, seed=config.seed, global_batch=self.global_batch
            ),
            flip=config.random_flip,
            variants=config.mask_variants,
            variant_share=config.mask_variant_share,
            timesteps=self.noise_schedule.config.num_train_timesteps,
            picture_shape=None
            if config.cache_latents
            else (self.pipe.vae.config.latent_channels, self.pipe.vae_scale_factor),
        )

    def _read(self, triplets, sizes, spec):
        if not self.config.cache_latents:
            return PictureReader(triplets, sizes, spec)
        return open_store(
            triplets,
            self.pipe.vae,
            sizes=sizes,
            spec=spec,
            root=self.config.latent_cache_dir,
            content=self.content,
        )

    def tune_model(self, model):
        """Gradient checkpointing and compilation, as the options say; see `loop.Objective`."""
        config, factor = self.config, self.pipe.vae_scale_factor
        self.recomputes = config.gradient_checkpointing
        if self.recomputes is None and self.device.type != "cuda":
            self.recomputes = False
        elif self.recomputes is None and distributed.is_divided(self.accelerator):
            # Weights or gradients travel within each pass: a process that ran out in a trial would
            # leave the others waiting.
            self.recomputes = True
        if self.recomputes:
            model.enable_gradient_checkpointing()
        if config.torch_compile:
            compile_unet(model)
        # Backward computes gradients of activations and of weights; frozen weights need none.
        passes = 3 if all(p.requires_grad for p in model.parameters()) else 2
        return passes * sum(
            fraction * count_flops(model, height // factor, width // factor)
            for (height, width), fraction in self.shapes.items()
        )

    def make_validation(self):
        if not self.config.validation_steps:
            return None
        return Validation(self.pipe, self.config, self.accelerator)

    def split_batch(self, batch):
        """Chunks of a micro-batch of high resolution that need no more memory than one of normal
        resolution, or single images where even one is larger."""
        height, width = batch["noise"].shape[-2:]
        factor = self.pipe.vae_scale_factor
        return split_chunks(batch, self._count_at_once(), height * width * factor**2)

    def _count_at_once(self) -> int:
        """Pixels that go through the UNet at once."""
        return self.config.train_batch_size * self.config.resolution**2

    def encode_batch(self, batch) -> dict:
        """`gt`, `masked` [B, 4, h, w] and `mask` [B, 1, h, w] float32, encoded here where the
        batch has images."""
        if self.config.cache_latents:
            return {name: batch[name].float() for name in ("gt", "masked", "mask")}
        pictures = {name: batch[name] for name in ("gt", "source", "mask")}
        return encode_pictures(self.pipe.vae, pictures, self.config.make_spec())

    def make_condition(self, latents) -> dict:
        """SDXL's text and size conditioning for latents [B, 4, h, w]; the prompt is shared."""
        config, factor = self.config, self.pipe.vae_scale_factor
        height, width = size = tuple(side * factor for side in latents.shape[-2:])
        if size not in self.time_ids:  # made once a size: the host would wait for the GPU
            self.time_ids[size] = sdxl.make_time_ids(
                height,
                width,
                top=config.crops_coords_top_left_h,
                left=config.crops_coords_top_left_w,
                device=latents.device,
            )
        return {
            "text_embeds": self.pooled.expand(len(latents), -1),
            "time_ids": self.time_ids[size].expand(len(latents), -1),
        }

    def compute_loss(self, model, batch):
        """||eps - eps_theta([z_t | m | z(s (1 - m))], t)||^2 over all latents (RORem, sec. 3.3).

        The same for the velocity where the model's scheduler predicts that (papers/zero_snr.md).
        The plain mean is the paper's; weights are options, off by default.

        Args:
            model: the UNet, as it is or wrapped.
            batch: `noise` [B, 4, h, w], `timestep` [B] from 0 to 999, `min_timestep` [B]
                (below it a hole does not count), and latents or images (`encode_batch`).

        Returns:
            The loss, and its parts by quarters of the timesteps.
        """
        scheduler, config = self.noise_schedule, self.config
        latents = self.encode_batch(batch)
        # z(GT) [B, 4, h, w]; m [B, 1, h, w] in {0, 1}; eps [B, 4, h, w]; t [B]
        clean, mask, noise, t = latents["gt"], latents["mask"], batch["noise"], batch["timestep"]
        # z_t = alpha_t z(GT) + sigma_t eps
        noisy = scheduler.add_noise(clean, noise, t)
        velocity = scheduler.config.prediction_type == "v_prediction"
        # v = alpha_t eps - sigma_t z(GT)
        target = scheduler.get_velocity(clean, noise, t) if velocity else noise
        # [z_t | m | z(s (1 - m))]: [B, 9, h, w]
        inputs = torch.cat([noisy, mask, latents["masked"]], dim=1)
        predicted = model(
            inputs,
            t,
            self.embeds.expand(len(clean), -1, -1),  # "" for all: [B, 77, 2048]
            added_cond_kwargs=self.make_condition(clean),
        ).sample.float()
        error = (predicted - target).square()
        # Weights w [B, 1, h, w]: 1 + mask_weight in the hole; 0 in the hole of a removal below its
        # timestep. sum(w e) / sum(w) an image, so that large holes do not outweigh small ones.
        counts = (t >= batch["min_timestep"])[:, None, None, None]
        weight = torch.where(counts, 1 + config.mask_weight * mask, 1 - mask)
        error = (weight * error).mean(dim=(1, 2, 3)) / weight.mean(dim=(1, 2, 3)).clamp(min=1e-3)
        if config.snr_gamma:
            # min(SNR, gamma) / SNR for eps, min(SNR, gamma) / (SNR + 1) for v (arXiv 2303.09556)
            snr = compute_snr(scheduler, t).clamp(min=1e-4)
            error = error * snr.clamp(max=config.snr_gamma) / (snr + 1 if velocity else snr)
        return error.mean(), tracking.split_by_time(
            error.detach(), t, scheduler.config.num_train_timesteps
        )

    def save_model(self, model, folder):
        if self.config.lora_rank:
            lora.save_lora(model, folder / "lora")
            lora.merge_lora(model)
        self.pipe.unet = model.eval()
        with sdxl.silence_libraries():
            self.pipe.save_pretrained(folder / "remover")
        sdxl.save_empty_prompt(self.pipe, folder / "remover")
        # It is used as its base is, but for the guidance, which it was trained without.
        settings = presets.find_settings(self.config.pretrained_model_name_or_path)
        settings = replace(settings, resolution=self.config.resolution, guidance_scale=1.0)
        presets.save_settings(settings, folder / "remover")
        if self.config.lora_rank:
            presets.save_settings(settings, folder / "lora")
        write_card(
            folder / "remover",
            title="Object remover",
            base_model=self.config.pretrained_model_name_or_path,
            resolution=self.config.resolution,
            text=f"Trained for {self.config.max_train_steps:,} steps on "
            f"{self.metrics['train_size']:,} triplets with the RORem kit.",
        )


def _take(sets: list[list], count: int) -> list[list]:
    """The first `count` triplets of several sets."""
    taken = []
    for part in sets:
        taken.append(part[:count])
        count -= len(taken[-1])
    return taken


def train_remover(config: RemoverConfig) -> dict:
    """Train and write `<output_dir>/remover`, a pipeline stock diffusers opens.

    Returns:
        `loop.train`'s metrics and `train_size`, the number of triplets.

    Raises:
        ValueError: there is no `meta_path`, or nothing in it to train on.
    """
    require_sets(config)
    return loop.train(RemoverObjective(config), config)


def main(arguments: list[str] | None = None) -> None:
    run_job(train_remover, parse_config(RemoverConfig, arguments))


if __name__ == "__main__":
    main()
