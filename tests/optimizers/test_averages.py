"""The average of the weights follows its formula, and replaces them only within a block."""

import pytest
import torch
from diffusers.training_utils import EMAModel

from flags.optimizer import OptimizerFlags
from optimizers.averages import averaged_weights, schedule_free_weights
from optimizers.build import make_optimizer


def test_the_average_follows_its_formula_and_the_weights_are_restored_after_an_error():
    weight = torch.nn.Parameter(torch.zeros(3))
    ema = EMAModel([weight], decay=0.5)
    average = torch.zeros(3)
    for step in range(1, 21):
        with torch.no_grad():
            weight += 1
        ema.step([weight])
        # Until the decay is reached: diffusers' ramp, (1 + n) / (10 + n) with n steps behind it.
        decay = min(0.5, step / (9 + step)) if step > 1 else 0
        average = decay * average + (1 - decay) * weight.detach()
    with pytest.raises(RuntimeError, match="disturbed"), averaged_weights(ema, [weight]):
        torch.testing.assert_close(weight.detach(), average)
        raise RuntimeError("disturbed")
    assert weight.tolist() == [20, 20, 20]


def test_the_schedule_free_average_follows_its_definition_and_reading_it_does_not_change_training():
    """The weights trained are y = (1 - beta1) z + beta1 x; x is the mean of all z, here by hand."""
    ends = []
    for is_read in (False, True):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 7))
        optimizer = make_optimizer([weight], OptimizerFlags(optimizer="schedulefree", beta1=0.9), 0.1)
        visited = []
        for step in range(5):
            (weight - step % 3).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            visited.append(optimizer.state[weight]["z"].clone())
            if is_read:
                with schedule_free_weights(optimizer, [weight]):
                    torch.testing.assert_close(weight.detach(), torch.stack(visited).mean(dim=0))
        ends.append(weight.detach())
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], torch.stack(visited).mean(dim=0))


def test_without_an_average_or_a_step_the_weights_do_not_change():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([weight], OptimizerFlags(optimizer="schedulefree"), 0.1)
    for average in (schedule_free_weights(optimizer, [weight]), averaged_weights(None, [weight])):
        with average:
            assert weight.tolist() == [1, 1]
