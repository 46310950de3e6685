import logging
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from buckets import Bucket
from progress import StepLog, StepSchedule
from test_flops import COGVIDEOX_5B
from throughput import Throughput


@pytest.mark.parametrize("batches_per_epoch", [1, 5, 8])
@pytest.mark.parametrize("accumulation", [1, 3, 4, 10])
def test_every_batch_of_every_epoch_belongs_to_one_step(batches_per_epoch, accumulation):
    schedule = StepSchedule(batches_per_epoch, accumulation)
    steps = range(3 * schedule.steps_per_epoch)
    bounds = [(schedule.batches_before(step), schedule.batches_before(step + 1)) for step in steps]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == 3 * batches_per_epoch
    assert all(end == start for (_, end), (start, _) in pairwise(bounds))
    assert all(1 <= end - start <= accumulation for start, end in bounds)


def test_no_step_mixes_two_epochs():
    schedule = StepSchedule(batches_per_epoch=5, accumulation=2)
    assert [schedule.batches_before(step) for step in range(7)] == [0, 2, 4, 5, 7, 9, 10]


def test_periods_count_in_steps_and_in_epochs():
    schedule = StepSchedule(batches_per_epoch=5, accumulation=2)
    assert [done for done in range(1, 13) if schedule.is_due(done, None, 2)] == [6, 12]
    assert [done for done in range(1, 13) if schedule.is_due(done, 5, None)] == [5, 10]
    assert [done for done in range(1, 13) if schedule.is_due(done, 5, 2)] == [5, 6, 10, 12]
    assert not any(schedule.is_due(done, None, None) for done in range(1, 13))


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
def test_every_step_is_logged_and_every_interval_says_how_fast_it_was(caplog):
    curves = Curves()
    accelerator = Accelerator(cpu=True, log_with=[curves])
    accelerator.init_trackers("run")
    throughput = Throughput(COGVIDEOX_5B, accelerator.device, 1, torch.float32, trains_all=False)
    log = StepLog(accelerator, first_step=10, total_steps=15, interval=2, throughput=throughput)
    rate = torch.tensor(0.5)  # torchao's optimizers change theirs in place
    with caplog.at_level(logging.INFO):
        for step in range(5):
            with throughput.phase("forward"):
                throughput.count(Bucket(49, 480, 720), samples=3)
            log.add(torch.tensor(float(step)), None if step == 4 else torch.tensor(2.0), rate)
            rate.add_(1.0)
        log.close()
    assert list(curves.logged) == [11, 12, 13, 14, 15]
    assert [values["loss"] for values in curves.logged.values()] == [0, 1, 2, 3, 4]
    assert [values["lr"] for values in curves.logged.values()] == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert [values.get("grad_norm") for values in curves.logged.values()] == [2, 2, 2, 2, None]
    fast = [step for step, values in curves.logged.items() if "throughput/samples_per_second" in values]
    assert fast == [12, 14, 15]
    first, _, last = log.speeds
    assert (first.samples, first.steps, last.samples, last.steps) == (6, 2, 3, 1)
    assert "speed, without the first steps: " in caplog.text
