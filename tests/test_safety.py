"""The content filter, with a small checker of random weights that flags one of two images."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from rorem_lib.data.assembly import assemble_sets
from rorem_lib.data.pictures import save_image
from rorem_lib.models.safety import SafetyChecker
from rorem_lib.models.sdxl import silence_libraries
from rorem_lib.sources.upstream import UpstreamSource


def _picture(number):
    rng = np.random.default_rng(number)
    return np.kron(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), np.ones((6, 6, 1), np.uint8))


@pytest.fixture(scope="module")
def checker_folder(tmp_path_factory):
    """A checker whose concepts are the embeddings of images 1 and 4."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    folder = tmp_path_factory.mktemp("checker")
    torch.manual_seed(0)
    with silence_libraries():
        model = StableDiffusionSafetyChecker(
            CLIPConfig(
                projection_dim=16,
                text_config={"hidden_size": 32},
                vision_config={
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 32,
                    "patch_size": 8,
                    "projection_dim": 16,
                },
            )
        )
        processor = CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
        inputs = processor([_picture(n) for n in range(6)], return_tensors="pt").pixel_values
        with torch.no_grad():
            embeds = model.visual_projection(model.vision_model(inputs)[1])
        near = torch.nn.functional.cosine_similarity(embeds[:, None], embeds[None], dim=2)
        nearest = (near - 2 * torch.eye(6)).max()
        assert nearest < 0.997  # else the images could not be told apart
        model.concept_embeds.data[:] = embeds[1]
        model.concept_embeds.data[3] = embeds[4]
        model.concept_embeds_weights.data[:] = (1 + nearest) / 2
        model.special_care_embeds.data[:] = -embeds.mean(0)
        model.special_care_embeds_weights.data[:] = 1
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def test_unsafe_pictures_are_found_in_order_in_batches_of_any_size(checker_folder):
    checker = SafetyChecker(str(checker_folder), device="cpu")
    for batch_size in (1, 4, 32):
        found = list(checker.find_unsafe((_picture(n) for n in range(6)), batch_size=batch_size))
        assert found == [False, True, False, False, True, False]


def test_pictures_are_taken_a_batch_at_a_time_in_any_size_and_stay_as_they_are(checker_folder):
    checker = SafetyChecker(str(checker_folder), device="cpu")
    pictures = [np.kron(_picture(n), np.ones((2, 2, 1), np.uint8))[:, : 90 + n] for n in range(6)]
    pictures[1], taken = _picture(1), []
    found = checker.find_unsafe((taken.append(p) or p for p in pictures), batch_size=4)
    assert next(found) is False and len(taken) == 4
    assert list(found)[0] is True and len(taken) == 6
    assert np.array_equal(pictures[1], _picture(1))  # not blackened
    assert list(checker.find_unsafe([])) == []


def _write_raw(raw):
    """Four triplets; the source of the second is unsafe."""
    records = []
    mask = np.zeros((48, 48), np.uint8)
    mask[8:20, 8:20] = 255
    for part in ("source", "mask", "GT"):
        (raw / part).mkdir(parents=True)
    for n in range(4):
        gt = _picture(n)
        gt[mask > 0] = 128
        for part, picture in (("source", _picture(n)), ("mask", mask), ("GT", gt)):
            save_image(raw / part / f"{n}.png", picture)
        records.append({part: f"{part}/{n}.png" for part in ("source", "mask", "GT")})
    (raw / "meta.json").write_text(json.dumps(records))
    return UpstreamSource(str(raw))


def test_unsafe_sources_are_rejected_and_no_picture_is_asked_for_twice(checker_folder, tmp_path):
    source = _write_raw(tmp_path / "raw")
    checker = SafetyChecker(str(checker_folder), device="cpu")
    result = assemble_sets(source, tmp_path / "out", safety=checker)
    assert result.reasons == {"unsafe": 1} and result.counts == {"labelled": 3}
    assert json.loads(result.rejected.read_text())["id"] == "1"

    class Silent:
        model_id = checker.model_id

        def find_unsafe(self, pictures):
            return iter([False for _ in pictures if pytest.fail("asked again")])

    again = assemble_sets(source, tmp_path / "out", safety=Silent())
    assert again.counts == result.counts and again.reasons == result.reasons


def test_answers_survive_a_kill_and_the_rest_is_asked_for(checker_folder, tmp_path):
    source, checker = _write_raw(tmp_path / "raw"), SafetyChecker(str(checker_folder), device="cpu")
    asked = []

    class Slow:
        """Answers one by one, as long as it may."""

        def __init__(self, most):
            self.most = most

        def find_unsafe(self, pictures):
            for picture in pictures:
                if len(asked) == self.most:
                    raise KeyboardInterrupt
                asked.append(picture)
                yield from checker.find_unsafe([picture])

    with pytest.raises(KeyboardInterrupt):
        assemble_sets(source, tmp_path / "out", safety=Slow(2))
    with open(tmp_path / "out/safety.jsonl", "a") as stream:
        stream.write('{"id": "2", "uns')  # torn
    result = assemble_sets(source, tmp_path / "out", safety=Slow(99))
    assert result.reasons == {"unsafe": 1} and result.counts == {"labelled": 3}
    assert len(asked) == 4 and all(np.array_equal(asked[n], _picture(n)) for n in range(4))
    answers = [json.loads(line) for line in (tmp_path / "out/safety.jsonl").open()]
    assert [(a["id"], a["unsafe"]) for a in answers] == [(str(n), n == 1) for n in range(4)]
    assert sorted(p.name for p in (tmp_path / "out/labelled/source").iterdir()) == [
        "0.png",
        "2.png",
        "3.png",
    ]
    whole = assemble_sets(source, tmp_path / "whole", safety=checker)
    assert whole.sets["labelled"].read_bytes() == result.sets["labelled"].read_bytes()


def test_other_settings_ask_again_and_without_a_checker_nothing_is_unsafe(checker_folder, tmp_path):
    source, checker = _write_raw(tmp_path / "raw"), SafetyChecker(str(checker_folder), device="cpu")
    assert assemble_sets(source, tmp_path / "out", safety=checker).counts == {"labelled": 3}
    assert assemble_sets(source, tmp_path / "out").counts == {"labelled": 4}
    assert not (tmp_path / "out/safety.jsonl").exists()


def test_without_a_network_the_missing_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="CompVis/stable-diffusion-safety-checker"):
        SafetyChecker(device="cpu")
    with pytest.raises(OSError, match=f"{tmp_path}"):
        SafetyChecker(str(tmp_path), device="cpu")
