"""Frozen weights in 8 or 4 bits: which layers, by which library, and how they compute.

torchao keeps a row of a weight in int8 or fp8, with one float32 scale; bitsandbytes keeps 64 weights at a time in 4
bits each, by a table made for normal numbers (NF4), with one scale, which is stored in 8 bits itself. Either is a loss
of precision of the base model alone: adapters on top are trained, and written, as on the model in full precision.

Source: torchao https://arxiv.org/abs/2507.16099, NF4 and LoRA on it https://arxiv.org/abs/2305.14314.
"""

from typing import Any

import torch
from diffusers import BitsAndBytesConfig, TorchAoConfig
from diffusers.utils import is_bitsandbytes_available, is_torchao_available
from transformers import TorchAoConfig as TextTorchAoConfig

from common.errors import UserError


# What lies outside the blocks is small, and all that the blocks compute passes through it.
UNQUANTIZED = ("patch_embed", "time_embedding", "ofs_embedding", "norm_out", "proj_out")


def check_quantization(quantization: str) -> None:
    """Refuse what this machine cannot quantize; loads nothing.

    Args:
        quantization: "none", "int8", "fp8" or "nf4".

    Raises:
        UserError: a package or a GPU is missing.
    """
    if quantization in ("int8", "fp8"):
        _check_torchao(f"--quantize_base {quantization}")
    if quantization == "nf4":
        if not torch.cuda.is_available():
            raise UserError("--quantize_base nf4: needs a GPU; --quantize_base int8 works without one")
        if not is_bitsandbytes_available():
            raise UserError("--quantize_base nf4: bitsandbytes is missing; install it with pip install bitsandbytes")


def _check_torchao(flag: str) -> None:
    if not is_torchao_available():
        raise UserError(f"{flag}: torchao is missing; install it with pip install torchao")


def quantize_transformer(quantization: str, dtype: torch.dtype) -> TorchAoConfig | BitsAndBytesConfig | None:
    """How `from_pretrained` of the transformer is to quantize the linear layers of its blocks, one by one.

    Args:
        quantization: "none", "int8", "fp8" or "nf4".
        dtype: that the layers compute in.

    Returns:
        The value of `quantization_config`; None for "none".

    Raises:
        UserError: a package or a GPU is missing.
    """
    check_quantization(quantization)
    if quantization == "none":
        return None
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=list(UNQUANTIZED),  # despite its name for 4 bits too
        )
    return TorchAoConfig(_weight_only(quantization), modules_to_not_convert=list(UNQUANTIZED))


def quantize_text_encoder() -> TextTorchAoConfig:
    """How `from_pretrained` of the text encoder is to quantize its linear layers to int8, one by one.

    torchao's weights alone are in 8 bits, on every device; bitsandbytes would round the activations too, of which T5
    has very large ones, and need a GPU.

    Raises:
        UserError: torchao is missing.
    """
    _check_torchao("--text_encoder_8bit")
    return TextTorchAoConfig(_weight_only("int8"))


def _weight_only(quantization: str) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    config = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[quantization]
    # Otherwise it changes settings of the whole process, TF32 among them.
    return config(set_inductor_config=False)


def compute_frozen(model: torch.nn.Module) -> None:
    """Let the quantized linear layers of a model whose weights stay as they are compute in the weights' own dtype, and
    keep nothing but the quantized weights for the backward pass; in place.

    Args:
        model: with weights that torchao or bitsandbytes quantized.
    """
    for layer in model.modules():
        if type(layer) is torch.nn.Linear and _is_torchao(layer.weight):
            layer.__class__ = FrozenLinear
        elif hasattr(layer, "compute_dtype") and isinstance(layer, torch.nn.Linear):  # bitsandbytes' Linear4bit
            layer.register_forward_pre_hook(_cast_input)


def _is_torchao(weight: torch.Tensor) -> bool:
    from torchao.utils import TorchAOBaseTensor

    return isinstance(weight, TorchAOBaseTensor)


def _cast_input(layer: torch.nn.Linear, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """What autocast does for plain layers: norms give float32, and bitsandbytes would give that back."""
    return (inputs[0].to(layer.compute_dtype),)


class FrozenLinear(torch.nn.Linear):
    """A linear layer with a frozen weight that torchao quantized: y = x W^T + b, in the weight's dtype.

    torchao's own layer leaves the dequantized weight to autograd, which would keep all of them until the backward
    pass; in float16 it multiplies by the integers before it scales, which overflows; and under autocast it computes in
    the dtype of its input.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` of any dtype -> `[..., out_features]` in the weight's."""
        return _MultiplyFrozen.apply(inputs.to(self.weight.dtype), self.weight, self.bias)


class _MultiplyFrozen(torch.autograd.Function):
    """x W^T + b; the gradient is that of x alone. The weight is dequantized in both passes, and let go."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # Saved, not held: where a checkpoint computes this again, the weight may have been elsewhere meanwhile.
        ctx.save_for_backward(weight)
        return torch.nn.functional.linear(inputs, weight.dequantize(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.dequantize(), None, None
