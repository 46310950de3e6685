"""Weights that are divided among ranks, put together again: what is saved is the same however a run was launched."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel


def whole_weights(
    accelerator: Accelerator, transformer: CogVideoXTransformer3DModel, names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """The weights of those names, whole; called on every rank.

    Args:
        transformer: the one that `accelerator.prepare` was given.
        names: as in the transformer's own `state_dict`.

    Returns:
        On the main process, each weight by its name; on the others nothing.
    """
    weights = transformer.state_dict() if accelerator.is_main_process else {}
    return {name: weights[name] for name in names if name in weights}
