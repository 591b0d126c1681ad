"""Model files on the Hub: whether one is there, and errors that say what to do."""

from __future__ import annotations

import contextlib
from pathlib import Path

from huggingface_hub import (
    _CACHED_NO_EXIST,
    ModelCardData,
    constants,
    errors,
    hf_hub_download,
    try_to_load_from_cache,
)

from rorem_lib.files import write_text

_KNOWN = (
    errors.RepositoryNotFoundError,
    errors.RevisionNotFoundError,
    errors.HFValidationError,
    errors.LocalEntryNotFoundError,
    errors.OfflineModeIsEnabled,
    errors.RevisionResolutionError,
)


@contextlib.contextmanager
def explain_hub(model_id: str, revision: str | None = None):
    """A block that may ask the Hub for a model: its errors name the id and what to do.

    Raises:
        PermissionError: the repository is gated, or the token is refused.
        FileNotFoundError: there is no such repository or revision, or it is not in the cache and
            the Hub cannot be asked.
        ConnectionError: a transfer broke.
    """
    name = f"{model_id}@{revision}" if revision else model_id
    try:
        yield
    except (
        OSError,
        errors.HTTPError,
        errors.RevisionResolutionError,
        errors.HFValidationError,
    ) as error:
        cause = error  # diffusers puts errors of its own around the Hub's
        while cause and not isinstance(cause, _KNOWN):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, errors.GatedRepoError):
            raise PermissionError(
                f"{model_id} is gated: accept its conditions on its page of the "
                "Hub, then run `hf auth login` as the same user"
            ) from error
        if isinstance(cause, (errors.RepositoryNotFoundError, errors.HFValidationError)):
            raise FileNotFoundError(
                f"there is no model {model_id}, neither a folder nor on the Hub, or it is private: "
                "check the name; for a private one run `hf auth login` or set HF_TOKEN"
            ) from error
        if isinstance(cause, errors.RevisionNotFoundError):
            raise FileNotFoundError(
                f"{model_id} has no revision {revision!r}: take a branch, a tag or a commit of it"
            ) from error
        if cause is not None:
            why = (
                "HF_HUB_OFFLINE is set: unset it and run once with a network"
                if constants.is_offline_mode()
                else "the Hub cannot be reached or was not to "
                "be asked: check the network (HF_ENDPOINT names a mirror)"
            )
            raise FileNotFoundError(
                f"{name} is no folder and not, or not all, in the cache "
                f"{constants.HF_HUB_CACHE}, and {why}"
            ) from error
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise PermissionError(
                f"the Hub refuses {name} ({status}: {error}): run `hf auth "
                "login` or set HF_TOKEN, with a token that may read it"
            ) from error
        if isinstance(error, errors.HTTPError):
            raise ConnectionError(
                f"the transfer of {name} broke ({error}): run again, finished files are kept"
            ) from error
        raise


def has_file(
    model_id: str, name: str, *, revision: str | None = None, local_files_only: bool = False
) -> bool:
    """Whether a folder, or a repository on the Hub, holds a file; it is downloaded, so a small one.

    Raises:
        OSError: the Hub's errors, see `explain_hub`; without a network also where the cache does
            not know.
    """
    if Path(model_id).is_dir():
        return (Path(model_id) / name).is_file()
    try:
        hf_hub_download(model_id, name, revision=revision, local_files_only=local_files_only)
    except errors.RemoteEntryNotFoundError:
        return False
    except errors.LocalEntryNotFoundError:
        # Without a network; the cache remembers what was not there when it was looked for.
        known = try_to_load_from_cache(model_id, name, revision=revision)
        if known is not _CACHED_NO_EXIST:
            raise
        return False
    return True


def lacks_file(error: BaseException, *, local_files_only: bool = False, **_) -> bool:
    """Whether `from_pretrained` failed since a file is not there, not since it did not arrive."""
    if type(error) is ValueError:  # a pipeline's, after looking through all its files
        return True
    while error is not None:
        if isinstance(error, errors.LocalEntryNotFoundError):  # offline that is all there is
            return local_files_only or constants.is_offline_mode()
        if isinstance(error, errors.RemoteEntryNotFoundError):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_card(folder, *, title: str, base_model: str, resolution: int, text: str) -> None:
    """Write a trained model's `README.md`, the model card that the Hub shows.

    Args:
        folder: the model's.
        title: what the model is.
        base_model: what it was trained from; named in the metadata where it is a Hub id.
        resolution: side of the images it was trained on, px: the size to use it at.
        text: how it was trained.
    """
    on_hub = base_model.count("/") == 1 and not Path(base_model).exists()
    data = ModelCardData(
        license="cc0-1.0" if base_model == "builtin" else "openrail++",
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["inpainting", "object-removal", "stable-diffusion-xl"],
        base_model=base_model if on_hub else None,
        resolution=resolution,
    )
    body = f"""# {title}

{text} Trained at {resolution} px: bring the image's short side to that size, as the kit does.
"""
    write_text(Path(folder) / "README.md", f"---\n{data.to_yaml()}\n---\n\n{body}")
