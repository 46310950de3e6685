"""Build the optimizer that the flags name, and step it."""

import importlib
import math
from collections.abc import Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from common.errors import UserError
from common.ranks import uses_deepspeed
from flags.optimizer import OptimizerFlags
from flags.settings import TrainingSettings
from optimizers.composite import StepInBackward, make_muon
from parallel.fsdp import gather_shards


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    flags: OptimizerFlags,
    learning_rate: float,
    *,
    stochastic_rounding: bool = False,
    fused: bool = True,
) -> Optimizer:
    """Build an optimizer over the trainable parameters; raises a UserError if a package or a GPU is missing.

    Args:
        stochastic_rounding: of the updates of bfloat16 parameters, with torch's global generator.
        fused: use torch's single-kernel Adam. Not with a gradient scaler: it hides from accelerate that it skipped a
            step, so that the learning rate would advance.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    name, betas = flags.optimizer, (flags.beta1, flags.beta2)
    settings: dict[str, Any] = {"lr": learning_rate, "weight_decay": flags.weight_decay}
    if name == "prodigy":
        return _import("prodigyopt", "--optimizer prodigy").Prodigy(
            trainable,
            betas=betas,
            beta3=flags.beta3,
            eps=flags.epsilon,
            decouple=flags.prodigy_decouple,
            use_bias_correction=flags.prodigy_use_bias_correction,
            safeguard_warmup=flags.prodigy_safeguard_warmup,
            **settings,
        )
    if name == "came":
        betas = (*betas, 0.9999 if flags.beta3 is None else flags.beta3)
        return _import("came_pytorch", "--optimizer came").CAME(trainable, betas=betas, **settings)
    if name == "muon":
        return make_muon(
            trainable,
            learning_rate=learning_rate,
            betas=betas,
            weight_decay=flags.weight_decay,
            epsilon=flags.epsilon,
            fused=fused,
        )
    settings |= {"betas": betas, "eps": flags.epsilon}
    if name == "schedulefree":
        optimizer = _import("schedulefree", "--optimizer schedulefree").AdamWScheduleFree(trainable, **settings)
        optimizer.train()
        return optimizer
    return _make_adam(trainable, flags, settings, stochastic_rounding, fused)


def _make_adam(
    trainable: Sequence[torch.nn.Parameter],
    flags: OptimizerFlags,
    settings: dict[str, Any],
    stochastic_rounding: bool,
    fused: bool,
) -> Optimizer:
    adam_class = _adam_class(flags, stochastic_rounding)
    if adam_class.__module__.startswith("torch.optim"):
        settings["fused"] = fused
    if stochastic_rounding:
        settings["bf16_stochastic_round"] = True
    if flags.use_cpu_offload_optimizer:
        if not torch.cuda.is_available():
            raise UserError("--use_cpu_offload_optimizer: moves optimizer states off a GPU, and there is none here")
        _import("torchao.optim", "--use_cpu_offload_optimizer")
        from optimizers.offload import ClippedOffloadOptimizer

        return ClippedOffloadOptimizer(trainable, adam_class, offload_gradients=flags.offload_gradients, **settings)
    make = partial(adam_class, **settings)
    return StepInBackward(trainable, make) if flags.step_in_backward else make(trainable)


def _adam_class(flags: OptimizerFlags, stochastic_rounding: bool) -> type[Optimizer]:
    class_name = {"adam": "Adam", "adamw": "AdamW"}[flags.optimizer]
    if flags.use_fp8 and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        raise UserError("--use_fp8: needs a GPU of compute capability 8.9 or newer; use --use_8bit --use_torchao")
    if flags.use_4bit or flags.use_fp8 or (flags.use_8bit and flags.use_torchao):
        return _torchao_adam(class_name + ("4bit" if flags.use_4bit else "Fp8" if flags.use_fp8 else "8bit"))
    if flags.use_8bit:
        return getattr(_import("bitsandbytes", "--use_8bit").optim, f"{class_name}8bit")
    if stochastic_rounding:
        return _torchao_adam(f"_{class_name}")  # with states in the dtype of the weights
    return getattr(torch.optim, class_name)


def _torchao_adam(name: str) -> type[Optimizer]:
    optimizers = _import("torchao.optim", "--use_torchao")
    from optimizers.compiled_adam import compiled_once

    return compiled_once(getattr(optimizers, name))


def _import(module: str, flag: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"came_pytorch": "came-pytorch"}.get(module, module.split(".")[0])
        raise UserError(f"{flag}: needs the package {package} (pip install {package}): {error}") from error


def check_launch(
    flags: OptimizerFlags, distributed_type: DistributedType, dtype: torch.dtype, *, bf16_weights: bool
) -> None:
    """Refuse settings that do not work with the launch or with the networks' dtype, which the flags do not show."""
    for flag in ("use_cpu_offload_optimizer", "step_in_backward"):
        if getattr(flags, flag) and distributed_type != DistributedType.NO:
            raise UserError(f"--{flag}: takes gradients before processes average them; launch one process, or omit it")
        if getattr(flags, flag) and dtype == torch.float16:
            raise UserError(f"--{flag}: takes gradients before fp16's scaling is undone; use --mixed_precision bf16")
    unsharded = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if flags.optimizer in ("muon", "schedulefree") and distributed_type not in unsharded:
        raise UserError(
            f"--optimizer {flags.optimizer}: does not work on weights in shards ({distributed_type.value}); use "
            "--optimizer adamw"
        )
    if bf16_weights and dtype != torch.bfloat16:
        raise UserError("--weights_dtype bf16: the networks must compute in bf16 too; add --mixed_precision bf16")


def clip_gradients(
    accelerator: Accelerator, optimizer: Optimizer, parameters: Sequence[torch.nn.Parameter], max_norm: float
) -> torch.Tensor | None:
    """Scale the gradients so that their norm over all parameters is at most `max_norm`; 0 does not clip.

    Optimizers that take gradients during the backward pass clip them. Returns the norm before clipping, on the device;
    None if it is unknown.
    """
    max_norm = max_norm or math.inf
    inner = getattr(optimizer, "optimizer", optimizer)
    if hasattr(inner, "clip_grad_norm_"):
        return inner.clip_grad_norm_(max_norm)
    return gather_shards(accelerator.clip_grad_norm_(parameters, max_norm))


def step_if_finite(accelerator: Accelerator, optimizer: Optimizer, grad_norm: torch.Tensor | float | None) -> None:
    """Update the weights, unless the norm from `clip_gradients` is not finite.

    torch's fused Adam checks that on the device. For others the CPU waits for the norm.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    # A gradient scaler and DeepSpeed check the gradients themselves.
    if accelerator.scaler is not None or not isinstance(grad_norm, torch.Tensor):
        optimizer.step()
    elif _checks_gradients(inner):
        # As a gradient scaler sets it, https://docs.pytorch.org/docs/stable/amp.html
        inner.grad_scale, inner.found_inf = None, grad_norm.isfinite().logical_not().float()
        optimizer.step()
    elif grad_norm.isfinite():
        optimizer.step()
    elif hasattr(inner, "discard_gradients"):
        inner.discard_gradients()


def _checks_gradients(optimizer: Optimizer) -> bool:
    is_adam = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
    return is_adam and all(
        group["fused"] and not any(isinstance(parameter, DTensor) for parameter in group["params"])
        for group in optimizer.param_groups
    )


def can_step(optimizer: Optimizer, loss: torch.Tensor) -> bool:
    """Return whether the backward pass may run: one that steps at the same time cannot be undone.

    Only then is the loss read.
    """
    steps_in_backward = isinstance(getattr(optimizer, "optimizer", optimizer), StepInBackward)
    return not steps_in_backward or bool(loss.isfinite())


def keep_rates_on_host(optimizer: Optimizer) -> None:
    """Move learning rates that are tensors (torchao's) to the host, so that reading them does not synchronize.

    accelerate moves them to the device with the rest of the optimizer's state.
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"] = group["lr"].cpu()


def apply_learning_rate(optimizer: Optimizer, lr_scheduler: LambdaLR, learning_rate: float) -> None:
    """Continue the schedule from its step with this base learning rate instead of the loaded checkpoint's."""
    keep_rates_on_host(optimizer)  # a checkpoint may have been loaded to the device
    lr_scheduler.base_lrs = [learning_rate] * len(optimizer.param_groups)
    rates = [learning_rate * factor(lr_scheduler.last_epoch) for factor in lr_scheduler.lr_lambdas]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["initial_lr"] = learning_rate
        if isinstance(group["lr"], torch.Tensor):  # torchao's
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    lr_scheduler._last_lr = rates


def build_optimizer(
    settings: TrainingSettings,
    parameters: Sequence[torch.nn.Parameter],
    learning_rate: float,
    total_steps: int,
    *,
    fused: bool,
) -> tuple[Optimizer, LRScheduler]:
    """Build the optimizer and its learning-rate schedule, which counts optimizer steps."""
    schedule = settings.schedule
    stochastic_rounding = settings.memory.weights_dtype == "bf16" and not uses_deepspeed()
    optimizer = make_optimizer(
        parameters, settings.optimizer, learning_rate, stochastic_rounding=stochastic_rounding, fused=fused
    )
    lr_scheduler = get_scheduler(
        schedule.lr_scheduler,
        optimizer,
        num_warmup_steps=schedule.lr_warmup_steps,
        num_training_steps=total_steps,
        num_cycles=schedule.lr_num_cycles,
        power=schedule.lr_power,
    )
    return optimizer, lr_scheduler
