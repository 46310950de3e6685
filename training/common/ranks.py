"""This process among those of the launch, as torchrun and `accelerate launch` describe it before torch is imported.

A process that was not launched by either is the only one, whatever single variables of them its environment has.
"""

import os


_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def _of_launch(variable: str, default: int) -> int:
    """Return a number that the launch has set. It sets both RANK and WORLD_SIZE; one of them means something else."""
    is_launched = os.environ.get("RANK") and os.environ.get("WORLD_SIZE")
    return int(os.environ.get(variable) or default) if is_launched else default


def forget_stray_ranks() -> None:
    """Remove the variables of a launch from the environment of a process without one, before accelerate reads them."""
    if not (os.environ.get("RANK") and os.environ.get("WORLD_SIZE")):
        for variable in _VARIABLES:
            os.environ.pop(variable, None)


def launch_rank() -> int:
    """Return the number of this process, from 0."""
    return _of_launch("RANK", 0)


def launch_size() -> int:
    """Return the number of processes on all machines."""
    return _of_launch("WORLD_SIZE", 1)


def launch_parallelism() -> dict[str, int]:
    """Return the sizes in `parallelism_config` of accelerate's YAML, `cp_size` and the like; empty without one.

    Source: `accelerate.parallelism_config.ParallelismConfig`, which reads the same variables.
    """
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        return {}
    sizes = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")
    return {name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}") or 1) for name in sizes}


def local_rank() -> int:
    """Return the number of this process on its machine, from 0, which is that of its GPU."""
    return _of_launch("LOCAL_RANK", 0)


def local_size() -> int:
    """Return the number of processes on this machine; by default all of them."""
    return _of_launch("LOCAL_WORLD_SIZE", launch_size())


def num_machines() -> int:
    """Return the number of machines, which have equally many processes."""
    return launch_size() // local_size()


def machine_rank() -> int:
    """Return the number of this machine, from 0."""
    return launch_rank() // local_size()


def precision_of(mixed_precision: str | None) -> str:
    """Return the compute precision (no, fp16, bf16): --mixed_precision, or else the launch configuration's."""
    return mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def uses_deepspeed() -> bool:
    """Return whether `accelerate launch` uses DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def uses_fsdp() -> bool:
    """Return whether `accelerate launch` uses FSDP."""
    return is_set("ACCELERATE_USE_FSDP")


def is_set(variable: str) -> bool:
    """Return whether an environment variable means true."""
    return os.environ.get(variable, "false").lower() in ("true", "1")
