"""Attention backends of the transformer: torch's choice, one of its kernels, or a package.

diffusers' processor for CogVideoX calls torch directly, so `transformer.set_attention_backend` has no effect on it.
The processor here only replaces that call by diffusers' dispatcher.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb

from common.errors import UserError, first_line
from parallel.context import ContextParallel


BACKENDS = {
    "native": AttentionBackendName.NATIVE,
    "flash": AttentionBackendName._NATIVE_FLASH,
    "cudnn": AttentionBackendName._NATIVE_CUDNN,
    "efficient": AttentionBackendName._NATIVE_EFFICIENT,
    "flash-attn": AttentionBackendName.FLASH,
    "flash-attn-3": AttentionBackendName._FLASH_3,
    "sage": AttentionBackendName.SAGE,
}


class DispatchedAttention:
    """CogVideoX's joint attention of text and video, computed by a backend of diffusers, one of `BACKENDS`.

    Source: `diffusers.models.attention_processor.CogVideoXAttnProcessor2_0`, to which "native" is identical, on a CPU
    bit for bit, gradients included.
    """

    def __init__(self, backend: str, context: ContextParallel | None = None):
        self.backend = BACKENDS[backend]
        self.context = context
        self._rotation: tuple[torch.Tensor, torch.Tensor] | None = None  # the last cos, and its rotation

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the attention's output for the video, `[B, V, D]`, and for the text, `[B, T, D]`.

        Args:
            attn: the layer, with the projections.
            attention_mask: None; CogVideoX has none.
            image_rotary_emb: cos and sin, each `[V, D / heads]`; None if the model has other positions.
        """
        text_length = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        # [B, heads, T + V, D / heads]
        query, key, value = (
            project(tokens).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (self._rotate(states, image_rotary_emb, text_length) for states in (query, key))
        # Autocast computes the norms in float32.
        query, key = query.to(value.dtype), key.to(value.dtype)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        if self.context is not None:
            key, value = self.context.gather_keys(key, value, text_length)
        attended = dispatch_attention_fn(query, key, value, attention_mask, backend=self.backend).flatten(2)
        output = attn.to_out[1](attn.to_out[0](attended))
        return output[:, text_length:], output[:, :text_length]

    def _rotate(
        self, states: torch.Tensor, image_rotary_emb: tuple[torch.Tensor, torch.Tensor], text_length: int
    ) -> torch.Tensor:
        """Rotate pairs of channels of the video's tokens in `[B, heads, T + V, D / heads]`."""
        if states.dtype != torch.float32 or torch.compiler.is_compiling():
            states[:, :, text_length:] = apply_rotary_emb(states[:, :, text_length:], image_rotary_emb)
            return states
        # The same arithmetic in one pass over the memory instead of a dozen. torch.compile fuses the dozen itself, but
        # not complex numbers.
        pairs = torch.view_as_complex(states.unflatten(3, (-1, 2)))
        return torch.view_as_real(pairs * self._rotation_of(image_rotary_emb, text_length)).flatten(3)

    def _rotation_of(self, image_rotary_emb: tuple[torch.Tensor, torch.Tensor], text_length: int) -> torch.Tensor:
        """`[T + V, D / heads / 2]`, complex: cos + i sin for the video, 1 for the text."""
        cos, sin = image_rotary_emb
        if self._rotation is None or self._rotation[0] is not cos or len(self._rotation[1]) != text_length + len(cos):
            rotation = torch.complex(cos[:, ::2], sin[:, ::2])  # neighbours have the same angle
            text = rotation.new_ones(text_length, rotation.shape[1])
            self._rotation = cos, torch.cat([text, rotation])  # shared by all blocks of a step
        return self._rotation[1]


def set_attention(
    transformer: CogVideoXTransformer3DModel, backend: str | None, context: ContextParallel | None = None
) -> None:
    """Set the attention backend of all blocks; None keeps the library's processor, or means native with a context."""
    if backend is not None or context is not None:
        transformer.set_attn_processor(DispatchedAttention(backend or "native", context))


@contextmanager
def temporary_attention(transformer: CogVideoXTransformer3DModel, backend: str | None) -> Iterator[None]:
    """Set the attention backend within the block; None changes nothing."""
    processors = dict(transformer.attn_processors)
    set_attention(transformer, backend)
    try:
        yield
    finally:
        transformer.set_attn_processor(processors)


def check_attention(
    backend: str | None, flag: str, device: torch.device, dtype: torch.dtype, head_dim: int, *, trains: bool
) -> None:
    """Check that a backend runs on a small attention of the transformer's head size; None needs no check.

    Args:
        flag: that names the backend, for messages.
        trains: try the backward pass too.
    """
    if backend is None:
        return
    if backend != "native" and device.type != "cuda":
        raise UserError(f"{flag} {backend}: needs a GPU, and there is none here; use native")
    if backend not in ("native", "efficient") and dtype == torch.float32:
        raise UserError(
            f"{flag} {backend}: computes in half precision only; add --mixed_precision bf16, or use native"
        )
    try:
        _check_attention_backend_requirements(BACKENDS[backend])
        shape = (1, 128, 1, head_dim)
        query, key, value = (torch.ones(shape, device=device, dtype=dtype, requires_grad=trains) for _ in range(3))
        output = dispatch_attention_fn(query, key, value, backend=BACKENDS[backend])
        if trains:
            output.sum().backward()
    except (RuntimeError, ValueError, TypeError) as error:
        reason = first_line(error)
        raise UserError(f"{flag} {backend}: does not run here: {reason}; use another one, or native") from error
