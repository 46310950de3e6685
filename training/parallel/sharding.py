"""Gather and save sharded weights: the saved files are the same however a run was launched."""

from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel

from parallel.deepspeed import gather_zero_weights, is_zero, load_zero_state, save_zero_state
from parallel.fsdp import gather_weights, is_fsdp


def whole_weights(
    accelerator: Accelerator, transformer: CogVideoXTransformer3DModel, names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Gather weights by name; called on every rank.

    Args:
        transformer: as passed to `accelerator.prepare`.
        names: as in the transformer's `state_dict`.

    Returns:
        On the main process, each weight by its name; on the others an empty dict.
    """
    if is_zero(accelerator):
        return gather_zero_weights(transformer, names, accelerator.is_main_process)
    if is_fsdp(accelerator):
        return gather_weights(transformer, names, accelerator.is_main_process)
    weights = transformer.state_dict() if accelerator.is_main_process else {}
    return {name: weights[name] for name in names if name in weights}


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
