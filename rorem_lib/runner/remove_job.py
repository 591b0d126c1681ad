"""The work of `rorem remove`: images go through the model a few at a time.

While the model works, the next images are read and the last results written, each in a thread.
"""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from rorem_lib.data.items import escape_text
from rorem_lib.files import is_full
from rorem_lib.runner.remove_images import (
    Loaded,
    encode_result,
    encode_side_by_side,
    load_item,
    make_key,
    name_side_by_side,
)
from rorem_lib.runner.remove_model import describe_small, identify_models, open_remover
from rorem_lib.runner.remove_plan import Item
from rorem_lib.runner.remove_results import Results, Unusable, complain

SETTINGS = (  # options that `ObjectRemover.remove` takes; where None, the model's own hold
    *("mode", "crop", "resolution", "num_inference_steps", "guidance_scale", "strength"),
    *("dilate", "seed", "candidates"),
)
GROUP, GROUP_PIXELS = 8, 12_000_000  # the most images, and pixels, that are read at a time
LOG_SECONDS = 10  # between two lines of progress in a log
STOPS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)  # the disk takes no file at all


class Job:
    """Items worked on in small groups: the next is read, and the last written, during a removal.

    Args:
        options: of the command line.
        items: of `remove_plan.plan`.
        results: the folder that they go to, opened and locked.
    """

    def __init__(self, options, items: list[Item], results: Results):
        self.options, self.items, self.results = options, items, results
        self.suffix = Path(items[0].output).suffix.lower()
        self.remover, self.settings = None, {}
        self.made = self.kept = 0
        self.alone = options.batch_size == 1
        self.faults: dict[Item, str] = {}
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
        options, tell = self.options, self.progress.tell
        models = identify_models(options, tell)
        if None in models.values():  # not there yet: a Hub id has its commit once it is
            self._open()
            models = {
                name: identity or getattr(options, name)
                for name, identity in identify_models(options, tell).items()
            }
        names = (*SETTINGS, "box", "invert_mask", "dtype", "runtime")
        return {name: getattr(options, name) for name in names} | models | {"suffix": self.suffix}

    def _fail(self, item: Item, error: BaseException | str) -> None:
        reason = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, (str, ValueError, OSError, FloatingPointError)):
            reason = f"{type(error).__name__}: {reason}"
        self.faults[item] = reason if str(item.source) in reason else f"{item.source}: {reason}"
        self.progress.step(worked=False)

    # ------------------------------------------------------------------------------- reading

    def _read_groups(self) -> Iterator[list[Loaded]]:
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

    def _read(self, item: Item) -> Loaded | None:
        """An item as it was read; None where it is done, or cannot be worked on."""
        names = [item.output]
        if self.options.side_by_side:
            names.append(name_side_by_side(item.output))
        try:
            if item.fault:
                raise Unusable(item.fault)
            key = make_key(item, self.settings)
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

    def _open(self) -> None:
        began = time.monotonic()
        self.remover = open_remover(self.options, self.progress.tell)
        self.progress.tell(f"{self.options.model} opened in {time.monotonic() - began:.0f} s")
        if advice := describe_small(self.options.model, self.remover):
            self.progress.tell(advice)
        self.progress.restart()

    def _remove(self, group: list[Loaded]) -> list[tuple[Loaded, np.ndarray | None]]:
        """(loaded, result [H, W, 3] uint8); None for a result from which nothing is removed."""
        removed = [(loaded, None) for loaded in group if not loaded.given.mask.any()]
        for loaded, _ in removed:
            self.progress.tell(
                f"warning: {loaded.item.source}: the mask is empty (nothing in it is "
                "128 or lighter), the image is copied"
            )
        group = [loaded for loaded in group if loaded.given.mask.any()]
        if group and self.remover is None:
            self._open()
        for part in [[loaded] for loaded in group] if self.alone else [group]:
            removed += self._try(part)
        return removed

    def _try(self, group: list[Loaded]) -> list[tuple[Loaded, np.ndarray]]:
        """Removals of a group, or of each alone where that fails: one must not fail the rest."""
        if not group:
            return []
        settings = {name: getattr(self.options, name) for name in SETTINGS}
        settings["batch_size"] = 1 if self.alone else self.options.batch_size
        try:
            results = self.remover.remove(
                [x.given.image for x in group],
                [x.given.mask for x in group],
                numbers=[0] * len(group),  # the same noise for an image, whatever is beside it
                names=[str(x.item.source) for x in group],
                **{name: value for name, value in settings.items() if value is not None},
            )
            return [(x, r.image) for x, r in zip(group, results)]
        except Exception as error:
            full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            self.alone |= full
            if len(group) == 1:
                self._fail(group[0].item, self._explain_memory() if full else error)
                return []
        return [pair for loaded in group for pair in self._try([loaded])]

    def _explain_memory(self) -> str:
        device = torch.device(self.remover.networks.device).type
        mends = "--dtype bf16" if device == "cpu" else "--offload, --dtype fp16, --device cpu"
        return f"the memory of {device} is too small: give {mends} or a smaller --resolution"

    # ------------------------------------------------------------------------------- writing

    def _write(self, removed: list[tuple[Loaded, np.ndarray | None]]) -> None:
        """Write results and their comparisons.

        Raises:
            OSError: the disk takes no more, whatever the file.
        """
        for loaded, image in removed:
            item = loaded.item
            try:
                files = {item.output: encode_result(loaded, image, self.suffix)}
                if self.options.side_by_side:
                    compared = encode_side_by_side(loaded, image, self.suffix)
                    files = {name_side_by_side(item.output): compared} | files
                for name, data in files.items():
                    self.results.write(name, data, source=item.source, key=loaded.key)
            except (ValueError, OSError) as error:
                if isinstance(error, OSError) and (is_full(error) or error.errno in STOPS):
                    raise
                self._fail(item, error)
            else:
                self.made += 1
                self.progress.step()

    def _tell_end(self) -> int:
        place, count = self.results.folder, len(self.items)
        if len(self.faults) < count:
            place = place / self.items[0].output if count == 1 else place
            before = f", {self.kept} done before" * bool(self.kept)
            print(escape_text(f"{self.made} made{before}: {place}"))
        if not self.faults:
            return 0
        complain(f"rorem: {len(self.faults)} of {count} failed:")
        for item in self.items:
            if item in self.faults:
                complain(f"  {self.faults[item]}")
        if count > 1:
            complain("Mend them and run the same command again: what is done is not made twice.")
        return 1


class Progress(tqdm):
    """How far the work is, and how long it will take: a bar in a terminal, else lines at times.

    What counts is the time of images that had to be worked on.
    """

    monitor_interval = 0  # no thread of its own

    def __init__(self, total: int):
        if sys.stderr.isatty():
            form = {"file": sys.stderr, "dynamic_ncols": True}
        else:
            form = {"file": _Lines(), "mininterval": LOG_SECONDS, "delay": 1e-9}
            form["bar_format"] = "{n_fmt} of {total_fmt} {rate_inv_fmt}, {remaining} left"
        form |= {"unit": "image", "smoothing": 0, "miniters": 1}
        super().__init__(total=total, disable=total == 1, **form)

    def restart(self) -> None:
        """Count time from now, not from before the model was opened."""
        if not self.disable:
            self.start_t = self.last_print_t = self._time()

    def step(self, *, worked: bool = True) -> None:
        """One image is done with."""
        with self.get_lock():  # two threads do
            if not self.disable:
                self.initial += not worked
                self.update()

    def tell(self, text: str) -> None:
        """A line that stays."""
        self.write(escape_text(text), file=sys.stderr)


class _Lines:
    """A log: what would draw over a line is a line there."""

    def write(self, text: str) -> None:
        if text := text.strip():
            complain(text)

    def flush(self) -> None:
        """`complain` has."""
