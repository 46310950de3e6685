"""The distribution of training timesteps, and the weights of their losses."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.training_utils import compute_snr

from diffusion.latents import sample_uniform
from diffusion.randomness import step_generator
from models.source import NoiseScheduler


@dataclass(frozen=True)
class TimestepSampling:
    """The distribution of timesteps. The defaults are as published: uniform, with equal weights."""

    distribution: str = "uniform"  # or logit_normal
    logit_mean: float = 0.0  # of logit_normal; higher means noisier
    logit_std: float = 1.0
    snr_gamma: float | None = None  # of min-SNR weights; None for equal weights

    def draw(
        self, generators: Sequence[torch.Generator], num_timesteps: int, parts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Draw a timestep below `num_timesteps` from each generator. Returns `[B]`, int64, on their device.

        Args:
            parts: `[B, 2]`, the part of the distribution for each sample, and the number of equally likely parts, as
                from `share_out`; None for the full distribution.

        Source: logit-normal, https://arxiv.org/abs/2403.03206, section 3.1.
        """
        quantiles = sample_uniform(generators)
        if parts is not None:
            part, num_parts = parts.to(quantiles, non_blocking=True).unbind(dim=1)
            quantiles = (part + quantiles) / num_parts
        if self.distribution == "logit_normal":
            quantiles = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(quantiles))
        return (quantiles * num_timesteps).long().clamp(max=num_timesteps - 1)

    def weights(self, timesteps: torch.Tensor, scheduler: NoiseScheduler) -> torch.Tensor:
        """Return the weights `[B]` of the velocity's loss at each timestep, float32.

        Source: min-SNR, https://arxiv.org/abs/2303.09556: min(SNR, gamma) on the error of the latents, which is
        min(SNR, gamma) / (SNR + 1) on the error of the velocity.
        """
        if self.snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        snr = compute_snr(scheduler, timesteps)
        return snr.clamp(max=self.snr_gamma) / (snr + 1)


def share_out(seed: int, step: int, rank: int, num_ranks: int, samples_per_rank: int) -> torch.Tensor:
    """Assign a different part of the timesteps' distribution to each sample of a step.

    The assignment is random at each step, so each sample sees the full distribution over many steps, while the
    timesteps of one step are spread evenly. If a rank has fewer than `samples_per_rank` samples, random parts are
    unused. Returns `[samples_per_rank, 2]`: this rank's parts, and the number of parts.
    """
    num_parts = num_ranks * samples_per_rank
    order = torch.randperm(num_parts, generator=step_generator(torch.device("cpu"), seed, "parts", step))
    mine = order[rank * samples_per_rank : (rank + 1) * samples_per_rank]
    return torch.stack([mine, torch.full_like(mine, num_parts)], dim=1)
