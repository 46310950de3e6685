"""The training objective of a batch: noise its latents, predict the velocity, compare."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from diffusers.utils.torch_utils import randn_tensor

from dataset import Batch
from diffusion.latents import pad_latent_frames, sample_latents, sample_uniform, velocity_losses
from diffusion.positions import rotary_embeddings
from diffusion.tasks import ImageToVideo, TextToVideo
from diffusion.timesteps import TimestepSampling
from models.configs import ModelConfigs
from models.encoding import encode_videos
from models.source import NoiseScheduler


@dataclass
class Objective:
    """CogVideoX's training objective on batches of any size; the defaults are as published."""

    task: TextToVideo | ImageToVideo  # adds the conditioning
    model: torch.nn.Module  # the transformer as wrapped by accelerate, to call
    transformer: CogVideoXTransformer3DModel  # the module inside, for its config
    scheduler: NoiseScheduler  # the model's own noise schedule
    configs: ModelConfigs
    vae: AutoencoderKLCogVideoX | None  # encodes raw clips; None if all batches are prepared
    dtype: torch.dtype  # of the transformer's inputs
    timesteps: TimestepSampling = field(default_factory=TimestepSampling)
    caption_dropout: float = 0.0  # probability that a sample is trained with the empty prompt
    empty_prompt: torch.Tensor | None = None  # [226, D], its embedding; needed for caption dropout
    _rotary_cache: dict = field(default_factory=dict, init=False, repr=False)

    def __call__(
        self, batch: Batch, generators: Sequence[torch.Generator], parts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the weighted losses `[B]` of the samples at random timesteps, float32.

        The batch and a generator for each sample are on the device; `parts` are as in `TimestepSampling.draw`.
        """
        timesteps = self.timesteps.draw(generators, self.scheduler.config.num_train_timesteps, parts)
        if self.caption_dropout:
            is_dropped = sample_uniform(generators) < self.caption_dropout
            embeds = torch.where(is_dropped[:, None, None], self.empty_prompt, batch.prompt_embeds)
            batch = replace(batch, prompt_embeds=embeds)
        losses = self.losses(batch, timesteps, generators, drop_images=True)
        return losses * self.timesteps.weights(timesteps, self.scheduler)

    def losses(
        self,
        batch: Batch,
        timesteps: torch.Tensor,
        generators: Sequence[torch.Generator],
        *,
        drop_images: bool = False,
    ) -> torch.Tensor:
        """Return the losses `[B]` of the samples at given timesteps (`[B]`, int64), float32, without caption dropout.

        The arguments are on the device; `drop_images` drops the image of some samples, as set in the task.
        """
        moments = batch.video_moments
        if moments is None:
            moments = encode_videos(self.vae, batch.videos)
        latents = sample_latents(moments, self.configs.vae["scaling_factor"], generators)
        latents = pad_latent_frames(latents, self.transformer.config.patch_size_t)
        noise = randn_tensor(latents.shape, generator=list(generators), device=latents.device)
        noisy_latents = self.scheduler.add_noise(latents, noise, timesteps)
        inputs = self.task.transformer_inputs(
            noisy_latents, batch, self.configs, self.vae, generators, drop_images=drop_images
        )
        velocity = self.model(
            **{name: tensor.to(self.dtype) for name, tensor in inputs.items()},
            encoder_hidden_states=batch.prompt_embeds.to(self.dtype),
            timestep=timesteps,
            image_rotary_emb=self._rotary_embeddings(latents),
            return_dict=False,
        )[0]
        return velocity_losses(velocity, self.scheduler.get_velocity(latents, noise, timesteps))

    def _rotary_embeddings(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        _, frames, _, height, width = latents.shape
        size = (frames, height * 8, width * 8)
        if size not in self._rotary_cache:
            self._rotary_cache[size] = rotary_embeddings(self.transformer, *size, latents.device)
        return self._rotary_cache[size]
