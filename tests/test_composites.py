import pickle
from collections import Counter

import cv2
import numpy as np
import pytest
from PIL import Image

from rorem_lib.data.items import Rejected, SourceError
from rorem_lib.data.pictures import TripletError
from rorem_lib.sources import composites, compositing
from rorem_lib.sources.composites import CompositesSource

GREY = 150


def _textured(seed, height=120, width=140):
    noise = np.random.default_rng(seed).normal(0, 12, (height, width, 1)).astype(np.float32)
    return np.clip(GREY + noise + np.zeros(3), 0, 255).astype(np.uint8)


def _figure(colour=(200, 40, 40), height=150, width=60):
    """A body on two legs, [height, width, 4], with a soft edge and empty space around it."""
    alpha = np.zeros((height + 20, width + 20), np.float32)
    alpha[10 : 10 + height * 2 // 3, 10 : 10 + width] = 1
    for left in (10, 10 + width * 3 // 4):
        alpha[10 : 10 + height, left : left + width // 4] = 1
    alpha = cv2.GaussianBlur(alpha, (0, 0), 1.5)
    rgb = np.zeros((*alpha.shape, 3)) + colour
    return np.dstack([rgb, alpha * 255]).astype(np.uint8)


def _block(colour=(200, 40, 40), side=100):
    return np.full((side, side, 4), (*colour, 255), np.uint8) * _framed(side)


def _framed(side):
    inside = np.zeros((side, side, 1), np.uint8)
    inside[4:-4, 4:-4] = 1
    return inside


def _save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    _save(tmp_path / "cutouts" / "figure.png", _figure())
    for number in range(3):
        _save(tmp_path / "backgrounds" / f"{number}.png", _textured(number))
    return tmp_path


def _source(folder, **options):
    return CompositesSource(str(folder), **{"size": 96, "count": 8, "min_scale": 0.4, **options})


def _render(folder, **options):
    source = _source(folder, **options)
    return [source.load_item(item) for item in source.list_items()]


def _change(made):
    """Signed change of each pixel from GT to source, the largest of the channels."""
    change = made.source.array.astype(int) - made.gt.array
    return np.take_along_axis(change, abs(change).argmax(axis=2)[..., None], axis=2)[..., 0]


def _inner(mask):
    """What lies 4 px within the white, and within the image."""
    framed = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT)
    return cv2.erode(framed, np.ones((9, 9), np.uint8))[1:-1, 1:-1] > 0


# ------------------------------------------------------------------------------------ the images


def test_triplets_have_the_promised_form(folder):
    for made in _render(folder):
        assert made.source.array.shape == made.gt.array.shape == (96, 96, 3)
        assert made.source.array.dtype == made.mask.array.dtype == np.uint8
        assert made.mask.array.shape == (96, 96) and set(np.unique(made.mask.array)) == {0, 255}
        assert made.source.file is made.mask.file is made.gt.file is None
        assert made.origin_file == folder / "backgrounds" / made.extra["background"]


def test_any_triplet_is_the_same_alone_and_in_any_order(folder):
    source = _source(folder)
    items = list(source.list_items())
    first = [source.load_item(item) for item in items]
    other = pickle.loads(pickle.dumps(source))
    for item, made in reversed(list(zip(items, first, strict=True))):
        again = other.load_item(pickle.loads(pickle.dumps(item)))
        assert again.source.array.tobytes() == made.source.array.tobytes()
        assert again.mask.array.tobytes() == made.mask.array.tobytes()
        assert again.gt.array.tobytes() == made.gt.array.tobytes()
        assert again.extra == made.extra
    assert list(_source(folder, count=3).list_items()) == items[:3]
    changed = _source(folder, seed=5).load_item(items[0])
    assert not np.array_equal(changed.source.array, first[0].source.array)


def test_gt_is_a_square_of_the_background_never_enlarged(folder):
    background = _textured(9, 96, 150)
    for old in (folder / "backgrounds").iterdir():
        old.unlink()
    _save(folder / "backgrounds" / "only.png", background)
    lefts = set()
    for made in _render(folder):
        matches = [x for x in range(55) if np.array_equal(background[:, x : x + 96], made.gt.array)]
        assert len(matches) == 1
        lefts.add(matches[0])
    assert len(lefts) > 3


@pytest.mark.parametrize(
    "options",
    [
        {"shadow": 1, "reflection": 0},
        {"shadow": 0, "reflection": 1},
        {"shadow": 0, "reflection": 0},
    ],
)
def test_source_equals_gt_where_neither_object_nor_effect_is(folder, monkeypatch, options):
    strengths = []

    def draw(*args, original=composites.draw_effect):
        strengths.append(original(*args))
        return strengths[-1]

    monkeypatch.setattr(composites, "draw_effect", draw)
    for made in _render(folder, effect_masks=0, dilate=0, **options):
        untouched = (made.mask.array == 0) & (strengths.pop(0)[1] <= 1 / 255)
        assert untouched.mean() > 0.3
        assert np.array_equal(made.source.array[untouched], made.gt.array[untouched])


def test_without_an_effect_only_the_object_changes(folder):
    for made in _render(folder, shadow=0, reflection=0):
        assert made.extra["effect"] == "none" and made.extra["mask_kind"] == "object"
        assert not _change(made)[made.mask.array == 0].any()
        assert abs(_change(made)[made.mask.array > 0]).mean() > 20


def test_colours_stay_without_relighting(folder):
    _save(folder / "cutouts" / "figure.png", _block((190, 30, 90)))
    for made in _render(folder, relight=0, max_rotation=0, shadow=0, reflection=0, dilate=0):
        inner = _inner(made.mask.array)
        assert inner.sum() > 500
        assert (made.source.array[inner] == (190, 30, 90)).all()


def test_relighting_moves_the_object_towards_its_surroundings(folder):
    far = []
    for strength in (0, 0.5, 1):
        made = _render(folder, relight=strength, shadow=0, reflection=0, count=1)[0]
        inner = _inner(made.mask.array)
        far.append(abs(made.source.array[inner].mean(axis=0) - GREY).max())
    assert far[0] > far[1] + 20 > far[2] + 20


def test_the_old_background_does_not_show_at_the_rim(folder):
    cutout = _figure((200, 30, 30))
    cutout[cutout[..., 3] < 240, :3] = (0, 255, 0)  # what stood behind it
    _save(folder / "cutouts" / "figure.png", cutout)
    flat = np.full((96, 96, 3), 100, np.uint8)
    for path in (folder / "backgrounds").iterdir():
        _save(path, flat)
    green = [
        (made.source.array[..., 1] > 104).sum()  # more than 160 px each without the cleaning
        for made in _render(folder, relight=0, shadow=0, reflection=0)
    ]
    assert max(green) <= 8


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_no_more_than_the_edge_margin_leaves_the_picture(folder, share):
    _save(folder / "cutouts" / "figure.png", _block())
    made = _render(
        folder,
        edge_margin=share,
        dilate=0,
        feather=0,
        max_rotation=0,
        effect_masks=0,
        min_scale=0.5,
        max_scale=0.5,
        count=40,
    )
    areas = [int((m.mask.array > 0).sum()) for m in made]
    assert max(areas) == 48 * 48 and min(areas) >= (1 - share) * 48 * 48
    assert (min(areas) < 48 * 48) == (share > 0)


def test_the_largest_object_fits(folder):
    for made in _render(folder, min_scale=1, max_scale=1, edge_margin=0):
        assert made.mask.array.any(axis=1).all()


# ------------------------------------------------------------------------------------- the effects


def test_a_shadow_only_darkens_and_touches_the_object(folder):
    for made in _render(folder, shadow=1, reflection=0, effect_masks=0, dilate=0):
        bare = made.mask.array == 0
        assert made.extra["effect"] == "shadow"
        assert (made.source.array[bare] <= made.gt.array[bare]).all()
        dark = (_change(made) < -20) & bare
        count, labels = cv2.connectedComponents(dark.astype(np.uint8))
        near = cv2.dilate(made.mask.array, np.ones((5, 5), np.uint8)) > 0
        sizes = np.bincount(labels[dark], minlength=count)
        assert sizes.max() > 20
        assert (labels[near] == sizes.argmax()).any()


def test_what_has_a_shadow_stands_in_the_lower_half(folder):
    feet = [
        np.nonzero(made.mask.array)[0].max() + 1
        for made in _render(
            folder,
            shadow=1,
            reflection=0,
            effect_masks=0,
            dilate=0,
            min_scale=0.2,
            max_scale=0.25,
            count=24,
        )
    ]
    assert 46 <= min(feet) < 60 and 80 < max(feet) <= 92


def test_the_side_towards_the_shadow_is_the_darker_one(folder):
    flat = np.full((96, 96, 3), GREY, np.uint8)
    for path in (folder / "backgrounds").iterdir():
        _save(path, flat)
    _save(folder / "cutouts" / "figure.png", _block((120, 120, 120)))
    sides = Counter()
    for made in _render(
        folder,
        relight=1,
        shadow=1,
        reflection=0,
        effect_masks=0,
        dilate=0,
        max_rotation=0,
        count=16,
    ):
        rows, columns = np.nonzero(made.mask.array)
        dark = (_change(made) < -10) & (made.mask.array == 0)
        falls = np.sign(np.nonzero(dark)[1].mean() - columns.mean())
        row = made.source.array[int(rows.mean()), :, 0].astype(float)
        left, right = row[columns.min() + 4], row[columns.max() - 4]
        sides[falls] += 1
        assert (left - right) * falls > 10
    assert sides[1] > 2 and sides[-1] > 2


def test_a_shadow_gets_softer_and_fainter_away_from_the_foot():
    alpha = np.zeros((120, 80), np.float32)
    alpha[:, 10:70] = 1
    standing = compositing.stand(np.zeros((120, 80, 3), np.float32), alpha, 100, 50, 340)
    shadow = compositing.cast_shadow(standing, compositing.Light(1.0, 0.5))
    near, far = shadow[160], shadow[125]  # 20 and 90 px up the object
    assert near.max() > far.max() + 0.1
    width = [((row > 0.1 * row.max()) & (row < 0.9 * row.max())).sum() for row in (near, far)]
    assert width[1] > 2 * width[0]
    assert abs(np.average(np.arange(340), weights=far) - (100 + 40 + 90)) < 3


def test_no_light_gets_between_the_foot_and_its_shadow():
    alpha = np.zeros((100, 80), np.float32)
    alpha[:, 10:70] = 1
    standing = compositing.stand(np.zeros((100, 80, 3), np.float32), alpha, 100, 50, 300)
    for back in (0.3, -0.3):
        shadow = compositing.cast_shadow(standing, compositing.Light(0.5, back))
        assert shadow[150, 120:160].min() > 0.9  # the first row below the object
    assert shadow[150:154, 120:160].min() > 0.9  # the last one falls towards the camera


def test_the_ground_goes_through_both_feet_of_a_tilted_object():
    alpha = np.zeros((60, 80), np.float32)
    alpha[10:30] = 1
    alpha[10:40, 5:10] = alpha[10:52, 65:70] = 1
    standing = compositing.stand(np.zeros((60, 80, 3), np.float32), alpha, 0, 0, 200)
    touched = (standing.alpha > 0.5) & (standing.above < 1.5)
    assert touched[:, : -standing.x + 20].any() and touched[:, -standing.x + 60 :].any()
    assert (standing.above[standing.alpha > 0.5] > 0).all()


def test_a_reflection_is_upside_down(folder):
    cutout = _block((0, 0, 255))
    cutout[:50, :, :3] = (255, 0, 0)
    _save(folder / "cutouts" / "figure.png", cutout)
    for made in _render(
        folder,
        shadow=0,
        reflection=1,
        relight=0,
        effect_masks=0,
        max_rotation=0,
        dilate=0,
        max_scale=0.45,
        edge_margin=0,
    ):
        rows, columns = np.nonzero(made.mask.array)
        column = int(columns.mean())
        redder = (made.source.array.astype(int) - made.gt.array)[:, column - 5 : column + 5]
        redder = (redder[..., 0] - redder[..., 2]).mean(axis=1)
        below = redder[rows.max() + 4 :]
        assert made.extra["effect"] == "reflection"
        assert below[:10].mean() < -8
        if len(below) > 35:
            assert below[25:35].mean() > 2


def test_effects_come_in_the_given_shares(folder):
    effects = Counter(
        made.extra["effect"]
        for made in _render(folder, shadow=0.5, reflection=0.3, count=120, size=48)
    )
    assert abs(effects["shadow"] - 60) < 18 and abs(effects["reflection"] - 36) < 16
    assert effects["none"] > 10


def test_an_effect_that_nobody_sees_is_none(folder):
    _save(folder / "cutouts" / "figure.png", _block())
    for made in _render(
        folder,
        shadow=1,
        reflection=0,
        min_scale=1,
        max_scale=1,
        max_rotation=0,
        edge_margin=0,
        feather=0,
        effect_masks=1,
    ):
        assert made.extra["effect"] == "none" and made.extra["mask_kind"] == "object"


# --------------------------------------------------------------------------------------- the masks


def test_masks_with_the_effect_cover_it_and_the_others_do_not(folder):
    for effect in ({"shadow": 1, "reflection": 0}, {"shadow": 0, "reflection": 1}):
        with_effect = _render(folder, effect_masks=1, dilate=0, **effect)
        objects = _render(folder, effect_masks=0, dilate=0, **effect)
        for wide, exact in zip(with_effect, objects, strict=True):
            assert np.array_equal(wide.source.array, exact.source.array)
            seen = abs(_change(wide)) > 8
            assert (wide.mask.array[seen] == 255).all()
            assert (seen & (exact.mask.array == 0)).sum() > 20
            assert (wide.mask.array[exact.mask.array > 0] == 255).all()
            assert wide.extra["mask_kind"] == "with_effect"
            assert exact.extra["mask_kind"] == "object"
            share = (exact.mask.array > 0).sum() / (wide.mask.array > 0).sum()
            assert wide.extra["mask_object_share"] == pytest.approx(share, abs=1e-3) != 1
            assert exact.extra["mask_object_share"] == 1


def test_about_half_of_the_masks_have_the_effect(folder):
    kinds = Counter(
        made.extra["mask_kind"]
        for made in _render(folder, shadow=1, reflection=0, count=80, size=48)
    )
    assert 25 <= kinds["object"] <= 55


def test_masks_cover_hair_and_grow_by_half_of_the_kernel(folder):
    soft = _figure()
    soft[..., 3] = cv2.GaussianBlur(soft[..., 3], (0, 0), 6)
    _save(folder / "cutouts" / "figure.png", soft)
    exact = _render(folder, shadow=0, reflection=0, dilate=0, max_scale=0.5)
    wider = _render(folder, shadow=0, reflection=0, max_scale=0.5)
    for small, large in zip(exact, wider, strict=True):
        assert not _change(small)[small.mask.array == 0].any()
        grown = cv2.dilate(small.mask.array, np.ones((5, 5), np.uint8))
        assert np.array_equal(large.mask.array, grown)


# --------------------------------------------------------------------------------------- the files


def test_every_file_is_used_once_before_any_is_used_again(folder):
    for number in range(4):
        _save(folder / "cutouts" / f"{number}.png", _figure())
    items = list(_source(folder, count=30).list_items())
    cutouts = [item.place[1] for item in items]
    backgrounds = [item.place[2] for item in items]
    for start in range(0, 30, 5):
        assert len(set(cutouts[start : start + 5])) == 5
    for start in range(0, 30, 3):
        assert len(set(backgrounds[start : start + 3])) == 3
    assert len({tuple(cutouts[i : i + 5]) for i in range(0, 30, 5)}) > 1
    assert len(set(zip(cutouts, backgrounds, strict=True))) > 9
    assert [item.id for item in items[:2]] == ["composite-000000", "composite-000001"]
    assert [item.group for item in items] == backgrounds


def test_listing_opens_no_picture_and_can_stop_early(folder, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("an image was opened"))
    items = _source(folder, count=10**6).list_items()
    assert [next(items).id for _ in range(3)][2] == "composite-000002"


def test_names_in_other_scripts_and_classes_from_folders(tmp_path):
    _save(tmp_path / "剪 图" / "猫 咪" / "一 号.png", _figure())
    _save(tmp_path / "背 景" / "街 道.png", _textured(1))
    source = _source(tmp_path / "剪 图", backgrounds=str(tmp_path / "背 景"), count=1)
    (item,) = source.list_items()
    made = source.load_item(item)
    assert made.extra["class"] == "猫 咪" and made.extra["cutout"] == "猫 咪/一 号.png"
    assert made.extra["background"] == item.group == "街 道.png"
    assert (made.mask.array > 0).any()


def test_no_class_without_class_folders(folder):
    assert "class" not in _render(folder, count=1)[0].extra


def test_backgrounds_within_the_folder_are_no_cutouts(folder):
    (folder / "cutouts").rename(folder / "dog")
    items = list(_source(folder).list_items())
    assert {item.place[1] for item in items} == {"dog/figure.png"}
    assert not CompositesSource.recognises(folder)
    (folder / "dog").rename(folder / "cutouts")
    assert CompositesSource.recognises(folder)


@pytest.mark.parametrize("convert", ["LA", "P", "WEBP", "key"])
def test_every_kind_of_transparency_is_read(folder, convert):
    path = folder / "cutouts" / "figure.png"
    image = Image.open(path).convert("RGBA")
    path.unlink()
    if convert == "LA":
        image.convert("LA").save(path)
    elif convert == "P":
        image.quantize(64).save(path)
    elif convert == "WEBP":
        image.save(path.with_suffix(".webp"), lossless=True)
    else:
        flat = Image.new("RGB", image.size, (1, 2, 3))
        flat.paste((200, 40, 40), mask=image.getchannel("A").point(lambda a: 255 * (a > 128)))
        flat.save(path, transparency=(1, 2, 3))
    for made in _render(folder, shadow=0, reflection=0, max_rotation=0, dilate=0):
        columns = np.flatnonzero(made.mask.array.any(axis=0))
        rows = np.flatnonzero(made.mask.array.any(axis=1))
        assert 1.8 < np.ptp(rows) / np.ptp(columns) < 3.2


def test_a_turned_cutout_is_upright(folder):
    path = folder / "cutouts" / "figure.png"
    lying = Image.open(path).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(path, exif=exif)
    made = _render(folder, shadow=0, reflection=0, max_rotation=0, edge_margin=0, count=1)[0]
    rows, columns = np.nonzero(made.mask.array)
    assert np.ptp(rows) > 1.8 * np.ptp(columns)


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "array, reason",
    [
        (_figure()[..., :3], "no alpha"),
        (np.dstack([_figure()[..., :3], np.full((170, 80), 255, np.uint8)]), "no alpha"),
        (np.dstack([_figure()[..., :3], np.full((170, 80), 60, np.uint8)]), "no alpha"),
        (_figure(height=15, width=6), "small cut-out"),
    ],
    ids=["RGB", "opaque", "empty", "small"],
)
def test_what_is_no_cutout_is_rejected(folder, array, reason):
    _save(folder / "cutouts" / "figure.png", array)
    with pytest.raises(Rejected, match="figure.png") as caught:
        _render(folder)
    assert caught.value.reason == reason


def test_an_object_too_thin_to_be_seen_is_rejected(folder):
    thread = np.zeros((900, 900, 4), np.uint8)
    thread[range(900), range(900)] = 255
    _save(folder / "cutouts" / "figure.png", thread)
    with pytest.raises(Rejected, match="so thin") as caught:
        _render(folder)
    assert caught.value.reason == "small cut-out"


def test_small_backgrounds_are_rejected(folder):
    for path in (folder / "backgrounds").iterdir():
        _save(path, _textured(1, 95, 300))
    with pytest.raises(Rejected, match="300x95 px.*96 px") as caught:
        _render(folder)
    assert caught.value.reason == "small background"


@pytest.mark.parametrize("part", ["cutouts/figure.png", "backgrounds/0.png"])
@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda data: b"", "is empty"),
        (lambda data: data[: len(data) // 2], "truncated or damaged"),
        (lambda data: b"no image", "is no image"),
        (None, "does not exist"),
    ],
    ids=["empty", "truncated", "text", "gone"],
)
def test_unreadable_files_are_named(folder, part, damage, words):
    for other in (folder / "backgrounds").glob("[12].png"):
        other.unlink()
    source = _source(folder, count=1)
    (item,) = source.list_items()
    path = folder / part
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    with pytest.raises(TripletError, match=words) as caught:
        source.load_item(item)
    assert caught.value.file == path


def test_missing_folders_are_named_with_what_is_expected(tmp_path):
    with pytest.raises(SourceError, match="gone is no folder: folder takes a folder of cut-outs"):
        next(_source(tmp_path / "gone").list_items())
    _save(tmp_path / "photo.jpg", _textured(1))
    with pytest.raises(SourceError, match=r"folder takes .*\.png.*it holds 1 \.jpg"):
        next(_source(tmp_path).list_items())
    _save(tmp_path / "a.png", _figure())
    with pytest.raises(SourceError, match="backgrounds is no folder: backgrounds takes"):
        next(_source(tmp_path).list_items())
    (tmp_path / "backgrounds").mkdir()
    with pytest.raises(SourceError, match="backgrounds takes a folder.*it holds nothing"):
        next(_source(tmp_path).list_items())
    with pytest.raises(SourceError, match="put them in two folders"):
        next(_source(tmp_path, backgrounds=str(tmp_path)).list_items())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"count": 0}, "count must be a whole number from 1"),
        ({"size": 512.5}, "size must be a whole number"),
        ({"min_scale": "0.2"}, "min_scale must be a number from 0.01 to 1, not '0.2'"),
        ({"min_scale": 0.7}, "min_scale 0.7 is above max_scale 0.6"),
        ({"relight": 2}, "relight must be a number from 0 to 1"),
        ({"edge_margin": 0.9}, "edge_margin must be a number from 0 to 0.5"),
        ({"shadow": 0.8, "reflection": 0.3}, "together are at most 1"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        CompositesSource("x", **options)


def test_the_license_is_an_option():
    assert CompositesSource.license == CompositesSource("x").license == "unknown: see the sources"
    assert CompositesSource("x", license="CC0-1.0").license == "CC0-1.0"
