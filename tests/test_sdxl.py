"""The SDXL-inpainting stack: what opens, what does not, conditioning, latents."""

import json
import logging
import shutil
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from hub_server import HubServer
from huggingface_hub import metadata_load
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from rorem_lib.data.remote import talk_to_hub
from rorem_lib.models import sdxl
from rorem_lib.models.hub import write_card
from rorem_lib.models.inpainting import ObjectRemover
from rorem_lib.models.presets import Settings, save_settings
from rorem_lib.pretrain import UNET


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return sdxl.load_pipeline(str(tiny_model))


def test_a_folder_opens_frozen_and_in_evaluation_mode(pipe):
    assert type(pipe).__name__ == "StableDiffusionXLInpaintPipeline"
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())
        assert next(part.parameters()).dtype == torch.float32


@pytest.mark.parametrize("inner", ["unet", ""])
def test_a_unet_alone_opens_over_its_base_model(tiny_model, pipe, tmp_path, inner):
    shutil.copytree(tiny_model / "unet", tmp_path / "upstream" / inner, dirs_exist_ok=True)
    opened = sdxl.load_pipeline(str(tmp_path / "upstream"), base_model=str(tiny_model))
    for a, b in zip(opened.unet.parameters(), pipe.unet.parameters(), strict=True):
        assert torch.equal(a, b)


def test_folders_that_are_not_there_or_hold_no_model_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no model folder .*missing"):
        sdxl.load_pipeline(str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match="neither a pipeline .* nor a UNet"):
        sdxl.load_pipeline(str(tmp_path))
    (tmp_path / "export.json").touch()
    with pytest.raises(FileNotFoundError, match="it is an exported model.*--runtime"):
        sdxl.load_pipeline(str(tmp_path))
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="it is a LoRA"):
        sdxl.load_pipeline(str(tmp_path))
    (tmp_path / "remover").mkdir()
    (tmp_path / "remover/model_index.json").touch()
    with pytest.raises(FileNotFoundError, match="the model is in .*remover"):
        sdxl.load_pipeline(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="neither a pipeline .* nor a VAE"):
        sdxl.load_pipeline("builtin", vae=str(tmp_path))


def make_fp16(folder):
    """A UNet folder's weights as upstream's releases have them: halves, no variant in the name."""
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights = {name: (2 * tensor).half() for name, tensor in weights.items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return weights


def assert_weights(module, expected):
    found = module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in expected.items())


@pytest.mark.parametrize("inner", ["unet", ""])
def test_a_released_unet_takes_the_place_of_the_models_own(
    tiny_model, pipe, tmp_path, inner, caplog, capfd
):
    folder = tmp_path / "released" / inner
    shutil.copytree(tiny_model / "unet", folder)
    weights = make_fp16(folder)
    opened = sdxl.load_pipeline(str(tiny_model), unet=str(tmp_path / "released"))
    assert_weights(opened.unet, weights)
    assert opened.unet.dtype == torch.float32 and not opened.unet.training
    assert not any(p.requires_grad for p in opened.unet.parameters())
    assert_weights(opened.vae, pipe.vae.state_dict())
    assert caplog.messages == []
    # of the base model's parts some have the variant, the UNet has not
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        (path,) = (base / part).glob("*.safetensors")
        path.rename(path.with_suffix(".fp16.safetensors"))
    again = sdxl.load_pipeline(str(tmp_path / "released"), base_model=str(base), variant="fp16")
    assert_weights(again.unet, weights)
    assert caplog.messages == [
        f"{tmp_path / 'released'} has no files of the variant fp16: those "
        "without a variant are taken"
    ]
    assert "fp16" not in capfd.readouterr().err  # not diffusers' own error lines


def test_a_pipeline_without_the_variant_opens_with_one_warning(tiny_model, pipe, caplog):
    opened = sdxl.load_pipeline(str(tiny_model), variant="fp16")
    assert_weights(opened.unet, pipe.unet.state_dict())
    assert [
        (r.levelno, r.getMessage().startswith(f"{tiny_model} has no files of the variant fp16"))
        for r in caplog.records
    ] == [(logging.WARNING, True)]


def test_files_of_the_variant_win_over_those_without(tiny_model, pipe, tmp_path, caplog):
    folder = tmp_path / "unet"
    shutil.copytree(tiny_model / "unet", folder)
    plain = folder / "diffusion_pytorch_model.safetensors"
    shutil.copy(plain, folder / "kept")
    weights = make_fp16(folder)
    plain.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "kept").rename(plain)
    whole = tmp_path / "whole"
    shutil.copytree(tiny_model, whole)
    (whole / "vae" / "diffusion_pytorch_model.safetensors").rename(
        whole / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    )
    opened = sdxl.load_pipeline(str(whole), unet=str(folder), variant="fp16")
    assert_weights(opened.unet, weights)
    assert caplog.messages == []
    assert_weights(
        sdxl.load_pipeline(str(tiny_model), unet=str(folder)).unet, pipe.unet.state_dict()
    )


def make_variant(folder):
    """Give all weights of a model the name of the variant fp16, as halves."""
    for path in [*folder.rglob("*.safetensors")]:
        weights = {name: tensor.half() for name, tensor in load_file(path).items()}
        path.unlink()
        save_file(weights, path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})


def test_a_folder_of_the_variant_alone_opens_without_naming_it(tiny_model, tmp_path, caplog):
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    shutil.copytree(tiny_model, whole)
    shutil.copytree(tiny_model / "unet", alone)
    first = load_file(alone / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    make_variant(whole)
    make_variant(alone)
    for opened in (
        sdxl.load_pipeline(str(whole)),
        sdxl.load_pipeline(str(alone), base_model=str(tiny_model)),
        sdxl.load_pipeline(str(alone), base_model=str(whole), dtype=torch.float16),
        sdxl.load_pipeline(str(tiny_model), unet=str(alone)),
    ):
        assert torch.equal(opened.unet.conv_in.weight.half(), first.half())
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_the_authors_layout_removes_over_a_local_base(tiny_model, tmp_path):
    """`LetsThink/RORem`: a UNet alone, halves under a name without variant."""
    released = tmp_path / "RORem"
    shutil.copytree(tiny_model / "unet", released)
    make_fp16(released)
    remover = ObjectRemover.from_pretrained(
        str(released), base_model=str(tiny_model), device="cpu", dtype="bf16"
    )
    assert remover.pipe.unet.dtype == torch.bfloat16 and remover.pipe.text_encoder is None
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[20:40, 20:40] = True
    result = remover(image, mask, num_inference_steps=1)
    assert result.shape == image.shape and (result[mask] != image[mask]).any()


def test_pickled_weights_are_refused_with_the_mend(tiny_model, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(tiny_model, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(OSError, match=r"diffusion_pytorch_model.bin is a pickle.*safetensors"):
        sdxl.load_pipeline(str(folder))


@pytest.mark.parametrize("inner", ["vae", ""])
def test_another_vae_takes_the_place_of_the_models_own(tiny_model, pipe, tmp_path, inner):
    torch.manual_seed(5)
    other = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        norm_num_groups=4,
        block_out_channels=[8, 8, 8],
        latent_channels=4,
        up_block_types=["UpDecoderBlock2D"] * 3,
    )
    other.save_pretrained(tmp_path / "other" / inner)
    opened = sdxl.load_pipeline(str(tiny_model), vae=str(tmp_path / "other"))
    assert isinstance(opened.vae, AutoencoderKL) and isinstance(pipe.vae, AutoencoderTiny)
    assert_weights(opened.vae, other.state_dict())
    assert opened.vae_scale_factor == 4 and not opened.vae.training
    assert_weights(opened.unet, pipe.unet.state_dict())


def test_parts_of_the_wrong_kind_are_refused(tiny_model, tmp_path):
    unet, vae = str(tiny_model / "unet"), str(tiny_model / "vae")
    with pytest.raises(ValueError, match="vae is no UNet, it is a AutoencoderTiny"):
        sdxl.load_pipeline(str(tiny_model), unet=vae)
    with pytest.raises(ValueError, match="unet is no VAE, it is a UNet2DConditionModel"):
        sdxl.load_pipeline(str(tiny_model), vae=unet)
    with pytest.raises(ValueError, match="is no whole pipeline: with another UNet"):
        sdxl.load_pipeline(unet, unet=unet)
    AutoencoderKL(latent_channels=16, norm_num_groups=4, block_out_channels=[8]).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="makes 16 latent channels, the UNet takes 4"):
        sdxl.load_pipeline(str(tiny_model), vae=str(tmp_path))


def test_a_text_to_image_unet_is_refused(pipe, tmp_path):
    UNet2DConditionModel(**UNET | {"in_channels": 4}).save_pretrained(tmp_path / "unet")
    other = StableDiffusionXLPipeline(
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        text_encoder_2=pipe.text_encoder_2,
        tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer_2,
        scheduler=pipe.scheduler,
        unet=UNet2DConditionModel.from_pretrained(tmp_path / "unet"),
    )
    other.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="is no inpainting model: its UNet takes 4 channels"):
        sdxl.load_pipeline(str(tmp_path / "whole"))


def test_prompts_have_sdxls_shapes_and_the_empty_one_is_no_zero(pipe):
    embeds, pooled = sdxl.encode_prompt(pipe)
    assert embeds.shape == (1, 77, pipe.unet.config.cross_attention_dim)
    assert pooled.shape[0] == 1 and pooled.abs().sum() > 0 and embeds.abs().sum() > 0
    assert not torch.equal(embeds, sdxl.encode_prompt(pipe, "a red ball")[0])


def test_text_encoders_never_leave_the_cpu_and_their_prompt_follows_the_unet(tiny_model):
    opened = sdxl.load_pipeline(str(tiny_model), device="meta")  # stands for a GPU
    assert {opened.unet.device.type, opened.vae.device.type} == {"meta"}
    assert {opened.text_encoder.device.type, opened.text_encoder_2.device.type} == {"cpu"}
    assert [t.device.type for t in sdxl.encode_prompt(opened)] == ["meta", "meta"]


def test_the_empty_prompt_is_encoded_once_and_kept_with_a_model(
    tiny_model, pipe, tmp_path, monkeypatch
):
    """SDXL's text encoders take 3.3 GB: where the embedding is there, none is opened."""
    folder = tmp_path / "kept"
    shutil.copytree(tiny_model, folder)
    light = sdxl.load_pipeline(str(folder), text_encoders=False)
    assert light.text_encoder is light.text_encoder_2 is light.tokenizer is None
    sdxl.save_empty_prompt(light, folder)
    for part in ("text_encoder", "text_encoder_2"):
        (folder / part / "model.safetensors").unlink()
    again = sdxl.load_pipeline(str(folder), text_encoders=False)
    for a, b, c in zip(*map(sdxl.encode_prompt, (pipe, light, again)), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    calls, encode = [], type(pipe).encode_prompt
    monkeypatch.setattr(
        type(pipe), "encode_prompt", lambda *a, **k: calls.append(1) or encode(*a, **k)
    )
    opened = sdxl.load_pipeline(str(tiny_model))
    assert torch.equal(sdxl.encode_prompt(opened)[0], sdxl.encode_prompt(opened)[0])
    assert len(calls) == 1


def test_time_ids_are_size_crop_and_target():
    assert sdxl.make_time_ids(96, 64, 2).tolist() == [[96, 64, 0, 0, 96, 64]] * 2
    assert sdxl.make_time_ids(96, 64, top=8, left=16).tolist() == [[96, 64, 8, 16, 96, 64]]


def test_bytes_survive_the_way_to_tensors_and_back():
    images = np.arange(2 * 16 * 16 * 3, dtype=np.uint32).reshape(2, 16, 16, 3).astype(np.uint8)
    tensor = sdxl.to_tensor(images)
    assert tensor.shape == (2, 3, 16, 16)
    assert tensor.min() >= -1 and tensor.max() <= 1
    assert np.array_equal(sdxl.to_bytes(tensor), images)


def test_the_hole_is_grey_and_the_rest_as_it_was():
    source, mask = torch.rand(1, 3, 8, 8) + 0.1, torch.zeros(1, 1, 8, 8)
    mask[:, :, 2:5, 2:5] = 1
    masked = sdxl.mask_source(source, mask)
    assert (masked[:, :, 2:5, 2:5] == 0).all()
    assert torch.equal(
        masked[mask.expand(-1, 3, -1, -1) == 0], source[mask.expand(-1, 3, -1, -1) == 0]
    )


@torch.no_grad()
def test_latents_of_autoencoders_with_and_without_posterior(pipe):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    tiny = sdxl.encode_images(pipe.vae, images)
    assert tiny.shape == (2, 4, 8, 8)
    assert sdxl.decode_latents(pipe.vae, tiny).shape == images.shape
    torch.manual_seed(0)
    large = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
    ).eval()
    mode = sdxl.encode_images(large, images)
    assert torch.equal(mode, large.encode(images).latent_dist.mean * 0.5)
    drawn = [
        sdxl.encode_images(large, images, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    decoded = sdxl.decode_latents(large, mode)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1


def test_masks_shrink_as_the_pipeline_shrinks_them(pipe):
    mask = torch.zeros(1, 1, 32, 32)
    mask[:, :, 9:20, 3:14] = 1
    small = sdxl.shrink_mask(mask, torch.zeros(1, 4, 8, 8))
    theirs, _ = pipe.prepare_mask_latents(
        mask, torch.zeros(1, 3, 32, 32), 1, 32, 32, torch.float32, "cpu", None, False
    )
    assert torch.equal(small, theirs)


def test_precision_is_what_was_asked_for_or_what_the_machine_has():
    assert [sdxl.choose_precision(p) for p in ("no", "bf16", "fp16")] == ["no", "bf16", "fp16"]
    assert sdxl.choose_precision("auto") in ("no", "bf16")
    a = torch.ones(2, 2)
    with sdxl.autocast("no"):
        assert (a @ a).dtype == torch.float32
    with sdxl.autocast("bf16"):
        assert (a @ a).dtype == torch.bfloat16


# ------------------------------------------------------------------------------ models on the Hub


def read_files(folder, prefix=""):
    return {
        f"{prefix}{path.relative_to(folder)}": path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def hub(tiny_model, pipe, tmp_path_factory):
    """Repositories: `o/whole` and `o/base`, `o/inner` (`unet/` alone), `o/root` (its files); with
    settings and prompt `o/told`, without `o/plain`; a file of `o/both` does not come through."""
    released = tmp_path_factory.mktemp("released") / "unet"
    shutil.copytree(tiny_model / "unet", released)
    make_fp16(released)
    told = tmp_path_factory.mktemp("told")
    sdxl.save_empty_prompt(pipe, told)
    save_settings(Settings(64, 7), told)
    both = read_files(tiny_model / "unet")
    weights = both["diffusion_pytorch_model.safetensors"]
    with HubServer().run() as server:
        server.add("o/whole", read_files(tiny_model))
        server.add("o/base", read_files(tiny_model))
        server.add("o/inner", read_files(released, "unet/") | {"README.md": b"x"})
        server.add("o/root", read_files(released))
        server.add("o/gated", read_files(released), gated=True)
        server.add("o/told", read_files(tiny_model) | read_files(told))
        server.add("o/plain", read_files(tiny_model))
        server.add("o/both", both | {"diffusion_pytorch_model.fp16.safetensors": weights})
        server.break_connection("GET", "fp16.safetensors", 100_000, times=20)
        yield server


# Each call's model as the sum of its first weights, and what was warned of; or the error. Then what
# removers know.
OPEN = """
    import logging
    from rorem_lib.models import sdxl
    from rorem_lib.models.inpainting import ObjectRemover
    said = []
    class Note(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())
    logging.getLogger("rorem_lib").addHandler(Note())
    for model, options in {!r}:
        said.clear()
        try:
            pipe = sdxl.load_pipeline(model, **options)
            show([pipe.unet.conv_in.weight.abs().sum().item(),
                  pipe.vae.encoder.layers[0].weight.abs().sum().item(), *said])
        except Exception as error:
            show(type(error).__name__ + ": " + str(error))
    for model in ("o/told", "o/plain"):
        remover = ObjectRemover.from_pretrained(model, device="cpu", dtype="no")
        show([remover.settings.num_inference_steps, remover.pipe.text_encoder is None])
"""
WRONG = [
    ("o/none", {}),
    ("builtin", {"unet": "o/none"}),
    ("a/b/c", {}),
    ("o/whole", {"revision": "gone"}),
    ("o/gated", {}),
    ("builtin", {"vae": "o/root"}),
]
BROKEN = [("builtin", {"unet": "o/both", "variant": "fp16"})]
ABSENT = [
    ("o/base", {}),
    ("o/never", {}),
    ("builtin", {"unet": "o/never"}),
    ("builtin", {"vae": "o/never"}),
]


@pytest.fixture(scope="module")
def calls(tiny_model):
    base = {"base_model": str(tiny_model)}
    return [
        ("o/whole", {}),
        ("o/inner", base),
        ("o/root", base),
        (str(tiny_model), {"unet": "o/inner", "vae": "o/whole"}),
        ("o/base", {"unet": "o/root"}),
        ("o/inner", {"base_model": "o/base"}),
        ("o/root", {"base_model": "o/whole", "variant": "fp16"}),
        ("o/whole", {"variant": "fp16"}),
    ]


@pytest.fixture(scope="module")
def clients(hub, calls, tmp_path_factory):
    """What one process shows with the Hub and another, with its cache, without; the cache; how many
    requests each made. A process has to import torch and diffusers, so they do all at once."""
    home = tmp_path_factory.mktemp("home")
    online = hub.run_client(home, OPEN.format(calls + WRONG + BROKEN))
    requests = len(hub.log)
    offline = hub.run_client(home, OPEN.format(calls + ABSENT), HF_HUB_OFFLINE="1")
    return SimpleNamespace(
        online=online, offline=offline, home=home, requests=(requests, len(hub.log) - requests)
    )


@pytest.mark.slow
def test_models_open_from_the_hub_and_then_without_it(hub, calls, clients, pipe):
    count = len(calls)
    opened, wrong = clients.online[:count], clients.online[count : count + len(WRONG)]
    none, unet, name, revision, gated, vae = wrong
    first = pipe.unet.conv_in.weight.abs().sum().item()
    assert [row[0] / first for row in opened] == pytest.approx([1, 2, 2, 2, 2, 2, 2, 1], rel=1e-3)
    assert {row[1] for row in opened} == {pipe.vae.encoder.layers[0].weight.abs().sum().item()}
    warning = "{} has no files of the variant fp16: those without a variant are taken"
    assert [row[2:] for row in opened] == [[]] * 6 + [
        [warning.format("o/root"), warning.format("o/whole")],
        [warning.format("o/whole")],
    ]
    # a UNet that another takes the place of is not downloaded
    assert hub.select("GET", "o/base") and hub.select("GET", "/vae/diffusion_pytorch_model")
    assert not [r for r in hub.select("GET", "/unet/diffusion_pytorch_model") if "o/base" in r.path]

    for text, id_ in ((none, "o/none"), (unet, "o/none"), (name, "a/b/c")):
        assert text.startswith(f"FileNotFoundError: there is no model {id_}, neither a folder nor")
        assert "hf auth login" in text and "HF_TOKEN" in text
    assert revision.startswith("FileNotFoundError: o/whole has no revision 'gone'")
    assert gated.startswith("PermissionError: o/gated is gated: accept its conditions")
    assert vae == "ValueError: o/root is no VAE, it is a UNet2DConditionModel"

    assert clients.offline[:count] == opened
    online, offline = clients.requests
    assert online > 0 and offline == 0
    for text, id_ in zip(
        clients.offline[count : count + len(ABSENT)],
        ["o/base", "o/never", "o/never", "o/never"],
        strict=True,
    ):
        assert text.startswith(
            f"FileNotFoundError: {id_}@main is no folder and not, or not all, in"
        )
        assert f"{clients.home}/hub" in text and "HF_HUB_OFFLINE is set" in text


@pytest.mark.slow
def test_settings_and_prompt_come_from_the_hub_and_may_be_missing(hub, clients):
    for shown in (clients.online, clients.offline):
        assert shown[-2:] == [[7, True], [50, True]]
    opened = [r.path for r in hub.select("GET", "o/told") if "text_encoder" in r.path]
    assert not [path for path in opened if path.endswith(".safetensors")]


@pytest.mark.slow
def test_a_broken_transfer_is_no_missing_variant(hub, calls, clients):
    text = clients.online[len(calls) + len(WRONG)]
    assert text.startswith("ConnectionError: the transfer of o/both@main broke")
    assert text.endswith("run again, finished files are kept")
    requests = [r.path for r in hub.select("GET", "safetensors") if "o/both" in r.path]
    assert requests and all(path.endswith("model.fp16.safetensors") for path in requests)


@pytest.mark.parametrize(
    "status, kind, text",
    [
        (401, PermissionError, r"the Hub refuses o/x@v1 \(401: .*hf auth login"),
        (403, PermissionError, r"the Hub refuses o/x@v1 \(403: .*hf auth login"),
        (502, ConnectionError, r"the transfer of o/x@v1 broke \(bad luck.*run again"),
    ],
)
def test_what_the_hub_answers_is_told_with_the_mend(status, kind, text):
    answer = httpx.Response(status, request=httpx.Request("GET", "http://127.0.0.1/o/x"))
    with pytest.raises(kind, match=text), talk_to_hub("o/x", "v1", kind="model"):
        raise HfHubHTTPError("bad luck", response=answer)


def test_local_files_only_asks_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(
        FileNotFoundError,
        match="o/never@main",
    ):
        sdxl.load_pipeline("o/never", local_files_only=True)


def test_a_models_folder_counts_from_the_repository_where_there_is_none(tiny_model, monkeypatch):
    monkeypatch.setattr(sdxl, "resolve_path", lambda path: tiny_model.parent / path)
    assert sdxl.resolve_model(tiny_model.name) == str(tiny_model)
    monkeypatch.chdir(tiny_model.parent)
    assert sdxl.resolve_model(tiny_model.name) == tiny_model.name, "the working folder first"
    assert sdxl.resolve_model("LetsThink/RORem") == "LetsThink/RORem"
    with pytest.raises(FileNotFoundError, match="runs/nothing"):
        sdxl.resolve_model("runs/nothing")


def test_the_remover_that_ships_is_a_unet_over_the_built_in_model():
    base, remover = sdxl.load_pipeline("builtin"), sdxl.load_pipeline("builtin:remover")
    assert sdxl.get_resolution(remover) == 64 and remover.unet.dtype == torch.float32
    for part in ("vae", "text_encoder", "unet"):
        own, other = (getattr(pipe, part).state_dict() for pipe in (base, remover))
        equal = all(torch.equal(own[name], other[name]) for name in own)
        assert equal == (part != "unet"), part
    with pytest.raises(FileNotFoundError, match="builtin:test.*builtin:remover"):
        sdxl.resolve_model("builtin:test")
    assert sum(p.stat().st_size for p in sdxl.REMOVER_FOLDER.rglob("*")) < 8.2e6


def test_a_trained_models_card_keeps_the_licence_of_what_it_was_trained_from(tmp_path):
    given = {"title": "Remover", "resolution": 64, "text": "Trained."}
    bases = {
        "first": ("builtin", "cc0-1.0"),
        "from the remover": ("builtin:remover", "cc0-1.0"),
        "second": (str(tmp_path / "first"), "cc0-1.0"),
        "silent": (str(tmp_path), "openrail++"),
        "hub": (sdxl.BASE_MODEL, "openrail++"),
    }
    for name, (base, licence) in bases.items():
        write_card(tmp_path / name, base_model=base, **given)
        assert metadata_load(tmp_path / name / "README.md")["license"] == licence


def test_a_card_and_the_configs_beside_it_name_no_folder(tmp_path):
    for name, origin in (
        ("model_index.json", "/home/anna/runs/x/remover"),
        ("unet/config.json", "runs/x/remover/unet"),
        ("vae/config.json", "madebyollin/sdxl-vae-fp16-fix"),
        ("text_encoder/config.json", None),
    ):
        path = tmp_path / "remover" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"size": 8} | ({"_name_or_path": origin} if origin else {})))
    base = tmp_path / "base"
    base.mkdir()
    write_card(tmp_path / "remover", title="T", base_model=str(base), resolution=8, text="x")
    card = (tmp_path / "remover" / "README.md").read_text()
    assert str(tmp_path) not in card and "base_model" not in card
    found = {p.parent.name: json.loads(p.read_text()) for p in tmp_path.rglob("*.json")}
    assert found["remover"] == found["unet"] == found["text_encoder"] == {"size": 8}
    assert found["vae"]["_name_or_path"] == "madebyollin/sdxl-vae-fp16-fix"
    write_card(tmp_path / "remover", title="T", base_model="a/b", resolution=8, text="x")
    assert "base_model: a/b" in (tmp_path / "remover" / "README.md").read_text()
