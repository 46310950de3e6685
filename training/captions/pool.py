"""Caption clips in parallel: decode their frames and ask a captioner."""

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Protocol

from PIL import Image

from captions.text import IMAGE_PROMPT, VIDEO_PROMPT, NoCaption
from common.bars import tqdm
from common.errors import UserError, listing
from data.clips import BadClip, ClipSample
from video.io import read_frames


# More than these mean that the server is gone or does not accept pictures.
MOST_FAILURES_IN_A_ROW = 10


class Captioner(Protocol):
    """A model that describes frames."""

    model: str

    def describe(self, frames: Sequence[Image.Image], prompt: str) -> str:
        """Return a caption; raises NoCaption if there is none for this clip, UserError if there is none for any."""


def _read_frames(planned: ClipSample, max_size: int) -> list[Image.Image]:
    """Return the chosen frames, each once, in RGB, their longer side at most `max_size` pixels."""
    indices = tuple(dict.fromkeys(planned.frame_indices))
    frames = [
        Image.fromarray(pixels) for pixels in read_frames(planned.clip.video, indices, seekable=planned.info.seekable)
    ]
    for frame in frames:
        frame.thumbnail((max_size, max_size), Image.Resampling.LANCZOS)
    return frames


def caption_clip(planned: ClipSample, captioner: Captioner, prompt: str | None, max_size: int) -> str:
    """Caption one clip.

    Args:
        prompt: None takes the built-in one.

    Raises:
        NoCaption: with the reason.
        UserError: no clip can be captioned.
    """
    try:
        frames = _read_frames(planned, max_size)
    except ValueError as error:
        raise NoCaption(str(error).removeprefix(f"{planned.clip.video}: ")) from error
    return captioner.describe(frames, prompt or (IMAGE_PROMPT if planned.info.is_image else VIDEO_PROMPT))


def caption_clips(
    clips: Mapping[str, ClipSample],
    caption: Callable[[str, ClipSample], None],
    num_workers: int,
    stopped: threading.Event,
) -> list[BadClip]:
    """Caption clips in parallel.

    Args:
        clips: by their paths as listed.
        caption: captions one clip and stores the caption, or raises NoCaption.
        num_workers: clips at a time.
        stopped: set on return, and on any exception.

    Returns:
        The clips without a caption and the reasons, in the order of `clips`.

    Raises:
        UserError: no further clip can be captioned.
    """
    failures, in_a_row = {}, 0
    pool = ThreadPoolExecutor(num_workers)
    try:
        asked = {pool.submit(caption, path, planned): (path, planned.clip) for path, planned in clips.items()}
        with tqdm(total=len(asked), desc="Captioning", unit=" clips", delay=0) as bar:
            for done in as_completed(asked):
                (path, clip), in_a_row = asked[done], in_a_row + 1
                try:
                    done.result()
                    in_a_row = 0
                except NoCaption as reason:
                    failures[path] = BadClip(str(clip.video), clip.source, str(reason))
                    bar.set_postfix_str(f"{len(failures)} failed")
                bar.update()
                if in_a_row == MOST_FAILURES_IN_A_ROW < len(asked):
                    title = f"{in_a_row} clips in a row got no caption, so no more are tried; finished ones are kept:"
                    raise UserError(listing(title, list(failures.values())[-in_a_row:]))
    except KeyboardInterrupt:
        tqdm.write("\nstopping; answers that are under way are waited for", file=sys.stderr)
        raise
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the clips that are queued
    return [failures[path] for path in clips if path in failures]
