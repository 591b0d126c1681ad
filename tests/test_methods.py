"""Methods: what a removal costs, how it is kept, and when it is made anew."""

import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, EulerDiscreteScheduler
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from rorem_lib.data.pictures import load_image, save_image
from rorem_lib.data.triplets import Triplet, read_triplets
from rorem_lib.evaluation import methods as methods_module
from rorem_lib.evaluation.methods import Method, make_methods, run_method
from rorem_lib.files import read_json
from rorem_lib.models import lora, presets, sdxl
from rorem_lib.models.inpainting import ObjectRemover
from rorem_lib.pretrain import VAE, build_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random pipeline of the built-in model's shape."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    pipe = build_pipeline(AutoencoderTiny(**VAE))
    torch.nn.init.normal_(pipe.unet.conv_out.weight, std=0.02)
    pipe.save_pretrained(folder / "remover")
    return folder / "remover"


@pytest.fixture
def triplets(tmp_path):
    """Five small images with a mask."""
    rng, found = np.random.default_rng(0), []
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 20:40] = 255
    for n in range(5):
        source, hole = tmp_path / f"{n}.png", tmp_path / f"{n}-mask.png"
        save_image(source, rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
        save_image(hole, mask)
        found.append(Triplet(f"scene-{n}", source, hole, None, f"scene-{n}"))
    return found


def read_all(run):
    return {name: load_image(path) for name, path in run.paths.items()}


def test_unet_calls_are_counted_not_believed(model, triplets, tmp_path):
    for steps, guidance, calls in ((3, 1.0, 3), (2, 2.0, 4)):
        method = Method(
            f"steps {steps}", model=str(model), num_inference_steps=steps, guidance_scale=guidance
        )
        run = run_method(method, triplets[:4], tmp_path / "r", batch_size=2)
        assert run.unet_calls == calls and run.seconds_per_image > 0
    assert run_method(Method("telea", kind="telea"), triplets, tmp_path / "r").unet_calls == 0


def test_a_methods_resolution_wins_over_the_models(model, triplets, tmp_path, monkeypatch):
    seen, remove = [], ObjectRemover.__call__

    def note(*given, resolution, **options):
        seen.append(resolution)
        return remove(*given, resolution=resolution, **options)

    monkeypatch.setattr(ObjectRemover, "__call__", note)
    rows = [
        {"name": "own", "model": str(model), "num_inference_steps": 1},
        {"name": "small", "model": str(model), "num_inference_steps": 1, "resolution": 32},
    ]
    for method in make_methods(rows, resolution=48):
        run_method(method, triplets[:1], tmp_path / "r")
    assert set(seen[: len(seen) // 2]) == {48} and set(seen[len(seen) // 2 :]) == {32}


def test_a_methods_mode_is_its_own(model, triplets, tmp_path):
    whole = Method("whole", model=str(model), num_inference_steps=1)
    kept = Method("kept", model=str(model), num_inference_steps=1, mode="exact")
    runs = [run_method(method, triplets[:1], tmp_path / "r") for method in (whole, kept)]
    (a,), (b,) = (read_all(run).values() for run in runs)
    source, mask = load_image(triplets[0].source), load_image(triplets[0].mask, "L")
    far = np.s_[:8]  # rows far from the object
    assert not mask[far].any()
    assert np.array_equal(b[far], source[far]) and not np.array_equal(a[far], source[far])
    stamps = [read_json(tmp_path / f"r/{n}/timing.json")["stamp"] for n in ("whole", "kept")]
    assert "mode" not in stamps[0] and stamps[1]["mode"] == "exact"
    with pytest.raises(ValueError, match='"odd": mode is one of effect, exact, full'):
        Method("odd", mode="half")


def test_lora_and_lcm_change_the_removal(model, triplets, tmp_path):
    pipe = methods_module.sdxl.load_pipeline(str(model))
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    from peft import get_peft_model_state_dict

    pipe.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(pipe.unet))
    plain = Method("plain", model=str(model), num_inference_steps=4)
    variants = [
        plain,
        Method("lcm", model=str(model), num_inference_steps=4, scheduler="lcm"),
        Method("lora", model=str(model), num_inference_steps=4, lora=str(tmp_path / "lora")),
        Method("trailing", model=str(model), num_inference_steps=4, scheduler="trailing"),
    ]
    runs = [run_method(m, triplets[:2], tmp_path / "r", batch_size=2) for m in variants]
    assert [run.unet_calls for run in runs] == [4, 4, 4, 4]
    pictures = [np.stack(list(read_all(run).values())) for run in runs]
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    assert np.array_equal(pictures[0], pictures[3])  # this model's own spacing is trailing


@pytest.mark.parametrize("scheduler", ["default", "lcm"])
def test_a_method_computes_what_its_parts_do(model, triplets, tmp_path, scheduler):
    """Whatever the LoRA says of itself: steps, size and scheduler are the method's."""
    pipe = methods_module.sdxl.load_pipeline(str(model))
    lora.add_lora(pipe.unet, 2)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    lora.save_lora(pipe.unet, tmp_path / "lora")
    presets.save_settings(presets.Settings(32, 1, 2.0, 0.5, "trailing"), tmp_path / "lora")
    how = {"num_inference_steps": 2, "strength": 0.9}
    method = Method(
        "m",
        model=str(model),
        lora=str(tmp_path / "lora"),
        scheduler=scheduler,
        resolution=48,
        **how,
    )
    run = run_method(method, triplets[:2], tmp_path / "r", batch_size=2, device="cpu")
    made = read_all(run)
    dtype = sdxl.DTYPES[sdxl.choose_precision("auto")]
    pipe = sdxl.load_pipeline(str(model), dtype=dtype)
    lora.load_lora(pipe, tmp_path / "lora")
    presets.set_scheduler(pipe, scheduler)
    given = ([load_image(t.source) for t in triplets[:2]], [str(t.mask) for t in triplets[:2]])
    how |= {"resolution": 48, "mode": "full", "crop": False}
    for one, wanted in zip(made.values(), ObjectRemover(pipe)(*given, **how), strict=True):
        assert np.array_equal(one, wanted)


def test_few_steps_of_a_trailing_scheduler_begin_at_the_noise():
    pipe = SimpleNamespace(scheduler=EulerDiscreteScheduler(timestep_spacing="leading"))
    for kind, first in (("default", 0), ("trailing", 999)):
        presets.set_scheduler(pipe, kind)
        pipe.scheduler.set_timesteps(1)
        assert pipe.scheduler.timesteps.tolist() == [first]


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_gives_the_same(model, triplets, tmp_path, monkeypatch):
    method = Method("m", model=str(model), num_inference_steps=2)
    whole = read_all(run_method(method, triplets, tmp_path / "whole", batch_size=2))
    run_method(method, triplets[:2], tmp_path / "r", batch_size=2)
    made, real = [], methods_module.save_image
    monkeypatch.setattr(
        methods_module,
        "save_image",
        lambda path, image: made.append(path.stem) or real(path, image),
    )
    run = run_method(method, triplets, tmp_path / "r", batch_size=2)
    assert made == ["scene-2", "scene-3", "scene-4"]
    resumed = read_all(run)
    for name in whole:
        assert np.array_equal(whole[name], resumed[name])
    monkeypatch.setattr(methods_module, "_open_method", None)  # nothing is left to do
    again = run_method(method, triplets, tmp_path / "r", batch_size=2)
    assert again.seconds_per_image == run.seconds_per_image


def test_what_changed_is_made_anew(model, triplets, tmp_path):
    method = Method("telea", kind="telea")
    run_method(method, triplets, tmp_path / "r")
    path = tmp_path / "r/telea/scene-0.png"
    before = path.stat().st_mtime_ns
    os.utime(triplets[0].source)  # it is younger, and what it was
    run_method(method, triplets, tmp_path / "r")
    assert path.stat().st_mtime_ns == before
    save_image(triplets[0].source, np.zeros((64, 64, 3), np.uint8))
    os.utime(triplets[0].source, ns=(1, 1))  # it is older, and another
    run_method(method, triplets, tmp_path / "r")
    assert load_image(path).max() == 0

    remover = Method("m", model=str(model), num_inference_steps=1)
    run_method(remover, triplets[:1], tmp_path / "r")
    path = tmp_path / "r/m/scene-0.png"
    before = path.read_bytes()
    other = Method("m", model=str(model), num_inference_steps=1, seed=1)
    run_method(other, triplets[:1], tmp_path / "r")
    assert path.read_bytes() != before
    weights = next(model.glob("unet/*.safetensors"))
    stamp = path.stat().st_mtime_ns
    os.utime(weights, ns=(1, 1))  # copied, not trained again
    run_method(other, triplets[:1], tmp_path / "r")
    assert path.stat().st_mtime_ns == stamp
    state = load_file(weights)
    state["conv_out.bias"] += 1  # trained again: other weights under the same name
    save_file(state, weights)
    os.utime(weights, ns=(1, 1))
    run_method(other, triplets[:1], tmp_path / "r")
    assert path.stat().st_mtime_ns > stamp


def test_another_set_with_equal_names_and_older_times_gets_removals_of_its_own(triplets, tmp_path):
    method = Method("telea", kind="telea")
    run_method(method, triplets, tmp_path / "r")
    (tmp_path / "other").mkdir()
    others = []
    for number, triplet in enumerate(triplets):
        source = tmp_path / "other" / triplet.source.name
        save_image(source, np.full((64, 64, 3), 40 * number, np.uint8))
        os.utime(source, ns=(1, 1))
        others.append(replace(triplet, source=source))
    found = read_all(run_method(method, others, tmp_path / "r"))
    assert [found[t.id].mean() for t in others] == pytest.approx([0, 40, 80, 120, 160], abs=2)


def test_what_others_keep_where_removals_go_is_set_aside(triplets, tmp_path):
    (tmp_path / "r/telea").mkdir(parents=True)
    (tmp_path / "r/telea/mine.txt").write_text("mine")
    run = run_method(Method("telea", kind="telea"), triplets, tmp_path / "r")
    (aside,) = (tmp_path / "r").glob("telea.*")
    assert [p.name for p in aside.iterdir()] == ["mine.txt"] and len(read_all(run)) == 5


def test_a_removal_that_a_lost_power_tore_is_made_anew(triplets, tmp_path):
    method = Method("telea", kind="telea")
    run = run_method(method, triplets, tmp_path / "r")
    whole = read_all(run)
    os.truncate(run.paths["scene-1"], 100)
    os.truncate(run.paths["scene-2"], 0)
    again = read_all(run_method(method, triplets, tmp_path / "r"))
    assert all(np.array_equal(again[name], whole[name]) for name in whole)


def test_the_place_in_the_set_is_part_of_what_a_removal_is_made_of(model, triplets, tmp_path):
    method = Method("m", model=str(model), num_inference_steps=1)
    first = read_all(run_method(method, triplets[:2], tmp_path / "r", batch_size=2))
    turned = read_all(run_method(method, triplets[1::-1], tmp_path / "r", batch_size=2))
    alone = read_all(run_method(method, triplets[1::-1], tmp_path / "alone", batch_size=2))
    for name in first:
        assert np.array_equal(turned[name], alone[name])
        assert not np.array_equal(turned[name], first[name])


def test_numbers_that_are_not_finite_name_the_model_and_the_image(model, triplets, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = next(broken.glob("unet/*.safetensors"))
    state = load_file(weights)
    state["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, weights)
    method = Method("m", model=str(broken), num_inference_steps=1)
    with pytest.raises(FloatingPointError, match=f"{broken}.*{triplets[0].source}"):
        run_method(method, triplets, tmp_path / "r", batch_size=2)
    assert not list((tmp_path / "r" / "m").glob("*.png"))


def test_classical_methods_touch_the_hole_alone(triplets, tmp_path):
    for kind in ("telea", "ns"):
        run = run_method(Method(kind, kind=kind), triplets, tmp_path / "r")
        result, source = load_image(run.paths["scene-0"]), load_image(triplets[0].source)
        mask = load_image(triplets[0].mask, "L") >= 128
        assert np.array_equal(result[~mask], source[~mask])
        assert not np.array_equal(result[mask], source[mask])


def test_methods_are_checked_before_anything_runs():
    found = make_methods(
        [
            {"name": "Telea", "kind": "telea"},
            {"name": "final", "model": "runs/x", "lora": "y", "seed": 9},
        ],
        seed=5,
    )
    assert [m.seed for m in found] == [5, 9]
    assert (found[1].model, found[1].lora, found[0].lora) == ("runs/x", "y", "")
    for rows, message in (
        ([{"name": "x", "stesp": 3}], "stesp"),
        ([{"kind": "telea"}], "no name"),
        ([{"name": "a b"}, {"name": "A-B"}], "names of their own"),
        ([{"name": "Source"}], "names of their own"),
        ([{"name": "x", "kind": "lama"}], "telea, ns, remover"),
        ([{"name": "x", "scheduler": "ddim"}], "default, trailing, lcm"),
    ):
        with pytest.raises(ValueError, match=message):
            make_methods(rows)


def test_ids_that_are_no_file_names_stay_apart(triplets, tmp_path):
    odd = [
        Triplet(name, t.source, t.mask, None, name)
        for name, t in zip(("a/b", "a_b", "a b"), triplets, strict=False)
    ]
    run = run_method(Method("telea", kind="telea"), odd, tmp_path / "r")
    assert len({path.name for path in run.paths.values()}) == 3
    assert all(path.parent.name == "telea" for path in run.paths.values())


def test_read_triplets_feeds_methods(tmp_path):
    """The real reader's triplets, of a built-in set, are what methods take."""
    from rorem_lib.builtin.sets import write_scene_sets

    write_scene_sets(tmp_path, labelled=0, pool=0, high_resolution=0, test=2)
    found = read_triplets(tmp_path / "test", require_gt=False)
    run = run_method(Method("ns", kind="ns"), found, tmp_path / "r")
    assert list(run.paths) == [t.id for t in found]
