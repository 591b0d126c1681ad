"""Untrained SDXL-inpainting pipelines, smaller than the built-in model or as large."""

import torch
from diffusers import AutoencoderTiny

from rorem_lib import pretrain
from rorem_lib.models import sdxl


def write_model(folder, *, unet=(), vae=()):
    """Write a pipeline of the built-in model's architecture, but for these settings of its parts.

    Returns:
        The folder.
    """
    torch.manual_seed(1)
    given, pretrain.UNET = pretrain.UNET, pretrain.UNET | dict(unet)
    try:
        pipe = pretrain.build_pipeline(AutoencoderTiny(**pretrain.VAE | dict(vae)))
    finally:
        pretrain.UNET = given
    # It starts as zeros, which would make every prediction the same, whatever goes in.
    torch.nn.init.normal_(pipe.unet.conv_out.weight, std=0.05)
    with sdxl.silence_libraries():
        pipe.save_pretrained(folder)
    return folder
