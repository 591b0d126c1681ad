"""The SDXL-inpainting stack: what opens, what does not, conditioning, latents."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

from rorem_lib import sdxl
from rorem_lib.pretrain import UNET


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return sdxl.load_pipeline(str(tiny_model))


def test_a_folder_opens_frozen_and_in_evaluation_mode(pipe):
    assert type(pipe).__name__ == "StableDiffusionXLInpaintPipeline"
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())
        assert next(part.parameters()).dtype == torch.float32


@pytest.mark.parametrize("inner", ["unet", ""])
def test_a_unet_alone_opens_over_its_base_model(tiny_model, pipe, tmp_path, inner):
    shutil.copytree(tiny_model / "unet", tmp_path / "upstream" / inner, dirs_exist_ok=True)
    opened = sdxl.load_pipeline(str(tmp_path / "upstream"), base_model=str(tiny_model))
    for a, b in zip(opened.unet.parameters(), pipe.unet.parameters(), strict=True):
        assert torch.equal(a, b)


def test_folders_that_are_not_there_or_hold_no_model_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no model folder .*missing"):
        sdxl.load_pipeline(str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match="neither a pipeline .* nor a UNet"):
        sdxl.load_pipeline(str(tmp_path))


def test_a_text_to_image_unet_is_refused(pipe, tmp_path):
    UNet2DConditionModel(**UNET | {"in_channels": 4}).save_pretrained(tmp_path / "unet")
    other = StableDiffusionXLPipeline(
        vae=pipe.vae, text_encoder=pipe.text_encoder, text_encoder_2=pipe.text_encoder_2,
        tokenizer=pipe.tokenizer, tokenizer_2=pipe.tokenizer_2, scheduler=pipe.scheduler,
        unet=UNet2DConditionModel.from_pretrained(tmp_path / "unet"))
    other.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="is no inpainting model: its UNet takes 4 channels"):
        sdxl.load_pipeline(str(tmp_path / "whole"))


def test_prompts_have_sdxls_shapes_and_the_empty_one_is_no_zero(pipe):
    embeds, pooled = sdxl.encode_prompt(pipe)
    assert embeds.shape == (1, 77, pipe.unet.config.cross_attention_dim)
    assert pooled.shape[0] == 1 and pooled.abs().sum() > 0 and embeds.abs().sum() > 0
    assert not torch.equal(embeds, sdxl.encode_prompt(pipe, "a red ball")[0])


def test_time_ids_are_size_crop_and_target():
    assert sdxl.make_time_ids(96, 64, 2).tolist() == [[96, 64, 0, 0, 96, 64]] * 2


def test_bytes_survive_the_way_to_tensors_and_back():
    images = np.arange(2 * 16 * 16 * 3, dtype=np.uint32).reshape(2, 16, 16, 3).astype(np.uint8)
    tensor = sdxl.to_tensor(images)
    assert tensor.shape == (2, 3, 16, 16)
    assert tensor.min() >= -1 and tensor.max() <= 1
    assert np.array_equal(sdxl.to_bytes(tensor), images)


def test_the_hole_is_grey_and_the_rest_as_it_was():
    source, mask = torch.rand(1, 3, 8, 8) + 0.1, torch.zeros(1, 1, 8, 8)
    mask[:, :, 2:5, 2:5] = 1
    masked = sdxl.mask_source(source, mask)
    assert (masked[:, :, 2:5, 2:5] == 0).all()
    assert torch.equal(masked[mask.expand(-1, 3, -1, -1) == 0],
                       source[mask.expand(-1, 3, -1, -1) == 0])


@torch.no_grad()
def test_latents_of_autoencoders_with_and_without_posterior(pipe):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    tiny = sdxl.encode_images(pipe.vae, images)
    assert tiny.shape == (2, 4, 8, 8)
    assert sdxl.decode_latents(pipe.vae, tiny).shape == images.shape
    torch.manual_seed(0)
    large = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 2, block_out_channels=[8, 16],
                          up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4,
                          latent_channels=4, scaling_factor=0.5).eval()
    mode = sdxl.encode_images(large, images)
    assert torch.equal(mode, large.encode(images).latent_dist.mean * 0.5)
    drawn = [sdxl.encode_images(large, images, generator=torch.Generator().manual_seed(s))
             for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    decoded = sdxl.decode_latents(large, mode)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1


def test_masks_shrink_as_the_pipeline_shrinks_them(pipe):
    mask = torch.zeros(1, 1, 32, 32)
    mask[:, :, 9:20, 3:14] = 1
    small = sdxl.shrink_mask(mask, torch.zeros(1, 4, 8, 8))
    theirs, _ = pipe.prepare_mask_latents(
        mask, torch.zeros(1, 3, 32, 32), 1, 32, 32, torch.float32, "cpu", None, False)
    assert torch.equal(small, theirs)


def test_precision_is_what_was_asked_for_or_what_the_machine_has():
    assert [sdxl.choose_precision(p) for p in ("no", "bf16", "fp16")] == ["no", "bf16", "fp16"]
    assert sdxl.choose_precision("auto") in ("no", "bf16")
    a = torch.ones(2, 2)
    with sdxl.autocast("no"):
        assert (a @ a).dtype == torch.float32
    with sdxl.autocast("bf16"):
        assert (a @ a).dtype == torch.bfloat16
