"""What of a removal is kept: bit for bit the source elsewhere, no seam, shadows gone."""

import tracemalloc

import cv2
import numpy as np
import pytest

from rorem_lib.models import composition
from rorem_lib.models.composition import LIMITS, compose, find_effect, fit_membrane, widen
from rorem_lib.models.removing import remove_from

UNIT, SIDE = 16, 64


def draw_scene(height=96, width=128, scale=1, seed=0):
    """An image of soft texture with a dark object and its shadow: source, mask, truth, shadow."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(90, 170, (height // 16 + 2, width // 16 + 2, 3)).astype(np.float32)
    truth = cv2.resize(coarse, (width * scale, height * scale), interpolation=cv2.INTER_CUBIC)
    truth += rng.normal(0, 3, truth.shape)
    y, x = np.indices(truth.shape[:2]) / scale
    shadow = (np.hypot((x - 75) / 18, (y - 62) / 6) < 1).astype(np.float32)
    shadow = cv2.GaussianBlur(shadow, (0, 0), 1.5 * scale)
    mask = np.where(np.hypot(x - 60, y - 50) < 12, 255, 0).astype(np.uint8)
    source = truth * (1 - 0.3 * shadow[..., None])
    source[mask > 0] = (30, 40, 90)
    return *(np.clip(v, 0, 255).astype(np.uint8) for v in (source, mask, truth)), shadow


def blur(image, sigma=0.8):
    """What an autoencoder does to an image."""
    return cv2.GaussianBlur(image, (0, 0), sigma)


@pytest.mark.parametrize("mode", ["effect", "exact"])
def test_outside_of_the_effect_every_pixel_is_the_source_s(mode):
    source, mask, truth, shadow = draw_scene()
    image, effect = compose(source, blur(truth), blur(source), mask, mode)
    assert np.array_equal(image[effect == 0], source[effect == 0])
    assert (effect[mask > 0] == 255).all(), "some of the object is left"
    far = ~widen(mask, 20) & ~widen(shadow > 0.01, 10)
    assert (effect[far] == 0).all()
    assert np.abs(image[mask > 0].astype(int) - blur(truth)[mask > 0]).mean() < 4


def test_a_shadow_goes_in_effect_and_stays_in_exact():
    source, mask, truth, shadow = draw_scene()
    dark = (shadow > 0.9) & ~widen(mask, 8)
    assert dark.any()
    left = {}
    for mode in ("effect", "exact"):
        image, _ = compose(source, blur(truth), blur(source), mask, mode)
        left[mode] = (truth[dark].astype(float) - image[dark]).mean()
    before = (truth[dark].astype(float) - source[dark]).mean()
    assert abs(left["effect"]) < 0.1 * before and left["exact"] == before


def test_exact_keeps_all_but_the_widened_mask():
    source, mask, truth, _ = draw_scene()
    noise = np.random.default_rng(0).integers(0, 256, truth.shape, dtype=np.uint8)
    image, effect = compose(source, noise, None, mask, "exact")
    reach = LIMITS.widen * composition.get_unit(mask.shape)
    outside = ~widen(mask, reach)
    assert np.array_equal(image[outside], source[outside]) and not effect[outside].any()


def test_full_is_the_removal_as_it_is():
    source, mask, truth, _ = draw_scene()
    image, effect = compose(source, blur(truth), None, mask, "full")
    assert np.array_equal(image, blur(truth)) and (effect == 255).all()


@pytest.mark.parametrize("mode", ["effect", "exact"])
def test_a_discoloured_removal_makes_no_step_at_the_rim(mode):
    source, mask, truth, _ = draw_scene()
    source = np.where(mask[..., None] > 0, source, truth)  # no shadow: the rim alone counts
    removal = np.clip(blur(truth).astype(int) + (20, -15, 20), 0, 255).astype(np.uint8)
    image, effect = compose(source, removal, blur(source), mask, mode)
    rim = widen(mask, 8) & ~widen(mask, 1)
    steps = np.abs(cv2.blur(image.astype(np.float32) - truth, (5, 5))[rim]).mean(axis=0)
    assert steps.max() < 2, "the removal's colours are seen"
    assert (effect > 0).mean() < 0.2, "a change of all colours is taken for an effect"


def test_a_change_that_is_not_connected_to_the_hole_is_no_effect():
    source, mask, truth, _ = draw_scene()
    removal = blur(truth)
    removal[5:15, 5:15] = 0  # another object that the model made of nothing
    image, effect = compose(source, removal, blur(source), mask, "effect")
    assert not effect[:20, :20].any() and np.array_equal(image[:20, :20], source[:20, :20])


@pytest.mark.parametrize("mode", ["effect", "exact", "full"])
@pytest.mark.parametrize("scale", [2, 3])
def test_detail_that_the_model_did_not_see_stays(mode, scale):
    source, mask, truth, shadow = draw_scene(scale=scale)
    small = [cv2.resize(x, (128, 96), interpolation=cv2.INTER_AREA) for x in (truth, source)]
    image, effect = compose(source, blur(small[0]), blur(small[1]), mask, mode)
    assert image.shape == source.shape and effect.shape == mask.shape
    dark = (shadow > 0.9) & ~widen(mask, 8 * scale)

    def measure(x):
        light = x.astype(np.float32).mean(axis=2)
        return (light - cv2.GaussianBlur(light, (0, 0), 1))[dark].std()

    assert measure(image) > 0.8 * measure(source)
    if mode != "full":
        assert np.array_equal(image[effect == 0], source[effect == 0])


def put_back_at_once(original, mask, small, removed):
    """What `composition.put_back` computes in strips."""
    size = (original.shape[1], original.shape[0])
    change = cv2.resize(removed.astype(np.float32) - small, size, interpolation=cv2.INTER_CUBIC)
    inside = cv2.resize(removed, size, interpolation=cv2.INTER_CUBIC).astype(np.float32)
    soft = cv2.GaussianBlur((mask >= 128).astype(np.float32), (0, 0), 1.5)[..., None]
    mixed = inside * soft + (original + change) * (1 - soft)
    return np.clip(mixed + 0.5, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "size, seen", [((300, 400), (64, 96)), ((301, 403), (64, 88)), ((50, 70), (64, 96))]
)
def test_a_whole_frame_is_put_back_in_strips_with_the_same_bits(size, seen):
    rng = np.random.default_rng(0)
    original, small, removed = (
        rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in (size, seen, seen)
    )
    coarse = rng.integers(0, 2, (size[0] // 16 + 1, size[1] // 16 + 1), dtype=np.uint8) * 255
    mask = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_NEAREST)
    made = composition.put_back(original, mask, small, removed)
    assert np.array_equal(made, put_back_at_once(original, mask, small, removed))


def test_a_frame_is_put_back_without_float_copies_of_it():
    """2 megapixels; 150 MB at 12 megapixels are 12.5 bytes a pixel, three of them the result."""
    original = np.zeros((1200, 1600, 3), np.uint8)
    mask = np.full(original.shape[:2], 255, np.uint8)
    small = np.zeros((192, 256, 3), np.uint8)
    tracemalloc.start()
    try:
        compose(original, small + 1, None, mask, "full")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12.5 * mask.size


@pytest.mark.parametrize("mode", ["effect", "exact"])
def test_no_seam_at_a_crop_s_edge_but_none_lost_at_the_image_s(mode):
    source, mask, truth, _ = draw_scene()
    mask = np.roll(mask, -54, axis=1)  # it touches the left edge
    assert mask[:, 0].any()
    inner = compose(source, blur(truth), blur(source), mask, mode, borders=(False,) * 4)[1]
    assert not inner[:, 0].any() and not inner[0].any()
    outer = compose(source, blur(truth), blur(source), mask, mode)[1]
    assert (outer[mask > 0] == 255).all()


@pytest.mark.parametrize("mode", composition.MODES)
def test_a_mask_of_the_whole_frame_takes_all_of_the_removal(mode):
    source, _, truth, _ = draw_scene()
    whole = np.full(source.shape[:2], 255, np.uint8)
    image, effect = compose(source, truth, blur(source), whole, mode)
    assert (effect == 255).all() and np.array_equal(image, truth)


def test_pixels_to_keep_are_kept_in_every_mode():
    source, mask, truth, _ = draw_scene()
    keep = np.zeros(mask.shape, bool)
    keep[40:60, 70:90] = True
    for mode in composition.MODES:
        image, effect = compose(source, truth, blur(source), mask, mode, keep=keep)
        assert not effect[keep].any() and np.array_equal(image[keep], source[keep])


def test_noise_far_from_the_hole_raises_the_level():
    _, mask, *_ = draw_scene()
    rng = np.random.default_rng(0)
    change = cv2.GaussianBlur(rng.normal(0, 60, (*mask.shape, 3)).astype(np.float32), (0, 0), 2)
    found = find_effect(change, mask)
    assert found[mask > 0].all() and found.mean() < 0.4


def test_a_membrane_goes_through_what_is_around_it():
    y, x = np.indices((40, 50)).astype(np.float32)
    region = np.zeros((40, 50), bool)
    region[10:30, 15:35] = True
    slope = np.stack([x, y, x - y], axis=2)  # harmonic: it is its own membrane
    filled = fit_membrane(np.where(region[..., None], 999, slope), region, 0.1, 1e9)
    assert np.abs(filled - slope).max() < 1


def test_what_makes_no_sense_is_refused():
    source, mask, truth, _ = draw_scene()
    with pytest.raises(ValueError, match="effect, exact, full"):
        compose(source, truth, source, mask, "paste")
    with pytest.raises(ValueError, match="round trip"):
        compose(source, truth, None, mask)


# ---------------------------------------------------------------------- plan, paint, compose


class Painter:
    """Fills holes with Telea's method and a noise of its number's; notes what it was given."""

    def __init__(self):
        self.sizes, self.numbers = [], []

    def paint(self, images, masks, numbers, names):
        assert len({image.shape for image in images}) == 1, "a batch has two sizes"
        self.sizes.append((len(images), images[0].shape[:2]))
        self.numbers += numbers
        return [
            np.clip(
                cv2.inpaint(blur(image), mask, 3, cv2.INPAINT_TELEA).astype(int)
                + np.random.default_rng(number).integers(-1, 2, image.shape),
                0,
                255,
            ).astype(np.uint8)
            for image, mask, number in zip(images, masks, numbers, strict=True)
        ]

    def round_trip(self, images):
        return [blur(image) for image in images]


def remove(sources, holes, painter=None, **options):
    painter = painter or Painter()
    options = {"resolution": SIDE, "unit": UNIT} | options
    return remove_from(sources, holes, painter.paint, painter.round_trip, **options)


def draw_photo(height, width, *boxes, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(80, 180, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = 255
        image[y0:y1, x0:x1] = 0
    return image, mask


@pytest.mark.parametrize("mode", composition.MODES)
@pytest.mark.parametrize(
    "height, width, boxes",
    [
        (301, 403, [(200, 150, 215, 160)]),
        (301, 403, [(0, 0, 10, 12), (390, 290, 403, 301)]),
        (301, 403, [(100, 100, 120, 120), (150, 110, 160, 120)]),
        (64, 64, [(20, 20, 30, 30)]),
        (5, 3, [(1, 1, 2, 2)]),
        (70, 900, [(850, 20, 870, 40), (10, 20, 30, 40)]),
        (301, 403, [(0, 0, 403, 301)]),
    ],
)
def test_outside_of_crop_and_effect_the_image_is_untouched(height, width, boxes, mode):
    image, mask = draw_photo(height, width, *boxes)
    before = image.copy(), mask.copy()
    (found,) = remove([image], [mask], mode=mode)
    assert np.array_equal(image, before[0]) and np.array_equal(mask, before[1])
    assert found.image.shape == image.shape and found.effect.shape == mask.shape
    same = found.effect == 0
    assert np.array_equal(found.image[same], image[same])
    inside = np.zeros(mask.shape, bool)
    for x0, y0, x1, y1 in found.crops:
        inside[y0:y1, x0:x1] = True
    assert not found.effect[~inside].any()
    assert (found.effect[mask > 0] == 255).all()
    if mask.min() == 0 and min(height, width) > 10:
        assert found.image[mask > 0].mean() > 60, "the object is still there"


def test_a_removal_does_not_depend_on_its_batch():
    given = [
        draw_photo(200, 300, (50 + 20 * k, 60, 70 + 20 * k, 80), (250, 150, 260, 160), seed=k)
        for k in range(3)
    ]
    given.append(draw_photo(64, 64, (10, 10, 20, 20)))
    sources, holes = map(list, zip(*given))
    painter = Painter()
    together = remove(sources, holes, painter, batch_size=4)
    assert max(count for count, _ in painter.sizes) == 4, "crops of several images share no batch"
    for place in (3, 1, 0, 2):
        (alone,) = remove([sources[place]], [holes[place]], numbers=[place], batch_size=1)
        assert np.array_equal(alone.image, together[place].image)
        assert np.array_equal(alone.effect, together[place].effect)


def test_an_empty_mask_gives_the_image_back():
    image, mask = draw_photo(100, 90)
    painter = Painter()
    for crop in (True, False):
        (found,) = remove([image], [mask], painter, crop=crop)
        assert np.array_equal(found.image, image) and not found.effect.any()
    assert found.crops == [] and painter.sizes == []


def test_without_crops_the_whole_frame_is_seen():
    image, mask = draw_photo(200, 300, (50, 60, 70, 80))
    painter = Painter()
    (found,) = remove([image], [mask], painter, crop=False)
    assert found.crops == [(0, 0, 300, 200)] and painter.sizes == [(1, (64, 96))]


def test_the_best_candidate_is_chosen_by_its_worst_crop():
    image, mask = draw_photo(200, 600, (20, 20, 40, 40), (560, 150, 580, 170))
    painter = Painter()
    worth = iter([[0.9, 0.5, 0.2], [0.1, 0.4, 0.8]])
    seen = []

    def score(sources, masks, removals):
        seen.append({len(sources), len(masks), len(removals)})
        return next(worth)

    (found,) = remove([image], [mask], painter, candidates=3, score=score, numbers=[7])
    assert (found.number, found.score) == (1, 0.4) and seen == [{3}, {3}]
    assert sorted(painter.numbers) == [21, 21, 22, 22, 23, 23]
    (alone,) = remove([image], [mask], numbers=[22])
    assert np.array_equal(alone.image, found.image)


def test_candidates_without_a_scorer_are_refused():
    image, mask = draw_photo(64, 64, (10, 10, 20, 20))
    with pytest.raises(ValueError, match="score"):
        remove([image], [mask], candidates=2)


def test_sizes_that_differ_are_named():
    image, _ = draw_photo(64, 64)
    with pytest.raises(ValueError, match="holiday.jpg is 64x64 px but its mask 20x30"):
        remove([image], [np.full((30, 20), 255, np.uint8)], names=["holiday.jpg"])


def test_a_speck_in_a_large_image_is_not_lost_when_it_is_shrunk():
    mask = np.zeros((3000, 2000), bool)
    mask[1501, 1001] = True  # a 2,000th of a pixel at 64 px
    assert composition.shrink_mask(mask, (96, 64)).sum() == 1
