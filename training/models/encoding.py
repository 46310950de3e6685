"""Encode prompts to embeddings, videos and given frames to latent moments, as the pipelines do."""

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline

from common.errors import UserError


@torch.no_grad()
def encode_prompts(pipeline: CogVideoXPipeline, prompts: list[str], max_sequence_length: int = 226) -> torch.Tensor:
    """Embed B prompts exactly as sampling does, each cut after `max_sequence_length` tokens.

    Returns:
        `[B, max_sequence_length, D]`, in the text encoder's dtype and on its device.
    """
    prompt_embeds, _ = pipeline.encode_prompt(
        prompts,
        do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
        device=pipeline.text_encoder.device,
        dtype=pipeline.text_encoder.dtype,
    )
    return prompt_embeds


@torch.no_grad()
def encode_videos(vae: AutoencoderKLCogVideoX, videos: torch.Tensor) -> torch.Tensor:
    """Encode videos to the moments of the VAE's posterior.

    Args:
        videos: `[B, F, 3, H, W]`, uint8 on any device; F = 4k or 4k + 1.

    Returns:
        `[B, 2C, F', H / 8, W / 8]`: mean and log-variance on the channel axis, unscaled, in the VAE's dtype.
    """
    # Without a name here, the pixels in float32 are freed before the encoder runs.
    return _encode_pixels(vae, videos.to(vae.device).permute(0, 2, 1, 3, 4).to(torch.float32).div_(127.5).sub_(1.0))


@torch.no_grad()
def encode_noised_images(
    vae: AutoencoderKLCogVideoX, images: torch.Tensor, scales: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Encode the given frames of a video with noise of several strengths to the moments of the VAE's posterior.

    Args:
        images: `[N, 3, H, W]`, uint8 on any device; 1 and 2 are encoded as images, 4k + 1 together as a video.
        scales: `[K]`, the noise's standard deviations, for pixels in [-1, 1].
        generator: of the noise; one on the CPU draws the same noise for every device.

    Returns:
        `[K, 2C, F', H / 8, W / 8]`, as from `encode_videos`.
    """
    pixels = images.to(generator.device, torch.float32).div(127.5).sub(1.0)
    noise = torch.randn(len(scales), *images.shape, generator=generator, device=generator.device)
    noised = (pixels + scales.view(-1, 1, 1, 1, 1) * noise).transpose(1, 2)  # [K, 3, N, H, W]
    videos = noised.split(1, dim=2) if len(images) == 2 else [noised]

    def encode(video: torch.Tensor) -> torch.Tensor:
        return torch.cat([_encode_pixels(vae, one[None].to(vae.device)) for one in video])

    return torch.cat(list(map(encode, videos)), dim=2)


def encode_mask(frames: torch.Tensor) -> torch.Tensor:
    """Average a mask over the pixels of each latent, in time as the VAE groups frames: 4k + 1 are 1, 4, 4, ...

    Args:
        frames: `[F, 3, H, W]`, uint8; F = 4k or 4k + 1.

    Returns:
        `[F', H / 8, W / 8]`, float16, in [0, 1]; exactly 1 where all pixels are white.
    """
    mask = torch.nn.functional.avg_pool2d(frames.float().mean(dim=1, keepdim=True) / 255, 8)[:, 0]
    first, groups = mask[: len(mask) % 4], mask[len(mask) % 4 :]
    return torch.cat([first, groups.reshape(-1, 4, *mask.shape[1:]).mean(dim=1)]).half()


def _encode_pixels(vae: AutoencoderKLCogVideoX, pixels: torch.Tensor) -> torch.Tensor:
    """`[B, 3, F, H, W]` in [-1, 1] -> moments."""
    height, width = pixels.shape[-2:]
    if vae.use_tiling and (height > vae.tile_sample_min_height or width > vae.tile_sample_min_width):
        down = int(vae.tile_sample_min_height * (1 - vae.tile_overlap_factor_height))
        right = int(vae.tile_sample_min_width * (1 - vae.tile_overlap_factor_width))
        if down % 8 or right % 8:  # a fraction of a latent: the tiles would be displaced
            raise UserError(
                f"--use_tiling, --enable_tiling: the tiles of this model's VAE are {down}x{right} pixels apart, "
                "which is not a multiple of 8; omit the flag"
            )
    # The CPU's 3D convolutions are several times faster in this layout.
    layout = torch.channels_last_3d if vae.device.type == "cpu" else torch.contiguous_format
    pixels = pixels.to(vae.dtype, memory_format=layout)
    return vae.encode(pixels).latent_dist.parameters
