"""Let ranks call a sharded network together, so that none waits forever for one that failed."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from parallel.coordinator import Coordinator
from parallel.fsdp import is_fsdp


class OtherRankFailed(Exception):
    """Another rank failed, so this one has to stop too."""


class OutOfStep(RuntimeError):
    """A rank failed inside the network: the others wait for its shards until it ends."""


class Lockstep:
    """A context in which all ranks call a network equally often, and check before each call that none has failed.

    A rank that fails between two calls leaves the context with its error. The others leave it at their next call,
    without an error. For unsharded weights the context does nothing.

    Raises:
        OutOfStep: this rank failed inside the network.
    """

    def __init__(self, accelerator: Accelerator, coordinator: Coordinator):
        self._coordinator = coordinator
        self._is_inside = False  # the network
        self._is_over = not is_fsdp(accelerator)

    def __enter__(self) -> "Lockstep":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if self._is_inside and isinstance(error, Exception):
            raise OutOfStep(
                "a rank failed inside a network whose weights are sharded over the ranks; the run ends; resume it "
                "from its last checkpoint"
            ) from error
        if not self._is_over and (error is None or isinstance(error, Exception)):
            self._agree(has_failed=error is not None)
        return isinstance(error, OtherRankFailed)  # which reports its own error

    @contextmanager
    def calling(self, network: torch.nn.Module) -> Iterator[None]:
        """Check at each call of this network, which all ranks call equally often, within the block."""
        if self._is_over:
            yield
            return
        hooks = [
            network.register_forward_pre_hook(self._begin, prepend=True),  # before those that gather the weights
            network.register_forward_hook(self._end),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, *_: Any) -> None:
        if self._agree(has_failed=False):
            raise OtherRankFailed
        self._is_inside = True

    def _end(self, *_: Any) -> None:
        self._is_inside = False

    def _agree(self, *, has_failed: bool) -> bool:
        self._is_over = self._coordinator.any(has_failed)
        return self._is_over
