"""Optimizer states in host memory, through torchao, with gradients clipped and checkpoints that can be resumed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils import clip_grads_with_norm_
from torchao.optim import CPUOffloadOptimizer


class ClippedOffloadOptimizer(CPUOffloadOptimizer):
    """torchao's offloaded optimizer, which copies each gradient to the host as soon as the backward pass has it.

    What clips the device's gradients afterwards changes nothing in those copies. Here the norms are taken on the
    device, before the copies, and `clip_grad_norm_` scales the copies: host memory is read and written once more only
    in steps which clip.

    One process, one GPU, no gradient scaler.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        optimizer_class: type[torch.optim.Optimizer],
        *,
        offload_gradients: bool = False,
        **settings: Any,
    ):
        """Offload `optimizer_class(parameters, **settings)`.

        Args:
            offload_gradients: free each gradient on the device when it was copied.
        """
        self._norms: dict[torch.nn.Parameter, torch.Tensor] = {}  # of the gradients of this step
        for parameter in parameters:
            # Hooks run in the order of their registration: this one before torchao's, which frees the gradient.
            parameter.register_post_accumulate_grad_hook(self._note_norm)
        super().__init__(parameters, optimizer_class, offload_gradients=offload_gradients, **settings)

    def _note_norm(self, parameter: torch.nn.Parameter) -> None:
        # Where gradients accumulate, each pass replaces the norm of the sum before.
        self._norms[parameter] = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients of the step so that their norm is at most `max_norm`.

        Returns:
            Their norm before, a scalar on the device. It is waited for: the update on the host needs it.
        """
        norm = torch.linalg.vector_norm(torch.stack(list(self._norms.values())))
        if norm > max_norm:
            self.stream.synchronize()  # the copies to the host
            on_host = [self.param_d2h_map[parameter] for parameter in self.queue]
            on_device = [parameter for group in self._groups_on_device for parameter in group["params"]]
            clip_grads_with_norm_(on_host + on_device, max_norm, norm)
        self._norms.clear()
        return norm

    def discard_gradients(self) -> None:
        """Forget the gradients of this step, which is left out."""
        self.stream.synchronize()  # no copy to the host is under way when the next step's begin
        self.queue.clear()

    @property
    def _groups_on_device(self) -> list[dict[str, Any]]:
        """Of the parameters too small to be worth a transfer."""
        return [] if self.d_opt is None else self.d_opt.param_groups

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parts' own groups.

        torchao goes on giving those which the small parameters had before a state was loaded: a schedule would then
        write to dicts that nobody reads.
        """
        return self._groups_on_device + [g for part in self.optim_dict.values() for g in part.param_groups]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, and take over the weights that the device has now.

        torchao would overwrite the weights of a checkpoint by the host's copies of the weights before.

        Raises:
            ValueError: the state is of other parameters.
        """
        if len(state_dict.get("offloaded", ())) != len(self.optim_dict):
            raise ValueError("loaded state dict has a different number of offloaded parameters")
        super().load_state_dict(state_dict)
        for on_device, on_host in self.param_d2h_map.items():
            on_host.copy_(on_device.detach())
