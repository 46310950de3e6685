"""The batches of an epoch, planned in arrays: which samples share one, and in which order they come."""

import random
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import repeat, starmap

import numpy as np

from data.buckets import Bucket, BucketColumn
from data.token_budget import BatchSize, Pieces, TokenBudget
from video.frames import round_half_up


@dataclass(frozen=True)
class Group:
    """Samples of one bucket with equal repeats."""

    indices: np.ndarray  # [N], in the order in which they take turns
    whole: int  # copies of each index in every epoch
    extra: int  # number of indices with one more copy

    def counts(self, epoch: int) -> np.ndarray:
        """Return the copies of each index in this epoch, `[N]`."""
        length = len(self.indices)
        turns = (np.arange(length, dtype=np.int32) - epoch * self.extra % length) % length
        return np.int32(self.whole) + (turns < self.extra)


@dataclass(frozen=True)
class Kind:
    """Samples that share batches: those to train on, or those for regularization."""

    groups: Mapping[Bucket, Sequence[Group]]
    limit: BatchSize | TokenBudget
    seed: str  # of its order

    @cached_property
    def samples_per_epoch(self) -> dict[Bucket, int]:
        """Samples of each bucket in an epoch, over all ranks, with repeats and without padding."""
        return {
            bucket: sum(g.whole * len(g.indices) + g.extra for g in groups) for bucket, groups in self.groups.items()
        }

    @cached_property
    def pieces(self) -> Pieces:
        """The sizes of an epoch's batches."""
        return self.limit.share_out(self.samples_per_epoch)

    @property
    def num_batches(self) -> int:
        """Batches of an epoch, over all ranks and without padding."""
        return self.pieces.num_batches

    @property
    def batches_of(self) -> dict[Bucket, int]:
        """Batches of an epoch that have samples of each bucket, over all ranks and without padding."""
        samples = self.samples_per_epoch
        last = np.searchsorted(np.cumsum(self.pieces.sizes), np.cumsum(list(samples.values())))
        return dict(zip(samples, np.diff(last, prepend=-1).tolist(), strict=True))

    @property
    def is_repeated(self) -> bool:
        """Whether a sample may come several times in an epoch."""
        return any(group.whole + (group.extra > 0) > 1 for groups in self.groups.values() for group in groups)

    def largest_batch(self, cost: Callable[[Bucket], int]) -> dict[Bucket, int]:
        """Return how many samples of each bucket are in the batch that costs the most."""
        counts, pieces = self.batches_of, self.pieces
        kinds = np.repeat(np.arange(len(counts)), list(counts.values()))
        costs = np.array(list(map(cost, counts)))[kinds] * pieces.sizes
        largest = np.flatnonzero(pieces.batches == np.bincount(pieces.batches, costs).argmax())
        return {list(counts)[kinds[piece]]: int(pieces.sizes[piece]) for piece in largest}

    def plan(self, epoch: int, turns: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the samples of an epoch, batch by batch in random order, `[N]`, and the batches' sizes.

        Args:
            turns: when the block of each sample comes, by its index; None without blocks.
        """
        rng, pieces, limit = random.Random(f"{self.seed}-{epoch}"), self.pieces, self.limit
        orders = [_order(groups, epoch, limit.most_of(bucket), rng, turns) for bucket, groups in self.groups.items()]
        samples, sizes = np.concatenate(orders), pieces.sizes
        order = shuffled(np.arange(self.num_batches, dtype=np.int32), rng)
        if turns is not None:
            latest = np.zeros(self.num_batches, np.int32)  # turn of a batch's samples
            np.maximum.at(latest, pieces.batches, turns[samples[np.cumsum(sizes) - 1]])
            order = order[np.argsort(latest[order], kind="stable")]
        # Each piece moves from its place among the unshuffled ones to its place among the shuffled ones.
        moved = np.argsort(np.argsort(order)[pieces.batches], kind="stable")
        return rearranged(samples, sizes, moved), np.bincount(pieces.batches, sizes).astype(np.int32)[order]


def make_kinds(
    buckets: BucketColumn,
    repeats: np.ndarray,
    regularization: np.ndarray | None,
    num_captions: np.ndarray | None,
    limit: BatchSize | TokenBudget,
    seed: int,
) -> list[Kind]:
    """Return the samples to train on, then those for regularization, as `data.sampler` documents."""
    trained = np.ones(len(buckets), bool) if regularization is None else ~regularization
    captions = np.ones(len(buckets), np.int32) if num_captions is None else num_captions
    kinds = [Kind(_group(buckets, repeats, captions, np.flatnonzero(trained), f"{seed}"), limit, f"{seed}")]
    if regularization is not None:
        num_trained = sum(kinds[0].samples_per_epoch.values())
        times = repeats * (num_trained / repeats[regularization].sum())
        own = f"{seed}-regularization"
        kinds.append(Kind(_group(buckets, times, captions, np.flatnonzero(regularization), own), limit, own))
    return kinds


def _group(
    buckets: BucketColumn, repeats: np.ndarray, captions: np.ndarray, rows: np.ndarray, seed: str
) -> dict[Bucket, list[Group]]:
    # Stable: samples of a group stay in their order.
    order = np.lexsort((captions[rows], repeats[rows], buckets.codes[rows]))
    order = rows[order].astype(np.int32)
    codes, times, captions = buckets.codes[order], repeats[order], captions[order]
    differs = (codes[1:] != codes[:-1]) | (times[1:] != times[:-1]) | (captions[1:] != captions[:-1])
    starts = np.flatnonzero(np.append(True, differs)[: len(codes)])
    rng = random.Random(f"{seed}-turns")
    groups = defaultdict(list)
    for start, indices in zip(starts, np.split(order, starts[1:]), strict=False):
        whole, fraction = divmod(Fraction(times[start].item()).limit_denominator(10_000), 1)
        extra = max(round_half_up(fraction * len(indices)), int(whole == 0))
        group = Group(_in_turns(indices, int(captions[start]), rng) if extra else indices, whole, extra)
        groups[buckets.kinds[codes[start]]].append(group)
    return groups


def _in_turns(indices: np.ndarray, num_captions: int, rng: random.Random) -> np.ndarray:
    """Shuffle samples, so that of the captions of a clip, which are next to each other, one comes in each turn."""
    if num_captions == 1 or len(indices) % num_captions:  # the index of a stranger
        return shuffled(indices, rng)
    clips = shuffled(indices.reshape(-1, num_captions), rng)
    first = (num_captions * _random(len(clips), rng)).astype(np.int64)
    return np.take_along_axis(clips, (first[:, None] + np.arange(num_captions)) % num_captions, 1).T.reshape(-1)


def _order(
    groups: Sequence[Group], epoch: int, batch_size: int, rng: random.Random, turns: np.ndarray | None
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


def rearranged(items: np.ndarray, sizes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return items whose parts of these sizes come in another order."""
    moved = sizes[order]
    moves = _starts(sizes)[order] - _starts(moved)
    return items[np.repeat(moves, moved) + np.arange(len(items), dtype=np.int32)]


def _random(count: int, rng: random.Random) -> np.ndarray:
    return np.fromiter(starmap(rng.random, repeat((), count)), np.float64, count)


def shuffled(items: np.ndarray, rng: random.Random) -> np.ndarray:
    # random.shuffle and numpy's generators may change between versions; random() may not.
    return items[np.argsort(_random(len(items), rng), kind="stable")]


def count_earlier(items: np.ndarray) -> np.ndarray:
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
