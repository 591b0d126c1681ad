"""A real JupyterLab with the widget's notebooks, and what an annotator sees and does there."""

import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import psutil
from PIL import Image

from rorem_lib.files import ROOT

ROOT_SELECTOR = ".rorem-annotator"
WAIT = 90  # s that a browser or a kernel gets for whatever it does: other tests run beside it
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


def write_notebook(folder, name="04_annotate", **parameters):
    """`annotate.ipynb` in a folder: a notebook of the kit with these parameters."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    cell = next(x for x in notebook.cells if "parameters" in x.metadata.get("tags", []))
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    nbformat.write(notebook, folder / "annotate.ipynb")


def wait_until(is_true, page=None):
    """Until a condition holds, `WAIT` s or longer; a page's events are handled meanwhile."""
    for _ in range(20 * WAIT):
        if is_true():
            return
        page.wait_for_timeout(50) if page else time.sleep(0.05)
    raise TimeoutError(f"{is_true.__name__} is not true after {WAIT} s")


def wait_until_still(page, selector):
    """Until what a selector finds has kept its place and size for 20 frames on screen."""
    page.wait_for_selector(selector)
    page.evaluate(
        """selector => new Promise(done => {
            let [before, same] = ["", 0];
            const look = () => {
                const area = document.querySelector(selector)?.getBoundingClientRect();
                const now = JSON.stringify(area ?? "");
                same = now === before && area?.height > 0 ? same + 1 : 0;
                before = now;
                same < 20 ? requestAnimationFrame(look) : done();
            };
            look();
        })""",
        selector,
    )


def save_screenshot(page, name, **options):
    """A page as a PNG's bytes, and in `$ROREM_SCREENSHOTS` where that is set."""
    data = page.screenshot(**options)
    if os.environ.get("ROREM_SCREENSHOTS"):
        folder = Path(os.environ["ROREM_SCREENSHOTS"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(data)
    return data


@contextlib.contextmanager
def run_lab(folder, *, plain=False):
    """A JupyterLab on a folder, as `make lab` starts it or plain: yields (address, process)."""
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
    environment["JUPYTER_CONFIG_PATH"] = "" if plain else str(ROOT)
    command = [sys.executable, "-m", "jupyterlab", f"--port={port}", *SERVER]
    command += [f"--ServerApp.root_dir={folder}"] + ["--allow-root"] * (os.geteuid() == 0)
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def listens_or_ended():
        with socket.socket() as probe:
            return server.poll() is not None or not probe.connect_ex(("127.0.0.1", port))

    wait_until(listens_or_ended)
    if server.poll() is not None:
        raise RuntimeError((folder / "lab.log").read_text())
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        family = [server, *psutil.Process(server.pid).children(recursive=True)]
        server.terminate()
        try:
            server.wait(20)
        finally:
            for process in psutil.wait_procs(family[1:], 1)[1]:
                process.kill()


class Annotating:
    """What an annotator sees and does."""

    def __init__(self, page, address, folder, labels="labels"):
        self.page, self.address, self.folder = page, address, folder
        self.log = folder / "stage" / labels / "labels-anna.jsonl"
        self.widget = page.locator(ROOT_SELECTOR)

    def open(self):
        """Open the notebook of the folder, which lies in JupyterLab's."""
        self.page.goto(f"{self.address}/lab/tree/{self.folder.name}/annotate.ipynb?reset")

    def wait_for_idle_kernel(self):
        def kernel_is_idle():
            answer = self.page.request.get(f"{self.address}/api/kernels")
            kernels = answer.json() if answer.ok else []  # an error while a kernel comes or goes
            # a page that was left while it opened may have started another, which nobody has
            return [k["execution_state"] for k in kernels if k["connections"]] == ["idle"]

        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        wait_until(kernel_is_idle, self.page)

    def run_notebook(self):
        self.wait_for_idle_kernel()  # what is run before the page has its kernel is not run at all
        self.page.locator(".lm-MenuBar >> text=Run").click()
        self.page.locator(".lm-Menu >> text=/^Run All Cells$/").click()

    def wait_for_picture(self):
        self.page.wait_for_selector(
            f"{ROOT_SELECTOR}[data-save=saved][data-place]:not([data-place=''])"
        )

    def start(self):
        """Run the notebook and turn the keys on."""
        self.run_notebook()
        self.wait_for_picture()
        self.focus()

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
        """Do something that moves to another image; the id it was done to."""
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
        return Image.open(io.BytesIO(save_screenshot(self.page, name))).convert("RGB")

    def grab_picture(self, side):
        """What a pane shows, [H, W, 3] uint8."""
        data = base64.b64decode(self.grab_canvas(side).partition(",")[2])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def grab_canvas(self, side):
        script = "canvas => canvas.toDataURL()"
        return self.widget.locator("canvas").nth(side).evaluate(script)
