"""How fast the annotation widget is for who sits before it, and whether it grows.

A real JupyterLab and a headless Chromium, real key presses, candidates of 512 px (JPEG sources and
removals, PNG masks). Measured: from a key's arrival in the page to the next picture painted, over
500 decisions at two a second and 1,000 taken back to back; how many of 100 keys at 10 and at 15
a second reach the log as they were typed (a key that comes before the next picture shows is
ignored); memory of kernel and page over 10,000 decisions, after the page's garbage collection: how
much a browser lets lie before it tidies up says nothing of what it has to keep.

    python tests/benchmarks/bench_annotator.py [decisions]

The goals: 50 ms at the 95th percentile, 100 of 100, memory flat.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from measuring import require_idle, save_result
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab import BROWSER, ROOT_SELECTOR, Annotating, run_lab, write_notebook  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402
from raw_data import make_scene  # noqa: E402

SIDE, PICTURES, TIMED, BURST, RATES = 512, 20, 1000, 100, (10, 15)
PACE, PACED = 2, 500  # keys a second and keys of an annotator who never stops to think

WATCH = """selector => {
    const root = document.querySelector(selector);
    window.latencies = [];
    let pressed = 0;
    root.addEventListener("keydown", () => (pressed = performance.now()), true);
    // data-place is set again when the next picture has been painted
    new MutationObserver(() => {
        if (root.dataset.place !== "" && pressed) {
            window.latencies.push(performance.now() - pressed);
            pressed = 0;
        }
    }).observe(root, { attributes: true, attributeFilter: ["data-place"] });
}"""


def write_candidates(folder: Path, count: int) -> None:
    """`count` candidates over `PICTURES` pictures: what matters here is that each is sent."""
    for part in ("source", "mask", "GT"):
        (folder / part).mkdir(parents=True)
    for number in range(PICTURES):
        scene = make_scene(number, (SIDE, SIDE))
        name = f"{number:06d}"
        for part, picture in (("source", scene.source), ("GT", scene.gt)):
            Image.fromarray(picture).save(folder / part / f"{name}.jpg", quality=92)
        Image.fromarray(scene.mask).save(folder / "mask" / f"{name}.png")
    rows = [{"id": f"c{place:05d}", "source": f"source/{place % PICTURES:06d}.jpg",
             "mask": f"mask/{place % PICTURES:06d}.png", "GT": f"GT/{place % PICTURES:06d}.jpg"}
            for place in range(count)]
    (folder / "meta.json").write_text(json.dumps(rows))


def measure_memory(server, browser_name: str, devtools) -> dict:
    """MB of the notebook's kernel, of the browser's processes, shared pages counted once, and of
    the page's JavaScript objects."""
    for _ in range(2):
        devtools.send("HeapProfiler.collectGarbage")
    time.sleep(2)  # what was freed goes back a little later
    counts = {x["name"]: x["value"] for x in devtools.send("Performance.getMetrics")["metrics"]}
    kernel, = (p for p in psutil.Process(server.pid).children(recursive=True)
               if "ipykernel_launcher" in " ".join(p.cmdline()))
    pages = [p for p in psutil.Process().children(recursive=True)
             if browser_name in p.name() and "--type=renderer" in " ".join(p.cmdline())]
    return {"kernel_mb": round(kernel.memory_full_info().pss / 1e6, 1),
            "page_mb": round(sum(p.memory_full_info().pss for p in pages) / 1e6, 1),
            "javascript_mb": round(counts["JSHeapUsedSize"] / 1e6, 1)}


def press_one_after_another(me: Annotating, count: int) -> None:
    for _ in range(count):
        me.press("a")


def press_in_time(me: Annotating, keys: str, rate: float) -> None:
    """`rate` keys a second, whatever the page does."""
    began = time.monotonic()
    for number, key in enumerate(keys):
        time.sleep(max(0, began + number / rate - time.monotonic()))
        me.page.keyboard.press(key)
    me.page.wait_for_timeout(1000)


def time_decisions(me: Annotating, act) -> dict:
    """Milliseconds from key to picture while `act` goes on."""
    me.page.evaluate("latencies.length = 0")
    act()
    found = me.page.evaluate("latencies")
    return {"count": len(found), "most": round(max(found), 1),
            **{f"p{q}": round(float(np.percentile(found, q)), 1) for q in (50, 95, 99)}}


def count_kept(me: Annotating, rate: float) -> dict:
    """How many of `BURST` keys at `rate` a second are in the log as they were typed."""
    keys, before = "".join(np.random.default_rng(0).choice(list("ax"), BURST)), len(me.saved)
    press_in_time(me, keys, rate)
    kept = [label for _, label, _ in me.saved[before:]]
    wanted = [{"a": "accept", "x": "reject"}[key] for key in keys]
    return {"rate": rate, "typed": BURST, "kept": len(kept), "as_typed": kept == wanted}


def main() -> None:
    total = int(next((x for x in sys.argv[1:] if x.isdigit()), 10_000))
    if "--busy" not in sys.argv:
        require_idle()
    folder = Path(tempfile.mkdtemp(prefix="annotator-"))
    write_candidates(folder / "candidates", total + 100)
    write_notebook(folder, output_dir=str(folder / "stage"), annotator="anna",
                   candidates=str(folder / "candidates"))
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                                    "google-chrome"))))
    try:
        with run_lab(folder) as (address, server), sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=BROWSER)
            page = browser.new_page(viewport={"width": 1366, "height": 768})
            page.set_default_timeout(120_000)
            page.goto(f"{address}/lab/tree/annotate.ipynb?reset")
            me = Annotating(page, address, folder)
            me.run_notebook()
            me.wait_for_picture()
            me.focus()
            press_one_after_another(me, 20)  # warm
            page.evaluate(WATCH, ROOT_SELECTOR)
            devtools = page.context.new_cdp_session(page)
            devtools.send("Performance.enable")
            pace = time_decisions(me, lambda: press_in_time(me, "a" * PACED, PACE))
            rush = time_decisions(me, lambda: press_one_after_another(me, TIMED))
            bursts = [count_kept(me, rate) for rate in RATES]
            memory = []
            while True:
                done = len(me.saved)
                memory.append({"decisions": done, **measure_memory(server, "chrom", devtools)})
                print(memory[-1], flush=True)
                if done >= total:
                    break
                press_one_after_another(me, min(1000, total - done))
            browser.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    save_result("annotator", {
        "latency_ms": {f"at {PACE} a second": pace, "back to back": rush}, "keys_in_time": bursts,
        "memory": memory,
        "memory_last_to_first": {part: round(memory[-1][part] / memory[0][part], 3)
                                 for part in memory[0] if part != "decisions"}},
        "jupyterlab", "anywidget", "playwright")


if __name__ == "__main__":
    main()
