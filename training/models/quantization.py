"""Frozen weights in 8 or 4 bits: which layers, by which library, and how they compute.

torchao stores each row of a weight in int8 or fp8, with one float32 scale. bitsandbytes stores blocks of 64 weights in
4 bits each, by a table for normally distributed weights (NF4), with one 8-bit scale. Both reduce the precision of only
the base model: adapters are trained and saved as on the model in full precision.

Source: torchao https://arxiv.org/abs/2507.16099, NF4 and LoRA on it https://arxiv.org/abs/2305.14314.
"""

from typing import Any

import torch
from diffusers import BitsAndBytesConfig, TorchAoConfig
from diffusers.utils import is_bitsandbytes_available, is_torchao_available
from transformers import TorchAoConfig as TextTorchAoConfig

from common.errors import UserError


# Layers outside the blocks are small, and all activations pass through them.
_UNQUANTIZED = ["patch_embed", "time_embedding", "ofs_embedding", "norm_out", "proj_out"]


def check_quantization(quantization: str) -> None:
    """Check that this machine has the packages and the GPU for "none", "int8", "fp8" or "nf4"."""
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
    """Return the config for `from_pretrained` to quantize the blocks' linear layers, if any; checks the machine.

    Args:
        quantization: "none", "int8", "fp8" or "nf4".
        dtype: that the layers compute in.
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
            llm_int8_skip_modules=_UNQUANTIZED,  # despite its name, also for 4 bits
        )
    return TorchAoConfig(_weight_only(quantization), modules_to_not_convert=_UNQUANTIZED)


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


def compute_frozen(model: torch.nn.Module) -> None:
    """Make the quantized linear layers of a frozen model compute in the weights' dtype, and save only the quantized
    weights for the backward pass; in place."""
    for layer in model.modules():
        if type(layer) is torch.nn.Linear and type(layer.weight).__module__.startswith("torchao."):
            layer.__class__ = FrozenLinear
        elif hasattr(layer, "compute_dtype") and isinstance(layer, torch.nn.Linear):  # bitsandbytes' Linear4bit
            layer.register_forward_pre_hook(_cast_input)


def _cast_input(layer: torch.nn.Linear, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Cast as autocast does for plain layers: norms return float32, in which bitsandbytes would compute."""
    return (inputs[0].to(layer.compute_dtype),)


class FrozenLinear(torch.nn.Linear):
    """A linear layer with a frozen weight that torchao quantized: y = x W^T + b, in the weight's dtype.

    With torchao's own layer, autograd keeps all dequantized weights until the backward pass; float16 overflows,
    because it scales after the multiplication; and under autocast it computes in the dtype of its input.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` of any dtype -> `[..., out_features]` in the weight's."""
        return _MultiplyFrozen.apply(inputs.to(self.weight.dtype), self.weight, self.bias)


class _MultiplyFrozen(torch.autograd.Function):
    """x W^T + b with a gradient for x only. The weight is dequantized in both passes and not kept."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # Saved for autograd: streamed weights may have moved before a checkpoint computes this again.
        ctx.save_for_backward(weight)
        return torch.nn.functional.linear(inputs, weight.dequantize(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.dequantize(), None, None
