"""That the pickles of a checkpoint run no code: what they may hold, and how they are read.

accelerate, DeepSpeed and torch keep parts of a training's state as pickles. A pickle can name any
function and have it called, so whoever can write into a checkpoint's folder could run programs in
the training that goes on from it. Here a pickle gets numbers, tensors, plain containers and the few
classes that those libraries need; everything else is refused before anything is loaded.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils.other import TORCH_SAFE_GLOBALS  # NumPy's arrays, in random states
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

SUFFIXES = (".bin", ".pkl", ".pt")
METADATA = ".metadata"  # torch.distributed.checkpoint's, a plain pickle
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# What DeepSpeed's optimizer states hold besides tensors: records of numbers, without methods that
# unpickling calls.
_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}
_IN_METADATA = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("collections", "OrderedDict"),
    *(("torch", name) for name, x in vars(torch).items() if isinstance(x, torch.dtype)),
}


@contextlib.contextmanager
def refusing_code() -> Iterator[None]:
    """A block in which `torch.load` reads numbers, tensors and plain containers alone, whatever
    its caller, accelerate or DeepSpeed, asks for."""
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        with safe_globals(_list_safe()):
            yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def check_pickles(folder: Path) -> None:
    """Refuse a checkpoint one of whose pickles would call something; none of them is loaded.

    Raises:
        ValueError: names the file and what it would call.
    """
    with safe_globals(_list_safe()):
        for path in sorted(folder.rglob("*")):
            if path.suffix in SUFFIXES or path.name.endswith(METADATA):
                _check(path)


def _check(path: Path) -> None:
    try:
        if path.name.endswith(METADATA):
            with open(path, "rb") as stream:
                _MetadataReader(stream).load()
            return
        if not (found := get_unsafe_globals_in_checkpoint(path)):
            return
        reason = f"it would call {', '.join(sorted(found))}"
    except OSError:
        raise
    except Exception as error:  # a pickle that is none of torch.save's fails in every way there is
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(
        f"{path} is refused, it is no part of a training's state ({reason}): take a checkpoint of "
        "your own making, or delete this one"
    )


def _list_safe() -> list:
    """Classes that a state may name besides torch's own, of the libraries that are in use."""
    found = [
        getattr(sys.modules[module], kind)
        for module, kinds in _DEEPSPEED.items()
        if module in sys.modules
        for kind in kinds
    ]
    return TORCH_SAFE_GLOBALS + found


class _MetadataReader(pickle.Unpickler):
    """Reads the list of tensors that divided weights are kept with."""

    def find_class(self, module, name):
        if (module, name) not in _IN_METADATA:
            raise pickle.UnpicklingError(f"it would call {module}.{name}")
        return super().find_class(module, name)
