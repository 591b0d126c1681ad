"""The removal loop: bit for bit the stock pipeline's, and its networks in other hands."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from rorem_lib.models import denoising, sdxl
from rorem_lib.models.inpainting import ObjectRemover

SCHEDULERS = (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    HeunDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    PNDMScheduler,
)


@pytest.fixture(scope="module")
def pipe(tiny_model):
    """With SDXL's kind of VAE, which has a posterior, and with its noise schedule."""
    pipe = sdxl.load_pipeline(str(tiny_model))
    torch.manual_seed(0)
    pipe.vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 8, 16],
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.3,
        force_upcast=False,
    ).eval()
    plain = {
        "rescale_betas_zero_snr": False,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
    }
    pipe.scheduler = DDIMScheduler.from_config({**pipe.scheduler.config, **plain})
    return pipe


def draw(batch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, 32, 48, 3), dtype=np.uint8)
    masks = np.zeros((batch, 32, 48), np.uint8)
    masks[:, 9:20, 13:30] = 255
    return images, masks


def run_both(pipe, *, batch=2, steps=4, **options):
    images, masks = draw(batch)
    embeds, pooled = sdxl.encode_prompt(pipe)
    stock = pipe(
        prompt_embeds=embeds.repeat(batch, 1, 1),
        pooled_prompt_embeds=pooled.repeat(batch, 1),
        image=[Image.fromarray(image) for image in images],
        mask_image=[Image.fromarray(mask) for mask in masks],
        height=32,
        width=48,
        num_inference_steps=steps,
        output_type="np",
        generator=[denoising.make_generator(0, n) for n in range(batch)],
        **options,
    ).images
    generators = [denoising.make_generator(0, n) for n in range(batch)]
    networks = denoising.PipelineNetworks(pipe)
    ours = denoising.denoise(
        networks, images, masks, generators, num_inference_steps=steps, **options
    )
    return stock, ours


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda kind: kind.__name__)
def test_removals_are_the_stock_pipelines_bit_for_bit(pipe, monkeypatch, scheduler):
    monkeypatch.setattr(pipe, "scheduler", scheduler.from_config(pipe.scheduler.config))
    for strength, guidance in ((1.0, 1.0), (0.7, 2.5)):
        stock, ours = run_both(pipe, strength=strength, guidance_scale=guidance)
        assert np.array_equal(stock, ours), (strength, guidance, np.abs(stock - ours).max())
        assert stock.std() > 0.01


@pytest.mark.parametrize("options", [{"strength": 0.99}, {"guidance_scale": 4.0}])
def test_the_shipped_kind_of_vae_and_noise_too(tiny_model, options):
    pipe = sdxl.load_pipeline(str(tiny_model))
    stock, ours = run_both(pipe, **{"strength": 1.0, "guidance_scale": 1.0} | options)
    assert np.array_equal(stock, ours)


def test_guidance_against_the_empty_prompt_where_the_pipeline_says_so(pipe):
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        stock, ours = run_both(pipe, batch=1, guidance_scale=3.0, strength=1.0)
    finally:
        pipe.register_to_config(force_zeros_for_empty_prompt=True)
    assert np.array_equal(stock, ours)


def test_a_whole_removal_is_the_stock_pipelines(pipe):
    """`mode="full"` at the model's size: what the card of a published model promises."""
    images, masks = draw(1)
    stock, _ = run_both(pipe, batch=1, strength=1.0, guidance_scale=1.0)
    result = ObjectRemover(pipe)(
        images[0], masks[0], mode="full", crop=False, resolution=32, num_inference_steps=4
    )
    assert np.array_equal(result, (stock[0] * 255).round().astype(np.uint8))


def test_the_pipelines_scheduler_is_left_alone(pipe):
    before = {k: v for k, v in vars(pipe.scheduler).items() if not torch.is_tensor(v)}
    images, masks = draw(1)
    networks = denoising.PipelineNetworks(pipe)
    denoising.denoise(
        networks, images, masks, [denoising.make_generator(0, 0)], num_inference_steps=2
    )
    assert before == {k: v for k, v in vars(pipe.scheduler).items() if not torch.is_tensor(v)}


def test_other_networks_take_the_place_of_the_pipelines(pipe):
    """All that another runtime has to be is in `Networks`."""
    real, calls = denoising.PipelineNetworks(pipe), []

    class Other:
        def __getattr__(self, name):
            assert name in denoising.Networks.__annotations__, name
            return getattr(real, name)

        def note(self, name, *given):
            assert all(x.dtype == torch.float32 for x in given if x.ndim)
            calls.append((name, *(tuple(x.shape) for x in given)))
            return getattr(real, name)(*given)

        def encode(self, images):
            return self.note("encode", images)

        def predict(self, *given):
            return self.note("predict", *given)

        def decode(self, latents):
            return self.note("decode", latents)

    images, masks = draw(2)
    generators = [[denoising.make_generator(0, n) for n in range(2)] for _ in range(2)]
    options = {"num_inference_steps": 2}
    ours = denoising.denoise(real, images, masks, generators[0], **options)
    theirs = denoising.denoise(Other(), images, masks, generators[1], **options)
    assert np.array_equal(ours, theirs)
    one, latents = (1, 3, 32, 48), (2, 4, 8, 12)
    step = ("predict", (2, 9, 8, 12), (), (2, 77, 32), (2, 16), (2, 6))
    assert calls == [("encode", one)] * 2 + [step] * 2 + [("decode", latents)]


def test_the_round_trip_is_the_vaes_alone(pipe):
    images, _ = draw(2)
    seen = denoising.encode_decode(denoising.PipelineNetworks(pipe), images)
    with torch.no_grad():
        latents = pipe.vae.encode(denoising.to_range(images)).latent_dist.mode()
        expected = pipe.vae.decode(latents).sample
    expected = (expected * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert seen.shape == (2, 32, 48, 3) and np.abs(seen - expected).max() < 1e-5


def test_a_strength_that_cannot_be_is_named(pipe):
    images, masks = draw(1)
    networks = denoising.PipelineNetworks(pipe)
    for strength in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match=f"strength is {strength}.*above 0"):
            denoising.denoise(
                networks, images, masks, [denoising.make_generator(0, 0)], strength=strength
            )
