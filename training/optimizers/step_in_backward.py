"""Optimizer steps inside the backward pass, so that only one gradient exists at a time."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.optim import Optimizer

from optimizers.composite import CompositeOptimizer


class StepInBackward(CompositeOptimizer):
    """Updates each parameter as soon as the backward pass has its gradient, and frees the gradient.

    One backward pass is one step: gradients are not accumulated, averaged over processes, scaled or clipped by their
    norm, which is never known.

    Source: the idea is that of LOMO, https://arxiv.org/abs/2306.09782; the hooks are torch's.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], make: Callable[[list[torch.nn.Parameter]], Optimizer]
    ):
        """Hook `make([parameter])` into the backward pass of each parameter."""
        super().__init__([make([parameter]) for parameter in parameters])
        for parameter, part in zip(parameters, self.parts, strict=True):
            parameter.register_post_accumulate_grad_hook(partial(_step_and_free, part))

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Do nothing: the backward pass has stepped."""

    def clip_grad_norm_(self, max_norm: float) -> None:
        """Do nothing and return None: the gradients are gone."""


def _step_and_free(part: Optimizer, parameter: torch.nn.Parameter) -> None:
    part.step()
    parameter.grad = None
