"""Draw batches: shuffled by seed and epoch, divided among ranks, resumable at any step."""

import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import repeat, starmap
from typing import NamedTuple

import numpy as np

from data.buckets import Bucket, BucketColumn
from data.token_budget import BatchSize, TokenBudget
from video.frames import round_half_up


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

    An epoch is planned in arrays: no sample becomes an object before its batch is drawn.

    Args:
        buckets: sample i belongs to buckets[i].
        batch_size: samples in a full batch, on one rank; or what fills one.
        seed: seed of the order.
        repeats: sample i comes repeats[i] times per epoch, above 0; None for once each.
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
        self._groups = _group(BucketColumn.of(buckets), times, seed)
        self._pieces = self.limit.share_out(self.samples_per_epoch)
        self.num_batches = self._pieces.num_batches
        # Two epochs, because batches are drawn ahead of training.
        self._planned = lru_cache(maxsize=2)(self._plan_epoch)

    @property
    def samples_per_epoch(self) -> dict[Bucket, int]:
        """Samples of each bucket in an epoch, over all ranks, with repeats and without padding."""
        return {
            bucket: sum(g.whole * len(g.indices) + g.extra for g in groups) for bucket, groups in self._groups.items()
        }

    @property
    def batches_of(self) -> dict[Bucket, int]:
        """Batches of an epoch that have samples of each bucket, over all ranks and without padding."""
        samples = self.samples_per_epoch
        last = np.searchsorted(np.cumsum(self._pieces.sizes), np.cumsum(list(samples.values())))
        return dict(zip(samples, np.diff(last, prepend=-1).tolist(), strict=True))

    def largest_batch(self, cost: Callable[[Bucket], int]) -> dict[Bucket, int]:
        """Return how many samples of each bucket are in the batch that costs the most."""
        counts, pieces = self.batches_of, self._pieces
        kinds = np.repeat(np.arange(len(counts)), list(counts.values()))
        costs = np.array(list(map(cost, counts)))[kinds] * pieces.sizes
        largest = np.flatnonzero(pieces.batches == np.bincount(pieces.batches, costs).argmax())
        return {list(counts)[kinds[piece]]: int(pieces.sizes[piece]) for piece in largest}

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
        number = (self._seen_in(epoch) + place * self.world_size + rank) % self.num_batches
        return self._planned(epoch).draws(number)

    def _seen_in(self, epoch: int) -> int:
        # An epoch's padding may have been seen too.
        return min(self.seen_batches, self.num_batches) if epoch == self.first_epoch else 0

    def _plan_epoch(self, epoch: int) -> "_Epoch":
        """Return the batches of an epoch in the order in which the ranks take them."""
        rng = random.Random(f"{self.seed}-{epoch}")
        most_of, turns = self.limit.most_of, self._turns(epoch)
        orders = [_order(groups, epoch, most_of(bucket), rng, turns) for bucket, groups in self._groups.items()]
        shuffled = _shuffled(np.arange(self.num_batches, dtype=np.int32), rng)
        if turns is not None:
            latest = np.zeros(self.num_batches, np.int32)  # turn of a batch's samples
            last_of_pieces = np.concatenate(orders)[np.cumsum(self._pieces.sizes) - 1]
            np.maximum.at(latest, self._pieces.batches, turns[last_of_pieces])
            shuffled = shuffled[np.argsort(latest[shuffled], kind="stable")]
        places = np.argsort(shuffled)[self._pieces.batches]
        shuffled = np.argsort(places, kind="stable")
        sizes = self._pieces.sizes[shuffled]
        # Each piece moves from its place among the unshuffled ones to its place among the shuffled ones.
        moves = _starts(self._pieces.sizes)[shuffled] - _starts(sizes)
        samples = np.concatenate(orders)[np.repeat(moves, sizes) + np.arange(sizes.sum(), dtype=np.int32)]
        ends = np.cumsum(sizes, dtype=np.int32)[np.append(np.diff(places[shuffled]) > 0, True)]
        repeated = any(group.whole + (group.extra > 0) > 1 for groups in self._groups.values() for group in groups)
        copies = _count_earlier(samples) if repeated else np.zeros(len(samples), np.int32)
        return _Epoch(epoch, samples, copies, ends)

    def _turns(self, epoch: int) -> np.ndarray | None:
        """Return when the block of each sample comes in an epoch, `[N]`; None without blocks."""
        if self.blocks is None:
            return None
        rng = random.Random(f"{self.seed}-{epoch}-blocks")  # of its own, so that the draws of others stay
        return np.argsort(_shuffled(np.arange(self.blocks.max() + 1), rng))[self.blocks]


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


@dataclass(frozen=True)
class _Group:
    """Samples of one bucket with equal repeats."""

    indices: np.ndarray  # [N], in the order in which they take turns
    whole: int  # copies of each index in every epoch
    extra: int  # number of indices with one more copy

    def counts(self, epoch: int) -> np.ndarray:
        """Return the copies of each index in this epoch, `[N]`."""
        length = len(self.indices)
        turns = (np.arange(length, dtype=np.int32) - epoch * self.extra % length) % length
        return np.int32(self.whole) + (turns < self.extra)


def _group(buckets: BucketColumn, repeats: np.ndarray, seed: int) -> dict[Bucket, list[_Group]]:
    order = np.lexsort((repeats, buckets.codes)).astype(np.int32)  # stable: samples of a group stay in their order
    codes, times = buckets.codes[order], repeats[order]
    differs = (codes[1:] != codes[:-1]) | (times[1:] != times[:-1])
    starts = np.flatnonzero(np.append(True, differs)[: len(codes)])
    rng = random.Random(f"{seed}-turns")
    groups = defaultdict(list)
    for start, indices in zip(starts, np.split(order, starts[1:]), strict=False):
        whole, fraction = divmod(Fraction(times[start].item()).limit_denominator(10_000), 1)
        extra = max(round_half_up(fraction * len(indices)), int(whole == 0))
        group = _Group(_shuffled(indices, rng) if extra else indices, whole, extra)
        groups[buckets.kinds[codes[start]]].append(group)
    return groups


def _order(
    groups: Sequence[_Group], epoch: int, batch_size: int, rng: random.Random, turns: np.ndarray | None
) -> np.ndarray:
    """Return the samples of a bucket in the order in which its batches take them, `[N]`.

    Copy k of n is in the k-th of n equal parts of the epoch, so that copies rarely meet in a batch, and frequent
    samples share batches with others. Samples of an earlier turn come first.
    """
    counts = np.concatenate([group.counts(epoch) for group in groups])
    samples = np.repeat(np.concatenate([group.indices for group in groups]), counts)
    copies = np.arange(len(samples), dtype=np.int32) - np.repeat(_starts(counts), counts)
    places = (copies + _random(len(samples), rng)) / np.repeat(counts, counts)
    order = samples[np.lexsort((samples, places) if turns is None else (samples, places, turns[samples]))]
    if counts.max() > 1:
        _part_copies(order, batch_size)
    return order


def _starts(sizes: np.ndarray) -> np.ndarray:
    """Return where each part begins if parts of these sizes follow one another, `[N]`."""
    return np.cumsum(sizes, dtype=np.int32) - sizes


def _random(count: int, rng: random.Random) -> np.ndarray:
    return np.fromiter(starmap(rng.random, repeat((), count)), np.float64, count)


def _shuffled(items: np.ndarray, rng: random.Random) -> np.ndarray:
    # random.shuffle and numpy's generators may change between versions; random() may not.
    return items[np.argsort(_random(len(items), rng), kind="stable")]


def _count_earlier(items: np.ndarray) -> np.ndarray:
    """Return how often each item comes before, `[N]`."""
    order = np.argsort(items, kind="stable")
    counts = np.empty(len(items), np.int32)
    counts[order] = np.arange(len(items)) - np.searchsorted(items[order], items[order])
    return counts


def _part_copies(order: np.ndarray, batch_size: int) -> None:
    """Move second copies of an index in a batch to the next batch, in place, while nearby indices can fill the gap."""
    fill = -1 - np.arange(-len(order) % batch_size)
    rows = np.sort(np.append(order, fill).reshape(-1, batch_size), axis=1)
    done = 0
    for start in np.flatnonzero((np.diff(rows) == 0).any(axis=1)) * batch_size:
        if start < done:
            continue
        done, waiting, upcoming = start, deque(), iter(order[start:])
        while True:  # until a batch leaves no copies for the next one; what is written has been read
            batch, copies = [], []
            while len(batch) < batch_size and len(copies) < batch_size:
                index = waiting.popleft() if waiting else next(upcoming, None)
                if index is None:
                    break
                (copies if index in batch else batch).append(index)
            room = batch_size - len(batch)
            batch += copies[:room]
            order[done : done + len(batch)] = batch
            done += len(batch)
            waiting.extendleft(reversed(copies[room:]))
            if not waiting:
                break
