"""`rorem export`: a remover as ONNX, for `rorem remove --runtime onnx` or `openvino`."""

from __future__ import annotations

import sys

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


def add_options(parser) -> None:
    """The options of `rorem export`."""
    parser.description = (
        "Write a remover as three ONNX graphs, which onnxruntime and OpenVINO run on processors "
        "faster than PyTorch does: rorem remove --model FOLDER --runtime onnx. SDXL's take 10.6 GB "
        "of disk in float32 and 5.5 in fp16, and about as much memory while they are written. "
        "Stopped, the same command goes on."
    )
    parser.add_argument("model", metavar="MODEL", help="builtin, a folder or a Hub id")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--lora", default="", metavar="MODEL", help="a LoRA that is merged")
    parser.add_argument("--revision", metavar="COMMIT", help="of the model on the Hub")
    parser.add_argument("--variant", metavar="NAME", help="of the model's files, such as fp16")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "fp16"),
        default="fp32",
        help="of the weights (default: fp32; fp16 is half as large, on processors not faster)",
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="don't compare each graph with PyTorch, which takes the memory of one more UNet",
    )


def run_command(options) -> int:
    """Run a parsed `rorem export` command; returns the exit code."""
    from rorem_lib.models.export import export_model  # it takes seconds: after the options

    try:
        export_model(
            options.model,
            options.output,
            lora=options.lora,
            dtype={"fp32": "no"}.get(options.dtype, options.dtype),
            check=not options.no_check,
            progress=lambda line: print(line, flush=True),
            revision=options.revision,
            variant=options.variant,
        )
    except (FileExistsError, FileNotFoundError, ImportError, BlockingIOError) as error:
        print(f"rorem: {error}", file=sys.stderr)
        return WRONG
    except (OSError, ValueError) as error:
        print(f"rorem: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on.", file=sys.stderr)
        return INTERRUPTED
    print(f"{options.output}: written; run it with --runtime onnx or openvino")
    return DONE
