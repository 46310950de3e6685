"""Load and wire everything that the training loop works with."""

import argparse
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel

from checkpoints.folder import WRITE_ERRORS, CheckpointFolder, TrainerState, why_unwritten
from checkpoints.schedule import ScheduleStart, StepSchedule
from common.errors import UserError
from common.signals import StopSignals
from data.buckets import BucketBatchSampler
from data.plan import PreparedData, TrainingData
from dataset import Batch, ClipDataset, PreparedDataset, make_loader, without_failures
from diffusion.objective import Objective
from diffusion.timesteps import TimestepSampling
from methods.lora import FullFinetune
from models.attention import attention_set
from models.prompts import PromptCache
from models.sampling import Pipeline
from models.source import CPU
from parallel.coordinator import Agreement
from parallel.deepspeed import gathered
from parallel.sharding import whole_weights
from run.encoded_inputs import Conditions, encode_conditions
from run.spec import Recipe, Task
from run.summary import describe_start
from run.trainable import Learner, make_learner, resume
from tracking.throughput import Throughput
from tracking.trackers import keep_losses, start_trackers
from validation.loss import log_validation_losses, validation_losses
from validation.videos import ValidationSettings, validate


logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What the loop works with."""

    accelerator: Accelerator
    agreement: Agreement
    output_dir: Path
    state: TrainerState  # at the start of the loop: resumed, or step 0
    total_steps: int
    schedule: StepSchedule
    sampler: BucketBatchSampler
    batches: Iterator[Batch]  # this rank's, from `state.step` on
    objective: Objective
    learner: Learner
    throughput: Throughput
    validate: Callable[[int], list[str]]  # validate after so many steps; returns why sampling failed, if it did
    save_result: Callable[[], Path]  # write the result on the main process; returns where it is
    usage: str  # the code that loads the result
    checkpoints: CheckpointFolder
    checkpoint_bytes: int
    signals: StopSignals

    @property
    def data_rank(self) -> int:
        """This process's number among those with data of their own."""
        return self.sampler.rank

    @property
    def num_data_ranks(self) -> int:
        """How many of these there are."""
        return self.sampler.world_size

    def save_checkpoint(self, step: int) -> None:
        """Save the training state after `step` steps."""
        self.checkpoints.save(replace(self.state, step=step), self.checkpoint_bytes)

    def batches_in(self, step: int) -> int:
        """How many batches each rank trains on in the step that follows `step` others."""
        return self.schedule.batches_before(step + 1) - self.schedule.batches_before(step)

    def samples_in(self, step: int) -> int:
        """How many samples all ranks together train on in the step that follows `step` others."""
        before = self.schedule.batches_before
        return self.sampler.samples_between(before(step), before(step + 1))


def set_up(recipe: Recipe) -> Run:
    """Load and wire everything, in an order that never holds two large components that are not needed together.

    Raises:
        UserError: weights, images or clips cannot be had, or the checkpoint is beyond the steps asked for.
    """
    args, accelerator = recipe.args, recipe.accelerator
    state = replace(recipe.state, schedule=start_schedule(recipe))
    sampler, schedule = make_sampler(recipe, state.schedule)
    total_steps = args.max_train_steps or schedule.end_of_epochs(args.num_train_epochs)
    if state.step > total_steps:
        raise UserError(
            f"--max_train_steps: {recipe.resumed} is at step {state.step}, beyond the {total_steps} steps asked for"
        )
    sampler.first_batch = schedule.batches_before(state.step)
    sampler.total_batches = schedule.batches_before(total_steps)

    conditions = encode_conditions(recipe)
    learner = make_learner(recipe, total_steps)
    if recipe.resumed:
        resume(recipe, learner)
    resumed_at = state.step if recipe.resumed else None
    start_trackers(accelerator, args, resumed_at=resumed_at)
    keep_losses(accelerator, recipe.output_dir, resumed_at=resumed_at)
    logger.info("%s", describe_start(recipe, learner.transformer, schedule, total_steps, sampler.padding))
    objective, signals = make_objective(recipe, conditions, learner), StopSignals()
    return Run(
        accelerator=accelerator,
        agreement=recipe.agreement,
        output_dir=recipe.output_dir,
        state=state,
        total_steps=total_steps,
        schedule=schedule,
        sampler=sampler,
        batches=load_batches(recipe, conditions.prompts, sampler),
        objective=objective,
        learner=learner,
        throughput=make_throughput(recipe),
        validate=make_validation(recipe, conditions, learner, objective, signals),
        save_result=make_saving(recipe, learner),
        usage=recipe.usage(recipe.output_dir),
        checkpoints=CheckpointFolder(recipe.output_dir, accelerator, recipe.agreement, args.checkpoints_total_limit),
        checkpoint_bytes=recipe.checkpoint_bytes,
        signals=signals,
    )


def start_schedule(recipe: Recipe) -> ScheduleStart:
    """From where on the steps are counted: as before or, where the run goes on with another number of ranks or of
    batches in a step, from the checkpoint on."""
    before = recipe.state.schedule
    num_ranks, accumulation = recipe.num_data_ranks, recipe.args.gradient_accumulation_steps
    if (before.num_ranks, before.accumulation) == (num_ranks, accumulation):
        return before
    logger.warning(
        "warning: the run goes on with %d processes x %d batches a step, after %d x %d: it sees every sample that is "
        "left of the epoch once, but in other steps than it would have",
        num_ranks,
        accumulation,
        before.num_ranks,
        before.accumulation,
    )
    _, schedule = make_sampler(recipe, before)
    return schedule.restart(recipe.state.step, num_ranks, accumulation)


def make_sampler(recipe: Recipe, start: ScheduleStart) -> tuple[BucketBatchSampler, StepSchedule]:
    """This rank's stream of batches from a start on, and which of them make up a step."""
    sampler = BucketBatchSampler(
        recipe.data.buckets,
        recipe.args.train_batch_size,
        seed=recipe.state.seed,
        repeats=recipe.data.repeats,
        rank=recipe.data_rank % start.num_ranks,  # there were fewer, maybe
        world_size=start.num_ranks,
        first_epoch=start.epoch,
        seen_batches=start.seen_batches,
    )
    return sampler, StepSchedule(start, sampler.batches_per_epoch, sampler.batches_in_first_epoch)


def make_throughput(recipe: Recipe) -> Throughput:
    """What counts and times the steps."""
    args, accelerator = recipe.args, recipe.accelerator
    return Throughput(
        recipe.configs.transformer,
        accelerator.device,
        recipe.num_data_ranks,
        recipe.dtype,
        trains_all=isinstance(recipe.method, FullFinetune),
        checkpoint_scope=args.checkpoint_scope if args.gradient_checkpointing else None,
        checkpoint_every=args.checkpoint_every,
        devices_per_sample=args.context_parallel_size,
    )


def make_objective(recipe: Recipe, conditions: Conditions, learner: Learner) -> Objective:
    """The objective as the flags want it."""
    args, empty_prompt = recipe.args, conditions.empty_prompt
    return Objective(
        task=recipe.task,
        model=learner.model,
        transformer=learner.transformer,
        scheduler=recipe.source.load_scheduler(),
        configs=recipe.configs,
        vae=conditions.vae,
        dtype=recipe.dtype,
        timesteps=TimestepSampling(
            distribution=args.timestep_sampling,
            logit_mean=args.logit_mean,
            logit_std=args.logit_std,
            snr_gamma=args.snr_gamma,
        ),
        caption_dropout=args.caption_dropout,
        empty_prompt=None if empty_prompt is None else empty_prompt.to(recipe.accelerator.device),
    )


def make_validation(
    recipe: Recipe, conditions: Conditions, learner: Learner, objective: Objective, signals: StopSignals
) -> Callable[[int], list[str]]:
    """Return what validates a step: the loss of the clips held out, and videos of the prompts, if there are any."""
    sample_videos = make_sampling(recipe, conditions, learner.transformer, signals)
    num_timesteps = objective.scheduler.config.num_train_timesteps
    # Not what accelerate wrapped: a rank that fails must not leave the others waiting inside a forward pass.
    objective = replace(objective, model=learner.transformer)

    def run_validation(step: int) -> list[str]:
        failures = []
        with learner.averaged(), recipe.undivided(), gathered(recipe.accelerator, learner.model):
            if conditions.held_out:
                losses, failures = validation_losses(
                    objective, conditions.held_out, recipe.accelerator, recipe.agreement, num_timesteps
                )
                log_validation_losses(recipe.accelerator, losses, failures, step)
            return failures + sample_videos(step)

    return run_validation


def make_sampling(
    recipe: Recipe, conditions: Conditions, transformer: CogVideoXTransformer3DModel, signals: StopSignals
) -> Callable[[int], list[str]]:
    """Return what samples the validation videos of a step; it does nothing when no prompts were given."""
    args, accelerator = recipe.args, recipe.accelerator
    settings = ValidationSettings(
        prompts=args.validation_prompts,
        images=conditions.images,
        dtype=recipe.dtype,
        num_videos=args.num_validation_videos,
        height=args.height,
        width=args.width,
        num_frames=args.max_num_frames,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        use_dynamic_cfg=args.use_dynamic_cfg,
        enable_model_cpu_offload=args.enable_model_cpu_offload,
        seed=recipe.state.seed,
        fps=recipe.video_fps,
    )

    def make_pipeline() -> Pipeline:
        return recipe.task.pipeline_class(
            tokenizer=None,
            text_encoder=None,
            # Loaded for the occasion: while training from prepared data, no VAE is resident.
            vae=conditions.vae or recipe.load_vae(CPU, decoder_only=not recipe.task.with_images),
            transformer=transformer,
            scheduler=recipe.source.load_scheduler(),
        )

    folder = recipe.output_dir / "validation"

    def sample_videos(step: int) -> list[str]:
        with attention_set(transformer, args.validation_attention_backend):
            return validate(
                accelerator,
                recipe.agreement,
                make_pipeline,
                settings,
                conditions.prompts,
                folder,
                step,
                lambda: signals.received is not None,
            )

    return sample_videos if settings.prompts else lambda step: []


def make_saving(recipe: Recipe, learner: Learner) -> Callable[[], Path]:
    """Return what writes the result on the main process, and says where it is."""
    accelerator, method, folder = recipe.accelerator, recipe.method, recipe.output_dir
    # Known before the first step: what fails here must not fail at the end.
    dtype = method.result_dtype(recipe.dtype, recipe.source)

    def save_result() -> Path:
        transformer = learner.transformer
        with learner.averaged():
            weights = whole_weights(accelerator, transformer, method.weight_names(transformer))
            return recipe.agreement.from_main(lambda: write(weights))

    def write(weights: dict[str, torch.Tensor]) -> Path:
        try:
            return method.save_result(learner.transformer, recipe.source, folder, dtype, weights)
        except UserError:
            raise
        except WRITE_ERRORS as error:
            raise UserError(
                f"--output_dir: '{folder}' cannot take the result: {why_unwritten(error)}; the checkpoint is whole, "
                "make room and run again with --resume_from_checkpoint latest"
            ) from error

    return save_result


def make_dataset(
    args: argparse.Namespace,
    data: TrainingData,
    task: Task,
    seed: int,
    prompts: PromptCache | None = None,
    *,
    replace_failed: bool,
) -> ClipDataset | PreparedDataset:
    """The samples as the task wants them, raw or prepared."""
    if isinstance(data, PreparedData):
        return PreparedDataset(data.clips, with_images=task.with_images)
    return ClipDataset(
        data.clips,
        reshape_mode=args.video_reshape_mode,
        random_flip=args.random_flip,
        seed=seed,
        prompts=prompts,
        with_images=task.with_images,
        replace_failed=replace_failed,
    )


def load_batches(recipe: Recipe, prompts: PromptCache, sampler: BucketBatchSampler) -> Iterator[Batch]:
    """Load the batches that the sampler draws, from raw or prepared clips."""
    args, seed = recipe.args, recipe.state.seed
    skips_failed = args.on_bad_clip == "skip"
    dataset = make_dataset(args, recipe.data, recipe.task, seed, prompts, replace_failed=skips_failed)
    loader = make_loader(dataset, sampler, num_workers=args.dataloader_num_workers, pin_memory=args.pin_memory)
    return without_failures(loader)
