"""Our blocks compute what the library's do, and train on the same curve."""

from copy import deepcopy

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from forward_pass import gradients, load, predict
from memory.activations import checkpoint_activations
from models.attention import set_attention
from tiny_steps import with_adapters


pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")


def error(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The norm of all differences beside the norm."""
    assert tensors.keys() == expected.keys()
    differences = [(tensors[name] - expected[name]).double().norm() for name in expected]
    return float(torch.stack(differences).norm() / torch.stack([t.double().norm() for t in expected.values()]).norm())


def computed(transformer: CogVideoXTransformer3DModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {"output": predict(transformer, dtype=dtype).detach(), **gradients(transformer, dtype=dtype)}


def of_libraries(transformer: CogVideoXTransformer3DModel) -> CogVideoXTransformer3DModel:
    """A copy that diffusers and peft compute."""
    copy = deepcopy(transformer)
    for module in copy.modules():
        vars(module).pop("forward", None)
    return copy


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_all_gradients_are_the_librarys_in_float32(tiny_models, kind):
    transformer = load(tiny_models(kind))
    expected = computed(transformer, torch.float32)
    set_attention(transformer)
    ours = computed(transformer, torch.float32)
    assert error(ours, expected) < 3e-6
    noise = 1e-7 * max(tensor.norm() for tensor in expected.values())  # some gradients are 0 but for rounding
    for name in expected:
        assert (ours[name] - expected[name]).norm() < 1e-4 * expected[name].norm() + noise, name


@pytest.mark.parametrize("method", ["lora", "sft"])
def test_half_precision_is_as_close_to_float32_as_the_librarys(tiny_models, method):
    ours = with_adapters(tiny_models("5b"), dropout=0.0) if method == "lora" else load(tiny_models("5b"))
    library = of_libraries(ours)
    set_attention(ours)
    expected = computed(library, torch.float32)
    errors = [error(computed(model, torch.bfloat16), expected) for model in (ours, library)]
    assert errors[0] < 1.1 * errors[1]


def loss_curve(transformer: CogVideoXTransformer3DModel, steps: int = 100) -> torch.Tensor:
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = (predict(transformer, 2, dtype=torch.bfloat16).float() - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_a_hundred_steps_follow_the_same_curve(tiny_models):
    ours = with_adapters(tiny_models("5b"), dropout=0.0)
    library = of_libraries(ours)
    set_attention(ours)
    checkpoint_activations(ours, "all-but-attention", 2)
    expected, losses = loss_curve(library), loss_curve(ours)
    assert expected[-1] < 0.5 * expected[0]
    assert ((losses - expected).abs() / expected).max() < 0.005
