"""Ranks make the same decisions, and wait for one another without a timeout."""

import threading

import pytest
import torch.distributed as dist

from common.errors import UserError
from forked_ranks import call_on_ranks
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


def use_everything() -> list:
    rank, coordinator = dist.get_rank(), Coordinator()
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


def test_two_ranks_get_the_same_answers_one_call_later(tmp_path):
    first, second = call_on_ranks(use_everything, 2, tmp_path / "ranks")
    nothing = (False, False)
    expected = [[nothing, nothing, (True, False), nothing], True, True, False, "from 0", [0, 1], "so it is"]
    assert first == expected
    assert second == [expected[0], False, *expected[2:]]


def be_late() -> bool:
    """Let the first rank wait longer than the timeout of the GPUs' group."""
    coordinator = Coordinator()
    if dist.get_rank() == 1:
        threading.Event().wait(timeout=2)  # never set: a long validation
    coordinator.wait()
    return True


def test_ranks_wait_longer_than_the_timeout_of_the_gpus(tmp_path):
    assert call_on_ranks(be_late, 2, tmp_path / "ranks", timeout=1) == [True, True]
