"""Archives: unpack what datasets come in, safely, and all of it or nothing.

An archive comes from the network. So no member may leave the folder or be anything but a file or a
folder, what is written is counted as it is written (headers lie), and modes are ignored. Split
archives (`x.tar.gz.part01`, `x.zip.001`, `x.tar.aa`) are read as one stream, without a joined copy.
"""

from __future__ import annotations

import importlib
import io
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from rorem_lib.data.pictures import AGAIN
from rorem_lib.files import read_json, write_json

MARKER = ".extracted.json"  # in the folder: which archive it was unpacked from
_NAME = re.compile(
    r"(?P<stem>.+?)\.(?:tar(?:\.(?:gz|bz2?|xz|lzma|zst))?|tgz|tbz2?|txz|zip|7z|rar)"
    r"(?:[._-]?(?:part[._-]?)?(?P<part>\d{1,4}|[a-d][a-z]))?",
    re.IGNORECASE,
)
_BY_HAND = {
    b"Rar!\x1a\x07": "a rar archive: unpack it by hand, `unrar x {0}` or `7z x {0}`",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it by hand, `tar --zstd -xf {0}`",
}
_CHUNK = 1 << 20


class ArchiveError(ValueError):
    """An archive is damaged, unsafe, too large or of an unknown kind; the message names it."""


def archive_stem(name: str) -> str | None:
    """An archive's name without its endings, None if it is not named like an archive."""
    found = _NAME.fullmatch(name)
    return found["stem"] if found else None


def list_parts(path: str | Path) -> list[Path]:
    """The files of a split archive, in order, from any one of them; else the file alone.

    Raises:
        ArchiveError: it is not there, or a part between or before others is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ArchiveError(f"there is no archive {path}: download it, or give its right path")
    found = _NAME.fullmatch(path.name)
    if not found or not found["part"]:
        return [path]
    head, width = path.name[: found.start("part")], len(found["part"])
    parts = {}
    for other in path.parent.iterdir():
        suffix = other.name[len(head) :].lower()
        if other.name.startswith(head) and (
            suffix.isdigit() or len(suffix) == width == 2 and suffix.isalpha()
        ):
            number = int(suffix) if suffix.isdigit() else 26 * ord(suffix[0]) + ord(suffix[1])
            parts[number] = other
    numbers = sorted(parts)
    first = numbers[0] if numbers and numbers[0] in (0, 1, 27 * ord("a")) else 1
    for number in range(first, first + len(numbers)):
        if number not in parts:
            raise ArchiveError(
                f"a part of {path.parent / head}... is missing before "
                f"{parts[numbers[-1]].name} (of {len(numbers)} here): download it"
            )
    return [parts[number] for number in numbers]


def find_archives(folder: str | Path) -> list[Path]:
    """Every archive below a folder, in order; of a split one the first part."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        match = _NAME.fullmatch(path.name)
        if match and path.is_file():
            found.setdefault(str(path).removesuffix(match["part"] or ""), path)
    return list(found.values())


def extract_archive(
    path: str | Path,
    folder: str | Path,
    *,
    max_bytes: int = 2 * 10**12,
    max_members: int = 5_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Unpack an archive into a folder of its own, once.

    It is unpacked beside, into `.<folder>.partial`, and renamed: the folder is there whole or not
    at all, and what a kill has left is thrown away. A folder that this archive was unpacked into
    is left as it is; one of another state of the archive is replaced.

    Args:
        path: tar (plain, gz, bz2, xz), zip or 7z (needs py7zr); any part of a split one.
        folder: made here.
        max_bytes: most bytes that may be written.
        max_members: most files and folders.
        progress: called with (bytes of the archive read, its size).

    Returns:
        `folder`.

    Raises:
        ArchiveError: damaged or truncated, a member that leaves the folder or is a link or a
            device, over a limit, a kind that is to be unpacked by hand, or `folder` holds
            something else.
        OSError: the disk is full or refuses; nothing is left.
    """
    path, folder = Path(path), Path(folder)
    parts = list_parts(path)
    state = {"archive": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in parts]}
    old = read_json(folder / MARKER) if (folder / MARKER).is_file() else None
    if old == state:
        return folder
    if old is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArchiveError(
            f"{folder} holds something that was not unpacked from {path.name}: "
            "choose another folder, or move it away"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with io.BufferedReader(_Parts(parts), _CHUNK) as stream:
            _unpack(path, stream, _Output(partial, path, stream, max_bytes, max_members, progress))
        write_json(partial / MARKER, state)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(partial, folder)
    except ArchiveError:
        raise
    except OSError as error:
        if error.errno is None:  # a decompressor's word, not the disk's
            raise _damaged(path, error) from error
        raise OSError(
            error.errno,
            f"cannot unpack {path} into {folder}: {error.strerror}; make "
            "room or choose another folder, nothing is left there",
        ) from error
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise _damaged(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _damaged(path: Path, error: Exception) -> ArchiveError:
    why = str(error).split("\n")[0]
    return ArchiveError(f"{path} is truncated, damaged or no archive ({why}): {AGAIN}")


class _Parts(io.RawIOBase):
    """Several files as one, to read and to seek in."""

    def __init__(self, paths: list[Path]):
        self._paths, self._sizes = paths, [path.stat().st_size for path in paths]
        self._at, self._open = 0, (None, None)

    def readable(self):
        return True

    seekable = readable

    def seek(self, offset, whence=io.SEEK_SET):
        start = (0, self._at, sum(self._sizes))[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer):
        number, offset = 0, self._at
        while number < len(self._sizes) and offset >= self._sizes[number]:
            offset -= self._sizes[number]
            number += 1
        if number == len(self._sizes):
            return 0
        if self._open[0] != number:
            self._close_part()
            self._open = number, open(self._paths[number], "rb")
        self._open[1].seek(offset)
        count = self._open[1].readinto(memoryview(buffer)[: self._sizes[number] - offset])
        self._at += count
        return count

    def _close_part(self):
        if self._open[1]:
            self._open[1].close()

    def close(self):
        self._close_part()
        super().close()


class _Output:
    """Where members go: refuses names that leave the folder, counts members and bytes."""

    def __init__(self, folder, archive, stream, max_bytes, max_members, progress):
        self.folder, self.archive, self.stream = folder, archive, stream
        self.bytes_left, self.members_left = max_bytes, max_members
        self.total = stream.seek(0, io.SEEK_END)
        self.progress = progress or (lambda done, total: None)
        stream.seek(0)

    def refuse(self, name: str, why: str) -> ArchiveError:
        return ArchiveError(f"{self.archive} is refused: its member {name!r} {why}")

    def check_name(self, name: str) -> list[str]:
        parts = name.split("/")
        if name.startswith("/") or ".." in parts or re.search(r"[\\\0]|^[A-Za-z]:", name):
            raise self.refuse(name, "leaves the folder, or would on another system")
        return [part for part in parts if part not in ("", ".")]

    def _place(self, name: str) -> Path:
        self.members_left -= 1
        if self.members_left < 0:
            raise ArchiveError(
                f"{self.archive} is refused: more members than max_members allows; "
                "raise it if this is expected"
            )
        return self.folder.joinpath(*self.check_name(name))

    def make_folder(self, name: str) -> None:
        self._place(name).mkdir(parents=True, exist_ok=True)

    def place_file(self, name: str) -> Path:
        place = self._place(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def count(self, size: int) -> None:
        self.bytes_left -= size
        if self.bytes_left < 0:
            raise ArchiveError(
                f"{self.archive} is refused: it unpacks to more than max_bytes "
                "allows; raise it if this is expected"
            )
        self.progress(min(self.stream.tell(), self.total), self.total)

    def write(self, name: str, content) -> None:
        with open(self.place_file(name), "wb") as target:
            while data := content.read(_CHUNK):
                self.count(len(data))
                target.write(data)


def _unpack(path: Path, stream, output: _Output) -> None:
    head = stream.peek(8)[:8]
    for magic, advice in _BY_HAND.items():
        if head.startswith(magic):
            raise ArchiveError(f"{path} is {advice.format(path.name)}, then give the folder")
    if head.startswith(b"7z\xbc\xaf\x27\x1c"):
        _unpack_7z(stream, output)
    elif head.startswith(b"PK"):
        _unpack_zip(stream, output)
    else:
        _unpack_tar(stream, output)


class _Member(tarfile.TarInfo):
    """A tar member that does not take a damaged header for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None

    def _proc_member(self, archive):
        if self.type in (b"L", b"K", b"x", b"g", b"X") and self.size > _CHUNK:
            raise tarfile.ReadError("a name of more than 1 MB")  # it would be read at once
        return super()._proc_member(archive)


def _unpack_tar(stream, output: _Output) -> None:
    with tarfile.open(
        fileobj=stream, mode="r:*", tarinfo=_Member, encoding="utf-8", errors="replace"
    ) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # or the memory would hold them all
            if member.isdir():
                output.make_folder(member.name)
            elif member.isreg():
                output.write(member.name, archive.extractfile(member))
            else:
                raise output.refuse(
                    member.name,
                    "is a link or a device; pack it again with "
                    "`tar --dereference --hard-dereference`",
                )
        while archive.fileobj.read(_CHUNK):  # checksums stand at the end
            pass


def _unpack_zip(stream, output: _Output) -> None:
    with zipfile.ZipFile(stream) as archive:
        for member in archive.infolist():
            name = member.orig_filename
            if not member.flag_bits & 0x800:  # no word on the encoding: UTF-8 if it is some
                try:
                    name = name.encode("cp437").decode()
                except UnicodeError:
                    pass
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise output.refuse(name, "is a link or a device")
            if name.endswith("/"):
                output.make_folder(name)
                continue
            try:
                with archive.open(member) as content:
                    output.write(name, content)
            except (NotImplementedError, RuntimeError) as error:
                raise output.refuse(name, f"cannot be read ({error}): unpack it by hand") from None


def _unpack_7z(stream, output: _Output) -> None:
    try:
        py7zr = importlib.import_module("py7zr")
    except ImportError:
        raise ArchiveError(
            f"{output.archive} is a 7z archive: `pip install py7zr`, or unpack it "
            f"by hand, `7z x {output.archive.name}`, and give the folder"
        ) from None

    class File(io.FileIO):
        def write(self, data):
            output.count(len(data))
            return super().write(data)

        def size(self):
            return self.tell()

    class Files(py7zr.WriterFactory):
        def create(self, filename):
            return File(output.place_file(filename), "wb")

    try:
        with py7zr.SevenZipFile(stream) as archive:
            for member in archive.files:
                output.check_name(member.filename)  # the library mends bad names silently
                if member.is_symlink or member.is_socket or member.is_junction:
                    raise output.refuse(member.filename, "is a link or a device")
                if member.is_directory:
                    output.make_folder(member.filename)
            archive.extractall(factory=Files())
    except (ArchiveError, OSError):
        raise
    except Exception as error:  # the library has many kinds
        raise _damaged(output.archive, error) from error
