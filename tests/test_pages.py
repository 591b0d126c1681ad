"""The pages: every relative link and anchor leads somewhere, and commands there exist."""

import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest

from rorem_lib.runner import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT)
    for place in (".", "notebooks", "papers", "rorem_lib", "tests")
    for path in ((ROOT / place).glob("*.md") if place == "." else (ROOT / place).rglob("*.md"))
    if ".ipynb_checkpoints" not in path.parts
)


def read(page) -> str:
    """A page's text without what stands in fences and between backticks."""
    text = re.sub(r"(?ms)^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"))
    return re.sub(r"`[^`\n]*`", "", text)


def list_anchors(path: Path) -> set[str]:
    """The anchors that a page's headings get on GitHub."""
    text = re.sub(r"(?ms)^```.*?^```", "", path.read_text(encoding="utf-8"))
    titles = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


def test_there_are_pages():
    assert {Path("README.md"), Path("papers/training.md")} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = unquote(target).partition("#")
        path = folder / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in list_anchors(path), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_and_their_options_exist(page, capsys):
    """Of `rorem`: the words of each line in a fence, as its own parser knows them."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    for kind, fence in re.findall(r"(?ms)^```(\w*)\n(.*?)^```", text):
        for line in fence.splitlines() if kind in ("", "bash", "sh") else ():
            if not re.match(r"(\S*/)?rorem ", line):
                continue
            words = shlex.split(line, comments=True)
            command = words[1:3] if words[1] == "data" else words[1:2]
            with pytest.raises(SystemExit) as end:
                cli.main([*command, "--help"])
            helped = capsys.readouterr().out
            assert end.value.code == 0, f"{page}: {line}"
            for option in (w.split("=")[0] for w in words if w.startswith("--")):
                assert option in helped, f"{page}: {line}: no {option}"
