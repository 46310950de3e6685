"""What FSDP's configuration and the flags of a script say of one another, before anything heavy is imported."""

import os

from common.errors import UserError
from common.ranks import _is_set, precision_of, uses_fsdp
from flags.optimizer import LOW_BITS
from flags.schema import flag_values
from flags.settings import TrainingSettings


_LOW_BIT_REMEDY = "leave it out (OPTIMIZER_FLAGS= before the launcher scripts)"
# Each takes parameters for plain tensors, moves them, or counts memory as if one device had them all.
_FOR_WHOLE_WEIGHTS = {
    **dict.fromkeys((*LOW_BITS, "use_torchao"), _LOW_BIT_REMEDY),
    **dict.fromkeys(("use_ema", "enable_model_cpu_offload", "memory_budget_gb", "auto_fit"), "leave it out"),
}


def check_fsdp(settings: TrainingSettings) -> None:
    """A launch by FSDP divides weights as they are loaded and computed here, and can do what the flags ask for.

    Raises:
        UserError: names the setting or the flag and what to do.
    """
    if not uses_fsdp():
        return
    for setting, is_as_needed, needed in (
        ("fsdp_version", os.environ.get("FSDP_VERSION", "1") == "2", "2"),
        ("fsdp_cpu_ram_efficient_loading", not _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"), "false"),
        ("fsdp_activation_checkpointing", not _is_set("FSDP_ACTIVATION_CHECKPOINTING"), "false"),
        ("fsdp_offload_params", not _is_set("FSDP_OFFLOAD_PARAMS"), "false"),
    ):
        if not is_as_needed:
            raise UserError(f"--config_file: {setting} must be {needed}, as in accelerate_configs/fsdp2.yaml")
    values = flag_values(settings)
    for flag, is_given, remedy in (
        (
            "--mixed_precision fp16",
            precision_of(settings.training.mixed_precision) == "fp16",
            "use --mixed_precision bf16",
        ),
        (
            f"--optimizer {settings.optimizer.optimizer}",
            settings.optimizer.optimizer not in ("adam", "adamw"),
            "use --optimizer adamw",
        ),
        (
            "--weights_dtype bf16",
            settings.memory.weights_dtype == "bf16",
            "leave it out: each GPU has but its share of float32",
        ),
        *((f"--{name}", values[name], remedy) for name, remedy in _FOR_WHOLE_WEIGHTS.items()),
    ):
        if is_given:
            raise UserError(f"{flag}: does not work on weights in shards (FSDP); {remedy}")
