"""The forward pass of CogVideoX's transformer block with about a quarter of the library's memory traffic.

The mathematics and the modules are those of `diffusers.models.transformers.cogvideox_transformer_3d.CogVideoXBlock`.
Differences: norms take and return the compute dtype and are float32 inside, as in sampling, where autocast makes them
float32 outside too; a norm and its modulation are one operation; text and video are joined once for each part.
"""

from types import MethodType
from typing import Any

import torch
from diffusers.models.normalization import CogVideoXLayerNormZero
from torch import nn

from models.packing import Packing, Rotary, packing_of


Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def use_blocks(transformer: nn.Module) -> None:
    """Have the transformer compute its blocks with `forward`; their attention must be a `DispatchedAttention`."""
    for block in transformer.transformer_blocks:
        block.forward = MethodType(forward, block)


def uses_blocks(transformer: nn.Module) -> bool:
    """Return whether the transformer computes its blocks with `forward`."""
    return all(getattr(block.forward, "__func__", None) is forward for block in transformer.transformer_blocks)


def forward(
    block: nn.Module,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: Rotary | Packing | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a block: `[B, V, D]` of the video and `[B, T, D]` of the text.

    Packed samples are a batch of one, `temb` has their embeddings, and a `Packing` stands for the rotary embedding.
    """
    inputs = hidden_states, encoder_hidden_states, temb, image_rotary_emb
    video, text, joined, gates = before_feed_forward(block, *inputs)
    return add_gated(video, text, block.ff(joined), gates, packing_of(image_rotary_emb))


def before_feed_forward(
    block: nn.Module,
    video: torch.Tensor,
    text: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: Rotary | Packing | None = None,
) -> Part:
    """Compute a block up to its feed-forward.

    Returns:
        video and text after the attention; both normed and joined, `[B, T + V, D]`; the gates of the feed-forward's
        output, `[B, 2, D]`.
    """
    packing = packing_of(image_rotary_emb)
    joined, gates = modulated_norm(block.norm1, video, text, temb, packing)
    joined = block.attn1(joined, image_rotary_emb=image_rotary_emb, text_length=text.shape[1])
    video, text = add_gated(video, text, joined, gates, packing)
    return video, text, *modulated_norm(block.norm2, video, text, temb, packing)


def first_part(block: nn.Module, *inputs: Any) -> Part:
    """Compute a block up to the last linear layer of its feed-forward; return that layer's input as the third."""
    video, text, joined, gates = before_feed_forward(block, *inputs)
    for layer in block.ff.net[:-2]:
        joined = layer(joined)
    return video, text, joined, gates


def last_part(
    block: nn.Module, part: Part, image_rotary_emb: Rotary | Packing | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the rest of a block from what `first_part` returns."""
    video, text, joined, gates = part
    for layer in block.ff.net[-2:]:  # linear, dropout
        joined = layer(joined)
    return add_gated(video, text, joined, gates, packing_of(image_rotary_emb))


def modulated_norm(
    norm: CogVideoXLayerNormZero,
    video: torch.Tensor,
    text: torch.Tensor,
    temb: torch.Tensor,
    packing: Packing | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm and modulate both; return them joined, `[B, T + V, D]`, and the gates of video and text, `[B, 2, D]`.

    (norm(x) w + b) (1 + scale) + shift is a norm with the weight w (1 + scale) and the bias b (1 + scale) + shift.
    """
    modulation = norm.linear(norm.silu(temb)).unflatten(1, (2, 3, -1))  # [B, video and text, 3, D]
    shift, scale, gates = modulation.unbind(2)
    scale = 1 + scale.float()
    weights, biases = norm.norm.weight * scale, norm.norm.bias * scale + shift
    batch = len(video)
    if packing is not None:
        samples = packing.split(text, video)
    else:
        samples = zip(*([states] if batch == 1 else states.split(1) for states in (text, video)), strict=True)
    parts = [
        layer_norm(states, weights[number, kind], biases[number, kind], norm.norm.eps)
        for number, both in enumerate(samples)
        for kind, states in zip((1, 0), both, strict=True)
    ]
    return torch.cat(parts, dim=1).view(batch, -1, video.shape[-1]), gates


def layer_norm(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm the last dimension in the states' dtype, with float32 inside; autocast would return float32."""
    weight, bias = weight.to(states.dtype), bias.to(states.dtype)
    with torch.autocast(states.device.type, enabled=False):
        return nn.functional.layer_norm(states, weight.shape, weight, bias, eps)


def add_gated(
    video: torch.Tensor,
    text: torch.Tensor,
    joined: torch.Tensor,
    gates: torch.Tensor,
    packing: Packing | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the gated output of a part to its inputs, `[B, V, D]` and `[B, T, D]`."""
    if packing is not None:
        inputs, outputs = packing.split(text, video), packing.split_joined(joined)
        samples = [
            add_gated(own_video, own_text, torch.cat(output, dim=1), gate)
            for (own_text, own_video), output, gate in zip(inputs, outputs, gates.split(1), strict=True)
        ]
        videos, texts = zip(*samples, strict=True)
        return torch.cat(videos, dim=1), torch.cat(texts, dim=1)
    of_text, of_video = joined.split([text.shape[1], video.shape[1]], dim=1)
    return torch.addcmul(video, gates[:, :1], of_video), torch.addcmul(text, gates[:, 1:], of_text)
