"""Timesteps have the set distribution, stratified or not, and weights are those of the paper."""

import math
from statistics import NormalDist

import pytest
import torch

from diffusion.timesteps import TimestepSampling, share_out
from schedulers import alphas_cumprod, make_scheduler


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + number) for number in range(count)]


def share(timesteps: torch.Tensor, low: int, high: int) -> float:
    return ((timesteps >= low) & (timesteps < high)).float().mean().item()


def test_timesteps_are_uniform_over_the_full_schedule_by_default():
    timesteps = TimestepSampling().draw(generators(20_000), 1000)
    assert timesteps.dtype == torch.int64
    assert (timesteps.min(), timesteps.max()) == (0, 999)
    assert all(share(timesteps, low, low + 100) == pytest.approx(0.1, abs=0.01) for low in range(0, 1000, 100))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 0.5)])
def test_logit_normal_timesteps_have_a_normal_logit(mean, std):
    timesteps = TimestepSampling("logit_normal", mean, std).draw(generators(20_000), 1000)
    for low, high in ((0, 250), (250, 500), (500, 750), (750, 1000)):
        edges = [math.inf if t in (0, 1000) else math.log(t / (1000 - t)) for t in (low, high)]
        below = [NormalDist(mean, std).cdf(-edges[0] if low == 0 else edges[0]), NormalDist(mean, std).cdf(edges[1])]
        assert share(timesteps, low, high) == pytest.approx(below[1] - below[0], abs=0.015)


def test_the_timesteps_of_a_step_are_spread_evenly_over_all_ranks():
    parts = torch.cat([share_out(seed=3, step=5, rank=rank, num_ranks=2, samples_per_rank=4) for rank in (0, 1)])
    timesteps = TimestepSampling().draw(generators(8), 1000, parts)
    assert sorted(timestep // 125 for timestep in timesteps.tolist()) == list(range(8))


def test_over_many_steps_each_sample_has_the_full_distribution():
    drawn = []
    for step in range(2000):
        part = share_out(seed=0, step=step, rank=1, num_ranks=2, samples_per_rank=2)[:1]
        drawn.append(TimestepSampling().draw(generators(1, seed=step), 1000, part))
    assert all(share(torch.cat(drawn), low, low + 250) == pytest.approx(0.25, abs=0.04) for low in range(0, 1000, 250))


@pytest.mark.parametrize("snr_shift_scale", [1.0, 3.0])
def test_min_snr_weights_are_the_papers_on_the_error_of_the_velocity(snr_shift_scale):
    timesteps = torch.tensor([0, 10, 300, 700, 998, 999])
    weights = TimestepSampling(snr_gamma=5.0).weights(timesteps, make_scheduler(snr_shift_scale))
    for timestep, weight in zip(timesteps.tolist(), weights.tolist(), strict=True):
        ac = alphas_cumprod(snr_shift_scale)[timestep]
        # |z0_hat - z0|^2 = (1 - ac) |v_hat - v|^2
        assert weight == pytest.approx(min(ac / (1 - ac), 5.0) * (1 - ac), rel=1e-3, abs=1e-7)


def test_weights_are_equal_by_default():
    assert TimestepSampling().weights(torch.tensor([0, 999]), make_scheduler(1.0)).tolist() == [1, 1]
