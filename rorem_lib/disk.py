"""Much that is written by several processes: all of it or nothing, a full disk said in words."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# How libraries that do not raise OSError say that a file could not be written to its end.
_FULL_WORDS = re.compile(
    r"No space left|quota exceeded|File too large|PytorchStreamWriter failed"
    r"|file write failed|unexpected pos",
    re.IGNORECASE,
)


def is_full(error: BaseException) -> bool:
    """Whether an error of torch, safetensors or the system means that the disk is full."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return _FULL_WORDS.search(str(error)) is not None


def attempt(
    accelerator,
    work: Callable[[], None],
    *,
    beside: Path,
    explain: Callable[[], str],
    together: bool = True,
) -> None:
    """One part of writing the folder `beside`: where it fails on any process, undo it on all.

    Args:
        work: called on each process.
        beside: removed where it fails.
        explain: the words for a full disk.
        together: without it a failing process raises alone, and its end makes the launcher end
            the others: they may be waiting for it inside DeepSpeed, where nothing reaches them.

    Raises:
        OSError: (ENOSPC) the disk is full, on all processes, whichever of them met it.
        RuntimeError: another process failed; that one raises its own error.
    """
    trouble = None
    try:
        work()
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        trouble = error
    code = 0 if trouble is None else 2 if is_full(trouble) else 1
    if together or trouble is None:
        code = int(accelerator.gather(torch.tensor([code], device=accelerator.device)).max())
    if code == 0:
        return
    words = explain() if code == 2 else ""
    if accelerator.is_main_process or not together:
        shutil.rmtree(beside, ignore_errors=True)
    if code == 2:
        raise OSError(errno.ENOSPC, words) from trouble
    raise trouble or RuntimeError(f"another process could not write {beside}: its log says why")


def flush(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk before what comes next."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def flush_folder(folder: Path) -> None:
    """`flush` of everything below a folder, and of the folder."""
    below = sorted(folder.rglob("*"))
    for path in [p for p in below if p.is_file()] + [p for p in below if p.is_dir()] + [folder]:
        flush(path)
