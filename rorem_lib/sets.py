"""What a parameter names: `builtin:<role>`, a set's folder or its meta file -> its `meta.json`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rorem_lib.builtin.sets import builtin_set
from rorem_lib.data.pictures import TripletError
from rorem_lib.data.triplets import resolve_meta
from rorem_lib.files import ROOT, resolve_path

ALONE = ROOT / "runs" / "alone"  # where a notebook writes that is run alone


def resolve(name: str | Path) -> Path:
    """The `meta.json` of one set.

    Args:
        name: `builtin:<role>` (rendered at its first use), a folder, or a meta file. A relative
            path counts from the working folder, and where there is none from the repository.

    Raises:
        TripletError: there is no such set; says which sets are near, and for a notebook's folder
            which notebook writes it.
    """
    if str(name).startswith("builtin:"):
        return builtin_set(str(name).removeprefix("builtin:"))
    path = Path(name).expanduser()
    path = path if path.exists() else resolve_path(path)
    try:
        return resolve_meta(path)
    except TripletError as error:
        if path.is_relative_to(ALONE) and len(path.relative_to(ALONE).parts) > 1:
            notebook = path.relative_to(ALONE).parts[0]
            raise TripletError(
                f"{error}; run notebooks/{notebook}.ipynb first, which writes it"
            ) from None
        raise


def resolve_all(names: str | Path | Iterable[str | Path]) -> list[Path]:
    """The `meta.json` of each of several sets; a single name is one set."""
    return [resolve(name) for name in ([names] if isinstance(names, (str, Path)) else names)]


def choose_preview(meta: Path) -> Path:
    """The test set beside a training set, `../test/meta.json`, or itself where there is none."""
    test = meta.resolve().parent.parent / "test" / meta.name
    return test if test.is_file() else meta
