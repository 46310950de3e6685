"""What a task adds to the training loop: which pipeline samples it, and what the transformer sees."""

from typing import Any

import torch
from diffusers import CogVideoXPipeline

from dataset import Batch
from errors import UserError
from models import ModelConfigs


class TextToVideo:
    """Videos from text alone: the transformer sees the noisy video latents as they are."""

    pipeline_class = CogVideoXPipeline

    def check_model(self, configs: ModelConfigs) -> None:
        """Refuse a model that another task needs.

        Raises:
            UserError: the transformer wants image latents beside the video's.
        """
        in_channels, latent_channels = configs.transformer["in_channels"], configs.vae["latent_channels"]
        if in_channels != latent_channels:
            raise UserError(
                f"--pretrained_model_name_or_path: this is an image-to-video model (its transformer takes "
                f"{in_channels} channels, video latents have {latent_channels}); give a text-to-video model such as "
                "THUDM/CogVideoX-5b"
            )

    def transformer_inputs(self, noisy_latents: torch.Tensor, batch: Batch) -> dict[str, Any]:
        """What the transformer takes beside text, timesteps and positions.

        Args:
            noisy_latents: `[B, F, C, H, W]`.
            batch: what else is known of the samples.
        """
        return {"hidden_states": noisy_latents}
