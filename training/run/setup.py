"""Load and connect everything that the training loop works with."""

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel

from checkpoints.folder import WRITE_ERRORS, CheckpointFolder, why_unwritten
from checkpoints.schedule import ScheduleStart, StepSchedule
from checkpoints.state import TrainerState
from cli.schema import flag_values
from common.errors import UserError
from common.run_folder import VALIDATION_FOLDER
from common.signals import StopSignals
from data.sampler import BucketBatchSampler
from dataset import Batch, ClipDataset, MixedBatch, PreparedDataset, make_loader, without_failures
from diffusion.objective import Objective
from diffusion.task import choose_scheduler
from diffusion.timesteps import TimestepSampling
from memory.activations import omits_last_layer
from models.attention import temporary_attention
from models.configs import CPU
from models.prompts import PromptCache
from models.sampling import Pipeline
from parallel.deepspeed import gathered
from parallel.sharding import gather_weights
from planning.samples import PreparedData, caption_dropouts
from run.encoded_inputs import EncodedInputs, encode_inputs
from run.loss_schedule import plan_losses
from run.recipe import Recipe
from run.report import RunReport, make_report
from run.spec import RunSpec
from run.summary import as_table, start_rows
from run.trainable import Trainable, make_trainable, resume
from tracking.bad_steps import StepGuard
from tracking.loss_curve import LossCurve
from tracking.peak_memory import PeakMemory
from tracking.throughput import Throughput
from tracking.trackers import keep_losses, start_trackers
from validation.loss import validate_loss
from validation.schedule import LossSchedule, share_pairs
from validation.videos import ValidationSettings, validate


logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything that the loop works with."""

    spec: RunSpec
    state: TrainerState  # at the start of the loop: resumed, or at step 0
    total_steps: int
    schedule: StepSchedule
    sampler: BucketBatchSampler
    batches: Iterator[Batch | MixedBatch]  # this rank's, from `state.step` on
    inputs: EncodedInputs
    objective: Objective
    trainable: Trainable
    throughput: Throughput
    guard: StepGuard
    losses: LossSchedule | None  # of held-out clips; None if there are none
    curve: LossCurve | None  # on the main process
    checkpoints: CheckpointFolder
    result_dtype: torch.dtype
    signals: StopSignals
    memory: PeakMemory
    report: RunReport  # writes what happens to the run's folder

    def batches_in(self, step: int) -> int:
        """Return the number of batches of each rank in the step after `step` steps."""
        return self.schedule.batches_before(step + 1) - self.schedule.batches_before(step)

    def samples_in(self, step: int) -> tuple[int, int]:
        """Return the samples of all ranks in the step after `step` steps: to train on, and for regularization."""
        before = self.schedule.batches_before
        return self.sampler.samples_between(before(step), before(step + 1))

    def save_checkpoint(self, step: int) -> None:
        """Save the training state after `step` steps; called on every rank."""
        self.checkpoints.save(replace(self.state, step=step), self.spec.checkpoint_bytes)

    def measures_loss(self, step: int) -> bool:
        """Return whether the loss of held-out clips is measured after `step` steps."""
        if self.losses is None:
            return False
        keeps_weights = not self.spec.settings.validation.prompts and self.samples(step)
        return self.losses.is_due(step, self.total_steps) or keeps_weights

    def samples(self, step: int) -> bool:
        """Return whether videos are sampled after `step` steps; without prompts, whether their weights are kept."""
        flags = self.spec.settings.validation
        if not self.spec.is_validated:
            return False
        if step in (0, self.total_steps):
            return step > 0 or bool(flags.validate_first)
        return self.schedule.is_due(step, flags.validation_steps, flags.validation_epochs)

    def validate(self, step: int) -> list[str]:
        """Measure the loss of the held-out clips and sample the videos, whichever is due; called on every rank.

        The weights are kept beside the videos, if the run keeps them. Returns the reasons of failures, which do not
        end the run.
        """
        spec, failures = self.spec, []
        measures, samples = self.measures_loss(step), self.samples(step)
        if not measures and not samples:
            return failures
        phase = self.memory.phase("validation", f" at step {step}") if samples else nullcontext()
        with phase, self.trainable.averaged(), spec.undivided():
            if step > 0 and samples and spec.keeps_validated:
                self._keep_weights(step)
            with gathered(spec.accelerator, self.trainable.model):
                if measures:
                    failures = self._measure_loss(step)
                prompts = spec.settings.validation.prompts
                return failures + self._sample_videos(step) if samples and prompts else failures

    def _measure_loss(self, step: int) -> list[str]:
        accelerator = self.spec.accelerator
        return validate_loss(
            # With the unwrapped model, so that a rank that fails leaves no other waiting in a forward pass.
            replace(self.objective, model=self.trainable.transformer),
            self.inputs.held_out,
            share_pairs(self.losses.pairs, accelerator.process_index, accelerator.num_processes),
            accelerator,
            self.spec.coordinator,
            step,
            self.curve,
        )

    def _sample_videos(self, step: int) -> list[str]:
        spec, transformer = self.spec, self.trainable.transformer
        settings, guidance = spec.settings, spec.settings.guidance
        sampling = ValidationSettings(
            prompts=settings.validation.prompts,
            conditions=self.inputs.conditions,
            dtype=spec.dtype,
            num_videos=settings.validation.num_validation_videos,
            height=settings.clips.height,
            width=settings.clips.width,
            num_frames=settings.clips.max_num_frames,
            num_inference_steps=guidance.num_inference_steps,
            guidance_scale=guidance.guidance_scale,
            use_dynamic_cfg=guidance.use_dynamic_cfg,
            enable_model_cpu_offload=settings.validation.enable_model_cpu_offload,
            seed=spec.state.seed,
            fps=spec.video_fps,
            sampling_cache=guidance.sampling_cache,
        )
        with temporary_attention(transformer, settings.speed.validation_attention_backend):
            failures = validate(
                spec.accelerator,
                spec.coordinator,
                self._make_pipeline,
                sampling,
                self.inputs.prompts,
                spec.output_dir / VALIDATION_FOLDER,
                step,
                lambda: self.signals.received is not None,
            )
        self.report.update()
        return failures

    def _make_pipeline(self) -> Pipeline:
        spec = self.spec
        return spec.task.pipeline_class(
            tokenizer=None,
            text_encoder=None,
            # Training from prepared data keeps no VAE loaded.
            vae=self.inputs.vae or spec.load_vae(CPU, decoder_only=spec.task.condition is None),
            transformer=self.trainable.transformer,
            scheduler=spec.source.load_scheduler(
                choose_scheduler(spec.task, spec.settings.guidance.sampling_scheduler)
            ),
        )

    def _keep_weights(self, step: int) -> None:
        """Write the weights, in the form of the result, into the folder of a validation; a failure is a warning."""
        folder = self.spec.output_dir / VALIDATION_FOLDER / f"step-{step}"
        weights = self._gather_weights()

        def write() -> str | None:
            try:
                self.spec.method.save(self.trainable.transformer, folder, self.result_dtype, weights)
            except WRITE_ERRORS as error:
                return why_unwritten(error)

        if problem := self.spec.coordinator.from_main(write):
            logger.warning("warning: the weights of step %d cannot be kept in %s: %s", step, folder, problem)

    def _gather_weights(self) -> dict[str, torch.Tensor]:
        """Return the trained weights by name on the main process; called on every rank."""
        transformer = self.trainable.transformer
        return gather_weights(self.spec.accelerator, transformer, self.spec.method.weight_names(transformer))

    def save_result(self, folder: Path | None = None) -> Path:
        """Write the result on the main process and return its file or folder; called on every rank.

        Args:
            folder: where to write it instead of the output folder.
        """
        with self.trainable.averaged():
            weights = self._gather_weights()
            return self.spec.coordinator.from_main(lambda: self._write_result(weights, folder or self.spec.output_dir))

    def _write_result(self, weights: dict[str, torch.Tensor], folder: Path) -> Path:
        spec = self.spec
        transformer, dtype = self.trainable.transformer, self.result_dtype
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise self.guard.failure("the trained weights are not finite, so no result is written")
        try:
            return spec.method.save(transformer, folder, dtype, weights, spec.source)
        except UserError:
            raise
        except WRITE_ERRORS as error:
            raise UserError(
                f"--output_dir: '{folder}' cannot take the result: {why_unwritten(error)}; the checkpoint is "
                "complete, make room and run again with --resume_from_checkpoint latest"
            ) from error


def set_up(spec: RunSpec) -> Run:
    """Load and connect everything, in an order that keeps only what the current stage needs in memory.

    Raises UserError if weights, images or clips cannot be read, or the checkpoint is beyond the last step.
    """
    settings, accelerator, memory = spec.settings, spec.accelerator, PeakMemory(spec.accelerator.device)
    state = replace(spec.state, schedule=start_schedule(spec))
    sampler, schedule = make_sampler(spec, state.schedule)
    total_steps = settings.training.max_train_steps or schedule.end_of_epochs(settings.training.num_train_epochs)
    if state.step > total_steps:
        raise UserError(
            f"--max_train_steps: {spec.resumed} is at step {state.step}, beyond the {total_steps} steps asked for"
        )
    sampler.first_batch = schedule.batches_before(state.step)
    sampler.total_batches = schedule.batches_before(total_steps)

    losses = plan_losses(spec, sampler, schedule, total_steps)
    state = replace(state, validation_passes=len(losses.pairs) if losses else 0)
    ranks = (accelerator.process_index, accelerator.num_processes)
    inputs = encode_inputs(spec, share_pairs(losses.pairs, *ranks) if losses else ())
    trainable = make_trainable(spec, total_steps)
    if spec.resumed:
        resume(spec, trainable)
    resumed_at = state.step if spec.resumed else None
    project, logging_dir = settings.tracking.tracker_name, spec.output_dir / settings.tracking.logging_dir
    start_trackers(accelerator, project, logging_dir, flag_values(settings), resumed_at=resumed_at)
    curve = keep_losses(accelerator, spec.output_dir, resumed_at=resumed_at)
    summary = start_rows(spec, trainable.transformer, schedule, total_steps, sampler.padding, losses)
    logger.info("%s", as_table(summary))
    limit = settings.checkpoints.checkpoints_total_limit
    return Run(
        spec=spec,
        state=state,
        total_steps=total_steps,
        schedule=schedule,
        sampler=sampler,
        batches=load_batches(spec, inputs.prompts, sampler),
        inputs=inputs,
        objective=make_objective(spec, inputs, trainable),
        trainable=trainable,
        throughput=make_throughput(spec, trainable.transformer),
        guard=StepGuard(spec.coordinator, settings.checkpoints.max_bad_steps, spec.output_dir),
        losses=losses,
        curve=curve,
        checkpoints=CheckpointFolder(spec.output_dir, accelerator, spec.coordinator, limit),
        # Read from the model's files now, so that a failure does not come after the training.
        result_dtype=spec.method.result_dtype(spec.dtype, spec.source),
        signals=StopSignals(),
        memory=memory,
        report=make_report(spec, total_steps, summary, losses, inputs.conditions),
    )


def start_schedule(spec: RunSpec) -> ScheduleStart:
    """Return the start of the step count: the checkpoint's own, or the checkpoint if the size of a step changed."""
    before = spec.state.schedule
    num_ranks, accumulation = spec.num_data_ranks, spec.settings.training.gradient_accumulation_steps
    if (before.num_ranks, before.accumulation) == (num_ranks, accumulation):
        return before
    logger.warning(
        "warning: the run continues with %d processes x %d batches a step, after %d x %d: it trains once on each "
        "sample left of the epoch, but in other steps than before",
        *(num_ranks, accumulation, before.num_ranks, before.accumulation),
    )
    _, schedule = make_sampler(spec, before)
    return schedule.restart(spec.state.step, num_ranks, accumulation)


def make_sampler(spec: RunSpec, start: ScheduleStart) -> tuple[BucketBatchSampler, StepSchedule]:
    """Return this rank's sampler of batches from a start on, and the batches of each step."""
    sampler = BucketBatchSampler.of(
        spec.data,
        spec.batch_limit,
        seed=spec.state.seed,
        rank=spec.data_rank % start.num_ranks,  # the run may have had fewer ranks
        world_size=start.num_ranks,
        first_epoch=start.epoch,
        seen_batches=start.seen_batches,
        blocks=spec.data.blocks,
    )
    return sampler, StepSchedule(start, sampler.batches_per_epoch, sampler.batches_in_first_epoch)


def make_throughput(spec: RunSpec, transformer: CogVideoXTransformer3DModel) -> Throughput:
    """Return the counter and timer of the steps."""
    return Throughput(
        spec.configs.transformer,
        spec.accelerator.device,
        spec.num_data_ranks,
        spec.dtype,
        **spec.flops_settings,
        recomputes_last=not omits_last_layer(transformer),
        devices_per_sample=spec.settings.speed.context_parallel_size,
    )


def make_objective(spec: RunSpec, inputs: EncodedInputs, trainable: Trainable) -> Objective:
    """Return the objective that the flags describe."""
    flags, empty_prompt = spec.settings.objective, inputs.empty_prompt
    dropouts = caption_dropouts(spec.data, flags.caption_dropout)
    return Objective(
        task=spec.task,
        model=trainable.model,
        transformer=trainable.transformer,
        scheduler=spec.source.load_scheduler(),
        configs=spec.configs,
        vae=inputs.vae,
        dtype=spec.dtype,
        mask_background=flags.mask_background_weight,
        timesteps=TimestepSampling(flags.timestep_sampling, flags.logit_mean, flags.logit_std, flags.snr_gamma),
        caption_dropout=flags.caption_dropout if dropouts is None else torch.from_numpy(dropouts),
        empty_prompt=None if empty_prompt is None else empty_prompt.to(spec.accelerator.device),
    )


def make_dataset(
    recipe: Recipe, seed: int, prompts: PromptCache | None = None, *, replace_failed: bool
) -> ClipDataset | PreparedDataset:
    """Return the training samples, raw or prepared, with the images or controls that the task needs, and masks."""
    with_masks = recipe.settings.masks.use_masks
    data, flags, with_images = recipe.data, recipe.settings.clips, recipe.task.condition == "image"
    if isinstance(data, PreparedData):
        with_controls = recipe.task.condition == "control"
        kinds = {"with_images": with_images, "with_controls": with_controls, "with_masks": with_masks}
        return PreparedDataset(data.clips, **kinds)
    return ClipDataset(
        data.clips,
        reshape_mode=flags.video_reshape_mode,
        random_flip=flags.random_flip,
        seed=seed,
        prompts=prompts,
        with_images=with_images,
        condition_frames=recipe.settings.image.condition_frames,
        control=recipe.controls,
        with_masks=with_masks,
        replace_failed=replace_failed,
    )


def load_batches(spec: RunSpec, prompts: PromptCache, sampler: BucketBatchSampler) -> Iterator[Batch | MixedBatch]:
    """Load the batches that the sampler draws, from raw or prepared clips."""
    skips_failed, flags = spec.settings.sources.on_bad_clip == "skip", spec.settings.loader
    dataset = make_dataset(spec, spec.state.seed, prompts, replace_failed=skips_failed)
    workers = flags.dataloader_num_workers
    return without_failures(make_loader(dataset, sampler, num_workers=workers, pin_memory=flags.pin_memory))
