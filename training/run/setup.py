"""Load and wire everything that the training loop works with."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel

from checkpoints.folder import WRITE_ERRORS, CheckpointFolder, why_unwritten
from checkpoints.schedule import ScheduleStart, StepSchedule
from checkpoints.state import TrainerState
from common.errors import UserError
from common.signals import StopSignals
from data.plan import PreparedData, TrainingData
from data.sampler import BucketBatchSampler
from dataset import Batch, ClipDataset, PreparedDataset, make_loader, without_failures
from diffusion.objective import Objective
from diffusion.timesteps import TimestepSampling
from flags.schema import flag_values
from flags.settings import TrainingSettings
from methods.full import FullFinetune
from models.attention import temporary_attention
from models.configs import CPU
from models.prompts import PromptCache
from models.sampling import Pipeline
from parallel.coordinator import Coordinator
from parallel.deepspeed import gathered
from parallel.sharding import gather_weights
from run.encoded_inputs import EncodedInputs, encode_inputs
from run.spec import RunSpec, Task
from run.summary import describe_start
from run.trainable import Trainable, make_trainable, resume
from tracking.throughput import Throughput
from tracking.trackers import keep_losses, start_trackers
from validation.loss import validate_loss
from validation.videos import ValidationSettings, validate


logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What the loop works with."""

    settings: TrainingSettings
    accelerator: Accelerator
    coordinator: Coordinator
    output_dir: Path
    state: TrainerState  # at the start of the loop: resumed, or step 0
    total_steps: int
    schedule: StepSchedule
    sampler: BucketBatchSampler
    batches: Iterator[Batch]  # this rank's, from `state.step` on
    objective: Objective
    trainable: Trainable
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


def set_up(spec: RunSpec) -> Run:
    """Load and wire everything, in an order that never holds two large components that are not needed together.

    Raises:
        UserError: weights, images or clips cannot be had, or the checkpoint is beyond the steps asked for.
    """
    settings, accelerator = spec.settings, spec.accelerator
    state = replace(spec.state, schedule=start_schedule(spec))
    sampler, schedule = make_sampler(spec, state.schedule)
    total_steps = settings.training.max_train_steps or schedule.end_of_epochs(settings.training.num_train_epochs)
    if state.step > total_steps:
        raise UserError(
            f"--max_train_steps: {spec.resumed} is at step {state.step}, beyond the {total_steps} steps asked for"
        )
    sampler.first_batch = schedule.batches_before(state.step)
    sampler.total_batches = schedule.batches_before(total_steps)

    inputs = encode_inputs(spec)
    trainable = make_trainable(spec, total_steps)
    if spec.resumed:
        resume(spec, trainable)
    resumed_at = state.step if spec.resumed else None
    start_trackers(
        accelerator,
        settings.tracking.tracker_name,
        Path(settings.training.output_dir, settings.tracking.logging_dir),
        flag_values(settings),
        resumed_at=resumed_at,
    )
    keep_losses(accelerator, spec.output_dir, resumed_at=resumed_at)
    logger.info("%s", describe_start(spec, trainable.transformer, schedule, total_steps, sampler.padding))
    objective, signals = make_objective(spec, inputs, trainable), StopSignals()
    return Run(
        settings=settings,
        accelerator=accelerator,
        coordinator=spec.coordinator,
        output_dir=spec.output_dir,
        state=state,
        total_steps=total_steps,
        schedule=schedule,
        sampler=sampler,
        batches=load_batches(spec, inputs.prompts, sampler),
        objective=objective,
        trainable=trainable,
        throughput=make_throughput(spec),
        validate=make_validation(spec, inputs, trainable, objective, signals),
        save_result=make_saving(spec, trainable),
        usage=spec.usage(spec.output_dir),
        checkpoints=CheckpointFolder(
            spec.output_dir, accelerator, spec.coordinator, settings.checkpoints.checkpoints_total_limit
        ),
        checkpoint_bytes=spec.checkpoint_bytes,
        signals=signals,
    )


def start_schedule(spec: RunSpec) -> ScheduleStart:
    """From where on the steps are counted: as before or, where the run goes on with another number of ranks or of
    batches in a step, from the checkpoint on."""
    before = spec.state.schedule
    num_ranks, accumulation = spec.num_data_ranks, spec.settings.training.gradient_accumulation_steps
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
    _, schedule = make_sampler(spec, before)
    return schedule.restart(spec.state.step, num_ranks, accumulation)


def make_sampler(spec: RunSpec, start: ScheduleStart) -> tuple[BucketBatchSampler, StepSchedule]:
    """This rank's stream of batches from a start on, and which of them make up a step."""
    sampler = BucketBatchSampler(
        spec.data.buckets,
        spec.settings.training.train_batch_size,
        seed=spec.state.seed,
        repeats=spec.data.repeats,
        rank=spec.data_rank % start.num_ranks,  # there were fewer, maybe
        world_size=start.num_ranks,
        first_epoch=start.epoch,
        seen_batches=start.seen_batches,
    )
    return sampler, StepSchedule(start, sampler.batches_per_epoch, sampler.batches_in_first_epoch)


def make_throughput(spec: RunSpec) -> Throughput:
    """What counts and times the steps."""
    settings, accelerator = spec.settings, spec.accelerator
    return Throughput(
        spec.configs.transformer,
        accelerator.device,
        spec.num_data_ranks,
        spec.dtype,
        trains_all=isinstance(spec.method, FullFinetune),
        checkpoint_scope=settings.memory.checkpoint_scope if settings.memory.gradient_checkpointing else None,
        checkpoint_every=settings.memory.checkpoint_every,
        devices_per_sample=settings.speed.context_parallel_size,
    )


def make_objective(spec: RunSpec, inputs: EncodedInputs, trainable: Trainable) -> Objective:
    """The objective as the flags want it."""
    settings, empty_prompt = spec.settings, inputs.empty_prompt
    return Objective(
        task=spec.task,
        model=trainable.model,
        transformer=trainable.transformer,
        scheduler=spec.source.load_scheduler(),
        configs=spec.configs,
        vae=inputs.vae,
        dtype=spec.dtype,
        timesteps=TimestepSampling(
            distribution=settings.objective.timestep_sampling,
            logit_mean=settings.objective.logit_mean,
            logit_std=settings.objective.logit_std,
            snr_gamma=settings.objective.snr_gamma,
        ),
        caption_dropout=settings.objective.caption_dropout,
        empty_prompt=None if empty_prompt is None else empty_prompt.to(spec.accelerator.device),
    )


def make_validation(
    spec: RunSpec, inputs: EncodedInputs, trainable: Trainable, objective: Objective, signals: StopSignals
) -> Callable[[int], list[str]]:
    """Return what validates a step: the loss of the clips held out, and videos of the prompts, if there are any."""
    sample_videos = make_sampling(spec, inputs, trainable.transformer, signals)
    # Not what accelerate wrapped: a rank that fails must not leave the others waiting inside a forward pass.
    objective = replace(objective, model=trainable.transformer)

    def run_validation(step: int) -> list[str]:
        failures = []
        with trainable.averaged(), spec.undivided(), gathered(spec.accelerator, trainable.model):
            if inputs.held_out:
                failures = validate_loss(objective, inputs.held_out, spec.accelerator, spec.coordinator, step)
            return failures + sample_videos(step)

    return run_validation


def make_sampling(
    spec: RunSpec, inputs: EncodedInputs, transformer: CogVideoXTransformer3DModel, signals: StopSignals
) -> Callable[[int], list[str]]:
    """Return what samples the validation videos of a step; it does nothing when no prompts were given."""
    settings, accelerator = spec.settings, spec.accelerator
    sampling = ValidationSettings(
        prompts=settings.validation.prompts,
        images=inputs.images,
        dtype=spec.dtype,
        num_videos=settings.validation.num_validation_videos,
        height=settings.clips.height,
        width=settings.clips.width,
        num_frames=settings.clips.max_num_frames,
        num_inference_steps=settings.guidance.num_inference_steps,
        guidance_scale=settings.guidance.guidance_scale,
        use_dynamic_cfg=settings.guidance.use_dynamic_cfg,
        enable_model_cpu_offload=settings.validation.enable_model_cpu_offload,
        seed=spec.state.seed,
        fps=spec.video_fps,
    )

    def make_pipeline() -> Pipeline:
        return spec.task.pipeline_class(
            tokenizer=None,
            text_encoder=None,
            # Loaded for the occasion: while training from prepared data, no VAE is resident.
            vae=inputs.vae or spec.load_vae(CPU, decoder_only=not spec.task.with_images),
            transformer=transformer,
            scheduler=spec.source.load_scheduler(),
        )

    folder = spec.output_dir / "validation"

    def sample_videos(step: int) -> list[str]:
        with temporary_attention(transformer, settings.speed.validation_attention_backend):
            return validate(
                accelerator,
                spec.coordinator,
                make_pipeline,
                sampling,
                inputs.prompts,
                folder,
                step,
                lambda: signals.received is not None,
            )

    return sample_videos if sampling.prompts else lambda step: []


def make_saving(spec: RunSpec, trainable: Trainable) -> Callable[[], Path]:
    """Return what writes the result on the main process, and says where it is."""
    accelerator, method, folder = spec.accelerator, spec.method, spec.output_dir
    # Known before the first step: what fails here must not fail at the end.
    dtype = method.result_dtype(spec.dtype, spec.source)

    def save_result() -> Path:
        transformer = trainable.transformer
        with trainable.averaged():
            weights = gather_weights(accelerator, transformer, method.weight_names(transformer))
            return spec.coordinator.from_main(lambda: write(weights))

    def write(weights: dict[str, torch.Tensor]) -> Path:
        try:
            return method.save(trainable.transformer, folder, dtype, weights, spec.source)
        except UserError:
            raise
        except WRITE_ERRORS as error:
            raise UserError(
                f"--output_dir: '{folder}' cannot take the result: {why_unwritten(error)}; the checkpoint is whole, "
                "make room and run again with --resume_from_checkpoint latest"
            ) from error

    return save_result


def make_dataset(
    settings: TrainingSettings,
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
        reshape_mode=settings.clips.video_reshape_mode,
        random_flip=settings.clips.random_flip,
        seed=seed,
        prompts=prompts,
        with_images=task.with_images,
        replace_failed=replace_failed,
    )


def load_batches(spec: RunSpec, prompts: PromptCache, sampler: BucketBatchSampler) -> Iterator[Batch]:
    """Load the batches that the sampler draws, from raw or prepared clips."""
    settings, seed = spec.settings, spec.state.seed
    skips_failed = settings.sources.on_bad_clip == "skip"
    dataset = make_dataset(settings, spec.data, spec.task, seed, prompts, replace_failed=skips_failed)
    loader = make_loader(
        dataset, sampler, num_workers=settings.loader.dataloader_num_workers, pin_memory=settings.loader.pin_memory
    )
    return without_failures(loader)
