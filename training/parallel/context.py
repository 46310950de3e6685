"""Context parallelism: the tokens of each sample divided among ranks, for videos too long for one device.

All ranks of a context group are given the same samples. Each keeps the whole text, 226 tokens, and one part of the
video's tokens, from the patch embedding to the last projection. There only attention looks beyond a token: its queries
stay where they are, and its keys and values are gathered from all parts, so that any kernel computes it, with any
number of heads. The last projection's output is gathered too: what goes in and what comes out is as on one device.

Gradients need no correction. Each rank differentiates the loss of the whole output, and each collective's backward
pass gives every part the sum of what all ranks want of it. So a rank ends with the derivative of the sum of all ranks'
losses, which are n equal ones, by its own copy of the weights. Over the n copies these add up to n times the gradient:
their mean, which DistributedDataParallel and FSDP take, is the gradient. The text, of which each rank has a copy too,
needs no care of its own. Groups with other samples join in that mean as ranks do in data parallelism.

torch's `context_parallel` and diffusers' `ContextParallelConfig` divide text and video alike, want equal parts, and
compute partial attentions by the few kernels that return their normalizers. accelerate's own machinery (from
`parallelism_config_cp_size`) is torch's, entered by `accelerator.maybe_context_parallel`, which is not called here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import distributed, nn


class ContextParallel:
    """Divides the video's tokens of a transformer among the ranks of a group.

    Two forward passes of different sizes must not be under way at once: a checkpointed block that is computed again
    takes the size of the last one.

    Args:
        group: the ranks that are given the same samples.
    """

    def __init__(self, group: distributed.ProcessGroup):
        self.group = group
        self.is_on = True
        self._num_tokens = 0  # of the video, in the forward pass that began last

    def divide(self, transformer: CogVideoXTransformer3DModel) -> None:
        """Have the transformer compute this rank's part alone, and return the whole; called on all ranks alike.

        Its attention has to be told apart, see `attention.set_attention`. To be called once for a transformer.
        """
        transformer.register_forward_pre_hook(self._divide_positions, with_kwargs=True)
        transformer.patch_embed.register_forward_hook(self._divide_tokens)
        transformer.proj_out.register_forward_hook(self._gather_output)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Compute on each rank by itself meanwhile, whatever the others do."""
        self.is_on = False
        try:
            yield
        finally:
            self.is_on = True

    def gather_keys(
        self, key: torch.Tensor, value: torch.Tensor, text_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give an attention the keys and values of all parts.

        Args:
            key, value: `[B, T + P, heads, D / heads]`: of the text, then of this rank's part of the video.
            text_length: T.

        Returns:
            `[B, T + V, heads, D / heads]` each; as they are while this is off.
        """
        if not self.is_on:
            return key, value
        # Tokens first, as they are gathered; both in one go.
        part = torch.stack([states[:, text_length:].transpose(0, 1) for states in (key, value)], dim=1)
        whole = _AllGather.apply(part, self.group)[: self._num_tokens]
        return tuple(
            torch.cat([states[:, :text_length], video.transpose(0, 1)], dim=1)
            for states, video in zip((key, value), whole.unbind(1), strict=True)
        )

    def _divide_positions(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Give the blocks the rotary embedding of this part, cos and sin `[P, D / heads]`."""
        rotary = kwargs.get("image_rotary_emb")
        if self.is_on and rotary is not None:
            kwargs = kwargs | {"image_rotary_emb": tuple(self._part_of(table, 0) for table in rotary)}
        return args, kwargs

    def _divide_tokens(self, patch_embed: nn.Module, args: tuple, tokens: torch.Tensor) -> torch.Tensor:
        """Leave `[B, T + P, D]` of the embedded tokens `[B, T + V, D]`."""
        if not self.is_on:
            return tokens
        text_length = args[0].shape[1]  # of the prompt's embedding
        self._num_tokens = tokens.shape[1] - text_length
        return torch.cat([tokens[:, :text_length], self._part_of(tokens[:, text_length:], 1)], dim=1)

    def _gather_output(self, proj_out: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Put the projected parts `[B, P, C]` together to `[B, V, C]`."""
        if not self.is_on:
            return output
        return _AllGather.apply(output.transpose(0, 1), self.group)[: self._num_tokens].transpose(0, 1)

    def _part_of(self, tokens: torch.Tensor, dim: int) -> torch.Tensor:
        return part_of(tokens, dim, self.group.rank(), self.group.size())


def start_context_parallel(size: int, timeout: timedelta) -> ContextParallel | None:
    """Make groups of so many neighbouring ranks; called on every rank. None for groups of one.

    accelerate's device mesh has the same groups: of its dimensions, context is the innermost.

    Args:
        size: divides the number of ranks.
        timeout: of the groups' collectives.
    """
    if size == 1:
        return None
    group, _ = distributed.new_subgroups(size, timeout=timeout)
    return ContextParallel(group)


def part_of(tokens: torch.Tensor, dim: int, part: int, num_parts: int) -> torch.Tensor:
    """One of equally long parts of the tokens along a dimension; the last ones are filled up with zeros.

    So only the end of all parts together is no token of the video, and what is gathered has to be cut to length, but
    nothing masked: as keys these zeros are cut off before the attention, and what is computed from them as queries
    is cut off in the end.

    Args:
        part: its number, from 0.
    """
    num_tokens = tokens.shape[dim]
    length = -(-num_tokens // num_parts)
    start, stop = (min(number * length, num_tokens) for number in (part, part + 1))
    mine = tokens.narrow(dim, start, stop - start)
    if stop - start == length:
        return mine
    missing = list(tokens.shape)
    missing[dim] = length - (stop - start)
    return torch.cat([mine, tokens.new_zeros(missing)], dim)


class _AllGather(torch.autograd.Function):
    """The tensors of all ranks behind one another; the gradient of each is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        whole = part.new_empty(group.size() * len(part), *part.shape[1:])
        distributed.all_gather_into_tensor(whole, part.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        part = gradient.new_empty(len(gradient) // ctx.group.size(), *gradient.shape[1:])
        distributed.reduce_scatter_tensor(part, gradient.contiguous(), group=ctx.group)
        return part, None
