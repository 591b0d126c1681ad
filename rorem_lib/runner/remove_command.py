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
    count = _number(int, 1)
    what = parser.add_argument_group("what is removed")
    add = what.add_mutually_exclusive_group(required=True).add_argument
    add("--mask", metavar="PATH", help="one mask for all images, or a folder: masks by name")
    text = "a rectangle in px; repeatable"
    add("--box", action="append", type=_parse_box, metavar="X0,Y0,X1,Y1", help=text)
    add = what.add_argument
    add("--invert-mask", action="store_true", help="black is removed, not white")
    add("--dilate", type=_number(int, 0), metavar="PX", help="widen it, half on each side")

    add = parser.add_argument_group("results").add_argument
    text = "file, or folder with / at its end (default: NAME_removed.png; removed/)"
    add("-o", "--output", metavar="PATH", help=text)
    add("--format", choices=("png", "jpg", "webp"), help="default: as -o says, else png")
    add("--side-by-side", action="store_true", help="also write before and after")
    add("--overwrite", action="store_true", help="replace files that rorem did not write")

    add = parser.add_argument_group("model").add_argument
    text = "folder, Hub id or builtin (default: %(default)s, the authors')"
    add("--model", default="LetsThink/RORem", metavar="MODEL", help=text)
    add("--revision", metavar="COMMIT", help="of the model on the Hub")
    add("--lora", default="", metavar="MODEL", help="a LoRA, such as 4 steps'")
    text = "chooses among the candidates, with --candidates"
    add("--discriminator", metavar="MODEL", help=text)

    add = parser.add_argument_group("how").add_argument
    text = "what is taken from the model: what the removal changed, the mask alone, all"
    add("--mode", choices=MODES, help=text)
    text = "the whole image at the model's size"
    add("--no-crop", dest="crop", action="store_false", default=None, help=text)
    add("--resolution", type=count, metavar="PX", help="short side for the model")
    add("--steps", dest="num_inference_steps", type=count, metavar="N", help="denoising steps")
    scale, share = _number(float, 0, 100), _number(float, 0, 1, above=True)
    add("--guidance", dest="guidance_scale", type=scale, metavar="X", help="1 is none")
    add("--strength", type=share, metavar="X", help="above 0, to 1: share of noise")
    add("--seed", type=_number(int, 0), default=0, metavar="N", help="fixes the noise")
    add("--candidates", type=count, default=1, metavar="N", help="seeds tried")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, mps")
    kinds = ("auto", "bf16", "fp16", "fp32")
    add("--dtype", choices=kinds, default="auto", help="of the weights")
    add("--offload", action="store_true", help="for small GPUs: parts take turns")
    add("--runtime", choices=("torch", "onnx", "openvino"), default="torch")
    add("--batch-size", type=count, metavar="N", help="images at a time")


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


def _number(kind: type, low: float, high: float = math.inf, *, above: bool = False):
    """A parser of numbers of a kind from `low`, or above it, to `high`."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high and not (above and value == low):
                return value
        what = "whole number" if kind is int else "number"
        end = "" if high == math.inf else f" to {high}"
        raise argparse.ArgumentTypeError(
            f"{text!r} is no {what} {'above' if above else 'from'} {low}{end}"
        )

    return parse


# ---------------------------------------------------------------------------------- the command


def run_command(options) -> int:
    """Run a parsed `rorem remove` command; returns the exit code."""
    from rorem_lib.files import is_full
    from rorem_lib.runner.remove_plan import plan
    from rorem_lib.runner.remove_results import complain, open_results

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup's choice stays
            signal.signal(number, _interrupt)
    try:
        _check(options)
        suffix = f".{options.format}" if options.format else None
        folder, items = plan(options.images, options.mask, output=options.output, suffix=suffix)
        inputs = [path for item in items for path in (item.source, item.mask) if path]
        with open_results(folder, inputs, options.overwrite) as results:
            from rorem_lib.runner.remove_job import Job  # torch, once the words are right

            return Job(options, items, results).run()
    except (ValueError, BlockingIOError, FileNotFoundError, ImportError) as error:
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


def _check(options) -> None:
    """Refuse options that contradict each other.

    Raises:
        ValueError: names them.
    """
    if options.candidates > 1 and not options.discriminator:
        raise ValueError("--candidates needs a --discriminator, which chooses among them")
    if options.discriminator and options.candidates < 2:
        raise ValueError("--discriminator chooses among --candidates: give 2 or more")
    exported = "it opens a folder that `rorem export` wrote"
    given = {
        "--device": (options.device not in ("auto", "cpu"), "it computes on the processor"),
        "--offload": (options.offload, "it computes on the processor"),
        "--revision": (options.revision, exported),
        "--lora": (options.lora, f"{exported}; merge it there, with --lora"),
        "--dtype": (
            options.dtype != "auto" and options.runtime == "onnx",
            f"{exported}; choose it there, with --dtype",
        ),
    }
    for name, (is_given, reason) in given.items():
        if is_given and options.runtime != "torch":
            raise ValueError(f"--runtime {options.runtime} takes no {name}: {reason}")
