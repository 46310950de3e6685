"""A linear layer with a LoRA computes what peft's does, and leaves to peft what is not plain."""

from copy import deepcopy

import pytest
import torch
from diffusers.models.attention_processor import Attention
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

from methods.lora_layers import use_layers
from models.quantization import compute_frozen


pytestmark = pytest.mark.usefixtures("one_thread")


def make_layer(*, adapters: tuple[str, ...] = ("default",), **options) -> nn.Module:
    """A layer from 96 to 64 channels; its adapters have rank 8, are scaled by 1.5 and have an effect."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64)).requires_grad_(False)
    config = LoraConfig(r=8, lora_alpha=12, target_modules=["0"], init_lora_weights=False, **options)
    for name in adapters:
        inject_adapter_in_model(config, model, name)
    return model


def results(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The output and all gradients."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 50, 96, generator=generator).requires_grad_()
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = model(inputs if dtype == torch.bfloat16 else inputs.to(dtype))
    (output * torch.linspace(-1, 1, 64)).sum().backward()
    trained = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    return {"output": output.detach(), "inputs": inputs.grad, **trained}


def errors(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    assert ours.keys() == expected.keys()
    return {name: float((ours[name] - expected[name]).norm() / expected[name].norm()) for name in expected}


def test_output_and_gradients_are_those_of_peft():
    model = make_layer()
    expected = results(model)
    assert all(tensor.abs().sum() > 0 for tensor in expected.values()) and len(expected) == 4
    use_layers(model)
    assert max(errors(results(model), expected).values()) < 1e-6


def test_under_autocast_it_is_as_close_to_the_truth_as_peft():
    model = make_layer()
    truth = results(deepcopy(model).double(), torch.float64)
    of_peft = errors(results(model, torch.bfloat16), truth)
    use_layers(model)
    ours = results(model, torch.bfloat16)
    assert all(ours[name].dtype == torch.float32 for name in ours if "lora" in name)
    for name, error in errors(ours, truth).items():
        assert error < 1.05 * of_peft[name] and error < 0.01, name


@pytest.mark.parametrize("in_fp8", [False, True])
def test_a_quantized_base_is_multiplied_as_without_a_lora(in_fp8):
    model = make_layer().bfloat16()
    quantize_(
        model, Float8WeightOnlyConfig(), lambda layer, _: type(layer) is nn.Linear and not layer.weight.requires_grad
    )
    compute_frozen(model, in_fp8=in_fp8)
    assert model[0].base_layer.in_fp8 == in_fp8
    expected = results(model, torch.bfloat16)
    use_layers(model)
    assert max(errors(results(model, torch.bfloat16), expected).values()) < 0.01


class Projections(nn.Module):
    """A sum of an attention's queries, keys and values, computed at once or one after another."""

    def __init__(self, *, at_once: bool):
        super().__init__()
        torch.manual_seed(0)
        self.attn, self.at_once = Attention(96, heads=2, dim_head=32, bias=True).requires_grad_(False), at_once
        config = LoraConfig(r=8, lora_alpha=12, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
        inject_adapter_in_model(config, self)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        layers = self.attn.to_q, self.attn.to_k, self.attn.to_v
        query, key, value = self.attn.project(inputs) if self.at_once else (layer(inputs) for layer in layers)
        return query + 2 * key - value


@pytest.mark.parametrize(("base", "bound"), [(None, 1e-6), ("int8", 0.01), ("fp8", 0.01)])
def test_queries_keys_and_values_at_once_have_the_gradients_of_three_layers(base, bound):
    at_once, apart = (Projections(at_once=kind) for kind in (True, False))
    for model in (at_once, apart):
        if base is not None:
            config = {"int8": Int8WeightOnlyConfig(), "fp8": Float8WeightOnlyConfig()}[base]
            quantize_(
                model.bfloat16(), config, lambda layer, _: type(layer) is nn.Linear and not layer.weight.requires_grad
            )
            compute_frozen(model, in_fp8=base == "fp8")
        use_layers(model)
    dtype = torch.float32 if base is None else torch.bfloat16
    assert max(errors(results(at_once, dtype), results(apart, dtype)).values()) < bound


@pytest.mark.parametrize(
    "options", [{"lora_dropout": 0.5}, {"use_dora": True}, {"adapters": ("default", "other")}], ids=str
)
def test_what_is_not_plain_is_left_to_peft(options):
    model = make_layer(**options)
    if "adapters" in options:
        model[0].set_adapter(list(options["adapters"]))
    expected = results(model.train())
    use_layers(model)
    assert max(errors(results(model), expected).values()) == 0


def test_adapters_can_be_disabled():
    model = make_layer()
    use_layers(model)
    inputs = torch.ones(1, 96)
    model[0].enable_adapters(False)
    assert torch.equal(model(inputs), model[0].base_layer(inputs))
