"""The annotation notebook in a real JupyterLab and a real browser, driven by key presses.

Screenshots (light, dark) go to `$ROREM_SCREENSHOTS` where it is set, for whoever wants to look.
"""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import nbformat
import psutil
import pytest
from PIL import Image

from rorem_lib.annotator import KEYS
from rorem_lib.sources.scenes import render_scene
from rorem_lib.stage import ROOT
from rorem_lib.triplets import TripletWriter, read_triplets

playwright_api = pytest.importorskip("playwright.sync_api")

ROOT_SELECTOR = ".rorem-annotator"
SERVER = [
    "--no-browser",
    "--ip=127.0.0.1",
    "--ServerApp.port_retries=0",
    "--IdentityProvider.token=",
    "--ServerApp.disable_check_xsrf=True",
    "--LabApp.news_url=None",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
]  # without token and check: it listens on the loopback for the length of the test
BROWSER = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
def folder(tmp_path):
    """A folder with twelve candidates and the annotation notebook, its parameters set."""
    with TripletWriter(tmp_path / "candidates") as writer:
        for number in range(12):
            scene = render_scene([4, number], role="pool")
            removal = cv2.inpaint(scene.image, scene.mask, 5, cv2.INPAINT_TELEA)
            writer.add(id=f"c{number:02}", source=scene.image, mask=scene.mask, gt=removal)
    notebook = nbformat.read(ROOT / "notebooks" / "04_annotate.ipynb", 4)
    cell = next(x for x in notebook.cells if "parameters" in x.metadata.get("tags", []))
    cell.source += f"""
output_dir = {str(tmp_path / "stage")!r}
candidates = {str(tmp_path / "candidates")!r}
annotator = "anna"
labels_wanted = 10"""
    nbformat.write(notebook, tmp_path / "annotate.ipynb")
    return tmp_path


@pytest.fixture
def lab(folder):
    """A JupyterLab on that folder; (address, process)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = folder / "config" / "labconfig" / "page_config.json"
    settings.parent.mkdir(parents=True)
    announcements = {"@jupyterlab/apputils-extension:announcements": True}
    settings.write_text(json.dumps({"disabledExtensions": announcements}))
    environment = {key: value for key, value in os.environ.items() if key != "ROREM_BATCH"}
    for name in ("config", "data", "runtime"):
        environment[f"JUPYTER_{name.upper()}_DIR"] = str(folder / name)
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "jupyterlab", f"--port={port}", *SERVER]
    command += [f"--ServerApp.root_dir={folder}"] + ["--allow-root"] * (os.geteuid() == 0)
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    for _ in range(600):
        with socket.socket() as probe:
            if server.poll() is not None or not probe.connect_ex(("127.0.0.1", port)):
                break
        time.sleep(0.1)
    if server.poll() is not None:
        pytest.fail((folder / "lab.log").read_text())
    yield f"http://127.0.0.1:{port}", server
    family = [server, *psutil.Process(server.pid).children(recursive=True)]
    server.terminate()
    try:
        server.wait(20)
    finally:
        for process in psutil.wait_procs(family[1:], 1)[1]:
            process.kill()


@pytest.fixture
def page(lab, chromium_path):
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path, args=BROWSER)
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        page.set_default_timeout(90_000)  # other tests run beside this one
        page.goto(f"{lab[0]}/lab/tree/annotate.ipynb?reset")
        yield page
        browser.close()


class Annotating:
    """What an annotator sees and does."""

    def __init__(self, page, address, folder):
        self.page, self.address, self.folder = page, address, folder
        self.log = folder / "stage" / "labels" / "labels-anna.jsonl"
        self.widget = page.locator(ROOT_SELECTOR)

    def run_notebook(self):
        for _ in range(300):  # what is run before the page has its kernel is not run at all
            kernels = self.page.request.get(f"{self.address}/api/kernels").json()
            if [(k["execution_state"], k["connections"]) for k in kernels] == [("idle", 1)]:
                break
            self.page.wait_for_timeout(100)
        self.page.locator(".lm-MenuBar >> text=Run").click()
        self.page.locator(".lm-Menu >> text=/^Run All Cells$/").click()

    def wait_for_picture(self):
        self.page.wait_for_selector(
            f"{ROOT_SELECTOR}[data-save=saved][data-place]:not([data-place=''])"
        )

    def focus(self):
        self.widget.locator("canvas").first.click()

    @property
    def shown(self):
        return self.widget.get_attribute("data-id")

    @property
    def saved(self):
        """The log's events, an undo as "undo"."""
        events = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [(e["id"], e.get("label", "undo"), e.get("reason")) for e in events]

    def change(self, act):
        """Do something that moves to another picture; the id it was done to."""
        before = self.shown
        act()
        self.page.wait_for_function(
            "([selector, before]) => { const data = document.querySelector(selector).dataset;"
            " return data.id !== before && (data.place !== '' || data.id === ''); }",
            arg=[ROOT_SELECTOR, before],
        )
        return before

    def press(self, key):
        return self.change(lambda: self.page.keyboard.press(key))

    def click(self, action):
        return self.change(lambda: self.widget.locator(f"[data-action={action}]").click())

    def take_picture(self, name):
        data = self.page.screenshot()
        if os.environ.get("ROREM_SCREENSHOTS"):
            target = Path(os.environ["ROREM_SCREENSHOTS"])
            target.mkdir(parents=True, exist_ok=True)
            (target / f"{name}.png").write_bytes(data)
        return Image.open(io.BytesIO(data)).convert("RGB")

    def grab_canvas(self, side):
        script = "canvas => canvas.toDataURL()"
        return self.widget.locator("canvas").nth(side).evaluate(script)


def test_labelling_by_keyboard_in_jupyterlab(page, lab, folder):
    me = Annotating(page, lab[0], folder)
    me.run_notebook()
    me.wait_for_picture()
    page.wait_for_function(  # "Run All Cells" leaves the reader elsewhere: it comes into view
        "selector => { const area = document.querySelector(selector).getBoundingClientRect();"
        " return area.top >= 0 && area.bottom <= window.innerHeight; }",
        arg=ROOT_SELECTOR,
    )
    me.focus()
    cells = page.locator(".jp-Cell").count()

    # a decision a key, each in the log when the next picture is on screen
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
        page.keyboard.down("a")  # with the next picture on screen: the browser calls it a repeat
        page.wait_for_timeout(30)
    page.keyboard.up("a")
    assert me.saved == expected

    # keys while a decision is being saved, or before the next picture is on screen, do not count
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

    # every key is a button
    actions = me.widget.locator("button").evaluate_all("all => all.map(b => b.dataset.action)")
    assert sorted(actions) == sorted(KEYS)
    expected.append((me.click("accept"), "accept", None))
    undone = me.click("undo") and me.shown
    expected.append((undone, "undo", None))
    me.widget.locator("[data-action=reason_1]").focus()
    expected.append((me.press("Enter"), "reject", "incomplete removal"))
    assert me.saved == expected

    # a full disk is told, and the picture stays until it is saved
    me.focus()
    aside = me.log.rename(me.log.with_suffix(".aside"))
    me.log.symlink_to("/dev/full")
    before = me.shown
    page.keyboard.press("a")
    page.wait_for_selector(f"{ROOT_SELECTOR}[data-save=failed]")
    assert "No space left" in me.widget.locator(".message").inner_text() and me.shown == before
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
    kernels = [
        process
        for process in psutil.Process(lab[1].pid).children(recursive=True)
        if "ipykernel_launcher" in " ".join(process.cmdline())
    ]
    assert len(kernels) == 1
    os.kill(kernels[0].pid, signal.SIGKILL)
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
    for _ in range(300):
        if (folder / "stage" / "DONE").exists():
            break
        page.wait_for_timeout(100)
    metrics = json.loads((folder / "stage" / "metrics.json").read_text())
    assert metrics["n_labelled"] == 10 and metrics["simulated"] is False
    accepted = [triplet.id for triplet in read_triplets(folder / "stage" / "accepted")]
    assert len(accepted) == metrics["n_accepted"] == 5
