"""`--dry_run` of a training script: do everything once that a run does, and keep nothing.

All samples are read, two steps of the largest batch are trained, saved and loaded again, and a video is sampled.
Failures that would come after hours come here, running out of memory included.
"""

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from pathlib import Path

import numpy as np
from PIL import Image

from checkpoints.folder import load_checkpoint
from checkpoints.manifest import size_of
from cli.schema import flag_values, replace_flags
from common.bars import tqdm
from common.errors import UserError, listing
from common.files import atomic_write, nearest_folder
from common.ranks import launch_rank, launch_size
from data.buckets import Bucket
from data.sampler import BucketBatchSampler, Draw
from data.token_budget import BatchSize, TokenBudget
from dataset import make_loader
from flags.settings import TrainingSettings
from planning.samples import TrainingData
from run.estimate import Measured, describe_run
from run.loop import train
from run.recipe import Recipe
from run.setup import make_dataset, set_up
from run.spec import RunSpec, check_spec
from tracking.peak_memory import PeakMemory
from video.condition_frames import ENDS, given_frames, is_context
from video.frames import Cut
from video.io import write_video


logger = logging.getLogger(__name__)

STEPS = 2  # the first one creates the optimizer's states, the second one needs them at its peak


def dry_run(recipe: Recipe) -> None:
    """Try a run in a folder that is removed again; raise a UserError if anything fails. Called on every rank."""
    with trial_spec(recipe, samples=True) as spec:
        read_every_sample(recipe)
        trial = try_out(spec)
        if trial.failures:
            raise UserError(f"--dry_run: the validation failed: {trial.failures[0].splitlines()[0]}")
        logger.info("dry run: steps of the largest batch, saving, loading and sampling all work; nothing is kept")
        if launch_rank() == 0:
            logger.info("the run would be:\n%s", describe_run(spec, recipe, trial.measured))
            logger.info("%s", trial.memory.describe())


@contextmanager
def trial_spec(recipe: Recipe, *, samples: bool) -> Iterator[RunSpec]:
    """Yield the spec of a trial of the largest batch, in a folder that is removed at the end; called on every rank.

    With `samples`, a video is sampled even if the run samples none. Raises UserError as `check_spec` does.
    """
    settings, folder = recipe.settings, trial_folder(recipe.output_dir)
    accumulation = min(2, settings.training.gradient_accumulation_steps)
    largest = largest_batch(recipe.data, recipe.batch_limit, launch_size(), accumulation)
    try:
        trial = trial_settings(settings, folder, largest.buckets[0] if samples else None)
        yield replace(check_spec(replace(recipe, settings=trial)), data=largest)
    finally:
        if launch_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Trial:
    """The outcome of a trial."""

    memory: PeakMemory
    failures: list[str]  # of the sampling
    measured: Measured


def try_out(spec: RunSpec) -> Trial:
    """Train two steps, save, load and sample; called on every rank."""
    run, accelerator, folder = set_up(spec), spec.accelerator, spec.output_dir
    with run.memory.phase("training"):
        train(run)
    began = time.monotonic()
    run.save_checkpoint(STEPS)
    saved = time.monotonic()
    checkpoint = folder / f"checkpoint-{STEPS}"
    load_checkpoint(accelerator, checkpoint)
    result = run.save_result()
    sampling = time.monotonic()
    failures = run.validate(STEPS)
    video_seconds = time.monotonic() - sampling
    measured = Measured(
        step=run.throughput.latest,
        throughput=run.throughput,
        checkpoint_seconds=saved - began,
        checkpoint_bytes=size_of(checkpoint),
        result_bytes=size_of(result) if result.is_dir() else result.stat().st_size,
        video_seconds=video_seconds,
        video_bytes=max((file.stat().st_size for file in (folder / "validation").rglob("*.mp4")), default=0),
        embedding_bytes=max((file.stat().st_size for file in (folder / "prompt_embeds").glob("*")), default=0),
    )
    spec.coordinator.wait()  # the main rank then removes the folder
    accelerator.end_training()
    return Trial(run.memory, failures, measured)


def read_every_sample(recipe: Recipe) -> None:
    """Read this rank's share of the samples as training would.

    A UserError, with --on_bad_clip skip a warning, lists those that cannot be read.
    """
    rank, settings = launch_rank(), recipe.settings
    dataset = make_dataset(recipe, settings.training.seed or 0, replace_failed=False)
    share = range(rank, len(dataset), launch_size())
    loader = make_loader(
        dataset, ([Draw(index, 0)] for index in share), num_workers=settings.loader.dataloader_num_workers
    )
    bar = tqdm(loader, desc="Reading every sample", unit=" samples", total=len(share), delay=0, disable=rank > 0)
    reasons = [reason for batch in bar for _, reason in batch.failed]
    if not reasons:
        return
    problem = listing(f"{len(reasons)} of {len(dataset)} samples cannot be read:", reasons, most=len(reasons))
    if settings.sources.on_bad_clip == "error":
        raise UserError(problem)
    logger.warning("warning: %s", problem)


def trial_folder(output_dir: Path) -> Path:
    """Return the folder of the trial, inside the output folder or its nearest existing parent: on the run's disk."""
    return nearest_folder(output_dir) / f".dry-run.{output_dir.absolute().name}"


def trial_settings(settings: TrainingSettings, folder: Path, sampled: Bucket | None) -> TrainingSettings:
    """Return the settings of a run of two steps and one coarse video, without trackers and hub.

    If the run validates nothing, the video has the size `sampled`; with None, there is none.
    """
    flags, size_flags = settings.validation, {}
    prompts, images, controls = (one[:1] for one in (flags.prompts, flags.images, flags.controls))
    if sampled and not prompts:
        prompts = ("a trial",)
        size_flags = {"max_num_frames": sampled.num_frames, "height": sampled.height, "width": sampled.width}
        if settings.task == "image-to-video":
            images = (write_given_frames(settings.image.condition_frames, folder, sampled, settings.clips.fps),)
        elif settings.task == "control-to-video":
            controls = (str(folder / "control.mp4"),)
            write_gray(Path(controls[0]), sampled, sampled.num_frames, Cut.of(flag_values(settings)))
            with atomic_write(folder / "control.mask.png") as partial:  # for --compute_control inpaint
                Image.new("RGB", (sampled.width, sampled.height), "white").save(partial)
    trial = replace_flags(
        settings,
        **size_flags,
        output_dir=str(folder),
        resume_from_checkpoint=None,
        logging_dir="logs",
        max_train_steps=STEPS,
        gradient_accumulation_steps=min(2, settings.training.gradient_accumulation_steps),
        profile=False,
        logging_steps=1,
        num_validation_videos=1,
        num_inference_steps=2,
        report_to="none",
    )
    return replace(trial, validation=replace(trial.validation, prompts=prompts, images=images, controls=controls))


def write_given_frames(condition: str, folder: Path, size: Bucket, fps: float | None = None) -> str:
    """Write what a video is sampled from, in gray, and return its value for --validation_images."""
    if is_context(condition):
        write_gray(folder / "start.mp4", size, len(given_frames(condition, size.num_frames)), Cut(fps))
        return str(folder / "start.mp4")
    file = folder / "start.png"
    with atomic_write(file) as partial:  # by every rank, while others read it
        Image.new("RGB", (size.width, size.height), "gray").save(partial)
    return f"{file},{file}" if condition == ENDS else str(file)


def write_gray(file: Path, size: Bucket, num_frames: int, cut: Cut) -> None:
    """Write a gray video of which this cut leaves a number of frames."""
    gray = Image.new("RGB", (size.width, size.height), "gray")
    rate = Fraction(cut.fps or 8).limit_denominator(10_000)
    with atomic_write(file) as partial:
        write_video(partial, [gray] * (cut.skip_frames_start + num_frames + cut.skip_frames_end), rate)


def largest_batch(
    data: TrainingData, batch_size: BatchSize | TokenBudget, num_ranks: int, accumulation: int
) -> TrainingData:
    """Return the samples of the largest batch, in pixels, `accumulation` times for each rank.

    A bucket that has fewer samples in an epoch than a batch holds has smaller batches.
    """
    sampler = BucketBatchSampler.of(data, batch_size, seed=0)
    samples = []
    for largest, count in sampler.largest_batch(cost=prod).items():
        of_bucket = np.flatnonzero(data.buckets.codes == data.buckets.kinds.index(largest))
        samples += np.resize(of_bucket, count * num_ranks * accumulation).tolist()
    return data.take(samples)
