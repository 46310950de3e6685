"""Gather and save sharded weights: the saved files are the same however a run was launched."""

import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel

from common.errors import first_line
from common.ranks import launch_rank
from parallel.deepspeed import errors_later, gather_zero_shards, is_zero, weights_only_loads
from parallel.fsdp import gather_shards, is_fsdp


def gather_weights(
    accelerator: Accelerator, transformer: CogVideoXTransformer3DModel, names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Return weights by name on the main process, an empty dict on the others; called on every rank.

    Args:
        transformer: as passed to `accelerator.prepare`.
        names: as in the transformer's `state_dict`.
    """
    state = transformer.state_dict(keep_vars=is_zero(accelerator))
    if not (is_zero(accelerator) or is_fsdp(accelerator)):
        return {name: state[name] for name in names} if accelerator.is_main_process else {}
    gather = gather_zero_shards if is_zero(accelerator) else gather_shards
    weights = {}
    for name in names:  # one after another, to save memory
        weight = gather(state[name])
        if accelerator.is_main_process:
            # A copy: weights may be views of larger storages, which safetensors does not write.
            weights[name] = weight.detach().to("cpu", copy=True)
    return weights


def save_state(accelerator: Accelerator, folder: Path) -> None:
    """Save weights, optimizer and schedule on every rank, as shards if they are; raises OSError or RuntimeError."""
    if not is_zero(accelerator):
        accelerator.save_state(str(folder))
        return
    with errors_later(accelerator.deepspeed_engine_wrapped.engine):
        accelerator.save_state(str(folder), exclude_frozen_parameters=True, save_latest=False)


def load_state(accelerator: Accelerator, folder: Path) -> None:
    """Load what `save_state` saved; called on every rank, with DeepSpeed on the same number of them.

    A checkpoint that is damaged or of another kind of run is an OSError or a ValueError.
    """
    if not is_zero(accelerator):
        accelerator.load_state(str(folder))
        return
    optimizer = accelerator.deepspeed_engine_wrapped.engine.optimizer
    max_grad_norm = optimizer.clip_grad  # DeepSpeed would restore it from the checkpoint
    try:
        with weights_only_loads():
            accelerator.load_state(str(folder), load_module_strict=False)
    except (RuntimeError, AssertionError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"rank {launch_rank()}: {first_line(error)}") from error
    optimizer.clip_grad = max_grad_norm
