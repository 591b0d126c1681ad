"""The real clients (huggingface_hub, gdown) in processes of their own, against a local server."""

import errno
import io
import os
import tarfile
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hub_server import HubServer

from rorem_lib.data import archives
from rorem_lib.data.items import SourceError
from rorem_lib.data.remote import open_remote, talk_to_hub

pytestmark = pytest.mark.slow

BIG = np.random.default_rng(1).bytes(34_000_000)  # the client resumes at multiples of 10 MiB


@pytest.fixture
def hub():
    with HubServer().run() as server:
        yield server


def _tar(files, mode="w:gz"):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def _download(*calls):
    """Code that downloads again and again, and shows each commit and tree, or the error."""
    return textwrap.dedent(f"""
        from rorem_lib.data.items import SourceError
        from rorem_lib.data.remote import download_dataset
        for name, options in {calls!r}:
            try:
                got = download_dataset(name, **options)
                show([got.origin, got.commit, str(got.folder), sorted(
                    str(p.relative_to(got.folder)) for p in got.folder.rglob("*") if p.is_file())])
            except (SourceError, OSError) as error:
                show(f"{{type(error).__name__}}: {{error}}")
    """)


# ------------------------------------------------------------------------------------ the Hub


def test_a_broken_download_is_resumed_and_only_what_is_asked_for_is_loaded(hub, tmp_path):
    commit = hub.add(
        "o/d",
        {
            "data/train-1.bin": BIG,
            "data/train-2.bin": b"2" * 5000,
            "data/test-1.bin": b"t" * 5000,
            "README.md": b"hello",
        },
    )
    hub.break_connection("GET", "train-1.bin", 25_000_000)
    (first,) = hub.run_client(tmp_path, _download(("o/d", {"patterns": ["data/train-*"]})))
    assert first[:2] == [f"hub:o/d@{commit}", commit]
    assert first[3] == ["data/train-1.bin", "data/train-2.bin"]
    assert (Path(first[2]) / "data" / "train-1.bin").read_bytes() == BIG
    broken, resumed = hub.select("GET", "train-1.bin")
    assert broken.start == 0 and broken.size <= 25_000_000
    assert resumed.status == 206 and resumed.start == 20 * 2**20  # the last whole piece
    assert resumed.size == len(BIG) - resumed.start
    assert not hub.select("GET", "test-1.bin") and not hub.select("GET", "resolve/main/README.md")


def test_offline_it_reads_the_cache_and_names_what_is_missing(hub, tmp_path):
    commit = hub.add("o/d", {"a.bin": b"a" * 2000, "b.bin": b"b" * 2000})
    asked = ("o/d", {"patterns": ["a.*"]})
    (online,) = hub.run_client(tmp_path, _download(asked))
    hub.log.clear()
    offline, other, revision, pinned = hub.run_client(
        tmp_path,
        _download(
            asked,
            ("o/d", {}),
            ("o/d", {"revision": "v2"}),
            ("o/d", {"patterns": ["a.*"], "revision": commit}),
        ),
        HF_HUB_OFFLINE="1",
    )
    assert offline == pinned == online
    for text, name in ((other, "o/d@main"), (revision, "o/d@v2")):
        assert text.startswith(
            f"FileNotFoundError: {name} is not, or not all, in the cache {tmp_path}"
        )
        assert "HF_HUB_OFFLINE is set: unset it" in text
    assert not hub.log


def test_a_pinned_revision_stays_and_a_branch_moves(hub, tmp_path):
    old = hub.add("o/d", {"a.txt": b"old"})
    new = hub.repos["o/d"].commit({"a.txt": b"new"})
    code = _download(("o/d", {"revision": old}), ("o/d", {"revision": "main"}), ("o/d", {}))
    found = hub.run_client(tmp_path, "import logging\nlogging.basicConfig(level=20)\n" + code)
    assert [commit for _, commit, *_ in found] == [old, new, new]
    assert [(Path(folder) / "a.txt").read_text() for _, _, folder, _ in found] == [
        "old",
        "new",
        "new",
    ]
    assert f"main is commit {new} now" in hub.errors and f"{old} is commit" not in hub.errors


def test_what_the_hub_refuses_is_answered_with_what_to_do(hub, tmp_path):
    hub.token = "secret"
    hub.add("o/gated", {"a.txt": b"a"}, gated=True)
    hub.add("o/private", {"a.txt": b"a"}, private=True)
    hub.add("o/open", {"a.txt": b"a"})
    gated, private, absent, revision, nothing, name = hub.run_client(
        tmp_path,
        _download(
            ("o/gated", {}),
            ("o/private", {}),
            ("o/absent", {}),
            ("o/open", {"revision": "v9"}),
            ("o/open", {"patterns": ["*.zip"]}),
            ("no name", {}),
        ),
    )
    assert gated.startswith("PermissionError: o/gated is gated")
    assert f"{hub.url}/datasets/o/gated" in gated and "hf auth login" in gated
    for text, repo in ((private, "o/private"), (absent, "o/absent"), (name, "no name")):
        assert text.startswith(f"FileNotFoundError: there is no dataset {repo}")
        assert "private" in text and "HF_TOKEN" in text
    assert revision.startswith("FileNotFoundError: o/open has no revision 'v9'")
    assert nothing.startswith("SourceError: ") and "matches *.zip; it has a.txt" in nothing
    (wrong,) = hub.run_client(tmp_path, _download(("o/gated", {})), HF_TOKEN="other")
    assert wrong.startswith("PermissionError: ") and "401" in wrong and "HF_TOKEN" in wrong
    let_in = hub.run_client(
        tmp_path, _download(("o/gated", {}), ("o/private", {})), HF_TOKEN="secret"
    )
    assert [files for *_, files in let_in] == [["a.txt"], ["a.txt"]]


def test_without_a_server_the_network_is_named(hub, tmp_path):
    (text,) = hub.run_client(tmp_path, _download(("o/d", {})), HF_ENDPOINT="http://127.0.0.1:9")
    assert text.startswith("FileNotFoundError: o/d@main") and "the Hub cannot be reached" in text


def test_what_a_killed_download_left_is_deleted_when_it_is_old(hub, tmp_path):
    hub.add("o/d", {"a.txt": b"a"})
    blobs = tmp_path / "hub" / "datasets--o--d" / "blobs"
    blobs.mkdir(parents=True)
    for name, age in (("old", 7200), ("new", 0)):
        (blobs / f"{name}.incomplete").write_bytes(b"1")
        os.utime(blobs / f"{name}.incomplete", (time.time() - age,) * 2)
    hub.run_client(tmp_path, _download(("o/d", {})))
    assert [p.name for p in blobs.glob("*.incomplete")] == ["new.incomplete"]


# ------------------------------------------------------------------------------- one door for all


def _open(hub, home, work, *specs, **environment):
    """[origin, commit, folder, {path: text}] of each spec."""
    return hub.run_client(
        home,
        f"""
        from rorem_lib.data.remote import open_remote
        for spec in {specs!r}:
            got = open_remote(spec, {str(work)!r})
            show([got.origin, got.commit, str(got.folder), {{
                str(p.relative_to(got.folder)): p.read_text() for p in got.folder.rglob("*")
                if p.is_file() and p.name != ".extracted.json"}}])
    """,
        **environment,
    )


def test_archives_of_a_repository_are_unpacked_once_beside_its_other_files(hub, tmp_path):
    whole = _tar({"source/图.txt": b"1" * 3000})
    commit = hub.add(
        "o/d",
        {
            "README.md": b"hello",
            "set.tar.gz": _tar({"meta.json": b"[]"}),
            "sub/big.tar.gz.part01": whole[:60],
            "sub/big.tar.gz.part02": whole[60:],
            "set/own.txt": b"own",
        },
    )
    work = tmp_path / "work"
    ((origin, found, folder, tree),) = _open(hub, tmp_path, work, "hub:o/d")
    assert (origin, found) == (f"hub:o/d@{commit}", commit)
    assert folder == str(work / f"o--d@{commit[:12]}")
    assert tree == {
        "README.md": "hello",
        "set.tar.gz.unpacked/meta.json": "[]",
        "set/own.txt": "own",
        "sub/big/source/图.txt": "1" * 3000,
    }
    marked = Path(folder) / "sub" / "big" / "source" / "图.txt"
    marked.write_text("mine")
    ((*_, again),) = _open(hub, tmp_path, work, origin, HF_HUB_OFFLINE="1")
    assert again["sub/big/source/图.txt"] == "mine"


def test_patterns_choose_the_files_whatever_else_the_cache_holds(hub, tmp_path):
    commit = hub.add("o/d", {"data/train-1.txt": b"1", "data/test-1.txt": b"t", "x.txt": b"x"})
    specs = ["hub:o/d", f"hub:o/d@{commit}:data/train-*, x.*", "hub:o/d@main:data/test-*"]
    whole, some, test = _open(hub, tmp_path, tmp_path / "work", *specs)
    assert set(whole[3]) == {"data/train-1.txt", "data/test-1.txt", "x.txt"}
    assert whole[2].endswith(f"snapshots/{commit}")  # nothing to unpack or to leave out: as it is
    assert some[3] == {"data/train-1.txt": "1", "x.txt": "x"}
    assert some[0] == f"hub:o/d@{commit}:data/train-*,x.*"
    assert test[3] == {"data/test-1.txt": "t"}


def test_local_folders_and_archives_are_opened_too(tmp_path):
    (tmp_path / "数 据").mkdir()
    assert open_remote(str(tmp_path / "数 据"), tmp_path / "work").folder == tmp_path / "数 据"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with zipfile.ZipFile(tmp_path / name / "set.v1.zip", "w") as archive:
            archive.writestr("who.txt", name)
    for name in ("a", "b", "a"):
        got = open_remote(str(tmp_path / name / "set.v1.zip"), tmp_path / "work")
        assert (got.folder / "who.txt").read_text() == name
        assert got.folder.name.startswith("set.v1-") and got.commit is None
        assert got.origin == str(tmp_path / name / "set.v1.zip")
    with pytest.raises(SourceError, match="there is no .*gone: give a folder, an archive, hub:"):
        open_remote(str(tmp_path / "gone"), tmp_path / "work")


@pytest.mark.parametrize(
    "spec, words",
    [
        ("hub:", "expected hub:owner/name"),
        ("hub:@main", "expected hub:owner/name"),
        ("drive:", "names no file on Google Drive"),
        ("drive:a b", "names no file on Google Drive"),
    ],
)
def test_specs_that_name_nothing_are_refused(tmp_path, spec, words):
    with pytest.raises(SourceError, match=words):
        open_remote(spec, tmp_path)


# -------------------------------------------------------------------------------- Google Drive


def test_a_large_file_on_drive_is_confirmed_resumed_and_unpacked(hub, tmp_path):
    noise = np.random.default_rng(2).bytes(3_000_000)
    hub.drive["File-1"] = data = _tar({"noise.hex": noise.hex().encode()}, "w")
    hub.break_connection("GET", "/drive/download", 2_500_000)
    link = "drive:https://drive.google.com/file/d/File-1/view?usp=sharing"
    ((origin, _, folder, tree),) = _open(hub, tmp_path, tmp_path / "work", link)
    assert origin == "drive:File-1" and tree == {"noise.hex": noise.hex()}
    asked, broken, resumed = hub.select("GET", "/drive/")
    assert asked.path == "/drive/uc"  # answered with the page that asks for a confirmation
    assert broken.start == 0 and broken.size <= 2_500_000
    assert resumed.status == 206 and 1_000_000 < resumed.start <= broken.size
    assert resumed.start + resumed.size == len(data)
    hub.log.clear()
    (Path(folder).parent / "drive-File-1.archive").unlink()  # to save space
    ((*_, again),) = _open(hub, tmp_path, tmp_path / "work", "drive:File-1")
    assert again == tree and not hub.log


def test_what_an_earlier_process_loaded_from_drive_is_kept(hub, tmp_path):
    hub.drive["f"] = data = np.random.default_rng(3).bytes(50_000)
    # named as gdown names what a kill leaves
    (tmp_path / "set.bin12345678.part").write_bytes(data[:20_000])
    code = f"""
        from rorem_lib.data.remote import download_drive
        download_drive("f", {str(tmp_path / "set.bin")!r})
    """
    hub.run_client(tmp_path, code)
    assert (tmp_path / "set.bin").read_bytes() == data
    last = hub.select("GET", "/drive/download")[-1]
    assert (last.start, last.size) == (20_000, 30_000)
    assert not list(tmp_path.glob("*.part"))


def test_what_drive_refuses_is_answered_with_what_to_do(hub, tmp_path):
    hub.drive["busy"] = (
        "Too many users have viewed or downloaded this file recently. Please try "
        "accessing the file again later."
    )
    hub.drive["page"] = "</p><p>Sign in"  # a page that gdown knows nothing of
    code = f"""
        from rorem_lib.data.items import SourceError
        from rorem_lib.data.remote import download_drive
        for name in ("busy", "absent", "page"):
            try:
                download_drive(name, {str(tmp_path / "out")!r})
            except SourceError as error:
                show(str(error))
    """
    busy, absent, page = hub.run_client(tmp_path, code)
    assert "quota for busy is used up: try again in a day, or copy the file" in busy
    for text, name in ((absent, "absent"), (page, "page")):
        assert f"does not give {name}: check the id, and that it is a file shared with" in text
    assert not (tmp_path / "out").exists()


def test_a_drive_file_that_is_no_archive_is_named(hub, tmp_path):
    hub.drive["f"] = b"hello"
    code = f"""
        from rorem_lib.data.archives import ArchiveError
        from rorem_lib.data.remote import open_remote
        try:
            open_remote("drive:f", {str(tmp_path / "work")!r})
        except ArchiveError as error:
            show(str(error))
    """
    (text,) = hub.run_client(tmp_path, code)
    assert "drive-f.archive is truncated, damaged or no archive" in text
    assert archives.archive_stem("drive-f.archive") is None


# ---------------------------------------------------------------------- around the client's calls


def test_progress_bars_are_for_people_alone(monkeypatch):
    from huggingface_hub.utils import are_progress_bars_disabled

    shown = are_progress_bars_disabled()
    for batch, hidden in (("1", True), ("", shown)):
        monkeypatch.setenv("ROREM_BATCH", batch)
        with talk_to_hub("o/d"):
            assert are_progress_bars_disabled() == hidden
        assert are_progress_bars_disabled() == shown


def test_a_full_disk_names_the_cache_and_other_faults_stay_themselves(tmp_path):
    with pytest.raises(OSError, match=f"o/d@v1.*{tmp_path}") as e:
        with talk_to_hub("o/d", "v1", cache_dir=tmp_path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert e.value.errno == errno.ENOSPC
    for fault in (PermissionError(errno.EACCES, "no", str(tmp_path)), ValueError("no")):
        with pytest.raises(type(fault)) as caught:
            with talk_to_hub("o/d"):
                raise fault
        assert caught.value is fault


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path):
    cache = tmp_path / ".cache/huggingface/hub"
    with pytest.raises(OSError, match=f"{cache} cannot be written.*HF_HOME") as caught:
        with talk_to_hub("o/d", cache_dir=cache):
            raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / ".cache"))
    assert isinstance(caught.value, PermissionError)


def test_a_socks_proxy_names_the_package_that_is_missing():
    httpx = pytest.importorskip("httpx")
    try:
        httpx.Client(proxy="socks5://127.0.0.1:9").close()
        pytest.skip("socksio is installed")
    except ImportError as error:
        cause = error
    for wrap in (False, True):
        with pytest.raises(ConnectionError, match="pip install socksio"), talk_to_hub("o/d"):
            if wrap:  # as the client does
                raise RuntimeError("cannot reach the Hub") from cause
            raise cause


def test_a_runtime_error_is_a_broken_upload_but_a_models_own_fault():
    with pytest.raises(ConnectionError, match="o/d@main"):
        with talk_to_hub("o/d"):
            raise RuntimeError("no luck")
    with pytest.raises(RuntimeError, match="size mismatch"), talk_to_hub("o/x", kind="model"):
        raise RuntimeError("size mismatch")
