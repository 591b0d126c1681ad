"""The annotation widget in a real JupyterLab and a real browser, driven by key presses.

Screenshots (light, dark) go to `$ROREM_SCREENSHOTS` where it is set, for whoever wants to look.
"""

import json
import os
import random
import signal

import cv2
import numpy as np
import psutil
import pytest
from lab import ROOT_SELECTOR, Annotating, run_lab, wait_until, write_notebook
from PIL import Image

from rorem_lib.builtin.scenes import render_scene
from rorem_lib.data.triplets import read_triplets
from rorem_lib.data.writer import TripletWriter
from rorem_lib.labels.keys import KEYS
from rorem_lib.labels.log import REASONS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab on a folder of all the tests' folders; (address, process, folder)."""
    folder = tmp_path_factory.mktemp("lab")
    with run_lab(folder) as running:
        yield *running, folder


@pytest.fixture
def folder(lab):
    """A folder with twelve candidates and the annotation notebook, its parameters set."""
    folder = lab[2] / f"removals-{len(list(lab[2].glob('removals-*'))) + 1}"
    with TripletWriter(folder / "candidates") as writer:
        for number in range(12):
            scene = render_scene([4, number], role="pool")
            removal = cv2.inpaint(scene.image, scene.mask, 5, cv2.INPAINT_TELEA)
            writer.add(id=f"c{number:02}", source=scene.image, mask=scene.mask, gt=removal)
    write_notebook(
        folder,
        output_dir=str(folder / "stage"),
        annotator="anna",
        candidates=str(folder / "candidates"),
        labels_wanted=10,
    )
    return folder


@pytest.fixture
def page(lab, open_page):
    page = open_page()
    yield page
    for session in page.request.get(f"{lab[0]}/api/sessions").json():
        page.request.delete(f"{lab[0]}/api/sessions/{session['id']}")


def signal_kernel(server, number):
    (kernel,) = (
        process
        for process in psutil.Process(server.pid).children(recursive=True)
        if "ipykernel_launcher" in " ".join(process.cmdline())
    )
    os.kill(kernel.pid, number)


def test_a_kernel_killed_while_keys_come_loses_nothing_it_called_saved(page, lab, folder):
    triplet = read_triplets(folder / "candidates")[0]
    with TripletWriter(folder / "candidates") as writer:  # enough to be killed among them
        for number in range(600):
            writer.add_triplet(triplet, id=f"d{number:03}")
    write_notebook(
        folder,
        output_dir=str(folder / "stage"),
        annotator="anna",
        candidates=str(folder / "candidates"),
        repeat_share=0.0,
    )
    me = Annotating(page, lab[0], folder)
    me.open()
    me.start()
    page.evaluate(
        """selector => {
            const root = document.querySelector(selector);
            setInterval(() => root.dispatchEvent(
                new KeyboardEvent("keydown", { key: "a", bubbles: true })), 5);
        }""",
        ROOT_SELECTOR,
    )
    seed = random.randrange(10**6)
    page.wait_for_timeout(200 + random.Random(seed).randrange(1500))
    signal_kernel(lab[1], signal.SIGKILL)
    page.wait_for_selector(f"{ROOT_SELECTOR}[data-save=failed]")
    called_saved = int(me.widget.locator(".count").inner_text().split()[0])
    kept = [item_id for item_id, *_ in me.saved]
    assert 0 < called_saved <= len(kept) <= called_saved + 1, f"seed {seed}"
    page.reload()
    me.run_notebook()
    me.wait_for_picture()
    assert me.widget.locator(".count").inner_text() == f"{len(kept)} of 612"
    assert me.shown not in kept


def test_labelling_by_keyboard_in_jupyterlab(page, lab, folder):
    me = Annotating(page, lab[0], folder)
    me.open()
    me.run_notebook()
    me.wait_for_picture()
    page.wait_for_function(  # "Run All Cells" leaves the reader elsewhere: it comes into view
        "selector => { const area = document.querySelector(selector).getBoundingClientRect();"
        " return area.top >= 0 && area.bottom <= window.innerHeight; }",
        arg=ROOT_SELECTOR,
    )
    me.focus()
    cells = page.locator(".jp-Cell").count()
    boxes = [button.bounding_box() for button in me.widget.locator(".decision").all()]
    assert len(boxes) == 3 + len(REASONS)
    assert len({box["y"] for box in boxes}) == 1, f"decisions stand in one row at 1366 px: {boxes}"

    # a decision a key, each in the log when the next image is on screen
    expected = []
    for key, label, reason in [
        ("a", "accept", None),
        ("x", "reject", None),
        ("2", "reject", "wrong content"),
        ("s", "skip", None),
        ("4", "reject", "shadow left"),
    ]:
        expected.append((me.press(key), label, reason))
        assert me.saved == expected
    assert len({item_id for item_id, *_ in expected}) == 5

    # undo, twice, and again
    for _ in range(2):
        me.press("u")
    assert me.shown == expected[3][0]
    expected += [(expected[4][0], "undo", None), (expected[3][0], "undo", None)]
    assert me.saved == expected
    expected.append((me.press("A"), "accept", None))  # caps lock is no trap
    assert me.shown == expected[4][0] and me.saved == expected

    # a key that is held counts once, however long
    expected.append((me.change(lambda: page.keyboard.down("a")), "accept", None))
    for _ in range(3):
        page.keyboard.down("a")  # with the next image on screen: the browser calls it a repeat
        page.wait_for_timeout(30)
    page.keyboard.up("a")
    assert me.saved == expected

    # keys while a decision is being saved, or before the next image is on screen, do not count
    page.evaluate(
        """selector => {
            const root = document.querySelector(selector);
            window.press = key => root.dispatchEvent(
                new KeyboardEvent("keydown", { key, bubbles: true }));
            window.eager = new MutationObserver(() => root.dataset.place === "" && press("s"));
            eager.observe(root, { attributes: true, attributeFilter: ["data-place"] });
        }""",
        ROOT_SELECTOR,
    )
    hasty = me.change(lambda: page.evaluate("['x', 'a', '1'].forEach(press)"))
    page.wait_for_timeout(100)
    page.evaluate("eager.disconnect()")
    expected.append((hasty, "reject", None))
    assert me.saved == expected

    # nor does one that went down before and is told after it, by a page that was busy meanwhile
    page.evaluate(
        """selector => {
            const root = document.querySelector(selector);
            let early;
            window.told = new Promise(resolve => {
                const watch = new MutationObserver(() => {
                    early ??= new KeyboardEvent("keydown", { key: "a", bubbles: true });
                    if (root.dataset.place === "") return;
                    watch.disconnect();
                    resolve(root.dispatchEvent(early));
                });
                watch.observe(root, { attributes: true, attributeFilter: ["data-place"] });
            });
        }""",
        ROOT_SELECTOR,
    )
    expected.append((me.press("x"), "reject", None))
    page.evaluate("told")
    page.wait_for_timeout(100)
    assert me.saved == expected
    undone = me.press("u") and me.shown
    expected.append((undone, "undo", None))
    assert me.saved == expected

    # who still holds the flicker key decides, and sees the next image as it is
    page.keyboard.down("f")
    page.wait_for_timeout(400)
    expected.append((me.press("a"), "accept", None))
    page.keyboard.up("f")
    assert me.widget.locator("figcaption").all_inner_texts() == ["source", "removal"]
    undone = me.press("u") and me.shown
    expected.append((undone, "undo", None))
    assert me.saved == expected

    # without NumLock the pad's keys are arrows: they move the image and label nothing
    plain = me.grab_canvas(1)
    for key, code, back in (
        ("ArrowDown", "Numpad2", "ArrowUp"),
        ("ArrowLeft", "Numpad4", "ArrowRight"),
        ("+", "NumpadAdd", "-"),
    ):
        page.evaluate(
            """([selector, key, code]) => document.querySelector(selector).dispatchEvent(
                new KeyboardEvent("keydown", { key, code, bubbles: true }))""",
            [ROOT_SELECTOR, key, code],
        )
        assert me.grab_canvas(1) != plain, f"{key} moves nothing"
        page.keyboard.press(back)
        assert me.grab_canvas(1) == plain and me.saved == expected

    # looking around labels nothing and is seen
    plain = me.grab_canvas(1)
    for key in "fzdp":
        page.keyboard.press(key)
        assert me.grab_canvas(1) != plain, f"{key} shows nothing"
        page.keyboard.press(key)
        assert me.grab_canvas(1) == plain, f"{key} does not go back"
    outlined = me.grab_canvas(0)
    page.keyboard.press("m")
    page.keyboard.press("m")
    assert me.grab_canvas(0) != outlined and me.grab_canvas(1) == plain
    for _ in range(2):
        page.keyboard.press("m")
    assert me.grab_canvas(0) == outlined and me.saved == expected

    # the notebook's own keys (b adds a cell) and typing a note stay out of it
    page.keyboard.press("b")
    page.keyboard.press("n")
    page.keyboard.type("as x 1")
    page.keyboard.press("Enter")
    expected.append((me.press("3"), "reject", "blur"))
    assert me.saved == expected and page.locator(".jp-Cell").count() == cells
    assert '"note": "as x 1"' in me.log.read_text().splitlines()[-1]
    for key in ("Control+z", "Control+Shift+z"):  # the browser's own undo knows the last note
        page.keyboard.press(key)
        assert me.widget.locator(".note").input_value() == "" and me.saved == expected

    # every key is a button
    actions = me.widget.locator("button").evaluate_all("all => all.map(b => b.dataset.action)")
    assert sorted(actions) == sorted(KEYS)
    expected.append((me.click("accept"), "accept", None))
    undone = me.click("undo") and me.shown
    expected.append((undone, "undo", None))
    me.press("u")
    expected.append((me.shown, "undo", None))
    assert me.widget.locator(".note").input_value() == "as x 1", "undo brings the note back"
    expected.append((me.press("3"), "reject", "blur"))
    assert me.widget.locator(".note").input_value() == ""
    me.widget.locator("[data-action=reason_1]").focus()
    expected.append(
        (me.change(lambda: page.keyboard.down("Enter")), "reject", "incomplete removal")
    )
    for _ in range(3):
        page.keyboard.down("Enter")  # held
        page.wait_for_timeout(30)
    page.keyboard.up("Enter")
    assert me.saved == expected

    # an undo pressed again while the kernel is busy is one undo
    me.focus()
    before = me.shown
    signal_kernel(lab[1], signal.SIGSTOP)
    page.keyboard.press("u")
    page.wait_for_selector(f"{ROOT_SELECTOR}[data-save=failed]")
    page.keyboard.press("u")
    undone = me.change(lambda: signal_kernel(lab[1], signal.SIGCONT)) and me.shown
    page.wait_for_timeout(300)
    expected.append((undone, "undo", None))
    assert me.saved == expected and before != undone
    expected.append((me.press("1"), "reject", "incomplete removal"))

    # what can't be saved is told, and the image stays until it is saved
    me.focus()
    aside = me.log.rename(me.log.with_suffix(".aside"))
    me.log.symlink_to("/dev/full")
    before = me.shown
    page.keyboard.press("a")
    page.wait_for_selector(f"{ROOT_SELECTOR}[data-save=failed]")
    assert "symbolic link" in me.widget.locator(".message").inner_text() and me.shown == before
    me.log.unlink()
    aside.rename(me.log)
    expected.append((me.press("a"), "accept", None))
    assert me.saved == expected and me.widget.get_attribute("data-save") == "saved"

    light = me.take_picture("annotate_light")
    area = me.widget.bounding_box()
    page.locator(".lm-MenuBar >> text=Settings").click()
    page.locator(".lm-Menu >> text=/^Theme$/").hover()
    page.locator(".lm-Menu >> text=/^JupyterLab Dark$/").click()
    page.wait_for_selector("body[data-jp-theme-light=false]", state="attached")
    page.wait_for_timeout(300)
    me.focus()
    dark = me.take_picture("annotate_dark")
    corner = (int(area["x"]) + 6, int(area["y"]) + 6)
    assert min(light.getpixel(corner)) > 200 and max(dark.getpixel(corner)) < 80

    # the kernel is killed: nothing is called saved that is not, and nothing is lost
    open_item = me.shown
    signal_kernel(lab[1], signal.SIGKILL)
    page.keyboard.press("a")
    page.wait_for_selector(f"{ROOT_SELECTOR}[data-save=failed]")
    assert me.shown == open_item and me.saved == expected
    page.reload()
    me.run_notebook()
    me.wait_for_picture()
    assert me.shown == open_item

    # to the end: the notebook finishes the stage
    me.focus()
    while me.widget.locator(".count").inner_text() != "10 of 10":
        expected.append((me.press("a"), "accept", None))
    assert me.saved == expected
    me.run_notebook()
    wait_until((folder / "stage" / "DONE").exists, page)
    metrics = json.loads((folder / "stage" / "metrics.json").read_text())
    assert metrics["n_labelled"] == 10 and metrics["simulated"] is False
    accepted = [triplet.id for triplet in read_triplets(folder / "stage" / "accepted")]
    assert len(accepted) == metrics["n_accepted"] == 5


def draw_by_hand(picture, box, shape):
    """What a pane of [H, W] should show: the box [x0, y0, x1, y1] of an image, as it fits."""
    (height, width), (x0, y0, x1, y1) = shape, box
    scale = min(width / (x1 - x0), height / (y1 - y0))
    left = round(width / 2 - (x0 + x1) / 2 * scale)
    top = round(height / 2 - (y0 + y1) / 2 * scale)
    wide = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC)
    return np.asarray(wide.crop((-left, -top, width - left, height - top)))


def test_panes_show_the_files_and_keys_leave_jupyterlabs_bar_alone(page, lab, folder):
    rng = np.random.default_rng(0)
    fine = rng.integers(0, 256, (2, 700, 900, 3), np.uint8)  # finer than a pane shows as a whole
    removal = Image.fromarray(cv2.GaussianBlur(fine[1], (0, 0), 1.2))
    mask = np.zeros((700, 900), np.uint8)
    mask[300:400, 500:640] = 255
    with TripletWriter(folder / "fine") as writer:
        for number in range(6):
            writer.add(id=f"f{number}", source=fine[0], mask=mask, gt=np.asarray(removal))
    write_notebook(
        folder,
        output_dir=str(folder / "stage"),
        annotator="anna",
        candidates=str(folder / "fine"),
        repeat_share=0.0,
    )
    me = Annotating(page, lab[0], folder)
    me.open()
    me.start()

    def find_error(box):
        shown = me.grab_picture(1)
        wanted = draw_by_hand(removal, box, shown.shape[:2])
        inside = wanted.any(axis=2) & shown.any(axis=2)
        error = np.abs(shown.astype(float) - wanted)[inside]
        return error.mean() if inside.mean() > 0.5 else np.inf

    whole = (0, 0, 900, 700)
    margin = 0.3 * 140 + 2
    zoomed = (500 - margin, 300 - margin, 640 + margin, 400 + margin)
    me.wait_for_idle_kernel()  # the cells below the widget have run
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    for _ in range(2):  # of the second image as of the first
        wait_until(lambda: find_error(whole) < 5, page)
        page.keyboard.press("z")
        wait_until(lambda: find_error(zoomed) < 5, page)  # once it is decoded in full
        page.keyboard.press("z")
        assert find_error(whole) < 5
        me.press("a")
    page.keyboard.press("z")
    for _ in range(2):  # who stays zoomed gets it in full at once
        me.press("a")
        assert find_error(zoomed) < 5
    assert not [url for url in asked if "favicon" in url]


def test_two_removals_beside_the_source_in_the_evaluation_notebook(page, lab, folder):
    write_notebook(
        folder,
        "08_evaluate",
        output_dir=str(folder / "stage"),
        annotator="",
        user_study="preference",
        study_methods=["Telea", "Navier-Stokes"],
        test_set="builtin:test",
        limit=6,
        study_pictures=4,
        methods=[{"name": "Telea", "kind": "telea"}, {"name": "Navier-Stokes", "kind": "ns"}],
    )
    me = Annotating(page, lab[0], folder, "user_study")
    me.open()
    me.run_notebook()
    page.locator("input[placeholder='such as anna.m']").fill("anna")
    page.keyboard.press("Enter")
    me.wait_for_picture()  # and the keys are on, without a click
    assert me.widget.evaluate("root => root === document.activeElement")
    captions = me.widget.locator("figcaption")
    assert captions.all_inner_texts() == ["source", "left", "right"]
    boxes = [canvas.bounding_box() for canvas in me.widget.locator("canvas").all()]
    assert len({(round(box["y"]), round(box["width"])) for box in boxes}) == 1
    source, left, right = (me.grab_canvas(side) for side in range(3))
    assert len({source, left, right}) == 3
    page.keyboard.press("f")  # the source in the place of both
    assert captions.all_inner_texts() == ["source"] * 3
    assert me.grab_canvas(1) == me.grab_canvas(2)
    page.keyboard.press("f")
    page.keyboard.press("d")
    assert captions.all_inner_texts() == ["source", "difference × 4", "difference × 4"]
    page.keyboard.press("d")
    assert (me.grab_canvas(1), me.grab_canvas(2)) == (left, right)
    me.take_picture("user_study_light")
    expected = [
        (me.press(key), label, None)
        for key, label in (("1", "left"), ("2", "same"), ("3", "right"))
    ]
    undone = me.press("u") and me.shown
    expected.append((undone, "undo", None))
    assert undone == expected[2][0]
    expected += [(me.click("left"), "left", None), (me.press("s"), "skip", None)]
    assert me.saved == expected
    page.keyboard.press("a")  # nothing is accepted here
    assert me.saved == expected and me.widget.locator(".count").inner_text() == "3 of 4"
    me.run_notebook()
    wait_until((folder / "stage" / "DONE").exists, page)
    study = json.loads((folder / "stage" / "metrics.json").read_text())["user_study"]
    told = json.loads((folder / "stage" / "user_study" / "trials.json").read_text())
    lefts = [told[expected[0][0]]["methods"][0], told[undone]["methods"][0]]
    wins = {name: lefts.count(name) / 3 for name in ("Navier-Stokes", "Telea")}
    (row,) = study["preferences"]
    assert (row["first"], row["second"], row["n"]) == ("Navier-Stokes", "Telea", 3)
    assert row["prefers_first"] == pytest.approx(wins["Navier-Stokes"])
    assert row["prefers_second"] == pytest.approx(wins["Telea"])
    assert row["same"] == pytest.approx(1 / 3)
