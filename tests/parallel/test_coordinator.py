"""Ranks decide alike, and wait for one another as long as it takes."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from common.errors import UserError
from forked_ranks import CONTEXT, start_server
from parallel.coordinator import Coordinator


def test_one_process_agrees_with_itself():
    coordinator = Coordinator()
    coordinator.wait()
    assert coordinator.is_main
    assert coordinator.any(True)
    assert coordinator.ask(True, False) == (True, False)
    coordinator.finish_asking()
    assert coordinator.from_main(lambda: 3) == 3
    assert coordinator.gather("a") == ["a"]
    with pytest.raises(UserError, match="so it is"):
        coordinator.from_main(refuse)


def refuse() -> None:
    raise UserError("so it is")


def start_rank(rank: int, port: int, work: Callable, results, gate) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # The group of the GPUs, whose patience is short.
    dist.init_process_group("gloo", timeout=timedelta(seconds=1))
    results.put((rank, work(rank, Coordinator(), gate)))


def on_two_ranks(work: Callable) -> list:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_server()
    results, gate = CONTEXT.Queue(), CONTEXT.Event()
    ranks = [CONTEXT.Process(target=start_rank, args=(rank, port, work, results, gate)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = dict(results.get() for _ in ranks)
    for process in ranks:
        process.join()
    return [found[0], found[1]]


def use_everything(rank: int, coordinator: Coordinator, gate) -> list:
    asked = [coordinator.ask(rank == 1 and turn == 1, False) for turn in range(4)]
    coordinator.finish_asking()
    try:
        coordinator.from_main(refuse)
        refused = False
    except UserError as error:
        refused = str(error)
    return [
        asked,
        coordinator.is_main,
        coordinator.any(rank == 1),
        coordinator.any(False),
        coordinator.from_main(lambda: f"from {rank}"),
        coordinator.gather(rank),
        refused,
    ]


def test_two_ranks_hear_the_same_one_call_later():
    first, second = on_two_ranks(use_everything)
    nothing = (False, False)
    expected = [[nothing, nothing, (True, False), nothing], True, True, False, "from 0", [0, 1], "so it is"]
    assert first == expected
    assert second == [expected[0], False, *expected[2:]]


def be_late(rank: int, coordinator: Coordinator, gate) -> bool:
    """The second rank comes when the first one has waited for longer than its group of GPUs would have."""
    if rank == 1:
        gate.wait(timeout=2)  # nobody opens it: a validation that takes long
    coordinator.wait()
    return True


def test_a_rank_that_takes_long_is_waited_for_beyond_the_timeout_of_the_gpus():
    assert on_two_ranks(be_late) == [True, True]
