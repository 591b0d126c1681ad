"""The model of `rorem remove`: opened from this machine or the Hub, and known again by its content.

What takes long is told before it begins, and where a model is not there, how to get it.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from rorem_lib.discriminator import Discriminator, score_images
from rorem_lib.files import hash_file
from rorem_lib.models.advice import SMALL, describe_use
from rorem_lib.models.hub import hash_model
from rorem_lib.models.inpainting import ObjectRemover
from rorem_lib.models.lora import LORA_FILE
from rorem_lib.models.sdxl import BASE_MODEL, choose_device, resolve_model

LARGE = 1_000_000_000  # bytes of a model's folder, from which reading them takes long

# What opening a model raises where it is not there, or the Hub does not give it.
UNREACHED = (FileNotFoundError, ConnectionError, PermissionError, HfHubHTTPError)


def identify_model(model: str, revision: str | None = None) -> str | None:
    """What a model computes with: a folder's hash, or a Hub id with its commit.

    None for one of the Hub that is not in the cache.

    Raises:
        FileNotFoundError: a folder was named that is not there.
    """
    if Path(model).is_file():
        return hash_file(model)
    place = resolve_model(model)
    if Path(place).is_dir():
        return hash_model(place)
    for name in ("model_index.json", "unet/config.json", "config.json", LORA_FILE):
        with contextlib.suppress(HFValidationError):  # no Hub id: opening it says so
            path = try_to_load_from_cache(place, name, revision=revision)
            if isinstance(path, str):
                return f"{place}@{Path(path).parents[name.count('/')].name}"
    return None


def identify_models(options, tell: Callable[[str], None]) -> dict[str, str | None]:
    """`identify_model` of each model that decides the results, by its option.

    Args:
        tell: called with what takes long.
    """
    models = {"model": options.model, "lora": options.lora}
    if options.candidates > 1:  # of one there is nothing to choose
        models["discriminator"] = options.discriminator
    found = {}
    for name, model in models.items():
        if not model:
            continue
        folder = Path(resolve_model(model))
        weights = (p for part in ("", "unet", "vae") for p in (folder / part).glob("*.[sb]*"))
        size = sum(p.stat().st_size for p in weights if p.suffix in (".safetensors", ".bin"))
        if size > LARGE:
            tell(f"{model} is read, {size / 1e9:.1f} GB, to know its results again")
        found[name] = identify_model(model, options.revision if name == "model" else None)
    return found


def open_remover(options, tell: Callable[[str], None]) -> ObjectRemover:
    """The remover that the options name.

    Args:
        tell: called with what takes long.

    Raises:
        FileNotFoundError: it is not there and cannot be fetched, or is none.
    """
    model, lora = options.model, options.lora
    folder = Path(resolve_model(lora or model))
    if lora and folder.is_dir() and not (folder / LORA_FILE).is_file():
        raise FileNotFoundError(f"{lora} holds no LoRA (no {LORA_FILE})")
    names = ("lora", "revision", "device", "dtype", "offload", "runtime")
    given = {name: getattr(options, name) for name in names}
    given["score"] = open_score(options) if options.discriminator else None
    try:
        try:
            return ObjectRemover.from_pretrained(model, local_files_only=True, **given)
        except FileNotFoundError as absent:
            if options.runtime != "torch":  # it takes a folder of `rorem export`, and says so
                raise
            known = identify_model(model, options.revision) is not None
            lacks_lora = lora and known and identify_model(lora) is None
            try:
                size = None if lacks_lora else measure_download(model, options.revision)
            except HTTPError:  # no network: the client would try each file for half a minute
                raise absent from None
            if size:
                what = BASE_MODEL if Path(resolve_model(model)).is_dir() else model
                tell(f"{what} is downloaded, {size / 1e9:.1f} GB, to {constants.HF_HUB_CACHE}")
            return ObjectRemover.from_pretrained(model, **given)
    except UNREACHED as error:
        text = str(error)
        if lora and lora not in text:
            text = f"{model} with the LoRA {lora}: {text}"
        raise FileNotFoundError(text) from None


def describe_small(model: str, remover: ObjectRemover) -> str | None:
    """What a miniature is not for; None of other models."""
    if remover.pipe is not None:
        count = sum(p.numel() for p in remover.pipe.unet.parameters())
    else:  # exported: about, by its files
        record = remover.networks.record
        size = sum(file["bytes"] for file in record["parts"]["unet"]["files"].values())
        count = size / (2 if record["dtype"] == "fp16" else 4)
    return describe_use(model, count) if count < SMALL else None


def open_score(options):
    """(sources, masks, removals) -> how good each removal is, by the discriminator.

    Raises:
        FileNotFoundError: it is not there and cannot be fetched, or is none.
    """
    device = choose_device(options.device)
    try:
        discriminator = Discriminator.from_pretrained(options.discriminator, device=device)
    except OSError as error:
        raise FileNotFoundError(f"the discriminator {options.discriminator}: {error}") from None
    return partial(score_images, discriminator)


def measure_download(model: str, revision: str | None = None) -> int | None:
    """Bytes that opening a model downloads, about; None where the Hub does not tell.

    A UNet alone needs the other parts of the base model too, one in a folder here those alone.

    Raises:
        HTTPError: the Hub cannot be reached.
    """
    folder, total, whole = Path(resolve_model(model)), 0, False
    if folder.is_dir() and (
        (folder / "model_index.json").is_file()
        or not any((folder / part / "config.json").is_file() for part in ("", "unet"))
    ):
        return None  # whole, or none: nothing is downloaded
    try:
        if not folder.is_dir():
            sizes = _list_sizes(model, revision)
            whole = "model_index.json" in sizes
            total = _add_weights(sizes, "[^/]+/|diffusion_pytorch_model")
        if not whole:
            total += _add_weights(_list_sizes(BASE_MODEL), "vae/|text_encoder")
        return total
    except (OSError, HfHubHTTPError, HFValidationError):
        return None


def _list_sizes(repo: str, revision: str | None = None) -> dict[str, int]:
    """The files of a repository on the Hub, bytes; unlike the tree, this is asked for once."""
    info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=10)
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _add_weights(sizes: Mapping[str, int], parts: str) -> int:
    """Bytes of the weights that are opened: in each folder those without a variant, or fp16's."""
    folders: dict[str, Counter] = defaultdict(Counter)
    for path, size in sizes.items():
        if path.endswith(".safetensors") and re.match(parts, path):
            folders[path.rpartition("/")[0]][".fp16." in path] += size
    return sum(kinds[False] or kinds[True] for kinds in folders.values())
