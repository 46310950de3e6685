"""The configs of a pretrained model, which define its kind, and the precisions it computes in."""

import hashlib
import inspect
import json
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin

from data.buckets import Bucket, native_fps, native_size


CPU = torch.device("cpu")
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ModelConfigs:
    """The configs that tell model kinds apart, with the defaults that `from_pretrained` fills in."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    pipeline: str = ""  # the class in model_index.json, of a model that takes more than the noisy latents

    @property
    def takes_condition(self) -> bool:
        """Whether the transformer takes other latents next to the video latents."""
        return self.transformer["in_channels"] != self.vae["latent_channels"]

    @property
    def is_control(self) -> bool:
        """Whether these are the latents of a control video, which take as many channels as those of an image."""
        return self.takes_condition and "Control" in self.pipeline

    @property
    def is_image_to_video(self) -> bool:
        """Whether these are the latents of an image."""
        return self.takes_condition and not self.is_control

    @property
    def patch_inputs(self) -> int:
        """The inputs of the patch embedding."""
        patch = self.transformer["patch_size"] ** 2 * (self.transformer["patch_size_t"] or 1)
        return self.transformer["in_channels"] * patch

    @property
    def image_scaling_factor(self) -> float:
        """The factor that the first frame's latents are multiplied by.

        Source: `CogVideoXImageToVideoPipeline.prepare_latents`; CogVideoX 1.5 was trained with the inverse.
        """
        factor = self.vae["scaling_factor"]
        return 1 / factor if self.vae["invert_scale_latents"] else factor

    @property
    def native_size(self) -> Bucket:
        """The size of the videos that the model was trained on."""
        return native_size(self.transformer)

    @property
    def native_fps(self) -> int:
        """The frame rate of the model's training videos: 16 for CogVideoX 1.5, which has patches in time."""
        return native_fps(self.transformer)

    @property
    def kind(self) -> str:
        """A digest of the transformer's config, which identifies the model kind."""
        config = {name: value for name, value in self.transformer.items() if not name.startswith("_")}
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def with_defaults(model_class: type[ModelMixin], config: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of missing settings, as `from_pretrained` does.

    The published configs of CogVideoX-2b and 5b lack patches in time and learned positions.
    """
    parameters = inspect.signature(model_class.__init__).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters if parameter.name != "self"}
    return {**defaults, **config}


def precision_warning(
    compute_dtype: torch.dtype, native_dtype: torch.dtype | None, flag: str = "--mixed_precision"
) -> str | None:
    """Return a warning if weights stored in bfloat16 compute in fp16, which `flag` sets; else None."""
    if (compute_dtype, native_dtype) != (torch.float16, torch.bfloat16):
        return None
    return (
        f"{flag} fp16: this model was trained in bfloat16, whose numbers go up to 3e38; fp16 ends at 65504, "
        f"so that activations overflow, which shows as NaN losses and black videos; use {flag} bf16"
    )
