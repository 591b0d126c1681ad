"""The discriminator: its head is trained, its folder is whole, scores are each image's own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from rorem_lib import discriminator as module
from rorem_lib.data.triplets import load_images, read_triplets
from rorem_lib.data.writer import TripletWriter
from rorem_lib.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    DiscriminatorObjective,
    score_images,
    score_triplets,
    train_discriminator,
)
from rorem_lib.models import sdxl


@pytest.fixture(scope="module")
def scored(tiny_set, tmp_path_factory):
    """A set whose accepted removals are the truth and whose rejected ones are painted red."""
    with TripletWriter(tmp_path_factory.mktemp("scored") / "set") as writer:
        for number, triplet in enumerate(read_triplets(tiny_set)):
            pictures, good = load_images(triplet), number % 2 == 0
            removal = pictures["gt"].copy()
            if not good:
                removal[pictures["mask"] > 0] = (220, 20, 20)
            writer.add(
                id=triplet.id,
                source=pictures["source"],
                mask=pictures["mask"],
                gt=removal,
                score=float(good),
            )
    return writer.folder


@pytest.fixture
def config(tiny_model, scored, tmp_path):
    return DiscriminatorConfig(
        output_dir=str(tmp_path / "out"),
        meta_path=[str(scored)],
        resolution=32,
        max_train_steps=4,
        pretrained_model_name_or_path=str(tiny_model),
        train_batch_size=4,
        logging_steps=1,
        learning_rate=3e-3,
        mixed_precision="no",
        checkpointing_steps=2,
        random_flip=True,
        random_shift=True,
        untouched_share=0.05,
        head_channels=32,
    )


@pytest.fixture
def small(tiny_model):
    torch.manual_seed(5)
    return Discriminator(
        sdxl.load_pipeline(str(tiny_model)),
        rank=2,
        lora_targets=["to_q", "to_v"],
        head_channels=16,
        origin={"base_model": str(tiny_model), "revision": "", "resolution": 32},
    )


def make_inputs(count, side=8):
    generator = torch.Generator().manual_seed(1)
    removal, source = (torch.randn(count, 4, side, side, generator=generator) for _ in "ab")
    return removal, (torch.rand(count, 1, side, side, generator=generator) > 0.7).float(), source


def test_head_and_lora_are_trained_and_frozen_blocks_are_not(config, monkeypatch):
    kept = {}
    build = DiscriminatorObjective.build_model

    def remember(self):
        kept["model"] = build(self)
        kept["before"] = {n: p.detach().clone() for n, p in kept["model"].named_parameters()}
        return kept["model"]

    monkeypatch.setattr(DiscriminatorObjective, "build_model", remember)
    train_discriminator(config)
    moved = {n: not torch.equal(p, kept["before"][n]) for n, p in kept["model"].named_parameters()}
    trained = {n for n in moved if "lora_" in n or n.startswith("head.")}
    assert {n for n in moved if moved[n]} == trained
    assert any("lora_" in n for n in trained) and "head.fine.0.weight" in trained
    assert not any("up_blocks" in n for n in moved)


def test_its_folder_opens_and_scores_the_same(config, scored, tmp_path, monkeypatch):
    kept = {}
    save = Discriminator.save_pretrained

    def remember(self, folder):
        kept["scores"] = score_triplets(self.eval(), read_triplets(scored))
        save(self, folder)

    monkeypatch.setattr(Discriminator, "save_pretrained", remember)
    train_discriminator(config)
    folder = tmp_path / "out" / "discriminator"
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "head.safetensors",
        "pytorch_lora_weights.safetensors",
    ]
    opened = Discriminator.from_pretrained(str(folder))
    assert not opened.training
    scores = score_triplets(opened, read_triplets(scored))
    assert np.array_equal(scores, kept["scores"])
    assert scores.std() > 1e-4, "all removals have one score: this test could not fail"


@pytest.mark.slow
def test_it_learns_to_tell_good_from_bad(config, scored):
    config.max_train_steps, config.random_flip, config.random_shift = 30, False, False
    metrics = train_discriminator(config)
    assert metrics["train_size"] == 10 and metrics["accepted_share"] == 0.5
    opened = Discriminator.from_pretrained(str(Path(config.output_dir) / "discriminator"))
    triplets = read_triplets(scored)
    scores = score_triplets(opened, triplets)
    good = np.array([t.extra["score"] > 0.5 for t in triplets])
    assert scores[good].min() > scores[~good].max()


def test_scores_do_not_depend_on_the_batch(small, scored):
    small.eval()
    triplets = read_triplets(scored)
    scores = score_triplets(small, triplets, batch_size=10)
    assert scores.shape == (10,) and scores.dtype == np.float32
    assert ((scores > 0) & (scores < 1)).all() and scores.std() > 1e-5
    for batch_size in (1, 3):
        assert np.allclose(
            scores, score_triplets(small, triplets, batch_size=batch_size), atol=1e-5
        )
    assert np.allclose(scores[::-1], score_triplets(small, triplets[::-1]), atol=1e-5)
    assert score_triplets(small, []).shape == (0,)


@torch.no_grad()
def test_images_at_hand_are_scored_as_those_of_a_set(small, scored):
    triplets = read_triplets(scored)[:4]
    opened = [load_images(t) for t in triplets]
    parts = ([p[name] for p in opened] for name in ("source", "mask", "gt"))
    scores = score_images(small.eval(), *parts)
    assert np.array_equal(scores, score_triplets(small, triplets))


def test_it_reads_all_three_inputs_at_any_size(small):
    small.eval()
    for side in (8, 12):
        inputs = make_inputs(3, side)
        logits = small(*inputs)
        assert logits.shape == (3,)
        for place in range(3):
            changed = list(inputs)
            changed[place] = changed[place].flip(-1)
            assert not torch.allclose(small(*changed), logits, atol=1e-6), place


def test_one_kind_of_label_is_a_clear_error(config, scored, tmp_path):
    for kind, number in ((0.0, 0), (1.0, 5)):
        with TripletWriter(tmp_path / f"only-{kind}") as writer:
            for triplet in read_triplets(scored):
                if triplet.extra["score"] == kind:
                    writer.add_triplet(triplet)
        config.meta_path = [str(tmp_path / f"only-{kind}")]
        with pytest.raises(ValueError, match=f"5 labelled.*{number}"):
            train_discriminator(config)


def test_unlabelled_triplets_are_no_rejected_ones(config, scored, tiny_set, tmp_path):
    with TripletWriter(tmp_path / "mixed") as writer:
        for number, triplet in enumerate(read_triplets(scored)):
            writer.add_triplet(triplet, score=triplet.extra["score"] if number < 6 else None)
    config.meta_path = [str(tmp_path / "mixed")]
    assert train_discriminator(config)["train_size"] == 6


def test_untouched_sources_are_shown_as_failures(config):
    config.untouched_share = 0.3
    objective = DiscriminatorObjective(config)
    objective.accelerator = Accelerator()
    objective.build_model()
    dataset = objective.make_dataset()
    samples = [dataset[p] for p in range(200)]
    untouched = [s for s in samples if np.array_equal(s["gt"], s["source"])]
    assert 0.2 < len(untouched) / 200 < 0.4
    assert not any(s["label"] for s in untouched) and any(s["label"] for s in samples)


def test_shifts_move_everything_at_once(config):
    config.untouched_share, config.random_flip = 0.0, False
    objective = DiscriminatorObjective(config)
    objective.accelerator = Accelerator()
    objective.build_model()
    dataset = objective.make_dataset()
    shifts = set()
    for position in range(30):
        sample = dataset[position]
        index = dataset.order.get_index(position)
        still = {n: x.float().numpy() for n, x in dataset.store.read(index).items()}
        assert set(still) == {"gt", "mask", "source"}
        side = still["gt"].shape[-1]
        found = [
            (y, x)
            for y in range(side)
            for x in range(side)
            if all(np.array_equal(sample[n], np.roll(still[n], (y, x), axis=(1, 2))) for n in still)
        ]
        assert len(found) == 1, "removal, mask and source are shifted apart"
        shifts.add(found[0])
    assert len(shifts) > 15
    config.random_shift = False
    assert np.array_equal(
        dataset[0]["gt"], dataset.store.read(dataset.order.get_index(0))["gt"].float().numpy()
    )


def test_classes_can_be_balanced(config, scored, tmp_path):
    with TripletWriter(tmp_path / "few") as writer:
        for triplet in read_triplets(scored)[:7]:
            if triplet.extra["score"] == 0 or triplet.id == "scene-0":
                writer.add_triplet(triplet)
    config.meta_path, config.balance_classes = [str(tmp_path / "few")], True
    objective = DiscriminatorObjective(config)
    objective.accelerator = Accelerator()
    objective.build_model()
    objective.make_dataset()
    assert objective.positive_weight == pytest.approx(3)
    batch = {"label": torch.tensor([1.0, 0, 0, 0]), **dict.fromkeys(("gt", "mask", "source"))}
    logits = torch.zeros(4, requires_grad=True)
    objective.compute_loss(lambda *inputs: logits, batch)[0].backward()
    assert logits.grad.sum().abs() < 1e-6  # the one accepted pulls as hard as three rejected


def test_a_stopped_training_goes_on_bit_for_bit(config, tmp_path, monkeypatch):
    train_discriminator(config)
    whole = tmp_path / "out" / "discriminator"
    config.output_dir = str(tmp_path / "stopped")
    calls, compute = [], DiscriminatorObjective.compute_loss

    def stop_in_fourth(self, model, batch):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compute(self, model, batch)

    monkeypatch.setattr(DiscriminatorObjective, "compute_loss", stop_in_fourth)
    with pytest.raises(KeyboardInterrupt):
        train_discriminator(config)
    assert train_discriminator(config)["resumed_at"] == 2 and len(calls) == 6
    for name in (module.HEAD_FILE, module.LORA_FILE):
        a, b = load_file(whole / name), load_file(tmp_path / "stopped" / "discriminator" / name)
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_what_is_no_discriminator_is_named(tmp_path, tiny_model):
    for folder in (tmp_path, tiny_model, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match="holds no discriminator"):
            Discriminator.from_pretrained(str(folder))
    (tmp_path / "discriminator").mkdir()
    (tmp_path / "discriminator/head.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=f"it is in {tmp_path}/discriminator"):
        Discriminator.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        (lambda name: name, None),
        (lambda name: f"base_model.model.{name}", r" 0 of its (\d+) .* \1 are unexp.* \1 are miss"),
        (lambda name: name if "lora_A" in name else None, r" 0 are unexp.* are missing .*lora_B"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_with_their_numbers(small, tmp_path, change, numbers):
    small.save_pretrained(tmp_path)
    path = tmp_path / module.LORA_FILE
    adapters = {change(name): tensor for name, tensor in load_file(path).items()}
    adapters.pop(None, None)
    save_file(adapters, path)
    if numbers is None:
        Discriminator.from_pretrained(str(tmp_path))
        return
    with pytest.raises(ValueError, match=f"{path} .*{numbers}"):
        Discriminator.from_pretrained(str(tmp_path))


def test_a_score_that_is_no_number_names_discriminator_and_removal(small, scored, tmp_path):
    with torch.no_grad():
        small.unet.conv_in.weight[0, 0, 0, 0] = torch.nan
    removal = read_triplets(scored)[0].gt
    with pytest.raises(FloatingPointError, match=f"{small.place}.*{removal}"):
        score_triplets(small.eval(), read_triplets(scored))


def test_its_settings_say_what_it_was_made_of(config, tmp_path, tiny_model):
    config.lora_targets = ["to_q", "conv1"]
    train_discriminator(config)
    folder = tmp_path / "out" / "discriminator"
    settings = json.loads((folder / "config.json").read_text())
    assert settings == {
        "rank": 4,
        "lora_targets": ["to_q", "conv1"],
        "head_channels": 32,
        "base_model": str(tiny_model),
        "revision": "",
        "resolution": 32,
    }
    names = load_file(folder / module.LORA_FILE)
    assert all("to_q" in n or "conv1" in n for n in names)
    assert any("conv1" in n for n in names)
