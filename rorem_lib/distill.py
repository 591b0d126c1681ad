"""LCM-LoRA: the remover in 4 steps (RORem, sec. 3.4; latent consistency models, arXiv 2310.04378).

    python -m rorem_lib.distill --pretrained_model_name_or_path runs/…/remover --meta_path …

The student is the remover with LoRA, the teacher the same weights with LoRA off. One DDIM step of
the teacher leads from t to an earlier time; the student must predict the same clean latents from
both. Upstream's code guides the teacher with quality prompts and a random scale; the paper says
empty text and no guidance, as RORem is used, and so does this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import StableDiffusionXLInpaintPipeline
from peft import LoraConfig, get_peft_model_state_dict

from rorem_lib import loop, options, sdxl
from rorem_lib.remover import RemoverConfig, RemoverObjective

LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj",
                "ff.net.2", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv",
                "upsamplers.0.conv", "time_emb_proj"]


@dataclass
class DistillConfig(RemoverConfig):
    """Distil a remover into a 4-step LCM-LoRA.

    The options of the remover's own loss (`mask_weight`, `snr_gamma`, `removal_min_timestep`) have
    no effect here: the target is the teacher's, not the GT.

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


class DistillObjective(RemoverObjective):
    """Consistency between the ends of one teacher step."""

    def build_model(self):
        unet = super().build_model().requires_grad_(False)
        targets = LORA_TARGETS
        unet.add_adapter(LoraConfig(r=self.config.rank, lora_alpha=self.config.rank,
                                    target_modules=targets))
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

    def _student(self, model, noisy, t, batch, added):
        """Consistency function: c_skip x + c_out x0, with the boundary x at t = 0."""
        x0, _ = self._clean(self._call(model, noisy, t, batch, added), noisy, t)
        time = (t.float() * self.config.timestep_scaling)[:, None, None, None]
        skip = 0.25 / (time**2 + 0.25)
        return skip * noisy + time / (time**2 + 0.25).sqrt() * x0

    def _call(self, model, noisy, t, batch, added):
        inputs = torch.cat([noisy, batch["mask"], batch["masked"]], dim=1)
        return model(inputs, t,
                     self.embeds.expand(len(noisy), -1, -1),
                     added_cond_kwargs=added).sample.float()

    def compute_loss(self, model, batch):
        config, clean = self.config, batch["gt"]
        side = clean.shape[-1] * self.pipe.vae_scale_factor
        added = {"text_embeds": self.pooled.expand(len(clean), -1),
                 "time_ids": sdxl.make_time_ids(side, side, len(clean), device=clean.device)}
        # The uniform timestep is snapped to the grid stride - 1, 2 stride - 1, …, 999.
        t = batch["timestep"] // self.stride * self.stride + self.stride - 1
        earlier = (t - self.stride).clamp(min=0)
        noisy = self.noise_schedule.add_noise(clean, batch["noise"], t)
        predicted = self._student(model, noisy, t, batch, added)
        unet = getattr(model, "module", model)
        with torch.no_grad():
            unet.disable_adapters()
            x0, noise = self._clean(self._call(unet, noisy, t, batch, added), noisy, t)
            unet.enable_adapters()
            a, s = (v[earlier][:, None, None, None] for v in (self.alpha, self.sigma))
            target = self._student(unet, a * x0 + s * noise, earlier, batch, added)
        error = predicted - target
        if config.huber_c:
            loss = ((error**2 + config.huber_c**2).sqrt() - config.huber_c).mean()
        else:
            loss = error.square().mean()
        return loss, {}

    def save_model(self, model, folder):
        # In peft's own names. diffusers' older names exist for the attention layers alone, and its
        # loader silently drops one kind from a file that mixes both.
        layers = get_peft_model_state_dict(model)
        StableDiffusionXLInpaintPipeline.save_lora_weights(folder / "lora",
                                                           unet_lora_layers=layers)


def train_lora(config: DistillConfig) -> dict:
    """Distil and write `<output_dir>/lora`; returns `loop.train`'s metrics."""
    return loop.train(DistillObjective(config), config)


def load_lora(pipe, folder) -> None:
    """Merge a 4-step LoRA into a pipeline of `sdxl.load_pipeline` and give it the LCM scheduler."""
    from diffusers import LCMScheduler

    # Named, since diffusers refuses to look for the file itself where the network is switched off.
    with sdxl.silence_libraries():
        pipe.load_lora_weights(str(folder), weight_name=LORA_FILE)
        pipe.fuse_lora(components=["unet"])  # merged into the weights, it costs no time
        pipe.unload_lora_weights()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)


def main(arguments: list[str] | None = None) -> None:
    options.run_job(train_lora, options.parse_config(DistillConfig, arguments))


if __name__ == "__main__":
    main()
