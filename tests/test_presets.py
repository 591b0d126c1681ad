"""What models were released with, and how calls take it."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from rorem_lib.models import lora, presets, sdxl
from rorem_lib.models.inpainting import ObjectRemover
from rorem_lib.models.presets import FOUR_STEPS, Settings, find_settings, save_settings


def draw_picture(side):
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    mask = np.zeros((side, side), np.uint8)
    mask[side // 3 : side // 2, side // 3 : side // 2] = 255
    return image, mask


def count_steps(remover, *given, **options):
    """The UNet's calls in one removal: images and latents a side that it sees."""
    seen = []
    hook = remover.pipe.unet.register_forward_pre_hook(
        lambda module, arguments: seen.append((len(arguments[0]), arguments[0].shape[-1]))
    )
    try:
        remover(*given, **options)
    finally:
        hook.remove()
    return seen


def test_released_models_are_used_as_their_authors_say():
    """LetsThink/RORem's README: 512 px, 50 steps, strength 0.99, no guidance."""
    assert find_settings("LetsThink/RORem") == Settings(512, 50, 1.0, 0.99)
    assert find_settings("LetsThink/RORem-mixed").strength == 0.99
    base = find_settings(sdxl.BASE_MODEL)
    assert base.resolution == 1024 and base.guidance_scale == 1 and base.strength < 1
    assert find_settings("builtin") == find_settings(str(sdxl.BUILTIN_FOLDER))


def test_a_folder_says_what_it_was_trained_for(tmp_path):
    assert find_settings(str(tmp_path)) == Settings()
    assert find_settings(str(tmp_path), default=FOUR_STEPS) == FOUR_STEPS
    given = Settings(768, 30, 1.5, 0.9, "trailing")
    save_settings(given, tmp_path)
    assert find_settings(str(tmp_path)) == given


@pytest.mark.parametrize(
    "content, text",
    [
        ({"steps": 4}, "steps: 4 is no setting.*num_inference_steps"),
        ({"strength": "1"}, "strength: '1'"),
        ({"resolution": True}, "resolution: True"),
        ({"scheduler": "euler"}, "euler.*default, trailing, lcm"),
        ([1], "is no setting"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path, content, text):
    (tmp_path / presets.SETTINGS_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=text):
        find_settings(str(tmp_path))


@pytest.fixture
def model(tiny_model, tmp_path):
    """The tiny model with settings of its own, and a LoRA of its UNet."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    save_settings(Settings(32, 3, 2.0, 0.7), folder)
    pipe = sdxl.load_pipeline(str(folder))
    lora.add_lora(pipe.unet, 2)
    torch.manual_seed(0)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    lora.save_lora(pipe.unet, tmp_path / "lora")
    return folder


def test_calls_take_the_models_settings_and_arguments_win(model):
    remover = ObjectRemover.from_pretrained(str(model), device="cpu", dtype="no")
    assert remover.settings == Settings(32, 3, 2.0, 0.7)
    image, mask = draw_picture(64)
    whole = {"mode": "full", "crop": False}
    # 0.7 of 3 steps are 2; guidance shows two images at once, of 8 latents a side
    assert count_steps(remover, image, mask, **whole) == [(2, 8)] * 2
    own = {"num_inference_steps": 4, "guidance_scale": 1.0, "strength": 1.0, "resolution": 64}
    assert count_steps(remover, image, mask, **whole, **own) == [(1, 16)] * 4


@pytest.mark.slow
@pytest.mark.parametrize("recorded", [False, True])
def test_a_lora_brings_its_own_and_can_be_left_out(model, tmp_path, recorded):
    image, mask = draw_picture(32)
    options = {"mode": "full", "crop": False}
    plain = ObjectRemover.from_pretrained(str(model), device="cpu", dtype="no")
    remover = ObjectRemover.from_pretrained(
        str(model), lora=str(tmp_path / "lora"), device="cpu", dtype="no", compile=recorded
    )
    assert isinstance(remover.pipe.scheduler, LCMScheduler)
    # LCM: 4 steps without guidance, at the LoRA's own 64 px
    assert count_steps(remover, image, mask, **options) == [(1, 16)] * 4
    first = remover(image, mask, **options)
    without = remover(image, mask, **options, use_lora=False)
    assert type(remover.pipe.scheduler) is DDIMScheduler and remover.settings == plain.settings
    assert (without == plain(image, mask, **options)).all(), "the very weights of before"
    assert (first != without).any()
    assert (remover(image, mask, **options) == first).all(), "and back again"
    save_settings(Settings(32, 2, 1.0, 1.0, "trailing"), tmp_path / "lora")
    told = ObjectRemover.from_pretrained(
        str(model), lora=str(tmp_path / "lora"), device="cpu", dtype="no"
    )
    assert count_steps(told, image, mask, **options) == [(1, 8)] * 2
    assert not isinstance(told.pipe.scheduler, LCMScheduler)


@pytest.mark.parametrize("kind", presets.SCHEDULERS)
def test_a_scheduler_takes_the_place_of_the_released_one(model, tmp_path, kind):
    """With the LoRA; without it the model keeps its own."""
    options = {"device": "cpu", "dtype": "no"}
    plain = ObjectRemover.from_pretrained(str(model), scheduler=kind, **options)
    laid = ObjectRemover.from_pretrained(
        str(model), lora=str(tmp_path / "lora"), scheduler=kind, **options
    )
    own = ObjectRemover.from_pretrained(str(model), **options).pipe.scheduler.config
    for remover in (plain, laid):
        assert isinstance(remover.pipe.scheduler, LCMScheduler) == (kind == "lcm")
        assert remover.settings.scheduler == kind
        spacing = "trailing" if kind == "trailing" else own.timestep_spacing
        assert kind == "lcm" or remover.pipe.scheduler.config.timestep_spacing == spacing
    laid(*draw_picture(32), use_lora=False)
    assert laid.pipe.scheduler.config == own
    with pytest.raises(ValueError, match="scheduler is 'euler': take one of default"):
        ObjectRemover.from_pretrained(str(model), scheduler="euler", **options)


def test_without_a_name_it_is_the_authors_model_and_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError, match="hf download LetsThink/RORem") as caught:
        ObjectRemover.from_pretrained(device="cpu")
    assert 'from_pretrained("builtin:remover")' in str(caught.value)
    with pytest.raises(FileNotFoundError, match="somebody/model") as caught:
        ObjectRemover.from_pretrained("somebody/model", device="cpu")
    assert "hf download" not in str(caught.value)
