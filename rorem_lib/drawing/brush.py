"""A brush and a box over an image, in JupyterLab and VS Code: what is painted is the mask.

The browser side is `brush.js`, `common.css` and `brush.css`. It gets the image as a JPEG of a
moderate size (a photo of 12 megapixels opens at once) and sends the mask in the image's own size.

Messages from the browser: `ready`; `mask`, with a PNG whose alpha is the mask; `act` (the button).
Messages to the browser: `open`, with the image and the mask so far; `busy`, `finished` and
`failed`, each with a text.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path

import anywidget
import cv2
import ipywidgets as widgets
import numpy as np
import traitlets
from IPython.display import display
from PIL import Image

from rorem_lib.data.masks import binarise_mask
from rorem_lib.drawing.encoding import encode_view

logger = logging.getLogger(__name__)

STYLES = [Path(__file__).with_name(name) for name in ("common.css", "brush.css")]
VIEW_SIZE = 1600  # longest side of the JPEG that the browser gets, px
# Pixels of the browser's mask: iOS has no larger canvas than 16.7 million. The mask of a larger
# image is drawn smaller, and enlarged here.
MOST_PIXELS = 16_000_000


class MaskBrush(anywidget.AnyWidget):
    """Paint a mask over an image.

    Attributes:
        mask: [H, W] uint8, 0 or 255, of the image's own size: what is painted by now. Without a
            browser (papermill) it stays the mask that was given.
    """

    _esm = Path(__file__).with_name("brush.js")
    _css = "".join(path.read_text(encoding="utf-8") for path in STYLES)
    settings = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        image: np.ndarray,
        mask: np.ndarray | None = None,
        *,
        action: str = "",
        act: Callable[[np.ndarray], object] | None = None,
    ):
        """Args:
        image: [H, W, 3] uint8, any size.
        mask: [H, W], what is painted at first (>= 128); None for nothing.
        action: the text of the button, such as "Remove"; "" for no button.
        act: called with the mask when the button is pressed. Its errors are shown beside it.

        Raises:
            ValueError: the image is no such array, or the mask of another size.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"the image is {image.dtype} {list(image.shape)}: give uint8 [H, W, 3]"
            )
        if mask is not None and mask.shape != image.shape[:2]:
            raise ValueError(
                f"the mask is {mask.shape[1]}x{mask.shape[0]} px, the image "
                f"{image.shape[1]}x{image.shape[0]}"
            )
        self._size = image.shape[1], image.shape[0]
        scale = min(1, (MOST_PIXELS / (self._size[0] * self._size[1])) ** 0.5)
        self._mask_size = tuple(max(1, int(side * scale)) for side in self._size)
        self._photo = encode_view(image, VIEW_SIZE, 90)
        self._mask = np.zeros(image.shape[:2], np.uint8) if mask is None else binarise_mask(mask)
        self._sent = b""  # the PNG that the browser sent last, not yet decoded
        self._act = act
        super().__init__(settings={"action": action})
        self.on_msg(lambda _, content, buffers: self.receive(content, buffers))

    @property
    def mask(self) -> np.ndarray:
        if self._sent:
            with Image.open(io.BytesIO(self._sent), formats=["PNG"]) as image:
                alpha = np.asarray(image.convert("RGBA").getchannel("A"))
            alpha = cv2.resize(alpha, self._size, interpolation=cv2.INTER_LINEAR)
            self._mask, self._sent = binarise_mask(alpha), b""
        return self._mask

    def __repr__(self) -> str:  # what a notebook shows that is opened without its kernel
        return f"<mask of an image of {self._size[0]}x{self._size[1]} px: run the notebook to draw>"

    def receive(self, content: dict, buffers: list = ()) -> None:
        """Answer one message of the browser (see the module's head)."""
        kind = content.get("kind")
        if kind == "ready":
            opened = {"kind": "open", "size": self._size, "mask_size": self._mask_size}
            self.send(opened, [self._photo, _encode_mask(self.mask, self._mask_size)])
        elif kind == "mask":
            data = bytes(buffers[0])
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:  # its head alone is read
                if image.size != self._mask_size:
                    raise ValueError(f"a mask of {image.size} px came, not {self._mask_size}")
            self._sent = data
        elif kind == "act" and self._act is not None:
            self._run()

    def _run(self) -> None:
        """The button's work; whatever goes wrong is told where the person looks."""
        if not self.mask.any():
            text = "paint over what is to be removed first"
            return self.send({"kind": "failed", "text": text})
        self.send({"kind": "busy", "text": "working …"})
        try:
            told = self._act(self.mask)
        except Exception as error:
            logger.exception("the button's work failed")
            self.send({"kind": "failed", "text": f"{type(error).__name__}: {error}"})
        else:
            self.send({"kind": "finished", "text": str(told or "done")})


def open_brush(
    image: np.ndarray,
    mask: np.ndarray | None,
    remove: Callable[[np.ndarray], object],
    *,
    action: str = "Remove",
) -> tuple[MaskBrush, widgets.VBox]:
    """A brush whose button shows beneath it what `remove(mask)` gives.

    Args:
        image, mask: as for `MaskBrush`.
        remove: gives something that a notebook can show; its `str` is told beside the button.

    Returns:
        The brush, and the box to show: brush and result.
    """
    result = widgets.Output()

    def act(drawn: np.ndarray) -> object:
        found = remove(drawn)
        result.outputs = ()
        with result:
            display(found)
        return found

    brush = MaskBrush(image, mask, action=action, act=act)
    return brush, widgets.VBox([brush, result])


def _encode_mask(mask: np.ndarray, size: tuple[int, int]) -> bytes:
    """A mask as a PNG whose alpha it is; b"" for an empty one."""
    if not mask.any():
        return b""
    if mask.shape[::-1] != size:
        mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
    stream = io.BytesIO()
    white = Image.new("L", size, 255)
    Image.merge("LA", (white, Image.fromarray(mask))).save(stream, "PNG", compress_level=1)
    return stream.getvalue()
