"""The simulated annotator says yes and no where a person would, and says that it is simulated."""

import json

import cv2
import numpy as np
import pytest

from rorem_lib.builtin.judge import judge_removal, simulate_labels
from rorem_lib.builtin.scenes import render_scene
from rorem_lib.builtin.sets import Truth
from rorem_lib.data.pictures import save_image
from rorem_lib.data.writer import TripletWriter
from rorem_lib.labels.keys import KEYS, list_decisions
from rorem_lib.labels.log import REASONS
from rorem_lib.labels.queue import QueueItem
from rorem_lib.plots import REASON_COLOURS


@pytest.fixture(scope="module")
def scenes():
    return [render_scene([21, number], role="test") for number in range(60)]


def judge(scene, result):
    truth = Truth(scene.truth, scene.object, scene.shadow)
    return judge_removal(scene.image, scene.mask, result, truth)


def to_bytes(picture):
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def fill_hole(scene, filling):
    """The truth, its hole filled with other colours."""
    return to_bytes(np.where((scene.mask >= 128)[..., None], filling, scene.truth))


def count(scenes, make):
    """(accepted, rejected by reason) of what `make` does to each scene."""
    reasons = [judge(scene, make(scene)).reason for scene in scenes]
    assert set(reasons) - {None} <= set(REASONS), "people choose from the same list"
    return reasons.count(None), {r: reasons.count(r) for r in reasons if r}


def measure_detail(scene):
    """Fine detail in the hole of the truth, grey levels."""
    grey = cv2.cvtColor(scene.truth, cv2.COLOR_RGB2GRAY).astype(np.float32)
    fine = grey - cv2.GaussianBlur(grey, (0, 0), 1.5)
    return float(fine[scene.mask >= 128].std())


# -------------------------------------------------------------------------------- what it accepts


def test_it_accepts_the_truth(scenes):
    assert count(scenes, lambda s: s.truth) == (len(scenes), {})


def test_it_accepts_the_truth_through_noise_that_nobody_sees(scenes):
    rng = np.random.default_rng(1)
    accepted, _ = count(scenes, lambda s: to_bytes(s.truth + rng.normal(0, 3, s.truth.shape)))
    assert accepted == len(scenes)


def test_it_accepts_small_differences_of_colour(scenes):
    rng = np.random.default_rng(1)
    accepted, reasons = count(
        scenes, lambda s: fill_hole(s, s.truth * rng.uniform(0.985, 1.015) + rng.uniform(-2, 2, 3))
    )
    assert accepted >= 0.97 * len(scenes), reasons


def test_it_accepts_texture_that_lies_a_pixel_beside(scenes):
    accepted, reasons = count(scenes, lambda s: fill_hole(s, np.roll(s.truth, 1, axis=1)))
    assert accepted >= 0.95 * len(scenes), reasons


# -------------------------------------------------------------------------------- what it rejects


def test_it_rejects_the_untouched_source(scenes):
    assert count(scenes, lambda s: s.image) == (0, {"incomplete removal": len(scenes)})


def test_it_rejects_what_is_left_of_the_object(scenes):
    accepted, _ = count(scenes, lambda s: to_bytes(0.4 * s.image + 0.6 * s.truth))
    assert accepted == 0


def test_it_rejects_half_of_an_object(scenes):
    def keep_half(scene):
        rows = np.where(scene.object.max(axis=1) > 127)[0]
        result = scene.truth.copy()
        result[int(np.median(rows)) :] = scene.image[int(np.median(rows)) :]
        return result

    accepted, _ = count(scenes, keep_half)
    assert accepted == 0


def test_it_rejects_the_mean_colour_on_texture(scenes):
    textured = [scene for scene in scenes if measure_detail(scene) > 5]
    assert len(textured) >= 10

    def fill_mean(scene):
        return fill_hole(scene, scene.truth[scene.mask >= 128].mean(axis=0))

    accepted, reasons = count(textured, fill_mean)
    assert accepted <= 0.05 * len(textured), reasons
    assert reasons["blur"] >= 0.5 * len(textured)


def test_it_rejects_a_blurred_truth_on_texture(scenes):
    textured = [scene for scene in scenes if measure_detail(scene) > 5]
    accepted, reasons = count(
        textured, lambda s: fill_hole(s, cv2.GaussianBlur(s.truth.astype(np.float32), (0, 0), 4))
    )
    assert accepted <= 0.05 * len(textured), reasons
    assert reasons["blur"] >= 0.7 * len(textured)


def test_it_rejects_another_object_in_the_hole(scenes):
    def invent(scene):
        """A disc of another colour where the object was not."""
        free = cv2.distanceTransform((scene.mask >= 128).astype(np.uint8), cv2.DIST_L2, 3)
        y, x = np.unravel_index(free.argmax(), free.shape)
        disc = np.zeros(scene.mask.shape, np.uint8)
        cv2.circle(disc, (int(x), int(y)), 4, 255, -1)
        result = scene.truth.copy()
        result[disc > 0] = 255 - scene.truth[disc > 0].mean(axis=0).round() // 2 * 2
        contrast = np.abs(result[disc > 0].astype(int) - scene.truth[disc > 0]).mean()
        return result if contrast > 60 else scene.image

    accepted, _ = count(scenes, invent)
    assert accepted == 0


def test_it_rejects_grain_that_the_truth_has_not(scenes):
    rng = np.random.default_rng(1)
    plain = [scene for scene in scenes if measure_detail(scene) < 2]
    assert len(plain) >= 5
    accepted, _ = count(plain, lambda s: fill_hole(s, s.truth + rng.normal(0, 20, s.truth.shape)))
    assert accepted == 0


def test_it_rejects_a_strong_shift_of_colour(scenes):
    accepted, _ = count(scenes, lambda s: fill_hole(s, s.truth + np.array([25, -15, -25])))
    assert accepted == 0


def test_it_rejects_a_shadow_that_was_left(scenes):
    shaded = [
        scene
        for scene in scenes
        if ((scene.shadow > 15) & (scene.mask < 128) & (scene.object <= 8)).sum() > 60
    ]
    assert len(shaded) >= 5
    accepted, reasons = count(
        shaded, lambda s: to_bytes(np.where((s.mask >= 128)[..., None], s.truth, s.image))
    )
    assert accepted <= 0.1 * len(shaded), reasons
    assert reasons.get("shadow left", 0) >= 0.7 * len(shaded), reasons


def disturb(scene, side=8, level=90):
    """The truth with a patch of another colour far from hole and shadow; None without room."""
    taken = ((scene.mask >= 128) | (scene.shadow > 0) | (scene.object > 0)).astype(np.uint8)
    room = cv2.dilate(taken, np.ones((2 * side + 5,) * 2, np.uint8)) == 0
    places = np.argwhere(room[:-side, :-side])
    if not len(places):
        return None
    y, x = places[0]
    result = scene.truth.astype(int)
    patch = result[y : y + side, x : x + side]
    patch += np.where(patch.mean() > 127, -level, level)
    return to_bytes(result)


def test_it_rejects_what_changed_elsewhere(scenes):
    disturbed = [(scene, image) for scene in scenes if (image := disturb(scene)) is not None]
    assert len(disturbed) >= 20
    reasons = [judge(scene, image).reason for scene, image in disturbed]
    assert set(reasons) == {"rest changed"}
    faint = [judge(scene, disturb(scene, level=6)) for scene, _ in disturbed]
    assert all(verdict.accept for verdict in faint)


def test_a_removal_that_fails_in_the_hole_has_that_reason_first(scenes):
    scene = next(s for s in scenes if disturb(s) is not None)
    both = np.where((scene.mask >= 128)[..., None], scene.image, disturb(scene))
    assert judge(scene, both).reason == "incomplete removal"


def test_what_the_other_questions_forgive_is_not_asked_twice(scenes):
    """A remainder of shadow that is small enough does not spill over into the rest."""
    shaded = [s for s in scenes if ((s.shadow > 15) & (s.mask < 128)).sum() > 60]
    assert len(shaded) >= 5
    for scene in shaded:
        left = to_bytes(0.25 * scene.image.astype(float) + 0.75 * scene.truth)
        verdict = judge(scene, np.where((scene.mask >= 128)[..., None], scene.truth, left))
        assert verdict.accept, verdict.reason


@pytest.mark.slow
def test_a_faithful_round_trip_through_the_autoencoder_keeps_the_rest(scenes):
    import torch
    from diffusers import AutoencoderTiny

    from rorem_lib.models.sdxl import resolve_model

    many = [*scenes, *(render_scene([21, number], role="test") for number in range(60, 200))]
    vae = AutoencoderTiny.from_pretrained(resolve_model("builtin"), subfolder="vae").eval()

    def send(scene):
        pixels = torch.from_numpy(scene.truth).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            back = vae.decode(vae.encode(pixels).latents).sample[0]
        return to_bytes((back.permute(1, 2, 0).numpy() + 1) * 127.5)

    accepted, reasons = count(many, send)
    assert reasons.get("rest changed", 0) <= 0.01 * len(many), reasons
    assert accepted >= 0.94 * len(many), reasons


def test_the_judge_has_the_reasons_people_have_in_one_list():
    assert set(REASON_COLOURS) >= set(REASONS)
    assert len({REASON_COLOURS[reason] for reason in REASONS}) == len(REASONS)
    keys = [KEYS[f"reason_{place}"] for place in range(1, len(REASONS) + 1)]
    assert keys == list("1234567") and REASONS[5] == "rest changed"
    buttons = [d["reason"] for d in list_decisions(False) if d["reason"]]
    assert buttons == list(REASONS)


def test_a_shadow_is_not_asked_for_where_there_is_none(scenes):
    without = [scene for scene in scenes if scene.shadow.max() <= 10]
    assert without and all(judge(s, s.truth).measures["shadow"] is None for s in without)


def test_it_judges_large_pictures_as_it_judges_small_ones():
    large = [render_scene([21, number], role="high_resolution") for number in range(12)]
    assert count(large, lambda s: s.truth)[0] == 12
    assert count(large, lambda s: s.image)[0] == 0


def test_pictures_of_other_sizes_are_an_error(scenes):
    scene = scenes[0]
    with pytest.raises(ValueError, match="sizes differ"):
        judge(scene, scene.truth[:60])


def test_measures_are_plain_numbers(scenes):
    verdict = judge(scenes[0], scenes[0].truth)
    json.dumps(verdict.measures)
    assert verdict.reason is None and abs(verdict.measures["residue"]) < 1e-6


# -------------------------------------------------------------------------------------- its labels


@pytest.fixture
def candidates(scenes, tmp_path):
    """Three candidates: the truth, the untouched source, another truth; and their hidden truth."""
    for part in ("truth", "object", "shadow"):
        (tmp_path / "hidden" / part).mkdir(parents=True)
    with TripletWriter(tmp_path / "candidates") as writer:
        for number, scene in enumerate(scenes[:3]):
            writer.add(
                id=f"c{number}",
                source=scene.image,
                mask=scene.mask,
                gt=scene.image if number == 1 else scene.truth,
            )
            for part in ("truth", "object", "shadow"):
                save_image(tmp_path / "hidden" / part / f"c{number}.png", getattr(scene, part))
    return tmp_path


def read_log(folder, name="simulated"):
    lines = (folder / "labels" / f"labels-{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_labels_say_that_they_are_simulated(candidates):
    verdicts = simulate_labels(
        candidates / "candidates", candidates / "hidden", candidates / "labels"
    )
    assert {v["id"]: v["accept"] for v in verdicts} == {"c0": True, "c1": False, "c2": True}
    lines = read_log(candidates)
    assert all(line["simulated"] is True and "simulated" in line["annotator"] for line in lines)
    assert [line["label"] for line in lines] == ["accept", "reject", "accept"]
    assert lines[1]["reason"] == "incomplete removal" and len(lines[0]["content"]) == 16
    with pytest.raises(ValueError, match="must say that it is simulated"):
        simulate_labels(
            candidates / "candidates",
            candidates / "hidden",
            candidates / "labels",
            annotator="anna",
        )


def test_stopped_labelling_goes_on(candidates):
    folders = candidates / "candidates", candidates / "hidden", candidates / "labels"
    queue = [
        QueueItem("c2", "audit"),
        QueueItem("c0", "uncertainty"),
        QueueItem("c2", "audit", repeat=True),
    ]
    assert len(simulate_labels(*folders, queue=queue)) == 2
    assert [v["id"] for v in simulate_labels(*folders)] == ["c1"]
    assert [(line["id"], line["order"]) for line in read_log(candidates)] == [
        ("c2", "audit"),
        ("c0", "uncertainty"),
        ("c1", "random"),
    ]
    assert simulate_labels(*folders) == []
