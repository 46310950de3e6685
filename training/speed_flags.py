"""The flags on speed, and which of them go together."""

import argparse
import os

from errors import UserError
from flag_types import choice


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
