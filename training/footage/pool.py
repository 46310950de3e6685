"""Processes that work on files of footage."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

from common.signals import die_with_parent


@contextmanager
def worker_processes(num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield processes that end with the `with` statement, or at once with this process or at Ctrl-C."""
    # spawn, because a fork copies locks that the threads of libraries hold
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), die_with_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for what is queued
