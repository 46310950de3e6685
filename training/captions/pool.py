"""Caption clips in parallel: decode their frames and ask a captioner."""

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Protocol

from PIL import Image

from captions.text import NoCaption, Questions
from common.bars import tqdm
from common.errors import UserError, listing
from data.clips import BadClip, ClipSample
from video.io import read_frames


# More than these mean that the server is gone or does not accept pictures.
MOST_FAILURES_IN_A_ROW = 10


class Captioner(Protocol):
    """A vision-language model that captions frames, which are RGB and in order.

    `describe` raises NoCaption if there is no caption for this clip, UserError if there is none for any.
    """

    model: str
    describe: Callable[[Sequence[Image.Image], str], str]


def caption_clip(planned: ClipSample, captioner: Captioner, questions: Questions, max_size: int) -> str:
    """Caption one clip from its chosen frames, each shown once, with their longer side at most `max_size` pixels.

    Raises NoCaption and UserError as the captioner does.
    """
    indices = list(dict.fromkeys(planned.frame_indices))
    try:
        pixels = read_frames(planned.clip.video, indices, seekable=planned.info.seekable)
    except ValueError as error:
        raise NoCaption(str(error).removeprefix(f"{planned.clip.video}: ")) from error
    frames = [Image.fromarray(picture) for picture in pixels]
    for frame in frames:
        frame.thumbnail((max_size, max_size), Image.Resampling.LANCZOS)
    return captioner.describe(frames, questions.image if planned.info.is_image else questions.video)


def caption_clips(
    clips: Mapping[str, ClipSample],
    caption: Callable[[str, ClipSample], None],
    num_workers: int,
    stopped: threading.Event,
) -> list[BadClip]:
    """Caption clips in parallel.

    Args:
        clips: by their paths as listed.
        caption: captions one clip and stores the caption, or raises NoCaption, or UserError to end the run.
        stopped: set on return, and on any exception.

    Returns:
        The clips without a caption and the reasons, in the order of `clips`.
    """
    failures, in_a_row = {}, 0
    pool = ThreadPoolExecutor(num_workers)
    try:
        asked = {pool.submit(caption, path, planned): path for path, planned in clips.items()}
        with tqdm(total=len(asked), desc="Captioning", unit=" clips", delay=0) as bar:
            for done in as_completed(asked):
                try:
                    done.result()
                    in_a_row = 0
                except NoCaption as reason:
                    clip = clips[asked[done]].clip
                    failures[asked[done]] = BadClip(str(clip.video), clip.source, str(reason))
                    in_a_row += 1
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
