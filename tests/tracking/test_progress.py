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
from tracking.progress import StepLog, in_words
from tracking.throughput import Throughput


class Curves(GeneralTracker):
    """Keeps what is logged."""

    name = "curves"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict) -> None:
        pass

    def log(self, values: dict, step: int, **options) -> None:
        self.logged[step] = values


@pytest.mark.usefixtures("fresh_accelerator")
def test_every_step_is_logged_and_every_interval_says_how_fast_it_was(tmp_path, caplog):
    curves = Curves()
    accelerator = Accelerator(cpu=True, log_with=[curves])
    accelerator.init_trackers("run")
    throughput = Throughput(COGVIDEOX_5B, accelerator.device, 1, torch.float32, trains_all=False)
    guard = StepGuard(Coordinator(), 3, tmp_path)
    log = StepLog(accelerator, first_step=10, total_steps=15, interval=2, throughput=throughput, guard=guard)
    rate = torch.tensor(0.5)  # torchao's optimizers change theirs in place
    with caplog.at_level(logging.INFO):
        for step in range(5):
            with throughput.phase("forward"):
                throughput.count(Bucket(49, 480, 720), samples=3)
            log.add(torch.tensor(float(step)), None if step == 4 else torch.tensor(2.0), rate)
            rate.add_(1.0)
        log.finish()
    assert list(curves.logged) == [11, 12, 13, 14, 15]
    assert [values["loss"] for values in curves.logged.values()] == [0, 1, 2, 3, 4]
    assert [values["lr"] for values in curves.logged.values()] == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert [values.get("grad_norm") for values in curves.logged.values()] == [2, 2, 2, 2, None]
    fast = [step for step, values in curves.logged.items() if "throughput/samples_per_second" in values]
    assert fast == [12, 14, 15]
    first, _, last = log.speeds
    assert (first.samples, first.steps, last.samples, last.steps) == (6, 2, 3, 1)
    assert "speed, without the first steps: " in caplog.text


@pytest.mark.usefixtures("fresh_accelerator")
def test_after_ten_steps_it_says_once_how_long_the_rest_takes(tmp_path, caplog):
    accelerator = Accelerator(cpu=True)
    throughput = Throughput(COGVIDEOX_5B, accelerator.device, 1, torch.float32, trains_all=False)
    guard = StepGuard(Coordinator(), 3, tmp_path)
    log = StepLog(accelerator, first_step=20, total_steps=50, interval=4, throughput=throughput, guard=guard)
    with caplog.at_level(logging.INFO):
        for step in range(30):
            with throughput.phase("forward"):
                throughput.count(Bucket(49, 480, 720), samples=3)
            log.add(torch.tensor(1.0), torch.tensor(2.0), 0.5)
            said = [record.getMessage() for record in caplog.records if " left: " in record.getMessage()]
            assert len(said) == (step >= 11)  # the third interval of four steps
        log.finish()
    assert re.fullmatch(r"about 0 s left: 18 steps of \d\S* s; validation and checkpoints come on top", said[0])


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59, "59 s"), (130, "2 min"), (5990, "1 h 40 min"), (7800, "2 h 10 min"), (273600, "3 d 4 h")],
)
def test_durations_are_said_as_people_say_them(seconds, words):
    assert in_words(seconds) == words
