"""The plan of a real run, and what it will take, from what a trial of it measured."""

import math
import shutil
from dataclasses import dataclass, replace

from checkpoints.resume import newest_checkpoint
from checkpoints.schedule import ScheduleStart, StepSchedule
from checkpoints.state import TrainerState, read_state
from common.files import nearest_folder
from common.units import in_bytes, in_words
from data.buckets import count_tokens
from run.loss_schedule import plan_losses
from run.recipe import Recipe
from run.setup import make_sampler, start_schedule
from run.spec import RunSpec
from run.summary import as_table
from tracking.flops import count_forward_flops
from tracking.throughput import Speed, Throughput


@dataclass(frozen=True)
class Measured:
    """What two steps of the largest batch, a checkpoint, the result and a video took."""

    step: Speed  # the second one
    throughput: Throughput  # counts the operations of a sample
    checkpoint_seconds: float
    checkpoint_bytes: int
    result_bytes: int
    video_seconds: float  # with two denoising steps, loading the VAE, and the loss of held-out clips
    video_bytes: int
    embedding_bytes: int  # of a prompt; 0 if no prompt is embedded


@dataclass(frozen=True)
class Plan:
    """What a run does."""

    first: int  # step
    last: int  # step
    epochs: float
    batches: int  # of each rank
    tflop: float  # of all its steps, on one device
    checkpoints: int
    kept_checkpoints: int
    validations: int
    losses: int  # measurements of the loss of held-out clips
    loss_tflop: float  # of these, on one device
    kept_validations: int  # whose weights are kept
    videos: int  # of each validation
    prompts: int  # that are embedded


def plan_run(trial: RunSpec, recipe: Recipe, throughput: Throughput) -> Plan:
    """Return what a run of the recipe does on the processes of its trial, from the checkpoint that it resumes."""
    settings, data, validation = recipe.settings, recipe.data, recipe.settings.validation
    spec = replace(trial, settings=settings, data=data, state=first_state(trial, recipe))
    sampler, schedule = make_sampler(spec, start_schedule(spec))
    done, training = spec.state.step, settings.training
    last = training.max_train_steps or schedule.end_of_epochs(training.num_train_epochs)
    batches = schedule.batches_before(last) - schedule.batches_before(done)
    epochs = batches / schedule.batches_per_epoch
    flop = sum(count * throughput.flops_of(bucket) for bucket, count in sampler.samples_per_epoch.items())
    every, limit = settings.checkpoints.checkpointing_steps, settings.checkpoints.checkpoints_total_limit
    checkpoints = math.ceil(last / every) - done // every if last > done else 0  # the last step has one, too
    validations = count_validations(recipe, schedule, done, last)
    losses = plan_losses(spec, sampler, schedule, last)
    num_losses = round(losses.count * (last - done) / last) if losses else 0
    starts_untrained = bool(validation.validate_first and done == 0)
    texts = {*data.captions, *validation.prompts, *(data.held_out.captions if data.held_out else ())}
    return Plan(
        first=done + 1,
        last=last,
        epochs=epochs,
        batches=batches,
        tflop=flop / 1e12 * epochs / spec.num_data_ranks,
        checkpoints=checkpoints,
        kept_checkpoints=min(checkpoints, limit or checkpoints),
        validations=validations,
        losses=num_losses,
        loss_tflop=num_losses * losses.flops / 1e12 if losses else 0,
        kept_validations=max(0, validations - starts_untrained) if spec.keeps_validated else 0,
        videos=len(validation.prompts) * validation.num_validation_videos,
        prompts=len(texts),
    )


def first_state(trial: RunSpec, recipe: Recipe) -> TrainerState:
    """Return the state that the run starts from: that of a checkpoint, or step 0."""
    resume_from = recipe.settings.checkpoints.resume_from_checkpoint
    if resumed := newest_checkpoint(resume_from, recipe.output_dir):
        return read_state(resumed)
    accumulation = recipe.settings.training.gradient_accumulation_steps
    return replace(trial.state, step=0, schedule=ScheduleStart(trial.num_data_ranks, accumulation))


def count_validations(recipe: Recipe, schedule: StepSchedule, done: int, last: int) -> int:
    """Return how often the run validates after `done` steps, the last step included."""
    flags = recipe.settings.validation
    if not recipe.is_validated:
        return 0
    between = range(done + 1, last)
    due = sum(schedule.is_due(step, flags.validation_steps, flags.validation_epochs) for step in between)
    return due + 1 + bool(flags.validate_first and done == 0)


def estimate_seconds(plan: Plan, recipe: Recipe, measured: Measured, num_processes: int) -> dict[str, float]:
    """Return the seconds that the run takes, by what it does; all processes sample videos.

    What a `--sampling_cache` skips depends on the video: denoising steps count in full.
    """
    seconds_per_tflop = measured.step.seconds / measured.step.tflops
    video = measured.video_seconds
    if recipe.sampled_size is not None:
        guidance, config = recipe.settings.guidance, measured.throughput.config
        more_passes = max(0, guidance.num_inference_steps - 2) * (2 if guidance.guidance_scale > 1 else 1)
        flop = count_forward_flops(config, count_tokens(config, recipe.sampled_size))
        video += more_passes * flop / 1e12 * seconds_per_tflop
    return {
        "steps": plan.tflop * seconds_per_tflop,
        "held-out loss": plan.loss_tflop * seconds_per_tflop,
        "validations": plan.validations * max(1, math.ceil(plan.videos / num_processes)) * video,
        "checkpoints": plan.checkpoints * measured.checkpoint_seconds,
    }


def estimate_bytes(plan: Plan, measured: Measured) -> dict[str, int]:
    """Return the bytes that the run takes on disk, by what it writes."""
    return {
        # A new one is complete before the oldest is removed.
        "checkpoints": min(plan.checkpoints, plan.kept_checkpoints + 1) * measured.checkpoint_bytes,
        "result": measured.result_bytes,
        "weights of validations": plan.kept_validations * measured.result_bytes,
        "videos": plan.validations * plan.videos * measured.video_bytes,
        "prompt embeddings": plan.prompts * measured.embedding_bytes,
    }


def describe_cache(plan: Plan, recipe: Recipe) -> str:
    """Return what the seconds omit of a cache of the validations, for the end of their line; empty without one."""
    cache = recipe.settings.guidance.sampling_cache
    if cache == "none" or not plan.validations:
        return ""
    return f"; what --sampling_cache {cache} skips is not subtracted"


def describe_run(trial: RunSpec, recipe: Recipe, measured: Measured) -> str:
    """Return the plan of the real run and its estimate, a line for each subject."""
    plan = plan_run(trial, recipe, measured.throughput)
    seconds = estimate_seconds(plan, recipe, measured, trial.accelerator.num_processes)
    on_disk, free = estimate_bytes(plan, measured), shutil.disk_usage(nearest_folder(recipe.output_dir)).free
    parts = ", ".join(f"{name} {in_words(one)}" for name, one in seconds.items() if one)
    files = ", ".join(f"{name} {in_bytes(one)}" for name, one in on_disk.items() if one)
    needed = sum(on_disk.values())
    rows = {
        "steps": f"{plan.first} to {plan.last}: {plan.epochs:.4g} epochs, {plan.batches} batches on each rank",
        "checkpoints": f"{plan.checkpoints}, {plan.kept_checkpoints} of them kept",
        "validations": f"{plan.validations}, of {plan.videos} videos" if plan.validations else "none",
        **({"held-out loss": f"measured {plan.losses} times"} if plan.losses else {}),
        "time": f"about {in_words(sum(seconds.values()))}: {parts}{describe_cache(plan, recipe)}",
        "disk": f"about {in_bytes(needed)}: {files}; {in_bytes(free)} are free",
    }
    if needed > free:
        rows["warning"] = "the disk is too small: set --checkpoints_total_limit, or another --output_dir"
    return as_table(rows)
