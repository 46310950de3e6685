"""What `--dry_run` of a training script does: go once through all that a run does, and leave nothing behind.

Every sample is read, two steps of the largest batch are trained, saved and loaded again, and a video is sampled. What
would fail after hours fails here, out of memory included.
"""

import logging
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import torch
from PIL import Image

from checkpoints.folder import load_checkpoint
from common.bars import tqdm
from common.errors import UserError, listing
from common.files import atomic_write, nearest_folder
from common.ranks import launch_rank, launch_size
from data.buckets import Bucket
from data.clips import ClipSample
from data.plan import TrainingData
from data.prepared import PreparedClip
from data.sampler import BucketBatchSampler, Draw
from dataset import make_loader
from flags.schema import replace_flags
from flags.settings import TrainingSettings
from run.loop import train
from run.setup import make_dataset, set_up
from run.spec import Method, RunSpec, Task, check_spec


logger = logging.getLogger(__name__)


STEPS = 2  # the optimizer's states come with the first step and are there in the second


def dry_run(
    settings: TrainingSettings,
    data: TrainingData,
    task: Task,
    method: Method,
) -> None:
    """Try out a run with these flags in a folder of its own, which is removed; called on every rank.

    Raises:
        UserError: model, data and flags do not go together, a sample cannot be read, or no video could be sampled.
    """
    with trial_spec(settings, data, task, method, samples=True) as spec:
        read_every_sample(settings, data, task)
        memory, failures = try_out(spec)
        if failures:
            raise UserError(f"--dry_run: the validation failed: {failures[0].splitlines()[0]}")
        logger.info("%s", describe_measured_memory(memory))
        logger.info("dry run: steps of the largest batch, saving, loading and sampling all work; nothing is kept")


@contextmanager
def trial_spec(
    settings: TrainingSettings, data: TrainingData, task: Task, method: Method, *, samples: bool
) -> Iterator[RunSpec]:
    """What a trial is made from: the largest batch, and a folder that is removed in the end; called on every rank.

    Args:
        samples: a video even where the run samples none.

    Raises:
        UserError: model, data and flags do not go together.
    """
    folder = trial_folder(Path(settings.training.output_dir))
    largest = largest_batch(
        data, settings.training.train_batch_size, launch_size(), min(2, settings.training.gradient_accumulation_steps)
    )
    try:
        trial = trial_flags(settings, folder, task, largest.buckets[0], samples=samples)
        yield replace(check_spec(trial, data, task, method), data=largest)
    finally:
        if launch_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def try_out(spec: RunSpec) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Train two steps, save, load and sample.

    Returns:
        The peaks of memory by part, and why sampling failed, if it did.
    """
    run = set_up(spec)
    train(run)
    memory = {"two steps": peak_memory(run.accelerator.device)}
    run.save_checkpoint(STEPS)
    load_checkpoint(run.accelerator, spec.output_dir / f"checkpoint-{STEPS}")
    run.save_result()
    failures = run.validate(STEPS)
    memory["a video"] = peak_memory(run.accelerator.device)
    run.coordinator.wait()
    run.accelerator.end_training()
    return memory, failures


def read_every_sample(settings: TrainingSettings, data: TrainingData, task: Task) -> None:
    """Read this rank's share of the samples as training would.

    Raises:
        UserError: lists those that cannot be read, unless bad clips are to be skipped.
    """
    rank, num_ranks = launch_rank(), launch_size()
    dataset = make_dataset(settings, data, task, seed=settings.training.seed or 0, replace_failed=False)
    draws = [[Draw(index, 0)] for index in range(rank, len(dataset), num_ranks)]
    loader = make_loader(dataset, draws, num_workers=settings.loader.dataloader_num_workers)
    bar = tqdm(loader, desc="Reading every sample", unit=" samples", total=len(draws), delay=0, disable=rank > 0)
    reasons = [reason for batch in bar for _, reason in batch.failed]
    if not reasons:
        return
    problem = listing(f"{len(reasons)} of {len(dataset)} samples cannot be read:", reasons, most=len(reasons))
    if settings.sources.on_bad_clip == "error":
        raise UserError(problem)
    logger.warning("warning: %s", problem)


def trial_folder(output_dir: Path) -> Path:
    """Where the trial is written: in the output folder or, until it exists, the nearest one that does; that is on the
    disk which the run will need."""
    return nearest_folder(output_dir) / f".dry-run.{output_dir.absolute().name}"


def trial_flags(
    settings: TrainingSettings, folder: Path, task: Task, size: Bucket, *, samples: bool
) -> TrainingSettings:
    """The flags of a run of two steps and one coarse video, which goes to no tracker and no hub.

    Args:
        size: of the video, where no validation says another.
        samples: a video even where there is no validation.
    """
    prompts, images, asked_for = settings.validation.prompts[:1], settings.validation.images[:1], {}
    if samples and not prompts:
        prompts = ("a trial",)
        asked_for = {"max_num_frames": size.num_frames, "height": size.height, "width": size.width}
        if task.with_images:
            images = (str(folder / "start.png"),)
            with atomic_write(Path(images[0])) as partial:  # by every rank, while others read it
                Image.new("RGB", (size.width, size.height), "gray").save(partial)
    changed = asked_for | {
        "output_dir": str(folder),
        "resume_from_checkpoint": None,
        "logging_dir": "logs",
        "max_train_steps": STEPS,
        "gradient_accumulation_steps": min(2, settings.training.gradient_accumulation_steps),
        "profile": False,
        "num_validation_videos": 1,
        "num_inference_steps": 2,
        "report_to": "none",
    }
    trial = replace_flags(settings, **changed)
    return replace(trial, validation=replace(trial.validation, prompts=prompts, images=images))


def largest_batch(data: TrainingData, batch_size: int, num_ranks: int, accumulation: int) -> TrainingData:
    """The samples that fill the largest batch, in pixels, for each rank `accumulation` times.

    A bucket that has fewer samples in an epoch than a batch holds has smaller batches.
    """
    sampler = BucketBatchSampler(data.buckets, batch_size, seed=0, repeats=data.repeats)
    sizes = {bucket: min(batch_size, samples) for bucket, samples in sampler.samples_per_epoch.items()}
    largest = max(sizes, key=lambda bucket: sizes[bucket] * bucket.num_frames * bucket.height * bucket.width)
    clips = [_once(clip) for clip, bucket in zip(data.clips, data.buckets, strict=True) if bucket == largest]
    return replace(data, clips=list(islice(cycle(clips), sizes[largest] * num_ranks * accumulation)))


def _once(sample: ClipSample | PreparedClip) -> ClipSample | PreparedClip:
    """The sample as it is without repeats."""
    if isinstance(sample, PreparedClip):
        return replace(sample, repeats=1.0)
    return replace(sample, clip=replace(sample.clip, repeats=1.0))


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most memory in use so far, in bytes."""
    peaks = {"host": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if device.type == "cuda":
        peaks |= {
            "device, allocated": torch.cuda.max_memory_allocated(device),
            "device, reserved": torch.cuda.max_memory_reserved(device),
        }
    return peaks


def describe_measured_memory(memory: dict[str, dict[str, int]]) -> str:
    """A line for each part of the trial."""
    lines = []
    for part, peaks in memory.items():
        sizes = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in peaks.items())
        lines.append(f"peak memory up to {part}: {sizes}")
    return "\n".join(lines)
