"""The loss of held-out clips is measured regularly, at a bounded share of the run's work."""

from collections import Counter

import pytest

from planning.held_out import SHARE
from validation.schedule import balanced_pairs, schedule_losses, share_pairs


@pytest.mark.parametrize("num_ranks", [1, 3, 8])
@pytest.mark.parametrize("num_clips", [1, 3, 8])
@pytest.mark.parametrize("total_steps", [2, 137, 1000, 50_000])
@pytest.mark.parametrize("most_passes", [6, 30, 95, 400, 1e6])
def test_the_share_stays_below_its_limit_whatever_the_run(total_steps, most_passes, num_clips, num_ranks):
    losses = schedule_losses(num_clips, most_passes, total_steps, num_ranks=num_ranks)
    measured = [step for step in range(total_steps + 1) if losses.is_due(step, total_steps)]
    assert (measured[0], measured[-1]) == (0, total_steps)
    assert losses.count == len(measured) <= 21
    passes = max(sum(map(len, share_pairs(losses.pairs, rank, num_ranks).values())) for rank in range(num_ranks))
    assert losses.share == pytest.approx(SHARE * len(measured) * passes / most_passes)
    assert losses.share <= SHARE


@pytest.mark.parametrize(
    ("most_passes", "passes", "every"),
    [
        (6, 3, 1000),  # only before and after
        (30, 3, 120),
        (54, 9, 200),  # all noise levels of one clip, six times
        (197, 9, 50),  # twenty-one times
        (198, 18, 100),  # of two clips, eleven times
        (10_000, 72, 50),  # of all, as often as is useful
    ],
)
def test_a_longer_run_measures_more_often_and_more_clips(most_passes, passes, every):
    losses = schedule_losses(8, most_passes, 1000)
    assert (len(losses.pairs), losses.every) == (passes, every)


def test_a_run_that_affords_nothing_is_measured_twice_and_says_what_it_costs():
    losses = schedule_losses(2, most_passes=2, total_steps=10)
    assert (len(losses.pairs), losses.count, losses.every) == (3, 2, 10)
    assert losses.share == pytest.approx(SHARE * 6 / 2)


def test_a_resumed_run_measures_what_it_measured_before():
    before = schedule_losses(8, 54, 1000)
    longer = schedule_losses(8, 54 * 100, 100_000, num_passes=len(before.pairs))
    assert longer.pairs == before.pairs


@pytest.mark.parametrize("num_clips", range(1, 9))
def test_every_nine_passes_have_all_noise_levels_of_many_clips(num_clips):
    pairs = balanced_pairs(num_clips)
    assert len(set(pairs)) == len(pairs) == 9 * num_clips
    for start in range(0, len(pairs), 9):
        clips, quantiles = zip(*pairs[start : start + 9], strict=True)
        assert sorted(quantiles) == list(range(9))
        counts = Counter(clips)
        assert len(counts) == num_clips
        assert max(counts.values()) - min(counts.values()) <= 1
    assert sorted(quantile // 3 for _, quantile in pairs[:3]) == [0, 1, 2]  # few, middle and much noise
