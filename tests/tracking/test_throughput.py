"""Throughput is measured with a clock that the tests move."""

import time

import pytest
import torch

from data.buckets import Bucket
from forward_pass import COGVIDEOX_5B
from tracking.flops import count_flops
from tracking.throughput import PHASES, PhaseTimer, Throughput


class Clock:
    now = 100.0


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def make_throughput(num_ranks: int = 1, devices_per_sample: int = 1) -> Throughput:
    settings = {"trains_all": False, "checkpoint_scope": "block", "devices_per_sample": devices_per_sample}
    return Throughput(COGVIDEOX_5B, torch.device("cpu"), num_ranks, torch.bfloat16, **settings)


def do_step(throughput: Throughput, clock: Clock, samples: int = 1) -> None:
    """8 seconds: 1 for data, 2 forward, 3 backward, 1 for the optimizer, and 1 in between."""
    for phase, seconds in zip(PHASES, (1, 2, 3, 1), strict=True):
        with throughput.phase(phase):
            clock.now += seconds
    throughput.count(Bucket(49, 480, 720), samples)
    clock.now += 1


def test_the_time_of_a_step_is_split_into_its_phases(clock):
    throughput = make_throughput()
    do_step(throughput, clock)
    do_step(throughput, clock)
    values = throughput.read(2).values()
    assert [values[f"{name}_seconds"] for name in ("step", *PHASES)] == [8, 1, 2, 3, 1]
    assert values["samples_per_second"] == 2 / 16
    assert values["tokens_per_second"] == 2 * 17_776 / 16
    flops = count_flops(COGVIDEOX_5B, 17_776, trains_all=False, checkpoint_scope="block")
    assert values["tflops_per_second"] == pytest.approx(flops / 1e12 / 8)


def test_time_between_steps_is_not_counted(clock):
    throughput = make_throughput()
    do_step(throughput, clock)
    first = throughput.read(1)
    clock.now += 1000  # a validation
    do_step(throughput, clock, samples=3)
    second = throughput.read(1)
    assert (first.seconds, second.seconds) == (8, 8)
    assert (first.samples, second.samples) == (1, 3)
    assert (first + second).values()["samples_per_second"] == 4 / 16
    assert (first + second).values()["forward_seconds"] == 2


@pytest.mark.parametrize(("num_ranks", "devices_per_sample"), [(4, 1), (1, 4)])
def test_samples_are_counted_on_all_devices_and_flops_on_one(clock, num_ranks, devices_per_sample):
    throughputs = make_throughput(), make_throughput(num_ranks, devices_per_sample)
    for throughput in throughputs:
        do_step(throughput, clock)
    one, several = (throughput.read(1) for throughput in throughputs)
    assert (several.samples, several.tokens) == (num_ranks * one.samples, num_ranks * one.tokens)
    assert several.tflops == one.tflops / devices_per_sample


def test_the_share_of_the_peak_is_shown_if_the_peak_is_known(clock):
    throughput = make_throughput()
    throughput.peak = 989.4
    do_step(throughput, clock)
    speed = throughput.read(1)
    assert speed.values()["peak_percent"] == pytest.approx(100 * 1241 / 8 / 989.4, rel=1e-3)
    assert str(speed) == (
        "0.125 samples/s, 2,222 tokens/s; 8.000 s a step: data 1.000, forward 2.000, backward 3.000, optimizer 1.000; "
        "155 TFLOP/s, 16% of the card's peak"
    )
    assert speed.short() == "0.125 samples/s, 155 TFLOP/s (16%)"
    throughput.peak = None
    do_step(throughput, clock)
    assert "peak" not in str(throughput.read(1))


@pytest.mark.gpu
def test_phases_are_timed_on_the_gpu_without_waiting_for_it():
    timer, device = PhaseTimer(torch.device("cuda")), torch.device("cuda")
    load = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with timer.phase("forward"):
            for _ in range(50):
                load = load @ load * 1e-3
        with timer.phase("backward"):
            load = load @ load * 1e-3
    finally:
        torch.cuda.set_sync_debug_mode("default")
    load.sum().item()
    seconds = timer.read()
    assert seconds["forward"] > 10 * seconds["backward"] > 0
    assert timer.read() == {}
