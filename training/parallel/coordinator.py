"""Communication between the ranks of a launch over CPUs, without the GPUs' timeout."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from common.errors import UserError


_T = TypeVar("T")
# Longer than any rank works alone. If one dies, the launcher or the closed connection ends the others.
PATIENCE = timedelta(days=7)


class Coordinator:
    """Common decisions of all ranks, and waits that may be long.

    A watchdog (--nccl_timeout) ends a GPU collective that one rank enters too early, because it may be a hang. So
    ranks wait here after work of different duration (sampling, saving, downloads).
    """

    def __init__(self) -> None:
        """Connect all ranks of the launch, if there are several; called on every rank."""
        self.num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.num_ranks > 1 else None
        self._asked: tuple[Any, torch.Tensor] | None = None  # sent by the last call of `ask`

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that decides for all."""
        return self.group is None or dist.get_rank() == 0

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.group is not None:
            dist.barrier(self.group)

    def any(self, wish: bool) -> bool:
        """Return whether any rank wishes it; waits for all of them."""
        if self.group is None:
            return wish
        wishes = torch.tensor([wish], dtype=torch.int32)
        dist.all_reduce(wishes, dist.ReduceOp.MAX, self.group)
        return bool(wishes[0])

    def ask(self, *wishes: bool) -> tuple[bool, ...]:
        """Return for each wish whether any rank had it at the previous call; all False at the first call.

        The answer comes one call late, so that no rank waits for the others. A single process gets it at once.
        """
        if self.group is None:
            return wishes
        before, sent = self._asked, torch.tensor(wishes, dtype=torch.int32)
        self._asked = dist.all_reduce(sent, dist.ReduceOp.MAX, self.group, async_op=True), sent
        if before is None:
            return (False,) * len(wishes)
        before[0].wait()
        return tuple(map(bool, before[1].tolist()))

    def finish_asking(self) -> None:
        """Receive the last, unused answer; called on every rank."""
        if self._asked is not None:
            self._asked[0].wait()
            self._asked = None

    def from_main(self, find: Callable[[], _T]) -> _T:
        """Return `find()` of the main process, pickled, on all ranks; its UserError or OSError ends them all."""
        found: list[Any] = [None, None]
        if self.is_main:
            try:
                found[0] = find()
            except (UserError, OSError) as error:  # others keep their traceback
                found[1] = str(error)
        if self.group is not None:
            dist.broadcast_object_list(found, src=0, group=self.group)
        if found[1] is not None:
            raise UserError(found[1])
        return found[0]

    def gather(self, value: _T) -> list[_T]:
        """Return the values of all ranks, in rank order, on all of them."""
        values: list[Any] = [value] * self.num_ranks
        if self.group is not None:
            dist.all_gather_object(values, value, self.group)
        return values
