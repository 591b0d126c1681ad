"""Summaries and figures of sets, and batches of opened triplets."""

import threading

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from rorem_lib import set_figures
from rorem_lib.batches import read_batches
from rorem_lib.set_summary import summarise_set, tabulate_classes, tabulate_origins
from rorem_lib.sources.base import Picture, Pictures
from rorem_lib.triplets import TripletError, TripletWriter, load_images, read_triplets


def _write(folder, count, gt=True, height=30, width=40):
    rng = np.random.default_rng(1)
    with TripletWriter(folder) as writer:
        for n in range(count):
            source = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            mask = np.zeros((height, width), np.uint8)
            mask[5:15, 5:5 + 10 + n % 10] = 255
            extra = {"mask_area": 0.25} if n % 2 else {}
            writer.add(id=f"{n:03d}", source=source, mask=mask, gt=source // 2 if gt else None,
                       group=f"g{n // 4}", origin="a" if n < 5 else "b", license="CC0-1.0",
                       width=width, height=height, change_inside=float(n), **extra,
                       **{"class": "dog"} if n % 3 else {"classes": ["cat", "dog"]})
    return folder / "meta.json"


def test_a_summary_counts_what_records_say_and_measures_the_rest(tmp_path):
    meta = _write(tmp_path, 20)
    found = summarise_set(meta, sample=6, seed=2)
    assert (found.count, found.groups) == (20, 5)
    assert dict(found.origins) == {("a", "CC0-1.0"): 5, ("b", "CC0-1.0"): 15}
    assert dict(found.classes) == {"dog": 20, "cat": 7} and dict(found.sizes) == {(40, 30): 20}
    assert found.mask_areas[1] == 0.25
    assert found.mask_areas[2] == pytest.approx(120 / 1200)
    assert list(found.change_inside) == list(range(20)) and not found.change_outside
    ids = [t.id for t in found.sample]
    assert len(set(ids)) == 6 and ids == [t.id for t in summarise_set(meta, sample=6,
                                                                      seed=2).sample]
    drawn = [t.id for seed in range(200) for t in summarise_set(meta, sample=2, seed=seed).sample]
    assert set(drawn) == {f"{n:03d}" for n in range(20)}  # late ones as early ones
    table = tabulate_origins({"x": found, "y": found})
    assert table.loc[("b", "CC0-1.0")].tolist() == [15, 15]
    assert tabulate_classes({"x": found}, top=1).to_dict() == {"x": {"dog": 20}}


def _pixels(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


@pytest.mark.parametrize("count, gt", [(1, True), (5, False), (40, True)])
def test_sheets_show_every_triplet_with_its_outline(tmp_path, count, gt):
    _write(tmp_path, count, gt, height=300, width=400)  # outlines must survive the shrinking
    triplets = read_triplets(tmp_path, require_gt=False)
    pixels = _pixels(set_figures.plot_sheet(triplets, title="some"))
    pink = (np.abs(pixels.astype(int) - (230, 30, 130)).max(axis=2) < 60).sum()
    assert pink > 6 * count
    assert pixels.shape[1] < 1400


def test_figures_of_a_source_its_rejections_and_changes():
    source = np.full((40, 60, 3), 90, np.uint8)
    mask = np.zeros((40, 60), np.uint8)
    mask[5:20, 5:20] = 255
    items = {"long-name-of-an-item-000001": Pictures(Picture(source), Picture(mask),
                                                     Picture(source + 9), None),
             "pool": Pictures(Picture(source), Picture(mask[:30]), None, None)}
    assert _pixels(set_figures.plot_items(items)).std() > 20
    axis = set_figures.plot_rejections({"misaligned": 3}, kept=9).axes[0]
    assert [bar.get_width() for bar in axis.patches] == [9, 3]
    assert [text.get_text() for text in axis.texts] == ["9  (75.0%)", "3  (25.0%)"]
    axes = set_figures.plot_changes([30, 40], [0, 2], min_change=2, max_change_outside=12).axes
    assert [axis.lines[0].get_xdata()[0] for axis in axes] == [2, 12]
    assert sum(bar.get_height() for bar in axes[1].patches) == 2


def test_batches_are_what_opening_one_by_one_gives(tmp_path):
    _write(tmp_path / "set", 11)
    triplets = read_triplets(tmp_path / "set")
    threads = threading.active_count()
    batches = list(read_batches(triplets, size=24, batch_size=4, threads=2))
    assert [len(batch["mask"]) for batch in batches] == [4, 4, 3]
    for part in ("source", "mask", "gt"):
        stacked = np.concatenate([batch[part] for batch in batches])
        assert np.array_equal(stacked, [load_images(t, size=24)[part] for t in triplets])
    assert threading.active_count() == threads
    _write(tmp_path / "pool", 3, gt=False)
    pool = read_triplets(tmp_path / "pool", require_gt=False)
    assert set(next(read_batches(pool, size=24, batch_size=2))) == {"source", "mask"}
    triplets[6].mask.write_bytes(b"")
    reader = read_batches(triplets, size=24, batch_size=4)
    assert len(next(reader)["mask"]) == 4
    with pytest.raises(TripletError, match=r"006\.png is empty"):
        next(reader)
    assert threading.active_count() == threads
