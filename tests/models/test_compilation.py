"""Blocks are compiled once per size and mode, and compute the same."""

import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounterWithBackend

from common.errors import UserError
from forward_pass import predict
from memory.activations import CheckpointStore, checkpoint_activations
from memory.block_streaming import stream_blocks
from memory.pinned import HostStack
from models.attention import set_attention
from models.compilation import check_compiler, compile_blocks
from tiny_steps import assert_same, train_step, with_adapters


CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("fresh_compiler")


def losses(transformer, sizes: list[int], **options) -> list[float]:
    optimizer = torch.optim.SGD([weight for weight in transformer.parameters() if weight.requires_grad], lr=1.0)
    values = []
    for frames in sizes:
        loss = predict(transformer, frames, **options).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


@pytest.mark.parametrize(("scope", "backend"), [("segment", "eager"), ("all-but-attention", "aot_eager")])
def test_all_blocks_share_one_compilation_for_each_size_and_mode(tiny_models, scope, backend):
    sizes = [5, 2, 5, 2]  # latent frames
    eager, compiled = (with_adapters(tiny_models("5b"), dropout=0.0) for _ in range(2))
    names = list(eager.state_dict())
    for transformer in (eager, compiled):
        set_attention(transformer, "native")
        checkpoint_activations(transformer, scope)
    counter = CompileCounterWithBackend(backend)
    compile_blocks(compiled, num_sizes=2, backend=counter)
    expected = losses(eager, sizes)
    assert losses(compiled, sizes) == pytest.approx(expected, rel=1e-5)
    assert expected[2:] != pytest.approx(expected[:2], rel=1e-2)  # the steps between changed something
    assert counter.frame_count == 2
    with torch.no_grad():
        torch.testing.assert_close(predict(compiled.eval(), 2), predict(eager.eval(), 2))
    assert counter.frame_count == 3
    losses(compiled.train(), sizes)
    assert counter.frame_count == 3
    assert list(compiled.state_dict()) == names


INPUT_BYTES = 2 * (16 + 5 * 4 * 6) * 128 * 4  # text and video tokens of two samples, float32


def compile_all(transformer, scope: str, *, streams: bool):
    """Compile a transformer's blocks with their checkpoints; return store, stream, and the graphs, backward last."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    store, stream = CheckpointStore(HostStack(10_000)), None
    if streams:
        stream = stream_blocks(transformer, torch.device("cpu"), store, scope=scope)
    else:
        checkpoint_activations(transformer, scope, offload_to=store)
    partition = min_cut_rematerialization_partition  # inductor's, which knows checkpoints
    compile_blocks(transformer, 1, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=partition))
    return store, stream, graphs


@pytest.mark.parametrize(("scope", "streams", "attentions"), [("block", False, 2), ("all-but-attention", True, 1)])
def test_checkpoints_in_compiled_blocks_are_offloaded_and_streamed(tiny_models, scope, streams, attentions):
    # DoRA empties a cache in each forward pass, a side effect in a checkpoint.
    transformer, freed = with_adapters(tiny_models("5b"), dropout=0.0, use_dora=not streams), []
    set_attention(transformer)
    expected = train_step(transformer)
    store, stream, graphs = compile_all(transformer, scope, streams=streams)
    for block in transformer.transformer_blocks[1:]:
        block.register_forward_pre_hook(
            lambda _, __, inputs: (
                weakref.finalize(inputs["hidden_states"].untyped_storage(), freed.append, 0) and None
            ),
            with_kwargs=True,
        )
    transformer.proj_out.register_forward_pre_hook(lambda *_: freed.append("end"))

    for _ in range(2):
        assert_same(train_step(transformer), expected)
    assert store.stack.used == 4 * INPUT_BYTES
    assert freed[:3] == [0, 0, "end"]  # in the forward pass; the last block's inputs are still on the device
    assert stream is None or stream.num_copies == 2 * 4 - 2 + 2 * 4 - 4
    forward, backward = (" ".join(str(node.target) for node in graph.graph.nodes) for graph in graphs)
    assert forward.count("dot_product") == 1
    assert backward.count("dot_product") == attentions  # its gradient, and the attention itself


def test_a_checkpoint_compiles_with_the_same_configuration_in_another_thread(tiny_models):
    transformer = with_adapters(tiny_models("5b"), dropout=0.0)
    checkpoint_activations(transformer, "segment", 2)
    limits = []

    def backend(graph, inputs):
        limits.append((torch._dynamo.config.recompile_limit, torch._dynamo.config.optimize_ddp))
        return graph

    compile_blocks(transformer, num_sizes=9, backend=backend)
    loss = predict(transformer).square().mean()
    torch._dynamo.reset()  # so that the backward pass compiles again
    with ThreadPoolExecutor(1) as thread:  # as on a GPU, where autograd has one
        thread.submit(loss.backward).result()
    assert len(limits) >= 2 and set(limits) == {(72, False)}


def test_more_sizes_than_announced_are_an_error(tiny_models, monkeypatch):
    monkeypatch.setattr("models.compilation._GRAPHS_PER_SIZE", 1)
    transformer = with_adapters(tiny_models("5b"))
    compile_blocks(transformer, num_sizes=1, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(FailOnRecompileLimitHit):
        losses(transformer, [5, 2])


def test_the_limit_grows_with_the_number_of_sizes(tiny_models):
    transformer = with_adapters(tiny_models("5b"))
    with torch._dynamo.config.patch(recompile_limit=8):
        compile_blocks(transformer, num_sizes=9, backend="eager")
        predict(transformer)
        assert torch._dynamo.config.recompile_limit >= 9 * 4  # two batch sizes, training and sampling


def test_a_missing_compiler_is_one_line(monkeypatch, tmp_path):
    check_compiler(CPU)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"^--compile: needs a C\+\+ compiler; install g\+\+, or omit the flag$"):
        check_compiler(CPU)


@pytest.mark.gpu
def test_compiled_blocks_train_as_eager_ones(tiny_models):
    device = torch.device("cuda")
    check_compiler(device)
    eager, compiled = (with_adapters(tiny_models("5b"), dropout=0.0).to(device) for _ in range(2))
    for transformer in (eager, compiled):
        transformer.enable_gradient_checkpointing()
    compile_blocks(compiled, num_sizes=2)
    expected = losses(eager, [5, 2, 5], device=device, dtype=torch.bfloat16)
    assert losses(compiled, [5, 2, 5], device=device, dtype=torch.bfloat16) == pytest.approx(expected, rel=0.02)
