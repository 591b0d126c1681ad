"""Attention, compilation, FLOPs: what makes training fast, and what it costs."""

import copy
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from forked import Job
from peft import LoraConfig

from rorem_lib.models import sdxl
from rorem_lib.models.attention import (
    SharedPromptAttention,
    compile_unet,
    prepare_training,
    set_attention,
)
from rorem_lib.training.memory import count_flops, get_peak_flops

BATCH = 3
CONFIG = UNet2DConditionModel.load_config(sdxl.BUILTIN_FOLDER / "unet")
SDXL = {
    **CONFIG,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "norm_num_groups": 32,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return prepare_training(UNet2DConditionModel.from_config(CONFIG))


@pytest.fixture(scope="module")
def full_size():
    """SDXL-inpainting's UNet without data."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(SDXL).train()


def make_inputs(height=8, width=8, *, states=None):
    torch.manual_seed(1)
    inputs = {
        "sample": torch.randn(BATCH, 9, height, width),
        "timestep": torch.arange(BATCH) * 300,
        "encoder_hidden_states": torch.randn(1, 77, 32).expand(BATCH, -1, -1),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(1, 16).expand(BATCH, -1),
            "time_ids": torch.full((BATCH, 6), 64.0),
        },
    }
    return inputs if states is None else inputs | {"encoder_hidden_states": states}


def differentiate(unet, **inputs):
    """The output and the gradients of all trained weights."""
    unet.zero_grad()
    output = unet(**(inputs or make_inputs())).sample
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return output.detach(), {
        n: p.grad.clone() for n, p in unet.named_parameters() if p.requires_grad
    }


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-5)
    assert one[1].keys() == other[1].keys() and one[1]
    for name, gradient in one[1].items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(
            gradient,
            other[1][name],
            rtol=1e-4,
            atol=1e-5 * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def share_prompt(unet, *, fused):
    stock = AttnProcessor2_0() if fused else AttnProcessor()
    shared = SharedPromptAttention(fused=fused)
    unet.set_attn_processor({n: shared if "attn2" in n else stock for n in unet.attn_processors})


def count_projected_rows(unet, inputs):
    rows = []
    layers = [m for n, m in unet.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    hooks = [
        layer.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
        for layer in layers
    ]
    result = differentiate(unet, **inputs)
    for hook in hooks:
        hook.remove()
    assert len(rows) == len(layers) > 0
    return set(rows), result


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_a_shared_prompt_gives_the_stock_output_and_gradients(unet, fused, lora):
    if lora:
        unet.requires_grad_(False)
        unet.add_adapter(
            LoraConfig(
                r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]
            )
        )
    unet.set_attn_processor(AttnProcessor2_0() if fused else AttnProcessor())
    rows, stock = count_projected_rows(unet, make_inputs())
    assert rows == {BATCH}
    share_prompt(unet, fused=fused)
    rows, shared = count_projected_rows(unet, make_inputs())
    assert rows == {1}
    assert_same(stock, shared)
    assert any("lora_A" in name and "attn2.to_k" in name for name in shared[1]) == lora


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_the_prompt_may_come_as_one_row(unet, fused):
    share_prompt(unet, fused=fused)
    inputs = make_inputs()
    expanded = differentiate(unet, **inputs)
    rows, alone = count_projected_rows(
        unet, make_inputs(states=inputs["encoder_hidden_states"][:1])
    )
    assert rows == {1}
    assert_same(expanded, alone)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_prompts_that_differ_are_not_shared(unet, fused):
    torch.manual_seed(2)
    inputs = make_inputs(states=torch.randn(BATCH, 77, 32))
    unet.set_attn_processor(AttnProcessor2_0() if fused else AttnProcessor())
    stock = differentiate(unet, **inputs)
    share_prompt(unet, fused=fused)
    rows, result = count_projected_rows(unet, inputs)
    assert rows == {BATCH}
    assert_same(stock, result)


def test_set_attention_shares_cross_attention_and_keeps_names(unet):
    kinds = {name: type(processor) for name, processor in unet.attn_processors.items()}
    assert {name: kind for name, kind in kinds.items() if "attn2" in name} == {
        name: SharedPromptAttention for name in kinds if "attn2" in name
    }
    assert {kind for name, kind in kinds.items() if "attn1" in name} == {AttnProcessor}
    assert {
        processor.fused for name, processor in unet.attn_processors.items() if "attn2" in name
    } == {False}
    assert set(unet.state_dict()) == set(UNet2DConditionModel.from_config(CONFIG).state_dict())


def test_away_from_the_cpu_attention_is_fused(full_size):
    unet = copy.deepcopy(full_size)
    set_attention(unet)
    for name, processor in unet.attn_processors.items():
        if "attn2" in name:
            assert isinstance(processor, SharedPromptAttention) and processor.fused
        else:
            assert type(processor) is AttnProcessor2_0


def test_a_layer_unlike_sdxls_keeps_the_stock_processor(unet):
    odd = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    odd.residual_connection = True
    set_attention(unet)
    assert type(odd.processor) is AttnProcessor
    inputs = make_inputs()
    shared = differentiate(unet, **inputs)
    unet.set_attn_processor(AttnProcessor())
    assert_same(shared, differentiate(unet, **inputs))


@pytest.mark.parametrize(
    "installed, text", [(False, r"pip install .*\[xformers\]"), (True, "needs an NVIDIA GPU")]
)
def test_xformers_that_cannot_run_is_refused_with_the_mend(unet, monkeypatch, installed, text):
    monkeypatch.setattr("rorem_lib.models.attention.is_xformers_available", lambda: installed)
    with pytest.raises(ValueError, match=text):
        set_attention(unet, xformers=True)


@pytest.mark.slow
@torch.compiler.config.patch(recompile_limit=2)
def test_compiled_blocks_train_the_same_at_more_sizes_than_dynamo_allows(unet):
    compiled = copy.deepcopy(unet)
    compile_unet(compiled, backend="eager")
    assert list(compiled.state_dict()) == list(unet.state_dict())
    for side in (4, 6, 8, 10):
        inputs = make_inputs(side, 8)
        assert_same(differentiate(unet, **inputs), differentiate(compiled, **inputs))


def test_compilation_without_a_compiler_names_the_mend(unet, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"torch_compile"):
        compile_unet(unet)


def test_a_compiler_that_cxx_names_but_is_not_there_is_refused(unet, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(ValueError, match="no no-such-compiler here"):
        compile_unet(unet)


def test_flops_are_those_of_the_products_counted_layer_by_layer(unet):
    total = []

    def note(module, inputs, output):
        if isinstance(module, torch.nn.Conv2d):
            total.append(2 * output.numel() * module.weight[0].numel())
        elif isinstance(module, torch.nn.Linear):
            total.append(2 * output.numel() * module.in_features)

    class Counting(AttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
            keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            width = attn.to_q.out_features  # scores and their products with the values
            total.append(2 * 2 * hidden_states.shape[1] * keys.shape[1] * width)
            return super().__call__(attn, hidden_states, encoder_hidden_states, **kwargs)

    counted = count_flops(unet, 8, 12, encoder_tokens=20)
    unet.set_attn_processor(Counting())
    for module in unet.modules():
        module.register_forward_hook(note)
    with torch.no_grad():
        unet(
            torch.randn(1, 9, 8, 12),
            5,
            torch.randn(1, 20, 32),
            added_cond_kwargs={"text_embeds": torch.randn(1, 16), "time_ids": torch.zeros(1, 6)},
        )
    assert counted == sum(total)


@pytest.mark.slow
def test_flops_of_sdxl_inpainting_are_the_known_ones(full_size):
    assert sum(p.numel() for p in full_size.parameters()) == 2_567_478_084
    assert count_flops(full_size, 64, 64) == pytest.approx(1.589e12, rel=1e-3)
    assert count_flops(full_size, 128, 128) == pytest.approx(6.762e12, rel=1e-3)


def test_counting_leaves_the_model_as_it_is(unet):
    unet.enable_gradient_checkpointing()
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in unet.named_parameters()}
    processors = dict(unet.attn_processors)
    count_flops(unet, 8, 8)
    assert {n: (p.data_ptr(), p.requires_grad) for n, p in unet.named_parameters()} == before
    assert unet.attn_processors == processors and unet.is_gradient_checkpointing
    assert all(p.dtype == torch.float32 and p.grad is None for p in unet.parameters())
    assert not any(module._forward_pre_hooks for module in unet.modules())


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H200", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("Something New", None),
    ],
)
def test_peaks_are_found_by_the_name_of_the_gpu(monkeypatch, name, tflops):
    monkeypatch.delenv("ROREM_PEAK_TFLOPS", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    expected = None if tflops is None else pytest.approx(tflops * 1e12)
    assert get_peak_flops("cuda:0") == expected


def test_a_peak_that_is_given_goes_before_the_table(monkeypatch):
    monkeypatch.delenv("ROREM_PEAK_TFLOPS", raising=False)
    assert get_peak_flops("cpu") is None
    monkeypatch.setenv("ROREM_PEAK_TFLOPS", "0.25")
    assert get_peak_flops("cpu") == 0.25e12


@pytest.mark.parametrize("value", ["fast", "0", "-3", "nan", "inf"])
def test_a_peak_that_is_no_number_is_refused(monkeypatch, value):
    monkeypatch.setenv("ROREM_PEAK_TFLOPS", value)
    with pytest.raises(ValueError, match="ROREM_PEAK_TFLOPS"):
        get_peak_flops("cpu")


def test_checkpointing_changes_no_gradient(unet):
    without = differentiate(unet)
    unet.enable_gradient_checkpointing()
    assert_same(without, differentiate(unet))


@pytest.mark.slow
def test_the_cpu_is_tuned_without_another_rounding():
    """In a process of its own: the settings are the process's."""
    code = """
import torch
from rorem_lib.training import memory
a, b = torch.randn(300, 700), torch.randn(200, 700)
exact = torch.nn.functional.linear(a.double(), b.double())
memory.tune_cpu()
error = (torch.nn.functional.linear(a, b) - exact).abs().max() / exact.abs().max()
assert error < 1e-5, error
# where oneDNN does not round
memory.F.linear = lambda a, b: (a.double() @ b.double().T).to(a.dtype)
torch.cpu.get_capabilities = dict  # no AMX
memory.tune_cpu()
assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
"""
    assert Job(exec, code, {}).wait() == 0


@pytest.mark.slow
def test_the_cpu_is_left_alone_where_products_would_be_rounded():
    code = """
import torch
from rorem_lib.training import memory
plain = memory.F.linear
memory.F.linear = lambda a, b: (plain(a, b) if a.dtype == torch.float64 else
                                plain(a.bfloat16(), b.bfloat16()).float())
torch.cpu.get_capabilities = dict  # no AMX
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
memory.tune_cpu()
assert torch.backends.mkldnn.matmul.fp32_precision == "none"
"""
    assert Job(exec, code, {}).wait() == 0
