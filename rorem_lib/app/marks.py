"""What is marked on a canvas of at most `CANVAS` px, and the mask of the photo it stands for."""

from __future__ import annotations

import cv2
import numpy as np

CANVAS = 1024  # longest side of what is painted on and shown, px; files keep their own size
COLOUR = (230, 30, 130)
OPACITY = 0.6  # of the marks: the object stays visible below


def shrink(image: np.ndarray) -> np.ndarray:
    """[H, W, C] uint8 with no side longer than `CANVAS`."""
    scale = CANVAS / max(image.shape[:2])
    if scale >= 1:
        return image
    sides = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    return cv2.resize(image, sides, interpolation=cv2.INTER_AREA)


def read_marks(editor: dict | None, shape: tuple[int, int]) -> np.ndarray:
    """What was painted in a `gr.ImageEditor`: [h, w] uint8, 0 or 255, of the canvas's shape."""
    marks = np.zeros(shape, np.uint8)
    for layer in (editor or {}).get("layers") or []:
        alpha = np.asarray(layer)[..., 3]
        if alpha.shape == shape:
            marks[alpha > 127 * OPACITY] = 255  # half of what the brush lays
    return marks


def make_canvas(preview: np.ndarray, marks: np.ndarray | None = None) -> dict:
    """The editor's value: an image [h, w, 3], and marks that the eraser takes away."""
    if marks is None or not marks.any():
        return {"background": preview, "layers": [], "composite": preview}
    layer = np.zeros((*marks.shape, 4), np.uint8)
    layer[marks > 0] = (*COLOUR, round(255 * OPACITY))
    return {"background": preview, "layers": [layer], "composite": show_marks(preview, marks)}


def show_marks(preview: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """An image [h, w, 3] uint8 with the marks [h, w] in colour."""
    shown = preview.copy()
    where = marks > 0
    shown[where] = np.round(preview[where] * (1 - OPACITY) + np.multiply(COLOUR, OPACITY))
    return shown


def enlarge(marks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Marks on the canvas as a mask of the photo's (height, width) px, 0 or 255."""
    if marks.shape == size:
        return marks
    large = cv2.resize(marks, size[::-1], interpolation=cv2.INTER_LINEAR)
    return np.where(large > 127, 255, 0).astype(np.uint8)
