"""Compile the transformer block by block: all blocks share one compiled function for each size of their inputs."""

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from torch.utils._triton import has_triton

from common.errors import UserError


# At most: of full batches and of an epoch's smaller last one, in training and in validation, of blocks that are
# checkpointed and of others.
_GRAPHS_PER_SIZE = 8


def compile_blocks(
    transformer: CogVideoXTransformer3DModel, num_sizes: int, *, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile each block where it stands; parameters keep their names.

    Each size (batch, tokens) is compiled once for training and once more for sampling, as soon as it comes. What
    cannot be compiled is an error: nothing falls back to the slow path unnoticed.

    Args:
        transformer: with its adapters, and with the attention that it is to have.
        num_sizes: of the clips of training, held-out set and validation videos; bounds the number of compilations.
        backend: of `torch.compile`.
    """
    torch._dynamo.reset()  # what another transformer needed does not count
    limit = _GRAPHS_PER_SIZE * num_sizes
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, limit)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, limit)
    # It splits graphs by buckets of gradients, so that they are exchanged early. Blocks are small enough for that.
    dynamo.optimize_ddp = False
    for block in transformer.transformer_blocks:
        block.forward = _Compiled(torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend))


class _Compiled:
    """The forward pass of a block, called alike wherever the block stands and whoever calls it.

    The first block's inputs are parts of one tensor that, beside a LoRA, needs no gradient. Those of the others lie
    apart and need one, so that the first block would be compiled separately.
    """

    def __init__(self, forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]):
        self.forward = forward

    def __call__(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `CogVideoXBlock.forward` does."""
        states = _like_any_other(hidden_states), _like_any_other(encoder_hidden_states)
        return self.forward(*states, temb, image_rotary_emb, attention_kwargs)


def _like_any_other(states: torch.Tensor) -> torch.Tensor:
    states = states.flatten().view(states.shape)  # `contiguous` would keep what strides a batch of one has
    if torch.is_grad_enabled() and not states.requires_grad:
        states = states.detach().requires_grad_()
    return states


def check_compiler(device: torch.device) -> None:
    """Look for what torch.compile makes kernels with.

    Raises:
        UserError: it is not there.
    """
    if device.type == "cuda" and not has_triton():
        raise UserError("--compile: needs Triton, which is missing or does not support this GPU; leave it out")
    # Triton builds its launchers in C, the CPU's kernels are C++.
    is_cuda = device.type == "cuda"
    language, variable, usual = ("C", "CC", ("gcc", "clang")) if is_cuda else ("C++", "CXX", ("g++", "clang++"))
    if not any(map(shutil.which, (os.environ.get(variable, usual[0]), *usual))):
        raise UserError(f"--compile: needs a {language} compiler; install {usual[0]}, or leave it out")
