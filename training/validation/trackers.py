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
            _log(tracker, videos, sheet, step)
        except Exception as error:
            logger.warning(
                "warning: %s failed to log the validation videos of step %d (%s); training continues",
                tracker.name,
                step,
                f"{type(error).__name__}: {error}",
            )


def _log(tracker: GeneralTracker, videos: Sequence[ValidationVideo], sheet: Path | None, step: int) -> None:
    match tracker.name:
        case "wandb":
            import wandb

            clips = [wandb.Video(str(video.file), caption=f"{video.name}: {video.prompt}") for video in videos]
            media = {"validation": clips}
            if sheet is not None:
                media["validation_contact_sheet"] = wandb.Image(str(sheet))
            tracker.log(media, step=step)
        case "trackio":
            import trackio

            media = {
                f"validation/{video.name}": trackio.Video(str(video.file), caption=video.prompt) for video in videos
            }
            if sheet is not None:
                media["validation/contact_sheet"] = trackio.Image(str(sheet))
            tracker.log(media, step=step)
        case "tensorboard":  # its writer needs moviepy for videos
            for video in videos:
                strip = np.concatenate(video.shown, axis=1)
                tracker.log_images({f"validation/{video.name}": strip[None]}, step=step, dataformats="NHWC")
                tracker.log({f"validation/{video.name}": video.prompt}, step=step)
        case "comet_ml":
            for video in videos:
                name, metadata = f"validation/{video.name}", {"prompt": video.prompt}
                tracker.tracker.log_video(str(video.file), name=name, step=step, metadata=metadata)
            if sheet is not None:
                tracker.tracker.log_image(str(sheet), name="validation/contact_sheet", step=step)
