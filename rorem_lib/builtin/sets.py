"""Writes the built-in scenes as triplet sets, and keeps their hidden truth apart.

`rorem_lib.builtin.scenes` holds the renderer alone; this module writes what it renders:

    <folder>/labelled         source, mask and GT, RORD-like and MULAN-like scenes in turn
    <folder>/pool             source and mask (OpenImages-like)
    <folder>/high_resolution  source and mask, larger: GT are removals that are then accepted
    <folder>/test             source and mask of the evaluation
    <folder>/hidden/<set>/{truth,object,shadow}/<id>.png

The hidden truth of the last three is for the simulated annotator and the evaluation alone, and is
reached only through `read_truth`; marks in `hidden/` and in each folder of it make the triplet
reader refuse its files. A scene is a function of (role, seed, index) and every set has roles of its
own, so no scene is in two sets.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rorem_lib.builtin import scenes
from rorem_lib.data.pictures import TripletError, load_image, save_image
from rorem_lib.data.triplets import HIDDEN_MARK, HIDDEN_PARTS, is_hidden
from rorem_lib.data.writer import TripletWriter, claim_set, clear_set
from rorem_lib.files import (
    find_cache,
    flush,
    is_filled,
    lock_folder,
    read_json,
    write_json,
    write_text,
)
from rorem_lib.workers import map_processes

logger = logging.getLogger(__name__)

VERSION = 1  # raise it when the same settings render other scenes: old sets are then made anew
ROLES = {
    "labelled": ("rord", "mulan"),
    "pool": ("pool",),
    "high_resolution": ("high_resolution",),
    "test": ("test",),
}
DEFAULT_SIZES = {"labelled": 600, "pool": 400, "high_resolution": 40, "test": 100}
LICENSE = "CC0-1.0"
_CHUNK = 100  # scenes between two reports of progress


@dataclass(frozen=True)
class Truth:
    """What a scene hides.

    Attributes:
        truth: [H, W, 3] uint8, the image had the object never been there.
        object: [H, W] uint8, the visible object's soft coverage.
        shadow: [H, W] uint8, how strongly its shadow or reflection changes the rest.
    """

    truth: np.ndarray
    object: np.ndarray
    shadow: np.ndarray


# ---------------------------------------------------------------------------------------- writing


def write_scene_sets(
    folder: str | Path,
    *,
    seed: int = 4,
    labelled: int = 3000,
    pool: int = 2000,
    high_resolution: int = 100,
    test: int = 500,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Write the four sets; killed and started again it goes on, and the files are the same.

    A set that was written with another seed, size or `VERSION` is written anew.

    Args:
        folder: where the sets' folders go.
        seed: fixes every pixel.
        labelled, pool, high_resolution, test: scenes in each set; 0 leaves a set empty.
        workers: processes; 1 renders in this one.
        progress: called with (scenes done, scenes in all) after every 100 scenes.

    Returns:
        Scenes in each set, by its name.

    Raises:
        ValueError: a negative number, or a folder that holds something else than these sets.
        BlockingIOError: another process writes there.
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    counts = {"labelled": labelled, "pool": pool, "high_resolution": high_resolution, "test": test}
    if min(*counts.values(), workers - 1) < 0:
        raise ValueError(f"sizes of sets are 0 or more, workers 1 or more: {counts}, {workers=}")
    for name in counts:
        _read_settings(folder, name)  # which refuses what others have there
    with lock_folder(folder):
        _write_sets(folder, counts, seed, workers, progress)
    return counts


def _write_sets(folder: Path, counts: dict[str, int], seed: int, workers: int, progress) -> None:
    chunks = []
    for name, count in counts.items():
        _open_set(folder, name, count, seed)
        for place in (Path(), Path(name)) if name != "labelled" else ():
            mark = folder / "hidden" / place / HIDDEN_MARK
            write_text(mark, "Nothing in here is ever read as a triplet.\n")
        with TripletWriter(folder / name, part="main") as writer:
            done = {x for x in writer.done_ids if _has_truth(folder / "hidden" / name, x)}
            todo = [i for i in range(count) if _name(name, i) not in done]
        chunks += [(folder, name, seed, todo[i : i + _CHUNK]) for i in range(0, len(todo), _CHUNK)]
    total = sum(counts.values())
    done = total - sum(len(chunk[3]) for chunk in chunks)
    for written in map_processes(_write_chunk, chunks, workers=workers):
        done += written
        if progress:
            progress(done, total)
    for name in counts:
        TripletWriter(folder / name).close()


def _has_truth(hidden: Path, scene_id: str) -> bool:
    """Whether a scene's hidden truth is there too, where its set has one; no lost power emptied
    it."""
    files = [hidden / part / f"{scene_id}.png" for part in HIDDEN_PARTS]
    return hidden.name == "labelled" or all(f.is_file() and f.stat().st_size for f in files)


def _read_settings(folder: Path, name: str) -> dict | None:
    """What a set of scenes was written with, None if nothing is there yet.

    Raises:
        TripletError: something else is in the way of the set, or of its hidden truth.
    """
    marker = folder / name / "scenes.json"
    found = read_json(marker) if marker.is_file() else None
    found = found if isinstance(found, dict) and "count" in found else None
    hidden = folder / "hidden"
    places = [] if found else [folder / name]
    if name != "labelled" and not any(map(is_hidden, [hidden, *hidden.glob("*/")])):
        places.append(hidden)
    elif name != "labelled" and not is_hidden(hidden / name):
        places.append(hidden / name)
    for place in places:
        if is_filled(place):
            raise TripletError(
                f"{place} holds something that is no scene set: choose another folder, or move "
                "that away"
            )
    return found


def _open_set(folder: Path, name: str, count: int, seed: int) -> None:
    """Clear what another seed, size or `VERSION` left, file by file; note what is written now."""
    wanted = {"seed": seed, "count": count, "version": VERSION}
    found = _read_settings(folder, name)
    if found == wanted:
        claim_set(folder / name, known=True)
        return
    if found:
        logger.info("%s has other settings now: it is written anew", folder / name)
        claim_set(folder / name, known=True)
        ids = [_name(name, index) for index in range(found["count"])]
        for part in HIDDEN_PARTS:
            for scene_id in ids:
                (folder / "hidden" / name / part / f"{scene_id}.png").unlink(missing_ok=True)
        clear_set(folder / name, ids=ids)
    write_json(folder / name / "scenes.json", wanted)


def _name(name: str, index: int) -> str:
    return f"{name}-{index:06d}"


def _write_chunk(chunk: tuple[Path, str, int, list[int]]) -> int:
    folder, name, seed, indices = chunk
    hidden = folder / "hidden" / name
    roles = ROLES[name]
    with TripletWriter(folder / name, part=f"{indices[0]:06d}") as writer:
        for index in indices:
            role, scene_id = roles[index % len(roles)], _name(name, index)
            scene = scenes.render_scene([seed, index], role=role)
            labelled = name == "labelled"
            if not labelled:  # before the record: what is in the set has its truth
                for part in HIDDEN_PARTS:
                    (hidden / part).mkdir(parents=True, exist_ok=True)
                    save_image(hidden / part / f"{scene_id}.png", getattr(scene, part))
            writer.add(
                id=scene_id,
                source=scene.image,
                mask=scene.mask,
                gt=scene.truth if labelled else None,
                origin=f"scenes/{role}",
                license=LICENSE,
                group=scene_id,
                family=scene.family,
                kind=scene.kind,
                mask_kind=scene.mask_kind,
                effect=scene.effect,
            )
    return len(indices)


# ---------------------------------------------------------------------------------- hidden truth


def hidden_of(meta_path: str | Path) -> Path | None:
    """The folder of hidden truth that belongs to a set's `meta.json`, None if it has none.

    It lies beside a set of scenes, and is marked (or has the parts that those of earlier versions
    have): a folder of that name that is not is somebody's own. Candidates note in `settings.json`
    which sets they were drawn from, and their truth is that of these scenes.
    """
    folder = Path(meta_path).parent
    places = [folder]
    if (folder / "settings.json").is_file():
        drawn_from = read_json(folder / "settings.json").get("drawn_from", [])
        places += [Path(path).parent for path in drawn_from]
    hidden = (place.parent / "hidden" / place.name for place in places)
    return next((place for place in hidden if place.is_dir() and is_hidden(place)), None)


def read_truth(hidden_dir: str | Path, scene_id: str) -> Truth:
    """The hidden truth of one scene; for the simulated annotator and the evaluation alone.

    Args:
        hidden_dir: `<assembled folder>/hidden/<set>`.
        scene_id: the scene's id; a removal's `-s<number>` behind it is taken off.

    Raises:
        TripletError: there is none; names the file.
    """
    hidden = Path(hidden_dir)
    if not (hidden / "truth" / f"{scene_id}.png").is_file():
        scene_id = re.sub(r"-s\d+$", "", scene_id)
    path = hidden / "truth" / f"{scene_id}.png"
    if not path.is_file():
        raise TripletError(
            f"there is no hidden truth {path}: only built-in scenes have one; take "
            "the folder hidden/<set> beside the set that holds this scene"
        )
    return Truth(
        load_image(path), *(load_image(hidden / part / path.name, "L") for part in HIDDEN_PARTS[1:])
    )


# ----------------------------------------------------------------------------- sets on first use


def builtin_set(role: str) -> Path:
    """The `meta.json` that `builtin:<role>` means, made at its first use and kept in the cache.

    Sets are rendered below `files.find_cache()` in a folder named after `VERSION`, so an old cache
    is never mistaken for a new one.

    Raises:
        TripletError: an unknown role.
        OSError: the cache cannot be written; names the folder.
    """
    if role not in ROLES:
        raise TripletError(
            f"there is no built-in set builtin:{role}: take one of "
            + ", ".join(f"builtin:{name}" for name in ROLES)
        )
    return (
        _make_once(
            find_cache() / f"scenes-v{VERSION}",
            lambda folder: write_scene_sets(folder, **DEFAULT_SIZES),
        )
        / role
        / "meta.json"
    )


def _make_once(folder: Path, make) -> Path:
    """Make a folder beside and rename it, so that it is there whole or not at all."""
    if folder.is_dir():
        return folder
    logger.info("making the built-in set %s (once)", folder)
    tmp_path = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        make(tmp_path)
        os.rename(tmp_path, folder)
        flush(folder.parent)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster, and its set is the same
            raise OSError(
                error.errno,
                f"cannot write the cache {folder}: {error.strerror}; set "
                "ROREM_CACHE to a folder with room",
            ) from error
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
    return folder
