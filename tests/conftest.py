"""What every test shares: one thread a process, no network, a cache of its own."""

import functools
import os

# Before anything imports torch, numpy or matplotlib: the libraries read these once. Several
# processes with a thread pool each on few cores are many times slower than one thread each.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import shutil
import signal
from unittest import mock

import pytest

# What a script starts in the background ignores Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Files in this order, the others behind them: processes take whole files, and the last ones to
# be taken must be short.
LONGEST = (
    "test_smoke.py",
    "test_annotator_browser.py",
    "test_resume.py",
    "test_pipeline.py",
    "test_brush_browser.py",
    "test_app_browser.py",
    "test_assembly.py",
    "test_assemble_notebook.py",
    "test_sharding.py",
    "test_export.py",
    "test_removal.py",
    "test_remover.py",
    "test_sdxl.py",
    "test_launch.py",
    "test_publishing.py",
    "test_remove_command.py",
    "test_stale.py",
)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session", autouse=True)
def rorem_cache(tmp_path_factory):
    """Folder that stands for ~/.cache/rorem, so that no run sees what an earlier one rendered."""
    folder = tmp_path_factory.mktemp("rorem_cache")
    before = os.environ.get("ROREM_CACHE")
    os.environ["ROREM_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["ROREM_CACHE"]
    else:
        os.environ["ROREM_CACHE"] = before


@pytest.fixture(scope="session")
def chromium_path():
    """Path of a Chromium for browser tests; without one they skip, and fail where CI=true."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    reason = "no chromium, chromium-browser or google-chrome in PATH: install one"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def quick_widgets(monkeypatch):
    """Annotation widgets that collect no garbage when they open: beside torch that takes half a
    second."""
    monkeypatch.setattr("rorem_lib.labels.widget.gc", mock.Mock())


@pytest.fixture(scope="module")
def browser(chromium_path):
    """A headless Chromium. Not for the session: its event loop would stand in other tests' way."""
    from lab import BROWSER

    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path, args=BROWSER)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens pages of a width, a height (CSS px) and options of Playwright's; the test fails where
    a script in one of them did, but for JupyterLab's own, when its kernel is killed, and Gradio's,
    when its editor goes before it was ready."""
    from lab import WAIT

    pages, errors = [], []

    def note(page, error):
        if "/lab/" not in page.url and "on 'IntersectionObserver'" not in str(error):
            errors.append(str(error))

    def open_page(width=1366, height=768, **options):
        page = browser.new_page(viewport={"width": width, "height": height}, **options)
        page.set_default_timeout(1000 * WAIT)
        page.on("pageerror", functools.partial(note, page))
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not errors


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of an untrained SDXL-inpainting pipeline of the built-in model's architecture."""
    from tiny import write_model

    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory):
    """`meta.json` of ten labelled scenes of 32 px; `scene-0` to `scene-9`."""
    from rorem_lib.builtin.scenes import render_scene
    from rorem_lib.data.writer import TripletWriter

    with TripletWriter(tmp_path_factory.mktemp("sets") / "tiny") as writer:
        for number in range(10):
            scene = render_scene([3, number], role="rord", size=32)
            writer.add(id=f"scene-{number}", source=scene.image, mask=scene.mask, gt=scene.truth)
    return writer.folder / "meta.json"
