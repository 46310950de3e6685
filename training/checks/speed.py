"""Checks of the flags on speed and context parallelism; none needs a model."""

import math
import os
from dataclasses import replace

from common.errors import UserError
from common.ranks import launch_parallelism, launch_size
from flags.settings import TrainingSettings


def check_speed(settings: TrainingSettings) -> None:
    """Check that the flags on speed go together with one another and with those on memory.

    Raises:
        UserError: two of them do not.
    """
    speed, memory = settings.speed, settings.memory
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UserError(
            "--config_file: its dynamo_config compiles the model as a whole, which is not supported; leave it out "
            "there, and give the script --compile"
        )
    if speed.attention_backend == "sage":
        raise UserError(
            "--attention_backend sage: sageattention has no backward pass, so it cannot train; use "
            "--validation_attention_backend sage to sample with it"
        )
    if speed.validation_attention_backend and not settings.validation.prompts:
        raise UserError("--validation_attention_backend: no video is sampled; add --validation_prompt or leave it out")
    if speed.compile and memory.offload_checkpoints and memory.checkpoint_scope == "feed-forward":
        raise UserError(
            "--compile: --offload_checkpoints moves tensors in the middle of a block with --checkpoint_scope "
            "feed-forward, which cannot be compiled; use --checkpoint_scope block"
        )
    if speed.compile and memory.stream_blocks:
        raise UserError(
            "--compile: blocks that come and go (--stream_blocks) cannot be compiled; leave one of them out"
        )


def settle_context_parallel(settings: TrainingSettings) -> TrainingSettings:
    """Return the settings with the number of processes that divide each sample, from the flag or the launch.

    Raises:
        UserError: the launch configuration contradicts itself or the flag, or other flags rule divided samples out.
    """
    configured, num_processes = launch_parallelism(), launch_size()
    for name in ("tp_size", "sp_size"):
        if configured.get(name, 1) > 1:
            raise UserError(f"parallelism_config_{name}: not supported; use parallelism_config_cp_size")
    strategy = os.environ.get("PARALLELISM_CONFIG_CP_COMM_STRATEGY", "allgather")
    if configured and strategy != "allgather":
        raise UserError(f"parallelism_config_cp_comm_strategy {strategy}: not supported; set it to allgather")
    if math.prod(configured.values()) not in (1, num_processes):
        sizes = " x ".join(f"{name} {size}" for name, size in configured.items() if size > 1)
        raise UserError(
            f"the accelerate config: its parallelism_config is for another number of processes ({sizes}) than the "
            f"{num_processes} launched; set dp_shard_size x cp_size to num_processes"
        )
    flag, size = settings.speed.context_parallel_size, configured.get("cp_size", 1)
    if flag is not None and size not in (1, flag):
        raise UserError(
            f"--context_parallel_size {flag}: parallelism_config_cp_size in the accelerate config is {size}; leave "
            "the flag out, or launch with another config"
        )
    size = flag or size
    settled = replace(settings, speed=replace(settings.speed, context_parallel_size=size))
    if size == 1:
        return settled
    if num_processes % size:
        raise UserError(
            f"--context_parallel_size {size}: {num_processes} "
            f"{'process' if num_processes == 1 else 'processes'} cannot be divided into groups of {size}; launch a "
            f"multiple of {size} by --num_processes of accelerate launch"
        )
    if settings.speed.compile:
        raise UserError("--compile: blocks that gather keys from other processes cannot be compiled; leave it out")
    if settings.memory.memory_budget_gb:
        raise UserError(
            "--memory_budget_gb: calculates for whole samples, not for divided ones; leave it out, and give the "
            "settings that you want"
        )
    return settled
