"""The latent cache: the same as encoding at once, made once, by all together, never stale."""

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState, debug_launcher
from accelerate.state import AcceleratorState
from torch.multiprocessing import ProcessExitedException

from rorem_lib.data.pictures import TripletError, load_image, save_image
from rorem_lib.data.triplets import load_images, read_triplets
from rorem_lib.data.writer import TripletWriter
from rorem_lib.models import sdxl
from rorem_lib.training import latent_cache, latents
from rorem_lib.training.latent_cache import open_store, read_sizes
from rorem_lib.training.latents import CacheSpec, encode_pictures, prepare_pictures

ALL = CacheSpec(parts=("gt", "masked", "source"))


@pytest.fixture
def vae(tiny_model):
    return sdxl.load_pipeline(str(tiny_model)).vae


@pytest.fixture
def triplets(tiny_set, tmp_path):
    """A copy of the tiny set that a test may damage."""
    shutil.copytree(tiny_set.parent, tmp_path / "set")
    return read_triplets(tmp_path / "set")[:5]


class Counting(torch.nn.Module):
    """A VAE that counts its encodings, and is interrupted after some of them."""

    def __init__(self, vae, after=-1):
        super().__init__()
        self.vae, self.config, self.dtype, self.left = vae, vae.config, vae.dtype, after
        self.batches = []

    def state_dict(self, *args, **kwargs):
        return self.vae.state_dict(*args, **kwargs)

    def encode(self, images):
        if self.left == len(self.batches):
            raise KeyboardInterrupt
        self.batches.append(len(images))
        return self.vae.encode(images)


Counting.__name__ = "AutoencoderTiny"  # the kind of VAE is a part of the shards' names


def open_small(triplets, vae, folder, **options):
    """A store of 32 px squares in shards of two, one image an encoding."""
    given = {"sizes": [(32, 32)] * len(triplets), "shard_size": 2, "batch_size": 1, "root": folder}
    return open_store(triplets, vae, **(given | options))


def read_all(store):
    """Every value of a store by what it belongs to."""
    return {
        (index, flipped, variant, name): value.float().numpy()
        for index in range(len(store))
        for flipped in range(1 + store.spec.flipped)
        for variant in range(1 + store.spec.mask_variants)
        for name, value in store.read(index, flipped=flipped, variant=variant).items()
    }


def assert_equal(first, second):
    first, second = read_all(first), read_all(second)
    assert first.keys() == second.keys() and first
    assert all(np.array_equal(first[key], second[key]) for key in first)


# --------------------------------------------------------------------------- what it holds


@torch.no_grad()
@pytest.mark.parametrize("dtype, exact", [("fp16", 2**-11), ("bf16", 2**-8)])
def test_it_holds_what_direct_encoding_gives(vae, triplets, tmp_path, dtype, exact):
    store = open_store(
        triplets,
        vae,
        sizes=[(32, 32)] * 5,
        root=tmp_path / "cache",
        batch_size=2,
        shard_size=3,
        spec=replace(ALL, dtype=dtype),
    )
    assert len(store) == 5 and len(store.paths) == 2
    for number, triplet in enumerate(triplets):
        pictures = load_images(triplet)
        for flipped in (0, 1):
            found = store.read(number, flipped=flipped)
            assert set(found) == {"gt", "masked", "source", "mask"}
            turned = {k: v[:, ::-1].copy() if flipped else v for k, v in pictures.items()}
            source, gt = (sdxl.to_tensor(turned[k][None]) for k in ("source", "gt"))
            mask = torch.as_tensor(turned["mask"] >= 128).float()[None, None]
            wanted = {"source": source, "gt": gt, "masked": sdxl.mask_source(source, mask)}
            for name, image in wanted.items():
                latents = sdxl.encode_images(vae, image)[0]
                assert found[name].dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
                assert torch.allclose(found[name].float(), latents, rtol=exact, atol=1e-4), name
            small = sdxl.shrink_mask(mask, torch.zeros(1, 4, 8, 8))[0]
            assert found["mask"].dtype == torch.uint8
            assert torch.equal(found["mask"].float(), small)


def test_it_holds_what_training_without_a_cache_encodes(vae, tmp_path):
    """Wide images, perturbed masks, both flipped: the same images go into the VAE."""
    rng = np.random.default_rng(1)
    with TripletWriter(tmp_path / "wide") as writer:
        for number in range(3):
            source = rng.integers(0, 256, (40, 70 + 9 * number, 3), dtype=np.uint8)
            mask = np.zeros(source.shape[:2], np.uint8)
            mask[10:30, 20 : 30 + 9 * number] = 255
            writer.add(id=str(number), source=source, mask=mask, gt=255 - source)
    triplets = read_triplets(tmp_path / "wide")
    spec = CacheSpec(mask_variants=2, mask_dilate_max=0.3)
    sizes = [(32, 64), (64, 32), (32, 64)]
    store = open_store(triplets, vae, sizes=sizes, spec=spec, root=tmp_path / "cache")
    masks = set()
    for number, size in enumerate(sizes):
        for flipped in (0, 1):
            for variant in range(3):
                pictures = prepare_pictures(
                    triplets[number], size, spec, flipped=flipped, variant=variant
                )
                assert pictures["gt"].shape == (*size, 3) and pictures["mask"].shape == size
                wanted = encode_pictures(vae, {k: x[None] for k, x in pictures.items()}, spec)
                found = store.read(number, flipped=flipped, variant=variant)
                assert set(found) == set(wanted) == {"gt", "masked", "mask"}
                for name in ("gt", "masked"):
                    assert found[name].shape == (4, size[0] // 4, size[1] // 4)
                    assert torch.allclose(
                        found[name].float(), wanted[name][0], rtol=2e-3, atol=2e-3
                    )
                assert torch.equal(found["mask"].float(), wanted["mask"][0])
                masks.add(pictures["mask"].tobytes())
    assert len(masks) == 18, "variants or flips are equal"


def test_variants_depend_on_the_masks_content_alone(triplets):
    spec = CacheSpec(mask_variants=3, mask_dilate_max=0.3, mask_loosen=2)
    exact = prepare_pictures(triplets[0], (32, 32), spec)["mask"]
    assert np.array_equal(exact, load_images(triplets[0])["mask"])
    variants = [prepare_pictures(triplets[0], (32, 32), spec, variant=v)["mask"] for v in (1, 2, 3)]
    assert len({v.tobytes() for v in variants}) > 1
    assert all((v[exact > 0] == 255).all() and v.sum() > exact.sum() for v in variants)
    mirrored = prepare_pictures(triplets[0], (32, 32), spec, variant=2, flipped=1)["mask"]
    assert np.array_equal(mirrored[:, ::-1], variants[1])
    shutil.copy(triplets[0].mask, triplets[1].mask)  # another triplet, the same mask
    other = prepare_pictures(triplets[1], (32, 32), spec, variant=2)["mask"]
    assert np.array_equal(other, variants[1])


def test_only_what_is_asked_for_is_made_and_read(vae, triplets, tmp_path):
    counting = Counting(vae)
    store = open_small(triplets, counting, tmp_path, spec=CacheSpec(parts=("gt",), flipped=False))
    assert len(counting.batches) == 5 and set(store.read(4)) == {"gt", "mask"}
    for index, options in ((5, {}), (-1, {}), (0, {"flipped": 1}), (0, {"variant": 1})):
        with pytest.raises(IndexError, match="no triplet"):
            store.read(index, **options)


def test_what_is_read_does_not_hold_on_to_the_shard(vae, triplets, tmp_path):
    for value in open_small(triplets, vae, tmp_path).read(1, flipped=1).values():
        assert value.untyped_storage().nbytes() == value.nbytes and value.is_contiguous()


def test_a_triplet_that_comes_twice_is_made_once(vae, triplets, tmp_path):
    counting = Counting(vae)
    store = open_small([*triplets[:2], *triplets[:2]], counting, tmp_path)
    assert len(counting.batches) == 8 and len(store) == 4 and len(store.paths) == 1
    assert torch.equal(store.read(1)["gt"], store.read(3)["gt"])


class Reads(torch.utils.data.Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(self.store)

    def __getitem__(self, index):
        return self.store.read(index, flipped=1)


def test_workers_read_it(vae, triplets, tmp_path):
    store = open_small(triplets, vae, tmp_path)
    here = [store.read(index, flipped=1) for index in range(5)]  # its files are open before a fork
    loader = torch.utils.data.DataLoader(
        Reads(store), batch_size=None, num_workers=1, multiprocessing_context="fork"
    )
    for wanted, found in zip(here, loader, strict=True):
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert_equal(pickle.loads(pickle.dumps(store)), store)


# --------------------------------------------------------------------------- made once, never stale


def test_a_second_opening_calls_no_vae(vae, triplets, tmp_path):
    first = open_small(triplets, vae, tmp_path)
    again = open_small(triplets, Counting(vae, after=0), tmp_path)
    assert again.paths == first.paths
    assert_equal(first, again)


@pytest.mark.slow
def test_whatever_latents_depend_on_names_other_files(vae, triplets, tmp_path):
    def list_files(of=triplets, size=(32, 32), **changes):
        return frozenset(
            open_small(
                of,
                vae,
                tmp_path / "cache",
                sizes=[size] * len(of),
                spec=CacheSpec(mask_variants=1, **changes),
            ).paths
        )

    files = [
        list_files(),
        list_files(size=(48, 48)),
        list_files(size=(32, 48)),
        list_files(of=triplets[::-1]),
        list_files(dtype="bf16"),
        list_files(flipped=False),
        list_files(resize_mode="squash"),
        list_files(center_crop=True),
        list_files(vae_precision="bf16"),
        list_files(mask_dilate_max=0.3),
        list_files(mask_loosen=2.0),
        list_files(parts=("masked",)),
    ]
    files.append(frozenset(open_small(triplets, vae, tmp_path / "cache").paths))
    with torch.no_grad():
        next(vae.encoder.parameters()).view(-1)[0] += 1e-3
    files.append(list_files())
    vae.register_to_config(scaling_factor=0.5)
    files.append(list_files())
    assert sum(map(len, files)) == len(frozenset().union(*files)), "two kinds share a file"
    (kind,) = {path.parent.parent for path in files[-1]}
    assert json.loads((kind / "kind.json").read_text())["config"]["scaling_factor"] == 0.5


def test_what_has_no_effect_shares_files(vae, triplets, tmp_path):
    first = open_small(triplets, vae, tmp_path)
    refuses = Counting(vae, after=0)
    for spec in (CacheSpec(mask_dilate_max=0.5), CacheSpec(mask_loosen=3)):  # without variants
        assert open_small(triplets, refuses, tmp_path, spec=spec).paths == first.paths


def test_an_added_triplet_makes_one_shard_anew(vae, tiny_set, tmp_path):
    triplets = read_triplets(tiny_set)
    open_small(triplets[:5], vae, tmp_path)
    counting = Counting(vae)
    store = open_small(triplets[:6], counting, tmp_path)
    assert len(counting.batches) == 2 * 4  # two triplets, two parts, flipped and not
    assert_equal(store, open_small(triplets[:6], vae, tmp_path / "other"))


def test_a_hard_link_made_meanwhile_changes_no_image(vae, triplets, tmp_path):
    counting = Counting(vae)
    encode = counting.encode

    def link(images):
        for triplet in triplets:
            (tmp_path / f"{triplet.id}-{len(counting.batches)}").hardlink_to(triplet.source)
        return encode(images)

    counting.encode = link
    assert len(open_small(triplets, counting, tmp_path / "cache")) == len(triplets)


def test_touched_files_are_hashed_again_and_changed_ones_encoded(
    vae, triplets, tmp_path, monkeypatch
):
    hashed, hash_file = [], latent_cache.hash_file
    monkeypatch.setattr(
        latent_cache, "hash_file", lambda path: hashed.append(Path(path)) or hash_file(path)
    )
    open_small(triplets, vae, tmp_path / "cache")
    assert len(hashed) == 15 and not hashed.clear()
    open_small(triplets, Counting(vae, after=0), tmp_path / "cache")
    assert hashed == []
    os.utime(triplets[1].mask)
    open_small(triplets, Counting(vae, after=0), tmp_path / "cache")
    assert hashed == [triplets[1].mask] and not hashed.clear()

    path, before = triplets[2].gt, triplets[2].gt.stat()
    data = path.read_bytes()
    picture = load_image(path)
    for value in range(1, 256):  # until another pixel is stored in as many bytes
        changed = picture.copy()
        changed[5, 5] ^= value
        save_image(path, changed)
        if path.stat().st_size == len(data) and path.read_bytes() != data:
            break
    else:
        pytest.fail("no image of the same length was found")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copying tool does
    counting = Counting(vae)
    store = open_small(triplets, counting, tmp_path / "cache")
    assert hashed == [path] and len(counting.batches) == 8
    assert_equal(store, open_small(triplets, vae, tmp_path / "other"))


def test_a_file_that_changes_while_it_is_encoded_is_not_cached(vae, triplets, tmp_path):
    counting, encode = Counting(vae), vae.encode

    def change(images):
        counting.batches.append(len(images))
        if len(counting.batches) == 8:  # the end of the first shard
            save_image(triplets[0].gt, load_image(triplets[0].gt) // 2)
        return encode(images)

    counting.encode = change
    with pytest.raises(TripletError, match=f"{triplets[0].gt}"):
        open_small(triplets, counting, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*/*/*.safetensors"))
    assert_equal(
        open_small(triplets, vae, tmp_path / "cache"), open_small(triplets, vae, tmp_path / "other")
    )


def test_a_damaged_index_is_made_again(vae, triplets, tmp_path, caplog, monkeypatch):
    open_small(triplets, vae, tmp_path / "cache")
    (index,) = (tmp_path / "cache" / "index").iterdir()
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join([*lines[:3], "{garbage\n", *lines[4:-1], lines[-1][:-9]]))
    open_small(triplets, Counting(vae, after=0), tmp_path / "cache")
    assert f"{index}: a torn line was skipped" in caplog.text
    monkeypatch.setattr(latent_cache, "hash_file", None)  # would fail if it were called
    open_small(triplets, Counting(vae, after=0), tmp_path / "cache")


def test_a_name_may_be_no_utf_8(tmp_path, monkeypatch):
    path = Path(os.fsdecode(bytes(tmp_path) + b"/\xff.png"))
    path.write_bytes(b"abc")
    (found,) = latent_cache.hash_files([path], tmp_path / "index")
    monkeypatch.setattr(latent_cache, "hash_file", None)
    assert latent_cache.hash_files([path], tmp_path / "index") == [found]


def test_hashes_of_another_set_in_the_same_folder_are_kept(triplets, tmp_path, monkeypatch):
    first, second = ([t.source for t in triplets[i : i + 2]] for i in (0, 2))
    latent_cache.hash_files(first, tmp_path / "index")
    latent_cache.hash_files(second, tmp_path / "index")
    monkeypatch.setattr(latent_cache, "hash_file", None)  # would fail if it were called
    found = latent_cache.hash_files([*first, *second], tmp_path / "index")
    assert len({row["sha256"] for row in found}) == 4


def test_interrupted_hashing_keeps_what_it_has(triplets, tmp_path, monkeypatch):
    files, hash_file = [t.source for t in triplets], latent_cache.hash_file

    def stop_at_the_last(path):
        if Path(path) == files[-1]:
            raise KeyboardInterrupt
        return hash_file(path)

    monkeypatch.setattr(latent_cache, "_HASHED_AT_ONCE", 1)
    monkeypatch.setattr(latent_cache, "hash_file", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        latent_cache.hash_files(files, tmp_path / "index")
    hashed = []
    monkeypatch.setattr(
        latent_cache, "hash_file", lambda path: hashed.append(Path(path)) or hash_file(path)
    )
    latent_cache.hash_files(files, tmp_path / "index")
    assert hashed == files[-1:]


# --------------------------------------------------------------------------- kills, damage, no room


def test_stopped_half_way_it_goes_on_with_the_missing_shards(vae, triplets, tmp_path):
    with pytest.raises(KeyboardInterrupt):  # in the second shard
        open_small(triplets, Counting(vae, after=10), tmp_path / "cache")
    assert len(list(tmp_path.glob("cache/*/*/*.safetensors"))) == 1
    counting = Counting(vae)
    whole = open_small(triplets, counting, tmp_path / "cache")
    assert len(counting.batches) == 3 * 4
    assert_equal(whole, open_small(triplets, vae, tmp_path / "other"))


def _die_while_renaming(vae, triplets, root):
    replace_file, renamed = os.replace, []

    def replace_or_die(beside, path):
        if str(path).endswith(".safetensors"):
            renamed.append(path)
            if len(renamed) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        replace_file(beside, path)

    os.replace = replace_or_die
    open_small(triplets, vae, root)


def test_killed_it_loses_the_shard_in_work_and_leaves_no_half_file(vae, triplets, tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=_die_while_renaming, args=(vae, triplets, tmp_path / "cache")
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (left,) = tmp_path.glob("cache/*/*/.*.partial")
    os.utime(left, (time.time() - 3700,) * 2)
    counting = Counting(vae)
    open_small(triplets, counting, tmp_path / "cache")
    assert len(counting.batches) == 3 * 4
    assert not list(tmp_path.glob("cache/*/*/.*.partial"))


def test_a_truncated_shard_is_made_again_with_a_warning(vae, triplets, tmp_path, caplog):
    store = open_small(triplets, vae, tmp_path / "cache")
    whole = read_all(store)
    for cut, path in ((100, store.paths[1]), (0, store.paths[2])):
        with open(path, "r+b") as stream:
            stream.truncate(cut)
    counting = Counting(vae)
    again = read_all(open_small(triplets, counting, tmp_path / "cache"))
    assert len(counting.batches) == 3 * 4
    assert all(np.array_equal(whole[key], again[key]) for key in whole)
    for path in store.paths[1:]:
        assert f"{path} is damaged" in caplog.text
    assert str(store.paths[0]) not in caplog.text


def test_what_dead_processes_left_is_removed(vae, triplets, tmp_path):
    folder = open_small(triplets, vae, tmp_path).paths[0].parent
    dead, young = folder / ".a.1.host.partial", folder / ".b.2.host.partial"
    for path, age in ((dead, 3700), (young, 3500)):  # one that is written is younger by far
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    open_small(triplets, vae, tmp_path)
    assert not dead.exists() and young.exists()


def test_a_full_disk_says_what_is_there_and_what_is_left(vae, triplets, tmp_path):
    sizes = [(32, 32)] * 2 + [(64, 64)] * 3
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))  # as if there was no more room
    try:
        with pytest.raises(OSError, match="1 of 3 shards are there and stay, about ") as caught:
            open_small(triplets, vae, tmp_path / "cache", sizes=sizes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = float(str(caught.value).split("about ")[1].split(" GB")[0])
    assert not list(tmp_path.rglob("*.partial"))
    counting = Counting(vae)
    store = open_small(triplets, counting, tmp_path / "cache", sizes=sizes)
    assert len(counting.batches) == 3 * 4
    assert left == pytest.approx(sum(p.stat().st_size for p in store.paths[1:]) / 1e9, rel=0.2)


def test_a_truncated_picture_is_named(vae, triplets, tmp_path):
    with open(triplets[3].gt, "r+b") as stream:
        stream.truncate(100)
    with pytest.raises(TripletError, match=triplets[3].gt.name):
        open_small(triplets, vae, tmp_path / "cache")
    triplets[3].gt.unlink()
    with pytest.raises(TripletError, match=f"{triplets[3].gt}"):
        open_small(triplets, vae, tmp_path / "cache")


# --------------------------------------------------------------------------- many processes


def _open_on_two(vae, triplets, roots, folder):
    """Open a store as one of two processes, and write what it did, or what stopped it."""
    AcceleratorState._reset_state(True)  # of the process that was forked
    rank = Accelerator().process_index
    hashed, hash_file = [], latent_cache.hash_file
    latent_cache.hash_file = lambda path: hashed.append(path) or hash_file(path)
    latent_cache.PATIENCE, vae = 0.3, Counting(vae)
    try:
        store = open_small(triplets, vae, roots[rank])
        found = {"encoded": len(vae.batches), "hashed": len(hashed), "read": len(read_all(store))}
    except (OSError, RuntimeError, ValueError) as error:
        found = {"error": type(error).__name__, "text": str(error)}
    (folder / f"{rank}.json").write_text(json.dumps(found))


def open_on_two(vae, triplets, roots, folder):
    debug_launcher(_open_on_two, (vae, triplets, roots, folder), num_processes=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_share_the_work(vae, tiny_set, tmp_path):
    triplets, cache = read_triplets(tiny_set), tmp_path / "cache"
    # ten triplets in five shards, four encodings each: three shards and two
    assert open_on_two(vae, triplets, [cache, cache], tmp_path) == [
        {"encoded": 24, "hashed": 15, "read": 60},
        {"encoded": 16, "hashed": 15, "read": 60},
    ]
    assert_equal(
        open_small(triplets, Counting(vae, after=0), cache),
        open_small(triplets, vae, tmp_path / "other"),
    )
    for path in list(cache.glob("*/*/*.safetensors"))[:2]:
        path.unlink()
    assert (
        open_on_two(vae, triplets, [cache, cache], tmp_path)
        == [
            {
                "encoded": 8,
                "hashed": 0,
                "read": 60,
            }  # what is missing is shared out, wherever it was
        ]
        * 2
    )


def test_a_folder_that_is_not_shared_is_a_clear_error(vae, triplets, tmp_path):
    found = open_on_two(vae, triplets, [tmp_path / "a", tmp_path / "b"], tmp_path)
    assert [x["error"] for x in found] == ["FileNotFoundError"] * 2
    for rank in (0, 1):
        assert f"process {rank} does not see {tmp_path}" in found[rank]["text"]
        assert "latent_cache_dir has to be a folder" in found[rank]["text"]
    # what each process made stays
    assert [len(list(tmp_path.glob(f"{name}/*/*/*.safetensors"))) for name in "ab"] == [2, 1]


@pytest.mark.parametrize("spoil", ["hash", "encode"])
def test_what_stops_one_process_stops_both(vae, triplets, tmp_path, monkeypatch, spoil):
    def fail(function):
        def call(*given):
            if PartialState().process_index == 1:
                raise ValueError("it does not go on")
            return function(*given)

        return call

    if spoil == "hash":
        monkeypatch.setattr(latent_cache, "_hash", fail(latent_cache._hash))
    else:
        monkeypatch.setattr(latent_cache, "_save_shard", fail(latent_cache._save_shard))
    found = open_on_two(vae, triplets, [tmp_path / "cache"] * 2, tmp_path)
    assert found == [
        {"error": "RuntimeError", "text": "process 1: it does not go on"},
        {"error": "ValueError", "text": "it does not go on"},
    ]
    # the other one has not gone on for nothing
    shards = list((tmp_path / "cache").glob("*/*/*.safetensors"))
    assert len(shards) == (0 if spoil == "hash" else 1)
    open_small(triplets, vae, tmp_path / "cache")


def test_a_process_that_is_killed_ends_the_other_and_what_is_made_stays(
    vae, triplets, tmp_path, monkeypatch
):
    save_shard = latent_cache._save_shard

    def die(*given):
        if PartialState().process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        save_shard(*given)

    monkeypatch.setattr(latent_cache, "_save_shard", die)
    began = time.monotonic()
    with pytest.raises(ProcessExitedException, match="process 1 terminated with signal SIGKILL"):
        open_on_two(vae, triplets, [tmp_path / "cache"] * 2, tmp_path)
    assert time.monotonic() - began < 60
    monkeypatch.undo()
    made = list((tmp_path / "cache").glob("*/*/*.safetensors"))
    counting = Counting(vae)
    store = open_small(triplets, counting, tmp_path / "cache")
    assert len(made) <= 1 and len(counting.batches) == 4 * (5 - 2 * len(made))
    assert_equal(store, open_small(triplets, vae, tmp_path / "other"))


# --------------------------------------------------------------------------- sizes and precision


def test_every_triplet_has_a_size_of_its_own(vae, triplets, tmp_path):
    sizes = [(32, 48), (32, 32), (32, 48), (64, 32), (32, 48)]
    store = open_small(triplets, vae, tmp_path, sizes=sizes)
    assert [tuple(store.read(i)["gt"].shape) for i in range(5)] == [
        (4, height // 4, width // 4) for height, width in sizes
    ]
    assert len(store.paths) == 4  # two of the first size, one of each other
    for index, size in enumerate(sizes):
        alone = open_store([triplets[index]], vae, sizes=[size], root=tmp_path / "other")
        assert torch.allclose(
            store.read(index)["masked"].float(), alone.read(0)["masked"].float(), atol=2e-3
        )


def test_sizes_that_do_not_suit_are_refused(vae, triplets, tmp_path):
    with pytest.raises(ValueError, match="images of 34x32 px do not suit this VAE"):
        open_small(triplets, vae, tmp_path, sizes=[(34, 32)] * 5)
    with pytest.raises(ValueError, match="5 triplets but 4 sizes"):
        open_small(triplets, vae, tmp_path, sizes=[(32, 32)] * 4)


def test_large_pictures_are_encoded_few_at_a_time(vae, triplets, tmp_path):
    counting = Counting(vae)
    counting.encode = lambda images: counting.batches.append(len(images)) or _pool(images)
    for size, batches in (
        ((512, 512), [4, 1]),
        ((1024, 512), [2, 2, 1]),
        ((1024, 2048), [1] * 5),
        ((256, 256), [4, 1]),
    ):
        counting.batches.clear()
        open_store(
            triplets,
            counting,
            sizes=[size] * 5,
            root=tmp_path,
            batch_size=4,
            spec=CacheSpec(parts=("gt",), flipped=False),
        )
        assert counting.batches == batches, size


def _pool(images):
    pooled = torch.nn.functional.avg_pool2d(images, 8)
    return type("Encoded", (), {"latents": pooled.mean(1, keepdim=True).repeat(1, 4, 1, 1)})


def test_where_memory_does_not_do_a_batch_is_halved(vae, triplets, tmp_path):
    counting, encode = Counting(vae), vae.encode

    def refuse_three(images):
        if len(images) > 2:
            raise torch.OutOfMemoryError
        counting.batches.append(len(images))
        return encode(images)

    counting.encode = refuse_three
    spec = CacheSpec(parts=("gt",), flipped=False)
    store = open_small(
        triplets, counting, tmp_path / "cache", spec=spec, batch_size=5, shard_size=5
    )
    assert counting.batches == [2, 1, 2]
    for number, triplet in enumerate(triplets):
        whole = sdxl.to_tensor(load_images(triplet)["gt"][None])
        with torch.no_grad():
            wanted = sdxl.encode_images(vae, whole)[0]
        assert torch.allclose(store.read(number)["gt"].float(), wanted, atol=2e-3)


def test_latents_that_overflow_in_half_precision_are_encoded_in_float32(
    vae, triplets, tmp_path, caplog
):
    latents._warn_overflow.cache_clear()
    wanted = open_small(triplets, vae, tmp_path / "cache")
    counting, encode = Counting(vae), vae.encode

    def overflow(images):
        counting.batches.append(torch.is_autocast_enabled("cpu"))
        encoded = encode(images)
        if counting.batches[-1] and len(counting.batches) in (1, 4):
            encoded.latents[0, 1, 2, 3] = torch.inf
        return encoded

    counting.encode = overflow
    half = open_small(triplets, counting, tmp_path / "cache", spec=CacheSpec(vae_precision="bf16"))
    assert counting.batches == [True, False, True, True, False] + [True] * 17
    assert torch.equal(half.read(0)["gt"], wanted.read(0)["gt"])
    assert not torch.equal(half.read(1)["gt"], wanted.read(1)["gt"])
    assert torch.allclose(half.read(1)["gt"], wanted.read(1)["gt"], atol=0.05)
    assert caplog.text.count("the VAE overflows in bf16") == 1


@pytest.mark.parametrize(
    "value, words", [(np.nan, "are not finite in fp16"), (1e6, "are not finite in fp16")]
)
def test_latents_that_cannot_be_kept_are_named(vae, triplets, tmp_path, value, words):
    counting, encode = Counting(vae), vae.encode

    def spoil(images):
        encoded = encode(images)
        encoded.latents[0, 0, 0, 0] = value
        return encoded

    counting.encode = spoil
    with pytest.raises(ValueError, match=f"{triplets[0].source.name}.*{words}"):
        open_small(triplets, counting, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*/*/*.safetensors"))


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"dtype": "fp32"}, "dtype is 'fp32': take fp16 or bf16"),
        ({"resize_mode": "stretch"}, "take crop or squash"),
        ({"vae_precision": "int8"}, "take fp32 or fp16 or bf16"),
        ({"parts": ("GT",)}, "take some of gt, masked, source"),
        ({"mask_loosen": -1}, "mask_loosen is -1"),
        ({"mask_variants": 2, "parts": ("gt",)}, "needs masked"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        CacheSpec(**wrong)


def test_encoding_is_not_lowered_by_the_trainings_autocast(vae, triplets):
    pictures = {k: x[None] for k, x in prepare_pictures(triplets[0], (32, 32), ALL).items()}
    plain = encode_pictures(vae, pictures, ALL)
    with torch.autocast("cpu", torch.bfloat16):
        inside = encode_pictures(vae, {k: torch.from_numpy(x) for k, x in pictures.items()}, ALL)
    assert all(torch.equal(plain[name], inside[name]) for name in plain)
    assert {x.dtype for x in plain.values()} == {torch.float32}


def test_sizes_are_read_from_headers(triplets, tmp_path):
    save_image(triplets[1].source, np.zeros((20, 50, 3), np.uint8))
    assert read_sizes(triplets) == [(32, 32), (20, 50)] + [(32, 32)] * 3
    triplets[2].source.write_bytes(b"no image")
    with pytest.raises(TripletError, match=triplets[2].source.name):
        read_sizes(triplets)


def test_it_lives_below_the_kits_cache(vae, triplets, rorem_cache):
    store = open_store(triplets, vae, sizes=[(32, 32)] * 5)
    assert all(path.is_relative_to(rorem_cache / "latents") for path in store.paths)


def test_a_batch_that_does_not_fit_is_halved_and_its_memory_given_back(vae, monkeypatch):
    """What the failed encoding had computed must be gone when the halves are encoded."""
    alive, sizes, encode = [], [], sdxl.encode_images

    def run_out(vae, images):
        assert not [x for x in alive if x() is not None]
        activations = images * 2
        alive.append(weakref.ref(activations))
        sizes.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(vae, images)

    pictures = {name: np.full((3, 32, 32, 3), 90, np.uint8) for name in ("gt", "source")}
    pictures["mask"] = np.zeros((3, 32, 32), np.uint8)
    spec = CacheSpec(parts=("gt",))
    whole = encode_pictures(vae, pictures, spec)["gt"]
    monkeypatch.setattr(sdxl, "encode_images", run_out)
    parts = encode_pictures(vae, pictures, spec)["gt"]
    assert sizes == [3, 2, 1, 1, 1]
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_variants_that_would_all_be_the_mask_are_refused():
    with pytest.raises(ValueError, match="mask_variants"):
        CacheSpec(mask_variants=2, mask_dilate_max=0.0, mask_loosen=0.0)
