"""This process among those of the launch, as torchrun and `accelerate launch` tell it before torch is imported.

A process that was not launched by either is the only one.
"""

import argparse
import os


def launch_rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK") or 0)


def launch_size() -> int:
    """How many processes there are, on all machines together."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def local_rank() -> int:
    """Number of this process on its machine, from 0: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def precision_of(args: argparse.Namespace) -> str:
    """What the networks compute in (no, fp16, bf16): as the flags say, else the launch configuration."""
    return args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
