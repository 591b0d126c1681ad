"""Validation: fixed scenes, grids, and a training that does not notice."""

import copy
import json
import random
from dataclasses import dataclass, field
from types import MethodType, SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import convert_outputs_to_fp32

from rorem_lib import metrics
from rorem_lib.data.pictures import load_image
from rorem_lib.data.writer import TripletWriter
from rorem_lib.models import sdxl
from rorem_lib.models.inpainting import ObjectRemover
from rorem_lib.training import validation
from rorem_lib.training.validation import GAP, Validation, compose_grid, load_scenes, remove_scenes


@dataclass
class Config:
    output_dir: str
    meta_path: list[str]
    high_resolution_meta_path: list[str] = field(default_factory=list)
    validation_meta_path: str = ""
    num_validation_images: int = 2
    resolution: int = 32
    seed: int = 4


def make_accelerator(main=True, precision="no", trackers=()):
    return SimpleNamespace(is_main_process=main, mixed_precision=precision, trackers=list(trackers))


def write_set(folder, sizes, *, gt=True, **extra):
    rng = np.random.default_rng(len(sizes))
    with TripletWriter(folder) as writer:
        for number, (height, width) in enumerate(sizes):
            source = cv2.resize(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), (width, height))
            mask = np.zeros((height, width), np.uint8)
            mask[height // 3 : height // 2, width // 3 : width // 2] = 255
            writer.add(
                id=f"picture-{number}",
                source=source,
                mask=mask,
                gt=255 - source if gt else None,
                **extra,
            )
    return str(writer.folder / "meta.json")


@pytest.fixture
def pipe(tiny_model):
    pipe = sdxl.load_pipeline(str(tiny_model))
    pipe.unet.requires_grad_(True).train()
    return pipe


@pytest.fixture
def make(tmp_path, pipe, tiny_set):
    def make(accelerator=None, **changes):
        config = Config(str(tmp_path / "run"), [str(tiny_set)])
        for name, value in changes.items():
            setattr(config, name, value)
        return Validation(pipe, config, accelerator or make_accelerator(), num_inference_steps=2)

    return make


def read_grid(made, step):
    return load_image(made.folder / f"step_{step}.png")


def list_cells(grid, rows, columns):
    """The grid's cells, [row][column]."""
    height = (grid.shape[0] + GAP) // rows
    width = (grid.shape[1] + GAP) // columns
    assert (rows * height - GAP, columns * width - GAP) == grid.shape[:2]
    return [
        [
            grid[r * height : (r + 1) * height - GAP][:, c * width : (c + 1) * width - GAP]
            for c in range(columns)
        ]
        for r in range(rows)
    ]


# ------------------------------------------------------------------------------------- what is made


def test_a_grid_shows_source_removal_and_gt_of_each_scene(make, pipe):
    made = make()
    values = made(pipe.unet, 3)
    cells = list_cells(read_grid(made, 3), rows=2, columns=3)
    scores = []
    for scene, (source, removal, gt) in zip(made.scenes, cells, strict=True):
        hole = scene.mask >= 128
        assert source.shape == (32, 32, 3)
        assert np.array_equal(source[hole], scene.source[hole])  # the outline lies outside
        assert (source != scene.source).any()
        assert np.array_equal(gt, scene.gt)
        scores.append(metrics.psnr_hole(removal, scene.gt, scene.mask))
    assert values == {"validation_psnr_hole": pytest.approx(np.mean(scores), abs=1e-3)}


def test_a_scene_is_what_stock_removal_gives_at_this_size(make, pipe):
    made = make()
    made(pipe.unet, 0)
    cells = list_cells(read_grid(made, 0), rows=2, columns=3)
    stock = copy.deepcopy(pipe)
    stock.unet.eval()
    expected = ObjectRemover(stock)(
        [s.source for s in made.scenes],
        [s.mask for s in made.scenes],
        resolution=32,
        num_inference_steps=2,
        seed=4,
        batch_size=4,
        mode="full",
        crop=False,
    )
    for row, picture in zip(cells, expected, strict=True):
        assert np.array_equal(row[1], picture)


def test_removals_that_are_not_finite_do_not_stop_a_training(make, pipe, caplog):
    with torch.no_grad():
        pipe.unet.conv_out.weight[0, 0, 0, 0] = torch.nan
    made = make()
    assert made(pipe.unet, 7) == {} and "step 7" in caplog.text
    assert not list(made.folder.glob("step_*.png"))


def test_equal_weights_give_equal_grids_and_other_weights_others(make, pipe):
    made = make()
    first = made(pipe.unet, 1)
    torch.rand(7), np.random.rand(7)  # what a training draws in between
    again = made(pipe.unet, 2)
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(1.5)
    other = made(pipe.unet, 3)
    assert first == again != other
    assert np.array_equal(read_grid(made, 1), read_grid(made, 2))
    assert not np.array_equal(read_grid(made, 2), read_grid(made, 3))


def test_scenes_keep_their_aspect_at_the_training_resolution(tmp_path, pipe, make):
    meta = write_set(tmp_path / "wide", [(60, 100), (200, 90), (33, 33)])
    made = make(meta_path=[meta], resolution=48, num_validation_images=9)
    sizes = [scene.source.shape[:2] for scene in made.scenes]
    assert sizes == [(48, 80), (104, 48), (48, 48)]
    assert all(
        scene.mask.shape == scene.source.shape[:2] == scene.gt.shape[:2] for scene in made.scenes
    )
    made(pipe.unet, 1)
    grid = read_grid(made, 1)
    assert grid.shape == (3 * 104 + 2 * GAP, 3 * 80 + 2 * GAP, 3)
    assert (grid[48:104, :80] == 255).all()  # white below a wide scene


def test_large_pictures_are_shrunk_in_the_grid(monkeypatch):
    monkeypatch.setattr(validation, "CELL", 20)
    scene = validation.Scene(
        "a", np.full((60, 40, 3), 9, np.uint8), np.zeros((60, 40), np.uint8), None
    )
    grid = compose_grid([scene], [np.full((60, 40, 3), 7, np.uint8)])
    assert grid.shape == (20, 2 * 13 + GAP, 3)
    assert (grid[:, :13] == 9).all() and (grid[:, -13:] == 7).all()


def test_without_gt_there_is_a_grid_of_two_columns_and_no_score(tmp_path, pipe, make):
    made = make(validation_meta_path=write_set(tmp_path / "pool", [(32, 32)], gt=False))
    assert made(pipe.unet, 1) == {}
    assert read_grid(made, 1).shape == (32, 64 + GAP, 3)


def test_lines_and_grids_of_later_steps_are_made_anew(make, pipe):
    made = make()
    for step in (2, 4, 6, 4):
        made(pipe.unet, step)
    lines = [json.loads(x) for x in (made.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert {scene.name for scene in made.scenes} == set(lines[0]["scenes"])
    assert lines[0]["validation_psnr_hole"] == pytest.approx(
        np.mean(list(lines[0]["scenes"].values())), abs=1e-3
    )
    assert sorted(p.name for p in made.folder.iterdir()) == [
        "metrics.jsonl",
        "step_2.png",
        "step_4.png",
    ]


def test_a_second_process_makes_the_same_and_writes_nothing(make, pipe):
    other = make(make_accelerator(main=False))
    values = other(pipe.unet, 1)
    assert not other.folder.exists()
    assert values == make()(pipe.unet, 1)


def test_trackers_that_take_pictures_get_the_grid(make, pipe):
    class Shows(GeneralTracker):
        name, requires_logging_directory = "shows", False
        tracker, shown = None, []

        @on_main_process
        def log_images(self, values, step=None, **kwargs):
            self.shown.append((values, step, kwargs))

    class Board(Shows):
        name, shown = "tensorboard", []

    blind = SimpleNamespace(name="blind")
    made = make(make_accelerator(trackers=[blind, Shows(_blank=True), Board(_blank=True)]))
    made(pipe.unet, 5)
    grid = read_grid(made, 5)
    ((values, step, kwargs),) = Shows.shown
    assert step == 5 and kwargs == {} and np.array_equal(values["validation"][0], grid)
    ((values, step, kwargs),) = Board.shown
    assert values["validation"].shape == (1, *grid.shape) and kwargs == {"dataformats": "NHWC"}


# ----------------------------------------------------------------------------- nothing is disturbed


def snapshot(pipe):
    unet = pipe.unet
    return {
        "weights": {k: v.clone() for k, v in unet.state_dict().items()},
        "grads": {k: p.grad.clone() for k, p in unet.named_parameters()},
        "modes": [m.training for m in unet.modules()],
        "config": dict(unet.config),
        "attributes": sorted(unet.__dict__),
        "forward": unet.__dict__.get("forward"),
        "needs": [p.requires_grad for p in unet.parameters()],
        "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
        "scheduler": (
            id(pipe.scheduler),
            pipe.scheduler.timesteps.clone(),
            pipe.scheduler.num_inference_steps,
        ),
        "vae": (pipe.vae.dtype, {k: v.clone() for k, v in pipe.vae.state_dict().items()}),
    }


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert np.all(a == b)


def fill_gradients(unet):
    for parameter in unet.parameters():
        parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_training_does_not_notice(make, pipe, monkeypatch, precision, fails):
    made = make(make_accelerator(precision=precision))
    pipe.vae.to(torch.bfloat16)  # as with vae_precision
    pipe.unet.mid_block.eval()
    fill_gradients(pipe.unet)
    decode = pipe.vae.decode

    def draw(*args, **kwargs):
        random.random(), np.random.rand(), torch.rand(1)
        return 1 / 0 if fails else decode(*args, **kwargs)

    monkeypatch.setattr(pipe.vae, "decode", draw)
    before = snapshot(pipe)
    if fails:
        with pytest.raises(ZeroDivisionError):
            made(pipe.unet, 1)
    else:
        made(pipe.unet, 1)
    assert_equal(before, snapshot(pipe))


def test_the_next_training_step_is_the_one_without_validation(make, pipe):
    def learn(unet):
        inputs = torch.randn(2, 9, 8, 8)
        added = {"text_embeds": torch.zeros(2, 16), "time_ids": sdxl.make_time_ids(32, 32, 2)}
        unet(
            inputs, torch.tensor([10, 500]), torch.ones(2, 77, 32), added_cond_kwargs=added
        ).sample.square().mean().backward()
        return [p.grad for p in unet.parameters()]

    plain = copy.deepcopy(pipe.unet)
    torch.manual_seed(3)
    made = make()
    made(pipe.unet, 1)
    with_validation = learn(pipe.unet)
    torch.manual_seed(3)
    assert_equal(with_validation, learn(plain))


def test_it_runs_in_evaluation_mode_in_the_trainings_precision(make, pipe, monkeypatch):
    seen, plain = [], pipe.unet.forward

    def forward(*args, **kwargs):
        seen.append(
            (
                pipe.unet.mid_block.training,
                torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu"),
                torch.is_grad_enabled(),
            )
        )
        return plain(*args, **kwargs)

    decoded, decode = [], pipe.vae.decode
    monkeypatch.setattr(
        pipe.vae,
        "decode",
        lambda z, **kw: (
            decoded.append((z.dtype, torch.is_autocast_enabled("cpu"), pipe.vae.dtype))
            or decode(z, **kw)
        ),
    )
    monkeypatch.setattr(pipe.unet, "forward", forward)
    make(make_accelerator(precision="bf16"))(pipe.unet, 1)
    assert set(seen) == {(False, True, torch.bfloat16, False)}
    assert set(decoded) == {(torch.float32, False, torch.float32)}


# ------------------------------------------------------------------------------- however it is held


def remove(pipe, unet, made, precision="no"):
    return remove_scenes(
        pipe, unet, made.scenes, side=32, seed=4, num_inference_steps=2, precision=precision
    )


def test_a_wrapped_or_compiled_unet_gives_what_the_plain_one_gives(make, pipe):
    made = make()
    expected = made(pipe.unet, 0)
    plain = read_grid(made, 0)
    traced = []

    def count(graph, _):
        traced.append(graph)
        return graph.forward

    wrapped = torch.compile(pipe.unet, backend=count)
    assert made(wrapped, 1) == expected
    unet = pipe.unet
    for module in unet.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.compile(backend=count)
    assert made(unet, 2) == expected
    assert not traced  # compiling for other shapes than the training's would cost minutes
    for step in (1, 2):
        assert np.array_equal(read_grid(made, step), plain)


def test_the_wrapper_of_several_processes_is_taken_off(make, pipe):
    made = make()
    expected = made(pipe.unet, 0)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(pipe.unet)
        assert made(wrapped, 1) == expected
        assert np.array_equal(read_grid(made, 0), read_grid(made, 1))
    finally:
        torch.distributed.destroy_process_group()


def test_accelerates_own_wrapper_stays_and_changes_nothing(make, pipe):
    made = make(make_accelerator(precision="bf16"))
    expected = made(pipe.unet, 0)
    autocast = torch.autocast("cpu", torch.bfloat16)
    own = MethodType(convert_outputs_to_fp32(autocast(pipe.unet.forward.__func__)), pipe.unet)
    pipe.unet.forward = own  # as `Accelerator.prepare` does it
    assert made(pipe.unet, 1) == expected
    assert pipe.unet.__dict__["forward"] is own


def test_half_weights_are_run_by_autocast(make, pipe):
    made = make()
    whole = remove(pipe, pipe.unet, made, "bf16")
    for a, b in zip(whole, remove(pipe, pipe.unet.to(torch.bfloat16), made, "bf16")):
        assert np.abs(a.astype(int) - b.astype(int)).mean() < 2
    assert pipe.unet.dtype == torch.bfloat16


def test_a_lora_under_training_is_seen(make, pipe):
    from peft import LoraConfig

    made = make()
    before = remove(pipe, pipe.unet, made)
    pipe.unet.requires_grad_(False).add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"]))
    for a, b in zip(before, remove(pipe, pipe.unet, made)):  # its second half begins as zeros
        assert np.array_equal(a, b)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=3)
    after = remove(pipe, pipe.unet, made)
    assert any((a != b).any() for a, b in zip(before, after))


# --------------------------------------------------------------------------------- where scenes are


def load(config):
    return [scene.name for scene in load_scenes(config, side=32, unit=8)]


def test_scenes_come_from_the_test_set_beside_or_from_the_training_set(tmp_path):
    training = write_set(tmp_path / "sets" / "train", [(32, 32)] * 3)
    config = Config("", [training])
    assert load(config) == ["picture-0", "picture-1"]
    with TripletWriter(tmp_path / "sets" / "test") as writer:
        picture, mask = np.zeros((32, 32, 3), np.uint8), np.eye(32, dtype=np.uint8) * 255
        writer.add(id="unseen", source=picture, mask=mask)
    assert load(config) == ["unseen"]
    config.validation_meta_path = training
    assert load(config) == ["picture-0", "picture-1"]


def test_a_training_set_in_the_working_folder_has_neighbours_too(tmp_path, monkeypatch):
    write_set(tmp_path / "train", [(32, 32)])
    write_set(tmp_path / "test", [(32, 32)] * 2)
    monkeypatch.chdir(tmp_path / "train")
    assert len(load(Config("", ["meta.json"]))) == 2


def test_rejected_triplets_are_no_scenes(tmp_path):
    meta = write_set(tmp_path / "bad", [(32, 32)], score=0.1)
    with pytest.raises(ValueError, match="validation_meta_path"):
        load(Config("", [meta]))


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"validation_meta_path": "nowhere/meta.json"}, "nowhere.*validation_meta_path"),
        ({"num_validation_images": 0}, "num_validation_images 0.*validation_steps 0"),
    ],
)
def test_missing_scenes_name_the_option(tiny_set, changes, complaint):
    config = Config("", [str(tiny_set)], **changes)
    with pytest.raises(ValueError, match=complaint):
        load(config)


def test_a_damaged_picture_is_named_before_the_training_begins(tmp_path, make):
    meta = write_set(tmp_path / "broken", [(32, 32)])
    (tmp_path / "broken" / "GT" / "picture-0.png").write_bytes(b"PNG?")
    with pytest.raises(ValueError, match="picture-0.png.*validation_meta_path"):
        make(validation_meta_path=meta)
