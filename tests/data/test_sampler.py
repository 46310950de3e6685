"""Batches are drawn as `data.sampler` documents: once per epoch or repeated, over any ranks, resumable."""

import itertools
import math
import random
import subprocess
import sys
from collections import Counter, defaultdict, deque
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.buckets import Bucket, BucketColumn
from data.sampler import BucketBatchSampler, Draw
from repository import TRAINING


SMALL, WIDE, LONG = Bucket(9, 32, 32), Bucket(9, 32, 64), Bucket(17, 32, 32)
samples = st.lists(st.sampled_from([SMALL, WIDE, LONG]), min_size=1, max_size=40)
some_repeats = st.one_of(st.integers(1, 4).map(float), st.sampled_from([0.05, 0.3, 0.5, 1.5, 2.25, 3.9]))
repeated_samples = st.lists(st.tuples(st.sampled_from([SMALL, WIDE, LONG]), some_repeats), min_size=1, max_size=30)
batch_sizes, worlds, seeds = st.integers(1, 7), st.integers(1, 9), st.integers(0, 2**40)


def stream(sampler, first, total):
    """The batches of a rank from one of its numbers up to another."""
    sampler.first_batch, sampler.total_batches = first, total
    return list(sampler)


def indices(sampler, epoch):
    end = sampler.batches_in_first_epoch + (epoch - sampler.first_epoch) * sampler.batches_per_epoch
    start = 0 if epoch == sampler.first_epoch else end - sampler.batches_per_epoch
    return [[draw.index for draw in batch] for batch in stream(sampler, start, end)]


def every_rank(buckets, batch_size, world_size, **options):
    options["world_size"] = world_size
    return [BucketBatchSampler(buckets, batch_size, rank=rank, **options) for rank in range(world_size)]


@given(repeated_samples, batch_sizes, worlds, seeds, st.integers(0, 60), st.integers(0, 60))
def test_a_resumed_stream_is_the_rest_of_the_uninterrupted_one(samples, size, world, seed, first, total):
    buckets, repeats = zip(*samples, strict=True)
    options = {"seed": seed, "rank": world - 1, "world_size": world, "repeats": repeats}
    full = stream(BucketBatchSampler(buckets, size, **options), 0, total)
    resumed = BucketBatchSampler(buckets, size, **options)
    assert stream(resumed, first, total) == full[first:]
    assert list(resumed) == full[first:]  # iterating does not move it


@given(samples, batch_sizes, seeds, st.lists(st.tuples(worlds, st.integers(0, 12)), min_size=1, max_size=4), st.data())
def test_no_batch_of_an_epoch_is_missed_or_repeated_when_the_number_of_ranks_changes(buckets, size, seed, runs, data):
    """A run is stopped some steps into an epoch and continues on other ranks, several times."""
    epoch = data.draw(st.integers(0, 3))
    alone = indices(BucketBatchSampler(buckets, size, seed=seed), epoch)
    seen = []
    for world, steps in runs:
        ranks = every_rank(buckets, size, world, seed=seed, first_epoch=epoch, seen_batches=len(seen))
        left = max(0, len(alone) - len(seen))
        assert {len(indices(sampler, epoch)) for sampler in ranks} == {math.ceil(left / world)}
        taken = list(zip(*(indices(sampler, epoch)[:steps] for sampler in ranks), strict=True))
        seen += [batch for step in taken for batch in step]
    assert seen[: len(alone)] == alone[: len(seen)]
    assert len(seen) < len(alone) + max(world for world, _ in runs)


@given(samples, batch_sizes, worlds, worlds, seeds, st.integers(0, 50), st.integers(0, 30))
def test_a_run_on_other_ranks_continues_into_later_epochs(buckets, size, before, after, seed, steps, first):
    per_epoch = every_rank(buckets, size, before, seed=seed)[0].batches_per_epoch
    epoch, steps_of_epoch = divmod(steps, per_epoch)
    seen = steps_of_epoch * before
    ranks = every_rank(buckets, size, after, seed=seed, first_epoch=epoch, seen_batches=seen)

    alone, expected = BucketBatchSampler(buckets, size, seed=seed), []
    while len(expected) < 30 * after:
        complete = [[Draw(index, epoch) for index in batch] for batch in indices(alone, epoch)]
        rest = complete[seen:]
        expected += [*rest, *itertools.islice(itertools.cycle(complete), -len(rest) % after)]
        epoch, seen = epoch + 1, 0

    for start in (0, first):
        steps = zip(*(stream(sampler, start, 30) for sampler in ranks), strict=True)
        assert list(itertools.chain(*steps)) == expected[start * after : 30 * after]


@given(samples, batch_sizes, worlds, seeds)
def test_an_epoch_that_was_seen_with_its_padding_is_over(buckets, size, world, seed):
    seen = every_rank(buckets, size, world, seed=seed)[0].batches_per_epoch * world
    sampler = BucketBatchSampler(buckets, size, seed=seed, first_epoch=2, seen_batches=seen)
    assert indices(sampler, 2) == []
    assert stream(sampler, 0, 1)[0][0].epoch == 3


def slowly_ordered(buckets, repeats, batch_size, seed, epoch):
    """The batches of an epoch, sample by sample: the order that runs of earlier versions resume."""

    def shuffled(items, rng):
        return sorted(items, key=lambda _: rng.random())

    members = defaultdict(list)
    for index, key in enumerate(zip(buckets, repeats, strict=True)):
        members[key].append(index)
    turns, rng, places = random.Random(f"{seed}-turns"), random.Random(f"{seed}-{epoch}"), defaultdict(list)
    for (bucket, times), group in sorted(members.items()):
        whole, fraction = divmod(Fraction(times).limit_denominator(10_000), 1)
        extra = max(math.floor(fraction * len(group) + Fraction(1, 2)), int(whole == 0))
        for position, index in enumerate(shuffled(group, turns) if extra else group):
            count = whole + ((position - epoch * extra) % len(group) < extra)
            places[bucket] += [((copy + rng.random()) / count, index) for copy in range(count)]
    batches = []
    for bucket in sorted(places):
        waiting = deque(index for _, index in sorted(places[bucket]))
        while waiting:
            batch, copies = [], []
            while waiting and len(batch) < batch_size and len(copies) < batch_size:
                index = waiting.popleft()
                (copies if index in batch else batch).append(index)
            room = batch_size - len(batch)
            batches.append(batch + copies[:room])
            waiting.extendleft(reversed(copies[room:]))
    seen, draws = Counter(), []
    for batch in shuffled(batches, rng):
        draws.append([])
        for index in batch:
            draws[-1].append(Draw(index, epoch, seen[index]))
            seen[index] += 1
    return draws


@given(repeated_samples, batch_sizes, worlds, seeds, st.integers(0, 3), st.integers(0, 40))
def test_runs_of_earlier_versions_continue_in_their_order(samples, size, world, seed, epoch, seen):
    buckets, repeats = zip(*samples, strict=True)
    options = {"seed": seed, "repeats": np.array(repeats), "first_epoch": epoch, "seen_batches": seen}
    ranks = every_rank(BucketColumn.of(buckets), size, world, **options)
    expected = []
    for number in range(epoch, epoch + 3):
        draws = slowly_ordered(buckets, repeats, size, seed, number)
        rest = draws[seen:] if number == epoch else draws
        expected += [*rest, *itertools.islice(itertools.cycle(draws), -len(rest) % world)]
    steps = zip(*(stream(sampler, 0, len(expected) // world) for sampler in ranks), strict=True)
    assert list(itertools.chain(*steps)) == expected


@pytest.mark.parametrize("size", [1, 4, 16])
def test_the_order_of_many_samples_is_that_of_earlier_versions(size):
    """Copies meet in few of the batches."""
    rng = random.Random(0)
    buckets = rng.choices([SMALL, WIDE, LONG], [5, 2, 1], k=3000)
    repeats = rng.choices([0.25, 1.0, 2.5, 7.0], k=3000)
    sampler = BucketBatchSampler(buckets, size, seed=1, repeats=repeats)
    sampler.total_batches = 2 * sampler.batches_per_epoch
    expected = [slowly_ordered(buckets, repeats, size, 1, epoch) for epoch in (0, 1)]
    assert list(sampler) == [*expected[0], *expected[1]]


# Fixed values: every machine and Python version must find the same.
GOLDEN_SCRIPT = """
from data.buckets import Bucket, BucketColumn
from data.sampler import BucketBatchSampler
a, b, c = Bucket(9, 32, 32), Bucket(9, 32, 64), Bucket(17, 32, 32)
samples, repeats = [a, b, c, a, a, b, a, c, b, a], [1, 1, 1, 0.4, 0.4, 1, 0.4, 1, 2.5, 1]
for sampler in BucketBatchSampler(samples, 2, seed=42), BucketBatchSampler(samples, 2, seed=42, repeats=repeats):
    sampler.total_batches = 2 * sampler.batches_per_epoch
    print([[draw.index for draw in batch] for batch in sampler])
"""
GOLDEN = """\
[[3], [0, 4], [5], [7, 2], [6, 9], [1, 8], [7, 2], [8, 5], [3], [6, 4], [9, 0], [1]]
[[8, 1], [0], [8], [7, 2], [6, 9], [5, 8], [7, 2], [8, 1], [5, 8], [0], [4, 9], [8]]
"""


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_the_order_is_the_same_everywhere(hash_seed):
    command, environment = [sys.executable, "-c", GOLDEN_SCRIPT], {"PYTHONHASHSEED": hash_seed}
    run = subprocess.run(command, cwd=TRAINING, env=environment, capture_output=True, text=True)
    assert run.stdout == GOLDEN


def test_the_order_depends_on_epoch_and_seed_only():
    buckets = [SMALL, WIDE] * 50

    def order(seed, epoch):
        random.seed(epoch)
        return str(indices(BucketBatchSampler(buckets, 4, seed=seed), epoch))

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert orders == [order(seed, epoch) for seed in range(3) for epoch in range(3)]


def test_more_ranks_than_batches_repeat_batches_until_each_rank_has_one():
    ranks = every_rank([SMALL, WIDE], 4, 5, seed=0)
    assert ranks[0].padding == 3
    assert sorted(Counter(indices(sampler, 0)[0][0] for sampler in ranks).values()) == [2, 3]


@given(repeated_samples, batch_sizes, worlds, seeds, st.integers(0, 5))
def test_an_epoch_has_every_sample_its_repeats_in_batches_of_one_bucket(samples, size, world, seed, epoch):
    buckets, repeats = zip(*samples, strict=True)
    ranks = every_rank(buckets, size, world, seed=seed, repeats=repeats)
    plans = [indices(sampler, epoch) for sampler in ranks]
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


@given(st.integers(1, 40), st.integers(0, 3), st.integers(1, 9), batch_sizes, seeds, st.integers(0, 6))
def test_samples_of_equal_repeats_take_turns(count, whole, tenths, size, seed, first_epoch):
    sampler = BucketBatchSampler([SMALL] * count, size, seed=seed, repeats=[whole + tenths / 10] * count)
    extra = max((2 * tenths * count + 10) // 20, int(whole == 0))  # tenths / 10 of them, halves up, exactly
    seen = Counter(dict.fromkeys(range(count), 0))
    for epoch in range(first_epoch, first_epoch + 10):
        seen.update(itertools.chain(*indices(sampler, epoch)))
        assert max(seen.values()) - min(seen.values()) <= 1
    assert sum(seen.values()) == 10 * (whole * count + extra)


@given(st.integers(1, 30), st.integers(1, 6), batch_sizes, seeds)
def test_copies_of_a_sample_are_in_different_batches_if_there_are_enough_samples(count, times, size, seed):
    sampler = BucketBatchSampler([SMALL] * count, size, seed=seed, repeats=[times] * count)
    if count >= 2 * size:
        assert all(len(set(batch)) == len(batch) for batch in indices(sampler, 0))


def test_buckets_are_mixed_over_the_epoch_and_frequent_samples_with_the_others():
    sampler = BucketBatchSampler([SMALL] * 200 + [WIDE] * 200, 1, seed=0)
    first_half = [index for (index,) in indices(sampler, 0)[:200]]
    assert 70 < sum(index < 200 for index in first_half) < 130
    sampler = BucketBatchSampler([SMALL] * 500, 8, seed=0, repeats=[4.0] * 100 + [1.0] * 400)
    often = [sum(index < 100 for index in batch) for batch in indices(sampler, 0)]
    assert len(often) == 100
    assert sum(0 < number < 8 for number in often) > 95


@given(repeated_samples, repeated_samples, batch_sizes, worlds, seeds, st.integers(0, 5))
def test_regularization_has_batches_of_its_own_and_as_many_samples(samples, kept, size, world, seed, epoch):
    buckets, repeats = zip(*samples, *kept, strict=True)
    is_kept = np.arange(len(buckets)) >= len(samples)
    options = {"seed": seed, "repeats": repeats, "regularization": is_kept}
    ranks = every_rank(buckets, size, world, **options)
    steps = zip(*(indices(sampler, epoch) for sampler in ranks), strict=True)
    drawn = [batch for step in steps for batch in step][: ranks[0].num_batches]
    assert drawn == indices(BucketBatchSampler(buckets, size, **options), epoch)  # on any number of ranks

    kinds = [{bool(is_kept[index]) for index in batch} for batch in drawn]
    assert all(len(kind) == 1 for kind in kinds)
    trained, regular = ([b for b, kind in zip(drawn, kinds, strict=True) if kind == {of}] for of in (False, True))
    assert len({buckets[index] for batch in regular for index in batch}) == len({bucket for bucket, _ in kept})
    # Each of its groups, of a bucket and repeats, is rounded to samples, and has at least one.
    total = sum(map(len, trained))
    assert total - len(set(kept)) <= sum(map(len, regular)) <= total + len(set(kept))
    # What is trained on comes in the order that it has without regularization.
    own = BucketBatchSampler(buckets[: len(samples)], size, seed=seed, repeats=repeats[: len(samples)])
    assert trained == indices(own, epoch)
    # Evenly spaced: no part of the epoch has more than its share, to a batch.
    share = len(regular) / len(drawn)
    assert all(abs(sum(k == {True} for k in kinds[:end]) - share * end) <= 1 for end in range(len(drawn)))


def test_as_many_batches_of_both_kinds_alternate_and_the_regularization_takes_turns():
    is_kept = np.arange(4 + 10) >= 4
    sampler = BucketBatchSampler([SMALL] * 14, 2, seed=0, regularization=is_kept)
    epochs = [indices(sampler, epoch) for epoch in range(5)]
    assert {tuple(bool(is_kept[batch[0]]) for batch in batches) for batches in epochs} == {(False, True) * 2}
    assert sampler.samples_between(0, 3) == (4, 2)
    drawn = Counter(index for batches in epochs for batch in batches for index in batch if index >= 4)
    assert drawn == dict.fromkeys(range(4, 14), 2)


@given(repeated_samples, repeated_samples, batch_sizes, seeds, st.integers(0, 40), st.integers(0, 40))
def test_a_resumed_stream_with_regularization_is_the_rest_of_it(samples, kept, size, seed, first, total):
    buckets, repeats = zip(*samples, *kept, strict=True)
    options = {"seed": seed, "repeats": repeats, "regularization": np.arange(len(buckets)) >= len(samples)}
    full = stream(BucketBatchSampler(buckets, size, **options), 0, total)
    assert stream(BucketBatchSampler(buckets, size, **options), first, total) == full[first:]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), batch_sizes, seeds, st.integers(0, 5))
def test_each_epoch_takes_one_caption_of_every_clip_and_all_of_them_in_turn(counts, size, seed, first_epoch):
    clip_of = np.repeat(np.arange(len(counts)), counts)
    num_captions = np.repeat(counts, counts)
    options = {"seed": seed, "repeats": 1 / num_captions, "num_captions": num_captions}
    sampler = BucketBatchSampler([SMALL] * len(clip_of), size, **options)
    drawn = [list(itertools.chain(*indices(sampler, first_epoch + epoch))) for epoch in range(12)]
    assert {tuple(sorted(clip_of[epoch])) for epoch in drawn} == {tuple(range(len(counts)))}
    # 12 epochs are whole turns of 1, 2, 3 and 4 captions.
    assert Counter(itertools.chain(*drawn)) == {index: 12 // number for index, number in enumerate(num_captions)}


def test_the_captions_of_an_epoch_are_not_all_the_first_ones():
    sampler = BucketBatchSampler([SMALL] * 40, 1, seed=0, repeats=[0.5] * 40, num_captions=np.full(40, 2))
    assert 4 < sum(index % 2 for (index,) in indices(sampler, 0)) < 16
