"""The training objective of a batch: noise its latents, predict the velocity, compare."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from diffusers.utils.torch_utils import randn_tensor

from dataset import Batch, MixedBatch
from diffusion.latents import mask_weights, pad_latent_frames, sample_latents, sample_uniform, velocity_losses
from diffusion.positions import rotary_embeddings
from diffusion.task import Task
from diffusion.timesteps import TimestepSampling
from models.configs import ModelConfigs
from models.encoding import encode_videos
from models.source import NoiseScheduler


_T = TypeVar("_T")


class Noised(NamedTuple):
    """The input of the transformer for samples of one bucket, and what it should predict."""

    inputs: dict[str, torch.Tensor]  # of the task
    prompt_embeds: torch.Tensor  # [B, 226, D]
    rotary: tuple[torch.Tensor, torch.Tensor] | None
    target: torch.Tensor  # velocity, [B, F, C, H, W]
    weights: torch.Tensor | None  # of each position in the loss, [B, F, H, W]; None for equal ones


@dataclass
class Objective:
    """CogVideoX's training objective on batches of any size; the defaults are as published."""

    task: Task  # adds the conditioning
    model: torch.nn.Module  # the transformer as wrapped by accelerate, to call
    transformer: CogVideoXTransformer3DModel  # the module inside, for its config
    scheduler: NoiseScheduler  # the model's own noise schedule
    configs: ModelConfigs
    vae: AutoencoderKLCogVideoX | None  # encodes raw clips; None if all batches are prepared
    dtype: torch.dtype  # of the transformer's inputs
    timesteps: TimestepSampling = field(default_factory=TimestepSampling)
    # Probability that a sample is trained with the empty prompt: of all, or `[N]`, by the index of its draw.
    caption_dropout: float | torch.Tensor = 0.0
    empty_prompt: torch.Tensor | None = None  # [226, D], its embedding; needed for caption dropout
    mask_background: float = 1.0  # weight of black in the batches' masks, relative to white
    _rotary_cache: dict = field(default_factory=dict, init=False, repr=False)

    def __call__(
        self, batch: Batch | MixedBatch, generators: Sequence[torch.Generator], parts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the weighted losses `[B]` of the samples at random timesteps, float32.

        The batch and a generator for each sample are on the device; `parts` are as in `TimestepSampling.draw`.
        """
        timesteps = self.timesteps.draw(generators, self.scheduler.config.num_train_timesteps, parts)
        losses = self.losses(batch, timesteps, generators, drops_conditions=True)
        return losses * self.timesteps.weights(timesteps, self.scheduler)

    def losses(
        self,
        batch: Batch | MixedBatch,
        timesteps: torch.Tensor,
        generators: Sequence[torch.Generator],
        *,
        drops_conditions: bool = False,
    ) -> torch.Tensor:
        """Return the losses `[B]` of the samples at given timesteps (`[B]`, int64), float32.

        The arguments are on the device; with `drops_conditions`, captions and images of some samples are dropped.
        """
        noised = [
            self._noise(part, times, of_part, drops_conditions=drops_conditions)
            for part, times, of_part in _by_part(batch, timesteps, generators)
        ]
        predicted = zip(self._predict(noised, timesteps), noised, strict=True)
        return torch.cat([velocity_losses(velocity, part.target, part.weights) for velocity, part in predicted])

    def _noise(
        self,
        batch: Batch,
        timesteps: torch.Tensor,
        generators: Sequence[torch.Generator],
        *,
        drops_conditions: bool,
    ) -> Noised:
        embeds = batch.prompt_embeds
        if self.empty_prompt is not None and drops_conditions:
            chance = self.caption_dropout
            if isinstance(chance, torch.Tensor):
                chance = chance[[draw.index for draw in batch.draws]].to(embeds.device, non_blocking=True)
            is_dropped = sample_uniform(generators) < chance
            embeds = torch.where(is_dropped[:, None, None], self.empty_prompt, embeds)
        moments = batch.video_moments
        if moments is None:
            moments = encode_videos(self.vae, batch.videos)
        latents = sample_latents(moments, self.configs.vae["scaling_factor"], generators)
        latents = pad_latent_frames(latents, self.transformer.config.patch_size_t)
        noise = randn_tensor(latents.shape, generator=list(generators), device=latents.device)
        noisy_latents = self.scheduler.add_noise(latents, noise, timesteps)
        inputs = self.task.transformer_inputs(
            noisy_latents, batch, self.configs, self.vae, generators, drop_images=drops_conditions
        )
        inputs = {name: tensor.to(self.dtype) for name, tensor in inputs.items()}
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        weights = None
        if batch.masks is not None:
            masks = pad_latent_frames(batch.masks, self.transformer.config.patch_size_t)
            weights = mask_weights(masks, self.mask_background)
        return Noised(inputs, embeds.to(self.dtype), self._rotary_embeddings(latents), target, weights)

    def _predict(self, noised: Sequence[Noised], timesteps: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the predicted velocities `[B, F, C, H, W]` of each bucket, from one pass over all samples."""
        if len(noised) == 1:
            yield self.model(
                **noised[0].inputs,
                encoder_hidden_states=noised[0].prompt_embeds,
                timestep=timesteps,
                image_rotary_emb=noised[0].rotary,
                return_dict=False,
            )[0]
            return
        sizes = [len(part.target) for part in noised]
        others = {name: value for name, value in noised[0].inputs.items() if name != "hidden_states"}
        velocities = self.model(
            hidden_states=[sample for part in noised for sample in part.inputs["hidden_states"].split(1)],
            **others,
            encoder_hidden_states=torch.cat([part.prompt_embeds for part in noised]),
            timestep=timesteps,
            image_rotary_emb=[part.rotary for part, size in zip(noised, sizes, strict=True) for _ in range(size)],
        )
        yield from map(torch.cat, _split(velocities, sizes))

    def _rotary_embeddings(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        _, frames, _, height, width = latents.shape
        size = (frames, height * 8, width * 8)
        if size not in self._rotary_cache:
            self._rotary_cache[size] = rotary_embeddings(self.transformer, *size, latents.device)
        return self._rotary_cache[size]


def _by_part(
    batch: Batch | MixedBatch, timesteps: torch.Tensor, generators: Sequence[torch.Generator]
) -> Iterator[tuple[Batch, torch.Tensor, Sequence[torch.Generator]]]:
    """Yield each part of a batch with its samples' timesteps and generators."""
    sizes = [len(part.names) for part in batch.parts]
    yield from zip(batch.parts, timesteps.split(sizes), _split(generators, sizes), strict=True)


def _split(items: Sequence[_T], sizes: Sequence[int]) -> Iterator[Sequence[_T]]:
    """Yield so many items after one another."""
    start = 0
    for size in sizes:
        yield items[start : start + size]
        start += size
