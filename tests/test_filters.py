"""The filters: limits, shifts, hashes, near-duplicates."""

import io
import time

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs
from sklearn.datasets import load_sample_images

from rorem_lib.data import filters
from rorem_lib.data.assembly import assemble_sets
from rorem_lib.data.filters import FilterConfig, check_pictures, find_duplicates, hash_picture
from rorem_lib.data.items import Picture, Pictures, Rejected
from rorem_lib.data.pictures import save_image
from rorem_lib.data.writer import TripletWriter
from rorem_lib.sources.upstream import UpstreamSource

PHOTOS = [
    *load_sample_images().images,
    photographs.astronaut(),
    photographs.coffee(),
    photographs.rocket(),
    photographs.chelsea(),
]


def _pictures(source, mask, gt):
    return Pictures(Picture(source), Picture(mask), None if gt is None else Picture(gt), None)


def _mask(shape, side):
    mask = np.zeros(shape[:2], np.uint8)
    mask[50 : 50 + side, 60 : 60 + side] = 255
    return mask


def _reject(source, mask, gt, **limits):
    with pytest.raises(Rejected) as caught:
        check_pictures(_pictures(source, mask, gt), FilterConfig(**limits))
    return caught.value.reason


def test_each_limit_is_where_it_says():
    source = np.full((200, 200, 3), 100, np.uint8)
    gt, mask = source.copy(), _mask(source.shape, 40)  # 4 % of the image
    gt[mask > 0] = 104
    found = check_pictures(
        _pictures(source, mask, gt),
        FilterConfig(min_mask_area=0.04, max_mask_area=0.041, min_change=4, min_side=200),
    )
    assert (found["mask_area"], found["change_inside"], found["change_outside"]) == (0.04, 4, 0)
    assert _reject(source, mask, gt, min_mask_area=0.0401) == "mask area"
    assert _reject(source, mask, gt, max_mask_area=0.0399) == "mask area"
    assert _reject(source, mask, gt, min_change=4.1) == "unchanged"
    assert _reject(source, mask, gt, min_side=201) == "small image"
    assert _reject(source[:150], mask[:150], gt[:150], min_side=151) == "small image"
    assert _reject(source, mask[:-1], gt) == "sizes differ"
    assert _reject(source, mask, gt[:, :-1]) == "sizes differ"
    assert _reject(source, mask * 0, gt) == "empty mask"
    assert _reject(source, mask * 0 + 255, gt) == "white mask"
    lighter = gt + 6
    check_pictures(_pictures(source, mask, lighter), FilterConfig(max_change_outside=6))
    assert _reject(source, mask, lighter, max_change_outside=5.9) == "changed outside"
    assert set(check_pictures(_pictures(source, mask, None), FilterConfig())) == {
        "mask_area",
        "phash",
    }


def test_grey_of_128_is_white_and_a_mask_over_almost_everything_has_no_outside():
    source = np.full((200, 200, 3), 100, np.uint8)
    mask, gt = _mask(source.shape, 40) // 255 * 127, source + 9
    assert _reject(source, mask, gt) == "empty mask"
    found = check_pictures(_pictures(source, mask + mask // 127, gt), FilterConfig(min_change=9))
    assert found["mask_area"] == 0.04
    mask[:] = 255
    mask[:2] = 0  # its blended edge is wider than that
    found = check_pictures(_pictures(source, mask, source + 60), FilterConfig(max_mask_area=1))
    assert found["change_outside"] == 0


def test_the_largest_shift_is_a_share_of_the_longer_side():
    photo = cv2.resize(PHOTOS[0], (1000, 600), interpolation=cv2.INTER_AREA)
    mask = _mask(photo.shape, 100)
    gt = np.roll(photo, 8, axis=1)
    gt[mask > 0] = 90
    shift = filters.measure_shift(photo, gt, mask)
    limits = {"max_change_outside": 255, "max_shift": shift / 1000 + 1e-9}
    check_pictures(_pictures(photo, mask, gt), FilterConfig(**limits))
    assert _reject(photo, mask, gt, **limits | {"max_shift": shift / 1000 - 1e-6}) == "misaligned"


@pytest.mark.parametrize(
    "limits",
    [
        {"min_mask_area": 0.5, "max_mask_area": 0.4},
        {"max_mask_area": 1.1},
        {"duplicate_distance": 17},
        {"min_change": -1},
    ],
)
def test_impossible_limits_are_refused(limits):
    with pytest.raises(ValueError):
        FilterConfig(**limits)


@pytest.mark.parametrize("number", range(len(PHOTOS)))
def test_a_moved_camera_is_measured_and_light_is_not(number):
    photo = cv2.resize(PHOTOS[number], (960, 640), interpolation=cv2.INTER_AREA)
    mask = _mask(photo.shape, 200)
    rng = np.random.default_rng(number)
    dimmed = np.clip(photo * 0.9 + rng.normal(0, 2, photo.shape), 0, 255).astype(np.uint8)
    dimmed[300:420, 100:500] = dimmed[300:420, 100:500] // 2  # a shadow that went away
    dimmed[mask > 0] = 90
    assert filters.measure_shift(photo, dimmed, mask) < 1
    for shift in (8, 16):
        moved = np.roll(dimmed, shift, axis=1)
        assert filters.measure_shift(photo, moved, mask) == pytest.approx(shift, abs=1.5)
    with pytest.raises(Rejected) as caught:
        check_pictures(_pictures(photo, mask, np.roll(dimmed, 16, axis=0)), FilterConfig())
    assert caught.value.reason == "misaligned"


@pytest.mark.parametrize("size", [(256, 135), (225, 135), (243, 200), (256, 256)])
def test_pictures_of_odd_sizes_are_not_half_a_pixel_off(size):
    photo = cv2.resize(PHOTOS[0], size, interpolation=cv2.INTER_AREA)
    noise = np.random.default_rng(0).normal(0, 1, photo.shape)
    again = np.clip(photo + noise, 0, 255).astype(np.uint8)
    assert filters.measure_shift(photo, again, np.zeros(photo.shape[:2], np.uint8)) < 0.1


@pytest.mark.parametrize("number", range(len(PHOTOS)))
def test_a_shift_is_measured_to_half_a_pixel_of_256(number):
    photo = cv2.resize(PHOTOS[number], (1024, 768), interpolation=cv2.INTER_AREA)
    mask = _mask(photo.shape, 240)
    for x, y in ((0.5, 0), (0, 1), (1.5, -1), (-2.5, 0.75), (3, 4)):
        moved = cv2.warpAffine(
            photo,
            np.float32([[1, 0, 4 * x], [0, 1, 4 * y]]),
            (1024, 768),
            borderMode=cv2.BORDER_REFLECT,
        )
        moved[mask > 0] = 90
        assert filters.measure_shift(photo, moved, mask) == pytest.approx(4 * np.hypot(x, y), abs=2)


def test_what_lies_in_the_mask_moves_no_camera():
    photo = cv2.resize(PHOTOS[3], (960, 640), interpolation=cv2.INTER_AREA)
    mask, other = _mask(photo.shape, 560), cv2.resize(PHOTOS[2], (960, 640))
    for shift in (0, 8):
        gt = np.roll(photo, shift, axis=1)
        source = np.where(mask[..., None] > 0, other, photo)
        gt[mask > 0] = np.roll(other, 20, axis=1)[mask > 0]
        assert filters.measure_shift(source, gt, mask) == pytest.approx(shift, abs=2)


def _save_jpeg(picture, quality):
    buffer = io.BytesIO()
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return np.array(Image.open(buffer))


@pytest.mark.parametrize("width, height", [(640, 480), (300, 200)])
def test_neither_noise_nor_compression_of_smooth_pictures_is_a_moved_camera(width, height):
    y, x = np.mgrid[:height, :width].astype(np.float32)
    mask = np.zeros((height, width), np.uint8)
    mask[height // 3 : height // 2, width // 3 : width // 2] = 255
    rng = np.random.default_rng(0)
    blobs = rng.integers(80, 180, (4, 5)).astype(np.float32)
    ramps = {
        "flat": x * 0 + 120,
        "along": 60 + 120 * x / width,
        "across": 60 + 60 * x / width + 60 * y / height,
        "vignette": 200 - 100 * np.hypot(x / width - 0.5, y / height - 0.5),
        "blobs": cv2.resize(blobs, (width, height), interpolation=cv2.INTER_CUBIC),
    }
    called = []
    for name, ramp in ramps.items():
        for noise in (0, 1, 3):
            for quality in (90, 60, 30):
                pair = [
                    _save_jpeg(
                        ramp[..., None] + light + rng.normal(0, noise, (height, width, 3)), quality
                    )
                    for light in (0, 3)
                ]
                pair[1][mask > 0] = 10
                if filters.measure_shift(*pair, mask) > FilterConfig().max_shift * width:
                    called.append((name, noise, quality))
    assert not called


def test_a_blurred_photograph_in_another_light_did_not_move():
    photo = np.repeat(photographs.clock()[..., None], 3, axis=2)
    height, width = photo.shape[:2]
    rng = np.random.default_rng(0)
    for share in (0.2, 0.5, 0.8):  # of each side
        low, high = (1 - share) / 2, (1 + share) / 2
        mask = np.zeros((height, width), np.uint8)
        mask[int(height * low) : int(height * high), int(width * low) : int(width * high)] = 255
        other = photo * 0.85 + rng.normal(0, 2, photo.shape)
        other[: height // 3, : width // 2] /= 2
        other = _save_jpeg(other, 80)
        other[mask > 0] = 90
        assert filters.measure_shift(photo, other, mask) < FilterConfig().max_shift * width


def test_smooth_pictures_are_not_called_misaligned():
    ramp = np.tile(np.linspace(60, 180, 300, dtype=np.float32), (200, 1))
    source = np.repeat(ramp[..., None], 3, axis=2).astype(np.uint8)
    mask, gt = _mask(source.shape, 60), source + 3
    gt[mask > 0] = 0
    check_pictures(_pictures(source, mask, gt), FilterConfig())


def test_hashes_survive_jpeg_and_resizing_and_tell_photographs_apart():
    def count_bits(one, two):
        return (int(one, 16) ^ int(two, 16)).bit_count()

    hashes = [hash_picture(photo) for photo in PHOTOS]
    for photo, own in zip(PHOTOS, hashes, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(photo).resize((200, 150)).save(buffer, "JPEG", quality=60)
        assert count_bits(hash_picture(np.array(Image.open(buffer))), own) <= 4
    assert min(count_bits(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > 10


@pytest.mark.parametrize("distance", range(6))
def test_no_near_pair_is_missed(distance, monkeypatch):
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**63, 400, dtype=np.uint64)
    for late in range(200, 400, 2):  # planted: up to eight bits away from an earlier one
        bits = rng.choice(64, rng.integers(0, 9), replace=False)
        hashes[late] = hashes[late - 200] ^ np.bitwise_or.reduce(
            np.uint64(1) << bits.astype(np.uint64), initial=np.uint64(0)
        )
    values = [int(value) for value in hashes]
    near = {
        (a, b)
        for a in range(400)
        for b in range(a)
        if (values[a] ^ values[b]).bit_count() <= distance
    }
    assert len(near) >= 5
    monkeypatch.setattr(filters, "look_alike", lambda one, two: True)
    found = list(find_duplicates(values, list(range(400)), str, distance=distance))
    assert {late for late, _ in found} == {late for late, _ in near}
    assert set(found) <= near and found == sorted(found)


def test_no_near_pair_is_missed_where_all_share_a_band_and_pairs_no_other(monkeypatch):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**52, 300, dtype=np.uint64) << np.uint64(12)
    hashes[200:] = hashes[:100]
    for bit in (12, 25, 38, 51):  # one in each of the other bands
        hashes[200:] ^= np.uint64(1) << rng.integers(bit, bit + 13, 100).astype(np.uint64)
    monkeypatch.setattr(filters, "look_alike", lambda one, two: True)
    found = list(find_duplicates(hashes.tolist(), list(range(300)), str, distance=4))
    assert found == [(200 + n, n) for n in range(100)]


def test_groups_the_protected_part_and_chains(monkeypatch):
    monkeypatch.setattr(filters, "look_alike", lambda one, two: True)
    assert list(find_duplicates([7, 7, 7], [1, 1, 2], str, distance=0)) == [(2, 0)]
    assert list(find_duplicates([7, 7, 7], [1, 2, 3], str, distance=0, start=2)) == [(2, 0)]
    # b is near a, c is near b alone: once b is dropped, nothing is there that c is like
    assert list(find_duplicates([0, 3, 15], [1, 2, 3], str, distance=2)) == [(1, 0)]


def test_like_hashes_of_unlike_pictures_are_no_duplicates(tmp_path):
    for number, level in enumerate((40, 200, 43)):
        save_image(tmp_path / f"{number}.png", np.full((60, 80, 3), level, np.uint8))
    hashes = [
        int(hash_picture(np.full((60, 80, 3), level, np.uint8)), 16) for level in (40, 200, 43)
    ]
    assert len(set(hashes)) == 1
    found = list(find_duplicates(hashes, [1, 2, 3], lambda n: tmp_path / f"{n}.png", distance=4))
    assert found == [(2, 0)]


def test_no_more_than_eight_pictures_of_a_hash_are_looked_at(monkeypatch):
    seen = []
    monkeypatch.setattr(filters, "look_alike", lambda one, two: seen.append((two, one)))
    assert not list(find_duplicates([5] * 12, list(range(12)), int, distance=4))
    assert seen == [(late, early) for late in range(12) for early in range(min(8, late))]


def test_a_hundred_thousand_hashes_take_seconds_and_lone_pictures_are_not_opened(monkeypatch):
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**64, 100_000, dtype=np.uint64)
    hashes[90_000:90_100] = hashes[:100] ^ (
        np.uint64(7) << rng.integers(0, 61, 100).astype(np.uint64)
    )
    opened = []
    monkeypatch.setattr(filters, "look_alike", lambda one, two: True)
    began = time.monotonic()
    found = list(find_duplicates(hashes.tolist(), list(range(100_000)), opened.append, distance=4))
    assert time.monotonic() - began < 10
    assert found == [(90_000 + n, n) for n in range(100)] and len(opened) == 200


def _write_flat(folder, *levels, gt=True):
    """Images of one colour: their hashes are alike, they are not."""
    mask = _mask((100, 100), 30)
    with TripletWriter(folder) as writer:
        for number, level in enumerate(levels):
            source = np.full((100, 100, 3), level, np.uint8)
            writer.add(
                id=str(number),
                source=source,
                mask=mask,
                gt=np.where(mask[..., None] > 0, 0, source) if gt else None,
            )
    return folder


@pytest.mark.parametrize("levels", [(200,), (40, 200)])
def test_every_evaluation_picture_is_compared_with(tmp_path, levels):
    result = assemble_sets(
        UpstreamSource(str(_write_flat(tmp_path / "raw", 200, 120))),
        tmp_path / "out",
        evaluation_sets=[_write_flat(tmp_path / "test", *levels, gt=False)],
    )
    assert result.reasons == {"near-duplicate": 1} and result.counts == {"labelled": 1}


def test_a_dropped_picture_does_not_hide_another_of_its_group(monkeypatch):
    look = [1, 1, 2, 2]  # the second is like the first, the fourth like the third
    monkeypatch.setattr(filters, "look_alike", lambda one, two: look[one] == look[two])
    found = list(find_duplicates([7] * 4, [1, 2, 2, 3], int, distance=0))
    assert found == [(1, 0), (3, 2)]
