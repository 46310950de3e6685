"""A step inside the backward pass is the step after it, without the gradients."""

import copy

import pytest
import torch
from diffusers.optimization import get_scheduler

from flags.optimizer import OptimizerFlags
from optimizers.build import make_optimizer


STATES = [
    {"optimizer": "adam"},
    {"optimizer": "adamw"},
    {"optimizer": "adam", "use_8bit": True},
    {"optimizer": "adamw", "use_8bit": True},
    {"optimizer": "adamw", "use_8bit": True, "use_torchao": True},
    {"optimizer": "adamw", "use_4bit": True, "use_torchao": True},
    {"optimizer": "adamw", "use_fp8": True, "use_torchao": True},
    {"optimizer": "adamw", "use_8bit": True, "use_torchao": True, "stochastic_rounding": True},
    {"optimizer": "adamw", "use_torchao": True, "stochastic_rounding": True},
]


def make(net: torch.nn.Module, *, stochastic_rounding: bool = False, **flags) -> torch.optim.Optimizer:
    flags = OptimizerFlags(**{"step_in_backward": True, "optimizer": "adamw"} | flags)
    return make_optimizer(net.parameters(), flags, 1e-2, stochastic_rounding=stochastic_rounding)


def model(flags: dict, device: str = "cpu") -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64))
    return layers.to(device, torch.bfloat16 if flags.get("stochastic_rounding") else torch.float32)


def loss_of(net: torch.nn.Module, step: int) -> torch.Tensor:
    weight = next(net.parameters())
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).to(weight)
    return net(inputs).square().mean()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("flags", [flags for flags in STATES if not flags.get("stochastic_rounding")], ids=str)
def test_it_ends_with_the_weights_of_steps_after_the_backward_pass(flags, device):
    ends = []
    with torch.compiler.set_stance("force_eager" if device == "cpu" else "default"):
        for step_in_backward in (False, True):
            net = model(flags, device)
            optimizer = make(net, step_in_backward=step_in_backward, **flags)
            schedule = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=5)
            for step in range(5):
                loss_of(net, step).backward()
                if step_in_backward:
                    assert all(parameter.grad is None for parameter in net.parameters())
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            ends.append([parameter.detach() for parameter in net.parameters()])
    assert not torch.equal(ends[0][0], next(model(flags, device).parameters()))
    # torch may sum up several weights' updates in one kernel, in another order.
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("flags", STATES, ids=str)
def test_it_goes_on_from_a_checkpoint_bit_for_bit(flags, tmp_path):
    def train(net: torch.nn.Module, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            loss_of(net, step).backward()

    with torch.compiler.set_stance("force_eager"):
        net = model(flags)
        optimizer = make(net, **flags)
        train(net, range(2))
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.bin")
        resumed = copy.deepcopy(model(flags))
        resumed.load_state_dict(net.state_dict())
        train(net, range(2, 4))
        optimizer = make(resumed, **flags)
        optimizer.load_state_dict(torch.load(tmp_path / "optimizer.bin", weights_only=True))
        train(resumed, range(2, 4))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(resumed.parameters(), net.parameters(), strict=True))


def test_it_has_no_norm_of_gradients_to_give():
    net = model({})
    optimizer = make(net)
    loss_of(net, 0).backward()
    assert optimizer.clip_grad_norm_(1.0) is None


def test_the_state_of_another_optimizer_is_refused():
    net = model({})
    optimizer = make(net)
    with pytest.raises(ValueError, match="different number of parts"):
        optimizer.load_state_dict(torch.optim.AdamW(net.parameters()).state_dict())


@pytest.mark.gpu
def test_it_does_not_hold_all_gradients_at_once():
    layers = [torch.nn.Linear(1024, 1024, bias=False) for _ in range(16)]  # of 4 MiB
    peaks = []
    for step_in_backward in (False, True):
        net = torch.nn.Sequential(*copy.deepcopy(layers)).cuda()
        optimizer = make(net, step_in_backward=step_in_backward)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            net(torch.ones(1, 1024, device="cuda")).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated())
        del net, optimizer
    assert peaks[1] < peaks[0] - 10 * 2**22
