import numpy as np
import pytest

from rorem_lib.data.masks import (
    binarise_mask,
    dilate_mask,
    draw_box_mask,
    loosen_mask,
    outline_mask,
    perturb_mask,
)


def _square(size=64, low=24, high=40):
    mask = np.zeros((size, size), np.uint8)
    mask[low:high, low:high] = 255
    return mask


def test_binarise_has_two_levels_and_its_threshold_is_white():
    mask = np.array([[0, 127, 128, 255]], np.uint8)
    assert binarise_mask(mask).tolist() == [[0, 0, 255, 255]]
    assert binarise_mask(mask, threshold=1).tolist() == [[0, 255, 255, 255]]


def test_binarise_takes_channel_0_and_booleans():
    mask = np.zeros((4, 5, 3), np.uint8)
    mask[1, 2, 0] = 255
    mask[3, 3, 1] = 255
    assert np.argwhere(binarise_mask(mask)).tolist() == [[1, 2]]
    assert binarise_mask(np.array([[True, False]])).tolist() == [[255, 0]]


@pytest.mark.parametrize("mask", [np.zeros((4, 4), np.float32), np.zeros(4, np.uint8)])
def test_binarise_refuses_other_types(mask):
    with pytest.raises(ValueError, match="a mask is uint8"):
        binarise_mask(mask)


def test_dilate_uses_a_square_kernel_of_that_side():
    mask = np.zeros((21, 21), np.uint8)
    mask[10, 10] = 255
    wide = dilate_mask(mask, 5)
    assert np.argwhere(wide).min(0).tolist() == [8, 8]
    assert np.argwhere(wide).max(0).tolist() == [12, 12]
    assert (wide > 0).sum() == 25


def test_dilate_by_nothing_copies_and_by_less_is_refused():
    mask = _square()
    same = dilate_mask(mask, 0)
    assert np.array_equal(same, mask) and same is not mask
    with pytest.raises(ValueError, match="-1 px"):
        dilate_mask(mask, -1)


def test_loosened_masks_cover_the_object_wobble_and_stay_near():
    mask = _square()
    loose = [loosen_mask(mask, np.random.default_rng(i)) for i in range(20)]
    assert all((x[mask > 0] == 255).all() for x in loose)
    assert all(set(np.unique(x)) <= {0, 255} for x in loose)
    grown = np.array([(x > 0).mean() / (mask > 0).mean() for x in loose])
    assert 1.2 < grown.mean() < 3.5
    assert len({x.tobytes() for x in loose}) == 20
    far = dilate_mask(mask, 27)
    assert all((x[far == 0] == 0).all() for x in loose)


def test_loosening_repeats_by_its_generator_and_scales_with_strength():
    mask = _square()
    first, second = (loosen_mask(mask, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first, second)
    assert np.array_equal(loosen_mask(mask, np.random.default_rng(3), 0), mask)
    wide = loosen_mask(mask, np.random.default_rng(3), 2)
    assert (wide > 0).sum() > (first > 0).sum() > (mask > 0).sum()


def test_box_mask_is_the_box_cut_by_the_picture():
    mask = draw_box_mask(10, 20, [15, 2, 40, 5])
    assert np.argwhere(mask).min(0).tolist() == [2, 15]
    assert np.argwhere(mask).max(0).tolist() == [4, 19]


@pytest.mark.parametrize("box", [[1, 2, 3], [30, 2, 40, 5], [5, 5, 5, 9], [-9, -9, -2, -2]])
def test_box_mask_refuses_what_covers_nothing(box):
    with pytest.raises(ValueError, match="box"):
        draw_box_mask(10, 20, box)


@pytest.mark.parametrize("size", [64, 1024])
def test_outline_lies_just_outside_the_mask_on_a_copy(size):
    mask = _square(size, size // 4, size // 2)
    image = np.full((size, size, 3), 90, np.uint8)
    shown = outline_mask(image, mask, colour=(255, 0, 0))
    line = (shown == (255, 0, 0)).all(2)
    assert line.any() and not line[mask > 0].any()
    assert not line[dilate_mask(mask, 15) == 0].any()
    assert (image == 90).all() and (shown[~line] == 90).all()


def test_outline_refuses_a_mask_of_another_size():
    with pytest.raises(ValueError, match="mask"):
        outline_mask(np.zeros((8, 8, 3), np.uint8), _square())


def test_perturbed_masks_cover_the_object_and_differ():
    mask = _square()
    masks = [perturb_mask(mask, np.random.default_rng(i), dilate_max=0.2) for i in range(40)]
    assert all((x[mask > 0] == 255).all() and set(np.unique(x)) == {0, 255} for x in masks)
    assert not any(np.array_equal(x, mask) for x in masks)
    squares = [x for x in masks if _is_box(x)]
    assert 10 < len(squares) < 30, "a coin chooses between dilating and loosening"
    widths = {int(np.ptp(np.argwhere(x)[:, 0])) + 1 for x in squares}
    assert min(widths) >= 17 and max(widths) <= 16 + 13 and len(widths) > 5  # 0.2 of 64 px
    assert all((x[dilate_mask(mask, 27) == 0] == 0).all() for x in masks)


def _is_box(mask):
    rows, columns = np.nonzero(mask)
    return (mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] > 0).all()


def test_perturbing_repeats_by_its_generator_and_its_kinds_can_be_switched_off():
    mask = _square()
    first, second = (perturb_mask(mask, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first, second)
    for seed in range(10):

        def draw(seed=seed, **options):
            return perturb_mask(mask, np.random.default_rng(seed), **options)

        assert _is_box(draw(loosen=0)) and not np.array_equal(draw(loosen=0), mask)
        assert not _is_box(draw(dilate_max=0, loosen=2))
        assert np.array_equal(draw(dilate_max=0, loosen=0), mask)
    with pytest.raises(ValueError, match="dilate_max must be 0 or more"):
        perturb_mask(mask, np.random.default_rng(0), dilate_max=-1)


def test_perturbing_leaves_something_of_the_picture():
    mask = np.full((32, 32), 255, np.uint8)
    mask[0, 0] = 0
    for seed in range(10):
        assert np.array_equal(perturb_mask(mask, np.random.default_rng(seed)), mask)
