"""The brush in a real browser: what the mouse, a finger and keys paint is the mask in Python.

Most tests open `brush.js` alone and carry its messages to a `MaskBrush` and back; the last goes
through a JupyterLab. Screenshots go to `$ROREM_SCREENSHOTS` where it is set.
"""

import base64
import io
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from lab import Annotating, run_lab, save_screenshot, wait_until_still, write_notebook
from PIL import Image

from rorem_lib.data.pictures import load_image, load_mask
from rorem_lib.drawing import brush as drawing
from rorem_lib.drawing.brush import MaskBrush
from rorem_lib.drawing.compare import compare_images

pytestmark = pytest.mark.slow

FILES = [MaskBrush._css, Path(drawing.__file__).with_name("brush.js").read_text()]
PAGE = """<!doctype html><meta name="viewport" content="width=device-width">
<style>body { margin: 8px; } %s</style><div id="here"></div>"""
MODEL = """async ([source, settings]) => {
    const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    const { default: widget } = await import(url);
    const toLetters = buffer => Array.from(new Uint8Array(buffer), x => String.fromCharCode(x));
    const toText = buffer => btoa(toLetters(buffer).join(""));
    const toBytes = text => Uint8Array.from(atob(text), x => x.charCodeAt(0));
    window.sent = [];
    const model = {
        get: () => settings,
        on: (_, call) => (window.receive = (content, texts) => call(content, texts.map(toBytes))),
        off: () => {},
        send: (content, _, buffers = []) => window.sent.push([content, buffers.map(toText)]),
    };
    widget.render({ model, el: document.getElementById("here") });
}"""


class Painting:
    """What a person does in the browser, and what Python has of it."""

    def __init__(self, page, brush):
        self.page, self.brush, self.waiting = page, brush, []
        brush.send = lambda content, buffers=(): self.waiting.append((content, buffers))
        page.set_content(PAGE % FILES[0])
        page.evaluate(MODEL, [FILES[1], brush.settings])
        self.carry()
        page.wait_for_selector(".rorem-brush[data-mask=sent]")
        self.canvas = page.locator("canvas.photo")

    def carry(self):
        """Carry messages both ways until neither side has one."""
        while True:
            sent = self.page.evaluate("() => window.sent.splice(0)")
            for content, buffers in sent:
                self.brush.receive(content, [memoryview(base64.b64decode(x)) for x in buffers])
            for content, buffers in self.waiting:
                texts = [base64.b64encode(x).decode() for x in buffers]
                self.page.evaluate("([a, b]) => window.receive(a, b)", [content, texts])
            if not sent and not self.waiting:
                return
            self.waiting.clear()

    @property
    def mask(self):
        self.page.wait_for_selector(".rorem-brush[data-mask=sent]")
        self.carry()
        return self.brush.mask

    def place(self, x, y):
        """Where a pixel's corner is on the page, with the whole image in view."""
        area, (width, height) = self.canvas.bounding_box(), self.brush._size
        scale = min(area["width"] / width, area["height"] / height)
        left = area["x"] + (area["width"] - width * scale) / 2
        top = area["y"] + (area["height"] - height * scale) / 2
        return left + x * scale, top + y * scale

    def drag(self, *points):
        mouse = self.page.mouse
        mouse.move(*self.place(*points[0]))
        mouse.down()
        for point in points[1:]:
            mouse.move(*self.place(*point), steps=8)
        mouse.up()

    def click(self, action):
        self.page.locator(f"[data-action={action}]").click()

    def get_diameter(self):
        return int(self.page.locator(".size").inner_text().split()[0])

    def take_picture(self, name):
        save_screenshot(self.page, name, full_page=True)


@pytest.fixture
def start(open_page):
    """Opens a brush in a page of a given width."""
    return lambda brush, *size, **options: Painting(open_page(*size, **options), brush)


def draw_photo(width=600, height=400):
    small = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def draw_stroke(shape, points, diameter):
    """The same stroke by OpenCV, with four bits below the pixel."""
    mask = np.zeros(shape, np.uint8)
    fixed = np.round((np.array(points, float) - 0.5) * 16).astype(np.int32)
    for a, b in zip(fixed[:-1], fixed[1:]):
        for share in np.linspace(0, 1, 200):
            centre = tuple(int(x) for x in np.round(a + share * (b - a)))
            cv2.circle(mask, centre, round(diameter * 8), 255, -1, shift=4)
    return mask


def compute_overlap(a, b):
    return ((a > 0) & (b > 0)).sum() / ((a > 0) | (b > 0)).sum()


@pytest.mark.parametrize("width", [1366, 390])
def test_a_stroke_a_box_and_their_undoing_are_the_masks_pixels(start, width):
    me = start(MaskBrush(draw_photo(), action="Remove"), width)
    assert not me.mask.any() and "nothing" in me.page.locator(".status").inner_text()
    assert me.page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    stroke = [(100, 100), (300, 150), (320, 300)]
    me.drag(*stroke)
    diameter = me.get_diameter()
    painted = me.mask
    assert painted.shape == (400, 600) and set(np.unique(painted)) == {0, 255}
    assert compute_overlap(painted, draw_stroke((400, 600), stroke, diameter)) > 0.93

    me.click("box")
    me.drag((450, 50), (550, 220))
    both = me.mask
    rows, columns = np.where(both != painted)
    box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    pixel = 600 / me.canvas.bounding_box()["width"]  # the mouse moves in whole pixels of the page
    assert np.abs(box - (450, 50, 550, 220)).max() <= pixel + 1
    assert (both[box[1] : box[3], box[0] : box[2]] == 255).all(), "all of the box, and whole pixels"
    me.take_picture(f"brush_{width}")

    me.click("undo")
    assert np.array_equal(me.mask, painted)
    me.click("undo")
    assert not me.mask.any() and me.page.locator("[data-action=undo]").is_disabled()
    for _ in range(2):
        me.click("redo")
    assert np.array_equal(me.mask, both)
    me.click("clear")
    assert not me.mask.any()
    me.page.keyboard.press("Control+z")  # the click has left the focus in the widget
    assert np.array_equal(me.mask, both)


def test_the_mask_that_was_given_is_erased_and_mended(start):
    given = np.zeros((400, 600), np.uint8)
    given[100:300, 200:400] = 255
    me = start(MaskBrush(draw_photo(), given))
    assert np.array_equal(me.mask, given), "nothing was drawn: what was given stands"
    me.canvas.click(position={"x": me.canvas.bounding_box()["width"] / 2, "y": 10})
    assert me.mask[:20, 290:310].any() and (me.mask[given > 0] == 255).all(), "a click is a dot"
    me.page.keyboard.press("u")
    assert np.array_equal(me.mask, given)
    me.page.keyboard.press("e")
    me.drag((200, 200), (400, 200))
    erased = me.mask
    assert not erased[195:205, 210:390].any() and erased[110:150, 210:390].all()
    assert not ((erased > 0) & (given == 0)).any()


def test_keys_set_the_size_and_zoom_keeps_the_place(start):
    me = start(MaskBrush(draw_photo()))
    me.drag((50, 50), (60, 60))
    before = me.get_diameter()
    me.page.keyboard.press("]")
    larger = me.get_diameter()
    for _ in range(2):
        me.page.keyboard.press("[")
    assert larger > before > me.get_diameter()
    me.click("clear")
    at = me.place(300, 200)
    me.page.mouse.move(*at)
    me.page.mouse.wheel(0, -800)  # e^2 times
    me.page.mouse.click(*at)
    rows, columns = np.where(me.mask)
    assert abs(rows.mean() + 0.5 - 200) < 1 and abs(columns.mean() + 0.5 - 300) < 1
    assert np.ptp(rows) + 1 == pytest.approx(me.get_diameter(), abs=1.5), "in px of the image"
    me.page.keyboard.press("0")
    me.page.keyboard.press("r")
    me.drag((10, 20), (40, 60))
    assert me.mask[25:55, 15:35].all()


def test_one_finger_paints_and_two_zoom(start):
    me = start(MaskBrush(draw_photo()), 390, has_touch=True, is_mobile=True)
    touch = me.page.context.new_cdp_session(me.page)

    def send(kind, *places):
        points = [{"x": x, "y": y, "id": n} for n, (x, y) in enumerate(places)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    send("touchStart", me.place(100, 100))
    for x in range(110, 301, 10):
        send("touchMove", me.place(x, 100))
    send("touchEnd")
    painted = me.mask
    assert painted[100, 105:295].all() and not painted[200:].any()
    assert me.page.evaluate("window.scrollY") == 0, "the finger paints and does not scroll"
    send("touchStart", me.place(250, 200))
    send("touchStart", me.place(250, 200), me.place(350, 200))
    for step in range(1, 9):
        send("touchMove", me.place(250 - 10 * step, 200), me.place(350 + 10 * step, 200))
    send("touchEnd")
    assert np.array_equal(me.mask, painted), "two fingers paint nothing"
    assert me.page.locator("[data-action=fit]").is_enabled(), "and zoom"


def test_a_photo_of_twelve_megapixels(start, monkeypatch):
    me = start(MaskBrush(draw_photo(4000, 3000)))
    assert len(me.brush._photo) < 1_500_000, "the browser gets a smaller JPEG"
    me.click("box")
    me.drag((1000, 900), (2200, 1500))
    mask = me.mask
    assert mask.shape == (3000, 4000) and len(me.brush._photo) < 1_500_000
    rows, columns = np.where(mask)
    pixel = 4000 / me.canvas.bounding_box()["width"] + 1
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert np.abs(np.subtract(found, (1000, 900, 2200, 1500))).max() <= pixel
    # larger than browsers have canvases of: drawn smaller, given back in full
    monkeypatch.setattr(drawing, "MOST_PIXELS", 100_000)
    me = start(MaskBrush(draw_photo(800, 500)))
    me.click("box")
    me.drag((200, 100), (600, 400))
    assert me.mask.shape == (500, 800)
    assert me.mask[110:390, 210:590].all() and not me.mask[:95].any()


def test_the_button_waits_for_the_mask_and_tells_what_came(start):
    asked = []

    def act(mask):
        asked.append(mask)
        if len(asked) > 1:
            raise MemoryError("too large for this GPU")
        return "saved photo-1.png"

    me = start(MaskBrush(draw_photo(), action="Remove", act=act))
    button, status = me.page.locator("[data-action=act]"), me.page.locator(".status")
    button.click()
    me.page.wait_for_function("window.sent.length")
    me.carry()
    assert not asked and "paint over" in status.inner_text()
    me.drag((100, 100), (200, 100))
    me.page.keyboard.press("Enter")
    me.page.wait_for_function("window.sent.some(([content]) => content.kind === 'act')")
    me.carry()
    assert asked[0][100, 105:195].all() and status.inner_text() == "saved photo-1.png"
    button.click()
    me.page.wait_for_function("window.sent.some(([content]) => content.kind === 'act')")
    me.carry()
    assert "too large" in status.inner_text() and button.is_enabled()


def test_every_tool_has_a_name_and_a_key(start):
    me = start(MaskBrush(draw_photo(), action="Remove"))
    for button in me.page.locator(".tools button").all():
        assert button.get_attribute("aria-label") and button.get_attribute("aria-keyshortcuts")
    for key, name in {"e": "erase", "r": "box", "h": "move", "b": "brush"}.items():
        me.page.locator(".rorem-brush").press(key)
        me.page.wait_for_selector(f"[data-action={name}][aria-pressed=true]")


def test_the_slider_shows_before_on_its_left(open_page):
    before, after = np.zeros((200, 300, 3), np.uint8), np.full((200, 300, 3), 200, np.uint8)
    page = open_page(390, 500)
    page.set_content(f"<meta charset=utf-8>{compare_images(before, {'a': after, 'b': before})}")
    pair = page.locator(".pair").bounding_box()

    def look():
        data = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))
        row = data[int(pair["y"] + 20), int(pair["x"]) : int(pair["x"] + pair["width"])]
        return (row < 60).mean()

    assert look() == pytest.approx(0.5, abs=0.1)
    page.locator("input[type=range]").focus()
    page.keyboard.press("Home")
    assert look() < 0.1
    page.locator("input[type=range]").click(position={"x": pair["width"] * 0.8, "y": 100})
    assert look() == pytest.approx(0.8, abs=0.1)
    page.keyboard.press("Home")
    page.locator("select").select_option("b")
    assert look() > 0.9


# ------------------------------------------------------------------------------- the notebook


def test_from_a_photo_in_the_notebooks_folder_to_a_removal(open_page, tmp_path):
    Image.fromarray(draw_photo()).save(tmp_path / "mine.png")
    write_notebook(
        tmp_path,
        "00_remove_objects",
        output_dir=str(tmp_path / "out"),
        image_path="mine.png",
        pretrained_model_name_or_path="builtin",
        removals=2,
        num_inference_steps=2,
        scenes=[],
    )
    with run_lab(tmp_path) as (address, _):
        page = open_page()
        page.goto(f"{address}/lab/tree/annotate.ipynb?reset")
        lab = Annotating(page, address, tmp_path)
        lab.run_notebook()
        page.wait_for_selector(".rorem-brush[data-mask=sent]")
        page.wait_for_selector("text=Nothing is marked yet")
        assert page.locator("text=Traceback").count() == 0
        lab.wait_for_idle_kernel()
        page.locator(".rorem-brush").scroll_into_view_if_needed()
        wait_until_still(page, ".rorem-brush canvas.photo")
        me = Painting.__new__(Painting)
        me.page, me.canvas = page, page.locator("canvas.photo")
        me.brush = SimpleNamespace(_size=(600, 400))
        me.click("box")
        masks = []
        for number, box in enumerate([((100, 100), (200, 180)), ((300, 200), (380, 300))]):
            me.drag(*box)
            me.click("act")
            first = 2 * number + 1
            page.wait_for_function(
                "name => document.querySelector('.rorem-brush .status').textContent.includes(name)",
                arg=f"mine-{first}.png",
            )
            masks.append(load_mask(tmp_path / f"out/mine-{first}-mask.png"))
            assert masks[-1][box[0][1] + 5 : box[1][1] - 5, box[0][0] + 5 : box[1][0] - 5].all()
            assert load_image(tmp_path / f"out/mine-{first + 1}.png").shape == (400, 600, 3)
        assert not masks[0][195:].any() and masks[1][masks[0] > 0].all(), "it adds to the first"
        page.wait_for_selector(".rorem-compare")
        assert page.locator(".rorem-compare").count() == 1, "the last result, in the first's place"
        assert page.locator("text=miniature of").count() == 1, "what the model is for"
        me.take_picture("notebook_00")
