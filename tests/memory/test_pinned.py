import torch
from hypothesis import given
from hypothesis import strategies as st

from memory.pinned import LARGEST_CHUNK, HostStack, host_buffers, plan_chunks


SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=60)


@given(SIZES)
def test_chunks_hold_all_buffers_in_their_order(sizes):
    chunks = plan_chunks(sizes)

    assert [size for _, members in chunks for size in members] == sizes
    for chunk, members in chunks:
        assert chunk & (chunk - 1) == 0  # a power of two
        assert sum(members) <= chunk


def test_little_is_wasted_on_the_blocks_of_full_size_models():
    for block, num_blocks in ((259_300_352, 42), (112_922_624, 30), (130_200_000, 42), (67_000_000, 42)):
        chunks = plan_chunks([block] * num_blocks)

        assert max(chunk for chunk, _ in chunks) <= LARGEST_CHUNK
        assert sum(chunk for chunk, _ in chunks) < 1.06 * block * num_blocks


def test_buffers_have_their_sizes_and_share_no_byte():
    sizes = [700, 3, 5000, 512, 512]
    buffers = list(host_buffers(sizes, pinned=False))
    for number, buffer in enumerate(buffers):
        buffer.fill_(number)

    assert [len(buffer) for buffer in buffers] == sizes
    assert all((buffer == number).all() for number, buffer in enumerate(buffers))


@given(SIZES)
def test_a_stack_reuses_its_bytes_after_a_reset(sizes):
    stack = HostStack(chunk_bytes=1000)

    def take_all() -> list[list[int]]:
        return [[piece.data_ptr() for piece in stack.take(size, pinned=False)] for size in sizes]

    first = take_all()
    assert stack.used == sum(sizes)
    stack.reset()
    assert take_all() == first
    assert len(stack.chunks) == -(-sum(sizes) // 1000)


def test_pieces_of_a_stack_have_the_requested_length_and_do_not_overlap():
    stack = HostStack(chunk_bytes=1000)
    requests = [stack.take(size, pinned=False) for size in (400, 2500, 100, 1)]
    for number, pieces in enumerate(requests):
        for piece in pieces:
            piece.fill_(number)

    assert [sum(map(len, pieces)) for pieces in requests] == [400, 2500, 100, 1]
    assert [len(pieces) for pieces in requests] == [1, 3, 1, 1]
    assert all((torch.cat(pieces) == number).all() for number, pieces in enumerate(requests))
