"""Defaults: upstream's, option by option; the paper's recipe adds nothing of the miniature to them.

The tables hold what upstream's three trainers have (commit b5f2e0a): the default of the code, and
what its run script gives. Ours is the script's where it gives one, else the code's; every other
value stands in a table of differences with its reason.
"""

import dataclasses
import importlib

import pytest
import yaml

from rorem_lib.acceptance import AcceptanceConfig
from rorem_lib.data.filters import FilterConfig
from rorem_lib.discriminator import DiscriminatorConfig, train_discriminator
from rorem_lib.distill import DistillConfig, train_lora
from rorem_lib.evaluation.methods import make_methods
from rorem_lib.evaluation.tables import list_pairs
from rorem_lib.files import ROOT
from rorem_lib.models import sdxl
from rorem_lib.parameters import CONFIGS, read_defaults, read_parameters
from rorem_lib.pretrain import PretrainConfig
from rorem_lib.removal import GenerateConfig, generate_candidates
from rorem_lib.remover import RemoverConfig, train_remover
from rorem_lib.runner.recipes import list_strings, read_recipe
from rorem_lib.training.config import IGNORED, REFUSED

SDXL = "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"
ABSENT = "no such option"

# Options that all three trainers have with one default and no word in a run script.
SHARED = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "adam_weight_decay": 1e-2,
    "allow_tf32": False,
    "cache_dir": None,
    "center_crop": False,
    "crops_coords_top_left_h": 0,
    "crops_coords_top_left_w": 0,
    "enable_xformers_memory_efficient_attention": True,
    "local_rank": -1,
    "logging_dir": "logs",
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "max_grad_norm": 1.0,
    "pretrained_vae_model_name_or_path": None,
    "random_flip": False,  # a switch: the remover's run script gives it
    "revision": None,
    "scale_lr": False,
}
# The others: (the code's default, what the run script gives).
UPSTREAM = {
    RemoverConfig: {
        "checkpointing_steps": (5000, 5000),
        "checkpoints_total_limit": (None, 5),
        "comments": ("Log comments for training RORem.", None),
        "dataloader_num_workers": (8, None),
        "dataset_config_name": (None, None),
        "dataset_name": ("fusing/instructpix2pix-1000-samples", None),
        "do_edm_style_training": (False, None),
        "gradient_accumulation_steps": (1, None),
        "gradient_checkpointing": (True, None),
        "hub_model_id": (None, None),
        "hub_token": (None, None),
        "learning_rate": (2e-5, 5e-5),
        "max_train_samples": (None, None),
        "max_train_steps": (None, 50_000),
        "meta_path": (["a folder of the authors'"], ["Final_open_RORem/meta.json"]),
        "mixed_precision": ("fp16", "fp16"),
        "num_train_epochs": (20, None),
        "num_validation_images": (2, None),
        "output_dir": ("experiment/SDXL_inpaint", "<your_path_to_save_checkpoint>"),
        "pretrained_model_name_or_path": (SDXL, SDXL),
        "pretrained_unet": (None, None),
        "push_to_hub": (False, None),
        "report_to": (None, "wandb"),
        "resolution": (512, 512),
        "resume_from_checkpoint": (None, None),
        "seed": (20240421, 4),
        "train_batch_size": (8, 16),
        "train_data_dir": (None, None),
        "trainable_modules": ([], None),
        "use_8bit_adam": (False, None),
        "vae_precision": ("fp32", None),
        "validation_steps": (300, 2000),
        "variant": (None, None),
    },
    DiscriminatorConfig: {
        "checkpointing_steps": (1000, None),
        "checkpoints_total_limit": (None, None),
        "comments": (None, None),
        "conditioning_dropout_prob": (0, None),
        "dataloader_num_workers": (0, None),
        "gradient_accumulation_steps": (1, None),
        "gradient_checkpointing": (False, None),
        "learning_rate": (5e-5, 1e-5),
        "max_train_steps": (10_000, 15_000),
        "meta_path": (["xxx/meta.json", "xxx/meta.json"], None),
        "mixed_precision": ("fp16", "fp16"),
        "num_train_epochs": (20, None),
        "output_dir": ("experiment/SDXL_discriminator", "a folder of the authors'"),
        "pretrained_lora": (None, None),
        "pretrained_model_name_or_path": (SDXL, SDXL),
        "pretrained_unet": (None, None),
        "rank": (4, 4),
        "report_to": (None, "wandb"),
        "resolution": (512, None),
        "seed": (20240421, 20240421),
        "train_batch_size": (4, 32),
        "trainable_modules": (["cls_pred_branch"], None),
        "vae_precision": ("fp32", None),
        "validation_steps": (ABSENT, 1000),
        "variant": (None, None),
    },
    DistillConfig: {
        "checkpointing_steps": (5000, 5000),
        "checkpoints_total_limit": (5, 10),
        "comments": ("Give a comment for the current run.", None),
        "dataloader_num_workers": (0, None),
        "gradient_accumulation_steps": (1, 1),
        "gradient_checkpointing": (False, None),
        "huber_c": (0.001, None),
        "learning_rate": (5e-5, 5e-5),
        "lora_alpha": (64, None),
        "lora_dropout": (0.0, None),
        "lora_rank": (64, None),
        "lora_target_modules": (None, None),
        "loss_type": ("l2", None),
        "max_train_samples": (None, None),
        "max_train_steps": (20_000, 20_000),
        "meta_path": (["xxx/meta.json", "xxx/meta.json"], None),
        "mixed_precision": ("fp16", "fp16"),
        "num_ddim_timesteps": (50, None),
        "num_train_epochs": (100, None),
        "output_dir": ("experiment/lcm-RORem-distilled", "experiment/RORem_LCM"),
        "pretrained_teacher_model": (SDXL, SDXL),
        "pretrained_teacher_unet": ("required", "xxx"),
        "report_to": (None, "wandb"),
        "resolution": (512, 512),
        "resume_from_checkpoint": (None, None),
        "seed": (None, 4),
        "teacher_revision": (None, None),
        "timestep_scaling_factor": (10.0, None),
        "tracker_project_name": ("RORem-LCM", "LCM-Finetune"),
        "train_batch_size": (16, 16),
        "use_8bit_adam": (False, None),
        "vae_encode_batch_size": (8, None),
        "validation_steps": (2000, 2000),
        "w_max": (15.0, None),
        "w_min": (3.0, None),
    },
}
RENAMED = {  # upstream's name in its distillation -> ours
    "lora_rank": "rank",
    "pretrained_teacher_model": "pretrained_model_name_or_path",
    "pretrained_teacher_unet": "pretrained_unet",
    "timestep_scaling_factor": "timestep_scaling",
}
# (ours, why), of all three and of each.
DIFFERENCES = {
    "comments": ("", "a note that nobody wrote says nothing"),
    "enable_xformers_memory_efficient_attention": (
        False,
        "PyTorch's own attention is as fast, and needs no package",
    ),
    "meta_path": ([], "required: the authors' folders are nobody else's"),
    "num_train_epochs": (0, "the run script counts steps, which win over epochs"),
    "output_dir": (..., "each notebook's folder"),
    "report_to": ("none", "a tracker asks for an account"),
    "resume_from_checkpoint": (
        "latest",
        "the same command goes on after a kill; upstream's resuming loads no optimizer",
    ),
}
OWN_DIFFERENCES = {
    RemoverConfig: {
        "gradient_checkpointing": (None, "the same gradients; only where the memory asks for it"),
        "num_validation_images": (4, "upstream shows four images whatever this option says"),
    },
    DiscriminatorConfig: {
        "center_crop": (ABSENT, "images are squashed, as upstream's are in the end"),
        "checkpoints_total_limit": (5, "as in the remover's run script: disks have an end"),
        "comments": (ABSENT, "upstream's code never reads it"),
        "conditioning_dropout_prob": (ABSENT, "0 upstream: nothing is dropped"),
        "crops_coords_top_left_h": (ABSENT, "0 upstream"),
        "crops_coords_top_left_w": (ABSENT, "0 upstream"),
        "enable_xformers_memory_efficient_attention": (ABSENT, "PyTorch's own attention"),
        "gradient_checkpointing": (ABSENT, "off upstream: most of the UNet is frozen"),
        "pretrained_lora": (ABSENT, "a discriminator starts from the base model"),
        "pretrained_unet": (ABSENT, "a folder or Hub id of a UNet alone is a model id here"),
        "pretrained_vae_model_name_or_path": (ABSENT, "the model's own"),
        "trainable_modules": (ABSENT, "LoRA and head are always trained"),
        "vae_precision": (ABSENT, "float32, as upstream's default"),
        "validation_steps": (ABSENT, "upstream's trainer has no such option and would stop"),
        "variant": (ABSENT, "found by itself"),
    },
    DistillConfig: {
        "gradient_checkpointing": (None, "the same gradients; only where the memory asks for it"),
        "huber_c": (0.0, "the constant counts with loss_type huber alone; 0 is l2 here"),
        "lora_alpha": (ABSENT, "always the rank, as upstream's 64"),
        "lora_dropout": (ABSENT, "0 upstream"),
        "lora_target_modules": (ABSENT, "upstream's fourteen kinds of layers"),
        "loss_type": (ABSENT, "huber_c says it: 0 is l2"),
        "pretrained_teacher_unet": ("", "a trained remover is one model id"),
        "teacher_revision": (ABSENT, "student and teacher are one model, with one revision"),
        "tracker_project_name": (ABSENT, "the tracker takes the folder's name"),
        "vae_encode_batch_size": (ABSENT, "latents are encoded once, before the training"),
        "w_max": (ABSENT, "no guidance, as the paper says; upstream's code ignores the option"),
        "w_min": (ABSENT, "no guidance, as the paper says; upstream's code ignores the option"),
    },
}
# What upstream has no option for is off, or as its code has it.
REMOVER_ADDITIONS = {
    "aspect_buckets": False,
    "bucket_step": 0,
    "cache_latents": True,  # the posterior's mode, encoded once; upstream samples it at every step
    "channels_last": None,
    "ema_decay": 0.0,
    "high_resolution": 1024,
    "high_resolution_meta_path": [],
    "high_resolution_share": 0.3,
    "latent_cache_dir": "",
    "latent_dtype": "fp16",
    "logging_steps": 25,
    "lora_rank": 0,
    "mask_dilate_max": 0.04,
    "mask_loosen": 1.0,
    "mask_variant_share": 0.5,
    "mask_variants": 0,
    "mask_weight": 0.0,
    "removal_min_timestep": 0,
    "resize_mode": "squash",
    "snr_gamma": 0.0,
    "torch_compile": False,
    "validation_meta_path": "",
}
ADDITIONS = {
    RemoverConfig: REMOVER_ADDITIONS,
    DistillConfig: REMOVER_ADDITIONS
    | {
        "lora_rank": 0,
        "num_validation_images": 4,
        "trainable_modules": [],
        "vae_precision": "fp32",
        "variant": "",
    },
    DiscriminatorConfig: {
        "balance_classes": False,
        "ema_decay": 0.0,
        "head_channels": 128,  # another head, whose reasons stand in papers/rorem.md
        "latent_cache_dir": "",
        "logging_steps": 25,
        "lora_targets": ["to_k", "to_q", "to_v", "to_out.0"],  # upstream's, written in its code
        "random_shift": False,
        "resume_from_checkpoint": "latest",
        "untouched_share": 0.0,
        "use_8bit_adam": False,
    },
}
TRAINERS = list(UPSTREAM)


def list_options(cls) -> dict:
    """Upstream's options: (the code's default, the run script's value or None)."""
    return {name: (value, None) for name, value in SHARED.items()} | UPSTREAM[cls]


def list_differences(cls) -> dict:
    shared = {k: v for k, v in DIFFERENCES.items() if k in list_options(cls)}
    return shared | OWN_DIFFERENCES[cls]


def get(config, name):
    name = RENAMED.get(name, name) if type(config) is DistillConfig else name
    return getattr(config, name, ABSENT)


@pytest.mark.parametrize("cls", TRAINERS)
def test_each_default_is_upstreams_or_has_a_reason(cls):
    config, differences = cls(), list_differences(cls)
    for name, (code, script) in list_options(cls).items():
        if name in IGNORED or name in REFUSED:
            assert not hasattr(config, name), name
            continue
        theirs, ours = code if script is None else script, get(config, name)
        if name in differences:
            expected, reason = differences.pop(name)
            assert reason and (expected is ... or ours == expected), name
            assert ours != theirs, f"{name} is upstream's: no difference"
        else:
            nothing = theirs is None and ours in ("", 0, "none")
            assert nothing or (ours == theirs and type(ours) is type(theirs)), name
    assert not differences, "of options that upstream has not"


def test_upstreams_trainer_has_52_options():
    assert len(list_options(RemoverConfig)) == 52
    assert set(IGNORED) | set(REFUSED) < set(list_options(RemoverConfig))


@pytest.mark.parametrize("cls", TRAINERS)
def test_what_upstream_has_no_option_for_is_off(cls):
    theirs = list_options(cls)
    if cls is DistillConfig:
        theirs = {RENAMED.get(name, name) for name in theirs if name != "lora_rank"} | {"rank"}
    ours = dataclasses.asdict(cls())
    assert {name: value for name, value in ours.items() if name not in theirs} == ADDITIONS[cls]


def test_generation_and_acceptance_are_full_size():
    config = GenerateConfig()
    assert config.pretrained_model_name_or_path == SDXL == sdxl.BASE_MODEL
    assert (config.num_inference_steps, config.guidance_scale, config.strength) == (50, 1.0, 1.0)
    assert (config.dilate, config.meta_path, config.batch_size) == ([0], [], 8)
    assert AcceptanceConfig() == AcceptanceConfig(
        test_share=0.25,
        calibration_method="platt",
        target_precision=0.9,
        min_share=0.0,
        bound="point",
    )


@pytest.mark.parametrize(
    "work, cls",
    [
        (train_remover, RemoverConfig),
        (train_lora, DistillConfig),
        (train_discriminator, DiscriminatorConfig),
        (generate_candidates, GenerateConfig),
    ],
)
def test_without_sets_it_says_what_to_give_before_it_loads_a_model(work, cls, tmp_path):
    with pytest.raises(ValueError, match="--meta_path A/meta.json"):
        work(cls(output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ the paper's recipe

PAPER = ROOT / "notebooks" / "recipes" / "paper.yaml"
# The miniature's values in parameters that belong to no config.
MINIATURE = {
    "batch_size": (16, 64),
    "hardware": ("cpu",),
    "preview_steps": (8,),
    "teacher_steps": (20,),
    "source": ("scenes",),
}


def list_fields(notebook: str) -> dict:
    """The library's defaults of a notebook's parameters."""
    return {k: v for config in CONFIGS.get(notebook, ()) for k, v in read_defaults(config).items()}


@pytest.fixture(scope="module")
def paper():
    return read_recipe("paper")


def list_stated(notebook: str) -> dict:
    """What the paper's recipe gives to every stage of a notebook."""
    return yaml.safe_load(PAPER.read_text())["defaults"].get(notebook, {})


def test_nothing_of_the_miniature_is_in_the_papers_recipe(paper):
    table = yaml.safe_load(PAPER.read_text())["stages"]
    for row in paper.stages:
        stem, cell = row.notebook.stem, read_parameters(row.notebook)
        stated = {"seed", *list_stated(stem), *table[row.name].get("parameters", {})}
        for name, default in list_fields(stem).items():
            if name in cell and name not in stated and name != "output_dir":
                assert row.given[name] == default, f"{row.name}: {name}"
        for name, value in row.parameters.items():
            assert value not in MINIATURE.get(name, ()), f"{row.name}: {name}"
            if name not in ("candidates", "scores"):
                assert not [s for s in list_strings(value) if s.startswith("builtin")], row.name
        if "meta_path" in row.parameters:
            assert row.parameters["meta_path"], f"{row.name} has no set"


def test_each_number_that_differs_in_the_papers_recipe_has_its_reason_beside_it():
    lines = PAPER.read_text().splitlines()
    (defaults,) = (v for k, v in yaml.compose(PAPER.read_text()).value if k.value == "defaults")
    checked = 0
    for notebook, table in defaults.value:
        for name, value in table.value:
            known = list_fields(notebook.value).get(name.value, ABSENT)
            assert str(known).lower() != value.value, f"{name.value} repeats the library's default"
            if name.value in ("mode", "meta_path"):  # which stage it is, not how it works
                continue
            line = name.start_mark.line
            reason = "#" in lines[line] or lines[line - 1].lstrip().startswith("#")
            assert reason, f"{notebook.value}: {name.value}"
            checked += 1
    assert checked > 10


def test_the_papers_recipe_trains_the_papers_batches_steps_and_rounds(paper):
    stages = {row.name: row.parameters for row in paper.stages}
    trainings = [row.parameters for row in paper.stages if row.notebook.stem == "02_train_remover"]
    assert len(trainings) == 8  # initialization, three rounds of two, high resolution
    for given in trainings:
        assert given["train_batch_size"] * given["gradient_accumulation_steps"] * 16 == 192
        assert (given["max_train_steps"], given["resolution"]) == (50_000, 512)
        assert (given["learning_rate"], given["validation_steps"]) == (5e-5, 2000)
    assert stages["initialization"]["pretrained_model_name_or_path"] == SDXL
    assert stages["high_resolution"]["high_resolution"] == 1024
    judge = stages["automation_3_discriminator"]
    assert (judge["rank"], judge["random_shift"], judge["min_share"]) == (4, False, 0.0)
    assert (judge["learning_rate"], judge["max_train_steps"]) == (1e-5, 15_000)
    assert stages["human_1_candidates"]["num_inference_steps"] == 50
    methods = make_methods(stages["evaluation"]["methods"])
    assert {m.num_inference_steps for m in methods if m.scheduler == "default"} == {50}


@pytest.mark.parametrize("name", ["demo", "paper"])
def test_the_distilled_model_has_its_controls(name):
    """The same remover without the LoRA: its own scheduler in 4, 2 and 1 steps, and LCM's."""
    (given,) = (r.parameters for r in read_recipe(name).stages if r.name == "evaluation")
    methods = make_methods(given["methods"])
    (student,) = (m for m in methods if m.lora)
    controls = [m for m in methods if m.model == student.model and m.control]
    assert all(m.row == student.row and not m.lora for m in controls)
    found = {(m.scheduler == "lcm", m.num_inference_steps) for m in controls}
    assert found == {(True, 4), (False, 4), (False, 2), (False, 1)}
    pairs = list_pairs([vars(m) for m in methods])
    assert {(student.name, m.name) for m in controls} <= set(pairs)


# --------------------------------------------------------------------- defaults without an import


@pytest.mark.parametrize("name", sorted({name for names in CONFIGS.values() for name in names}))
def test_defaults_that_are_read_are_those_of_the_class(name):
    module, _, kind = name.rpartition(".")
    config = getattr(importlib.import_module(f"rorem_lib.{module}"), kind)()
    assert read_defaults(name) == dataclasses.asdict(config)


def test_every_field_says_what_it_means():
    for cls in (*TRAINERS, GenerateConfig, PretrainConfig, AcceptanceConfig, FilterConfig):
        for field in dataclasses.fields(cls):
            assert field.metadata["help"], f"{cls.__name__}.{field.name}"


def test_a_list_is_every_configs_own():
    one, other = RemoverConfig(), RemoverConfig()
    one.meta_path.append("A/meta.json")
    assert other.meta_path == []
