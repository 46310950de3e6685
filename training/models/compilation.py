"""Compile the transformer block by block: all blocks share one compiled function per input size."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from torch.utils._triton import has_triton

from common.errors import UserError


# At most: full batches and an epoch's smaller last one, training and validation, checkpointed blocks and others.
_GRAPHS_PER_SIZE = 8
# Assumed, not measured: a minute to compile a size; then 0.04 s less for each step of 49x480x720 on the fastest cards,
# for 144 GB less memory traffic (assets/docs/training.md) at 4 TB/s.
STEPS_TO_EARN = 1500


def earns_compilation(steps: int, num_sizes: int) -> bool:
    """Return whether a run is long enough for compiled blocks to save more time than their compilation takes."""
    return steps >= STEPS_TO_EARN * num_sizes


def compile_blocks(
    transformer: CogVideoXTransformer3DModel, num_sizes: int, *, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile each block in place; parameters keep their names.

    Each size (batch, tokens) is compiled once for training and once for sampling, at its first use. A block that
    cannot be compiled raises an error instead of silently falling back to eager mode.

    Args:
        transformer: with its adapters and its attention backend.
        num_sizes: number of sizes in training, held-out set and validation videos; bounds the number of compilations.
    """
    torch._dynamo.reset()  # compilations of other transformers do not count
    limit = _GRAPHS_PER_SIZE * num_sizes
    for block in transformer.transformer_blocks:
        compiled = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)
        block.forward = partial(_call_normalized, compiled, limit)


def _configure(limit: int) -> None:
    """Configure Dynamo for at least so many compilations of a function, in the calling thread."""
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, limit)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, limit)
    # It would split graphs by gradient buckets for early all-reduce; blocks are small enough for that.
    dynamo.optimize_ddp = False
    # peft's DoRA empties a cache in each forward pass, which a checkpoint need not repeat.
    dynamo.skip_fwd_side_effects_in_bwd_under_checkpoint = True


def _call_normalized(
    forward: Callable[..., Any],
    limit: int,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    *args: Any,
    **kw: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call a block's forward pass with the same kind of inputs for each block.

    The first block's inputs are views of one tensor that, with a LoRA, needs no gradient. Those of the others are
    separate and need one, so that the first block would be compiled separately.

    Dynamo's configuration is that of the thread: on a GPU, checkpoints compute again in a thread of autograd.
    """
    _configure(limit)
    return forward(_normalized(hidden_states), _normalized(encoder_hidden_states), *args, **kw)


def _normalized(states: torch.Tensor) -> torch.Tensor:
    states = states.flatten().view(states.shape)  # `contiguous` would keep the strides of a batch of one
    return states if states.requires_grad or not torch.is_grad_enabled() else states.detach().requires_grad_()


def check_compiler(device: torch.device) -> None:
    """Check that torch.compile finds its compilers."""
    is_cuda = device.type == "cuda"
    if is_cuda and not has_triton():
        raise UserError("--compile: needs Triton, which is missing or does not support this GPU; omit the flag")
    # Triton builds its launchers in C; CPU kernels are C++.
    language, variable, usual = ("C", "CC", ("gcc", "clang")) if is_cuda else ("C++", "CXX", ("g++", "clang++"))
    if not any(map(shutil.which, (os.environ.get(variable, usual[0]), *usual))):
        raise UserError(f"--compile: needs a {language} compiler; install {usual[0]}, or omit the flag")
