"""What DeepSpeed's configuration and the flags of a script say of one another, before anything heavy is imported."""

import json
import os
from typing import Any

from common.errors import UserError
from common.ranks import launch_size, precision_of, uses_deepspeed
from flags.optimizer import LOW_BITS, OptimizerFlags
from flags.schema import flag_values
from flags.settings import TrainingSettings


# What DeepSpeed's configuration can say too, but the flags decide.
_SAID_BY_FLAGS = {
    "train_micro_batch_size_per_gpu": "train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}


def read_deepspeed_config() -> dict[str, Any]:
    """DeepSpeed's configuration as far as it was given: the file of `deepspeed_config_file`, else what the YAML says.

    Raises:
        UserError: the file cannot be read.
    """
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        said = {
            "gradient_accumulation_steps": os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto"),
            "gradient_clipping": os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto"),
        }
        stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        numbers = {key: value if value == "auto" else json.loads(value) for key, value in said.items()}
        return {**numbers, "zero_optimization": {"stage": stage}}
    try:
        with open(file, encoding="utf-8") as opened:
            config = json.load(opened)
        config["zero_optimization"].get("stage")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--config_file: deepspeed_config_file '{file}' is no DeepSpeed configuration with zero_optimization "
            f"({type(error).__name__}: {error}); mend it, or use accelerate_configs/zero2.yaml"
        ) from error
    return config


def zero_stage() -> int:
    """What is divided among processes: 1 the optimizer's states, 2 the gradients too, 3 the weights too; 0 nothing."""
    return read_deepspeed_config()["zero_optimization"].get("stage", 0) if uses_deepspeed() else 0


def describe_division() -> str | bool:
    """What a checkpoint's files depend on; False without DeepSpeed."""
    return f"ZeRO-{zero_stage()} on {launch_size()} processes" if uses_deepspeed() else False


def check_zero(settings: TrainingSettings) -> None:
    """A launch by DeepSpeed contradicts no flag, and can do what the flags ask for.

    Raises:
        UserError: names the flag and what to do.
    """
    if not uses_deepspeed():
        return
    precision, config = precision_of(settings.training.mixed_precision), read_deepspeed_config()
    _check_config(settings, config, precision)
    stage = config["zero_optimization"].get("stage", 0)
    if stage not in (1, 2, 3):
        raise UserError(
            f"--config_file: ZeRO stage {stage} divides nothing; use stage 2 or 3, or accelerate_configs/ddp.yaml"
        )
    _check_optimizer(settings.optimizer, precision)
    _check_weights(settings, precision, stage)


def _check_config(settings: TrainingSettings, config: dict[str, Any], precision: str) -> None:
    size = settings.training.train_batch_size * settings.training.gradient_accumulation_steps * launch_size()
    values = flag_values(settings)
    meant = {key: (f"--{flag}", values[flag]) for key, flag in _SAID_BY_FLAGS.items()}
    meant["train_batch_size"] = ("--train_batch_size times accumulation steps times processes", size)
    for key, (name, value) in meant.items():
        if config.get(key, "auto") not in ("auto", value):
            raise UserError(
                f"--config_file: {key} of DeepSpeed is {config[key]}, but {name} is {value:g}; leave it out there"
            )
    for key, flag in (("optimizer", "--optimizer"), ("scheduler", "--lr_scheduler")):
        if key in config:
            raise UserError(f"--config_file: the {key} of DeepSpeed is in the way of {flag}; leave it out there")
    for key in ("fp16", "bf16", "torch_autocast", "amp"):
        if config.get(key, {}).get("enabled", False) is True and precision != key:
            raise UserError(
                f"--config_file: {key} of DeepSpeed is not --mixed_precision {precision}; leave it out there"
            )


def _check_optimizer(optimizer: OptimizerFlags, precision: str) -> None:
    if precision == "fp16":
        raise UserError(
            "--mixed_precision fp16: not under DeepSpeed; use bf16, or launch with accelerate_configs/ddp.yaml"
        )
    if optimizer.optimizer not in ("adam", "adamw"):
        raise UserError(
            f"--optimizer {optimizer.optimizer}: under DeepSpeed a process has pieces of the weights, and this "
            "optimizer looks at them as a whole; use --optimizer adamw, or launch with accelerate_configs/ddp.yaml"
        )
    for flag in (*LOW_BITS, "use_torchao"):
        if getattr(optimizer, flag):
            raise UserError(
                f"--{flag}: DeepSpeed divides states in 32 bits only; leave it out (OPTIMIZER_FLAGS= before the "
                "launcher scripts), or launch with accelerate_configs/ddp.yaml"
            )


def _check_weights(settings: TrainingSettings, precision: str, stage: int) -> None:
    is_rounded = settings.memory.weights_dtype == "bf16"
    if is_rounded and precision != "bf16":
        raise UserError("--weights_dtype bf16: the networks must compute in bf16 too; use --mixed_precision bf16")
    if settings.memory.memory_budget_gb or settings.memory.auto_fit:
        flag = "--memory_budget_gb" if settings.memory.memory_budget_gb else "--auto_fit"
        raise UserError(f"{flag}: knows nothing of DeepSpeed; leave it out, or use accelerate_configs/single_gpu.yaml")
    if settings.speed.context_parallel_size > 1:
        raise UserError(
            "--context_parallel_size: not with DeepSpeed; use accelerate_configs/ddp.yaml or "
            "fsdp2_context_parallel.yaml"
        )
    if settings.objective.use_ema and (stage == 3 or is_rounded):
        raise UserError(
            "--use_ema: no process has all weights in full precision; leave it out, or use ZeRO-2 with "
            "--weights_dtype fp32"
        )
    if stage < 3:
        return
    if settings.speed.compile:
        raise UserError("--compile: ZeRO-3 fetches weights in the middle of a block; leave it out, or use ZeRO-2")
    if settings.validation.enable_model_cpu_offload:
        raise UserError(
            "--enable_model_cpu_offload: ZeRO-3 has its own places for the weights; leave it out, or use ZeRO-2"
        )
