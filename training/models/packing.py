"""Samples of different sizes as one sequence, in which each attends only to its own tokens.

A batch of equal samples shares its matrix products; clips of different sizes would each need a batch of their own.
Packed, they share everything but the attention, which is computed sample by sample: block-diagonal, exact, unmasked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel


Rotary = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the samples of a sequence are: text and video of the first, text and video of the second, and so on."""

    text_length: int  # T, of each sample
    video_lengths: tuple[int, ...]  # V of each sample
    rotary: Rotary | None  # cos and sin of all tokens, [sum of T + V, D / heads]; None if the model has none

    @property
    def lengths(self) -> list[int]:
        """The tokens of each sample."""
        return [self.text_length + video for video in self.video_lengths]

    def split(self, text: torch.Tensor, video: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Split texts `[1, B * T, D]` and videos `[1, sum of V, D]` into pairs `[1, T, D]`, `[1, V, D]`."""
        return list(zip(text.split(self.text_length, 1), video.split(self.video_lengths, 1), strict=True))

    def split_joined(self, joined: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Split a sequence `[1, sum of T + V, D]` into pairs `[1, T, D]` and `[1, V, D]`."""
        parts = joined.split([one for video in self.video_lengths for one in (self.text_length, video)], 1)
        return list(zip(parts[::2], parts[1::2], strict=True))


def packing_of(image_rotary_emb: "Rotary | Packing | None") -> Packing | None:
    """Return the packing that stands for the rotary embedding; None for a batch."""
    return image_rotary_emb if isinstance(image_rotary_emb, Packing) else None


def accept_packed(transformer: CogVideoXTransformer3DModel) -> None:
    """Let the transformer take samples of different sizes: a sequence of `hidden_states`, see `forward`.

    Its attention must be a `DispatchedAttention`, and its blocks those of `models.blocks`.
    """
    transformer.forward = MethodType(_dispatch, transformer)


def _dispatch(transformer: CogVideoXTransformer3DModel, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(hidden_states, torch.Tensor):
        return type(transformer).forward(transformer, hidden_states, *args, **kwargs)
    return forward(transformer, hidden_states, *args, **kwargs)


def forward(
    transformer: CogVideoXTransformer3DModel,
    hidden_states: Sequence[torch.Tensor],
    encoder_hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    image_rotary_emb: Sequence[Rotary | None],
    ofs: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Predict for samples of different sizes what the transformer's own forward pass predicts for each of them.

    Args:
        hidden_states: of each sample, `[1, F, C, H, W]`.
        encoder_hidden_states: their prompts, `[B, T, D]`.
        timestep: `[B]`.
        image_rotary_emb: cos and sin of each sample, or None.
        ofs: `[1]`, of image-to-video models of CogVideoX 1.5.

    Returns:
        The prediction of each sample, `[1, F, C, H, W]`.

    Source: `diffusers.CogVideoXTransformer3DModel.forward`.
    """
    dtype = hidden_states[0].dtype
    temb = transformer.time_embedding(transformer.time_proj(timestep).to(dtype))
    if transformer.ofs_embedding is not None:
        temb = temb + transformer.ofs_embedding(transformer.ofs_proj(ofs).to(dtype))
    text_length = encoder_hidden_states.shape[1]
    embedded = [
        transformer.embedding_dropout(transformer.patch_embed(prompt, sample))
        for prompt, sample in zip(encoder_hidden_states.split(1), hidden_states, strict=True)
    ]
    text = torch.cat([tokens[:, :text_length] for tokens in embedded], dim=1)
    video = torch.cat([tokens[:, text_length:] for tokens in embedded], dim=1)
    video_lengths = tuple(tokens.shape[1] - text_length for tokens in embedded)
    packing = Packing(text_length, video_lengths, _join_rotary(image_rotary_emb, text_length))
    for block in transformer.transformer_blocks:
        if torch.is_grad_enabled() and transformer.gradient_checkpointing:
            video, text = transformer._gradient_checkpointing_func(block, video, text, temb, packing, None)
        else:
            video, text = block(video, text, temb, packing)
    video = transformer.norm_final(video)
    parts = zip(video.split(packing.video_lengths, 1), temb.split(1), strict=True)
    normed = torch.cat([transformer.norm_out(tokens, temb=one) for tokens, one in parts], dim=1)
    outputs = transformer.proj_out(normed).split(packing.video_lengths, 1)
    return [_unpatchify(transformer, *one) for one in zip(outputs, hidden_states, strict=True)]


def _join_rotary(tables: Sequence[Rotary | None], text_length: int) -> Rotary | None:
    """Join cos and sin of the samples' videos, with the text before each, which is not rotated."""
    if tables[0] is None:
        return None
    cos = [part for table, _ in tables for part in (table.new_ones(text_length, table.shape[1]), table)]
    sin = [part for _, table in tables for part in (table.new_zeros(text_length, table.shape[1]), table)]
    return torch.cat(cos), torch.cat(sin)


def _unpatchify(transformer: CogVideoXTransformer3DModel, tokens: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Arrange the predicted patches of a sample, `[1, V, C * patch]`, as `[1, F, C, H, W]`."""
    _, frames, _, height, width = sample.shape
    size, depth = transformer.config.patch_size, transformer.config.patch_size_t
    rows, columns = height // size, width // size
    if depth is None:
        patches = tokens.unflatten(2, (-1, size, size)).unflatten(1, (frames, rows, columns))
        return patches.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
    patches = tokens.unflatten(2, (-1, depth, size, size)).unflatten(1, (-1, rows, columns))
    return patches.permute(0, 1, 5, 4, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(1, 2)
