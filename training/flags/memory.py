"""The flags on the memory of weights and activations."""

from dataclasses import dataclass
from typing import Any

from cli.schema import flag
from cli.types import PositiveFloat, PositiveInt


CHECKPOINT_SCOPES = ("block", "all-but-attention", "segment", "feed-forward")
QUANTIZATIONS = ("none", "int8", "fp8", "nf4")


def text_encoder_flag() -> Any:
    """Declare --text_encoder_8bit, which all scripts that embed captions or prompts have."""
    return flag(
        False, "Run the text encoder in 8 bits (torchao, any device): 5 GB instead of 10; embeddings differ by ~1%."
    )


@dataclass(frozen=True)
class MemoryFlags:
    """Memory of weights and activations."""

    gradient_checkpointing: bool = flag(
        False,
        "Recompute activations in the backward pass instead of storing them: much less memory, slower steps. Without "
        "a flag on checkpoints, a run on a GPU uses the fastest memory settings that fit into its free memory.",
        shown="what fits; off on a CPU",
    )
    checkpoint_scope: str = flag(
        "block",
        "Unit that --gradient_checkpointing recomputes: a block; a block without its attention (faster; at full size "
        "0.1 GB a block); a segment of several blocks (stores fewer inputs); or only each block's feed-forward "
        "(faster still, more memory).",
        choices=CHECKPOINT_SCOPES,
    )
    checkpoint_every: PositiveInt | None = flag(
        None,
        "With --gradient_checkpointing, checkpoint only every N-th block, except its attention: faster, more memory. "
        "With --checkpoint_scope segment, blocks per segment; with all-but-attention, store the attention of every "
        "N-th block.",
        shown="1; 2 in a segment",
    )
    offload_checkpoints: bool = flag(False, "Keep inputs of --gradient_checkpointing in pinned CPU memory.")
    quantize_base: str = flag(
        "none",
        "Store the frozen base model's linear layers in 8 bits (int8, fp8: torchao) or 4 (nf4: bitsandbytes). fp8 is "
        "faster on GPUs that multiply it. The LoRA is saved as usual and loads on the unquantized model.",
        choices=QUANTIZATIONS,
    )
    stream_blocks: bool = flag(
        False,
        "Keep frozen blocks in pinned CPU memory and copy each to the GPU just before use, two at a time. For the "
        "smallest cards; needs --gradient_checkpointing.",
    )
    weights_dtype: str = flag(
        "fp32",
        "Precision of the trained weights. bf16 halves weights and gradients; torchao then rounds updates "
        "stochastically (needs --use_torchao). Under DeepSpeed it halves the weights on each GPU, and sharded float32 "
        "weights are updated.",
        choices=("fp32", "bf16"),
    )
    text_encoder_8bit: bool = text_encoder_flag()
    auto_fit: bool = flag(
        False, "If the first steps run out of GPU memory, restart with stronger savings, and log which. One process."
    )
    memory_budget_gb: PositiveFloat | None = flag(
        None, "Choose the fastest memory settings that fit in this much GPU memory, and log them.", metavar="GB"
    )
