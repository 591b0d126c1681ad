import cv2
import numpy as np
import pytest
from PIL import Image

from rorem_lib.data.items import open_picture
from rorem_lib.data.masks import (
    binarise_mask,
    dilate_mask,
    draw_box_mask,
    loosen_mask,
    outline_mask,
    perturb_mask,
)
from rorem_lib.data.pictures import TripletError, load_mask


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


def test_dilate_by_more_than_the_image_covers_it_at_once():
    mask = np.zeros((40, 300), np.uint8)
    mask[39, 299] = 255
    assert dilate_mask(mask, 10**9).all()


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


# ------------------------------------------------------------------------- masks that people have


def _photo(size=64, seed=0):
    rng = np.random.default_rng(seed)
    return cv2.resize(
        rng.integers(0, 256, (9, 9, 3), dtype=np.uint8), (size, size), interpolation=cv2.INTER_CUBIC
    )


def _flag(size=64):
    """A drawing of three colours."""
    colours = np.array([(250, 250, 240), (200, 20, 30), (20, 40, 160)], np.uint8)
    return np.broadcast_to(colours[np.arange(size)[:, None] % 24 // 8], (size, size, 3))


def _layer(colour, alpha):
    return np.dstack([np.broadcast_to(np.uint8(colour), (*alpha.shape, 3)), alpha])


def _paint(mask, object_colour, ground=(0, 0, 0)):
    share = cv2.GaussianBlur(mask, (3, 3), 0)[..., None] / 255  # soft edges, as brushes have
    return (share * np.float64(object_colour) + (1 - share) * np.float64(ground)).astype(np.uint8)


def _in_palette(mask, colours):
    image = Image.fromarray((mask > 0).astype(np.uint8), "P")
    image.putpalette(colours)
    return image


KINDS = {  # files that people give for `_square()`
    "white on black": lambda mask: mask,
    "DALL-E": lambda mask: np.dstack([_photo(), 255 - mask]),
    "DALL-E, grey": lambda mask: np.dstack([_photo()[..., :1]] * 3 + [255 - mask]),
    "DALL-E, white ground": lambda mask: np.dstack(
        [np.where(np.arange(64)[:, None] < 46, 250, _photo()[..., n]) for n in range(3)]
        + [255 - mask]
    ).astype(np.uint8),
    "DALL-E, black where opaque": lambda mask: _layer((0, 0, 0), 255 - mask),
    "0 and 1": lambda mask: mask // 255,
    "0 and 1 as RGB": lambda mask: np.repeat(mask[..., None] // 255, 3, axis=2),
    "0 and 1, 16 bits": lambda mask: (mask // 255).astype(np.uint16),
    "palette of classes": lambda mask: _in_palette(mask, [0, 0, 0, 128, 0, 0]),
    "palette of grey": lambda mask: _in_palette(mask, [0, 0, 0, 255, 255, 255]),
    "red on black": lambda mask: _paint(mask, (230, 20, 20)),
    "blue on black": lambda mask: _paint(mask, (0, 0, 200)),
    "white strokes on a layer": lambda mask: _layer((255, 255, 255), mask),
    "red strokes on a layer": lambda mask: _layer((255, 0, 0), mask),
    "yellow strokes on a layer": lambda mask: _layer((250, 240, 20), mask),
    "black and white on a layer": lambda mask: np.dstack(
        [mask] * 3 + [cv2.dilate(mask, np.ones((9, 9), np.uint8))]
    ),
    "black strokes on a layer": lambda mask: _layer((0, 0, 0), mask),
    "white on black, opaque": lambda mask: np.dstack([mask] * 3 + [mask * 0 + 255]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_masks_that_people_have_mean_what_people_mean(tmp_path, kind):
    mask, made = _square(), KINDS[kind](_square())
    image = made if isinstance(made, Image.Image) else Image.fromarray(made)
    image.save(tmp_path / "mask.png")
    found = load_mask(tmp_path / "mask.png") >= 128
    assert (found & (mask > 0)).sum() / (found | (mask > 0)).sum() > 0.98
    turned = load_mask(tmp_path / "mask.png", invert=True) >= 128
    assert np.array_equal(turned, ~found)
    # what every program reads alike is taken over as it is, the rest is written anew
    picture = open_picture(tmp_path / "mask.png", "L")
    assert (picture.file is not None) == (kind == "white on black")


def test_a_coloured_jpeg_is_read_in_spite_of_its_noise(tmp_path):
    Image.fromarray(_paint(_square(256, 80, 180), (20, 230, 40))).save(tmp_path / "mask.jpg")
    found = load_mask(tmp_path / "mask.jpg") >= 128
    truth = _square(256, 80, 180) > 0
    assert (found & truth).sum() / (found | truth).sum() > 0.98


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda mask: _photo(), "photograph"),
        (lambda mask: cv2.cvtColor(_photo(), cv2.COLOR_RGB2GRAY), "photograph"),
        (lambda mask: np.dstack([_photo(), mask]), "object to be removed, or what is around it"),
        (lambda mask: _layer((255, 255, 255), 255 - mask), "the white to be removed, or the hole"),
        (lambda mask: np.dstack([_flag(), mask]), "object to be removed, or what"),
        (lambda mask: _paint(mask, (255, 0, 0), (255, 255, 255)), r"rgb\(255, \d+, \d+\)"),
        (lambda mask: np.where(mask[..., None] > 0, (255, 0, 0), _photo()), "many colours"),
    ],
    ids=[
        "photograph",
        "grey photograph",
        "cut-out",
        "white canvas",
        "drawing cut out",
        "red on white",
        "red on photo",
    ],
)
def test_what_may_mean_two_things_is_asked_back(tmp_path, make, words):
    Image.fromarray(make(_square()).astype(np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(TripletError, match=rf"mask\.png.*{words}") as caught:
        load_mask(tmp_path / "mask.png")
    assert caught.value.file == tmp_path / "mask.png"


def test_a_mask_of_another_size_is_fitted_and_one_of_another_shape_names_both(tmp_path):
    thin = np.zeros((300, 400), np.uint8)
    thin[150, 40:360] = 255
    Image.fromarray(thin).save(tmp_path / "mask.png")
    small = load_mask(tmp_path / "mask.png", (75, 100))
    assert small.shape == (75, 100) and (small[37] > 0).sum() == 80
    large = load_mask(tmp_path / "mask.png", (601, 800))  # a rounded side
    assert large.shape == (601, 800) and set(np.unique(large)) == {0, 255}
    assert (large > 0).mean() == pytest.approx((thin > 0).mean(), rel=0.6)
    with pytest.raises(TripletError, match=r"mask\.png.*400x300 px.*300x400 px"):
        load_mask(tmp_path / "mask.png", (400, 300))


def test_masks_that_are_neither_full_nor_plain_stay_what_they_are(tmp_path):
    soft = cv2.GaussianBlur(_square(), (0, 0), 4)
    for mask in (soft, _square() * 0, _square() * 0 + 255, _square() * 0 + 1, _square() // 127):
        Image.fromarray(mask).save(tmp_path / "mask.png")
        assert np.array_equal(load_mask(tmp_path / "mask.png"), mask)
