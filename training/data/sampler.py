"""Draw batches: shuffled by seed and epoch, divided among ranks, resumable at any step."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from data.buckets import Bucket, BucketColumn
from data.epochs import count_earlier, make_kinds, rearranged, shuffled
from data.token_budget import BatchSize, TokenBudget


class Draw(NamedTuple):
    """A sample of a batch. All its randomness follows from the seed and these three values, whichever worker decodes
    it and whichever batch, step and rank it is in."""

    index: int
    epoch: int
    copy: int = 0  # counts the occurrences of the index in the epoch


class BucketBatchSampler:
    """A stream of batches of indices (`list[Draw]`) that can start at any step of any epoch.

    In each epoch every index comes once over all ranks, or as often as `repeats` says. A batch has samples of one
    bucket, fewer in the bucket's last one; or samples of several buckets, up to a number of tokens. All ranks get the
    same number of batches in every epoch; if the total is not divisible by the number of ranks, the epoch's first
    batches come again at its end (`padding`).

    Repeats of 2.3 mean twice in every epoch, and a third time in three of ten. Epochs are equally long, so the n
    samples of a bucket with equal repeats take turns: round(0.3 n) of them get the extra copy, the next ones in the
    next epoch. Below 1, at least one of the n comes, so that every sample is used. Copies of an index are in different
    batches if the bucket has enough samples (with a `TokenBudget`, in nearly all cases).

    The order follows from (seed, epoch) on any machine and Python version: only `random.Random(str).random()` is used,
    which Python guarantees. It does not depend on `world_size`: at every step the ranks take the next `world_size`
    batches. A run that continues on another number of ranks starts its stream at `first_epoch`, after `seen_batches`.

    Samples for regularization have batches of their own, evenly spaced among those of the samples to train on, and
    every epoch has as many of them as of the others: their repeats are scaled. So with as many batches of both kinds,
    they alternate, and a step of two batches, of one rank or of two, has one of each.

    An epoch is planned in arrays: no sample becomes an object before its batch is drawn.

    Args:
        buckets: sample i belongs to buckets[i].
        batch_size: samples in a full batch, on one rank; or what fills one.
        seed: seed of the order.
        repeats: sample i comes repeats[i] times per epoch, above 0; None for once each.
        regularization: `[N]`, bool: which samples are for regularization, not all; None for none of them.
        num_captions: `[N]`: how many samples next to each other are the captions of one clip. With repeats of 1 / n,
            each epoch takes another of the n; None for one each.
        rank, world_size: number of this process, from 0, and of all processes.
        first_epoch: epoch that the stream starts in.
        seen_batches: batches of `first_epoch` to skip, over all ranks and with padding.
        blocks: `[N]`, from 0: each epoch takes the samples of one block after the other, the blocks in random order;
            None for one block.

    Attributes:
        num_batches: batches of an epoch, over all ranks and without padding.
        first_batch, total_batches: part of the stream to iterate over, to be set before: batches of this rank to skip
            and the end, both counted over epochs from the start of the stream.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        batch_size: int | BatchSize | TokenBudget,
        *,
        seed: int,
        repeats: Sequence[float] | None = None,
        regularization: np.ndarray | None = None,
        num_captions: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
        first_epoch: int = 0,
        seen_batches: int = 0,
        blocks: np.ndarray | None = None,
    ):
        self.seed = seed
        self.limit = BatchSize(batch_size) if isinstance(batch_size, int) else batch_size
        self.rank, self.world_size = rank, world_size
        self.first_epoch, self.seen_batches = first_epoch, seen_batches
        self.blocks = blocks
        self.first_batch = self.total_batches = 0
        times = np.ones(len(buckets)) if repeats is None else np.asarray(repeats, np.float64)
        self._regularization = regularization
        self.kinds = make_kinds(BucketColumn.of(buckets), times, regularization, num_captions, self.limit, seed)
        self.num_batches = sum(kind.num_batches for kind in self.kinds)
        # Two epochs, because batches are drawn ahead of training.
        self._planned = lru_cache(maxsize=2)(self._plan_epoch)

    @classmethod
    def of(cls, data: Any, limit: BatchSize | TokenBudget | int, **options: Any) -> "BucketBatchSampler":
        """Return the sampler of `planning.samples.TrainingData`, with the other arguments of the constructor."""
        facts = {name: getattr(data, name) for name in ("repeats", "regularization", "num_captions")}
        return cls(data.buckets, limit, **facts, **options)

    @property
    def samples_per_epoch(self) -> dict[Bucket, int]:
        """Samples of each bucket in an epoch, over all ranks, with repeats and without padding."""
        counts = Counter()
        for kind in self.kinds:
            counts.update(kind.samples_per_epoch)
        return dict(counts)

    def largest_batch(self, cost: Callable[[Bucket], int]) -> dict[Bucket, int]:
        """Return how many samples of each bucket are in the batch that costs the most."""
        largest = (kind.largest_batch(cost) for kind in self.kinds)
        return max(largest, key=lambda batch: sum(cost(bucket) * count for bucket, count in batch.items()))

    @property
    def batches_per_epoch(self) -> int:
        """Batches that each rank gets in an epoch."""
        return -(-self.num_batches // self.world_size)

    @property
    def batches_in_first_epoch(self) -> int:
        """Batches that each rank gets in the epoch that its stream starts in."""
        return -(-(self.num_batches - self._seen_in(self.first_epoch)) // self.world_size)

    @property
    def padding(self) -> int:
        """Batches, over all ranks, that come a second time in each epoch."""
        return self.batches_per_epoch * self.world_size - self.num_batches

    def samples_between(self, first_batch: int, last_batch: int) -> tuple[int, int]:
        """Count the samples of all ranks in their batches from `first_batch` up to, not including, `last_batch`.

        Returns those to train on, and those for regularization.
        """
        counts = [0, 0]
        for batch in range(first_batch, last_batch):
            for rank in range(self.world_size):
                draws = self._draws(batch, rank)
                counts[self.is_regularization(draws)] += len(draws)
        return counts[0], counts[1]

    def is_regularization(self, draws: Sequence[Draw]) -> bool:
        """Return whether the draws of a batch are for regularization."""
        return self._regularization is not None and bool(self._regularization[draws[0].index])

    def __iter__(self) -> Iterator[list[Draw]]:
        return (self._draws(batch, self.rank) for batch in range(self.first_batch, self.total_batches))

    def _draws(self, batch: int, rank: int) -> list[Draw]:
        """Return a rank's batch of that number, counted over epochs from the start of the stream."""
        epoch, place = self.first_epoch, batch
        if batch >= self.batches_in_first_epoch:
            epochs, place = divmod(batch - self.batches_in_first_epoch, self.batches_per_epoch)
            epoch += 1 + epochs
        number = (self._seen_in(epoch) + place * self.world_size + rank) % self.num_batches
        return self._planned(epoch).draws(number)

    def _seen_in(self, epoch: int) -> int:
        # An epoch's padding may have been seen too.
        return min(self.seen_batches, self.num_batches) if epoch == self.first_epoch else 0

    def _plan_epoch(self, epoch: int) -> "_Epoch":
        """Return the batches of an epoch in the order in which the ranks take them."""
        turns = self._turns(epoch)
        planned, sizes = zip(*(kind.plan(epoch, turns) for kind in self.kinds), strict=True)
        samples, sizes = np.concatenate(planned), np.concatenate(sizes)
        places = np.concatenate([(np.arange(kind.num_batches) + 0.5) / kind.num_batches for kind in self.kinds])
        order = np.argsort(places, kind="stable")
        samples, ends = rearranged(samples, sizes, order), np.cumsum(sizes[order], dtype=np.int32)
        is_repeated = any(kind.is_repeated for kind in self.kinds)
        copies = count_earlier(samples) if is_repeated else np.zeros(len(samples), np.int32)
        return _Epoch(epoch, samples, copies, ends)

    def _turns(self, epoch: int) -> np.ndarray | None:
        """Return when the block of each sample comes in an epoch, `[N]`; None without blocks."""
        if self.blocks is None:
            return None
        rng = random.Random(f"{self.seed}-{epoch}-blocks")  # of its own, so that the draws of others stay
        return np.argsort(shuffled(np.arange(self.blocks.max() + 1), rng))[self.blocks]


@dataclass(frozen=True)
class _Epoch:
    """The batches of an epoch, one after the other."""

    number: int
    samples: np.ndarray  # [N]
    copies: np.ndarray  # [N], how often the sample came before
    ends: np.ndarray  # [batches]

    def draws(self, batch: int) -> list[Draw]:
        place = slice(self.ends[batch - 1] if batch else 0, self.ends[batch])
        drawn = zip(self.samples[place].tolist(), self.copies[place].tolist(), strict=True)
        return [Draw(index, self.number, copy) for index, copy in drawn]
