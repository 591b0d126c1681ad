"""Reads pickles of numpy arrays without running anything that a pickle can ask for.

A pickle names functions and has them called. Here it gets none of the ones it names: the few that
arrays need are answered by stand-ins of this module, which build an array of plain numbers from
the bytes and nothing else; every other name is refused. (`pickle`, "Restricting Globals", in
Python's documentation; what arrays need is in numpy's `ndarray.__reduce__` and `__reduce_ex__`.)

Refused is also what would fill the memory or never end: more steps than annotations have, more
memory made than the bytes account for, and keys or members of sets that are no plain values, since
a few bytes can spell a tuple whose hash takes for ever or ends the process. For the same reason no
value is ever shown in a message but short texts and numbers.
"""

from __future__ import annotations

import functools
import io
import pickle
import pickletools
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rorem_lib.data.pictures import AGAIN, TripletError, describe_content

_NUMBERS = re.compile(r"[<>|=]?(\?|b1|[iu][1248]|f[248]|U\d{1,6})")
_MEMO_SLOTS = 1_000_000  # a pickle numbers what it refers to again
_KEYS = (str, bytes, int, float, bool, type(None), np.generic)  # hashed at once, whatever they hold
_SPARE = 16_000_000  # bytes that values may take beyond eight times the pickle's own


class _Refused(Exception):
    """A pickle asks for something that arrays do not need."""


def load_compressed_pickle(path: str | Path, max_bytes: int, *, max_steps: int = 200_000) -> Any:
    """Read what `zlib.compress(pickle.dumps(value))` wrote, of protocol 2 or later.

    Args:
        path: the file.
        max_bytes: how large it may be once decompressed; no more than this is ever decompressed.
        max_steps: of the program that a pickle is; each can take some 200 bytes of memory.

    Returns:
        dicts, lists, tuples, sets, texts, bytes, numbers; numpy arrays and scalars of booleans,
        integers, floats or texts; Pillow images of mode 1, L or RGB become uint8 (1: bool) arrays.

    Raises:
        TripletError: missing, truncated, damaged, larger than `max_bytes`, or with a class, a
            function or an array of Python objects in it; names the file and the class.
    """
    path = Path(path)
    data = _decompress(path, max_bytes)
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name in ("PUT", "LONG_BINPUT") and argument >= _MEMO_SLOTS:
                raise _Refused(f"reserves {argument} places in memory")
            if number == max_steps:
                raise _Refused(f"has more than {max_steps} steps")
        return _Unpickler(io.BytesIO(data), room=8 * len(data) + _SPARE).load()
    except _Refused as error:
        raise TripletError(
            f"{path} is refused: its pickle {error}, which no array needs and which "
            "could harm; get the file from its publisher again",
            file=path,
        ) from None
    except Exception as error:  # a damaged pickle fails in every way there is
        why = f"{type(error).__name__}: {error}"[:200]
        raise TripletError(f"{path} is a damaged pickle ({why}): {AGAIN}", file=path) from None


def _decompress(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as stream:
            packed = stream.read(max_bytes + max_bytes // 1000 + 1024)  # zlib adds less to any data
        inflater = zlib.decompressobj()
        data = inflater.decompress(packed, max_bytes + 1)
    except FileNotFoundError:
        raise TripletError(f"{path} does not exist", file=path) from None
    except OSError as error:
        raise TripletError(f"{path} cannot be read: {error.strerror}", file=path) from None
    except zlib.error as error:
        what = describe_content(packed[:512])
        why = f"is {what}" if what else f"is no zlib data, or damaged ({error}): {AGAIN}"
        raise TripletError(f"{path} {why}", file=path) from None
    if len(data) > max_bytes:
        raise TripletError(
            f"{path} is larger than {max_bytes} bytes when decompressed: raise the "
            "limit if its publisher is to be trusted",
            file=path,
        )
    if not inflater.eof:
        raise TripletError(f"{path} is truncated: {AGAIN}", file=path)
    return data


class _Unpickler(pickle._Unpickler):  # the one in Python: its steps can be watched
    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: io.BytesIO, room: int):
        super().__init__(stream)
        self._room = room  # bytes that what is called may still make

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[_OLD_NAMES.get(module, module), name]
        except KeyError:
            raise _Refused(f"asks for {module}.{name}"[:200]) from None

    def _spend(self) -> None:
        """Count what a call has made: it may have copied bytes that stand in the pickle once."""
        made = self.stack[-1]
        self._room -= sys.getsizeof(made) + getattr(made, "nbytes", 0)
        if self._room < 0:
            raise _Refused("makes more of its bytes than arrays do")

    def _check_members(self, members) -> None:
        if not all(isinstance(member, _KEYS) for member in members):
            raise _Refused("has keys, or members of a set, that are neither texts nor numbers")


def _watch(opcode: bytes, before=None, after=None) -> None:
    """Have a step of `_Unpickler` looked at before and after it is done."""
    inherited = _Unpickler.dispatch[opcode[0]]

    def step(unpickler):
        if before:
            before(unpickler)
        inherited(unpickler)
        if after:
            after(unpickler)

    _Unpickler.dispatch[opcode[0]] = step


# What stands on top of the stack before each step: of a marked one all, of the others a pair.
_watch(pickle.SETITEM, before=lambda u: u._check_members(u.stack[-2:-1]))
_watch(pickle.SETITEMS, before=lambda u: u._check_members(u.stack[::2]))
_watch(pickle.DICT, before=lambda u: u._check_members(u.stack[::2]))
_watch(pickle.ADDITEMS, before=lambda u: u._check_members(u.stack))
_watch(pickle.FROZENSET, before=lambda u: u._check_members(u.stack))
for _opcode in (pickle.REDUCE, pickle.BUILD, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.OBJ):
    _watch(_opcode, after=_Unpickler._spend)
_watch(pickle.INST, after=_Unpickler._spend)


def _show(value) -> str:
    """A value of a pickle for a message: to show one of another kind may never end."""
    return f"{value!r}"[:60] if isinstance(value, (str, bytes)) else type(value).__name__


# A pickle can also set attributes on whatever it was given, unless that has a `__setstate__`: all
# stand-ins have one, so that no pickle changes them for the next.


class _Dtype:
    """Stands for `numpy.dtype`: booleans, integers, floats, texts; no objects, no fields."""

    def __init__(self, code: str, *_: bool):
        if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
            raise _Refused(
                "has an array of Python objects"
                if isinstance(code, str) and code.startswith("O")
                else f"has an array of type {_show(code)}"
            )
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if any(part is not None for part in state[2:5]):
            raise _Refused("has an array with fields")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """Stands for `numpy.ndarray` from the moment it is made to when its bytes come."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        super().__setstate__((1, shape, dtype.dtype, fortran, bytes(memoryview(data))))


class _Image(np.ndarray):
    """Stands for `PIL.Image.Image`; becomes the array of its pixels."""

    def __new__(cls) -> _Image:
        return super().__new__(cls, 0, np.uint8)

    def __setstate__(self, state: list) -> None:
        mode, (width, height), data = state[1], state[2], state[4]
        if mode not in ("1", "L", "RGB"):
            raise _Refused(f"has an image of mode {_show(mode)}")
        if not (isinstance(width, int) and isinstance(height, int)):
            raise _Refused("has an image without a size")
        if width * height > 8 * len(data):  # Pillow reserves the pixels before it looks at the data
            raise _Refused(f"has {len(data)} bytes for an image of {width}x{height} px")
        pixels = np.asarray(Image.frombytes(mode, (width, height), data))
        super().__setstate__((1, pixels.shape, pixels.dtype, False, pixels.tobytes()))


class _Function:
    """Stands for a function."""

    def __init__(self, call):
        self._call = call

    def __call__(self, *args):
        return self._call(*args)

    def __setstate__(self, state) -> None:
        raise _Refused("changes a function")


_NDARRAY = object()  # the class is named, never called


def _reconstruct(kind, shape: tuple, _: bytes) -> _Array:
    if kind is not _NDARRAY or shape != (0,):
        raise _Refused("makes an array in an unknown way")
    return np.ndarray.__new__(_Array, 0, np.uint8)


def _make_set(kind: type, members=()) -> set | frozenset:
    if not isinstance(members, (list, tuple)) or not all(isinstance(m, _KEYS) for m in members):
        raise _Refused("has members of a set that are neither texts nor numbers")
    return kind(members)


def _make_scalar(dtype: _Dtype, data: bytes) -> np.generic:
    return np.frombuffer(data, dtype.dtype, count=1)[0]


def _from_buffer(data: bytes, dtype: _Dtype, shape: tuple, order: str, axes=None) -> np.ndarray:
    array = np.frombuffer(data, dtype.dtype)
    if order == "K" and axes is not None:
        return array.reshape(shape).transpose(axes)
    return array.reshape(shape, order=order)


def _encode(text: str, codec: str) -> bytes:
    if codec not in ("latin1", "latin-1"):  # how bytes are written in protocols 0 to 2
        raise _Refused(f"asks for the codec {_show(codec)}")
    return text.encode("latin1")


_OLD_NAMES = {
    "numpy._core.multiarray": "numpy.core.multiarray",
    "__builtin__": "builtins",
    "numpy._core.numeric": "numpy.core.numeric",
}
_ADMITTED = {
    # protocols 0 to 3 name sets and empty bytes
    ("builtins", "set"): _Function(functools.partial(_make_set, set)),
    ("builtins", "frozenset"): _Function(functools.partial(_make_set, frozenset)),
    ("builtins", "bytes"): _Function(lambda: b""),
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy.core.multiarray", "_reconstruct"): _Function(_reconstruct),
    ("numpy.core.multiarray", "scalar"): _Function(_make_scalar),
    ("numpy.core.numeric", "_frombuffer"): _Function(_from_buffer),
    ("_codecs", "encode"): _Function(_encode),
    ("PIL.Image", "Image"): _Image,
}
