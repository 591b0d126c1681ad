"""Command lines and files of options: ours, upstream's words, and what accelerate passes on."""

import dataclasses
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from rorem_lib.discriminator import DiscriminatorConfig
from rorem_lib.distill import DistillConfig
from rorem_lib.parameters import StrictLoader
from rorem_lib.remover import RemoverConfig
from rorem_lib.training.config import IGNORED, REFUSED, LoopConfig, parse_config

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "notebooks" / "recipes"


@dataclass
class Options(LoopConfig):
    """Options of a test."""

    meta_path: list[str] = field(default_factory=lambda: ["builtin:labelled"])
    random_flip: bool = True
    rank: int = 4
    checkpointing: bool | None = None
    limit: int | None = None
    upstream_options: ClassVar[bool] = False


def read(line, cls=RemoverConfig):
    return parse_config(cls, line.split())


def write(folder, values):
    path = folder / "config.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return str(path)


# ------------------------------------------------------------------------------ words and files


def test_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    path = write(
        tmp_path,
        "rank: 8\nlearning_rate: 1e-4\nmax_train_steps: 2.0e+3\n"
        "meta_path: [a, b]\nrandom_flip: false\n",
    )
    config = parse_config(Options, ["--config", path, "--rank", "16"])
    assert config == Options(
        rank=16, learning_rate=1e-4, max_train_steps=2000, meta_path=["a", "b"], random_flip=False
    )
    assert isinstance(config.learning_rate, float)  # YAML itself reads 1e-4 as text
    assert isinstance(config.max_train_steps, int)
    assert parse_config(Options, []) == Options()


def test_lists_and_switches_on_the_command_line():
    config = read("--meta_path a b c --no-random_flip --learning_rate 1e-3", Options)
    assert config.meta_path == ["a", "b", "c"]
    assert config.random_flip is False and config.learning_rate == 1e-3
    assert read("--meta_path --rank 5", Options) == Options(meta_path=[], rank=5)


@pytest.mark.parametrize(
    "words, value",
    [
        ([], True),
        (["True"], True),
        (["true"], True),
        (["1"], True),
        (["yes"], True),
        (["False"], False),
        (["no"], False),
        (["0"], False),
        ([""], False),
    ],
)
def test_a_switch_takes_a_word_as_upstreams_xformers_option_does(words, value):
    option = "--enable_xformers_memory_efficient_attention"
    config = parse_config(RemoverConfig, [option, *words, "--seed", "7"])
    assert config.enable_xformers_memory_efficient_attention is value and config.seed == 7


def test_what_is_automatic_is_none_until_someone_decides(tmp_path):
    path = write(tmp_path, "checkpointing: true\nlimit: 3\n")
    assert read("", Options).checkpointing is None
    assert read("--checkpointing", Options).checkpointing is True
    assert read("--no-checkpointing", Options).checkpointing is False
    assert read("--checkpointing auto", Options).checkpointing is None
    assert read(f"--config {path}", Options) == Options(checkpointing=True, limit=3)
    assert read(f"--config {path} --checkpointing auto --limit 4", Options) == Options(limit=4)
    for word in ("null", "auto"):
        path = write(tmp_path, f"checkpointing: {word}\nlimit: null\n")
        assert read(f"--config {path}", Options) == Options()


@pytest.mark.parametrize(
    "line",
    [
        "--learning_rte 1",
        "--learning 1",
        "--rank four",
        "stray",
        "--random_flip maybe",
        "--no-random_flip=True",
        "--random_flip auto",
        "--checkpointing soon",
        "--hub_token x",
        "--dataset_name x",
    ],
)
def test_mistyped_options_are_refused(line, capsys):
    with pytest.raises(SystemExit):
        read(line, Options)
    assert line.split("=")[0].split()[0] in capsys.readouterr().err


def test_a_mistyped_option_is_answered_with_the_nearest(capsys, tmp_path):
    with pytest.raises(SystemExit):
        read("--learning_rte 1", Options)
    assert "learning_rate" in capsys.readouterr().err
    with pytest.raises(ValueError, match="learning_rte.*learning_rate"):
        read(f"--config {write(tmp_path, 'learning_rte: 1')}", Options)
    with pytest.raises(SystemExit):
        read("--no-random_flip True", Options)


def test_a_switch_is_turned_off_in_each_spelling():
    for word in ("--no-cache_latents", "--no_cache_latents", "--no-cache-latents"):
        assert read(word).cache_latents is False
    for word in ("--no-random_flip", "--no_random_flip", "--no-random-flip"):
        assert read(f"--random_flip {word}").random_flip is False
        assert read(f"{word} --random-flip").random_flip is True


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("learning_rte: 1", "unknown option learning_rte for Options"),
        ("rank: four", "rank: expected int"),
        ("rank: null", "rank: expected int"),
        ("random_flip: 'yes'", "random_flip: expected bool"),
        ("meta_path: a", "meta_path: expected"),
        ("checkpointing: 1", r"checkpointing: expected bool \| None"),
        ("- rank", "expected a table"),
        ("rank: [", "not valid YAML"),
        ("rank: 2\nlimit: 3\nrank: 4", 'not valid YAML: "rank" stands here twice'),
        ("random_flip: auto", "random_flip: expected bool"),
        ("hub_token: x", "unknown option"),
        ("stages: {}", "unknown option stages"),
        ("upstream_options: true", "unknown option"),
    ],
)
def test_mistyped_files_are_refused_by_name(tmp_path, text, complaint):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=f"config.yaml: {complaint}"):
        parse_config(Options, ["--config", path])


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    "text, complaint",
    [
        (BOMB, "more than 100,000 values"),
        (BOMB + "b: {<<: *a11}", "more than 100,000 values"),
        ("a: &a [*a]", "in itself"),
        ("a: " + "[" * 20_000, "nested deeper"),
        ("a: " + "{b: " * 20_000, "nested deeper"),
        ("\n".join(" " * n + f"k{n}:" for n in range(200)), "nested deeper"),
        ("rank: " + "1" * 6000, "digits"),
        ("rank: 2026-13-45", "month"),
        ("? [a, [b]]\n: 1", "unhashable"),
    ],
    ids=["aliases", "merged", "itself", "lists", "tables", "blocks", "digits", "date", "key"],
)
def test_yaml_that_never_ends_is_refused_at_once(tmp_path, text, complaint):
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"(?s)config.yaml: not valid YAML: .*{complaint}"):
        parse_config(Options, ["--config", write(tmp_path, text)])
    assert time.monotonic() - began < 5


def test_aliases_of_a_sane_size_and_many_keys_are_read():
    table = yaml.load("a: &a {x: 1, y: [2]}\nb: *a\nc: {<<: *a, x: 3}", StrictLoader)
    assert table == {"a": {"x": 1, "y": [2]}, "b": {"x": 1, "y": [2]}, "c": {"x": 3, "y": [2]}}
    many = "\n".join(f"k{n}: 1" for n in range(10_000))
    assert len(yaml.load(many, StrictLoader)) == 10_000


def test_help_names_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        read("--help")
    text = capsys.readouterr().out
    assert end.value.code == 0
    for field_ in dataclasses.fields(RemoverConfig):
        assert f"--{field_.name} " in text
    assert "(default: None)" in text and "--no-cache_latents" in text and "--no-NAME" in text
    with pytest.raises(SystemExit):
        read("--seeed 4")
    assert len(capsys.readouterr().err.splitlines()) == 2  # from each of many processes


# ------------------------------------------------------------------------------ upstream's words

# Every option of upstream's trainer (52): words that it takes, and what they mean here.
UPSTREAM = {
    "adam_beta1": ("0.85", 0.85),
    "adam_beta2": ("0.95", 0.95),
    "adam_epsilon": ("1e-6", 1e-6),
    "adam_weight_decay": ("0.1", 0.1),
    "allow_tf32": ("", True),
    "cache_dir": ("/tmp/x", "ignored"),
    "center_crop": ("", True),
    "checkpointing_steps": ("700", 700),
    "checkpoints_total_limit": ("3", 3),
    "comments": ("first", "first"),
    "crops_coords_top_left_h": ("8", 8),
    "crops_coords_top_left_w": ("16", 16),
    "dataloader_num_workers": ("4", 4),
    "dataset_config_name": ("x", "ignored"),
    "dataset_name": ("fusing/instructpix2pix-1000-samples", "ignored"),
    "do_edm_style_training": ("", "refused"),
    "enable_xformers_memory_efficient_attention": ("True", True),
    "gradient_accumulation_steps": ("2", 2),
    "gradient_checkpointing": ("", True),
    "hub_model_id": ("me/x", "ignored"),
    "hub_token": ("hf_secret", "refused"),
    "learning_rate": ("2e-5", 2e-5),
    "local_rank": ("3", "ignored"),
    "logging_dir": ("l", "l"),
    "lr_scheduler": ("constant_with_warmup", "constant_with_warmup"),
    "lr_warmup_steps": ("50", 50),
    "max_grad_norm": ("0.5", 0.5),
    "max_train_samples": ("100", 100),
    "max_train_steps": ("5000", 5000),
    "meta_path": ("A/meta.json B/meta.json", ["A/meta.json", "B/meta.json"]),
    "mixed_precision": ("bf16", "bf16"),
    "num_train_epochs": ("20", 20),
    "num_validation_images": ("2", 2),
    "output_dir": ("out", "out"),
    "pretrained_model_name_or_path": ("diffusers/sdxl", "diffusers/sdxl"),
    "pretrained_unet": ("LetsThink/RORem", "LetsThink/RORem"),
    "pretrained_vae_model_name_or_path": ("madebyollin/x", "madebyollin/x"),
    "push_to_hub": ("", "ignored"),
    "random_flip": ("", True),
    "report_to": ("wandb", "wandb"),
    "resolution": ("256", 256),
    "resume_from_checkpoint": ("out/checkpoint-500", "out/checkpoint-500"),
    "revision": ("main", "main"),
    "scale_lr": ("", True),
    "seed": ("7", 7),
    "train_batch_size": ("8", 8),
    "train_data_dir": ("x", "ignored"),
    "trainable_modules": ("attn1 attn2", ["attn1", "attn2"]),
    "use_8bit_adam": ("", True),
    "vae_precision": ("bf16", "bf16"),
    "validation_steps": ("200", 200),
    "variant": ("fp16", "fp16"),
}


def test_words_for_epochs_win_over_a_file_of_steps(tmp_path):
    (tmp_path / "job.yaml").write_text("max_train_steps: 50\n")
    words = ["--config", str(tmp_path / "job.yaml"), "--num_train_epochs", "3"]
    assert parse_config(LoopConfig, words).max_train_steps == 0
    both = parse_config(LoopConfig, [*words, "--max_train_steps", "7"])
    assert (both.max_train_steps, both.num_train_epochs) == (7, 3)


def test_help_says_what_each_option_means(capsys):
    with pytest.raises(SystemExit):
        parse_config(RemoverConfig, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--seed SEED fixes initialisation, order, noise and flips (default: 4)" in text
    for field_ in dataclasses.fields(RemoverConfig):
        assert " ".join(field_.metadata["help"].split()) in text, f"{field_.name} is not described"


@pytest.mark.parametrize("name", UPSTREAM)
def test_each_of_upstreams_options_means_the_same_or_says_why_not(name, caplog, capsys):
    words, value = UPSTREAM[name]
    line = ["--" + name, *words.split(), "--snr_gamma", "5"]
    if value is True:
        line = [f"--no-{name}", *line]
    if value == "refused":
        with pytest.raises(SystemExit):
            parse_config(RemoverConfig, line)
        error = capsys.readouterr().err
        assert f"--{name}: {REFUSED[name]}" in error and "hf_secret" not in error
        return
    changed = {} if value == "ignored" else {name: value}
    if name == "num_train_epochs":  # steps win where they are given
        changed["max_train_steps"] = 0
    assert value in (True, "ignored") or getattr(RemoverConfig(), name) != value
    assert parse_config(RemoverConfig, line) == RemoverConfig(snr_gamma=5.0, **changed)
    expected = [f"{name}: no effect, as in upstream's trainer"] if value == "ignored" else []
    assert caplog.messages == expected


def test_upstreams_options_together_in_words_and_in_a_file_are_one_config(tmp_path, caplog):
    taken = {name: pair for name, pair in UPSTREAM.items() if pair[1] != "refused"}
    line = [word for name, (words, _) in taken.items() for word in ("--" + name, *words.split())]
    config = parse_config(RemoverConfig, line)
    values = {
        name: words if value == "ignored" else value for name, (words, value) in taken.items()
    }
    assert read(f"--config {write(tmp_path, values)}") == config
    assert config == RemoverConfig(**{k: v for k, (_, v) in taken.items() if v != "ignored"})
    assert caplog.messages == [", ".join(IGNORED) + ": no effect, as in upstream's trainer"] * 2


def test_a_file_is_refused_what_words_are_but_may_say_no_to_it(tmp_path):
    path = write(tmp_path, "do_edm_style_training: true")
    with pytest.raises(ValueError, match="config.yaml: do_edm_style_training: EDM"):
        read(f"--config {path}")
    path = write(tmp_path, "do_edm_style_training: false\nhub_token: null")
    assert read(f"--config {path}") == RemoverConfig()


def test_one_of_several_processes_says_what_has_no_effect(monkeypatch, caplog):
    monkeypatch.setenv("RANK", "1")
    assert read("--dataset_name x") == RemoverConfig()
    assert caplog.messages == []
    monkeypatch.setenv("RANK", "0")
    read("--dataset_name x")
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("cls", [RemoverConfig, DiscriminatorConfig])
def test_the_launchers_file_has_no_place_among_our_options(cls, capsys, tmp_path):
    with pytest.raises(SystemExit):
        read("--config_file deepspeed_zero2.yaml", cls)
    assert (
        "--config_file: belongs to `accelerate launch` and stands before -m; a file of this "
        "job's own options is --config" in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="config_file: belongs to"):
        read(f"--config {write(tmp_path, {'config_file': 'x.yaml'})}", cls)


def test_only_the_remover_takes_what_only_upstreams_remover_takes(capsys):
    with pytest.raises(SystemExit):
        read("--dataset_name x", DiscriminatorConfig)
    assert "unrecognized arguments: --dataset_name x" in capsys.readouterr().err


# ------------------------------------------------------------------------ upstream's command line


COMMAND = """--train_batch_size 16 --output_dir runs/remover
    --meta_path A/meta.json B/meta.json --max_train_steps 50000 --random_flip --resolution 512
    --pretrained_model_name_or_path diffusers/stable-diffusion-xl-1.0-inpainting-0.1
    --mixed_precision fp16 --checkpoints_total_limit 5 --checkpointing_steps 5000
    --learning_rate 5e-5 --validation_steps 2000 --seed 4 --report_to wandb"""
CONFIG = RemoverConfig(
    train_batch_size=16,
    output_dir="runs/remover",
    meta_path=["A/meta.json", "B/meta.json"],
    max_train_steps=50000,
    random_flip=True,
    resolution=512,
    pretrained_model_name_or_path="diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
    mixed_precision="fp16",
    checkpoints_total_limit=5,
    checkpointing_steps=5000,
    learning_rate=5e-5,
    validation_steps=2000,
    seed=4,
    report_to="wandb",
)


@pytest.mark.parametrize(
    "launcher",
    [
        "--multi_gpu --num_processes 8",
        f"--config_file {RECIPES / 'accelerate' / 'deepspeed_zero2.yaml'}",
        f"--config_file {RECIPES / 'accelerate' / 'many_gpus.yaml'} --multi_gpu --num_processes 8",
    ],
)
def test_upstreams_command_is_this_config_behind_every_launcher(launcher):
    started = launch_command_parser().parse_args(
        [*launcher.split(), "-m", "rorem_lib.remover", *COMMAND.split()]
    )
    assert started.module and started.training_script == "rorem_lib.remover"
    assert parse_config(RemoverConfig, started.training_script_args) == CONFIG


def test_words_file_notebook_and_file_with_words_give_one_config(tmp_path):
    in_words = read(COMMAND)
    names = [word[2:] for word in COMMAND.split() if word.startswith("--")]
    values = {name: getattr(CONFIG, name) for name in names} | {"learning_rate": "5e-5"}
    in_a_file = read(f"--config {write(tmp_path, values)}")
    # what a notebook's job gets: every field, written down by its launcher
    from_a_notebook = read(f"--config {write(tmp_path, dataclasses.asdict(CONFIG))}")
    path = write(tmp_path, values | {"seed": 5, "train_batch_size": 1, "meta_path": ["C"]})
    mixed = read(
        f"--config {path} --seed 4 --train_batch_size 16 --meta_path A/meta.json B/meta.json"
    )
    assert in_words == in_a_file == from_a_notebook == mixed == CONFIG


def test_the_remover_recipe_is_upstreams_run_script():
    config = read(f"--config {RECIPES / 'jobs' / 'remover.yaml'}")
    assert config == dataclasses.replace(CONFIG, meta_path=["data/Final_open_RORem/meta.json"])
    for line in (RECIPES / "jobs" / "remover.yaml").read_text().splitlines():
        if "--config_file" in line:
            assert (RECIPES.parents[1] / line.split()[4]).is_file()


@pytest.mark.parametrize("cls", [RemoverConfig, DistillConfig, DiscriminatorConfig])
def test_every_option_is_read_somewhere(cls):
    """One that is only declared would silently do nothing."""
    code = "".join(
        path.read_text() for path in (ROOT / "rorem_lib").rglob("*.py") if path.name != "config.py"
    )
    read = set(re.findall(r"(?:(?<=config\.)|(?<=self\.))\w+", code))
    read |= set(re.findall(r'getattr\(\S*config, "(\w+)"', code))
    assert {field.name for field in dataclasses.fields(cls)} - read == set()
