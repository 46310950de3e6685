"""Frozen transformer blocks that stay in host memory and come to the device one after another, for the smallest cards.

Two slots on the device take turns: while one block computes, the next one is copied to the other slot. Nothing is ever
copied back, since nothing changed. diffusers' group offloading does not do this in training: a checkpointed block ends
its second run early, at the last activation that is needed, so that the hook which would offload it again is never
called and in the backward pass all blocks gather on the device; and what it prefetches there is the block after.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from common.errors import UserError
from memory.activations import CheckpointStore, checkpoint_activations
from memory.pinned import ALIGNMENT, host_buffers


def stream_blocks(
    transformer: CogVideoXTransformer3DModel, device: torch.device, offload_to: CheckpointStore | None = None
) -> "BlockStream":
    """Keep the frozen parameters of all blocks in host memory, and have each block copied to the device for its use.

    All the rest of the transformer, adapters in the blocks among it, goes to `device`, and only that moves when the
    transformer is moved later. Every block is checkpointed, as it must be: its weights are gone when its backward pass
    comes, unless it computes again then. To be called once for a transformer, on any device, after adapters were
    added (by `Lora.attach`, which has DistributedDataParallel leave frozen parameters alone) and weights quantized.

    Args:
        transformer: to be changed.
        device: to compute on.
        offload_to: where the inputs of the blocks are kept, as `checkpoint_activations` takes it.

    Raises:
        UserError: the weights are of a kind that cannot be streamed.
    """
    checkpoint_activations(transformer, "block", offload_to=offload_to)
    stream = BlockStream(transformer.transformer_blocks, device)
    transformer.to(device)
    return stream


def frozen_bytes(block: nn.Module) -> int:
    """Bytes of a block's frozen parameters; all blocks' are in host memory, the device has twice the largest one's."""
    return sum(_aligned(part) for _, _, parameter in _frozen(block) for part in _plain_parts(parameter))


class BlockStream:
    """A ring of two slots on the device for the frozen parameters of blocks that run one after another.

    A block that begins finds its weights in its slot, or waits for them, and has the next one copied to the other
    slot. Which is next: going forward, the one behind it; going back, the one before it; at either end the one that
    was just left, which is still there, so that turning round costs no copy. Where no gradients are computed, the
    first block comes after the last. Forward and backward pass through n blocks make 2n - 4 copies, the very first two
    more.

    Copies run on a stream of their own. One into a slot begins when all that was computed so far has ended: with it
    the forward pass of the block that was in the slot, or its backward pass, since autograd finishes a block before it
    goes on to the one before. Were a block not computed again for its backward pass, autograd would refuse: it sees
    that the saved weights were overwritten.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.num_copies = 0  # of blocks to the device, so far
        self._device = device
        sizes = [frozen_bytes(block) for block in blocks]
        buffers = host_buffers(sizes, pinned=device.type == "cuda")
        self._slots = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(2)]
        self._numbers = {block: number for number, block in enumerate(blocks)}
        # Always the same slot for a block: what an autograd function holds on to since the forward pass is right again
        # when the block's backward pass comes.
        self._blocks = [
            _StreamedBlock(block, next(buffers), self._slots[number % 2]) for number, block in enumerate(blocks)
        ]
        self._in_slots: list[int | None] = [None, None]
        self._mounted: int | None = None
        self._previous = -1
        self._copying: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copying = torch.cuda.Stream(device)
            self._arrived = [torch.cuda.Event() for _ in self._slots]
            for slot in self._slots:
                slot.record_stream(self._copying)  # when the ring is dropped, a copy may be under way
        for block in blocks:
            block.register_forward_pre_hook(self._begin_block)

    @property
    def resident(self) -> set[int]:
        """Numbers of the blocks that are on the device, or on their way there."""
        return {number for number in self._in_slots if number is not None}

    @property
    def device_bytes(self) -> int:
        """Of the slots."""
        return sum(slot.nbytes for slot in self._slots)

    # One hook for all blocks, not one for each: compiled blocks then share their code.
    @torch.compiler.disable
    def _begin_block(self, block: nn.Module, inputs: tuple) -> None:
        number = self._numbers[block]
        if number not in self._in_slots:
            self._copy(number)
        if self._copying is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrived[number % 2])
        self._mount(number)
        following = self._following(number)
        # From the last of an odd number of blocks to the first, both have the same slot.
        if following not in self._in_slots and following % 2 != number % 2:
            self._copy(following)
        self._previous = number

    def _following(self, number: int) -> int:
        """The block that is expected after this one."""
        last = len(self._blocks) - 1
        if not torch.is_grad_enabled():
            return 0 if number == last else number + 1
        if number in (0, last):
            return min(1, last) if number == 0 else last - 1
        return number + 1 if number > self._previous else number - 1

    def _copy(self, number: int) -> None:
        """Copy a block's parameters to its slot, when what is computed so far has ended."""
        slot, host = number % 2, self._blocks[number].host
        self._in_slots[slot] = None
        target = self._slots[slot][: len(host)]
        if self._copying is None:
            target.copy_(host)
        else:
            self._copying.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._copying):
                target.copy_(host, non_blocking=True)
                self._arrived[slot].record()
        self._in_slots[slot] = number
        self.num_copies += 1

    def _mount(self, number: int) -> None:
        """Let this block alone have its parameters in its slot; all others show those in host memory."""
        if self._mounted is not None:
            before = self._blocks[self._mounted]
            before.set_parameters(before.at_rest)
        self._blocks[number].set_parameters(self._blocks[number].in_slot)
        self._mounted = number


class _StreamedBlock:
    """A block's frozen parameters, in host memory and in its slot."""

    def __init__(self, block: nn.Module, host: torch.Tensor, slot: torch.Tensor) -> None:
        self.host = host  # uint8, all of them
        self._places = [(module, name) for module, name, _ in _frozen(block)]
        parameters = [parameter for _, _, parameter in _frozen(block)]
        for parameter in parameters:
            _check(parameter)
        self.at_rest = _laid_out(parameters, host)
        for parameter, copy in zip(parameters, self.at_rest, strict=True):
            for source, target in zip(_plain_parts(parameter), _plain_parts(copy), strict=True):
                target.copy_(source)
        self.in_slot = _laid_out(parameters, slot)
        self.set_parameters(self.at_rest)
        for module in {module for module, _ in self._places}:
            _keep_in_place(module, [name for owner, name in self._places if owner is module])

    def set_parameters(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give the block other tensors for its frozen parameters."""
        for (module, name), parameter in zip(self._places, parameters, strict=True):
            setattr(module, name, parameter)


def _frozen(block: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                yield module, name, parameter


def _check(parameter: nn.Parameter) -> None:
    if type(parameter) is not nn.Parameter and not is_traceable_wrapper_subclass(parameter):
        raise UserError(
            f"--stream_blocks: weights that are kept as {type(parameter).__name__} cannot be streamed; use "
            "--quantize_base none, int8 or fp8"
        )


def _keep_in_place(module: nn.Module, names: Sequence[str]) -> None:
    """Have `to`, `cuda`, `float` and so on pass some parameters of a module by.

    accelerate and pipelines move whole models, which would bring all blocks to the device at once.
    """

    def apply_to_others(function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        kept = {name: getattr(module, name) for name in names}
        for name in names:
            setattr(module, name, None)  # as an optional parameter that a module does without
        try:
            return type(module)._apply(module, function, recurse)
        finally:
            for name, parameter in kept.items():
                setattr(module, name, parameter)

    module._apply = apply_to_others


def _plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold the bytes: of a quantized one its integers, scales and so on, else itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor.detach()]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain_parts(getattr(tensor, name))]


def _laid_out(parameters: Sequence[nn.Parameter], buffer: torch.Tensor) -> list[nn.Parameter]:
    """Parameters like those given, one behind the other in a buffer of bytes, on its device."""
    start = 0

    def place(part: torch.Tensor) -> torch.Tensor:
        nonlocal start
        view = buffer[start : start + part.nbytes].view(part.dtype)
        start += _aligned(part)
        return view.as_strided(part.size(), torch.empty_like(part, device="meta").stride())

    return [nn.Parameter(_rebuilt(parameter, place), requires_grad=False) for parameter in parameters]


def _rebuilt(tensor: torch.Tensor, place: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A tensor like the one given, with each of its plain parts placed elsewhere."""
    if not is_traceable_wrapper_subclass(tensor):
        return place(tensor.detach())
    names, context = tensor.__tensor_flatten__()
    parts = {name: _rebuilt(getattr(tensor, name), place) for name in names}
    return type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())


def _aligned(part: torch.Tensor) -> int:
    return -(-part.nbytes // ALIGNMENT) * ALIGNMENT
