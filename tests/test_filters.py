"""The filters: limits, shifts, hashes, near-duplicates."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs
from sklearn.datasets import load_sample_images

from rorem_lib import filters
from rorem_lib.filters import FilterConfig, check_pictures, find_duplicates, hash_picture
from rorem_lib.pictures import save_image
from rorem_lib.sources.base import Picture, Pictures, Rejected

PHOTOS = [*load_sample_images().images, photographs.astronaut(), photographs.coffee(),
          photographs.rocket(), photographs.chelsea()]


def _pictures(source, mask, gt):
    return Pictures(Picture(source), Picture(mask), None if gt is None else Picture(gt), None)


def _mask(shape, side):
    mask = np.zeros(shape[:2], np.uint8)
    mask[50:50 + side, 60:60 + side] = 255
    return mask


def _reject(source, mask, gt, **limits):
    with pytest.raises(Rejected) as caught:
        check_pictures(_pictures(source, mask, gt), FilterConfig(**limits))
    return caught.value.reason


def test_each_limit_is_where_it_says():
    source = np.full((200, 200, 3), 100, np.uint8)
    gt, mask = source.copy(), _mask(source.shape, 40)  # 4 % of the picture
    gt[mask > 0] = 104
    found = check_pictures(_pictures(source, mask, gt), FilterConfig(
        min_mask_area=0.04, max_mask_area=0.041, min_change=4, min_side=200))
    assert (found["mask_area"], found["change_inside"], found["change_outside"]) == (0.04, 4, 0)
    assert _reject(source, mask, gt, min_mask_area=0.0401) == "mask area"
    assert _reject(source, mask, gt, max_mask_area=0.0399) == "mask area"
    assert _reject(source, mask, gt, min_change=4.1) == "unchanged"
    assert _reject(source, mask, gt, min_side=201) == "small picture"
    assert _reject(source, mask[:-1], gt) == "sizes differ"
    assert _reject(source, mask, gt[:, :-1]) == "sizes differ"
    assert _reject(source, mask * 0, gt) == "empty mask"
    assert _reject(source, mask * 0 + 255, gt) == "white mask"
    lighter = gt + 6
    check_pictures(_pictures(source, mask, lighter), FilterConfig(max_change_outside=6))
    assert _reject(source, mask, lighter, max_change_outside=5.9) == "changed outside"
    assert set(check_pictures(_pictures(source, mask, None), FilterConfig())) == {
        "mask_area", "phash"}


@pytest.mark.parametrize("limits", [{"min_mask_area": 0.5, "max_mask_area": 0.4},
                                    {"max_mask_area": 1.1}, {"duplicate_distance": 17},
                                    {"min_change": -1}])
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
            np.uint64(1) << bits.astype(np.uint64), initial=np.uint64(0))
    values = [int(value) for value in hashes]
    near = {(a, b) for a in range(400) for b in range(a)
            if (values[a] ^ values[b]).bit_count() <= distance}
    assert len(near) >= 5
    monkeypatch.setattr(filters, "look_alike", lambda one, two: True)
    found = list(find_duplicates(values, list(range(400)), str, distance=distance))
    assert {late for late, _ in found} == {late for late, _ in near}
    assert set(found) <= near and found == sorted(found)


def test_groups_the_protected_part_and_chains(monkeypatch):
    monkeypatch.setattr(filters, "look_alike", lambda one, two: True)
    assert list(find_duplicates([7, 7, 7], [1, 1, 2], str, distance=0)) == [(2, 0)]
    assert list(find_duplicates([7, 7, 7], [1, 2, 3], str, distance=0, start=2)) == [(2, 0)]
    # b is near a, c is near b alone: once b is dropped, nothing is there that c is like
    assert list(find_duplicates([0, 3, 15], [1, 2, 3], str, distance=2)) == [(1, 0)]


def test_like_hashes_of_unlike_pictures_are_no_duplicates(tmp_path):
    for number, level in enumerate((40, 200, 43)):
        save_image(tmp_path / f"{number}.png", np.full((60, 80, 3), level, np.uint8))
    hashes = [int(hash_picture(np.full((60, 80, 3), level, np.uint8)), 16)
              for level in (40, 200, 43)]
    assert len(set(hashes)) == 1
    found = list(find_duplicates(hashes, [1, 2, 3], lambda n: tmp_path / f"{n}.png", distance=4))
    assert found == [(2, 0)]
