"""The offloaded optimizer equals the inner one with clipping, and resumes from a checkpoint."""

import copy
import os
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch.optim import Adam, AdamW, Optimizer
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8, _AdamW, cpu_offload

from optimizers.build import apply_learning_rate, keep_rates_on_host
from optimizers.compiled_adam import compiled_once
from optimizers.offload import ClippedOffloadOptimizer


INNER = [Adam, AdamW, *map(compiled_once, (AdamW8bit, AdamW4bit, AdamWFp8))]


class HostStream(torch.cpu.Stream):
    """torch's CPU stream with the two methods that it lacks."""

    def record_event(self) -> torch.cpu.Event:
        return torch.cpu.Event()

    def synchronize(self) -> None:
        pass


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> Iterator[str]:
    """The device of the parameters. The CPU acts as a GPU, with dummy streams and without pinned memory."""
    if request.param == "cpu":
        streams = {"Stream": HostStream, "stream": torch.cpu.stream, "current_stream": torch.cpu.current_stream}
        stand_in = SimpleNamespace(
            cuda=SimpleNamespace(**streams),
            optim=torch.optim,
            empty_like=lambda tensor, pin_memory=False, **options: torch.empty_like(tensor, **options),
        )
        monkeypatch.setattr(cpu_offload, "torch", stand_in)
        monkeypatch.setattr(cpu_offload, "get_available_devices", lambda: ["cpu", "cuda"])
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    with torch.compiler.set_stance("force_eager"):
        yield request.param


def model(device: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Build matrices that are offloaded, and biases that are too small for that."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64)).to(device, dtype)


def settings(optimizer_class: type[Optimizer]) -> dict[str, Any]:
    return {"lr": 1e-2, "weight_decay": 1e-2} | ({"fused": True} if optimizer_class in (Adam, AdamW) else {})


def offloaded(net: torch.nn.Module, optimizer_class: type[Optimizer], **options: Any) -> ClippedOffloadOptimizer:
    return ClippedOffloadOptimizer(list(net.parameters()), optimizer_class, **settings(optimizer_class), **options)


def backward(net: torch.nn.Module, step: int) -> None:
    weight = next(net.parameters())
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).to(weight)
    (net(inputs).square().mean() * 100).backward()


def train(
    net: torch.nn.Module, optimizer: Optimizer, steps: range, max_norm: float = 1e9, passes: int = 1
) -> list[torch.Tensor]:
    clip = getattr(optimizer, "clip_grad_norm_", partial(torch.nn.utils.clip_grad_norm_, list(net.parameters())))
    norms = []
    for step in steps:
        torch.manual_seed(step)
        for number in range(passes):
            backward(net, step + number)
        norms.append(clip(max_norm))
        optimizer.step()
        optimizer.zero_grad()
    return norms


@pytest.mark.parametrize(("offload_gradients", "passes"), [(False, 1), (True, 1), (False, 2)])
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_gradients_are_clipped_as_torch_clips_them(device, offload_gradients, passes, max_norm):
    expected, net = model(device), model(device)
    norms = train(expected, AdamW(expected.parameters(), **settings(AdamW)), range(4), max_norm, passes)
    assert all(1 < norm < 1e9 for norm in norms)
    optimizer = offloaded(net, AdamW, offload_gradients=offload_gradients)
    torch.testing.assert_close(train(net, optimizer, range(4), max_norm, passes), norms)
    torch.testing.assert_close(list(net.parameters()), list(expected.parameters()))


@pytest.mark.parametrize("optimizer_class", INNER, ids=lambda inner: inner.__name__)
def test_a_schedule_reaches_all_weights_through_accelerate(device, optimizer_class, fresh_accelerator):
    net = model(device)
    parameters = list(net.parameters())
    optimizer = offloaded(net, optimizer_class)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=4)
    wrapped = Accelerator(cpu=device == "cpu").prepare_optimizer(optimizer)
    keep_rates_on_host(wrapped)
    moved = []
    for step in range(5):
        before = [parameter.detach().clone() for parameter in parameters]
        backward(net, step)
        wrapped.step()
        wrapped.zero_grad()
        schedule.step()
        pairs = zip(parameters, before, strict=True)
        moved.append([(now - then).abs().max().item() for now, then in pairs])
    assert all(size > 0 for sizes in moved[:4] for size in sizes)
    assert moved[4] == [0, 0, 0, 0]  # the rate has come down to 0
    schedule.last_epoch = 0
    apply_learning_rate(wrapped, schedule, 0.5)
    assert {float(group["lr"]) for group in optimizer.param_groups} == {0.5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer_class", [*INNER, compiled_once(_AdamW)], ids=lambda inner: inner.__name__)
def test_it_resumes_bit_exactly(device, optimizer_class, dtype, tmp_path):
    rounds = dtype == torch.bfloat16 and optimizer_class not in (Adam, AdamW)
    options = {"bf16_stochastic_round": True} if rounds else {}
    net = model(device, dtype)
    optimizer = offloaded(net, optimizer_class, **options)
    train(net, optimizer, range(2), 1.0)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.bin")
    weights = copy.deepcopy(net.state_dict())
    train(net, optimizer, range(2, 4), 1.0)

    resumed = model(device, dtype)
    optimizer = offloaded(resumed, optimizer_class, **options)
    resumed.load_state_dict(weights)  # before the optimizer, as accelerate does it
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.bin", weights_only=True))
    train(resumed, optimizer, range(2, 4), 1.0)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(resumed.parameters(), net.parameters(), strict=True))


def test_the_step_uses_all_cores_and_the_rest_of_the_process_as_many_threads_as_before(
    device, one_thread, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 3}, raising=False)
    threads = []

    class NotingThreads(torch.optim.SGD):
        def step(self) -> None:
            threads.append(torch.get_num_threads())

    net = model(device)
    optimizer = offloaded(net, NotingThreads)
    backward(net, 0)
    optimizer.step()
    assert threads == [3] * 3  # of two matrices, and of the biases
    assert torch.get_num_threads() == 1


def test_the_state_of_other_weights_is_refused(device):
    with pytest.raises(ValueError, match="different number"):
        offloaded(model(device)[0], AdamW).load_state_dict(offloaded(model(device), AdamW).state_dict())
