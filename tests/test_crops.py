"""Crops: all of the mask, inside of the image, as the model wants them, and not too many."""

import time

import numpy as np
import pytest

from rorem_lib.models.crops import MAX_ASPECT, MAX_CROPS, find_boxes, frame_crop, plan_crops


def make_mask(height, width, *boxes):
    mask = np.zeros((height, width), np.uint8)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = 255
    return mask


def check_plan(mask, resolution, unit):
    """Every promise of a plan; returns it."""
    height, width = mask.shape
    crops = plan_crops(mask, resolution, unit)
    covered = np.zeros(mask.shape, int)
    for crop in crops:
        x0, y0, x1, y1 = crop.box
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height, crop
        assert all(side > 0 and side % unit == 0 for side in crop.size), crop
        left, top, right, bottom = crop.core
        assert x0 <= left and y0 <= top and right <= x1 and bottom <= y1, crop
        covered[top:bottom, left:right] += 1
    assert covered[mask >= 128].all(), "a part of the mask is in no crop"
    assert covered.max(initial=0) <= 1, "two crops are for the same pixels"
    assert len(crops) <= MAX_CROPS
    return crops


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 2)])  # which OpenCV may take for a number
def test_masks_of_a_pixel_are_covered(shape):
    assert len(check_plan(np.full(shape, 255, np.uint8), 64, 8)) == 1


@pytest.mark.parametrize("unit", [8, 16])
def test_any_mask_of_any_image_is_covered(unit):
    rng = np.random.default_rng(unit)
    for _ in range(150):
        height, width = rng.integers(1, 600, 2)
        boxes = []
        for _ in range(rng.integers(1, 7)):
            x, y = rng.integers(width), rng.integers(height)
            boxes.append((x, y, x + rng.integers(1, 200), y + rng.integers(1, 200)))
        check_plan(make_mask(height, width, *boxes), int(rng.choice([32, 64, 100, 512])), unit)


def test_a_small_object_in_a_large_image_is_seen_pixel_by_pixel():
    for box in ((2000, 1500, 2080, 1600), (0, 0, 80, 100), (3920, 2900, 4000, 3000)):
        (crop,) = check_plan(make_mask(3000, 4000, box), 512, 16)
        assert crop.size == (512, 512) and crop.scale == 1


def test_a_large_object_has_context_for_its_shadow():
    box = (1500, 1000, 2100, 1400)
    (crop,) = check_plan(make_mask(3000, 4000, box), 512, 16)
    x0, y0, x1, y1 = crop.box
    assert box[0] - x0 > 200 and x1 - box[2] > 200 and box[1] - y0 > 200 and y1 - box[3] > 200
    width, height = crop.size
    assert min(crop.size) >= 496 and max(crop.size) <= MAX_ASPECT * 512 + 16
    assert (x1 - x0) / (y1 - y0) == pytest.approx(width / height, rel=0.02), "it is distorted"


def test_far_objects_have_crops_of_their_own_and_near_ones_share():
    near = [(1000, 1000, 1080, 1080), (1150, 1050, 1200, 1100)]
    far = (3000, 2500, 3100, 2600)
    crops = check_plan(make_mask(3000, 4000, *near, far), 512, 16)
    assert [crop.core for crop in crops] == [(1000, 1000, 1200, 1100), far]


@pytest.mark.parametrize(
    "height, width, box",
    [
        (64, 64, (10, 10, 20, 20)),
        (3, 3, (1, 1, 2, 2)),
        (80, 70, (0, 0, 9, 9)),
        (3000, 4000, (300, 200, 3700, 2900)),
        (500, 500, (0, 0, 500, 500)),
    ],
)
def test_the_whole_frame_is_seen_where_crops_make_no_sense(height, width, box):
    resolution = 64 if height < 100 else 512
    (crop,) = check_plan(make_mask(height, width, box), resolution, 16)
    assert crop == frame_crop(width, height, resolution, 16)


def test_nothing_to_remove_needs_no_crop():
    assert plan_crops(np.zeros((300, 200), np.uint8), 64, 16) == []


def test_specks_do_not_make_hundreds_of_crops():
    rng = np.random.default_rng(0)
    mask = np.zeros((3000, 4000), np.uint8)
    mask[rng.integers(0, 3000, 2000), rng.integers(0, 4000, 2000)] = 255
    began = time.process_time()
    crops = check_plan(mask, 512, 16)
    assert time.process_time() - began < 3
    assert 1 < len(crops) <= MAX_CROPS
    assert min(crop.scale for crop in crops) > 0.3, "specks are seen much smaller than they are"


def test_specks_beside_an_object_share_its_crop():
    rng = np.random.default_rng(0)
    mask = make_mask(3000, 4000, (2000, 1500, 2200, 1700))
    mask[rng.integers(1450, 1750, 300), rng.integers(1950, 2250, 300)] = 255
    assert len(check_plan(mask, 512, 16)) == 1


def test_a_panorama_is_seen_in_parts():
    (crop,) = check_plan(make_mask(300, 3000, (2900, 100, 3000, 150)), 512, 16)
    assert crop.box == (2700, 0, 3000, 300)
    (crop,) = check_plan(make_mask(300, 6000, (10, 100, 5990, 150)), 512, 16)
    assert max(crop.size) <= 8 * 512 + 16


def test_boxes_are_exact_in_large_images():
    boxes = [(1001, 503, 1002, 504), (3997, 2999, 4000, 3000)]
    assert [box for box, _ in find_boxes(make_mask(3000, 4000, *boxes), 512)] == boxes
