"""Optimizer states in host memory, with torchao, gradient clipping and resumable checkpoints."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.utils import clip_grads_with_norm_
from torchao.optim import CPUOffloadOptimizer


@contextmanager
def _all_cores() -> Iterator[None]:
    """Use all cores that the process may use: accelerate starts it with one thread unless told otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class ClippedOffloadOptimizer(CPUOffloadOptimizer):
    """torchao's offloaded optimizer with gradient clipping.

    It copies each gradient to the host as soon as the backward pass has it, so that clipping on the device comes too
    late. Here the norms are computed on the device before the copies, and `clip_grad_norm_` scales the copies, which
    costs host memory traffic only in steps that clip. For one process, one GPU, no gradient scaler.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], optimizer_class: type[torch.optim.Optimizer], **settings: Any
    ):
        """Offload `optimizer_class(parameters, **settings)`.

        `offload_gradients=True` also frees each gradient on the device after it was copied.
        """
        self._norms: dict[torch.nn.Parameter, torch.Tensor] = {}  # of the gradients of this step
        for parameter in parameters:
            # Hooks run in order of registration: this one before torchao's, which frees the gradient.
            parameter.register_post_accumulate_grad_hook(self._note_norm)
        super().__init__(parameters, optimizer_class, **settings)

    def _note_norm(self, parameter: torch.nn.Parameter) -> None:
        # When gradients accumulate, each pass replaces the norm of the partial sum.
        self._norms[parameter] = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)

    @_all_cores()
    def step(self, closure: None = None) -> None:
        """Update the weights that got a gradient; closures are not supported."""
        super().step()

    @torch.no_grad()
    @_all_cores()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients of the step to a norm of at most `max_norm`; returns the norm before, after a sync."""
        norm = torch.linalg.vector_norm(torch.stack(list(self._norms.values())))
        if norm > max_norm:
            self.stream.synchronize()  # the copies to the host
            on_host = [self.param_d2h_map[parameter] for parameter in self.queue]
            on_device = [parameter for group in self._groups_on_device for parameter in group["params"]]
            clip_grads_with_norm_(on_host + on_device, max_norm, norm)
        self._norms.clear()
        return norm

    def discard_gradients(self) -> None:
        """Drop the gradients of this step, which is skipped."""
        self.stream.synchronize()  # no copy to the host is under way when the next step's begin
        self.queue.clear()

    @property
    def _groups_on_device(self) -> list[dict[str, Any]]:
        """The groups of parameters that are too small to be worth a transfer."""
        return [] if self.d_opt is None else self.d_opt.param_groups

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts; torchao's are outdated after a state was loaded: schedules would not reach them."""
        return self._groups_on_device + [g for part in self.optim_dict.values() for g in part.param_groups]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, and copy the device's current weights to the host.

        torchao would overwrite a checkpoint's weights by the host's older copies. Raises a ValueError if the state is
        of other parameters.
        """
        if len(state_dict.get("offloaded", ())) != len(self.optim_dict):
            raise ValueError("loaded state dict has a different number of offloaded parameters")
        super().load_state_dict(state_dict)
        for on_device, on_host in self.param_d2h_map.items():
            on_host.copy_(on_device.detach())
