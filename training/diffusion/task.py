"""What a task is, and the checks of model and sizes that tasks share."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel, DiffusionPipeline

from common.errors import UserError
from data.buckets import Bucket, largest_sides
from dataset import Batch
from models.configs import ModelConfigs
from models.source import NoiseScheduler


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


class Task(Protocol):
    """A task, which has a file of its own: the pipeline that samples it, and the inputs of its transformer."""

    name: str  # "text-to-video"
    pipeline_class: type[DiffusionPipeline]
    scheduler_class: type[NoiseScheduler] | None  # that the pipeline needs, if not any
    condition: str | None  # what samples and sampled videos have besides captions: "image", "control"

    @property
    def settings(self) -> Mapping[str, object]:
        """Settings by flag that a resumed run must share with its checkpoint."""

    def model_configs(self, configs: ModelConfigs) -> ModelConfigs:
        """Return the configs of the model to train or sample, for those of the base model."""

    def check_model(self, configs: ModelConfigs, sizes: Iterable[Bucket], flags: SizeFlags = TRAINING_SIZES) -> None:
        """Refuse a model of another task, and sizes of clips and of videos to sample that the model cannot sample."""

    def prepare_model(self, transformer: CogVideoXTransformer3DModel) -> None:
        """Change the transformer and its config before training and sampling."""

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
        """Return the transformer's inputs besides text, timesteps and positions.

        Args:
            noisy_latents: `[B, F, C, H, W]`.
            vae: encodes raw clips; None if all batches are prepared.
            generators: one for each sample, on the device of the latents, for its random draws.
            drop_images: train some samples without their condition.
        """

    def usage(self) -> list[str]:
        """Return the lines of code that a user of the result needs after loading the pipeline."""


def choose_scheduler(task: Task, kind: str) -> str:
    """Return the `--sampling_scheduler` to sample with; raise a UserError if the task's pipeline cannot use it."""
    if task.scheduler_class is None:
        return kind
    if kind == "dpm":
        raise UserError(
            f"--sampling_scheduler dpm: {task.pipeline_class.__name__} samples only with ddim; omit the flag"
        )
    return "ddim"


def pipeline_index(task: Task) -> dict[str, object]:
    """Return what the `model_index.json` of a task's result says, if another pipeline samples it than its base."""
    return {"_class_name": task.pipeline_class.__name__, "scheduler": ["diffusers", task.scheduler_class.__name__]}


def other_task_message(configs: ModelConfigs, fact: str, wanted: str, model: str) -> str:
    """Return the message on a model of another task, with the scripts that train it."""
    task = "control" if configs.is_control else "image" if configs.is_image_to_video else "text"
    script = f"cogvideox_{task}_to_video"
    return (
        f"--pretrained_model_name_or_path: {fact} (its transformer takes {configs.transformer['in_channels']} "
        f"channels, a video has {configs.vae['latent_channels']}); train it with {script}_lora.py or {script}_sft.py, "
        f"or pass {wanted} model such as THUDM/CogVideoX-{model}"
    )


def check_sizes(configs: ModelConfigs, sizes: Iterable[Bucket], flags: SizeFlags) -> None:
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


def check_learned_positions(configs: ModelConfigs, sizes: Iterable[Bucket], advice: str = "") -> None:
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
