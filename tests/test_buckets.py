"""Buckets are chosen, and batches drawn from them, as `buckets` promises."""

import itertools
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import buckets as buckets_module
from buckets import Bucket, BucketBatchSampler, Draw, assign_bucket, make_buckets


SMALL, WIDE, LONG = Bucket(9, 32, 32), Bucket(9, 32, 64), Bucket(17, 32, 32)


# Making


def test_buckets_are_every_combination_sorted_without_repeats():
    assert make_buckets([17, 9, 9], [48, 32], [64], max_num_frames=17) == [
        Bucket(9, 32, 64),
        Bucket(9, 48, 64),
        Bucket(17, 32, 64),
        Bucket(17, 48, 64),
    ]


def test_buckets_with_too_many_frames_are_left_out():
    assert make_buckets([9, 17, 33], [32], [32], max_num_frames=17) == [Bucket(9, 32, 32), Bucket(17, 32, 32)]


def test_no_bucket_left_is_an_error():
    with pytest.raises(ValueError, match="no bucket has at most 16 frames; the smallest has 17"):
        make_buckets([17, 33], [32], [32], max_num_frames=16)


def test_a_bucket_prints_as_frames_height_width():
    assert str(Bucket(49, 480, 720)) == "49x480x720"


# Assigning


def test_the_longest_bucket_that_fits_wins_and_none_when_none_fits():
    buckets = make_buckets([9, 17, 33], [32], [32], 33)
    assert [assign_bucket(frames, 32, 32, buckets) for frames in (8, 9, 16, 17, 1000)] == [
        None,
        Bucket(9, 32, 32),
        Bucket(9, 32, 32),
        Bucket(17, 32, 32),
        Bucket(33, 32, 32),
    ]


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (720, 1280, (720, 1280)),
        (1080, 1920, (720, 1280)),  # the same ratio exactly, the rest is downscaling
        (1280, 720, (1280, 720)),
        (400, 720, (320, 576)),  # the same ratio exactly; 384x720 is off by 4%
        (272, 640, (256, 576)),  # 480x1024 is nearer in ratio, but would be upscaled
        (144, 176, (320, 384)),  # all are larger: nearest ratio
        (480, 720, (480, 720)),
    ],
)
def test_sizes_go_by_ratio_without_upscaling(height, width, expected):
    sides = [256, 320, 384, 480, 512, 576, 720, 768, 960, 1024, 1280, 1536]
    assert assign_bucket(49, height, width, make_buckets([49], sides, sides, 49))[1:] == expected


def test_equal_ratios_go_by_area_and_equal_areas_by_height():
    assert assign_bucket(9, 500, 750, make_buckets([9], [320, 480], [480, 720], 9))[1:] == (480, 720)
    tall, wide = Bucket(9, 64, 32), Bucket(9, 32, 64)
    for order in ([tall, wide], [wide, tall]):
        assert assign_bucket(9, 48, 48, order) == wide  # both as far in ratio and in area


sides = st.integers(1, 40).map(lambda n: 16 * n)
bucket_lists = st.lists(st.builds(Bucket, st.sampled_from([1, 9, 17, 49]), sides, sides), min_size=1, max_size=12)


@given(st.integers(0, 60), sides, sides, bucket_lists, st.randoms())
def test_the_bucket_is_one_of_the_best_in_any_order(frames, height, width, buckets, rng):
    chosen = assign_bucket(frames, height, width, buckets)
    fitting = [bucket for bucket in buckets if bucket.num_frames <= frames]
    if not fitting:
        assert chosen is None
        return
    longest = [b for b in fitting if b.num_frames == max(bucket.num_frames for bucket in fitting)]
    downscaling = [b for b in longest if b.height <= height and b.width <= width]
    assert chosen in (downscaling or longest)
    distance = {b: abs(math.log(b.width / b.height) - math.log(width / height)) for b in downscaling or longest}
    assert distance[chosen] <= min(distance.values()) + 1e-8
    assert assign_bucket(frames, height, width, rng.sample(buckets, len(buckets))) == chosen


# Sampling

samples = st.lists(st.sampled_from([SMALL, WIDE, LONG]), min_size=1, max_size=40)
batch_sizes, worlds, seeds, shuffles = st.integers(1, 7), st.integers(1, 9), st.integers(0, 2**40), st.booleans()


def every_rank(buckets, batch_size, world_size, **options):
    return [
        BucketBatchSampler(buckets, batch_size, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


@given(samples, batch_sizes, worlds, seeds, shuffles, st.integers(0, 5))
def test_an_epoch_has_every_sample_once_in_batches_of_one_bucket(buckets, batch_size, world, seed, shuffle, epoch):
    ranks = every_rank(buckets, batch_size, world, seed=seed, shuffle=shuffle)
    plans = [sampler.epoch_batches(epoch) for sampler in ranks]
    assert {len(plan) for plan in plans} == {ranks[0].batches_per_epoch}
    in_order = [tuple(plan[step]) for step in range(ranks[0].batches_per_epoch) for plan in plans]
    own, repeated = in_order[: len(in_order) - ranks[0].padding], in_order[len(in_order) - ranks[0].padding :]
    assert sorted(itertools.chain(*own)) == list(range(len(buckets)))
    assert set(repeated) <= set(own)
    assert ranks[0].padding < world
    for batch in own:
        assert len({buckets[index] for index in batch}) == 1
        assert 1 <= len(batch) <= batch_size
    partial = Counter(buckets[batch[0]] for batch in own if len(batch) < batch_size)
    assert all(count == 1 for count in partial.values())


@given(samples, batch_sizes, worlds, seeds, shuffles, st.integers(0, 60), st.integers(0, 60))
def test_a_resumed_stream_is_the_rest_of_the_uninterrupted_one(buckets, size, world, seed, shuffle, first, total):
    options = {"seed": seed, "shuffle": shuffle, "rank": world - 1, "world_size": world, "total_batches": total}
    whole = BucketBatchSampler(buckets, size, **options)
    resumed = BucketBatchSampler(buckets, size, first_batch=first, **options)
    assert list(resumed) == list(whole)[first:]
    assert len(whole) == total
    assert len(resumed) == max(0, total - first)
    assert list(resumed) == list(resumed)  # iterating does not move it


@given(samples, batch_sizes, seeds, st.integers(0, 30))
def test_a_run_resumed_on_another_number_of_ranks_misses_and_repeats_nothing(buckets, size, seed, steps):
    def taken(world_size, first, total):
        ranks = every_rank(buckets, size, world_size, seed=seed, first_batch=first, total_batches=total)
        return [batch for step in zip(*ranks, strict=True) for batch in step]

    if every_rank(buckets, size, 2, seed=seed)[0].padding:
        return  # an odd number of batches: the epochs end at different steps
    alone = taken(1, 0, 2 * steps)
    assert taken(2, 0, steps) == alone
    assert taken(2, 0, steps // 2) + taken(1, 2 * (steps // 2), 2 * steps) == alone


@given(samples, batch_sizes, worlds, seeds)
def test_the_stream_goes_through_the_epochs(buckets, batch_size, world, seed):
    sampler = BucketBatchSampler(buckets, batch_size, seed=seed, world_size=world)
    stream = list(itertools.islice(sampler, 3 * sampler.batches_per_epoch))
    assert stream == [
        [Draw(index, epoch) for index in batch] for epoch in range(3) for batch in sampler.epoch_batches(epoch)
    ]


GOLDEN = [[[3], [0, 4], [5], [7, 2], [6, 9], [1, 8]], [[7, 2], [8, 5], [3], [6, 4], [9, 0], [1]]]


def test_the_order_is_the_same_everywhere():
    """Written down once; another machine or Python must find the same."""
    buckets = [SMALL, WIDE, LONG, SMALL, SMALL, WIDE, SMALL, LONG, WIDE, SMALL]
    sampler = BucketBatchSampler(buckets, 2, seed=42)
    assert [sampler.epoch_batches(epoch) for epoch in (0, 1)] == GOLDEN
    script = (
        "from buckets import *; a, b, c = Bucket(9, 32, 32), Bucket(9, 32, 64), Bucket(17, 32, 32);"
        "s = BucketBatchSampler([a, b, c, a, a, b, a, c, b, a], 2, seed=42);"
        "print([s.epoch_batches(e) for e in (0, 1)])"
    )
    where = Path(buckets_module.__file__).parent
    for hash_seed in ("0", "1"):
        run = subprocess.run(
            [sys.executable, "-c", script],
            cwd=where,
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
        )
        assert run.stdout.strip() == str(GOLDEN)


def test_epochs_and_seeds_differ_and_other_random_numbers_do_not_matter():
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
    ],
)
def test_numbers_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        BucketBatchSampler(**{"buckets": [SMALL], "batch_size": 1, "seed": 0, **wrong})


@settings(deadline=None, max_examples=1)
@given(st.just(100_000))
def test_a_hundred_thousand_samples_are_planned_in_a_moment(count):
    sampler = BucketBatchSampler([SMALL, WIDE, LONG, SMALL] * (count // 4), 4, seed=0)
    assert sum(map(len, sampler.epoch_batches(0))) == count
