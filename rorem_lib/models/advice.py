"""Which remover is taken where nobody names one, and what a remover is and is not for."""

from __future__ import annotations

from huggingface_hub import try_to_load_from_cache

from rorem_lib.models.sdxl import BASE_MODEL, BUILTIN_REMOVER

AUTHORS_MODEL = "LetsThink/RORem"
SMALL = 100_000_000  # parameters of a UNet; SDXL's has 2.6 billion
_WANTED = (
    f"For photographs take the authors' {AUTHORS_MODEL}: 8.7 GB to download (its UNet 5.1 GB, the "
    "rest of SDXL-inpainting 3.6 GB), under Apache-2.0 and SDXL's OpenRAIL++-M, on a GPU of 16 GB "
    "(less with offload; a CPU takes minutes). `hf download "
    f"{AUTHORS_MODEL}` fetches it."
)


def choose_remover() -> str:
    """The authors' model if it and SDXL-inpainting lie in the Hub's cache, else the miniature."""
    files = ((AUTHORS_MODEL, "config.json"), (AUTHORS_MODEL, "unet/config.json"))
    there = any(isinstance(try_to_load_from_cache(*file), str) for file in files)
    base = isinstance(try_to_load_from_cache(BASE_MODEL, "model_index.json"), str)
    return AUTHORS_MODEL if there and base else BUILTIN_REMOVER


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
