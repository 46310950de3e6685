"""Tensor functions of the training objective: latents, noise, velocity, positions."""

from collections.abc import Sequence

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


def sample_latents(
    moments: torch.Tensor, scaling_factor: float, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Draw scaled latents `[B, F, C, H, W]`, float32, in the transformer's layout, from the VAE's posterior.

    Args:
        moments: `[B, 2C, F, H, W]`, mean and log-variance on the channel axis.
        scaling_factor: of the VAE; scales the latents to about unit variance.
        generators: B generators on the device of `moments`.

    Source: the inverse of `CogVideoXPipeline.decode_latents`.
    """
    latents = DiagonalGaussianDistribution(moments.float()).sample(list(generators)) * scaling_factor
    return latents.permute(0, 2, 1, 3, 4)


def image_noise_scales(num_scales: int, generator: torch.Generator) -> torch.Tensor:
    """Draw the noise strength on the first frame before it conditions an image-to-video model.

    `log(scale) ~ N(-3, 0.5)`, relative to pixels in [-1, 1]. One scale is drawn from each of `num_scales` equally
    likely parts of the distribution, so that a few scales cover it. Returns `[num_scales]`, float32, increasing, on
    the generator's device; a single scale has exactly the published distribution.

    Source: CogVideoX, https://arxiv.org/abs/2408.06072, section on image-to-video.
    """
    parts = torch.arange(num_scales, device=generator.device)
    quantiles = (parts + torch.rand(num_scales, generator=generator, device=generator.device)) / num_scales
    # The ends of the distribution are at infinity.
    return torch.exp(-3.0 + 0.5 * torch.special.ndtri(quantiles.clamp(1e-6, 1 - 1e-6)))


def pad_latent_frames(latents: torch.Tensor, patch_size_t: int | None) -> torch.Tensor:
    """Repeat the first frame of `[B, F, C, H, W]` until F divides by `patch_size_t` (None except in CogVideoX 1.5).

    Source: `CogVideoXPipeline.__call__` samples as many extra frames in front and discards them before decoding.
    """
    missing = -latents.shape[1] % (patch_size_t or 1)
    return torch.cat([latents[:, :1]] * missing + [latents], dim=1) if missing else latents


def sample_uniform(generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Draw a number in [0, 1) from each generator. Returns `[B]`, float64, on their device."""
    return torch.cat([torch.rand(1, generator=g, device=g.device, dtype=torch.float64) for g in generators])


def mask_weights(masks: torch.Tensor, background: float) -> torch.Tensor:
    """Return the weight of each latent position, float32, with the mean 1 over a sample's.

    White has the weight 1 and black `background`, before each sample's weights are divided by their mean. A sample
    whose weights are all 0 keeps them.

    Args:
        masks: `[B, F, H, W]` in [0, 1].
    """
    weights = masks.float() + background * (1 - masks.float())
    return weights / weights.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-9)


def velocity_losses(velocity: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error of each sample's predicted velocity `[B, F, C, H, W]`, in float32. Returns `[B]`.

    With `weights`, `[B, F, H, W]`, each position's squared error is multiplied by its weight.

    With `z0_hat = sqrt(ac) zt - sqrt(1 - ac) v`, CogVideoX's published loss `mean((z0_hat - z0)^2) / (1 - ac)` is in
    exact arithmetic `mean((v - v_target)^2)` with `v_target = sqrt(ac) noise - sqrt(1 - ac) z0`, which
    `scheduler.get_velocity` returns. This form needs no division, which loses digits as ac nears 1.

    Source: v-prediction, https://arxiv.org/abs/2202.00512; the loss of CogVideoX, https://arxiv.org/abs/2408.06072.
    """
    errors = torch.nn.functional.mse_loss(velocity.float(), target.float(), reduction="none")
    return (errors if weights is None else errors * weights[:, :, None]).mean(dim=(1, 2, 3, 4))
