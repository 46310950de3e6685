from itertools import pairwise

import pytest

from progress import StepSchedule


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
