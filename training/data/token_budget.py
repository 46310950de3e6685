"""Share samples out over batches: a number of samples of one bucket, or samples of any bucket up to a token count."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from common.errors import UserError, listing
from data.buckets import Bucket


@dataclass(frozen=True)
class Pieces:
    """The samples of one bucket in one batch, for every batch: sorted by bucket, then by batch."""

    batches: np.ndarray  # [P], int32: numbers from 0
    sizes: np.ndarray  # [P], int32: samples

    @property
    def num_batches(self) -> int:
        """The number of batches, none of which is empty."""
        return int(self.batches.max()) + 1


@dataclass(frozen=True)
class BatchSize:
    """Batches of one bucket; a bucket's last batch may be smaller."""

    samples: int

    def most_of(self, bucket: Bucket) -> int:
        """Return the number of the bucket's samples in a full batch."""
        return self.samples

    def worth_of(self, bucket: Bucket) -> float:
        """Return how many of the bucket's samples cost as much as a full batch."""
        return self.samples

    def __str__(self) -> str:
        return str(self.samples)

    def share_out(self, counts: Mapping[Bucket, int]) -> Pieces:
        """Share out so many samples of each bucket."""
        ends = (np.append(np.arange(0, count, self.samples, np.int32), np.int32(count)) for count in counts.values())
        sizes = np.concatenate([np.diff(of_bucket) for of_bucket in ends])
        return Pieces(np.arange(len(sizes), dtype=np.int32), sizes)


@dataclass(frozen=True)
class TokenBudget:
    """Batches of samples of any bucket with up to `tokens` tokens, as few as first fit finds, the largest first."""

    tokens: int
    tokens_of: Callable[[Bucket], int]  # of a sample: text and video

    def most_of(self, bucket: Bucket) -> int:
        """Return the number of the bucket's samples that fill a batch."""
        return self.tokens // self.tokens_of(bucket)

    def worth_of(self, bucket: Bucket) -> float:
        """Return how many of the bucket's samples cost as much as a full batch."""
        return self.tokens / self.tokens_of(bucket)

    def __str__(self) -> str:
        return f"{self.tokens} tokens"

    def share_out(self, counts: Mapping[Bucket, int]) -> Pieces:
        """Share out so many samples of each bucket; raise UserError if one does not fit into a batch."""
        self.check(counts)
        by_size = sorted(counts, key=self.tokens_of, reverse=True)
        left, num_batches = dict(counts), 0
        found: dict[Bucket, list[tuple[np.ndarray, int]]] = {bucket: [] for bucket in counts}
        while any(left.values()):
            batch, room = {}, self.tokens
            for bucket in by_size:
                if taken := min(left[bucket], room // self.tokens_of(bucket)):
                    batch[bucket] = taken
                    room -= taken * self.tokens_of(bucket)
            times = min(left[bucket] // taken for bucket, taken in batch.items())  # equal batches at once
            for bucket, taken in batch.items():
                found[bucket].append((np.arange(num_batches, num_batches + times, dtype=np.int32), taken))
                left[bucket] -= taken * times
            num_batches += times
        pieces = [piece for of_bucket in found.values() for piece in of_bucket]
        sizes = [np.full(len(batches), size, np.int32) for batches, size in pieces]
        return Pieces(np.concatenate([batches for batches, _ in pieces]), np.concatenate(sizes))

    def check(self, buckets: Iterable[Bucket]) -> None:
        """Refuse buckets of which not even one sample fits, with a UserError that lists them."""
        too_large = (bucket for bucket in sorted(buckets) if not self.most_of(bucket))
        large = [f"{bucket}: {self.tokens_of(bucket)} tokens" for bucket in too_large]
        if large:
            title = f"--max_tokens_per_batch {self.tokens}: too few for one sample of these buckets; raise it:"
            raise UserError(listing(title, large))
