"""The settings and data of a run, and what follows from them without loading weights."""

import inspect
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from common.ranks import precision_of, uses_deepspeed
from data.buckets import Bucket, count_tokens
from data.token_budget import BatchSize, TokenBudget
from dataset import LISTED
from diffusion.control_to_video import ControlToVideo
from diffusion.image_to_video import ImageToVideo
from diffusion.task import Task, pipeline_index
from diffusion.text_to_video import TextToVideo
from flags.settings import TrainingSettings
from memory.accounting import checkpoint_bytes
from memory.facts import ModelFacts, model_facts
from memory.settings import MemorySettings, memory_settings_of, with_memory
from methods.full import FullFinetune
from methods.lora import Lora
from models.configs import DTYPES, ModelConfigs
from models.source import ModelSource
from planning.plan import control_flags
from planning.samples import TrainingData


@dataclass(frozen=True)
class Recipe:
    """The settings and data of a run."""

    settings: TrainingSettings
    data: TrainingData

    @cached_property
    def task(self) -> Task:
        """The task of the script."""
        if self.settings.task == "text-to-video":
            return TextToVideo()
        if self.settings.task == "control-to-video":
            return ControlToVideo(control_flags(self.settings).compute_control, not self.base_configs.takes_condition)
        flags = self.settings.image
        ignores_positions = flags.ignore_learned_positional_embeddings
        return ImageToVideo(flags.noised_image_dropout, ignores_positions, flags.condition_frames)

    @cached_property
    def method(self) -> Lora | FullFinetune:
        """The method of the script."""
        if self.settings.method == "lora":
            lora = Lora.from_flags(self.settings.lora, self.settings.memory.quantize_base)
            return replace(lora, new_inputs=self.configs.patch_inputs - self.base_configs.patch_inputs)
        index = {}
        if self.configs is not self.base_configs:  # the result is sampled by another pipeline than the base model
            index = pipeline_index(self.task)
        return FullFinetune(self.settings.full.save_pipeline, self.settings.memory.weights_dtype, index=index)

    @cached_property
    def source(self) -> ModelSource:
        """The location of the base model."""
        model = self.settings.model
        return ModelSource(model.pretrained_model_name_or_path, model.revision, model.variant, model.cache_dir)

    @cached_property
    def base_configs(self) -> ModelConfigs:
        """The configs of the base model; raises UserError if they cannot be read."""
        return self.source.configs()

    @cached_property
    def configs(self) -> ModelConfigs:
        """The configs of the model to train; raises UserError if the base model is of another task."""
        return self.task.model_configs(self.base_configs)

    @cached_property
    def model_facts(self) -> ModelFacts:
        """The parameters of the model, those of the method included."""
        return model_facts(self.configs, self.method)

    @cached_property
    def checkpoint_bytes(self) -> int:
        """The bytes of a checkpoint, or slightly more."""
        num_bytes = checkpoint_bytes(self.model_facts, memory_settings_of(self.settings))
        # DeepSpeed writes the weights twice: the optimizer's and the module's.
        return num_bytes * 5 // 3 if uses_deepspeed() else num_bytes

    @cached_property
    def batch_limit(self) -> BatchSize | TokenBudget:
        """What fills a micro-batch; raises UserError if not even one of some samples fits."""
        training = self.settings.training
        if training.max_tokens_per_batch is None:
            return BatchSize(training.train_batch_size)
        budget = TokenBudget(training.max_tokens_per_batch, partial(count_tokens, self.configs.transformer))
        budget.check(set(self.data.buckets.counts))
        return budget

    @property
    def flops_settings(self) -> dict[str, object]:
        """What the operations of a step depend on besides its samples, for `count_flops`."""
        memory = self.settings.memory
        return {
            "trains_all": isinstance(self.method, FullFinetune),
            "checkpoint_scope": memory.checkpoint_scope if memory.gradient_checkpointing else None,
            "checkpoint_every": memory.checkpoint_every,
        }

    @property
    def is_validated(self) -> bool:
        """Whether the run validates at --validation_steps and the like: it samples videos, or was given clips."""
        return bool(self.settings.validation.prompts or self.settings.validation.validation_dataset_file)

    @property
    def controls(self) -> str | None:
        """The controls of the clips, as for `ClipDataset`."""
        return (self.task.kind or LISTED) if isinstance(self.task, ControlToVideo) else None

    @property
    def precision(self) -> str:
        """The precision of the computation: no, fp16 or bf16."""
        return precision_of(self.settings.training.mixed_precision)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the networks compute in."""
        return DTYPES[self.precision]

    @property
    def sampled_size(self) -> Bucket | None:
        """The size of the validation videos; None if there are none."""
        clips = self.settings.clips
        return Bucket(clips.max_num_frames, clips.height, clips.width) if self.settings.validation.prompts else None

    @property
    def clip_sizes(self) -> set[Bucket]:
        """The sizes of all clips, held-out ones included."""
        return {*self.data.buckets.counts, *(self.data.held_out.buckets.counts if self.data.held_out else [])}

    @property
    def sizes(self) -> set[Bucket]:
        """The sizes of all clips and of the validation videos."""
        return self.clip_sizes | ({self.sampled_size} if self.sampled_size else set())

    @property
    def output_dir(self) -> Path:
        """The folder that everything is written to."""
        return Path(self.settings.training.output_dir)

    @property
    def keeps_validated(self) -> bool:
        """Whether the weights of every validation are kept, so that the best one can be used."""
        return self.settings.method == "lora" or self.settings.full.save_validation_weights

    @property
    def video_fps(self) -> int:
        """The frame rate of validation videos."""
        return max(round(self.settings.clips.fps or 8), 1)

    def usage(self, where: Path | str, model: str | None = None) -> str:
        """Return the code that loads the result from the run's folder or its repository on the hub.

        The code calls the base model `model`, or None for its path or hub id.
        """
        model = model or self.settings.model.pretrained_model_name_or_path
        pipeline = self.task.pipeline_class
        if is_ours := not pipeline.__module__.startswith("diffusers."):
            pipeline = pipeline.__base__
        lines = self.method.usage(pipeline.__name__, model, where, self.task.usage())
        if is_ours:  # the library has no pipeline for the result: users need the code of ours
            code = inspect.getsource(inspect.getmodule(self.task.pipeline_class)).partition("\n\n")[2]
            lines = [*code.strip().split("\n"), "", "", *lines]
            lines += [f"pipe = {self.task.pipeline_class.__name__}(**pipe.components)"]
        if self.task.scheduler_class is not None:
            lines.append(f"pipe.scheduler = {self.task.scheduler_class.__name__}.from_config(pipe.scheduler.config)")
        return "\n".join(lines)

    def with_memory(self, memory: MemorySettings) -> "Recipe":
        """Return the recipe with other memory settings."""
        return replace(self, settings=with_memory(self.settings, memory))
