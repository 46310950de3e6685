"""The rotary positions of a video, as the pipeline computes them."""

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel


def rotary_embeddings(
    transformer: CogVideoXTransformer3DModel, num_latent_frames: int, height: int, width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Compute the pipeline's rotary position embeddings for a video of this size; None for models without them.

    `num_latent_frames` are those after padding, height and width are in pixels. Returns cos and sin, each
    `[tokens, head_dim]`, float32.
    """
    if not transformer.config.use_rotary_positional_embeddings:
        return None
    # The pipeline's method is private, but calling it guarantees the same positions in training and sampling.
    pipeline = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=None)
    return pipeline._prepare_rotary_positional_embeddings(height, width, num_latent_frames, device)
