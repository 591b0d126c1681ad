"""How fast the annotation widget is for who sits before it, and whether it grows.

A real JupyterLab and a headless Chromium, real key presses, candidates of 512 px (JPEG sources and
removals, PNG masks). Measured: from a key's arrival in the page to the next picture painted, over
1,000 decisions taken one after another; how many of 100 keys at 15 a second reach the log as they
were typed; memory of kernel and page over 10,000 decisions.

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

SIDE, PICTURES, TIMED, BURST, RATE = 512, 20, 1000, 100, 15

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


def measure_memory(server, browser_name: str) -> dict:
    """MB of the notebook's kernel and of the browser's processes, shared pages counted once."""
    kernel, = (p for p in psutil.Process(server.pid).children(recursive=True)
               if "ipykernel_launcher" in " ".join(p.cmdline()))
    pages = [p for p in psutil.Process().children(recursive=True)
             if browser_name in p.name() and "--type=renderer" in " ".join(p.cmdline())]
    return {"kernel_mb": round(kernel.memory_full_info().pss / 1e6, 1),
            "page_mb": round(sum(p.memory_full_info().pss for p in pages) / 1e6, 1)}


def press_one_after_another(me: Annotating, count: int) -> None:
    for _ in range(count):
        me.press("a")


def press_in_time(me: Annotating, keys: str) -> None:
    """`RATE` keys a second, whatever the page does."""
    began = time.monotonic()
    for number, key in enumerate(keys):
        time.sleep(max(0, began + number / RATE - time.monotonic()))
        me.page.keyboard.press(key)
    me.page.wait_for_timeout(1000)


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
            press_one_after_another(me, TIMED)
            latencies = page.evaluate("latencies")
            before = len(me.saved)
            keys = "".join(np.random.default_rng(0).choice(list("ax"), BURST))
            press_in_time(me, keys)
            kept = [label for _, label, _ in me.saved[before:]]
            wanted = [{"a": "accept", "x": "reject"}[key] for key in keys]
            memory = []
            while True:
                done = len(me.saved)
                memory.append({"decisions": done, **measure_memory(server, "chrom")})
                print(memory[-1], flush=True)
                if done >= total:
                    break
                press_one_after_another(me, min(1000, total - done))
            browser.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    save_result("annotator", {
        "latency_ms": {"count": len(latencies),
                       **{f"p{q}": round(float(np.percentile(latencies, q)), 1)
                          for q in (50, 95, 99)}, "most": round(max(latencies), 1)},
        "keys_at_15_a_second": {"typed": BURST, "kept": len(kept), "as_typed": kept == wanted},
        "memory": memory,
        "memory_last_to_first": {part: round(memory[-1][part] / memory[0][part], 3)
                                 for part in ("kernel_mb", "page_mb")}},
        "jupyterlab", "anywidget", "playwright")


if __name__ == "__main__":
    main()
