"""LoRA files: of which tools they are taken, and that what does not fit is refused with numbers."""

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from rorem_lib.models import lora, sdxl


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    """A LoRA with an effect, as the kit writes it, and what the UNet's weights become by it."""
    folder = tmp_path_factory.mktemp("lora")
    unet = sdxl.load_pipeline(str(tiny_model)).unet
    lora.add_lora(unet, 2)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    lora.save_lora(unet, folder)
    adapters = get_peft_model_state_dict(unet)
    lora.merge_lora(unet)
    return load_file(folder / lora.LORA_FILE), adapters, unet.state_dict()


def write(folder, state):
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, folder / lora.LORA_FILE)


def name_as_kohya(name):
    layer, letter = name.removesuffix(".weight").rsplit(".", 1)
    way = {"lora_A": "lora_down", "lora_B": "lora_up"}[letter]
    return f"lora_unet_{layer.removeprefix('unet.').replace('.', '_')}.{way}.weight"


PREFIXES = {
    "the kit's": lambda name: name,
    "peft's": lambda name: "base_model.model." + name.removeprefix("unet."),
    "peft's of a pipeline": lambda name: "base_model.model." + name,
    "none": lambda name: name.removeprefix("unet."),
    "transformer": lambda name: "transformer." + name.removeprefix("unet."),
    "kohya's": name_as_kohya,
}


@pytest.mark.parametrize("kind", PREFIXES)
def test_known_prefixes_load_the_same_lora(saved, tiny_model, tmp_path, kind):
    state, _, merged = saved
    if kind == "kohya's":  # diffusers knows its names of attention layers alone
        state = {n: x for n, x in state.items() if ".attn" in n}
    write(tmp_path, {PREFIXES[kind](name): tensor for name, tensor in state.items()})
    pipe = sdxl.load_pipeline(str(tiny_model))
    before = {name: x.clone() for name, x in pipe.unet.state_dict().items()}
    lora.load_lora(pipe, tmp_path)
    changed = 0
    for name, weight in pipe.unet.state_dict().items():
        taken = kind != "kohya's" or ".attn" in name
        wanted = merged[name] if taken else before[name]
        torch.testing.assert_close(weight, wanted, rtol=1e-4, atol=1e-5)
        changed += not torch.equal(weight, before[name])
    assert changed == len(state) // 2


def keep_half(state):
    return {name: x for name, x in state.items() if "lora_A" in name}


def keep_first_half(state):
    return dict(list(sorted(state.items()))[: len(state) // 2])


def make_flux(state):
    layers = [f"transformer.single_transformer_blocks.{n}.attn.to_q" for n in range(7)]
    return {f"{layer}.lora_{way}.weight": torch.ones(2, 2) for layer in layers for way in "AB"}


def add_text_encoder(state):
    return state | {"text_encoder.layers.0.q.lora_A.weight": torch.ones(2, 2)}


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        (keep_half, r"{half} of its {half} tensors match, 0 are unexpected and {half} are missing"),
        (keep_first_half, r"{half} of its {half} tensors match, 0 are unexpected and \d+ are miss"),
        (make_flux, r" 0 of its 14 tensors match, 14 are unexpected .* and 0 are missing"),
        (add_text_encoder, r"{all} of its {more} tensors match, 1 are unexpected .* 0 are missing"),
        (lambda state: {"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, r" 0 of its 1 "),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(
    saved, tiny_model, tmp_path, change, numbers
):
    state = saved[0]
    write(tmp_path, change(state))
    pipe = sdxl.load_pipeline(str(tiny_model))
    before = {name: x.clone() for name, x in pipe.unet.state_dict().items()}
    numbers = numbers.format(half=len(state) // 2, all=len(state), more=len(state) + 1)
    with pytest.raises(ValueError, match=f"{lora.LORA_FILE} .*{numbers}"):
        lora.load_lora(pipe, tmp_path)
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys(), "the refused LoRA left its layers"
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_folder_without_a_lora_is_an_error(tiny_model, tmp_path):
    with pytest.raises(OSError, match=lora.LORA_FILE):
        lora.load_lora(sdxl.load_pipeline(str(tiny_model)), tmp_path)
