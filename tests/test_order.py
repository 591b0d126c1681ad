"""The order of samples: each once an epoch, one shape a step, alike on any number of processes."""

import math
import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rorem_lib.training.sampler import (
    BucketSampler,
    PositionSampler,
    ShuffledOrder,
    assign_buckets,
    make_buckets,
    split_chunks,
)


def make_positions(batch, accumulate, world, rank, *, first=0, last=5):
    config = SimpleNamespace(
        train_batch_size=batch, gradient_accumulation_steps=accumulate, max_train_steps=last
    )
    return PositionSampler(config, SimpleNamespace(process_index=rank, num_processes=world), first)


# -------------------------------------------------------------------------------------- one bucket


def test_order_visits_everything_once_an_epoch_and_shuffles_each_anew():
    order = ShuffledOrder(7, seed=1)
    epochs = [[order.get_index(p) for p in range(e * 7, e * 7 + 7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[1] == [ShuffledOrder(7, seed=1).get_index(p) for p in range(7, 14)]
    assert epochs[0] != [ShuffledOrder(7, seed=2).get_index(p) for p in range(7)]


def test_order_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="training set is empty"):
        ShuffledOrder(0, seed=1)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_a_global_batch_without_gap_or_overlap(world):
    ranks = [list(make_positions(8 // world, 2, world, r, first=2)) for r in range(world)]
    steps = [sum((ranks[r][n] for r in range(world)), []) for n in range(len(ranks[0]))]
    assert steps == [list(range(8 * n, 8 * n + 8)) for n in range(4, 10)]
    assert {len(make_positions(8 // world, 2, world, r, first=2)) for r in range(world)} == {6}


def test_batches_cross_epochs_so_that_none_is_short():
    order = ShuffledOrder(10, seed=3)
    batches = [[order.get_index(p) for p in batch] for batch in make_positions(4, 1, 1, 0)]
    assert [len(batch) for batch in batches] == [4] * 5
    assert set(Counter(sum(batches, [])).values()) == {2}


@pytest.mark.parametrize(
    "sizes, weights, bucket", [([23], [1.0], 0), ([0, 23, 0], [0, 0.2, 0], 1), ([9, 23], [0, 7], 1)]
)
def test_a_single_bucket_in_use_is_the_plain_order(sizes, weights, bucket):
    order, plain = BucketSampler(sizes, weights, seed=4, global_batch=6), ShuffledOrder(23, seed=4)
    assert [order.find(p) for p in range(300)] == [(bucket, plain.get_index(p)) for p in range(300)]


# ------------------------------------------------------------------------------------- two or more


def list_steps(order, steps, batch):
    return [[order.find(p) for p in range(s * batch, s * batch + batch)] for s in range(steps)]


def test_all_samples_of_a_step_are_of_one_bucket():
    order = BucketSampler([20, 7, 11], [0.5, 0.2, 0.3], seed=1, global_batch=6)
    for step in list_steps(order, 200, 6):
        assert len({bucket for bucket, _ in step}) == 1


def test_in_each_bucket_all_are_seen_once_before_any_is_seen_twice():
    sizes = [20, 7, 11]
    order = BucketSampler(sizes, [0.5, 0.2, 0.3], seed=1, global_batch=6)
    seen = {bucket: [] for bucket in range(3)}
    for bucket, index in sum(list_steps(order, 300, 6), []):
        seen[bucket].append(index)
    for bucket, size in enumerate(sizes):
        epochs = [seen[bucket][n : n + size] for n in range(0, len(seen[bucket]) - size, size)]
        assert len(epochs) > 5
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 98, 1], [5, 1, 1, 1, 1, 2]])
def test_every_bucket_has_its_share_of_the_steps_at_any_time(weights, seed):
    order = BucketSampler([9] * len(weights), weights, seed=seed, global_batch=1)
    chosen = np.array([order.find(p)[0] for p in range(20_000)])
    steps = np.arange(1, len(chosen) + 1)
    for bucket, weight in enumerate(weights):
        error = (chosen == bucket).cumsum() - steps * weight / sum(weights)
        assert np.abs(error).max() < 4  # a fair die is off by about 100


def test_another_seed_has_other_buckets():
    def choose(seed):
        order = BucketSampler([9, 9], [1, 1], seed=seed, global_batch=4)
        return [order.find(4 * step)[0] for step in range(40)]

    assert choose(1) == choose(1) != choose(2)


def test_what_was_asked_before_changes_nothing():
    fresh = BucketSampler([50, 31], [2, 1], seed=5, global_batch=4)
    late = fresh.find(4 * 30_000 + 1)  # as after a resume: nothing before it was asked for
    used = BucketSampler([50, 31], [2, 1], seed=5, global_batch=4)
    for position in range(0, 4 * 9000, 3):
        used.find(position)
    copied = pickle.loads(pickle.dumps(used))
    assert used.find(4 * 30_000 + 1) == copied.find(4 * 30_000 + 1) == late
    assert [fresh.find(p) for p in range(400)] == [copied.find(p) for p in range(400)]


@pytest.mark.parametrize("batch, accumulate, world", [(4, 1, 2), (2, 2, 2), (1, 4, 2), (2, 4, 1)])
def test_however_a_global_batch_is_split_each_step_has_the_same_samples(batch, accumulate, world):
    def collect(batch, accumulate, world):
        order = BucketSampler([20, 7, 11], [0.5, 0.2, 0.3], seed=1, global_batch=8)
        steps = [[] for _ in range(40)]
        for rank in range(world):
            positions = make_positions(batch, accumulate, world, rank, last=40)
            for number, micro in enumerate(positions):
                steps[number // accumulate] += [order.find(p) for p in micro]
        return [sorted(step) for step in steps]

    whole = collect(8, 1, 1)
    assert collect(batch, accumulate, world) == whole
    assert len({step[0][0] for step in whole}) == 3


def test_fifty_thousand_steps_of_192_are_not_kept():
    order = BucketSampler([40_000, 9000, 6000], [0.7, 0.2, 0.1], seed=1, global_batch=192)
    for step in range(50_000):
        order.find(step * 192)
    assert len(pickle.dumps(order)) < 3e6  # an epoch's shuffle, not 9.6 million places


@pytest.mark.parametrize(
    "sizes, weights, complaint",
    [
        ([], [], "training set is empty"),
        ([0, 0], [0, 0], "training set is empty"),
        ([5, 0], [1, 0.5], "without samples"),
        ([5, 5], [1, -1], "at least 0"),
        ([5, 5], [1, math.nan], "at least 0"),
        ([5, 5], [1], "2 buckets but 1 weights"),
    ],
)
def test_buckets_that_cannot_be_drawn_from_are_refused(sizes, weights, complaint):
    with pytest.raises(ValueError, match=complaint):
        BucketSampler(sizes, weights, seed=1, global_batch=4)


# ------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize(
    "resolution, unit, step",
    [(512, 32, 0), (1024, 32, 0), (64, 8, 0), (96, 8, 0), (544, 32, 0), (512, 32, 32)],
)
def test_buckets_are_no_larger_than_the_square_and_turn_alike(resolution, unit, step):
    buckets = make_buckets(resolution, unit=unit, step=step)
    taken = step or max(unit, resolution // 8 // unit * unit)
    assert (resolution, resolution) in buckets
    assert {(w, h) for h, w in buckets} == set(buckets)
    ratios = [h / w for h, w in buckets]
    assert ratios == sorted(set(ratios)) and ratios[0] == 0.5 and ratios[-1] == 2
    for height, width in buckets:
        assert 0.7 * resolution**2 < height * width <= resolution**2
        assert height == width or (height % taken == 0 and width % taken == 0)


def test_the_buckets_of_512_px_are_these():
    assert make_buckets(512, unit=32) == [
        (320, 640),
        (384, 640),
        (448, 576),
        (512, 512),
        (576, 448),
        (640, 384),
        (640, 320),
    ]


def test_sides_that_the_model_cannot_halve_are_refused():
    with pytest.raises(ValueError, match="resolution of 500 px.*multiple of 32"):
        make_buckets(500, unit=32)
    with pytest.raises(ValueError, match="bucket_step 48.*32"):
        make_buckets(512, unit=32, step=48)


BUCKETS = make_buckets(64, unit=8)  # 40x80 48x80 56x72 64x64 72x56 80x48 80x40


def test_a_picture_goes_to_the_bucket_of_the_nearest_ratio():
    sizes = [(480, 640), (640, 480), (1000, 1000), (100, 400), (3000, 2000), (64, 65)]
    chosen = [BUCKETS[n] for n in assign_buckets(sizes, BUCKETS, min_images=1)]
    assert chosen == [(56, 72), (72, 56), (64, 64), (40, 80), (80, 48), (64, 64)]


def test_buckets_with_few_pictures_move_towards_the_square_until_they_are_enough():
    wide, middle, square, tall = (40, 80), (48, 80), (64, 64), (80, 40)
    sizes = [wide] * 3 + [middle] * 2 + [square] * 9 + [tall] * 4

    def count(min_images):
        chosen = assign_buckets(sizes, BUCKETS, min_images=min_images)
        return dict(Counter(BUCKETS[n] for n in chosen))

    assert count(1) == {wide: 3, middle: 2, square: 9, tall: 4}
    assert count(3) == {wide: 3, square: 11, tall: 4}
    assert count(4) == {middle: 5, square: 9, tall: 4}
    assert count(6) == {square: 18}


def test_a_square_with_few_pictures_joins_the_nearest_bucket_that_has_enough():
    sizes = [(64, 64)] * 2 + [(56, 72)] * 8 + [(80, 40)] * 8
    chosen = [BUCKETS[n] for n in assign_buckets(sizes, BUCKETS, min_images=4)]
    assert chosen == [(56, 72)] * 10 + [(80, 40)] * 8


def test_too_few_pictures_in_all_are_trained_as_squares():
    chosen = assign_buckets([(40, 80), (80, 40), (64, 64)], BUCKETS, min_images=10)
    assert [BUCKETS[n] for n in chosen] == [(64, 64)] * 3
    assert assign_buckets([], BUCKETS, min_images=10) == []


# ------------------------------------------------------------------------------------------ chunks


@pytest.mark.parametrize(
    "allowed, each, lengths",
    [
        (16 * 512**2, 512**2, [16]),
        (16 * 512**2, 1024**2, [4] * 4),
        (16 * 512**2, 320 * 640, [16]),
        (16 * 512**2, 768**2, [6, 5, 5]),
        (100, 1024**2, [1] * 16),
    ],
)
def test_chunks_are_equal_and_no_larger_than_allowed(allowed, each, lengths):
    batch = {"gt": torch.arange(32.0).view(16, 2), "timestep": torch.arange(16)}
    chunks = split_chunks(batch, allowed, each)
    assert [len(chunk["gt"]) for chunk in chunks] == lengths
    for name, value in batch.items():
        assert torch.equal(torch.cat([chunk[name] for chunk in chunks]), value)


def test_gradients_of_weighted_chunks_are_those_of_the_whole_batch():
    torch.manual_seed(1)
    model, batch = torch.nn.Conv2d(3, 2, 3), {"x": torch.randn(7, 3, 8, 8)}

    def compute_gradient(chunks):
        model.zero_grad()
        for chunk in chunks:
            loss = model(chunk["x"]).square().mean()
            (loss * len(chunk["x"]) / 7).backward()
        return model.weight.grad.clone()

    chunks = split_chunks(batch, 3 * 64, 64)
    assert [len(chunk["x"]) for chunk in chunks] == [3, 2, 2]
    torch.testing.assert_close(
        compute_gradient(chunks), compute_gradient([batch]), rtol=1e-5, atol=1e-7
    )
