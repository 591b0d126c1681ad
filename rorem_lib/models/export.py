"""A remover as three ONNX graphs, which run without PyTorch's networks: `rorem export`.

    folder/
      export.json                what it is: settings, resolution, what it was made from, files
      empty_prompt.safetensors   the empty prompt's embedding: no text encoder is needed
      scheduler/                 diffusers' configuration of the noise schedule
      vae_encoder/model.onnx     [B, 3, H, W] -> [B, 8 or 4, h, w]
      vae_decoder/model.onnx     [B, 4, h, w] -> [B, 3, H, W]
      unet/model.onnx            LoRA merged; [B, 9, h, w] -> [B, 4, h, w]

Weights lie beside each graph in `model.onnx.data`: a protobuf ends at 2 GB, SDXL's UNet has 10.3 GB
in float32 (5.1 in fp16). `models/runtimes.py` runs the folder.

Tracing takes little memory beyond the weights: PyTorch's exporter works on shapes alone, and files
are written from the weights where they lie. A graph is compared with PyTorch when PyTorch's own
part has been let go of. A LoRA is merged beside a copy of what it changes, which goes again: of
SDXL's UNet that is once more its size for a moment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

from rorem_lib.files import (
    flush_folder,
    hash_file,
    hide_paths,
    lock_folder,
    read_json,
    replace_folder,
    write_json,
)
from rorem_lib.models import sdxl
from rorem_lib.models.hub import hash_model
from rorem_lib.models.lora import LORA_FILE
from rorem_lib.models.runtimes import (
    FORMAT,
    GRAPH,
    RECORD,
    OnnxGraph,
    is_whole,
    require_packages,
)

logger = logging.getLogger(__name__)
DTYPES = {"no": torch.float32, "fp16": torch.float16}
# Largest difference between a graph and PyTorch, as a share of the largest value of the output.
TOLERANCE = {"no": 1e-3, "fp16": 3e-2}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class _Encoder(nn.Module):
    """[B, 3, H, W] in -1..1 -> the posterior's mean and log variance [B, 8, h, w], or the latents
    [B, 4, h, w] of a VAE without posterior; not scaled."""

    inputs, output = ("images",), "encoded"

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, images):
        encoded = self.vae.encode(images.to(self.vae.dtype))
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.parameters.float()
        return encoded.latents.float()


class _Decoder(nn.Module):
    """Latents [B, 4, h, w], scaling undone -> images [B, 3, H, W] in about -1..1."""

    inputs, output = ("latents",), "images"

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, latents):
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()


class _Predictor(nn.Module):
    """The UNet. Everything that goes in and comes out is float32, whatever the weights are."""

    inputs = ("sample", "timestep", "embeds", "pooled", "time_ids")
    output = "predicted"

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, sample, timestep, embeds, pooled, time_ids):
        dtype = self.unet.dtype
        return self.unet(
            sample.to(dtype),
            timestep,
            encoder_hidden_states=embeds.to(dtype),
            # both float32: the exporter does not bring two types together where they meet
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
            return_dict=False,
        )[0].float()


def export_model(
    model: str,
    folder,
    *,
    lora: str = "",
    dtype: str = "no",
    check: bool = True,
    progress: Callable[[str], None] = logger.info,
    **options,
) -> Path:
    """Write a remover's folder; started again, parts that are there are kept.

    Args:
        model: `builtin`, `builtin:remover`, a folder or a Hub id.
        folder: where it goes: a new or empty folder, or one with the same export begun.
        lora: a LoRA that is merged, its folder or Hub id.
        dtype: "no" (float32) or "fp16", what the UNet's weights are stored and computed in. The
            VAE stays float32: in half precision SDXL's overflows.
        check: compare each graph, run by onnxruntime, with PyTorch; needs memory for it.
        progress: is called with a line for each part.
        options: as of `ObjectRemover.from_pretrained` (`revision`, `variant`, `base_model`,
            `local_files_only`).

    Returns:
        The folder.

    Raises:
        ImportError: a package is missing; says how to install it.
        FileExistsError: the folder holds something else, or another export.
        ValueError: another `dtype`; or a graph does not compute what PyTorch does.
        OSError: of opening the model, or of writing.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: an export takes one of {', '.join(DTYPES)}")
    require_packages(*PACKAGES if check else PACKAGES[:2])
    folder = Path(folder).expanduser().absolute()
    record = {
        "format": FORMAT,
        "dtype": dtype,
        "made_from": _describe_source(model, lora, options.get("revision")),
    }
    found = _read_begun(folder, record)
    if found.get("complete"):
        progress(f"{folder}: this export is there already")
        return folder
    with lock_folder(folder):
        pipe, settings = _open_remover(model, lora=lora, device="cpu", dtype=dtype, **options)
        record["settings"] = dataclasses.asdict(settings)
        _write_parts(pipe, folder, record, found, check, progress)
    return folder


def _open_remover(model: str, **options):
    """Its pipeline and settings, without what it keeps to go back behind its LoRA."""
    from rorem_lib.models.inpainting import ObjectRemover

    remover = ObjectRemover.from_pretrained(model, **options)
    return remover.pipe, remover.settings


def _describe_source(model: str, lora: str, revision: str | None) -> dict:
    """What decides what an export computes: names for people, hashes of folders' content."""
    found = {"model": hide_paths(str(model)), "hash": hash_model(sdxl.resolve_model(model))}
    if revision:
        found["revision"] = revision
    if lora:
        path = Path(sdxl.resolve_model(lora))
        found["lora"] = hide_paths(str(lora))
        if path.is_dir():
            found["lora_hash"] = hash_file(path / LORA_FILE)
    return found


def _read_begun(folder: Path, record: dict) -> dict:
    """What an earlier start wrote into the folder; nothing where it is new or empty.

    Raises:
        FileExistsError: the folder holds something else, or another export.
    """
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return {}
    if not (folder / RECORD).is_file():
        begun = folder.is_dir() and {p.name for p in folder.iterdir()} <= {".lock"}
        if begun:  # killed while it opened the model
            return {}
        raise FileExistsError(
            f"{folder} holds something else than an export (no {RECORD}): name a new folder"
        )
    found = read_json(folder / RECORD)
    for name in ("format", "dtype", "made_from"):
        if _identify(found.get(name)) != _identify(record[name]):
            raise FileExistsError(
                f"{folder} is another export ({name} was {found.get(name)} and is {record[name]}): "
                "name a new folder, or remove that one"
            )
    return found


def _identify(value):
    """Of where a model comes from, what its content is: a folder may have been moved."""
    if not isinstance(value, dict):
        return value
    if "lora_hash" in value:
        value = value | {"lora": ""}
    hashed = len(value["hash"]) == 64 and "/" not in value["hash"]
    return {k: v for k, v in value.items() if k != "model" or not hashed}


def _write_parts(pipe, folder: Path, record: dict, found: dict, check: bool, progress) -> None:
    embeds, pooled = (x.float().contiguous() for x in sdxl.encode_prompt(pipe))
    record |= {
        "complete": False,
        "resolution": sdxl.get_resolution(pipe),
        "unit": sdxl.get_unit(pipe),
        "factor": pipe.vae_scale_factor,
        "scaling_factor": pipe.vae.config.scaling_factor,
        "zero_negative": pipe.config.force_zeros_for_empty_prompt,
        "packages": {name: metadata.version(name) for name in ("torch", "diffusers", "onnx")},
        "parts": found.get("parts", {}),
    }
    write_json(folder / RECORD, record)
    sdxl.save_empty_prompt(pipe, folder)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    for name, examples, shapes, module in _list_parts(pipe, embeds, pooled):
        if is_whole(folder, record["parts"].get(name)):
            progress(f"{name}: kept as it is")
            continue
        with torch.no_grad():
            expected = module(*examples)
        tmp_path = folder / f".{name}.partial"
        shutil.rmtree(tmp_path, ignore_errors=True)
        tmp_path.mkdir()
        _trace(module, examples, shapes, tmp_path / GRAPH)
        del module
        if name == "unet":  # the memory is needed for the check
            pipe.unet = None
        entry = {}
        if check:
            entry["difference"] = _compare(
                tmp_path / GRAPH, examples, expected, TOLERANCE[record["dtype"]]
            )
        flush_folder(tmp_path)
        replace_folder(tmp_path, folder / name)
        entry["files"] = {
            f"{name}/{path.name}": {"bytes": path.stat().st_size, "sha256": hash_file(path)}
            for path in sorted((folder / name).iterdir())
        }
        record["parts"][name] = entry
        write_json(folder / RECORD, record)
        size = sum(file["bytes"] for file in entry["files"].values())
        note = f", at most {entry['difference']:.0e} from PyTorch" if check else ""
        progress(f"{name}: {size / 1e6:,.1f} MB{note}")
    record["complete"] = True
    write_json(folder / RECORD, record)


def _list_parts(pipe, embeds, pooled) -> Iterator[tuple]:
    """(name, example inputs, dynamic shapes, module) of each graph; the largest comes last.

    Two different sides and a batch of two, so that no dimension is taken for another or for one.
    """
    factor, unit = pipe.vae_scale_factor, sdxl.get_unit(pipe)
    batch, high, wide = Dim("batch", max=63), Dim("high", min=2), Dim("wide", min=2)
    noise = torch.Generator().manual_seed(0)
    height, width = 4 * unit, 6 * unit
    images = torch.rand(2, 3, height, width, generator=noise) * 2 - 1
    shape = (height // factor, width // factor)
    yield (
        "vae_encoder",
        (images,),
        ({0: batch, 2: unit * high, 3: unit * wide},),
        _Encoder(pipe.vae).eval(),
    )
    yield (
        "vae_decoder",
        (torch.randn(2, 4, *shape, generator=noise),),
        ({0: batch, 2: unit // factor * high, 3: unit // factor * wide},),
        _Decoder(pipe.vae).eval(),
    )
    examples = (
        torch.randn(2, 9, *shape, generator=noise),
        torch.tensor(500.0),
        embeds.repeat(2, 1, 1),
        pooled.repeat(2, 1),
        sdxl.make_time_ids(height, width, 2),
    )
    step = unit // factor  # the UNet halves sides so often that they must be multiples of it
    sides = {0: batch, 2: step * high, 3: step * wide}
    each = {0: batch}
    yield "unet", examples, (sides, None, each, each, each), _Predictor(pipe.unet).eval()


def _trace(module, examples, shapes, path: Path) -> None:
    """Write a module's graph and, beside it, its weights."""
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            examples,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=list(module.inputs),
            output_names=[module.output],
            verbose=False,
        )
        program.save(path, external_data=True)


@contextlib.contextmanager
def _quiet():
    """The exporter's remarks on a missing torchvision and on its own deprecations would drown what
    the command says."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


def _compare(path: Path, examples, expected, tolerance: float) -> float:
    """The largest difference between a graph in onnxruntime and what PyTorch computed, as a share
    of the largest value.

    Raises:
        ValueError: it is above the tolerance.
    """
    given = OnnxGraph(path)(*(x.numpy() for x in examples))
    difference = float((given - expected).abs().max() / expected.abs().max())
    if not difference <= tolerance:
        raise ValueError(
            f"{path.parent.name} computes something else than PyTorch: the largest difference is "
            f"{difference:.2g} of the largest value, {tolerance:g} is allowed"
        )
    return difference
