"""Failures that end a run and that the user can do something about: said in a few lines, with what to do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from common.errors import UserError, listing
from common.out_of_memory import memory_that_ran_out
from common.worker_watch import explain_death
from data.rows import one_line


_ADVICE_ON_HOST = (
    "give fewer --dataloader_num_workers or a smaller --train_batch_size (--batch_size), leave out --pin_memory and "
    "what keeps things in host memory (--offload_checkpoints, --stream_blocks, --use_cpu_offload_optimizer)"
)


@contextmanager
def explained_failures(advise: Callable[[], list[str]], on_host: str = _ADVICE_ON_HOST) -> Iterator[None]:
    """Turn a device or host that is out of memory, and a data worker that died, into errors that say what to do.

    Args:
        advise: what frees memory of the device, a line each, the least costly first; called when it is needed.
        on_host: what frees the host's memory, as the end of a sentence.

    Raises:
        UserError: in their place.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        explanation = explain_death(error) or _explain_memory(error, advise, on_host)
        if explanation is None:
            raise
        raise UserError(explanation) from error


def _explain_memory(error: BaseException, advise: Callable[[], list[str]], on_host: str) -> str | None:
    memory = memory_that_ran_out(error)
    if memory is None:
        return None
    # Torch goes on with a page about its allocator.
    reason = one_line(f"{type(error).__name__}: {'. '.join(str(error).split('. ')[:3])}", 300)
    if memory == "host":
        return f"out of host memory ({reason}); {on_host}"
    return listing(f"out of GPU memory ({reason}); what to change, the least costly first:", advise())
