"""What every test shares: one thread a process, no network, a cache of its own."""

import os

# Before anything imports torch, numpy or matplotlib: the libraries read these once. Several
# processes with a thread pool each on few cores are many times slower than one thread each.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import shutil

import pytest


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
