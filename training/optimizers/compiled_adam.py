"""torchao's Adam, whose update of a weight is compiled once instead of for each weight in each step."""

import torch
from torch.optim import Optimizer
from torchao.optim.adam import single_param_adam


# Compiled at its first call for each shape and dtype.
_update = torch.compile(single_param_adam, fullgraph=True, dynamic=False)


def compiled_once(adam_class: type[Optimizer]) -> type[Optimizer]:
    """Return one of torchao's Adam classes with this step; numbers and state dict stay the same."""
    return type(adam_class.__name__, (_CompiledOnce, adam_class), {})


class _CompiledOnce:
    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the weights that have a gradient; closures are not supported."""
        with torch._dynamo.utils.disable_cache_limit():  # of this thread, which may be that of the backward pass
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_one(parameter, group)

    def _step_one(self, parameter: torch.nn.Parameter, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = self._new_buffer(parameter, True)
            state["exp_avg_sq"] = self._new_buffer(parameter, False)
        state["step"] += 1
        _update(
            parameter.detach(),  # a parameter of FSDP cannot be compiled
            parameter.grad,
            state["step"],
            state["exp_avg"],
            state["exp_avg_sq"],
            None,  # AMSGrad's maximum
            group["lr"],
            *group["betas"],
            group["weight_decay"],
            group["eps"],
            self.is_adamw,
            self.bf16_stochastic_round and parameter.dtype is torch.bfloat16,
        )
