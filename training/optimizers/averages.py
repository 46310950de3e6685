"""Averages of the trained weights, which are often better than the last weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch.optim import Optimizer


@contextmanager
def averaged_weights(ema: EMAModel | None, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Replace the weights by the average within the block; None changes nothing."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


@contextmanager
def schedule_free_weights(optimizer: Optimizer, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Replace the trained weights by the average of a schedule-free optimizer within the block.

    Source: https://arxiv.org/abs/2405.15682.
    """
    # The optimizer interpolates between the two, which cannot be undone exactly.
    trained = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, kept in zip(parameters, trained, strict=True):
                parameter.copy_(kept)
