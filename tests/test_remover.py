"""The remover: what its loss sees, that it learns, and that stock diffusers opens the result."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType
from diffusers import AutoPipelineForInpainting
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import default_collate

from rorem_lib.data.triplets import load_images, read_triplets
from rorem_lib.data.writer import TripletWriter
from rorem_lib.models import sdxl
from rorem_lib.models.attention import compile_unet
from rorem_lib.models.inpainting import ObjectRemover
from rorem_lib.remover import RemoverConfig, RemoverObjective, train_remover
from rorem_lib.training import checkpoints, loop
from rorem_lib.training.tracking import split_by_time

UNET_FILE = "remover/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def config(tiny_model, tiny_set, tmp_path):
    return RemoverConfig(
        output_dir=str(tmp_path / "out"),
        meta_path=[str(tiny_set)],
        resolution=32,
        high_resolution=48,
        pretrained_model_name_or_path=str(tiny_model),
        max_train_steps=3,
        train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        random_flip=True,
        validation_steps=0,
        dataloader_num_workers=0,
        mixed_precision="no",
        latent_cache_dir=str(tmp_path / "cache"),
    )


def make_objective(config):
    objective = RemoverObjective(config)
    objective.accelerator = Accelerator()
    objective.model = objective.build_model()
    objective.dataset = objective.make_dataset()
    return objective


def take_batch(objective, positions):
    samples = [objective.dataset[p] for p in positions]
    return default_collate(samples)


def test_stock_diffusers_opens_the_remover_and_runs_it(config, tiny_set, tmp_path):
    metrics = train_remover(config)
    assert metrics["train_size"] == 10 and metrics["steps"] == 3
    assert metrics == json.loads((tmp_path / "out" / "train_metrics.json").read_text())
    pipe = AutoPipelineForInpainting.from_pretrained(tmp_path / "out" / "remover")
    pipe.set_progress_bar_config(disable=True)
    pictures = load_images(read_triplets(tiny_set)[0])
    image = pipe(
        prompt="",
        image=Image.fromarray(pictures["source"]),
        height=32,
        width=32,
        mask_image=Image.fromarray(pictures["mask"]),
        num_inference_steps=2,
        guidance_scale=1.0,
        strength=1.0,
    ).images[0]
    assert image.size == (32, 32)
    assert not list((tmp_path / "out").rglob("*.bin")), "weights are safetensors, never pickles"
    trained = sdxl.load_pipeline(str(tmp_path / "out" / "remover"))
    assert sdxl.get_resolution(trained) == 32, "the size it was trained at is noted in the model"
    assert trained.unet.config.sample_size * trained.vae_scale_factor == 32
    remover = ObjectRemover.from_pretrained(str(tmp_path / "out" / "remover"), device="cpu")
    assert remover.settings.resolution == 32 and remover.settings.guidance_scale == 1
    kept = load_file(tmp_path / "out" / "remover" / sdxl.EMPTY_PROMPT)["prompt_embeds"]
    assert torch.equal(kept, sdxl.encode_prompt(trained)[0])
    card = (tmp_path / "out" / "remover" / "README.md").read_text()
    assert "resolution: 32" in card and "32 px" in card and "10 triplets" in card
    assert "license: openrail++" in card
    written = (tmp_path / "out" / "remover").rglob("*")
    texts = [p.read_text() for p in written if p.suffix in (".json", ".md", ".txt")]
    assert len(texts) > 5 and not any(
        config.pretrained_model_name_or_path in text for text in texts
    )


def test_all_of_the_unet_is_trained_and_nothing_else(config, tiny_model, tmp_path):
    train_remover(config)
    before = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "out" / UNET_FILE)
    still = [n for n in before if torch.equal(before[n], after[n])]
    assert not still, f"untrained: {still}"
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model"):
        old, new = (
            load_file(f / f"{part}.safetensors") for f in (tiny_model, tmp_path / "out" / "remover")
        )
        assert all(torch.equal(old[n], new[n]) for n in old), part


def copy_set(tiny_set, folder):
    """A set with files of its own, not linked to others."""
    with TripletWriter(folder) as writer:
        for triplet in read_triplets(tiny_set)[:4]:
            writer.add(id=triplet.id, **load_images(triplet))
    return folder


def exchange_images(folder):
    """The images under other names, with the times as they were, written through hard links."""
    paths = [triplet.gt for triplet in read_triplets(folder)]
    before = [(path.read_bytes(), path.stat()) for path in paths]
    for number, path in enumerate(paths):
        link = folder.with_name("linked.png")
        link.hardlink_to(path)
        link.write_bytes(before[number ^ 1][0])
        link.unlink()
        os.utime(path, ns=(before[number][1].st_atime_ns, before[number][1].st_mtime_ns))


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False])
def test_a_resumed_training_refuses_other_images(
    config, tiny_set, tmp_path, monkeypatch, caplog, cached
):
    folder = copy_set(tiny_set, tmp_path / "set")
    config.meta_path, config.cache_latents = [str(folder)], cached
    config.checkpointing_steps, calls, compute = 1, [], RemoverObjective.compute_loss

    def stop_in_third(self, model, batch):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(self, model, batch)

    monkeypatch.setattr(RemoverObjective, "compute_loss", stop_in_third)
    with pytest.raises(KeyboardInterrupt):
        train_remover(config)
    exchange_images(folder)
    with pytest.raises(ValueError, match="checkpoint-2 .*the images were others"):
        train_remover(config)
    exchange_images(folder)  # as they were
    moved = shutil.move(folder, tmp_path / "moved")
    assert train_remover(replace(config, meta_path=[str(moved)]))["resumed_at"] == 2
    exchange_images(moved)
    with caplog.at_level("INFO"):
        again = replace(config, meta_path=[str(moved)])
        assert train_remover(again)["resumed_at"] == 0, "other images are another training"
    (aside,) = (tmp_path / "out").glob("finished-*")
    assert (aside / "remover").is_dir() and "the images were others" in caplog.text
    assert train_remover(again)["resumed_at"] == 0 and len(calls) == 2 + 1 + 1 + 3


def test_a_finished_training_that_noted_no_images_is_kept(config, tmp_path):
    first = train_remover(config)
    file = tmp_path / "out" / "training.json"
    noted = json.loads(file.read_text())
    del noted["inputs"]["images"]
    file.write_text(json.dumps(noted))
    assert train_remover(config) == first and not list((tmp_path / "out").glob("finished-*"))


@pytest.mark.slow
def test_it_learns_its_own_triplets(config, tmp_path):
    config.max_train_steps = 25
    train_remover(config)
    losses = [
        json.loads(x)["loss"] for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.slow
def test_adam_in_8_bits_trains_and_goes_on_where_it_stopped(config, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    # else the checkpoint of a finished training holds its UNet alone
    monkeypatch.setattr(checkpoints, "finish_checkpoints", lambda config: None)
    config.use_8bit_adam, config.max_train_steps, config.checkpointing_steps = True, 4, 2
    train_remover(config)
    kept = torch.load(tmp_path / "out" / "checkpoint-2" / "optimizer.bin", weights_only=True)
    states = [
        {**state, **state.get("__bnb_optimizer_quant_state__", {})}["state1"]
        for state in kept["state"].values()
    ]
    assert {s.dtype for s in states if s.numel() >= 4096} == {torch.uint8}
    losses, weights = read_run(tmp_path / "out")
    train_remover(
        replace(
            config,
            output_dir=str(tmp_path / "resumed"),
            resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"),
        )
    )
    more, resumed = read_run(tmp_path / "resumed")
    assert more == losses[2:]
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    train_remover(replace(config, output_dir=str(tmp_path / "whole"), use_8bit_adam=False))
    exact = read_run(tmp_path / "whole")[0]
    assert exact != losses and exact == pytest.approx(losses, rel=0.05)


def test_a_sample_is_a_function_of_its_position(config):
    objective = make_objective(config)
    a, b, other = (objective.dataset[p] for p in (17, 17, 18))
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert not np.array_equal(a["noise"], other["noise"])
    assert a["noise"].std() == pytest.approx(1, abs=0.2)
    times = [objective.dataset[p]["timestep"] for p in range(300)]
    assert min(times) < 50 and max(times) > 950


def test_flips_turn_everything_at_once_and_each_sample_for_itself(config):
    objective = make_objective(config)
    store, dataset = objective.dataset.readers[0], objective.dataset
    flips = []
    for position in range(40):
        sample = dataset[position]
        found = [
            flipped
            for flipped in (0, 1)
            if all(
                torch.equal(sample[name], store.read(int(sample["index"]), flipped=flipped)[name])
                for name in ("gt", "masked", "mask")
            )
        ]
        assert found, "gt, source and mask of one sample come from different flips"
        flips.append(found[0])
    assert any(set(flips[i : i + 4]) == {0, 1} for i in range(0, 40, 4)), "a flip a batch"
    config.random_flip = False
    still = make_objective(config).dataset
    for sample in map(still.__getitem__, range(20)):
        assert torch.equal(sample["gt"], store.read(int(sample["index"]))["gt"])


def test_sets_are_read_one_after_another(config, tiny_set, tmp_path):
    triplets = read_triplets(tiny_set)
    for name, part in (("a", triplets[:3]), ("b", triplets[3:])):
        with TripletWriter(tmp_path / name) as writer:
            for triplet in part:
                writer.add_triplet(triplet)
    config.meta_path, config.random_flip = [str(tmp_path / "a"), str(tmp_path / "b")], False
    both = make_objective(config).dataset
    config.meta_path = [str(tiny_set)]
    whole = make_objective(config).dataset.readers[0]
    seen = {int(s["index"]): s["gt"] for s in map(both.__getitem__, range(10))}
    assert sorted(seen) == list(range(10))
    for index, latents in seen.items():
        # whatever else was in the batch that was encoded with it
        torch.testing.assert_close(latents, whole.read(index)["gt"], rtol=0, atol=2e-3)


def test_a_high_resolution_below_the_normal_one_is_refused(config):
    with pytest.raises(ValueError, match="high_resolution.*48.*512"):
        replace(config, resolution=512, high_resolution_meta_path=config.meta_path)


def test_only_the_first_samples_are_taken_where_a_number_is_given(config, tiny_set):
    config.max_train_samples = 4
    config.meta_path = [str(tiny_set), str(tiny_set)]
    assert [len(part) for mix in make_objective(config).list_mixes() for part in mix.sets] == [4]
    config.max_train_samples = 13
    assert [len(part) for mix in make_objective(config).list_mixes() for part in mix.sets] == [
        10,
        3,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["crop", "squash"])
def test_training_without_the_cache_equals_training_from_it(config, tmp_path, mode):
    config.resize_mode, config.mask_variants, config.max_train_steps = mode, 1, 6
    config.resolution = 24  # smaller than the images: they are resized and cut
    train_remover(config)
    cached = read_run(tmp_path / "out")
    config.cache_latents, config.output_dir = False, str(tmp_path / "direct")
    config.latent_cache_dir = str(tmp_path / "unused")
    train_remover(config)
    direct = read_run(tmp_path / "direct")
    assert not list((tmp_path / "unused").rglob("*.safetensors"))
    np.testing.assert_allclose(direct[0], cached[0], rtol=2**-8)
    start = load_file(Path(config.pretrained_model_name_or_path) / UNET_FILE.partition("/")[2])
    moved = sum((cached[1][n] - start[n]).square().sum() for n in start) ** 0.5
    apart = sum((cached[1][n] - direct[1][n]).square().sum() for n in start) ** 0.5
    assert 0 < moved and apart < 0.05 * moved


def read_run(folder):
    losses = [json.loads(x)["loss"] for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return losses, load_file(folder / UNET_FILE)


def test_rejected_triplets_are_left_out(config, tiny_set, tmp_path):
    with TripletWriter(tmp_path / "scored") as writer:
        for number, triplet in enumerate(read_triplets(tiny_set)):
            writer.add_triplet(triplet, score=None if number == 0 else float(number % 2))
    config.meta_path = [str(tmp_path / "scored")]
    objective = make_objective(config)
    assert objective.metrics["train_size"] == 6  # five accepted, one without a score
    config.meta_path = [str(tiny_set), str(tmp_path / "scored")]
    assert train_remover(config)["train_size"] == 16


def test_a_set_without_triplets_is_an_error(config, tmp_path):
    with TripletWriter(tmp_path / "empty"):
        pass
    config.meta_path = [str(tmp_path / "empty")]
    with pytest.raises(ValueError, match="the training set is empty"):
        train_remover(config)


def test_the_unet_sees_noise_mask_and_blanked_source(config):
    """Channels 0-3 are noisy GT, 4 the mask, 5-8 the source without its hole."""
    objective = make_objective(config)
    batch = take_batch(objective, range(2))
    seen = {}

    def model(inputs, t, embeds, added_cond_kwargs):
        seen.update(inputs=inputs, t=t, embeds=embeds, added=added_cond_kwargs)
        return type("Output", (), {"sample": torch.zeros_like(batch["gt"])})

    objective.compute_loss(model, batch)
    latents = objective.encode_batch(batch)
    noisy = objective.noise_schedule.add_noise(latents["gt"], batch["noise"], batch["timestep"])
    assert torch.equal(
        seen["inputs"], torch.cat([noisy, latents["mask"], latents["masked"]], dim=1)
    )
    assert seen["embeds"].shape[:2] == (2, 77)
    assert seen["added"]["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_a_perfect_prediction_has_no_loss(config, kind):
    objective = make_objective(config)
    scheduler = objective.noise_schedule
    scheduler.register_to_config(prediction_type=kind)
    batch = take_batch(objective, range(4))
    perfect = (
        batch["noise"]
        if kind == "epsilon"
        else scheduler.get_velocity(batch["gt"], batch["noise"], batch["timestep"])
    )

    def compute(offset):
        sample = perfect + offset
        return objective.compute_loss(
            lambda *a, **k: type("Output", (), {"sample": sample}), batch
        )[0].item()

    assert compute(0.0) == pytest.approx(0, abs=1e-6)
    assert compute(0.5) == pytest.approx(0.25, abs=1e-5)


def test_the_loss_is_upstreams_plain_mean_unless_an_option_changes_it(config, tiny_set, tmp_path):
    """RORem's noise prediction: the mean over all latents, accepted removals as all others."""
    with TripletWriter(tmp_path / "accepted") as writer:
        for triplet in read_triplets(tiny_set):
            writer.add_triplet(triplet, score=1.0, accepted_by="human")
    config.meta_path = [str(tmp_path / "accepted")]
    objective = make_objective(config)
    objective.noise_schedule.register_to_config(prediction_type="epsilon")
    batch = take_batch(objective, range(4))
    sample = torch.randn(batch["noise"].shape, generator=torch.Generator().manual_seed(3))
    loss, _ = objective.compute_loss(lambda *a, **k: type("Output", (), {"sample": sample}), batch)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(sample, batch["noise"]))


def test_mask_weight_makes_the_hole_count_more(config):
    objective = make_objective(config)
    batch = take_batch(objective, range(4))
    target = objective.noise_schedule.get_velocity(batch["gt"], batch["noise"], batch["timestep"])

    def compute(weight, where):
        objective.config.mask_weight = weight
        sample = target + where
        return objective.compute_loss(
            lambda *a, **k: type("Output", (), {"sample": sample}), batch
        )[0].item()

    hole, rest = batch["mask"], 1 - batch["mask"]
    assert compute(3.0, hole) > 1.2 * compute(0.0, hole)
    assert compute(3.0, rest) < compute(0.0, rest)
    assert compute(3.0, 1.0) == pytest.approx(1.0, abs=1e-5)  # weights are normalised


def test_holes_of_accepted_removals_count_at_late_times_alone(config, tiny_set, tmp_path):
    with TripletWriter(tmp_path / "accepted") as writer:
        for triplet in read_triplets(tiny_set)[:5]:
            writer.add_triplet(triplet, score=1.0, accepted_by="human")
    config.meta_path = [str(tiny_set), str(tmp_path / "accepted")]
    config.removal_min_timestep = 600
    objective = make_objective(config)
    min_timestep = {
        int(s["index"]): int(s["min_timestep"])
        for s in map(objective.dataset.__getitem__, range(15))
    }
    assert [min_timestep[i] for i in range(15)] == [0] * 10 + [600] * 5

    def compute(min_timestep, time, where):
        batch = take_batch(objective, range(4)) | {
            "min_timestep": torch.full((4,), min_timestep),
            "timestep": torch.full((4,), time),
        }
        target = objective.noise_schedule.get_velocity(
            batch["gt"], batch["noise"], batch["timestep"]
        )
        off = batch["mask"] if where == "hole" else 1 - batch["mask"]
        return objective.compute_loss(
            lambda *a, **k: type("Output", (), {"sample": target + off}), batch
        )[0].item()

    assert compute(600, 599, "hole") == pytest.approx(0, abs=1e-6)
    assert compute(600, 599, "rest") == pytest.approx(1, abs=1e-5)
    for where in ("hole", "rest"):
        assert compute(600, 600, where) == compute(0, 600, where) > 0.01


@pytest.mark.slow
def test_high_resolution_comes_in_whole_steps_at_its_share(config, tiny_set):
    config.high_resolution_meta_path, config.high_resolution_share = [str(tiny_set)], 0.3
    objective = make_objective(config)
    sides = [objective.dataset[p]["gt"].shape[-1] for p in range(4 * 100)]
    steps = [set(sides[i : i + 4]) for i in range(0, 400, 4)]
    assert all(len(step) == 1 for step in steps)
    assert sum(step == {12} for step in steps) == pytest.approx(30, abs=1)
    large = next(p for p in range(0, 400, 4) if sides[p] == 12)
    chunks = objective.split_batch(take_batch(objective, range(large, large + 4)))
    assert [len(c["gt"]) for c in chunks] == [1] * 4  # 48 px instead of 32: 2.25 times the memory
    assert train_remover(config)["train_size"] == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "device", "kind", "wanted"),
    [
        (None, "cpu", DistributedType.NO, False),
        (None, "cuda", DistributedType.NO, None),
        (None, "cuda", DistributedType.MULTI_GPU, None),
        (None, "cuda", DistributedType.DEEPSPEED, True),
        (None, "cuda", DistributedType.FSDP, True),
        (False, "cuda", DistributedType.FSDP, False),
        (True, "cpu", DistributedType.NO, True),
    ],
)
def test_checkpointing_is_tried_on_gpus_alone(config, option, device, kind, wanted):
    config.gradient_checkpointing = option
    objective = make_objective(config)
    objective.accelerator = SimpleNamespace(device=torch.device(device), distributed_type=kind)
    objective.tune_model(objective.model)
    assert objective.recomputes is wanted
    assert objective.model.is_gradient_checkpointing is bool(wanted)


class ShortObjective(RemoverObjective):
    """A GPU's memory that suffices if activations are not kept, or never."""

    enough = True

    def tune_model(self, model):
        flops = super().tune_model(model)
        self.recomputes = None
        return flops

    def compute_loss(self, model, batch):
        loss = super().compute_loss(model, batch)
        if not (model.is_gradient_checkpointing and self.enough):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_that_memory_asks_for_changes_no_weight(
    config, tmp_path, monkeypatch, compiled
):
    monkeypatch.setattr("rorem_lib.remover.compile_unet", partial(compile_unet, backend="eager"))
    config.torch_compile, config.high_resolution_meta_path = compiled, config.meta_path
    train_remover(replace(config, output_dir=str(tmp_path / "whole")))
    objective = ShortObjective(config)
    loop.train(objective, config)
    assert objective.recomputes is True
    one, other = (load_file(tmp_path / name / UNET_FILE) for name in ("whole", "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_where_checkpointing_does_not_suffice_it_is_no_advice(config, monkeypatch):
    monkeypatch.setattr(ShortObjective, "enough", False)
    with pytest.raises(MemoryError, match="train_batch_size 2") as caught:
        loop.train(ShortObjective(config), config)
    assert "gradient_checkpointing" not in str(caught.value)


def test_wide_and_tall_pictures_are_trained_in_shapes_of_their_own(config, tmp_path):
    rng = np.random.default_rng(0)
    with TripletWriter(tmp_path / "mixed") as writer:
        for number in range(30):
            height, width = ((40, 80), (80, 40), (60, 60))[number % 3]
            mask = np.zeros((height, width), np.uint8)
            mask[10:20, 10:20] = 255
            picture = rng.integers(0, 256, (height, width, 3), np.uint8)
            writer.add(id=str(number), source=picture, mask=mask, gt=picture[::-1].copy())
    config.meta_path, config.aspect_buckets = [str(tmp_path / "mixed")], True
    objective = make_objective(config)
    shapes = set()
    for start in range(0, 120, 4):
        batch = take_batch(objective, range(start, start + 4))
        height, width = (side * 4 for side in batch["noise"].shape[-2:])
        shapes.add((height, width))
        assert objective.make_condition(batch["noise"])["time_ids"][0].tolist() == [
            height,
            width,
            0,
            0,
            height,
            width,
        ]
    assert (32, 32) in shapes and len(shapes) == 3
    assert {h > w for h, w in shapes if h != w} == {True, False}
    config.aspect_buckets = False
    square = make_objective(config)
    assert {square.dataset[p]["gt"].shape[1:] for p in range(30)} == {(8, 8)}


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"resolution": 30}, "30 px does not suit this model: take a multiple of"),
        ({"resolution": 0}, "resolution is 0: take 8 or more"),
        ({"resize_mode": "stretch"}, "resize_mode is 'stretch': take crop or squash"),
        ({"trainable_modules": ["attn7"]}, "no module's name ends so"),
        ({"high_resolution_share": 1.5}, "high_resolution_share is 1.5"),
    ],
)
def test_options_that_do_not_suit_are_named(config, change, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_objective(replace(config, **change))


def test_trainable_modules_leave_the_rest_as_it_is(config, tiny_model, tmp_path):
    config.trainable_modules = ["attn2.to_q"]
    train_remover(config)
    before = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "out" / UNET_FILE)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and all("attn2.to_q" in n for n in changed)


@pytest.mark.slow
def test_a_lora_is_trained_alone_and_merged_into_what_is_written(config, tiny_model, tmp_path):
    config.lora_rank = 2
    metrics = train_remover(config)
    whole = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    assert 0 < metrics["trainable_parameters"] < 0.3 * sum(w.numel() for w in whole.values())
    merged = AutoPipelineForInpainting.from_pretrained(tmp_path / "out" / "remover").unet
    assert set(merged.state_dict()) == set(whole)
    plain = AutoPipelineForInpainting.from_pretrained(tiny_model)
    plain.load_lora_weights(
        str(tmp_path / "out" / "lora"), weight_name="pytorch_lora_weights.safetensors"
    )
    inputs = (
        torch.randn(1, 9, 8, 8),
        torch.tensor([500]),
        torch.randn(1, 77, merged.config.cross_attention_dim),
    )
    added = {
        "text_embeds": torch.randn(1, plain.text_encoder_2.config.projection_dim),
        "time_ids": torch.ones(1, 6),
    }
    with torch.no_grad():
        a, b = (unet(*inputs, added_cond_kwargs=added).sample for unet in (merged, plain.unet))
        plain.disable_lora()
        c = plain.unet(*inputs, added_cond_kwargs=added).sample
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(a, c, rtol=1e-3, atol=1e-4), "the LoRA does nothing"


def test_losses_are_told_apart_by_the_quartile_of_their_timestep():
    parts = split_by_time(
        torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 249, 250, 999]), 1000
    )
    assert parts["loss_t1"][:2].tolist() == [1, 2] and parts["loss_t1"][2:].isnan().all()
    assert parts["loss_t2"].nanmean() == 3 and parts["loss_t4"].nanmean() == 4
    assert parts["loss_t3"].isnan().all()


def test_min_snr_holds_down_easy_times(config):
    objective = make_objective(config)
    batch = take_batch(objective, range(4)) | {"timestep": torch.full((4,), 5)}
    target = objective.noise_schedule.get_velocity(batch["gt"], batch["noise"], batch["timestep"])

    def compute(gamma):
        objective.config.snr_gamma = gamma
        return objective.compute_loss(
            lambda *a, **k: type("Output", (), {"sample": target + 1}), batch
        )[0].item()

    assert compute(5.0) < 0.1 * compute(0.0)
