"""The flags on the memory of weights and activations."""

from dataclasses import dataclass
from typing import Any

from flags.schema import flag
from flags.types import positive_float, positive_int


CHECKPOINT_SCOPES = ("block", "segment", "feed-forward")
QUANTIZATIONS = ("none", "int8", "fp8", "nf4")


def text_encoder_flag() -> Any:
    """Declare --text_encoder_8bit, which all scripts that embed captions or prompts have."""
    return flag(
        False,
        "Embed captions and prompts with the text encoder's weights in 8 bits (torchao, on any device): 5 GB of "
        "memory instead of 10; the embeddings differ by about 1%.",
    )


@dataclass(frozen=True)
class MemoryFlags:
    """Memory of weights and activations."""

    gradient_checkpointing: bool = flag(
        False,
        "Compute activations again in the backward pass instead of keeping them: much less memory, slower steps. "
        "Needed for full-size clips on most cards.",
    )
    checkpoint_scope: str = flag(
        "block",
        "With --gradient_checkpointing, what is computed again as one piece: block by block, segment (several "
        "blocks: fewer inputs are kept, more is computed again at once), or feed-forward (that part of each "
        "block alone: faster, more memory).",
        choices=CHECKPOINT_SCOPES,
    )
    checkpoint_every: int | None = flag(
        None,
        "With --gradient_checkpointing, checkpoint every N-th block only, which is faster and takes more memory; "
        "with --checkpoint_scope segment, blocks in a segment.",
        type=positive_int,
        metavar="N",
        shown="1; 2 in a segment",
    )
    offload_checkpoints: bool = flag(
        False,
        "With --gradient_checkpointing, keep what is kept (the inputs of the blocks) in pinned host memory; "
        "copies run beside the computation.",
    )
    quantize_base: str = flag(
        "none",
        "Store the frozen base model's linear layers in 8 bits (int8, fp8: by torchao) or 4 (nf4: by "
        "bitsandbytes, needs a GPU). The LoRA is written as ever and loads on the unquantized model.",
        choices=QUANTIZATIONS,
    )
    stream_blocks: bool = flag(
        False,
        "Keep the frozen blocks in pinned host memory and copy each to the GPU just before it is used: two "
        "blocks are there at a time. For the smallest cards; needs --gradient_checkpointing.",
    )
    weights_dtype: str = flag(
        "fp32",
        "What the trained weights are kept in. bf16 halves weights and gradients; updates are then rounded "
        "stochastically, by torchao's optimizers: it needs --use_torchao. Under DeepSpeed it halves the weights "
        "on each GPU; float32 ones, divided among the GPUs, are updated.",
        choices=("fp32", "bf16"),
    )
    text_encoder_8bit: bool = text_encoder_flag()
    auto_fit: bool = flag(
        False,
        "When the first steps run out of GPU memory, start them again with the next stronger savings of memory, "
        "and say which. One process only.",
    )
    memory_budget_gb: float | None = flag(
        None,
        "Choose the fastest of the settings of memory that fits into so much GPU memory, and say which.",
        type=positive_float,
        metavar="GB",
        shown="what the flags say",
    )
