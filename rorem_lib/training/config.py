"""The command line of a training job: one option a field of its config, or a YAML file."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import os
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers.hf_argparser import HfArgumentParser, string_to_bool

from rorem_lib.models import sdxl
from rorem_lib.parameters import StrictLoader, coerce_value, option, suggest
from rorem_lib.training import distributed
from rorem_lib.training.memory import tune_cpu

logger = logging.getLogger(__name__)

# Options of upstream's trainer that its code never uses. A config that sets `upstream_options`
# takes them, so that upstream's command lines and scripts run unchanged.
IGNORED = (
    "cache_dir",
    "dataset_config_name",
    "dataset_name",
    "hub_model_id",
    "local_rank",
    "push_to_hub",
    "train_data_dir",
)
# What such a config refuses, and what to do instead.
REFUSED = {
    "do_edm_style_training": "EDM training is not supported; leave the option out, the noise is "
    "that of the model's own scheduler",
    "hub_token": "a token on a command line can be read by everyone on the machine; run "
    "`hf auth login` or set HF_TOKEN",
}
_NOT_OURS = {
    "config_file": "belongs to `accelerate launch` and stands before -m; a file of this "
    "job's own options is --config"
}
_LEFT_OUT = object()


@dataclass
class LoopConfig:
    """What every training run has.

    Names follow upstream's and diffusers' command lines; the defaults are those of upstream's run
    script for the remover, where it sets a value, else those of its code.
    """

    output_dir: str = option(
        "runs/alone/training", "folder for the model, checkpoints and metrics.jsonl"
    )
    max_train_steps: int = option(50_000, "optimizer steps in all; 0 takes num_train_epochs")
    num_train_epochs: int = option(
        0,
        "times every sample is seen, where max_train_steps is 0 or, on a command line, not given",
    )
    train_batch_size: int = option(16, "samples a process and micro-batch")
    gradient_accumulation_steps: int = option(1, "micro-batches an optimizer step")
    learning_rate: float = option(5e-5, "AdamW's peak rate")
    scale_lr: bool = option(False, "multiply the rate by the global batch")
    lr_scheduler: str = option("constant", "a name that diffusers' get_scheduler knows")
    lr_warmup_steps: int = option(
        500, "steps of linear warm-up, in schedules that have one; constant has none"
    )
    adam_weight_decay: float = option(1e-2, "AdamW's decoupled weight decay")
    adam_beta1: float = option(0.9, "AdamW's decay of the mean gradient")
    adam_beta2: float = option(0.999, "AdamW's decay of the mean squared gradient")
    adam_epsilon: float = option(1e-8, "AdamW's term against division by zero")
    use_8bit_adam: bool = option(
        False, "optimizer states in 8 bits (the extra eightbit, bitsandbytes)"
    )
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    mixed_precision: str = option("fp16", "no, bf16, fp16, or auto: bf16 where the hardware has it")
    allow_tf32: bool = option(False, "float32 matrix products on NVIDIA's TF32 units")
    ema_decay: float = option(
        0.0,
        "decay of the weights' moving average, which is then what is validated and saved "
        "(a checkpoint's unet/ has the weights themselves); 0 keeps none",
    )
    checkpointing_steps: int = option(5000, "steps between checkpoints; 0 writes none")
    checkpoints_total_limit: int = option(5, "how many checkpoints are kept; 0 keeps all")
    resume_from_checkpoint: str = option(
        "latest",
        "latest, none (which begins anew), a checkpoint folder or its name in output_dir; one "
        "whose pickles would run code is refused",
    )
    logging_steps: int = option(
        25, "steps between lines of metrics.jsonl; 0 writes the last step's alone"
    )
    dataloader_num_workers: int = option(
        0, "processes that read samples; 0 reads in the training process"
    )
    report_to: str = option(
        "none", "none, or a tracker accelerate knows (tensorboard, wandb, trackio)"
    )
    logging_dir: str = option(
        "logs", "the tracker's folder below output_dir (trackio has one of its own)"
    )
    seed: int = option(4, "fixes initialisation, order, noise and flips")

    def __post_init__(self):
        if not (self.max_train_steps or self.num_train_epochs):
            raise ValueError("max_train_steps and num_train_epochs are both 0: set one of them")
        for name in (
            "max_train_steps",
            "num_train_epochs",
            "lr_warmup_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "logging_steps",
            "dataloader_num_workers",
        ):
            check_at_least(self, name, 0)
        for name in ("train_batch_size", "gradient_accumulation_steps"):
            check_at_least(self, name, 1)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}: take 0 (none) to below 1")
        sdxl.choose_precision(self.mixed_precision)  # which refuses what it does not know


def check_at_least(config, name: str, least: int) -> None:
    """Refuse a config's number that is too small, before anything is loaded.

    Raises:
        ValueError: names the option.
    """
    if getattr(config, name) < least:
        raise ValueError(f"{name} is {getattr(config, name)}: take {least} or more")


class _Parser(HfArgumentParser):
    """`HfArgumentParser`, with empty lists, `--no-x` for every switch, and `--x auto` for None."""

    def add_argument(self, *names, **given):
        if given.get("type") is string_to_bool:
            automatic = given.get("default") is None
            given |= {
                "type": _read_choice if automatic else _read_switch,
                "nargs": "?",
                "const": True,
            }
        elif given.get("action") == "store_false":
            names = dict.fromkeys([f"--no-{given['dest']}", *names])
        elif given.get("nargs") == "+":
            given["nargs"] = "*"
        return super().add_argument(*names, **given)


def _read_switch(word: str) -> bool:
    return bool(word) and string_to_bool(word)  # upstream has `--x ""` for no


def _read_choice(word: str) -> bool | None:
    return None if word == "auto" else _read_switch(word)


def parse_config(cls, arguments: list[str] | None = None):
    """A config dataclass from a command line: one `--option` a field, or `--config FILE.yaml`.

    Options on the command line win over the file. Lists take several words or none. Switches are
    `--x`, `--no-x` or `--x True`; a `bool | None` that is left out, or `auto` (in the file also
    `null`), is the automatic choice.

    Args:
        cls: the dataclass. With `upstream_options: ClassVar[bool] = True` it also takes the rest
            of upstream's trainer's options: `IGNORED` with one line of warning, `REFUSED` not.
        arguments: the words; None takes this process's.

    Raises:
        SystemExit: an unknown, mistyped or refused option, named by argparse.
        ValueError: the file is no YAML table, has a key twice or one that is no field of `cls`, or
            a value of another type.
        FileNotFoundError: there is no such file.
    """
    upstream = getattr(cls, "upstream_options", False)
    refused = _NOT_OURS | (REFUSED if upstream else {})
    ignored = IGNORED if upstream else ()
    fields = [field.name for field in dataclasses.fields(cls)]
    parser = _build_parser(cls, ignored, refused)
    namespace = argparse.Namespace(**dict.fromkeys(fields, _LEFT_OUT))
    parsed, unknown = parser.parse_known_args(arguments, namespace)
    given = {name: value for name, value in vars(parsed).items() if value is not _LEFT_OUT}
    for name in refused.keys() & given.keys():  # its value is never repeated
        parser.error(f"--{name}: {refused[name]}")
    if unknown:
        near = suggest(unknown[0].lstrip("-"), fields)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
    path = given.pop("config", None)
    values = (_read_file(path, cls, ignored, refused) if path else {}) | given
    if unused := sorted(set(values) & set(ignored)):
        for name in unused:
            del values[name]
        if os.environ.get("RANK", "0") == "0":  # once, not from every process
            logger.warning("%s: no effect, as in upstream's trainer", ", ".join(unused))
    if given.get("num_train_epochs"):  # words win over the file, and steps over epochs
        values["max_train_steps"] = given.get("max_train_steps", 0)
    elif values.get("num_train_epochs"):
        values.setdefault("max_train_steps", 0)
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):  # no JSON could hold it
            raise ValueError(f"{name} is {value}: take a finite number")
    return cls(**values)


def _build_parser(cls, ignored, refused) -> _Parser:
    parser = _Parser(
        cls,
        description=(cls.__doc__ or "").splitlines()[0],
        usage="%(prog)s [--config FILE.yaml] [--option value ...]  (--help lists the options)",
        epilog="--no-NAME turns a switch off; --NAME auto leaves a choice whose default is None.",
        allow_abbrev=False,
    )
    for field in dataclasses.fields(cls):
        if field.type in (bool, bool | None) and field.default is not True:  # else Hf adds it
            parser.add_argument(
                f"--no_{field.name}",
                f"--no-{field.name.replace('_', '-')}",
                action="store_false",
                dest=field.name,
                help=argparse.SUPPRESS,
            )
    rest = {"default": argparse.SUPPRESS}
    parser.add_argument("--config", **rest, help="YAML file with any of these options")
    for name in ignored:
        parser.add_argument(
            f"--{name}", nargs="?", **rest, help="no effect, as in upstream's trainer"
        )
    for name, reason in refused.items():
        parser.add_argument(f"--{name}", nargs="*", **rest, help=reason)
    return parser


def _read_file(path, cls, ignored, refused) -> dict:
    """The values of a YAML file of options, as the fields of `cls` want them.

    `HfArgumentParser.parse_yaml_file` would take any type, `1e-4` as text, and name no neighbour.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), StrictLoader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a table, one `option: value` a line")
    for name in refused:
        if values.pop(name, None) not in (None, False):
            raise ValueError(f"{path}: {name}: {refused[name]}")
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(map(str, values.keys() - fields - set(ignored))):
        raise ValueError(
            f"{path}: unknown option {', '.join(unknown)} for {cls.__name__}"
            f"{suggest(unknown[0], fields)}"
        )
    for name in fields & values.keys():
        if values[name] == "auto" and hints[name] == (bool | None):  # as in words
            values[name] = None
        try:
            values[name] = coerce_value(values[name], hints[name])
        except TypeError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
    return values


def require_sets(config) -> None:
    """Refuse a config without `meta_path`, before minutes go into loading a model.

    Raises:
        ValueError: says what to give.
    """
    if not config.meta_path:
        raise ValueError(
            "meta_path is empty: give one or several sets, as in --meta_path A/meta.json "
            "B/meta.json; builtin:labelled and builtin:pool are the miniature's"
        )


def run_job(function, config) -> None:
    """A stage module's `main`: log lines to standard output, then the work."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    if distributed.get_device() == "cpu":
        tune_cpu()
    function(config)
