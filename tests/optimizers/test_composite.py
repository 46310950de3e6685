"""A step inside the backward pass equals one after it, without storing all gradients."""

import copy

import pytest
import torch
from diffusers.optimization import get_scheduler

from flags.optimizer import LOW_BITS, OptimizerFlags
from optimizers.build import make_optimizer


STATES = [{"optimizer": name} | states for states in ({}, {"use_8bit": True}) for name in ("adam", "adamw")]
STATES += [{"optimizer": "adamw", bits: True, "use_torchao": True} for bits in LOW_BITS]


def model(device: str = "cpu") -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64)).to(device)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("flags", STATES, ids=str)
def test_it_equals_steps_after_the_backward_pass(flags, device):
    ends = []
    with torch.compiler.set_stance("force_eager" if device == "cpu" else "default"):
        for step_in_backward in (False, True):
            net = model(device)
            chosen = OptimizerFlags(step_in_backward=step_in_backward, **flags)
            optimizer = make_optimizer(net.parameters(), chosen, 1e-2)
            schedule = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=5)
            for step in range(5):
                inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).to(device)
                net(inputs).square().mean().backward()
                if step_in_backward:
                    assert all(parameter.grad is None for parameter in net.parameters())
                    assert optimizer.clip_grad_norm_(1.0) is None
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            ends.append([parameter.detach() for parameter in net.parameters()])
    assert not torch.equal(ends[0][0], next(model(device).parameters()))
    # torch may sum up several weights' updates in one kernel, in another order.
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


def test_the_state_of_another_optimizer_is_refused():
    net = model()
    optimizer = make_optimizer(net.parameters(), OptimizerFlags(optimizer="adamw", step_in_backward=True), 1e-2)
    with pytest.raises(ValueError, match="different number of parts"):
        optimizer.load_state_dict(torch.optim.AdamW(net.parameters()).state_dict())


@pytest.mark.gpu
def test_it_does_not_hold_all_gradients_at_once():
    layers = [torch.nn.Linear(1024, 1024, bias=False) for _ in range(16)]  # of 4 MiB
    peaks = []
    for step_in_backward in (False, True):
        net = torch.nn.Sequential(*copy.deepcopy(layers)).cuda()
        optimizer = make_optimizer(
            net.parameters(), OptimizerFlags(optimizer="adamw", step_in_backward=step_in_backward), 1e-3
        )
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            net(torch.ones(1, 1024, device="cuda")).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated())
        del net, optimizer
    assert peaks[1] < peaks[0] - 10 * 2**22
