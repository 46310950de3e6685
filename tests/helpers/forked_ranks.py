"""Scripts as several processes, forked from one that has imported everything: an import takes longer than training."""

import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from repository import TRAINING


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["warm_imports"])
# What Python tells of a process's work on files, in the order of a save: written, renamed, older ones removed.
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def start_server() -> None:
    """Start the process that all others are forked from; it finds modules by the environment only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TRAINING), str(Path(__file__).parent)]))
        forkserver.ensure_running()


def call_on_ranks(function: Callable[..., Any], num_ranks: int, folder: Path, *args: Any, timeout: float = 60) -> list:
    """Call a function in the processes of a launch, with a timeout of collectives in seconds; returns its results."""
    folder.mkdir()
    start_server()
    ranks = [
        CONTEXT.Process(target=call_on_rank, args=(function, rank, num_ranks, folder, args, timeout))
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * num_ranks

    import torch

    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def call_on_rank(
    function: Callable[..., Any], rank: int, num_ranks: int, folder: Path, args: tuple, timeout: float
) -> None:
    import torch
    from torch import distributed

    set_rank(rank, num_ranks)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/store", timedelta(seconds=timeout)
    distributed.init_process_group("gloo", store, rank=rank, world_size=num_ranks, timeout=timeout)
    torch.save(function(*args), folder / f"{rank}.pt")
    if distributed.is_initialized():  # a training run has ended it
        distributed.destroy_process_group()


def set_rank(rank: int, num_ranks: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(num_ranks), "ACCELERATE_USE_CPU": "true"}


@dataclass(frozen=True)
class Stop:
    """A moment of a run that depends on no clock except for the delay: most are in a save or shortly after it."""

    signal: signal.Signals
    event: int  # number of the file event in the output folder after which the process gets the signal
    delay: float  # seconds


def start(
    script: str, argv: list[str], log: Path, num_ranks: int = 1, *, stop: Stop | None = None, largest_file: int = 0
) -> list[multiprocessing.Process]:
    """Start a script as the ranks of one launch.

    Args:
        log: file to append the output of all ranks to.
        stop: when the first rank gets a signal; None: never.
        largest_file: that the ranks can write, in bytes; 0: any.
    """
    start_server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        CONTEXT.Process(
            target=run_rank, args=(script, argv, rank, num_ranks, port, log, None if rank else stop, largest_file)
        )
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    return ranks


def finish(script: str, argv: list[str], log: Path, num_ranks: int = 1) -> str:
    for process in start(script, argv, log, num_ranks):
        process.join()
        assert process.exitcode == 0, log.read_text()
    return log.read_text()


def run_rank(
    script: str, argv: list[str], rank: int, num_ranks: int, port: int, log: Path, stop: Stop | None, largest_file: int
) -> None:
    import torch

    if num_ranks > 1:
        set_rank(rank, num_ranks)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if stop:
        stop_at_event(stop, argv[argv.index("--output_dir") + 1])
    __import__(script).main(argv)


def stop_at_event(stop: Stop, folder: str) -> None:
    """Count the file events in a folder, and signal this process at the given one."""
    count = 0

    def watch(event: str, details: tuple) -> None:
        nonlocal count
        if event in FILE_EVENTS and str(details[0]).startswith(folder):
            count += 1
            if count == stop.event:
                # Immediately if there is no delay: at this event, not soon after it.
                later = threading.Timer(stop.delay, os.kill, (os.getpid(), stop.signal))
                later.start() if stop.delay else later.function(*later.args)

    sys.addaudithook(watch)
