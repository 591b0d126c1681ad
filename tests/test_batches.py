"""Batches of opened triplets: what opening one by one gives, ahead by little, no thread left."""

import threading
import time
from functools import partial

import numpy as np
import pytest

from rorem_lib.data.pictures import TripletError, save_image
from rorem_lib.data.triplets import load_images, read_triplets
from rorem_lib.data.writer import TripletWriter
from rorem_lib.training.latent_cache import read_batches
from rorem_lib.workers import group_chunks

load = partial(load_images, size=24)


def _write(folder, count, gt=True):
    """Triplets of different sizes."""
    rng = np.random.default_rng(1)
    with TripletWriter(folder) as writer:
        for number in range(count):
            source = rng.integers(0, 256, (30 + number, 40, 3), dtype=np.uint8)
            mask = np.zeros(source.shape[:2], np.uint8)
            mask[5:15, 5 : 15 + number] = 255
            writer.add(id=f"{number:03d}", source=source, mask=mask, gt=source // 2 if gt else None)
    return read_triplets(folder, require_gt=gt)


@pytest.fixture(autouse=True)
def no_thread_stays():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("batch_size, threads", [(4, 2), (1, 1), (11, None), (40, 3)])
def test_batches_are_what_opening_one_by_one_gives(tmp_path, batch_size, threads):
    triplets = _write(tmp_path, 11)
    found = list(read_batches(load, group_chunks(triplets, batch_size), threads=threads))
    sizes = [min(batch_size, 11 - first) for first in range(0, 11, batch_size)]
    assert [len(batch["mask"]) for batch in found] == sizes
    for part, shape in (("source", (24, 24, 3)), ("mask", (24, 24)), ("gt", (24, 24, 3))):
        stacked = np.concatenate([batch[part] for batch in found])
        assert stacked.dtype == np.uint8 and stacked.shape == (11, *shape)
        assert np.array_equal(stacked, [load_images(t, size=24)[part] for t in triplets])


def test_a_pool_has_no_gt_and_nothing_gives_no_batch(tmp_path):
    pool = _write(tmp_path, 3, gt=False)
    assert [set(batch) for batch in read_batches(load, [pool[:2], pool[2:]])] == [
        {"source", "mask"}
    ] * 2
    assert list(read_batches(load, [])) == []


def test_batches_may_differ_in_size_and_number(tmp_path):
    triplets = _write(tmp_path, 5)
    chunks = [[(t, (24, 32)) for t in triplets[:4]], [(triplets[4], (16, 40))]]
    found = list(read_batches(lambda item: load_images(item[0], size=item[1], mode="crop"), chunks))
    assert [batch["gt"].shape for batch in found] == [(4, 24, 32, 3), (1, 16, 40, 3)]


def test_slow_pictures_keep_their_place():
    def load_slowly(number):
        time.sleep(0.05 * (number % 3 == 0))
        return {"mask": np.full((2, 2), number, np.uint8), "gt": None}

    found = np.concatenate(
        [
            batch["mask"][:, 0, 0]
            for batch in read_batches(load_slowly, group_chunks(range(12), 5), threads=4)
        ]
    )
    assert found.tolist() == list(range(12))


@pytest.mark.parametrize("options, ahead", [({}, 2), ({"ahead": 0}, 0)])
def test_so_many_batches_are_decoded_ahead_and_no_more(options, ahead, tmp_path):
    triplets = _write(tmp_path, 12)
    taken = []
    reader = read_batches(
        load, group_chunks((taken.append(t) or t for t in triplets), 2), **options
    )
    for number in range(1, 4):
        next(reader)
        assert len(taken) == 2 * (number + ahead)
    reader.close()
    assert len(taken) == 2 * (3 + ahead)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda t: t.mask.write_bytes(b""), r"mask/006\.png is empty"),
        (lambda t: t.gt.unlink(), r"GT/006\.png does not exist"),
        (
            lambda t: save_image(t.gt, np.zeros((9, 9, 3), np.uint8)),
            r"GT/006\.png is 9x9 px but .*006",
        ),
    ],
    ids=["empty", "missing", "another size"],
)
def test_what_cannot_be_read_is_named_in_its_turn(tmp_path, damage, words):
    triplets = _write(tmp_path, 11)
    damage(triplets[6])
    reader = read_batches(load, group_chunks(triplets, 4))
    assert len(next(reader)["mask"]) == 4
    with pytest.raises(TripletError, match=words):
        next(reader)
