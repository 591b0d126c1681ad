import os
import pickle
import zlib

import numpy as np
import pytest
from PIL import Image

from rorem_lib.data.items import Rejected, SourceError
from rorem_lib.data.pictures import TripletError
from rorem_lib.sources.mulan import MulanSource

HEIGHT, WIDTH = 40, 48
CAPTIONS = ("a brown dog on the grass", "a red ball, not a dog", "cattle behind a fence")
BOXES = ((5, 6, 22, 26), (12, 18, 30, 38), (0, 30, 16, 48))  # y0, x0, y1, x1; they overlap


def _make_stack(n=3, seed=0):
    """A background and layers as MULAN's script makes them, the last on top."""
    rng = np.random.default_rng(seed)
    background = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    layers = []
    for y0, x0, y1, x1 in BOXES[:n]:
        rgb = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
        rgb[y0:y1, x0:x1] = rng.integers(0, 256, (y1 - y0, x1 - x0, 3))
        alpha[y0:y1, x0:x1] = 255
        alpha[y1 - 1, x0:x1] = 90  # a soft edge
        alpha[y0:y1, x0] = 3
        layers.append((rgb, alpha))
    return background, layers


def _lay(under, layers):
    under = under.astype(float)
    for rgb, alpha in layers:
        share = alpha[..., None] / 255
        under = rgb * share + under * (1 - share)
    return np.floor(under + 0.5).astype(np.uint8)


def _annotate(photo, stack, kind="uint8"):
    """The annotation that gives `stack` over `photo`: what the photograph shows, and the rest."""
    background, layers = stack
    instances, form = {}, FORMS[kind]
    entry = _take_apart(photo, background, form)
    annotation = {
        "captioning": {"llava": "13b", "blip2": "opt", "clip": "L14"},
        "background": {"llava": "a meadow, seen from afar", "blip2": "grass", **entry},
        "image": {"llava": "long", "blip2": "short"},
        "instances": instances,
    }
    for key, ((rgb, alpha), caption) in enumerate(zip(layers, CAPTIONS)):
        instances[key] = {
            "blip2": caption,
            **_take_apart(photo, rgb, form, alpha == 255),
            "instance_alpha": form["alpha"](alpha),
        }
    return annotation


def _take_apart(photo, rgb, form, instance=None):
    same = (photo == rgb).all(axis=2)
    entry = {"original_image_mask": form["mask"](same)}
    if instance is not None and form.get("two masks"):  # the first is wider than the instance
        wide = same | ~instance
        entry = {"original_image_mask": form["mask"](wide), "instance_mask": form["mask"](instance)}
        same = wide & instance
    return entry | {"inpainted_delta": form["delta"](rgb.astype(int) - photo * same[..., None])}


def _uint8(values):
    return values.astype(np.uint8)


FORMS = {
    "uint8": {"mask": _uint8, "delta": _uint8, "alpha": _uint8},
    "bool, signed": {"mask": lambda m: m, "delta": lambda d: d.astype(np.int16), "alpha": _uint8},
    "255, float": {
        "mask": lambda m: _uint8(m) * 255,
        "delta": lambda d: d.astype(np.float32),
        "alpha": lambda a: (a / 255).astype(np.float32),
    },
    "channels": {
        "mask": lambda m: np.repeat(m[..., None], 3, 2).astype(np.float64),
        "delta": lambda d: d.astype(np.int64),
        "alpha": lambda a: a[..., None],
    },
    "two masks": {"mask": _uint8, "delta": _uint8, "alpha": _uint8, "two masks": True},
    "pictures": {"mask": lambda m: m, "delta": _uint8, "alpha": Image.fromarray},
    "columns first": {
        "mask": np.asfortranarray,
        "delta": lambda d: np.asfortranarray(_uint8(d)),
        "alpha": np.asfortranarray,
    },
}


def _write_annotation(path, annotation, protocol=pickle.DEFAULT_PROTOCOL):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zlib.compress(pickle.dumps(annotation, protocol)))


def _write_layers(folder, image_id, stack, table=True):
    folder.mkdir(parents=True, exist_ok=True)
    background, layers = stack
    Image.fromarray(background).save(folder / f"{image_id}-layer_0.png")
    lines = [f'data/old place/{image_id}-layer_0.png,grass,"a meadow, seen from afar"']
    for number, ((rgb, alpha), caption) in enumerate(zip(layers, CAPTIONS), 1):
        picture = Image.fromarray(rgb)
        picture.putalpha(Image.fromarray(alpha))
        picture.save(folder / f"{image_id}-layer_{number}.png")
        lines.append(f'data/old place/{image_id}-layer_{number}.png,"{caption}",N/A')
    if table:
        (folder / "meta_data.csv").write_text("\n".join(["paths,blip2,llava", *lines]))


COCO, LAION = "000000581346", "000635517"


@pytest.fixture
def stack():
    return _make_stack()


@pytest.fixture
def photo(stack):
    return _lay(*stack)


@pytest.fixture
def annotated(tmp_path, stack, photo):
    """annotations/ and images/train2017/ with one photograph."""
    _write_annotation(tmp_path / "raw" / "annotations" / f"{COCO}.p.zl", _annotate(photo, stack))
    _save_photo(tmp_path / "images" / "train2017" / f"{COCO}.png", photo)
    return tmp_path / "raw"


@pytest.fixture
def decomposed(tmp_path, stack):
    _write_layers(tmp_path / "mulan_coco", COCO, stack)
    return tmp_path / "mulan_coco"


def _save_photo(path, photo):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo).save(path)


def _open(folder, **options):
    images = folder.parent / "images"
    if images.is_dir() and "images" not in options:
        options["images"] = str(images)
    return MulanSource(str(folder), **options)


def _load(source):
    return {item.id: source.load_item(item) for item in source.list_items()}


def _only(source):
    (item,) = source.list_items()
    return source.load_item(item)


def _equal(found, expected, levels=0):
    assert found.dtype == np.uint8 and found.shape == expected.shape
    return np.abs(found.astype(int) - expected).max() <= levels


# ------------------------------------------------------------------------------------- triplets


def test_the_top_instance_is_removed(annotated, stack, photo):
    background, layers = stack
    (item,) = _open(annotated).list_items()
    assert (item.id, item.group, item.split) == (COCO, COCO, None)
    found = _open(annotated, dilate=0).load_item(item)
    assert _equal(found.source.array, photo, 1)
    assert _equal(found.gt.array, _lay(background, layers[:2]), 1)
    assert np.array_equal(found.mask.array, np.where(layers[2][1] > 1, 255, 0))
    assert (found.source.file, found.mask.file, found.gt.file) == (None, None, None)
    assert found.origin_file == annotated / "annotations" / f"{COCO}.p.zl"
    assert found.extra == {
        "layer": 3,
        "n_layers": 4,
        "caption": CAPTIONS[2],
        "photograph": f"{COCO}.png",
        "composite_error": pytest.approx(0, abs=0.5),
    }


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize("remove", ["top", "each"])
def test_annotations_and_layers_give_the_same_triplets(annotated, decomposed, order, remove):
    options = {"order": order, "remove": remove, "threshold": 0.2, "dilate": 3}
    first = _load(_open(annotated, **options))
    second = _load(_open(decomposed, **options))
    assert list(first) == list(second) and len(first) == (1 if remove == "top" else 3)
    for name, pictures in first.items():
        for part in ("source", "mask", "gt"):
            expected = getattr(pictures, part).array.astype(int)
            assert _equal(getattr(second[name], part).array, expected, 1), (name, part)
        assert pictures.extra == second[name].extra


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("protocol", [2, pickle.DEFAULT_PROTOCOL, 5])
def test_every_form_of_masks_deltas_and_alphas_gives_the_layers(
    tmp_path, stack, photo, kind, protocol
):
    _write_annotation(tmp_path / "raw" / f"{COCO}.p.zl", _annotate(photo, stack, kind), protocol)
    _save_photo(tmp_path / "images" / f"{COCO}.png", photo)
    found = _only(_open(tmp_path / "raw"))
    assert _equal(found.source.array, photo, 1)
    assert _equal(found.gt.array, _lay(stack[0], stack[1][:2]), 1)


def test_annotations_of_numpy_1_are_read(tmp_path, annotated, photo):
    path = annotated / "annotations" / f"{COCO}.p.zl"
    data = pickle.dumps(_annotate(photo, _make_stack()), 2)
    path.write_bytes(zlib.compress(data.replace(b"numpy._core.", b"numpy.core.")))
    assert _equal(_only(_open(annotated)).source.array, photo, 1)


def test_deltas_of_uint8_add_as_uint8_do(tmp_path, stack, photo):
    annotation = _annotate(photo, stack)
    entry = annotation["instances"][2]
    entry["original_image_mask"] = np.ones((HEIGHT, WIDTH), np.uint8)
    entry["inpainted_delta"] = stack[1][2][0] - photo  # wraps below 0
    _write_annotation(tmp_path / "raw" / f"{COCO}.p.zl", annotation)
    _save_photo(tmp_path / "images" / f"{COCO}.png", photo)
    assert _equal(_only(_open(tmp_path / "raw")).source.array, photo, 1)


def test_signed_deltas_are_clipped(tmp_path, stack, photo):
    annotation = _annotate(photo, stack, "bool, signed")
    annotation["background"]["inpainted_delta"] += 300
    _write_annotation(tmp_path / "raw" / f"{COCO}.p.zl", annotation)
    _save_photo(tmp_path / "images" / f"{COCO}.png", photo)
    assert (_only(_open(tmp_path / "raw")).source.array[-1, 0] == 255).all()


def test_the_order_says_which_instance_is_on_top(annotated, stack, photo):
    background, layers = stack
    found = _only(_open(annotated, order="descending"))
    assert _equal(found.source.array, _lay(background, layers[::-1]), 1)
    assert _equal(found.gt.array, _lay(background, layers[:0:-1]), 1)
    assert found.extra["layer"] == 1 and found.extra["caption"] == CAPTIONS[0]


def test_the_composite_error_is_larger_in_the_wrong_order(annotated, stack, photo):
    right, wrong = (
        _only(_open(annotated, order=order)).extra["composite_error"]
        for order in ("ascending", "descending")
    )
    expected = np.abs(_lay(stack[0], stack[1][::-1]).astype(int) - photo).mean()
    assert right < 0.5 and wrong > 2
    assert wrong == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize("order, numbers", [("ascending", [1, 2, 3]), ("descending", [3, 2, 1])])
def test_each_instance_is_removed_from_what_is_below_it(decomposed, stack, order, numbers):
    background, layers = stack
    found = _load(_open(decomposed, remove="each", order=order, dilate=0))
    assert list(found) == [f"{COCO}-{n}" for n in (1, 2, 3)]
    for place, number in enumerate(numbers):
        below = [layers[n - 1] for n in numbers[:place]]
        pictures = found[f"{COCO}-{number}"]
        assert _equal(pictures.gt.array, _lay(background, below), 1)
        assert _equal(pictures.source.array, _lay(background, [*below, layers[number - 1]]), 1)
        assert np.array_equal(pictures.mask.array > 0, layers[number - 1][1] > 1)
        assert pictures.extra == {"layer": number, "n_layers": 4, "caption": CAPTIONS[number - 1]}
    groups = {item.group for item in _open(decomposed, remove="each").list_items()}
    assert groups == {COCO}


def test_each_of_annotations_measures_the_whole_composite(annotated):
    found = _load(_open(annotated, remove="each"))
    assert [pictures.extra["composite_error"] < 0.5 for pictures in found.values()] == [True] * 3


def test_no_visible_trace_of_the_instance_is_outside_of_the_mask(tmp_path, stack):
    background, layers = stack
    rgb, alpha = layers[2]
    alpha[:] = np.linspace(0, 255, WIDTH)  # semi-transparent from side to side
    rgb[:], background[:] = 255, 0
    _write_layers(tmp_path, COCO, (background, layers))
    found = _only(_open(tmp_path, dilate=0))
    change = np.abs(found.source.array.astype(int) - found.gt.array).max(axis=2)
    assert change[found.mask.array == 0].max() <= 1
    assert found.mask.array.min() == 0 and (found.mask.array > 0).mean() > 0.9


@pytest.mark.parametrize("dilate, sides", [(0, (18, 18)), (5, (22, 22)), (9, (26, 26))])
def test_masks_are_widened(tmp_path, dilate, sides):
    _write_layers(tmp_path, COCO, _make_stack(2))
    mask = _only(_open(tmp_path, dilate=dilate, threshold=0.004)).mask.array
    rows, columns = np.nonzero(mask)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (sides[0], sides[1] + 2)


def test_a_threshold_leaves_out_what_is_more_transparent(decomposed, stack):
    for threshold, least in ((0.0, 1), (0.01, 3), (0.5, 255)):
        mask = _only(_open(decomposed, threshold=threshold, dilate=0)).mask.array
        assert np.array_equal(mask, np.where(stack[1][2][1] >= least, 255, 0)), threshold


def test_keys_are_ordered_as_numbers(tmp_path, stack, photo):
    annotation = _annotate(photo, stack)
    first, second, third = annotation["instances"].values()
    annotation["instances"] = {"10": third, "9": second, "1": first}
    _write_annotation(tmp_path / "raw" / f"{COCO}.p.zl", annotation)
    _save_photo(tmp_path / "images" / f"{COCO}.png", photo)
    found = _only(_open(tmp_path / "raw"))
    assert found.extra["caption"] == CAPTIONS[2] and found.extra["composite_error"] < 0.5


# -------------------------------------------------------------------------------------- filters


@pytest.mark.parametrize(
    "options, reason, words",
    [
        ({"min_area": 0.2}, "area", r"layer 3 covers 0\.1[0-9]+ of the image"),
        ({"max_area": 0.1}, "area", "not 0.0 to 0.1"),
        ({"max_border": 0.3}, "border", r"layer 3 has 0\.[3-9]\d+ of its outline"),
        ({"words": ("dog",)}, "class words", r"cattle behind a fence\) has none of dog"),
        ({"words": ("cat", "fen")}, "class words", "has none of cat, fen"),
        ({"exclude_words": ("FENCE",)}, "class words", "has one of FENCE"),
        ({"exclude_words": "horse, Cattle"}, "class words", "has one of horse, Cattle"),
    ],
)
def test_a_filtered_top_instance_is_rejected_and_not_replaced(
    annotated, decomposed, options, reason, words
):
    for folder in (annotated, decomposed):
        (item,) = _open(folder, **options).list_items()
        with pytest.raises(Rejected, match=words) as caught:
            _open(folder, **options).load_item(item)
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    "options, kept",
    [
        ({}, [1, 2, 3]),
        ({"words": ["DOG"]}, [1, 2]),
        ({"words": "ball, fence"}, [2, 3]),
        ({"exclude_words": ["dog", "all"]}, [3]),
        ({"words": ["own", "he"]}, []),
        ({"words": ["dog"], "exclude_words": ["red ball"]}, [1]),
        ({"max_border": 0.0}, [1, 2]),
        ({"min_area": 0.168}, [2]),
        ({"max_area": 0.14}, [3]),
    ],
)
def test_filters_judge_each_instance(decomposed, options, kept):
    source, found = _open(decomposed, remove="each", **options), []
    for item in source.list_items():
        try:
            found.append(source.load_item(item).extra["layer"])
        except Rejected:
            pass
    assert found == kept


def test_words_need_captions(decomposed):
    (decomposed / "meta_data.csv").unlink()
    assert "caption" not in _only(_open(decomposed)).extra
    with pytest.raises(Rejected, match="no caption.* has none of fence"):
        _only(_open(decomposed, words=("fence",)))


def test_captions_are_also_found_above_the_layers_folder(tmp_path, stack):
    _write_layers(tmp_path, COCO, stack)
    (tmp_path / "deep" / COCO).mkdir(parents=True)
    for file in tmp_path.glob("*.png"):
        file.rename(tmp_path / "deep" / COCO / file.name)
    assert _only(_open(tmp_path)).extra["caption"] == CAPTIONS[2]


def test_pictures_without_an_instance_are_rejected(tmp_path, annotated):
    _write_layers(tmp_path / "none", COCO, _make_stack(0))
    _write_annotation(
        annotated / "annotations" / f"{COCO}.p.zl", _annotate(_make_stack(0)[0], _make_stack(0))
    )
    for folder in (tmp_path / "none", annotated):
        for remove in ("top", "each"):
            with pytest.raises(Rejected) as caught:
                _only(_open(folder, remove=remove))
            assert caught.value.reason == "no instance"


# -------------------------------------------------------------------------------------- listing


def test_listing_opens_nothing_where_the_top_is_removed(tmp_path):
    for name in (
        "b/2.p.zl",
        "a/10.p.zl",
        "a/9.p.zl",
        "c/照片 1-layer_0.png",
        "c/照片 1-layer_1.png",
        "c/._x-layer_0.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    source = MulanSource(str(tmp_path), images=str(tmp_path))
    _save_photo(tmp_path / "10.png", _make_stack()[0])
    items = list(source.list_items())
    assert [item.id for item in items] == ["10", "9", "2", "照片 1"]
    assert items == list(source.list_items())
    for item in (items[0], items[3]):
        with pytest.raises(TripletError):
            source.load_item(item)


def test_items_come_as_folders_are_walked(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / f"{place}-layer_0.png").write_bytes(b"")
    listing = MulanSource(str(tmp_path)).list_items()
    assert next(listing).id == "a"
    (tmp_path / "b" / "b-layer_0.png").unlink()
    assert list(listing) == []  # b was not looked at before


def test_each_lists_a_damaged_annotation_once_and_says_why_it_fails(annotated):
    (annotated / "annotations" / "000000000009.p.zl").write_bytes(b"damaged")
    source = _open(annotated, remove="each")
    items = list(source.list_items())
    assert [item.id for item in items] == ["000000000009-0", *(f"{COCO}-{n}" for n in (1, 2, 3))]
    _save_photo(annotated.parent / "images" / "000000000009.jpg", _make_stack()[0])
    with pytest.raises(TripletError, match="000000000009.p.zl"):
        source.load_item(items[0])


def test_an_image_given_twice_is_taken_once(annotated, stack, photo):
    _write_layers(annotated / "annotations", COCO, stack)  # beside the annotation
    _write_annotation(annotated / "copy" / f"{COCO}.p.zl", _annotate(photo, stack))
    source = _open(annotated)
    items = list(source.list_items())
    assert len({item.id for item in items}) == 3 and {item.group for item in items} == {COCO}
    assert source.load_item(items[0]).origin_file.name == f"{COCO}-layer_0.png"
    for item in items[1:]:
        with pytest.raises(Rejected, match="was listed before") as caught:
            source.load_item(item)
        assert caught.value.reason == "same image"


def test_folders_are_recognised_by_names(tmp_path, annotated, decomposed):
    other = tmp_path / "other"
    (other / "x").mkdir(parents=True)
    (other / "x" / "layer_0.png").write_bytes(b"")
    (other / "a.pkl").write_bytes(b"")
    assert MulanSource.recognises(annotated) and MulanSource.recognises(decomposed)
    assert MulanSource.recognises(annotated / "annotations") and MulanSource.recognises(tmp_path)
    assert not MulanSource.recognises(other) and not MulanSource.recognises(tmp_path / "gone")
    decomposed.rename(annotated / decomposed.name)
    assert not MulanSource.recognises(tmp_path)  # a folder too far below, which may hold others
    with pytest.raises(SourceError, match=r"MULAN:.*p\.zl.*a\.pkl"):
        list(MulanSource(str(other)).list_items())
    with pytest.raises(SourceError, match="is no folder"):
        list(MulanSource(str(tmp_path / "gone")).list_items())


def test_a_source_and_its_items_go_to_other_processes(annotated):
    source = _open(annotated, remove="each", words=["ball"])
    copy, items = pickle.loads(pickle.dumps((source, list(source.list_items()))))
    assert copy == source
    assert np.array_equal(copy.load_item(items[1]).gt.array, source.load_item(items[1]).gt.array)


# ---------------------------------------------------------------------------------- photographs


@pytest.mark.parametrize(
    "image_id, file",
    [
        (COCO, f"{COCO}.png"),
        (COCO, f"val2017/{COCO}.bmp"),
        ("581346", f"train2017/{COCO}.PNG"),
        (COCO, "581346.png"),
        (LAION, f"00063/{LAION}.webp"),
        ("照片 1", "train2017/照片 1.png"),
    ],
)
def test_photographs_are_found_by_image_id(tmp_path, stack, photo, image_id, file):
    _write_annotation(tmp_path / "raw" / f"{image_id}.p.zl", _annotate(photo, stack))
    path = tmp_path / "base 图" / file
    path.parent.mkdir(parents=True)
    Image.fromarray(photo).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
    (tmp_path / "more").mkdir()
    images = os.pathsep.join(str(tmp_path / name) for name in ("more", "base 图"))
    found = _only(_open(tmp_path / "raw", images=images))
    assert _equal(found.source.array, photo, 1)
    assert found.extra["photograph"] == path.name


def test_a_folder_of_photographs_may_have_the_separator_in_its_name(tmp_path, annotated, photo):
    folder = tmp_path / f"a{os.pathsep}b"
    _save_photo(folder / f"{COCO}.png", photo)
    assert _only(_open(annotated, images=str(folder))).extra["composite_error"] < 0.5


def test_a_picture_of_laion_is_not_taken_from_coco(tmp_path, stack, photo):
    _write_annotation(tmp_path / "raw" / f"{LAION}.p.zl", _annotate(photo, stack))
    _save_photo(tmp_path / "images" / "train2017" / f"000{LAION}.png", photo)
    with pytest.raises(Rejected, match=f"{LAION}.p.zl:.*{LAION}") as caught:
        _only(_open(tmp_path / "raw"))
    assert caught.value.reason == "no photograph"


@pytest.mark.parametrize(
    "table",
    [
        f"image,annotation\nshots/my image.png,/elsewhere/{LAION}.p.zl\n",
        f"URL,File_ID\nhttps://example.org/x/my%20picture.png,{LAION}\n",
        f"image_id,file_name\n{LAION},here/my image.png\n",
        f"image_id,file_name,url\n{LAION},,http://example.org/my image.png?size="
        + "9" * 300
        + "\n",
    ],
    ids=["path", "no match", "name", "URL"],
)
def test_a_table_links_annotations_to_photographs(tmp_path, stack, photo, table):
    _write_annotation(tmp_path / "raw" / f"{LAION}.p.zl", _annotate(photo, stack))
    in_images = not table.startswith("image,")
    _save_photo(tmp_path / ("images/sub" if in_images else "shots") / "my image.png", photo)
    (tmp_path / "link 表.csv").write_text("\ufeff" + table, encoding="utf-8")
    source = _open(tmp_path / "raw", linking=str(tmp_path / "link 表.csv"))
    if "%20" in table:
        with pytest.raises(Rejected, match="表.csv"):
            _only(source)
    else:
        assert _equal(_only(source).source.array, photo, 1)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"images": ""}, "is an annotation without its photograph: give the folders of COCO 2017"),
        ({"images": "/nowhere at all"}, "images: /nowhere at all is no folder"),
        ({"linking": "/nowhere.csv"}, "linking: /nowhere.csv cannot be read"),
        ({"linking": __file__}, "linking: .*(has the columns|cannot be read as CSV)"),
    ],
)
def test_what_is_not_there_is_said_before_the_work(annotated, options, words):
    with pytest.raises(SourceError, match=words):
        list(_open(annotated, **options).list_items())


def test_a_table_with_other_columns_is_refused(tmp_path, annotated):
    (tmp_path / "link.csv").write_text("picture,number\na,b\n")
    with pytest.raises(SourceError, match="link.csv"):
        list(_open(annotated, linking=str(tmp_path / "link.csv")).list_items())


def test_layers_need_no_photograph_and_are_compared_with_it_where_there_is_one(
    tmp_path, decomposed, photo
):
    assert "composite_error" not in _only(_open(decomposed)).extra
    _save_photo(tmp_path / "images" / f"{COCO}.png", photo)
    assert _only(_open(decomposed)).extra["composite_error"] < 0.5
    _save_photo(tmp_path / "images" / f"{COCO}.png", photo[:-2])
    assert "composite_error" not in _only(_open(decomposed)).extra


# ---------------------------------------------------------------------------- what is refused


def _pop(*keys):
    def change(annotation):
        holder = annotation
        for key in keys[:-1]:
            holder = holder[key]
        del holder[keys[-1]]

    return change


def _set(value, *keys):
    def change(annotation):
        holder = annotation
        for key in keys[:-1]:
            holder = holder[key]
        holder[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (_pop("background"), "is no annotation of MULAN: it has no background"),
        (_pop("instances"), "it has no instances"),
        (_set(None, "instances", 1), "it has no 1"),
        (
            _pop("background", "inpainted_delta"),
            "background has no array inpainted_delta .its keys",
        ),
        (_pop("instances", 1, "instance_alpha"), "instance 1 has no array instance_alpha"),
        (
            _set("white", "instances", 0, "original_image_mask"),
            "instance 0 has no array original_im",
        ),
        (
            _set(np.ones((9, 9), bool), "instances", 2, "original_image_mask"),
            r"instance 2: original_image_mask has \[9, 9, 1\] values but the photograph is "
            "48x40 px",
        ),
        (
            _set(np.ones((HEIGHT, WIDTH, 4)), "background", "inpainted_delta"),
            "has .40, 48, 4. values",
        ),
        (
            _set(np.full((HEIGHT, WIDTH), 256), "instances", 0, "instance_alpha"),
            "reaches from 256 to",
        ),
        (
            _set(np.full((HEIGHT, WIDTH), -1), "instances", 0, "instance_alpha"),
            "reaches from -1 to -1",
        ),
        (
            _set(np.full((HEIGHT, WIDTH), np.nan), "instances", 0, "inpainted_delta"),
            "are no numbers",
        ),
        (_set(np.array([None]), "image", "blip2"), "array of Python objects"),
    ],
)
def test_faults_of_an_annotation_are_named(annotated, stack, photo, change, words):
    annotation = _annotate(photo, stack)
    change(annotation)
    _write_annotation(annotated / "annotations" / f"{COCO}.p.zl", annotation)
    with pytest.raises(TripletError, match=words) as caught:
        _only(_open(annotated))
    assert f"{COCO}.p.zl" in str(caught.value)


class _Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("remove", ["top", "each"])
def test_an_annotation_runs_nothing(tmp_path, annotated, stack, photo, remove):
    annotation = {**_annotate(photo, stack), "image": _Evil(tmp_path / "marker")}
    _write_annotation(annotated / "annotations" / f"{COCO}.p.zl", annotation)
    with pytest.raises(TripletError, match=r"p\.zl.*posix\.mkdir"):
        _only(_open(annotated, remove=remove))
    assert not (tmp_path / "marker").exists()
    pickle.loads(pickle.dumps(annotation))
    assert (tmp_path / "marker").exists()


def test_the_size_of_an_annotation_is_limited(annotated, stack, photo):
    annotation = {**_annotate(photo, stack), "image": bytes(1 << 20)}
    _write_annotation(annotated / "annotations" / f"{COCO}.p.zl", annotation)
    with pytest.raises(TripletError, match="larger than 1048576 bytes when decompressed"):
        _only(_open(annotated, max_mb=1))
    assert _only(_open(annotated, max_mb=2)).extra["n_layers"] == 4


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: (f / f"{COCO}-layer_0.png").unlink(), "layer_0.png is missing: decompose"),
        (lambda f: (f / f"{COCO}-layer_2.png").unlink(), "layer_2.png is missing: decompose"),
        (
            lambda f: Image.new("RGB", (WIDTH, HEIGHT)).save(f / f"{COCO}-layer_2.png"),
            "layer_2.png has no alpha channel",
        ),
        (
            lambda f: Image.new("RGBA", (9, 8)).save(f / f"{COCO}-layer_2.png"),
            "layer_2.png is 9x8 px but layer_0 is 48x40",
        ),
        (lambda f: (f / f"{COCO}-layer_3.png").write_bytes(b"x"), "layer_3.png is no image"),
        (
            lambda f: (f / "meta_data.csv").write_text("a,b\n1,2\n"),
            "meta_data.csv has the columns a",
        ),
    ],
)
def test_faults_of_layers_are_named(decomposed, change, words):
    change(decomposed)
    with pytest.raises(TripletError, match=words):
        _only(_open(decomposed))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"order": "up"}, "order must be ascending or descending, not 'up'"),
        ({"remove": "all"}, "remove must be top or each"),
        ({"threshold": 128}, "threshold must be a number from 0 to 1"),
        ({"max_border": -1}, "max_border must be a number"),
        ({"max_area": float("nan")}, "max_area must be a number"),
        ({"min_area": 0.5, "max_area": 0.1}, "min_area must be at most max_area, not 0.5 to 0.1"),
        ({"dilate": -1}, "dilate must be a whole number, 0 or more, not -1"),
        ({"dilate": 2.5}, "dilate must be a whole number"),
        ({"max_mb": 0}, "max_mb must be a whole number, 1"),
        ({"words": (1,)}, "words must be a list"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        MulanSource("x", **options)
