"""`rorem app` in a real browser: a mask drawn with the mouse, boxes, variants, phones.

Screenshots go to `$ROREM_SCREENSHOTS` where it is set, for whoever wants to look.
"""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from lab import save_screenshot, wait_until, wait_until_still
from PIL import Image

from rorem_lib.app import app, service
from rorem_lib.builtin.scenes import render_scene
from rorem_lib.data.pictures import load_image
from rorem_lib.models.inpainting import ObjectRemover

pytestmark = pytest.mark.slow


class Recorder(service.Service):
    """A service that remembers what it was asked for."""

    def remove(self, path, mask, **options):
        self.asked = path, mask, options
        return super().remove(path, mask, **options)


@pytest.fixture(scope="module")
def recorder():
    return Recorder(ObjectRemover.from_pretrained("builtin", device="cpu"))


@pytest.fixture(scope="module")
def address(recorder):
    ui = app.build(recorder)
    yield app.launch(ui, prevent_thread_lock=True, quiet=True, max_file_size=2**20)[1]
    ui.close()


@pytest.fixture(scope="module")
def scene():
    return render_scene([4, 3], role="pool")


class Visit:
    """What a visitor sees and does."""

    def __init__(self, open_page, address, width, height=900):
        self.page = open_page(width, height)
        self.asked, self.photo = [], None
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector("#photo")
        self.width = width

    def upload(self, path):
        self.page.set_input_files("#photo input[type=file]", path)
        self.page.wait_for_selector("#go:not([disabled])")
        self.page.wait_for_selector("#editor .pixi-target.visible")
        self.photo, self.is_drawn_on = load_image(path), False

    def locate(self, x, y):
        """Where a pixel of a photo no larger than the canvas lies on the page."""
        height, width = self.photo.shape[:2]
        zoom = self.page.locator("#editor").inner_text().partition("%")[0].split()[-1]
        area = self.page.locator("#editor canvas").first.bounding_box()
        scale = int(zoom) / 100
        left = area["x"] + (area["width"] - width * scale) / 2
        top = area["y"] + (area["height"] - height * scale) / 2
        return left + (x + 0.5) * scale, top + (y + 0.5) * scale

    def photo_is_in_place(self):
        """Whether its pixels are seen where `locate` says: the canvas moves until it fits."""
        seen = np.asarray(Image.open(io.BytesIO(self.page.screenshot())).convert("RGB"))
        height, width = self.photo.shape[:2]
        (left, top), (right, bottom) = self.locate(0, 0), self.locate(width, height)
        ys, xs = np.mgrid[0.1:0.9:8j, 0.1:0.9:8j]
        rows = np.clip(top + ys * (bottom - top), 0, seen.shape[0] - 1).astype(int)
        columns = np.clip(left + xs * (right - left), 0, seen.shape[1] - 1).astype(int)
        expected = self.photo[(ys * height).astype(int), (xs * width).astype(int)]
        return np.median(np.abs(seen[rows, columns].astype(int) - expected)) < 8

    def draw(self, *points):
        """A stroke from point to point, px of the photo."""
        if not self.is_drawn_on:
            wait_until(self.photo_is_in_place, self.page)
            self.is_drawn_on = True
        self.page.mouse.move(*self.locate(*points[0]))
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*self.locate(*point), steps=4)
        self.page.mouse.up()
        self.page.evaluate("new Promise(done => requestAnimationFrame(done))")

    def choose(self, **numbers):
        """Settings below "More settings", by their ids."""
        if not self.page.locator("#steps").is_visible():
            self.page.locator("#more button").first.click()
        for name, value in numbers.items():
            field = self.page.locator(f"#{name} input[type=number]")
            field.fill(str(value))
            field.press("Tab")

    def remove(self):
        self.page.locator("#go").click()
        self.page.wait_for_selector("#result #png")
        self.page.wait_for_selector("#slider img")

    def download(self, kind, folder):
        with self.page.expect_download() as waiting:
            self.page.locator(f"#{kind}").click()
        path = folder / waiting.value.suggested_filename
        waiting.value.save_as(path)
        return path

    def look(self, name):
        """A screenshot, and nothing wider than the page."""
        wide = self.page.evaluate("document.scrollingElement.scrollWidth")
        assert wide <= self.width, f"the page is {wide} px wide in a window of {self.width}"
        save_screenshot(self.page, f"app_{name}_{self.width}", full_page=True)

    def check_requests(self):
        foreign = [
            u for u in self.asked if not u.startswith(("http://127.0.0.1", "data:", "blob:"))
        ]
        assert self.asked and foreign == [], "everything comes from this machine"


def test_what_is_drawn_with_the_mouse_is_removed(open_page, address, recorder, scene, tmp_path):
    photo = np.kron(scene.image, np.ones((4, 4, 1), np.uint8))  # 256 px
    Image.fromarray(photo).save(tmp_path / "photo.png")
    visit = Visit(open_page, address, 1366)
    assert visit.page.locator("#go").is_disabled(), "first a photo"
    visit.look("empty")
    visit.upload(tmp_path / "photo.png")
    visit.choose(steps=2, seed=3)
    visit.page.locator("#go").click()
    assert "marked" in visit.page.locator(".toast-body").first.inner_text()
    visit.draw((140, 90), (200, 90), (200, 140), (140, 140))
    visit.page.locator("#editor button[aria-label=Erase]").click()
    visit.draw((140, 140), (140, 139))
    visit.look("drawn")
    visit.remove()
    visit.look("removed")

    path, mask, options = recorder.asked
    assert options["num_inference_steps"] == 2 and options["seed"] == 3
    assert options.pop("variants") == 1
    assert Path(path).read_bytes() == (tmp_path / "photo.png").read_bytes(), "the file as it was"
    assert mask.shape == photo.shape[:2] and set(np.unique(mask)) == {0, 255}
    for x, y in ((140, 90), (170, 90), (200, 115), (170, 140)):
        assert mask[y, x] == 255, f"drawn at {x}, {y}"
    assert mask[140, 140] == 0, "the eraser takes away"
    ys, xs = np.nonzero(mask)
    bounds = np.array([xs.min(), ys.min(), xs.max(), ys.max()])
    assert np.abs(bounds - [140, 90, 200, 140]).max() < 20, f"no more than a brush wider: {bounds}"

    saved = visit.download("png", tmp_path)
    assert saved.name == "photo_removed.png"
    expected = recorder.remover.remove(str(tmp_path / "photo.png"), mask, **options)
    np.testing.assert_array_equal(load_image(saved), np.asarray(expected.image.convert("RGB")))
    kept = expected.effect == 0
    assert kept.mean() > 0.2
    np.testing.assert_array_equal(load_image(saved)[kept], photo[kept])
    assert (load_image(saved) != photo).any()
    assert "miniature" in visit.page.locator("#about").inner_text(), "what it is not for"
    visit.check_requests()


def test_a_box_on_a_phone_and_the_best_of_two(open_page, address, recorder, scene, tmp_path):
    photo = np.kron(scene.image, np.ones((24, 32, 1), np.uint8))  # 2048x1536 px
    Image.fromarray(photo).save(tmp_path / "large.jpg", quality=95)
    visit = Visit(open_page, address, 390, 844)
    visit.look("empty")
    visit.upload(tmp_path / "large.jpg")
    visit.look("opened")
    visit.page.locator("#tool label", has_text="Box").click()
    target = visit.page.locator("#target img")
    wait_until_still(visit.page, "#target img")
    target.scroll_into_view_if_needed()
    area = target.bounding_box()
    for x, y, hint in ((0.5, 0.3, "the opposite corner"), (0.85, 0.65, "two corners")):
        target.click(position={"x": area["width"] * x, "y": area["height"] * y})
        visit.page.locator("#target", has_text=hint).wait_for()  # other words pass by: progress
    visit.look("box")
    visit.choose(steps=2, count=2)
    visit.remove()
    thumbnails = visit.page.locator("#variants .thumbnail-item")
    thumbnails.nth(1).wait_for()
    assert thumbnails.count() == 2
    first = load_image(visit.download("png", tmp_path))
    sources = "[...document.querySelectorAll('#slider img')].map(image => image.src).join()"
    before = visit.page.evaluate(sources)
    thumbnails.nth(1).click()
    visit.page.wait_for_function(f"before => {sources} !== before", arg=before)
    visit.look("variants")
    second = load_image(visit.download("png", tmp_path))

    path, mask, options = recorder.asked
    ys, xs = np.nonzero(mask)
    bounds = np.array([xs.min() / 2048, ys.min() / 1536, xs.max() / 2048, ys.max() / 1536])
    assert np.abs(bounds - [0.5, 0.3, 0.85, 0.65]).max() < 0.02, bounds
    assert mask.shape == (1536, 2048) and options.pop("variants") == 2
    expected = recorder.remover.remove([path] * 2, [mask] * 2, numbers=[0, 1], **options)
    for found, removal in zip((first, second), expected):
        np.testing.assert_array_equal(found, np.asarray(removal.image.convert("RGB")))
    jpeg = visit.download("jpg", tmp_path)
    with Image.open(jpeg) as result:
        assert result.format == "JPEG" and result.size == (2048, 1536)

    # a new photo starts afresh
    Image.fromarray(scene.image).save(tmp_path / "next.png")
    visit.page.locator("#photo button[aria-label=Clear]").click()
    visit.page.wait_for_selector("#go[disabled]")
    visit.upload(tmp_path / "next.png")
    assert not visit.page.locator("#result").is_visible()
    assert visit.page.locator("#tool input").first.is_checked()
    visit.page.locator("#go").click()
    assert "marked" in visit.page.locator(".toast-body").first.inner_text()
    visit.check_requests()


def test_what_is_no_image_or_too_large_is_named(open_page, address, tmp_path):
    (tmp_path / "page.png").write_text("<!doctype html><html></html>")
    visit = Visit(open_page, address, 1366)
    visit.page.set_input_files("#photo input[type=file]", tmp_path / "page.png")
    message = visit.page.locator(".toast-body").first.inner_text()
    assert "page.png" in message and "web page" in message and "/tmp" not in message
    visit.look("refused")
    (tmp_path / "heavy.jpg").write_bytes(os.urandom(1_200_000))
    visit.page.reload()
    visit.page.set_input_files("#photo input[type=file]", tmp_path / "heavy.jpg")
    message = visit.page.locator(".toast-body").first.inner_text()
    assert "heavy.jpg" in message and "maximum allowed size" in message
    visit.look("heavy")
    visit.check_requests()
