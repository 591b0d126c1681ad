"""The remover: what its loss sees, that it learns, and that stock diffusers opens the result."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForInpainting
from PIL import Image
from safetensors.torch import load_file

from rorem_lib import options
from rorem_lib.latent_cache import open_cache
from rorem_lib.remover import CachedLatents, RemoverConfig, RemoverObjective, train_remover
from rorem_lib.triplets import TripletWriter, load_images, read_triplets

UNET_FILE = "remover/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def config(tiny_model, tiny_set, tmp_path):
    return RemoverConfig(
        output_dir=str(tmp_path / "out"), meta_path=[str(tiny_set)], resolution=32,
        high_resolution=48, pretrained_model_name_or_path=str(tiny_model), max_train_steps=3,
        train_batch_size=4, learning_rate=1e-3, logging_steps=1, mixed_precision="no",
        latent_cache_dir=str(tmp_path / "cache"))


def make_objective(config):
    objective = RemoverObjective(config)
    objective.model = objective.build_model()
    objective.dataset = objective.make_dataset()
    return objective


def take_batch(objective, positions):
    samples = [objective.dataset[p] for p in positions]
    return {k: torch.as_tensor(np.stack([s[k] for s in samples])) for k in samples[0]}


def test_stock_diffusers_opens_the_remover_and_runs_it(config, tiny_set, tmp_path):
    metrics = train_remover(config)
    assert metrics["train_size"] == 10 and metrics["steps"] == 3
    assert metrics == json.loads((tmp_path / "out" / "train_metrics.json").read_text())
    pipe = AutoPipelineForInpainting.from_pretrained(tmp_path / "out" / "remover")
    pipe.set_progress_bar_config(disable=True)
    pictures = load_images(read_triplets(tiny_set)[0])
    image = pipe(prompt="", image=Image.fromarray(pictures["source"]), height=32, width=32,
                 mask_image=Image.fromarray(pictures["mask"]), num_inference_steps=2,
                 guidance_scale=1.0, strength=1.0).images[0]
    assert image.size == (32, 32)
    assert not list((tmp_path / "out").rglob("*.bin")), "weights are safetensors, never pickles"


def test_all_of_the_unet_is_trained_and_nothing_else(config, tiny_model, tmp_path):
    config.ema_decay = 0.0
    train_remover(config)
    before = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "out" / UNET_FILE)
    still = [n for n in before if torch.equal(before[n], after[n])]
    assert not still, f"untrained: {still}"
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model"):
        old, new = (load_file(f / f"{part}.safetensors")
                    for f in (tiny_model, tmp_path / "out" / "remover"))
        assert all(torch.equal(old[n], new[n]) for n in old), part


def test_it_learns_its_own_triplets(config, tmp_path):
    config.max_train_steps, config.ema_decay = 25, 0.0
    train_remover(config)
    losses = [json.loads(x)["loss"] for x in
              (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_a_sample_is_a_function_of_its_position(config):
    objective = make_objective(config)
    a, b, other = (objective.dataset[p] for p in (17, 17, 18))
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert not np.array_equal(a["noise"], other["noise"])
    assert a["noise"].std() == pytest.approx(1, abs=0.2)
    times = [objective.dataset[p]["timestep"] for p in range(300)]
    assert min(times) < 50 and max(times) > 950


def test_flips_turn_everything_at_once(config, tiny_set):
    objective = make_objective(config)
    cache = objective.dataset.caches[0]
    twins = set()
    for position in range(40):
        sample = objective.dataset[position]
        place = sample["index"]
        found = [twin for twin in (0, 1)
                 if all(np.array_equal(sample[n], np.float32(getattr(cache, n)[place, twin]))
                        for n in ("gt", "masked", "source", "mask"))]
        assert found, "gt, source and mask of one sample come from different twins"
        twins.add(found[0])
    assert twins == {0, 1}
    still = CachedLatents([cache], seed=4, flip=False)
    assert all(np.array_equal(s["gt"], np.float32(cache.gt[s["index"], 0]))
               for s in map(still.__getitem__, range(20)))


def test_sets_are_read_one_after_another(config, tiny_set, tiny_model):
    triplets, vae = read_triplets(tiny_set), RemoverObjective(config)
    vae.build_model()
    caches = [open_cache(part, vae.pipe.vae, size=32) for part in (triplets[:3], triplets[3:])]
    both = CachedLatents(caches, seed=1, flip=False)
    seen = {}
    for position in range(10):
        seen[int(both[position]["index"])] = both[position]["gt"]
    assert sorted(seen) == list(range(10))
    for index, latents in seen.items():
        cache, place = (caches[0], index) if index < 3 else (caches[1], index - 3)
        assert np.array_equal(latents, np.float32(cache.gt[place, 0]))


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
    noisy = objective.noise_schedule.add_noise(batch["gt"], batch["noise"], batch["timestep"])
    assert torch.equal(seen["inputs"], torch.cat([noisy, batch["mask"], batch["masked"]], dim=1))
    assert seen["embeds"].shape[:2] == (2, 77)
    assert seen["added"]["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_a_perfect_prediction_has_no_loss(config, kind):
    objective = make_objective(config)
    scheduler = objective.noise_schedule
    scheduler.register_to_config(prediction_type=kind)
    batch = take_batch(objective, range(4))
    perfect = batch["noise"] if kind == "epsilon" else scheduler.get_velocity(
        batch["gt"], batch["noise"], batch["timestep"])

    def compute(offset):
        sample = perfect + offset
        return objective.compute_loss(
            lambda *a, **k: type("Output", (), {"sample": sample}), batch)[0].item()

    assert compute(0.0) == pytest.approx(0, abs=1e-6)
    assert compute(0.5) == pytest.approx(0.25, abs=1e-6)


def test_mask_weight_makes_the_hole_count_more(config):
    objective = make_objective(config)
    batch = take_batch(objective, range(4))
    target = objective.noise_schedule.get_velocity(batch["gt"], batch["noise"], batch["timestep"])

    def compute(weight, where):
        objective.config.mask_weight = weight
        sample = target + where
        return objective.compute_loss(
            lambda *a, **k: type("Output", (), {"sample": sample}), batch)[0].item()

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
    least = {int(s["index"]): int(s["least"]) for s in map(objective.dataset.__getitem__,
                                                           range(15))}
    assert [least[i] for i in range(15)] == [0] * 10 + [600] * 5

    def compute(least, time, where):
        batch = take_batch(objective, range(4)) | {
            "least": torch.full((4,), least), "timestep": torch.full((4,), time)}
        target = objective.noise_schedule.get_velocity(batch["gt"], batch["noise"],
                                                       batch["timestep"])
        off = batch["mask"] if where == "hole" else 1 - batch["mask"]
        return objective.compute_loss(lambda *a, **k: type("Output", (), {"sample": target + off}),
                                      batch)[0].item()

    assert compute(600, 599, "hole") == pytest.approx(0, abs=1e-6)
    assert compute(600, 599, "rest") == pytest.approx(1, abs=1e-5)
    for where in ("hole", "rest"):
        assert compute(600, 600, where) == compute(0, 600, where) > 0.01


def test_high_resolution_comes_in_whole_batches_at_its_share(config, tiny_set):
    config.high_resolution_meta_path, config.high_resolution_share = [str(tiny_set)], 0.3
    objective = make_objective(config)
    sides = [objective.dataset[p]["gt"].shape[-1] for p in range(4 * 100)]
    batches = [set(sides[i:i + 4]) for i in range(0, 400, 4)]
    assert all(len(batch) == 1 for batch in batches)
    assert 0.15 < sum(batch == {12} for batch in batches) / 100 < 0.45
    assert train_remover(config)["train_size"] == 20


def test_min_snr_holds_down_easy_times(config):
    objective = make_objective(config)
    batch = take_batch(objective, range(4)) | {"timestep": torch.full((4,), 5)}
    target = objective.noise_schedule.get_velocity(batch["gt"], batch["noise"], batch["timestep"])

    def compute(gamma):
        objective.config.snr_gamma = gamma
        return objective.compute_loss(
            lambda *a, **k: type("Output", (), {"sample": target + 1}), batch)[0].item()

    assert compute(5.0) < 0.1 * compute(0.0)


def test_the_command_line_takes_the_configs_fields():
    config = options.parse_config(RemoverConfig, ["--meta_path", "a", "b", "--resolution", "512",
                                               "--no-random_flip"])
    assert (config.meta_path, config.resolution, config.random_flip) == (["a", "b"], 512, False)
