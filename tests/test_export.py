"""Export: three graphs that compute what PyTorch computes, written so that a stop loses nothing."""

import json
import shutil
import signal
import threading

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from forked import context
from tiny import write_model

from rorem_lib.builtin.scenes import render_scene
from rorem_lib.models import denoising, export, lora, runtimes, sdxl
from rorem_lib.models.inpainting import ObjectRemover
from rorem_lib.runner import cli

pytestmark = pytest.mark.slow  # a UNet is traced
SIDES = [(64, 64), (48, 72)]  # the second was seen neither by the export nor by a first call


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a pipeline with every kind of layer, and as few as can be: an export takes as long
    as there are operations, however large they are."""
    unet = {
        "down_block_types": ("DownBlock2D",) * 2,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ("UpBlock2D",) * 2,
    }
    vae = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    return write_model(tmp_path_factory.mktemp("models") / "model", unet=unet, vae=vae)


@pytest.fixture(scope="module")
def lora_folder(model, tmp_path_factory):
    """A LoRA of the model that changes what it computes."""
    pipe = sdxl.load_pipeline(str(model))
    torch.manual_seed(2)
    lora.add_lora(pipe.unet, 2)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path_factory.mktemp("lora")
    lora.save_lora(pipe.unet, folder)
    return folder


@pytest.fixture(scope="module")
def exported(model, lora_folder, tmp_path_factory):
    """An export of the model with the LoRA."""
    folder = tmp_path_factory.mktemp("exports") / "remover"
    lines = []
    export.export_model(str(model), folder, lora=str(lora_folder), progress=lines.append)
    assert [line.split(":")[0] for line in lines] == ["vae_encoder", "vae_decoder", "unet"]
    return folder


@pytest.fixture(scope="module")
def remover(model, lora_folder):
    return ObjectRemover.from_pretrained(
        str(model), lora=str(lora_folder), device="cpu", dtype="no"
    )


def render(height, width, count=2):
    scenes = [render_scene([5, i], role="rord", size=max(height, width)) for i in range(count)]
    images = [s.image[:height, :width].copy() for s in scenes]
    masks = [np.zeros((height, width), np.uint8) for _ in scenes]
    for mask in masks:
        mask[10:30, 15:40] = 255
    return np.stack(images), np.stack(masks)


def denoise(networks, sides, **options):
    images, masks = render(*sides)
    generators = [denoising.make_generator(1, i) for i in range(len(images))]
    return denoising.denoise(networks, images, masks, generators, num_inference_steps=3, **options)


@pytest.mark.parametrize("runtime", runtimes.RUNTIMES)
def test_graphs_compute_what_pytorch_does(exported, remover, runtime):
    networks = runtimes.ExportedNetworks(exported, runtime, dtype="no")
    expected = denoising.PipelineNetworks(remover.pipe)
    for name in ("unit", "factor", "scaling_factor", "resolution", "zero_negative"):
        assert getattr(networks, name) == getattr(expected, name), name
    for sides in SIDES:
        for options in ({}, {"guidance_scale": 3.0, "strength": 0.7}):
            given, wanted = (denoise(n, sides, **options) for n in (networks, expected))
            assert np.abs(given - wanted).max() * 255 < 0.05, (sides, options)
    plain = sdxl.load_pipeline(str(remover.pipe.origin))
    without = denoise(denoising.PipelineNetworks(plain), SIDES[0])
    assert np.abs(denoise(networks, SIDES[0]) - without).max() * 255 > 1, "LoRA was not merged"


@pytest.mark.parametrize("runtime", runtimes.RUNTIMES)
def test_remover_removes_with_it(exported, remover, runtime):
    opened = ObjectRemover.from_pretrained(str(exported), runtime=runtime, dtype="no")
    assert opened.settings == remover.settings
    images, masks = render(64, 64, 1)
    given, wanted = (r(images[0], masks[0], seed=3) for r in (opened, remover))
    assert np.abs(given.astype(int) - wanted).max() <= 1


def _end_in_a_thread(path):
    graphs = [runtimes.OpenVinoGraph(path)]
    graphs[0](np.zeros((1, 4, 8, 8), np.float32))
    thread = threading.Thread(target=graphs.clear)
    thread.start()
    thread.join()
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_after_a_thread_freed_the_model_is_survived(exported):
    process = context.Process(
        target=_end_in_a_thread, args=(exported / "vae_decoder" / runtimes.GRAPH,)
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0  # -11: OpenVINO had freed the main thread's stack for signals


def test_what_is_not_finite_is_nan(exported):
    networks = runtimes.ExportedNetworks(exported, "onnx")
    latents = torch.zeros(2, 4, 16, 16)
    latents[1, 0, 3, 3] = torch.inf
    images = networks.decode(latents)
    assert images[0].isfinite().all() and images[1].isnan().all()


def test_a_stopped_export_goes_on_where_it_was(model, lora_folder, exported, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(exported, folder)
    record = json.loads((folder / "export.json").read_text())
    encoder = record["parts"].pop("vae_encoder")
    record["complete"] = False
    (folder / "export.json").write_text(json.dumps(record))
    shutil.move(folder / "vae_encoder", folder / ".vae_encoder.partial")
    (folder / ".vae_encoder.partial/model.onnx").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="not whole"):
        runtimes.ExportedNetworks(folder, "onnx")
    before = (folder / "unet/model.onnx").stat().st_mtime_ns
    lines = []
    # The model is another folder with the same content.
    moved = shutil.copytree(model, tmp_path / "moved")
    options = {"lora": str(lora_folder), "progress": lines.append, "check": False}
    export.export_model(str(moved), folder, **options)
    assert [line.partition(": kept")[1] for line in lines] == ["", ": kept", ": kept"]
    assert (folder / "unet/model.onnx").stat().st_mtime_ns == before
    record = json.loads((folder / "export.json").read_text())
    assert record["parts"]["vae_encoder"]["files"] == encoder["files"] and record["complete"]
    assert not list(folder.glob(".*.partial"))
    lines.clear()
    export.export_model(str(moved), folder, **options)
    assert len(lines) == 1 and "there already" in lines[0]


def test_what_lies_in_the_folder_stays(model, exported, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="something else"):
        export.export_model(str(model), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    before = (exported / "export.json").read_text()
    with pytest.raises(FileExistsError, match="another export"):
        export.export_model(str(model), exported)  # without the LoRA
    with pytest.raises(FileExistsError, match="dtype"):
        export.export_model(str(model), exported, dtype="fp16")
    assert (exported / "export.json").read_text() == before


def test_a_file_cut_short_is_named(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "short")
    data = folder / "unet/model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(FileNotFoundError, match="unet"):
        runtimes.ExportedNetworks(folder, "openvino")


def test_wrong_requests_say_what_to_do(model, exported, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="torch, onnx or openvino"):
        runtimes.ExportedNetworks(exported, "tensorrt")
    with pytest.raises(FileNotFoundError, match="rorem export"):
        runtimes.ExportedNetworks(model, "onnx")
    with pytest.raises(ValueError, match="merged"):
        ObjectRemover.from_pretrained(str(exported), runtime="onnx", lora="x")
    with pytest.raises(ValueError, match="dtype is 'bf16': an exported model"):
        ObjectRemover.from_pretrained(str(exported), runtime="onnx", dtype="bf16")
    with pytest.raises(ValueError, match="bf16"):
        export.export_model(str(model), tmp_path / "x", dtype="bf16")
    monkeypatch.setattr(runtimes.metadata, "version", _raise_missing)
    with pytest.raises(ImportError, match="pip install .*export.txt"):
        runtimes.ExportedNetworks(exported, "onnx")
    assert cli.main(["export", str(model), "-o", str(tmp_path / "x")]) == 2
    assert "pip install" in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", "cuda"),
        ("offload", True),
        ("compile", True),
        ("revision", "main"),
        ("variant", "fp16"),
        ("scheduler", "lcm"),
        ("base_model", "o/base"),
        ("lora", "x"),
    ],
)
def test_what_an_exported_model_cannot_honour_is_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}: an exported model.*merged"):
        ObjectRemover.from_pretrained(str(tmp_path), runtime="openvino", **{name: value})
    with pytest.raises(FileNotFoundError, match="no exported model"):
        ObjectRemover.from_pretrained(str(tmp_path), runtime="openvino", device="cpu")


def _raise_missing(name):
    raise runtimes.metadata.PackageNotFoundError(name)


def test_command_keeps_a_finished_export(model, lora_folder, exported, capsys):
    words = ["export", str(model), "--lora", str(lora_folder), "-o", str(exported)]
    assert cli.main(words) == 0
    assert "there already" in capsys.readouterr().out
    assert cli.main([*words, "--dtype", "fp16"]) == 2
    assert str(exported) in capsys.readouterr().err


def test_a_posterior(tmp_path):
    """`AutoencoderKL`: mean and log variance come out, also of sides that were not traced."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()
    module = export._Encoder(vae)
    high, wide = torch.export.Dim("high", min=2), torch.export.Dim("wide", min=2)
    sides = ({0: torch.export.Dim("batch", max=63), 2: 2 * high, 3: 2 * wide},)
    export._trace(module, (torch.rand(2, 3, 32, 48),), sides, tmp_path / "model.onnx")
    x = torch.rand(1, 3, 40, 24)
    with torch.no_grad():
        expected = module(x)
    assert expected.shape == (1, 8, 20, 12)
    for graph in runtimes.GRAPHS.values():
        given = graph(tmp_path / "model.onnx")(x.numpy())
        assert given.shape == expected.shape
        assert (given - expected).abs().max() < 1e-4 * expected.abs().max()


def test_half_precision(model, tmp_path):
    folder = export.export_model(str(model), tmp_path / "half", dtype="fp16")
    size, whole = (sum(p.stat().st_size for p in (f / "unet").iterdir()) for f in (folder, model))
    assert size < 0.6 * whole, "not half of what it is in float32"
    wanted = denoise(denoising.PipelineNetworks(sdxl.load_pipeline(str(model))), SIDES[0])
    for runtime in runtimes.RUNTIMES:
        networks = runtimes.ExportedNetworks(folder, runtime, dtype="no")
        assert np.abs(denoise(networks, SIDES[0]) - wanted).max() * 255 < 1.5, runtime
