"""The task control-to-video: the transformer also sees the latents of a control video, frame by frame.

A text-to-video model gets the inputs for them with zero weights, so that training starts from its own outputs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXFunControlPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from common.errors import UserError
from data.buckets import Bucket
from dataset import Batch
from diffusion.task import TRAINING_SIZES, SizeFlags, check_learned_positions, check_sizes, other_task_message
from models.configs import ModelConfigs
from models.encoding import encode_videos


RESTS = (0, 1, 5)  # of frames divided by 8 that the pipeline samples, of a model other than 1.5


@dataclass(frozen=True)
class ControlToVideo:
    """Videos that follow another video: its latents are concatenated to the noisy ones, as in the pipeline."""

    kind: str | None = None  # how controls are computed from clips; None for controls of the user
    widens: bool = True  # whether the base model takes no control yet; for `usage`

    name = "control-to-video"
    pipeline_class = CogVideoXFunControlPipeline
    condition = "control"
    scheduler_class = CogVideoXDDIMScheduler  # the pipeline does not pass what others need

    @property
    def settings(self) -> dict[str, object]:
        """Settings by flag that a resumed run must share with its checkpoint."""
        return {"--compute_control": self.kind}

    def model_configs(self, configs: ModelConfigs) -> ModelConfigs:
        """Return the configs with input channels for the control; raise a UserError for an image-to-video model."""
        if configs.is_image_to_video:
            fact = "this is an image-to-video model"
            raise UserError(other_task_message(configs, fact, "a text-to-video or control", "5b"))
        if configs.is_control:
            return configs
        channels = 2 * configs.transformer["in_channels"]
        name = self.pipeline_class.__name__
        return replace(configs, transformer=configs.transformer | {"in_channels": channels}, pipeline=name)

    def check_model(self, configs: ModelConfigs, sizes: Iterable[Bucket], flags: SizeFlags = TRAINING_SIZES) -> None:
        """Refuse sizes that the pipeline does not sample; `model_configs` has refused other models."""
        sizes = list(sizes)
        check_sizes(configs, sizes, flags)
        check_learned_positions(configs, sizes)
        # The pipeline refuses latent frames that 1.5's patches in time divide unevenly, and the VAE of the others
        # decodes 4, 12, 20, ... frames to three fewer than the control has.
        is_later = configs.transformer["patch_size_t"] is not None
        taken, rests = ("8k", (0,)) if is_later else ("1, 8k, 8k+1 or 8k+5", RESTS)
        wrong = sorted({size.num_frames for size in sizes if size.num_frames % 8 not in rests})
        if wrong:
            nearest = sorted({n for count in wrong for n in _nearest(count, rests)})
            raise UserError(
                f"{flags.frames}: with a control, the pipeline of this model samples {taken} frames, not "
                f"{', '.join(map(str, wrong))}; nearest are {', '.join(map(str, nearest))}{flags.advice}"
            )

    def prepare_model(self, transformer: CogVideoXTransformer3DModel) -> None:
        """Give a text-to-video transformer and its config inputs for the control, with zero weights."""
        if transformer.config.in_channels > transformer.config.out_channels:  # takes a control already
            return
        projection = transformer.patch_embed.proj  # a convolution, or in CogVideoX 1.5 a linear layer
        weight = widen(projection.weight.detach())
        projection.weight = torch.nn.Parameter(weight, requires_grad=projection.weight.requires_grad)
        name = "in_channels" if hasattr(projection, "in_channels") else "in_features"
        setattr(projection, name, weight.shape[1])
        transformer.register_to_config(in_channels=2 * transformer.config.in_channels)

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
        """Return the transformer's inputs besides text, timesteps and positions; see `Task`. Nothing is drawn.

        Source: `CogVideoXFunControlPipeline.prepare_control_latents` and `__call__`: the most likely latents.
        """
        moments = batch.control_moments
        if moments is None:
            moments = encode_videos(vae, batch.controls)
        latents = DiagonalGaussianDistribution(moments.float()).mode() * configs.vae["scaling_factor"]
        return {"hidden_states": torch.cat([noisy_latents, latents.permute(0, 2, 1, 3, 4)], dim=2)}

    def usage(self) -> list[str]:
        """Return the lines of code that a user of the result needs after loading the pipeline."""
        if not self.widens:
            return []
        return [
            "projection = pipe.transformer.patch_embed.proj  # the base takes no control: add inputs of weight zero",
            "weight = torch.cat([projection.weight, torch.zeros_like(projection.weight)], dim=1)",
            "projection.weight = torch.nn.Parameter(weight)",
            'setattr(projection, "in_channels" if weight.ndim == 4 else "in_features", weight.shape[1])',
            "pipe.transformer.register_to_config(in_channels=2 * pipe.transformer.config.in_channels)",
        ]


def widen(weight: torch.Tensor) -> torch.Tensor:
    """Return weights of the patch embedding, `[out, in, ...]`, with zeros for as many inputs again, of the control."""
    return torch.cat([weight, torch.zeros_like(weight)], dim=1)  # channels come first among the inputs


def _nearest(count: int, rests: Sequence[int]) -> list[int]:
    """Return the numbers on both sides of a count of frames that have one of the rests by 8."""
    taken = [n for n in range(1, count + 9) if n % 8 in rests]
    return [max((n for n in taken if n < count), default=taken[0]), min(n for n in taken if n > count)]
