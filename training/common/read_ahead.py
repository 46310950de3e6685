"""Fetch the files of coming batches from a store while training."""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.ranks import local_size
from common.remote import RemotePath, at_hand, cache_limit


class ReadAhead:
    """Batches whose files in stores a thread fetches into the cache, in their order, before they are drawn.

    The ranks of a machine together stay ahead by a quarter of the cache: so nothing is removed before it is used. A
    file that cannot be fetched is left to the reader of the batch, which reports it.

    Args:
        batches: can be iterated over again.
        files_of: returns the files of a draw.
    """

    def __init__(self, batches: Iterable[Sequence[Any]], files_of: Callable[[Any], Sequence[Path]]):
        self.batches, self.files_of = batches, files_of
        self._most = cache_limit() // (4 * local_size())

    def __iter__(self) -> Iterator[Sequence[Any]]:
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
