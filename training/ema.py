"""The running average of the trained weights, which is often better than the last of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel


def make_ema(parameters: Sequence[torch.nn.Parameter], decay: float) -> EMAModel:
    """Start an average of `parameters`, on their device; `decay` is reached in about 10 / (1 - decay) steps."""
    return EMAModel(parameters, decay=decay)


@contextmanager
def averaged_weights(ema: EMAModel | None, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Put the average in the place of the weights meanwhile; None changes nothing."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)
