"""Checks of a DeepSpeed launch and its configuration against the flags of a script; nothing heavy is imported."""

import json
import os
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.ranks import launch_size, precision_of, uses_deepspeed
from flags.optimizer import LOW_BITS
from flags.settings import TrainingSettings


def read_deepspeed_config() -> dict[str, Any]:
    """Return DeepSpeed's configuration: the file of `deepspeed_config_file`, or else what accelerate's YAML sets."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        config = {"zero_optimization": {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}}
        for key in ("gradient_accumulation_steps", "gradient_clipping"):
            value = os.environ.get(f"ACCELERATE_{key.upper()}", "auto")
            config[key] = value if value == "auto" else json.loads(value)
        return config
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        config["zero_optimization"].get("stage")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--config_file: deepspeed_config_file '{file}' is not a DeepSpeed configuration with zero_optimization "
            f"({type(error).__name__}: {error}); fix it, or use accelerate_configs/zero2.yaml"
        ) from error
    return config


def zero_stage() -> int:
    """Return the ZeRO stage: 1 shards the optimizer's states, 2 also gradients, 3 also weights; 0 nothing."""
    return read_deepspeed_config()["zero_optimization"].get("stage", 0) if uses_deepspeed() else 0


def describe_division() -> str | bool:
    """Return the ZeRO stage and number of processes that a checkpoint's files depend on; False without DeepSpeed."""
    return f"ZeRO-{zero_stage()} on {launch_size()} processes" if uses_deepspeed() else False


def check_zero(settings: TrainingSettings) -> None:
    """Check that a DeepSpeed launch does not contradict the flags, and supports them."""
    if not uses_deepspeed():
        return
    precision, stage = precision_of(settings.training.mixed_precision), zero_stage()
    _check_config(settings, read_deepspeed_config(), precision)
    if stage not in (1, 2, 3):
        raise UserError(
            f"--config_file: ZeRO stage {stage} divides nothing; use 2 or 3, or accelerate_configs/ddp.yaml"
        )
    _check_optimizer(settings, precision)
    _check_memory(settings)
    if stage == 3:
        _check_sharded_weights(settings)


def _check_config(settings: TrainingSettings, config: dict[str, Any], precision: str) -> None:
    """Check that DeepSpeed's configuration has the same values as the flags."""
    batch, steps = settings.training.train_batch_size, settings.training.gradient_accumulation_steps
    for key, flag, value in (
        ("train_micro_batch_size_per_gpu", "--train_batch_size", batch),
        ("gradient_accumulation_steps", "--gradient_accumulation_steps", steps),
        ("gradient_clipping", "--max_grad_norm", settings.optimizer.max_grad_norm),
        ("train_batch_size", "--train_batch_size x accumulation steps x processes", batch * steps * launch_size()),
    ):
        if config.get(key, "auto") not in ("auto", value):
            raise UserError(
                f"--config_file: DeepSpeed's {key} is {config[key]}, but {flag} is {value:g}; remove it there"
            )
    for key, flag in (("optimizer", "--optimizer"), ("scheduler", "--lr_scheduler")):
        if key in config:
            raise UserError(f"--config_file: DeepSpeed's {key} conflicts with {flag}; remove it there")
    for key in ("fp16", "bf16", "torch_autocast", "amp"):
        if config.get(key, {}).get("enabled", False) is True and precision != key:
            raise UserError(f"--config_file: DeepSpeed's {key} is not --mixed_precision {precision}; remove it there")


def _check_optimizer(settings: TrainingSettings, precision: str) -> None:
    if precision == "fp16":
        raise UserError("--mixed_precision fp16: not with DeepSpeed; use bf16, or accelerate_configs/ddp.yaml")
    if settings.optimizer.optimizer not in ("adam", "adamw"):
        raise UserError(
            f"--optimizer {settings.optimizer.optimizer}: needs full weight matrices, which DeepSpeed shards; use "
            "--optimizer adamw, or launch with accelerate_configs/ddp.yaml"
        )
    for flag in (*LOW_BITS, "use_torchao"):
        if getattr(settings.optimizer, flag):
            raise UserError(
                f"--{flag}: DeepSpeed shards only 32-bit states; omit it (OPTIMIZER_FLAGS= before the launcher "
                "scripts), or launch with accelerate_configs/ddp.yaml"
            )
    if settings.memory.weights_dtype == "bf16" and precision != "bf16":
        raise UserError("--weights_dtype bf16: the networks must compute in bf16 too; use --mixed_precision bf16")


def _check_memory(settings: TrainingSettings) -> None:
    for flag in ("memory_budget_gb", "auto_fit"):
        if getattr(settings.memory, flag):
            raise UserError(f"--{flag}: not with DeepSpeed; omit it, or use accelerate_configs/single_gpu.yaml")
    if settings.speed.context_parallel_size > 1:
        raise UserError(
            "--context_parallel_size: not with DeepSpeed; use accelerate_configs/ddp.yaml or "
            "fsdp2_context_parallel.yaml"
        )
    if settings.objective.use_ema and (zero_stage() == 3 or settings.memory.weights_dtype == "bf16"):
        raise UserError("--use_ema: needs all weights in float32; omit it, or use ZeRO-2 with --weights_dtype fp32")


def _check_sharded_weights(settings: TrainingSettings) -> None:
    if settings.speed.compile:
        raise UserError("--compile: ZeRO-3 gathers weights in the middle of a block; omit it, or use ZeRO-2")
    if settings.validation.enable_model_cpu_offload:
        raise UserError("--enable_model_cpu_offload: ZeRO-3 places the weights itself; omit it, or use ZeRO-2")
