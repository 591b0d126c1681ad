import os
import pickle
import shutil
import struct
import subprocess
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from rorem_lib.data.pictures import TripletError
from rorem_lib.sources.safe_pickle import load_compressed_pickle

LIMIT = 1_000_000


def _write(folder, data):
    path = folder / "附 件.p.zl"
    path.write_bytes(zlib.compress(data))
    return path


def _load(folder, data, limit=LIMIT):
    return load_compressed_pickle(_write(folder, data), limit)


# ---------------------------------------------------------------------------------- what is read

VALUE = {
    "bytes": np.arange(12, dtype=np.uint8).reshape(3, 4),
    "bool": np.eye(3) > 0,
    "signed": np.arange(-4, 4, dtype=np.int16),
    "half": np.array([0.5, 2], np.float16),
    "big-endian": np.array([1, 70000], ">i4"),
    "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "turned": np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
    "none": np.zeros((0, 3)),
    "one": np.array(7),
    "scalar": np.float32(2.5),
    "text": np.str_("狗 é"),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_protocol_come_back_as_they_were(tmp_path, protocol):
    found = _load(tmp_path, pickle.dumps(VALUE, protocol))
    assert list(found) == list(VALUE)
    for name, array in VALUE.items():
        assert np.array_equal(found[name], array), name
        assert found[name].dtype.newbyteorder("=") == array.dtype.newbyteorder("="), name
        assert np.shape(found[name]) == np.shape(array), name


def test_the_module_names_of_numpy_1_are_known(tmp_path):
    data = pickle.dumps(VALUE, 2)  # names stand in it as plain lines
    old = data.replace(b"numpy._core.", b"numpy.core.")
    assert old != data
    assert np.array_equal(_load(tmp_path, old)["signed"], VALUE["signed"])


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_plain_values_come_back_as_they_were(tmp_path, protocol):
    value = {
        "a": [1, (2.5, None, True)],
        3: {"x", "é"},
        "b": b"\xff\0",
        "c": b"",
        "d": frozenset([1]),
    }
    assert _load(tmp_path, pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_pickled_pictures_become_arrays(tmp_path, mode):
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7
    image = Image.fromarray(grey).convert(mode)
    found = _load(tmp_path, pickle.dumps([image]))[0]
    assert isinstance(found, np.ndarray)
    assert found.dtype == (bool if mode == "1" else np.uint8)
    assert np.array_equal(found, np.asarray(image))


# ------------------------------------------------------------------------------- what is refused


class Call:
    """Pickles as a call; a call can itself be what is called, or an argument."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args

    def __call__(self):
        raise AssertionError("is only pickled")


def _dotted(module, name, *args):
    """A call of a name with dots in it, which protocol 4 follows from attribute to attribute."""
    text = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
    return b"\x80\x04" + text + b"\x93" + pickle.dumps(args, 3)[2:-1] + b"R."


def _attack_through_file(marker):
    file = marker.with_name("evil.npy")
    np.save(file, np.array([Call(os.system, f"touch '{marker}'")], object), allow_pickle=True)
    return Call(np.load, str(file), None, True)


ATTACKS = {  # the end of the name that is asked for -> what makes a marker file
    "posix.system": lambda marker: Call(os.system, f"touch '{marker}'"),
    ".call": lambda marker: Call(subprocess.call, ["touch", str(marker)]),
    "eval": lambda marker: Call(eval, f"open({str(marker)!r}, 'w')"),
    "exec": lambda marker: Call(exec, f"open({str(marker)!r}, 'w')"),
    "io.open": lambda marker: Call(open, str(marker), "w"),
    "shutil.copyfile": lambda marker: Call(shutil.copyfile, __file__, str(marker)),
    "getattr": lambda marker: Call(Call(getattr, Call(__import__, "os"), "mkdir"), str(marker)),
    "numpy.load": _attack_through_file,
    "numpy.memmap": lambda marker: Call(np.memmap, str(marker), "u1", "w+", 0, (1,)),
    "numpy.savetxt": lambda marker: Call(np.savetxt, str(marker), [1]),
    "numpy.testing._private.utils.runstring": lambda marker: _dotted(
        "numpy.testing._private.utils", "runstring", f"open({str(marker)!r}, 'w')", {}
    ),
    "shutil.os.system": lambda marker: _dotted("shutil", "os.system", f"touch '{marker}'"),
    "numpy.ndarray.tofile": lambda marker: _dotted(
        "numpy", "ndarray.tofile", np.ones(2), str(marker)
    ),
    "numpy._core.multiarray.ndarray.tofile": lambda marker: _dotted(
        "numpy._core.multiarray", "ndarray.tofile", np.ones(2), str(marker)
    ),
}


def _pickle(attack, protocol):
    return attack if isinstance(attack, bytes) else pickle.dumps([attack], protocol)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", ATTACKS)
def test_pickles_that_do_things_are_refused_and_do_nothing(tmp_path, name, protocol):
    marker = tmp_path / "marker"
    data = _pickle(ATTACKS[name](marker), protocol)
    try:
        pickle.loads(data)
    except EOFError:  # numpy.load has done what it was to do
        pass
    assert marker.exists(), "the attack itself does nothing"
    marker.rmdir() if marker.is_dir() else marker.unlink()
    with pytest.raises(TripletError) as caught:
        _load(tmp_path, data)
    assert not marker.exists()
    assert name in str(caught.value) and "附 件.p.zl is refused" in str(caught.value)
    assert caught.value.file == tmp_path / "附 件.p.zl"


def test_an_attack_after_good_arrays_is_refused_too(tmp_path):
    marker = tmp_path / "marker"
    value = {**VALUE, "z": Call(os.mkdir, str(marker))}
    with pytest.raises(TripletError, match="asks for posix.mkdir"):
        _load(tmp_path, pickle.dumps(value))
    assert not marker.exists()


@pytest.mark.parametrize(
    "value, words",
    [
        (np.array([1, "a"], object), "has an array of Python objects"),
        (np.zeros(2, [("a", "u1"), ("b", "f4")]), "has an array of type 'V5'"),
        (np.array(["2024-01-01"], "M8[D]"), "has an array of type 'M8'"),
        (np.array([1j]), "has an array of type 'c16'"),
        (Image.new("RGBA", (2, 2)), "has an image of mode 'RGBA'"),
        (complex(1, 2), "asks for builtins.complex"),
        (np.ma.masked_array([1]), "asks for numpy.ma._mareconstruct|asks for numpy.ma"),
        (TripletError("x"), "asks for rorem_lib.data.pictures.TripletError"),
    ],
)
def test_other_values_are_refused_by_their_name(tmp_path, value, words):
    with pytest.raises(TripletError, match=words):
        _load(tmp_path, pickle.dumps([value], 4))


def test_only_the_codec_of_bytes_is_admitted(tmp_path):
    data = b"\x80\x02c_codecs\nencode\nX\x01\0\0\0bX\x05\0\0\0rot13\x86R."
    with pytest.raises(TripletError, match="asks for the codec 'rot13'"):
        _load(tmp_path, data)
    assert _load(tmp_path, data.replace(b"\x05\0\0\0rot13", b"\x06\0\0\0latin1")) == b"b"


@pytest.mark.parametrize(
    "name",
    [
        "numpy\ndtype",
        "numpy\nndarray",
        "_codecs\nencode",
        "numpy.core.multiarray\n_reconstruct",
        "PIL.Image\nImage",
        "builtins\nset",
    ],
)
def test_no_pickle_changes_what_the_next_one_gets(tmp_path, name):
    for attribute in ("_call", "__call__", "__new__", "__init__", "__setstate__", "dtype"):
        for state in ({attribute: 1}, (None, {attribute: 1})):
            state = pickle.dumps(state, 2)[2:-1]
            with pytest.raises(TripletError):
                _load(tmp_path, b"\x80\x02c" + name.encode() + b"\n" + state + b"b.")
    value = [*VALUE.values(), Image.new("L", (2, 2)), {1}]
    assert len(_load(tmp_path, pickle.dumps(value, 2))) == len(value)


# ---------------------------------------------------------------------------- memory, damaged files


def _measure_memory(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    path = _write(tmp_path, bytes(50_000_000))

    def load():
        with pytest.raises(TripletError, match="larger than 100000 bytes when decompressed"):
            load_compressed_pickle(path, 100_000)

    assert _measure_memory(load) < 3_000_000


def test_no_more_of_a_file_is_read_than_is_allowed(tmp_path):
    path = tmp_path / "large.p.zl"
    path.write_bytes(zlib.compress(bytes(10_000_000), 0))

    def load():
        with pytest.raises(TripletError, match="larger than 100000 bytes"):
            load_compressed_pickle(path, 100_000)

    assert _measure_memory(load) < 3_000_000


def test_the_limit_itself_is_allowed(tmp_path):
    data = pickle.dumps(bytes(5000))
    assert _load(tmp_path, data, len(data)) == bytes(5000)
    with pytest.raises(TripletError, match="larger than"):
        _load(tmp_path, data, len(data) - 1)


def test_a_picture_is_not_made_larger_than_its_bytes(tmp_path):
    data = pickle.dumps(Image.new("L", (3, 3), 65), 4)
    assert np.array_equal(_load(tmp_path, data), np.full((3, 3), 65))
    wide = data.replace(b"K\x03K\x03", b"M\x10\x27M\x10\x27")  # 10000 x 10000
    wide = wide[:2] + wide[11:]  # without the frame, whose length has changed
    with pytest.raises(TripletError, match="has 9 bytes for an image of 10000x10000 px"):
        _load(tmp_path, wide)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02]r" + struct.pack("<I", 5_000_000) + b".",  # a place in the memo
        b"\x80\x02]p5000000\n.",
        b"\x80\x02cnumpy\nndarray\nJ\x00\xe1\xf5\x05\x85R.",  # numpy.ndarray(100000000)
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nJ\x00\xe1\xf5\x05\x85U\x01b"
        b"\x87R.",
        b"\x80\x02cbuiltins\nbytes\nJ\x00\xe1\xf5\x05\x85R.",
    ],
    ids=["memo", "memo as text", "array", "reconstruct", "bytes"],
)
def test_a_small_pickle_takes_no_large_memory(tmp_path, data):
    def load():
        with pytest.raises(TripletError):
            _load(tmp_path, data)

    assert _measure_memory(load) < 3_000_000


TWICE = b"2\x86"  # a pair of what is on top of the stack: its hash, or its text, doubles


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02})" + TWICE * 50 + b"Ns.",  # the hash of a key
        b"\x80\x02})" + b"\x85" * 150_000 + b"Ns.",  # and its depth
        b"\x80\x02}()" + TWICE * 50 + b"Nu.",
        b"\x80\x02()" + TWICE * 50 + b"Nd.",
        b"\x80\x04\x8f()" + TWICE * 50 + b"\x90.",
        b"\x80\x04()" + TWICE * 50 + b"\x91.",
        b"\x80\x02cbuiltins\nset\n])" + TWICE * 50 + b"a\x85R.",
        b"\x80\x02cbuiltins\nfrozenset\n])" + TWICE * 50 + b"a\x85\x81.",
        b"\x80\x02cnumpy\ndtype\n)" + TWICE * 50 + b"\x85R.",  # its text, in a message
        b"\x80\x02c_codecs\nencode\nX\x01\0\0\0b)" + TWICE * 50 + b"\x86R.",
        b"\x80\x02cPIL.Image\nImage\n)\x81(N)" + TWICE * 50 + b"K\x01K\x01\x86NNtb.",
    ],
    ids=[
        *("key", "depth", "keys", "table", "member", "frozen", "set", "new frozenset", "type"),
        *("codec", "mode"),
    ],
)
def test_a_value_whose_hash_or_text_never_ends_is_refused_at_once(tmp_path, data):
    with pytest.raises(TripletError):
        _load(tmp_path, data)


def _copy(call, count):
    """A call whose result is made `count` times of one text of a megabyte."""
    text = b"X" + struct.pack("<I", 2**20) + b"a" * 2**20 + b"q\x010"
    return b"\x80\x02" + text + b"]" + call * count + b"."


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04(" + b"\x8f" * 1_000_000 + b"l.",  # sets that are empty
        b"\x80\x02(" + b"]" * 1_000_000 + b"l.",
        _copy(b"c_codecs\nencode\nh\x01X\x06\0\0\0latin1\x86Ra", 200),
    ],
    ids=["sets", "lists", "copies"],
)
def test_a_pickle_makes_no_more_than_its_bytes_account_for(tmp_path, data):
    def load():
        with pytest.raises(TripletError, match="is refused"):
            _load(tmp_path, data, 10_000_000)

    assert _measure_memory(load) < 60_000_000
    assert len(zlib.compress(data)) < 10_000


def test_a_web_page_in_the_place_of_a_pickle_is_called_so(tmp_path):
    (tmp_path / "x.p.zl").write_bytes(b"<!doctype html><html>Sign in</html>")
    with pytest.raises(TripletError, match=r"x\.p\.zl is a web page"):
        load_compressed_pickle(tmp_path / "x.p.zl", LIMIT)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:3],
        lambda data: b"",
        lambda data: b"no zlib at all",
        lambda data: data[5:],
        lambda data: zlib.compress(zlib.decompress(data)[:-40]),
        lambda data: zlib.compress(b""),
        lambda data: zlib.compress(b"{}"),
        lambda data: zlib.compress(zlib.decompress(data).replace(b"K\x03K\x04", b"K\x03K\x05", 1)),
    ],
    ids=[
        "half",
        "last byte",
        "head",
        "empty",
        "text",
        "tail",
        "cut pickle",
        "no pickle",
        "JSON",
        "wrong shape",
    ],
)
def test_damaged_files_are_named(tmp_path, change):
    path = _write(tmp_path, pickle.dumps(VALUE))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(TripletError, match=r"附 件\.p\.zl") as caught:
        load_compressed_pickle(path, LIMIT)
    assert caught.value.file == path


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(TripletError, match="gone.p.zl does not exist"):
        load_compressed_pickle(tmp_path / "gone.p.zl", LIMIT)
    with pytest.raises(TripletError, match="cannot be read"):
        load_compressed_pickle(tmp_path, LIMIT)
