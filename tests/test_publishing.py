"""Publishing: in this process to a folder, and by the real clients against a local server."""

import errno
import hashlib
import io
import json
import os
import re
import signal
import tempfile
import textwrap
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from forked import Job
from hub_server import HubServer
from PIL import Image

from rorem_lib.data.assembly import assemble_sets
from rorem_lib.data.filters import FilterConfig
from rorem_lib.data.items import Rejected, SourceError
from rorem_lib.data.pictures import TripletError, load_image
from rorem_lib.data.publishing import publish_sets, upload_dataset
from rorem_lib.data.triplets import HIDDEN_MARK, load_images, read_triplets
from rorem_lib.data.writer import TripletWriter
from rorem_lib.sources.parquet import ParquetSetSource

SIZE = 48


def _picture(seed):
    """A smooth image: two of them differ, and JPEG keeps them."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _write_set(folder, count, *, gt=True, start=0, **changes):
    """A set of JPEG sources, PNG masks and PNG GTs, with names that are not ASCII."""
    folder.mkdir(parents=True)
    with TripletWriter(folder) as writer:
        for number in range(start, start + count):
            source, mask = _picture(number), np.zeros((SIZE, SIZE), np.uint8)
            mask[8:24, 8 : 16 + number % 9] = 255
            truth = source.copy()
            truth[mask > 0] = 255 - truth[mask > 0]
            path = folder / f"{number}.jpg"
            Image.fromarray(source).save(path, quality=95)
            extra = {
                "origin": ("RORD", "MULAN")[number % 2],
                "license": ("RORD's terms", "CC-BY-NC-SA-4.0")[number % 2],
                "class": ("dog", "灯")[number % 2],
                "seed": number,
                "score": number / 8,
                "round": 2,
                "remover": "rorem",
                "accepted_by": ("human", None)[number % 2],
                "place": {"x": [1, 2]},
                "group": f"scene {number // 2}",
                **changes,
            }
            writer.add(
                id=f"图 {number:03}",
                source=path,
                mask=mask,
                gt=truth if gt else None,
                **{key: value for key, value in extra.items() if value is not None},
            )
            path.unlink()
    return folder


def _hash_shards(folder):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted((folder / "data").iterdir())
    }


def _publish(sets, folder, **options):
    return publish_sets(
        sets, folder, **{"repo_id": "me/removals", "acceptance": "By *two* people.", **options}
    )


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return {
        "train": _write_set(folder / "train", 23),
        "test": _write_set(folder / "测 试", 5, gt=False, start=100),
    }


@pytest.fixture(scope="module")
def published(sets, tmp_path_factory):
    return _publish(
        sets,
        tmp_path_factory.mktemp("published") / "out",
        max_shard_bytes=60_000,
        filters="Groups of two.",
    )


@pytest.fixture
def hub():
    with HubServer().run() as server:
        yield server


# ---------------------------------------------------------------------------------- the folder


def test_shards_hold_the_files_byte_by_byte_in_order(sets, published):
    names = [p.name for p in sorted((published / "data").iterdir())]
    count = len(names) - 1
    assert count > 2
    assert names == [
        "test-00000-of-00001.parquet",
        *(f"train-{n:05}-of-{count:05}.parquet" for n in range(count)),
    ]
    rows = [
        row for name in names[1:] for row in pq.read_table(published / "data" / name).to_pylist()
    ]
    triplets = read_triplets(sets["train"])
    assert [row["id"] for row in rows] == [t.id for t in triplets]
    for row, triplet in zip(rows, triplets):
        for key, path in zip(("source", "mask", "GT"), (triplet.source, triplet.mask, triplet.gt)):
            assert row[key] == {"bytes": path.read_bytes(), "path": path.name}
        record = {
            key: row[key]
            for key in ("origin", "license", "accepted_by", "remover", "score", "round")
            if row[key] is not None
        }
        assert {**record, **json.loads(row["extra"])} == triplet.extra
        assert row["group"] == triplet.group
    test = pq.read_table(published / "data" / names[0])
    assert test.column("GT").null_count == test.num_rows == 5
    assert test.column("width").to_pylist() == test.column("height").to_pylist() == [SIZE] * 5
    areas = [
        np.mean(load_images(t)["mask"] >= 128)
        for t in read_triplets(sets["test"], require_gt=False)
    ]
    assert test.column("mask_area").to_pylist() == areas


def test_row_groups_stay_small(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "MAX_ROW_GROUP_SIZE", "50KB")
    shard = _publish({"train": sets["train"]}, tmp_path / "a") / "data/train-00000-of-00001.parquet"
    meta = pq.read_metadata(shard)
    groups = [meta.row_group(n) for n in range(meta.num_row_groups)]
    assert len(groups) > 1 and sum(group.num_rows for group in groups) == 23
    assert max(group.total_byte_size for group in groups) < 60_000
    monkeypatch.setattr(datasets.config, "MAX_ROW_GROUP_SIZE", "1KB")  # an image may be larger
    shard = _publish({"train": sets["train"]}, tmp_path / "b") / "data/train-00000-of-00001.parquet"
    assert pq.read_metadata(shard).num_row_groups == 23
    assert (
        ParquetSetSource(str(tmp_path / "b"))
        .load_item(list(ParquetSetSource(str(tmp_path / "b")).list_items())[22])
        .extra["seed"]
        == 22
    )


def test_the_card_says_what_is_in_it(published):
    text = (published / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["license"] == ["cc-by-nc-sa-4.0", "other"]
    assert header["license_name"] == "CC-BY-NC-SA-4.0, RORD's terms"
    assert header["task_categories"] == ["image-to-image"]
    assert header["size_categories"] == ["n<1K"]
    (config,) = header["configs"]
    assert config["data_files"] == [
        {"split": "train", "path": "data/train-*"},
        {"split": "test", "path": "data/test-*"},
    ]
    info = header["dataset_info"]
    assert [(s["name"], s["num_examples"]) for s in info["splits"]] == [("train", 23), ("test", 5)]
    assert {f["name"]: f["dtype"] for f in info["features"]}["GT"] == "image"
    assert info["download_size"] == sum(p.stat().st_size for p in (published / "data").iterdir())
    for line in (
        "# removals",
        "By *two* people.",
        "Groups of two.",
        "| RORD | RORD's terms | 12 | 3 |",
        "| MULAN | CC-BY-NC-SA-4.0 | 11 | 2 |",
        "| human | rorem | 2 | 12 | 3 |",
        "| - | rorem | 2 | 11 | 2 |",
        "| dog | 12 | 3 |",
        "| 灯 | 11 | 2 |",
        "| 48x48 | 23 | 5 |",
        'load_dataset("me/removals", split="train"',
        "li2025rorem",
        "{{RORem}: Training a Robust Object Remover with Human-in-the-Loop}",
    ):
        assert line in text, line
    shares = [16 * (8 + n % 9) / SIZE**2 for n in range(23)]
    row = next(line for line in text.splitlines() if line.startswith("| train | ") and "%" in line)
    assert row.split(" | ")[1:] == [
        f"{v:.2%}" for v in np.quantile(shares, [0, 0.05, 0.25, 0.5, 0.75, 0.95])
    ] + [f"{max(shares):.2%} |"]


def test_one_known_license_is_the_cards(tmp_path):
    folder = _write_set(tmp_path / "set", 2, license=None)
    out = _publish({"train": folder}, tmp_path / "out", license="CC0-1.0", title="Ours")
    header = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    assert (header["license"], header["pretty_name"]) == ("cc0-1.0", "Ours")
    assert "license_name" not in header
    assert pq.read_table(out / "data").column("license").to_pylist() == ["CC0-1.0"] * 2


def test_nothing_in_a_record_becomes_markup_in_the_card(tmp_path):
    bad = "x |\n\n# Owned\n<script>alert(1)</script> [a](javascript:b) `c` **d** _e_ | y"
    folder = _write_set(
        tmp_path / "set", 2, origin=bad, license=bad, accepted_by=bad, remover=bad, **{"class": bad}
    )
    out = _publish({"train": folder}, tmp_path / "out", title=f"My {bad}")
    text = (out / "README.md").read_text()
    head, body = text.split("---\n", 2)[1:]
    assert yaml.safe_load(head)["license_name"] == bad
    assert "<script" not in body and "\n# Owned" not in body
    assert body.count("&lt;script&gt;") >= 6  # title, origin, license, accepted by, remover, class
    rows = [line for line in body.splitlines() if "Owned" in line and line.startswith("|")]
    assert len(rows) == 3  # licences, accepted, classes: a row each
    for row in rows:
        cells = re.split(r"(?<!\\)[|]", row)[1:-1]
        assert cells[-1].strip() == "2" and len(cells) in (2, 3, 4)
        assert r"\[a\](javascript:b) \`c\` \*\*d\*\* \_e\_ \|" in row
    for repo in ('me/x", split="y', "me/x\n# Owned", "/home/me/x", "me/x`"):
        with pytest.raises(TripletError, match="repository"):
            _publish({"train": folder}, tmp_path / "out", repo_id=repo)


def test_no_absolute_path_is_published(tmp_path):
    secret = tmp_path / "anna"
    folder = _write_set(
        secret / "set",
        3,
        remover=str(secret / "runs" / "human_1" / "remover"),
        group=str(secret / "video 1"),
        place={"file": [str(secret / "a b" / "c.jpg")], "class": "/m/01g317"},
        caption=f"made of {secret}/x/y.png, and/or C:\\Users\\anna\\z.png; https://a.org/b/c/d",
    )
    out = _publish(
        {"train": folder},
        tmp_path / "out",
        acceptance=f"By the model in `{secret}/runs/rorem`.",
        filters=f"Those of {secret}/assembly.json.",
    )
    (shard,) = (out / "data").iterdir()
    (row, *_) = pq.read_table(shard).to_pylist()
    extra = json.loads(row["extra"])
    assert (row["remover"], row["group"]) == ("human_1/remover", "anna/video 1")
    assert extra["place"] == {"file": ["a b/c.jpg"], "class": "/m/01g317"}
    assert extra["caption"] == "made of x/y.png, and/or anna/z.png; https://a.org/b/c/d"
    text = (out / "README.md").read_text()
    assert "`runs/rorem`" in text and "Those of anna/assembly.json." in text
    for data in (text.encode(), shard.read_bytes(), str(pq.read_schema(shard).metadata).encode()):
        assert str(tmp_path).encode() not in data and b"C:\\" not in data


def test_the_same_sets_give_the_same_bytes_and_finished_shards_are_kept(sets, published, tmp_path):
    out = _publish(sets, tmp_path / "out", max_shard_bytes=60_000, filters="Groups of two.")
    assert _hash_shards(out) == _hash_shards(published)
    assert (out / "README.md").read_bytes() == (published / "README.md").read_bytes()
    times = {p.name: p.stat().st_mtime_ns for p in (out / "data").iterdir()}
    second = "train-00001-of-" + sorted(times)[-1].split("-of-")[1]
    (out / "data" / second).unlink()  # and a kill may leave half of one beside
    torn = out / "data" / f".{second.removesuffix('.parquet')}.partial"
    torn.mkdir()
    (torn / second).write_bytes(b"half")
    seen = []
    _publish(sets, out, max_shard_bytes=60_000, progress=lambda *numbers: seen.append(numbers))
    changed = {
        p.name for p in (out / "data").iterdir() if times.get(p.name) != p.stat().st_mtime_ns
    }
    assert changed == {second}
    assert _hash_shards(out) == _hash_shards(published)
    assert seen[-1] == (28, 28)


def test_changed_records_are_written_anew_and_old_shards_go(tmp_path):
    folder = _write_set(tmp_path / "set", 12)
    out = _publish({"train": folder}, tmp_path / "out", max_shard_bytes=30_000)
    first = _hash_shards(out)
    with TripletWriter(folder) as writer:
        writer.add_triplet(read_triplets(folder)[-1], score=0.25)
    _publish({"train": folder}, out, max_shard_bytes=30_000)
    second = _hash_shards(out)
    assert [n for n in first if first[n] != second[n]] == [sorted(first)[-1]]
    _publish({"train": folder}, out)
    assert list(_hash_shards(out)) == ["train-00000-of-00001.parquet"]
    assert pq.read_table(out / "data").column("score").to_pylist()[-1] == 0.25


# ----------------------------------------------------------------------------- what is refused


def test_missing_files_are_named_before_anything_is_written(tmp_path):
    folder = _write_set(tmp_path / "set", 8)
    for number in (2, 5):
        (folder / "GT" / f"图 {number:03}.png").unlink()
    with pytest.raises(TripletError, match="2 files.*图 002.png,.*图 005.png$"):
        _publish({"train": folder}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unsound_pictures_are_all_named_and_their_shard_is_not_there(tmp_path):
    folder = _write_set(tmp_path / "set", 8)
    source = folder / "source" / "图 001.jpg"
    source.write_bytes(source.read_bytes()[:-200])
    Image.new("L", (SIZE, SIZE)).save(folder / "mask" / "图 003.png")
    with pytest.raises(
        TripletError,
        match="2 records.*图 001.jpg.*图 003.png",
    ):
        _publish({"train": folder}, tmp_path / "out")
    assert not list((tmp_path / "out" / "data").iterdir())
    assert not (tmp_path / "out" / "README.md").exists()


def test_records_without_a_license_are_named(tmp_path):
    folder = _write_set(tmp_path / "set", 8, license=None)
    with pytest.raises(TripletError, match="8 records.*图 000,.*图 004 [.]{3}$"):
        _publish({"train": folder}, tmp_path / "out")


def test_a_split_has_a_gt_in_every_record_or_in_none(tmp_path):
    folder = _write_set(tmp_path / "set", 4)
    records = json.loads((folder / "meta.json").read_text())
    del records[2]["GT"]
    (folder / "meta.json").write_text(json.dumps(records))
    with pytest.raises(TripletError, match="1 of 4 records have no GT: .*: 图 002$"):
        _publish({"train": folder}, tmp_path / "out")


def test_hidden_truth_is_never_published(tmp_path):
    folder = _write_set(tmp_path / "set", 2)
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / HIDDEN_MARK).touch()
    folder = folder.rename(tmp_path / "hidden" / "set")
    with pytest.raises(TripletError, match="hidden folder"):
        _publish({"train": folder}, tmp_path / "out")


def test_names_of_splits_empty_sets_and_foreign_folders(tmp_path, caplog):
    folder = _write_set(tmp_path / "set", 2)
    with pytest.raises(TripletError, match="letters, digits and _ only: rename my-set"):
        _publish({"my-set": folder}, tmp_path / "out")
    empty = _write_set(tmp_path / "empty", 0)
    with pytest.raises(TripletError, match="there is nothing to publish"):
        _publish({"test": empty}, tmp_path / "out")
    out = _publish({"test": empty, "train": folder}, tmp_path / "out")
    assert "has no records: test becomes no split" in caplog.text
    assert list(_hash_shards(out)) == ["train-00000-of-00001.parquet"]
    (out / "data" / "mine.parquet").write_bytes(b"1")
    with pytest.raises(TripletError, match="mine.parquet"):
        _publish({"train": folder}, out)
    assert (out / "data" / "mine.parquet").exists()


@pytest.mark.parametrize("writer", [pq.ParquetWriter, datasets.arrow_writer.ArrowWriter])
def test_a_full_disk_names_the_shard_and_leaves_no_half_of_it(tmp_path, monkeypatch, writer):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = _write_set(tmp_path / "set", 2)
    monkeypatch.setattr(writer, "write_table", fail)
    with pytest.raises(OSError, match="train-00000-of-00001.parquet") as caught:
        _publish({"train": folder}, tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert not list((tmp_path / "out" / "data").iterdir())


def test_a_kill_leaves_no_half_of_a_shard_and_what_was_finished(sets, published, tmp_path):
    out = tmp_path / "out"
    code = f"""
        import os, signal
        from rorem_lib.data.publishing import publish_sets
        stop = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        publish_sets({{"train": {str(sets["train"])!r}}}, {str(out)!r}, repo_id="me/removals",
                     max_shard_bytes=60_000, progress=stop)
    """
    assert Job(exec, textwrap.dedent(code), {}).wait() == -signal.SIGKILL
    (first,) = (out / "data").iterdir()
    time_of_first = first.stat().st_mtime_ns
    assert not (out / "README.md").exists()
    _publish({"train": sets["train"]}, out, max_shard_bytes=60_000)
    assert first.stat().st_mtime_ns == time_of_first
    train = {n: h for n, h in _hash_shards(published).items() if n.startswith("train")}
    assert _hash_shards(out) == train


# ------------------------------------------------------------------------------- and back again


def test_published_sets_are_assembled_to_the_same_files_and_records(sets, published, tmp_path):
    source = ParquetSetSource(str(published))
    assert all(map(ParquetSetSource.recognises, (published, published / "data")))
    assembly = assemble_sets(source, tmp_path / "out")
    for name, original in (("labelled", sets["train"]), ("test", sets["test"])):
        triplets = read_triplets(assembly.sets[name], require_gt=False)
        originals = read_triplets(original, require_gt=False)
        assert [t.id for t in triplets] == [t.id for t in originals]
        for triplet, first in zip(triplets, originals):
            for path, old in (
                (triplet.source, first.source),
                (triplet.mask, first.mask),
                (triplet.gt, first.gt),
            ):
                assert (path and path.read_bytes()) == (old and old.read_bytes())
            assert first.extra.items() <= triplet.extra.items()
            assert triplet.group == first.group
            assert triplet.extra["file"] == first.source.name
            assert triplet.extra["sha256"] == hashlib.sha256(first.source.read_bytes()).hexdigest()


def test_files_of_a_row_live_as_long_as_its_pictures(published):
    source = ParquetSetSource(str(published))
    item = next(item for item in source.list_items() if item.split == "train")
    pictures = source.load_item(item)
    path = pictures.source.file
    assert np.array_equal(load_image(path), pictures.source.array)
    folder = path.parent.parent
    del pictures
    assert not folder.exists()


def test_rows_without_gt_are_a_pools(sets, tmp_path):
    out = _publish({"train": sets["test"]}, tmp_path / "out")
    source = ParquetSetSource(str(out))
    with pytest.raises(Rejected, match="0.*0.*GT.*require_gt"):
        source.load_item(next(source.list_items()))
    pool = ParquetSetSource(str(out), require_gt=False)
    assert pool.load_item(next(pool.list_items())).gt is None
    assert (source.gives_gt, pool.gives_gt) == (True, False)
    with pytest.raises(ValueError, match="require_gt.*'no'"):
        ParquetSetSource(str(out), require_gt="no")


def test_foreign_parquet_is_read_by_its_columns(tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn

    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:8, :8] = 255
    features = Features(
        {
            "source": ImageColumn(),
            "mask": ImageColumn(),
            "GT": ImageColumn(),
            "extra": Value("string"),
            "quality": Value("int32"),
        }
    )
    rows = {
        "source": [_picture(1)] * 2,
        "mask": [mask] * 2,
        "GT": [_picture(2), None],
        "extra": ["no JSON", '{"note": 1}'],
        "quality": [3, None],
    }
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "data" / "train.parquet")
    source = ParquetSetSource(str(tmp_path))
    first, second = source.list_items()
    assert (first.id, first.group, first.split) == ("train-0-0", "train-0-0", "train")
    pictures = source.load_item(first)
    assert np.array_equal(pictures.gt.array, _picture(2))
    assert np.array_equal(pictures.mask.array, mask) and pictures.source.file.suffix == ".png"
    del pictures.extra["sha256"]
    assert pictures.extra == {"extra": "no JSON", "quality": 3}
    with pytest.raises(Rejected):
        source.load_item(second)


def _write_shard(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, compression="brotli")
    return ParquetSetSource(str(path.parent.parent))


def _encode(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": "x.png"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows, values",
    [
        (2_000_000, {"id": None, "source": None, "mask": None}),
        (1, {"id": "x" * 300_000_000, "source": None, "mask": None}),
    ],
    ids=["rows", "a value"],
)
def test_a_small_shard_that_would_become_gigabytes_is_refused(tmp_path, rows, values):
    columns = {name: pa.array([value] * rows, pa.string()) for name, value in values.items()}
    source = _write_shard(tmp_path / "data/train.parquet", **columns)
    assert (tmp_path / "data/train.parquet").stat().st_size < 20_000
    with pytest.raises(TripletError, match=r"train\.parquet"):
        list(source.list_items())


def test_a_value_stored_once_does_not_fill_the_memory_a_thousand_times(tmp_path, monkeypatch):
    large = {"bytes": bytes(500_000), "path": "x"}
    source = _write_shard(tmp_path / "data/train.parquet", source=[large] * 900, mask=[large] * 900)
    path = tmp_path / "data/train.parquet"
    assert path.stat().st_size < 60_000
    items = list(source.list_items())
    assert len(items) == 900
    with pytest.raises(TripletError, match=r"train\.parquet.*ROREM_MAX_PARQUET_RATIO"):
        source.load_item(items[0])


@pytest.mark.parametrize(
    "extra, words",
    [
        *((f'{{"{key}": "x"}}', key) for key in ("source", "mask", "GT", "gt", "inpaint")),
        ('{"note": "half a \\ud800"}', "surrogates"),
        ('{"note": ' + "[" * 60 + "]" * 60 + "}", "deeper than"),
        ('{"note": ' + "[" * 20_000, "recursion"),
    ],
    ids=["source", "mask", "GT", "gt", "inpaint", "half a character", "lists", "no end"],
)
def test_further_keys_that_no_record_can_have_are_rejected(tmp_path, extra, words):
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:8, :8] = 255
    parts = {"source": _picture(1), "mask": mask, "GT": _picture(1).copy()}
    parts["GT"][mask > 0] = 255 - parts["GT"][mask > 0]
    columns = {name: [_encode(array)] * 2 for name, array in parts.items()}
    extras = [extra, '{"note": 1, "id": "z", "group": "y"}']  # the row's own id and group count
    source = _write_shard(tmp_path / "raw/data/train.parquet", **columns, extra=extras)
    filters = FilterConfig(duplicate_distance=-1)
    result = assemble_sets(source, tmp_path / "out", workers=0, filters=filters)
    assert result.counts == {"labelled": 1} and sum(result.reasons.values()) == 1
    assert words in (tmp_path / "out/rejected.jsonl").read_text()
    (kept,) = read_triplets(result.sets["labelled"])
    assert (kept.id, kept.extra["note"]) == ("train-0-1", 1)


def test_a_temporary_folder_that_cannot_be_written_rejects_nothing(sets, tmp_path, monkeypatch):
    out = _publish({"train": sets["train"]}, tmp_path / "published")
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    with pytest.raises(SourceError, match="set TMPDIR"):
        assemble_sets(ParquetSetSource(str(out)), tmp_path / "out", workers=0)
    assert not (tmp_path / "out/rejected.jsonl").exists()


def test_ids_that_two_splits_share_are_made_unique(sets, tmp_path):
    out = _publish({"train": sets["train"], "validation": sets["train"]}, tmp_path / "out")
    ids = [item.id for item in ParquetSetSource(str(out)).list_items()]
    assert len(set(ids)) == 46 and {"图 003", "图 003~2"} <= set(ids)


def test_damaged_shards_and_cells_are_named(published, tmp_path):
    with pytest.raises(SourceError, match="data/<split>-"):
        list(ParquetSetSource(str(tmp_path)).list_items())
    data = (published / "data" / "test-00000-of-00001.parquet").read_bytes()
    shard = tmp_path / "test-00000-of-00001.parquet"
    shard.write_bytes(data[:-100])
    assert not ParquetSetSource.recognises(tmp_path)
    with pytest.raises(TripletError, match="test-00000-of-00001.parquet"):
        list(ParquetSetSource(str(tmp_path)).list_items())
    table = pq.read_table(published / "data" / shard.name).slice(0, 2).to_pylist()
    table[0]["source"]["bytes"] = table[0]["source"]["bytes"][:-300]
    table[1]["source"]["bytes"] = None
    pq.write_table(pa.Table.from_pylist(table), shard)
    source = ParquetSetSource(str(tmp_path))
    first, second = source.list_items()
    with pytest.raises(TripletError, match=f"^{shard},.*0.*0"):
        source.load_item(first)
    with pytest.raises(TripletError, match="row 1 of row group 0, source holds no image"):
        source.load_item(second)
    pq.write_table(pa.table({"input": [1]}), shard)
    with pytest.raises(SourceError, match="has no columns source and mask, but input"):
        list(source.list_items())


# ------------------------------------------------------------------------------------- the Hub


UPLOAD = """
    from rorem_lib.data.publishing import upload_dataset
    try:
        show(upload_dataset({0!r}, "me/removals"))
    except OSError as error:
        show(f"{{type(error).__name__}}: {{error}}")
"""
# What load_dataset gives, streaming and not: pixels as hashes, everything else as it is.
LOAD = """
    import hashlib
    import numpy as np
    from datasets import load_dataset
    for streaming in (False, True):
        for split in ("train", "test"):
            rows = []
            for row in load_dataset("me/removals", split=split, streaming=streaming):
                rows.append({key: hashlib.sha256(np.asarray(value).tobytes()).hexdigest()
                             if hasattr(value, "getpixel") else value
                             for key, value in row.items()})
            show(rows)
"""


def _describe(meta):
    rows = []
    for triplet in read_triplets(meta, require_gt=False):
        images, extra = load_images(triplet), dict(triplet.extra)
        row = {"id": triplet.id, "group": triplet.group}
        for key in ("source", "mask", "GT"):
            image = images[key.lower()]
            row[key] = image if image is None else hashlib.sha256(image.tobytes()).hexdigest()
        for key in ("origin", "license", "accepted_by", "remover", "score", "round"):
            row[key] = extra.pop(key, None)
        row |= {"width": SIZE, "height": SIZE, "mask_area": float(np.mean(images["mask"] >= 128))}
        rows.append({**row, "extra": json.dumps(extra, ensure_ascii=False, sort_keys=True)})
    return rows


@pytest.mark.slow
def test_upload_over_a_broken_connection_then_load_dataset_gives_the_same(
    hub, sets, published, tmp_path
):
    hub.token = "secret"
    shards = _hash_shards(published)
    broken = shards[sorted(shards)[1]]
    hub.break_connection("PUT", broken, 20_000)
    (address,) = hub.run_client(tmp_path, UPLOAD.format(str(published)), HF_TOKEN="secret")
    repo = hub.repos["me/removals"]
    commit = repo.branches["main"]
    assert repo.private and address == f"{hub.url}/datasets/me/removals/tree/{commit}"
    tree = repo.commits[commit]
    assert {name: tree[f"data/{name}"].sha256 for name in shards} == shards
    assert tree["README.md"].data == (published / "README.md").read_bytes()
    assert set(tree) == {".gitattributes", "README.md", *(f"data/{name}" for name in shards)}
    counts = {digest: len(hub.select("PUT", digest)) for digest in shards.values()}
    assert counts == {digest: 1 + (digest == broken) for digest in shards.values()}

    whole_train, whole_test, train, test = hub.run_client(tmp_path, LOAD, HF_TOKEN="secret")
    assert train == whole_train == _describe(sets["train"])
    assert test == whole_test == _describe(sets["test"])

    hub.log.clear()  # once more: nothing to send, and no new commit
    assert hub.run_client(tmp_path, UPLOAD.format(str(published)), HF_TOKEN="secret") == [address]
    assert not hub.select("PUT", "") and not hub.select("POST", "/commit/")


@pytest.mark.slow
def test_a_killed_upload_goes_on_and_stale_shards_are_deleted(hub, published, sets, tmp_path):
    shards = _hash_shards(published)
    broken = shards[sorted(shards)[1]]
    hub.break_connection("PUT", broken, 10_000, times=99)
    process = hub.start_client(tmp_path, UPLOAD.format(str(published)))
    deadline = time.monotonic() + 30
    while len(hub.objects) < len(shards) - 1 or not hub.select("PUT", broken):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not hub.select("POST", "/commit/")
    hub.breaks.clear()
    hub.log.clear()
    assert len(hub.run_client(tmp_path, UPLOAD.format(str(published)))) == 1
    assert [r.path for r in hub.select("PUT", "")] == [f"/lfs/{broken}"]

    smaller = _publish({"train": sets["train"]}, tmp_path / "out")
    hub.run_client(tmp_path, UPLOAD.format(str(smaller)))
    repo = hub.repos["me/removals"]
    assert [p for p in repo.commits[repo.branches["main"]] if p.startswith("data/")] == [
        "data/test-00000-of-00001.parquet",
        "data/train-00000-of-00001.parquet",
    ]


@pytest.mark.slow
def test_uploads_go_to_a_branch_that_is_made(hub, published, tmp_path):
    hub.run_client(
        tmp_path,
        f"""
        from rorem_lib.data.publishing import upload_dataset
        upload_dataset({str(published)!r}, "me/removals", revision="v2", private=False)
    """,
    )
    repo = hub.repos["me/removals"]
    assert not repo.private and set(repo.branches) == {"main", "v2"}
    assert "README.md" in repo.commits[repo.branches["v2"]]
    assert "README.md" not in repo.commits[repo.branches["main"]]


@pytest.mark.slow
def test_without_a_right_to_write_the_upload_says_what_to_do(hub, published, tmp_path):
    hub.token = "secret"
    (refused,) = hub.run_client(tmp_path, UPLOAD.format(str(published)))
    assert refused.startswith("PermissionError: ")
    assert "hf auth login" in refused and "HF_TOKEN" in refused
    assert not hub.repos


@pytest.mark.slow
def test_a_shard_that_cannot_be_sent_is_named(hub, published, tmp_path):
    hub.is_full = True
    (refused,) = hub.run_client(tmp_path, UPLOAD.format(str(published)))
    assert refused.startswith("ConnectionError: ") and "run again" in refused
    assert "'data/t" in refused and "507" in refused


def test_an_unfinished_folder_is_not_uploaded(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(b"1")
    with pytest.raises(SourceError, match="is not published to the end: publish again"):
        upload_dataset(tmp_path, "me/removals")
