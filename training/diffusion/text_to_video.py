"""The task text-to-video: the transformer sees only the noisy video latents."""

from collections.abc import Iterable, Sequence
from types import MappingProxyType

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel

from common.errors import UserError
from data.buckets import Bucket
from dataset import Batch
from diffusion.task import TRAINING_SIZES, SizeFlags, check_learned_positions, check_sizes, other_task_message
from models.configs import ModelConfigs


class TextToVideo:
    """Videos from text: the transformer sees only the noisy video latents."""

    name = "text-to-video"
    pipeline_class = CogVideoXPipeline
    condition = None
    scheduler_class = None
    settings = MappingProxyType({})

    def model_configs(self, configs: ModelConfigs) -> ModelConfigs:
        """Return the configs of the model; this task changes none."""
        return configs

    def check_model(self, configs: ModelConfigs, sizes: Iterable[Bucket], flags: SizeFlags = TRAINING_SIZES) -> None:
        """Refuse a model of another task, and sizes of clips and of videos to sample that the model cannot sample."""
        if configs.takes_condition:
            fact = "this is a control model" if configs.is_control else "this is an image-to-video model"
            raise UserError(other_task_message(configs, fact, "a text-to-video", "5b"))
        check_sizes(configs, sizes, flags)
        check_learned_positions(configs, sizes)

    def prepare_model(self, transformer: CogVideoXTransformer3DModel) -> None:
        """Change the transformer before training; this task changes nothing."""

    def transformer_inputs(
        self,
        noisy_latents: torch.Tensor,
        batch: Batch,
        configs: ModelConfigs,
        vae: AutoencoderKLCogVideoX | None,
        generators: Sequence[torch.Generator],
        *,
        drop_images: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Return the transformer's inputs besides text, timesteps and positions; see `Task`."""
        return {"hidden_states": noisy_latents}

    def usage(self) -> list[str]:
        """Return the lines of code that a user of the result needs after loading the pipeline."""
        return []
