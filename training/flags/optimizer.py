"""The flags on the optimizer and its memory."""

from dataclasses import dataclass

from flags.schema import flag
from flags.types import DecayRate, NonNegativeFloat, PositiveFloat


OPTIMIZERS = ("adam", "adamw", "prodigy", "came", "schedulefree", "muon")
LOW_BITS = ("use_8bit", "use_4bit", "use_fp8")


@dataclass(frozen=True)
class OptimizerFlags:
    """The optimizer, its hyperparameters, and the precision of its states."""

    optimizer: str = flag(
        "adam",
        "adam or adamw (decoupled weight decay) for most runs; prodigy finds its own step size; came needs less "
        "memory; schedulefree averages the weights of adamw instead of decaying the learning rate; muon "
        "orthogonalizes the updates of matrices and uses adamw for the rest.",
        choices=OPTIMIZERS,
    )
    beta1: DecayRate = flag(
        0.9, "Decay of the running mean of gradients; with muon, also the momentum of matrices.", alias="adam_beta1"
    )
    beta2: DecayRate = flag(
        0.95, "Decay of the running mean of squared gradients; raise it (0.999) for stability.", alias="adam_beta2"
    )
    beta3: DecayRate | None = flag(
        None,
        "prodigy: decay of the step size estimate (default: square root of beta2). came: of the confidence",
        alias="prodigy_beta3",
        shown="0.9999",
    )
    weight_decay: NonNegativeFloat = flag(
        0.0001, "How strongly weights decay towards 0; raise it against overfitting.", alias="adam_weight_decay"
    )
    epsilon: PositiveFloat = flag(
        1e-08, "Added to the denominator of an update, so that it is never 0.", alias="adam_epsilon"
    )
    max_grad_norm: NonNegativeFloat = flag(
        1.0, "Clip the norm of the gradients to this; 0 turns clipping off.", shown="1.0; 0 with --step_in_backward"
    )
    prodigy_decouple: bool = flag(False, "prodigy: decouple weight decay from the gradient, as adamw does.")
    prodigy_use_bias_correction: bool = flag(
        False, "prodigy: correct the bias of the running means in the first steps, as adam does."
    )
    prodigy_safeguard_warmup: bool = flag(
        False, "prodigy: leave the learning rate out of the step size estimate; use it with warm-up."
    )
    use_8bit: bool = flag(
        False,
        "8-bit states for adam or adamw, a quarter of the memory: from bitsandbytes, or torchao with --use_torchao.",
        alias="use_8bit_adam",
    )
    use_4bit: bool = flag(False, "4-bit states for adam or adamw; needs --use_torchao.")
    use_torchao: bool = flag(
        False, "Use torchao's optimizer with --use_8bit, --use_4bit, --use_fp8 or --weights_dtype bf16."
    )
    use_fp8: bool = flag(
        False,
        "8-bit floating-point states for adam or adamw; needs --use_torchao and a GPU of compute capability 8.9 or "
        "newer (RTX 40, H100).",
    )
    use_cpu_offload_optimizer: bool = flag(
        False,
        "Keep the states of adam or adamw in CPU memory and update there (torchao; any states but those of "
        "bitsandbytes): slower, for full fine-tuning on one GPU that is otherwise too small.",
    )
    offload_gradients: bool = flag(
        False, "With --use_cpu_offload_optimizer, keep gradients on the CPU too; not with gradient accumulation."
    )
    step_in_backward: bool = flag(
        False,
        "Let adam or adamw update each weight, and free its gradient, during the backward pass, so that full "
        "fine-tuning never holds all gradients. No clipping, gradient accumulation or fp16; one process only.",
    )
