"""Checks of an FSDP launch against the flags of a script; nothing heavy is imported."""

import os

from cli.schema import flag_values
from common.errors import UserError
from common.ranks import is_set, precision_of, uses_fsdp
from flags.optimizer import LOW_BITS
from flags.settings import TrainingSettings


_MUST_BE_OFF = ("fsdp_cpu_ram_efficient_loading", "fsdp_activation_checkpointing", "fsdp_offload_params")
# Each expects plain tensors as parameters, moves them, or estimates memory as if one device had all weights.
_FOR_UNSHARDED = {
    **dict.fromkeys((*LOW_BITS, "use_torchao"), "omit it (OPTIMIZER_FLAGS= before the launcher scripts)"),
    **dict.fromkeys(("use_ema", "enable_model_cpu_offload", "memory_budget_gb", "auto_fit"), "omit it"),
}


def check_fsdp(settings: TrainingSettings) -> None:
    """Check that an FSDP launch shards weights as this toolkit does, and supports the flags."""
    if not uses_fsdp():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("--config_file: fsdp_version must be 2, as in accelerate_configs/fsdp2.yaml")
    for name in _MUST_BE_OFF:
        if is_set(name.upper()):
            raise UserError(f"--config_file: {name} must be false, as in accelerate_configs/fsdp2.yaml")
    if precision_of(settings.training.mixed_precision) == "fp16":
        raise _refusal("mixed_precision fp16", "use --mixed_precision bf16")
    if settings.optimizer.optimizer not in ("adam", "adamw"):
        raise _refusal(f"optimizer {settings.optimizer.optimizer}", "use --optimizer adamw")
    if settings.memory.weights_dtype == "bf16":
        raise _refusal("weights_dtype bf16", "omit it: each GPU has only its share of float32")
    if settings.guidance.sampling_cache == "first-block":  # the library does not know the class of a sharded block
        raise _refusal("sampling_cache first-block", "use --sampling_cache pab or faster")
    values = flag_values(settings)
    for name, remedy in _FOR_UNSHARDED.items():
        if values[name]:
            raise _refusal(name, remedy)


def _refusal(flag: str, remedy: str) -> UserError:
    return UserError(f"--{flag}: does not work on sharded weights (FSDP); {remedy}")
