"""Read, encode and write batches at the same time, and say which of the three held up the others."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar


_Batch = TypeVar("_Batch")
_Result = TypeVar("_Result")

READ_AHEAD = 2  # batches


@dataclass
class StageTimes:
    """Seconds of the thread that encodes."""

    reading: float = 0.0  # in which no batch was ready to be encoded
    encoding: float = 0.0
    writing: float = 0.0  # in which too many results waited to be written

    @contextmanager
    def spent(self, stage: str) -> Iterator[None]:
        """Add the duration of the block to a stage."""
        begin = time.monotonic()
        yield
        setattr(self, stage, getattr(self, stage) + time.monotonic() - begin)

    def __str__(self) -> str:
        return (
            f"{self.reading:.1f} s waiting for decoding, {self.encoding:.1f} s encoding, {self.writing:.1f} s waiting "
            "for writing"
        )


def run_stages(
    batches: Iterable[_Batch],
    encode: Callable[[_Batch], _Result | None],
    write: Callable[[_Result], None],
    *,
    num_writers: int,
) -> StageTimes:
    """Read batches in one thread, encode them in this one, in their order, and write the results in others.

    Args:
        batches: up to READ_AHEAD of them are read before they are needed, in addition to those of their data workers.
        encode: returns what is to be written, or None.
        write: called by `num_writers` threads, for which at most twice as many results wait.
    """
    times = StageTimes()
    iterator = iter(batches)  # in this thread: the workers of a loader end with the thread that has started them
    writing: deque[Future] = deque()
    with ThreadPoolExecutor(num_writers) as writers, ThreadPoolExecutor(1) as reader:
        try:
            reading = deque(reader.submit(next, iterator, None) for _ in range(READ_AHEAD))
            while True:
                with times.spent("reading"):
                    batch = reading.popleft().result()
                if batch is None:
                    break
                reading.append(reader.submit(next, iterator, None))
                with times.spent("encoding"):
                    result = encode(batch)
                if result is not None:
                    writing.append(writers.submit(write, result))
                with times.spent("writing"):
                    # Waiting for the oldest bounds the results in memory, and raises a writer's error.
                    while len(writing) > 2 * num_writers:
                        writing.popleft().result()
            with times.spent("writing"):
                for future in writing:
                    future.result()
        finally:
            reader.shutdown(wait=False, cancel_futures=True)
    return times
