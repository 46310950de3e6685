"""Log validation videos to the experiment trackers, each in the tracker's own form."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate.tracking import GeneralTracker


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationVideo:
    """One sampled video."""

    number: int  # among all videos of a validation, prompt by prompt
    name: str
    prompt: str
    file: Path  # mp4
    shown: list[np.ndarray]  # a few frames spread over the video, small, of one size; uint8 [H, W, 3], RGB


def log_videos(
    trackers: Sequence[GeneralTracker], videos: Sequence[ValidationVideo], sheet: Path | None, step: int
) -> None:
    """Log videos with their names and prompts on the main process; warn if a tracker fails.

    Args:
        trackers: accelerate's trackers; those that take no pictures are skipped.
        videos: videos that have been written.
        sheet: a PNG of all of them, or None.
        step: optimizer steps done.
    """
    for tracker in trackers:
        try:
            if tracker.name == "wandb":
                _log_to_wandb(tracker, videos, sheet, step)
            elif tracker.name == "trackio":
                _log_to_trackio(tracker, videos, sheet, step)
            elif tracker.name == "tensorboard":
                _log_to_tensorboard(tracker, videos, step)
            elif tracker.name == "comet_ml":
                _log_to_comet(tracker, videos, sheet, step)
        except Exception as error:
            logger.warning(
                "warning: %s failed to log the validation videos of step %d (%s); training continues",
                tracker.name,
                step,
                f"{type(error).__name__}: {error}",
            )


def _log_to_wandb(tracker: GeneralTracker, videos: Sequence[ValidationVideo], sheet: Path | None, step: int) -> None:
    import wandb

    logged = {
        "validation": [wandb.Video(str(video.file), caption=f"{video.name}: {video.prompt}") for video in videos]
    }
    if sheet is not None:
        logged["validation_contact_sheet"] = wandb.Image(str(sheet))
    tracker.log(logged, step=step)


def _log_to_trackio(tracker: GeneralTracker, videos: Sequence[ValidationVideo], sheet: Path | None, step: int) -> None:
    import trackio

    logged = {f"validation/{video.name}": trackio.Video(str(video.file), caption=video.prompt) for video in videos}
    if sheet is not None:
        logged["validation/contact_sheet"] = trackio.Image(str(sheet))
    tracker.log(logged, step=step)


def _log_to_tensorboard(tracker: GeneralTracker, videos: Sequence[ValidationVideo], step: int) -> None:
    """Log each video's frames side by side, as TensorBoard's writer needs moviepy for videos."""
    for video in videos:
        strip = np.concatenate(video.shown, axis=1)
        tracker.log_images({f"validation/{video.name}": strip[None]}, step=step, dataformats="NHWC")
        tracker.log({f"validation/{video.name}": video.prompt}, step=step)


def _log_to_comet(tracker: GeneralTracker, videos: Sequence[ValidationVideo], sheet: Path | None, step: int) -> None:
    experiment = tracker.tracker
    for video in videos:
        experiment.log_video(
            str(video.file), name=f"validation/{video.name}", step=step, metadata={"prompt": video.prompt}
        )
    if sheet is not None:
        experiment.log_image(str(sheet), name="validation/contact_sheet", step=step)
