"""Streamed blocks compute the same as resident ones, in two slots and with few copies."""

from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError
from memory.activations import CheckpointStore
from memory.block_streaming import BlockStream, frozen_bytes, stream_blocks
from memory.pinned import HostStack
from models.attention import set_attention
from tiny_steps import (
    assert_close,
    assert_same,
    fail_once_each_way,
    peak_of_steps,
    sample_step,
    train_step,
    wide_transformer,
    with_adapters,
)


pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tiny_models) -> Path:
    return tiny_models("5b")  # of four blocks


def frozen_weights(block: nn.Module) -> list[torch.Tensor]:
    return [parameter for parameter in block.parameters() if not parameter.requires_grad]


def entries(transformer: CogVideoXTransformer3DModel, stream: BlockStream) -> list[tuple[int, set[int]]]:
    """Record, for each block that starts, the blocks that are on the device or being copied there."""
    seen = []
    for number, block in enumerate(transformer.transformer_blocks):
        block.norm1.register_forward_pre_hook(
            lambda part, inputs, number=number: seen.append((number, {*stream.in_slots} - {None}))
        )
    return seen


@pytest.mark.parametrize("offloaded", [False, True])
def test_outputs_and_gradients_are_those_of_resident_blocks(transformer, expected, offloaded):
    stream_blocks(transformer, CPU, CheckpointStore(HostStack(10_000)) if offloaded else None)

    for _ in range(3):
        assert_same(train_step(transformer), expected)


@pytest.mark.parametrize("every", [1, 3])
def test_the_results_of_the_attention_can_be_kept(transformer, every):
    set_attention(transformer)
    expected = train_step(transformer)
    stream_blocks(transformer, CPU, scope="all-but-attention", every=every)

    for _ in range(3):
        assert_same(train_step(transformer), expected)


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_quantized_blocks_are_streamed(model, resident, quantize):
    pytest.importorskip("torchao")
    transformer = with_adapters(model, quantize=quantize)
    expected = train_step(transformer)
    quantized, plain = (frozen_bytes(one.transformer_blocks[0]) for one in (transformer, resident))
    stream = stream_blocks(transformer, CPU)

    for _ in range(2):
        assert_same(train_step(transformer), expected)
    assert sum(slot.nbytes for slot in stream.slots) == 2 * quantized
    assert quantized < 0.35 * plain  # which is in float32


def test_the_device_holds_two_blocks_and_a_block_computes_with_weights_in_its_slot(transformer):
    block_bytes = sum(weight.nbytes for weight in frozen_weights(transformer.transformer_blocks[0]))
    stream = stream_blocks(transformer, CPU)
    blocks = transformer.transformer_blocks
    at_rest = [[weight.data_ptr() for weight in frozen_weights(block)] for block in blocks]
    slots = set()

    def check(part: nn.Module, inputs: tuple) -> None:
        for block, places in zip(blocks, at_rest, strict=True):
            now = [weight.data_ptr() for weight in frozen_weights(block)]
            if block.ff is part:
                assert not set(now) & set(places)
                slots.add(frozen_weights(block)[0].untyped_storage().data_ptr())
            else:
                assert now == places

    for block in blocks:
        block.ff.register_forward_pre_hook(check)
    train_step(transformer)

    assert len(slots) == 2
    assert sum(slot.nbytes for slot in stream.slots) == 2 * frozen_bytes(blocks[0])
    assert block_bytes <= frozen_bytes(blocks[0]) < 1.05 * block_bytes  # the alignment


def test_the_next_block_is_copied_while_one_computes_in_either_direction(transformer):
    stream = stream_blocks(transformer, CPU)
    seen = entries(transformer, stream)

    train_step(transformer)
    there = [(0, {0, 1}), (1, {1, 2}), (2, {2, 3}), (3, {2, 3})]
    back = [(3, {2, 3}), (2, {1, 2}), (1, {0, 1}), (0, {0, 1})]
    assert seen == there + back
    assert stream.num_copies == 2 * 4 - 2

    train_step(transformer)  # the first two blocks are still there
    assert seen == 2 * (there + back)
    assert stream.num_copies == 2 * 4 - 2 + 2 * 4 - 4


def test_sampling_starts_with_the_first_block_again(transformer):
    sample = sample_step(transformer)
    stream = stream_blocks(transformer, CPU)
    seen = entries(transformer, stream)

    for _ in range(3):
        assert torch.equal(sample_step(transformer), sample)
    assert seen == 3 * [(0, {0, 1}), (1, {1, 2}), (2, {2, 3}), (3, {3, 0})]
    assert stream.num_copies == 3 * 4 + 1


# With three, the first cannot be copied while the last computes: they share a slot.
@pytest.mark.parametrize(("num_blocks", "num_copies"), [(1, 1), (2, 2), (3, 4 + 1 + 3 + 1)])
def test_training_and_sampling_take_turns_on_any_number_of_blocks(transformer, num_blocks, num_copies):
    transformer.transformer_blocks = transformer.transformer_blocks[:num_blocks]
    expected, sample = train_step(transformer), sample_step(transformer)
    stream = stream_blocks(transformer, CPU)

    for _ in range(2):
        assert_same(train_step(transformer), expected)
        assert torch.equal(sample_step(transformer), sample)
    assert stream.num_copies == num_copies


def test_a_pass_that_failed_does_not_disturb_the_next_step(transformer, expected):
    stream_blocks(transformer, CPU)
    for _ in fail_once_each_way(transformer, transformer.transformer_blocks[2].ff):
        assert_same(train_step(transformer), expected)


def test_moving_the_model_leaves_the_blocks_where_they_are(transformer):
    stream_blocks(transformer, CPU)
    train_step(transformer)
    places = [weight.data_ptr() for block in transformer.transformer_blocks for weight in frozen_weights(block)]

    transformer.double()

    after = [weight for block in transformer.transformer_blocks for weight in frozen_weights(block)]
    assert [weight.data_ptr() for weight in after] == places
    assert {weight.dtype for weight in after} == {torch.float32}
    others = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    others += transformer.patch_embed.parameters()
    assert {parameter.dtype for parameter in others} == {torch.float64}


def test_saved_and_trained_weights_stay_the_same(transformer):
    weights = {name: weight.clone() for name, weight in transformer.state_dict().items()}
    trainable = [id(parameter) for parameter in transformer.parameters() if parameter.requires_grad]
    stream_blocks(transformer, CPU)
    train_step(transformer)

    assert list(transformer.state_dict()) == list(weights)
    assert all(torch.equal(weight, weights[name]) for name, weight in transformer.state_dict().items())
    assert [id(parameter) for parameter in transformer.parameters() if parameter.requires_grad] == trainable


def test_weights_of_an_unknown_kind_are_refused(transformer):
    class Packed(nn.Parameter):
        """A stand-in for the 4-bit weights of bitsandbytes, whose bytes need other tensors."""

    layer = transformer.transformer_blocks[1].ff.net[2]
    layer.weight = Packed(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)

    with pytest.raises(UserError, match=r"--stream_blocks: weights of type Packed cannot be streamed; use"):
        stream_blocks(transformer, CPU)


@pytest.mark.usefixtures("one_process")
def test_a_wrapped_transformer_exchanges_only_its_adapters(transformer, expected):
    stream_blocks(transformer, CPU)
    wrapped = DistributedDataParallel(transformer)
    for _ in range(2):
        assert_same(train_step(transformer, model=wrapped), expected)
    parameters = dict(transformer.named_parameters())
    ignored = parameters.keys() & wrapped.parameters_to_ignore
    assert ignored == {name for name, parameter in parameters.items() if not parameter.requires_grad}


@pytest.mark.gpu
@pytest.mark.parametrize("offloaded", [False, True])
def test_streamed_blocks_compute_the_same_on_a_gpu(offloaded):
    resident, streamed = wide_transformer().cuda(), wide_transformer()
    stream_blocks(streamed, torch.device("cuda"), CheckpointStore() if offloaded else None)
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cuda", torch.bfloat16):
        expected, sample = train_step(resident, size=32), sample_step(resident)
        for _ in range(3):
            assert_close(train_step(streamed, size=32), expected, 1e-3)
            assert_close((sample_step(streamed), {}), (sample, {}), 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_quantized_blocks_are_streamed_on_a_gpu(model, quantize):
    pytest.importorskip("torchao")
    resident = with_adapters(model, dropout=0.0, quantize=quantize).cuda()
    streamed = with_adapters(model, dropout=0.0, quantize=quantize)
    stream_blocks(streamed, torch.device("cuda"))

    with sdpa_kernel(SDPBackend.MATH):
        expected = train_step(resident)
        for _ in range(3):
            assert_close(train_step(streamed), expected, 1e-3)


@pytest.mark.gpu
def test_streaming_leaves_two_blocks_on_the_gpu():
    peaks = []
    for is_streamed in (False, True):
        transformer = wide_transformer()
        if is_streamed:
            stream_blocks(transformer, torch.device("cuda"))
        else:
            transformer.cuda().enable_gradient_checkpointing()
        with torch.autocast("cuda", torch.bfloat16):
            peaks.append(peak_of_steps(transformer, size=16))
        blocks = [frozen_bytes(block) for block in transformer.transformer_blocks]
        del transformer

    assert peaks[0] - peaks[1] == pytest.approx(sum(blocks[2:]), rel=0.05)
