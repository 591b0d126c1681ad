"""The latent cache: the same as encoding at once, read again, never stale, never torn."""

import shutil

import numpy as np
import pytest
import torch

from rorem_lib import latent_cache, sdxl
from rorem_lib.latent_cache import open_cache
from rorem_lib.pictures import load_image, save_image
from rorem_lib.triplets import TripletError, load_images, read_triplets


@pytest.fixture
def vae(tiny_model):
    return sdxl.load_pipeline(str(tiny_model)).vae


@pytest.fixture
def triplets(tiny_set, tmp_path):
    """A copy of the tiny set that a test may damage."""
    shutil.copytree(tiny_set.parent, tmp_path / "set")
    return read_triplets(tmp_path / "set")[:5]


class Refuses(torch.nn.Module):
    """Stands for a VAE whose encoder must not be called (again)."""

    def __init__(self, vae, after=0):
        super().__init__()
        self.vae, self.config, self.dtype, self.left = vae, vae.config, vae.dtype, after

    def state_dict(self, *args, **kwargs):
        return self.vae.state_dict(*args, **kwargs)

    def encode(self, images):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return self.vae.encode(images)


Refuses.__name__ = "AutoencoderTiny"  # the kind of VAE is a part of the fingerprint


@torch.no_grad()
def test_it_holds_what_direct_encoding_gives(vae, triplets, tmp_path):
    cache = open_cache(triplets, vae, size=32, root=tmp_path / "cache", batch_size=2)
    assert len(cache) == 5 and cache.gt.shape == (5, 2, 4, 8, 8) and cache.gt.dtype == np.float16
    for number, triplet in enumerate(triplets):
        pictures = load_images(triplet)
        for twin in (0, 1):
            turned = {k: v[:, ::-1].copy() if twin else v for k, v in pictures.items()}
            source, gt = (sdxl.to_tensor(turned[k][None]) for k in ("source", "gt"))
            mask = torch.as_tensor(turned["mask"] >= 128).float()[None, None]
            wanted = {"source": source, "gt": gt, "masked": sdxl.mask_source(source, mask)}
            for name, image in wanted.items():
                latents = sdxl.encode_images(vae, image)[0].numpy()
                assert np.allclose(getattr(cache, name)[number, twin], latents, rtol=2e-3,
                                   atol=2e-3), (name, number, twin)
            small = sdxl.shrink_mask(mask, torch.zeros(1, 4, 8, 8))[0].numpy()
            assert np.array_equal(cache.mask[number, twin], small)


def test_a_second_opening_calls_no_vae(vae, triplets, tmp_path):
    first = open_cache(triplets, vae, size=32, root=tmp_path / "cache")
    again = open_cache(triplets, Refuses(vae), size=32, root=tmp_path / "cache")
    assert again.folder == first.folder
    assert np.array_equal(first.gt, again.gt)


def test_whatever_latents_depend_on_names_another_folder(vae, triplets, tmp_path):
    def find_folder(**changes):
        given = {"triplets": triplets, "vae": vae, "size": 32} | changes
        return open_cache(given.pop("triplets"), given.pop("vae"), root=tmp_path / "cache",
                          **given).folder

    folders = [find_folder(), find_folder(size=48), find_folder(triplets=triplets[:4]),
               find_folder(triplets=triplets[::-1])]
    picture = load_image(triplets[2].gt)
    picture[5, 5] ^= 1
    save_image(triplets[2].gt, picture)
    folders.append(find_folder())
    with torch.no_grad():
        next(vae.encoder.parameters()).view(-1)[0] += 1e-3
    folders.append(find_folder())
    vae.register_to_config(scaling_factor=0.5)
    folders.append(find_folder())
    assert len(set(folders)) == len(folders)


def test_killed_half_way_it_leaves_nothing_that_could_be_read(vae, triplets, tmp_path):
    root = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        open_cache(triplets, Refuses(vae, after=8), size=32, root=root, batch_size=1)
    left = list(root.iterdir())
    assert left and all(p.name.endswith(".partial") for p in left)
    assert not list(root.rglob("done.json"))
    whole = open_cache(triplets, vae, size=32, root=root, batch_size=1)
    other = open_cache(triplets, vae, size=32, root=tmp_path / "other", batch_size=1)
    for name in (*latent_cache.NAMES, "mask"):
        assert np.array_equal(getattr(whole, name), getattr(other, name))


def test_pictures_of_another_size_are_resized(vae, triplets, tmp_path):
    cache = open_cache(triplets, vae, size=48, root=tmp_path / "cache")
    assert cache.gt.shape == (5, 2, 4, 12, 12)


def test_a_truncated_picture_is_named(vae, triplets, tmp_path):
    with open(triplets[3].gt, "r+b") as stream:
        stream.truncate(100)
    with pytest.raises(TripletError, match=triplets[3].gt.name):
        open_cache(triplets, vae, size=32, root=tmp_path / "cache")


def test_it_lives_below_the_kits_cache(vae, triplets, rorem_cache):
    assert open_cache(triplets, vae, size=32).folder.is_relative_to(rorem_cache / "latents")
