"""Gradient checkpointing: compute activations again in the backward pass, and offload the inputs to host memory."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from memory.pinned import HostStack


@dataclass(frozen=True)
class KeptActivations:
    """Activations on the device at the start of the backward pass, counted in transformer blocks."""

    inputs: int  # of checkpoints: hidden states and encoder hidden states, [B, T, D] together
    complete_blocks: int  # blocks without checkpoint, and those that are computed again at once
    without_feed_forward: int  # blocks with all activations except those of the feed-forward


def count_kept(scope: str, every: int, num_blocks: int) -> KeptActivations:
    """Count the kept activations for arguments of `checkpoint_activations`, or "none" for no checkpointing.

    With offloaded checkpoints, two of the inputs are on the device at a time, the others in host memory.
    """
    if scope == "none":
        return KeptActivations(0, num_blocks, 0)
    checkpoints = -(-num_blocks // every)
    complete = min(every, num_blocks) if scope == "segment" else num_blocks - checkpoints + 1
    return KeptActivations(checkpoints, complete, checkpoints - 1 if scope == "feed-forward" else 0)


def checkpoint_activations(
    transformer: CogVideoXTransformer3DModel,
    scope: str = "block",
    every: int = 1,
    offload_to: "CheckpointStore | None" = None,
) -> None:
    """Have the transformer compute activations again in the backward pass instead of keeping them.

    Gradients are the same, including dropout. The names of the weights stay, and nothing changes where no gradients
    are computed. The blocks may be compiled, before or after, except with "feed-forward" and a store. To be called
    once for a transformer.

    Args:
        scope: of a checkpoint: "block", "segment" (several blocks) or "feed-forward" (by far the largest part of a
            block).
        every: checkpoint one of so many blocks, starting with the first; for "segment", the number of its blocks.
        offload_to: for the inputs of the checkpoints; None keeps them on the device.
    """
    blocks = transformer.transformer_blocks
    if scope == "feed-forward":
        for number in range(0, len(blocks), every):
            _checkpoint_forward(blocks[number].ff, offload_to, is_first=number == 0)
        return

    def run_block(block: torch.nn.Module, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Replace a call of the block; the first one of a segment runs all of its blocks."""
        number = next(number for number, candidate in enumerate(blocks) if candidate is block)
        if number % every > 0:
            return inputs[:2] if scope == "segment" else block(*inputs)
        segment = blocks[number : number + every] if scope == "segment" else [block]

        def run_segment(hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *others: Any) -> tuple:
            for member in segment:
                hidden_states, encoder_hidden_states = member(hidden_states, encoder_hidden_states, *others)
            return hidden_states, encoder_hidden_states

        return _checkpoint(run_segment, inputs, offload_to, is_first=number == 0)

    transformer.enable_gradient_checkpointing(run_block)


def _checkpoint_forward(module: torch.nn.Module, store: "CheckpointStore | None", *, is_first: bool) -> None:
    forward = module.forward

    def checkpointed(*inputs: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        return _checkpoint(forward, inputs, store, is_first=is_first)

    module.forward = checkpointed


def _checkpoint(function: Callable, inputs: tuple, store: "CheckpointStore | None", *, is_first: bool) -> Any:
    """Call the function now, as the first checkpoint of the pass or a later one, and again in the backward pass."""
    if store is None:
        return checkpoint(function, *inputs, use_reentrant=False)
    if is_first:
        store.clear()
    # The checkpoint saves its inputs under these hooks and hides from them what is saved inside it.
    with store.next_checkpoint():
        return checkpoint(function, *inputs, use_reentrant=False)


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
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Kept:
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

    def _unpack(self, packed: torch.Tensor | _Kept) -> torch.Tensor:
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
