"""Gradients are the same with every kind of checkpointing and with offloaded inputs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy

from memory.activations import (
    CheckpointStore,
    KeptActivations,
    attention_policy,
    checkpoint_activations,
    count_kept,
)
from memory.pinned import HostStack
from models.attention import set_attention
from tiny_steps import (
    assert_close,
    assert_same,
    fail_once_each_way,
    inputs_of,
    peak_of_steps,
    sample_step,
    train_step,
    wide_transformer,
    with_adapters,
)


SETTINGS = [("block", 1), ("block", 2), ("block", 3), ("segment", 2), ("segment", 3)]
SETTINGS += [("all-but-attention", 1), ("all-but-attention", 3), ("feed-forward", 1), ("feed-forward", 3)]
NUM_BLOCKS = 4
pytestmark = pytest.mark.usefixtures("one_thread")
INPUT_BYTES = 2 * (16 + 5 * 4 * 6) * 128 * 4  # text and video tokens of two samples, float32


def small_store() -> CheckpointStore:
    return CheckpointStore(HostStack(chunk_bytes=10_000))


def count_on_device(store: CheckpointStore) -> int:
    return sum(kept.tensor is not None for one in store.checkpoints for kept in one.kept)


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize(("scope", "every"), SETTINGS)
def test_gradients_are_those_without_checkpointing_dropout_included(transformer, expected, scope, every, offloaded):
    checkpoint_activations(transformer, scope, every, small_store() if offloaded else None)

    for _ in range(2):
        assert_same(train_step(transformer), expected)


@pytest.mark.parametrize("targets", [["to_q", "to_out.0"], ["ff.net.2"], ["norm2.linear"], ["all-linear"]])
@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize(("scope", "every"), [("block", 1), ("block", 3), ("all-but-attention", 3)])
def test_checkpoints_inside_of_blocks_give_the_same_gradients(tiny_models, scope, every, offloaded, targets):
    transformer = with_adapters(tiny_models("5b"), target_modules=targets)
    set_attention(transformer)
    expected = train_step(transformer)
    checkpoint_activations(transformer, scope, every, small_store() if offloaded else None)
    assert not transformer.gradient_checkpointing

    for _ in range(2):
        assert_same(train_step(transformer), expected)


@pytest.mark.parametrize(("scope", "every"), SETTINGS)
def test_only_the_checkpointed_parts_are_computed_again(transformer, scope, every):
    checkpoint_activations(transformer, scope, every)
    computed = []
    for number, block in enumerate(transformer.transformer_blocks):
        block.attn1.register_forward_pre_hook(lambda part, inputs, number=number: computed.append(number))
        block.ff.net[0].register_forward_pre_hook(lambda part, inputs, number=number: computed.append(f"ff {number}"))
    numbers, step = range(NUM_BLOCKS), 1 if scope == "all-but-attention" else every

    output = transformer(**inputs_of(transformer), return_dict=False)[0]
    assert computed == [part for number in numbers for part in (number, f"ff {number}")]

    computed.clear()
    output.mean().backward()
    pieces = [numbers[first : first + (every if scope == "segment" else 1)] for first in numbers[::step]]
    again = [part for piece in reversed(pieces) for number in piece for part in (number, f"ff {number}")]
    assert computed == (again[1::2] if scope == "feed-forward" else again)


@pytest.mark.parametrize("scope", ["block", "all-but-attention", "segment", "feed-forward"])
def test_weights_keep_their_names_and_sampling_is_untouched(transformer, scope):
    store = small_store()
    names, sample = list(transformer.state_dict()), sample_step(transformer)
    checkpoint_activations(transformer, scope, 2, store)

    assert list(transformer.state_dict()) == names
    assert torch.equal(sample_step(transformer), sample)
    assert store.stack.used == 0


@pytest.mark.parametrize(("scope", "every"), SETTINGS)
def test_all_inputs_of_checkpoints_go_to_host_memory_and_come_back(transformer, scope, every):
    store = small_store()
    checkpoint_activations(transformer, scope, every, store)

    output = transformer(**inputs_of(transformer), return_dict=False)[0]

    assert store.stack.used == count_kept(scope, every, NUM_BLOCKS).inputs * INPUT_BYTES
    # Those of the last checkpoint are needed first and still on the device.
    assert count_on_device(store) == (1 if scope == "feed-forward" else 2)
    output.mean().backward()
    assert count_on_device(store) == 0


def test_host_memory_is_allocated_once_and_grows_only_for_larger_batches(transformer):
    store = small_store()
    checkpoint_activations(transformer, offload_to=store)
    for batch_size, largest in ((2, 2), (1, 2), (2, 2), (3, 3)):
        train_step(transformer, batch_size)
        assert 0 <= sum(chunk.nbytes for chunk in store.stack.chunks) - NUM_BLOCKS * INPUT_BYTES * largest / 2 < 10_000


def test_a_pass_without_backward_pass_or_one_that_failed_does_not_disturb_the_next_step(transformer, expected):
    checkpoint_activations(transformer, offload_to=small_store())
    transformer(**inputs_of(transformer))
    for _ in fail_once_each_way(transformer, transformer.transformer_blocks[2].ff):
        assert_same(train_step(transformer), expected)


def test_a_backward_pass_after_another_forward_pass_is_refused(transformer):
    checkpoint_activations(transformer, offload_to=small_store())
    first = transformer(**inputs_of(transformer), return_dict=False)[0]
    transformer(**inputs_of(transformer))

    with pytest.raises(RuntimeError, match="released when another forward pass began"):
        first.mean().backward()


@pytest.mark.usefixtures("one_process")
def test_a_wrapped_transformer_gets_the_same_gradients_for_all_weights(transformer):
    transformer.requires_grad_(True)
    expected = train_step(transformer)
    checkpoint_activations(transformer, "segment", 2, small_store())
    wrapped = DistributedDataParallel(transformer)

    for _ in range(2):
        assert_same(train_step(transformer, model=wrapped), expected)


def test_kept_activations_are_counted():
    assert count_kept("none", 1, 42) == KeptActivations(inputs=0, complete_blocks=42, without_feed_forward=0)
    assert count_kept("block", 1, 42) == KeptActivations(inputs=42, complete_blocks=1, without_feed_forward=0)
    kept = count_kept("block", 4, 42)
    assert kept == KeptActivations(inputs=11, complete_blocks=32, without_feed_forward=0, attentions=11)
    kept = count_kept("all-but-attention", 4, 42)
    assert kept == KeptActivations(inputs=42, complete_blocks=1, without_feed_forward=0, attentions=11)
    assert count_kept("segment", 4, 42) == KeptActivations(inputs=11, complete_blocks=4, without_feed_forward=0)
    assert count_kept("feed-forward", 1, 42) == KeptActivations(inputs=42, complete_blocks=1, without_feed_forward=41)


KERNELS = ["flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_results_of_all_kernels_of_torch_are_kept(kernel):
    operator = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default
    assert attention_policy(None, operator) == CheckpointPolicy.MUST_SAVE
    assert attention_policy(None, torch.ops.aten.addmm.default) == CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.gpu
@pytest.mark.parametrize(("scope", "every"), [("block", 1), ("segment", 2), ("feed-forward", 1)])
def test_offloaded_checkpoints_give_the_same_gradients_on_a_gpu(scope, every):
    transformer = wide_transformer().cuda()
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cuda", torch.bfloat16):
        expected = train_step(transformer, size=32)
        checkpoint_activations(transformer, scope, every, CheckpointStore())
        for _ in range(3):
            assert_close(train_step(transformer, size=32), expected, 1e-3)


@pytest.mark.gpu
def test_offloaded_checkpoints_free_gpu_memory():
    tokens = 2 * (16 + 5 * 32 * 34)
    kept = tokens * 512 * 2  # bytes in bfloat16
    peaks = []
    for store in (None, CheckpointStore()):
        transformer = wide_transformer().cuda()
        checkpoint_activations(transformer, offload_to=store)
        with torch.autocast("cuda", torch.bfloat16):
            peaks.append(peak_of_steps(transformer, size=64))
        del transformer

    # Of 12 inputs, up to three are on the GPU: of the computed block, the one before it, and one being copied out.
    assert peaks[0] - peaks[1] > 8 * kept
