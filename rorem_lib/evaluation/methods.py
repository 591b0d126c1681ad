"""Removal methods, and making their removals: resumable, timed, the same noise for every method.

A method is a model with its settings, or one of OpenCV's two classical algorithms. Removals are
kept as PNG and times are measured when a removal is made, so that an evaluation which was stopped
goes on where it was.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from rorem_lib.data.journal import Journal, read_lines
from rorem_lib.data.pictures import save_image
from rorem_lib.data.triplets import Triplet, load_images
from rorem_lib.files import is_filled, read_json, set_aside, write_json
from rorem_lib.models import hub, sdxl
from rorem_lib.models.inpainting import MODES, ObjectRemover, inpaint_classical
from rorem_lib.models.presets import SCHEDULERS
from rorem_lib.training.latent_cache import hash_triplets
from rorem_lib.workers import Progress

logger = logging.getLogger(__name__)

KINDS = ("telea", "ns", "remover")
BASELINES = (  # in miniature: what a remover is compared with, and the model it starts from
    {"name": "Telea", "kind": "telea"},
    {"name": "Navier-Stokes", "kind": "ns"},
    {"name": "base", "model": "builtin", "num_inference_steps": 20, "row": "base"},
)
SOURCE = "source"  # no method may be called so: it is the untouched image in every table


@dataclass(frozen=True)
class Method:
    """A way to remove objects.

    Attributes:
        name: unique; shown in every table.
        kind: "telea" or "ns" (OpenCV), or "remover" (a diffusion model).
        model: `builtin`, a folder or a Hub id; removers only.
        revision: the Hub revision.
        lora: folder of LoRA weights laid over the model; "" for none.
        scheduler: "default" (the model's own), "trailing" (the same, its first step at the noisiest
            timestep, which few steps need) or "lcm".
        resolution: short side at which the model works, px; 0 takes what it was trained at.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 is off, as RORem removes.
        strength: share of the noise schedule; 1 starts from pure noise.
        mode: what of the source stands in the result, see `composition.MODES`.
        crop: work on crops around the objects, not on the whole frame.
        seed: of the noise.
        control: True for a model that is only there to be compared with (no round of Table 1).
        row: the row of Table 1 whose model this is, such as "base" or "human 1"; "" for none.
    """

    name: str
    kind: str = "remover"
    model: str = "builtin"
    revision: str = ""
    lora: str = ""
    scheduler: str = "default"
    resolution: int = 0
    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    strength: float = 1.0
    mode: str = "full"
    crop: bool = False
    seed: int = 0
    control: bool = False
    row: str = ""

    def __post_init__(self):
        for field, choices in (("kind", KINDS), ("scheduler", SCHEDULERS), ("mode", MODES)):
            if getattr(self, field) not in choices:
                raise ValueError(
                    f'method "{self.name}": {field} is one of {", ".join(choices)}, '
                    f"not {getattr(self, field)!r}"
                )
        for field, least in (("resolution", 0), ("num_inference_steps", 1)):
            if getattr(self, field) < least:
                raise ValueError(
                    f'method "{self.name}": {field} is {getattr(self, field)}: take {least} or more'
                )
        if not self.slug:
            raise ValueError(f"a method's name has letters or digits, not {self.name!r}")

    @property
    def slug(self) -> str:
        """The name as a folder's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class MethodRun:
    """Removals of one method: id -> file; seconds and UNet calls per image (None: not timed)."""

    paths: dict[str, Path]
    seconds_per_image: float | None
    unet_calls: float | None


def make_methods(rows: Sequence[Mapping], **defaults) -> list[Method]:
    """Check methods given as dicts, as a notebook's parameter or a recipe has them.

    Args:
        rows: dicts with the fields of `Method`; `name` is required.
        defaults: fields of `Method` for rows that do not set them, such as `seed`.

    Raises:
        ValueError: a key or choice is unknown, a name is missing or occurs twice.
    """
    known, methods = {field.name for field in fields(Method)}, []
    for row in rows:
        unknown = sorted(set(row) - known)
        if unknown or not row.get("name"):
            raise ValueError(
                f"method {dict(row)}: "
                + (
                    f"unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}"
                    if unknown
                    else "it has no name"
                )
            )
        methods.append(Method(**defaults | dict(row)))
    slugs = [method.slug for method in methods]
    twice = sorted({m.name for m in methods if slugs.count(m.slug) > 1 or m.slug == SOURCE})
    if twice:
        raise ValueError(f"methods need names of their own: {', '.join(twice)}")
    return methods


def run_method(
    method: Method,
    triplets: Sequence[Triplet],
    folder: str | Path,
    *,
    batch_size: int = 8,
    device: str = "",
) -> MethodRun:
    """Make a method's removals, those that are not there yet.

    A removal's noise depends on its place in `triplets` alone, the same for every method. One
    batch warms up untimed; the time is the median over full batches, images' files not included.
    Removals of another model, other settings, another batch size, another source, mask or place are
    made anew: content decides, not names or times.

    Args:
        folder: removals are written to `<folder>/<slug>/<id>.png`, what they were made of to
            `made.jsonl` and times to `timing.json` there.
        batch_size: images a batch, by default for 512 px; take the same for every method.
        device: where removers run; "" takes a GPU if there is one.

    Raises:
        FloatingPointError: a model gives numbers that are not finite; names it and the image.
    """
    folder = Path(folder) / method.slug
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    stamp = {
        **asdict(method),
        "batch_size": batch_size,
        "device": device,
        "control": None,
        "row": None,
        "files": [
            hub.hash_model(sdxl.resolve_model(place))
            for place in (method.model, method.lora)
            if place
        ]
        if method.kind == "remover"
        else [],
    }
    if (method.mode, method.crop) == ("full", False):  # a release before this one had no other
        del stamp["mode"], stamp["crop"]
    timing = _read_timing(folder / "timing.json", stamp)
    if timing is None:
        if is_filled(folder):  # of another method, or somebody's own
            logger.info("%s has other removals: they are now %s", folder, set_aside(folder))
        timing = {"stamp": stamp, "batches": []}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "timing.json", timing)
    paths = {t.id: folder / f"{_name_file(t.id)}.png" for t in triplets}
    made, inputs = Journal(folder / "made.jsonl"), _describe_inputs(triplets)
    known = {row["id"]: row for _, row in read_lines(made.path)} if made.path.exists() else {}
    waiting = [
        (n, t)
        for n, t in enumerate(triplets)
        if not _is_whole(paths[t.id], known.get(t.id), inputs[n])
    ]
    if waiting:
        remove, take_calls = _open_method(method, device)
        progress = Progress(f"{method.name}, removals", len(waiting))
        for start in range(0, len(waiting), batch_size):
            part = waiting[start : start + batch_size]
            pictures = [load_images(replace(t, gt=None)) for _, t in part]
            given = (
                [p["source"] for p in pictures],
                [p["mask"] for p in pictures],
                [n for n, _ in part],
                [str(t.source) for _, t in part],
            )
            if start == 0:
                remove(*given, steps=min(2, method.num_inference_steps))
            take_calls()
            began = time.perf_counter()
            removed = remove(*given)
            seconds = time.perf_counter() - began
            for (n, triplet), picture in zip(part, removed, strict=True):
                data = save_image(paths[triplet.id], picture)
                made.append(inputs[n] | {"bytes": len(data)})
            timing["batches"].append(
                {"n": len(part), "seconds": round(seconds, 5), "unet_calls": take_calls()}
            )
            write_json(folder / "timing.json", timing)
            progress.add(len(part))
        logger.info("%s", progress)
    made.close()
    return MethodRun(paths, *_summarise_timing(timing["batches"], batch_size))


def _open_method(method: Method, device: str) -> tuple[Callable, Callable]:
    """The method as a function of sources, masks, noise numbers and names, and its UNet calls'
    counter.

    The counter says how often the UNet has seen an image since it was last asked.
    """
    if method.kind != "remover":

        def remove(sources, masks, numbers, names, steps=None):
            return [
                inpaint_classical(s, m, method=method.kind)
                for s, m in zip(sources, masks, strict=True)
            ]

        return remove, lambda: 0
    remover = ObjectRemover.from_pretrained(
        method.model,
        lora=method.lora,
        scheduler=method.scheduler,
        revision=method.revision or None,
        device=device,
    )
    pipe = remover.pipe
    size = sdxl.get_resolution(pipe)  # the LoRA's, where it says it
    calls = [0]

    def count(module, arguments, keywords):
        sample = arguments[0] if arguments else keywords["sample"]
        calls[0] += len(sample)

    def take_calls():
        seen, calls[0] = calls[0], 0
        return seen

    def remove(sources, masks, numbers, names, steps=None):
        return remover(
            sources,
            masks,
            mode=method.mode,
            crop=method.crop,
            resolution=method.resolution or size,
            num_inference_steps=steps or method.num_inference_steps,
            guidance_scale=method.guidance_scale,
            strength=method.strength,
            seed=method.seed,
            numbers=numbers,
            names=names,
            batch_size=len(sources),
        )

    pipe.unet.register_forward_pre_hook(count, with_kwargs=True)
    return remove, take_calls


def _read_timing(path: Path, stamp: dict) -> dict | None:
    """The times on record, if they belong to this very method."""
    try:
        timing = read_json(path)
        return timing if timing["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _describe_inputs(triplets: Sequence[Triplet]) -> list[dict]:
    """What each removal is made of: the place that numbers its noise, the content of source and
    mask."""
    content = hash_triplets([replace(t, gt=None) for t in triplets])
    return [
        {
            "id": t.id,
            "place": n,
            "source": content[t.source]["sha256"],
            "mask": content[t.mask]["sha256"],
        }
        for n, t in enumerate(triplets)
    ]


def _is_whole(path: Path, row: dict | None, inputs: dict) -> bool:
    """Whether a removal is there, made of these inputs, and not torn by a lost power."""
    if row is None or {k: v for k, v in row.items() if k != "bytes"} != inputs:
        return False
    return path.is_file() and path.stat().st_size == row.get("bytes")


def _name_file(name: str) -> str:
    plain = re.sub(r"[^\w.~-]", "_", name)
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _summarise_timing(batches: list[dict], batch_size: int) -> tuple[float | None, float | None]:
    if not batches:
        return None, None
    full = [b for b in batches if b["n"] == batch_size] or batches
    seconds = float(np.median([b["seconds"] / b["n"] for b in full]))
    return seconds, sum(b["unet_calls"] for b in batches) / sum(b["n"] for b in batches)
