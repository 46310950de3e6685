"""What the ranks of a launch agree on among themselves, without their GPUs and without hurry."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from common.errors import UserError


_T = TypeVar("T")
# Long enough for anything that a rank may do alone. Where one dies, its launcher or the closed connection ends others.
PATIENCE = timedelta(days=7)


class Coordinator:
    """Decisions that all ranks must take alike, and waits that may last, over CPUs.

    A collective of GPUs that one rank enters early is ended by a watchdog (--nccl_timeout), because it may be a hang.
    Whoever is done with something that takes ranks differently long (sampling, saving, downloads) waits here first.
    """

    def __init__(self) -> None:
        """Connect all ranks of the launch, if there are several; called on every rank."""
        self.num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.num_ranks > 1 else None
        self._asked: tuple[Any, torch.Tensor] | None = None  # what the last call of `ask` sent out

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that decides alone."""
        return self.group is None or dist.get_rank() == 0

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.group is not None:
            dist.barrier(self.group)

    def any(self, wish: bool) -> bool:
        """Whether any rank wishes it; waits for all of them."""
        if self.group is None:
            return wish
        wishes = torch.tensor([wish], dtype=torch.int32)
        dist.all_reduce(wishes, dist.ReduceOp.MAX, self.group)
        return bool(wishes[0])

    def ask(self, *wishes: bool) -> tuple[bool, ...]:
        """Whether any rank wished each of these, the call before; nothing at the first call.

        The answer to this call comes with the next one, so that no rank waits for what others do meanwhile. One
        process has its answer at once.
        """
        if self.group is None:
            return wishes
        before, sent = self._asked, torch.tensor(wishes, dtype=torch.int32)
        self._asked = dist.all_reduce(sent, dist.ReduceOp.MAX, self.group, async_op=True), sent
        if before is None:
            return (False,) * len(wishes)
        work, answer = before
        work.wait()
        return tuple(map(bool, answer.tolist()))

    def finish_asking(self) -> None:
        """Take the last answer, which nobody needs; called on every rank."""
        if self._asked is not None:
            self._asked[0].wait()
            self._asked = None

    def from_main(self, find: Callable[[], _T]) -> _T:
        """What `find` returns on the main process, on all of them.

        Args:
            find: called there alone. What it returns travels as a pickle.

        Raises:
            UserError: on every rank, where `find` raised it, or an OSError.
        """
        found: list[Any] = [None, None]
        if self.is_main:
            try:
                found[0] = find()
            except (UserError, OSError) as error:  # of others than these, its traceback says more
                found[1] = str(error)
        if self.group is not None:
            dist.broadcast_object_list(found, src=0, group=self.group)
        if found[1] is not None:
            raise UserError(found[1])
        return found[0]

    def gather(self, value: _T) -> list[_T]:
        """The values of all ranks, in their order, on all of them."""
        values: list[Any] = [value] * self.num_ranks
        if self.group is not None:
            dist.all_gather_object(values, value, self.group)
        return values
