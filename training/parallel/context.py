"""Context parallelism: the tokens of each sample are divided among ranks, for videos too long for one device.

All ranks of a context group get the same samples. Each keeps all 226 text tokens and one part of the video's tokens,
from the patch embedding to the last projection. Only attention mixes tokens there: the queries stay local, and the
keys and values are gathered from all parts, so that any kernel works, with any number of heads. The last projection's
output is gathered too, so that inputs and outputs are as on one device.

Gradients need no correction. Each of the n ranks differentiates the loss of the complete output, and each collective's
backward pass sums the gradients of all ranks for each part. Summed over the copies of the weights that is n times the
gradient, so the mean, which DistributedDataParallel and FSDP take, is the gradient.

torch's `context_parallel` and diffusers' `ContextParallelConfig` divide text and video alike, need equal parts, and
compute partial attentions with the few kernels that return their normalizers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import distributed, nn


class ContextParallel:
    """Divides the video's tokens of a transformer among the ranks of a group, which get the same samples.

    Forward passes of different sizes must not overlap: a recomputed checkpointed block uses the size of the last one.
    """

    def __init__(self, group: distributed.ProcessGroup):
        self.group = group
        self.is_on = True
        self._num_tokens = 0  # of the video, in the last forward pass

    def divide(self, transformer: CogVideoXTransformer3DModel) -> None:
        """Make the transformer compute only this rank's part, and return the complete output; call once, on all ranks.

        Its attention needs the context too, see `attention.set_attention`.
        """
        transformer.register_forward_pre_hook(self._divide_positions, with_kwargs=True)
        transformer.patch_embed.register_forward_hook(self._divide_tokens)
        transformer.proj_out.register_forward_hook(self._gather_output)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Disable the division within the block, so that each rank computes independently."""
        self.is_on = False
        try:
            yield
        finally:
            self.is_on = True

    def gather_keys(
        self, key: torch.Tensor, value: torch.Tensor, text_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather all parts of the video: `[B, T + P, heads, D / heads]` -> `[B, T + V, heads, D / heads]` each.

        While the division is off, both are returned unchanged.

        Args:
            text_length: T; the text's tokens are the first.
        """
        if not self.is_on:
            return key, value
        # Tokens first, for the collective; both in one call.
        part = torch.stack([states[:, text_length:].transpose(0, 1) for states in (key, value)], dim=1)
        gathered = _AllGather.apply(part, self.group)[: self._num_tokens]
        return tuple(
            torch.cat([states[:, :text_length], video.transpose(0, 1)], dim=1)
            for states, video in zip((key, value), gathered.unbind(1), strict=True)
        )

    def _divide_positions(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Replace the rotary embedding by that of this part, cos and sin `[P, D / heads]`."""
        rotary = kwargs.get("image_rotary_emb")
        if self.is_on and rotary is not None:
            kwargs = kwargs | {"image_rotary_emb": tuple(self._part_of(table, 0) for table in rotary)}
        return args, kwargs

    def _divide_tokens(self, patch_embed: nn.Module, args: tuple, tokens: torch.Tensor) -> torch.Tensor:
        """Reduce the embedded tokens `[B, T + V, D]` to `[B, T + P, D]`."""
        if not self.is_on:
            return tokens
        text_length = args[0].shape[1]  # of the prompt's embedding
        self._num_tokens = tokens.shape[1] - text_length
        return torch.cat([tokens[:, :text_length], self._part_of(tokens[:, text_length:], 1)], dim=1)

    def _gather_output(self, proj_out: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Gather the projected parts `[B, P, C]` to `[B, V, C]`."""
        if not self.is_on:
            return output
        return _AllGather.apply(output.transpose(0, 1), self.group)[: self._num_tokens].transpose(0, 1)

    def _part_of(self, tokens: torch.Tensor, dim: int) -> torch.Tensor:
        return part_of(tokens, dim, self.group.rank(), self.group.size())


def start_context_parallel(size: int, timeout: timedelta) -> ContextParallel | None:
    """Create groups of `size` neighbouring ranks, a divisor of their number; called on every rank.

    accelerate's device mesh has the same groups: context is its innermost dimension. Returns None for groups of one.
    """
    return None if size == 1 else ContextParallel(distributed.new_subgroups(size, timeout=timeout)[0])


def part_of(tokens: torch.Tensor, dim: int, part: int, num_parts: int) -> torch.Tensor:
    """Return part number `part`, from 0, of equally long parts of the tokens along a dimension.

    The last parts are padded with zeros. All padding is at the end of the gathered keys and outputs, so that cutting
    them to length replaces a mask.
    """
    num_tokens = tokens.shape[dim]
    length = -(-num_tokens // num_parts)
    start, stop = (min(number * length, num_tokens) for number in (part, part + 1))
    padding = [0, 0] * (tokens.ndim - dim - 1) + [0, length - (stop - start)]
    return nn.functional.pad(tokens.narrow(dim, start, stop - start), padding)


class _AllGather(torch.autograd.Function):
    """Concatenates the tensors of all ranks; the gradient of each is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        gathered = part.new_empty(group.size() * len(part), *part.shape[1:])
        distributed.all_gather_into_tensor(gathered, part.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        part = gradient.new_empty(len(gradient) // ctx.group.size(), *gradient.shape[1:])
        distributed.reduce_scatter_tensor(part, gradient.contiguous(), group=ctx.group)
        return part, None
