"""The LCM-LoRA: what it trains, where its consistency holds, and that diffusers opens it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import LCMScheduler
from safetensors import safe_open
from safetensors.torch import load_file

from rorem_lib.data.triplets import load_images, read_triplets
from rorem_lib.distill import DistillConfig, DistillObjective, load_lora, train_lora
from rorem_lib.models import presets, sdxl
from rorem_lib.models.inpainting import ObjectRemover

LORA = "lora/pytorch_lora_weights.safetensors"


@pytest.fixture
def config(tiny_model, tiny_set, tmp_path):
    return DistillConfig(
        output_dir=str(tmp_path / "out"),
        meta_path=[str(tiny_set)],
        resolution=32,
        rank=2,
        pretrained_model_name_or_path=str(tiny_model),
        max_train_steps=4,
        train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        checkpointing_steps=2,
        validation_steps=0,
        mixed_precision="no",
    )


@pytest.fixture
def objective(config):
    objective = DistillObjective(config)
    objective.accelerator = Accelerator()
    objective.model = objective.build_model()
    return objective


def make_batch(count=3, side=8):
    generator = torch.Generator().manual_seed(2)
    noise, clean, masked = (torch.randn(count, 4, side, side, generator=generator) for _ in "abc")
    mask = (torch.rand(count, 1, side, side, generator=generator) > 0.5).float()
    return {
        "gt": clean,
        "noise": noise,
        "masked": masked,
        "mask": mask,
        "timestep": torch.tensor([7, 512, 999])[:count],
    }


@pytest.mark.slow
def test_only_the_lora_is_trained_and_it_is(config, tiny_model, tmp_path, monkeypatch):
    kept = {}
    build = DistillObjective.build_model

    def remember(self):
        kept["model"] = build(self)
        kept["before"] = {n: p.detach().clone() for n, p in kept["model"].named_parameters()}
        return kept["model"]

    monkeypatch.setattr(DistillObjective, "build_model", remember)
    train_lora(config)
    moved = {
        n for n, p in kept["model"].named_parameters() if not torch.equal(p, kept["before"][n])
    }
    assert moved == {n for n in kept["before"] if "lora_" in n}
    kinds = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in moved}
    assert {"to_q", "conv1", "proj_in", "time_emb_proj"} <= kinds


@pytest.mark.slow
def test_stock_diffusers_opens_it_and_it_changes_the_removal(
    config, tiny_model, tiny_set, tmp_path
):
    train_lora(config)
    names = {p.name for p in (tmp_path / "out" / "lora").iterdir()}
    assert names == {Path(LORA).name, presets.SETTINGS_FILE, "README.md"}
    assert presets.find_settings(str(tmp_path / "out" / "lora")) == replace(
        presets.FOUR_STEPS, resolution=32
    )
    pictures = load_images(read_triplets(tiny_set)[0])
    inputs = [pictures["source"]], [pictures["mask"]]
    options = {"num_inference_steps": 4, "mode": "full", "crop": False, "resolution": 32}
    plain, fast, theirs = (sdxl.load_pipeline(str(tiny_model)) for _ in range(3))
    for pipe in (plain, theirs):
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    load_lora(fast, tmp_path / "out" / "lora")
    theirs.load_lora_weights(tmp_path / "out" / LORA)
    assert isinstance(fast.scheduler, LCMScheduler)
    results = [
        ObjectRemover(pipe)(*inputs, **options)[0].astype(int) for pipe in (plain, fast, theirs)
    ]
    assert np.abs(results[1] - results[0]).mean() > 0.05
    assert np.abs(results[1] - results[2]).max() <= 2  # merged or not, it is the same LoRA


@pytest.mark.slow
def test_the_loaded_lora_predicts_what_the_trained_student_predicted(
    config, tiny_model, tmp_path, monkeypatch
):
    kept, save, batch = {}, DistillObjective.save_model, make_batch()
    added = {"text_embeds": torch.ones(3, 16), "time_ids": sdxl.make_time_ids(32, 32, 3)}

    @torch.no_grad()
    def predict(self, unet):
        return self._call(unet, batch["noise"], batch["timestep"], batch, added)

    def remember(self, model, folder):
        kept["objective"], kept["student"] = self, predict(self, model)
        model.disable_adapters()
        kept["teacher"] = predict(self, model)
        save(self, model, folder)

    monkeypatch.setattr(DistillObjective, "save_model", remember)
    train_lora(config)
    pipe = sdxl.load_pipeline(str(tiny_model))
    torch.testing.assert_close(predict(kept["objective"], pipe.unet), kept["teacher"])
    load_lora(pipe, tmp_path / "out" / "lora")
    torch.testing.assert_close(
        predict(kept["objective"], pipe.unet), kept["student"], rtol=1e-3, atol=1e-4
    )
    assert (kept["student"] - kept["teacher"]).abs().max() > 1e-3


def test_four_steps_are_four_calls_of_the_unet(config, tiny_model, tiny_set, tmp_path):
    config.max_train_steps = 1
    train_lora(config)
    pipe = sdxl.load_pipeline(str(tiny_model))
    load_lora(pipe, tmp_path / "out" / "lora")
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    pictures = load_images(read_triplets(tiny_set)[0])
    ObjectRemover(pipe)([pictures["source"]], [pictures["mask"]], num_inference_steps=4)
    assert len(calls) == 4
    with safe_open(tmp_path / "out" / LORA, "pt") as file:
        assert file.metadata() == {"format": "pt", sdxl.TRAINED_RESOLUTION: "32"}
    assert sdxl.get_resolution(pipe) == 32, "the LoRA's size, not the model's 64"


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_a_prediction_is_turned_into_clean_latents_and_noise(objective, kind):
    scheduler = objective.noise_schedule
    scheduler.register_to_config(prediction_type=kind)
    batch = make_batch()
    t = torch.tensor([19, 499, 799])
    noisy = scheduler.add_noise(batch["gt"], batch["noise"], t)
    exact = (
        batch["noise"]
        if kind == "epsilon"
        else scheduler.get_velocity(batch["gt"], batch["noise"], t)
    )
    clean, noise = objective._clean(exact, noisy, t)
    torch.testing.assert_close(clean, batch["gt"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(noise, batch["noise"], rtol=1e-3, atol=1e-3)


def test_the_consistency_function_is_the_identity_at_time_zero(objective):
    batch = make_batch()
    added = {
        "text_embeds": objective.pooled.expand(3, -1),
        "time_ids": sdxl.make_time_ids(32, 32, 3),
    }
    with torch.no_grad():
        start = objective._student(
            objective.model, batch["noise"], torch.zeros(3).long(), batch, added
        )
        late = objective._student(
            objective.model, batch["noise"], torch.full((3,), 999), batch, added
        )
    torch.testing.assert_close(start, batch["noise"])
    assert (late - batch["noise"]).abs().mean() > 0.1


def test_times_lie_on_the_teachers_grid(objective):
    seen = []

    def student(model, noisy, t, batch, added):
        seen.append(t.tolist())
        return noisy.requires_grad_()

    objective._student = student
    objective.compute_loss(objective.model, make_batch())
    later, earlier = seen
    assert later == [19, 519, 999] and earlier == [0, 499, 979]


def test_the_teacher_is_the_model_without_lora(objective):
    """A LoRA that changes the student must not change the teacher's DDIM step."""
    for name, parameter in objective.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    batch, taken = make_batch(), []
    clean = objective._clean

    def remember(predicted, noisy, t):
        taken.append(predicted.detach())
        return clean(predicted, noisy, t)

    objective._clean = remember
    loss, _ = objective.compute_loss(objective.model, batch)
    student, teacher, _ = taken
    assert (student - teacher).abs().max() > 1e-3
    base = sdxl.load_pipeline(objective.config.pretrained_model_name_or_path).unet
    t = torch.tensor([19, 519, 999])
    noisy = objective.noise_schedule.add_noise(batch["gt"], batch["noise"], t)
    added = {
        "text_embeds": objective.pooled.expand(3, -1),
        "time_ids": sdxl.make_time_ids(32, 32, 3),
    }
    with torch.no_grad():
        torch.testing.assert_close(
            objective._call(base, noisy, t, batch, added), teacher, rtol=1e-4, atol=1e-5
        )
    loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for n, p in objective.model.named_parameters()
        if "lora_" in n
    )


def test_huber_is_below_the_square_for_large_errors(objective):
    batch = make_batch()
    objective._student = lambda model, noisy, t, *_: noisy + 10 * (t > 500)[:, None, None, None]
    square = objective.compute_loss(objective.model, batch)[0]
    objective.config.huber_c = 0.001
    assert objective.compute_loss(objective.model, batch)[0] < 0.5 * square


@pytest.mark.slow
def test_a_stopped_training_goes_on_bit_for_bit(config, tmp_path, monkeypatch):
    train_lora(config)
    config.output_dir = str(tmp_path / "stopped")
    calls, compute = [], DistillObjective.compute_loss

    def stop_in_fourth(self, model, batch):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compute(self, model, batch)

    monkeypatch.setattr(DistillObjective, "compute_loss", stop_in_fourth)
    with pytest.raises(KeyboardInterrupt):
        train_lora(config)
    assert train_lora(config)["resumed_at"] == 2 and len(calls) == 6
    a, b = (load_file(tmp_path / name / LORA) for name in ("out", "stopped"))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
