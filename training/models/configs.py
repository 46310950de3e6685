"""What the configs of a pretrained model say of its kind, and the precisions it computes in."""

import hashlib
import inspect
import json
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    ModelMixin,
)

from data.buckets import Bucket


CPU = torch.device("cpu")


DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ModelConfigs:
    """The facts that tell the model kinds apart, as `from_pretrained` reads them; the path's name says nothing."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]

    @property
    def is_image_to_video(self) -> bool:
        """Whether the transformer takes an image's latents beside the video's."""
        return self.transformer["in_channels"] != self.vae["latent_channels"]

    @property
    def image_scaling_factor(self) -> float:
        """What the latents of the image to start from are multiplied by.

        Source: `CogVideoXImageToVideoPipeline.prepare_latents`; CogVideoX 1.5 was trained with the inverse.
        """
        factor = self.vae["scaling_factor"]
        return 1 / factor if self.vae["invert_scale_latents"] else factor

    @property
    def native_size(self) -> Bucket:
        """The size that the model was trained at."""
        sample = self.transformer
        height, width = 8 * sample["sample_height"], 8 * sample["sample_width"]
        if sample["patch_size_t"] is not None:
            # Published configs of CogVideoX 1.5 give the 300x300 latents that its positions reach to.
            height, width = min(height, 768), min(width, 1360)
        return Bucket(sample["sample_frames"], height, width)

    @property
    def native_fps(self) -> int:
        """The frame rate of the videos that the model was trained on: CogVideoX 1.5 has patches in time, and 16."""
        return 8 if self.transformer["patch_size_t"] is None else 16

    @property
    def kind(self) -> str:
        """A digest of the transformer's config, which tells model kinds apart wherever the model lies."""
        config = {name: value for name, value in self.transformer.items() if not name.startswith("_")}
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def _with_defaults(model_class: type[ModelMixin], config: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a config lacks, as `from_pretrained` does.

    The published folders of CogVideoX-2b and 5b are older than patches in time and learned positions.
    """
    parameters = inspect.signature(model_class.__init__).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters if parameter.name != "self"}
    return {**defaults, **config}


def precision_warning(
    compute_dtype: torch.dtype, native_dtype: torch.dtype | None, flag: str = "--mixed_precision"
) -> str | None:
    """What to tell a user who computes in a precision that the model's weights were not made for, if anything.

    Args:
        compute_dtype: of the forward pass.
        native_dtype: that the weights are stored in; None if that is not known.
        flag: which says what to compute in, for the message.
    """
    if (compute_dtype, native_dtype) != (torch.float16, torch.bfloat16):
        return None
    return (
        f"{flag} fp16: this model was trained in bfloat16, whose numbers go up to 3e38; fp16 ends at 65504, "
        f"so that activations overflow, which shows as NaN losses and black videos; use {flag} bf16"
    )
