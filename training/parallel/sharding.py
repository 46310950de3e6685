"""Gather and save sharded weights: the saved files are the same however a run was launched."""

from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel

from parallel.deepspeed import gather_zero_shards, is_zero, load_zero_state, save_zero_state
from parallel.fsdp import gather_shards, is_fsdp


def gather_weights(
    accelerator: Accelerator, transformer: CogVideoXTransformer3DModel, names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Gather weights by name; called on every rank.

    Args:
        transformer: as passed to `accelerator.prepare`.
        names: as in the transformer's `state_dict`.

    Returns:
        On the main process, each weight by its name; on the others an empty dict.
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
    """Save weights, optimizer and schedule with accelerate, as shards if they are; called on every rank."""
    if is_zero(accelerator):
        save_zero_state(accelerator, folder)
    else:
        accelerator.save_state(str(folder))


def load_state(accelerator: Accelerator, folder: Path) -> None:
    """Load what `save_state` saved; called on every rank.

    Raises:
        OSError, ValueError: the checkpoint is damaged, or of another kind of run.
    """
    if is_zero(accelerator):
        load_zero_state(accelerator, folder)
    else:
        accelerator.load_state(str(folder))
