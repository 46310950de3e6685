"""Count the floating-point operations of a training step from the transformer's config; list the cards' peak."""

import re
from collections.abc import Mapping
from typing import Any


# Dense bfloat16 products with float32 sums, TFLOP/s, by the driver's name of the card.
_PEAK_TFLOPS = {
    r"A100\b": 312.0,
    r"A10$": 125.0,
    r"A40$": 149.7,
    r"RTX A6000$": 154.8,
    r"H100 (80GB HBM3|SXM)": 989.4,
    r"H100 PCIe$": 756.0,
    r"H100 NVL$": 835.0,
    r"H200$": 989.4,
    r"H200 NVL$": 835.0,
    r"L4$": 121.0,
    r"L40$": 181.0,
    r"L40S$": 362.0,
    r"RTX 6000 Ada": 364.2,
    r"RTX 3090$": 71.0,
    r"RTX 4080$": 97.5,
    r"RTX 4090$": 165.2,
    r"RTX 5090$": 209.5,
}


def peak_tflops(device_name: str) -> float | None:
    """Return a card's peak TFLOP/s of dense bfloat16 products; None for an unknown card.

    Args:
        device_name: from `torch.cuda.get_device_name`. "RTX 4090 Laptop GPU" is another card than "RTX 4090".

    Source: NVIDIA's data sheets of these cards without the factor two of sparsity; for GeForce cards the architecture
    white papers, half precision with float32 sums (GeForce halves that rate).
    """
    return next((peak for name, peak in _PEAK_TFLOPS.items() if re.search(rf"\b{name}", device_name)), None)


def count_flops(
    config: Mapping[str, Any],
    num_tokens: int,
    *,
    trains_all: bool,
    checkpoint_scope: str | None = None,
    checkpoint_every: int = 1,
    recomputes_last: bool = True,
) -> float:
    """Count the operations of a training step in the matrix products of the blocks, for one sample.

    A multiplication and an addition are two operations. With N tokens of width d in L blocks, a linear layer from a to
    b channels takes 2 N a b. A block has four of d to d in its attention and two between d and 4 d in its feed-forward
    part: 8 N d^2 + 16 N d^2. Its scores and their weighted sums take 2 N^2 d each. So the forward pass takes
    L (24 N d^2 + 4 N^2 d).

    The backward pass of attention has two products for each of the forward pass and computes the scores again: 2.5
    times the forward pass. The backward pass of a linear layer takes as much as its forward pass for the gradient of
    its input and, if the layer is trained, the same for the gradient of its weights.

    Not counted: adapters (less than 1% at rank 64), the modulation of the norms (one vector a sample), the layers
    before and after the blocks (0.1%), everything but matrix products, and the VAE if clips are not prepared.

    Args:
        config: the transformer's.
        num_tokens: N, of one sample.
        trains_all: the weights of the linear layers are trained, not adapters.
        checkpoint_scope: what the backward pass computes again: "block", "all-but-attention", "segment" (every block),
            or "feed-forward", whose second layer it does not need; None for nothing.
        checkpoint_every: one of so many blocks is checkpointed, if not every block, then without its attention; for
            "segment", the number of its blocks; for "all-but-attention", the attention of one of so many blocks is not
            computed again.
        recomputes_last: checkpoints of blocks contain the second layer of the feed-forward.

    Source: https://arxiv.org/abs/2205.14135 and 2307.08691 for attention that stores no scores.
    """
    layers = config["num_layers"]
    feed_forward, linear, attention = _forward_of_a_block(config, num_tokens)
    chosen = -(-layers // checkpoint_every)
    block = linear + attention - (0 if recomputes_last else feed_forward / 2)
    again = {
        None: 0,
        "block": chosen * (block - (attention if checkpoint_every > 1 else 0)),
        "all-but-attention": layers * block - chosen * attention,
        "segment": layers * (linear + attention),
        "feed-forward": chosen * feed_forward / 2,
    }[checkpoint_scope]
    backward = 2.5 * attention + linear * (2 if trains_all else 1)
    return layers * (linear + attention + backward) + again


def count_forward_flops(config: Mapping[str, Any], num_tokens: int) -> float:
    """Count the operations of a forward pass, as in sampling, for one sample; see `count_flops`."""
    _, linear, attention = _forward_of_a_block(config, num_tokens)
    return config["num_layers"] * (linear + attention)


def _forward_of_a_block(config: Mapping[str, Any], num_tokens: int) -> tuple[float, float, float]:
    """Return the operations of the feed-forward part, of all linear layers, and of attention."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    feed_forward = 16 * num_tokens * width**2
    return feed_forward, feed_forward + 8 * num_tokens * width**2, 4 * num_tokens**2 * width
