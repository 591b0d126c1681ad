"""`rorem data`: check, merge and publish triplet sets on the command line, as notebook 01 does.

Exit codes: 0 done, or every set is sound; 1 a set has faults, or a file cannot be read or written;
2 a wrong option; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

SOUND, FAULTY, INTERRUPTED = 0, 1, 130


def add_commands(parser: argparse.ArgumentParser) -> None:
    """The commands below `rorem data`."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="open every image of a set, name each fault")
    check.add_argument("folder", help="a set, its meta.json, or a folder with several sets")
    check.add_argument("--allow-absolute", action="store_true", help="accept absolute paths")
    check.add_argument(
        "--allow-outside", action="store_true", help="accept paths that leave the set's folder"
    )
    check.add_argument(
        "--hash",
        action="store_true",
        help="also name files that are not those that were written (reads every byte again)",
    )
    merge = commands.add_parser("merge", help="make one set of several, their files reused")
    merge.add_argument(
        "folder", help="the new set's folder; a merged set that is there is replaced"
    )
    merge.add_argument("sets", nargs="+", help="sets to merge")
    publish = commands.add_parser(
        "publish", help="write Parquet shards and a dataset card, and upload them if asked to"
    )
    publish.add_argument("folder", help="a set, or a folder with sets: each is a split")
    publish.add_argument(
        "--repo-id",
        required=True,
        metavar="OWNER/NAME",
        help="the dataset's id on the Hub; the card names it",
    )
    publish.add_argument(
        "--output-dir",
        metavar="FOLDER",
        help="where shards and card go (default: FOLDER/published)",
    )
    publish.add_argument("--license", default="", help="licence of the records that name none")
    publish.add_argument(
        "--acceptance",
        default="",
        metavar="TEXT",
        help="how the GTs were made and accepted, for the card",
    )
    publish.add_argument(
        "--upload",
        action="store_true",
        help="upload to the Hub (token: HF_TOKEN or `hf auth login`)",
    )
    publish.add_argument(
        "--public",
        action="store_true",
        help="make a new repository public; it is private otherwise",
    )
    for command in (check, merge):
        command.add_argument(
            "--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)"
        )


def run_command(options) -> int:
    """Run a parsed `rorem data` command; returns the exit code, never a traceback for bad data."""
    from rorem_lib.data.items import SourceError
    from rorem_lib.data.pictures import TripletError

    run = {"check": _check, "merge": _merge, "publish": _publish}[options.data_command]
    try:
        return run(options)
    except (TripletError, SourceError, OSError, ValueError, RuntimeError) as error:
        print(f"rorem: {error}", file=sys.stderr)
        return FAULTY
    except KeyboardInterrupt:
        print("\nrorem: interrupted", file=sys.stderr)
        return INTERRUPTED


def find_sets(folder: str | Path) -> dict[str, Path]:
    """The sets that a path means: one, or those in a folder's sub folders, by their names.

    Raises:
        TripletError: there is none.
    """
    from rorem_lib.data.triplets import META, resolve_meta

    folder = Path(folder)
    inner = {path.parent.name: path for path in sorted(folder.glob(f"*/{META}"))}
    if inner and not (folder / META).exists():
        return inner
    meta = resolve_meta(folder)
    return {meta.absolute().parent.name: meta}  # "." has no name


def _check(options) -> int:
    from tqdm import tqdm

    from rorem_lib.data.check import check_set
    from rorem_lib.data.pictures import TripletError
    from rorem_lib.data.triplets import read_records

    faults = 0
    for name, meta in find_sets(options.folder).items():
        try:
            with tqdm(desc=name, unit=" triplets", leave=False, disable=None) as bar:
                problems = check_set(
                    meta,
                    workers=options.workers,
                    progress=lambda checked, bar=bar: bar.update(checked - bar.n),
                    allow_absolute=options.allow_absolute,
                    allow_outside=options.allow_outside,
                    hashes=options.hash,
                )
        except TripletError as error:  # no list at all; there may be sets after it
            print(f"rorem: {error}", file=sys.stderr)
            faults += 1
            continue
        for problem in problems:
            shown = str(problem.file)
            print(problem.reason if shown in problem.reason else f"{shown}: {problem.reason}")
        count = sum(1 for _ in read_records(meta))
        print(
            f"{meta.parent}: {count:,} triplets, "
            f"{f'{len(problems):,} faulty' if problems else 'all sound'}"
        )
        faults += len(problems)
    return FAULTY if faults else SOUND


def _merge(options) -> int:
    from rorem_lib.data.check import check_set
    from rorem_lib.data.triplets import read_records
    from rorem_lib.data.writer import merge_sets

    metas = [meta for folder in options.sets for meta in find_sets(folder).values()]
    meta = merge_sets(metas, options.folder)
    problems = check_set(meta, workers=options.workers)
    for problem in problems:
        print(problem.reason)
    print(f"{meta.parent}: {sum(1 for _ in read_records(meta)):,} triplets of {len(metas)} sets")
    return FAULTY if problems else SOUND


def _publish(options) -> int:
    from rorem_lib.data.assembly import describe_filters
    from rorem_lib.data.publishing import publish_sets, upload_dataset

    sets = find_sets(options.folder)
    given = Path(options.folder)
    given = given if given.is_dir() else given.parent
    folder = Path(options.output_dir or given / "published")
    publish_sets(
        sets,
        folder,
        repo_id=options.repo_id,
        license=options.license,
        acceptance=options.acceptance,
        filters=describe_filters(given),
    )
    print(f"{folder}: shards of {', '.join(sets)}, and README.md")
    if options.upload:
        address = upload_dataset(folder, options.repo_id, private=not options.public)
        print(f"uploaded to {address}")
    return SOUND
