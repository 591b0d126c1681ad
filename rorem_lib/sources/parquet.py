"""Reads sets published as Parquet shards, by `data.publishing` or with the same columns.

What reads shards row by row, with their faults named, serves `sources.paired` too.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
import tempfile
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rorem_lib.data.items import (
    Item,
    Picture,
    Pictures,
    Rejected,
    Source,
    SourceError,
    make_id,
    open_picture,
)
from rorem_lib.data.pictures import AGAIN, TripletError, describe_content, read_head
from rorem_lib.files import hash_file, read_limit

_NEEDED = ("source", "mask")
_FEW_ROWS = 1000  # in a shard: it may have so many whatever its size
_LEAST_BYTES = 32  # of a shard for each row more: a row has two images
_SMALL = 2**28  # bytes of a row group: below it, it may be packed as tightly as it likes


@dataclass(frozen=True)
class ParquetSetSource(Source):
    """A set published as Parquet with its images embedded.

    `data/<split>-00000-of-00001.parquet` (or the same without `data/`) with the columns source,
    mask and, but for a pool, GT, each `{bytes, path}`. The columns id, group, origin, license,
    score and what else there is stay the records'; a text column `extra` is a JSON object of more.
    Images become files again byte by byte, in a temporary folder that lives as long as the
    `Pictures` do. One row group is held in memory at a time.

    Args:
        folder: the dataset's folder, or its `data/`.
        require_gt: refuse rows without GT, but those of a split named test; false makes a pool.
    """

    folder: str
    require_gt: bool = True

    name = "parquet"
    origin = "a set published as Parquet"
    license = "unknown"
    layout = "data/<split>-*.parquet with the columns source, mask and GT"

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return has_columns(Path(folder), _NEEDED)

    def list_items(self) -> Iterator[Item]:
        shards = list_shards(Path(self.folder))
        if not shards:
            raise self.refuse_layout()
        seen: dict[str, int] = {}
        for shard in shards:
            place = str(shard.relative_to(self.folder))
            split = re.sub(r"-\d+(-of-\d+)?$", "", shard.stem)
            check_columns(shard, _NEEDED)
            for group, row, values in list_rows(shard, ["id", "group"]):
                name = values.get("id")
                name = make_id(f"{shard.stem}-{group}-{row}" if name is None else name)
                seen[name] = seen.get(name, 0) + 1
                if seen[name] > 1:  # another split has it too
                    name = f"{name}~{seen[name]}"
                scene = values.get("group")
                yield Item(name, name if scene is None else str(scene), (place, group, row), split)

    def load_item(self, item: Item) -> Pictures:
        file, group, row = item.place
        shard = Path(self.folder) / file
        where = f"{shard}, row {row} of row group {group}"
        record = read_row(shard, group, row)
        cells = {part: record.pop(part, None) for part in ("source", "mask", "GT")}
        if cells["GT"] is None and self.require_gt and item.split != "test":
            raise Rejected("no GT", f"{where} has no GT: take it into a pool (require_gt: false)")
        opened, files = {"GT": None}, {}
        with contextlib.ExitStack() as stack:
            with _name_temporary_folder():
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rorem-")))
            for part, cell in cells.items():
                if part != "GT" or cell is not None:
                    with _name_temporary_folder():
                        files[part] = _write_cell(cell, folder / part, f"{where}, {part}", shard)
                    opened[part] = _open_cell(files[part], f"{where}, {part}", shard)
            with contextlib.suppress(KeyError, TypeError, ValueError):  # else it is something else
                record = {**record, **dict(json.loads(record["extra"])), "extra": None}
            # known here, for no one may ask for the file when its image is gone
            extra = {"sha256": hash_file(files["source"])} | {
                key: value
                for key, value in record.items()
                if key not in ("id", "group") and _is_plain(value)
            }
            pictures = Pictures(
                opened["source"], opened["mask"], opened["GT"], files["source"], extra
            )
            weakref.finalize(pictures, stack.pop_all().close)
        return pictures


def list_shards(folder: Path) -> list[Path]:
    """The Parquet files of a folder's `data/`, else of the folder itself."""
    for place in (folder / "data", folder):
        if files := sorted(path for path in place.glob("*.parquet") if path.name[0] != "."):
            return files
    return []


def has_columns(folder: Path, columns: Collection[str]) -> bool:
    """Whether the first shard of a folder has these columns: other sets have files of its name."""
    try:
        return any(
            set(columns) <= set(pq.read_schema(shard).names) for shard in list_shards(folder)[:1]
        )
    except (OSError, ValueError, pa.ArrowException):
        return False


def check_columns(shard: Path, columns: Collection[str]) -> None:
    """Refuse a shard that lacks one of these columns.

    Raises:
        SourceError: it lacks one; names it, and those that are there.
        TripletError: it is no Parquet file, or a damaged one.
    """
    with _name_faults(shard):
        names = pq.read_schema(shard).names
    if lacking := [column for column in columns if column not in names]:
        raise SourceError(
            f"{shard} has no columns {' and '.join(lacking)}, but {', '.join(sorted(names))}"
        )


def list_rows(shard: Path, columns: Sequence[str]) -> Iterator[tuple[int, int, dict]]:
    """(row group, row in it, values) of every row; reads only those of `columns` that there are.

    Raises:
        TripletError: it is no Parquet file, or a damaged one.
    """
    with _name_faults(shard), pq.ParquetFile(shard) as file:
        _check_cost(shard, file.metadata)
        for group in range(file.num_row_groups):
            row = itertools.count()
            for batch in _iter_batches(file, group, columns):
                for values in batch.to_pylist():
                    yield group, next(row), values


def read_row(shard: Path, group: int, row: int, columns: tuple[str, ...] | None = None) -> dict:
    """One row of a shard, of all columns or of some.

    Raises:
        TripletError: the file is gone, damaged, or has no such row any more.
    """
    with _name_faults(shard):
        table = read_group(str(shard), shard.stat().st_mtime_ns, group, columns)
        return table.slice(row, 1).to_pylist()[0]


@functools.lru_cache(maxsize=1)  # rows come in order: each group is read once, and one is held
def read_group(shard: str, changed: int, group: int, columns: tuple[str, ...] | None) -> pa.Table:
    """A row group of a shard; `changed`, its time, keeps a replaced file from the cache."""
    with pq.ParquetFile(shard) as file:
        room = _check_cost(Path(shard), file.metadata)
        batches = []
        for batch in _iter_batches(file, group, columns and list(columns)):
            if (room := room - batch.nbytes) < 0:
                raise _refuse_cost(Path(shard), group, "more than the limit of its")
            batches.append(batch)
        return pa.Table.from_batches(batches, batches[0].schema)


def _iter_batches(file: pq.ParquetFile, group: int, columns) -> Iterator[pa.RecordBatch]:
    """A row group in parts: a value that is stored once may stand in every row.

    Each part has at most 256 MB, or one row, if sizes are what the file says.
    """
    about = file.metadata.row_group(group)
    chunks = [about.column(number) for number in range(about.num_columns)]
    roots = tuple(f"{column}." for column in columns or ())
    sizes = [
        chunk.total_uncompressed_size
        for chunk in chunks
        if not roots or f"{chunk.path_in_schema}.".startswith(roots)
    ]
    count = _SMALL // max(1, *sizes, 1)
    return file.iter_batches(min(1000, max(1, count)), [group], columns, use_threads=False)


def _check_cost(shard: Path, metadata: pq.FileMetaData) -> float:
    """Refuse a shard that says itself that it would become far more than it is.

    Images do not compress: a row group of more than 256 MB has at most `ROREM_MAX_PARQUET_RATIO`
    (20) bytes for each of the file's.

    Returns:
        The most bytes that a row group may become.
    """
    size = shard.stat().st_size
    most = max(_SMALL, read_limit("ROREM_MAX_PARQUET_RATIO", 20) * size)
    if metadata.num_rows > max(_FEW_ROWS, size / _LEAST_BYTES):
        raise TripletError(
            f"{shard} has {metadata.num_rows:,} rows in {size:,} bytes: no set of images is so "
            "small; get it from its publisher again",
            file=shard,
        )
    for group in range(metadata.num_row_groups):
        if (decoded := metadata.row_group(group).total_byte_size) > most:
            raise _refuse_cost(shard, group, f"{decoded:,} of its")
    return most


def _refuse_cost(shard: Path, group: int, made: str) -> TripletError:
    return TripletError(
        f"{shard}, row group {group}, would make {made} {shard.stat().st_size:,} bytes: raise "
        "ROREM_MAX_PARQUET_RATIO (20) if its publisher is to be trusted",
        file=shard,
    )


@contextlib.contextmanager
def _name_faults(shard: Path):
    try:
        yield
    except TripletError:
        raise
    except (OSError, ValueError, MemoryError, pa.ArrowException, IndexError) as error:
        what = describe_content(read_head(shard))
        why = (
            f"is {what}" if what else f"is no Parquet file, truncated or damaged ({error}): {AGAIN}"
        )
        raise TripletError(f"{shard} {why}", file=shard) from None


@contextlib.contextmanager
def _name_temporary_folder():
    """A block that writes there: no item is at fault where that cannot be."""
    try:
        yield
    except OSError as error:
        raise SourceError(
            f"images cannot be unpacked into {tempfile.tempdir or 'a temporary folder'} ({error}): "
            "set TMPDIR to a folder with room"
        ) from error


def _write_cell(cell, folder: Path, where: str, shard: Path) -> Path:
    """An image's bytes as a file under the name that it had."""
    if not isinstance(cell, dict) or not cell.get("bytes"):
        raise TripletError(
            f"{where} holds no image: publish the set again with its images embedded",
            file=shard,
        )
    data, name = cell["bytes"], Path(cell.get("path") or "picture")
    suffix = name.suffix if re.fullmatch(r"\.\w{1,5}", name.suffix) else ""
    suffix = suffix or {b"\x89P": ".png", b"\xff\xd8": ".jpg", b"RI": ".webp"}.get(data[:2], "")
    path = folder / (make_id(name.stem) + suffix)
    path.parent.mkdir()
    path.write_bytes(data)
    return path


def _open_cell(path: Path, where: str, shard: Path) -> Picture:
    try:
        return open_picture(path, "L" if path.parent.name == "mask" else "RGB")
    except TripletError as error:
        raise TripletError(str(error).replace(str(path), where), file=shard) from None


def _is_plain(value) -> bool:
    try:
        return value is not None and bool(json.dumps(value))
    except (TypeError, ValueError):  # bytes, dates; a number of thousands of digits
        return False
