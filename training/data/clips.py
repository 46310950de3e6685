"""Clips, and the plan that gives each its frames and its bucket before anything is decoded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

from data.buckets import Bucket, assign_bucket
from video.frames import choose_samples
from video.probe import VideoInfo


@dataclass(frozen=True, slots=True)
class Clip:
    """One video, or still image, and its caption."""

    video: Path
    caption: str  # with the id token in front
    source: str  # where it is listed, for messages: "videos.txt:3"
    image: Path | None = None  # the first frame that image-to-video conditions on; None: the video's own
    repeats: float = 1.0  # how often it comes in an epoch; 2.5: twice in each, and once more in half of them
    metadata: Mapping[str, str] = field(default_factory=dict)  # the table's other columns


@dataclass(frozen=True, slots=True)
class BadClip:
    """A clip that cannot be used, and why."""

    what: str  # its path as far as it is known
    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what} ({self.source}): {self.reason}"


@dataclass(frozen=True, slots=True)
class ClipSample:
    """A sample: which frames of a clip go into which bucket."""

    clip: Clip
    info: VideoInfo
    bucket: Bucket
    frame_indices: tuple[int, ...]
    part: int = 0  # which of the clip's samples, where a long clip gives several
    first_frame: VideoInfo | None = None  # what the probe found of clip.image, where that is needed
    num_held: int = 0  # frames at the end that are there only because the last one is held


def plan_clips(
    clips: Sequence[Clip],
    infos: Mapping[Path, VideoInfo | str],
    buckets: Sequence[Bucket],
    *,
    skip_start: int = 0,
    skip_end: int = 0,
    fps: float | None = None,
    long_clips: str = "spread",
    hold_last_frame: bool = False,
    with_images: bool = False,
) -> tuple[list[ClipSample], list[BadClip]]:
    """Give every clip its frames and its bucket, or the reason why it has none.

    Args:
        clips: what to plan, in order.
        infos: what the probe found of every video, and with `with_images` of every image; a str is the reason why a
            file cannot be used. As from `probe_files`.
        buckets: as from `make_buckets`.
        skip_start, skip_end: frames left out at either end of each video.
        fps: frames a second to sample at; None takes a clip's frames as they are.
        long_clips: one of `frames.LONG_CLIPS`.
        hold_last_frame: fill videos that are too short by repeating their last frame.
        with_images: clips that name an image need it; otherwise images are not looked at.

    Returns:
        The samples and the bad clips, both in the order of `clips`. Every clip is in exactly one of the two.
    """
    choose = partial(choose_samples, skip_start=skip_start, skip_end=skip_end, fps=fps, long_clips=long_clips)
    frame_counts = sorted({bucket.num_frames for bucket in buckets})

    # Clips alike share one tuple of frame numbers, which saves time and memory where there are a million.
    @cache
    def samples_of(timing: VideoInfo) -> tuple[list[tuple[int, ...]], int]:
        return _choose_or_hold(timing, frame_counts, choose, hold_last_frame)

    @cache
    def bucket_of(num_frames: int, height: int, width: int) -> Bucket:
        return assign_bucket(num_frames, height, width, buckets)

    planned, bad = [], []
    for clip in clips:
        try:
            info = _found(infos[clip.video])
            first_frame = _first_frame(clip, infos) if with_images else None
            samples, num_held = samples_of(_timing(info))
        except ValueError as reason:
            bad.append(BadClip(str(clip.video), clip.source, str(reason)))
            continue
        for part, indices in enumerate(samples):
            bucket = bucket_of(len(indices), info.height, info.width)
            planned.append(ClipSample(clip, info, bucket, indices, part, first_frame, num_held))
    return planned, bad


def _found(info: VideoInfo | str) -> VideoInfo:
    if isinstance(info, str):
        raise ValueError(info)
    return info


def _first_frame(clip: Clip, infos: Mapping[Path, VideoInfo | str]) -> VideoInfo | None:
    if clip.image is None:
        return None
    try:
        return _found(infos[clip.image])
    except ValueError as error:
        raise ValueError(f"its image {clip.image}: {error}") from error


def _timing(info: VideoInfo) -> VideoInfo:
    """The same for all clips that the same frames are chosen from."""
    return replace(info, height=0, width=0, rotation=0, seekable=False, sha256="")


def _choose_or_hold(
    info: VideoInfo, frame_counts: Sequence[int], choose: Callable[..., list[tuple[int, ...]]], hold_last_frame: bool
) -> tuple[list[tuple[int, ...]], int]:
    """The samples of a clip, and how many frames of its only one are there because the last frame is held."""
    try:
        return choose(info, frame_counts), 0
    except ValueError:
        if not hold_last_frame:
            raise
    (sample,) = choose(info, frame_counts, hold_last_frame=True)

    def fits(count: int) -> bool:
        try:
            return bool(choose(info, [count]))
        except ValueError:
            return False

    # Frames repeat by themselves where fps is above the clip's rate, so counting equal ones would not tell.
    return [sample], next(held for held in range(1, len(sample)) if fits(len(sample) - held))
