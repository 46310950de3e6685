"""Choose the frames of a clip's samples, with exact arithmetic on the probe's result; opens no file."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from video.probe import VideoInfo


# How to use a clip with more frames than a sample takes: frames spread over the clip, its first part, or consecutive
# parts, each a sample.
LONG_CLIPS = ("spread", "first", "split")
RESHAPE_MODES = ("center", "random", "none")  # see --video_reshape_mode
# A slide show may repeat every frame a few dozen times; more means damaged time stamps and endless repeats.
_MOST_REPEATS = 100


@dataclass(frozen=True)
class Cut:
    """How training clips are cut and cropped, and like them what sampled videos follow; named as the flags."""

    fps: float | None = None
    long_clips: str = "spread"  # with `fps`, the same as "first"
    hold_last_frame: bool = False
    skip_frames_start: int = 0
    skip_frames_end: int = 0
    video_reshape_mode: str = "center"

    def __post_init__(self):
        is_rate = self.fps is None or self.fps > 0
        if not is_rate or self.long_clips not in LONG_CLIPS or self.video_reshape_mode not in RESHAPE_MODES:
            raise ValueError(f"no such cut: {self}")

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> "Cut":
        """Return the cut that flags set by name; raises ValueError or TypeError for other values than theirs."""
        return cls(**{one.name: flags[one.name] for one in fields(cls) if one.name in flags})

    def choose(self, info: "VideoInfo", num_frames: int) -> tuple[int, ...]:
        """Return the frames of a sample of this length, the first of several; raises ValueError without one."""
        if info.is_image and num_frames > 1:
            raise ValueError("is a still image, not a video")
        skipped = self.skip_frames_start, self.skip_frames_end
        usable = () if info.is_image else usable_frames(info, *skipped, self.fps)
        if not info.is_image and len(usable) < num_frames and not (self.hold_last_frame and usable):
            raise ValueError(f"has {count_usable(info, len(usable), *skipped, self.fps)}; pass a longer one")
        return choose_samples(
            info,
            [num_frames],
            skip_start=self.skip_frames_start,
            skip_end=self.skip_frames_end,
            fps=self.fps,
            long_clips="first" if self.fps and self.long_clips == "spread" else self.long_clips,
            hold_last_frame=self.hold_last_frame,
        )[0]


UNCUT = Cut()  # by default


def choose_samples(
    info: "VideoInfo",
    frame_counts: Sequence[int],
    *,
    skip_start: int = 0,
    skip_end: int = 0,
    fps: float | None = None,
    long_clips: str = "spread",
    hold_last_frame: bool = False,
) -> list[tuple[int, ...]]:
    """Choose the frames of each sample of a clip.

    A sample has the largest count that the clip can fill. Videos take a count of 1 only if there is no other: a clip
    that is a little short must not silently become a still image.

    With fps the frames are first resampled: frame i is the one nearest in time to i / fps seconds after the first
    usable frame (halves round up), by the frames' own time stamps if the rate varies. The last frame counts as shown
    for the average frame duration. From these frames

    - "spread" takes as many as a sample needs, evenly from the first to the last,
    - "first" takes the first ones,
    - "split" takes consecutive samples as long as the rest fills one; the remainder is not used.

    Args:
        frame_counts: of the frame buckets, at least 1 each, in any order.
        skip_start, skip_end: frames at either end of a video that are never chosen; ignored for still images.
        fps: sampling rate in frames per second.
        hold_last_frame: repeat the last usable frame of a video that is too short for the smallest count above 1.

    Returns:
        At least one sample; its indices are in [skip_start, num_frames - skip_end - 1] and never decrease. They repeat
        only if fps is above the clip's rate, or the last frame is held. A clip without a sample is a ValueError with
        the numbers and what to do.
    """
    if info.is_image:
        if 1 not in frame_counts:
            raise ValueError("is a still image; add 1 to --frame_buckets")
        return [(0,)]
    counts = sorted(count for count in set(frame_counts) if count > 1) or [1]
    usable = usable_frames(info, skip_start, skip_end, fps)
    if len(usable) < counts[0]:
        if not (hold_last_frame and usable and counts[0] > 1):
            raise ValueError(_too_short(info, len(usable), counts[0], skip_start, skip_end, fps))
        return [(*usable, *[usable[-1]] * (counts[0] - len(usable)))]
    largest = max(count for count in counts if count <= len(usable))
    if long_clips == "first":
        return [tuple(usable[:largest])]
    if long_clips == "spread":
        gap = Fraction(len(usable) - 1, max(largest - 1, 1))
        return [tuple(usable[round_half_up(i * gap)] for i in range(largest))]
    samples, start = [], 0
    while len(usable) - start >= counts[0]:
        count = max(count for count in counts if count <= len(usable) - start)
        samples.append(tuple(usable[start : start + count]))
        start += count
    return samples


def usable_frames(info: "VideoInfo", skip_start: int, skip_end: int, fps: float | None) -> Sequence[int]:
    """Return the frames that samples are chosen from: all that are not skipped, or those resampled at `fps`."""
    frames = range(skip_start, info.num_frames - skip_end)
    if fps is None or not frames:
        return frames
    if info.fps <= 0:
        raise ValueError("its frame rate is unknown, so it cannot be sampled at --fps")
    if fps > _MOST_REPEATS * info.fps:
        raise ValueError(f"plays at {info.fps:g} fps, too slow to be sampled at --fps {fps:g}")
    rate = _as_meant(fps)
    if info.frame_times is not None:
        return _frames_by_time(info.frame_times, frames[0], frames[-1], rate)
    step = _as_meant(info.fps) / rate
    # The largest count whose last position, round_half_up((count - 1) · step), is still below len(frames).
    count = -((1 - 2 * len(frames)) // (2 * step))
    return [frames[round_half_up(i * step)] for i in range(count)]


def _frames_by_time(times: Sequence[int], first: int, last: int, rate: Fraction) -> list[int]:
    """Do the same by the times of all frames in microseconds, for a variable rate; `first` to `last` are used."""
    # Twice the time at which the next frame becomes the nearest: doubled, all are integers.
    changes = [a + b for a, b in pairwise(times)]
    average = Fraction(times[-1] - times[0], len(times) - 1)
    end = changes[last] if last < len(changes) else 2 * times[last] + average
    count = -((2 * times[first] - end) // (2_000_000 / rate))
    # The changes up to each moment are counted; they are integers, so it may be floored.
    moments = (2 * times[first] + 2_000_000 * i * rate.denominator // rate.numerator for i in range(count))
    return [bisect_right(changes, moment, first, last) for moment in moments]


def _as_meant(rate: float) -> Fraction:
    """Return the nearest small fraction: 30000/1001 for 29.97002997."""
    return Fraction(rate).limit_denominator(10_000) or Fraction(rate)


def _too_short(
    info: "VideoInfo", num_usable: int, smallest: int, skip_start: int, skip_end: int, fps: float | None
) -> str:
    frames = count_usable(info, num_usable, skip_start, skip_end, fps)
    ways = []
    if num_usable == 0 or len(usable_frames(info, 0, 0, fps)) >= smallest:
        ways.append("lower --skip_frames_start or --skip_frames_end")
    if fps is not None and len(usable_frames(info, skip_start, skip_end, None)) >= smallest:
        ways.append("raise --fps")
    if num_usable > 1:
        ways.append("add a smaller one to --frame_buckets")
    if num_usable > 0 and smallest > 1:
        ways.append("pass --hold_last_frame")
    advice = f": {', or '.join(ways)}" if ways else ""
    return f"{frames}; the smallest frame bucket for videos has {smallest}{advice}"


def count_usable(info: "VideoInfo", num_usable: int, skip_start: int, skip_end: int, fps: float | None) -> str:
    """Return the number of usable frames in words, with what it is less than."""
    frames = "1 usable frame" if num_usable == 1 else f"{num_usable} usable frames"
    if fps is not None:
        return f"{frames} at {fps:g} fps (of {info.num_frames} at {info.fps:g} fps)"
    return f"{frames} (of {info.num_frames})" if skip_start or skip_end else frames


def round_half_up(value: Fraction) -> int:
    """Round to the nearest integer, halves up."""
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)
