"""The flags on speed."""

from dataclasses import dataclass

from cli.schema import flag
from cli.types import PositiveInt


# models/attention.py maps these to the names in diffusers.
ATTENTION_BACKENDS = ("native", "flash", "cudnn", "efficient", "flash-attn", "flash-attn-3", "flash-attn-4", "sage")


@dataclass(frozen=True)
class SpeedFlags:
    """Speed, and how samples are divided among processes."""

    allow_tf32: bool = flag(False, "TF32 for float32 products, on Ampere and newer: faster, slightly less exact.")
    compile: bool = flag(
        False,
        "Compile the transformer's blocks with torch.compile: faster steps that need less memory, after about a "
        "minute of compilation for each size. --no-compile turns it off.",
        shown="on a GPU from 1,500 steps for each size",
    )
    attention_backend: str | None = flag(
        None,
        "Attention kernel: native lets torch choose; flash, cudnn (try it on Hopper GPUs and newer) and efficient are "
        "kernels of torch; flash-attn, flash-attn-3 and flash-attn-4 are packages. All but native need a GPU, and "
        "all but native and efficient half precision.",
        choices=ATTENTION_BACKENDS,
        shown="native",
    )
    validation_attention_backend: str | None = flag(
        None,
        "The same for validation videos; sage (package sageattention) rounds to 8 bits and cannot train.",
        choices=ATTENTION_BACKENDS,
        shown="that of training",
    )
    context_parallel_size: PositiveInt | None = flag(
        None,
        "Divide the tokens of each sample among N processes, for videos too long for one GPU: 1/N of the activation "
        "memory, and 1/N of the samples per step. N must divide the number of processes.",
        shown="parallelism_config_cp_size of the accelerate config, or 1",
    )
    profile: bool = flag(False, "Record three of the first steps on CPU and GPU to --output_dir/profile; slows these.")
