"""Candidates: remove objects from images of any size, in batches, one or many processes.

    # one GPU
    python -m rorem_lib.removal --pretrained_model_name_or_path runs/mine/remover \
        --meta_path pool/meta.json --count 10000 --output_dir runs/round_1
    # eight GPUs, the same removals
    accelerate launch --multi_gpu --num_processes 8 -m rorem_lib.removal \
        --pretrained_model_name_or_path runs/mine/remover --meta_path pool/meta.json \
        --count 10000 --output_dir runs/round_1

Reads a remover and the sources and masks of triplet sets. Writes in `output_dir` the triplet set
`candidates/`, whose GT is the removal, and `train_metrics.json`. Started again, it goes on.

`models.inpainting.ObjectRemover` does the work. Every image has a generator of its own, so a
removal does not depend on the batch it was in, nor on how many processes shared the work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rorem_lib.data import masks
from rorem_lib.data.pictures import TripletError
from rorem_lib.data.triplets import check_ids, load_images, read_triplets
from rorem_lib.data.writer import TripletWriter, claim_set
from rorem_lib.files import hash_file, is_filled, lock_folder, read_json, set_aside, write_json
from rorem_lib.models import hub, sdxl
from rorem_lib.models.inpainting import CLASSICAL, MODES, ObjectRemover, inpaint_classical
from rorem_lib.parameters import option
from rorem_lib.sets import resolve_all
from rorem_lib.training import distributed
from rorem_lib.training.config import check_at_least, parse_config, require_sets, run_job
from rorem_lib.training.latent_cache import hash_triplets, summarise_content

logger = logging.getLogger(__name__)

VERSION = 1  # raise it when the same settings give other removals


@dataclass
class GenerateConfig:
    """Generate removal candidates for a set of sources and masks (RORem, sec. 3.1)."""

    output_dir: str = option(
        "runs/alone/03_generate_removals", "the candidates go to its folder candidates"
    )
    meta_path: list[str] = option([], "sets of sources and masks, required; GT is not read")
    pretrained_model_name_or_path: str = option(
        "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
        "the remover: builtin, a folder or a Hub id",
    )
    revision: str = option("", "the model's Hub revision")
    also: list[str] = option(
        [],
        "further methods that take turns with the remover, image by image: models, or telea and ns "
        "for OpenCV's. A discriminator that shall judge several methods has to see how each fails",
    )
    start: int = option(0, "first image of the set that is used")
    count: int = option(0, "how many images are used; 0 takes all from start on")
    resolution: int = option(
        0, "short side at which the remover works, px; 0 takes what it was trained at"
    )
    seeds_per_image: int = option(1, "removals made of each image, with different noise")
    num_inference_steps: int = option(50, "denoising steps")
    guidance_scale: float = option(1.0, "classifier-free guidance; 1 is off")
    strength: float = option(1.0, "1 starts from pure noise; below it the object can shine through")
    mode: str = option(
        "full",
        "what of the source stands in the result: full takes all from the remover, exact keeps all "
        "outside of the mask, effect keeps what the removal left unchanged",
    )
    crop: bool = option(False, "work on crops around the objects, not on the whole frame")
    dilate: list[int] = option(
        [0],
        "px by which the mask is widened for the removal; several values take turns with the "
        "removals of an image. The candidate keeps the mask as it was: where the wider one hid a "
        "shadow, what is accepted teaches the remover to take the shadow away unasked",
    )
    batch_size: int = option(8, "removals a forward pass; the default is for 512 px")
    mixed_precision: str = option("auto", "no, bf16, fp16, or auto: bf16 where the hardware has it")
    seed: int = option(4, "fixes all noise")

    def __post_init__(self):
        for name in ("start", "count", "resolution"):
            check_at_least(self, name, 0)
        for name in ("seeds_per_image", "num_inference_steps", "batch_size"):
            check_at_least(self, name, 1)
        if not self.dilate or min(self.dilate) < 0:
            raise ValueError(f"dilate is {self.dilate}: take one or several numbers, 0 or more")
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}: take one of {', '.join(MODES)}")
        sdxl.choose_precision(self.mixed_precision)  # which refuses what it does not know


def generate_candidates(config: GenerateConfig) -> dict:
    """Write `<output_dir>/candidates`, a triplet set whose GT is the removal; resumable.

    Ids are the images' own, with `-s<k>` behind them where several seeds were used. What another
    remover, other settings or other images left there is set aside; where more images are asked for
    than before, it goes on.

    Returns:
        `{"n_images", "n_removals", "seconds", "removals_per_second", "num_processes"}`.

    Raises:
        BlockingIOError: another process generates in this folder.
        FloatingPointError: a remover gives numbers that are not finite; names it and the image.
        ValueError: there is no `meta_path`, there are no images, two of the sets share ids, or an
            id cannot name files.
        TripletError: `candidates` is read, or holds something that no such job wrote.
    """
    from accelerate import PartialState

    require_sets(config)
    # Unlike `Accelerator`, it does not ask the environment whether it shall stay on the CPU, and
    # would take each of several CPU processes for the only one.
    on_cpu = distributed.get_device() == "cpu"
    state = PartialState(cpu=on_cpu, timeout=distributed.PATIENCE)
    metas = resolve_all(config.meta_path)
    triplets = read_triplets(metas, require_gt=False)[config.start :]
    triplets = triplets[: config.count] if config.count else triplets
    if not triplets:
        raise ValueError(f"no images at {config.meta_path} from number {config.start} on")
    wanted = [
        (t, k, config.start + i)
        for i, t in enumerate(triplets)
        for k in range(config.seeds_per_image)
    ]
    names = [_name(t, k, config) for t, k, _ in wanted]
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ValueError(f"{config.meta_path} share ids, such as {twice}: merge the sets first")
    check_ids(names)
    with contextlib.ExitStack() as stack:
        lock = lock_folder(config.output_dir)
        distributed.ask_main(partial(stack.enter_context, lock))
        return _generate(config, state, metas, triplets, wanted)


def _generate(config: GenerateConfig, state, metas, triplets, wanted) -> dict:
    """`generate_candidates` of `wanted`, in a folder in which no other process is at work."""
    folder = Path(config.output_dir) / "candidates"
    content = hash_triplets([replace(t, gt=None) for t in triplets])
    images = {
        _name(t, k, config): summarise_content([replace(t, gt=None)], content) for t, k, _ in wanted
    }
    distributed.ask_main(partial(_open_candidates, folder, config, metas, images))
    started, made = time.monotonic(), 0
    methods = _list_methods(config)
    with TripletWriter(folder, part=f"rank{state.process_index}") as writer:
        mine = [
            (t, k, n)
            for t, k, n in wanted[state.process_index :: state.num_processes]
            if _name(t, k, config) not in writer.done_ids
        ]
        for turn, method in enumerate(methods):
            todo = [item for item in mine if item[2] % len(methods) == turn]
            remove = _open_method(method, config, state.device) if todo else None
            for begin in range(0, len(todo), 4 * config.batch_size):
                part = todo[begin : begin + 4 * config.batch_size]
                pictures = [load_images(t) for t, _, _ in part]
                wide = [
                    masks.dilate_mask(masks.binarise_mask(p["mask"]), _get_dilation(k, config))
                    for p, (_, k, _) in zip(pictures, part)
                ]
                removed = remove(
                    [p["source"] for p in pictures],
                    wide,
                    [n * config.seeds_per_image + k for _, k, n in part],
                    [str(t.source) for t, _, _ in part],
                )
                for (triplet, k, _), result in zip(part, removed):
                    extra = {"remover": method, "seed": k, "dilate": _get_dilation(k, config)}
                    writer.add_triplet(triplet, id=_name(triplet, k, config), gt=result, **extra)
                made += len(part)
                rate = made / max(time.monotonic() - started, 1e-9)
                logger.info(
                    "%d of %d removals  %.1f per second  %d s left",
                    made,
                    len(mine),
                    rate,
                    (len(mine) - made) / rate,
                )
    state.wait_for_everyone()
    if state.is_main_process:
        TripletWriter(folder).close()
    seconds = max(time.monotonic() - started, 1e-9)
    metrics = {
        "n_images": len(triplets),
        "n_removals": len(wanted),
        "seconds": round(seconds, 2),
        "removals_per_second": round(made / seconds, 2),
        "num_processes": state.num_processes,
    }
    if state.is_main_process:
        write_json(Path(config.output_dir) / "train_metrics.json", metrics)
    state.wait_for_everyone()
    return metrics


def _list_methods(config: GenerateConfig) -> list[str]:
    return [config.pretrained_model_name_or_path, *config.also]


def _get_dilation(k: int, config: GenerateConfig) -> int:
    """By how many pixels the mask of an image's removal number `k` is widened."""
    return config.dilate[k % len(config.dilate)]


def _open_method(method: str, config: GenerateConfig, device):
    """A method as a function of sources, masks, noise numbers and the images' names."""
    if method in CLASSICAL:
        return lambda sources, object_masks, *_: [
            inpaint_classical(source, mask, method=method)
            for source, mask in zip(sources, object_masks, strict=True)
        ]
    own = method == config.pretrained_model_name_or_path
    remover = ObjectRemover.from_pretrained(
        method,
        device=str(device),
        dtype=config.mixed_precision,
        revision=own and config.revision or None,
    )
    return lambda sources, object_masks, numbers, names: remover(
        sources,
        object_masks,
        mode=config.mode,
        crop=config.crop,
        resolution=config.resolution or sdxl.get_resolution(remover.pipe),
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        strength=config.strength,
        seed=config.seed,
        numbers=numbers,
        names=names,
        batch_size=config.batch_size,
    )


def _open_candidates(
    folder: Path, config: GenerateConfig, metas: list[Path], images: dict[str, str]
) -> None:
    """Set aside candidates of another remover, other settings or images; note this run's.

    Models, sets and images are compared by their content: they may have been moved, and an image
    may have been overwritten in place. How many images are used, and from which on, changes none of
    their removals: what is there of the ids that are wanted is kept.

    `drawn_from` says where the images' sets lie, for `builtin.sets.hidden_of`.

    Args:
        images: the content of source and mask of each candidate that is wanted, by its id.
    """
    _refuse_foreign(folder, metas)
    settings = dataclasses.asdict(config) | {
        "methods": [
            m if m in CLASSICAL else hub.hash_model(sdxl.resolve_model(m))
            for m in _list_methods(config)
        ],
        "sets": [hash_file(meta) for meta in metas],
    }
    for name in (
        *("output_dir", "batch_size", "meta_path", "start", "count"),
        *("pretrained_model_name_or_path", "also"),
    ):
        settings.pop(name)
    if (config.mode, config.crop) == ("full", False):  # an earlier release knew nothing else
        del settings["mode"], settings["crop"]
    marker = folder / "settings.json"
    why = "with other settings, another remover or other images"
    if marker.is_file():
        found = read_json(marker)
        found.pop("drawn_from", None)
        noted = found.pop("images", {})  # a release before this one noted none
        if found == settings:
            claim_set(folder, known=True)  # of an earlier version, which marked none
            why = _find_foreign(TripletWriter(folder).list_known(), noted, images)
    if folder.exists() and why:
        logger.info("%s was made %s: it is now %s", folder, why, set_aside(folder))
    drawn_from = [str(meta.resolve()) for meta in metas]
    write_json(marker, settings | {"drawn_from": drawn_from, "images": images})
    claim_set(folder, known=True)


def _refuse_foreign(folder: Path, metas: list[Path]) -> None:
    for meta in metas:
        if meta.resolve().is_relative_to(folder.resolve()):
            raise TripletError(
                f"{meta} lies in {folder}, where the candidates are written: choose another "
                "output_dir"
            )
    if is_filled(folder) and not (folder / "settings.json").is_file():
        raise TripletError(
            f"{folder} holds something that is no set of candidates (there is no settings.json): "
            "choose another output_dir, or move it away"
        )


def _find_foreign(done: set[str], noted: dict[str, str], images: dict[str, str]) -> str:
    """Why the candidates `done` of equal settings cannot stay, or "" where they can."""
    if not done <= images.keys():
        return "of more images than are asked for"
    changed = sorted(name for name in done if noted.get(name, images[name]) != images[name])
    return f"of images that have changed since, such as {changed[0]}'s" if changed else ""


def _name(triplet, k: int, config: GenerateConfig) -> str:
    return triplet.id if config.seeds_per_image == 1 else f"{triplet.id}-s{k}"


def main(arguments: list[str] | None = None) -> None:
    run_job(generate_candidates, parse_config(GenerateConfig, arguments))


if __name__ == "__main__":
    main()
