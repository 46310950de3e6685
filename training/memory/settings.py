"""The settings that trade speed or precision for memory, as one value."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from cli.schema import flag_values, replace_flags
from flags.settings import TrainingSettings


GB = 2**30  # bytes


@dataclass(frozen=True)
class MemorySettings:
    """The values of the flags of the same names, for the method of the script."""

    method: str  # lora, sft
    gradient_checkpointing: bool = False
    checkpoint_scope: str = "block"
    checkpoint_every: int = 1
    offload_checkpoints: bool = False
    quantize_base: str = "none"  # lora
    stream_blocks: bool = False  # lora
    weights_dtype: str = "fp32"  # sft
    optimizer: str = "adam"
    use_8bit: bool = False
    use_4bit: bool = False
    use_fp8: bool = False
    use_torchao: bool = False
    use_cpu_offload_optimizer: bool = False
    offload_gradients: bool = False
    step_in_backward: bool = False
    use_ema: bool = False
    enable_model_cpu_offload: bool = False

    @property
    def state_bits(self) -> int:
        """The bits of one number in the optimizer's states."""
        return 4 if self.use_4bit else 8 if self.use_8bit or self.use_fp8 else 32

    @property
    def trained_bytes(self) -> int:
        """The bytes of one trained number; adapters are always in float32."""
        return 2 if self.method == "sft" and self.weights_dtype == "bf16" else 4


NAMES = tuple(field.name for field in fields(MemorySettings) if field.name != "method")


def memory_settings_of(settings: TrainingSettings) -> MemorySettings:
    """Return the memory settings of checked flags."""
    values = flag_values(settings)
    return MemorySettings(settings.method, **{name: values[name] for name in NAMES})


def with_memory(settings: TrainingSettings, memory: MemorySettings) -> TrainingSettings:
    """Return the settings with other memory settings."""
    changes = {name: getattr(memory, name) for name in NAMES}
    if memory.step_in_backward:
        changes["max_grad_norm"] = 0.0
    return replace_flags(settings, **changes)


def differing_flags(settings: MemorySettings, base: MemorySettings) -> list[str]:
    """Return the flags and values to type to get from `base` to `settings`."""
    flags = []
    for name, value in differences(settings, base).items():
        if value is True:
            flags.append(f"--{name}")
        elif value is False:
            flags.append(f"(no --{name})")
        else:
            flags += [f"--{name}", str(value)]
    return flags


def describe_change(settings: MemorySettings, base: MemorySettings) -> str:
    """Return the differing flags in words, with their side effect; empty if nothing differs."""
    effect = " (gradients are not clipped)" if settings.step_in_backward and not base.step_in_backward else ""
    return " ".join(differing_flags(settings, base)) + effect


def differences(settings: MemorySettings, base: MemorySettings) -> Mapping[str, Any]:
    """Return the values of `settings` that differ from `base`, by name."""
    before = asdict(base)
    return {name: value for name, value in asdict(settings).items() if value != before[name]}
