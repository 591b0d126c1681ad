"""LCM-LoRA: the remover in 4 steps (RORem, sec. 3.4; latent consistency models, arXiv 2310.04378).

    python -m rorem_lib.distill --pretrained_model_name_or_path runs/…/remover --meta_path …

The student is the remover with LoRA, the teacher the same weights with LoRA off. One DDIM step of
the teacher leads from t to an earlier time; the student must predict the same clean latents from
both. Upstream's code guides the teacher with quality prompts and a random scale; the paper says
empty text and no guidance, as RORem is used, and so does this.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from diffusers import LCMScheduler

from rorem_lib.models import lora
from rorem_lib.remover import RemoverConfig, RemoverObjective
from rorem_lib.training import loop
from rorem_lib.training.config import parse_config, run_job
from rorem_lib.training.validation import Validation


@dataclass
class DistillConfig(RemoverConfig):
    """Distil a remover into a 4-step LCM-LoRA.

    The options of the remover's own loss (`mask_weight`, `snr_gamma`, `removal_min_timestep`) have
    no effect here: the target is the teacher's, not the GT. `lora_rank` and `trainable_modules`
    are refused: the LoRA of `rank` is what is trained.

    Attributes:
        rank: LoRA rank (and alpha).
        num_ddim_timesteps: the teacher's DDIM grid; one step of it is one consistency step.
        timestep_scaling: of the boundary condition (LCM, appendix); larger is closer to a pure
            x0 prediction away from t = 0.
        huber_c: 0 is the squared error; above it the pseudo-Huber loss' constant.
    """

    output_dir: str = "runs/alone/07_distill_lora"
    rank: int = 64
    num_ddim_timesteps: int = 50
    timestep_scaling: float = 10.0
    huber_c: float = 0.0

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
        if self.noise_schedule.config.prediction_type == "v_prediction":
            return a * noisy - s * predicted, a * predicted + s * noisy
        return (noisy - s * predicted) / a.clamp(min=1e-3), predicted

    def _student(self, model, noisy, t, latents, added):
        """Consistency function: c_skip x + c_out x0, with the boundary x at t = 0."""
        x0, _ = self._clean(self._call(model, noisy, t, latents, added), noisy, t)
        time = (t.float() * self.config.timestep_scaling)[:, None, None, None]
        skip = 0.25 / (time**2 + 0.25)
        return skip * noisy + time / (time**2 + 0.25).sqrt() * x0

    def _call(self, model, noisy, t, latents, added):
        inputs = torch.cat([noisy, latents["mask"], latents["masked"]], dim=1)
        return model(
            inputs, t, self.embeds.expand(len(noisy), -1, -1), added_cond_kwargs=added
        ).sample.float()

    def compute_loss(self, model, batch):
        config, latents = self.config, self.encode_batch(batch)
        clean = latents["gt"]
        added = self.make_condition(clean)
        # The uniform timestep is snapped to the grid stride - 1, 2 stride - 1, …, 999.
        t = batch["timestep"] // self.stride * self.stride + self.stride - 1
        earlier = (t - self.stride).clamp(min=0)
        noisy = self.noise_schedule.add_noise(clean, batch["noise"], t)
        predicted = self._student(model, noisy, t, latents, added)
        unet = getattr(model, "module", model)
        with torch.no_grad():
            unet.disable_adapters()
            x0, noise = self._clean(self._call(unet, noisy, t, latents, added), noisy, t)
            unet.enable_adapters()
            a, s = (v[earlier][:, None, None, None] for v in (self.alpha, self.sigma))
            target = self._student(unet, a * x0 + s * noise, earlier, latents, added)
        error = predicted - target
        if config.huber_c:
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


def train_lora(config: DistillConfig) -> dict:
    """Distil and write `<output_dir>/lora`; returns `loop.train`'s metrics."""
    return loop.train(DistillObjective(config), config)


def load_lora(pipe, folder) -> None:
    """Merge a 4-step LoRA into a pipeline of `sdxl.load_pipeline` and give it the LCM scheduler."""
    lora.load_lora(pipe, folder)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)


def main(arguments: list[str] | None = None) -> None:
    run_job(train_lora, parse_config(DistillConfig, arguments))


if __name__ == "__main__":
    main()
