"""Which timesteps a run is trained on, and how much each of them counts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.training_utils import compute_snr

from diffusion.latents import sample_uniform
from diffusion.randomness import step_generator
from models.source import NoiseScheduler


@dataclass(frozen=True)
class TimestepSampling:
    """The distribution of timesteps. The defaults are as published: uniform, and all of equal weight.

    Raises:
        ValueError: there is no such distribution.
    """

    distribution: str = "uniform"  # or logit_normal
    logit_mean: float = 0.0  # of logit_normal; higher means noisier
    logit_std: float = 1.0
    snr_gamma: float | None = None  # of min-SNR weights; None for equal ones

    def __post_init__(self):
        if self.distribution not in ("uniform", "logit_normal"):
            raise ValueError(f"there is no timestep distribution {self.distribution!r}")

    def draw(
        self, generators: Sequence[torch.Generator], num_timesteps: int, parts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Draw a timestep for each sample.

        Args:
            generators: one for each sample.
            num_timesteps: of the noise schedule.
            parts: `[B, 2]`, which part each sample takes of how many equally likely ones, as from `share_out`; None
                for all of the distribution.

        Returns:
            `[B]`, int64, in `0..num_timesteps - 1`, on the generators' device.

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
        """How much the loss of the velocity counts at each timestep. Returns `[B]`, float32.

        Source: min-SNR, https://arxiv.org/abs/2303.09556: min(SNR, gamma) on the error of the latents, which is
        min(SNR, gamma) / (SNR + 1) on the error of the velocity.
        """
        if self.snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        snr = compute_snr(scheduler, timesteps)
        return snr.clamp(max=self.snr_gamma) / (snr + 1)


def share_out(seed: int, step: int, rank: int, num_ranks: int, samples_per_rank: int) -> torch.Tensor:
    """Give each sample of a step a part of its own of the timesteps' distribution.

    Which sample gets which is drawn anew for each step, so that the timesteps of any one sample have the whole
    distribution; those of a step lie evenly.

    Args:
        samples_per_rank: the most that a rank can have in a step; where it has fewer, parts are left out at random.

    Returns:
        `[samples_per_rank, 2]`: this rank's parts, and how many there are.
    """
    num_parts = num_ranks * samples_per_rank
    order = torch.randperm(num_parts, generator=step_generator(torch.device("cpu"), seed, "parts", step))
    mine = order[rank * samples_per_rank : (rank + 1) * samples_per_rank]
    return torch.stack([mine, torch.full_like(mine, num_parts)], dim=1)
