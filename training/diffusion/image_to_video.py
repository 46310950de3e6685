"""The task image-to-video: the transformer also sees the latents of a first frame, or of more frames."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXImageToVideoPipeline, CogVideoXTransformer3DModel

from common.errors import UserError
from data.buckets import Bucket
from dataset import Batch
from diffusion.latents import image_noise_scales, sample_latents, sample_uniform
from diffusion.task import TRAINING_SIZES, SizeFlags, check_learned_positions, check_sizes, other_task_message
from models.condition_pipeline import ConditionFramesPipeline
from models.configs import ModelConfigs
from models.encoding import encode_noised_images
from video.condition_frames import ENDS, FIRST, fewest_frames, is_context


@dataclass(frozen=True)
class ImageToVideo:
    """Videos made from given frames, whose latents are concatenated to the noisy ones, as in the pipeline."""

    noised_image_dropout: float  # probability that a sample is trained without its image
    ignore_learned_positions: bool  # drop those of CogVideoX-5b-I2V, which fit only its native size
    condition_frames: str = FIRST  # the given frames, as in `video.condition_frames`

    name = "image-to-video"
    condition = "image"

    @property
    def pipeline_class(self) -> type[CogVideoXImageToVideoPipeline]:
        """The library's pipeline, which takes a first frame, or ours for other frames."""
        return CogVideoXImageToVideoPipeline if self.condition_frames == FIRST else ConditionFramesPipeline

    scheduler_class = None

    @property
    def settings(self) -> dict[str, object]:
        """Settings by flag that a resumed run must share with its checkpoint."""
        frames = self.condition_frames != FIRST and self.condition_frames  # off in older checkpoints
        return {"--ignore_learned_positional_embeddings": self.ignore_learned_positions, "--condition_frames": frames}

    def model_configs(self, configs: ModelConfigs) -> ModelConfigs:
        """Return the configs of the model; this task changes none."""
        return configs

    def check_model(self, configs: ModelConfigs, sizes: Iterable[Bucket], flags: SizeFlags = TRAINING_SIZES) -> None:
        """Refuse a model of another task, and sizes that it cannot sample or has no learned positions for."""
        if not configs.is_image_to_video:
            fact = "this is a control model" if configs.is_control else "this is a text-to-video model"
            raise UserError(other_task_message(configs, fact, "an image-to-video", "5b-I2V"))
        sizes, fewest = list(sizes), fewest_frames(self.condition_frames)
        check_sizes(configs, sizes, flags)
        if short := sorted({size.num_frames for size in sizes if size.num_frames < fewest}):
            raise UserError(
                f"{flags.frames}: --condition_frames {self.condition_frames} needs videos of {fewest} frames or more, "
                f"not {', '.join(map(str, short))}"
            )
        if self.ignore_learned_positions and not configs.transformer["use_learned_positional_embeddings"]:
            raise UserError(
                "--ignore_learned_positional_embeddings: this model has no learned positions; omit the flag"
            )
        if not self.ignore_learned_positions:
            check_learned_positions(configs, sizes, ", or drop them with --ignore_learned_positional_embeddings")

    def prepare_model(self, transformer: CogVideoXTransformer3DModel) -> None:
        """Drop the learned positions, if asked to, from the transformer and the config that is saved."""
        if self.ignore_learned_positions and transformer.config.use_learned_positional_embeddings:
            del transformer.patch_embed.pos_embedding
            transformer.patch_embed.use_learned_positional_embeddings = False
            transformer.register_to_config(use_learned_positional_embeddings=False)

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
        """Return the transformer's inputs besides text, timesteps and positions; see `Task`.

        Source: `CogVideoXImageToVideoPipeline.prepare_latents` and `__call__`: the image's latents in the first latent
        frame, zeros in all others, including the padded ones of CogVideoX 1.5. A last frame is in the last latent
        frame; the beginning of a video is padded as the video is.
        """
        moments = batch.image_moments
        if moments is None:
            moments = torch.cat(
                [
                    encode_noised_images(vae, images, image_noise_scales(1, generator), generator)
                    for images, generator in zip(batch.images, generators, strict=True)
                ]
            )
        latents = sample_latents(moments, configs.image_scaling_factor, generators)
        if drop_images:
            is_kept = sample_uniform(generators) >= self.noised_image_dropout
            latents = latents * is_kept.view(-1, 1, 1, 1, 1)
        condition = torch.zeros_like(noisy_latents)
        if self.condition_frames == ENDS:
            condition[:, [0, -1]] = latents
        else:
            if is_context(self.condition_frames):
                padding = condition.shape[1] - batch.bucket.latent_shape[0]
                latents = torch.cat([latents[:, :1]] * padding + [latents], dim=1)
            condition[:, : latents.shape[1]] = latents
        inputs = {"hidden_states": torch.cat([noisy_latents, condition], dim=2)}
        if configs.transformer["ofs_embed_dim"] is not None:
            inputs["ofs"] = noisy_latents.new_full((1,), 2.0)  # the pipeline's value
        return inputs

    def usage(self) -> list[str]:
        """Return the lines of code that a user of the result needs after loading the pipeline."""
        if not self.ignore_learned_positions:
            return []
        return [
            "del pipe.transformer.patch_embed.pos_embedding  # the result was trained without learned positions",
            "pipe.transformer.patch_embed.use_learned_positional_embeddings = False",
            "pipe.transformer.register_to_config(use_learned_positional_embeddings=False)",
        ]
