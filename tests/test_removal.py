"""Inference: any size in, the same size out; noise by number; candidate sets that go on."""

import itertools
import json
import os
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from cells import CellFailed, run_cells
from forked import Job, run_job
from PIL import ExifTags, Image, ImageCms
from safetensors.torch import load_file, save_file

from rorem_lib import removal
from rorem_lib.data.pictures import load_image, load_mask
from rorem_lib.data.triplets import load_images, read_triplets
from rorem_lib.data.writer import OWNED, TripletWriter
from rorem_lib.files import lock_folder
from rorem_lib.models import denoising, inpainting, sdxl
from rorem_lib.models.composition import shrink
from rorem_lib.models.crops import frame_crop
from rorem_lib.models.inpainting import ObjectRemover
from rorem_lib.removal import GenerateConfig, generate_candidates

ROOT = Path(__file__).resolve().parents[1]
QUICK = {"num_inference_steps": 2}


def remove_objects(pipe, images, masks, **options):
    """Removals as the stages make them: all of the frame is the remover's."""
    whole = {"mode": "full", "crop": False}
    return ObjectRemover(pipe)(images, masks, **whole | options)


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return sdxl.load_pipeline(str(tiny_model))


def fit_frame(image, mask, resolution, unit):
    """The whole frame as the model sees it."""
    height, width = mask.shape
    return shrink(image, mask, frame_crop(width, height, resolution, unit).size[::-1])


def draw_picture(height, width, seed=0):
    """An image of fine detail with a mask in its middle."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[height // 3 : height // 2, width // 3 : width // 2] = 255
    return image, mask


def assert_near(a, b):
    """The same up to the rounding of another batch size's matrix products."""
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


@pytest.mark.parametrize(
    "height, width",
    [(64, 64), (75, 100), (500, 333), (41, 40), (96, 96), (96, 130), (64, 70), (30, 200)],
)
def test_any_size_comes_back_as_it_went_in(pipe, height, width):
    image, mask = draw_picture(height, width)
    before = image.copy(), mask.copy()
    (result,) = remove_objects(pipe, [image], [mask], **QUICK | {"num_inference_steps": 1})
    assert result.shape == image.shape and result.dtype == np.uint8
    assert np.array_equal(image, before[0]) and np.array_equal(mask, before[1])


def get_latent_sides(pipe, size=(64, 64), **options):
    """Sides of the latents that the UNet sees while an image of `size` is worked on."""
    seen = set()
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, arguments, keywords: seen.add(tuple(arguments[0].shape[-2:])),
        with_kwargs=True,
    )
    image, mask = draw_picture(*size)
    try:
        remove_objects(pipe, [image], [mask], num_inference_steps=1, **options)
    finally:
        hook.remove()
    return seen


def test_the_size_is_what_was_trained_not_what_sample_size_says(tiny_model, tmp_path, caplog):
    """`sample_size` says 1024 px in every SDXL-inpainting model, whatever it was trained at."""
    pipe = sdxl.load_pipeline(str(tiny_model))
    assert sdxl.get_resolution(pipe) == 64 and pipe.vae_scale_factor == 4
    pipe.unet.register_to_config(sample_size=32)
    assert get_latent_sides(pipe, (96, 96)) == {(16, 16)}
    assert get_latent_sides(pipe, (96, 160), resolution=96) == {(24, 40)}
    sdxl.set_resolution(pipe, pipe.unet, 96)
    pipe.unet.register_to_config(sample_size=32)
    pipe.save_pretrained(tmp_path / "saved")
    again = sdxl.load_pipeline(str(tmp_path / "saved"))
    assert get_latent_sides(again) == {(24, 24)}


@pytest.mark.slow
def test_a_model_that_does_not_say_its_size_works_at_512(tiny_model, tmp_path, caplog):
    folder = shutil.copytree(tiny_model, tmp_path / "silent")
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    del config[sdxl.TRAINED_RESOLUTION]
    path.write_text(json.dumps(config | {"sample_size": 32}))
    with caplog.at_level("INFO", logger="rorem_lib"):
        silent = sdxl.load_pipeline(str(folder))
        assert get_latent_sides(silent, resolution=64) == {(16, 16)}
        assert not caplog.text, "a size that is given needs no other"
        assert get_latent_sides(silent) == {(128, 128)}
        assert sdxl.get_resolution(silent) == 512
    assert caplog.text.count("512 px") == 1 and str(folder) in caplog.text


@pytest.mark.parametrize("said", ["abc", [64], {}, True, -64, 1e12, 64.0, 0])
def test_a_size_that_cannot_be_is_not_taken(pipe, monkeypatch, caplog, said):
    monkeypatch.setattr(
        pipe.unet, "_internal_dict", {**pipe.unet.config, sdxl.TRAINED_RESOLUTION: said}
    )
    monkeypatch.setattr(pipe, "told_resolution", False, raising=False)
    with caplog.at_level("INFO", logger="rorem_lib"):
        assert sdxl.get_resolution(pipe) == 512
    assert pipe.origin in caplog.text and repr(said) in caplog.text


def test_other_programs_take_the_note_of_the_size_without_a_word(tiny_model, caplog):
    from diffusers import AutoPipelineForInpainting

    with caplog.at_level("WARNING", logger="diffusers"):
        stock = AutoPipelineForInpainting.from_pretrained(tiny_model)
    assert not [r for r in caplog.records if sdxl.TRAINED_RESOLUTION in r.getMessage()]
    assert stock.unet.config.sample_size * stock.vae_scale_factor == 64


@pytest.mark.parametrize("precision, vae", [("fp16", torch.float32), ("bf16", torch.bfloat16)])
def test_lower_precision_is_the_weights_and_in_fp16_not_the_vaes(
    tiny_model, monkeypatch, precision, vae
):
    """SDXL's VAE overflows in fp16; latents stay float32 between the steps. No call casts weights:
    every one that a layer computes with is the very tensor that was opened."""
    remover = ObjectRemover.from_pretrained(str(tiny_model), device="cpu", dtype=precision)
    pipe = remover.pipe
    seen, casts = {"unet": set(), "vae": set(), "steps": set()}, []

    def note(name):
        return lambda module, inputs, output: seen[name].add(output.dtype)

    hooks = [pipe.unet.conv_in.register_forward_hook(note("unet"))]
    hooks += [
        module.register_forward_hook(note("vae"))
        for module in pipe.vae.modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    step = type(pipe.scheduler).step
    monkeypatch.setattr(
        type(pipe.scheduler),
        "step",
        lambda self, output, t, sample, **options: (
            seen["steps"].update({output.dtype, sample.dtype}),
            step(self, output, t, sample, **options),
        )[1],
    )
    weights = {p.data_ptr() for part in (pipe.unet, pipe.vae) for p in part.parameters()}

    class CountCasts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in weights:
                casts.append(tuple(args[0].shape))
            return func(*args, **kwargs or {})

    with CountCasts():
        remover(*draw_picture(64, 64), mode="full", crop=False, num_inference_steps=2)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert seen == {"unet": {half}, "vae": {vae}, "steps": {torch.float32}}
    assert casts == []


def test_offloading_leaves_the_weights_on_the_cpu(tiny_model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    """diffusers' own hooks move each part while it works; here there is no GPU to move it to."""
    asked = []
    kind = sdxl.StableDiffusionXLInpaintPipeline
    monkeypatch.setattr(kind, "enable_model_cpu_offload", lambda self, device: asked.append(device))
    remover = ObjectRemover.from_pretrained(
        str(tiny_model), device="cuda", dtype="no", offload=True
    )
    assert asked == ["cuda"] and remover.networks.device.type == "cuda"
    assert remover.pipe.unet.device.type == remover.pipe.vae.device.type == "cpu"
    with pytest.raises(ValueError, match="offload.*device is cpu"):
        ObjectRemover.from_pretrained(str(tiny_model), device="cpu", offload=True)


def make_kl(**options):
    """SDXL's kind of VAE, as small as the tiny model's."""
    return sdxl.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 8, 16],
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        **options,
    ).eval()


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_large_frames_alone_go_through_the_vae_in_tiles(tiny_model, monkeypatch, way):
    pipe, seen = sdxl.load_pipeline(str(tiny_model)), []
    pipe.vae = make_kl()
    pass_on = getattr(pipe.vae, way)
    monkeypatch.setattr(
        pipe.vae, way, lambda *a, **k: seen.append(pipe.vae.use_tiling) or pass_on(*a, **k)
    )
    monkeypatch.setattr(denoising, "TILED_PIXELS", 64 * 64)
    for size in ((64, 64), (64, 128), (64, 64)):
        remove_objects(pipe, *([x] for x in draw_picture(*size)), num_inference_steps=1)
    assert seen == [False, True, False]


@pytest.mark.slow
def test_a_recorded_unet_removes_the_same_bit_for_bit(tiny_model):
    options = {"device": "cpu", "dtype": "no"}
    plain = ObjectRemover.from_pretrained(str(tiny_model), **options)
    fast = ObjectRemover.from_pretrained(str(tiny_model), **options, compile=True)
    calls, forward = [], type(fast.pipe.unet).forward
    fast.pipe.unet.forward = lambda *a, **k: calls.append(1) or forward(fast.pipe.unet, *a, **k)
    for size in ((64, 64), (64, 96), (64, 64), (64, 64)):
        for guidance in (1.0, 2.0):
            given = {"mode": "full", "crop": False, "guidance_scale": guidance, **QUICK}
            a, b = (remover(*draw_picture(*size), **given) for remover in (plain, fast))
            assert np.array_equal(a, b)
    assert len(calls) == 4, "once each size of batch and image"
    assert count_calls(fast.pipe, 3, 1.0) == [1] * 3, "who watches its calls sees them"


def test_on_gpus_the_repeated_blocks_are_compiled(tiny_model, monkeypatch):
    used = []
    monkeypatch.setattr(inpainting, "compile_unet", lambda unet: used.append(unet))
    remover = ObjectRemover.from_pretrained(str(tiny_model), device="meta", compile=True)
    assert used == [remover.pipe.unet]


def test_the_best_device_is_taken_and_words_are_kept(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert sdxl.choose_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="device is cuda:2, and torch .* finds 2"):
        sdxl.choose_device("cuda:2")
    with pytest.raises(ValueError, match="device is 'gpu': take auto, cpu, cuda"):
        sdxl.choose_device("gpu")
    for cuda, mps, device in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert sdxl.choose_device() == device
    assert sdxl.choose_precision("auto", "mps") == "fp16"


def test_choosing_among_candidates_needs_a_chooser(pipe):
    with pytest.raises(ValueError, match="candidates is 3.*discriminator"):
        ObjectRemover(pipe)(*draw_picture(64, 64), candidates=3)


def test_a_removal_depends_on_its_number_not_on_its_batch(pipe):
    pictures = [
        draw_picture(*size, seed=n)
        for n, size in enumerate([(64, 64), (75, 100), (64, 64), (64, 64)])
    ]
    images, masks = map(list, zip(*pictures))
    whole = remove_objects(pipe, images, masks, batch_size=4, **QUICK)
    for a, b in zip(whole, remove_objects(pipe, images, masks, batch_size=1, **QUICK)):
        assert_near(a, b)
    turned = remove_objects(pipe, images[::-1], masks[::-1], numbers=[3, 2, 1, 0], **QUICK)
    for a, b in zip(whole, turned[::-1]):
        assert_near(a, b)
    again = remove_objects(pipe, images, masks, batch_size=4, **QUICK)
    assert all(np.array_equal(a, b) for a, b in zip(whole, again))


def test_noise_comes_from_seed_and_number(pipe):
    image, mask = draw_picture(64, 64)
    a, b = remove_objects(pipe, [image, image], [mask, mask], **QUICK)
    (other,) = remove_objects(pipe, [image], [mask], seed=1, **QUICK)
    assert np.abs(a.astype(int) - b).mean() > 1 and np.abs(a.astype(int) - other).mean() > 1


def test_a_large_pictures_detail_survives_outside_the_mask(pipe):
    image, mask = draw_picture(320, 480)
    (result,) = remove_objects(pipe, [image], [mask], **QUICK)
    far = cv2.dilate(mask, np.ones((25, 25), np.uint8)) == 0

    def find_detail(picture):
        picture = picture.astype(np.float32)
        return picture - cv2.GaussianBlur(picture, (0, 0), 2)

    kept = np.corrcoef(find_detail(result)[far].ravel(), find_detail(image)[far].ravel())[0, 1]
    inner = cv2.erode(mask, np.ones((11, 11), np.uint8)) > 0
    lost = np.corrcoef(find_detail(result)[inner].ravel(), find_detail(image)[inner].ravel())[0, 1]
    assert kept > 0.7 and abs(lost) < 0.2, (kept, lost)


def test_pasting_back_keeps_every_pixel_outside_the_wide_mask(pipe):
    for size in ((64, 64), (90, 120)):
        image, mask = draw_picture(*size)
        removal = ObjectRemover(pipe).remove(
            image, mask, dilate=5, mode="exact", crop=False, **QUICK
        )
        result, wide = removal.image, cv2.dilate(mask, np.ones((25, 25), np.uint8))
        assert not removal.effect[wide == 0].any(), "the hole and a feathered rim alone"
        assert np.array_equal(result[wide == 0], image[wide == 0])
        assert not np.array_equal(result[wide > 0], image[wide > 0])


def test_a_thin_mask_does_not_get_lost_in_a_smaller_picture():
    image, mask = draw_picture(640, 640)
    mask[:] = 0
    mask[100, 50:400] = 255
    small, thin = fit_frame(image, mask, 64, 8)
    assert small.shape[:2] == thin.shape == (64, 64)
    assert (thin[10, 6:39] == 255).all() and set(np.unique(thin)) == {0, 255}


def test_an_image_longer_than_photographs_are_is_made_smaller():
    image, mask = draw_picture(3, 2000)
    small, _ = fit_frame(image, mask + 255, 64, 8)
    assert small.shape == (8, 512, 3)
    small, _ = fit_frame(*draw_picture(100, 800), 64, 8)
    assert small.shape == (64, 512, 3)


@pytest.mark.parametrize(
    "steps, guidance, calls, pictures", [(20, 1.0, 20, 1), (4, 1.0, 4, 1), (3, 3.0, 3, 2)]
)
def test_each_step_is_one_call_of_the_unet(pipe, steps, guidance, calls, pictures):
    assert count_calls(pipe, steps, guidance) == [pictures] * calls


def test_lcm_runs_all_of_its_four_steps(tiny_model):
    from diffusers import LCMScheduler

    fast = sdxl.load_pipeline(str(tiny_model))
    fast.scheduler = LCMScheduler.from_config(fast.scheduler.config)
    assert count_calls(fast, 4, 1.0) == [1] * 4


def count_calls(pipe, steps, guidance):
    seen = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, arguments, keywords: seen.append(len(arguments[0])), with_kwargs=True
    )
    image, mask = draw_picture(64, 64)
    try:
        remove_objects(
            pipe,
            [image],
            [mask],
            num_inference_steps=steps,
            guidance_scale=guidance,
        )
    finally:
        hook.remove()
    return seen


def test_mismatched_inputs_are_named(pipe):
    image, mask = draw_picture(64, 64)
    with pytest.raises(ValueError, match="2 images but 1 masks"):
        remove_objects(pipe, [image, image], [mask])
    with pytest.raises(ValueError, match="image 1.*mask is 30x64 px.*64x64 px"):
        remove_objects(pipe, [image, image], [mask, mask[:, :30]])
    with pytest.raises(ValueError, match="resolution is -64: take 1 or more px"):
        remove_objects(pipe, [image], [mask], resolution=-64)
    with pytest.raises(ValueError, match="num_inference_steps.*-1:.*1"):
        remove_objects(pipe, [image], [mask], num_inference_steps=-1)
    with pytest.raises(ValueError, match="strength is 0.1: of 4 steps .* 10 steps"):
        remove_objects(pipe, [image], [mask], num_inference_steps=4, strength=0.1)
    with pytest.raises(ValueError, match="mode is 'whole': take one of effect, exact, full"):
        remove_objects(pipe, [image], [mask], mode="whole")
    with pytest.raises(ValueError, match="dtype is 'BF16': .*bf16"):
        ObjectRemover.from_pretrained(pipe.origin, dtype="BF16")
    assert remove_objects(pipe, [], []) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_inference_steps": 1.5}, "num_inference_steps is 1.5"),
        ({"resolution": None}, "resolution is None"),
        ({"candidates": 0}, "candidates is 0: take 1"),
        ({"seed": -1}, "seed is -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"numbers": []}, "numbers is .*each of 1"),
        ({"numbers": 7}, "numbers is 7"),
        ({"names": "abc"}, "names is 'abc'"),
    ],
)
def test_options_of_the_wrong_kind_are_named(pipe, options, said):
    image, mask = draw_picture(64, 64)
    with pytest.raises(ValueError, match=said):
        remove_objects(pipe, [image], [mask], **options)


@pytest.mark.parametrize("mask", ["mask.png", Image.new("L", (64, 64)), None])
def test_images_in_a_list_need_masks_in_a_list(pipe, mask):
    with pytest.raises(ValueError, match="a list of masks"):
        remove_objects(pipe, [draw_picture(64, 64)[0]] * 2, mask)


def test_classical_methods_fill_the_hole_alone():
    image, mask = draw_picture(64, 64)
    image[:] = 90
    image[mask > 0] = 250
    for method in ("telea", "ns"):
        result = inpainting.inpaint_classical(image, mask, method=method)
        assert np.abs(result.astype(int) - 90).max() <= 2
    with pytest.raises(ValueError, match="take telea or ns"):
        inpainting.inpaint_classical(image, mask, method="lama")


# ------------------------------------------------------------------------------- candidate sets


@pytest.fixture
def config(tiny_model, tiny_set, tmp_path):
    return GenerateConfig(
        output_dir=str(tmp_path / "out"),
        meta_path=[str(tiny_set)],
        pretrained_model_name_or_path=str(tiny_model),
        num_inference_steps=1,
        batch_size=2,
        mixed_precision="no",
    )


def read_results(config):
    folder = Path(config.output_dir) / "candidates"
    return {t.id: load_images(t)["gt"] for t in read_triplets(folder)}


def test_candidates_are_a_triplet_set(config, tiny_set):
    metrics = generate_candidates(config)
    assert metrics["n_images"] == metrics["n_removals"] == 10
    written = json.loads((Path(config.output_dir) / "train_metrics.json").read_text())
    assert written == metrics
    sources = {t.id: t for t in read_triplets(tiny_set)}
    for triplet in read_triplets(Path(config.output_dir) / "candidates"):
        original = sources[triplet.id]
        assert triplet.source.read_bytes() == original.source.read_bytes()
        assert triplet.mask.read_bytes() == original.mask.read_bytes()
        assert triplet.gt.read_bytes() != original.gt.read_bytes()
        assert triplet.group == original.group
        assert triplet.extra["remover"] == config.pretrained_model_name_or_path


def test_several_seeds_a_picture_and_a_part_of_the_set(config, tiny_set):
    config.start, config.count, config.seeds_per_image = 3, 2, 3
    generate_candidates(config)
    found = read_results(config)
    assert sorted(found) == [f"scene-{n}-s{k}" for n in (3, 4) for k in range(3)]
    assert not np.array_equal(found["scene-3-s0"], found["scene-3-s1"])
    groups = {
        t.id: (t.group, t.extra["seed"])
        for t in read_triplets(Path(config.output_dir) / "candidates")
    }
    assert groups["scene-4-s2"] == ("scene-4", 2)
    # what an image becomes does not depend on which part of the set was asked for
    config.output_dir, config.start, config.count = config.output_dir + "2", 4, 3
    generate_candidates(config)
    assert_near(read_results(config)["scene-4-s1"], found["scene-4-s1"])


def test_methods_take_turns(config, tiny_set, tiny_model):
    config.also = [str(tiny_model), "telea"]
    config.pretrained_model_name_or_path = "ns"
    generate_candidates(config)
    triplets = read_triplets(Path(config.output_dir) / "candidates")
    assert [t.extra["remover"] for t in triplets[:4]] == ["ns", str(tiny_model), "telea", "ns"]
    for triplet in triplets[2], triplets[3]:
        pictures = load_images(triplet)
        assert np.array_equal(
            pictures["gt"],
            inpainting.inpaint_classical(
                pictures["source"], pictures["mask"], method=triplet.extra["remover"]
            ),
        )
    outside = load_images(triplets[1])["mask"] < 128  # a model's removal is no paste-back
    assert (load_images(triplets[1])["gt"] != load_images(triplets[1])["source"])[outside].any()


def test_candidates_of_another_mode_keep_the_rest_and_are_another_set(config):
    config.count = 2
    generate_candidates(config)
    marker = Path(config.output_dir) / "candidates" / "settings.json"
    assert not {"mode", "crop"} & json.loads(marker.read_text()).keys(), "an earlier release's"
    config.mode = "exact"
    generate_candidates(config)
    assert json.loads(marker.read_text())["mode"] == "exact"
    assert len(list(Path(config.output_dir).glob("candidates.*"))) == 1
    for triplet in read_triplets(Path(config.output_dir) / "candidates"):
        pictures = load_images(triplet)
        same = (pictures["gt"] == pictures["source"]).all(axis=2)
        assert same[pictures["mask"] < 128].mean() > 0.3 and not same.all()


def test_candidates_are_drawn_at_the_resolution_asked_for(config, monkeypatch):
    seen, remove = [], ObjectRemover.__call__

    def note(*given, resolution, **options):
        seen.append(resolution)
        return remove(*given, resolution=resolution, **options)

    monkeypatch.setattr(ObjectRemover, "__call__", note)
    config.count, config.resolution = 1, 32
    generate_candidates(config)
    assert seen == [32]


@pytest.mark.parametrize(
    "changes",
    [
        {"count": -1},
        {"start": -2},
        {"resolution": -64},
        {"seeds_per_image": 0},
        {"num_inference_steps": 0},
        {"batch_size": 0},
        {"dilate": []},
        {"mixed_precision": "fp32"},
        {"mode": "whole"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_that_make_no_sense_are_named(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"^{name} is .*take "):
        GenerateConfig(**changes)


def test_moved_models_and_more_images_go_on_where_it_was(config, tmp_path, monkeypatch):
    seen, remove = [], ObjectRemover.__call__

    def note(pipe, images, *given, **options):
        seen.extend(options["numbers"])
        return remove(pipe, images, *given, **options)

    monkeypatch.setattr(ObjectRemover, "__call__", note)
    config.start, config.count = 2, 1
    generate_candidates(config)
    moved = shutil.copytree(config.pretrained_model_name_or_path, tmp_path / "moved")
    config.pretrained_model_name_or_path, config.start, config.count = str(moved), 1, 3
    generate_candidates(config)
    assert sorted(read_results(config)) == ["scene-1", "scene-2", "scene-3"]
    assert seen == [2, 1, 3] and not list(Path(config.output_dir).glob("candidates.*"))
    scheduler = moved / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text() + " ")
    generate_candidates(config)  # the weights are the same, what is made with them may not be
    assert seen[3:] == [1, 2, 3] and len(list(Path(config.output_dir).glob("candidates.*"))) == 1
    config.count = 1
    generate_candidates(config)
    assert sorted(read_results(config)) == ["scene-1"], "a set has what was asked for"


def test_what_other_settings_made_is_set_aside_not_deleted(config):
    config.count = 1
    generate_candidates(config)
    first = read_results(config)["scene-0"]
    config.resolution = 32
    generate_candidates(config)
    (aside,) = Path(config.output_dir).glob("candidates.*")
    (old,) = read_triplets(aside)
    assert np.array_equal(load_images(old)["gt"], first)
    assert not np.array_equal(read_results(config)["scene-0"], first)


def copy_set(tiny_set, folder):
    """A set with files of its own, not linked to others."""
    with TripletWriter(folder) as writer:
        for triplet in read_triplets(tiny_set)[:2]:
            pictures = load_images(triplet)
            writer.add(id=triplet.id, source=pictures["source"], mask=pictures["mask"])
    return folder


@pytest.mark.parametrize("part", ["source", "mask"])
def test_an_image_that_was_overwritten_in_place_gets_a_new_candidate(
    config, tiny_set, tmp_path, part
):
    """The candidates' files are hard links to the pool's: both change at once."""
    config.meta_path = [str(copy_set(tiny_set, tmp_path / "pool"))]
    generate_candidates(config)
    first = read_results(config)
    triplet = read_triplets(tmp_path / "pool", require_gt=False)[1]
    path = getattr(triplet, part)
    assert path.stat().st_nlink > 1
    linked = tmp_path / "linked.png"
    linked.hardlink_to(path)
    before = path.stat()
    image = load_image(linked, "RGB" if part == "source" else "L")
    ok, data = cv2.imencode(".png", image[::-1])
    linked.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    generate_candidates(config)
    (aside,) = Path(config.output_dir).glob("candidates.*")
    second = read_results(config)
    assert np.array_equal(load_images(read_triplets(aside)[0])["gt"], first["scene-0"])
    assert np.array_equal(second["scene-0"], first["scene-0"])
    assert not np.array_equal(second["scene-1"], first["scene-1"])


def test_candidates_of_an_earlier_release_stay(config, caplog):
    config.count = 1
    generate_candidates(config)
    marker = Path(config.output_dir) / "candidates" / "settings.json"
    noted = json.loads(marker.read_text())
    del noted["images"]  # it noted none
    marker.write_text(json.dumps(noted))
    (marker.parent / OWNED).unlink()  # and marked no set
    first = read_results(config)
    config.count = 2
    generate_candidates(config)
    assert np.array_equal(read_results(config)["scene-0"], first["scene-0"])
    assert not list(Path(config.output_dir).glob("candidates.*"))
    assert sorted(json.loads(marker.read_text())["images"]) == ["scene-0", "scene-1"]


def test_a_folder_is_generated_in_by_one_process_at_a_time(config, monkeypatch):
    monkeypatch.setattr(removal, "_open_method", None)  # nothing is loaded before
    with lock_folder(config.output_dir):
        with pytest.raises(BlockingIOError, match=str(os.getpid())):
            generate_candidates(config)
    assert not (Path(config.output_dir) / "candidates").exists()


def test_a_clock_that_is_set_back_takes_no_seconds_away(config, monkeypatch, caplog):
    moments = itertools.count(2e9, -3600)
    monkeypatch.setattr("time.time", lambda: next(moments))
    config.count = 2
    with caplog.at_level("INFO", logger="rorem_lib"):
        metrics = generate_candidates(config)
    assert metrics["seconds"] > 0 and metrics["removals_per_second"] > 0
    assert not re.search(r"-\d+ s left", caplog.text)


# ---------------------------------------------------------------------- numbers that are not finite


@pytest.fixture
def broken(tiny_model, tmp_path):
    """A model with one weight that is NaN."""
    folder = shutil.copytree(tiny_model, tmp_path / "broken")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, weights)
    return folder


def test_one_nan_in_a_model_is_an_error_that_names_it_and_the_image(broken, config, tiny_set):
    image, mask = draw_picture(64, 64)
    pipe = sdxl.load_pipeline(str(broken))
    with pytest.raises(FloatingPointError, match=f"{broken}.*image 0"):
        remove_objects(pipe, [image], [mask], **QUICK)
    with pytest.raises(FloatingPointError, match=f"{broken}.*lake.jpg"):
        remove_objects(pipe, [image], [mask], names=["lake.jpg"], **QUICK)
    config.pretrained_model_name_or_path = str(broken)
    source = read_triplets(tiny_set)[0].source
    with pytest.raises(FloatingPointError, match=f"{broken}.*{source}"):
        generate_candidates(config)
    assert not TripletWriter(Path(config.output_dir) / "candidates").done_ids


@pytest.mark.parametrize("finite", [True, False])
def test_a_vae_that_overflows_in_half_precision_decodes_again_in_float32(
    tiny_model, monkeypatch, finite
):
    pipe = sdxl.load_pipeline(str(tiny_model), dtype=torch.bfloat16)
    image, mask = draw_picture(64, 64)
    (whole,) = remove_objects(pipe, [image], [mask], **QUICK)
    decode, seen = type(pipe.vae).decode, []

    def overflow(self, latents, *args, **options):
        seen.append(self.dtype)
        decoded = decode(self, latents, *args, **options)
        if self.dtype == torch.bfloat16 or not finite:
            decoded[0][:] = float("inf")
        return decoded

    monkeypatch.setattr(type(pipe.vae), "decode", overflow)
    before = pipe.vae.__dict__.keys()
    if finite:
        (result,) = remove_objects(pipe, [image], [mask], **QUICK)
        assert np.abs(result.astype(int) - whole).mean() < 4  # bf16 has 8 bits
    else:
        with pytest.raises(FloatingPointError):
            remove_objects(pipe, [image], [mask], **QUICK)
    assert seen == [torch.bfloat16, torch.float32] and pipe.vae.dtype == torch.bfloat16
    assert pipe.vae.__dict__.keys() == before


# ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stopped_generation_goes_on(config, monkeypatch):
    generate_candidates(config)
    whole = read_results(config)
    config.output_dir += "2"
    calls, remove = [], ObjectRemover.__call__

    def stop_in_second_call(pipe, images, *args, **options):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return remove(pipe, images, *args, **options)

    monkeypatch.setattr(ObjectRemover, "__call__", stop_in_second_call)
    with pytest.raises(KeyboardInterrupt):
        generate_candidates(config)
    assert not (Path(config.output_dir) / "candidates" / "meta.json").exists()
    generate_candidates(config)
    assert calls == [8, 2, 2], "what was there has been made again"
    resumed = read_results(config)
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert_near(whole[name], resumed[name])
    generate_candidates(config)
    assert calls == [8, 2, 2], "a finished set was made again"


def test_what_other_settings_left_is_written_anew(config, tiny_set, tmp_path):
    config.count = 4
    generate_candidates(config)
    first = read_results(config)
    config.seed, config.count = 5, 3
    generate_candidates(config)
    second = read_results(config)
    assert sorted(second) == ["scene-0", "scene-1", "scene-2"]
    assert not any(np.array_equal(first[n], second[n]) for n in second)
    files = list((Path(config.output_dir) / "candidates" / "GT").iterdir())
    assert len(files) == 3


def test_several_dilations_take_turns_and_the_mask_stays(config, tiny_set, monkeypatch):
    config.count, config.seeds_per_image, config.dilate = 2, 3, [0, 9]
    seen, remove = [], ObjectRemover.__call__

    def remember(pipe, sources, object_masks, **rest):
        seen.extend(object_masks)
        return remove(pipe, sources, object_masks, **rest)

    monkeypatch.setattr(ObjectRemover, "__call__", remember)
    generate_candidates(config)
    made = read_triplets(Path(config.output_dir) / "candidates")
    assert [t.extra["dilate"] for t in made] == [0, 9, 0] * 2
    for triplet, used in zip(made, seen, strict=True):
        mask = load_images(triplet)["mask"]
        own = next(t for t in read_triplets(tiny_set) if t.id == triplet.group)
        assert np.array_equal(mask, load_images(own)["mask"])
        kernel = np.ones((9, 9), np.uint8)
        wide = cv2.dilate(mask, kernel) if triplet.extra["dilate"] else mask
        assert np.array_equal(used >= 128, wide >= 128)


def test_bad_sets_are_errors(config, tiny_set):
    config.start = 10
    with pytest.raises(ValueError, match="no images at .* from number 10 on"):
        generate_candidates(config)
    config.start, config.meta_path = 0, [str(tiny_set)] * 2
    with pytest.raises(ValueError, match="share ids, such as scene-0"):
        generate_candidates(config)


def test_what_others_keep_in_candidates_is_left_alone(config):
    folder = Path(config.output_dir) / "candidates"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="no set of candidates"):
        generate_candidates(config)
    assert [p.name for p in folder.iterdir()] == ["mine.txt"]


def test_candidates_are_not_made_of_themselves(config):
    config.count = 2
    generate_candidates(config)
    before = read_results(config)
    config.meta_path = [str(Path(config.output_dir) / "candidates" / "meta.json")]
    with pytest.raises(ValueError, match="choose another output_dir"):
        generate_candidates(config)
    assert read_results(config).keys() == before.keys()


def test_ids_that_cannot_name_files_are_told_before_any_removal(config, tmp_path, monkeypatch):
    records = json.loads(Path(config.meta_path[0]).read_text())
    folder = shutil.copytree(Path(config.meta_path[0]).parent, tmp_path / "foreign")
    records[7]["id"] = "字" * 80
    (folder / "meta.json").write_text(json.dumps(records))
    config.meta_path = [str(folder)]
    monkeypatch.setattr(ObjectRemover, "__call__", None)
    with pytest.raises(ValueError, match="cannot name a triplet's files"):
        generate_candidates(config)
    assert not Path(config.output_dir).exists()


def test_a_candidate_that_a_lost_power_emptied_is_made_anew(config):
    config.count = 3
    generate_candidates(config)
    before = read_results(config)
    (Path(config.output_dir) / "candidates/GT/scene-1.png").write_bytes(b"")
    generate_candidates(config)
    after = read_results(config)
    assert after.keys() == before.keys()
    assert_near(after["scene-1"], before["scene-1"])


def test_pools_need_no_ground_truth(config, tiny_set, tmp_path):
    with TripletWriter(tmp_path / "pool") as writer:
        for triplet in read_triplets(tiny_set)[:2]:
            writer.add(id=triplet.id, source=triplet.source, mask=triplet.mask)
    config.meta_path = [str(tmp_path / "pool")]
    assert generate_candidates(config)["n_removals"] == 2


@pytest.mark.slow
def test_two_processes_make_what_one_makes(config):
    generate_candidates(config)
    alone = read_results(config)
    folder = Path(config.output_dir + "2")
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(vars(config) | {"output_dir": str(folder)}))
    words, log = ["--config", str(folder / "config.yaml")], folder / "job.log"
    job = Job(run_job, "rorem_lib.removal", words, processes=2, log=log)
    assert job.wait() == 0, job.read_log()[-3000:]
    assert json.loads((folder / "train_metrics.json").read_text())["num_processes"] == 2
    config.output_dir = str(folder)
    both = read_results(config)
    assert list(both) == list(alone)
    for name in alone:
        assert_near(alone[name], both[name])
    assert not list((folder / "candidates").glob("*.partial"))


# --------------------------------------------------------------------- an image and mask of yours


@pytest.mark.slow
def test_notebook_00_opens_on_the_photo_that_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # as in JupyterLab a relative path counts from where one is
    parameters = {
        "output_dir": str(tmp_path / "out"),
        "removals": 2,
        "num_inference_steps": 2,
        "scenes": [0],
    }
    run_cells(ROOT / "notebooks/00_remove_objects.ipynb", tmp_path / "done.ipynb", parameters)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["remover"] == "builtin:remover"
    assert metrics["files"] == ["coffee-1.png", "coffee-2.png"]
    assert {p.stem for p in (tmp_path / "out/figures").iterdir()} == {
        *("removals", "closely", "changes", "scenes")
    }
    assert load_image(tmp_path / "out/coffee-2.png").shape == (400, 600, 3)
    told = (tmp_path / "done.ipynb").read_text()
    assert "LetsThink/RORem" in told and "no model for photographs" in told
    # a photo of one's own, of the same folder: the first results stay
    Image.fromarray(load_image(tmp_path / "out/coffee-1.png")[:90, :120]).save("mine.png")
    before = (tmp_path / "out/coffee-1.png").read_bytes()
    parameters |= {"image_path": "mine.png", "mask_box": [10, 20, 50, 60], "scenes": []}
    run_cells(ROOT / "notebooks/00_remove_objects.ipynb", tmp_path / "done.ipynb", parameters)
    assert (tmp_path / "out/coffee-1.png").read_bytes() == before
    assert load_image(tmp_path / "out/mine-2.png").shape == (90, 120, 3)
    parameters["mask_box"] = []
    with pytest.raises(CellFailed, match="Nothing is marked"):
        run_cells(ROOT / "notebooks/00_remove_objects.ipynb", tmp_path / "done.ipynb", parameters)


@pytest.mark.slow
def test_notebook_00_takes_an_editors_mask_and_keeps_profile_and_exif(tiny_model, tmp_path):
    small = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    scene = cv2.resize(small, (150, 100), interpolation=cv2.INTER_CUBIC)
    hole = np.zeros((100, 150), np.uint8)
    hole[40:70, 60:100] = 255
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # stored lying
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.DateTimeOriginal: "2026:01:02 03:04:05"}
    stored = Image.fromarray(np.rot90(scene).copy())
    stored.save(tmp_path / "photo.jpg", quality=95, exif=exif, icc_profile=profile)
    mask = np.dstack([scene, 255 - hole])[::2, ::2]  # DALL-E's, of another size
    Image.fromarray(mask).save(tmp_path / "mask.png")
    parameters = {
        "output_dir": str(tmp_path / "out"),
        "image_path": str(tmp_path / "photo.jpg"),
        "mask_path": str(tmp_path / "mask.png"),
        "pretrained_model_name_or_path": str(tiny_model),
        "removals": 1,
        "num_inference_steps": 2,
        "mode": "exact",
        "scenes": [],
    }
    run_cells(ROOT / "notebooks/00_remove_objects.ipynb", tmp_path / "done.ipynb", parameters)
    with Image.open(tmp_path / "out/photo-1.png") as image:
        assert image.info["icc_profile"] == profile
        kept, removal = image.getexif(), np.array(image)
    assert kept[ExifTags.Base.Orientation] == 1
    dates = kept.get_ifd(ExifTags.IFD.Exif)
    assert dates[ExifTags.Base.DateTimeOriginal] == "2026:01:02 03:04:05"
    photo = load_image(tmp_path / "photo.jpg")
    changed = (removal != photo).any(axis=2)
    near = cv2.dilate(hole, np.ones((31, 31), np.uint8)) > 0
    assert removal.shape == (100, 150, 3) and changed[hole > 0].any() and not changed[~near].any()
    assert np.array_equal(load_mask(tmp_path / "out/photo-1-mask.png"), hole)
    parameters["mask_path"] = str(tmp_path / "photo.jpg")
    with pytest.raises(CellFailed, match=r"photo\.jpg, given as a mask"):
        run_cells(ROOT / "notebooks/00_remove_objects.ipynb", tmp_path / "done.ipynb", parameters)
