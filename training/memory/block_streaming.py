"""Block swap for frozen transformer blocks: they stay in host memory and are copied to the device one after another.

The device has two slots: while one block computes, the next one is copied to the other slot. Frozen weights are never
copied back. diffusers' group offloading does not work in training: a checkpointed block ends its second run early, at
the last activation that is needed, so that the hook which would offload it is not called and all blocks accumulate on
the device in the backward pass; it also prefetches in the wrong direction there.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, transform_subclass

from common.errors import UserError
from memory.activations import CheckpointStore, checkpoint_activations, keep_outside
from memory.pinned import ALIGNMENT, host_buffers


def stream_blocks(
    transformer: CogVideoXTransformer3DModel,
    device: torch.device,
    offload_to: CheckpointStore | None = None,
    *,
    scope: str = "block",
    every: int = 1,
) -> "BlockStream":
    """Keep the frozen parameters of all blocks in host memory, and copy each block to the device when it runs.

    The rest of the transformer, including adapters in the blocks, goes to `device`, and only the rest moves when the
    transformer is moved later. Every block is checkpointed, because its weights are gone before its backward pass. To
    be called once for a transformer, on any device, after adapters were added (with `Lora.attach`, which has
    DistributedDataParallel ignore frozen parameters) and weights quantized.

    The other arguments are those of `checkpoint_activations`; `scope` is "block", of every block, or
    "all-but-attention". Raises UserError if the weights are of a kind that cannot be streamed.
    """
    checkpoint_activations(transformer, scope, every)
    stream = BlockStream(transformer.transformer_blocks, device)
    if offload_to is not None:
        transformer.register_forward_pre_hook(lambda *_: offload_to.clear())
    for block in transformer.transformer_blocks:
        keep_outside(block, offload_to, stream)
    transformer.to(device)
    return stream


def frozen_bytes(block: nn.Module) -> int:
    """Return the bytes of a block's frozen parameters with their alignment."""
    return sum(_aligned(part) for _, _, parameter in _frozen(block) for part in plain_parts(parameter))


class BlockStream:
    """Two slots on the device for the frozen parameters of blocks that run one after another.

    When a block starts, it waits for its weights in its slot and has the next block copied to the other slot. The next
    block is the following one in the forward pass, the preceding one in the backward pass, and at either end the one
    that just ran, which is still in its slot. Without gradients, the first block comes after the last. Forward and
    backward pass through n blocks need 2n - 4 copies, the first pass two more.

    Copies run on a separate stream. A copy into a slot starts after the computation so far, which includes the forward
    or backward pass of the block that was in the slot: autograd finishes a block before the preceding one.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.num_copies = 0  # of blocks to the device
        self._device = device
        sizes = [frozen_bytes(block) for block in blocks]
        buffers = host_buffers(sizes, pinned=device.type == "cuda")
        self.slots = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(2)]
        self._numbers = {block: number for number, block in enumerate(blocks)}
        # A block always has the same slot, so that tensors which autograd saved are valid again in its backward pass.
        self._blocks = [
            _StreamedBlock(block, next(buffers), self.slots[number % 2]) for number, block in enumerate(blocks)
        ]
        self.in_slots: list[int | None] = [None, None]  # numbers of the blocks, from the start of their copy on
        self._mounted: int | None = None
        self.current = -1  # number of the block that runs
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._copying is not None:
            self._arrived = [torch.cuda.Event() for _ in self.slots]
            for slot in self.slots:
                slot.record_stream(self._copying)  # a copy may still run when the slots are dropped
        for block in blocks:
            block.register_forward_pre_hook(self._begin_block)

    # One hook for all blocks, so that compiled blocks share their code.
    @torch.compiler.disable
    def _begin_block(self, block: nn.Module, inputs: tuple) -> None:
        self._bring(self._numbers[block])

    def is_in_slot(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is a weight, or a part of one, in a slot."""
        storage = plain_parts(tensor)[0].untyped_storage()._cdata
        return any(storage == slot.untyped_storage()._cdata for slot in self.slots)

    def bring_back(self, number: int) -> None:
        """Have a block in its slot again for its backward pass, before what it saved or computes again is used."""
        if number != self.current:
            with torch.enable_grad():  # not in sampling, which runs in one direction
                self._bring(number)

    def _bring(self, number: int) -> None:
        """Have a block in its slot for the following computation, and the next one copied beside it."""
        if number not in self.in_slots:
            self._copy(number)
        if self._copying is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrived[number % 2])
        self._mount(number)
        following = self._following(number)
        # The first block and the last of an odd number share a slot.
        if following not in self.in_slots and following % 2 != number % 2:
            self._copy(following)
        self.current = number

    def _following(self, number: int) -> int:
        """Return the number of the block that is expected after this one."""
        last = len(self._blocks) - 1
        if not torch.is_grad_enabled():
            return 0 if number == last else number + 1
        if number in (0, last):
            return min(1, last) if number == 0 else last - 1
        return number + 1 if number > self.current else number - 1

    def _copy(self, number: int) -> None:
        """Copy a block's parameters to its slot after the computation so far."""
        slot, host = number % 2, self._blocks[number].host
        self.in_slots[slot] = None
        target = self.slots[slot][: len(host)]
        if self._copying is None:
            target.copy_(host)
        else:
            self._copying.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._copying):
                target.copy_(host, non_blocking=True)
                self._arrived[slot].record()
        self.in_slots[slot] = number
        self.num_copies += 1

    def _mount(self, number: int) -> None:
        """Set only this block's parameters to those in its slot; the others have those in host memory."""
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
            if nn.Parameter in type(parameter).__mro__[1:] and not is_traceable_wrapper_subclass(parameter):
                raise UserError(
                    f"--stream_blocks: weights of type {type(parameter).__name__} cannot be streamed; use "
                    "--quantize_base none, int8 or fp8"
                )
        self.at_rest = _laid_out(parameters, host)
        for parameter, copy in zip(parameters, self.at_rest, strict=True):
            for source, target in zip(plain_parts(parameter), plain_parts(copy), strict=True):
                target.copy_(source)
        self.in_slot = _laid_out(parameters, slot)
        self.set_parameters(self.at_rest)
        for module in {module for module, _ in self._places}:
            _keep_in_place(module, [name for owner, name in self._places if owner is module])

    def set_parameters(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace the block's frozen parameters."""
        for (module, name), parameter in zip(self._places, parameters, strict=True):
            setattr(module, name, parameter)


def _frozen(block: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                yield module, name, parameter


def _keep_in_place(module: nn.Module, names: Sequence[str]) -> None:
    """Have `to`, `cuda`, `float` and so on skip some parameters of a module.

    accelerate and pipelines move complete models, which would copy all blocks to the device at once.
    """

    def apply_to_others(function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        kept = {name: getattr(module, name) for name in names}
        for name in names:
            setattr(module, name, None)  # as an optional parameter that a module lacks
        try:
            return type(module)._apply(module, function, recurse)
        finally:
            for name, parameter in kept.items():
                setattr(module, name, parameter)

    module._apply = apply_to_others


def plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors with the bytes: the integers, scales and so on of a quantized one, else itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor.detach()]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in plain_parts(getattr(tensor, name))]


def _laid_out(parameters: Sequence[nn.Parameter], buffer: torch.Tensor) -> list[nn.Parameter]:
    """Return parameters of the same shapes and kinds that are views of consecutive parts of a buffer of bytes."""
    start = 0

    def place(part: torch.Tensor) -> torch.Tensor:
        nonlocal start
        view = buffer[start : start + part.nbytes].view(part.dtype)
        start += _aligned(part)
        return view.as_strided(part.size(), torch.empty_like(part, device="meta").stride())

    return [nn.Parameter(rebuilt(parameter, place), requires_grad=False) for parameter in parameters]


def rebuilt(tensor: torch.Tensor, place: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the same kind of tensor with each of its plain parts replaced by `place`."""
    if not is_traceable_wrapper_subclass(tensor):
        return place(tensor.detach())
    return transform_subclass(tensor, lambda _, part: rebuilt(part, place))


def _aligned(part: torch.Tensor) -> int:
    return -(-part.nbytes // ALIGNMENT) * ALIGNMENT
