"""Ranks that call a network in shards together: if one of them fails in between, none is left waiting."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from parallel.coordinator import Coordinator
from parallel.fsdp import is_fsdp


class OtherRankFailed(Exception):
    """Raised where this rank could go on, but another one cannot."""


class OutOfStep(RuntimeError):
    """Raised where a rank failed inside the network: the others wait for its shards, and only its end ends that."""


class Lockstep:
    """A context in which all ranks call a network equally often, and say before each call that they are still there.

    A rank that fails between two calls leaves the context with its error. The others are told at their next call: that
    ends what they do in the context, without an error. Where weights are whole nothing of this happens.

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
                "a rank failed inside a network whose weights are divided among ranks; the run ends, to be resumed "
                "from its last checkpoint"
            ) from error
        if not self._is_over and (error is None or isinstance(error, Exception)):
            self._agree(has_failed=error is not None)
        return isinstance(error, OtherRankFailed)  # whose own error says why

    @contextmanager
    def calling(self, network: torch.nn.Module) -> Iterator[None]:
        """Meanwhile all ranks call the network equally often."""
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
