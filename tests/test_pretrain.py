"""Pre-training of the built-in model: its stream of scenes, its objectives, its export."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, AutoPipelineForInpainting
from safetensors.torch import load_file

from rorem_lib import pretrain
from rorem_lib.files import write_json
from rorem_lib.models import sdxl
from rorem_lib.pretrain import PretrainConfig


@pytest.fixture
def config(tmp_path):
    return PretrainConfig(
        output_dir=str(tmp_path),
        max_train_steps=2,
        train_batch_size=4,
        size=32,
        dataloader_num_workers=0,
        mixed_precision="no",
        logging_steps=1,
        checkpointing_steps=1,
    )


def read_losses(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_free_masks_are_binary_and_of_all_sizes():
    rng = np.random.default_rng(1)
    masks = [pretrain.draw_free_mask(rng, 64) for _ in range(300)]
    assert all(m.shape == (64, 64) and set(np.unique(m)) <= {0, 255} for m in masks)
    areas = [(m > 0).mean() for m in masks]
    assert max(areas) == 1 and 0.03 < np.median(areas) < 0.5
    assert np.mean(np.array(areas) == 0) < 0.05


def test_samples_are_functions_of_their_position(config):
    stream = pretrain._SceneStream(config, masks=True)
    a, b = stream[11], pretrain._SceneStream(config, masks=True)[11]
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert a["image"].shape == (32, 32, 3) and a["mask"].shape == (1, 32, 32)
    assert a["noise"].shape == (4, 8, 8) and not np.array_equal(a["noise"], stream[10]["noise"])
    assert not np.array_equal(a["image"], stream[13]["image"])


def test_autoencoder_and_base_are_trained_and_exported(config, tmp_path, monkeypatch):
    metrics = pretrain.run_stage("autoencoder", config)
    assert metrics["steps"] == 2 and len(read_losses(tmp_path / "autoencoder")) == 2
    assert isinstance(
        AutoencoderTiny.from_pretrained(tmp_path / "autoencoder" / "vae"), AutoencoderTiny
    )
    config.vae = str(tmp_path / "autoencoder" / "vae")
    pretrain.run_stage("base", config)
    unet = load_file(tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    assert unet["conv_out.weight"].abs().sum() > 0  # it started as zeros
    folder = pretrain.export_model(
        str(tmp_path / "autoencoder" / "vae"), str(tmp_path / "base" / "unet"), tmp_path / "model"
    )
    pipe = AutoPipelineForInpainting.from_pretrained(folder)
    for name, weight in pipe.unet.state_dict().items():
        torch.testing.assert_close(weight.float(), unet[name], rtol=1e-3, atol=1e-4)
    assert next(sdxl.load_pipeline(str(folder)).unet.parameters()).dtype == torch.float32
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert size < 24e6, f"{size / 1e6:.1f} MB are too many to ship"


def test_a_stopped_pretraining_goes_on_bit_for_bit(config, tmp_path, monkeypatch):
    """Its autoencoder draws noise from torch's own generator, so that has to go on too."""
    config.max_train_steps = 3
    whole = PretrainConfig(**vars(config) | {"output_dir": str(tmp_path / "whole")})
    pretrain.run_stage("autoencoder", whole)
    calls, compute = [], pretrain.AutoencoderObjective.compute_loss

    def stop_in_third(self, model, batch):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(self, model, batch)

    monkeypatch.setattr(pretrain.AutoencoderObjective, "compute_loss", stop_in_third)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run_stage("autoencoder", config)
    assert pretrain.run_stage("autoencoder", config)["resumed_at"] == 2
    a, b = (
        load_file(f / "autoencoder" / "vae" / "diffusion_pytorch_model.safetensors")
        for f in (tmp_path / "whole", tmp_path)
    )
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_text_encoders_are_always_the_same(tiny_model):
    pipe = pretrain.build_pipeline(AutoencoderTiny(**pretrain.VAE))
    embeds = sdxl.encode_prompt(pipe)[0]
    torch.testing.assert_close(embeds, sdxl.encode_prompt(sdxl.load_pipeline(str(tiny_model)))[0])


def test_a_runs_remover_becomes_the_one_that_ships(tmp_path):
    run = tmp_path / "demo"
    pipe = sdxl.load_pipeline("builtin")
    with torch.no_grad():
        pipe.unet.conv_out.bias += 0.25
    with sdxl.silence_libraries():
        pipe.save_pretrained(run / "high_resolution" / "remover")
    row = {"row": "high resolution", "control": False, "n": 500, "success_rate": 0.62}
    row |= {"success_interval": [0.577, 0.661], "num_inference_steps": 20}
    write_json(run / "evaluation" / "metrics.json", {"methods": [row]})
    write_json(run / "run.json", {"recipe": "demo", "seed": 4})
    folder = pretrain.export_remover(run, tmp_path / "remover")
    unet = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in unet.values()} == {torch.float16}
    found = sdxl.load_pipeline(str(folder), base_model="builtin")
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.allclose(found.unet.state_dict()[name], tensor, rtol=1e-3, atol=1e-3), name
    assert "62.0% of 500" in (folder / "README.md").read_text()
    assert json.loads((folder / "made.json").read_text())["success_rate"] == 0.62
    with pytest.raises(FileNotFoundError, match="human_1"):
        pretrain.export_remover(run, tmp_path / "remover", stage="human_1")
    with torch.no_grad():
        next(pipe.vae.parameters()).add_(1)
    with sdxl.silence_libraries():
        pipe.save_pretrained(run / "high_resolution" / "remover")
    with pytest.raises(ValueError, match="another model"):
        pretrain.export_remover(run, tmp_path / "remover")
    assert (folder / "config.json").is_file(), "what was there stays"


@pytest.mark.parametrize("words", [[], ["bse"], ["--output_dir", "x"]])
def test_an_unknown_stage_is_refused(words):
    with pytest.raises(SystemExit, match="rorem_lib.pretrain"):
        pretrain.main(words)


def test_help_is_no_error(capsys):
    for word in ("-h", "--help"):
        pretrain.main([word])
        assert capsys.readouterr().out.startswith("usage: python -m rorem_lib.pretrain")


def test_the_command_line_runs_a_stage(tmp_path):
    pretrain.main(
        [
            "autoencoder",
            "--output_dir",
            str(tmp_path),
            "--size",
            "32",
            "--max_train_steps",
            "1",
            "--train_batch_size",
            "2",
            "--mixed_precision",
            "no",
            "--dataloader_num_workers",
            "0",
        ]
    )
    assert (tmp_path / "autoencoder" / "vae" / "config.json").is_file()
