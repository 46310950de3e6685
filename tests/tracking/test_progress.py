import logging
import re

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from data.buckets import Bucket
from forward_pass import COGVIDEOX_5B
from parallel.coordinator import Coordinator
from tracking.bad_steps import StepGuard
from tracking.peak_memory import PeakMemory
from tracking.progress import KeptPart, StepLog, in_words
from tracking.throughput import Throughput


class Curves(GeneralTracker):
    name = "curves"
    requires_logging_directory = False
    tracker = None

    def __init__(self):
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}

    def log(self, values: dict, step: int, **options) -> None:
        self.logged[step] = values


@pytest.fixture
def make_log(fresh_accelerator, tmp_path, caplog):
    caplog.set_level(logging.INFO)

    def make_log(first_step: int, total_steps: int, interval: int) -> StepLog:
        accelerator = Accelerator(cpu=True)
        throughput = Throughput(COGVIDEOX_5B, accelerator.device, 1, torch.float32, trains_all=False)
        guard = StepGuard(Coordinator(), 3, tmp_path)
        memory = PeakMemory(accelerator.device)
        return StepLog(accelerator, first_step, total_steps, interval, throughput, memory, guard)

    return make_log


def do_step(log: StepLog, loss: float, grad_norm: float | None, rate: torch.Tensor | float) -> None:
    with log.throughput.phase("forward"):
        log.throughput.count(Bucket(49, 480, 720), samples=3)
    log.add(torch.tensor(loss), None if grad_norm is None else torch.tensor(grad_norm), rate)


def test_every_step_is_logged_and_every_interval_has_a_speed(make_log, caplog):
    log, curves = make_log(first_step=10, total_steps=15, interval=2), Curves()
    log.accelerator.trackers = [curves]
    rate = torch.tensor(0.5)  # torchao's optimizers change theirs in place
    for step in range(5):
        do_step(log, float(step), None if step == 4 else 2.0, rate)
        rate.add_(1.0)
    log.finish()
    assert list(curves.logged) == [11, 12, 13, 14, 15]
    assert [values["loss"] for values in curves.logged.values()] == [0, 1, 2, 3, 4]
    assert [values["lr"] for values in curves.logged.values()] == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert [values.get("grad_norm") for values in curves.logged.values()] == [2, 2, 2, 2, None]
    fast = [step for step, values in curves.logged.items() if "throughput/samples_per_second" in values]
    assert fast == [12, 14, 15]
    assert [step for step, values in curves.logged.items() if values.get("memory/peak_host_gb", 0) > 0] == fast
    first, _, last = log.speeds
    assert (first.samples, first.steps, last.samples, last.steps) == (6, 2, 3, 1)
    assert "speed, without the first steps: " in caplog.text


def test_the_time_left_is_logged_once_after_ten_steps(make_log, caplog):
    log = make_log(first_step=20, total_steps=50, interval=4)
    for step in range(30):
        do_step(log, 1.0, 2.0, 0.5)
        said = [message for message in caplog.messages if " left: " in message]
        assert len(said) == (step >= 11)  # the third interval of four steps
    log.finish()
    words = r"about 0 s left: 18 steps of \d\S* s \(.* samples/s, .*\); validation and checkpoints come on top"
    assert re.fullmatch(words, said[0])


def test_the_bar_fits_120_columns_and_a_resumed_one_counts_only_its_own_steps(make_log):
    log = make_log(first_step=10_000, total_steps=30_000, interval=1)
    do_step(log, 12.3456, 123.456, 0.000123)
    shown = log.bar.format_dict | {"n": 10_010, "elapsed": 300.0, "rate": None, "ncols": None}
    line = log.bar.format_meter(**shown)
    assert "<166:35:00, 30.00s/ steps, loss=12.3456, lr=1.23e-04, grad_norm=123.456]" in line
    assert len(line) <= 120


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59, "59 s"), (130, "2 min"), (5990, "1 h 40 min"), (7800, "2 h 10 min"), (273600, "3 d 4 h")],
)
def test_durations_are_formatted_for_people(seconds, words):
    assert in_words(seconds) == words


def test_the_loss_of_regularization_is_logged_apart_and_without_its_weight(make_log):
    """Two samples of each kind of losses 1 and 3, and steps of one kind, with a weight of 0.5."""
    log, curves = make_log(first_step=0, total_steps=3, interval=3), Curves()
    log.accelerator.trackers = [curves]
    with log.throughput.phase("forward"):
        log.throughput.count(Bucket(49, 480, 720), samples=3)
    for total, apart, share in ((1.25, 0.75, 0.5), (1.5, 1.5, 1.0), (1.0, 0.0, 0.0)):
        log.add(torch.tensor(total), torch.tensor(1.0), 0.1, kept=KeptPart(torch.tensor(apart), share, 0.5))
    losses = [{name: values[name] for name in values if name.endswith("loss")} for values in curves.logged.values()]
    assert losses == [{"loss": 1.0, "regularization_loss": 3.0}, {"regularization_loss": 3.0}, {"loss": 1.0}]
    assert "loss=1.0000, regularization_loss=3.0000, lr" in log.bar.postfix
    assert log.losses == [1.0, 1.0]
