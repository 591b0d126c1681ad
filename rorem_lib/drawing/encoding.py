"""Images as browsers get them: JPEGs of a moderate size."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def encode_view(image: np.ndarray, side: int, quality: int) -> bytes:
    """[H, W, 3] uint8 as a JPEG whose longest side has at most `side` px."""
    shown = Image.fromarray(image)
    shown.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2)
    stream = io.BytesIO()
    shown.save(stream, "JPEG", quality=quality)
    return stream.getvalue()
