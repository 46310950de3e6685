"""How an error says that memory ran out."""

import torch


def memory_that_ran_out(error: BaseException) -> str | None:
    """Which memory an error says is full, "device" or "host"; None: it says something else."""
    if isinstance(error, MemoryError):
        return "host"
    if isinstance(error, torch.OutOfMemoryError):
        return "device"
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if "DefaultCPUAllocator" in text:
        return "host"
    # As the driver says it, not torch's own allocator: pinned memory, libraries' work spaces.
    return "device" if "out of memory" in text.lower() else None
