"""What the annotation widget's browser needs to show one removal: files, outlines, crops."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from skimage.measure import find_contours

from rorem_lib.data.pictures import TripletError, get_orientation, load_mask, open_image
from rorem_lib.data.triplets import Triplet, load_images

# Files up to this size go to the browser as they are.
PLAIN_BYTES = 1_000_000


def encode_item(
    triplet: Triplet, rival: Path | None = None, *, view_size: int = 1024
) -> tuple[dict, list[bytes]]:
    """What the browser needs to show one candidate.

    A plain file of a moderate size goes as it is, which spares decoding it here.

    Returns:
        info: `size` [width, height], `box` of the mask [x0, y0, x1, y1] and `outline` (closed
            polygons [x0, y0, x1, y1, ...]), all in pixels of the source; `types`, one per image;
            `crop` [x0, y0, x1, y1] if full-resolution crops were added.
        images: source, removal, the rival if there is one and, for large images, the crops of
            all of them.

    Raises:
        TripletError: an image cannot be read, or their sizes differ.
    """
    shown = [triplet.source, triplet.gt, *([rival] if rival else [])]
    files = [_read_plain_file(path, view_size) for path in shown]
    mask = load_mask(triplet.mask)
    size = [mask.shape[1], mask.shape[0]]
    plain = all(file is not None and file[2] == size for file in files)
    if not plain:
        images = load_images(triplet)  # also says what does not fit
        shown = [images["source"], images["gt"]]
        if rival:
            shown.append(load_images(replace(triplet, gt=rival))["gt"])
    mask = mask >= 128
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = [0, 0, *size]
    if len(rows):
        box = [int(x) for x in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]
    info = {"size": size, "box": box, "outline": trace_mask(mask)}
    if plain:
        return info | {"types": [kind for kind, _, _ in files]}, [data for _, data, _ in files]
    shown = [Image.fromarray(image) for image in shown]
    if max(size) > view_size:
        # What the browser zooms to, in a pane that is wider than high, and something to pan over.
        reach = max(0.8 * max(box[2] - box[0], box[3] - box[1]) + 2, view_size / 4)
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        crop = [max(0, int(x - 1.25 * reach)), max(0, int(y - reach))]
        crop += [min(size[0], int(x + 1.25 * reach) + 1), min(size[1], int(y + reach) + 1)]
        shown += [image.crop(crop) for image in shown]
        for image in shown[: len(shown) // 2]:
            image.thumbnail((view_size, view_size), Image.Resampling.LANCZOS)
        info["crop"] = crop
    encoded = [_encode_image(image) for image in shown]
    return info | {"types": [kind for kind, _ in encoded]}, [data for _, data in encoded]


def _read_plain_file(path: Path, view_size: int) -> tuple[str, bytes, list[int]] | None:
    """Type, bytes and [width, height] of a file that any browser shows as it is, else None."""
    try:
        if path.stat().st_size > PLAIN_BYTES:
            return None
        with open_image(path) as image:  # reads the head alone
            known = image.format in ("PNG", "JPEG") and image.mode == "RGB"
            upright = get_orientation(image, in_head=True) == 1  # XMP's word counts too
            solid = not image.has_transparency_data
            if known and upright and solid and max(image.size) <= view_size:
                return f"image/{image.format.lower()}", path.read_bytes(), list(image.size)
    except (OSError, TripletError):
        pass  # load_images names what is wrong with it
    return None


def trace_mask(mask: np.ndarray) -> list[list[float]]:
    """Outlines of a mask [H, W] bool as closed polygons [x0, y0, x1, y1, ...] in pixels.

    Coordinates run from 0 to W and 0 to H: pixel i covers i to i + 1.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return []
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    outlines = []
    for contour in find_contours(np.pad(part, 1).astype(np.float32), 0.5):
        # find_contours counts from pixel centres, and the padding shifts by one: -1 + 0.5.
        points = cv2.approxPolyDP(contour.astype(np.float32), 0.35, True)[:, 0, ::-1] - 0.5
        outlines.append(np.round(points + [columns[0], rows[0]], 2).ravel().tolist())
    return outlines


def _encode_image(image: Image.Image) -> tuple[str, bytes]:
    stream = io.BytesIO()
    if image.width * image.height <= 256 * 256:  # small: lossless costs nothing
        image.save(stream, "PNG", compress_level=1)
        return "image/png", stream.getvalue()
    image.save(stream, "JPEG", quality=93, subsampling=0)
    return "image/jpeg", stream.getvalue()
