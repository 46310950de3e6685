"""Checks of the flags on speed and context parallelism; none needs a model."""

import math
import os
from dataclasses import replace

from common.errors import UserError
from common.ranks import launch_parallelism, launch_size
from flags.settings import TrainingSettings


def check_speed(settings: TrainingSettings) -> None:
    """Check that the flags on speed can be combined with one another and with those on memory."""
    speed, memory = settings.speed, settings.memory
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UserError(
            "--config_file: dynamo_config is not supported; remove it there, and pass --compile to the script"
        )
    if speed.attention_backend == "sage":
        raise UserError("--attention_backend sage: has no backward pass; use --validation_attention_backend sage")
    if speed.validation_attention_backend and not settings.validation.has_videos:
        raise UserError("--validation_attention_backend: no video is sampled; add --validation_prompt or omit it")
    cache = settings.guidance.sampling_cache
    if speed.compile and cache in ("pab", "faster") and settings.validation.has_videos:
        raise UserError(
            f"--sampling_cache {cache}: skips parts of blocks, which compiled blocks cannot; use first-block, or "
            "omit --compile"
        )
    if speed.compile and memory.offload_checkpoints and memory.checkpoint_scope == "feed-forward":
        raise UserError(
            "--compile: the inputs of checkpoints inside a compiled block (--checkpoint_scope feed-forward) cannot be "
            "offloaded; use --checkpoint_scope all-but-attention, or omit --offload_checkpoints"
        )


def settle_context_parallel(settings: TrainingSettings) -> TrainingSettings:
    """Return the checked settings with the number of processes that divide each sample, by the flag or the launch."""
    size = _context_parallel_size(settings.speed.context_parallel_size, launch_size())
    settled = replace(settings, speed=replace(settings.speed, context_parallel_size=size))
    if size == 1:
        return settled
    if settings.speed.compile:
        raise UserError("--compile: blocks that gather keys from other processes cannot be compiled; omit it")
    if settings.memory.memory_budget_gb:
        raise UserError("--memory_budget_gb: not with divided samples; omit it, and pass the memory settings you want")
    return settled


def _context_parallel_size(flag: int | None, num_processes: int) -> int:
    configured = launch_parallelism()
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
    size = configured.get("cp_size", 1)
    if flag is not None and size not in (1, flag):
        raise UserError(
            f"--context_parallel_size {flag}: parallelism_config_cp_size in the accelerate config is {size}; omit the "
            "flag, or launch with another config"
        )
    size = flag or size
    if num_processes % size:
        raise UserError(
            f"--context_parallel_size {size}: does not divide the number of processes ({num_processes}); launch a "
            f"multiple of {size} with --num_processes of accelerate launch"
        )
    return size
