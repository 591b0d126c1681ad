"""Before and after under a slider, plain HTML: it needs no kernel and works in exported pages."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping

import numpy as np

from rorem_lib.drawing.encoding import encode_view

VIEW_SIZE = 1000  # longest side of what is shown, px: Jupyter drops outputs above 3 MB in 3 s
_CSS = """
.rorem-compare { --cut: 50%; width: 100%; max-width: 900px; margin: 4px 0 10px;
  font: 13px/1.4 var(--jp-ui-font-family, system-ui, sans-serif); }
.rorem-compare .pair { position: relative; line-height: 0; border-radius: 4px; overflow: hidden; }
.rorem-compare .pair:focus-within { outline: 3px solid #1976d2; outline-offset: 1px; }
.rorem-compare img { display: block; width: 100%; max-width: none; height: auto; margin: 0; }
.rorem-compare img[hidden] { display: none; }
.rorem-compare .before { position: absolute; inset: 0;
  clip-path: inset(0 calc(100% - var(--cut)) 0 0); }
.rorem-compare .edge { position: absolute; top: 0; bottom: 0; left: var(--cut); width: 3px;
  margin-left: -1.5px; background: #fff; box-shadow: 0 0 3px #000; pointer-events: none; }
.rorem-compare .edge::after { content: "\\2194"; position: absolute; top: 50%; left: -15px;
  width: 32px; height: 32px; margin-top: -16px; border-radius: 50%; background: #fff; color: #222;
  font-size: 20px; line-height: 31px; text-align: center; box-shadow: 0 0 4px #000; }
.rorem-compare .side { position: absolute; top: 8px; padding: 1px 9px; border-radius: 10px;
  background: rgba(0, 0, 0, 0.65); color: #fff; line-height: 1.5; pointer-events: none; }
.rorem-compare input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0;
  opacity: 0; cursor: ew-resize; touch-action: pan-y; }
.rorem-compare select { margin: 0 0 6px; padding: 3px 6px; font: inherit; }
"""
_CHOOSE = (
    "const box=this.closest('.rorem-compare');"
    "box.querySelectorAll('.after').forEach((x,i)=>x.hidden=i!==this.selectedIndex);"
    "box.querySelector('.right').textContent=this.value"
)
_MOVE = "this.closest('.rorem-compare').style.setProperty('--cut',this.value+'%')"


def compare_images(before: np.ndarray, afters: Mapping[str, np.ndarray]) -> str:
    """HTML of an image under a slider; with several others, a list chooses among them.

    Args:
        before: [H, W, 3] uint8.
        afters: title -> [H, W, 3] uint8, of the same size.

    Raises:
        ValueError: there is nothing to compare with, or a size differs.
    """
    if not afters:
        raise ValueError("there is nothing to compare with")
    for title, image in afters.items():
        if image.shape != before.shape:
            raise ValueError(f"{title} is {image.shape}, the image before {before.shape}")
    titles = [html.escape(title, quote=True) for title in afters]
    shown = "".join(
        f'<img class="after" alt="{title}" src="{_encode(image)}"{" hidden" if place else ""}>'
        for place, (title, image) in enumerate(zip(titles, afters.values()))
    )
    choice = ""
    if len(titles) > 1:
        options = "".join(f"<option>{title}</option>" for title in titles)
        choice = f'<select aria-label="what is shown" onchange="{_CHOOSE}">{options}</select>'
    return (
        f'<div class="rorem-compare"><style>{_CSS}</style>{choice}<div class="pair">{shown}'
        f'<img class="before" alt="before" src="{_encode(before)}"><span class="edge"></span>'
        f'<span class="side" style="left: 8px">before</span>'
        f'<span class="side right" style="right: 8px">{titles[0]}</span>'
        f'<input type="range" min="0" max="100" step="0.5" value="50" oninput="{_MOVE}" '
        'aria-label="how much of the image before is shown, percent"></div></div>'
    )


def _encode(image: np.ndarray) -> str:
    data = base64.b64encode(encode_view(image, VIEW_SIZE, 88)).decode()
    return f"data:image/jpeg;base64,{data}"
