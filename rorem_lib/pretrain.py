"""Make the built-in model again: an SDXL-inpainting stack in miniature, trained on the scenes.

    # one GPU, or a CPU
    python -m rorem_lib.pretrain all --output_dir training/builtin
    # eight GPUs, stage by stage: autoencoder, widen, base, anneal; then export on one process
    accelerate launch --multi_gpu --num_processes 8 -m rorem_lib.pretrain base \
        --output_dir training/builtin --train_batch_size 8

Reads nothing: scenes are rendered as they are needed. Writes in `output_dir` a folder for each
stage and the pipeline `model/`.

`all` trains the autoencoder (twice: on the scenes the base sees, then on the wide ones), then the
base UNet the way SDXL-inpainting was trained (random masks, the image itself as target, objects
included), and writes the pipeline. The base so learns to paint plausible things into holes,
objects among them: what RORem starts from (RORem, Table 1, "Base"). Every training resumes when
it is started again; a finished one is not made again.

`builtin:remover`, the remover that ships, is the last one of a demo run:

    python -m rorem_lib.pretrain remover --run runs/demo
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from rorem_lib.builtin import scenes
from rorem_lib.files import read_json, replace_folder, resolve_path, write_json
from rorem_lib.models import hub, sdxl
from rorem_lib.models.attention import prepare_training
from rorem_lib.parameters import option
from rorem_lib.training import loop
from rorem_lib.training.config import LoopConfig, parse_config

TEXT_WIDTH = 16
UNET = {
    "sample_size": scenes.SIZE // 4,
    "in_channels": 9,
    "out_channels": 4,
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2 * TEXT_WIDTH,
    "attention_head_dim": (2, 4),
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + TEXT_WIDTH,
}
VAE = {
    "encoder_block_out_channels": (32, 32, 32),
    "decoder_block_out_channels": (48, 48, 48),
    "num_encoder_blocks": (1, 1, 2),
    "num_decoder_blocks": (3, 2, 1),
    "scaling_factor": 1.0,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


@dataclass
class PretrainConfig(LoopConfig):
    """Pre-training of the built-in model's autoencoder or base UNet."""

    output_dir: str = option("training/builtin", "each stage has a folder of its own in it")
    max_train_steps: int = option(1000, "optimizer steps in all")
    train_batch_size: int = option(32, "samples a process and micro-batch")
    learning_rate: float = option(1e-3, "AdamW's peak rate")
    lr_warmup_steps: int = option(200, "steps of linear warm-up, in schedules that have one")
    ema_decay: float = option(0.999, "decay of the weights' moving average, which is saved")
    checkpointing_steps: int = option(250, "steps between checkpoints; 0 writes none")
    checkpoints_total_limit: int = option(2, "how many checkpoints are kept; 0 keeps all")
    mixed_precision: str = option("bf16", "no, bf16, fp16, or auto: bf16 where the hardware has it")
    dataloader_num_workers: int = option(
        1, "processes that render scenes; 0 renders in the training process"
    )
    vae: str = option("", "the trained autoencoder's folder (base only)")
    init_from: str = option("", "a model folder to start from; empty starts from random weights")
    role: str = option("pretrain", "which scenes are seen, see builtin.scenes")
    object_share: float = option(0.45, "fraction of the masks that follow an object")
    moved_share: float = option(
        0.12,
        "fraction of the masks that have an object's outline, but lie elsewhere; all others know "
        "nothing of objects (draw_free_mask)",
    )
    size: int = option(scenes.SIZE, "side of the scenes, px")
    first_scene: int = option(0, "index of the first scene; every later scene is new")


def draw_free_mask(rng: np.random.Generator, size: int) -> np.ndarray:
    """A random mask that knows nothing of the objects, uint8 [size, size] 0/255.

    Blobs and strokes, a rectangle, half of the image or all of it, as inpainting models are
    pre-trained (LaMa and SDXL-inpainting style random masks).
    """
    mask = np.zeros((size, size), np.uint8)
    choice = rng.random()
    if choice < 0.06:
        mask[:] = 255
    elif choice < 0.25:
        x, y = rng.integers(0, size, 2)
        w, h = rng.integers(size // 6, size // 2 + 1, 2)
        mask[y : y + h, x : x + w] = 255
    elif choice < 0.75:
        centre = rng.uniform(0.15, 0.85, 2) * size
        axes = rng.uniform(0.1, 0.25, 2) * size
        cv2.ellipse(mask, (tuple(centre), tuple(2 * axes), float(rng.uniform(0, 180))), 255, -1)
    else:
        points = (rng.uniform(0.1, 0.9, (int(rng.integers(2, 5)), 1, 2)) * size).astype(np.int32)
        cv2.polylines(mask, [points], False, 255, int(rng.integers(size // 12, size // 5)))
    return mask


class _SceneStream(Dataset):
    """Endless scenes: two masks a scene, flips, noise and timestep, all from the position."""

    def __init__(self, config: PretrainConfig, *, masks: bool):
        self.config, self.masks = config, masks
        self._scene = functools.lru_cache(maxsize=1)(self._render)

    def _render(self, number):
        return scenes.render_scene(
            [self.config.seed, self.config.first_scene + number],
            role=self.config.role,
            size=self.config.size,
        )

    def __len__(self):
        return sys.maxsize

    def __getitem__(self, position):
        config = self.config
        scene = self._scene(position // 2)
        rng = np.random.default_rng([config.seed, 7, position])
        flip = slice(None, None, -1) if rng.random() < 0.5 else slice(None)
        sample = {"image": scene.image[:, flip].copy()}
        kind = rng.random()
        if kind < config.object_share:
            mask = scene.mask
        elif kind < config.object_share + config.moved_share:
            mask = np.roll(scene.mask, rng.integers(0, config.size, 2), axis=(0, 1))
        else:
            mask = draw_free_mask(rng, config.size)
        sample["mask"] = (mask[:, flip] >= 128).astype(np.uint8)[None]
        if self.masks:
            side = config.size // 4
            sample["noise"] = rng.standard_normal((4, side, side), dtype=np.float32)
            sample["timestep"] = np.int64(rng.integers(0, 1000))
        return sample


class AutoencoderObjective(loop.Objective):
    """`AutoencoderTiny`: L1 + L2 + gradient loss, latents kept near zero mean and unit spread."""

    def build_model(self):
        start = self.config.init_from
        vae = AutoencoderTiny.from_pretrained(start) if start else AutoencoderTiny(**VAE)
        return vae.train().requires_grad_(True).to(memory_format=torch.channels_last)

    def make_dataset(self):
        return _SceneStream(self.config, masks=False)

    def compute_loss(self, model, batch):
        images = sdxl.to_tensor(batch["image"])
        half = len(images) // 2  # the encoder also sees images with a hole
        mask = batch["mask"].float()
        mask[half:] = 0
        images = sdxl.mask_source(images, mask)
        vae = getattr(model, "module", model)
        # `forward` of AutoencoderTiny quantises the latents to bytes; the pipeline does not
        latents = vae.encoder(images)
        noisy = latents + 0.02 * torch.randn_like(latents)
        decoded = vae.decoder(noisy).float()
        error = decoded - images
        slope = sum((error.diff(dim=d)).abs().mean() for d in (2, 3))
        rows = latents.float().flatten(2)
        mean, spread = rows.mean(dim=(0, 2)), rows.std(dim=(0, 2))
        shape = mean.square().mean() + (spread - 1).square().mean()
        squared = error.square().mean()
        loss = error.abs().mean() + squared + 0.3 * slope + 0.02 * shape
        return loss, {"psnr": 10 * torch.log10(4 / squared.detach()), "spread": spread.mean()}

    def save_model(self, model, folder):
        model.save_pretrained(folder / "vae")


class BaseObjective(loop.Objective):
    """The 9-channel UNet learns to reconstruct whatever a mask hides (v-prediction)."""

    def build_model(self):
        torch.manual_seed(self.config.seed)
        self.pipe = build_pipeline(
            AutoencoderTiny.from_pretrained(self.config.vae), init_from=self.config.init_from
        )
        self.vae = self.pipe.vae.to(self.device, memory_format=torch.channels_last)
        self.embeds, self.pooled = (t.to(self.device) for t in sdxl.encode_prompt(self.pipe))
        sdxl.set_resolution(self.pipe, self.pipe.unet, self.config.size)
        return prepare_training(self.pipe.unet.to(self.device))

    def make_dataset(self):
        return _SceneStream(self.config, masks=True)

    def compute_loss(self, model, batch):
        scheduler = self.pipe.scheduler
        with torch.no_grad():
            images = sdxl.to_tensor(batch["image"])
            mask = batch["mask"].float()
            latents = sdxl.encode_images(
                self.vae, torch.cat([images, sdxl.mask_source(images, mask)])
            ).float()
            clean, masked = latents.chunk(2)
            noise, t = batch["noise"], batch["timestep"]
            noisy = scheduler.add_noise(clean, noise, t)
            target = scheduler.get_velocity(clean, noise, t)
            small = sdxl.shrink_mask(mask, clean)
            inputs = torch.cat([noisy, small, masked], dim=1)
            count, size = len(images), self.config.size
            added = {
                "text_embeds": self.pooled.expand(count, -1),
                "time_ids": sdxl.make_time_ids(size, size, count, device=self.device),
            }
        predicted = model(
            inputs, t, self.embeds.expand(count, -1, -1), added_cond_kwargs=added
        ).sample.float()
        weight = 1 + 2 * small
        error = (predicted - target).square()
        loss = (weight * error).mean() / weight.mean()
        hole = (small * error).sum() / (4 * small.sum()).clamp(min=1)
        return loss, {"loss_hole": hole.detach()}

    def save_model(self, model, folder):
        model.save_pretrained(folder / "unet")


def build_pipeline(vae, *, init_from: str = "") -> StableDiffusionXLInpaintPipeline:
    """The stack around `vae`: tokenizers, random text encoders, UNet (random or `init_from`)."""
    if init_from:
        unet = UNet2DConditionModel.from_pretrained(init_from)
    else:
        unet = UNet2DConditionModel(**UNET)
        torch.nn.init.zeros_(unet.conv_out.weight)
    tokenizer = _build_tokenizer("<|endoftext|>")
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "num_hidden_layers": 2,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_attention_heads": 2,
        "projection_dim": TEXT_WIDTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)  # the text encoders are never trained: always the same ones
    pipe = StableDiffusionXLInpaintPipeline(
        vae=vae,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULER),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text)),
        tokenizer=tokenizer,
        tokenizer_2=_build_tokenizer("!"),
    )
    if not init_from:
        sdxl.set_resolution(pipe, unet, scenes.SIZE)
    return pipe


def _build_tokenizer(pad_token: str) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges: every letter is a token."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    names = letters + [letter + "</w>" for letter in letters]
    vocabulary = {
        name: number for number, name in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])
    }
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, pad_token=pad_token)


def export_model(vae: str, unet: str, folder, *, half: bool = True) -> Path:
    """Write the pipeline to `folder`, weights in float16 so that it stays under 24 MB."""
    pipe = build_pipeline(AutoencoderTiny.from_pretrained(vae), init_from=unet)
    if half:
        pipe.to(dtype=torch.float16)
    pipe.save_pretrained(folder)
    return Path(folder)


def export_remover(run, folder=sdxl.REMOVER_FOLDER, *, stage: str = "high_resolution") -> Path:
    """Write the remover of a demo run as `builtin:remover`: its UNet in float16, and its card.

    VAE, text encoders and scheduler stay those of `builtin`, from which the run started.

    Args:
        run: the run's folder, such as `runs/demo`.
        folder: where it goes; what is there is replaced.
        stage: the training whose remover it is.

    Raises:
        FileNotFoundError: the stage has no remover.
        ValueError: the run did not start from `builtin`: another VAE's latents.
    """
    run, folder = resolve_path(run), Path(folder)
    found = run / stage / "remover"
    if not (found / "unet" / "config.json").is_file():
        raise FileNotFoundError(f"{found} holds no remover: run the stage {stage} first")
    for vae in found.glob("vae/*.safetensors"):
        own, shipped = load_file(vae), load_file(sdxl.BUILTIN_FOLDER / "vae" / vae.name)
        if any(not torch.equal(own[name].half(), shipped[name].half()) for name in shipped):
            raise ValueError(f"{vae} is not the VAE of builtin: the run started from another model")
    unet = UNet2DConditionModel.from_pretrained(found / "unet").half()
    tmp_path = folder.with_name(f".{folder.name}.partial")
    unet.save_pretrained(tmp_path)
    made = {"stage": stage}
    if (run / "run.json").is_file():
        described = read_json(run / "run.json")
        made |= {"recipe": described["recipe"], "seed": described["seed"]}
    text = "Not measured yet."
    if (run / "evaluation" / "metrics.json").is_file():
        methods = read_json(run / "evaluation" / "metrics.json")["methods"]
        rows = {m["row"]: m for m in methods if not m["control"] and m.get("row")}
        row = rows[stage.replace("_", " ")]
        made |= {name: row[name] for name in ("n", "success_rate", "success_interval")}
        low, high = (100 * x for x in row["success_interval"])
        text = (
            f"Success {100 * row['success_rate']:.1f}% of {row['n']} held-out scenes (95% CI "
            f"{low:.1f} to {high:.1f}), {row['num_inference_steps']} steps, by the simulated "
            "annotator."
        )
    write_json(tmp_path / "made.json", made)
    title = "The remover that ships, a miniature for the kit's rendered scenes"
    words = (
        f"The UNet of the demo's stage `{stage}` in float16, {text[0].lower()}{text[1:]} Its VAE, "
        "text encoders and scheduler are those of `builtin/model`. It is for images like the kit's "
        "rendered scenes and for nothing else: on photographs it is no better than OpenCV."
    )
    size = unet.config[sdxl.TRAINED_RESOLUTION]
    hub.write_card(tmp_path, title=title, base_model="builtin", resolution=size, text=words)
    return replace_folder(tmp_path, folder)


# What the shipped model was made with; the model card repeats it. Like SDXL's own, the
# autoencoder has seen the wide world (`widen`); only the UNet's pre-training leaves a gap.
AUTOENCODER_STAGE = {"max_train_steps": 2600, "learning_rate": 2e-3, "lr_scheduler": "cosine"}
WIDEN_STAGE = {
    "max_train_steps": 1700,
    "learning_rate": 1.5e-3,
    "lr_scheduler": "cosine",
    "role": "pool",
    "first_scene": 20_000_000,
}
BASE_STAGE = {
    "max_train_steps": 9000,
    "train_batch_size": 64,
    "lr_scheduler": "constant_with_warmup",
}
ANNEAL_STAGE = {
    "max_train_steps": 3000,
    "train_batch_size": 64,
    "lr_scheduler": "linear",
    "lr_warmup_steps": 100,
    "object_share": 0.35,
    "moved_share": 0.25,
}

STAGES = {
    "autoencoder": AUTOENCODER_STAGE,
    "widen": WIDEN_STAGE,
    "base": BASE_STAGE,
    "anneal": ANNEAL_STAGE,
}


def run_stage(name: str, config: PretrainConfig) -> dict:
    """One of `STAGES`, each in its own folder below `output_dir`."""
    root = Path(config.output_dir)
    config = replace(config, output_dir=str(root / name))
    if name in ("autoencoder", "widen"):
        if name == "widen":
            config.init_from = config.init_from or str(root / "autoencoder" / "vae")
        return loop.train(AutoencoderObjective(config), config)
    config.vae = config.vae or str(root / "widen" / "vae")
    if name == "anneal":
        config.init_from = config.init_from or str(root / "base" / "unet")
        config.first_scene = config.first_scene or 10_000_000
    return loop.train(BaseObjective(config), config)


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    usage = (
        f"usage: python -m rorem_lib.pretrain {'|'.join(STAGES)}|export|all|remover "
        "[--option value ...]"
    )
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"{usage}\n\n{PretrainConfig.__doc__} `base --help` lists the options.")
        return
    if arguments[:1] == ["remover"]:
        parser = argparse.ArgumentParser(prog="python -m rorem_lib.pretrain remover")
        parser.add_argument("--run", required=True, help="folder of a demo run")
        parser.add_argument("--stage", default="high_resolution", help="whose remover it is")
        given = parser.parse_args(arguments[1:])
        print(export_remover(given.run, stage=given.stage))
        return
    if not arguments or arguments[0] not in (*STAGES, "export", "all"):
        sys.exit(usage)
    requested = arguments.pop(0)
    for name, settings in STAGES.items():
        if requested in (name, "all"):
            given = parse_config(
                PretrainConfig,
                [*(w for k, v in settings.items() for w in (f"--{k}", str(v))), *arguments],
            )
            run_stage(name, given)
    if requested in ("export", "all"):
        root = Path(parse_config(PretrainConfig, arguments).output_dir)
        folder = export_model(
            str(root / "widen" / "vae"), str(root / "anneal" / "unet"), root / "model"
        )
        write_json(folder / "made.json", {"stages": STAGES})


if __name__ == "__main__":
    main()
