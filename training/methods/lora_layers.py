"""The forward pass of a linear layer with a LoRA, as one operation of autograd."""

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn

from models.quantization import FrozenLinear, multiply, multiply_back


def use_layers(transformer: nn.Module) -> None:
    """Have all linear layers with a LoRA compute with `forward`; names and weights stay."""
    for layer in transformer.modules():
        if isinstance(layer, Linear):
            layer.forward = MethodType(forward, layer)


def forward(layer: Linear, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute a layer; one with DoRA, dropout, several adapters, none or a foreign base is left to peft."""
    base, active = layer.get_base_layer(), layer.active_adapters
    is_plain = type(base) in (nn.Linear, FrozenLinear) and not base.weight.requires_grad
    is_single = len(active) == 1 and active[0] in layer.lora_A and not layer.disable_adapters and not layer.merged
    if not (is_plain and is_single) or active[0] in layer.lora_variant or args or kwargs:
        return type(layer).forward(layer, inputs, *args, **kwargs)
    name = active[0]
    if layer.training and not isinstance(layer.lora_dropout[name], nn.Identity):
        return type(layer).forward(layer, inputs)
    kind, is_quantized = inputs.device.type, type(base) is FrozenLinear
    is_cast = torch.is_autocast_enabled(kind) and not is_quantized
    dtype = torch.get_autocast_dtype(kind) if is_cast else base.weight.dtype
    factors = layer.lora_A[name].weight, layer.lora_B[name].weight
    in_fp8 = base.in_fp8 if is_quantized else None
    return _Multiply.apply(inputs.to(dtype), base.weight, base.bias, *factors, layer.scaling[name], in_fp8)


class _Multiply(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T in the dtype of x, with gradients for x, A and B.

    Sums go into the matrix products, A and B are cast once, and s is folded into B.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
        in_fp8: bool | None,
    ) -> torch.Tensor:
        """Compute the layer; `in_fp8` is None for a weight that is not quantized."""
        down, up = down.to(inputs.dtype), (up if scale == 1 else up * scale).to(inputs.dtype)
        rows = inputs.flatten(0, -2)
        inner = rows @ down.t()
        # The weight is saved for autograd: streamed ones may have moved before a checkpoint computes this again.
        ctx.save_for_backward(rows, weight, down, up, inner)
        ctx.scale, ctx.in_fp8 = scale, in_fp8
        if in_fp8 is None:
            output = nn.functional.linear(rows, weight, bias)
        else:
            output = multiply(rows, weight, bias, in_fp8=in_fp8)
        return torch.addmm(output, inner, up.t(), out=output).unflatten(0, inputs.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, down, up, inner = ctx.saved_tensors
        shape, gradient = gradient.shape, gradient.flatten(0, -2)
        of_inner = gradient @ up
        of_inputs = None
        if ctx.needs_input_grad[0]:
            if ctx.in_fp8 is None:
                of_inputs = gradient @ weight.to(gradient.dtype)
            else:
                of_inputs = multiply_back(gradient, weight, in_fp8=ctx.in_fp8)
            of_inputs = torch.addmm(of_inputs, of_inner, down, out=of_inputs).unflatten(0, shape[:-1])
        of_down, of_up = (of_inner.t() @ rows).float(), (gradient.t() @ inner).float()
        return of_inputs, None, None, of_down, of_up if ctx.scale == 1 else of_up * ctx.scale, None, None
