"""The SDXL-inpainting stack: open it (Hub, folder or built in), prompts, time ids, latents.

Every stage opens models here and nowhere else, so the small model that ships in this package runs
through the same code as `diffusers/stable-diffusion-xl-1.0-inpainting-0.1`.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from rorem_lib.data.remote import talk_to_hub
from rorem_lib.files import resolve_path
from rorem_lib.models.hub import find_optional, has_file, lacks_file

logger = logging.getLogger(__name__)
BUILTIN_FOLDER = Path(__file__).parents[1] / "builtin" / "model"
# The remover of the demo's last round: its UNet alone, the rest is the built-in model's.
BUILTIN_REMOVER = "builtin:remover"
REMOVER_FOLDER = BUILTIN_FOLDER.with_name("remover")
BASE_MODEL = "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"  # upstream's starting point
# The side of the images a model was trained on, px, in its UNet's config. SDXL's `sample_size` does
# not say it: that is 128 (1024 px) in every SDXL-inpainting model, also in RORem's, trained at 512.
# A leading underscore keeps other programs from warning of a key that they do not know.
TRAINED_RESOLUTION = "_trained_resolution"
DEFAULT_RESOLUTION = 512  # RORem's (sec. 4.1), for models that do not say it
_SANE_RESOLUTIONS = range(8, 8193)
PRECISIONS = ("auto", "no", "bf16", "fp16")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The empty prompt's embedding, in a model's folder: whoever removes needs no text encoder then.
EMPTY_PROMPT = "empty_prompt.safetensors"
TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
MODEL_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler")


@contextlib.contextmanager
def silence_libraries():
    """diffusers' and transformers' loading bars and notes would drown a notebook's own lines."""
    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels):
            library.set_verbosity(level)
            library.enable_progress_bar()


with silence_libraries():  # they remark that torchvision is missing, which is as it should be
    from diffusers import (
        AutoencoderKL,
        AutoencoderTiny,
        AutoModel,
        AutoPipelineForInpainting,
        StableDiffusionXLInpaintPipeline,
        UNet2DConditionModel,
    )


def resolve_model(model_id: str) -> str:
    """What opens a model: the folder of `builtin` or `builtin:remover`, a folder of the user's, or
    a Hub id as it is.

    A relative folder counts from the working folder, and where there is none from the repository.

    Raises:
        FileNotFoundError: a path was given that holds no model.
    """
    if str(model_id) == "builtin":
        if not (BUILTIN_FOLDER / "model_index.json").is_file():
            raise FileNotFoundError(
                f"{BUILTIN_FOLDER} holds no model: reinstall the package, or "
                "make it again with `python -m rorem_lib.pretrain all`"
            )
        return str(BUILTIN_FOLDER)
    if str(model_id) == BUILTIN_REMOVER:
        if not (REMOVER_FOLDER / "config.json").is_file():
            raise FileNotFoundError(
                f"{REMOVER_FOLDER} holds no model: reinstall the package, or make it again with "
                "`rorem run demo` and `python -m rorem_lib.pretrain remover --run runs/demo`"
            )
        return str(REMOVER_FOLDER)
    if str(model_id).startswith("builtin:"):
        raise FileNotFoundError(f"there is no model {model_id}: take builtin or {BUILTIN_REMOVER}")
    path = Path(model_id).expanduser()
    for folder in (path, resolve_path(path)):
        if folder.is_dir():
            return str(folder)
    if path.is_absolute() or str(model_id).startswith((".", "runs/")):
        raise FileNotFoundError(
            f"there is no model folder {path}: run the stage that makes it, or take `builtin` or a "
            "Hub id"
        )
    return str(model_id)


def _open(cls, model_id: str, *, variant: str | None, **options):
    """`cls.from_pretrained`; where no files have the variant's name, those without one, and where
    none is asked for and all are `fp16`, those."""
    # A pipeline mixes both kinds of files; one model's must be of the variant, in safetensors:
    # else a transfer that broke would be taken for a file that is not there.
    options["use_safetensors"] = True
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)  # it logs what it then raises
    try:
        return cls.from_pretrained(model_id, variant=variant, **options)
    except (OSError, ValueError) as error:
        if not Path(model_id).is_dir() and not lacks_file(error, **options):
            raise
        first = error
    finally:
        diffusers_logging.set_verbosity(level)
    other = None if variant else "fp16"
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    try:
        opened = cls.from_pretrained(model_id, variant=other, **options)
    except (OSError, ValueError):
        pickles = Path(model_id).is_dir() and [*Path(model_id).rglob("*.bin")]
        if pickles:
            raise OSError(
                f"{pickles[0]} is a pickle, which may run code when it is opened, and there is no "
                "safetensors file beside it: take the model in safetensors, or convert it"
            ) from None
        raise first from None
    finally:
        diffusers_logging.set_verbosity(level)
    if variant:
        logger.warning(
            "%s has no files of the variant %s: those without a variant are taken",
            model_id,
            variant,
        )
    else:
        logger.info("%s has files of the variant fp16 alone: those are taken", model_id)
    return opened


def _open_part(model_id: str, part: str, *, revision: str | None = None, **options):
    """A UNet or VAE from a folder or Hub id that holds it in `<part>/` or alone."""
    name, kinds = {
        "unet": ("UNet", UNet2DConditionModel),
        "vae": ("VAE", (AutoencoderKL, AutoencoderTiny)),
    }[part]
    folder = resolve_model(model_id)
    where = {"revision": revision, "local_files_only": options["local_files_only"]}
    with talk_to_hub(folder, revision, kind="model"):
        for inner in (part, ""):
            if has_file(folder, f"{inner}/config.json".strip("/"), **where):
                break
        else:
            raise FileNotFoundError(
                f"{folder} holds neither a pipeline (model_index.json) nor a "
                f"{name} ({part}/config.json or config.json){_hint_at_place(Path(folder))}"
            )
        opened = _open(AutoModel, folder, subfolder=inner or None, revision=revision, **options)
    if not isinstance(opened, kinds):
        raise ValueError(f"{model_id} is no {name}, it is a {type(opened).__name__}")
    return opened


def _hint_at_place(folder: Path) -> str:
    """What a folder holds that is no model, as far as it is one of the kit's."""
    inner = folder / "remover"
    if any((inner / name).is_file() for name in ("model_index.json", "config.json")):
        return f": the model is in {inner}"
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        return ": it is a LoRA, which is laid over a model (lora, --lora)"
    if (folder / "export.json").is_file():
        return ": it is an exported model, which runs with runtime (--runtime) onnx or openvino"
    return ""


def load_pipeline(
    model_id: str = "builtin",
    *,
    unet: str = "",
    vae: str = "",
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    base_model: str = BASE_MODEL,
    text_encoders: bool = True,
    local_files_only: bool = False,
) -> StableDiffusionXLInpaintPipeline:
    """Open an SDXL-inpainting pipeline.

    Args:
        model_id: `builtin`, `builtin:remover`, a pipeline folder, a Hub id, or a folder or Hub id
            that holds a UNet alone (as upstream's trainer writes it), which is opened over
            `base_model`.
        unet: a folder or Hub id whose UNet, in `unet/` or alone, takes the place of the model's
            own (upstream's `pretrained_unet`).
        vae: likewise the VAE's, in `vae/` or alone.
        revision: the Hub commit, tag or branch of `model_id`; pin it.
        variant: the weight files' variant, for example `fp16`. Where files have no such name,
            those without a variant are taken, with a warning; where none is named and all files
            are `fp16`, those are.
        dtype: the type of the UNet's and the VAE's weights in memory; text encoders have float32.
        vae_dtype: the VAE's, if it is another.
        device: where UNet and VAE go. Text encoders stay on the CPU: their prompt is constant.
        base_model: what the rest of the pipeline comes from when `model_id` is a UNet alone.
        text_encoders: False leaves them out once the empty prompt is encoded, and opens none where
            the folder has its embedding (`EMPTY_PROMPT`). Such a pipeline removes, and cannot be
            saved whole.
        local_files_only: never ask the network.

    Returns:
        The pipeline, its progress bar off, its modules frozen and in evaluation mode.

    Raises:
        FileNotFoundError: there is no such folder or repository, it holds no model, or it is not
            in the cache and the Hub cannot be asked.
        PermissionError: the repository is gated.
        ValueError: the UNet does not take 9 channels, so it is not an inpainting model; the VAE
            does not make 4; or `model_id` is a UNet alone and `unet` names another.
    """
    folder = resolve_model(model_id)
    options = {"variant": variant or None, "local_files_only": local_files_only}
    vae_dtype = vae_dtype or dtype
    dtypes = {"default": dtype, "vae": vae_dtype}
    dtypes |= {"text_encoder": torch.float32, "text_encoder_2": torch.float32}
    parts, prompt = {}, None
    with silence_libraries():
        with talk_to_hub(folder, revision, kind="model"):
            whole = has_file(
                folder, "model_index.json", revision=revision, local_files_only=local_files_only
            )
        if not whole and unet:
            raise ValueError(
                f"{model_id} is no whole pipeline: with another UNet ({unet}) it has "
                "nothing to give; name the pipeline that the UNet goes into"
            )
        if not whole:
            parts["unet"] = _open_part(model_id, "unet", revision=revision, dtype=dtype, **options)
            base_model = "builtin" if model_id == BUILTIN_REMOVER else base_model
            folder, revision = resolve_model(base_model), None
        elif unet:
            parts["unet"] = _open_part(unet, "unet", dtype=dtype, **options)
        if vae:
            parts["vae"] = _open_part(vae, "vae", dtype=vae_dtype, **options)
        with talk_to_hub(folder, revision, kind="model"):
            if not text_encoders:
                prompt = _read_empty_prompt(folder, revision, local_files_only)
                parts |= dict.fromkeys(TEXT_PARTS if prompt else ())
            pipe = _open(
                AutoPipelineForInpainting,
                folder,
                revision=revision,
                add_watermarker=False,
                dtype=dtypes,
                **parts,
                **options,
            )
    if pipe.unet.config.in_channels != 9:
        raise ValueError(
            f"{unet or model_id} is no inpainting model: its UNet takes "
            f"{pipe.unet.config.in_channels} channels instead of 9"
        )
    if (channels := pipe.vae.config.get("latent_channels", 4)) != 4:
        raise ValueError(
            f"the VAE {vae or model_id} makes {channels} latent channels, the UNet takes 4"
        )
    for name in MODEL_PARTS[:-1]:
        if (part := getattr(pipe, name)) is not None:
            part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    pipe.origin = unet or model_id  # whose size `get_resolution` asks for
    if prompt:
        pipe.empty_prompt = prompt
    elif not text_encoders:
        encode_prompt(pipe)
        pipe.register_modules(**dict.fromkeys(TEXT_PARTS))
    pipe.unet.to(device)
    pipe.vae.to(device)
    return pipe


def _read_empty_prompt(folder: str, revision: str | None, local_files_only: bool):
    """The embedding of the empty prompt beside a model, as `encode_prompt` gives it; or None."""
    path = find_optional(folder, EMPTY_PROMPT, revision=revision, local_files_only=local_files_only)
    if path is None:
        return None
    state = load_file(path)
    return state["prompt_embeds"], state["pooled_prompt_embeds"]


def save_empty_prompt(pipe, folder) -> None:
    """Write a pipeline's embedding of the empty prompt beside its parts: `EMPTY_PROMPT`."""
    embeds, pooled = (tensor.float().cpu().contiguous() for tensor in encode_prompt(pipe))
    state = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    save_file(state, Path(folder) / EMPTY_PROMPT, metadata={"format": "pt"})


def choose_device(requested: str = "auto") -> str:
    """ "auto" is the best there is: "cuda", "mps" (Apple), "cpu"; other words are returned.

    Raises:
        ValueError: no device's name, or this machine or this torch has none such.
    """
    if requested != "auto":
        _check_device(requested)
        return requested
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _check_device(requested: str) -> None:
    try:
        device = torch.device(requested)
    except RuntimeError:
        raise ValueError(f"device is {requested!r}: take auto, cpu, cuda or mps") from None
    count = {"cuda": torch.cuda.device_count, "mps": torch.mps.device_count}.get(device.type)
    if count and count() <= (device.index or 0):
        raise ValueError(
            f"device is {requested}, and torch {torch.__version__} finds {count()} of that kind "
            "here: take auto or cpu, or install the torch that is built for your GPU"
        )


def choose_precision(requested: str, device="cpu") -> str:
    """What "auto" means on this machine: "bf16" where matrix units take it, "fp16" on GPUs that
    take nothing else, else "no".

    Args:
        requested: "auto", "no", "bf16" or "fp16"; all but "auto" are returned as they are.
        device: where the model runs. On CPUs bf16 pays where there are instructions for it (AMX,
            avx512_bf16: training is 1.3 times as fast); elsewhere it is slower than float32.

    Raises:
        ValueError: another word.
    """
    if requested not in PRECISIONS:
        raise ValueError(f"mixed_precision is {requested!r}: take one of {', '.join(PRECISIONS)}")
    if requested != "auto":
        return requested
    if torch.device(device).type == "mps":
        return "fp16"
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("amx_tile") or able.get("avx512_bf16") else "no"


def get_resolution(pipe) -> int:
    """Short side of the images at which a pipeline works, px: what it was trained at, or 512.

    Where the model does not say it, or says what cannot be, that is logged, once a pipeline.
    """
    said = pipe.unet.config.get(TRAINED_RESOLUTION)
    if type(said) is int and said in _SANE_RESOLUTIONS:
        return said
    if not getattr(pipe, "told_resolution", False):
        pipe.told_resolution = True
        logger.info(
            "%s does not say at which size it was trained%s: it works at %d px, or at `resolution`",
            getattr(pipe, "origin", pipe.unet.config.get("_name_or_path")),
            "" if said is None else f" ({TRAINED_RESOLUTION} is {said!r})",
            DEFAULT_RESOLUTION,
        )
    return DEFAULT_RESOLUTION


def set_resolution(pipe, unet, resolution: int) -> None:
    """Note the size that a UNet is trained at, px, in the config that is saved with it.

    `sample_size` too: other programs take it for the size to work at where none is given.
    """
    unet.register_to_config(
        **{TRAINED_RESOLUTION: resolution, "sample_size": resolution // pipe.vae_scale_factor}
    )


def get_unit(pipe) -> int:
    """What sides of images must be multiples of, px: the VAE's factor, halved by the UNet."""
    return pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)


def autocast(precision: str, device="cpu"):
    """The autocast context of a precision that `choose_precision` returned."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(device).type, dtype, enabled=precision != "no")


def encode_prompt(pipe, prompt: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Text conditioning as SDXL has it: ([1, L, C] penultimate states, [1, P] pooled).

    RORem trains and removes with the empty prompt; its embedding is that of "", not zeros
    (RORem, sec. 3.3). It is computed once a pipeline, on the CPU.
    """
    known = getattr(pipe, "empty_prompt", None)
    if prompt or known is None:
        with torch.no_grad():
            embeds, _, pooled, _ = pipe.encode_prompt(
                prompt, do_classifier_free_guidance=False, device=pipe.text_encoder.device
            )
        known = embeds, pooled
        if not prompt:
            pipe.empty_prompt = known
    device = next(pipe.unet.parameters()).device  # diffusers' own `device` takes ms
    return tuple(tensor.to(device) for tensor in known)


def make_time_ids(
    height: int, width: int, batch: int = 1, *, top: int = 0, left: int = 0, device="cpu"
) -> torch.Tensor:
    """SDXL's micro-conditioning [batch, 6]: original size, crop corner, target size (px).

    Args:
        height, width: of the images.
        batch: rows of the result, all equal.
        top, left: the corner at which a larger image was cut.
        device: where the result goes.
    """
    return torch.tensor(
        [[height, width, top, left, height, width]], dtype=torch.float32, device=device
    ).repeat(batch, 1)


def encode_images(vae, images: torch.Tensor, *, generator=None) -> torch.Tensor:
    """[B, 3, H, W] in -1..1 -> scaled latents [B, 4, H / f, W / f].

    Takes the mode of `AutoencoderKL`'s posterior when `generator` is None, else a sample;
    `AutoencoderTiny` has no posterior.
    """
    encoded = vae.encode(images)
    if hasattr(encoded, "latent_dist"):
        latents = (
            encoded.latent_dist.mode()
            if generator is None
            else encoded.latent_dist.sample(generator)
        )
    else:
        latents = encoded.latents
    return latents * vae.config.scaling_factor


def decode_latents(vae, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents -> images [B, 3, H, W], clipped to -1..1."""
    return vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)


def to_tensor(images) -> torch.Tensor:
    """uint8 [B, H, W, 3] (array or tensor) -> float32 [B, 3, H, W] in -1..1."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_bytes(images: torch.Tensor):
    """[B, 3, H, W] in -1..1 -> uint8 array [B, H, W, 3]."""
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def mask_source(source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Blank the hole: source [B, 3, H, W] in -1..1, mask [B, 1, H, W] in {0, 1} -> mid-grey hole.

    Hiding the object from the UNet is what avoids ghosts of it (RORem, sec. 3.3).
    """
    return source * (mask < 0.5)


def shrink_mask(mask: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """[B, 1, H, W] -> the latents' size by nearest neighbour, as the pipeline does."""
    return F.interpolate(mask.float(), size=latents.shape[-2:], mode="nearest")
