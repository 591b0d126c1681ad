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
    """Write a trained model's `README.md`, the model card that the Hub shows.

    In the configs beside it diffusers notes the folder that the model was loaded from: that goes.

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
    body = f"""# {title}

{text} Trained at {resolution} px: bring the image's short side to that size, as the kit does.
"""
    for config in [*Path(folder).glob("model_index.json"), *Path(folder).glob("*/config.json")]:
        content = read_json(config)
        if not _is_on_hub(content.get("_name_or_path", "owner/name")):
            del content["_name_or_path"]
            write_text(config, json.dumps(content, indent=2, sort_keys=True) + "\n")
    write_text(Path(folder) / "README.md", f"---\n{data.to_yaml()}\n---\n\n{body}")


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
