"""The brush's Python side without a browser, results under numbers, before and after."""

import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from rorem_lib.builtin.photo import MASK, PHOTO
from rorem_lib.data.masks import find_surroundings
from rorem_lib.data.pictures import load_image, load_mask
from rorem_lib.drawing.brush import MaskBrush, open_brush
from rorem_lib.drawing.compare import compare_images
from rorem_lib.drawing.results import Desk, NothingMarked, require_mask
from rorem_lib.files import find_file
from rorem_lib.models import advice
from rorem_lib.models.inputs import read_inputs


def draw_photo(height=40, width=60, value=90):
    return np.full((height, width, 3), value, np.uint8)


def draw_mask(height=40, width=60):
    mask = np.zeros((height, width), np.uint8)
    mask[10:20, 30:50] = 255
    return mask


def encode(mask):
    """A mask as the browser sends it: a PNG whose alpha it is."""
    stream = io.BytesIO()
    Image.fromarray(np.dstack([mask, mask, mask, mask])).save(stream, "PNG")
    return memoryview(stream.getvalue())


def fill_hole(path, mask, number):
    given = read_inputs(path, mask, "")
    return given.restore(np.where(mask[..., None] > 0, np.uint8(number + 1), given.image))


class StandIn:
    """A remover that paints the hole: a number's noise is its colour."""

    def __init__(self):
        self.seen = []

    def remove(self, images, masks, *, numbers, **options):
        self.seen.append(options)
        return [
            SimpleNamespace(image=fill_hole(image, mask, number), effect=mask)
            for image, mask, number in zip(images, masks, numbers)
        ]


# ------------------------------------------------------------------------------- the brush


def test_the_shipped_photo_has_a_mask_of_its_size_and_a_licence():
    image, mask = load_image(PHOTO), load_mask(MASK)
    assert mask.shape == image.shape[:2] and set(np.unique(mask)) == {0, 255}
    assert 0.01 < (mask > 0).mean() < 0.1 and PHOTO.stat().st_size < 150_000
    assert "CC0" in PHOTO.with_name("README.md").read_text()


def test_without_a_browser_the_mask_is_the_one_that_was_given():
    assert np.array_equal(MaskBrush(draw_photo(), draw_mask()).mask, draw_mask())
    assert not MaskBrush(draw_photo()).mask.any()


def test_what_the_browser_sends_is_the_mask_in_the_images_size():
    brush = MaskBrush(draw_photo(), draw_mask())
    sent = np.zeros((40, 60), np.uint8)
    sent[5:8] = 255
    sent[30:33] = 127  # the faint half of a stroke's edge
    brush.receive({"kind": "mask"}, [encode(sent)])
    assert brush.mask[5:8].all() and not brush.mask[8:].any() and brush.mask.dtype == np.uint8
    with pytest.raises(ValueError, match="mask of"):
        brush.receive({"kind": "mask"}, [encode(sent[:20])])
    assert brush.mask[5:8].all(), "what does not fit changes nothing"


def test_a_page_that_is_opened_again_gets_what_was_painted():
    brush = MaskBrush(draw_photo(), draw_mask())
    told = []
    brush.send = lambda content, buffers=(): told.append((content, buffers))
    sent = draw_mask()[::-1]
    brush.receive({"kind": "mask"}, [encode(sent)])
    brush.receive({"kind": "ready"})
    ((content, (photo, mask)),) = told
    assert content["size"] == (60, 40) == Image.open(io.BytesIO(photo)).size
    alpha = np.asarray(Image.open(io.BytesIO(mask)).convert("RGBA"))[..., 3]
    assert np.array_equal(alpha, sent)


def test_images_and_masks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        MaskBrush(draw_photo().astype(float))
    with pytest.raises(ValueError, match="60x20 px, the image 60x40"):
        MaskBrush(draw_photo(), draw_mask()[:20])


def test_the_button_removes_what_is_painted_and_tells_errors():
    seen, told = [], []

    def remove(mask):
        seen.append(mask)
        if mask[0, 0]:
            raise MemoryError("no room")
        return "saved"

    brush, box = open_brush(draw_photo(), None, remove)
    brush.send = lambda content, buffers=(): told.append((content["kind"], content["text"]))
    brush.receive({"kind": "act"})
    assert not seen and told.pop()[0] == "failed"
    brush.receive({"kind": "mask"}, [encode(draw_mask())])
    brush.receive({"kind": "act"})
    assert np.array_equal(seen[0], draw_mask())
    assert [kind for kind, _ in told] == ["busy", "finished"] and box.children[0] is brush
    brush.receive({"kind": "mask"}, [encode(np.full((40, 60), 255, np.uint8))])
    brush.receive({"kind": "act"})
    assert told[-1][0] == "failed" and "no room" in told[-1][1]


# ------------------------------------------------------------------------------- results


def test_no_result_overwrites_another(tmp_path):
    desks = []
    for name in ("sea.jpg", "sea-1.jpg"):
        Image.fromarray(draw_photo()).save(tmp_path / name)
        desk = Desk(StandIn(), draw_photo(), tmp_path / name, tmp_path, removals=2, mode="exact")
        desks.append(desk)
    first, other = (desk.remove(draw_mask()) for desk in desks)
    assert [p.name for p in first.files] == ["sea-1.png", "sea-2.png"]
    assert [p.name for p in other.files] == ["sea-1-1.png", "sea-1-2.png"]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    again = desks[0].remove(draw_mask())
    assert again.files == first.files, "what comes out a second time is there"
    moved = desks[0].remove(draw_mask()[::-1])
    assert [p.name for p in moved.files] == ["sea-3.png", "sea-4.png"]
    assert all(path.read_bytes() == data for path, data in before.items())
    assert np.array_equal(load_mask(tmp_path / "sea-3-mask.png"), draw_mask()[::-1])
    settings = json.loads((tmp_path / "sea-3.json").read_text())
    assert (
        settings["files"] == ["sea-3.png", "sea-4.png"] and settings["options"]["mode"] == "exact"
    )
    assert np.array_equal(load_image(moved.files[1]), moved.images["sea-4.png"])


@pytest.mark.parametrize("kind", ["transparent", "deep", "grey"])
def test_results_are_of_the_photos_kind_and_shown_as_rgb(tmp_path, kind):
    levels = np.random.default_rng(0).integers(0, 65535, (40, 60)).astype(np.uint16)
    alpha = np.full((40, 60), 90, np.uint8)
    photo = {
        "transparent": Image.fromarray(np.dstack([draw_photo(), alpha])),
        "deep": Image.fromarray(levels),
        "grey": Image.fromarray(alpha),
    }[kind]
    path = tmp_path / "sea.png"
    photo.save(path)
    outcome = Desk(StandIn(), load_image(path), path, tmp_path).remove(draw_mask())
    with Image.open(outcome.files[0]) as found:
        assert found.mode == photo.mode
        kept = draw_mask() == 0
        assert np.array_equal(np.asarray(found)[kept], np.asarray(photo)[kept]), "every bit"
    (shown,) = outcome.images.values()
    assert shown.shape == (40, 60, 3) and shown.dtype == np.uint8
    assert (shown != load_image(path)).any(axis=2)[~kept].all()
    assert np.array_equal(shown[kept], load_image(path)[kept])
    assert "rorem-compare" in outcome._repr_html_()


def test_a_result_says_what_it_cost_and_what_the_model_is_for(tmp_path):
    path = tmp_path / "a <b>.png"
    Image.fromarray(draw_photo()).save(path)
    desk = Desk(StandIn(), draw_photo(), path, tmp_path, note="for scenes & no photos")
    shown = desk.remove(draw_mask())._repr_html_()
    assert "s per removal" in shown and "GB" in shown and "for scenes &amp; no photos" in shown
    assert "<b>" not in shown and "a &lt;b&gt;-1.png" in shown
    with pytest.raises(ValueError, match="removals is 0"):
        Desk(StandIn(), draw_photo(), path, tmp_path, removals=0)


def test_nothing_marked_is_told_in_plain_words():
    with pytest.raises(NothingMarked, match="mask_box") as error:
        require_mask(np.zeros((4, 4), np.uint8))
    assert error.value._render_traceback_() == [str(error.value)]
    assert require_mask(draw_mask()).any()


def test_a_slider_needs_images_of_one_size():
    shown = compare_images(draw_photo(), {"a": draw_photo(value=1), "b": draw_photo(value=2)})
    assert len(re.findall("data:image/jpeg", shown)) == 3 and "<option>b</option>" in shown
    with pytest.raises(ValueError, match="a is"):
        compare_images(draw_photo(), {"a": draw_photo(height=30)})
    with pytest.raises(ValueError, match="nothing"):
        compare_images(draw_photo(), {})


def test_surroundings_hold_the_mask_and_stay_in_the_image():
    mask = draw_mask()
    assert find_surroundings(mask) == (slice(1, 28), slice(21, 58))
    mask[0, 0] = mask[-1, -1] = 255
    assert mask[find_surroundings(mask)].shape == mask.shape


# ------------------------------------------------------------------------------- what is taken


def test_a_photo_counts_from_the_working_folder_then_from_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_file("README.md").name == "README.md" and find_file("README.md").is_absolute()
    assert find_file("README.md").parent != tmp_path, "there is none here: the repository's"
    (tmp_path / "README.md").write_text("mine")
    assert find_file("README.md") == tmp_path / "README.md"
    with pytest.raises(FileNotFoundError, match="nothing.jpg") as error:
        find_file("nothing.jpg")
    assert str(tmp_path) in str(error.value)


def test_the_authors_model_is_taken_where_it_lies_in_the_cache(monkeypatch):
    cached = set()
    monkeypatch.setattr(
        advice, "try_to_load_from_cache", lambda *file, **_: "path" if file in cached else None
    )
    assert advice.choose_remover() == "builtin:remover"
    weights = "diffusion_pytorch_model.safetensors"
    own = {(advice.AUTHORS_MODEL, f"unet/{name}") for name in ("config.json", weights)}
    base = {(advice.BASE_MODEL, name) for name in ("model_index.json", f"vae/{weights}")}
    cached |= own
    assert advice.choose_remover() == "builtin:remover", "its UNet alone is not enough"
    cached |= base
    assert advice.choose_remover() == advice.AUTHORS_MODEL
    for file in own | base:
        cached.remove(file)
        assert advice.choose_remover() == "builtin:remover", f"stopped before {file}"
        cached.add(file)
    for name in ("config.json", weights.replace(".", ".fp16.", 1)):
        cached.add((advice.AUTHORS_MODEL, name))
    cached -= own
    assert advice.choose_remover() == advice.AUTHORS_MODEL, "the UNet alone, of a variant"


def test_a_miniature_says_what_a_photograph_needs():
    words = advice.describe_use("builtin:remover", 3_970_000)
    assert all(part in words for part in ("4 million", "LetsThink/RORem", "GB", "OpenRAIL++-M"))
    assert all(command in words for command in advice.DOWNLOADS) and len(advice.DOWNLOADS) == 2
    assert "miniature" not in advice.describe_use("LetsThink/RORem", 2_567_000_000)
