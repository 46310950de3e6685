"""The flags on the memory of weights and activations, and which of them go together."""

import argparse

from common.errors import UserError
from common.ranks import launch_size, uses_deepspeed, uses_fsdp
from flags.types import choice, positive_float, positive_int


CHECKPOINT_SCOPES = ("block", "segment", "feed-forward")
QUANTIZATIONS = ("none", "int8", "fp8", "nf4")


def add_memory_flags(group: argparse._ArgumentGroup, method: str) -> None:
    group.add_argument(
        "--checkpoint_scope",
        **choice(CHECKPOINT_SCOPES),
        default="block",
        help="With --gradient_checkpointing, what is computed again as one piece: block by block, segment (several "
        "blocks: fewer inputs are kept, more is computed again at once), or feed-forward (that part of each block "
        "alone: faster, more memory). (default: %(default)s)",
    )
    group.add_argument(
        "--checkpoint_every",
        metavar="N",
        type=positive_int,
        default=None,
        help="With --gradient_checkpointing, checkpoint every N-th block only, which is faster and takes more memory; "
        "with --checkpoint_scope segment, blocks in a segment. (default: 1; 2 in a segment)",
    )
    group.add_argument(
        "--offload_checkpoints",
        action="store_true",
        help="With --gradient_checkpointing, keep what is kept (the inputs of the blocks) in pinned host memory; "
        "copies run beside the computation. (default: off)",
    )
    if method == "lora":
        group.set_defaults(weights_dtype="fp32")  # the adapters'
        group.add_argument(
            "--quantize_base",
            **choice(QUANTIZATIONS),
            default="none",
            help="Store the frozen base model's linear layers in 8 bits (int8, fp8: by torchao) or 4 (nf4: by "
            "bitsandbytes, needs a GPU). The LoRA is written as ever and loads on the unquantized model. "
            "(default: %(default)s)",
        )
        group.add_argument(
            "--stream_blocks",
            action="store_true",
            help="Keep the frozen blocks in pinned host memory and copy each to the GPU just before it is used: two "
            "blocks are there at a time. For the smallest cards; needs --gradient_checkpointing. (default: off)",
        )
    else:
        # What is trained itself can be neither quantized nor streamed.
        group.set_defaults(quantize_base="none", stream_blocks=False)
        group.add_argument(
            "--weights_dtype",
            **choice(("fp32", "bf16")),
            default="fp32",
            help="What the trained weights are kept in. bf16 halves weights and gradients; updates are then rounded "
            "stochastically, by torchao's optimizers: it needs --use_torchao. Under DeepSpeed it halves the weights "
            "on each GPU; float32 ones, divided among the GPUs, are updated. (default: %(default)s)",
        )
    add_text_encoder_flag(group)
    group.add_argument(
        "--auto_fit",
        action="store_true",
        help="When the first steps run out of GPU memory, start them again with the next stronger savings of memory, "
        "and say which. One process only. (default: off)",
    )
    group.add_argument(
        "--memory_budget_gb",
        metavar="GB",
        type=positive_float,
        help="Choose the fastest of the settings of memory that fits into so much GPU memory, and say which. "
        "(default: what the flags say)",
    )


def add_text_encoder_flag(group: argparse._ArgumentGroup) -> None:
    """For all scripts that embed captions or prompts."""
    group.add_argument(
        "--text_encoder_8bit",
        action="store_true",
        help="Embed captions and prompts by the text encoder with its weights in 8 bits (torchao's, on any device): 5 "
        "GB of memory, not 10; the embeddings differ by about 1%%. (default: off)",
    )


def check_memory(args: argparse.Namespace, given: set[str], method: str) -> None:
    """The savings of memory have what they need.

    Settles `args.checkpoint_every`.

    Raises:
        UserError: one has not, or two do not go together.
    """
    for flag in ("checkpoint_scope", "checkpoint_every", "offload_checkpoints"):
        if flag in given and not args.gradient_checkpointing:
            raise UserError(f"--{flag}: no effect without gradient checkpointing; add --gradient_checkpointing")
    args.checkpoint_every = args.checkpoint_every or (2 if args.checkpoint_scope == "segment" else 1)
    if method == "lora" and args.quantize_base != "none":
        _check_quantization(args)
    if method == "lora" and args.stream_blocks:
        _check_streaming(args)
    if args.auto_fit and launch_size() > 1:
        raise UserError(
            "--auto_fit: a process that runs out of memory would leave the others waiting; find the settings with one "
            "process (--auto_fit --dry_run), and give these to all"
        )


def _check_streaming(args: argparse.Namespace) -> None:
    """Blocks that come and go are computed again, one by one."""
    _check_launcher("--stream_blocks", "divide blocks that are not on the GPU")
    if not args.gradient_checkpointing or args.checkpoint_scope != "block" or args.checkpoint_every != 1:
        raise UserError(
            "--stream_blocks: every block has to be computed again, one by one; give --gradient_checkpointing, "
            "without --checkpoint_scope and --checkpoint_every"
        )
    if args.enable_model_cpu_offload:
        raise UserError(
            "--enable_model_cpu_offload: with --stream_blocks the transformer is not on the GPU as a whole anyway; "
            "leave it out"
        )


def _check_quantization(args: argparse.Namespace) -> None:
    """Quantized weights are not asked to go where they cannot."""
    flag = f"--quantize_base {args.quantize_base}"
    _check_launcher(flag, "divide quantized weights")
    if args.quantize_base == "nf4" and args.stream_blocks:
        raise UserError(f"{flag}: bitsandbytes' weights cannot be streamed; use int8 or leave out --stream_blocks")


def _check_launcher(flag: str, impossible: str) -> None:
    for launcher, is_used in (("DeepSpeed", uses_deepspeed()), ("FSDP", uses_fsdp())):
        if is_used:
            raise UserError(
                f"{flag}: {launcher} cannot {impossible}; launch with accelerate_configs/ddp.yaml or "
                "single_gpu.yaml, or leave the flag out"
            )
