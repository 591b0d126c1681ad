"""Model files: whether one is there, what they contain, the card beside them."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from pathlib import Path

from huggingface_hub import (
    ModelCardData,
    constants,
    errors,
    hf_hub_download,
    metadata_load,
    try_to_load_from_cache,
)

from rorem_lib.files import hash_file, read_json, resolve_path, write_text
from rorem_lib.models.standalone import write_pipeline

SETTINGS_FILE = "removal_settings.json"  # what a model was released with, see `presets`


CONFIGS = ("model_index.json", "config.json", "*/config.json")


def has_file(
    model_id: str, name: str, *, revision: str | None = None, local_files_only: bool = False
) -> bool:
    """Whether a folder, or a repository on the Hub, holds a file; it is downloaded, so a small one.

    Raises:
        OSError: the client's; without a network also where the cache does not know. A block of
            `data.remote.talk_to_hub` makes them say what to do.
    """
    if Path(model_id).is_dir():
        return (Path(model_id) / name).is_file()
    try:
        hf_hub_download(model_id, name, revision=revision, local_files_only=local_files_only)
    except errors.RemoteEntryNotFoundError:
        return False
    except errors.LocalEntryNotFoundError:
        # Without a network. The cache answers a path, None where it does not know, and something
        # else where the file was looked for and was not there.
        known = try_to_load_from_cache(model_id, name, revision=revision)
        if known is None or isinstance(known, str):
            raise
        return False
    return True


def find_optional(
    model_id: str, name: str, *, revision: str | None = None, local_files_only: bool = False
) -> Path | None:
    """A small file of a folder or a repository on the Hub that need not be there, or None.

    None too without a network, where the cache does not know whether it is there.

    Raises:
        OSError: the client's, such as of a repository that is not there (`has_file`).
    """
    if Path(model_id).is_dir():
        path = Path(model_id) / name
        return path if path.is_file() else None
    where = {"revision": revision, "local_files_only": local_files_only}
    try:
        return Path(hf_hub_download(model_id, name, **where))
    except (errors.RemoteEntryNotFoundError, errors.LocalEntryNotFoundError):
        return None


def lacks_file(error: BaseException, *, local_files_only: bool = False, **_) -> bool:
    """Whether `from_pretrained` failed since a file is not there, not since it did not arrive."""
    if type(error) is ValueError:  # a pipeline's, after looking through all its files
        return True
    while error is not None:
        if isinstance(error, errors.LocalEntryNotFoundError):  # offline that is all there is
            return local_files_only or constants.is_offline_mode()
        if isinstance(error, errors.RemoteEntryNotFoundError):
            return True
        error = error.__cause__ or error.__context__
    return False


def hash_model(model_id: str) -> str:
    """SHA-256 of what decides what a model's folder computes; a Hub id as it is.

    Weights of UNet and VAE, and all configs. The text encoders' 3 GB are left out: no training here
    changes them.
    """
    folder, total = Path(model_id), hashlib.sha256()
    if not folder.is_dir():
        return str(model_id)
    patterns = [
        f"{part}*.{end}" for part in ("", "unet/", "vae/") for end in ("safetensors", "bin")
    ]
    for path in sorted({p for x in (*patterns, "*.json", "*/*.json") for p in folder.glob(x)}):
        state = path.stat()
        digest = _hash_once(path, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        total.update(f"{path.relative_to(folder)}\0{digest}\n".encode())
    return total.hexdigest()


@functools.lru_cache(1024)
def _hash_once(path: Path, *state) -> str:
    """A file's hash, read again in this process only if its size or times changed: a UNet has 5 to
    10 GB, and several methods of an evaluation share one."""
    return hash_file(path)


def write_card(folder, *, title: str, base_model: str, resolution: int, text: str) -> None:
    """Write a trained model's `README.md`, the model card that the Hub shows, and beside a whole
    pipeline the `pipeline.py` with which diffusers alone removes as the kit does.

    In the configs beside it diffusers notes the folder that the model was loaded from: that goes.
    The settings that the card and the pipeline name are those that the folder holds.

    Args:
        folder: the model's.
        title: what the model is.
        base_model: what it was trained from; named in the metadata where it is a Hub id. A
            folder's own card gives the licence, which its descendants keep.
        resolution: side of the images it was trained on, px: the size to use it at.
        text: how it was trained.
    """
    data = ModelCardData(
        license="cc0-1.0"
        if base_model.partition(":")[0] == "builtin"
        else _read_licence(base_model) or "openrail++",
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["inpainting", "object-removal", "stable-diffusion-xl"],
        base_model=base_model if _is_on_hub(base_model) else None,
        resolution=resolution,
    )
    whole = (Path(folder) / "model_index.json").is_file()
    usage = ""  # of a UNet alone its owner says it
    if whole:
        usage = _describe_pipeline(folder, resolution)
    elif not (Path(folder) / "config.json").is_file():
        usage = _describe_lora(folder, base_model)
    body = f"""# {title}

{text} Trained at {resolution} px: bring the image's short side to that size, as the kit does.
"""
    body += f"\n{usage}" if usage else ""
    for config in [p for name in CONFIGS for p in Path(folder).glob(name)]:
        content = read_json(config)
        if not _is_on_hub(content.get("_name_or_path", "owner/name")):
            del content["_name_or_path"]
            write_text(config, json.dumps(content, indent=2, sort_keys=True) + "\n")
    write_text(Path(folder) / "README.md", f"---\n{data.to_yaml()}\n---\n\n{body}")
    if whole:
        write_pipeline(folder, _read_settings(folder))


def _read_settings(folder) -> dict:
    """The settings beside a model; nothing where there are none."""
    path = Path(folder) / SETTINGS_FILE
    return read_json(path) if path.is_file() else {}


def _describe_pipeline(folder, resolution: int) -> str:
    """How a whole model is used: with the kit, and with diffusers alone."""
    settings = _read_settings(folder)
    steps, strength = settings.get("num_inference_steps", 50), settings.get("strength", 1.0)
    guidance = settings.get("guidance_scale", 1.0)
    return f"""## Use

`MODEL` is this folder, or its id on the Hub. With the RORem kit, on images of any size; what the
removal did not change stays the image's own:

```python
from rorem_lib.models.inpainting import ObjectRemover

remover = ObjectRemover.from_pretrained(MODEL)
result = remover("photo.png", "mask.png")
result.save("removed.png")
```

The same with diffusers, where the kit is not installed. `pipeline.py` in this folder is the code
that runs (it also needs opencv-python-headless):

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(MODEL, custom_pipeline=MODEL, trust_remote_code=True)
result = pipe(image, mask).images[0]
```

With diffusers' own pipeline it is the whole frame anew, at the size that the model was trained at:

```python
from diffusers import AutoPipelineForInpainting

pipe = AutoPipelineForInpainting.from_pretrained(MODEL)
result = pipe(
    prompt="", image=image, mask_image=mask, height={resolution}, width={resolution},
    num_inference_steps={steps}, strength={strength}, guidance_scale={guidance},
).images[0]
```

`image` and `mask` are PIL images (white is removed). `height` and `width` have the image's aspect,
the shorter is {resolution}.
"""


def _describe_lora(folder, base_model: str) -> str:
    """How a LoRA is used: with the kit, and with diffusers."""
    settings = _read_settings(folder)
    base = base_model if _is_on_hub(base_model) else "BASE"
    named = "" if base != "BASE" else ", `BASE` the remover that it was trained on"
    lcm = settings.get("scheduler") == "lcm"
    scheduler = "pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)\n" if lcm else ""
    imported = "AutoPipelineForInpainting" + ", LCMScheduler" * lcm
    steps = settings.get("num_inference_steps", 50)
    shown = base if base == "BASE" else f'"{base}"'
    return f"""## Use

`LORA` is this folder, or its id on the Hub{named}. With the RORem kit:

```python
from rorem_lib.models.inpainting import ObjectRemover

remover = ObjectRemover.from_pretrained({shown}, lora=LORA)
result = remover("photo.png", "mask.png")
result.save("removed.png")
```

With diffusers, which is then called as the remover's own card says, with
`num_inference_steps={steps}`:

```python
from diffusers import {imported}

pipe = AutoPipelineForInpainting.from_pretrained({shown})
pipe.load_lora_weights(LORA)
{scheduler}```
"""


def _is_on_hub(model: str) -> bool:
    """Whether a model's name is an id on the Hub: `owner/name`, and no folder here."""
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith(".")
    return bool(named) and not resolve_path(model).exists() and not Path(model).exists()


def _read_licence(base_model: str) -> str | None:
    """What the card in a model's folder says; None where there is none."""
    for folder in (Path(base_model), resolve_path(base_model)):
        if (folder / "README.md").is_file():
            return (metadata_load(folder / "README.md") or {}).get("license")
    return None
