"""The flags on the optimizer and its memory."""

from dataclasses import dataclass

from flags.schema import flag
from flags.types import decay_rate, non_negative_float, positive_float


OPTIMIZERS = ("adam", "adamw", "prodigy", "came", "schedulefree", "muon")
LOW_BITS = ("use_8bit", "use_4bit", "use_fp8")


@dataclass(frozen=True)
class OptimizerFlags:
    """The optimizer, its numbers, and what its states are kept in."""

    optimizer: str = flag(
        "adam",
        "adam or adamw (decoupled weight decay) for most runs; prodigy finds its own step size; came needs less "
        "memory; schedulefree is adamw with an average of the weights in the place of a falling learning rate; "
        "muon orthogonalizes the steps of matrices and takes adamw for the rest.",
        choices=OPTIMIZERS,
    )
    beta1: float = flag(
        0.9,
        "Decay of the running mean of gradients; with muon, the momentum of matrices too.",
        type=decay_rate,
        metavar="X",
        also=("--adam_beta1",),
    )
    beta2: float = flag(
        0.95,
        "Decay of the running mean of squared gradients; raise it towards 0.999 when training is unsteady.",
        type=decay_rate,
        metavar="X",
        also=("--adam_beta2",),
    )
    beta3: float | None = flag(
        None,
        "prodigy: decay of its step size estimate (default: square root of beta2). came: decay of its confidence",
        type=decay_rate,
        metavar="X",
        also=("--prodigy_beta3",),
        shown="0.9999",
    )
    weight_decay: float = flag(
        0.0001,
        "How strongly weights are pulled towards 0; raise it when the result overfits.",
        type=non_negative_float,
        metavar="X",
        also=("--adam_weight_decay",),
    )
    epsilon: float = flag(
        1e-08,
        "Added to the denominator of a step so that it cannot be 0.",
        type=positive_float,
        metavar="X",
        also=("--adam_epsilon",),
    )
    max_grad_norm: float = flag(
        1.0,
        "Gradients whose norm is larger are scaled down to this norm; 0 leaves them as they are.",
        type=non_negative_float,
        metavar="X",
        shown="%(default)s; 0 with --step_in_backward",
    )
    prodigy_decouple: bool = flag(False, "prodigy: decouple weight decay from the gradient, as adamw does.")
    prodigy_use_bias_correction: bool = flag(
        False, "prodigy: correct the bias of the first steps' running means, as adam does."
    )
    prodigy_safeguard_warmup: bool = flag(
        False, "prodigy: keep the learning rate out of the step size estimate; use it with warm-up."
    )
    use_8bit: bool = flag(
        False,
        "Keep the states of adam or adamw in 8 bits, a quarter of the memory: by bitsandbytes, or by torchao "
        "with --use_torchao.",
        also=("--use_8bit_adam",),
    )
    use_4bit: bool = flag(False, "Keep the states of adam or adamw in 4 bits; needs --use_torchao.")
    use_torchao: bool = flag(
        False,
        "Take the optimizer of --use_8bit, --use_4bit, --use_fp8 or --weights_dtype bf16 from torchao; without "
        "it, 8 bits are those of bitsandbytes.",
    )
    use_fp8: bool = flag(
        False,
        "Keep the states of adam or adamw as 8-bit floats; needs --use_torchao and a GPU of compute capability "
        "8.9 or newer (RTX 40, H100).",
    )
    use_cpu_offload_optimizer: bool = flag(
        False,
        "Keep the states of adam or adamw in CPU memory and step there (by torchao, with states of any bits but "
        "bitsandbytes'): slower, for full fine-tuning on one GPU that is too small otherwise.",
    )
    offload_gradients: bool = flag(
        False,
        "With --use_cpu_offload_optimizer, keep gradients on the CPU too; not together with gradient accumulation.",
    )
    step_in_backward: bool = flag(
        False,
        "Let adam or adamw, with states of any bits, update each weight as soon as the backward pass has its "
        "gradient, and free the gradient: full fine-tuning then never holds all gradients at once. Their norm is "
        "not known, so they are not clipped. One process, no gradient accumulation, not fp16.",
    )
