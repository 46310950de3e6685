"""Sample one video, for validation and for the finished model."""

import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from PIL import Image

from data.buckets import Bucket


Pipeline = CogVideoXPipeline | CogVideoXImageToVideoPipeline


def sample_video(
    pipeline: Pipeline,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor | None,
    image: Image.Image | None,
    *,
    size: Bucket,
    num_inference_steps: int,
    guidance_scale: float,
    use_dynamic_cfg: bool,
    seed: int,
) -> list[Image.Image]:
    """Sample a video of `size`, which may have 4k frames too, from embedded prompts.

    Args:
        pipeline: set up on its device; it needs no text encoder.
        prompt_embeds: `[T, D]`, on any device. The pipeline draws its noise in their dtype.
        negative_prompt_embeds: `[T, D]`; None if `guidance_scale` is 1 or less.
        image: the first frame; None for text-to-video.
        seed: of a generator on the pipeline's device.
    """
    device, num_frames = pipeline._execution_device, size.num_frames
    negative = None if negative_prompt_embeds is None else negative_prompt_embeds[None].to(device)
    frames = pipeline(
        **({} if image is None else {"image": image}),
        prompt_embeds=prompt_embeds[None].to(device),
        negative_prompt_embeds=negative,
        height=size.height,
        width=size.width,
        # The VAE decodes 4, 12, 20, ... frames to three fewer.
        num_frames=num_frames + 1 if num_frames % 8 == 4 else num_frames,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        use_dynamic_cfg=use_dynamic_cfg,
        generator=torch.Generator(device).manual_seed(seed),
        output_type="pil",
    ).frames[0]
    # The first of an even number of latent frames is decoded to four frames, but holds one frame of a 4k+1 clip.
    surplus = len(frames) - num_frames
    return frames[min(surplus, 3) :][:num_frames]
