"""Sets that are somewhere else: on the Hugging Face Hub, on Google Drive, in an archive.

`open_remote` turns what a recipe names into a local folder, for the importers to recognise. On the
Hub a revision is resolved to its commit first, so that what was read can be said and read again.
Tokens come from the environment (`HF_TOKEN`) or `hf auth login`, never from an argument.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rorem_lib.data.archives import MARKER, archive_stem, extract_archive, find_archives
from rorem_lib.data.items import SourceError
from rorem_lib.files import is_full

logger = logging.getLogger(__name__)

_SPEC = re.compile(r"hub:(?P<repo>[^@:]+)(?:@(?P<revision>[^:]+))?(?::(?P<patterns>.+))?")


@dataclass(frozen=True)
class Fetched:
    """What was fetched.

    Attributes:
        folder: where it lies.
        origin: names it so that it can be fetched again: `hub:owner/name@<commit>`, `drive:<id>`,
            or the local path.
        commit: the commit hash, for a repository on the Hub.
    """

    folder: Path
    origin: str
    commit: str | None = None


# ------------------------------------------------------------------------------------ the Hub


@contextlib.contextmanager
def talk_to_hub(
    repo_id: str,
    revision: str | None = None,
    *,
    kind: str = "dataset",
    cache_dir: str | Path | None = None,
):
    """A block that calls the Hub: its errors say what to do; no progress bars in a batch run.

    Args:
        repo_id, revision, cache_dir: what the block asks for, and where it is kept.
        kind: "dataset" or "model".

    Raises:
        PermissionError: the repository is gated, or the token is refused.
        FileNotFoundError: there is no such repository or revision, or it is not in the cache and
            the Hub cannot be asked.
        ConnectionError: the Hub refuses, or a transfer broke.
        OSError: the disk is full.
    """
    from huggingface_hub import constants, utils

    quiet = os.environ.get("ROREM_BATCH") == "1" and not utils.are_progress_bars_disabled()
    if quiet:
        utils.disable_progress_bars()
    try:
        yield
    except Exception as error:
        cache = cache_dir or constants.HF_HUB_CACHE
        if explained := _explain(error, repo_id, revision or "main", kind, cache):
            raise explained from error
        raise
    finally:
        if quiet:
            utils.enable_progress_bars()


def _explain(error: Exception, repo_id: str, revision: str, kind: str, cache) -> OSError | None:
    """What to raise for an error of the client; None for one that is not the Hub's."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{repo_id}"
    name, login = f"{repo_id}@{revision}", "run `hf auth login` or set HF_TOKEN"
    if is_full(error):
        return OSError(
            errno.ENOSPC,
            f"no space is left for {name} in {cache}: make room, or set HF_HOME to a larger disk "
            "and run again",
        )
    causes = [error]
    while following := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(following)
    if any(isinstance(cause, ImportError) and "socks" in str(cause).lower() for cause in causes):
        return ConnectionError(
            "the proxy that ALL_PROXY or HTTPS_PROXY names is a SOCKS proxy, for which the Hub's "
            "client needs one package more: `pip install socksio`, or name an HTTP proxy"
        )
    if error_at := isinstance(error, OSError) and error.filename:
        place, cache_path = Path(os.fsdecode(error_at)), Path(cache)
        if cache_path.is_relative_to(place) or place.is_relative_to(cache_path):
            return OSError(
                error.errno,
                f"the Hub's cache {cache} cannot be written ({error}): set HF_HOME to a folder "
                "that can",
            )
    of_hub = (OSError, errors.HTTPError, errors.RevisionResolutionError, errors.HFValidationError)
    # A broken upload is a RuntimeError; around a model that may be anything.
    if not isinstance(error, (*of_hub, RuntimeError) if kind == "dataset" else of_hub):
        return None
    for cause in causes:  # diffusers puts errors of its own around the Hub's
        match cause:
            case errors.GatedRepoError():
                return PermissionError(
                    f"{repo_id} is gated: accept its conditions on {page}, then {login} as the "
                    "same user"
                )
            case errors.RepositoryNotFoundError() | errors.HFValidationError():
                return FileNotFoundError(
                    f"there is no {kind} {repo_id}, neither a folder nor on the Hub, or it is "
                    f"private: check the name ({page}); for a private one {login}"
                )
            case errors.RevisionNotFoundError():
                return FileNotFoundError(
                    f"{repo_id} has no revision {revision!r}: take a branch, a tag or a commit of "
                    f"{page}/commits/main"
                )
            case (
                errors.LocalEntryNotFoundError()
                | errors.OfflineModeIsEnabled()
                | errors.RevisionResolutionError()
            ):
                why = (
                    "HF_HUB_OFFLINE is set: unset it and run once with a network"
                    if constants.is_offline_mode()
                    else "the Hub cannot be reached or was not to be asked: check the network "
                    "(HF_ENDPOINT names a mirror) and run again, finished files are kept"
                )
                return FileNotFoundError(
                    f"{name} is {'no folder and ' * (kind == 'model')}not, or not all, in the "
                    f"cache {cache}, and {why}"
                )
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code < 500:
        status = error.response.status_code
        advice = {
            401: f"; the token is wrong or has expired, {login}",
            403: f"; the token may not do this, {login} with one that may",
        }.get(status, "")
        said = f"the Hub refuses {name} ({status}: {error.server_message or error}){advice}"
        return PermissionError(said) if advice else ConnectionError(said)
    if isinstance(error, (errors.HTTPError, ConnectionError, TimeoutError, RuntimeError)):
        why = f": {error.__cause__}" if error.__cause__ else ""
        return ConnectionError(
            f"the transfer of {name} broke ({error}{why}): run again, finished files are kept"
        )
    return None


def download_dataset(
    repo_id: str,
    *,
    revision: str | None = None,
    patterns: Sequence[str] = (),
    cache_dir: str | Path | None = None,
) -> Fetched:
    """Download a dataset's files from the Hub, or find them in the cache.

    A broken connection is resumed where it broke. After a kill the client keeps the finished
    files, and loads the one under way from its start. Once everything is there no network is
    needed (`HF_HUB_OFFLINE=1`).

    Args:
        repo_id: `owner/name`.
        revision: branch, tag or commit; the default branch if None.
        patterns: what to download, such as `data/train-*`; everything if empty.
        cache_dir: the Hub's cache (default: `$HF_HOME/hub`).

    Returns:
        The snapshot's folder, shared by all downloads of the commit, and the commit.

    Raises:
        SourceError: no file matches the patterns.
        OSError: the Hub's errors, see `talk_to_hub`.
    """
    from huggingface_hub import errors, get_cached_repo_tree, snapshot_download

    where = {"repo_type": "dataset", "cache_dir": cache_dir}
    with talk_to_hub(repo_id, revision, cache_dir=cache_dir):
        _drop_torn(repo_id, cache_dir)
        folder = Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=list(patterns) or None, **where
            )
        )
    commit = folder.name
    if commit != revision:
        logger.info(
            "%s: %s is commit %s now; name that to read the same again",
            repo_id,
            revision or "the default branch",
            commit,
        )
    if not _match(folder, patterns):
        there = []
        with contextlib.suppress(errors.CachedRepoTreeNotFoundError):  # an older client's cache
            there = [f.path for f in get_cached_repo_tree(repo_id, revision=commit, **where)]
        raise SourceError(
            f"no file of {repo_id}@{commit} matches {', '.join(patterns) or '*'}; it "
            f"has {', '.join(there[:8]) or 'none'}" + " ..." * (len(there) > 8)
        )
    return Fetched(folder, f"hub:{repo_id}@{commit}", commit)


def _drop_torn(repo_id: str, cache_dir: str | Path | None) -> None:
    """Delete what killed downloads left: the client never takes it up again."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    repo = repo_folder_name(repo_id=repo_id, repo_type="dataset")
    for path in (Path(cache_dir or constants.HF_HUB_CACHE) / repo).glob("blobs/*.incomplete"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 3600:  # else another process may be at it
                path.unlink()


def _match(folder: Path, patterns: Sequence[str]) -> list[str]:
    from huggingface_hub.utils import filter_repo_objects

    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return list(filter_repo_objects(names, allow_patterns=list(patterns) or None))


# -------------------------------------------------------------------------------- Google Drive


def download_drive(file_id: str, path: str | Path) -> Path:
    """Download a file that is shared by link on Google Drive; goes on where it stopped.

    Raises:
        SourceError: not shared with everyone, the day's quota is used up, or the network failed.
    """
    import gdown

    path = Path(path)
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        gdown.download(
            id=file_id,
            output=str(path),
            resume=True,
            retries=5,
            timeout=60,
            quiet=os.environ.get("ROREM_BATCH") == "1",
        )
    except gdown.exceptions.FileURLRetrievalError as error:
        text = " ".join(str(error).split())
        if re.search(r"too many users|quota", text, re.IGNORECASE):
            raise SourceError(
                f"Google Drive's quota for {file_id} is used up: try again in a day, "
                "or copy the file into a Drive of your own and give the copy's id"
            ) from error
        raise SourceError(
            f"Google Drive does not give {file_id}: check the id, and that it is a "
            "file shared with everyone who has the link; or download it in a browser "
            f"and give the file ({text})"
        ) from error
    except (gdown.exceptions.DownloadError, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
        raise SourceError(
            f"the download of {file_id} from Google Drive broke ({error}): run "
            "again, it goes on where it stopped"
        ) from error
    return path


# ------------------------------------------------------------------------------- one door for all


def open_remote(
    spec: str,
    work_dir: str | Path,
    *,
    unpack: bool = True,
    cache_dir: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Fetched:
    """Make what a spec names a local folder.

    Args:
        spec: `hub:owner/name@revision` or `hub:owner/name@revision:pattern,pattern`; `drive:<id>`
            or `drive:<link>` (an archive); a local archive; a local folder.
        work_dir: archives are unpacked below it, once, each into a folder of its name.
        unpack: False leaves the archives of a repository alone.
        cache_dir: the Hub's cache.
        progress: as in `extract_archive`.

    Raises:
        SourceError: it names nothing, or cannot be had; says what to do.
        ArchiveError: it cannot be unpacked.
        OSError: the Hub's errors, see `talk_to_hub`, or the disk is full.
    """
    work_dir = Path(work_dir)
    if spec.startswith("drive:"):
        return _open_drive(spec, work_dir, progress)
    if spec.startswith("hub:"):
        found = _SPEC.fullmatch(spec)
        if not found:
            raise SourceError(f"{spec!r}: expected hub:owner/name@revision:patterns")
        patterns = [p.strip() for p in (found["patterns"] or "").split(",") if p.strip()]
        fetched = download_dataset(
            found["repo"], revision=found["revision"], patterns=patterns, cache_dir=cache_dir
        )
        folder = _lay_out(fetched, patterns, work_dir, unpack, progress)
        return Fetched(
            folder, fetched.origin + ":" * bool(patterns) + ",".join(patterns), fetched.commit
        )
    path = Path(spec).expanduser().absolute()
    if path.is_dir():
        return Fetched(path, str(path))
    if not path.is_file():
        raise SourceError(
            f"there is no {path}: give a folder, an archive, hub:owner/name@revision or drive:<id>"
        )
    name = f"{archive_stem(path.name) or path.stem}-{_hash(str(path.parent))}"
    return Fetched(extract_archive(path, work_dir / name, progress=progress), str(path))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _open_drive(spec: str, work_dir: Path, progress) -> Fetched:
    from gdown.parse_url import parse_url

    file_id = spec.removeprefix("drive:")
    if "/" in file_id:
        file_id = parse_url(file_id)[0]
    if not re.fullmatch(r"[\w-]+", file_id or ""):
        raise SourceError(
            f"{spec!r} names no file on Google Drive: expected drive:<id> or the file's link"
        )
    folder, path = work_dir / f"drive-{file_id}", work_dir / f"drive-{file_id}.archive"
    if path.is_file() or not (folder / MARKER).is_file():  # else the archive was deleted since
        extract_archive(download_drive(file_id, path), folder, progress=progress)
    return Fetched(folder, f"drive:{file_id}")


def _lay_out(fetched: Fetched, patterns: list[str], work_dir: Path, unpack: bool, progress) -> Path:
    """The snapshot itself, or a folder of its own: archives unpacked, the other files as links.

    A snapshot's folder is shared by all downloads of the commit, so it may hold more than matched.
    """
    archives = find_archives(fetched.folder) if unpack else []
    if not archives and not patterns:
        return fetched.folder
    name = fetched.origin.removeprefix("hub:").replace("/", "--")
    name = name.replace(fetched.commit, fetched.commit[:12])
    folder = work_dir / (name + f"-{_hash(','.join(patterns))}" * bool(patterns))
    matching, taken = set(_match(fetched.folder, patterns)), set()
    for path in archives:
        where = path.relative_to(fetched.folder)
        if str(where) in matching:
            target = where.with_name(archive_stem(path.name))
            if target in taken or (fetched.folder / target).exists():
                target = where.with_name(f"{path.name}.unpacked")
            taken.add(target)
            extract_archive(path, folder / target, progress=progress)
    for where in matching:
        link = folder / where
        if link.exists() or unpack and archive_stem(link.name):
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)  # it led into a cache that is gone
        link.symlink_to((fetched.folder / where).absolute())
    return folder
