"""`rorem remove`: objects removed from images, one or a folder of them, on the command line.

Exit codes: 0 done; 1 an image could not be worked on, or a file not be written; 2 a wrong option,
no model, or another process is at work in the folder; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import signal

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
MODES = ("effect", "exact", "full")  # `models.inpainting.MODES`, which imports torch
SUFFIXES = {"png": ".png", "jpg": ".jpg", "webp": ".webp"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `rorem remove`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "rorem remove IMAGE ... (--mask PATH | --box X0,Y0,X1,Y1) [-o PATH] [options]"
    parser.description = (
        "Remove objects from images. White in a mask is removed; so is the inside of a box.\n"
        "What is not given is as the model's own settings have it."
    )
    parser.epilog = (
        "examples:\n"
        "  rorem remove photo.jpg --box 10,20,200,180\n"
        "  rorem remove photo.jpg --mask mask.png -o clean.jpg\n"
        "  rorem remove photos --mask masks -o clean     (photo1.jpg has the mask photo1.png)\n"
        "Run again, it goes on: what is done is not made twice. More: papers/removal.md"
    )
    # A box may begin with a number below 0, which is no option.
    parser._negative_number_matcher = re.compile(r"-[\d.][\d.,e+-]*$")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders or patterns")
    what = parser.add_argument_group("what is removed")
    either = what.add_mutually_exclusive_group(required=True)
    either.add_argument(
        "--mask", metavar="PATH", help="one mask for all images, or a folder: masks by name"
    )
    either.add_argument(
        "--box",
        action="append",
        type=_parse_box,
        metavar="X0,Y0,X1,Y1",
        help="a rectangle in px; repeatable",
    )
    what.add_argument("--invert-mask", action="store_true", help="black is removed, not white")
    what.add_argument(
        "--dilate", type=_at_least(0), metavar="PX", help="widen it, half on each side"
    )

    result = parser.add_argument_group("results")
    result.add_argument(
        "-o", "--output", metavar="PATH", help="file or folder (default: NAME_removed.png; removed)"
    )
    result.add_argument("--format", choices=SUFFIXES, help="default: as -o says, else png")
    result.add_argument("--side-by-side", action="store_true", help="also write before and after")
    result.add_argument(
        "--overwrite", action="store_true", help="replace files that rorem did not write"
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        default="LetsThink/RORem",
        metavar="MODEL",
        help="folder, Hub id or builtin (default: %(default)s, the authors')",
    )
    model.add_argument("--revision", metavar="COMMIT", help="of the model on the Hub")
    model.add_argument("--lora", default="", metavar="MODEL", help="a LoRA, such as 4 steps'")
    model.add_argument(
        "--discriminator", metavar="MODEL", help="chooses among the candidates, with --candidates"
    )

    how = parser.add_argument_group("how")
    how.add_argument(
        "--mode",
        choices=MODES,
        help="what is taken from the model: what the removal changed, the mask alone, all",
    )
    how.add_argument("--no-crop", action="store_true", help="the whole image at the model's size")
    how.add_argument(
        "--resolution", type=_at_least(1), metavar="PX", help="short side for the model"
    )
    how.add_argument("--steps", type=_at_least(1), metavar="N", help="denoising steps")
    how.add_argument("--guidance", type=_number(0, 100), metavar="X", help="1 is none")
    how.add_argument(
        "--strength",
        type=_number(0, 1, above=True),
        metavar="X",
        help="above 0, to 1: share of noise",
    )
    how.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="fixes the noise")
    how.add_argument("--candidates", type=_at_least(1), default=1, metavar="N", help="seeds tried")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, mps")
    machine.add_argument(
        "--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of the weights"
    )
    machine.add_argument("--offload", action="store_true", help="for small GPUs: parts take turns")
    machine.add_argument("--runtime", choices=("torch", "onnx", "openvino"), default="torch")
    machine.add_argument("--batch-size", type=_at_least(1), metavar="N", help="images at a time")


def _parse_box(text: str) -> tuple[float, ...]:
    try:
        box = tuple(float(part) for part in text.split(","))
    except ValueError:
        box = ()
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise argparse.ArgumentTypeError(f"{text!r} is no X0,Y0,X1,Y1 in px")
    if box[0] >= box[2] or box[1] >= box[3]:
        raise argparse.ArgumentTypeError(f"{text!r} is empty: X0 < X1 and Y0 < Y1")
    return box


def _at_least(least: int):
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {least} or more")
        return int(text)

    return parse


def _number(low: float, high: float, *, above: bool = False):
    """A parser of numbers from `low`, or above it, to `high`."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := float(text)) <= high and not (above and value == low):
                return value
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number {'above' if above else 'from'} {low} to {high}"
        )

    return parse


# ---------------------------------------------------------------------------------- the command


def run_command(options) -> int:
    """Run a parsed `rorem remove` command; returns the exit code."""
    from rorem_lib.files import is_full
    from rorem_lib.runner.remove_results import complain

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup's choice stays
            signal.signal(number, _interrupt)
    try:
        return _run(options)
    except (ValueError, BlockingIOError, ImportError) as error:
        complain(f"rorem: {error}")
        return WRONG
    except OSError as error:
        complain(f"rorem: {'the disk is full: ' if is_full(error) else ''}{error}")
        complain("What was written stays. Mend it, and run the same command again to go on.")
        return FAILED
    except KeyboardInterrupt:
        complain("\nrorem: interrupted. What is done stays; the same command goes on.")
        return INTERRUPTED


def _interrupt(number, frame):
    raise KeyboardInterrupt(signal.Signals(number).name)


def _run(options) -> int:
    from rorem_lib.files import lock_folder
    from rorem_lib.runner.remove_files import plan
    from rorem_lib.runner.remove_results import Results

    if options.candidates > 1 and not options.discriminator:
        raise ValueError("--candidates needs a --discriminator, which chooses among them")
    if options.discriminator and options.candidates < 2:
        raise ValueError("--discriminator chooses among --candidates: give 2 or more")
    suffix = SUFFIXES[options.format] if options.format else None
    folder, items = plan(options.images, options.mask, output=options.output, suffix=suffix)
    inputs = [path for item in items for path in (item.source, item.mask) if path]
    results = Results(folder, inputs, options.overwrite)
    results.make()
    with lock_folder(results.state):
        results.open()
        try:
            from rorem_lib.runner.remove_work import Work  # torch, once the words are right

            return Work(options, items, results).run()
        finally:
            results.close()
