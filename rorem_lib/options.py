"""The command line of a training job: one option a field of its config, or a YAML file."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import logging
import sys
from pathlib import Path
from typing import get_type_hints

import yaml

from rorem_lib.parameters import coerce_value


def parse_config(cls, arguments: list[str] | None = None):
    """A config dataclass from a command line: one `--option` a field, or `--config FILE.yaml`.

    Options on the command line win over the file. Lists take several words.

    Raises:
        SystemExit: an unknown or mistyped option, named by argparse.
        ValueError: the file has a key that is no field of `cls`, or a value of another type.
    """
    parser = argparse.ArgumentParser(description=(cls.__doc__ or "").splitlines()[0],
                                     allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with any of these options")
    hints, defaults = get_type_hints(cls), dataclasses.asdict(cls())
    for field in dataclasses.fields(cls):
        kind, options = hints[field.name], {}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif getattr(kind, "__origin__", None) is list:
            options = {"nargs": "+", "type": kind.__args__[0]}
        else:
            options = {"type": kind}
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **options,
                            help=f"default: {defaults[field.name]!r}".replace("%", "%%"))
    given = vars(parser.parse_args(arguments))
    values = {}
    if path := given.pop("config", None):
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if unknown := sorted(set(values) - set(defaults)):
        raise ValueError(f"{path}: unknown option {', '.join(unknown)} for {cls.__name__}")
    for name, value in values.items():
        try:
            values[name] = coerce_value(value, inspect.formatannotation(hints[name]))
        except TypeError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
    return cls(**(values | given))


def run_job(function, config) -> None:
    """A stage module's `main`: log lines to standard output, then the work."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    function(config)
