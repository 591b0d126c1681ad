"""VAE latents computed once, read many times.

A training step needs the latents of GT and of the masked source; the VAE is frozen, so they never
change. They lie in shards whose names are hashes of all they depend on: the VAE's weights, the
preprocessing, the size and the content of every file. A shard is missing or whole, and nothing that
is stale can be read, since its name differs. All processes of a job make them together.

    <root>/index/             which file has which content, see `hash_files`
    <root>/<kind>/kind.json   what the kind of latents is: VAE and preprocessing
    <root>/<kind>/<ab>/<content>.safetensors   up to 256 triplets of one size
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import socket
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import save

from rorem_lib.data.journal import Journal, read_lines
from rorem_lib.data.pictures import TripletError, read_size
from rorem_lib.data.triplets import Triplet
from rorem_lib.files import find_cache, hash_file, write_json
from rorem_lib.training.distributed import ask_main, failing_together, get_device
from rorem_lib.training.latents import (
    DTYPES,
    CacheSpec,
    encode_pictures,
    prepare_pictures,
    vary_mask,
)
from rorem_lib.workers import Progress, group_chunks

logger = logging.getLogger(__name__)

VERSION = 3  # raise it when preprocessing changes
PATIENCE = 120.0  # seconds in which a file of one node has to show on all others
_OPEN_SHARDS = 1024  # of a store at once
_HASHED_AT_ONCE = 64  # files a process: a kill loses no more
_open_shard = functools.partial(safetensors.safe_open, framework="pt")


def cache_root() -> Path:
    """Where latents are cached: below `files.find_cache()`."""
    return find_cache() / "latents"


def _choose_root(root: Path | str) -> Path:
    return Path(root).expanduser() if root else cache_root()


def read_sizes(triplets: Sequence[Triplet]) -> list[tuple[int, int]]:
    """(height, width) in px of each triplet's source, from the files' headers.

    Raises:
        TripletError: a file is missing or no image.
    """
    with ThreadPoolExecutor(8) as pool:
        chunks = pool.map(
            lambda chunk: [read_size(triplet.source) for triplet in chunk],
            group_chunks(triplets, 64),
        )
        return [size for chunk in chunks for size in chunk]


class LatentStore:
    """Latents of triplets in the order they were given, memory-mapped.

    It can be sent to other processes and used after a fork.

    Attributes:
        spec: how they were made.
        paths: the shards' files.
        shard, row: [N] in which of them a triplet's latents lie, and where.
    """

    def __init__(self, paths: list[Path], shard: np.ndarray, row: np.ndarray, spec: CacheSpec):
        self.paths, self.shard, self.row, self.spec = paths, shard, row, spec
        self._open = functools.lru_cache(_OPEN_SHARDS)(_open_shard)

    def __len__(self):
        return len(self.row)

    def __getstate__(self):
        return {name: x for name, x in vars(self).items() if name != "_open"}

    def __setstate__(self, state):
        self.__init__(**state)

    def read(self, index: int, *, flipped: int = 0, variant: int = 0) -> dict[str, torch.Tensor]:
        """What was cached of one triplet.

        Args:
            index: its place, from 0.
            flipped: 1 is mirrored.
            variant: which mask; 0 is the triplet's own.

        Returns:
            The parts [4, h, w] in the cache's type and `mask` [1, h, w] uint8 0 or 1.

        Raises:
            IndexError: there is no such triplet, flipped or variant.
        """
        if not (
            0 <= index < len(self)
            and 0 <= flipped <= self.spec.flipped
            and 0 <= variant <= self.spec.mask_variants
        ):
            raise IndexError(
                f"no triplet {index}, flipped {flipped}, variant {variant} in this cache of "
                f"{len(self)}"
            )
        file, row = self._open(self.paths[self.shard[index]]), int(self.row[index])
        # clone: a slice holds on to the whole file
        return {
            part: (
                file.get_slice(part)[row, variant, flipped]
                if part in ("masked", "mask")
                else file.get_slice(part)[row, flipped]
            ).clone()
            for part in (*self.spec.parts, "mask")
        }


@dataclass
class _Shard:
    """Triplets of one size, to be in one file."""

    number: int
    path: Path
    size: tuple[int, int]
    members: list[Triplet]
    content: dict[Path, dict]  # of `hash_files`, of the members' files

    def check_files(self) -> None:
        """What was encoded must be what the file's name says."""
        for path, known in self.content.items():
            # a hard link made meanwhile changes the file's times, and not its bytes
            if describe_stat(path) != known["stat"] and hash_file(path) != known["sha256"]:
                raise TripletError(
                    f"{path} was changed while its latents were made: start again (the images "
                    "have to lie in a folder that all nodes share)",
                    file=path,
                )

    def is_whole(self) -> bool:
        try:
            _open_shard(self.path)
        except FileNotFoundError:
            return False
        except safetensors.SafetensorError as error:
            logger.warning("%s is damaged (%s): it is made again", self.path, error)
            return False
        return True


def open_store(
    triplets: Sequence[Triplet],
    vae,
    *,
    sizes: Sequence[tuple[int, int]],
    spec: CacheSpec | None = None,
    root: Path | str = "",
    batch_size: int = 32,
    shard_size: int = 256,
    content: Mapping[Path, dict] | None = None,
) -> LatentStore:
    """Open the latents of `triplets`, computing what is missing first.

    Killed, it loses the shard in work; started again, it goes on. All processes of accelerate's
    group call it with the same arguments, each makes a part of what is missing, and all return when
    everything is there.

    Args:
        triplets: with GT.
        vae: the frozen autoencoder in float32, on the device that shall compute.
        sizes: (height, width) in px of each triplet, which its images are fitted to.
        spec: what to make; by default `CacheSpec()`.
        root: the folder of all caches, one that all processes see; `cache_root()` by default.
        batch_size: images an encoding at up to 512 x 512 px, fewer of larger ones.
        shard_size: triplets a file.
        content: of `hash_triplets`, where that was asked for before.

    Raises:
        TripletError: a file is missing, truncated or of another size than its triplet.
        ValueError: latents are not finite, or the VAE's factor does not divide a size.
        OSError: the disk is full, or cannot be written to; what is there stays.
        FileNotFoundError: `root` is not the folder of all processes.
        RuntimeError: another process failed.
    """
    spec = spec or CacheSpec()
    triplets, sizes = list(triplets), [(int(h), int(w)) for h, w in sizes]
    if len(triplets) != len(sizes):
        raise ValueError(f"{len(triplets)} triplets but {len(sizes)} sizes")
    root, state = _choose_root(root), PartialState()
    with failing_together():
        folder = root / _name_kind(root, vae, spec, write=state.is_main_process)
    content = content or hash_triplets(triplets, root)
    plan, store = _plan_shards(triplets, sizes, content, folder, shard_size, spec)

    def list_missing():
        _remove_leftovers(root, folder)
        return [shard.number for shard in plan if not shard.is_whole()]

    missing = [plan[number] for number in ask_main(list_missing)]
    own = missing[state.process_index :: state.num_processes]
    with contextlib.closing(_write_shards(own, vae, spec, batch_size, plan, root)) as writer:
        for _ in range(math.ceil(len(missing) / state.num_processes)):
            with failing_together():  # after each shard: what stops one stops all at once
                next(writer, None)
    with failing_together():
        _wait_until_seen(missing)
    if missing and state.is_main_process:
        count = sum(len(shard.members) for shard in missing)
        logger.info("latents of %d triplets cached in %s", count, root)
    return store


def _wait_until_seen(shards: list[_Shard]) -> None:
    """A network file system may show what another node wrote a minute later."""
    until = time.monotonic() + PATIENCE
    while shards := [shard for shard in shards if not shard.path.is_file()]:
        if time.monotonic() > until:
            raise FileNotFoundError(
                f"process {PartialState().process_index} does not see {shards[0].path}, which "
                "another one has written: latent_cache_dir has to be a folder that all nodes share"
            )
        time.sleep(min(1, PATIENCE))


# ------------------------------------------------------------------------------- files' contents


def describe_stat(path: str | Path) -> str:
    """Size and times of a file: what changes when its content does.

    No program can set the time of change back; inodes tell nothing, since FUSE invents them at
    every mount.
    """
    try:
        state = os.stat(path)
    except FileNotFoundError:
        raise TripletError(f"{path} does not exist", file=Path(path)) from None
    return f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"


def _describe_all(paths: list[str]) -> list[str]:
    return [describe_stat(path) for path in paths]


def _hash(path: str) -> dict:
    before = ""
    while before != (stat := describe_stat(path)):  # again where it changed while it was read
        before, value = stat, hash_file(path)
    return {"id": ascii(path), "stat": stat, "sha256": value}  # a name may be no UTF-8


def hash_files(paths: Sequence[Path], folder: Path, *, threads: int = 8) -> list[dict[str, str]]:
    """SHA-256 of files; each process of accelerate's group, which all call it, reads a part.

    What was read once is read again only where `describe_stat` differs. A `sha256` in a set's
    records would not do: it is of the raw file, and would miss an image that was edited since.

    Args:
        paths: the files.
        folder: where the hashes are kept, in a journal for all below one folder. Jobs that write it
            at the same time may tear each other's lines: those files are read again.
        threads: readers of this process.

    Returns:
        `stat` (of `describe_stat`) and `sha256` in hex of each.

    Raises:
        TripletError: a file does not exist.
        OSError: the hashes cannot be kept; names the file.
        RuntimeError: another process failed.
    """
    # A process that is the first to ask decides here whether accelerate stays on the CPU.
    state = PartialState(cpu=get_device() == "cpu")
    names = [os.path.abspath(path) for path in paths]
    place = hashlib.sha256(os.fsencode(os.path.commonpath(names) if names else "")).hexdigest()
    journal, unique = Journal(folder / f"{place[:16]}.jsonl"), list(dict.fromkeys(names))
    with ThreadPoolExecutor(threads) as pool:
        known = ask_main(lambda: _list_known(journal.path, unique, pool))
        found = {row["id"]: row for row in known}
        missing = [name for name in unique if ascii(name) not in found]
        progress = Progress("files hashed", len(missing), active=state.is_main_process)
        for chunk in group_chunks(missing, _HASHED_AT_ONCE * state.num_processes):
            with failing_together():
                own = list(pool.map(_hash, chunk[state.process_index :: state.num_processes]))
            rows = gather_object(own)
            with failing_together():
                if state.is_main_process:
                    for row in rows:
                        journal.append(row)
            found |= {row["id"]: row for row in rows}
            progress.add(len(chunk))
    journal.close()
    return [found[ascii(name)] for name in names]


def hash_triplets(triplets: Sequence[Triplet], root: Path | str = "") -> dict[Path, dict[str, str]]:
    """What `hash_files` says of all images of triplets, by their paths.

    Args:
        triplets: with or without GT.
        root: the folder of all caches; `cache_root()` by default.

    Raises:
        TripletError, OSError, RuntimeError: as `hash_files`.
    """
    files = list(dict.fromkeys(path for t in triplets for path in _list_files(t)))
    return dict(zip(files, hash_files(files, _choose_root(root) / "index")))


def summarise_content(triplets: Iterable[Triplet], content: Mapping[Path, dict]) -> str:
    """SHA-256 of the images of triplets in their order, of what `hash_triplets` found."""
    total = hashlib.sha256()
    for triplet in triplets:
        for path in _list_files(triplet):
            total.update(content[path]["sha256"].encode())
    return total.hexdigest()


def _list_files(triplet: Triplet) -> list[Path]:
    return [path for path in (triplet.source, triplet.mask, triplet.gt) if path]


def _list_known(journal: Path, names: list[str], pool) -> list[dict]:
    """The rows of files that are as they were."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    rows = {row["id"]: row for _, row in read_lines(journal)} if journal.exists() else {}
    chunks = group_chunks(names, 512)  # a future a file would take far longer
    stats = (stat for part in pool.map(_describe_all, chunks) for stat in part)
    now = zip((rows.get(ascii(name)) for name in names), stats)
    return [row for row, stat in now if row and row.get("stat") == stat]


# ------------------------------------------------------------------------------------ shards


def _name_kind(root: Path, vae, spec: CacheSpec, *, write: bool) -> str:
    """Sixteen hex digits for a VAE and a preprocessing; `kind.json` says what they stand for."""
    weights = hashlib.sha256()
    for name, weight in sorted(vae.state_dict().items()):
        weights.update(name.encode())
        weights.update(weight.detach().float().cpu().numpy().tobytes())
    chosen = dataclasses.asdict(spec)
    chosen["twins"] = chosen.pop("flipped")  # as shards are named since the first of them
    if not spec.mask_variants:
        del chosen["mask_dilate_max"], chosen["mask_loosen"]
    if spec.resize_mode == "squash":
        del chosen["center_crop"]
    kind = {
        "version": VERSION,
        "vae": type(vae).__name__,
        "weights": weights.hexdigest(),
        "config": {k: x for k, x in vae.config.items() if not k.startswith("_")},
        **chosen,
    }
    name = hashlib.sha256(json.dumps(kind, sort_keys=True).encode()).hexdigest()[:16]
    if write and not (root / name / "kind.json").is_file():
        write_json(root / name / "kind.json", kind)
    return name


def _remove_leftovers(root: Path, folder: Path) -> None:
    """Delete what killed processes were writing an hour ago."""
    for path in [*folder.glob("*/.*.partial"), *root.glob("*/.*.partial")]:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()


def _plan_shards(triplets, sizes, content, folder, shard_size, spec):
    """The shards, each once, and the store that will read them."""
    by_size = defaultdict(list)
    for index, size in enumerate(sizes):
        by_size[size].append(index)
    plan: dict[Path, _Shard] = {}
    shard, row = np.zeros((2, len(triplets)), np.int32)
    for size, indices in by_size.items():
        for chunk in group_chunks(indices, shard_size):
            members = [triplets[i] for i in chunk]
            files = [path for t in members for path in _list_files(t)]
            text = f"{size} {[content[file]['sha256'] for file in files]}"
            name = hashlib.sha256(text.encode()).hexdigest()[:24]
            path = folder / name[:2] / f"{name}.safetensors"
            if path not in plan:  # equal triplets may come twice
                plan[path] = _Shard(
                    len(plan), path, size, members, {file: content[file] for file in files}
                )
            shard[chunk], row[chunk] = plan[path].number, range(len(chunk))
    return list(plan.values()), LatentStore(list(plan), shard, row, spec)


def _load_variants(item: tuple[Triplet, tuple[int, int]], spec: CacheSpec) -> dict:
    """`prepare_pictures` with all masks [V, h, w]."""
    pictures = prepare_pictures(*item, spec)
    masks = [vary_mask(pictures["mask"], v, spec) for v in range(1 + spec.mask_variants)]
    return pictures | {"mask": np.stack(masks)}


def _list_chunks(shards: list[_Shard], batch_size: int) -> Iterator[list]:
    """The batches of every shard."""
    for shard in shards:
        area = shard.size[0] * shard.size[1]
        count = max(1, int(batch_size * min(1, 512 * 512 / area)))
        yield from group_chunks([(triplet, shard.size) for triplet in shard.members], count)


def _write_shards(
    shards: list[_Shard],
    vae,
    spec: CacheSpec,
    batch_size: int,
    plan: list[_Shard],
    root: Path,
) -> Iterator[None]:
    """Make and write one shard a step."""
    progress = Progress(
        "latents of triplets (this process's)",
        sum(len(shard.members) for shard in shards),
        active=PartialState().is_main_process,
    )
    # On a CPU the VAE takes all cores: one after the other is a quarter faster than side by side.
    reader = read_batches(
        functools.partial(_load_variants, spec=spec),
        _list_chunks(shards, batch_size),
        ahead=0 if next(vae.parameters()).device.type == "cpu" else 2,
    )
    with contextlib.closing(reader):
        for shard in shards:
            batches, count = [], 0
            while count < len(shard.members):
                batch = next(reader)
                batches.append(_encode_variants(vae, batch, spec))
                count += len(batch["gt"])
                progress.add(len(batch["gt"]))
            shard.check_files()
            tensors = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
            if not all(latents.isfinite().all() for latents in tensors.values()):
                raise ValueError(
                    f"latents of {shard.members[0].source} or the next "
                    f"{len(shard.members) - 1} triplets are not finite in "
                    f"{spec.dtype}: check the VAE or take latent_dtype bf16"
                )
            _save_shard(shard, save(tensors), plan, root)
            yield


def _encode_variants(vae, batch: dict, spec: CacheSpec) -> dict[str, torch.Tensor]:
    """All of a batch: `gt`, `source` [B, T, ...], `masked`, `mask` [B, V, T, ...], on the CPU.

    Axis T is (as it is, mirrored), axis V the masks.
    """
    device = next(vae.parameters()).device
    pictures = {part: torch.as_tensor(x).to(device) for part, x in batch.items()}
    # the width is the last axis of masks but not of images
    views = [pictures] + [
        {part: x.flip(-1 if part == "mask" else -2) for part, x in pictures.items()}
    ] * spec.flipped
    only_masked = dataclasses.replace(spec, parts=("masked",), mask_variants=0)
    found = defaultdict(list)
    for view in views:
        each = [
            encode_pictures(vae, view | {"mask": mask}, spec if variant == 0 else only_masked)
            for variant, mask in enumerate(view["mask"].unbind(1))
        ]
        for part in (*spec.parts, "mask"):
            whole = part in ("masked", "mask")
            found[part].append(torch.stack([e[part] for e in each], 1) if whole else each[0][part])
    return {
        part: torch.stack(views, 2 if part in ("masked", "mask") else 1)
        .to(torch.uint8 if part == "mask" else DTYPES[spec.dtype])
        .cpu()
        for part, views in found.items()
    }


def _save_shard(shard: _Shard, data: bytes, plan: list[_Shard], root: Path) -> None:
    path = shard.path
    tmp_path = path.with_name(f".{path.stem}.{os.getpid()}.{socket.gethostname()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp_path, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(tmp_path, path)
    except OSError as error:
        tmp_path.unlink(missing_ok=True)
        missing = [other for other in plan if not other.is_whole()]
        area = sum(len(x.members) * x.size[0] * x.size[1] for x in missing)
        left = area * len(data) / (len(shard.members) * shard.size[0] * shard.size[1])
        raise OSError(
            error.errno,
            f"cannot write latents to {root}: {error.strerror}; "
            f"{len(plan) - len(missing)} of {len(plan)} shards are there and stay, about "
            f"{left / 1e9:.3g} GB are still to be written: free so much or set latent_cache_dir to "
            "a folder with more room, then start again",
        ) from error


def read_batches(
    load: Callable[..., Mapping[str, np.ndarray | None]],
    chunks: Iterable[Sequence],
    *,
    threads: int | None = None,
    ahead: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """Open triplets in order, batch by batch, by default two batches ahead of the taker.

    Decoding and resizing leave Python's lock, so threads are enough to use all cores.

    Args:
        load: opens one item, for example `partial(load_images, size=512)`.
        chunks: the items of each batch; all images of one are brought to one size.
        threads: by default one a core.
        ahead: batches that are decoded in advance; 0 for a taker that needs all cores itself.

    Yields:
        What `load` gave for the items of a chunk, stacked: of `load_images` `source` and `gt`
        [B, h, w, 3] uint8 and `mask` [B, h, w] uint8 0 or 255; without `gt` in a pool.

    Raises:
        TripletError: an image cannot be read, or sizes differ.
    """
    pool = ThreadPoolExecutor(threads or os.cpu_count())
    waiting: deque[list] = deque()
    try:
        for chunk in chunks:
            waiting.append([pool.submit(load, item) for item in chunk])
            if len(waiting) > ahead:
                yield _stack(waiting.popleft())
        while waiting:
            yield _stack(waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _stack(futures: list) -> dict[str, np.ndarray]:
    pictures = [future.result() for future in futures]
    return {
        part: np.stack([p[part] for p in pictures])
        for part, first in pictures[0].items()
        if first is not None
    }
