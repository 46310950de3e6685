"""Attention backends of the transformer: torch's choice, one of its kernels, or a package.

diffusers' processor for CogVideoX calls torch directly, so `transformer.set_attention_backend` has no effect on it.
The processor here replaces that call by diffusers' dispatcher, and a dozen passes over queries and keys by one.
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
from models.blocks import layer_norm, use_blocks
from models.packing import Packing, Rotary, accept_packed, packing_of
from parallel.context import ContextParallel


BACKENDS = {
    "native": AttentionBackendName.NATIVE,
    "flash": AttentionBackendName._NATIVE_FLASH,
    "cudnn": AttentionBackendName._NATIVE_CUDNN,
    "efficient": AttentionBackendName._NATIVE_EFFICIENT,
    "flash-attn": AttentionBackendName.FLASH,
    "flash-attn-3": AttentionBackendName._NATIVE_FLASH,
    "flash-attn-4": AttentionBackendName._NATIVE_FLASH,
    "sage": AttentionBackendName.SAGE,
}
# Packages that torch's flash attention can call, with a gradient: diffusers' own call of FlashAttention 3 has none.
_IMPLEMENTATIONS = {"flash-attn-3": "FA3", "flash-attn-4": "FA4"}
_PACKAGES = {"FA3": "flash_attn_interface (FlashAttention 3, built from source)", "FA4": "flash-attn-4"}


class DispatchedAttention:
    """CogVideoX's joint attention of text and video, computed by a backend of diffusers, one of `BACKENDS`.

    Source: `diffusers.models.attention_processor.CogVideoXAttnProcessor2_0`, to which "native" is identical without
    autocast, on a CPU bit for bit, gradients of all but its norms included. With autocast the norms return the compute
    dtype, as they do in sampling.
    """

    def __init__(self, backend: str, context: ContextParallel | None = None):
        self.backend = BACKENDS[backend]
        self.context = context
        self._rotation: tuple[torch.Tensor, torch.Tensor] | None = None  # the last cos, and its rotation

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | Packing | None = None,
        text_length: int = 0,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the attention's output for the video, `[B, V, D]`, and for the text, `[B, T, D]`; or both joined.

        Args:
            attn: the layer, with the projections.
            hidden_states: of the video, or of text and video joined, `[B, T + V, D]`.
            encoder_hidden_states: of the text; None if joined.
            attention_mask: None; CogVideoX has none.
            image_rotary_emb: cos and sin, each `[V, D / heads]`; None if the model has other positions; a
                `Packing` for packed samples, of which each attends to its own tokens.
            text_length: T, of joined states.
        """
        tokens = hidden_states
        if encoder_hidden_states is not None:
            text_length = encoder_hidden_states.shape[1]
            tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        if hasattr(attn, "project"):  # all three at once
            projections = attn.project(tokens)
        else:
            projections = [layer(tokens) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        # [B, T + V, heads, D / heads]
        query, key, value = (states.unflatten(2, (attn.heads, -1)) for states in projections)
        query, key = (
            layer_norm(states, norm.weight, norm.bias, norm.eps)
            for states, norm in ((query, attn.norm_q), (key, attn.norm_k))
        )
        packing = packing_of(image_rotary_emb)
        if packing is not None:
            image_rotary_emb, text_length = packing.rotary, 0
        if image_rotary_emb is not None:
            query, key = (self._rotate(states, image_rotary_emb, text_length) for states in (query, key))
        if self.context is not None:
            key, value = self.context.gather_keys(key, value, text_length)
        samples = [(query, key, value)]
        if packing is not None:
            samples = zip(*(states.split(packing.lengths, 1) for states in (query, key, value)), strict=True)
        attended = [dispatch_attention_fn(*sample, attention_mask, backend=self.backend) for sample in samples]
        joined = attended[0] if packing is None else torch.cat(attended, dim=1)
        output = attn.to_out[1](attn.to_out[0](joined.flatten(2)))
        return output if encoder_hidden_states is None else (output[:, text_length:], output[:, :text_length])

    def _rotate(
        self, states: torch.Tensor, image_rotary_emb: tuple[torch.Tensor, torch.Tensor], text_length: int
    ) -> torch.Tensor:
        """Rotate pairs of channels of the video's tokens in `[B, T + V, heads, D / heads]`, in float32."""
        if torch.compiler.is_compiling():  # fuses everything itself, but not complex numbers
            text, video = states[:, :text_length], states[:, text_length:]
            return torch.cat([text, apply_rotary_emb(video, image_rotary_emb, sequence_dim=1)], dim=1)
        # The same arithmetic in one pass over the memory instead of a dozen.
        rotation = self._rotation_of(image_rotary_emb, text_length)[:, None]
        rotated = torch.view_as_complex(states.float().unflatten(3, (-1, 2))) * rotation
        return torch.view_as_real(rotated).flatten(3).to(states.dtype)

    def _rotation_of(self, image_rotary_emb: tuple[torch.Tensor, torch.Tensor], text_length: int) -> torch.Tensor:
        """`[T + V, D / heads / 2]`, complex: cos + i sin for the video, 1 for the text."""
        cos, sin = image_rotary_emb
        if self._rotation is None or self._rotation[0] is not cos or len(self._rotation[1]) != text_length + len(cos):
            rotation = torch.complex(cos[:, ::2], sin[:, ::2])  # neighbours have the same angle
            text = rotation.new_ones(text_length, rotation.shape[1])
            self._rotation = cos, torch.cat([text, rotation])  # shared by all blocks of a step
        return self._rotation[1]


def set_attention(
    transformer: CogVideoXTransformer3DModel, backend: str | None = None, context: ContextParallel | None = None
) -> None:
    """Have the transformer compute its blocks as `models.blocks` does, with an attention backend; native for None."""
    transformer.set_attn_processor(DispatchedAttention(backend or "native", context))
    use_blocks(transformer)
    accept_packed(transformer)
    use_implementation(_IMPLEMENTATIONS.get(backend))


@contextmanager
def temporary_attention(transformer: CogVideoXTransformer3DModel, backend: str | None) -> Iterator[None]:
    """Set the attention backend within the block; None changes nothing."""
    if backend is None:
        yield
        return
    processors = dict(transformer.attn_processors)
    with _implementation_of(backend):
        transformer.set_attn_processor(DispatchedAttention(backend))
        try:
            yield
        finally:
            transformer.set_attn_processor(processors)


@contextmanager
def _implementation_of(backend: str) -> Iterator[None]:
    """Let torch's flash attention be that of the backend within the block."""
    before = _implementation()
    try:
        use_implementation(_IMPLEMENTATIONS.get(backend))
        yield
    finally:
        use_implementation(before)


def _implementation() -> str | None:
    """Return the package that computes torch's flash attention; None for torch itself."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)  # from torch 2.11 on
    return current() if current else None


def use_implementation(name: str | None) -> None:
    """Have torch's flash attention call a package, one of `_PACKAGES`, or for None torch's own kernels again."""
    if name == _implementation():
        return
    if name is None:
        torch.nn.attention.restore_flash_attention_impl()
        return
    try:
        torch.nn.attention.activate_flash_attention_impl(name)
    except AttributeError as error:
        raise RuntimeError(f"torch {torch.__version__} cannot call it with a gradient") from error
    except ImportError as error:
        raise RuntimeError(f"the package {_PACKAGES[name]} is missing or does not load: {error}") from error


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
        with _implementation_of(backend):
            query, key, value = (torch.ones(shape, device=device, dtype=dtype, requires_grad=trains) for _ in range(3))
            output = dispatch_attention_fn(query, key, value, backend=BACKENDS[backend])
            if trains:
                output.sum().backward()
    except (RuntimeError, ValueError, TypeError) as error:
        reason = first_line(error)
        raise UserError(f"{flag} {backend}: does not run here: {reason}; use another one, or native") from error
