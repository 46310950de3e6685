"""Buckets of one size (frames, height, width), and the sampler that makes batches of one bucket.

The sampler knows indices only; clips are decoded where the batches go, in the DataLoader's workers.
"""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple, TypeVar


T = TypeVar("T")


class Bucket(NamedTuple):
    """The size that all clips of a batch are brought to."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


def make_buckets(
    frame_buckets: Iterable[int], height_buckets: Iterable[int], width_buckets: Iterable[int], max_num_frames: int
) -> list[Bucket]:
    """Every combination of the sizes given, sorted, without repeats and without those above `max_num_frames`.

    Raises:
        ValueError: no bucket is left.
    """
    buckets = {Bucket(*size) for size in product(frame_buckets, height_buckets, width_buckets)}
    fitting = sorted(bucket for bucket in buckets if bucket.num_frames <= max_num_frames)
    if not fitting:
        smallest = min((bucket.num_frames for bucket in buckets), default=None)
        raise ValueError(f"no bucket has at most {max_num_frames} frames; the smallest has {smallest}")
    return fitting


def assign_bucket(usable_frames: int, height: int, width: int, buckets: Sequence[Bucket]) -> Bucket | None:
    """The bucket of a clip.

    As many frames as the clip can fill. Among the sizes with that many frames: one that needs no upscaling where there
    is one; then the nearest aspect ratio, |log(w/h) - log(w'/h')|; then the nearest area; then the smallest height.
    The order of `buckets` does not matter.

    Returns:
        None when the clip has fewer frames than every bucket.
    """
    num_frames = max((bucket.num_frames for bucket in buckets if bucket.num_frames <= usable_frames), default=None)
    if num_frames is None:
        return None
    sizes = [bucket for bucket in buckets if bucket.num_frames == num_frames]
    sizes = [bucket for bucket in sizes if bucket.height <= height and bucket.width <= width] or sizes

    def aspect_distance(bucket: Bucket) -> float:
        return abs(math.log(bucket.width * height) - math.log(bucket.height * width))

    # 1e-9: equal ratios (480x720, 512x768) differ in the last bits of their logarithms.
    nearest = min(map(aspect_distance, sizes)) + 1e-9
    return min(
        (bucket for bucket in sizes if aspect_distance(bucket) <= nearest),
        key=lambda bucket: (abs(bucket.height * bucket.width - height * width), bucket),
    )


class Draw(NamedTuple):
    """One sample of a batch. The epoch travels along so that a clip's augmentation follows from (seed, epoch, index)
    alone, whichever worker decodes it."""

    index: int
    epoch: int


class BucketBatchSampler:
    """Batches of indices, one bucket a batch: an endless stream over epochs that can start anywhere.

    In each epoch every index comes exactly once over all ranks. A bucket's last batch may be smaller. All ranks get
    the same number of batches; where the total does not divide by the ranks, the epoch's first batches come again at
    its end (`padding`).

    The order follows from (seed, epoch) on any machine and Python version: only `random.Random(str).random()` is used,
    which Python guarantees. It does not depend on `world_size`: at every step the ranks take the next `world_size`
    batches of it.

    Args:
        buckets: sample i belongs to buckets[i].
        batch_size: samples in a full batch, on one rank.
        seed: of the order.
        shuffle: False keeps samples and buckets in order.
        rank: of this process, from 0.
        world_size: number of ranks.
        first_batch: batches of this rank to leave out, counted over epochs; those a checkpoint has seen.
        total_batches: where the stream ends, counted like `first_batch` from the very start; None for never.

    Yields:
        list[Draw]: one batch.

    Raises:
        ValueError: no samples, or a number out of its range.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        first_batch: int = 0,
        total_batches: int | None = None,
    ):
        if not buckets:
            raise ValueError("there are no samples to draw from")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be from 0 to world_size - 1 = {world_size - 1}")
        if first_batch < 0:
            raise ValueError(f"first_batch is {first_batch}; it must be at least 0")
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.first_batch, self.total_batches = first_batch, total_batches
        self._indices_by_bucket: dict[Bucket, list[int]] = {bucket: [] for bucket in sorted(set(buckets))}
        for index, bucket in enumerate(buckets):
            self._indices_by_bucket[bucket].append(index)
        self._num_batches = sum(-(-len(indices) // batch_size) for indices in self._indices_by_bucket.values())

    @property
    def batches_per_epoch(self) -> int:
        """Batches that each rank gets in an epoch."""
        return -(-self._num_batches // self.world_size)

    @property
    def padding(self) -> int:
        """Whole batches, over all ranks, that come a second time in each epoch."""
        return self.batches_per_epoch * self.world_size - self._num_batches

    def epoch_batches(self, epoch: int) -> list[list[int]]:
        """This rank's batches of indices in one epoch. A pure function of the samples, seed, epoch, rank and world."""
        rng = random.Random(f"{self.seed}-{epoch}")
        batches = []
        for indices in self._indices_by_bucket.values():
            order = self._order(indices, rng)
            batches += [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        batches = self._order(batches, rng)
        steps = range(self.batches_per_epoch)
        return [list(batches[(step * self.world_size + self.rank) % len(batches)]) for step in steps]

    def _order(self, items: list[T], rng: random.Random) -> list[T]:
        # random.shuffle may change between Python versions; random() may not.
        return sorted(items, key=lambda _: rng.random()) if self.shuffle else items

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, skip = divmod(self.first_batch, self.batches_per_epoch)
        position = self.first_batch
        while True:
            for batch in self.epoch_batches(epoch)[skip:]:
                if self.total_batches is not None and position >= self.total_batches:
                    return
                yield [Draw(index, epoch) for index in batch]
                position += 1
            epoch, skip = epoch + 1, 0

    def __len__(self) -> int:
        """Batches still to come, from `first_batch` to `total_batches`."""
        if self.total_batches is None:
            raise TypeError("an endless sampler has no length; set total_batches")
        return max(0, self.total_batches - self.first_batch)
