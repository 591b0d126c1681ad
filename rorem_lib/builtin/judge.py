"""A simulated annotator for the built-in scenes: it answers what a person would be asked.

RORem's annotators see the source with its mask and the removal, and say whether it succeeded; the
failures they name are incomplete removal, wrong content and blur (RORem, sec. 3.1). The simulated
annotator asks six questions and may look at the scene's hidden truth for each:

1. Is the object gone? What is left of it is measured by regressing (removal - truth) on
   (source - truth) over the object: 0 is gone, 1 is untouched.
2. Is nothing invented in its place? The largest local colour difference to the truth, after a
   blur that forgives texture which differs pixel by pixel.
3. Does the colour fit? The mean colour difference over the hole.
4. Is the texture as sharp as the truth's? The ratio of fine detail (a high-pass) in the hole.
5. Is the shadow (or reflection) gone? The same regression as in 1 over the effect's region.
6. Is the rest as it was? As in 2, outside of hole and effect, after a wider blur: what the
   autoencoder makes of every image's edges is forgiven, it is no removal's doing.

Pixel PSNR is not asked: it prefers a blurred mean. Its labels carry `simulated: true` everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

VERSION = 2  # raise it when a removal is judged otherwise


@dataclass(frozen=True)
class Limits:
    """Where the simulated annotator says no. Lab units are CIELAB's (L from 0 to 100).

    Attributes:
        residue: share of the object's contrast that may be left.
        shadow: share of the shadow's contrast that may be left.
        content: largest local colour difference in the hole, or outside of hole and effect, Lab
            units, on a plain background.
        content_texture: what a background's own local contrast adds to `content`, a factor.
        colour: mean colour difference over the hole, Lab units.
        blur: least ratio of fine detail to the truth's,
        missing: if more fine detail than this is missing (rms of L): less is not seen.
        grain: largest ratio of fine detail to the truth's.
    """

    residue: float = 0.2
    shadow: float = 0.4
    content: float = 8.0
    content_texture: float = 0.25
    colour: float = 5.0
    blur: float = 0.5
    missing: float = 1.0
    grain: float = 2.0


@dataclass(frozen=True)
class Verdict:
    """One judgement: `accept`, the first `reason` against it (None if none), what was measured."""

    accept: bool
    reason: str | None
    measures: dict


def _to_lab(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def _remaining(change, trace, weight) -> float:
    """Least-squares share of `trace` that is in `change` [H, W, 3] under weights [H, W]."""
    power = float((weight[..., None] * trace * trace).sum())
    return float((weight[..., None] * change * trace).sum()) / power if power > 0 else 0.0


def judge_removal(source, mask, result, truth, *, limits: Limits = Limits()) -> Verdict:
    """Judge one removal.

    Args:
        source: [H, W, 3] uint8, the image with the object.
        mask: [H, W] uint8, what was to be removed (white >= 128).
        result: [H, W, 3] uint8, the removal.
        truth: `Truth` of the scene: truth [H, W, 3], object [H, W], shadow [H, W], all uint8.
        limits: where it says no.

    Returns:
        A `Verdict`; its measures are residue, shadow (None where the scene has none), content,
        content_limit, colour, detail (a ratio), missing (rms of L), rest (as content; None where
        hole and effect cover the image).

    Raises:
        ValueError: the images' sizes differ.
    """
    if not source.shape == result.shape == truth.truth.shape:
        raise ValueError(
            f"sizes differ: source {source.shape}, removal {result.shape}, "
            f"truth {truth.truth.shape}"
        )
    unit = source.shape[0] / 64
    lab_source, lab_result, lab_truth = map(_to_lab, (source, result, truth.truth))
    change, trace = lab_result - lab_truth, lab_source - lab_truth
    hole = (mask >= 128) | (truth.object > 127)
    weight = truth.object.astype(np.float32) / 255
    residue = _remaining(change, trace, weight)

    # Local colour: blurred over 2 px of a 64 px image, so that pixels of texture may differ.
    local = np.linalg.norm(cv2.GaussianBlur(change, (0, 0), 2.0 * unit), axis=2)
    content = float(local[hole].max())
    smooth = cv2.GaussianBlur(lab_truth, (0, 0), 2.0 * unit)
    ring = cv2.dilate(hole.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=round(4 * unit))
    contrast = float(np.linalg.norm(smooth[ring > 0].std(axis=0)))
    content_limit = limits.content + limits.content_texture * contrast
    colour = float(np.linalg.norm(change[hole].mean(axis=0)))

    # Fine detail well inside of the hole: at its edge, the surroundings would be measured too.
    inside = (
        cv2.erode(hole.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=round(2 * unit)) > 0
    )
    inside = inside if inside.sum() >= 30 * unit**2 else hole
    detail = []
    for picture in (lab_result, lab_truth):
        light = picture[..., 0]
        fine = light - cv2.GaussianBlur(light, (0, 0), 1.5 * unit)
        detail.append(float(np.sqrt(np.square(fine[inside]).mean())))
    missing = detail[1] - detail[0]
    ratio = (detail[0] + 0.7) / (detail[1] + 0.7)  # 0.7: grain that nobody sees

    effect = (truth.shadow > 10) & (truth.object <= 8)
    shadow = None
    if effect.sum() >= 12 * unit**2:
        shadow = _remaining(change, trace, effect.astype(np.float32))

    # The rest alone, or what the other questions forgive in the hole would be blurred into it. Of
    # truths that only went through the autoencoder an eighth would fail after 2 px, 1% after 3.
    outside = ~hole & ~effect & (truth.object <= 8)
    rest = None
    if outside.any():
        local = cv2.GaussianBlur(change * outside[..., None], (0, 0), 3.0 * unit)
        rest = float(np.linalg.norm(local, axis=2)[outside].max())
    measures = {
        "residue": residue,
        "shadow": shadow,
        "content": content,
        "content_limit": content_limit,
        "colour": colour,
        "detail": ratio,
        "missing": missing,
        "rest": rest,
    }
    failed = {
        "incomplete removal": residue > limits.residue,
        "wrong content": content > content_limit or ratio > limits.grain,
        "colour shift": colour > limits.colour,
        "blur": ratio < limits.blur and missing > limits.missing,
        "shadow left": shadow is not None and shadow > limits.shadow,
        "rest changed": rest is not None and rest > content_limit,
    }
    reason = next((name for name, bad in failed.items() if bad), None)
    return Verdict(reason is None, reason, measures)


def simulate_labels(
    candidates_meta,
    hidden_dir,
    folder,
    *,
    annotator: str = "simulated",
    limits: Limits = Limits(),
    queue: Iterable | None = None,
) -> list[dict]:
    """Label candidates as the simulated annotator; each label is in the log before the next.

    Args:
        candidates_meta: a candidate set's `meta.json`.
        hidden_dir: the hidden truth that belongs to its scenes.
        folder: where `labels-<annotator>.jsonl` is written; labels already there are kept.
        annotator: the log's name; it always contains "simulated".
        queue: which candidates and how they were drawn, `labels.queue.QueueItem`s, silent
            repeats left out; by default all.

    Returns:
        One dict a new label: id, accept, reason and the measures.

    Raises:
        ValueError: a name that does not say that it is simulated.
    """
    from rorem_lib.builtin.sets import read_truth
    from rorem_lib.data.triplets import load_images, read_triplets
    from rorem_lib.labels.log import LabelLog, split_stale
    from rorem_lib.labels.queue import QueueItem

    if "simulated" not in annotator:
        raise ValueError(f"the annotator's name must say that it is simulated, not {annotator!r}")
    triplets = {t.id: t for t in read_triplets(candidates_meta)}
    log = LabelLog(Path(folder), annotator)
    done = {label.id for label in split_stale(log.read(), triplets.values())[0]}
    verdicts = []
    for item in queue if queue is not None else [QueueItem(x, "random") for x in triplets]:
        name = item.id
        if name in done or item.repeat:
            continue
        pictures = load_images(triplets[name])
        verdict = judge_removal(
            pictures["source"],
            pictures["mask"],
            pictures["gt"],
            read_truth(hidden_dir, name),
            limits=limits,
        )
        log.append(
            name,
            "accept" if verdict.accept else "reject",
            reason=verdict.reason,
            order=item.order,
            simulated=True,
            content_file=triplets[name].gt,
        )
        verdicts.append(
            {"id": name, "accept": verdict.accept, "reason": verdict.reason, **verdict.measures}
        )
    return verdicts
