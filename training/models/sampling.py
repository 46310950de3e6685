"""Sample one video, for validation and for the finished model, perhaps with a cache over the denoising steps."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import (
    CogVideoXFunControlPipeline,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
)
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
        condition: the first frame, or given frames as for `ConditionFramesPipeline`; or the frames of the control,
            which are as many and as large as those of the video; None for text-to-video.
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


@contextmanager
def cached(pipeline: Pipeline, kind: str, *, is_guided: bool) -> Iterator[None]:
    """Have the transformer reuse results of earlier denoising steps within the block; the pipeline forgets them
    after each video. Afterwards the transformer is as before.

    Args:
        kind: "first-block", "pab", "faster", or "none", which changes nothing.
        is_guided: each call of the transformer computes a sample without the prompt and one with it.
    """
    if kind == "none":
        yield
        return
    transformer = pipeline.transformer
    forwards = {module: vars(module).get("forward") for module in transformer.modules()}
    try:
        transformer.enable_cache(_cache_config(pipeline, kind, is_guided))
        yield
    finally:
        if transformer.is_cache_enabled:
            transformer.disable_cache()
        # The library leaves its registries, and a forward pass of each module that it wrapped: compiled blocks and
        # checkpoints would see other modules than before.
        for module, forward in forwards.items():
            vars(module).pop("_diffusers_hook", None)
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def _cache_config(
    pipeline: Pipeline, kind: str, is_guided: bool
) -> FirstBlockCacheConfig | PyramidAttentionBroadcastConfig | FasterCacheConfig:
    """Return the library's own settings; for FasterCache, those of its example for CogVideoX."""
    if kind == "first-block":
        return FirstBlockCacheConfig()
    timestep = {"current_timestep_callback": lambda: pipeline.current_timestep}
    if kind == "pab":
        return PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, **timestep)
    logging.getLogger("diffusers.hooks.faster_cache").setLevel(logging.ERROR)  # it warns of itself at each use
    return FasterCacheConfig(
        low_frequency_weight_update_timestep_range=(99, 641),
        attention_weight_callback=lambda _: 0.3,
        tensor_format="BFCHW",
        is_guidance_distilled=not is_guided,  # there is no sample without the prompt to skip
        **timestep,
    )
