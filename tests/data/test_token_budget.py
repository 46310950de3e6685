"""Batches are filled with samples of any bucket up to a number of tokens."""

from collections import Counter
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from data.buckets import Bucket
from data.sampler import BucketBatchSampler
from data.token_budget import TokenBudget


LARGE, MEDIUM, SMALL = Bucket(49, 64, 64), Bucket(17, 64, 64), Bucket(1, 64, 64)
BUDGET = TokenBudget(100, {LARGE: 60, MEDIUM: 30, SMALL: 10}.__getitem__)


def batches_of(counts: dict[Bucket, int], budget: TokenBudget = BUDGET, **options) -> list[list[Bucket]]:
    buckets = [bucket for bucket, count in counts.items() for _ in range(count)]
    sampler = BucketBatchSampler(buckets, budget, seed=0, **options)
    sampler.total_batches = sampler.batches_per_epoch
    return [[buckets[draw.index] for draw in batch] for batch in sampler]


def test_small_samples_fill_the_room_beside_large_ones():
    batches = batches_of({LARGE: 2, MEDIUM: 1, SMALL: 12})
    found = sorted((Counter(batch) for batch in batches), key=lambda batch: (-batch[LARGE], -batch[MEDIUM]))
    assert found == [{LARGE: 1, MEDIUM: 1, SMALL: 1}, {LARGE: 1, SMALL: 4}, {SMALL: 7}]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.lists(st.integers(1, 60), min_size=5, max_size=5),
    st.integers(40, 200),
)
def test_every_sample_comes_once_and_no_batch_exceeds_the_budget(costs, counts, tokens):
    kinds = [Bucket(1 + 4 * number, 64, 64) for number in range(len(costs))]
    cost_of = dict(zip(kinds, costs, strict=True))
    wanted = dict(zip(kinds, counts, strict=False))
    batches = batches_of(wanted, TokenBudget(tokens, cost_of.__getitem__))
    assert Counter(bucket for batch in batches for bucket in batch) == wanted
    loads = [sum(map(cost_of.get, batch)) for batch in batches]
    assert max(loads) <= tokens
    # The last one of each kind of batch may be far from full.
    assert sum(load <= tokens - max(costs) for load in loads) <= len(costs)


def test_epochs_have_equally_many_batches_and_samples_in_other_ones():
    buckets = [LARGE] * 5 + [SMALL] * 30
    sampler = BucketBatchSampler(buckets, BUDGET, seed=0, repeats=[1.5] * 5 + [1.0] * 30, world_size=2)
    sampler.total_batches = 3 * sampler.batches_per_epoch
    drawn = list(sampler)
    first, second, third = np.array_split(np.array([batch[0].epoch for batch in drawn]), 3)
    assert ({*first}, {*second}, {*third}) == ({0}, {1}, {2})
    orders = [[draw.index for batch in drawn for draw in batch if draw.epoch == epoch] for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_largest_batch_is_known():
    sampler = BucketBatchSampler([LARGE] * 2 + [MEDIUM] + [SMALL] * 12, BUDGET, seed=0)
    assert sampler.largest_batch(cost=prod) == {LARGE: 1, MEDIUM: 1, SMALL: 1}
    (training,) = sampler.kinds
    assert training.batches_of == {SMALL: 3, MEDIUM: 1, LARGE: 2}


def test_a_sample_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"--max_tokens_per_batch 50: too few .*\n.*49x64x64: 60 tokens"):
        TokenBudget(50, BUDGET.tokens_of).check({SMALL, LARGE})


def test_a_budget_is_not_shared_with_regularization():
    is_kept = np.arange(20) >= 10
    sampler = BucketBatchSampler([SMALL, LARGE] * 10, BUDGET, seed=0, regularization=is_kept)
    sampler.total_batches = 2 * sampler.batches_per_epoch
    drawn = list(sampler)
    assert {len({bool(is_kept[draw.index]) for draw in batch}) for batch in drawn} == {1}
    assert max(len({draw.index % 2 for draw in batch}) for batch in drawn) == 2  # of several sizes
