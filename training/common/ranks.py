"""This process among those of the launch, as torchrun and `accelerate launch` tell it before torch is imported.

A process that was not launched by either is the only one.
"""

import os


def launch_rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK") or 0)


def launch_size() -> int:
    """How many processes there are, on all machines together."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def launch_parallelism() -> dict[str, int]:
    """What `parallelism_config` in accelerate's YAML divides and among how many: `cp_size` and the like, by name.

    Empty where it has none. Source: `accelerate.parallelism_config.ParallelismConfig`, which reads the same variables.
    """
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        return {}
    sizes = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")
    return {name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}") or 1) for name in sizes}


def local_rank() -> int:
    """Number of this process on its machine, from 0: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def local_size() -> int:
    """How many of the processes are on this machine; all of them where nothing says otherwise."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or launch_size())


def num_machines() -> int:
    """How many machines there are, each with as many processes."""
    return launch_size() // local_size()


def machine_rank() -> int:
    """Number of this machine, from 0."""
    return launch_rank() // local_size()


def precision_of(mixed_precision: str | None) -> str:
    """Return what the networks compute in (no, fp16, bf16): --mixed_precision, else the launch configuration's."""
    return mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def uses_deepspeed() -> bool:
    """Whether `accelerate launch` was asked for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def uses_fsdp() -> bool:
    """Whether `accelerate launch` was asked for FSDP."""
    return _is_set("ACCELERATE_USE_FSDP")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")
