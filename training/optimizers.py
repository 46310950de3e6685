"""Build the optimizer and the learning-rate scheduler that the flags name."""

import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from errors import UserError


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    name: str,
    *,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.95,
    beta3: float | None = None,
    weight_decay: float = 1e-4,
    epsilon: float = 1e-8,
    use_8bit: bool = False,
    use_4bit: bool = False,
    use_torchao: bool = False,
    use_cpu_offload: bool = False,
    offload_gradients: bool = False,
    prodigy_decouple: bool = False,
    prodigy_use_bias_correction: bool = False,
    prodigy_safeguard_warmup: bool = False,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """Build an optimizer over the trainable ones of `parameters`.

    Args:
        name: adam, adamw, prodigy or came.
        use_8bit, use_4bit: keep Adam's states in low precision; bitsandbytes' 8-bit unless `use_torchao`.
        fused: take torch's single-kernel Adam. Under a gradient scaler it hides from accelerate that it skipped a
            step, and the learning rate would move on.
        use_cpu_offload: keep states (and, with `offload_gradients`, gradients) in host memory, through torchao.

    Raises:
        UserError: the package that implements the choice is not installed, or it needs a GPU.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if name == "prodigy":
        return _import("prodigyopt", "--optimizer prodigy").Prodigy(
            trainable,
            lr=learning_rate,
            betas=(beta1, beta2),
            beta3=beta3,
            weight_decay=weight_decay,
            eps=epsilon,
            decouple=prodigy_decouple,
            use_bias_correction=prodigy_use_bias_correction,
            safeguard_warmup=prodigy_safeguard_warmup,
        )
    if name == "came":
        return _import("came_pytorch", "--optimizer came").CAME(
            trainable,
            lr=learning_rate,
            betas=(beta1, beta2, 0.9999 if beta3 is None else beta3),
            weight_decay=weight_decay,
        )
    adam_class = _adam_class(name, use_8bit=use_8bit, use_4bit=use_4bit, use_torchao=use_torchao)
    settings: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (beta1, beta2),
        "weight_decay": weight_decay,
        "eps": epsilon,
    }
    if adam_class.__module__.startswith("torch.optim"):
        settings["fused"] = fused
    if use_cpu_offload:
        if not torch.cuda.is_available():
            raise UserError("--use_cpu_offload_optimizer: moves optimizer states off a GPU, and there is none here")
        offload = _import("torchao.optim", "--use_cpu_offload_optimizer").CPUOffloadOptimizer
        return offload(trainable, adam_class, offload_gradients=offload_gradients, **settings)
    return adam_class(trainable, **settings)


def _adam_class(name: str, *, use_8bit: bool, use_4bit: bool, use_torchao: bool) -> type[torch.optim.Optimizer]:
    class_name = {"adam": "Adam", "adamw": "AdamW"}[name]
    if use_4bit:
        return getattr(_import("torchao.optim", "--use_4bit"), f"{class_name}4bit")
    if use_8bit and use_torchao:
        return getattr(_import("torchao.optim", "--use_8bit --use_torchao"), f"{class_name}8bit")
    if use_8bit:
        return getattr(_import("bitsandbytes", "--use_8bit").optim, f"{class_name}8bit")
    return getattr(torch.optim, class_name)


def _import(module: str, flag: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"came_pytorch": "came-pytorch"}.get(module, module.split(".")[0])
        raise UserError(f"{flag}: needs the package {package} (pip install {package}): {error}") from error


def apply_learning_rate(optimizer: torch.optim.Optimizer, lr_scheduler: LambdaLR, learning_rate: float) -> None:
    """Go on along the schedule with this base learning rate, whatever the checkpoint that was loaded had.

    Args:
        optimizer: may be accelerate's wrapper.
        lr_scheduler: at the step it goes on from.
        learning_rate: the schedule's factor is multiplied with it.
    """
    lr_scheduler.base_lrs = [learning_rate] * len(optimizer.param_groups)
    rates = [learning_rate * factor(lr_scheduler.last_epoch) for factor in lr_scheduler.lr_lambdas]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["initial_lr"] = learning_rate
        if isinstance(group["lr"], torch.Tensor):  # torchao's
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    lr_scheduler._last_lr = rates
