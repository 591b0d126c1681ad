"""`rorem data` as it is typed: exit codes, what goes to which stream, and that no data is lost."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from forked import Job, run_rorem
from hub_server import HubServer

from rorem_lib.data.assembly import assemble_sets
from rorem_lib.data.check import check_set
from rorem_lib.data.pictures import load_image, save_image
from rorem_lib.data.triplets import read_triplets
from rorem_lib.data.writer import TripletWriter
from rorem_lib.files import ROOT
from rorem_lib.runner import cli
from rorem_lib.sources.upstream import UpstreamSource

pytestmark = pytest.mark.slow

SIZE = 32


def _picture(seed):
    return np.random.default_rng(seed).integers(0, 255, (SIZE, SIZE, 3), np.uint8)


def _mask():
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[6:16, 6:16] = 255
    return mask


def _write_set(folder, names, seed=0, **extra):
    with TripletWriter(folder) as writer:
        for number, name in enumerate(names):
            writer.add(
                id=name,
                source=_picture(seed + number),
                mask=_mask(),
                gt=_picture(seed + number + 100),
                seed=seed + number,
                **extra,
            )
    return folder


def _run(*words, cwd=None, **environment):
    """`rorem data WORDS` to its end; in a fresh process where there is an environment to read."""
    words = ["data", *map(str, words)]
    if environment:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        kept |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "rorem_lib.runner.cli", *words],
            cwd=cwd,
            text=True,
            capture_output=True,
            timeout=60,
            env=kept | environment,
        )
    else:
        with tempfile.TemporaryDirectory() as place:
            out, errors = Path(place, "out"), Path(place, "errors")
            job = Job(run_rorem, words, log=out, errors=errors, cwd=cwd)
            code = job.wait()
            done = subprocess.CompletedProcess(words, code, out.read_text(), errors.read_text())
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    return done


def _seeds(folder):
    """By id the seed of each record, whose images must be those of that seed."""
    found = {}
    for triplet in read_triplets(folder):
        seed = found[triplet.id] = triplet.extra["seed"]
        assert np.array_equal(load_image(triplet.source), _picture(seed)), f"of {triplet.id}"
        assert np.array_equal(load_image(triplet.gt), _picture(seed + 100)), f"of {triplet.id}"
    return found


# ---------------------------------------------------------------------------------------- check


def test_sound_sets_end_with_0_however_they_are_named(tmp_path):
    first = _write_set(tmp_path / "集 合", ["a", "b"])
    _write_set(tmp_path / "two", ["c"])
    line = f"{first}: 2 triplets, all sound\n"
    for words, cwd, said in (
        ([first], None, line),
        ([first / "meta.json"], None, line),
        (["."], first, ".: 2 triplets, all sound\n"),
        ([tmp_path], None, f"{tmp_path / 'two'}: 1 triplets, all sound\n{line}"),
    ):
        done = _run("check", *words, "--workers", 1, cwd=cwd)
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


@pytest.fixture
def faulty(tmp_path):
    """A set of 70 triplets, more than a process takes at a time, seven of them with a fault."""
    folder = _write_set(tmp_path / "faulty", [f"{number:02d}" for number in range(70)])
    (folder / "source/03.png").write_bytes(b"")
    (folder / "mask/40.png").unlink()
    data = (folder / "GT/66.png").read_bytes()
    (folder / "GT/66.png").write_bytes(data[: len(data) // 2])
    save_image(folder / "mask/67.png", _mask() * 0)
    records = json.loads((folder / "meta.json").read_text())
    records[10] = {"id": "10"}
    records[11] = "nonsense"
    records[15]["source"] = "../../x.png"
    (folder / "meta.json").write_text(json.dumps(records))
    return folder


def test_each_fault_is_named_once_on_stdout_by_any_number_of_processes(faulty):
    one, two = (_run("check", faulty, "--workers", workers) for workers in (1, 2))
    assert (one.returncode, one.stdout, one.stderr) == (two.returncode, two.stdout, two.stderr)
    assert one.returncode == 1 and one.stderr == ""
    *lines, last = one.stdout.splitlines()
    assert last == f"{faulty}: 70 triplets, 7 faulty"
    for line, (file, reason) in zip(
        lines,
        [
            ("source/03.png", "is empty (0 bytes)"),
            ("meta.json", "record 11 has no source"),
            ("meta.json", "record 12 is no object"),
            ("meta.json", "leaves the set's folder"),
            ("mask/40.png", "is missing (record 41)"),
            ("GT/66.png", "is truncated or damaged"),
            ("mask/67.png", "is an empty mask"),
        ],
        strict=True,
    ):
        assert line.count(str(faulty / file)) == 1 and reason in line


def test_one_faulty_set_among_several_ends_with_1_and_all_are_checked(faulty):
    _write_set(faulty.parent / "sound", ["a"])
    done = _run("check", faulty.parent, "--workers", 1)
    assert done.returncode == 1
    assert f"{faulty}: 70 triplets, 7 faulty\n" in done.stdout
    assert done.stdout.endswith(f"{faulty.parent / 'sound'}: 1 triplets, all sound\n")


def test_what_is_no_set_is_one_line_on_stderr(tmp_path):
    damaged, half = tmp_path / "damaged", tmp_path / "half"
    for folder in (damaged, half, tmp_path / "empty"):
        folder.mkdir()
    (damaged / "meta.json").write_text('[{"source": "a.png",\n "mask"')
    (half / "meta.jsonl.partial").write_text("{}\n")
    for place, words in (
        (tmp_path / "nowhere", "there is no triplet set at {} (meta.json is missing)"),
        (tmp_path / "empty", "there is no triplet set at {} (meta.json is missing)"),
        (damaged, "{}/meta.json is neither JSON nor JSON lines (line 2:"),
        (half, "{} is an unfinished set: run again"),
    ):
        done = _run("check", place)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("rorem: " + words.format(place))
        assert done.stderr.count("\n") == 1


def test_paths_that_leave_the_set_are_faults_unless_allowed(tmp_path):
    folder = _write_set(tmp_path / "set", ["a", "b"])
    save_image(tmp_path / "x.png", _picture(7))
    records = json.loads((folder / "meta.json").read_text())
    records[0]["source"] = "../x.png"
    records[1]["GT"] = str(tmp_path / "x.png")
    (folder / "meta.json").write_text(json.dumps(records))
    for words, faults in (
        ([], 2),
        (["--allow-outside"], 1),
        (["--allow-absolute"], 1),
        (["--allow-outside", "--allow-absolute"], 0),
    ):
        done = _run("check", folder, "--workers", 1, *words)
        assert len(done.stdout.splitlines()) == faults + 1
        assert done.returncode == (1 if faults else 0)


def test_hash_names_files_that_are_not_those_that_were_written(tmp_path):
    folder = _write_set(tmp_path / "set", ["a", "b"])
    save_image(folder / "source/b.png", _picture(9))
    done = _run("check", folder, "--workers", 1)
    assert (done.returncode, done.stdout) == (0, f"{folder}: 2 triplets, all sound\n")
    done = _run("check", folder, "--workers", 1, "--hash")
    assert done.returncode == 1 and f"{folder}: 2 triplets, 1 faulty\n" in done.stdout
    assert done.stdout.startswith(f"{folder}/source/b.png is not the file that was written")


def test_a_terminal_is_told_how_far_it_is(tmp_path, monkeypatch, capsys):
    folder = _write_set(tmp_path / "set", ["a", "b"])
    assert cli.main(["data", "check", str(folder), "--workers", "1"]) == 0
    assert capsys.readouterr().err == ""  # nobody watches
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["data", "check", str(folder), "--workers", "1"]) == 0
    told = capsys.readouterr().err
    assert "triplets" in told and told.endswith("\r")  # and the line is gone at the end


def test_an_interruption_ends_with_130(tmp_path):
    folder = _write_set(tmp_path / "set", ["a"])
    (folder / "source/a.png").unlink()
    os.mkfifo(folder / "source/a.png")  # whoever reads it waits
    process = subprocess.Popen(
        [sys.executable, "-m", "rorem_lib.runner.cli", "data", "check", folder, "--workers", "1"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    with open(folder / "source/a.png", "wb"):  # goes on as soon as it is read
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in errors


def test_a_damaged_list_does_not_hide_the_sets_after_it(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/meta.json").write_text("[")
    _write_set(tmp_path / "b", ["a"])
    done = _run("check", tmp_path, "--workers", 1)
    assert done.returncode == 1 and f"{tmp_path / 'b'}: 1 triplets, all sound" in done.stdout
    assert str(tmp_path / "a/meta.json") in done.stdout + done.stderr


# ---------------------------------------------------------------------------------------- merge


def test_merged_ids_are_unique_and_the_inputs_stay(tmp_path):
    first = _write_set(tmp_path / "one", ["a", "b"])
    second = _write_set(tmp_path / "two", ["b", "c"], seed=10)
    for _ in range(2):  # what is there is replaced
        done = _run("merge", tmp_path / "all", first, second, "--workers", 1)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{tmp_path / 'all'}: 4 triplets of 2 sets\n"
        assert _seeds(tmp_path / "all") == {"a": 0, "b": 1, "b~2": 10, "c": 11}
    assert _seeds(first) == {"a": 0, "b": 1} and _seeds(second) == {"b": 10, "c": 11}
    (tmp_path / "sets").mkdir()
    for folder in (first, second):
        folder.rename(tmp_path / "sets" / folder.name)
    done = _run("merge", tmp_path / "of a folder", tmp_path / "sets", "--workers", 1)
    assert done.returncode == 0 and "4 triplets of 2 sets" in done.stdout
    assert list(_seeds(tmp_path / "of a folder")) == ["a", "b", "b~2", "c"]


def test_a_missing_input_is_named_before_anything_is_written(tmp_path):
    first = _write_set(tmp_path / "one", ["a"])
    done = _run("merge", tmp_path / "all", first, tmp_path / "gone", "--workers", 1)
    assert done.returncode == 1 and not (tmp_path / "all").exists()
    assert done.stderr.startswith(f"rorem: there is no triplet set at {tmp_path / 'gone'} ")


def test_faulty_inputs_end_with_1_and_their_files_are_named(tmp_path):
    first, second = _write_set(tmp_path / "one", ["a"]), _write_set(tmp_path / "two", ["b"])
    (second / "source/b.png").write_bytes(b"")
    done = _run("merge", tmp_path / "all", first, second, "--workers", 1)
    assert done.returncode == 1
    assert f"{tmp_path}/all/source/b.png is empty (0 bytes)" in done.stdout
    (second / "source/b.png").unlink()
    done = _run("merge", tmp_path / "new", first, second)
    assert done.returncode == 1 and f"{second}/source/b.png is missing" in done.stderr
    assert not (tmp_path / "new/meta.json").exists()


def test_a_merge_that_fails_leaves_the_set_that_was_there(tmp_path):
    target = tmp_path / "all"
    _run("merge", target, _write_set(tmp_path / "one", ["a"]), "--workers", 1)
    other, faulty = _write_set(tmp_path / "other", ["a"], seed=7), _write_set(tmp_path / "z", ["z"])
    (faulty / "GT/z.png").unlink()
    done = _run("merge", target, other, faulty, "--workers", 1)
    assert done.returncode == 1 and f"{faulty}/GT/z.png is missing" in done.stderr
    assert _seeds(target) == {"a": 0} and not list(target.glob("*.partial"))


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(0, id="the first"),
        pytest.param(1, id="the last"),
    ],
)
def test_merging_into_one_of_the_inputs_loses_nothing(tmp_path, place):
    """Whether it is done or refused."""
    sets = [
        _write_set(tmp_path / "one", ["a", "b"]),
        _write_set(tmp_path / "two", ["b", "c"], seed=10),
    ]
    target = sets[place]
    before = _seeds(target)
    done = _run("merge", target, *sets, "--workers", 1)
    found = _seeds(target)
    if done.returncode:
        assert found == before and str(target) in done.stderr
    else:
        assert sorted(found.values()) == [0, 1, 10, 11]


@pytest.mark.parametrize("name", ["../home/precious.txt", "{}/home/precious.txt"])
def test_merging_into_a_set_of_others_deletes_nothing(tmp_path, name):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/precious.txt").write_text("mine")
    target = _write_set(tmp_path / "downloaded", ["a"])
    record = {"id": "precious", "source": name.format(tmp_path), "mask": "mask/a.png"}
    (target / "meta.json").write_text(json.dumps([record]))
    first = _write_set(tmp_path / "one", ["b"])
    done = _run("merge", target, first, "--workers", 1)  # even where it says to be the kit's own
    assert done.returncode == 0 and (tmp_path / "home/precious.txt").read_text() == "mine"
    (target / ".rorem-set").unlink()
    before = (target / "meta.json").read_bytes()
    done = _run("merge", target, first, "--workers", 1)
    assert done.returncode == 1 and "choose another folder" in done.stderr
    assert (target / "meta.json").read_bytes() == before


# -------------------------------------------------------------------------------------- publish


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    """Sets assembled of ten raw triplets, of which two were rejected."""
    folder = tmp_path_factory.mktemp("publish")
    raw = folder / "raw"
    records = []
    for part in ("source", "mask", "GT"):
        (raw / part).mkdir(parents=True)
    for number in range(10):
        source = _picture(number)
        for part, picture in (
            ("source", source),
            ("mask", _mask()),
            ("GT", np.where(_mask()[..., None] > 0, 0, source)),
        ):
            save_image(raw / part / f"{number}.png", picture)
        records.append(
            {part: f"{part}/{number}.png" for part in ("source", "mask", "GT")}
            | {"license": "CC0-1.0", "split": "test" if number > 6 else "train"}
        )
    save_image(raw / "mask/1.png", _mask() * 0)
    (raw / "GT/2.png").unlink()
    (raw / "meta.json").write_text(json.dumps(records))
    result = assemble_sets(UpstreamSource(str(raw)), folder / "out")
    assert result.counts == {"labelled": 5, "test": 3}
    return folder / "out"


def test_publishing_writes_shards_of_every_set_and_a_card_with_what_was_rejected(
    assembled, tmp_path
):
    words = [
        "publish",
        assembled,
        "--repo-id",
        "me/removals",
        "--output-dir",
        tmp_path / "out",
        "--acceptance",
        "By *two* people.",
    ]
    done = _run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'out'}: shards of labelled, test, and README.md\n"
    shards = sorted((tmp_path / "out/data").iterdir())
    assert [path.name for path in shards] == [
        "labelled-00000-of-00001.parquet",
        "test-00000-of-00001.parquet",
    ]
    for path, name in zip(shards, ("labelled", "test")):
        triplets = read_triplets(assembled / name)
        rows = pq.read_table(path).to_pylist()
        assert [row["id"] for row in rows] == [triplet.id for triplet in triplets]
        assert [row["GT"]["bytes"] for row in rows] == [t.gt.read_bytes() for t in triplets]
    card = (tmp_path / "out/README.md").read_text()
    for text in (
        "By *two* people.",
        "`min_mask_area` 0.0005",
        "8 items were kept; rejected were:",
        "| empty mask | 1 |",
        "| missing file | 1 |",
        'load_dataset("me/removals"',
    ):
        assert text in card, text
    times = [path.stat().st_mtime_ns for path in shards]
    assert _run(*words).returncode == 0
    assert times == [path.stat().st_mtime_ns for path in shards]


def test_the_licence_must_be_known_and_the_default_folder_is_beside_the_set(tmp_path):
    folder = _write_set(tmp_path / "训练", ["a", "b"])
    done = _run("publish", folder, "--repo-id", "me/x")
    assert done.returncode == 1 and done.stdout == ""
    assert "2 records name no license" in done.stderr and not (folder / "published").exists()
    done = _run("publish", folder, "--repo-id", "me/x", "--license", "CC0-1.0")
    assert done.returncode == 0
    shard = folder / "published/data/训练-00000-of-00001.parquet"
    assert pq.read_table(shard).column("license").to_pylist() == ["CC0-1.0"] * 2
    assert "license: cc0-1.0" in (folder / "published/README.md").read_text()
    assert check_set(folder) == []


def test_a_folder_with_a_card_of_others_is_not_published_into(tmp_path):
    folder = _write_set(tmp_path / "set", ["a"], license="CC0-1.0")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("mine")
    done = _run("publish", folder, "--repo-id", "me/x", "--output-dir", tmp_path / "out")
    assert done.returncode == 1 and "README.md" in done.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["README.md"]
    assert (tmp_path / "out/README.md").read_text() == "mine"


def test_without_a_hub_an_upload_says_so_and_keeps_the_shards(assembled, tmp_path):
    words = [
        "publish",
        assembled,
        "--repo-id",
        "me/removals",
        "--output-dir",
        tmp_path / "out",
        "--upload",
    ]
    for environment, said in (
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set: unset it"),
        ({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}, "Connection refused"),
    ):
        done = _run(*words, HF_HOME=str(tmp_path), **environment)
        assert done.returncode == 1 and "shards of labelled, test" in done.stdout
        assert done.stderr.startswith("rorem: ") and said in done.stderr
        assert "me/removals" in done.stderr and "uploaded" not in done.stdout
    assert len(list((tmp_path / "out/data").glob("*.parquet"))) == 2


@pytest.mark.parametrize("public", [False, True], ids=["private", "public"])
def test_uploads_are_private_unless_public_is_said(assembled, tmp_path, public):
    with HubServer().run() as hub:
        hub.token = "secret"
        done = _run(
            "publish",
            assembled,
            "--repo-id",
            "me/removals",
            "--output-dir",
            tmp_path / "out",
            "--upload",
            *["--public"] * public,
            HF_HUB_OFFLINE="0",
            HF_ENDPOINT=hub.url,
            HF_HOME=str(tmp_path),
            HF_TOKEN="secret",
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1",
        )
    assert done.returncode == 0, done.stderr
    repo = hub.repos["me/removals"]
    commit = repo.branches["main"]
    assert done.stdout.endswith(f"uploaded to {hub.url}/datasets/me/removals/tree/{commit}\n")
    assert repo.private is not public
    files = repo.commits[commit]
    shard = "data/test-00000-of-00001.parquet"
    assert files[shard].data == (tmp_path / "out" / shard).read_bytes()
    assert {"README.md", shard, "data/labelled-00000-of-00001.parquet"} <= set(files)
    assert not any("publishing" in name for name in files)


def test_the_current_folder_and_a_meta_file_can_be_published(tmp_path):
    folder = _write_set(tmp_path / "train", ["a"], license="CC0-1.0")
    for number, (name, cwd) in enumerate(
        ((".", folder), ("meta.json", folder), ("train/meta.json", tmp_path))
    ):
        out = tmp_path / str(number)
        done = _run("publish", name, "--repo-id", "me/x", "--output-dir", out, cwd=cwd)
        assert done.returncode == 0, done.stderr
        assert (out / "data/train-00000-of-00001.parquet").is_file()


# -------------------------------------------------------------------------------------- options


def test_help_names_every_command_and_option():
    for words, parts in (
        ([], ["check", "merge", "publish", "open every image"]),
        (["check"], ["folder", "--allow-absolute", "--allow-outside", "--hash", "--workers"]),
        (["merge"], ["folder", "sets", "--workers"]),
        (
            ["publish"],
            [
                "folder",
                "--repo-id OWNER/NAME",
                "--output-dir",
                "--license",
                "--acceptance",
                "--upload",
                "--public",
                "HF_TOKEN",
            ],
        ),
    ):
        done = _run(*words, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        for part in parts:
            assert part in done.stdout, part


def test_wrong_options_end_with_2():
    for words, said in (
        ([], "COMMAND"),
        (["check"], "folder"),
        (["merge", "x"], "sets"),
        (["publish", "x"], "--repo-id"),
        (["check", "x", "--workers", "many"], "--workers"),
        (["mend", "x"], "mend"),
    ):
        done = _run(*words)
        assert done.returncode == 2 and done.stdout == ""
        assert said in done.stderr.splitlines()[-1]
