"""Sample one video, for validation and for the finished model."""

from collections.abc import Sequence

import torch
from diffusers import CogVideoXFunControlPipeline, CogVideoXImageToVideoPipeline, CogVideoXPipeline
from PIL import Image

from data.buckets import Bucket


Pipeline = CogVideoXPipeline | CogVideoXImageToVideoPipeline | CogVideoXFunControlPipeline


def sample_video(
    pipeline: Pipeline,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor | None,
    condition: Image.Image | Sequence[Image.Image] | None,
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
        condition: the first frame, or the frames of the control, which are as many and as large as those of the video;
            None for text-to-video.
        seed: of a generator on the pipeline's device.
    """
    device, num_frames = pipeline._execution_device, size.num_frames
    negative = None if negative_prompt_embeds is None else negative_prompt_embeds[None].to(device)
    # The VAE decodes 4, 12, 20, ... frames to three fewer; there are no such controls.
    options = {"num_frames": num_frames + 1 if num_frames % 8 == 4 else num_frames}
    if isinstance(pipeline, CogVideoXFunControlPipeline):
        options = {"control_video": list(condition)}
    elif condition is not None:
        options["image"] = condition
    frames = pipeline(
        **options,
        prompt_embeds=prompt_embeds[None].to(device),
        negative_prompt_embeds=negative,
        height=size.height,
        width=size.width,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        use_dynamic_cfg=use_dynamic_cfg,
        generator=torch.Generator(device).manual_seed(seed),
        output_type="pil",
    ).frames[0]
    # The first of an even number of latent frames is decoded to four frames, but holds one frame of a 4k+1 clip.
    surplus = len(frames) - num_frames
    return frames[min(surplus, 3) :][:num_frames]
