"""How fast the annotation widget is for who sits before it, and whether it grows.

A real JupyterLab and a headless Chromium, real key presses, candidates of 512 px (JPEG sources and
removals, PNG masks). Measured: from a key's arrival in the page to the next image painted, over
300 decisions at two a second and 1,000 taken back to back; how many of 100 keys at 10 and at 15
a second, ten times each, reach the log as they were typed (a key that comes before the next image
shows is ignored); memory of kernel and page over 10,000 decisions, after the page's garbage
collection: how much a browser lets lie before it tidies up says nothing of what it has to keep.
All of it as `make lab` starts JupyterLab; the latencies also in a JupyterLab without the kit's
settings (`jupyter_lab_config.py`), the baseline.

Playwright opens the notebook and leaves: as long as it is there the page keeps what it has loaded
for it, up to 100 MB, and copies every message to it. Keys then come through DevTools alone.

    python tests/benchmarks/bench_annotator.py [decisions]

The goals: 50 ms at the 95th percentile, 100 of 100, memory flat.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import requests
import websocket
from measuring import require_idle, save_result
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab import BROWSER, ROOT_SELECTOR, Annotating, run_lab, write_notebook  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402
from raw_data import make_scene  # noqa: E402

SIDE, PICTURES, TIMED = 512, 20, 1000
BURST, BURSTS, RATES = 100, 10, (10, 15)
PACE, PACED = 2, 300  # keys per second and keys of an annotator who never stops to think

WATCH = """selector => {
    const root = document.querySelector(selector);
    window.latencies = [];
    let pressed = 0;
    root.addEventListener("keydown", () => (pressed = performance.now()), true);
    // data-place is set again when the next image has been painted
    new MutationObserver(() => {
        if (root.dataset.place !== "" && pressed) {
            window.latencies.push(performance.now() - pressed);
            pressed = 0;
            window.painted?.();
        }
    }).observe(root, { attributes: true, attributeFilter: ["data-place"] });
}"""
WAIT = """count => new Promise(resolve => {
    if (latencies.length >= count) resolve();
    else window.painted = () => latencies.length >= count && resolve();
})"""


class Page:
    """A page of a browser, by the few DevTools commands that this needs."""

    def __init__(self, port: int):
        pages = requests.get(f"http://127.0.0.1:{port}/json/list", timeout=60).json()
        (address,) = (x["webSocketDebuggerUrl"] for x in pages if "/lab/" in x["url"])
        self.socket = websocket.create_connection(address, timeout=120, suppress_origin=True)
        self.sent = 0

    def send(self, method: str, **parameters) -> int:
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": parameters}))
        return self.sent

    def call(self, method: str, **parameters) -> dict:
        number = self.send(method, **parameters)
        while (answer := json.loads(self.socket.recv())).get("id") != number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def run(self, script: str, argument: object = None):
        """What a JavaScript function returns, promises waited for."""
        expression = f"({script})({json.dumps(argument)})"
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        code = {"key": key, "code": f"Key{key.upper()}", "windowsVirtualKeyCode": ord(key.upper())}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=key, **code)
        self.send("Input.dispatchKeyEvent", type="keyUp", **code)


@contextlib.contextmanager
def open_notebook(address: str, folder: Path):
    """The annotation notebook run in Chromium, the widget in focus: the page and its processes."""
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    )
    profile = folder / "profile"
    process = subprocess.Popen(
        [
            chromium,
            "--headless",
            "--window-size=1366,768",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
            *BROWSER,
            f"{address}/lab/tree/annotate.ipynb?reset",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (profile / "DevToolsActivePort").is_file():
            time.sleep(0.2)
        port = int((profile / "DevToolsActivePort").read_text().split()[0])
        with sync_playwright() as playwright:
            browser = playwright.chromium.connect_over_cdp(f"http://127.0.0.1:{port}")
            (page,) = (p for context in browser.contexts for p in context.pages if "/lab/" in p.url)
            page.set_default_timeout(120_000)
            me = Annotating(page, address, folder)
            me.start()
            browser.close()  # leaves
        yield Page(port), process
    finally:
        process.terminate()
        process.wait(20)


@contextlib.contextmanager
def open_widget(candidates: int, *, plain: bool = False):
    """The widget on so many candidates in a JupyterLab: folder, page, server, browser."""
    folder = Path(tempfile.mkdtemp(prefix="annotator-"))
    try:
        write_candidates(folder / "candidates", candidates)
        write_notebook(
            folder,
            output_dir=str(folder / "stage"),
            annotator="anna",
            candidates=str(folder / "candidates"),
        )
        with (
            run_lab(folder, plain=plain) as (address, server),
            open_notebook(address, folder) as (page, browser),
        ):
            yield folder, page, server, browser
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_log(folder: Path) -> list[str]:
    """The labels given so far."""
    log = folder / "stage" / "labels" / "labels-anna.jsonl"
    return [json.loads(line)["label"] for line in log.read_text().splitlines()]


def write_candidates(folder: Path, count: int) -> None:
    """`count` candidates over `PICTURES` images: what matters here is that each is sent."""
    for part in ("source", "mask", "GT"):
        (folder / part).mkdir(parents=True)
    for number in range(PICTURES):
        scene = make_scene(number, (SIDE, SIDE))
        name = f"{number:06d}"
        for part, picture in (("source", scene.source), ("GT", scene.gt)):
            Image.fromarray(picture).save(folder / part / f"{name}.jpg", quality=92)
        Image.fromarray(scene.mask).save(folder / "mask" / f"{name}.png")
    rows = [
        {
            "id": f"c{place:05d}",
            "source": f"source/{place % PICTURES:06d}.jpg",
            "mask": f"mask/{place % PICTURES:06d}.png",
            "GT": f"GT/{place % PICTURES:06d}.jpg",
        }
        for place in range(count)
    ]
    (folder / "meta.json").write_text(json.dumps(rows))


def measure_memory(server, browser, page: Page) -> dict:
    """MB of the notebook's kernel, of the page's processes, shared pages counted once, and of the
    page's JavaScript objects."""
    for _ in range(2):
        page.call("HeapProfiler.collectGarbage")
    time.sleep(2)  # what was freed goes back a little later
    counts = {x["name"]: x["value"] for x in page.call("Performance.getMetrics")["metrics"]}
    (kernel,) = (
        p
        for p in psutil.Process(server.pid).children(recursive=True)
        if "ipykernel_launcher" in " ".join(p.cmdline())
    )
    pages = [
        p
        for p in psutil.Process(browser.pid).children(recursive=True)
        if "--type=renderer" in " ".join(p.cmdline())
    ]
    return {
        "kernel_mb": round(kernel.memory_full_info().pss / 1e6, 1),
        "page_mb": round(sum(p.memory_full_info().pss for p in pages) / 1e6, 1),
        "javascript_mb": round(counts["JSHeapUsedSize"] / 1e6, 1),
    }


def press_one_after_another(page: Page, count: int) -> None:
    done = page.run("() => latencies.length")
    for number in range(count):
        page.press("a")
        page.run(WAIT, done + number + 1)


def press_in_time(page: Page, keys: str, rate: float) -> None:
    """`rate` keys per second, whatever the page does."""
    began = time.monotonic()
    for number, key in enumerate(keys):
        time.sleep(max(0, began + number / rate - time.monotonic()))
        page.press(key)
    time.sleep(1)


def time_decisions(page: Page, act) -> dict:
    """Milliseconds from key to image while `act` goes on; how many took longer than 50."""
    page.run("() => { latencies.length = 0; }")
    act()
    found = page.run("() => latencies")
    return {
        "count": len(found),
        "over_50": sum(x > 50 for x in found),
        "most": round(max(found), 1),
        **{f"p{q}": round(float(np.percentile(found, q)), 1) for q in (50, 95, 99)},
    }


def time_both(page: Page) -> dict:
    """Latencies of an annotator at work, and of keys back to back."""
    page.run(WATCH, ROOT_SELECTOR)
    press_one_after_another(page, 20)  # warm
    return {
        f"at {PACE} a second": time_decisions(page, lambda: press_in_time(page, "a" * PACED, PACE)),
        "back to back": time_decisions(page, lambda: press_one_after_another(page, TIMED)),
    }


def count_kept(page: Page, folder: Path, rate: float) -> dict:
    """How many of `BURST` keys at `rate` a second are in the log, `BURSTS` times; and how many
    of the logs hold just what was typed."""
    keys = "".join(np.random.default_rng(0).choice(list("ax"), BURST))
    wanted = [{"a": "accept", "x": "reject"}[key] for key in keys]
    bursts = []
    for _ in range(BURSTS):
        before = len(read_log(folder))
        press_in_time(page, keys, rate)
        bursts.append(read_log(folder)[before:])
    return {
        "rate": rate,
        "typed": BURST,
        "kept": [len(kept) for kept in bursts],
        "as_typed": sum(kept == wanted for kept in bursts),
    }


def main() -> None:
    total = int(next((x for x in sys.argv[1:] if x.isdigit()), 10_000))
    if "--busy" not in sys.argv:
        require_idle()
    with open_widget(total + 100) as (folder, page, server, browser):
        page.call("Performance.enable")
        latencies = time_both(page)
        bursts = [count_kept(page, folder, rate) for rate in RATES]
        memory = []
        while True:
            done = len(read_log(folder))
            memory.append({"decisions": done, **measure_memory(server, browser, page)})
            print(memory[-1], flush=True)
            if done >= total:
                break
            press_one_after_another(page, min(1000, total - done))
    with open_widget(2000, plain=True) as (_, page, *_):
        baseline = time_both(page)
    save_result(
        "annotator",
        {
            "latency_ms": latencies,
            "latency_ms_in_a_plain_jupyterlab": baseline,
            "ratio_of_p50": {
                part: round(latencies[part]["p50"] / baseline[part]["p50"], 2) for part in latencies
            },
            "keys_in_time": bursts,
            "memory": memory,
            "memory_last_to_first": {
                part: round(memory[-1][part] / memory[0][part], 3)
                for part in memory[0]
                if part != "decisions"
            },
        },
        "jupyterlab",
        "anywidget",
        "playwright",
    )


if __name__ == "__main__":
    main()
