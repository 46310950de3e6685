"""The average of the weights follows them, and takes their place only meanwhile."""

import pytest
import torch

from flags.optimizer import OptimizerFlags
from optimizers.averages import averaged_weights, make_ema, schedule_free_weights
from optimizers.build import make_optimizer


def test_the_average_follows_the_weights_by_its_formula():
    weight = torch.nn.Parameter(torch.zeros(3))
    ema = make_ema([weight], decay=0.5)
    average = torch.zeros(3)
    for step in range(1, 21):
        with torch.no_grad():
            weight += 1
        ema.step([weight])
        # Until the decay is reached: diffusers' ramp, (1 + n) / (10 + n) with n steps behind it.
        decay = min(0.5, step / (9 + step)) if step > 1 else 0
        average = decay * average + (1 - decay) * weight.detach()
    with averaged_weights(ema, [weight]):
        torch.testing.assert_close(weight.detach(), average)


def test_the_weights_come_back_whatever_happens_meanwhile():
    weight = torch.nn.Parameter(torch.randn(3))
    before = weight.detach().clone()
    ema = make_ema([weight], decay=0.9)
    with torch.no_grad():
        weight += 1
    with pytest.raises(RuntimeError, match="disturbed"), averaged_weights(ema, [weight]):
        assert torch.equal(weight.detach(), before)
        raise RuntimeError("disturbed")
    assert torch.equal(weight.detach(), before + 1)


def test_without_an_average_the_weights_stay():
    weight = torch.nn.Parameter(torch.ones(2))
    with averaged_weights(None, [weight]):
        assert weight.tolist() == [1, 1]


def schedule_free_run(steps: int, averages: list[torch.Tensor] | None = None) -> torch.Tensor:
    """Weights after so many steps; with a list, after a look at the average after each."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 7))
    optimizer = make_optimizer([weight], OptimizerFlags("schedulefree"), 0.1)
    for step in range(steps):
        (weight - step % 3).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if averages is not None:
            with schedule_free_weights(optimizer, [weight]):
                averages.append(weight.detach().clone())
    return weight.detach()


def test_the_average_of_a_schedule_free_optimizer_is_the_one_it_is_defined_by():
    """The weights trained are y = (1 - beta1) z + beta1 x; x is the mean of all z, here by hand."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 7))
    optimizer = make_optimizer([weight], OptimizerFlags("schedulefree"), 0.1)
    visited = []
    for step in range(5):
        (weight - step % 3).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        visited.append(optimizer.state[weight]["z"].clone())
    with schedule_free_weights(optimizer, [weight]):
        torch.testing.assert_close(weight.detach(), torch.stack(visited).mean(dim=0))
    assert not torch.equal(weight.detach(), torch.stack(visited).mean(dim=0))


def test_a_look_at_the_schedule_free_average_changes_nothing_in_training():
    averages = []
    assert torch.equal(schedule_free_run(5, averages), schedule_free_run(5))
    assert not torch.equal(averages[-1], schedule_free_run(5))


def test_before_the_first_step_the_schedule_free_average_is_the_weights():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([weight], OptimizerFlags("schedulefree"), 0.1)
    with schedule_free_weights(optimizer, [weight]):
        assert weight.tolist() == [1, 1]
