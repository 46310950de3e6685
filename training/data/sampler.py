"""Draw batches of one bucket: shuffled by seed and epoch, divided among ranks, resumable at any step."""

import math
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
    """An endless stream of batches of indices, one bucket per batch, that can start at any step of any epoch.

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
        shuffle: False keeps samples and buckets in order.
        rank: rank of this process, from 0.
        world_size: number of ranks.
        first_epoch: epoch that the stream starts in.
        seen_batches: batches of `first_epoch` to skip, over all ranks and with padding.
        first_batch: batches of this rank to skip, counted over epochs from the start of the stream; those that a
            checkpoint has seen.
        total_batches: end of the stream, counted like `first_batch`; None for never.

    Yields:
        list[Draw]: one batch.

    Raises:
        ValueError: there are no samples, or a number is out of range.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        batch_size: int,
        *,
        seed: int,
        repeats: Sequence[float] | None = None,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        first_epoch: int = 0,
        seen_batches: int = 0,
        first_batch: int = 0,
        total_batches: int | None = None,
    ):
        if not buckets:
            raise ValueError("there are no samples to draw from")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be from 0 to world_size - 1 = {world_size - 1}")
        for name, value in (
            ("first_epoch", first_epoch),
            ("seen_batches", seen_batches),
            ("first_batch", first_batch),
        ):
            if value < 0:
                raise ValueError(f"{name} is {value}; it must be at least 0")
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.first_epoch, self.seen_batches = first_epoch, seen_batches
        self.first_batch, self.total_batches = first_batch, total_batches
        self._groups = self._group(buckets, [1.0] * len(buckets) if repeats is None else repeats)
        self._num_batches = sum(-(-samples // batch_size) for samples in self.samples_per_epoch.values())
        # Two epochs, because batches are drawn ahead of training.
        self._all_draws = lru_cache(maxsize=2)(self._plan_epoch)

    @property
    def samples_per_epoch(self) -> dict[Bucket, int]:
        """Samples of each bucket in an epoch, over all ranks, with repeats and without padding."""
        return {bucket: sum(group.size for group in groups) for bucket, groups in self._groups.items()}

    @property
    def batches_per_epoch(self) -> int:
        """Batches that each rank gets in an epoch."""
        return -(-self._num_batches // self.world_size)

    @property
    def batches_in_first_epoch(self) -> int:
        """Batches that each rank gets in the epoch that its stream starts in."""
        return self._batches_in(self.first_epoch)

    @property
    def padding(self) -> int:
        """Batches, over all ranks, that come a second time in each epoch."""
        return self.batches_per_epoch * self.world_size - self._num_batches

    def epoch_batches(self, epoch: int) -> list[list[int]]:
        """Return this rank's batches of indices in an epoch; in `first_epoch`, those after `seen_batches`."""
        return [[draw.index for draw in batch] for batch in self._epoch_draws(epoch)]

    def samples_between(self, first_batch: int, last_batch: int) -> int:
        """Count the samples of all ranks in their batches from `first_batch` up to, not including, `last_batch`; both
        are counted like the `first_batch` of the stream."""
        return sum(
            len(self._draws_of(epoch, place, rank))
            for epoch, place in map(self._locate, range(first_batch, last_batch))
            for rank in range(self.world_size)
        )

    def _epoch_draws(self, epoch: int) -> list[list[Draw]]:
        return [self._draws_of(epoch, place, self.rank) for place in range(self._batches_in(epoch))]

    def _draws_of(self, epoch: int, place: int, rank: int) -> list[Draw]:
        draws = self._all_draws(epoch)
        return draws[(self._seen_in(epoch) + place * self.world_size + rank) % len(draws)]

    def _plan_epoch(self, epoch: int) -> list[list[Draw]]:
        """Return the batches of an epoch in the order in which the ranks take them."""
        rng = random.Random(f"{self.seed}-{epoch}")
        batches = []
        for groups in self._groups.values():
            batches += _cut(self._epoch_order(groups, epoch, rng), self.batch_size)
        return _count_copies(self._order(batches, rng), epoch)

    def _group(self, buckets: Sequence[Bucket], repeats: Sequence[float]) -> dict[Bucket, list["_Group"]]:
        members: dict[tuple[Bucket, float], list[int]] = {}
        for index, key in enumerate(zip(buckets, repeats, strict=True)):
            members.setdefault(key, []).append(index)
        rng = random.Random(f"{self.seed}-turns")
        groups: dict[Bucket, list[_Group]] = {}
        for (bucket, times), indices in sorted(members.items()):
            if not 0 < times < math.inf:
                raise ValueError(f"repeats of sample {indices[0]} are {times}; they must be above 0")
            whole, fraction = divmod(Fraction(times).limit_denominator(10_000), 1)
            extra = max(round_half_up(fraction * len(indices)), int(whole == 0))
            turns = self._order(indices, rng) if extra else indices
            groups.setdefault(bucket, []).append(_Group(turns, whole, extra))
        return groups

    def _epoch_order(self, groups: Sequence["_Group"], epoch: int, rng: random.Random) -> list[int]:
        """Return a bucket's indices in an epoch. Copy k of n is in the k-th of n equal parts, so that copies rarely
        meet in a batch, and frequent samples share batches with others."""
        places = [
            ((copy + rng.random()) / times if self.shuffle else copy, index)
            for group in groups
            for index, times in group.counts(epoch)
            for copy in range(times)
        ]
        return [index for _, index in sorted(places)]

    def _order(self, items: list[_T], rng: random.Random) -> list[_T]:
        # random.shuffle may change between Python versions; random() may not.
        return sorted(items, key=lambda _: rng.random()) if self.shuffle else items

    def _seen_in(self, epoch: int) -> int:
        # An epoch's padding may have been seen too.
        return min(self.seen_batches, self._num_batches) if epoch == self.first_epoch else 0

    def _batches_in(self, epoch: int) -> int:
        return -(-(self._num_batches - self._seen_in(epoch)) // self.world_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, skip = self._locate(self.first_batch)
        position = self.first_batch
        while True:
            for batch in self._epoch_draws(epoch)[skip:]:
                if self.total_batches is not None and position >= self.total_batches:
                    return
                yield batch
                position += 1
            epoch, skip = epoch + 1, 0

    def _locate(self, batch: int) -> tuple[int, int]:
        """Return the epoch of this rank's batch of that number, and its place in the epoch."""
        if batch < self.batches_in_first_epoch:
            return self.first_epoch, batch
        epochs, place = divmod(batch - self.batches_in_first_epoch, self.batches_per_epoch)
        return self.first_epoch + 1 + epochs, place

    def __len__(self) -> int:
        """Count the batches from `first_batch` to `total_batches`."""
        if self.total_batches is None:
            raise TypeError("an endless sampler has no length; set total_batches")
        return max(0, self.total_batches - self.first_batch)


@dataclass(frozen=True)
class _Group:
    """Samples of one bucket with equal repeats."""

    indices: list[int]  # in the order in which they take turns
    whole: int  # copies of each index in every epoch
    extra: int  # number of indices with one more copy

    @property
    def size(self) -> int:
        """Samples in an epoch."""
        return self.whole * len(self.indices) + self.extra

    def counts(self, epoch: int) -> Iterator[tuple[int, int]]:
        """Yield each index with its number of copies in this epoch."""
        first = epoch * self.extra
        for position, index in enumerate(self.indices):
            yield index, self.whole + ((position - first) % len(self.indices) < self.extra)


def _cut(order: Sequence[int], batch_size: int) -> list[list[int]]:
    """Cut the order into batches; the last may be smaller. A second copy of an index moves to the next batch while
    the nearby indices can fill its place."""
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


def _count_copies(batches: Sequence[Sequence[int]], epoch: int) -> list[list[Draw]]:
    counters: defaultdict[int, Iterator[int]] = defaultdict(count)
    return [[Draw(index, epoch, next(counters[index])) for index in batch] for batch in batches]
