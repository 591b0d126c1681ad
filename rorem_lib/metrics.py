"""Metrics of one removal against the truth, one a function.

Images are uint8 [H, W, 3], masks and effect maps uint8 [H, W]; white (>= 128) in a mask is the
hole. All PSNRs are in dB over 0..255, infinite where nothing differs; `mean_psnr` counts such
images apart. No metric here says whether a removal is good: PSNR prefers a blurred mean, so success
is judged apart (see `rorem_lib.evaluation.evaluate`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable

import numpy as np
from skimage.metrics import structural_similarity

logger = logging.getLogger(__name__)

EFFECT_LEVEL = 8  # grey levels by which a shadow or reflection must change a pixel to count
EFFECT_PIXELS = 20  # with fewer such pixels there is no shadow to measure


def psnr(a: np.ndarray, b: np.ndarray, where: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB; infinite where no pixel differs.

    Args:
        a, b: uint8 images of the same shape.
        where: bool [H, W]; only these pixels count (all of them without it).

    Raises:
        ValueError: the shapes differ, or no pixel counts.
    """
    if a.shape != b.shape:
        raise ValueError(f"PSNR compares images of one shape, not {a.shape} and {b.shape}")
    error = (a.astype(np.float64) - b) ** 2
    if where is not None:
        error = error[where]
    if error.size == 0:
        raise ValueError("PSNR of no pixels: the mask or region is empty")
    mean = error.mean()
    return float("inf") if mean == 0 else float(10 * np.log10(255**2 / mean))


def mean_psnr(values: Iterable[float]) -> tuple[float | None, int]:
    """Mean in dB over the images that differ (None without one), and how many are identical.

    An identical region has no PSNR: any number in its place would decide the mean.
    """
    values = np.array(list(values), dtype=np.float64)
    differing = values[np.isfinite(values)]
    mean = float(differing.mean()) if differing.size else None
    return mean, int(np.isposinf(values).sum())


def psnr_hole(result: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """PSNR in dB where the mask is white.

    Raises:
        ValueError: the mask is empty or the shapes differ.
    """
    return psnr(result, truth, mask >= 128)


def psnr_shadow(
    result: np.ndarray, truth: np.ndarray, shadow: np.ndarray, mask: np.ndarray
) -> float | None:
    """PSNR in dB where the object's shadow or reflection fell and the mask does not reach.

    Args:
        shadow: [H, W] 0..255, by how many grey levels the effect changes each pixel.

    Returns:
        None where fewer than `EFFECT_PIXELS` pixels are changed by more than `EFFECT_LEVEL`.
    """
    region = (shadow > EFFECT_LEVEL) & (mask < 128)
    return psnr(result, truth, region) if region.sum() >= EFFECT_PIXELS else None


def psnr_background(
    result: np.ndarray, truth: np.ndarray, mask: np.ndarray, shadow: np.ndarray | None = None
) -> float | None:
    """PSNR in dB outside the mask and outside the object's effect: what must stay as it was.

    On the built-in scenes a method that leaves these pixels alone is infinitely near. None if no
    such pixel exists.
    """
    region = mask < 128
    if shadow is not None:
        region &= shadow == 0  # where the effect is faint, the source is not the truth either
    return psnr(result, truth, region) if region.any() else None


def ssim_hole(result: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """Structural similarity (-1..1), its map averaged in the hole (Wang et al. 2004, sigma 1.5).

    Raises:
        ValueError: the mask is empty, the shapes differ, or the image is under 11 px.
    """
    hole = mask >= 128
    if not hole.any():
        raise ValueError("SSIM of no pixels: the mask is empty")
    rows, columns = np.nonzero(hole.any(axis=1))[0], np.nonzero(hole.any(axis=0))[0]
    # The window reaches 5 px: the rest of the image has no say, but costs most of the time.
    near = np.s_[max(0, rows[0] - 6) : rows[-1] + 7, max(0, columns[0] - 6) : columns[-1] + 7]
    if min(hole[near].shape) < 11:  # a small hole in a corner
        near = np.s_[:, :]
    _, similarity = structural_similarity(
        result[near],
        truth[near],
        channel_axis=2,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    return float(similarity[hole[near]].mean())


@functools.cache
def load_lpips(net: str = "alex"):
    """The LPIPS network of torchmetrics, with the published weights or not at all.

    Args:
        net: "alex", "squeeze" or "vgg"; numbers of different networks don't compare.

    Returns:
        (network, ""), or (None, why not): torchvision is missing, or the weights are neither in
        torch's cache nor can be downloaded. A random network is never handed out. The network takes
        two batches [N, 3, H, W] in -1..1 and returns a map of distances [N, 1, H, W].
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        network = LearnedPerceptualImagePatchSimilarity(net_type=net).net
    except ModuleNotFoundError as error:
        return None, (
            f"LPIPS ({net}) was not measured: {error}. Install the torchvision that "
            "belongs to your torch"
        )
    except (OSError, RuntimeError) as error:  # URLError and HTTPError are OSErrors
        return None, (
            f"LPIPS ({net}) was not measured: its published weights are neither cached "
            f"nor could they be downloaded ({error})"
        )
    network.spatial = True  # as `lpips.LPIPS(spatial=True)`; the metric's own interface hides it
    return network.eval(), ""


def lpips_hole(
    result: np.ndarray, truth: np.ndarray, mask: np.ndarray, *, net: str = "alex"
) -> float | None:
    """LPIPS distance (0 = the same) in the hole: its map's mean there.

    The truth is compared with the truth that has the result in its hole, so only the filling is
    measured. A mean over the whole image would say how small the hole is.

    Returns:
        None where the network's published weights can't be had (`load_lpips` says why).

    Raises:
        ValueError: the mask is empty.
    """
    import torch

    hole = mask >= 128
    if not hole.any():
        raise ValueError("LPIPS of no pixels: the mask is empty")
    network, _ = load_lpips(net)
    if network is None:
        return None
    pasted = np.where(hole[..., None], result, truth)
    pair = torch.from_numpy(np.stack([pasted, truth])).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        distances = network(pair[:1], pair[1:])[0, 0]
    return float(distances[torch.from_numpy(hole)].mean())
