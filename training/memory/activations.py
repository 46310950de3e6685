"""Gradient checkpointing: compute activations again in the backward pass, and offload the inputs to host memory."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from types import MethodType
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from memory.pinned import HostStack
from models.blocks import first_part, last_part, uses_blocks
from models.blocks import forward as compute_block


# Parts whose training needs the input or the output of a feed-forward's last layer.
_NEED_LAST = (".ff.net.2.", ".norm2.", "time_embedding.", "ofs_embedding.")


@dataclass(frozen=True)
class KeptActivations:
    """Activations on the device at the start of the backward pass, counted in transformer blocks."""

    inputs: int  # of checkpoints: hidden states and encoder hidden states, [B, T, D] together
    complete_blocks: int  # blocks without checkpoint, and those that are computed again at once
    without_feed_forward: int  # blocks with all activations except those of the feed-forward
    attentions: int = 0  # results of the attention with their statistics, of blocks that are computed again


def count_kept(scope: str, every: int, num_blocks: int) -> KeptActivations:
    """Count the kept activations for arguments of `checkpoint_activations`, or "none" for no checkpointing.

    With offloaded checkpoints, two of the inputs are on the device at a time, the others in host memory.
    """
    if scope == "none":
        return KeptActivations(0, num_blocks, 0)
    checkpoints = -(-num_blocks // every)
    if scope == "all-but-attention":
        return KeptActivations(num_blocks, 1, 0, attentions=checkpoints)
    attentions = checkpoints if scope == "block" and every > 1 else 0
    complete = min(every, num_blocks) if scope == "segment" else num_blocks - checkpoints + 1
    return KeptActivations(checkpoints, complete, checkpoints - 1 if scope == "feed-forward" else 0, attentions)


def checkpoint_activations(
    transformer: CogVideoXTransformer3DModel,
    scope: str = "block",
    every: int = 1,
    offload_to: "CheckpointStore | None" = None,
) -> None:
    """Have the transformer compute activations again in the backward pass instead of keeping them.

    Gradients are the same, including dropout. The names of the weights stay, and nothing changes where no gradients
    are computed. To be called once for a transformer, after `set_attention`.

    Args:
        scope: of a checkpoint: "block", "all-but-attention" (a block, but the result of its attention is kept),
            "segment" (several blocks) or "feed-forward" (by far the largest part of a block).
        every: checkpoint one of so many blocks, starting with the first; for "segment", the number of its blocks; for
            "all-but-attention", keep the attention of one of so many blocks. Where memory allows blocks without
            checkpoint, the others keep their attention, which saves more arithmetic for its memory.
        offload_to: for the inputs of the checkpoints; None keeps them on the device.

    Checkpoints of blocks are parts of the blocks' forward passes and can be compiled with them.
    """
    blocks = transformer.transformer_blocks
    if offload_to is not None:
        transformer.register_forward_pre_hook(lambda *_: offload_to.clear())
    if scope == "feed-forward":
        for number in range(0, len(blocks), every):
            _checkpoint_forward(blocks[number].ff, offload_to)
        return
    if scope == "segment":
        _checkpoint_segments(transformer, every, offload_to)
        return
    keeps_some = scope == "all-but-attention" or every > 1
    forwards = [_checkpointed_block(transformer, keeps_attention=keeps) for keeps in (False, True)]
    for number, block in enumerate(blocks):
        if scope == "all-but-attention" or number % every == 0:
            block.forward = MethodType(forwards[keeps_some and number % every == 0], block)
            if offload_to is not None:
                keep_outside(block, offload_to)


def _checkpoint_segments(
    transformer: CogVideoXTransformer3DModel, length: int, store: "CheckpointStore | None"
) -> None:
    blocks = transformer.transformer_blocks

    def run_block(block: torch.nn.Module, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Replace a call of the block; the first one of a segment runs all of its blocks."""
        number = next(number for number, candidate in enumerate(blocks) if candidate is block)
        if number % length > 0:
            return inputs[:2]

        def run_segment(hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *others: Any) -> tuple:
            for member in blocks[number : number + length]:
                hidden_states, encoder_hidden_states = member(hidden_states, encoder_hidden_states, *others)
            return hidden_states, encoder_hidden_states

        return _checkpoint(run_segment, inputs, store)

    transformer.enable_gradient_checkpointing(run_block)


def omits_last_layer(transformer: CogVideoXTransformer3DModel) -> bool:
    """Return whether checkpoints of blocks omit the last layer of the feed-forward: it is frozen, and ends the block.

    The backward pass of a frozen linear layer needs neither its input nor its output. Of a trained one it needs the
    input, the largest tensor of a block; if the gates are trained, it needs the output.
    """
    trained = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    is_of_blocks = not transformer.gradient_checkpointing  # set for segments
    return is_of_blocks and not any(part in name for name in trained for part in _NEED_LAST)


def _checkpointed_block(transformer: CogVideoXTransformer3DModel, *, keeps_attention: bool) -> Callable:
    """Return the forward pass of a block with a checkpoint inside it."""
    compute = compute_block if uses_blocks(transformer) else type(transformer.transformer_blocks[0]).forward
    omits_last = compute is compute_block and omits_last_layer(transformer)
    options = _KEEP_ATTENTION if keeps_attention else {}

    def checkpointed(
        block: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = block, hidden_states, encoder_hidden_states, temb, image_rotary_emb
        if not torch.is_grad_enabled():
            return compute(*inputs)
        if not omits_last:
            return checkpoint(compute, *inputs, use_reentrant=False, **options)
        part = checkpoint(first_part, *inputs, use_reentrant=False, **options)
        return last_part(block, part, image_rotary_emb)

    return checkpointed


def _checkpoint_forward(module: torch.nn.Module, store: "CheckpointStore | None") -> None:
    forward = module.forward

    def checkpointed(*inputs: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        return _checkpoint(forward, inputs, store)

    module.forward = checkpointed


def _checkpoint(function: Callable, inputs: tuple, store: "CheckpointStore | None") -> Any:
    """Call the function now and again in the backward pass."""
    if store is None:
        return checkpoint(function, *inputs, use_reentrant=False)
    # The checkpoint saves its inputs under these hooks and hides from them what is saved inside it.
    with store.next_checkpoint():
        return checkpoint(function, *inputs, use_reentrant=False)


def keep_outside(block: torch.nn.Module, store: "CheckpointStore | None", stream: Any = None) -> None:
    """Have a block that contains a checkpoint keep its inputs in the store, and its weights in the slot of a stream.

    Compiled or not, autograd saves the block's inputs, its weights, and the results of its attention, which stay where
    they are. The module's hooks surround its forward pass, which may be compiled before or after this call.

    Args:
        stream: a `BlockStream`, whose own hook comes first. What is saved then has it bring the block back.
    """
    contexts = []

    def enter(block: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        tokens = [states.shape for states in (*args, *kwargs.values()) if getattr(states, "ndim", 0) == 3]
        number = None if stream is None else stream.current
        if store is not None:
            store.next_checkpoint()

        def pack(tensor: torch.Tensor) -> tuple[Any, bool]:
            is_input = tensor.shape in tokens  # by shape, because compiled blocks may copy them
            kept = store.pack(tensor) if store is not None and is_input else tensor
            return kept, stream is not None and (is_input or stream.is_in_slot(tensor))

        def unpack(packed: tuple[Any, bool]) -> torch.Tensor:
            kept, is_streamed = packed
            if is_streamed:
                stream.bring_back(number)
            return kept if isinstance(kept, torch.Tensor) else store.unpack(kept)

        contexts.append(saved_tensors_hooks(pack, unpack))
        contexts[-1].__enter__()

    def leave(*_: Any) -> None:
        while contexts:
            contexts.pop().__exit__(None, None, None)

    block.register_forward_pre_hook(enter, with_kwargs=True)
    block.register_forward_hook(leave, always_call=True)


def attention_policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what torch's and the packages' kernels of attention return: the result and the sums of the softmax."""
    name = str(operator)
    is_attention = "dot_product" in name or "flash_attn" in name
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


_KEEP_ATTENTION: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, attention_policy)}
if "respect_saved_tensors_hooks" in signature(checkpoint).parameters:  # from torch 2.15 on, to be decided
    _KEEP_ATTENTION["respect_saved_tensors_hooks"] = False  # the results stay on the device, also with a store


@dataclass(eq=False)
class _Kept:
    """A tensor in host memory, and on the device while it is copied out or back."""

    checkpoint: int  # its number in the forward pass
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    host: list[torch.Tensor] | None  # its bytes; None when their room was released
    tensor: torch.Tensor | None


@dataclass(eq=False)
class _Checkpoint:
    """The tensors of one checkpoint."""

    kept: list[_Kept] = field(default_factory=list)
    copied: torch.cuda.Event | None = None  # the last copy, out or back


class CheckpointStore:
    """Keeps the inputs of checkpoints in host memory between forward and backward pass.

    On a GPU the memory is pinned and copies run on a separate stream: out during the checkpoint's function, back
    during the backward pass of the following checkpoint. torch's `save_on_cpu` copies on the stream of the computation
    and allocates pinned memory for each tensor again.

    A forward pass releases what was kept for the previous one, whether a backward pass used it or not. Device memory
    is always allocated on the stream of the computation and dropped only after that stream has waited for the copy, so
    that it is reused in stream order, however far ahead the CPU is. (`Tensor.record_stream` would block its reuse
    until the CPU has seen the end of the copy: with the CPU a full pass ahead, nothing would be saved.) Host memory is
    used only by the copying stream, in its order.
    """

    def __init__(self, stack: HostStack | None = None) -> None:
        self.stack = stack or HostStack()
        self.checkpoints: list[_Checkpoint] = []
        self._copying: torch.cuda.Stream | None = None

    def clear(self) -> None:
        """Release everything at the start of a forward pass."""
        for one in self.checkpoints:
            self._drop(one)
            for kept in one.kept:
                kept.host = None
        self.checkpoints.clear()
        self.stack.reset()

    def next_checkpoint(self) -> saved_tensors_hooks:
        """Return the context in which to call the next checkpoint."""
        if self.checkpoints:
            self._drop(self.checkpoints[-1])  # it was copied during its function
        self.checkpoints.append(_Checkpoint())
        return saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Kept:
        """Copy a tensor of the current checkpoint to host memory."""
        # Token sequences are [B, T, D]; the time embedding, [B, D], is small and the same tensor for all blocks.
        if tensor.dim() < 3:
            return tensor
        tensor = tensor.detach().contiguous()
        host = self.stack.take(tensor.nbytes, pinned=tensor.is_cuda)
        number = len(self.checkpoints) - 1
        kept = _Kept(number, tensor.shape, tensor.dtype, tensor.device, host, tensor)
        self.checkpoints[number].kept.append(kept)
        self._copy(self.checkpoints[number], zip(host, _split_bytes(tensor, host), strict=True), tensor.device)
        return kept

    def unpack(self, packed: torch.Tensor | _Kept) -> torch.Tensor:
        """Return a packed tensor, on the device again."""
        if isinstance(packed, torch.Tensor):
            return packed
        if packed.host is None:
            raise RuntimeError("the inputs of this checkpoint were released when another forward pass began")
        one = self.checkpoints[packed.checkpoint]
        if packed.tensor is None:
            self._bring_back(one)
        self._wait(one)
        if packed.checkpoint > 0:
            self._bring_back(self.checkpoints[packed.checkpoint - 1])
        tensor, packed.tensor = packed.tensor, None
        return tensor

    def _bring_back(self, one: _Checkpoint) -> None:
        """Start to copy the tensors that are not on the device."""
        for kept in one.kept:
            if kept.tensor is None:
                kept.tensor = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)
                self._copy(one, zip(_split_bytes(kept.tensor, kept.host), kept.host, strict=True), kept.device)

    def _copy(
        self, one: _Checkpoint, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], device: torch.device
    ) -> None:
        """Copy the second of each pair to the first, after the computation so far and parallel to what follows."""
        if device.type != "cuda":
            for target, source in pairs:
                target.copy_(source)
            return
        if self._copying is None:
            self._copying = torch.cuda.Stream(device)
        self._copying.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._copying):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            one.copied = self._copying.record_event()

    def _wait(self, one: _Checkpoint) -> None:
        """Have the following computation wait for the last copy."""
        if one.copied is not None:
            torch.cuda.current_stream(self._copying.device).wait_event(one.copied)

    def _drop(self, one: _Checkpoint) -> None:
        """Keep the tensors of a checkpoint only in host memory."""
        self._wait(one)
        for kept in one.kept:
            kept.tensor = None


def _split_bytes(tensor: torch.Tensor, pieces: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Split the bytes of a contiguous tensor into parts as long as the pieces."""
    return tensor.view(-1).view(torch.uint8).split([len(piece) for piece in pieces])
