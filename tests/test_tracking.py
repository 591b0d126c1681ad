"""What a training shows of itself: `metrics.jsonl`, trackers, and what to lower without memory."""

import json
import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate import tracking as accelerate_tracking
from accelerate.tracking import GeneralTracker
from accelerate.utils import ProjectConfiguration
from forked import Job

from rorem_lib.training import tracking


@dataclass
class Config:
    """What the tracker reads of a `LoopConfig`."""

    max_train_steps: int = 10
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    report_to: str = "none"
    meta_path: list = field(default_factory=lambda: ["a/meta.json", "b/meta.json"])
    gradient_checkpointing: bool | None = None
    seed: int = 4


class Clock:
    """Time that passes when the test says so."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tracking, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def no_peak(monkeypatch):
    monkeypatch.delenv("ROREM_PEAK_TFLOPS", raising=False)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def make_tracker(accelerator, folder, **changes):
    flops = changes.pop("flops_per_image", None)
    config = Config(**changes)
    batch_total = (
        config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    )
    return tracking.Tracker(accelerator, config, folder, batch_total, flops_per_image=flops)


def read_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def add(tracker, loss, **values):
    tracker.add({"loss": torch.tensor(loss), **{n: torch.tensor(v) for n, v in values.items()}})


def test_a_line_holds_the_means_of_its_window(accelerator, tmp_path, clock):
    tracker = make_tracker(accelerator, tmp_path, gradient_accumulation_steps=2)
    for loss, size in ((1.0, 3.0), (2.0, 5.0), (3.0, 7.0), (6.0, 9.0)):
        add(tracker, loss, size=size)
        clock.now += 1
    line = tracker.write(2, torch.tensor(0.123456), 5e-5)
    assert line == read_lines(tmp_path)[0]
    assert line.pop("memory_gb") > 0.01
    assert line == {
        "step": 2,
        "loss": 3.0,
        "size": 6.0,
        "lr": 5e-5,
        "grad_norm": 0.1235,
        "images_per_second": 4.0,
        "seconds_left": 16.0,
    }
    add(tracker, 8.0, size=1.0)  # the next window holds nothing of the last one
    clock.now += 2
    assert tracker.write(3, None, 5e-5)["loss"] == 8.0
    assert [line["step"] for line in read_lines(tmp_path)] == [2, 3]


def test_samples_that_are_absent_do_not_count(accelerator, tmp_path):
    tracker, nan = make_tracker(accelerator, tmp_path), math.nan
    add(tracker, 1.0, loss_t1=[1.0, nan, nan], loss_t2=[nan, 4.0, nan], loss_t3=[nan] * 3)
    add(tracker, 1.0, loss_t1=[2.0, 6.0, nan], loss_t2=[nan, nan, nan], loss_t3=[nan] * 3)
    line = tracker.write(1, None, 0.1)
    assert line["loss_t1"] == 3.0 and line["loss_t2"] == 4.0
    assert "loss_t3" not in line and "loss_t3" not in read_lines(tmp_path)[0]


def test_a_loss_that_is_no_number_ends_the_training_without_a_line(accelerator, tmp_path):
    tracker = make_tracker(accelerator, tmp_path)
    add(tracker, 1.0)
    add(tracker, math.nan)
    with pytest.raises(FloatingPointError, match="7:.*learning_rate"):
        tracker.write(7, None, 0.1)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "norm, shown",
    [
        (None, None),
        (torch.tensor(math.inf), None),
        (torch.tensor(math.nan), None),
        (torch.tensor(1.5), 1.5),
        (0.25, 0.25),
    ],
    ids=["unknown", "infinite", "nan", "tensor", "number"],
)
def test_a_norm_is_shown_where_it_is_known_and_finite(accelerator, tmp_path, norm, shown):
    tracker = make_tracker(accelerator, tmp_path)
    add(tracker, 1.0)
    assert tracker.write(1, norm, 0.1).get("grad_norm") == shown


def test_only_values_that_are_known_can_be_found_infinite():
    tracking.check_finite(None, "norm", 3)
    tracking.check_finite(torch.tensor(1.0), "norm", 3)
    with pytest.raises(FloatingPointError, match="the norm is inf at step 3"):
        tracking.check_finite(torch.tensor(math.inf), "norm", 3)


def test_excluded_time_does_not_count(accelerator, tmp_path, clock):
    tracker = make_tracker(accelerator, tmp_path)
    add(tracker, 1.0)
    clock.now += 2
    with tracker.excluded():
        clock.now += 500
    with pytest.raises(OSError), tracker.excluded():
        clock.now += 500
        raise OSError
    line = tracker.write(1, None, 0.1)
    assert line["images_per_second"] == 2.0 and line["seconds_left"] == 18.0
    add(tracker, 1.0)
    clock.now += 1
    assert tracker.write(2, None, 0.1)["images_per_second"] == 4.0


def test_mfu_is_shown_where_the_peak_is_known(accelerator, tmp_path, clock, monkeypatch):
    tracker = make_tracker(accelerator, tmp_path, flops_per_image=3e9)
    add(tracker, 1.0)
    assert "mfu" not in tracker.write(1, None, 0.1)
    monkeypatch.setenv("ROREM_PEAK_TFLOPS", "0.1")
    tracker = make_tracker(accelerator, tmp_path, flops_per_image=3e9)
    add(tracker, 1.0)
    add(tracker, 1.0)
    clock.now += 2
    # 8 samples of 3 GFLOP in 2 s of 100 GFLOP a second
    assert tracker.write(2, None, 0.1)["mfu"] == pytest.approx(24 / 200)
    tracker = make_tracker(accelerator, tmp_path)
    add(tracker, 1.0)
    assert "mfu" not in tracker.write(3, None, 0.1)


@pytest.mark.slow
def test_memory_is_the_peak_of_this_process(accelerator, tmp_path):
    tracker = make_tracker(accelerator, tmp_path)
    add(tracker, 1.0)
    before = tracker.write(1, None, 0.1)["memory_gb"]
    torch.ones(int((before + 0.2) * 1e9 / 4))  # resident for a moment
    add(tracker, 1.0)
    after = tracker.write(2, None, 0.1)["memory_gb"]
    assert before + 0.15 < after < 2 * before + 0.5


def test_a_window_without_steps_has_no_line(accelerator, tmp_path):
    assert make_tracker(accelerator, tmp_path).write(1, None, 0.1) is None
    assert not (tmp_path / "metrics.jsonl").exists()


def test_names_that_change_are_refused(accelerator, tmp_path):
    tracker = make_tracker(accelerator, tmp_path)
    add(tracker, 1.0, size=1.0)
    with pytest.raises(ValueError, match="logged loss after loss, size"):
        add(tracker, 1.0)


def test_nothing_is_read_and_no_graph_is_kept_between_lines(accelerator, tmp_path):
    tracker = make_tracker(accelerator, tmp_path)
    weight = torch.ones(2, requires_grad=True)
    tracker.add({"loss": weight.sum(), "each": weight * 2})
    assert not any(v.requires_grad for values in tracker.window.values() for v in values)
    remote = make_tracker(accelerator, tmp_path)
    remote.add({"loss": torch.empty((), device="meta")})  # has no value that could be read
    with pytest.raises(NotImplementedError):
        remote.write(1, None, 0.1)


def test_one_gather_serves_all_names(accelerator, tmp_path, monkeypatch):
    calls = []
    gather = accelerator.gather
    monkeypatch.setattr(accelerator, "gather", lambda x: calls.append(x.shape) or gather(x))
    tracker = make_tracker(accelerator, tmp_path)
    add(tracker, 1.0, size=2.0, loss_t1=[1.0, math.nan])
    tracker.write(1, None, 0.1)
    assert calls == [(1, 4, 2)]  # three names and the memory


LOSSES = [1.0, 2.0, 4.0, 9.0]
FIRST = [[1.0, math.nan], [math.nan, math.nan], [3.0, 5.0], [math.nan, 8.0]]


def write_lines(folder):
    """One of two processes, each with every second micro-batch."""
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    assert accelerator.num_processes == 2
    tracker = make_tracker(accelerator, folder)
    for number in range(rank, 4, 2):
        add(tracker, LOSSES[number], loss_t1=FIRST[number], loss_t2=[math.nan] * 2)
    line = tracker.write(2, torch.tensor(1.0), 0.1)
    (folder / f"line_{rank}.json").write_text(json.dumps(line))
    accelerator.end_training()


@pytest.mark.slow
def test_two_processes_write_the_line_that_one_writes(accelerator, tmp_path):
    two = tmp_path / "two"
    two.mkdir()
    job = Job(write_lines, two, processes=2, log=tmp_path / "job.log")
    assert job.wait() == 0, job.read_log()
    tracker = make_tracker(accelerator, tmp_path)
    for loss, values in zip(LOSSES, FIRST):
        add(tracker, loss, loss_t1=values, loss_t2=[math.nan] * 2)
    one = tracker.write(2, torch.tensor(1.0), 0.1)
    lines = read_lines(two)
    assert len(lines) == 1
    for line in [
        lines[0],
        *(json.loads((two / f"line_{rank}.json").read_text()) for rank in range(2)),
    ]:
        for name in ("step", "loss", "loss_t1", "lr", "grad_norm"):
            assert line[name] == one[name]
        assert line["memory_gb"] == lines[0]["memory_gb"]
    assert one["loss"] == 4.0 and one["loss_t1"] == 4.25
    assert lines[0].keys() == one.keys() and "loss_t2" not in one


def test_lines_after_the_last_checkpoint_and_a_torn_one_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracking.trim_lines(path, 5)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 2, "lo')
    tracking.trim_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


class Notes(GeneralTracker):
    """A tracker that keeps what it is given."""

    name = "notes"
    requires_logging_directory = False
    made = []

    def __init__(self, run_name, **options):
        super().__init__()
        self.run_name, self.settings, self.logged = run_name, None, []
        Notes.made.append(self)

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **options):
        self.logged.append((step, values))


@pytest.fixture
def notes(monkeypatch):
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "notes", Notes)
    monkeypatch.setattr(Notes, "made", [])
    return Notes.made


def test_trackers_get_settings_without_lists_and_every_line(notes, tmp_path):
    config = Config(report_to="notes")
    tracking.check_report_to("notes")
    accelerator = Accelerator(cpu=True, log_with="notes", project_dir=str(tmp_path))
    tracking.start_trackers(accelerator, config)
    tracker = tracking.Tracker(accelerator, config, tmp_path, 4)
    add(tracker, 1.0)
    line = tracker.write(3, None, 0.1)
    (made,) = notes
    assert made.settings == {
        "max_train_steps": 10,
        "train_batch_size": 4,
        "seed": 4,
        "gradient_accumulation_steps": 1,
        "report_to": "notes",
        "meta_path": "a/meta.json, b/meta.json",
        "gradient_checkpointing": "None",
    }
    ((step, logged),) = made.logged
    assert step == 3 and {"step": step, **logged} == line


def test_no_tracker_is_started_by_default(accelerator):
    tracking.check_report_to("none")
    tracking.start_trackers(accelerator, Config())
    assert accelerator.trackers == []


@pytest.mark.parametrize(
    "name, text",
    [
        ("wandb", r'report_to is wandb, which is not installed: run .* -e "\.\[trackers\]"'),
        ("all", r"\[trackers\]"),
        ("mlflow", "report_to is mlflow, which is not installed"),
        ("tensorboards", "report_to is 'tensorboards': take none, all or one of .*tensorboard,"),
        ("wandb,tensorboard", "take none"),
    ],
)
def test_trackers_that_cannot_start_are_refused(monkeypatch, name, text):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match=text):
        tracking.check_report_to(name)


def test_a_tracker_that_is_installed_passes(monkeypatch):
    monkeypatch.setattr(
        tracking, "get_available_trackers", lambda: [accelerate_tracking.LoggerType.WANDB]
    )
    tracking.check_report_to("wandb")
    tracking.check_report_to("all")


def test_tensorboard_takes_the_settings_and_the_lines(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracking.check_report_to("tensorboard")
    accelerator = Accelerator(
        cpu=True,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=tmp_path, logging_dir=tmp_path / "logs"),
    )
    config = Config(report_to="tensorboard")
    tracking.start_trackers(accelerator, config)
    tracker = tracking.Tracker(accelerator, config, tmp_path, 4)
    add(tracker, 0.5)
    tracker.write(3, None, 0.1)
    accelerator.end_training()
    found = events.EventAccumulator(str(tmp_path / "logs" / "rorem"))
    found.Reload()
    (event,) = found.Scalars("loss")
    assert (event.step, event.value) == (3, 0.5)


def make_options(**changes):
    given = {
        "train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "resolution": 512,
        "gradient_checkpointing": None,
        "use_8bit_adam": False,
        "lora_rank": 0,
    }
    return SimpleNamespace(**given | changes)


def describe(error=None, sizes=(), **changes):
    return tracking.describe_out_of_memory(
        error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        make_options(**changes),
        sizes,
    )


@pytest.fixture
def not_sharded(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)


def test_without_memory_every_way_that_is_not_taken_is_named(not_sharded):
    text = describe(sizes=[(512, 512), (768, 1344), (1008, 1008)])
    assert text.startswith("out of memory on the GPU at 1344 x 768 px with train_batch_size 16: ")
    for way in (
        "train_batch_size 8 with gradient_accumulation_steps 4",
        "gradient_checkpointing",
        "use_8bit_adam",
        "lora_rank",
        "deepspeed_zero2.yaml",
        "lower resolution",
    ):
        assert way in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"train_batch_size": 1}, "train_batch_size"),
        ({"lora_rank": 8}, "lora_rank"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"use_8bit_adam": True}, "use_8bit_adam"),
    ],
)
def test_ways_that_are_taken_are_not_named(not_sharded, changes, word):
    assert word in describe().partition(":")[2]
    assert word not in describe(**changes).partition(":")[2]


@pytest.mark.parametrize("name", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_a_sharded_training_is_not_told_to_shard(monkeypatch, not_sharded, name):
    monkeypatch.setenv(name, "true")
    assert "deepspeed" not in describe()


def test_a_config_without_the_options_is_not_told_of_them(not_sharded):
    config = SimpleNamespace(train_batch_size=3, gradient_accumulation_steps=1)
    text = tracking.describe_out_of_memory(MemoryError(), config)
    assert text == (
        "out of memory with train_batch_size 3: any of this lowers what is needed: "
        "train_batch_size 1 with gradient_accumulation_steps 3 (the training stays the "
        "same)"
    )
    config.train_batch_size = 1
    assert "nothing left to lower" in tracking.describe_out_of_memory(MemoryError(), config)


def test_sizes_come_from_the_resolutions_of_the_config(not_sharded):
    assert "512 x 512 px" in describe(high_resolution=1024, high_resolution_meta_path=[])
    assert "1024 x 1024 px" in describe(high_resolution=1024, high_resolution_meta_path=["a"])


def test_real_errors_of_both_allocators_are_known(not_sharded):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**52)
    text = describe(caught.value)
    assert text.startswith("out of memory at 512 x 512 px with train_batch_size 16: ")
    assert "8bit" not in text and "deepspeed" not in text  # they are for GPUs
    for message in (
        "CUDA out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "HIP out of memory",
    ):
        assert describe(RuntimeError(message)), message


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(28, "No space left"),
        ValueError("out of memory"),
        KeyError("DefaultCPUAllocator"),
    ],
)
def test_other_errors_stay_what_they_are(error):
    assert describe(error) is None


def test_the_peak_is_looked_up_once_for_the_device(accelerator, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(tracking, "get_peak_flops", lambda device: asked.append(device) or 1e9)
    tracker = make_tracker(accelerator, tmp_path, flops_per_image=1.0)
    for step in (1, 2):
        add(tracker, 1.0)
        assert "mfu" in tracker.write(step, None, 0.1)
    assert asked == [torch.device("cpu")]
