"""The work of `rorem remove`: the model is opened, images go through it a few at a time.

While the model works, the next images are read and the last results written, each in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from tqdm import tqdm

from rorem_lib.data.items import escape_text
from rorem_lib.discriminator import Discriminator, score_images
from rorem_lib.files import hash_file, is_full
from rorem_lib.models.advice import SMALL, describe_use
from rorem_lib.models.hub import hash_model
from rorem_lib.models.inpainting import ObjectRemover
from rorem_lib.models.lora import LORA_FILE
from rorem_lib.models.sdxl import BASE_MODEL, choose_device, resolve_model
from rorem_lib.runner.remove_files import (
    Item,
    Loaded,
    Unusable,
    copy_source,
    encode_result,
    encode_side_by_side,
    load_item,
    make_key,
    name_side_by_side,
)
from rorem_lib.runner.remove_results import Results, complain

GROUP, GROUP_PIXELS = 8, 12_000_000  # the most images, and pixels, that are read at a time
LOG_SECONDS = 10  # between two lines of progress in a log

LARGE = 1_000_000_000  # bytes of a model's folder, from which reading them takes long

# What opening a model raises where it is not there, or the Hub does not give it.
UNREACHED = (FileNotFoundError, ConnectionError, PermissionError, HfHubHTTPError)


class NoModel(ValueError):
    """The model cannot be opened; the message says how to get it."""


class Work:
    """Items worked on in small groups: the next is read, and the last written, during a removal.

    Args:
        options: of the command line.
        items: of `remove_files.plan`.
        results: the folder that they go to, opened and locked.
    """

    def __init__(self, options, items: list[Item], results: Results):
        self.options, self.items, self.results = options, items, results
        self.suffix = Path(items[0].output).suffix.lower()
        self.remover, self.settings = None, {}
        self.made = self.kept = 0
        self.alone = options.batch_size == 1
        self.faults: dict = {}  # item -> why
        self.progress = Progress(len(items))

    def run(self) -> int:
        """Work on all; returns the exit code, the end told."""
        self.settings = self._describe_settings()
        # Left by an error, the blocks wait for the one image that is being read or written.
        with self.progress, ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            groups = self._read_groups()
            waiting, writing = reader.submit(next, groups, None), None
            while (group := waiting.result()) is not None:
                waiting = reader.submit(next, groups, None)
                removed = self._remove(group)
                if writing:
                    writing.result()
                writing = writer.submit(self._write, removed)
            if writing:
                writing.result()
        return self._tell_end()

    def _describe_settings(self) -> dict:
        """All but image and mask that decides a result."""
        options = self.options
        names = (
            *("box", "invert_mask", "dilate", "mode", "no_crop", "resolution", "steps", "guidance"),
            *("strength", "seed", "candidates", "dtype", "runtime"),
        )
        found = {name: getattr(options, name) for name in names}
        models = {"model": options.model, "lora": options.lora}
        if options.candidates > 1:  # of one there is nothing to choose
            models["discriminator"] = options.discriminator
        models = {name: model for name, model in models.items() if model}
        for model in models.values():
            if (size := _measure_folder(model)) > LARGE:
                self.progress.write(
                    f"{model} is read, {size / 1e9:.1f} GB, to know its results again"
                )

        def identify() -> dict:
            revisions = {"model": options.revision}
            return {k: identify_model(v, revisions.get(k)) for k, v in models.items()}

        identities = identify()
        if None in identities.values():  # not there yet: a Hub id has its commit once it is
            self._open()
            identities = {k: v or models[k] for k, v in identify().items()}
        return found | identities | {"suffix": self.suffix}

    def _fail(self, item: Item, error: BaseException | str) -> None:
        reason = " ".join(str(error).split()) or type(error).__name__
        known = (str, ValueError, OSError, FloatingPointError)
        if not isinstance(error, known):
            reason = f"{type(error).__name__}: {reason}"
        self.faults[item] = reason if str(item.source) in reason else f"{item.source}: {reason}"
        self.progress.step(worked=False)

    # ------------------------------------------------------------------------------- reading

    def _read_groups(self) -> Iterator[list]:
        """What is to be made, a few images at a time."""
        limit = 1 if self.alone else self.options.batch_size or GROUP
        group, pixels = [], 0
        for item in self.items:
            if (loaded := self._read(item)) is None:
                continue
            group.append(loaded)
            pixels += loaded.given.mask.size
            if len(group) >= limit or pixels >= GROUP_PIXELS:
                yield group
                group, pixels = [], 0
        if group:
            yield group

    def _list_names(self, item: Item) -> list[str]:
        names = [item.output]
        return [*names, name_side_by_side(item.output)] if self.options.side_by_side else names

    def _read(self, item: Item) -> Loaded | None:
        """An item as it was read; None where it is done, or cannot be worked on."""
        try:
            if item.fault:
                raise Unusable(item.fault)
            key = make_key(item, self.settings)
            names = self._list_names(item)
            if all(self.results.is_done(name, key) for name in names):
                self.kept += 1
                self.progress.step(worked=False)
                return None
            for name in names:
                self.results.check_free(name, item.source)
            invert = self.options.invert_mask
            return load_item(item, key, boxes=self.options.box or (), invert=invert)
        except (ValueError, OSError, MemoryError) as error:
            self._fail(item, error)
            return None

    # ------------------------------------------------------------------------------- the model

    def _remove(self, group: list[Loaded]) -> list[tuple[Loaded, np.ndarray | None]]:
        """(loaded, result [H, W, 3] uint8); None for a result from which nothing is removed."""
        removed = []
        for loaded in [x for x in group if not x.given.mask.any()]:
            self.progress.write(
                f"warning: {loaded.item.source}: the mask is empty (nothing in it is "
                "128 or lighter), the image is copied"
            )
            removed.append((loaded, None))
            group = [x for x in group if x is not loaded]
        if group and self.remover is None:
            self._open()
        parts = [[x] for x in group] if self.alone else [group]
        for part in filter(None, parts):
            removed += self._try(part)
        return removed

    def _try(self, group: list[Loaded]) -> list[tuple[Loaded, np.ndarray]]:
        """Removals of a group, or of each alone where that fails: one must not fail the rest."""
        try:
            results = self.remover.remove(
                [x.given.image for x in group],
                [x.given.mask for x in group],
                numbers=[0] * len(group),  # the same noise for an image, whatever is beside it
                names=[str(x.item.source) for x in group],
                **self._collect_settings(),
            )
            return [(x, r.image) for x, r in zip(group, results)]
        except Exception as error:
            full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            self.alone |= full
            if len(group) == 1:
                if full:
                    error = self._explain_memory()
                self._fail(group[0].item, error)
                return []
        return [pair for loaded in group for pair in self._try([loaded])]

    def _explain_memory(self) -> str:
        exported = self.options.runtime != "torch"
        device = "cpu" if exported else choose_device(self.options.device)
        what = "a smaller --resolution"
        if device != "cpu":
            what = f"--offload, --dtype fp16, {what} or --device cpu"
        elif not exported:
            what = f"--dtype bf16 or {what}"
        return f"the memory of {device} is too small for it: give {what}"

    def _collect_settings(self) -> dict:
        """The settings of `ObjectRemover.remove` that were given; the others are the model's."""
        options = self.options
        given = {
            "mode": options.mode,
            "crop": False if options.no_crop else None,
            "resolution": options.resolution,
            "num_inference_steps": options.steps,
            "guidance_scale": options.guidance,
            "strength": options.strength,
            "dilate": options.dilate,
            "batch_size": 1 if self.alone else options.batch_size,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return given | {"seed": options.seed, "candidates": options.candidates}

    def _open(self) -> None:
        began = time.monotonic()
        self.remover = open_remover(self.options, self.progress.write)
        name = self.options.model
        self.progress.write(f"{name} opened in {time.monotonic() - began:.0f} s")
        count = _count_parameters(self.remover)
        if count < SMALL:
            self.progress.write(describe_use(name, count))
        self.progress.restart()

    # ------------------------------------------------------------------------------- writing

    def _write(self, removed: list[tuple]) -> None:
        """Write results and their comparisons.

        Raises:
            OSError: the disk takes no more, whatever the file.
        """
        for loaded, image in removed:
            item = loaded.item
            try:
                whole = {"source": item.source, "key": loaded.key}
                if image is None:
                    data = copy_source(loaded, self.suffix)
                else:
                    data = encode_result(loaded, image, self.suffix)
                if self.options.side_by_side:
                    shown = loaded.given.image if image is None else image
                    compared = encode_side_by_side(loaded, shown, self.suffix)
                    self.results.write(name_side_by_side(item.output), compared, **whole)
                self.results.write(item.output, data, **whole)
            except (ValueError, OSError) as error:
                stops = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
                if isinstance(error, OSError) and (is_full(error) or error.errno in stops):
                    raise
                self._fail(item, error)
            else:
                self.made += 1
                self.progress.step()

    def _tell_end(self) -> int:
        place = self.results.folder
        if len(self.items) == 1:
            place = place / self.items[0].output
        told = f"{self.made} made" + f", {self.kept} done before" * bool(self.kept)
        if len(self.faults) < len(self.items):
            print(escape_text(f"{told}: {place}"))
        if not self.faults:
            return 0
        complain(f"rorem: {len(self.faults)} of {len(self.items)} failed:")
        for item in self.items:
            if item in self.faults:
                complain(f"  {self.faults[item]}")
        if len(self.items) > 1:
            complain("Mend them and run the same command again: what is done is not made twice.")
        return 1


class Progress:
    """How far the work is, and how long it will take: a bar in a terminal, else lines at times.

    What counts is the time of images that had to be worked on.
    """

    def __init__(self, total: int, stream=None):
        self.total, self.done, self.worked = total, 0, 0
        self.stream = stream or sys.stderr
        self.began = self.told = time.monotonic()
        self._bar = None

    def __enter__(self):
        if self.stream.isatty() and self.total > 1:
            self._bar = tqdm(total=self.total, unit="image", file=self.stream, dynamic_ncols=True)
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()

    def restart(self) -> None:
        """Count time from now, not from before the model was opened."""
        self.began = time.monotonic()
        if self._bar is not None:
            self._bar.unpause()

    def step(self, *, worked: bool = True) -> None:
        """One image is done with."""
        self.done += 1
        self.worked += worked
        if self._bar is not None:
            if not worked:
                self._bar.initial += 1
            self._bar.update()
            return
        now = time.monotonic()
        if self.total == 1 or (now < self.told + LOG_SECONDS and self.done < self.total):
            return
        self.told = now
        text = f"{self.done} of {self.total}"
        if self.worked:
            seconds = (now - self.began) / self.worked
            left = _format_seconds(seconds * (self.total - self.done))
            text += f"  {seconds:.2f} s per image  {left} left"
        self.write(text)

    def write(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.write(escape_text(text), file=self.stream)
        else:
            print(escape_text(text), file=self.stream, flush=True)


def _format_seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


# ------------------------------------------------------------------------------------ the model


def identify_model(model: str, revision: str | None = None) -> str | None:
    """What a model computes with: a folder's hash, or a Hub id with its commit.

    None for one of the Hub that is not in the cache.

    Raises:
        NoModel: a folder was named that is not there.
    """
    if Path(model).is_file():
        return hash_file(model)
    place = _resolve(model)
    if Path(place).is_dir():
        return hash_model(place)
    for name in ("model_index.json", "unet/config.json", "config.json", LORA_FILE):
        with contextlib.suppress(ValueError):  # no Hub id: opening it says so
            path = try_to_load_from_cache(place, name, revision=revision)
            if isinstance(path, str):
                return f"{place}@{Path(path).parents[name.count('/')].name}"
    return None


def _measure_folder(model: str) -> int:
    """Bytes of the files that `identify_model` reads of a model's folder; 0 for no folder."""
    with contextlib.suppress(FileNotFoundError):
        folder = Path(resolve_model(model))
        files = [p for part in ("", "unet", "vae") for p in (folder / part).glob("*")]
        return sum(p.stat().st_size for p in files if p.suffix in (".safetensors", ".bin"))
    return 0


def _count_parameters(remover) -> float:
    """Of a remover's UNet; of an exported one about, by its files. Infinite for no known kind."""
    if pipe := getattr(remover, "pipe", None):
        return sum(p.numel() for p in pipe.unet.parameters())
    if record := getattr(getattr(remover, "networks", None), "record", None):
        size = sum(file["bytes"] for file in record["parts"]["unet"]["files"].values())
        return size / (2 if record["dtype"] == "fp16" else 4)
    return math.inf


def open_remover(options, tell: Callable[[str], None]) -> ObjectRemover:
    """The remover that the options name.

    Args:
        tell: called with what takes long.

    Raises:
        NoModel: it is not there and cannot be fetched, or is none.
    """
    model, lora = options.model, options.lora
    if lora and Path(folder := _resolve(lora)).is_dir() and not Path(folder, LORA_FILE).is_file():
        raise NoModel(f"{lora} holds no LoRA (no {LORA_FILE})")
    given = {
        "lora": lora,
        "revision": options.revision,
        "device": options.device,
        "dtype": options.dtype,
        "offload": options.offload,
        "runtime": options.runtime,
        "score": open_score(options) if options.discriminator else None,
    }
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
                what = BASE_MODEL if Path(_resolve(model)).is_dir() else model
                tell(f"{what} is downloaded, {size / 1e9:.1f} GB, to {constants.HF_HUB_CACHE}")
            return ObjectRemover.from_pretrained(model, **given)
    except UNREACHED as error:
        text = str(error)
        if lora and lora not in text and identify_model(lora) is None:
            text = f"{model} with the LoRA {lora}: {text}"
        raise NoModel(text) from None


def _resolve(model: str) -> str:
    """As `resolve_model`, which says what is wrong with a name.

    Raises:
        NoModel: a folder was named that is not there.
    """
    try:
        return resolve_model(model)
    except FileNotFoundError as error:
        raise NoModel(str(error)) from None


def open_score(options):
    """(sources, masks, removals) -> how good each removal is, by the discriminator.

    Raises:
        NoModel: it is not there and cannot be fetched, or is none.
    """
    device = choose_device(options.device)
    try:
        discriminator = Discriminator.from_pretrained(options.discriminator, device=device)
    except OSError as error:
        raise NoModel(f"the discriminator {options.discriminator}: {error}") from None
    return partial(score_images, discriminator)


def measure_download(model: str, revision: str | None = None) -> int | None:
    """Bytes that opening a model downloads, about; None where the Hub does not tell.

    A UNet alone needs the other parts of the base model too, one in a folder here those alone.

    Raises:
        HTTPError: the Hub cannot be reached.
    """

    def measure(repo: str, revision: str | None, parts: re.Pattern) -> tuple[int, bool]:
        # Unlike the tree, this is asked for once.
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=10)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        plain = {path for path in sizes if path.endswith(".safetensors") and ".fp16." not in path}
        total = 0
        for path, size in sizes.items():
            folder = path.rpartition("/")[0]
            has_plain = any(other.rpartition("/")[0] == folder for other in plain)
            wanted = path in plain or (path.endswith(".safetensors") and not has_plain)
            total += size * (wanted and bool(parts.match(path)))
        return total, "model_index.json" in sizes

    folder = Path(_resolve(model))
    if folder.is_dir() and (
        (folder / "model_index.json").is_file()
        or not any((folder / part / "config.json").is_file() for part in ("", "unet"))
    ):
        return None  # whole, or none: nothing is downloaded
    try:
        total, whole = 0, False
        if not folder.is_dir():
            parts = re.compile(r"[^/]+/|diffusion_pytorch_model")
            total, whole = measure(model, revision, parts)
        if not whole:
            total += measure(BASE_MODEL, None, re.compile("vae/|text_encoder"))[0]
        return total
    except (OSError, HfHubHTTPError, HFValidationError):
        return None
