"""The remover's training on random weights and samples, in memory: its speed needs no others.

Everything but weights and samples is the kit's own: `loop.train`, `RemoverObjective`, `speed`. The
UNet and the VAE are SDXL-inpainting's, by their configs below, or the built-in model's.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from diffusers import AutoencoderKL, StableDiffusionXLInpaintPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from rorem_lib import remover
from rorem_lib.data.triplets import Triplet
from rorem_lib.models import sdxl
from rorem_lib.models.attention import compile_unet
from rorem_lib.remover import RemoverConfig, RemoverObjective
from rorem_lib.training import distributed, loop
from rorem_lib.training.dataset import TrainingMix
from rorem_lib.training.latents import DTYPES, encode_pictures
from rorem_lib.training.memory import count_flops, get_peak_flops

# The architecture of diffusers/stable-diffusion-xl-1.0-inpainting-0.1; all else is the default.
UNET = {
    "sample_size": 128,
    "in_channels": 9,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "sample_size": 1024,
    "latent_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.13025,
}
UNET_PARAMETERS, VAE_PARAMETERS = 2_567_478_084, 83_653_863
FORWARD_FLOPS = 1.5889e12  # of the UNet at 512 px
RESOLUTION = 512


@dataclass(frozen=True)
class Case:
    """A configuration.

    Attributes:
        options: what differs from `make_config`'s and `RemoverConfig`'s defaults.
        upstream: as the authors' trainer does it.
        needs: a package without which it is left out.
        own_prompts: keys and values of the prompt are made for each sample.
        steps: optimizer steps that are timed, after as many that are not.
        tiny: the built-in model in the place of SDXL's.
        batch: samples a step.
        memory_share: of the GPU's memory that may be used.
    """

    options: dict = field(default_factory=dict)
    upstream: bool = False
    needs: str = ""
    own_prompts: bool = False
    steps: int = 10
    tiny: bool = False
    batch: int = 1
    memory_share: float = 1.0

    def make_config(self, folder: Path) -> RemoverConfig:
        return RemoverConfig(
            **{
                "output_dir": str(folder),
                "pretrained_model_name_or_path": "builtin",
                "random_flip": True,
                "validation_steps": 0,
                "resolution": 64 if self.tiny else RESOLUTION,
                "train_batch_size": self.batch,
                "max_train_steps": 2 * self.steps,
                "logging_steps": self.steps,
                "checkpointing_steps": 10**9,
                "dataloader_num_workers": 0 if self.tiny else 2,
                "mixed_precision": "bf16",
                "vae_precision": "bf16",
                "resume_from_checkpoint": "none",
                **self.options,
            }
        )


def check_architecture() -> None:
    """The configs are SDXL's: parameters and FLOPs, counted without a byte of weights.

    Raises:
        ValueError: a number is another one.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
        vae = AutoencoderKL(**VAE)
    for name, model, expected in (("UNet", unet, UNET_PARAMETERS), ("VAE", vae, VAE_PARAMETERS)):
        count = sum(p.numel() for p in model.parameters())
        if count != expected:
            raise ValueError(f"the {name} has {count} parameters, SDXL-inpainting's {expected}")
    flops = count_flops(unet, RESOLUTION // 8, RESOLUTION // 8)
    if abs(flops / FORWARD_FLOPS - 1) > 1e-3:
        raise ValueError(f"a forward pass has {flops:.4g} FLOPs, not {FORWARD_FLOPS:.4g}")


def make_pipeline(small, device) -> StableDiffusionXLInpaintPipeline:
    """SDXL-inpainting with random UNet and VAE, made where they stay.

    Args:
        small: the built-in pipeline. Its tokenizers and scheduler are taken, and its text encoders
            widened, so that they give a prompt of SDXL's size; they run once.
        device: where the weights go.
    """
    with torch.device(device), sdxl.silence_libraries():
        parts = {"unet": UNet2DConditionModel(**UNET), "vae": AutoencoderKL(**VAE)}
        for name, cls, width in (
            ("text_encoder", CLIPTextModel, 768),
            ("text_encoder_2", CLIPTextModelWithProjection, 1280),
        ):
            config = getattr(small, name).config.to_dict()
            parts[name] = cls(
                CLIPTextConfig(**config | {"hidden_size": width, "projection_dim": width})
            )
        pipe = StableDiffusionXLInpaintPipeline(**small.components | parts)
    for part in parts.values():
        part.requires_grad_(False).eval()
    return pipe.to(device)


class RandomReader:
    """What a latent cache or the images' reader gives, made up: eight triplets that take turns.

    Args:
        shape: (h, w) of the images, px.
        factor: the VAE's where latents are wanted, 0 for images.
        dtype: the latents'.
    """

    def __init__(self, shape: tuple[int, int], factor: int, dtype: torch.dtype, count: int = 64):
        self.count, (height, width) = count, shape
        generator = torch.Generator().manual_seed(0)
        hole = torch.zeros(shape, dtype=torch.uint8)
        hole[height // 4 : height // 2, width // 4 : width // 2] = 255
        if factor:
            latents = (8, 4, height // factor, width // factor)
            self.parts = {
                name: torch.randn(latents, generator=generator).to(dtype)
                for name in ("gt", "masked")
            }
            hole = (hole[::factor, ::factor] >= 128).to(torch.uint8)[None]
        else:
            self.parts = {
                name: torch.randint(256, (8, *shape, 3), generator=generator, dtype=torch.uint8)
                for name in ("gt", "source")
            }
        self.parts["mask"] = hole.expand(8, *hole.shape)

    def __len__(self):
        return self.count

    def read(self, index: int, *, flipped: int = 0, variant: int = 0) -> dict[str, torch.Tensor]:
        """The parts of one triplet; its flipped and its variants are itself."""
        return {name: part[index % 8] for name, part in self.parts.items()}


class RandomObjective(RemoverObjective):
    """The remover's, of random samples, its model not written."""

    def __init__(self, config: RemoverConfig, case: Case):
        super().__init__(config)
        self.case = case

    def build_model(self):
        unet = super().build_model()
        if self.case.own_prompts and not self.config.enable_xformers_memory_efficient_attention:
            unet.set_attn_processor(AttnProcessor2_0())
        return unet

    def hash_images(self):
        return None  # there are none

    def list_mixes(self):
        nowhere = Triplet("random", Path("random"), Path("random"), Path("random"), "random")
        return [TrainingMix([[nowhere] * 64], self.config.resolution)]

    def _read(self, triplets, sizes, spec):
        factor = self.pipe.vae_scale_factor if self.config.cache_latents else 0
        return RandomReader(sizes[0], factor, DTYPES[spec.dtype], count=len(triplets))

    def save_model(self, model, folder):
        pass


class UpstreamObjective(RandomObjective):
    """What the authors' trainer does otherwise at a step."""

    @torch.no_grad()
    def encode_batch(self, batch):
        vae, mask = self.pipe.vae, (batch["mask"] >= 128).float()[:, None]
        pictures = {
            "gt": sdxl.to_tensor(batch["gt"]),
            "masked": sdxl.mask_source(sdxl.to_tensor(batch["source"]), mask),
        }
        with sdxl.autocast("no", self.device):  # its autocast is the UNet's alone
            latents = {
                name: sdxl.encode_images(vae, x, generator=self.generator)
                for name, x in pictures.items()
            }
        return latents | {"mask": sdxl.shrink_mask(mask, latents["gt"])}

    @functools.cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.config.seed)

    def compute_loss(self, model, batch):
        loss, shown = super().compute_loss(model, batch)
        loss.item()  # it logs every step's, and so waits for the GPU
        return loss, shown


def make_stock_optimizer(config, parameters, batch: int = 1) -> torch.optim.Optimizer:
    """AdamW as the authors' trainer makes it: not fused."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )


@contextlib.contextmanager
def replaced(case: Case):
    """Random models in the place of files; upstream's optimizer where it is its turn."""
    with contextlib.ExitStack() as stack:

        def replace(module, name, value):
            stack.enter_context(mock.patch.object(module, name, value))

        if case.tiny:  # blocks are split as for the compiler, but run as they are: seconds saved
            replace(remover, "compile_unet", functools.partial(compile_unet, backend="eager"))
        else:
            small = sdxl.load_pipeline("builtin")
            replace(sdxl, "load_pipeline", lambda *_, device, **__: make_pipeline(small, device))
        if case.upstream:
            replace(loop, "make_optimizer", make_stock_optimizer)
        yield


def measure_case(case: Case) -> dict:
    """Train by one configuration.

    Returns:
        `batch`, `images_per_second`, `mfu` where the device's peak is known, `memory_gb` (10^9
        bytes), `gradient_checkpointing`, and with fp16's scaler `skipped_steps`, which cost less
        than others; or `batch` and `out_of_memory` with the kit's advice.
    """
    if case.memory_share < 1 and distributed.get_device() == "cuda":
        torch.cuda.set_per_process_memory_fraction(case.memory_share)
    with tempfile.TemporaryDirectory() as folder, replaced(case):
        config = case.make_config(Path(folder))
        objective = (UpstreamObjective if case.upstream else RandomObjective)(config, case)
        try:
            loop.train(objective, config)
        except MemoryError as error:
            return {"batch": case.batch, "out_of_memory": str(error)}
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    scaler = objective.accelerator.scaler
    # each step that is skipped halves the scale, which begins at 2^16
    skipped = {} if scaler is None else {"skipped_steps": 16 - int(math.log2(scaler.get_scale()))}
    return {
        "batch": case.batch,
        **skipped,
        **{name: lines[-1][name] for name in ("images_per_second", "mfu") if name in lines[-1]},
        "memory_gb": max(line["memory_gb"] for line in lines),
        "gradient_checkpointing": bool(objective.recomputes),
    }


def measure_encoding(case: Case) -> dict:
    """Triplets a second that `encode_pictures` makes latents of, by the VAE's precision: what a
    latent cache takes once, each as it is and mirrored; decoding is left out."""
    device = distributed.get_device()
    found = {}
    with replaced(case):
        vae = sdxl.load_pipeline("builtin", device=device).vae
    config = case.make_config(Path("unused"))
    side, batch = config.resolution, case.batch
    reader = RandomReader((side, side), 0, torch.float16)
    samples = [reader.read(index) for index in range(batch)]
    pictures = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    for precision in ("fp32", "bf16"):
        spec = RemoverConfig(vae_precision=precision).make_spec()
        encode_pictures(vae, pictures, spec)["masked"].cpu()
        began = time.perf_counter()
        for _ in range(case.steps):
            encode_pictures(vae, pictures, spec)["masked"].cpu()  # waits for the GPU
        views = (1 + spec.flipped) * (time.perf_counter() - began)
        found[precision] = round(batch * case.steps / views, 2)
    return found


def describe_gpu() -> dict:
    """Name, memory in GiB, compute capability, CUDA's version and the peak in TFLOP per second."""
    if distributed.get_device() != "cuda":
        return {}
    card = torch.cuda.get_device_properties(0)
    peak = get_peak_flops("cuda")
    return {
        "name": card.name,
        "memory_gib": round(card.total_memory / 2**30, 1),
        "capability": f"{card.major}.{card.minor}",
        "cuda": torch.version.cuda,
        "peak_tflops": peak and peak / 1e12,
    }
