"""The command line of a training job: one option a field of its config, or a YAML file."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import logging
import os
import re
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import yaml

from rorem_lib.parameters import coerce_value
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
_WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
    "": False,
}


@dataclass
class LoopConfig:
    """What every training run has. Names follow upstream's and diffusers' command lines.

    Attributes:
        output_dir: folder for the model, checkpoints and `metrics.jsonl`.
        max_train_steps: optimizer steps in all; 0 takes `num_train_epochs`.
        num_train_epochs: times every sample is seen, where `max_train_steps` is 0 or, on a command
            line, not given.
        train_batch_size: samples a process and micro-batch.
        gradient_accumulation_steps: micro-batches an optimizer step.
        learning_rate: AdamW's peak rate.
        scale_lr: multiply it by the global batch (upstream's option).
        lr_scheduler: a name that `diffusers.optimization.get_scheduler` knows.
        lr_warmup_steps: steps of linear warm-up (schedulers that have one).
        adam_weight_decay: AdamW's decoupled weight decay.
        adam_beta1, adam_beta2, adam_epsilon: AdamW's other constants.
        use_8bit_adam: optimizer states in 8 bits (the extra `eightbit`, bitsandbytes).
        max_grad_norm: gradients are clipped to this norm.
        mixed_precision: "no", "bf16", "fp16", or "auto": bf16 where the hardware has it.
        allow_tf32: float32 matrix products on NVIDIA's TF32 units.
        ema_decay: decay of the weights' moving average, which is then what is validated and saved
            (a checkpoint's `unet/` has the weights themselves); 0 keeps none.
        checkpointing_steps: steps between checkpoints; 0 writes none.
        checkpoints_total_limit: how many checkpoints are kept; 0 keeps all.
        resume_from_checkpoint: "latest", "none", a checkpoint folder or its name in `output_dir`;
            one of your own making, since parts of it are pickles.
        logging_steps: steps between lines of `metrics.jsonl`; 0 writes the last step's alone.
        dataloader_num_workers: processes that read samples; 0 reads in the training process.
        report_to: "none", or a tracker accelerate knows ("tensorboard", "wandb", "trackio").
        logging_dir: the tracker's folder below `output_dir` (trackio has one of its own).
        seed: fixes initialisation, order, noise and flips.
    """

    output_dir: str = "runs/alone/training"
    max_train_steps: int = 1000
    num_train_epochs: int = 0
    train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-5
    scale_lr: bool = False
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    adam_weight_decay: float = 1e-2
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    use_8bit_adam: bool = False
    max_grad_norm: float = 1.0
    mixed_precision: str = "auto"
    allow_tf32: bool = False
    ema_decay: float = 0.0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str = "latest"
    logging_steps: int = 25
    dataloader_num_workers: int = 0
    report_to: str = "none"
    logging_dir: str = "logs"
    seed: int = 4


class _Switch(argparse.Action):
    """`--x` and `--no-x`. A word may follow (`--x True`, `--x ""`), as upstream has one option.

    Where the field may be None, `--x auto` is None.
    """

    def __init__(self, option_strings, dest, *, words=_WORDS, **options):
        negative = [f"--no-{name.removeprefix('--')}" for name in option_strings]
        super().__init__([*option_strings, *negative], dest, nargs="?", **options)
        self.words = words

    def __call__(self, parser, namespace, values, option_string=None):
        negative = option_string.startswith("--no-")
        word = "true" if values is None else values.lower()
        if word not in self.words or negative and values is not None:
            wanted = (
                "no word"
                if negative
                else " or ".join(
                    ["True", "False", *("auto" for value in self.words.values() if value is None)]
                )
            )
            raise argparse.ArgumentError(self, f"expected {wanted}, got {values!r}")
        setattr(namespace, self.dest, not negative and self.words[word])

    def format_usage(self):
        return " | ".join(self.option_strings)


class _Refuse(argparse.Action):
    """An option that ends the job with its reason, `help`; its value is never repeated."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, dest, nargs="*", **options)

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string}: {self.help}")


def parse_config(cls, arguments: list[str] | None = None):
    """A config dataclass from a command line: one `--option` a field, or `--config FILE.yaml`.

    Options on the command line win over the file. Lists take several words or none. Switches are
    `--x`, `--no-x` or `--x True`; a `bool | None` that is left out, `null` in the file or
    `--x auto` on the command line, is the automatic choice.

    Args:
        cls: the dataclass. With `upstream_options: ClassVar[bool] = True` it also takes the rest
            of upstream's trainer's options: `IGNORED` with one line of warning, `REFUSED` not.
        arguments: the words; None takes this process's.

    Raises:
        SystemExit: an unknown, mistyped or refused option, named by argparse.
        ValueError: the file is no YAML table, has a key that is no field of `cls`, or a value of
            another type.
        FileNotFoundError: there is no such file.
    """
    upstream = getattr(cls, "upstream_options", False)
    refused = _NOT_OURS | (REFUSED if upstream else {})
    ignored = IGNORED if upstream else ()
    given = vars(_build_parser(cls, ignored, refused).parse_args(arguments))
    values, path = {}, given.pop("config", None)
    if path:
        values = _read_file(path, cls, ignored, refused)
    values |= given
    if unused := sorted(set(values) & set(ignored)):
        for name in unused:
            del values[name]
        if os.environ.get("RANK", "0") == "0":  # once, not from every process
            logger.warning("%s: no effect, as in upstream's trainer", ", ".join(unused))
    if given.get("num_train_epochs"):  # words win over the file, and steps over epochs
        values["max_train_steps"] = given.get("max_train_steps", 0)
    elif values.get("num_train_epochs"):
        values.setdefault("max_train_steps", 0)
    return cls(**values)


def _build_parser(cls, ignored, refused) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(cls.__doc__ or "").splitlines()[0],
        usage="%(prog)s [--config FILE.yaml] [--option value ...]  (--help lists the options)",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", help="YAML file with any of these options")
    hints, defaults, meanings = typing.get_type_hints(cls), dataclasses.asdict(cls()), {}
    for base in cls.__mro__[::-1]:
        meanings |= _read_meanings(base)
    for field in dataclasses.fields(cls):
        kind, optional = _unwrap(hints[field.name])
        if kind is bool:
            words = _WORDS | ({"auto": None} if optional else {})
            options = {"action": _Switch, "words": words, "metavar": "True|False"}
        elif typing.get_origin(kind) is list:
            options = {"nargs": "*", "type": typing.get_args(kind)[0]}
        else:
            options = {"type": kind}
        shown = "automatic" if defaults[field.name] is None else repr(defaults[field.name])
        about = f"{meanings.get(field.name, '')} Default: {shown}"
        parser.add_argument(f"--{field.name}", **options, help=about.replace("%", "%%"))
    for name in ignored:
        parser.add_argument(f"--{name}", nargs="?", help="no effect, as in upstream's trainer")
    for name, reason in refused.items():
        parser.add_argument(f"--{name}", action=_Refuse, help=reason)
    return parser


def _read_meanings(cls) -> dict[str, str]:
    """What the docstring of a config says of its fields, under `Attributes:`."""
    _, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
    block = re.match(r"(?:[ ]{4}.*\n?|\n)*", rest)[0]
    entries = re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", block, re.MULTILINE)
    return {
        name: " ".join(text.replace("`", "").split())
        for names, text in entries
        for name in names.split(", ")
    }


def _unwrap(kind) -> tuple[type, bool]:
    """`X | None` -> (X, True), any other type -> (itself, False)."""
    if not isinstance(kind, types.UnionType) and typing.get_origin(kind) is not typing.Union:
        return kind, False
    (inner,) = (k for k in typing.get_args(kind) if k is not types.NoneType)
    return inner, True


def _read_file(path, cls, ignored, refused) -> dict:
    """The values of a YAML file of options, as the fields of `cls` want them."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
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
        raise ValueError(f"{path}: unknown option {', '.join(unknown)} for {cls.__name__}")
    for name in fields & values.keys():
        try:
            values[name] = coerce_value(values[name], inspect.formatannotation(hints[name]))
        except TypeError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
    return values


def run_job(function, config) -> None:
    """A stage module's `main`: log lines to standard output, then the work."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    if distributed.find_device() == "cpu":
        tune_cpu()
    function(config)
