"""Pinned host memory, which a GPU copies from and to while it computes, with little waste.

torch's allocator rounds each request for pinned memory up to a power of two and keeps freed memory. So memory is
requested in powers of two here, split up, and reused.
"""

from collections.abc import Iterator, Sequence

import torch


ALIGNMENT = 512  # bytes, as torch's allocator of device memory
LARGEST_CHUNK = 2**31  # bytes


def host_buffers(sizes: Sequence[int], *, pinned: bool) -> Iterator[torch.Tensor]:
    """Allocate buffers chunk by chunk as they are requested, so that the tensors they replace can be freed meanwhile.

    Yields a uint8 tensor `[size]` for each size in bytes; pinned ones need a GPU.
    """
    for chunk, members in plan_chunks(sizes):
        memory = torch.empty(chunk, dtype=torch.uint8, pin_memory=pinned)
        yield from memory[: sum(members)].split(members)


def plan_chunks(sizes: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Pack buffers, in their order, into chunks of powers of two; return the bytes of each chunk and of its buffers.

    With similar sizes, each chunk wastes less than one buffer.
    """
    chunks, start, left = [], 0, sum(sizes)
    while start < len(sizes):
        # The binary digits of the rest: a large chunk, then smaller ones, the last about as large as one buffer.
        chunk = max(power_above(sizes[start]), min(LARGEST_CHUNK, 1 << (left.bit_length() - 1)))
        members: list[int] = []
        while start < len(sizes) and sum(members) + sizes[start] <= chunk:
            members.append(sizes[start])
            start += 1
        chunks.append((chunk, members))
        left -= sum(members)
    return chunks


def power_above(size: int) -> int:
    """Return the next power of two, which torch's allocator takes for a request for pinned memory."""
    return 1 << max(size - 1, 0).bit_length()


class HostStack:
    """Host memory that is taken piece by piece and released all together, again and again.

    It grows by chunks to the need of the largest round and is allocated only once.
    """

    def __init__(self, chunk_bytes: int = 2**28) -> None:
        self._chunk_bytes = chunk_bytes
        self.chunks: list[torch.Tensor] = []
        self.used = 0  # bytes taken since the last reset

    def take(self, size: int, *, pinned: bool) -> list[torch.Tensor]:
        """Return the next `size` bytes as uint8 tensors, split where a chunk ends; pin newly allocated chunks."""
        pieces = []
        while size > 0:
            number, start = divmod(self.used, self._chunk_bytes)
            if number == len(self.chunks):
                self.chunks.append(torch.empty(self._chunk_bytes, dtype=torch.uint8, pin_memory=pinned))
            pieces.append(self.chunks[number][start : start + size])
            self.used += len(pieces[-1])
            size -= len(pieces[-1])
        return pieces

    def reset(self) -> None:
        """Release everything; earlier copies from it must be done before the next copies into it."""
        self.used = 0
