"""LCM-LoRA: the remover in 4 steps (RORem, sec. 3.4; latent consistency models, arXiv 2310.04378).

    # one GPU: the same 128 images a step, in eight parts
    python -m rorem_lib.distill --pretrained_model_name_or_path runs/mine/remover \
        --meta_path A/meta.json --output_dir runs/lora --gradient_accumulation_steps 8
    # eight GPUs
    accelerate launch --multi_gpu --num_processes 8 -m rorem_lib.distill \
        --pretrained_model_name_or_path runs/mine/remover --meta_path A/meta.json \
        --output_dir runs/lora

Reads a remover and the sets it was trained on. Writes in `output_dir` the LoRA
`lora/pytorch_lora_weights.safetensors`, `metrics.jsonl`, `train_metrics.json`,
`checkpoint-<step>/` and `validation_images/`. Started again, it goes on from the latest checkpoint;
a finished training is not made again.

The student is the remover with LoRA, the teacher the same weights with LoRA off. One DDIM step of
the teacher leads from t to an earlier time; the student must predict the same clean latents from
both. Upstream's code guides the teacher with quality prompts and a random scale; the paper says
empty text and no guidance, as RORem is used, and so does this.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from diffusers import LCMScheduler

from rorem_lib.models import lora, presets
from rorem_lib.models.hub import write_card
from rorem_lib.parameters import option
from rorem_lib.remover import RemoverConfig, RemoverObjective
from rorem_lib.training import loop
from rorem_lib.training.config import parse_config, require_sets, run_job
from rorem_lib.training.validation import Validation

VERSION = 1  # raise it when the same settings train other weights


@dataclass
class DistillConfig(RemoverConfig):
    """Distil a remover into a 4-step LCM-LoRA; the defaults are upstream's.

    The options of the remover's own loss (`mask_weight`, `snr_gamma`, `removal_min_timestep`) have
    no effect here: the target is the teacher's, not the GT. `lora_rank` and `trainable_modules`
    are refused: the LoRA of `rank` is what is trained.
    """

    output_dir: str = option(
        "runs/alone/07_distill_lora", "folder for the LoRA, checkpoints and metrics.jsonl"
    )
    max_train_steps: int = option(20_000, "optimizer steps in all; 0 takes num_train_epochs")
    checkpoints_total_limit: int = option(10, "how many checkpoints are kept; 0 keeps all")
    dataloader_num_workers: int = option(
        0, "processes that read samples; 0 reads in the training process"
    )
    rank: int = option(64, "LoRA rank (and alpha)")
    num_ddim_timesteps: int = option(
        50, "steps of the teacher's DDIM grid; one of them is one consistency step"
    )
    timestep_scaling: float = option(
        10.0,
        "of the boundary condition (LCM, appendix); larger is closer to a pure x0 prediction away "
        "from t = 0",
    )
    huber_c: float = option(0.0, "0 is the squared error; else the pseudo-Huber loss' constant")

    def __post_init__(self):
        super().__post_init__()
        if self.lora_rank or self.trainable_modules:
            raise ValueError(
                "distillation trains a LoRA of `rank`: leave lora_rank and "
                "trainable_modules as they are"
            )


class DistillObjective(RemoverObjective):
    """Consistency between the ends of one teacher step."""

    def build_model(self):
        unet = super().build_model()
        lora.add_lora(unet, self.config.rank)
        alphas = self.noise_schedule.alphas_cumprod.to(self.device)
        self.alpha, self.sigma = alphas.sqrt(), (1 - alphas).sqrt()
        total = self.noise_schedule.config.num_train_timesteps
        self.stride = total // self.config.num_ddim_timesteps
        return unet

    def _clean(self, predicted, noisy, t):
        """(x0, noise) that a prediction at time t [B] means, each [B, 4, h, w]."""
        a, s = self.alpha[t][:, None, None, None], self.sigma[t][:, None, None, None]
        # v: x0 = alpha_t x_t - sigma_t v, eps = sigma_t x_t + alpha_t v
        # eps: x0 = (x_t - sigma_t eps) / alpha_t
        if self.noise_schedule.config.prediction_type == "v_prediction":
            return a * noisy - s * predicted, a * predicted + s * noisy
        return (noisy - s * predicted) / a.clamp(min=1e-3), predicted

    def _student(self, model, noisy, t, latents, added):
        """Consistency function f(x_t, t) = c_skip(t) x_t + c_out(t) x0; f(x_0, 0) = x_0."""
        x0, _ = self._clean(self._call(model, noisy, t, latents, added), noisy, t)
        # tau = 10 t, sigma_data^2 = 0.25:
        # c_skip = 0.25 / (tau^2 + 0.25), c_out = tau / sqrt(tau^2 + 0.25)
        time = (t.float() * self.config.timestep_scaling)[:, None, None, None]
        skip = 0.25 / (time**2 + 0.25)
        return skip * noisy + time / (time**2 + 0.25).sqrt() * x0

    def _call(self, model, noisy, t, latents, added):
        inputs = torch.cat([noisy, latents["mask"], latents["masked"]], dim=1)
        return model(
            inputs, t, self.embeds.expand(len(noisy), -1, -1), added_cond_kwargs=added
        ).sample.float()

    def compute_loss(self, model, batch):
        """d(f(x_t, t), f(x_{t-k}, t-k)): two points of a path have one end (LCM, papers/lcm.md).

        x_{t-k} is one DDIM step of the teacher, the same UNet with its LoRA off; no gradient goes
        through the second term. No guidance: RORem removes without (sec. 3.3).

        Args:
            model: the UNet with LoRA, as it is or wrapped.
            batch: as the remover's.
        """
        config, latents = self.config, self.encode_batch(batch)
        clean = latents["gt"]  # z(GT) [B, 4, h, w]
        added = self.make_condition(clean)
        # The uniform timestep is snapped to the DDIM grid k - 1, 2k - 1, …, 999.
        t = batch["timestep"] // self.stride * self.stride + self.stride - 1
        earlier = (t - self.stride).clamp(min=0)
        # x_t = alpha_t z + sigma_t eps
        noisy = self.noise_schedule.add_noise(clean, batch["noise"], t)
        predicted = self._student(model, noisy, t, latents, added)
        unet = getattr(model, "module", model)
        with torch.no_grad():
            unet.disable_adapters()
            x0, noise = self._clean(self._call(unet, noisy, t, latents, added), noisy, t)
            unet.enable_adapters()
            # x_{t-k} = alpha_{t-k} x0 + sigma_{t-k} eps, both of the teacher
            a, s = (v[earlier][:, None, None, None] for v in (self.alpha, self.sigma))
            target = self._student(unet, a * x0 + s * noise, earlier, latents, added)
        error = predicted - target
        if config.huber_c:  # sqrt(e^2 + c^2) - c
            loss = ((error**2 + config.huber_c**2).sqrt() - config.huber_c).mean()
        else:
            loss = error.square().mean()
        return loss, {}

    def tune_model(self, model):
        """Twice the work of a remover's LoRA: teacher and target are a forward pass each."""
        return 2 * super().tune_model(model)

    def make_validation(self):
        """The student's removals as it is used: in 4 steps."""
        if not self.config.validation_steps:
            return None
        pipe = copy.copy(self.pipe)
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        return Validation(pipe, self.config, self.accelerator, num_inference_steps=4)

    def save_model(self, model, folder):
        lora.save_lora(model, folder / "lora")
        settings = replace(presets.FOUR_STEPS, resolution=self.config.resolution)
        presets.save_settings(settings, folder / "lora")
        write_card(
            folder / "lora",
            title="4-step LoRA of an object remover",
            base_model=self.config.pretrained_model_name_or_path,
            resolution=self.config.resolution,
            text="Distilled (LCM-LoRA) with the RORem kit: 4 steps with diffusers' LCMScheduler.",
        )


def train_lora(config: DistillConfig) -> dict:
    """Distil and write `<output_dir>/lora`; returns `loop.train`'s metrics.

    Raises:
        ValueError: there is no `meta_path`, or nothing in it to train on.
    """
    require_sets(config)
    return loop.train(DistillObjective(config), config)


def load_lora(pipe, folder) -> None:
    """Merge a 4-step LoRA into a pipeline of `sdxl.load_pipeline` and give it the LCM scheduler."""
    lora.load_lora(pipe, folder)
    presets.set_scheduler(pipe, "lcm")


def main(arguments: list[str] | None = None) -> None:
    run_job(train_lora, parse_config(DistillConfig, arguments))


if __name__ == "__main__":
    main()
