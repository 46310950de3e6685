"""Frozen weights in 8 or 4 bits: which layers, by which library, and how they compute.

torchao stores each row of a weight in int8 or fp8, with one float32 scale. bitsandbytes stores blocks of 64 weights in
4 bits each, by a table for normally distributed weights (NF4), with one 8-bit scale. Both reduce the precision of only
the base model: adapters are trained and saved as on the model in full precision.

int8 and nf4 save memory: a weight is dequantized for each product. fp8 also saves time on GPUs that multiply it: there
the inputs, and in the backward pass the gradients, are rounded to fp8 too, with one scale for each token.

Source: torchao https://arxiv.org/abs/2507.16099, NF4 and LoRA on it https://arxiv.org/abs/2305.14314, fp8 in training
https://arxiv.org/abs/2209.05433.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, CogVideoXTransformer3DModel, TorchAoConfig
from diffusers.utils import is_bitsandbytes_available, is_torchao_available
from transformers import TorchAoConfig as TextTorchAoConfig

from common.errors import UserError


# Layers outside the blocks are small, and all activations pass through them.
_UNQUANTIZED = ["patch_embed", "time_embedding", "ofs_embedding", "norm_out", "proj_out"]
# In the blocks, these turn the timestep into shifts, scales and gates for all tokens, so that their errors do not
# average out: in nf4, they would cause half of the model's error.
MODULATION = frozenset(["norm1", "norm2"])

_Scaled = tuple[torch.Tensor, torch.Tensor]  # a matrix in fp8, and the factors of its rows or columns


def check_quantization(quantization: str) -> None:
    """Check that this machine has the packages for "none", "int8", "fp8" or "nf4"."""
    if quantization != "none":
        _check_torchao(f"--quantize_base {quantization}")
    if quantization == "nf4" and not is_bitsandbytes_available():
        raise UserError("--quantize_base nf4: bitsandbytes is missing; install it with pip install bitsandbytes")


def _check_torchao(flag: str) -> None:
    if not is_torchao_available():
        raise UserError(f"{flag}: torchao is missing; install it with pip install torchao")


def quantize_transformer(
    quantization: str, dtype: torch.dtype, device: torch.device
) -> TorchAoConfig | BitsAndBytesConfig | None:
    """Return the config for `from_pretrained` to quantize the blocks' linear layers, if any; checks the packages.

    Args:
        quantization: "none", "int8", "fp8" or "nf4"; to be completed by `quantize_remaining`.
        dtype: that the layers compute in.
        device: to load to.
    """
    check_quantization(quantization)
    if quantization == "none" or (quantization == "nf4" and device.type == "cpu"):  # which diffusers refuses
        return None
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=[*_UNQUANTIZED, *sorted(MODULATION)],  # despite its name, also for 4 bits
        )
    return TorchAoConfig(_weight_only(quantization), modules_to_not_convert=_UNQUANTIZED)


def quantize_remaining(transformer: CogVideoXTransformer3DModel, quantization: str, dtype: torch.dtype) -> None:
    """Quantize the linear layers of an nf4 model's blocks that `from_pretrained` did not: modulation, to int8; on a
    CPU, all.

    Args:
        dtype: that the layers compute in.
    """
    if quantization != "nf4":
        return
    from torchao.quantization import quantize_

    transformer.is_loaded_in_4bit = True  # as diffusers sets it for peft
    blocks = transformer.transformer_blocks
    for name, layer in list(blocks.named_modules()):
        if type(layer) is torch.nn.Linear and not any(f".{norm}." in name for norm in MODULATION):
            blocks.set_submodule(name, _in_nf4(layer, dtype))
    quantize_(blocks, _weight_only("int8"), lambda layer, _: type(layer) is torch.nn.Linear)


def _in_nf4(layer: torch.nn.Linear, dtype: torch.dtype) -> torch.nn.Linear:
    from bitsandbytes.nn import Linear4bit, Params4bit

    has_bias = layer.bias is not None
    quantized = Linear4bit(layer.in_features, layer.out_features, has_bias, dtype, quant_type="nf4", device="meta")
    quantized.weight = Params4bit(layer.weight.data, quant_type="nf4", module=quantized)
    quantized.bias = layer.bias
    return quantized.to(layer.weight.device)  # quantizes


def quantize_text_encoder() -> TextTorchAoConfig:
    """Return the config for `from_pretrained` to quantize the text encoder's linear layers to int8.

    torchao quantizes only the weights, on every device; bitsandbytes needs a GPU and would also round the activations,
    some of which are very large in T5. Raises a UserError if torchao is missing.
    """
    _check_torchao("--text_encoder_8bit")
    return TextTorchAoConfig(_weight_only("int8"))


def _weight_only(quantization: str) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    config = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[quantization]
    return config(set_inductor_config=False)  # True changes process-wide settings, TF32 among them


def compute_frozen(model: torch.nn.Module, *, in_fp8: bool | None = None) -> None:
    """Make the quantized linear layers of a frozen model compute in the weights' dtype, and save only the quantized
    weights for the backward pass; in place.

    Args:
        in_fp8: multiply in fp8 instead, in half-precision models, the layers in fp8 that see tokens; None for whether
            this machine's GPU can.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and type(layer.weight).__module__.startswith("torchao."):
            layer.__class__ = FrozenLinear
            is_fp8 = getattr(layer.weight, "qdata", layer.weight).dtype == torch.float8_e4m3fn
            if is_fp8:  # torchao divides rows of zeros by zero
                layer.weight.qdata.view(torch.uint8).masked_fill_(layer.weight.scale == 0, 0)
            layer.in_fp8 = (
                is_fp8
                and layer.weight.dtype != torch.float32
                and all(size % 16 == 0 for size in layer.weight.shape)
                and not any(f".{norm}." in name for norm in MODULATION)
                and (has_fp8_products() if in_fp8 is None else in_fp8)
            )
        elif hasattr(layer, "compute_dtype") and isinstance(layer, torch.nn.Linear):  # bitsandbytes' Linear4bit
            layer.register_forward_pre_hook(_cast_input)
            # In evaluation it would repack the weights, in place and without a backward pass.
            layer.support_avx512bf16_for_cpu = False


@cache
def has_fp8_products() -> bool:
    """Tell whether this machine's GPU multiplies fp8 matrices with a scale for each row (8.9, 9.0 and later)."""
    if not torch.cuda.is_available():
        return False
    ones = torch.ones(32, 32, dtype=torch.bfloat16, device="cuda")
    try:  # torch lacks it for some GPUs, which ones depends on its version
        rows, scales = _quantize_rows(ones)
        products = [
            _multiply_scaled((rows, scales), (rows.t(), scales.t()), ones[0], use_fast_accum=f) for f in (True, False)
        ]
    except (RuntimeError, ValueError):
        return False
    return all(bool((product == 33).all()) for product in products)


def describe_products(model: torch.nn.Module) -> str:
    """Name the precision in which the layers of a quantized model multiply, for a log; "" if it has none."""
    layers = [layer for layer in model.modules() if isinstance(layer, FrozenLinear)]
    if not layers:
        return ""
    in_fp8 = any(layer.in_fp8 for layer in layers)
    return f", multiplied in {'fp8' if in_fp8 else str(layers[0].weight.dtype).removeprefix('torch.')}"


def _cast_input(layer: torch.nn.Linear, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Cast as autocast does for plain layers: norms return float32, in which bitsandbytes would compute."""
    return (inputs[0].to(layer.compute_dtype),)


class FrozenLinear(torch.nn.Linear):
    """A linear layer with a frozen weight that torchao quantized: y = x W^T + b, in the weight's dtype.

    With torchao's own layer, autograd keeps all dequantized weights until the backward pass; float16 overflows,
    because it scales after the multiplication; and under autocast it computes in the dtype of its input.
    """

    in_fp8 = False  # round the inputs to fp8 too, and multiply in it

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` of any dtype -> `[..., out_features]` in the weight's."""
        return _MultiplyFrozen.apply(inputs.to(self.weight.dtype), self.weight, self.bias, self.in_fp8)


class _MultiplyFrozen(torch.autograd.Function):
    """x W^T + b with a gradient for x only; of the weight, only the quantized one is kept for it."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, in_fp8: bool
    ) -> torch.Tensor:
        # Saved for autograd: streamed weights may have moved before a checkpoint computes this again.
        ctx.save_for_backward(weight)
        ctx.in_fp8 = in_fp8
        (output,) = multiply(inputs.flatten(0, -2), [weight], [bias], in_fp8=in_fp8)
        return output.unflatten(0, inputs.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        of_inputs = multiply_back(gradient.flatten(0, -2), weight, in_fp8=ctx.in_fp8)
        return of_inputs.unflatten(0, gradient.shape[:-1]), None, None, None


def dequantize(weight: torch.Tensor) -> torch.Tensor:
    """Return torchao's values, of int8 in one pass over the memory."""
    if weight.qdata.dtype != torch.int8:
        return weight.dequantize()
    return torch.mul(weight.qdata, weight.scale, out=torch.empty_like(weight.qdata, dtype=weight.dtype))


def multiply(
    rows: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], *, in_fp8: bool
) -> list[torch.Tensor]:
    """Compute x W^T + b of rows `[N, in]` with weights `[out, in]` that torchao quantized, in the rows' dtype.

    With `in_fp8` both matrices are in fp8, and sums in float32; otherwise the weight is dequantized.
    """
    layers = list(zip(weights, biases, strict=True))
    if not in_fp8:
        return [torch.nn.functional.linear(rows, dequantize(weight), bias) for weight, bias in layers]
    quantized = _quantize_rows(rows)
    return [
        _multiply_scaled(
            quantized,
            (weight.qdata.t(), weight.scale.t()),
            None if bias is None else bias.bfloat16(),
            use_fast_accum=True,
        ).to(rows.dtype)
        for weight, bias in layers
    ]


def multiply_back(gradient: torch.Tensor, weight: torch.Tensor, *, in_fp8: bool) -> torch.Tensor:
    """Compute the gradient of the rows of `multiply`, g W of `[N, out]`, in the dtype of g."""
    if not in_fp8:
        return gradient @ dequantize(weight)
    # This product sums over the rows of the weight, so that their scales have to be in the other matrix.
    rows = _quantize_rows(gradient.bfloat16() * weight.scale.t().bfloat16())
    columns = weight.qdata.t().contiguous().t()  # the only order of the second matrix that all GPUs read
    ones = torch.ones_like(columns[:1], dtype=torch.float32)
    return _multiply_scaled(rows, (columns, ones)).to(gradient.dtype)


def _quantize_rows(matrix: torch.Tensor) -> _Scaled:
    """Round a matrix to fp8 with one float32 scale for each row: `[M, N]` -> `[M, N]`, `[M, 1]`."""
    largest = torch.linalg.vector_norm(matrix, torch.inf, dim=-1, keepdim=True).float()
    limits = torch.finfo(torch.float8_e4m3fn), torch.finfo(torch.float32)
    scales = (largest / limits[0].max).clamp(min=limits[1].tiny)  # a row of zeros
    # Written at once: the quotient in float32 would be four times as large.
    return torch.div(matrix, scales, out=torch.empty_like(matrix, dtype=torch.float8_e4m3fn)), scales


def _multiply_scaled(
    rows: _Scaled, columns: _Scaled, bias: torch.Tensor | None = None, **options: bool
) -> torch.Tensor:
    """Multiply fp8 matrices to a bfloat16 one; some GPUs have no other product with a scale for each row."""
    (left, left_scales), (right, right_scales) = rows, columns
    return torch._scaled_mm(left, right, left_scales, right_scales, bias=bias, out_dtype=torch.bfloat16, **options)
