"""What `--dry_run` of a training script does: go once through all that a run does, and leave nothing behind.

Every sample is read, then one step of the largest batch is trained, saved, loaded again, and a video is sampled. What
would fail after hours fails here, out of memory included.
"""

import argparse
import logging
import resource
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from buckets import Bucket, Draw
from checkpoints import load_checkpoint
from dataset import make_loader
from errors import UserError, listing
from plan import TrainingData
from ranks import launch_rank, launch_size
from recipe import Method, Task
from run_setup import Run, make_dataset, set_up


logger = logging.getLogger(__name__)


def rehearse(
    args: argparse.Namespace,
    data: TrainingData,
    task: Task,
    method: Method,
    train: Callable[[argparse.Namespace, Run], None],
) -> None:
    """Try out a run with these flags in a folder beside the output folder, which is removed; called on every rank.

    Args:
        train: the loop.

    Raises:
        UserError: a sample cannot be read, or the sampling of a video failed.
    """
    read_every_sample(args, data, task)
    folder = trial_folder(Path(args.output_dir))
    largest = largest_batch(data, args.train_batch_size * launch_size())
    trial = trial_flags(args, folder, task, largest.buckets[0])
    try:
        run = set_up(trial, largest, task, method)
        train(trial, run)
        memory = {"one step": peak_memory(run.accelerator.device)}
        run.save_checkpoint(1)
        load_checkpoint(run.accelerator, folder / "checkpoint-1")
        run.save_result()
        if failures := run.validate(1):
            raise UserError(f"--dry_run: no video could be sampled: {failures[0].splitlines()[0]}")
        memory["a video"] = peak_memory(run.accelerator.device)
        run.accelerator.wait_for_everyone()
        logger.info("%s", describe_memory(memory))
        logger.info("dry run: a step of the largest batch, saving, loading and sampling all work; nothing is kept")
        run.accelerator.end_training()
    finally:
        if launch_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def read_every_sample(args: argparse.Namespace, data: TrainingData, task: Task) -> None:
    """Read this rank's share of the samples as training would.

    Raises:
        UserError: lists those that cannot be read, unless bad clips are to be skipped.
    """
    rank, num_ranks = launch_rank(), launch_size()
    dataset = make_dataset(args, data, task, seed=args.seed or 0, replace_failed=False)
    draws = [[Draw(index, 0)] for index in range(rank, len(dataset), num_ranks)]
    loader = make_loader(dataset, draws, num_workers=args.dataloader_num_workers)
    bar = tqdm(loader, desc="Reading every sample", unit=" samples", total=len(draws), disable=rank > 0)
    reasons = [reason for batch in bar for _, reason in batch.failed]
    if not reasons:
        return
    problem = listing(f"{len(reasons)} of {len(dataset)} samples cannot be read:", reasons, most=len(reasons))
    if args.on_bad_clip == "error":
        raise UserError(problem)
    logger.warning("warning: %s", problem)


def trial_folder(output_dir: Path) -> Path:
    """Where the trial is written: on the disk that the run will need, in the nearest folder that exists."""
    output_dir = output_dir.absolute()
    existing = next(parent for parent in output_dir.parents if parent.is_dir())
    return existing / f".dry-run.{output_dir.name}"


def trial_flags(args: argparse.Namespace, folder: Path, task: Task, size: Bucket) -> argparse.Namespace:
    """The flags of a run of one step and one coarse video, which goes to no tracker and no hub.

    Args:
        size: of the video, where no validation says another.
    """
    prompts, images, asked_for = args.validation_prompts[:1], args.validation_images[:1], {}
    if not prompts:
        prompts = ["a trial"]
        asked_for = {"max_num_frames": size.num_frames, "height": size.height, "width": size.width}
        if task.with_images:
            folder.mkdir(parents=True, exist_ok=True)
            images = [str(folder / "start.png")]
            Image.new("RGB", (size.width, size.height), "gray").save(images[0])
    changed = asked_for | {
        "output_dir": str(folder),
        "resume_from_checkpoint": None,
        "max_train_steps": 1,
        "gradient_accumulation_steps": 1,
        "validation_prompts": prompts,
        "validation_images": images,
        "num_validation_videos": 1,
        "num_inference_steps": 2,
        "report_to": "none",
    }
    return argparse.Namespace(**(vars(args) | changed))


def largest_batch(data: TrainingData, batch_size: int) -> TrainingData:
    """The samples of the batch that needs the most memory."""
    counts = Counter(data.buckets)

    def pixels(bucket: Bucket) -> int:
        return min(batch_size, counts[bucket]) * bucket.num_frames * bucket.height * bucket.width

    largest = max(counts, key=pixels)
    clips = [clip for clip, bucket in zip(data.clips, data.buckets, strict=True) if bucket == largest]
    return replace(data, clips=clips[:batch_size])


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most memory in use so far, in bytes."""
    peaks = {"host": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if device.type == "cuda":
        peaks |= {
            "device, allocated": torch.cuda.max_memory_allocated(device),
            "device, reserved": torch.cuda.max_memory_reserved(device),
        }
    return peaks


def describe_memory(memory: dict[str, dict[str, int]]) -> str:
    """A line for each part of the trial."""
    lines = []
    for part, peaks in memory.items():
        sizes = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in peaks.items())
        lines.append(f"peak memory up to {part}: {sizes}")
    return "\n".join(lines)
