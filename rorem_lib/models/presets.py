"""What a model was released with: size, steps, guidance, strength, scheduler. A call's defaults.

Our own models and LoRAs have it in a small JSON file in their folder, others in `RELEASED`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields
from pathlib import Path

from diffusers import LCMScheduler

from rorem_lib.data.remote import talk_to_hub
from rorem_lib.files import read_json, write_json
from rorem_lib.models import sdxl
from rorem_lib.models.hub import SETTINGS_FILE, find_optional

SCHEDULERS = ("default", "trailing", "lcm")


@dataclass(frozen=True)
class Settings:
    """How a model is used.

    Attributes:
        resolution: short side at which it works, px; 0 takes what its UNet's config says.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 is off.
        strength: share of the noise schedule; 1 starts from pure noise.
        scheduler: "default" (the model's own), "trailing" (the same, its first step at the noisiest
            timestep, which few steps need) or "lcm".
    """

    resolution: int = 0
    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    strength: float = 1.0
    scheduler: str = "default"

    def __post_init__(self):
        if self.scheduler not in SCHEDULERS:
            raise ValueError(
                f"scheduler is {self.scheduler!r}: take one of {', '.join(SCHEDULERS)}"
            )


RELEASED = {
    # The authors' README: 512 px, 50 steps, strength 0.99, no guidance.
    "LetsThink/RORem": Settings(512, 50, 1.0, 0.99),
    "LetsThink/RORem-mixed": Settings(512, 50, 1.0, 0.99),  # 1024 px too
    # Its card asks for a strength below 1. Its guidance of 8 and 20 steps are for a prompt; here
    # there is none, and guidance is off, as RORem removes (sec. 3.3).
    sdxl.BASE_MODEL: Settings(1024, 50, 1.0, 0.99),
    "builtin": Settings(64, 20),
    "builtin:remover": Settings(64, 20),
}
# What LCM-LoRA is distilled for, and what a LoRA that says nothing of itself is taken for.
FOUR_STEPS = Settings(0, 4, 1.0, 1.0, "lcm")


def find_settings(
    model: str,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    default: Settings = Settings(),
) -> Settings:
    """What a model or LoRA was released with: its file says it, or `RELEASED`, or `default`.

    Args:
        model: `builtin`, a folder, or a Hub id.

    Raises:
        ValueError: the file holds something else; names it.
    """
    if str(model) in RELEASED:
        return RELEASED[str(model)]
    folder = sdxl.resolve_model(model)
    if folder == str(sdxl.BUILTIN_FOLDER):
        return RELEASED["builtin"]
    where = {"revision": revision, "local_files_only": local_files_only}
    with talk_to_hub(folder, revision, kind="model"):
        path = find_optional(folder, SETTINGS_FILE, **where)
    if path is None:
        return default
    found, kinds = read_json(path), {field.name: field.type for field in fields(Settings)}
    for name, value in found.items() if isinstance(found, dict) else [(str(found), None)]:
        right = {"int": int, "float": (int, float), "str": str}.get(kinds.get(name), ())
        if not isinstance(value, right) or isinstance(value, bool):
            raise ValueError(
                f"{path}: {name}: {value!r} is no setting of a removal; known are "
                f"{', '.join(f'{n} ({kind})' for n, kind in kinds.items())}"
            )
    return Settings(**found)


def save_settings(settings: Settings, folder) -> None:
    """Write `SETTINGS_FILE` into a model's or LoRA's folder."""
    write_json(Path(folder) / SETTINGS_FILE, dataclasses.asdict(settings))


def set_scheduler(pipe, kind: str) -> None:
    """Give a pipeline one of `SCHEDULERS`, with the training's noise schedule."""
    if kind == "lcm":
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    elif kind == "trailing":
        config = {**pipe.scheduler.config, "timestep_spacing": "trailing"}
        pipe.scheduler = type(pipe.scheduler).from_config(config)
