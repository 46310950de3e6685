"""The tasks text-to-video and image-to-video: the pipeline that samples each, and the inputs of the transformer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from common.errors import UserError
from data.buckets import Bucket, largest_sides
from dataset import Batch
from diffusion.latents import image_noise_scales, sample_latents, sample_uniform
from models.configs import ModelConfigs
from models.encoding import encode_noised_image


class SizeFlags(NamedTuple):
    """The flags that set sizes, for messages on a size that a model does not take."""

    sides: str
    frames: str
    advice: str = ""  # what to do for another size


TRAINING_SIZES = SizeFlags(
    "--height, --width, --height_buckets, --width_buckets",
    "--max_num_frames, --frame_buckets",
    " (prepare the data again for it)",
)


class TextToVideo:
    """Videos from text: the transformer sees only the noisy video latents."""

    name = "text-to-video"
    pipeline_class = CogVideoXPipeline
    with_images = False
    settings = MappingProxyType({})  # settings by flag that a resumed run must share with its checkpoint

    def check_model(self, configs: ModelConfigs, sizes: Iterable[Bucket], flags: SizeFlags = TRAINING_SIZES) -> None:
        """Refuse a model of another task, and sizes of clips and of videos to sample that the model cannot sample."""
        if configs.is_image_to_video:
            raise UserError(_other_task(configs, "this is an image-to-video model", "a text-to-video", "5b"))
        _check_sizes(configs, sizes, flags)
        _check_learned_positions(configs, sizes)

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
    ) -> dict[str, Any]:
        """Return the transformer's inputs besides text, timesteps and positions.

        Args:
            noisy_latents: `[B, F, C, H, W]`.
            vae: encodes raw clips; None if all batches are prepared.
            generators: one for each sample, on the device of the latents, for its random draws.
        """
        return {"hidden_states": noisy_latents}

    def usage(self) -> list[str]:
        """Return the lines of code that a user of the result needs after loading the pipeline."""
        return []


@dataclass(frozen=True)
class ImageToVideo:
    """Videos that begin with an image: its latents are concatenated to the noisy ones, as in the pipeline."""

    noised_image_dropout: float  # probability that a sample is trained without its image
    ignore_learned_positions: bool  # drop those of CogVideoX-5b-I2V, which fit only its native size

    name = "image-to-video"
    pipeline_class = CogVideoXImageToVideoPipeline
    with_images = True

    @property
    def settings(self) -> dict[str, object]:
        """Settings by flag that a resumed run must share with its checkpoint."""
        return {"--ignore_learned_positional_embeddings": self.ignore_learned_positions}

    def check_model(self, configs: ModelConfigs, sizes: Iterable[Bucket], flags: SizeFlags = TRAINING_SIZES) -> None:
        """Refuse a model of another task, and sizes that it cannot sample or has no learned positions for."""
        if not configs.is_image_to_video:
            raise UserError(_other_task(configs, "this is a text-to-video model", "an image-to-video", "5b-I2V"))
        _check_sizes(configs, sizes, flags)
        if self.ignore_learned_positions and not configs.transformer["use_learned_positional_embeddings"]:
            raise UserError(
                "--ignore_learned_positional_embeddings: this model has no learned positions; omit the flag"
            )
        if not self.ignore_learned_positions:
            _check_learned_positions(configs, sizes, ", or drop them with --ignore_learned_positional_embeddings")

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
    ) -> dict[str, Any]:
        """Return the transformer's inputs besides text, timesteps and positions; see `TextToVideo`.

        Source: `CogVideoXImageToVideoPipeline.prepare_latents` and `__call__`: the image's latents in the first latent
        frame, zeros in all others, including the padded ones of CogVideoX 1.5.
        """
        moments = batch.image_moments
        if moments is None:
            moments = torch.cat(
                [
                    encode_noised_image(vae, image, image_noise_scales(1, generator), generator)
                    for image, generator in zip(batch.images, generators, strict=True)
                ]
            )
        latents = sample_latents(moments, configs.image_scaling_factor, generators)
        if drop_images:
            is_kept = sample_uniform(generators) >= self.noised_image_dropout
            latents = latents * is_kept.view(-1, 1, 1, 1, 1)
        condition = torch.zeros_like(noisy_latents)
        condition[:, :1] = latents
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


def _other_task(configs: ModelConfigs, fact: str, wanted: str, model: str) -> str:
    script = "cogvideox_image_to_video" if configs.is_image_to_video else "cogvideox_text_to_video"
    return (
        f"--pretrained_model_name_or_path: {fact} (its transformer takes {configs.transformer['in_channels']} "
        f"channels, a video has {configs.vae['latent_channels']}); train it with {script}_lora.py or {script}_sft.py, "
        f"or pass {wanted} model such as THUDM/CogVideoX-{model}"
    )


def _check_sizes(configs: ModelConfigs, sizes: Iterable[Bucket], flags: SizeFlags) -> None:
    """Refuse sizes that CogVideoX 1.5 cannot be trained or sampled at; other models take any size."""
    if configs.transformer["patch_size_t"] is None:
        return
    sizes = set(sizes)
    height, width = largest_sides(configs.transformer)
    too_large = {(size.height, size.width) for size in sizes if size.height > height or size.width > width}
    if too_large:
        nearest = {(min(size[0], height), min(size[1], width)) for size in too_large}
        raise UserError(
            f"{flags.sides}: this CogVideoX 1.5 model has positions for up to {height}x{width} (height x width), not "
            f"for {_names(too_large)}; nearest is {_names(nearest)}{flags.advice}"
        )
    # The VAE decodes two latent frames to eight frames; if their number is odd, the first one to one frame.
    unsampled = {size.num_frames for size in sizes if size.num_frames != 1 and size.num_frames % 8 > 1}
    if unsampled:
        nearest = {count for frames in unsampled for count in (max(1, frames // 8 * 8 + 1), frames // 8 * 8 + 8)}
        raise UserError(
            f"{flags.frames}: CogVideoX 1.5 takes 1, 8k or 8k+1 frames, not "
            f"{', '.join(map(str, sorted(unsampled)))}, which its pipeline does not sample; nearest are "
            f"{', '.join(map(str, sorted(nearest)))}{flags.advice}"
        )


def _check_learned_positions(configs: ModelConfigs, sizes: Iterable[Bucket], advice: str = "") -> None:
    """Refuse sizes other than that of the learned positions, if the model has some."""
    native = configs.native_size
    others = sorted(set(sizes) - {native})
    if others and configs.transformer["use_learned_positional_embeddings"]:
        raise UserError(
            f"the learned positions of this model fit only {native} (frames x height x width), not "
            f"{', '.join(map(str, others))}; use that size{advice}"
        )


def _names(sizes: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
