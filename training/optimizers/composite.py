"""Several optimizers as one: Muon with AdamW, and one for each parameter, which steps in the backward pass."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from common.errors import UserError


class CompositeOptimizer(Optimizer):
    """Optimizers over different parameters, as one.

    Its `param_groups` are those of the parts, not copies, so that schedules change every part.
    """

    def __init__(self, parts: Sequence[Optimizer]):
        self.parts = list(parts)
        super().__init__(self._groups_of_parts(), {})

    def _groups_of_parts(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Step every part; closures are not supported."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the parts, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; raises a ValueError if it is of other parts or parameters."""
        if len(state_dict.get("parts", ())) != len(self.parts):
            raise ValueError("loaded state dict has a different number of parts")
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups_of_parts()  # loading creates new ones


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


def make_muon(
    parameters: Sequence[torch.nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    epsilon: float,
    fused: bool,
) -> CompositeOptimizer:
    """Build Muon for matrices and AdamW for the other weights (biases, norms, convolutions); needs torch 2.9.

    Muon's steps are scaled to the size of AdamW's, so that rates tuned for AdamW work; its momentum is the first beta.

    Source: Muon, https://kellerjordan.github.io/posts/muon/; the scale of its steps, https://arxiv.org/abs/2502.16982.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"--optimizer muon: torch {torch.__version__} does not have it; install torch 2.9 or newer, or use "
            "--optimizer adamw"
        )
    matrices = [parameter for parameter in parameters if parameter.ndim == 2]
    others = [parameter for parameter in parameters if parameter.ndim != 2]
    shared = {"lr": learning_rate, "weight_decay": weight_decay}
    parts = []
    if matrices:
        parts.append(torch.optim.Muon(matrices, momentum=betas[0], adjust_lr_fn="match_rms_adamw", **shared))
    if others:
        parts.append(torch.optim.AdamW(others, betas=betas, eps=epsilon, fused=fused, **shared))
    return CompositeOptimizer(parts)
