"""Let ranks call a sharded network together, so that none waits forever for one that failed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from parallel.coordinator import Coordinator
from parallel.fsdp import is_fsdp


class OtherRankFailed(Exception):
    """Another rank failed, so this one has to stop too."""


class OutOfStep(RuntimeError):
    """A rank failed inside the network: the others wait for its shards until it ends."""


@contextmanager
def lockstep(accelerator: Accelerator, coordinator: Coordinator) -> Iterator[Callable[[torch.nn.Module], None]]:
    """Yield a function that watches a network, which all ranks call equally often within the block.

    Each call of a watched network first checks that no rank has failed. A rank that fails between two calls leaves the
    block with its error; the others leave it at their next call, without an error. For unsharded weights nothing
    happens. A rank that fails inside the network raises OutOfStep.
    """
    if not is_fsdp(accelerator):
        yield lambda network: None
        return
    hooks, is_inside = [], False

    def begin(*_: Any) -> None:
        nonlocal is_inside
        if coordinator.any(False):
            raise OtherRankFailed
        is_inside = True

    def end(*_: Any) -> None:
        nonlocal is_inside
        is_inside = False

    def watch(network: torch.nn.Module) -> None:
        hooks.append(network.register_forward_pre_hook(begin, prepend=True))  # before those that gather the weights
        hooks.append(network.register_forward_hook(end))

    try:
        yield watch
        coordinator.any(False)
    except OtherRankFailed:
        pass  # that rank reports its error
    except Exception as error:
        if is_inside:
            raise OutOfStep(
                "a rank failed inside a network whose weights are sharded over the ranks; the run ends; resume it "
                "from its last checkpoint"
            ) from error
        coordinator.any(True)
        raise
    finally:
        for hook in hooks:
            hook.remove()
