"""The step that is compiled once takes torchao's own steps, from torchao's own states."""

import copy
import io
import shutil

import pytest
import torch
from torch.optim import Optimizer
from torchao.optim import Adam4bit, Adam8bit, AdamFp8, AdamW4bit, AdamW8bit, AdamWFp8, _AdamW

from optimizers.compiled_adam import compiled_once


CLASSES = [Adam8bit, Adam4bit, AdamFp8, AdamW8bit, AdamW4bit, AdamWFp8, _AdamW]


def weights(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """A matrix large enough for low-bit states, a vector, and a weight that gets no gradient."""
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((64, 64), (64,), (8,))]


def step(parameters: list[torch.nn.Parameter], optimizer: Optimizer, steps: range) -> None:
    for number in steps:
        torch.manual_seed(number)
        for parameter in parameters[:2]:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def saved(optimizer: Optimizer) -> bytes:
    """Return the file that a checkpoint has of the optimizer."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return file.getvalue()


def assert_same_end(
    ours: list[torch.nn.Parameter], optimizer: Optimizer, theirs: list[torch.nn.Parameter], reference: Optimizer
) -> None:
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    assert saved(optimizer) == saved(reference)


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("adam_class", CLASSES, ids=lambda adam_class: adam_class.__name__)
def test_it_continues_from_a_checkpoint_of_torchaos_own_step(adam_class, rounds):
    settings = {"lr": 1e-2, "weight_decay": 0.1, "bf16_stochastic_round": rounds}
    theirs = weights(torch.bfloat16 if rounds else torch.float32)
    with torch.compiler.set_stance("force_eager"):
        reference = adam_class(theirs, **settings)
        step(theirs, reference, range(2))
        ours = copy.deepcopy(theirs)
        optimizer = compiled_once(adam_class)(ours, **settings)
        optimizer.load_state_dict(torch.load(io.BytesIO(saved(reference)), weights_only=True))
        step(theirs, reference, range(2, 5))
        step(ours, optimizer, range(2, 5))
    assert_same_end(ours, optimizer, theirs, reference)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
def test_compiled_steps_are_torchaos_and_are_compiled_once_for_each_shape():
    theirs, ours = weights(), weights()
    optimizer, reference = compiled_once(AdamW8bit)(ours, lr=1e-2), AdamW8bit(theirs, lr=1e-2)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step(ours, optimizer, range(3))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    step(theirs, reference, range(3))
    assert_same_end(ours, optimizer, theirs, reference)
