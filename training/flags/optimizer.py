"""The flags on the optimizer and its memory, and which of them go together."""

import argparse

from common.errors import UserError
from common.ranks import launch_size, uses_deepspeed
from flags.types import choice, decay_rate, non_negative_float, positive_float


OPTIMIZERS = ("adam", "adamw", "prodigy", "came", "schedulefree", "muon")
LOW_BITS = ("use_8bit", "use_4bit", "use_fp8")


def add_optimizer_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--optimizer",
        **choice(OPTIMIZERS),
        default="adam",
        help="adam or adamw (decoupled weight decay) for most runs; prodigy finds its own step size; came needs less "
        "memory; schedulefree is adamw with an average of the weights in the place of a falling learning rate; muon "
        "orthogonalizes the steps of matrices and takes adamw for the rest. (default: %(default)s)",
    )
    group.add_argument(
        "--beta1",
        "--adam_beta1",
        metavar="X",
        type=decay_rate,
        default=0.9,
        help="Decay of the running mean of gradients; with muon, the momentum of matrices too. (default: %(default)s)",
    )
    group.add_argument(
        "--beta2",
        "--adam_beta2",
        metavar="X",
        type=decay_rate,
        default=0.95,
        help="Decay of the running mean of squared gradients; raise it towards 0.999 when training is unsteady. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--beta3",
        "--prodigy_beta3",
        metavar="X",
        type=decay_rate,
        help="prodigy: decay of its step size estimate (default: square root of beta2). came: decay of its "
        "confidence (default: 0.9999).",
    )
    group.add_argument(
        "--weight_decay",
        "--adam_weight_decay",
        metavar="X",
        type=non_negative_float,
        default=1e-4,
        help="How strongly weights are pulled towards 0; raise it when the result overfits. (default: %(default)s)",
    )
    group.add_argument(
        "--epsilon",
        "--adam_epsilon",
        metavar="X",
        type=positive_float,
        default=1e-8,
        help="Added to the denominator of a step so that it cannot be 0. (default: %(default)s)",
    )
    group.add_argument(
        "--max_grad_norm",
        metavar="X",
        type=non_negative_float,
        default=1.0,
        help="Gradients whose norm is larger are scaled down to this norm; 0 leaves them as they are. (default: "
        "%(default)s; 0 with --step_in_backward)",
    )
    group.add_argument(
        "--prodigy_decouple",
        action="store_true",
        help="prodigy: decouple weight decay from the gradient, as adamw does. (default: off)",
    )
    group.add_argument(
        "--prodigy_use_bias_correction",
        action="store_true",
        help="prodigy: correct the bias of the first steps' running means, as adam does. (default: off)",
    )
    group.add_argument(
        "--prodigy_safeguard_warmup",
        action="store_true",
        help="prodigy: keep the learning rate out of the step size estimate; use it with warm-up. (default: off)",
    )


def add_optimizer_memory_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--use_8bit",
        "--use_8bit_adam",
        action="store_true",
        help="Keep the states of adam or adamw in 8 bits, a quarter of the memory: by bitsandbytes, or by torchao "
        "with --use_torchao. (default: off)",
    )
    group.add_argument(
        "--use_4bit",
        action="store_true",
        help="Keep the states of adam or adamw in 4 bits; needs --use_torchao. (default: off)",
    )
    group.add_argument(
        "--use_torchao",
        action="store_true",
        help="Take the optimizer of --use_8bit, --use_4bit, --use_fp8 or --weights_dtype bf16 from torchao; without "
        "it, 8 bits are those of bitsandbytes. (default: off)",
    )
    group.add_argument(
        "--use_fp8",
        action="store_true",
        help="Keep the states of adam or adamw as 8-bit floats; needs --use_torchao and a GPU of compute capability "
        "8.9 or newer (RTX 40, H100). (default: off)",
    )
    group.add_argument(
        "--use_cpu_offload_optimizer",
        action="store_true",
        help="Keep the states of adam or adamw in CPU memory and step there (by torchao, with states of any bits but "
        "bitsandbytes'): slower, for full fine-tuning on one GPU that is too small otherwise. (default: off)",
    )
    group.add_argument(
        "--offload_gradients",
        action="store_true",
        help="With --use_cpu_offload_optimizer, keep gradients on the CPU too; not together with gradient "
        "accumulation. (default: off)",
    )
    group.add_argument(
        "--step_in_backward",
        action="store_true",
        help="Let adam or adamw, with states of any bits, update each weight as soon as the backward pass has its "
        "gradient, and free the gradient: full fine-tuning then never holds all gradients at once. Their norm is not "
        "known, so they are not clipped. One process, no gradient accumulation, not fp16. (default: off)",
    )


def check_low_bit(args: argparse.Namespace) -> None:
    """The savings of the optimizer's memory exist for the optimizer chosen, and are not contradictory."""
    bits = [flag for flag in LOW_BITS if getattr(args, flag)]
    if len(bits) > 1:
        raise UserError(f"--{bits[0]} and --{bits[1]}: only one is possible; leave out the other")
    for flag in (*LOW_BITS, "use_cpu_offload_optimizer", "step_in_backward"):
        if getattr(args, flag) and args.optimizer not in ("adam", "adamw"):
            raise UserError(f"--{flag}: not available for {args.optimizer}; use --optimizer adamw or leave it out")
    for flag, what in (("use_4bit", "4-bit"), ("use_fp8", "8-bit floating-point")):
        if getattr(args, flag) and not args.use_torchao:
            raise UserError(f"--{flag}: only torchao has {what} optimizers; add --use_torchao")
    _check_offload(args)
    if args.step_in_backward and args.use_cpu_offload_optimizer:
        raise UserError(
            "--step_in_backward: the offloaded optimizer steps on the CPU after the backward pass; leave it out, or "
            "use --offload_gradients instead"
        )
    if args.step_in_backward and args.gradient_accumulation_steps > 1:
        raise UserError(
            "--step_in_backward: frees gradients in every backward pass, so they cannot be accumulated; leave it out "
            "or use --gradient_accumulation_steps 1"
        )
    for flag in ("use_cpu_offload_optimizer", "step_in_backward"):
        if getattr(args, flag) and args.mixed_precision == "fp16":
            raise UserError(f"--{flag}: takes gradients before fp16's scaling is undone; use --mixed_precision bf16")
        if getattr(args, flag) and launch_size() > 1:
            raise UserError(
                f"--{flag}: takes gradients before processes average them; launch one process, or leave it out"
            )
    _check_weights_dtype(args)


def _check_offload(args: argparse.Namespace) -> None:
    if args.use_cpu_offload_optimizer and args.use_8bit and not args.use_torchao:
        raise UserError(
            "--use_cpu_offload_optimizer: works with the 8-bit optimizers of torchao only; add --use_torchao or "
            "leave out --use_8bit"
        )
    if args.offload_gradients and not args.use_cpu_offload_optimizer:
        raise UserError("--offload_gradients: needs the offloaded optimizer; add --use_cpu_offload_optimizer")
    if args.offload_gradients and args.gradient_accumulation_steps > 1:
        raise UserError(
            "--offload_gradients: torchao frees gradients after every backward pass, so they cannot be accumulated; "
            "leave it out or use --gradient_accumulation_steps 1"
        )


def _check_weights_dtype(args: argparse.Namespace) -> None:
    """Weights in bf16, which full fine-tuning alone has, are updated by optimizers that round stochastically: except
    under DeepSpeed, which keeps float32 ones beside them."""
    if args.weights_dtype != "bf16" or uses_deepspeed():
        return
    if args.optimizer not in ("adam", "adamw"):
        raise UserError(
            f"--weights_dtype bf16: {args.optimizer} does not round stochastically, and small updates would be lost; "
            "use --optimizer adamw --use_torchao"
        )
    if not args.use_torchao:
        raise UserError("--weights_dtype bf16: only torchao's optimizers round stochastically; add --use_torchao")
    if args.optimizer == "adam" and not any(getattr(args, flag) for flag in LOW_BITS):
        raise UserError(
            "--weights_dtype bf16: torchao has adam with low-bit states only; use --optimizer adamw or add --use_8bit"
        )
    if args.mixed_precision in ("no", "fp16"):
        raise UserError("--weights_dtype bf16: the networks must compute in bf16 too; use --mixed_precision bf16")
    if args.use_ema:
        raise UserError(
            "--use_ema: an average kept in bf16 would lose what a step adds to it; leave it out or use "
            "--weights_dtype fp32"
        )


def check_optimizer(args: argparse.Namespace, given: set[str]) -> None:
    """No flag of another optimizer is given, and none that this one cannot follow."""
    if "beta3" in given and args.optimizer not in ("prodigy", "came"):
        raise UserError(
            f"--beta3: {args.optimizer} has no third beta; leave it out or use --optimizer prodigy or came"
        )
    for flag in ("prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup"):
        if getattr(args, flag) and args.optimizer != "prodigy":
            raise UserError(f"--{flag}: no effect on {args.optimizer}; leave it out or use --optimizer prodigy")
    if args.optimizer == "schedulefree" and args.use_ema:
        raise UserError("--use_ema: schedulefree averages the weights itself; leave it out or use --optimizer adamw")
    if args.optimizer == "schedulefree" and args.beta1 == 0:
        raise UserError("--beta1: schedulefree divides by it; give more than 0")
    if args.step_in_backward:
        if "max_grad_norm" in given and args.max_grad_norm:
            raise UserError(
                "--max_grad_norm: the norm over all gradients is never known with --step_in_backward; leave one of "
                "them out"
            )
        args.max_grad_norm = 0.0
