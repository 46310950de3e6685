"""The flags on speed."""

from dataclasses import dataclass

from flags.schema import flag
from flags.types import positive_int


# What users type; models/attention.py knows what diffusers calls them.
ATTENTION_BACKENDS = ("native", "flash", "cudnn", "efficient", "flash-attn", "flash-attn-3", "sage")


@dataclass(frozen=True)
class SpeedFlags:
    """Speed, and how samples are divided among processes."""

    allow_tf32: bool = flag(
        False, "Let float32 matrix products use TF32 on Ampere GPUs and newer: faster, slightly less exact."
    )
    compile: bool = flag(
        False,
        "Compile the transformer's blocks by torch.compile: faster steps that take less memory, after a minute "
        "or so of compilation at the first step of each size. Worth it for runs of some hundred steps and more.",
    )
    attention_backend: str | None = flag(
        None,
        "What computes the attention, more than half of a step at full size: native lets torch choose; flash, "
        "cudnn and efficient name one of its kernels (try cudnn on Hopper GPUs and newer); flash-attn and "
        "flash-attn-3 are packages of these names. All but native need a GPU, and all but native and efficient "
        "half precision.",
        choices=ATTENTION_BACKENDS,
        shown="diffusers' own code, which lets torch choose",
    )
    validation_attention_backend: str | None = flag(
        None,
        "The same for sampling the validation videos, where sage, the package sageattention, can be taken too: "
        "it rounds to 8 bits and has no backward pass.",
        choices=ATTENTION_BACKENDS,
        shown="that of the training",
    )
    context_parallel_size: int | None = flag(
        None,
        "Divide the tokens of each sample among N processes, for videos too long for one GPU: activations take "
        "an N-th of the memory, and a step has an N-th of the samples. N has to divide the number of processes.",
        type=positive_int,
        metavar="N",
        shown="parallelism_config_cp_size of the accelerate config, 1 without",
    )
    profile: bool = flag(
        False,
        "Record what three of the first steps do on CPU and GPU, into the folder profile of --output_dir; the "
        "steps recorded are slower, and so is what the log says of their speed.",
    )
