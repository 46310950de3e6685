"""The flags on the optimizer and its memory."""

from dataclasses import dataclass

from cli.schema import flag
from cli.types import DecayRate, NonNegativeFloat, PositiveFloat


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
    beta1: DecayRate = flag(0.9, "Decay of the mean of gradients; with muon, also its momentum.", alias="adam_beta1")
    beta2: DecayRate = flag(0.95, "Decay of the mean of squared gradients; 0.999 is more stable.", alias="adam_beta2")
    beta3: DecayRate | None = flag(
        None,
        "prodigy: decay of the step size estimate (default: square root of beta2). came: of the confidence",
        alias="prodigy_beta3",
        shown="0.9999",
    )
    weight_decay: NonNegativeFloat = flag(
        0.0001, "How strongly weights decay towards 0; raise it against overfitting.", alias="adam_weight_decay"
    )
    epsilon: PositiveFloat = flag(1e-08, "Added to an update's denominator, to avoid 0.", alias="adam_epsilon")
    max_grad_norm: NonNegativeFloat = flag(
        1.0, "Clip the norm of the gradients to this; 0 turns clipping off.", shown="1.0; 0 with --step_in_backward"
    )
    prodigy_decouple: bool = flag(False, "prodigy: decouple weight decay from the gradient, as adamw does.")
    prodigy_use_bias_correction: bool = flag(False, "prodigy: correct the running means' bias in the first steps.")
    prodigy_safeguard_warmup: bool = flag(False, "prodigy: estimate the step size without the rate, for warm-up.")
    use_8bit: bool = flag(
        False, "8-bit states of adam or adamw: bitsandbytes', or torchao's with --use_torchao.", alias="use_8bit_adam"
    )
    use_4bit: bool = flag(False, "4-bit states for adam or adamw; needs --use_torchao.")
    use_torchao: bool = flag(False, "torchao's optimizer, for --use_8bit, --use_4bit, --use_fp8 or bf16 weights.")
    use_fp8: bool = flag(
        False, "8-bit float states of adam or adamw; needs --use_torchao and an RTX 40, H100 or newer GPU."
    )
    use_cpu_offload_optimizer: bool = flag(
        False,
        "Keep the states of adam or adamw in CPU memory and update there (torchao; any states but those of "
        "bitsandbytes): slower, for full fine-tuning on one GPU that is otherwise too small.",
    )
    offload_gradients: bool = flag(False, "--use_cpu_offload_optimizer for gradients too, without accumulation.")
    step_in_backward: bool = flag(
        False,
        "Let adam or adamw update each weight, and free its gradient, during the backward pass, so that full "
        "fine-tuning never holds all gradients. No clipping, gradient accumulation or fp16; one process only.",
    )
