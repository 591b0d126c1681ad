import errno
import gzip
import io
import os
import signal
import stat
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile

import numpy as np
import pytest

from rorem_lib.data import archives
from rorem_lib.data.archives import (
    ArchiveError,
    archive_stem,
    extract_archive,
    find_archives,
    list_parts,
)

DATA = np.random.default_rng(0).bytes(300_000)
FILES = {"集 合/source/a.png": DATA, "集 合/meta.json": b"[]", "empty": b""}


def _make_tar(path, files=FILES, mode="w:gz", extra=()):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o4777
            archive.addfile(member, io.BytesIO(data))
        for member in extra:
            archive.addfile(member)
    return path


def _make_zip(path, files=FILES):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def _read_tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != archives.MARKER
    }


def _assert_nothing_left(tmp_path, *names):
    assert sorted(os.listdir(tmp_path)) == sorted(names)


# ------------------------------------------------------------------------------ what is unpacked


@pytest.mark.parametrize(
    "name, make",
    [
        ("x.tar", lambda p: _make_tar(p, mode="w")),
        ("x.tar.gz", _make_tar),
        ("x.tar.bz2", lambda p: _make_tar(p, mode="w:bz2")),
        ("x.txz", lambda p: _make_tar(p, mode="w:xz")),
        ("x.zip", _make_zip),
        ("no ending", _make_tar),
    ],
)
def test_archives_are_unpacked_byte_by_byte(tmp_path, name, make):
    folder = extract_archive(make(tmp_path / name), tmp_path / "deep" / "out")
    assert _read_tree(folder) == FILES
    assert not stat.S_IMODE((folder / "empty").stat().st_mode) & 0o6111
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_folders_without_files_and_dotted_names_are_kept(tmp_path):
    member = tarfile.TarInfo("./a/.b/..c")
    member.type = tarfile.DIRTYPE
    folder = extract_archive(
        _make_tar(tmp_path / "x.tar", extra=[member], mode="w"), tmp_path / "out"
    )
    assert (folder / "a" / ".b" / "..c").is_dir()


def test_names_in_zip_files_that_do_not_say_their_encoding(tmp_path):
    path = _make_zip(tmp_path / "x.zip", {"AAA.txt": b"1", "B.txt": b"2"})
    raw = path.read_bytes().replace(b"AAA.txt", "图.txt".encode()).replace(b"B.txt", b"\x82.txt")
    path.write_bytes(raw)
    with zipfile.ZipFile(path) as archive:
        assert not any(member.flag_bits & 0x800 for member in archive.infolist())
    assert _read_tree(extract_archive(path, tmp_path / "out")) == {"图.txt": b"1", "é.txt": b"2"}


@pytest.mark.parametrize(
    "suffixes",
    [
        [".part01", ".part02", ".part03"],
        [".001", ".002", ".003"],
        [".aa", ".ab", ".ac"],
        [".part-aa", ".part-ab", ".part-ac"],
        ["aa", "ab", "ac"],
        [".0", ".1", ".2"],
    ],
)
@pytest.mark.parametrize("name, make", [("x.tar.gz", _make_tar), ("x.zip", _make_zip)])
def test_split_archives_are_read_as_one(tmp_path, name, make, suffixes):
    data = make(tmp_path / "whole").read_bytes()
    (tmp_path / "whole").unlink()
    for number, suffix in enumerate(suffixes):
        (tmp_path / (name + suffix)).write_bytes(data[number * 120_000 :][:120_000])
    (first,) = find_archives(tmp_path)
    assert first.name == name + suffixes[0]
    assert archive_stem(first.name) == "x"
    middle = tmp_path / (name + suffixes[1])
    assert _read_tree(extract_archive(middle, tmp_path / "out")) == FILES
    middle.unlink()
    with pytest.raises(ArchiveError, match=rf"{name}.*{suffixes[2]}"):
        list_parts(first)


def test_an_archive_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ArchiveError, match="gone.zip"):
        extract_archive(tmp_path / "gone.zip", tmp_path / "out")


def test_more_than_nine_parts_are_in_the_order_of_their_numbers(tmp_path):
    for number in range(1, 12):
        (tmp_path / f"x.tar.part{number}").write_bytes(b"%d" % number)
    assert [p.read_bytes() for p in list_parts(tmp_path / "x.tar.part3")] == [
        b"%d" % n for n in range(1, 12)
    ]


def test_archives_are_found_by_their_names(tmp_path):
    for name in (
        "b/x.tar.gz",
        "a.zip",
        "c.7z",
        "d.part1.rar",
        "train.parquet",
        "e.tar.png",
        "README.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [p.name for p in find_archives(tmp_path)] == ["a.zip", "x.tar.gz", "c.7z", "d.part1.rar"]


def test_progress_reaches_the_archives_size(tmp_path):
    seen = []
    path = _make_tar(tmp_path / "x.tar", mode="w")
    extract_archive(path, tmp_path / "out", progress=lambda *numbers: seen.append(numbers))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {path.stat().st_size}
    assert 300_000 <= seen[-1][0] <= path.stat().st_size


# --------------------------------------------------------------------------------- once, or anew


def test_an_archive_is_unpacked_once_and_again_when_it_changed(tmp_path):
    path = _make_tar(tmp_path / "x.tar.gz")
    folder = extract_archive(path, tmp_path / "out")
    (folder / "empty").write_bytes(b"mine")
    assert (extract_archive(path, folder) / "empty").read_bytes() == b"mine"
    _make_tar(path, {"new": b"1"})
    assert _read_tree(extract_archive(path, folder)) == {"new": b"1"}


def test_a_folder_with_something_else_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_bytes(b"1")
    with pytest.raises(ArchiveError, match="out holds something .*choose another folder"):
        extract_archive(_make_tar(tmp_path / "x.tar.gz"), tmp_path / "out")
    assert _read_tree(tmp_path / "out") == {"mine": b"1"}


def test_killed_halfway_it_starts_again(tmp_path):
    _make_tar(tmp_path / "x.tar", {f"{n:03}": DATA for n in range(200)}, mode="w")
    code = f"""
        import time
        from rorem_lib.data.archives import extract_archive
        extract_archive({str(tmp_path / "x.tar")!r}, {str(tmp_path / "out")!r},
                        progress=lambda done, total: time.sleep(.02))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    while not (tmp_path / ".out.partial" / "010").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    (tmp_path / ".out.partial" / "torn").write_bytes(b"")
    folder = extract_archive(tmp_path / "x.tar", tmp_path / "out")
    assert _read_tree(folder) == {f"{n:03}": DATA for n in range(200)}
    _assert_nothing_left(tmp_path, "x.tar", "out")


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "C:/evil", "a\\..\\evil"])
@pytest.mark.parametrize("make", [_make_tar, _make_zip])
def test_no_member_leaves_the_folder(tmp_path, name, make):
    path = make(tmp_path / "x", {"good": b"1", name: b"2"})
    with pytest.raises(ArchiveError, match="x is refused: its member .*evil.* leaves the folder"):
        extract_archive(path, tmp_path / "out")
    _assert_nothing_left(tmp_path, "x")


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE]
)
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    member = tarfile.TarInfo("thing")
    member.type, member.linkname = kind, "empty"
    with pytest.raises(ArchiveError, match="'thing'.*--hard-dereference"):
        extract_archive(_make_tar(tmp_path / "x", extra=[member]), tmp_path / "out")
    _assert_nothing_left(tmp_path, "x")


@pytest.mark.parametrize("make", [_make_tar, _make_zip])
@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a")])
def test_a_member_that_is_a_file_and_a_folder_is_refused(tmp_path, make, names):
    path = make(tmp_path / "x", dict.fromkeys(names, b"text"))
    with pytest.raises(ArchiveError, match="is a file in it and a folder too"):
        extract_archive(path, tmp_path / "out")
    _assert_nothing_left(tmp_path, "x")


def test_links_in_a_zip_are_refused(tmp_path):
    info = zipfile.ZipInfo("thing")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ArchiveError, match="'thing' is a link"):
        extract_archive(tmp_path / "x.zip", tmp_path / "out")
    _assert_nothing_left(tmp_path, "x.zip")


@pytest.mark.parametrize("make", [_make_tar, _make_zip])
@pytest.mark.parametrize(
    "limit, words", [({"max_bytes": 300_001}, "max_bytes"), ({"max_members": 2}, "max_members")]
)
def test_limits_hold_for_what_is_written(tmp_path, make, limit, words):
    path = make(tmp_path / "x")
    with pytest.raises(ArchiveError, match=words):
        extract_archive(path, tmp_path / "out", **limit)
    _assert_nothing_left(tmp_path, "x")
    extract_archive(path, tmp_path / "out", max_bytes=300_002, max_members=3)


@pytest.mark.parametrize("make", [_make_tar, _make_zip])
def test_a_small_archive_does_not_become_a_large_folder(tmp_path, monkeypatch, make):
    monkeypatch.setattr(archives, "_SMALL", 100_000)
    path = make(tmp_path / "x", {"zeros": bytes(2_000_000)})
    assert 2_000_000 > 100 * path.stat().st_size
    with pytest.raises(ArchiveError, match="ROREM_MAX_ARCHIVE_RATIO"):
        extract_archive(path, tmp_path / "out")
    _assert_nothing_left(tmp_path, "x")
    extract_archive(path, tmp_path / "out", max_ratio=1e6)
    monkeypatch.setenv("ROREM_MAX_ARCHIVE_RATIO", "1e6")
    extract_archive(path, tmp_path / "again")


def _add_header(kind, data):
    member = tarfile.TarInfo("h")
    member.type, member.size = kind, len(data)
    return member.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    "data, words",
    [
        (_add_header(b"x", b"1" * 1_000_000), "16 kB"),
        (_add_header(b"x", b"30 mtime=1700000000.123456\n\n\n\n") * 2000, "8 headers"),
        (_add_header(b"L", b"name") * 2000, "8 headers"),
        (_add_header(b"S", b""), "--sparse"),
        (_add_header(b"x", b"24 GNU.sparse.size=9999\n26 GNU.sparse.realsize=9\n"), "--sparse"),
    ],
    ids=["digits", "pax", "names", "sparse", "pax sparse"],
)
def test_headers_that_take_hours_are_refused_at_once(tmp_path, data, words):
    sound = _make_tar(tmp_path / "sound", mode="w").read_bytes()
    (tmp_path / "sound").unlink()
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(data + sound))
    began = time.monotonic()
    with pytest.raises(ArchiveError, match=rf"x\.tar\.gz.*{words}"):
        extract_archive(tmp_path / "x.tar.gz", tmp_path / "out")
    assert time.monotonic() - began < 5
    _assert_nothing_left(tmp_path, "x.tar.gz")


def test_slow_headers_end_the_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_SLOW", (-1.0, 0.0))
    with pytest.raises(ArchiveError, match="headers that take"):
        extract_archive(_make_tar(tmp_path / "x.tar"), tmp_path / "out")
    _assert_nothing_left(tmp_path, "x.tar")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"<html><title>Google Drive - Virus scan warning</title>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_what_is_no_archive_is_called_what_it_is(tmp_path, content, words):
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(ArchiveError, match=rf"x\.zip is no archive but .*{words}"):
        extract_archive(tmp_path / "x.zip", tmp_path / "out")


def test_a_zip_that_lies_about_its_sizes_is_stopped(tmp_path):
    path = _make_zip(tmp_path / "x.zip", {"zeros": bytes(10_000_000)})
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\x01\x02")
    raw[at + 24 : at + 28] = (100).to_bytes(4, "little")  # the size that the directory names
    path.write_bytes(raw)
    with pytest.raises(ArchiveError):
        extract_archive(path, tmp_path / "out", max_bytes=1000)
    _assert_nothing_left(tmp_path, "x.zip")


def _cut_at_a_member(path):
    """A plain tar without its last member and its end: each header that is left is sound."""
    with tarfile.open(path) as archive:
        return path.read_bytes()[: archive.getmembers()[-1].offset]


def _damage_header(path):
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[1].offset
    raw = bytearray(path.read_bytes())
    raw[offset + 5] ^= 255
    return bytes(raw)


@pytest.mark.parametrize(
    "mode, spoil",
    [
        ("w:gz", lambda p: p.read_bytes()[:200_000]),
        ("w:gz", lambda p: p.read_bytes()[:-4]),
        ("w:bz2", lambda p: p.read_bytes()[:200_000]),
        ("w:xz", lambda p: p.read_bytes()[:200_000]),
        ("w", lambda p: p.read_bytes()[:200_000]),
        ("w", _cut_at_a_member),
        ("w", _damage_header),
        ("w", lambda p: b"no archive at all"),
        ("w", lambda p: b""),
        ("w:gz", lambda p: gzip.compress(gzip.decompress(p.read_bytes()))[:-8] + b"12345678"),
    ],
    ids=[
        "gz",
        "gz end",
        "bz2",
        "xz",
        "tar",
        "tar between members",
        "tar header",
        "text",
        "empty",
        "gz checksum",
    ],
)
def test_damaged_tars_are_named_and_leave_nothing(tmp_path, mode, spoil):
    path = _make_tar(tmp_path / "x.tar", mode=mode)
    path.write_bytes(spoil(path))
    with pytest.raises(ArchiveError, match=r"x\.tar"):
        extract_archive(path, tmp_path / "out")
    _assert_nothing_left(tmp_path, "x.tar")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw[:200_000],
        lambda raw: raw[:1000] + bytes(50) + raw[1050:],
    ],
    ids=["cut", "content"],
)
def test_damaged_zips_are_named_and_leave_nothing(tmp_path, spoil):
    path = _make_zip(tmp_path / "x.zip")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ArchiveError, match=r"x\.zip"):
        extract_archive(path, tmp_path / "out")
    _assert_nothing_left(tmp_path, "x.zip")


def test_a_zip_with_a_password_is_to_be_unpacked_by_hand(tmp_path):
    path = _make_zip(tmp_path / "x.zip", {"a": b"1"})
    raw = bytearray(path.read_bytes())
    for magic, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(magic) + place] |= 1
    path.write_bytes(raw)
    with pytest.raises(ArchiveError, match="'a'"):
        extract_archive(path, tmp_path / "out")


@pytest.mark.parametrize(
    "head, words",
    [
        (b"Rar!\x1a\x07\x00", "rar archive.*unrar x x.bin"),
        (b"\x28\xb5\x2f\xfd", "zstd.*tar --zstd -xf x.bin"),
        (b"7z\xbc\xaf\x27\x1c", "7z archive.*7z x x.bin"),
    ],
)
def test_other_kinds_are_named_with_what_to_do(tmp_path, head, words):
    (tmp_path / "x.bin").write_bytes(head + bytes(100))
    with pytest.raises(ArchiveError, match=words):
        extract_archive(tmp_path / "x.bin", tmp_path / "out")
    _assert_nothing_left(tmp_path, "x.bin")


def test_a_name_of_a_megabyte_is_refused_before_it_is_read(tmp_path):
    member = tarfile.TarInfo("x" * 2_000_000)
    path = _make_tar(tmp_path / "x.tar.gz", extra=[member])
    with pytest.raises(ArchiveError, match=r"x\.tar\.gz.*1 MB"):
        extract_archive(path, tmp_path / "out")
    _assert_nothing_left(tmp_path, "x.tar.gz")


def test_names_in_a_tar_that_are_no_utf_8_are_kept_readable(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT, encoding="cp437") as tar:
        tar.addfile(tarfile.TarInfo("é.txt"))
    assert _read_tree(extract_archive(tmp_path / "x.tar", tmp_path / "out")) == {"\ufffd.txt": b""}


@pytest.mark.parametrize("make", [_make_tar, _make_zip])
def test_a_full_disk_names_the_archive_and_leaves_nothing(tmp_path, monkeypatch, make):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = make(tmp_path / "x")
    monkeypatch.setattr(tarfile.TarFile, "makefile", fail)
    monkeypatch.setattr(zipfile.ZipFile, "extract", fail)
    with pytest.raises(OSError, match=r"cannot unpack .*x into .*out: No space") as caught:
        extract_archive(path, tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    _assert_nothing_left(tmp_path, "x")
