"""Host memory that a GPU copies from and to while it computes: pinned, and little more of it than is needed.

torch's allocator rounds each request for pinned memory up to a power of two, up to twice what was asked for, and keeps
what is given back. So memory is asked for in powers of two here, and split up; and it is kept for as long as it may be
of use.
"""

from collections.abc import Iterator, Sequence

import torch


ALIGNMENT = 512  # bytes; what the allocator of device memory aligns to
LARGEST_CHUNK = 2**31  # bytes


def host_buffers(sizes: Sequence[int], *, pinned: bool) -> Iterator[torch.Tensor]:
    """Allocate buffers that last, chunk by chunk as they are asked for: what they replace can be freed meanwhile.

    Args:
        sizes: in bytes.
        pinned: needs a GPU.

    Returns:
        For each size, uint8 tensors `[size]`.
    """
    for chunk, members in plan_chunks(sizes):
        memory = torch.empty(chunk, dtype=torch.uint8, pin_memory=pinned)
        yield from memory[: sum(members)].split(members)


def plan_chunks(sizes: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Pack buffers, in their order, into chunks of powers of two.

    Returns:
        The size of each chunk, and those of the buffers in it, in bytes. Of many buffers of similar sizes, less than
        one for each chunk is wasted.
    """
    chunks, start, left = [], 0, sum(sizes)
    while start < len(sizes):
        # The rest is packed as its binary digits: a large chunk, then smaller ones, the last about one buffer large.
        chunk = max(power_above(sizes[start]), min(LARGEST_CHUNK, _power_below(left)))
        members: list[int] = []
        while start < len(sizes) and sum(members) + sizes[start] <= chunk:
            members.append(sizes[start])
            start += 1
        chunks.append((chunk, members))
        left -= sum(members)
    return chunks


def power_above(size: int) -> int:
    """What torch's allocator takes for a request for pinned memory: the next power of two."""
    return 1 << max(size - 1, 0).bit_length()


def _power_below(size: int) -> int:
    return 1 << max(size.bit_length() - 1, 0)


class HostStack:
    """Room for bytes that are put down one after another and all given up together, over and over.

    It grows by chunks to what the largest round needs, and is allocated only once.
    """

    def __init__(self, chunk_bytes: int = 2**28) -> None:
        self._chunk_bytes = chunk_bytes
        self._chunks: list[torch.Tensor] = []
        self.used = 0  # bytes taken since the last reset

    @property
    def allocated(self) -> int:
        """Bytes in all chunks."""
        return len(self._chunks) * self._chunk_bytes

    def take(self, size: int, *, pinned: bool) -> list[torch.Tensor]:
        """The next `size` bytes: uint8 tensors, of which all but the first begin a chunk.

        Args:
            pinned: whether to pin what is allocated; needs a GPU.
        """
        pieces = []
        while size > 0:
            number, start = divmod(self.used, self._chunk_bytes)
            if number == len(self._chunks):
                self._chunks.append(torch.empty(self._chunk_bytes, dtype=torch.uint8, pin_memory=pinned))
            pieces.append(self._chunks[number][start : start + size])
            self.used += len(pieces[-1])
            size -= len(pieces[-1])
        return pieces

    def reset(self) -> None:
        """Give all room up; who still copies from it must do so before what comes next is copied into it."""
        self.used = 0
