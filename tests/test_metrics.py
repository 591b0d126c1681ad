"""Metrics: their units, regions, and what they say when there is nothing to measure."""

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from rorem_lib import metrics


@pytest.fixture
def scene():
    """A grey truth, a mask in the middle, a shadow that reaches out of it."""
    truth = np.full((32, 32, 3), 100, np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[8:16, 8:16] = 255
    shadow = np.zeros((32, 32), np.uint8)
    shadow[14:22, 8:16] = 40
    return truth, mask, shadow


def test_psnr_is_in_decibels_over_255():
    a = np.zeros((4, 4, 3), np.uint8)
    assert metrics.psnr(a, a + 255) == pytest.approx(0)
    assert metrics.psnr(a, a + 5) == pytest.approx(10 * np.log10(255**2 / 25))


def test_psnr_of_bytes_does_not_wrap_around():
    a, b = np.full((2, 2, 3), 250, np.uint8), np.full((2, 2, 3), 10, np.uint8)
    assert metrics.psnr(a, b) == metrics.psnr(b, a) == pytest.approx(10 * np.log10(255**2 / 240**2))


def test_identical_pictures_are_counted_apart_from_the_mean():
    a = np.zeros((4, 4, 3), np.uint8)
    assert metrics.psnr(a, a) == np.inf
    assert metrics.mean_psnr([20, np.inf, 30, np.inf]) == (25, 2)
    assert metrics.mean_psnr([np.inf]) == (None, 1) and metrics.mean_psnr([]) == (None, 0)


def test_nearly_equal_pictures_have_no_limit():
    a = np.zeros((4096, 1024, 3), np.uint8)
    b = a.copy()
    b[0, 0, 0] = 1  # one grey level of 12 million
    found = metrics.psnr(a, b)
    assert found == pytest.approx(10 * np.log10(255**2 * a.size)) and found > 100


def test_psnr_refuses_other_shapes_and_empty_regions():
    a = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="one shape"):
        metrics.psnr(a, a[:2])
    with pytest.raises(ValueError, match="empty"):
        metrics.psnr_hole(a, a, np.zeros((4, 4), np.uint8))


def test_each_region_sees_its_own_error_alone(scene):
    truth, mask, shadow = scene
    result = truth.copy()
    result[mask >= 128] += 10
    assert metrics.psnr_hole(result, truth, mask) == pytest.approx(10 * np.log10(255**2 / 100))
    assert metrics.psnr_shadow(result, truth, shadow, mask) == np.inf
    assert metrics.psnr_background(result, truth, mask, shadow) == np.inf
    result = truth.copy()
    result[16:22, 8:16] -= 40  # the shadow is left where the mask does not reach
    assert metrics.psnr_hole(result, truth, mask) == np.inf
    assert metrics.psnr_shadow(result, truth, shadow, mask) == pytest.approx(
        10 * np.log10(255**2 / 1600)
    )
    assert metrics.psnr_background(result, truth, mask, shadow) == np.inf
    assert metrics.psnr_background(result, truth, mask) < np.inf
    result = truth.copy()
    result[0, 0] = 0
    assert metrics.psnr_background(result, truth, mask, shadow) < np.inf


def test_shadow_needs_twenty_pixels_outside_the_mask(scene):
    truth, mask, shadow = scene
    shadow[:] = 0
    shadow[20, :19] = 40
    assert metrics.psnr_shadow(truth, truth, shadow, mask) is None
    shadow[20, :20] = 40
    assert metrics.psnr_shadow(truth, truth, shadow, mask) == np.inf
    shadow[20, :20] = 8  # not more than 8 grey levels: nobody sees it
    assert metrics.psnr_shadow(truth, truth, shadow, mask) is None


def test_background_may_not_exist(scene):
    truth, _, shadow = scene
    assert metrics.psnr_background(truth, truth, np.full((32, 32), 255, np.uint8), shadow) is None


def test_ssim_falls_with_structure_and_is_measured_in_the_hole():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[10:22, 10:22] = 255
    flat = truth.copy()
    flat[mask >= 128] = 128
    assert metrics.ssim_hole(truth, truth, mask) == pytest.approx(1)
    assert metrics.ssim_hole(flat, truth, mask) < 0.3
    far = truth.copy()
    far[0, 0] = 255 - far[0, 0]  # far outside of the hole and of the window
    assert metrics.ssim_hole(far, truth, mask) == pytest.approx(1)


@pytest.mark.parametrize("box", [(20, 30, 18, 25), (0, 3, 0, 3), (60, 64, 0, 64), (0, 64, 5, 6)])
def test_ssim_is_that_of_the_whole_picture(box):
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    b = (0.7 * a + 0.3 * b).astype(np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[box[0] : box[1], box[2] : box[3]] = 255
    _, whole = structural_similarity(
        a,
        b,
        channel_axis=2,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    assert metrics.ssim_hole(a, b, mask) == pytest.approx(whole[mask > 0].mean(), abs=1e-9)


def test_lpips_says_why_it_is_missing(monkeypatch, scene):
    def refuse(*_, **__):
        raise ModuleNotFoundError("torchvision is not installed")

    metrics.load_lpips.cache_clear()
    monkeypatch.setattr("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", refuse)
    truth, mask, _ = scene
    network, reason = metrics.load_lpips("alex")
    assert network is None and "torchvision" in reason
    assert metrics.lpips_hole(truth, truth, mask) is None
    metrics.load_lpips.cache_clear()


@pytest.fixture
def local_lpips(monkeypatch):
    """In place of the network: the absolute difference, blurred over 3 px, as a map."""
    import torch

    def compare(a, b):
        assert a.shape == b.shape == (1, 3, *a.shape[2:]) and a.abs().max() <= 1
        return torch.nn.functional.avg_pool2d((a - b).abs().mean(1, keepdim=True), 3, 1, 1)

    monkeypatch.setattr(metrics, "load_lpips", lambda net: (compare, ""))


def test_lpips_looks_at_the_hole_alone(local_lpips, scene):
    truth, mask, _ = scene
    result = 255 - truth
    result[mask >= 128] = truth[mask >= 128]
    assert metrics.lpips_hole(result, truth, mask) == 0
    assert metrics.lpips_hole(255 - truth, truth, mask) > 0
    with pytest.raises(ValueError, match="empty"):
        metrics.lpips_hole(truth, truth, np.zeros((32, 32), np.uint8))


def test_lpips_does_not_fall_with_the_size_of_the_picture(local_lpips, scene):
    truth, mask, _ = scene
    found = [
        metrics.lpips_hole(
            np.pad(255 - truth, ((0, rows), (0, rows), (0, 0))),
            np.pad(truth, ((0, rows), (0, rows), (0, 0))),
            np.pad(mask, (0, rows)),
        )
        for rows in (0, 32, 200)
    ]
    assert found == pytest.approx([found[0]] * 3) and found[0] > 0.1


def test_the_real_network_returns_a_map(monkeypatch):
    """torchmetrics' own network, its backbone without weights: what `spatial` does to it."""
    import torch
    from torchmetrics.functional.image import lpips

    class Backbone(torch.nn.Module):
        def __init__(self, **_):
            super().__init__()
            self.layers = torch.nn.ModuleList(
                torch.nn.Conv2d(3, c, 3, stride=2, padding=1) for c in (64, 192, 384, 256, 256)
            )

        def forward(self, x):
            return [layer(x) for layer in self.layers]

    monkeypatch.setattr(lpips, "Alexnet", Backbone)
    monkeypatch.setattr("torchmetrics.image.lpip._TORCHVISION_AVAILABLE", True)
    metrics.load_lpips.cache_clear()
    torch.manual_seed(0)
    truth = np.full((48, 40, 3), 90, np.uint8)
    mask = np.zeros((48, 40), np.uint8)
    mask[8:20, 8:20] = 255
    network, reason = metrics.load_lpips("alex")
    pair = torch.zeros(2, 1, 3, 48, 40)
    assert reason == "" and network(*pair).shape == (1, 1, 48, 40)
    other = metrics.lpips_hole(255 - truth, truth, mask)
    assert metrics.lpips_hole(truth, truth, mask) == 0 < other
    metrics.load_lpips.cache_clear()
