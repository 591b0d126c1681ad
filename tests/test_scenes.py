import cv2
import numpy as np
import pytest

from rorem_lib.builtin import scenes
from rorem_lib.builtin.scenes import render_scene

WIDE = ("pool", "high_resolution", "test")
COUNT = 120


@pytest.fixture(scope="module")
def rendered():
    return {
        role: [render_scene([11, i], role=role, size=64) for i in range(COUNT)]
        for role in scenes.ROLES
    }


def _bytes(scene):
    return b"".join(
        getattr(scene, part).tobytes() for part in ("image", "truth", "object", "shadow", "mask")
    )


def _change(scene):
    return np.abs(scene.image.astype(int) - scene.truth).max(axis=2)


def test_a_scene_is_a_function_of_role_seed_and_index():
    assert _bytes(render_scene([4, 7])) == _bytes(render_scene([4, 7]))
    others = [
        render_scene([4, 8]),
        render_scene([5, 7]),
        render_scene([4, 7], role="test"),
        render_scene([4, 7], role="high_resolution", size=64),
    ]
    assert len({_bytes(scene) for scene in [render_scene([4, 7]), *others]}) == 5


def test_roles_have_their_families_kinds_and_effects(rendered):
    for role, found in rendered.items():
        families = {scene.family for scene in found}
        kinds = {scene.kind for scene in found}
        effects = {scene.effect for scene in found}
        if role in WIDE:
            assert families == set(scenes.KNOWN + scenes.NEW)
            assert kinds == set(scenes.KNOWN_OBJECTS + scenes.NEW_OBJECTS)
            new = np.mean([scene.family in scenes.NEW for scene in found])
            assert 0.35 < new < 0.65
        else:
            assert families == set(scenes.LABELLED.get(role, scenes.KNOWN))
            assert kinds == set(scenes.KNOWN_OBJECTS)
        assert effects == set(scenes.EFFECTS[role])


def test_initial_triplets_show_neither_cast_shadows_nor_reflections():
    shown = {effect for role in ("rord", "mulan") for effect in scenes.EFFECTS[role]}
    assert shown == {"none", "contact"}
    assert {"cast", "reflection"} <= set(scenes.EFFECTS["pool"]) == set(scenes.EFFECTS["test"])


def test_initial_triplets_leave_a_gap_to_the_pool():
    labelled = {family for part in scenes.LABELLED.values() for family in part}
    assert not labelled & set(scenes.NEW)
    assert not set(scenes.KNOWN_OBJECTS) & set(scenes.NEW_OBJECTS)


def test_masks_cover_the_object_and_leave_something(rendered):
    kinds = set()
    for found in rendered.values():
        for scene in found:
            assert set(np.unique(scene.mask)) == {0, 255}
            assert (scene.mask[scene.object > 24] == 255).all()
            assert (scene.object > 128).sum() > 20  # there is something to remove
            kinds.add(scene.mask_kind)
    assert kinds == set(scenes.MASK_KINDS)


def test_truth_is_the_image_outside_object_and_effect(rendered):
    for found in rendered.values():
        for scene in found:
            touched = cv2.dilate((scene.object > 0).astype(np.uint8), np.ones((3, 3), np.uint8))
            untouched = (touched == 0) & (scene.shadow == 0)
            assert untouched.any()
            assert (_change(scene)[untouched] == 0).all()


def test_shadow_is_the_change_outside_the_object(rendered):
    for scene in rendered["rord"]:
        outside = scene.object <= 8
        assert (scene.shadow[~outside] == 0).all()
        assert np.array_equal(scene.shadow[outside], _change(scene)[outside])


def test_effects_show_and_their_absence_does_not(rendered):
    found = [scene for role in ("rord", *WIDE) for scene in rendered[role]]
    for effect in ("contact", "cast", "reflection"):
        of_kind = [scene for scene in found if scene.effect == effect]
        seen = np.mean([(scene.shadow > 12).sum() > 12 for scene in of_kind])
        assert seen > 0.6, effect
    for scene in (scene for scene in found if scene.effect == "none"):
        assert scene.shadow.max() < 16  # the antialiased edge alone


def test_masks_with_shadow_cover_what_is_strong_of_it(rendered):
    covered = {"object": [], "with_shadow": []}
    for scene in (scene for role in WIDE for scene in rendered[role]):
        strong = scene.shadow > 8
        if scene.mask_kind in covered and scene.effect == "contact" and strong.sum() > 20:
            covered[scene.mask_kind].append((scene.mask[strong] > 0).mean())
    assert np.mean(covered["with_shadow"]) > 0.99
    assert np.mean(covered["object"]) < 0.7


def test_no_initial_triplet_shows_a_shadow_outside_of_its_mask(rendered):
    for scene in (*rendered["rord"], *rendered["mulan"]):
        outside = (scene.mask == 0) & (scene.shadow > 8)
        assert outside.sum() <= 4, (scene.effect, scene.mask_kind)
    left = [((s.mask == 0) & (s.shadow > 8)).sum() > 20 for s in rendered["test"]]
    assert np.mean(left) > 0.25  # what the rounds have to teach


@pytest.mark.parametrize("size", [64, 96, 128])
def test_any_side_can_be_rendered(size):
    scene = render_scene([1, 2], role="test", size=size)
    assert scene.image.shape == scene.truth.shape == (size, size, 3)
    assert scene.mask.shape == scene.object.shape == scene.shadow.shape == (size, size)
    assert all(
        getattr(scene, part).dtype == np.uint8
        for part in ("image", "truth", "object", "shadow", "mask")
    )
    assert scene.image.std() > 3


def test_default_sides():
    assert render_scene(3).image.shape[0] == scenes.SIZE
    high = render_scene(3, role="high_resolution").image
    assert high.shape[0] == scenes.HIGH_RESOLUTION_SIZE > scenes.SIZE


def test_errors_name_the_mend():
    with pytest.raises(ValueError, match="take one of pretrain, rord"):
        render_scene(1, role="poool")
    with pytest.raises(ValueError, match="at least 32 px"):
        render_scene(1, size=16)
