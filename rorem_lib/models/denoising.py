"""One removal by SDXL-inpainting: condition, denoise, decode. Three networks, one loop.

It computes what the stock `StableDiffusionXLInpaintPipeline` computes for the same images, masks
and generators, bit for bit, without its way through PIL images, its checks and its casts. The
networks are three plain calls (`Networks`), so that another runtime can take their place.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor

from rorem_lib.models import sdxl

DECODED_PIXELS = 1_050_000  # at a time: SDXL's VAE takes 1 GB for every 512x512 in float32
TILED_PIXELS = 4_200_000  # of a frame, above which the VAE works in tiles


class Networks(Protocol):
    """What the loop needs of a model. All tensors in and out are float32, on `device`.

    Attributes:
        origin: what the model is called in errors.
        device: where tensors are given and taken.
        scheduler: a diffusers scheduler; the loop works on a copy.
        embeds, pooled: the empty prompt's states [1, L, C] and pooled state [1, P].
        zero_negative: with guidance, zeros stand for the negative prompt, not the empty one's
            states (`force_zeros_for_empty_prompt` of the pipeline).
        scaling_factor: of the latents; the VAE's.
        factor: px of an image per latent, a side.
        unit: what an image's sides must be multiples of, px.
        resolution: the side at which the model was trained, px.
    """

    origin: str
    device: torch.device
    scheduler: object
    embeds: torch.Tensor
    pooled: torch.Tensor
    zero_negative: bool
    scaling_factor: float
    factor: int
    unit: int
    resolution: int

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[1, 3, H, W] in -1..1 -> [1, 8, h, w], the posterior's mean and log variance, or
        [1, 4, h, w], latents of a VAE without posterior. Not scaled."""

    def predict(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        embeds: torch.Tensor,
        pooled: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> torch.Tensor:
        """The UNet: [B, 9, h, w], [] (int64 or float32), [B, L, C], [B, P], [B, 6] ->
        [B, 4, h, w]."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, 4, h, w], scaling undone -> [B, 3, H, W] in about -1..1; NaN where an image is not
        finite."""


def _peek(module) -> torch.Tensor:
    """A weight. diffusers' own `device` and `dtype` walk all modules, ms at every question."""
    return next(module.parameters())


@contextlib.contextmanager
def _tile(vae, pixels: int):
    """A VAE in tiles where a frame of so many pixels would take more memory than there is.

    `AutoencoderTiny` needs little, and tiles of it do not fit together (diffusers 0.42).
    """
    large = pixels > TILED_PIXELS and isinstance(vae, sdxl.AutoencoderKL)
    turn = large and not vae.use_tiling
    try:
        if turn:
            vae.enable_tiling()
        yield
    finally:
        if turn:
            vae.disable_tiling()


class PipelineNetworks:
    """The networks of a pipeline of `sdxl.load_pipeline`, in the type that its weights have.

    Inputs are cast to the weights' type, never the other way; what comes out is float32, else some
    schedulers would round the latents between steps. The pipeline may be given another UNet, VAE or
    scheduler at any time.
    """

    def __init__(self, pipe, *, record: bool = False):
        """Args:
        record: keep the UNet's operations at its first call of each size (`torch.jit.trace`), for
            small models on CPUs, where Python takes a quarter of the time. Weights may change in
            place, but not their type or device.
        """
        self.pipe, self.recorded = pipe, {} if record else None

    origin = property(lambda self: getattr(self.pipe, "origin", "the model"))
    # With offloading weights lie on the CPU between calls: diffusers knows where they run.
    device = property(
        lambda self: getattr(self.pipe, "works_on", None) or _peek(self.pipe.unet).device
    )
    scheduler = property(lambda self: self.pipe.scheduler)
    embeds = property(lambda self: sdxl.encode_prompt(self.pipe)[0].to(self.device))
    pooled = property(lambda self: sdxl.encode_prompt(self.pipe)[1].to(self.device))
    zero_negative = property(lambda self: self.pipe.config.force_zeros_for_empty_prompt)
    scaling_factor = property(lambda self: self.pipe.vae.config.scaling_factor)
    factor = property(lambda self: self.pipe.vae_scale_factor)
    unit = property(lambda self: sdxl.get_unit(self.pipe))
    resolution = property(lambda self: sdxl.get_resolution(self.pipe))

    def encode(self, images):
        vae = self.pipe.vae
        with _tile(vae, images[0, 0].numel()):
            encoded = vae.encode(images.to(_peek(vae).dtype))
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.parameters.float()
        return encoded.latents.float()

    def predict(self, sample, timestep, embeds, pooled, time_ids):
        dtype = _peek(self.pipe.unet).dtype
        sample, embeds, pooled = (x.to(dtype) for x in (sample, embeds, pooled))
        return self._run_unet(sample, timestep, embeds, pooled, time_ids).float()

    def _call_unet(self, sample, timestep, embeds, pooled, time_ids):
        return self.pipe.unet(
            sample,
            timestep,
            encoder_hidden_states=embeds,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
            return_dict=False,
        )[0]

    def _run_unet(self, *given):
        """The UNet, or what was recorded of it: the same operations without its Python code.

        Where somebody watches its calls with hooks it runs itself.
        """
        unet = self.pipe.unet
        if self.recorded is None or unet._forward_pre_hooks or unet._forward_hooks:
            return self._call_unet(*given)
        key = (id(unet), *((x.shape, x.dtype) for x in given))
        if key not in self.recorded:
            with warnings.catch_warnings():
                # That other sizes take other ways through the code: each gets its own record.
                warnings.simplefilter("ignore", torch.jit.TracerWarning)
                self.recorded[key] = torch.jit.trace(self._call_unet, given, check_trace=False)
        return self.recorded[key](*given)

    def decode(self, latents):
        """A VAE in half precision that overflows is taken in float32, as SDXL's own needs in fp16.

        An image that is not finite then, or whose latents were not, is NaN: else what comes after
        would clip infinity to white.
        """
        vae, dtype = self.pipe.vae, _peek(self.pipe.vae).dtype
        sound = latents.isfinite().flatten(1).all(1)
        with _tile(vae, latents[0, 0].numel() * self.factor**2):
            images = vae.decode(latents.to(dtype), return_dict=False)[0].float()
            if dtype != torch.float32 and sound.all() and not images.isfinite().all():
                with sdxl.silence_libraries():  # diffusers remarks on every change of precision
                    try:
                        vae.to(torch.float32)
                        images = vae.decode(latents, return_dict=False)[0]
                    finally:
                        vae.to(dtype)
        sound &= images.isfinite().flatten(1).all(1)
        if not sound.all():
            images[~sound] = torch.nan
        return images


@torch.no_grad()
def denoise(
    networks: Networks,
    images: np.ndarray,
    masks: np.ndarray,
    generators: Sequence[torch.Generator],
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    strength: float = 1.0,
) -> np.ndarray:
    """Remove what the masks cover, in a batch of images of one size.

    Args:
        images: [B, H, W, 3] uint8; sides are multiples of `networks.unit`.
        masks: [B, H, W] uint8, white (>= 128) is removed.
        generators: one an image, of the CPU; from it comes all the image's noise, in the stock
            pipeline's order: the source's posterior (below full strength), the first latents, the
            masked source's posterior, the scheduler's steps.
        num_inference_steps: steps of the whole schedule.
        guidance_scale: classifier-free guidance; 1 is off.
        strength: share of the schedule that is run; below 1 it starts from the noised source.

    Returns:
        [B, H, W, 3] float32 in 0..1; NaN where a removal is not finite.

    Raises:
        ValueError: a strength outside 0..1, or one that leaves no step.
    """
    batch, height, width = masks.shape
    device, generators = networks.device, list(generators)
    guided = guidance_scale > 1
    source = to_range(images).to(device)
    hole = torch.from_numpy(np.ascontiguousarray(masks) >= 128)[:, None].float().to(device)
    scheduler, timesteps = _start_schedule(networks, num_inference_steps, strength)
    # x_T: noise, or at strength below 1 the noised source
    shape = (batch, 4, height // networks.factor, width // networks.factor)
    latents = None if strength == 1 else encode_images(networks, source, generators)
    noise = randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)
    if latents is None:
        latents = noise * scheduler.init_noise_sigma
    else:
        latents = scheduler.add_noise(latents.contiguous(), noise, timesteps[:1].repeat(batch))
    # c = [m at the latents' size | z(s (1 - m))]: blanking the object avoids ghosts of it
    condition = torch.cat(
        [
            sdxl.shrink_mask(hole, latents),
            encode_images(networks, sdxl.mask_source(source, hole), generators),
        ],
        dim=1,
    )
    # Copies, no views: products of views round otherwise.
    embeds = networks.embeds.repeat(batch, 1, 1)
    pooled = networks.pooled.repeat(batch, 1)
    time_ids = sdxl.make_time_ids(height, width, batch, device=device)
    if guided:
        empty = [torch.zeros_like(x) if networks.zero_negative else x for x in (embeds, pooled)]
        embeds, pooled = torch.cat([empty[0], embeds]), torch.cat([empty[1], pooled])
        condition, time_ids = condition.repeat(2, 1, 1, 1), time_ids.repeat(2, 1)
    options = _list_step_options(scheduler, generators)
    for t in timesteps:
        sample = torch.cat([latents] * 2) if guided else latents
        sample = torch.cat([scheduler.scale_model_input(sample, t), condition], dim=1)
        predicted = networks.predict(sample, t, embeds, pooled, time_ids)
        if guided:  # e = e_negative + w (e_prompt - e_negative)
            negative, positive = predicted.chunk(2)
            predicted = negative + guidance_scale * (positive - negative)
        latents = scheduler.step(predicted, t, latents, **options, return_dict=False)[0]
    return decode_images(networks, latents)


def _start_schedule(networks: Networks, num_inference_steps: int, strength: float):
    """A scheduler of this call's own, and the timesteps that are run."""
    if not 0 < strength <= 1:
        raise ValueError(
            f"strength is {strength}: take a share of the schedule, above 0 and up to 1"
        )
    run = min(int(num_inference_steps * strength), num_inference_steps)
    if run < 1:
        raise ValueError(
            f"strength is {strength}: of {num_inference_steps} steps that leaves none; take "
            f"{-(-1 // strength):.0f} steps or more"
        )
    scheduler = copy.deepcopy(networks.scheduler)  # it notes where it stands
    scheduler.set_timesteps(num_inference_steps, device=networks.device)
    begin = (num_inference_steps - run) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return scheduler, scheduler.timesteps[begin:]


def _list_step_options(scheduler, generators: list) -> dict:
    """What this scheduler's step takes of: the generators, DDIM's eta (0: no noise of its own)."""
    known = inspect.signature(scheduler.step).parameters
    options = {"generator": generators, "eta": 0.0}
    return {name: value for name, value in options.items() if name in known}


def to_range(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in -1..1, rounded as the stock pipeline rounds."""
    # Channels stay last in memory, as there: convolutions of another layout round otherwise.
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255 * 2 - 1


def encode_images(
    networks: Networks, images: torch.Tensor, generators: list[torch.Generator]
) -> torch.Tensor:
    """[B, 3, H, W] in -1..1 -> scaled latents [B, 4, h, w], drawn from the posterior if there is
    one. Image by image: the memory is one image's, and no image depends on its batch."""
    latents = []
    for image, generator in zip(images.split(1), generators, strict=True):
        encoded = networks.encode(image)
        if encoded.shape[1] == 8:
            encoded = DiagonalGaussianDistribution(encoded).sample(generator)
        latents.append(encoded)
    return networks.scaling_factor * torch.cat(latents)


def decode_images(networks: Networks, latents: torch.Tensor) -> np.ndarray:
    """Scaled latents [B, 4, h, w] -> [B, H, W, 3] float32 in 0..1, NaN where not finite."""
    latents = latents / networks.scaling_factor
    pixels = latents[0, 0].numel() * networks.factor**2
    parts = latents.split(max(1, DECODED_PIXELS // pixels))
    images = torch.cat([networks.decode(part) for part in parts])
    return (images * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def encode_decode(networks: Networks, images: np.ndarray) -> np.ndarray:
    """The VAE's round trip of [B, H, W, 3] uint8, at the posterior's mean; see `denoise`."""
    source = to_range(images).to(networks.device)
    latents = torch.cat([networks.encode(image)[:, :4] for image in source.split(1)])
    return decode_images(networks, networks.scaling_factor * latents)


def make_generator(seed: int, number: int) -> torch.Generator:
    """The noise source of removal `number` under a run's `seed` (each well mixed)."""
    mixed = np.random.SeedSequence([seed, number]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(mixed[0]) << 31 | int(mixed[1]) >> 1)


def paint(
    networks: Networks,
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    numbers: Sequence[int],
    names: Sequence[str],
    *,
    seed: int,
    **sampling,
) -> list[np.ndarray]:
    """Removals [h, w, 3] uint8 of one batch: images [h, w, 3] and masks [h, w] of one size.

    Args:
        numbers: of the removals' noise, under `seed`.
        names: of the images, for errors.
        sampling: `num_inference_steps`, `guidance_scale`, `strength` of `denoise`.

    Raises:
        FloatingPointError: a removal is not finite; names the model and the image.
    """
    generators = [make_generator(seed, number) for number in numbers]
    removed = denoise(networks, np.stack(images), np.stack(masks), generators, **sampling)
    for one, name in zip(removed, names, strict=True):
        if not np.isfinite(one).all():
            raise FloatingPointError(
                f"{networks.origin} gives numbers that are not finite for {name}: its weights are "
                "damaged (train or download it again), or they overflow in fp16 (take bf16 or no)"
            )
    return list((removed * 255).round().astype(np.uint8))


def round_trip(networks: Networks, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Images [h, w, 3] uint8 of one size through the VAE alone, likewise."""
    seen = encode_decode(networks, np.stack(images))
    return list((np.nan_to_num(seen) * 255).round().astype(np.uint8))
