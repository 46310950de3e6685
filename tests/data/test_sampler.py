"""Batches are drawn as `data.sampler` documents: once per epoch or repeated, over any ranks, resumable."""

import itertools
import math
import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.buckets import Bucket
from data.sampler import BucketBatchSampler, Draw
from repository import TRAINING


SMALL, WIDE, LONG = Bucket(9, 32, 32), Bucket(9, 32, 64), Bucket(17, 32, 32)
samples = st.lists(st.sampled_from([SMALL, WIDE, LONG]), min_size=1, max_size=40)
some_repeats = st.one_of(st.integers(1, 4).map(float), st.sampled_from([0.05, 0.3, 0.5, 1.5, 2.25, 3.9]))
repeated_samples = st.lists(st.tuples(st.sampled_from([SMALL, WIDE, LONG]), some_repeats), min_size=1, max_size=30)
batch_sizes, worlds, seeds, shuffles = st.integers(1, 7), st.integers(1, 9), st.integers(0, 2**40), st.booleans()


def every_rank(buckets, batch_size, world_size, **options):
    return [
        BucketBatchSampler(buckets, batch_size, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


@given(repeated_samples, batch_sizes, worlds, seeds, shuffles, st.integers(0, 60), st.integers(0, 60))
def test_a_resumed_stream_is_the_rest_of_the_uninterrupted_one(samples, size, world, seed, shuffle, first, total):
    buckets, repeats = zip(*samples, strict=True)
    options = {"seed": seed, "shuffle": shuffle, "rank": world - 1, "world_size": world, "total_batches": total}
    options["repeats"] = repeats
    whole = BucketBatchSampler(buckets, size, **options)
    resumed = BucketBatchSampler(buckets, size, first_batch=first, **options)
    assert list(resumed) == list(whole)[first:]
    assert len(whole) == total
    assert len(resumed) == max(0, total - first)
    assert list(resumed) == list(resumed)  # iterating does not move it


@given(samples, batch_sizes, seeds, st.lists(st.tuples(worlds, st.integers(0, 12)), min_size=1, max_size=4), st.data())
def test_no_batch_of_an_epoch_is_missed_or_repeated_when_the_number_of_ranks_changes(buckets, size, seed, runs, data):
    """A run is stopped some steps into an epoch and continues on other ranks, several times."""
    epoch = data.draw(st.integers(0, 3))
    alone = BucketBatchSampler(buckets, size, seed=seed).epoch_batches(epoch)
    seen = []
    for world, steps in runs:
        ranks = every_rank(buckets, size, world, seed=seed, first_epoch=epoch, seen_batches=len(seen))
        left = max(0, len(alone) - len(seen))
        assert {len(sampler.epoch_batches(epoch)) for sampler in ranks} == {math.ceil(left / world)}
        taken = list(zip(*(sampler.epoch_batches(epoch)[:steps] for sampler in ranks), strict=True))
        seen += [batch for step in taken for batch in step]
    assert seen[: len(alone)] == alone[: len(seen)]
    assert len(seen) < len(alone) + max(world for world, _ in runs)


@given(samples, batch_sizes, worlds, worlds, seeds, st.integers(0, 50), st.integers(0, 30))
def test_a_run_on_other_ranks_continues_into_later_epochs(buckets, size, before, after, seed, steps, first):
    per_epoch = every_rank(buckets, size, before, seed=seed)[0].batches_per_epoch
    epoch, steps_of_epoch = divmod(steps, per_epoch)
    seen = steps_of_epoch * before
    options = {"seed": seed, "first_epoch": epoch, "seen_batches": seen, "total_batches": 30}

    alone, expected = BucketBatchSampler(buckets, size, seed=seed), []
    while len(expected) < 30 * after:
        whole = [[Draw(index, epoch) for index in batch] for batch in alone.epoch_batches(epoch)]
        rest = whole[seen:]
        expected += [*rest, *itertools.islice(itertools.cycle(whole), -len(rest) % after)]
        epoch, seen = epoch + 1, 0

    def stream(**more):
        ranks = every_rank(buckets, size, after, **options, **more)
        return [batch for step in zip(*ranks, strict=True) for batch in step]

    assert stream() == expected[: 30 * after]
    assert stream(first_batch=first) == expected[first * after : 30 * after]


@given(samples, batch_sizes, worlds, seeds)
def test_an_epoch_that_was_seen_with_its_padding_is_over(buckets, size, world, seed):
    seen = every_rank(buckets, size, world, seed=seed)[0].batches_per_epoch * world
    sampler = BucketBatchSampler(buckets, size, seed=seed, first_epoch=2, seen_batches=seen)
    assert sampler.epoch_batches(2) == []
    assert next(iter(sampler))[0].epoch == 3


@given(samples, batch_sizes, worlds, seeds)
def test_the_stream_goes_through_the_epochs(buckets, batch_size, world, seed):
    sampler = BucketBatchSampler(buckets, batch_size, seed=seed, world_size=world)
    stream = list(itertools.islice(sampler, 3 * sampler.batches_per_epoch))
    assert stream == [
        [Draw(index, epoch) for index in batch] for epoch in range(3) for batch in sampler.epoch_batches(epoch)
    ]


# Fixed values: every machine and Python version must find the same.
GOLDEN_SCRIPT = """
from data.buckets import Bucket
from data.sampler import BucketBatchSampler
a, b, c = Bucket(9, 32, 32), Bucket(9, 32, 64), Bucket(17, 32, 32)
samples, repeats = [a, b, c, a, a, b, a, c, b, a], [1, 1, 1, 0.4, 0.4, 1, 0.4, 1, 2.5, 1]
for sampler in BucketBatchSampler(samples, 2, seed=42), BucketBatchSampler(samples, 2, seed=42, repeats=repeats):
    print([sampler.epoch_batches(epoch) for epoch in (0, 1)])
"""
GOLDEN = """\
[[[3], [0, 4], [5], [7, 2], [6, 9], [1, 8]], [[7, 2], [8, 5], [3], [6, 4], [9, 0], [1]]]
[[[8, 1], [0], [8], [7, 2], [6, 9], [5, 8]], [[7, 2], [8, 1], [5, 8], [0], [4, 9], [8]]]
"""


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_the_order_is_the_same_everywhere(hash_seed):
    run = subprocess.run(
        [sys.executable, "-c", GOLDEN_SCRIPT],
        cwd=TRAINING,
        env={"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
    )
    assert run.stdout == GOLDEN


def test_the_order_depends_on_epoch_and_seed_only():
    buckets = [SMALL, WIDE] * 50

    def order(seed, epoch):
        random.seed(epoch)
        return str(BucketBatchSampler(buckets, 4, seed=seed).epoch_batches(epoch))

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert orders == [order(seed, epoch) for seed in range(3) for epoch in range(3)]


def test_buckets_are_mixed_over_the_epoch():
    sampler = BucketBatchSampler([SMALL] * 200 + [WIDE] * 200, 1, seed=0)
    first_half = [index for (index,) in sampler.epoch_batches(0)[:200]]
    assert 70 < sum(index < 200 for index in first_half) < 130


def test_without_shuffling_samples_come_in_order_and_none_is_lost():
    sampler = BucketBatchSampler([SMALL, WIDE, SMALL, SMALL, WIDE], 2, seed=0, shuffle=False)
    for epoch in range(2):
        assert sampler.epoch_batches(epoch) == [[0, 2], [3], [1, 4]]


def test_more_ranks_than_batches_repeat_batches_until_each_rank_has_one():
    ranks = every_rank([SMALL, WIDE], 4, 5, seed=0)
    assert ranks[0].padding == 3
    assert Counter(sampler.epoch_batches(0)[0][0] for sampler in ranks) in (
        Counter({0: 3, 1: 2}),
        Counter({1: 3, 0: 2}),
    )


# Repeats


@given(repeated_samples, batch_sizes, worlds, seeds, shuffles, st.integers(0, 5))
def test_an_epoch_has_every_sample_its_repeats_in_batches_of_one_bucket(samples, size, world, seed, shuffle, epoch):
    buckets, repeats = zip(*samples, strict=True)
    ranks = every_rank(buckets, size, world, seed=seed, shuffle=shuffle, repeats=repeats)
    plans = [sampler.epoch_batches(epoch) for sampler in ranks]
    assert {len(plan) for plan in plans} == {ranks[0].batches_per_epoch}
    in_order = [batch for step in zip(*plans, strict=True) for batch in step]
    own = in_order[: len(in_order) - ranks[0].padding]
    assert ranks[0].padding < world
    assert all(batch in own for batch in in_order[len(own) :])
    counts = Counter(itertools.chain(*own))
    assert all(math.floor(times) <= counts[index] <= math.ceil(times) for index, times in enumerate(repeats))
    of_bucket = Counter()
    for index, number in counts.items():
        of_bucket[buckets[index]] += number
    assert of_bucket == ranks[0].samples_per_epoch
    for bucket, total in of_bucket.items():
        sizes = sorted((len(batch) for batch in own if buckets[batch[0]] == bucket), reverse=True)
        assert sizes == [size] * (total // size) + [total % size] * bool(total % size)
    assert all(len({buckets[index] for index in batch}) == 1 for batch in own)


@given(st.integers(1, 40), st.integers(0, 3), st.integers(1, 9), batch_sizes, seeds, shuffles, st.integers(0, 6))
def test_samples_of_equal_repeats_take_turns(count, whole, tenths, size, seed, shuffle, first_epoch):
    sampler = BucketBatchSampler(
        [SMALL] * count, size, seed=seed, shuffle=shuffle, repeats=[whole + tenths / 10] * count
    )
    extra = max((2 * tenths * count + 10) // 20, int(whole == 0))  # tenths / 10 of them, halves up, exactly
    seen = Counter(dict.fromkeys(range(count), 0))
    for epoch in range(first_epoch, first_epoch + 10):
        seen.update(itertools.chain(*sampler.epoch_batches(epoch)))
        assert max(seen.values()) - min(seen.values()) <= 1
    assert sum(seen.values()) == 10 * (whole * count + extra)


@given(samples, batch_sizes, seeds, shuffles, st.integers(0, 5))
def test_once_each_is_the_same_with_and_without_repeats(buckets, size, seed, shuffle, epoch):
    without = BucketBatchSampler(buckets, size, seed=seed, shuffle=shuffle)
    once = BucketBatchSampler(buckets, size, seed=seed, shuffle=shuffle, repeats=[1.0] * len(buckets))
    assert without.epoch_batches(epoch) == once.epoch_batches(epoch)


@given(st.integers(1, 30), st.integers(1, 6), batch_sizes, seeds, shuffles)
def test_copies_of_a_sample_are_in_different_batches_if_there_are_enough_samples(count, times, size, seed, shuffle):
    sampler = BucketBatchSampler([SMALL] * count, size, seed=seed, shuffle=shuffle, repeats=[times] * count)
    if count >= 2 * size:
        assert all(len(set(batch)) == len(batch) for batch in sampler.epoch_batches(0))


def test_samples_that_come_often_share_batches_with_those_that_come_once():
    sampler = BucketBatchSampler([SMALL] * 500, 8, seed=0, repeats=[4.0] * 100 + [1.0] * 400)
    often = [sum(index < 100 for index in batch) for batch in sampler.epoch_batches(0)]
    assert len(often) == 100
    assert sum(0 < number < 8 for number in often) > 95


def test_without_shuffling_copies_come_in_further_rounds():
    sampler = BucketBatchSampler([SMALL] * 4, 2, seed=0, shuffle=False, repeats=[1, 2.5, 2.5, 1])
    assert sampler.epoch_batches(0) == [[0, 1], [2, 3], [1, 2], [1]]
    assert sampler.epoch_batches(1) == [[0, 1], [2, 3], [1, 2], [2]]


@pytest.mark.parametrize("times", [0, -1.0, math.nan, math.inf])
def test_repeats_must_be_above_zero(times):
    with pytest.raises(ValueError, match=f"repeats of sample 1 are {times}; they must be above 0"):
        BucketBatchSampler([SMALL] * 2, 1, seed=0, repeats=[1.0, times])


# Mistakes


def test_an_endless_stream_has_no_length():
    with pytest.raises(TypeError, match="endless"):
        len(BucketBatchSampler([SMALL], 1, seed=0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"buckets": []}, "no samples"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"first_batch": -1}, "first_batch is -1"),
        ({"first_epoch": -1}, "first_epoch is -1"),
        ({"seen_batches": -1}, "seen_batches is -1"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        BucketBatchSampler(**{"buckets": [SMALL], "batch_size": 1, "seed": 0, **wrong})
