"""Encode prompts, images and held-out clips before the transformer is loaded, with one encoder in memory at a time."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.training_utils import free_memory

from cli.schema import flag_values
from common.errors import UserError
from dataset import Batch
from models.configs import ModelConfigs
from models.prompts import PromptCache
from planning.plan import validation_data_flags
from planning.samples import PreparedData, TrainingData, caption_dropouts
from prepared.folder import read_prompt
from run.recipe import Recipe
from run.spec import RunSpec
from validation.loss import encode_validation_set, read_validation_set
from validation.videos import Conditions
from video.condition_frames import split_files
from video.frames import Cut
from video.images import load_controls, load_given_frames


@dataclass(frozen=True)
class EncodedInputs:
    """Results of the text encoder and the VAE for training and validation."""

    prompts: PromptCache  # of all captions and prompts
    empty_prompt: torch.Tensor | None  # [226, D], for caption dropout
    conditions: Conditions | None  # of the validation videos; None for text-to-video
    vae: AutoencoderKLCogVideoX | None  # stays loaded to encode raw clips; None for prepared data
    held_out: list[Batch]  # this rank's share of the clips whose loss is measured, on the CPU


def encode_inputs(spec: RunSpec, held_out: Collection[int] = ()) -> EncodedInputs:
    """Load text encoder and VAE one after the other, encode, and free them; called on every rank.

    `held_out` are the indices of the held-out clips that this rank measures.
    """
    settings, accelerator, data = spec.settings, spec.accelerator, spec.data
    conditions = load_conditions(spec)
    dropouts = caption_dropouts(data, settings.objective.caption_dropout)
    drops_captions = settings.objective.caption_dropout > 0 if dropouts is None else bool(dropouts.any())
    empty_prompt = find_prompt(data, spec.configs, "") if drops_captions else None
    cache, in_8bit = spec.output_dir / "prompt_embeds", settings.memory.text_encoder_8bit
    prompts = PromptCache(cache, spec.source, spec.dtype, in_8bit=in_8bit)
    sampled = list(settings.validation.prompts)
    if sampled and settings.guidance.guidance_scale > 1:  # guidance is against the empty prompt
        sampled.append("")
    prepared = [find_prompt(data, spec.configs, text) for text in sampled]
    if all(embeds is not None for embeds in prepared):  # the text encoder is not needed for them
        for text, embeds in zip(sampled, prepared, strict=True):
            prompts.store(text, embeds)
    texts = [*data.captions, *sampled, *(data.held_out.captions if data.held_out else [])]
    if drops_captions and empty_prompt is None:
        texts.append("")
    prompts.embed(texts, accelerator.device, rank=accelerator.process_index, world_size=accelerator.num_processes)
    free_memory()
    spec.coordinator.wait()  # the rank that downloads the text encoder may take long
    if drops_captions and empty_prompt is None:
        empty_prompt = prompts.load("")
    vae = None if isinstance(data, PreparedData) else spec.load_vae(accelerator.device)
    batches = _encode_held_out(spec, held_out, prompts, vae) if held_out else []
    return EncodedInputs(prompts, empty_prompt, conditions, vae, batches)


def _encode_held_out(
    spec: RunSpec, share: Collection[int], prompts: PromptCache, vae: AutoencoderKLCogVideoX | None
) -> list[Batch]:
    clips, with_images = spec.data.held_out.clips, spec.task.condition == "image"
    if isinstance(spec.data.held_out, PreparedData):
        with_controls = spec.task.condition == "control"
        return read_validation_set(clips, share, with_images=with_images, with_controls=with_controls)
    is_fraction, sources = spec.data.held_out_fraction > 0, spec.settings.sources
    batches = encode_validation_set(
        clips,
        share,
        vae or spec.load_vae(spec.accelerator.device),
        prompts,
        reshape_mode=validation_data_flags(spec.settings)[1].video_reshape_mode,
        with_images=with_images,
        condition_frames=spec.settings.image.condition_frames,
        control=spec.controls,
        replace_failed=is_fraction and sources.on_bad_clip == "skip",
        shows_progress=spec.accelerator.is_main_process,
    )
    free_memory()
    return batches


def load_conditions(spec: Recipe) -> Conditions | None:
    """Load the first frames or controls of the validation videos, cropped like clips."""
    clips, flags, cut = spec.settings.clips, spec.settings.validation, Cut.of(flag_values(spec.settings))
    if spec.task.condition == "control" and flags.controls:
        return load_controls(flags.controls, spec.sampled_size, spec.task.kind, cut=cut)
    if spec.task.condition != "image":
        return None
    condition = spec.settings.image.condition_frames
    files = [split_files(condition, one) for one in flags.images]
    return load_given_frames(files, condition, clips.height, clips.width, flag="--validation_images", cut=cut)


def find_prompt(data: TrainingData, configs: ModelConfigs, prompt: str) -> torch.Tensor | None:
    """Return the embedding, `[226, D]`, of a caption or of the empty prompt that the data was prepared with, if any.

    Raises UserError if it is damaged, or of another model.
    """
    if not isinstance(data, PreparedData):
        return None
    expected = (configs.transformer["max_text_seq_length"], configs.transformer["text_embed_dim"])
    for folder in data.folders:
        if (embeds := read_prompt(folder, prompt)) is None:
            continue
        if embeds.shape != expected:
            raise UserError(
                f"--load_tensors: the prompt {prompt!r} in '{folder}' has the shape {tuple(embeds.shape)}, the model "
                f"needs {expected}; prepare the data with the model to be trained"
            )
        return embeds
    return None
