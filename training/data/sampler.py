"""Draw batches of one bucket: shuffled by seed and epoch, divided among ranks, resumable at any step."""

import random
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import count
from typing import NamedTuple, TypeVar

from data.buckets import Bucket
from video.frames import round_half_up


_T = TypeVar("T")


class Draw(NamedTuple):
    """A sample of a batch. All its randomness follows from the seed and these three values, whichever worker decodes
    it and whichever batch, step and rank it is in."""

    index: int
    epoch: int
    copy: int = 0  # counts the occurrences of the index in the epoch


class BucketBatchSampler:
    """A stream of batches of indices (`list[Draw]`), one bucket per batch, that can start at any step of any epoch.

    In each epoch every index comes once over all ranks, or as often as `repeats` says. The last batch of a bucket may
    be smaller. All ranks get the same number of batches in every epoch; if the total is not divisible by the number of
    ranks, the epoch's first batches come again at its end (`padding`).

    Repeats of 2.3 mean twice in every epoch, and a third time in three of ten. Epochs are equally long, so the n
    samples of a bucket with equal repeats take turns: round(0.3 n) of them get the extra copy, the next ones in the
    next epoch. Below 1, at least one of the n comes, so that every sample is used. Copies of an index are in different
    batches if the bucket has enough samples.

    The order follows from (seed, epoch) on any machine and Python version: only `random.Random(str).random()` is used,
    which Python guarantees. It does not depend on `world_size`: at every step the ranks take the next `world_size`
    batches. A run that continues on another number of ranks starts its stream at `first_epoch`, after `seen_batches`.

    Args:
        buckets: sample i belongs to buckets[i].
        batch_size: samples in a full batch, on one rank.
        seed: seed of the order.
        repeats: sample i comes repeats[i] times per epoch, above 0; None for once each.
        rank, world_size: number of this process, from 0, and of all processes.
        first_epoch: epoch that the stream starts in.
        seen_batches: batches of `first_epoch` to skip, over all ranks and with padding.

    Attributes:
        first_batch, total_batches: part of the stream to iterate over, to be set before: batches of this rank to skip
            and the end, both counted over epochs from the start of the stream.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        batch_size: int,
        *,
        seed: int,
        repeats: Sequence[float] | None = None,
        rank: int = 0,
        world_size: int = 1,
        first_epoch: int = 0,
        seen_batches: int = 0,
    ):
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.first_epoch, self.seen_batches = first_epoch, seen_batches
        self.first_batch = self.total_batches = 0
        self._groups = _group(buckets, [1.0] * len(buckets) if repeats is None else repeats, seed)
        self._num_batches = sum(-(-samples // batch_size) for samples in self.samples_per_epoch.values())
        # Two epochs, because batches are drawn ahead of training.
        self._all_draws = lru_cache(maxsize=2)(self._plan_epoch)

    @property
    def samples_per_epoch(self) -> dict[Bucket, int]:
        """Samples of each bucket in an epoch, over all ranks, with repeats and without padding."""
        return {
            bucket: sum(g.whole * len(g.indices) + g.extra for g in groups) for bucket, groups in self._groups.items()
        }

    @property
    def batches_per_epoch(self) -> int:
        """Batches that each rank gets in an epoch."""
        return -(-self._num_batches // self.world_size)

    @property
    def batches_in_first_epoch(self) -> int:
        """Batches that each rank gets in the epoch that its stream starts in."""
        return -(-(self._num_batches - self._seen_in(self.first_epoch)) // self.world_size)

    @property
    def padding(self) -> int:
        """Batches, over all ranks, that come a second time in each epoch."""
        return self.batches_per_epoch * self.world_size - self._num_batches

    def samples_between(self, first_batch: int, last_batch: int) -> int:
        """Count the samples of all ranks in their batches from `first_batch` up to, not including, `last_batch`."""
        ranks = range(self.world_size)
        return sum(len(self._draws(batch, rank)) for batch in range(first_batch, last_batch) for rank in ranks)

    def __iter__(self) -> Iterator[list[Draw]]:
        return (self._draws(batch, self.rank) for batch in range(self.first_batch, self.total_batches))

    def _draws(self, batch: int, rank: int) -> list[Draw]:
        """Return a rank's batch of that number, counted over epochs from the start of the stream."""
        epoch, place = self.first_epoch, batch
        if batch >= self.batches_in_first_epoch:
            epochs, place = divmod(batch - self.batches_in_first_epoch, self.batches_per_epoch)
            epoch += 1 + epochs
        draws = self._all_draws(epoch)
        return draws[(self._seen_in(epoch) + place * self.world_size + rank) % len(draws)]

    def _seen_in(self, epoch: int) -> int:
        # An epoch's padding may have been seen too.
        return min(self.seen_batches, self._num_batches) if epoch == self.first_epoch else 0

    def _plan_epoch(self, epoch: int) -> list[list[Draw]]:
        """Return the batches of an epoch in the order in which the ranks take them."""
        rng = random.Random(f"{self.seed}-{epoch}")
        batches: list[list[int]] = []
        for groups in self._groups.values():
            # Copy k of n is in the k-th of n equal parts of the epoch, so that copies rarely meet in a batch, and
            # frequent samples share batches with others.
            places = [
                ((copy + rng.random()) / times, index)
                for group in groups
                for index, times in group.counts(epoch)
                for copy in range(times)
            ]
            batches += _cut([index for _, index in sorted(places)], self.batch_size)
        copies: defaultdict[int, Iterator[int]] = defaultdict(count)
        return [[Draw(index, epoch, next(copies[index])) for index in batch] for batch in _shuffled(batches, rng)]


@dataclass(frozen=True)
class _Group:
    """Samples of one bucket with equal repeats."""

    indices: list[int]  # in the order in which they take turns
    whole: int  # copies of each index in every epoch
    extra: int  # number of indices with one more copy

    def counts(self, epoch: int) -> Iterator[tuple[int, int]]:
        """Yield each index with its number of copies in this epoch."""
        first = epoch * self.extra
        for position, index in enumerate(self.indices):
            yield index, self.whole + ((position - first) % len(self.indices) < self.extra)


def _group(buckets: Sequence[Bucket], repeats: Sequence[float], seed: int) -> dict[Bucket, list[_Group]]:
    members = defaultdict(list)
    for index, key in enumerate(zip(buckets, repeats, strict=True)):
        members[key].append(index)
    rng = random.Random(f"{seed}-turns")
    groups = defaultdict(list)
    for (bucket, times), indices in sorted(members.items()):
        whole, fraction = divmod(Fraction(times).limit_denominator(10_000), 1)
        extra = max(round_half_up(fraction * len(indices)), int(whole == 0))
        groups[bucket].append(_Group(_shuffled(indices, rng) if extra else indices, whole, extra))
    return groups


def _shuffled(items: list[_T], rng: random.Random) -> list[_T]:
    # random.shuffle may change between Python versions; random() may not.
    return sorted(items, key=lambda _: rng.random())


def _cut(order: Sequence[int], batch_size: int) -> list[list[int]]:
    """Cut into batches. A second copy of an index moves to the next batch while nearby indices can fill its place."""
    batches, waiting = [], deque(order)
    while waiting:
        batch, copies = [], []
        while waiting and len(batch) < batch_size and len(copies) < batch_size:
            index = waiting.popleft()
            (copies if index in batch else batch).append(index)
        room = batch_size - len(batch)
        batches.append(batch + copies[:room])
        waiting.extendleft(reversed(copies[room:]))
    return batches
