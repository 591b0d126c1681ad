"""Notebook 01 on raw data of every source: what it writes, refuses, shows and says."""

import html
import json
import os
import shlex
import subprocess
import sys
import tarfile

import cv2
import datasets
import nbformat
import numpy as np
import pandas as pd
import pytest
import raw_data
from cells import CellFailed, run_cells
from forked import Job, run_papermill_forked

from rorem_lib.data.check import check_set
from rorem_lib.data.triplets import load_images, read_triplets
from rorem_lib.data.writer import TripletWriter
from rorem_lib.files import ROOT, hash_file
from rorem_lib.sources.registry import CLASSES, open_source

pytestmark = pytest.mark.slow

NOTEBOOK = ROOT / "notebooks" / "01_assemble_dataset.ipynb"
NAMED = {"corne", "high_resolution", "mulan_decomposed", "parquet", "rord_raw"}  # the rest: auto
APART = {"composites", "omnieraser"}  # have tests of their own


def run(folder, **parameters):
    """Run the notebook into `folder`, with the metrics that it wrote."""
    run_cells(NOTEBOOK, folder / "notebook.ipynb", {"output_dir": str(folder), **parameters})
    return json.loads((folder / "metrics.json").read_text())


def list_outputs(notebook):
    return [
        output for cell in nbformat.read(notebook, 4).cells for output in cell.get("outputs", ())
    ]


def read_sets(folder, counts):
    return {name: read_triplets(folder / name, require_gt=False) for name in counts}


@pytest.mark.parametrize("name", sorted(raw_data.LAYOUTS.keys() - APART))
def test_raw_data_becomes_sets_with_provenance_and_every_fault_is_named(name, tmp_path):
    folder, data = tmp_path / "out", tmp_path / "原始 data" / name
    folder.mkdir()
    raw = raw_data.write_raw(name, data)
    metrics = run(
        folder,
        source=raw["source"] if name in NAMED else "auto",
        input_dir=str(data),
        source_options=raw["options"],
    )
    assert metrics["source"] == raw["source"] and metrics["raw"] == str(data)
    assert {key: metrics[f"n_{key}"] for key in raw["counts"]} == raw["counts"]
    sets = read_sets(folder, raw["counts"])
    assert {key: len(found) for key, found in sets.items()} == raw["counts"]
    assert {key: len({t.group for t in found}) for key, found in sets.items()} == raw["groups"]
    _check_folder(folder, data, raw, sets)
    if raw["truth"]:
        place, key, *truth = raw["truth"]
        _check_pixels(next(t for t in sets[place] if t.id == key), *truth)


def _check_folder(folder, data, raw, sets):
    pool = not CLASSES[raw["source"]].has_gt
    assert {path.parent.name for path in folder.glob("*/meta.json")} == set(sets)
    for key, found in sets.items():
        assert check_set(folder / key) == []
        for triplet in found:
            _check_record(triplet, data, pool)
    assert json.loads((folder / "metrics.json").read_text())["rejected"] == raw["rejected"]
    _check_rejections(
        folder, data, raw["rejected"], {t.id for found in sets.values() for t in found}
    )
    figures = {path.stem: cv2.imread(str(path)) for path in (folder / "figures").iterdir()}
    assert set(figures) == {
        "source",
        "rejections",
        "mask_areas",
        *(f"sheet_{key}" for key in sets),
        *(["changes"] * (not pool)),
    }
    for name, drawn in figures.items():
        assert drawn.shape[0] > 60 and drawn.std() > 5, f"{name} is empty"


def _check_record(triplet, data, pool):
    extra, pictures = triplet.extra, load_images(triplet)
    assert extra["origin"] and extra["license"] and triplet.group
    assert (triplet.gt is None) == pool
    assert pictures["source"].shape[:2] == (extra["height"], extra["width"])
    assert extra["mask_area"] == pytest.approx((pictures["mask"] > 0).mean(), abs=1e-4)
    assert len(extra["sha256"]) == 64 and len(extra["phash"]) == 16
    raw_file = data / extra["file"]
    assert not os.path.isabs(extra["file"])
    if raw_file.is_file() and raw_file.suffix != ".parquet":  # else it is the image's own hash
        assert extra["sha256"] == hash_file(raw_file)
    if not pool:
        assert extra["change_inside"] > max(10, 4 * extra["change_outside"])


def _check_rejections(folder, data, reasons, kept):
    lines = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert pd.Series([line["reason"] for line in lines]).value_counts().to_dict() == reasons
    for line in lines:
        assert line["id"] not in kept and line["set"] in ("labelled", "pool", "test")
        assert line["group"] and len(line["message"]) > 10
    shown = html.unescape(
        " ".join(
            output["data"].get("text/html", "")
            for output in list_outputs(folder / "notebook.ipynb")
            if "data" in output
        )
    )
    for line in lines:  # the table shows paths below the raw data's folder
        line["message"] = line["message"].replace(f"{data}/", "")
    for reason in reasons:
        assert any(line["message"] in shown for line in lines if line["reason"] == reason), reason


def _check_pixels(triplet, source, mask, gt):
    """Equal but for JPEG, a camera's noise, and the corners of polygons."""
    found, white = load_images(triplet), mask >= 128
    assert cv2.absdiff(found["source"], source).mean() < 4
    both, either = (found["mask"] > 0) & white, (found["mask"] > 0) | white
    assert both.sum() / either.sum() > 0.95
    if gt is None:
        assert triplet.gt is None
        return
    difference = cv2.absdiff(found["gt"], gt)
    assert difference.mean() < 5 and difference[white].mean() < 10
    assert cv2.absdiff(found["gt"], source)[white].mean() > 20


def test_composites_change_nothing_but_the_object_and_its_effect(tmp_path):
    folder, data = tmp_path / "out", tmp_path / "raw"
    folder.mkdir()
    raw = raw_data.write_raw("composites", data)
    backgrounds = {path.name for path in (data / "backgrounds").iterdir()}
    metrics = run(
        folder,
        source="auto",
        input_dir=str(data),
        source_options=raw["options"],
        test_share=0.5,
        max_side=120,
        workers=2,
    )
    sets = read_sets(folder, ("labelled", "test"))
    _check_folder(folder, data, raw, sets)
    groups = {key: {t.group for t in found} for key, found in sets.items()}
    assert groups["labelled"] and groups["test"] and not groups["labelled"] & groups["test"]
    assert groups["labelled"] | groups["test"] <= backgrounds
    assert metrics["n_labelled"] + metrics["n_test"] == sum(raw["counts"].values())
    effects = set()
    for triplet in sets["labelled"] + sets["test"]:
        pictures = load_images(triplet)
        assert pictures["source"].shape == (120, 120, 3)
        change = cv2.absdiff(pictures["source"], pictures["gt"]).max(axis=2)
        near = cv2.dilate(pictures["mask"], np.ones((5, 5), np.uint8)) > 0
        outside = triplet.extra["effect"] != "none" and triplet.extra["mask_kind"] == "object"
        assert (change[~near].max() > 12) == outside
        effects.add((triplet.extra["effect"], triplet.extra["mask_kind"]))
        assert triplet.extra["license"] == "CC0-1.0"
    assert {("shadow", "object"), ("shadow", "with_effect"), ("none", "object")} <= effects


def test_an_archive_is_unpacked_read_and_published(tmp_path):
    """As a reader runs it, alone: an archive with the sets one folder down."""
    raw = raw_data.write_raw("upstream", tmp_path / "download")
    with tarfile.open(tmp_path / "RORem.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "download", "RORem_dataset/sets")
    words = [NOTEBOOK, tmp_path / "done.ipynb", "-k", "python3"]
    for name, value in {
        "source": "auto",
        "input_dir": tmp_path / "RORem.tar.gz",
        "output_dir": tmp_path / "out",
        "publish_as": "me/removals",
        "publish_license": "CC-BY-4.0",
        "publish_acceptance": "made for a test",
    }.items():
        words += ["-p", name, value]
    words += ["-y", "{source_options: {metas: [RORD, Mulan]}}"]
    log = tmp_path / "papermill.log"
    job = Job(run_papermill_forked, [str(word) for word in words], log=log, cwd=tmp_path)
    assert job.wait() == 0, job.read_log()[-3000:]
    assert (tmp_path / "out/DONE").read_text().startswith("alone")
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["raw"] == str(tmp_path / "RORem.tar.gz") and metrics["n_labelled"] == 5
    assert set(metrics["rejected"]) == set(raw["rejected"]) - {"unreadable"}
    published = tmp_path / "out/published"
    rows = datasets.load_dataset(str(published), cache_dir=str(tmp_path / "cache"))["labelled"]
    triplets = {t.id: t for t in read_triplets(tmp_path / "out/labelled")}
    assert set(rows["id"]) == set(triplets) and len(rows) == 5
    for row in rows:
        pictures = load_images(triplets[row["id"]])
        assert np.array_equal(np.array(row["source"]), pictures["source"])
        assert np.array_equal(np.array(row["GT"]), pictures["gt"])
    card = (published / "README.md").read_text()
    assert "made for a test" in card and "missing file" in card


def test_pictures_of_an_evaluation_set_are_left_out(tmp_path):
    folder, data = tmp_path / "out", tmp_path / "raw"
    folder.mkdir()
    raw = raw_data.write_raw("omnieraser", data)
    scene = raw_data.make_scene(2)
    with TripletWriter(tmp_path / "eval") as writer:  # smaller, and of another camera
        source, gt = (
            cv2.resize(raw_data.film(picture, 7), (180, 120))
            for picture in (scene.source, scene.gt)
        )
        writer.add(id="held out", source=source, gt=gt, mask=cv2.resize(scene.mask, (180, 120)))
    metrics = run(
        folder, source="auto", input_dir=str(data), evaluation_sets=[str(tmp_path / "eval")]
    )
    raw["rejected"] |= {"near-duplicate": 1}
    sets = read_sets(folder, raw["counts"])
    _check_folder(folder, data, raw, sets)
    assert len(sets["labelled"]) == metrics["n_labelled"] == raw["counts"]["labelled"] - 1
    _check_pixels(next(t for t in sets["labelled"] if t.id == raw["truth"][1]), *raw["truth"][2:])
    lines = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    late = next(line for line in lines if line["reason"] == "near-duplicate")
    assert late["id"] == "video002_0002" and str(tmp_path / "eval") in late["message"]
    assert not list(folder.glob("labelled/*/video002_0002.*"))


def test_raw_data_can_be_written_to_try_the_notebook_on(tmp_path):
    done = subprocess.run(
        [sys.executable, raw_data.__file__, "mulan_annotations", "raw"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    command = shlex.split(done.stdout)
    assert command[1] == str(NOTEBOOK.relative_to(ROOT)) and "input_dir" in command
    source = open_source(
        "auto", command[command.index("input_dir") + 1], **json.loads(command[-1])["source_options"]
    )
    assert source.name == "mulan" and len(list(source.list_items())) == 8


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"source_options": {"frmaes": 3}},
            "the source rord has no option frmaes; it has frames=0",
        ),
        ({"input_dir": "figures"}, "has none of the layouts that can be imported; it holds a.txt"),
        ({"min_side": 4000}, "every item was rejected, most for: small image"),
    ],
)
def test_what_cannot_be_assembled_is_said_in_the_notebook(changes, words, tmp_path):
    raw_data.write_raw("rord_960", tmp_path / "raw")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/a.txt").write_text("")
    given = {"source": "auto", "input_dir": "raw"} | changes
    given["input_dir"] = str(tmp_path / given["input_dir"])
    with pytest.raises(CellFailed) as failure:
        run(tmp_path, **given)
    assert words in str(failure.value) and not (tmp_path / "metrics.json").exists()
    errors = [
        output
        for output in list_outputs(tmp_path / "notebook.ipynb")
        if output["output_type"] == "error"
    ]
    assert len(errors) == 1 and words in errors[0]["evalue"]


def test_raw_data_in_the_output_folder_is_left_alone(tmp_path):
    """RORD's third layout has a folder `test`, as the assembled sets have."""
    raw_data.write_raw("rord_preprocessed", tmp_path)
    before = {p: hash_file(p) for p in tmp_path.rglob("*") if p.is_file()}
    assert any("test" in path.parts for path in before)
    with pytest.raises(CellFailed, match="choose an output folder outside of what is read"):
        run(tmp_path, source="auto", input_dir=str(tmp_path))
    assert {path: hash_file(path) for path in before} == before
    with pytest.raises(CellFailed, match="test holds something that is no scene set"):
        run(tmp_path, source="scenes", labelled=1, pool=1, high_resolution=1, test_size=1)
    assert {path: hash_file(path) for path in before} == before
