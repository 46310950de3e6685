"""The forward pass of linear layers with a LoRA, as one operation of autograd."""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from peft.tuners.lora import Linear
from torch import nn

from models.quantization import FrozenLinear, dequantize, multiply, multiply_back


def use_layers(transformer: nn.Module) -> None:
    """Have linear layers with a LoRA compute with `forward`, and attention with `project`; names and weights stay."""
    for layer in transformer.modules():
        if isinstance(layer, Linear):
            layer.forward = MethodType(forward, layer)
        elif isinstance(layer, Attention):
            layer.project = MethodType(project, layer)


def project(attn: Attention, inputs: torch.Tensor) -> Sequence[torch.Tensor]:
    """Compute queries, keys and values, as one operation if all have a plain LoRA on the same kind of base."""
    layers = attn.to_q, attn.to_k, attn.to_v
    if all(map(_is_plain, layers)) and len({type(layer.base_layer) for layer in layers}) == 1:
        return _compute(layers, inputs)
    return [layer(inputs) for layer in layers]


def forward(layer: Linear, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute a layer; one with DoRA, dropout, several adapters, none or a foreign base is left to peft."""
    if args or kwargs or not _is_plain(layer):
        return type(layer).forward(layer, inputs, *args, **kwargs)
    return _compute([layer], inputs)[0]


def _is_plain(layer: nn.Module) -> bool:
    if not isinstance(layer, Linear):
        return False
    base, active = layer.base_layer, layer.active_adapters
    is_frozen = type(base) in (nn.Linear, FrozenLinear) and not base.weight.requires_grad
    is_single = len(active) == 1 and active[0] in layer.lora_A and not layer.disable_adapters and not layer.merged
    if not (is_frozen and is_single) or active[0] in layer.lora_variant:
        return False
    return not layer.training or isinstance(layer.lora_dropout[active[0]], nn.Identity)


def _compute(layers: Sequence[Linear], inputs: torch.Tensor) -> Sequence[torch.Tensor]:
    """Compute plain layers of the same inputs and the same kind of base."""
    base, kind = layers[0].base_layer, inputs.device.type
    is_quantized = type(base) is FrozenLinear
    is_cast = torch.is_autocast_enabled(kind) and not is_quantized
    dtype = torch.get_autocast_dtype(kind) if is_cast else base.weight.dtype
    tensors, scales = [], []
    for layer in layers:
        (name,) = layer.active_adapters
        tensors += layer.base_layer.weight, layer.base_layer.bias, layer.lora_A[name].weight, layer.lora_B[name].weight
        scales.append(layer.scaling[name])
    return _Multiply.apply(inputs.to(dtype), scales, base.in_fp8 if is_quantized else None, *tensors)


class _Multiply(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T in the dtype of x, for several W, b, s, A, B, with gradients for x, A and B.

    Sums go into the matrix products, that of the gradients for x too; all A are one factor; A and B are cast once, and
    s is folded into B.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        scales: Sequence[float],
        in_fp8: bool | None,
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        """Compute layers of W, b, A and B each; `in_fp8` is None for weights that are not quantized."""
        weights, biases, downs, ups = (tensors[kind::4] for kind in range(4))
        down = torch.cat(downs).to(inputs.dtype)
        ups = [(up if scale == 1 else up * scale).to(inputs.dtype) for up, scale in zip(ups, scales, strict=True)]
        rows = inputs.flatten(0, -2)
        inner = rows @ down.t()
        # The weights are saved for autograd: streamed ones may have moved before a checkpoint computes this again.
        ctx.save_for_backward(rows, down, inner, *weights, *ups)
        ctx.scales, ctx.in_fp8, ctx.ranks = scales, in_fp8, [len(one) for one in downs]
        if in_fp8 is None:
            outputs = map(nn.functional.linear, [rows] * len(weights), weights, biases)
        else:
            outputs = multiply(rows, weights, biases, in_fp8=in_fp8)
        parts = zip(outputs, inner.split(ctx.ranks, dim=1), ups, strict=True)
        return tuple(
            torch.addmm(output, part, up.t(), out=output).unflatten(0, inputs.shape[:-1]) for output, part, up in parts
        )

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, down, inner, *others = ctx.saved_tensors
        weights, ups = others[: len(gradients)], others[len(gradients) :]
        shape, gradients = gradients[0].shape, [gradient.flatten(0, -2) for gradient in gradients]
        of_inner = torch.cat([gradient @ up for gradient, up in zip(gradients, ups, strict=True)], dim=1)
        of_inputs = None
        if ctx.needs_input_grad[0]:
            for gradient, weight in zip(gradients, weights, strict=True):
                of_inputs = _add_product(of_inputs, gradient, weight, ctx.in_fp8)
            of_inputs = torch.addmm(of_inputs, of_inner, down, out=of_inputs).unflatten(0, shape[:-1])
        of_layers = []
        of_downs = (of_inner.t() @ rows).float().split(ctx.ranks)
        parts = zip(gradients, inner.split(ctx.ranks, dim=1), of_downs, ctx.scales, strict=True)
        for gradient, part, of_down, scale in parts:
            of_up = (gradient.t() @ part).float()
            of_layers += None, None, of_down, of_up if scale == 1 else of_up * scale
        return of_inputs, None, None, *of_layers


def _add_product(
    total: torch.Tensor | None, gradient: torch.Tensor, weight: torch.Tensor, in_fp8: bool | None
) -> torch.Tensor:
    """Add g W to the total, in place, or begin it."""
    if in_fp8:
        product = multiply_back(gradient, weight, in_fp8=in_fp8)
        return product if total is None else total.add_(product)
    weight = weight.to(gradient.dtype) if in_fp8 is None else dequantize(weight)
    return gradient @ weight if total is None else torch.addmm(total, gradient, weight, out=total)
