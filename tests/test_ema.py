"""The average of the weights follows them, and takes their place only meanwhile."""

import pytest
import torch

from ema import averaged_weights, make_ema


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
