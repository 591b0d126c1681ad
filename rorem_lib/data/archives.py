"""Archives: unpack what datasets come in, safely, and all of it or nothing.

`tarfile` (with its data filter) and `zipfile` extract. What they lack is here: an archive comes
from the network, so names that leave the folder, links and devices are refused and not mended,
members and bytes are limited, and a tar that ends too early or has a damaged header is an error.
Split archives (`x.tar.gz.part01`, `x.zip.001`, `x.tar.aa`) are read as one stream, without a joined
copy; a folder is unpacked whole or not at all, and once.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import io
import itertools
import lzma
import re
import shutil
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rorem_lib.data.pictures import AGAIN, describe_content
from rorem_lib.files import flush_disk, read_json, read_limit, replace_folder, write_json

MARKER = ".extracted.json"  # in the folder: which archive it was unpacked from
_NAME = re.compile(
    r"(?P<stem>.+?)\.(?:tar(?:\.(?:gz|bz2?|xz|lzma|zst))?|tgz|tbz2?|txz|zip|7z|rar)"
    r"(?:[._-]?(?:part[._-]?)?(?P<part>\d{1,4}|[a-d][a-z]))?",
    re.IGNORECASE,
)
_BY_HAND = {
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it by hand, `7z x {0}` (p7zip)",
    b"Rar!\x1a\x07": "a rar archive: unpack it by hand, `unrar x {0}` or `7z x {0}`",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it by hand, `tar --zstd -xf {0}`",
}
_CHUNK = 1 << 20
_SMALL = 10**9  # bytes that an archive may write however small it is
_MOST_HEADER = 1 << 14  # bytes of what a tar says of one member beside its name
_SLOW = 30.0, 0.02  # seconds for all headers of a tar, and for each: a few bytes can take hours
_FILTER = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Debian 12 has 3.11.2


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
    max_ratio: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Unpack an archive into a folder of its own, once.

    It is unpacked beside, into `.<folder>.partial`, and renamed: the folder is there whole or not
    at all, and what a kill has left is thrown away. A folder that this archive was unpacked into
    is left as it is; one of another state of the archive is replaced.

    Args:
        path: tar (plain, gz, bz2, xz) or zip; any part of a split one.
        folder: made here.
        max_bytes: most bytes that may be written.
        max_members: most files and folders.
        max_ratio: most bytes written, beyond 1 GB, for each of the archive's; by default
            `ROREM_MAX_ARCHIVE_RATIO` (100): images hardly compress, tables and labels do.
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
    max_ratio = max_ratio or read_limit("ROREM_MAX_ARCHIVE_RATIO", 100)
    allowed = max(_SMALL, max_ratio * sum(part.stat().st_size for part in parts))
    limits = {
        "max_members": max_members,
        "max_bytes": max_bytes,
        "ROREM_MAX_ARCHIVE_RATIO": allowed,
    }
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
            _unpack(path, stream, partial, limits, progress)
        flush_disk(partial)
        write_json(partial / MARKER, state)
        replace_folder(partial, folder)
    except ArchiveError:
        raise
    except _Refused as error:
        raise ArchiveError(f"{path} is refused: it has {error}") from None
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
    with open(path, "rb") as stream:
        if what := describe_content(stream.read(512)):
            return ArchiveError(f"{path} is no archive but {what}")
    why = str(error).split("\n")[0]
    return ArchiveError(f"{path} is truncated, damaged or no archive ({why}): {AGAIN}")


class _Refused(Exception):
    """A tar has what none needs; tarfile takes no other error for a file of another kind."""


class _Parts(io.RawIOBase):
    """Several files as one, to read and to seek in."""

    def __init__(self, paths: list[Path]):
        self._paths, self._place = paths, 0
        self._ends = list(itertools.accumulate(path.stat().st_size for path in paths))

    def readable(self):
        return True

    seekable = readable

    def seek(self, offset, whence=io.SEEK_SET):
        self._place = max(0, offset + (0, self._place, self._ends[-1])[whence])
        return self._place

    def readinto(self, buffer):
        number = bisect.bisect_right(self._ends, self._place)
        if number == len(self._ends):
            return 0
        left = self._ends[number] - self._place
        with open(self._paths[number], "rb") as file:
            file.seek(-left, io.SEEK_END)
            count = file.readinto(memoryview(buffer)[:left])
        self._place += count
        return count


def _unpack(path: Path, stream, folder: Path, limits: dict[str, float], progress) -> None:
    head = stream.peek(8)[:8]
    for magic, advice in _BY_HAND.items():
        if head.startswith(magic):
            raise ArchiveError(f"{path} is {advice.format(path.name)}, then give the folder")
    total, written, count = stream.seek(0, io.SEEK_END), 0, 0
    stream.seek(0)
    members = _read_zip if head.startswith(b"PK") else _read_tar
    for name, is_plain, size, extract in members(stream, folder):
        refused = f"{path} is refused: its member {name!r}"
        if re.search(r"^/|(^|/)\.\.(/|$)|[\\\0]|^[A-Za-z]:", name):
            raise ArchiveError(f"{refused} leaves the folder, or would on another system")
        if not is_plain:
            raise ArchiveError(
                f"{refused} is a link or a device; pack a tar again with "
                "`tar --dereference --hard-dereference`"
            )
        # Neither library writes more of a member than the size that its header names.
        written, count = written + size, count + 1
        for limit, most in limits.items():
            if (count if limit == "max_members" else written) > most:
                raise ArchiveError(
                    f"{path} is refused: it holds more than {limit} allows ({most:,.0f}); raise it "
                    "if this is expected"
                )
        try:
            extract()
        except (FileExistsError, IsADirectoryError, NotADirectoryError):
            raise ArchiveError(f"{refused} is a file in it and a folder too") from None
        except (NotImplementedError, RuntimeError) as error:  # a password, an unknown method
            raise ArchiveError(f"{refused} cannot be read ({error}): unpack it by hand") from None
        if progress:
            progress(min(stream.tell(), total), total)


class _Member(tarfile.TarInfo):
    """A tar member that does not take a damaged header for the archive's end.

    What comes before a member (long names, and pax headers, which Python parses in time that grows
    with the square of their length) is limited.
    """

    before = 0  # such headers since the last member; each archive has a class of its own

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        if member.type in (b"L", b"K", b"x", b"g", b"X"):
            cls.before += 1
            if member.size > _CHUNK:
                raise _Refused("a name of more than 1 MB")  # it would be read at once
            if member.type not in (b"L", b"K") and member.size > _MOST_HEADER:
                raise _Refused("a header of more than 16 kB")
            if cls.before > 8:
                raise _Refused("more than 8 headers before a member")
        else:
            cls.before = 0
        return member

    def _refuse_sparse(self, *_):
        raise _Refused("a sparse file: pack the tar again without --sparse")

    # a header of these may name millions of parts
    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def _read_tar(stream, folder: Path) -> Iterator[tuple[str, bool, int, Callable]]:
    """Each member's name, whether it is a file or a folder, its bytes, and what extracts it."""
    with tarfile.open(
        fileobj=stream,
        mode="r:*",
        tarinfo=type("_Member", (_Member,), {}),
        encoding="utf-8",
        errors="replace",
    ) as archive:
        began, spent, members = time.monotonic(), 0.0, 0
        while (member := archive.next()) is not None:
            archive.members.clear()  # or the memory would hold them all
            spent, members = spent + time.monotonic() - began, members + 1
            if spent > _SLOW[0] + _SLOW[1] * members:
                raise _Refused(f"headers that take {spent:.0f} s to read")
            extract = functools.partial(archive.extract, member, folder, set_attrs=False, **_FILTER)
            yield member.name, member.isreg() or member.isdir(), member.size, extract
            began = time.monotonic()
        while archive.fileobj.read(_CHUNK):  # checksums stand at the end
            pass


def _read_zip(stream, folder: Path) -> Iterator[tuple[str, bool, int, Callable]]:
    """As `_read_tar`."""
    with zipfile.ZipFile(stream) as archive:
        for member in archive.infolist():
            member.filename = member.orig_filename
            if not member.flag_bits & 0x800:  # no word on the encoding: UTF-8 if it is some
                with contextlib.suppress(UnicodeError):
                    member.filename = member.filename.encode("cp437").decode()
            kind = stat.S_IFMT(member.external_attr >> 16)
            yield (
                member.filename,
                kind in (0, stat.S_IFREG, stat.S_IFDIR),
                member.file_size,
                functools.partial(archive.extract, member, folder),
            )
