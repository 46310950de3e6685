"""The training loss of a batch: encode what is not encoded yet, add noise, predict the velocity, compare."""

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

from dataset import Batch
from diffusion import (
    pad_latent_frames,
    rotary_embeddings,
    sample_latents,
    sample_noise,
    sample_timesteps,
    velocity_loss,
)
from models import ModelConfigs, NoiseScheduler, encode_videos
from tasks import ImageToVideo, TextToVideo


class Objective:
    """CogVideoX's training objective on batches of any size.

    Args:
        task: adds what it conditions on.
        model: what to call: the transformer, or what accelerate wrapped it in.
        transformer: the module inside, for its config.
        scheduler: the model's own noise schedule.
        configs: of the model.
        vae: encodes raw clips; None when all batches are prepared.
        dtype: of the transformer's inputs.
    """

    def __init__(
        self,
        task: TextToVideo | ImageToVideo,
        model: torch.nn.Module,
        transformer: CogVideoXTransformer3DModel,
        scheduler: NoiseScheduler,
        configs: ModelConfigs,
        vae: AutoencoderKLCogVideoX | None,
        dtype: torch.dtype,
    ):
        self.task = task
        self.model = model
        self.transformer = transformer
        self.scheduler = scheduler
        self.configs = configs
        self.vae = vae
        self.dtype = dtype
        self.rotary_cache: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor] | None] = {}

    def __call__(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """Return the mean loss over the batch, a float32 scalar.

        Args:
            batch: on the device.
            generator: of everything random here.
        """
        moments = batch.video_moments if self.vae is None else encode_videos(self.vae, batch.videos)
        latents = sample_latents(moments, self.configs.vae["scaling_factor"], generator)
        latents = pad_latent_frames(latents, self.transformer.config.patch_size_t)
        noise = sample_noise(latents, generator)
        timesteps = sample_timesteps(len(latents), self.scheduler.config.num_train_timesteps, generator)
        noisy_latents = self.scheduler.add_noise(latents, noise, timesteps)
        inputs = self.task.transformer_inputs(noisy_latents, batch, self.configs, self.vae, generator)
        velocity = self.model(
            **{name: tensor.to(self.dtype) for name, tensor in inputs.items()},
            encoder_hidden_states=batch.prompt_embeds.to(self.dtype),
            timestep=timesteps,
            image_rotary_emb=self._rotary_embeddings(latents),
            return_dict=False,
        )[0]
        return velocity_loss(velocity, self.scheduler.get_velocity(latents, noise, timesteps))

    def _rotary_embeddings(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        _, frames, _, height, width = latents.shape
        size = (frames, height * 8, width * 8)
        if size not in self.rotary_cache:
            self.rotary_cache[size] = rotary_embeddings(self.transformer, *size, latents.device)
        return self.rotary_cache[size]
