"""Which remover is taken where nobody names one, and what a remover is and is not for."""

from __future__ import annotations

import contextlib

from huggingface_hub import try_to_load_from_cache

from rorem_lib.models.sdxl import BASE_MODEL, BUILTIN_REMOVER

AUTHORS_MODEL = "LetsThink/RORem"
SMALL = 100_000_000  # parameters of a UNet; SDXL's has 2.6 billion
# Sizes: the UNet's 2,567 M parameters in fp16; text encoders (818 M) and VAE (84 M) in float32.
DOWNLOADS = (  # the authors' model is a UNet alone: the rest is SDXL-inpainting's
    f"hf download {AUTHORS_MODEL}",
    f'hf download {BASE_MODEL} --include "*.json" --include "*.txt" '
    '--include "text_encoder*/model.safetensors" '
    '--include "vae/diffusion_pytorch_model.safetensors"',
)
_COMMANDS = " and ".join(f"`{command}`" for command in DOWNLOADS)
_WANTED = (
    f"For photographs take the authors' {AUTHORS_MODEL}: 8.7 GB to download (its UNet 5.1 GB, the "
    "rest of SDXL-inpainting 3.6 GB), under Apache-2.0 and SDXL's OpenRAIL++-M, on a GPU of 16 GB "
    f"(less with offload; a CPU takes minutes). {_COMMANDS} fetch it."
)
NO_MODEL = f"""\
{AUTHORS_MODEL}, the authors' model, is not on this machine and could not be downloaded.
With a network, once (5.1 GB + 3.6 GB):
  {DOWNLOADS[0]}
  {DOWNLOADS[1]}
or name a folder with a model (model, --model). To copy it from another machine, take the folder
~/.cache/huggingface/hub with you, or name it in HF_HUB_CACHE.
Licences: {AUTHORS_MODEL} Apache-2.0; SDXL, which it stands on, OpenRAIL++-M.
What ships with the kit is no model for photographs, but a miniature (4 M parameters) for the kit's
rendered scenes of 64 px: --model {BUILTIN_REMOVER}, or from_pretrained("{BUILTIN_REMOVER}")"""
_FOLDERS = ("", "unet/")
_WEIGHTS = [  # what a UNet's weights are called: whole or in shards, of any type, of a variant
    f"{folder}diffusion_pytorch_model{variant}.safetensors{index}"
    for folder in _FOLDERS
    for variant in ("", ".fp16")
    for index in ("", ".index.json")
]


def choose_remover() -> str:
    """The authors' model if it and SDXL-inpainting lie in the Hub's cache, else the miniature.

    With their weights: a download that was stopped leaves the configs alone.
    """
    base = ("model_index.json", "vae/diffusion_pytorch_model.safetensors")
    there = (
        any(_is_cached(AUTHORS_MODEL, f"{folder}config.json") for folder in _FOLDERS)
        and any(_is_cached(AUTHORS_MODEL, name) for name in _WEIGHTS)
        and all(_is_cached(BASE_MODEL, name) for name in base)
    )
    return AUTHORS_MODEL if there else BUILTIN_REMOVER


def _is_cached(model: str, name: str, revision: str | None = None) -> bool:
    return isinstance(try_to_load_from_cache(model, name, revision=revision), str)


@contextlib.contextmanager
def explain_absence(model: str, revision: str | None = None):
    """A block that opens a model: the error that it cannot be had says how to get it too."""
    try:
        yield
    except (FileNotFoundError, ConnectionError, PermissionError) as error:
        names = [f"{folder}config.json" for folder in _FOLDERS]
        if model == AUTHORS_MODEL and not any(_is_cached(model, n, revision) for n in names):
            error.args = (f"{error}\n{NO_MODEL}",)
        elif BASE_MODEL in str(error):
            error.args = (f"{error}\nWith a network, once (3.6 GB):\n  {DOWNLOADS[1]}",)
        raise


def describe_use(model: str, parameters: int) -> str:
    """What is to be known beside a result: what the remover is and is not for.

    Args:
        model: its name.
        parameters: of its UNet.
    """
    if parameters < SMALL:
        return (
            f"{model} is a miniature of {parameters / 1e6:.0f} million parameters that knows "
            "rendered scenes of 64 px alone. It shows that the kit works, and is no model for "
            f"photographs: there expect no more than of OpenCV. {_WANTED}"
        )
    return (
        f"{model} fills the hole with what is likely, not with what was there: look closely at "
        "faces, text and large holes, and do not take the result for evidence."
    )
