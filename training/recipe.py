"""What a run is made from: flags, data, task, method and model, checked against one another before it starts."""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLCogVideoX

from buckets import Bucket
from checkpoints import TrainerState, find_checkpoint, read_state
from dataset import check_prepared
from errors import UserError
from fingerprints import fingerprint_encoders
from launch import shared_seed, start_accelerator
from methods import FullFinetune, Lora
from models import DTYPES, ModelConfigs, ModelSource
from plan import PreparedData, TrainingData, describe, report_skipped
from prepared import check_encoders
from tasks import ImageToVideo, TextToVideo


logger = logging.getLogger(__name__)


Task = TextToVideo | ImageToVideo
Method = Lora | FullFinetune


@dataclass(frozen=True)
class Recipe:
    """What a run is made from."""

    args: argparse.Namespace
    data: TrainingData
    task: Task
    method: Method
    source: ModelSource
    configs: ModelConfigs
    accelerator: Accelerator
    resumed: Path | None  # the checkpoint to go on from
    state: TrainerState  # where the loop starts: at step 0, or where the checkpoint is

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in."""
        return DTYPES[self.accelerator.mixed_precision]

    @property
    def output_dir(self) -> Path:
        """Where everything is written."""
        return Path(self.args.output_dir)

    def load_vae(self, device: torch.device) -> AutoencoderKLCogVideoX:
        """Load the VAE with the memory savings that the flags ask for."""
        vae = self.source.load_vae(self.dtype, slicing=self.args.enable_slicing, tiling=self.args.enable_tiling)
        return vae.to(device)


def check_recipe(args: argparse.Namespace, data: TrainingData, task: Task, method: Method) -> Recipe:
    """Put a recipe together, by the configs alone, and say what it will train on.

    Raises:
        UserError: model, data, flags and the checkpoint to resume from do not go together.
    """
    source = ModelSource(args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir)
    configs = source.configs()
    sampled = [Bucket(args.max_num_frames, args.height, args.width)] if args.validation_prompts else []
    held_out = data.held_out.buckets if data.held_out else []
    task.check_model(configs, {*data.buckets, *held_out, *sampled})
    method.check_model(configs, source)
    if isinstance(data, PreparedData):
        check_prepared(data.clips, configs)
    resumed = find_checkpoint(args.resume_from_checkpoint, Path(args.output_dir))
    accelerator = start_accelerator(args)
    describe_data(args, accelerator, data, source, configs)
    settings = {"model": configs.kind, "--optimizer": args.optimizer, "--use_ema": args.use_ema}
    settings |= {**task.settings, **method.settings}
    if resumed:
        state = read_state(resumed)
        state.check_settings(settings)
    else:
        state = TrainerState(0, shared_seed(accelerator, args.seed), settings)
    return Recipe(args, data, task, method, source, configs, accelerator, resumed, state)


def describe_data(
    args: argparse.Namespace, accelerator: Accelerator, data: TrainingData, source: ModelSource, configs: ModelConfigs
) -> None:
    """Say what will be trained on, before anything heavy is loaded; refuse data of other encoders than the model's.

    Raises:
        UserError: the data was prepared with another VAE, text encoder or tokenizer.
    """
    if isinstance(data, PreparedData):
        encoders = fingerprint_encoders(source.local_folder(), args.variant)
        for folder in data.folders:
            problem = check_encoders(folder, encoders)
            if problem and not args.ignore_prepared_mismatch:
                raise UserError(
                    f"--load_tensors: {problem}; prepare the data with {args.pretrained_model_name_or_path}, or give "
                    "--ignore_prepared_mismatch if you know that they are equal"
                )
            if problem:
                logger.warning("warning: %s", problem)
    elif accelerator.is_main_process:
        report_skipped(data.bad, Path(args.output_dir))
    if accelerator.is_main_process:
        plan = describe(
            data,
            source,
            configs,
            batch_size=args.train_batch_size,
            num_ranks=accelerator.num_processes,
            reshape_mode=args.video_reshape_mode,
        )
        logger.info("%s", plan)
