"""The flags on speed, and which of them go together."""

import argparse
import math
import os

from common.errors import UserError
from common.ranks import launch_parallelism, launch_size
from flags.types import choice, positive_int


# What users type; attention.py knows what diffusers calls them.
ATTENTION_BACKENDS = ("native", "flash", "cudnn", "efficient", "flash-attn", "flash-attn-3", "sage")


def add_speed_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--allow_tf32",
        action="store_true",
        help="Let float32 matrix products use TF32 on Ampere GPUs and newer: faster, slightly less exact. "
        "(default: off)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="Compile the transformer's blocks by torch.compile: faster steps that take less memory, after a minute "
        "or so of compilation at the first step of each size. Worth it for runs of some hundred steps and more. "
        "(default: off)",
    )
    group.add_argument(
        "--attention_backend",
        **choice(ATTENTION_BACKENDS),
        help="What computes the attention, more than half of a step at full size: native lets torch choose; flash, "
        "cudnn and efficient name one of its kernels (try cudnn on Hopper GPUs and newer); flash-attn and "
        "flash-attn-3 are packages of these names. All but native need a GPU, and all but native and efficient half "
        "precision. (default: diffusers' own code, which lets torch choose)",
    )
    group.add_argument(
        "--validation_attention_backend",
        **choice(ATTENTION_BACKENDS),
        help="The same for sampling the validation videos, where sage, the package sageattention, can be taken too: "
        "it rounds to 8 bits and has no backward pass. (default: that of the training)",
    )
    group.add_argument(
        "--context_parallel_size",
        metavar="N",
        type=positive_int,
        help="Divide the tokens of each sample among N processes, for videos too long for one GPU: activations take "
        "an N-th of the memory, and a step has an N-th of the samples. N has to divide the number of processes. "
        "(default: parallelism_config_cp_size of the accelerate config, 1 without)",
    )
    group.add_argument(
        "--profile",
        action="store_true",
        help="Record what three of the first steps do on CPU and GPU, into the folder profile of --output_dir; the "
        "steps recorded are slower, and so is what the log says of their speed. (default: off)",
    )


def check_speed(args: argparse.Namespace) -> None:
    """The flags on speed go together with one another and with those on memory.

    Raises:
        UserError: two of them do not.
    """
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UserError(
            "--config_file: its dynamo_config compiles the model as a whole, which is not supported; leave it out "
            "there, and give the script --compile"
        )
    if args.attention_backend == "sage":
        raise UserError(
            "--attention_backend sage: sageattention has no backward pass, so it cannot train; use "
            "--validation_attention_backend sage to sample with it"
        )
    if args.validation_attention_backend and not args.validation_prompts:
        raise UserError("--validation_attention_backend: no video is sampled; add --validation_prompt or leave it out")
    if args.compile and args.offload_checkpoints and args.checkpoint_scope == "feed-forward":
        raise UserError(
            "--compile: --offload_checkpoints moves tensors in the middle of a block with --checkpoint_scope "
            "feed-forward, which cannot be compiled; use --checkpoint_scope block"
        )
    if args.compile and args.stream_blocks:
        raise UserError(
            "--compile: blocks that come and go (--stream_blocks) cannot be compiled; leave one of them out"
        )


def check_context_parallel(args: argparse.Namespace) -> None:
    """The processes can divide samples among them, and what else is asked for can be done on divided ones.

    Settles `args.context_parallel_size`.

    Raises:
        UserError: they cannot, or the launch configuration is at odds with itself or with the flag.
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
    flag, size = args.context_parallel_size, configured.get("cp_size", 1)
    if flag is not None and size not in (1, flag):
        raise UserError(
            f"--context_parallel_size {flag}: parallelism_config_cp_size in the accelerate config is {size}; leave "
            "the flag out, or launch with another config"
        )
    args.context_parallel_size = size = flag or size
    if size == 1:
        return
    if num_processes % size:
        raise UserError(
            f"--context_parallel_size {size}: {num_processes} "
            f"{'process' if num_processes == 1 else 'processes'} cannot be divided into groups of {size}; launch a "
            f"multiple of {size} by --num_processes of accelerate launch"
        )
    if args.compile:
        raise UserError("--compile: blocks that gather keys from other processes cannot be compiled; leave it out")
    if args.memory_budget_gb:
        raise UserError(
            "--memory_budget_gb: calculates for whole samples, not for divided ones; leave it out, and give the "
            "settings that you want"
        )
