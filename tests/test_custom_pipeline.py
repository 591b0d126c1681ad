"""What a published model's folder gives to people who have diffusers and not the kit."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForInpainting, DiffusionPipeline
from PIL import Image

from rorem_lib.builtin.scenes import render_scene
from rorem_lib.models import denoising, hub, presets, sdxl
from rorem_lib.models.inpainting import ObjectRemover

SETTINGS = presets.Settings(resolution=64, num_inference_steps=2, strength=0.9)


@pytest.fixture(scope="module")
def published(tiny_model, tmp_path_factory):
    """A trained model's folder, as the trainings write it."""
    folder = tmp_path_factory.mktemp("published") / "remover"
    pipe = sdxl.load_pipeline(str(tiny_model))
    with sdxl.silence_libraries():
        pipe.save_pretrained(folder)
    presets.save_settings(SETTINGS, folder)
    hub.write_card(folder, title="R", base_model="builtin", resolution=64, text="Trained.")
    return folder


@pytest.fixture(scope="module")
def photo():
    """(image, mask): a scene of 160 px, two and a half times the model's side."""
    scene = render_scene([9, 1], role="rord", size=160)
    mask = np.zeros((160, 160), np.uint8)
    mask[60:85, 50:80] = 255
    return Image.fromarray(scene.image), Image.fromarray(mask)


@pytest.fixture(scope="module")
def remover(published):
    return ObjectRemover.from_pretrained(str(published), device="cpu", dtype="no")


def open_custom(published, **options):
    return DiffusionPipeline.from_pretrained(
        published, custom_pipeline=str(published), trust_remote_code=True, **options
    )


@pytest.mark.parametrize("options", [{}, {"mode": "exact", "crop": False, "seed": 4}])
def test_the_pipeline_removes_as_the_kit_does(published, remover, photo, options):
    image, mask = photo
    given = open_custom(published)(image, mask, **options).images[0]
    wanted = np.array(remover(image, mask, **options))
    assert np.array_equal(np.array(given), wanted)
    assert not np.array_equal(wanted, np.array(image))


def test_masks_of_all_kinds_mean_what_they_mean_to_the_kit(published, photo, tmp_path):
    image, mask = photo
    pipe, plain = open_custom(published), np.array(mask)
    strokes = np.zeros((*plain.shape, 4), np.uint8)
    strokes[plain > 0] = (230, 30, 130, 255)
    image.save(tmp_path / "photo.png")
    Image.fromarray(strokes).save(tmp_path / "mask.png")
    first, *others = (
        np.array(pipe(tmp_path / "photo.png", kind).images[0])
        for kind in (mask, tmp_path / "mask.png", plain // 255, plain > 0)
    )
    assert not np.array_equal(first, np.array(image))
    assert all(np.array_equal(first, other) for other in others)


def test_images_and_masks_of_all_sizes_and_modes_are_taken_as_the_kit_takes_them(
    published, remover, photo, caplog
):
    image, mask = photo
    layered = image.copy()
    layered.putalpha(Image.linear_gradient("L").resize(image.size))
    array, empty = np.array(image), Image.new("L", mask.size)
    given = [layered, image.convert("L"), array, image]
    holes = [mask.resize((80, 80)), mask, np.array(mask), empty]
    pipe, numbers = open_custom(published), [5, 6, 7, 8]
    with caplog.at_level("WARNING"):
        made = pipe(given, holes, numbers=numbers).images
    assert len([r for r in caplog.records if "image 3: its mask is empty" in r.getMessage()]) == 1
    for one, wanted in zip(made, remover(given, holes, numbers=numbers), strict=True):
        assert type(one) is type(wanted) and np.array_equal(np.array(one), np.array(wanted))
    assert [getattr(one, "mode", None) for one in made] == ["RGBA", "L", None, "RGB"]
    assert np.array_equal(np.array(made[3]), array)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"numbers": [1, 2]}, "numbers is .*each of 1"),
        ({"mode": "whole"}, "mode is 'whole': take one of effect"),
        ({"num_inference_steps": 1.5}, "num_inference_steps is 1.5"),
        ({"resolution": -64}, "resolution is -64"),
        ({"guidance_scale": -1}, "guidance_scale is -1"),
        ({"strength": 2.0}, "strength is 2.0"),
        ({"candidates": 2}, "candidates is 2"),
    ],
)
def test_options_that_make_no_sense_are_named(published, photo, options, said):
    with pytest.raises(ValueError, match=said):
        open_custom(published)(*photo, **options)


def test_masks_that_do_not_fit_are_named(published, photo):
    image, mask = photo
    with pytest.raises(ValueError, match="mask is 160x30 px.*160x160 px"):
        open_custom(published)(image, mask.crop((0, 0, 160, 30)))
    with pytest.raises(ValueError, match="2 images but 1 masks"):
        open_custom(published)([image] * 2, [mask])


@pytest.mark.slow
def test_it_needs_no_kit(published, remover, photo, tmp_path):
    image, mask = photo
    image.save(tmp_path / "photo.png")
    mask.save(tmp_path / "mask.png")
    code = f"""
import sys
sys.modules["rorem_lib"] = None  # importing it fails
from diffusers import DiffusionPipeline
from PIL import Image
pipe = DiffusionPipeline.from_pretrained(
    {str(published)!r}, custom_pipeline={str(published)!r}, trust_remote_code=True)
found = pipe([Image.open("photo.png")] * 2, [Image.open("mask.png")] * 2).images
found[1].save("removed.png")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    wanted = remover([image] * 2, [mask] * 2)[1]
    assert np.array_equal(np.array(Image.open(tmp_path / "removed.png")), np.array(wanted))


def read_code(folder) -> list[str]:
    text = (folder / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_card_runs_as_it_stands(published, photo, tmp_path, monkeypatch):
    """The kit, the custom pipeline, and the stock pipeline against the kit's whole frame."""
    image, mask = photo
    monkeypatch.chdir(tmp_path)
    image.save("photo.png")
    mask.save("mask.png")
    ours, custom, stock = read_code(published)
    assert len(ours.strip().splitlines()) <= 5 and len(custom.strip().splitlines()) <= 4
    space = {"MODEL": str(published), "image": image, "mask": mask}
    exec(ours, space)
    assert Image.open("removed.png").size == image.size
    exec(custom, space)
    assert np.array_equal(np.array(space["result"]), np.array(Image.open("removed.png")))
    # The stock pipeline works at the size that it is given: the images have it.
    small = {"image": image.resize((64, 64)), "mask": mask.resize((64, 64))}
    for name in ("num_inference_steps=2", "strength=0.9", "height=64"):
        assert name in stock, name
    exec(
        stock.replace("prompt=", "generator=noise, prompt="),
        space | small | {"noise": denoising.make_generator(0, 0)},
        found := {},
    )
    remover = ObjectRemover.from_pretrained(str(published), device="cpu", dtype="no")
    wanted = remover(small["image"], small["mask"], mode="full", crop=False)
    assert np.array_equal(np.array(found["result"]), np.array(wanted))


def test_stock_diffusers_opens_the_folder(published):
    pipe = AutoPipelineForInpainting.from_pretrained(published)
    assert type(pipe).__name__ == "StableDiffusionXLInpaintPipeline"
    index = json.loads((published / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLInpaintPipeline"


def test_the_pipeline_takes_half_precision(published, photo):
    pipe = open_custom(published, torch_dtype=torch.bfloat16)
    image, mask = photo
    found = pipe(image, mask).images[0]
    outside = np.array(mask) == 0
    kept = (np.array(found) == np.array(image)).all(axis=2)
    assert kept[outside].mean() > 0.3 and not kept.all()


def test_a_lora_says_how_it_is_used(tmp_path):
    presets.save_settings(presets.FOUR_STEPS, tmp_path)
    hub.write_card(tmp_path, title="L", base_model="owner/remover", resolution=512, text="D.")
    ours, theirs = read_code(tmp_path)
    assert 'from_pretrained("owner/remover", lora=LORA)' in ours
    assert "LCMScheduler.from_config" in theirs and "load_lora_weights(LORA)" in theirs
    assert "num_inference_steps=4" in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "pipeline.py").exists()


def test_the_generated_file_is_whole(published, tmp_path):
    """Every name in it is defined, and nothing of the kit is imported."""
    path = published / "pipeline.py"
    text = path.read_text()
    assert "import rorem_lib" not in text and "from rorem_lib" not in text
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E9", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "SETTINGS = {'resolution': 64" in text
