"""Summaries and figures of sets."""

from collections import Counter

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from rorem_lib.data import figures
from rorem_lib.data.items import Picture, Pictures
from rorem_lib.data.pictures import TripletError
from rorem_lib.data.summary import summarise_set, tabulate_classes, tabulate_origins
from rorem_lib.data.triplets import read_triplets
from rorem_lib.data.writer import TripletWriter


def _write(folder, count, gt=True, height=30, width=40):
    rng = np.random.default_rng(1)
    with TripletWriter(folder) as writer:
        for n in range(count):
            source = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            mask = np.zeros((height, width), np.uint8)
            mask[5:15, 5 : 5 + 10 + n % 10] = 255
            extra = {"mask_area": 0.25} if n % 2 else {}
            writer.add(
                id=f"{n:03d}",
                source=source,
                mask=mask,
                gt=source // 2 if gt else None,
                group=f"g{n // 4}",
                origin="a" if n < 5 else "b",
                license="CC0-1.0",
                width=width,
                height=height,
                change_inside=float(n),
                **extra,
                **{"class": "dog"} if n % 3 else {"classes": ["cat", "dog"]},
            )
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
    assert len(set(ids)) == 6 and ids == [
        t.id for t in summarise_set(meta, sample=6, seed=2).sample
    ]
    drawn = [t.id for seed in range(200) for t in summarise_set(meta, sample=2, seed=seed).sample]
    assert set(drawn) == {f"{n:03d}" for n in range(20)}  # late ones as early ones
    table = tabulate_origins({"x": found, "y": found})
    assert table.loc[("b", "CC0-1.0")].tolist() == [15, 15]
    assert tabulate_classes({"x": found}, top=1).to_dict() == {"x": {"dog": 20}}


def test_every_triplet_is_drawn_as_often_as_any_other_and_another_seed_draws_others(tmp_path):
    meta = _write(tmp_path, 12)
    draws = [[t.id for t in summarise_set(meta, sample=4, seed=seed).sample] for seed in range(300)]
    assert all(len(set(ids)) == 4 for ids in draws)
    counts = Counter(name for ids in draws for name in ids)  # 100 of each are expected
    assert len(counts) == 12 and 65 < min(counts.values()) and max(counts.values()) < 135
    assert len(set(map(tuple, draws))) > 200
    whole = summarise_set(meta, sample=50).sample
    assert [t.id for t in whole] == [f"{n:03d}" for n in range(12)]


def test_masks_are_opened_only_where_no_record_says_their_area(tmp_path):
    meta = _write(tmp_path, 4)
    for number in (1, 3):
        (tmp_path / f"mask/{number:03d}.png").unlink()
    assert list(summarise_set(meta).mask_areas)[1::2] == [0.25, 0.25]
    (tmp_path / "mask/002.png").unlink()
    with pytest.raises(TripletError, match=r"mask/002\.png does not exist"):
        summarise_set(meta)


def test_bare_records_and_empty_sets_are_summarised(tmp_path):
    _write(tmp_path / "some", 3)
    with TripletWriter(tmp_path / "bare") as writer:
        for number, extra in enumerate(({}, {"kind": "pole"}, {"class": "", "classes": "sign"})):
            mask = np.full((10, 10), 127, np.uint8)
            mask[: number + 1] = 128
            writer.add(id=str(number), source=np.zeros((10, 10, 3), np.uint8), mask=mask, **extra)
    TripletWriter(tmp_path / "none").close()
    some, bare, none = (summarise_set(tmp_path / name) for name in ("some", "bare", "none"))
    assert (bare.count, bare.groups) == (3, 3) and not bare.sizes and not bare.change_inside
    assert dict(bare.origins) == {("not named", "not named"): 3}
    assert dict(bare.classes) == {"pole": 1, "sign": 1}
    assert list(bare.mask_areas) == pytest.approx([0.1, 0.2, 0.3])
    assert (none.count, none.groups, none.sample) == (0, 0, [])
    origins = tabulate_origins({"bare": bare, "some": some, "none": none})
    assert list(origins.columns) == ["bare", "some", "none"]
    assert origins.loc[("not named", "not named")].tolist() == [3, 0, 0]
    assert origins.loc[("a", "CC0-1.0")].tolist() == [0, 3, 0]
    classes = tabulate_classes({"bare": bare, "some": some})
    assert classes.index[0] == "dog" and set(classes.index) == {"dog", "cat", "pole", "sign"}
    assert classes.loc["dog"].tolist() == [0, 3] and classes.loc["pole"].tolist() == [1, 0]
    assert list(tabulate_classes({"bare": bare, "some": some}, top=1).index) == ["dog"]
    assert len(tabulate_origins({"none": none})) == len(tabulate_classes({"none": none})) == 0


def _pixels(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


@pytest.mark.parametrize("count, gt", [(1, True), (5, False), (40, True)])
def test_sheets_show_every_triplet_with_its_outline(tmp_path, count, gt):
    _write(tmp_path, count, gt, height=300, width=400)  # outlines must survive the shrinking
    triplets = read_triplets(tmp_path, require_gt=False)
    pixels = _pixels(figures.plot_sheet(triplets, title="some"))
    pink = (np.abs(pixels.astype(int) - (230, 30, 130)).max(axis=2) < 60).sum()
    assert pink > 6 * count
    assert pixels.shape[1] < 1400


def test_figures_of_a_source_its_rejections_and_changes():
    source = np.full((40, 60, 3), 90, np.uint8)
    mask = np.zeros((40, 60), np.uint8)
    mask[5:20, 5:20] = 255
    items = {
        "long-name-of-an-item-000001": Pictures(
            Picture(source), Picture(mask), Picture(source + 9), None
        ),
        "pool": Pictures(Picture(source), Picture(mask[:30]), None, None),
    }
    assert _pixels(figures.plot_items(items)).std() > 20
    axis = figures.plot_rejections({"misaligned": 3}, kept=9).axes[0]
    assert [bar.get_width() for bar in axis.patches] == [9, 3]
    assert [text.get_text() for text in axis.texts] == ["9  (75.0%)", "3  (25.0%)"]
    axes = figures.plot_changes([30, 40], [0, 2], min_change=2, max_change_outside=12).axes
    assert [axis.lines[0].get_xdata()[0] for axis in axes] == [2, 12]
    assert sum(bar.get_height() for bar in axes[1].patches) == 2


def test_mask_areas_have_a_panel_a_set_on_one_scale():
    figure = figures.plot_mask_areas({"labelled": [0.1, 0.1, 0.3], "test": [0.5, 0.2]}, bins=10)
    first, second = figure.axes
    assert [axis.get_title() for axis in figure.axes] == [
        "labelled: 3, median 10.0%",
        "test: 2, median 35.0%",
    ]
    assert [axis.lines[0].get_xdata()[0] for axis in figure.axes] == [0.1, 0.35]
    for axis, count in ((first, 3), (second, 2)):
        assert len(axis.patches) == 10 and sum(bar.get_height() for bar in axis.patches) == count
    ends = [axis.patches[-1].get_x() + axis.patches[-1].get_width() for axis in figure.axes]
    assert ends == pytest.approx([0.51, 0.51])
    with pytest.raises(ValueError, match="no masks"):
        figures.plot_mask_areas({})
