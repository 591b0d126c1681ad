"""An exported remover (`models/export.py`) run by onnxruntime or OpenVINO in the one loop of
`models/denoising.py`."""

from __future__ import annotations

import functools
from importlib import metadata
from pathlib import Path

import diffusers
import numpy as np
import torch
from safetensors.torch import load_file

from rorem_lib.files import read_json
from rorem_lib.models import sdxl

FORMAT = 1  # of an exported folder: raise it when older ones could not be read
RECORD = "export.json"
GRAPH = "model.onnx"
INSTALL = "pip install -c requirements/constraints.txt -r requirements/export.txt"
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}


class OnnxGraph:
    """One graph in onnxruntime: arrays in, in the graph's order, a tensor out.

    Args:
        path: of the .onnx file.
        threads: of the processor; 0 takes as many as PyTorch would.
    """

    def __init__(self, path: Path, *, threads: int = 0, precision: str = "no"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self._inputs = [value.name for value in self._session.get_inputs()]

    def __call__(self, *arrays: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self._session.run(None, dict(zip(self._inputs, arrays)))[0])


@functools.cache
def _open_openvino():
    """The process's one OpenVINO, which is never closed.

    Its CPU plugin gives the thread that compiles first another stack for signals, and frees that
    stack with the last model. Where another thread did this (garbage is collected in any), the
    next signal, an interrupt of a notebook's kernel say, ended the process by SIGSEGV.
    """
    import openvino

    return openvino.Core()


class OpenVinoGraph:
    """One graph in OpenVINO; as `OnnxGraph`.

    The first shapes that it is called with are compiled for themselves, which a call of the
    miniature's UNet is a quarter faster for; all others share one graph for any shape.

    Args:
        precision: "no" computes in float32; "bf16" and "fp16" where the processor can.
    """

    def __init__(self, path: Path, *, threads: int = 0, precision: str = "no"):
        self._core = _open_openvino()
        self._model = self._core.read_model(str(path))
        self._options = {
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": {"no": "f32", "bf16": "bf16", "fp16": "f16"}[precision],
        }
        self._shapes = self._fixed = self._any = None

    def __call__(self, *arrays: np.ndarray) -> torch.Tensor:
        shapes = [array.shape for array in arrays]
        if self._shapes is None:
            model = self._model.clone()
            model.reshape({i: list(shape) for i, shape in enumerate(shapes)})
            self._shapes, self._fixed = shapes, self._compile(model)
        if shapes == self._shapes:
            return torch.from_numpy(self._fixed(arrays)[0])
        if self._any is None:
            self._any = self._compile(self._model)
        return torch.from_numpy(self._any(arrays)[0])

    def _compile(self, model):
        return self._core.compile_model(model, "CPU", self._options)


GRAPHS = {"onnx": OnnxGraph, "openvino": OpenVinoGraph}


class ExportedNetworks:
    """The networks of a folder that `rorem export` wrote, as `denoising.Networks` says.

    Args:
        folder: the export's.
        runtime: one of `RUNTIMES`.
        dtype: "no", "bf16" or "fp16", what OpenVINO computes in; "auto" takes bf16 where the
            processor has instructions for it. onnxruntime computes in what was exported.
        threads: of the processor; 0 takes as many as PyTorch would.

    Raises:
        ValueError: there is no such runtime, or not for this dtype; or the folder was written by a
            newer release.
        ImportError: the runtime is not installed; says how to.
        FileNotFoundError: the folder is no whole export.
    """

    device = torch.device("cpu")

    def __init__(self, folder, runtime: str, *, dtype="auto", threads: int = 0):
        if runtime not in RUNTIMES:
            raise ValueError(f"runtime is {runtime!r}: take torch, {' or '.join(RUNTIMES)}")
        require_packages(RUNTIMES[runtime])
        folder = Path(folder).expanduser()
        self.record = record = read_record(folder)
        self.origin = str(folder)
        if isinstance(dtype, torch.dtype):
            dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no")
        if runtime == "onnx" and dtype not in ("auto", "no", record["dtype"]):
            refuse_options(dtype=dtype)
        dtype = sdxl.choose_precision(dtype)
        self.settings = record["settings"]
        self.resolution, self.unit = record["resolution"], record["unit"]
        self.factor, self.scaling_factor = record["factor"], record["scaling_factor"]
        self.zero_negative = record["zero_negative"]
        prompt = load_file(folder / sdxl.EMPTY_PROMPT)
        self.embeds, self.pooled = prompt["prompt_embeds"], prompt["pooled_prompt_embeds"]
        config = read_json(folder / "scheduler" / "scheduler_config.json")
        if not (kind := str(config.get("_class_name"))).endswith("Scheduler"):
            raise ValueError(f"{folder}/scheduler holds no scheduler but {kind}")
        self.scheduler = getattr(diffusers, kind).from_config(config)
        self._encoder, self._decoder, self._unet = (
            GRAPHS[runtime](folder / part / GRAPH, threads=threads, precision=dtype)
            for part in ("vae_encoder", "vae_decoder", "unet")
        )

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self._encoder(_open(images))

    def predict(self, sample, timestep, embeds, pooled, time_ids) -> torch.Tensor:
        return self._unet(*map(_open, (sample, timestep, embeds, pooled, time_ids)))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        images = self._decoder(_open(latents))
        # Not the images alone: some VAEs make something finite of anything.
        sound = latents.isfinite().flatten(1).all(1) & images.isfinite().flatten(1).all(1)
        images[~sound] = torch.nan
        return images


def _open(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().contiguous().numpy()


def is_export(folder) -> bool:
    """Whether a folder was written by `rorem export`."""
    return (Path(folder).expanduser() / RECORD).is_file()


def read_record(folder: Path) -> dict:
    """What an export's `export.json` says.

    Raises:
        FileNotFoundError: it is no export, or a part is missing or cut short.
        ValueError: a newer release wrote it.
    """
    if not is_export(folder):
        raise FileNotFoundError(
            f"{folder} is no exported model (no {RECORD}): write one with "
            f"`rorem export MODEL -o FOLDER`"
        )
    record = read_json(folder / RECORD)
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{folder} is an export of format {record.get('format')}, this release reads "
            f"{FORMAT}: export it again"
        )
    broken = [n for n, part in record["parts"].items() if not is_whole(folder, part)]
    if broken or not record["complete"]:
        raise FileNotFoundError(
            f"{folder}: the export is not whole ({', '.join(broken) or 'it was stopped'}): run the "
            "same `rorem export` again, it goes on"
        )
    return record


def refuse_options(**options) -> None:
    """Refuse options that an exported model cannot honour: those that are not empty.

    Raises:
        ValueError: names the option.
    """
    for name, value in options.items():
        if value:
            raise ValueError(
                f"{name} is {value!r}: an exported model runs on the CPU as it was exported, with "
                "its LoRA merged; leave it out, or give it to `rorem export`"
            )


def require_packages(*names: str) -> None:
    """Refuse where optional packages are missing.

    Raises:
        ImportError: names them and the command that installs them.
    """
    missing = []
    for name in names:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise ImportError(f"{', '.join(missing)} is not installed; in the repository: {INSTALL}")


def is_whole(folder: Path, entry: dict | None) -> bool:
    """Whether all files of a part are there in their sizes."""
    return bool(entry) and all(
        (folder / name).is_file() and (folder / name).stat().st_size == file["bytes"]
        for name, file in entry["files"].items()
    )
