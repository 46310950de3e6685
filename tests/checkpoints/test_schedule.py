"""Steps cover all batches, and a run resumed with another launch continues where the data was."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.schedule import ScheduleStart, StepSchedule
from data.buckets import Bucket
from data.sampler import BucketBatchSampler


def complete_epochs(batches_per_epoch: int, accumulation: int) -> StepSchedule:
    return StepSchedule(ScheduleStart(accumulation=accumulation), batches_per_epoch, batches_per_epoch)


@pytest.mark.parametrize("batches_per_epoch", [1, 5, 8])
@pytest.mark.parametrize("accumulation", [1, 3, 4, 10])
def test_every_batch_of_every_epoch_belongs_to_one_step(batches_per_epoch, accumulation):
    schedule = complete_epochs(batches_per_epoch, accumulation)
    steps = range(3 * schedule.steps_per_epoch)
    bounds = [(schedule.batches_before(step), schedule.batches_before(step + 1)) for step in steps]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == 3 * batches_per_epoch
    assert schedule.end_of_epochs(3) == len(bounds)
    assert all(end == start for (_, end), (start, _) in pairwise(bounds))
    assert all(1 <= end - start <= accumulation for start, end in bounds)


def test_no_step_mixes_two_epochs():
    schedule = complete_epochs(5, accumulation=2)
    assert [schedule.batches_before(step) for step in range(7)] == [0, 2, 4, 5, 7, 9, 10]


def test_periods_count_in_steps_and_in_epochs():
    schedule = complete_epochs(5, accumulation=2)
    assert [done for done in range(1, 13) if schedule.is_due(done, None, 2)] == [6, 12]
    assert [done for done in range(1, 13) if schedule.is_due(done, 5, None)] == [5, 10]
    assert [done for done in range(1, 13) if schedule.is_due(done, 5, 2)] == [5, 6, 10, 12]
    assert not any(schedule.is_due(done, None, None) for done in range(1, 13))


def test_after_a_restart_within_an_epoch_it_ends_with_its_batches():
    # 10 batches an epoch, of which 2 ranks see 4 in 2 steps; 6 remain for 3 ranks.
    before = StepSchedule(ScheduleStart(num_ranks=2), batches_per_epoch=5, batches_in_first_epoch=5)
    start = before.restart(step=2, num_ranks=3, accumulation=1)
    assert start == ScheduleStart(3, 1, step=2, epoch=0, seen_batches=4)
    schedule = StepSchedule(start, batches_per_epoch=4, batches_in_first_epoch=2)
    assert [schedule.batches_before(step) for step in range(2, 10)] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [done for done in range(3, 13) if schedule.is_due(done, None, 1)] == [4, 8, 12]
    assert schedule.end_of_epochs(2) == 8


def samplers(buckets, start: ScheduleStart) -> list[BucketBatchSampler]:
    return [
        BucketBatchSampler(
            buckets,
            2,
            seed=3,
            rank=rank,
            world_size=start.num_ranks,
            first_epoch=start.epoch,
            seen_batches=start.seen_batches,
        )
        for rank in range(start.num_ranks)
    ]


def schedule_of(sampler: BucketBatchSampler, start: ScheduleStart) -> StepSchedule:
    return StepSchedule(start, sampler.batches_per_epoch, sampler.batches_in_first_epoch)


def samples_of_steps(buckets, start: ScheduleStart, first: int, last: int) -> list[int]:
    """Return what all ranks draw from step `first` up to but not including `last`."""
    drawn = []
    for sampler in samplers(buckets, start):
        schedule = schedule_of(sampler, start)
        sampler.first_batch, sampler.total_batches = schedule.batches_before(first), schedule.batches_before(last)
        drawn += [draw.index for batch in sampler for draw in batch]
    return drawn


@given(
    st.integers(1, 40), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 30)
)
def test_an_epoch_continues_with_other_ranks_and_every_remaining_sample_comes_once(
    count, ranks, accumulation, ranks_after, accumulation_after, done
):
    buckets = [Bucket(17, 64, 96) if index % 3 else Bucket(17, 96, 64) for index in range(count)]
    before = ScheduleStart(ranks, accumulation)
    schedule = schedule_of(samplers(buckets, before)[0], before)
    done = done % schedule.steps_per_epoch
    seen = samples_of_steps(buckets, before, 0, done)
    after = schedule.restart(done, ranks_after, accumulation_after)
    rest_schedule = schedule_of(samplers(buckets, after)[0], after)
    rest = samples_of_steps(buckets, after, done, rest_schedule.end_of_epochs(1))
    assert set(seen) | set(rest) == set(range(count))
    # Except for padding: at most a batch of two for each rank but one.
    assert len(rest) <= count - len(set(seen)) + 2 * (ranks_after - 1)
    # The following epochs are complete.
    steps = rest_schedule.end_of_epochs(1), rest_schedule.end_of_epochs(2)
    assert set(samples_of_steps(buckets, after, *steps)) == set(range(count))


@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 40), st.integers(0, 6))
def test_the_samples_between_two_batches_are_those_of_all_ranks(count, ranks, first, length):
    buckets = [Bucket(17, 64, 96) if index % 3 else Bucket(17, 96, 64) for index in range(count)]
    of_ranks = samplers(buckets, ScheduleStart(ranks))
    drawn = 0
    for sampler in of_ranks:
        sampler.first_batch, sampler.total_batches = first, first + length
        drawn += sum(map(len, sampler))
    assert {sampler.samples_between(first, first + length) for sampler in of_ranks} == {(drawn, 0)}
