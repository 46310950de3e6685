"""Fetch the files of coming batches from a store while training."""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.ranks import local_size
from common.remote import RemotePath, at_hand, cache_limit
from data.sampler import Draw


def plan_blocks(
    places: np.ndarray, files: Sequence[np.ndarray], sizes: Sequence[np.ndarray], most: int
) -> np.ndarray | None:
    """Group samples that share files of a store, so that an epoch needs only a part of the files at a time.

    Args:
        places: of the samples in their data set, `[N]`, from 0 to 1.
        files: for each kind of file, the file of each sample, `[N]`; -1 for none in a store. Files of the first kind
            stay in one block.
        sizes: for each kind, the bytes of its files.
        most: bytes of the files of a block, unless one sample needs more.

    Returns:
        The block of each sample, from 0, `[N]`; None if the files of all samples take at most twice `most`.
    """
    if sum(map(np.sum, sizes)) <= 2 * most:
        return None
    first, in_store = files[0], files[0] >= 0
    # Each bucket and data set has files of its own: blocks take files from the same part of all lists.
    middles = np.bincount(first[in_store], places[in_store]) / np.bincount(first[in_store])
    needs = [_pairs(first, other) for other in files[1:]]
    blocks, block, held, size = np.zeros(len(middles), np.int64), 0, set(), 0
    for shard in np.argsort(middles, kind="stable").tolist():
        needed = {(kind, one) for kind, pairs in enumerate(needs, 1) for one in pairs.get(shard, ())}
        if size and size + _bytes(shard, needed - held, sizes) > most:
            block, held, size = block + 1, set(), 0
        size += _bytes(shard, needed - held, sizes)
        held |= needed
        blocks[shard] = block
    return np.where(in_store, blocks[first], (places * (block + 1)).astype(np.int64))


def _pairs(first: np.ndarray, other: np.ndarray) -> dict[int, list[int]]:
    """Return the other files of the samples of each first file."""
    pairs: dict[int, list[int]] = {}
    for one, another in np.unique(np.stack([first, other]), axis=1).T.tolist():
        if min(one, another) >= 0:
            pairs.setdefault(one, []).append(another)
    return pairs


def _bytes(shard: int, others: Iterable[tuple[int, int]], sizes: Sequence[np.ndarray]) -> int:
    return int(sizes[0][shard]) + sum(int(sizes[kind][one]) for kind, one in others)


class ReadAhead:
    """Batches whose files in stores a thread fetches into the cache, in their order, before they are drawn.

    The ranks of a machine together stay ahead by a quarter of the cache: so nothing is removed before it is used. A
    file that cannot be fetched is left to the reader of the batch, which reports it.

    Args:
        batches: can be iterated over again.
        files_of: returns the files of a draw.
    """

    def __init__(self, batches: Iterable[list[Draw]], files_of: Callable[[Draw], Sequence[Path]]):
        self.batches, self.files_of = batches, files_of
        self._most = cache_limit() // (4 * local_size())

    def __iter__(self) -> Iterator[list[Draw]]:
        position = _Position()
        threading.Thread(target=self._fetch, args=(position,), name="read-ahead", daemon=True).start()
        try:
            for number, batch in enumerate(self.batches):
                position.move(number)
                yield batch
        finally:
            position.move(math.inf)

    def _fetch(self, position: "_Position") -> None:
        ahead: deque[tuple[int, RemotePath, int]] = deque()  # number of the batch, file and bytes
        for number, batch in enumerate(self.batches):
            if position.is_over:
                return
            known = {file for _, file, _ in ahead}
            for file in dict.fromkeys(file for draw in batch for file in self.files_of(draw)):
                if not isinstance(file, RemotePath) or file in known:
                    continue
                while ahead and sum(size for *_, size in ahead) > self._most:
                    position.wait_for(ahead.popleft()[0])
                if position.has_passed(number):  # the loader has overtaken this thread
                    break
                with suppress(UserError, OSError), at_hand(file) as local:
                    ahead.append((number, file, local.stat().st_size))


class _Position:
    """The number of the batch that is drawn, shared between the loader and the thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._number = -1.0

    def move(self, number: float) -> None:
        """Set the number; infinite when no more batches are drawn."""
        with self._changed:
            self._number = number
            self._changed.notify()

    @property
    def is_over(self) -> bool:
        return self._number == math.inf

    def has_passed(self, number: int) -> bool:
        return self._number > number

    def wait_for(self, number: int) -> None:
        """Wait until a batch is drawn."""
        with self._changed:
            self._changed.wait_for(lambda: self._number >= number)
