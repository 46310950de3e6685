"""Choose the frames of a clip's samples, with exact arithmetic on the probe's result; opens no file."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from video.probe import VideoInfo


# How to use a clip with more frames than a sample takes: frames spread over the clip, its first part, or consecutive
# parts, each a sample.
LONG_CLIPS = ("spread", "first", "split")
# A slide show may repeat every frame a few dozen times; more means damaged time stamps and endless repeats.
_MOST_REPEATS = 100


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

    A sample has the largest count that the clip can fill. A count of 1 is for still images, and for videos only if
    there is no other count: a clip that is a little short must not silently become a still image.

    With fps the frames are first resampled: frame i is the one nearest in time to i / fps seconds after the first
    usable frame (halves round up), by the frames' own time stamps if the rate varies. The last frame counts as shown
    for the average frame duration. From these frames

    - "spread" takes as many as a sample needs, evenly from the first to the last (not allowed with fps),
    - "first" takes the first ones,
    - "split" takes consecutive samples as long as the rest fills one; the remainder is not used.

    Args:
        info: as from `probe_video`.
        frame_counts: of the frame buckets, at least 1 each, in any order.
        skip_start, skip_end: frames at either end of a video that are never chosen; ignored for still images.
        fps: sampling rate in frames per second.
        long_clips: one of `LONG_CLIPS`.
        hold_last_frame: repeat the last usable frame of a video that is too short for the smallest count above 1.

    Returns:
        At least one sample; its indices are in [skip_start, num_frames - skip_end - 1] and never decrease. They repeat
        only if fps is above the clip's rate, or the last frame is held.

    Raises:
        ValueError: the clip has no sample (with the numbers and what to do), or an argument is out of range.
    """
    _check(frame_counts, fps, long_clips)
    if info.is_image:
        if 1 not in frame_counts:
            raise ValueError("is a still image; add 1 to --frame_buckets")
        return [(0,)]
    counts = sorted(count for count in set(frame_counts) if count > 1) or [1]
    num_usable, index_of = _usable_frames(info, skip_start, skip_end, fps)
    if num_usable < counts[0]:
        if not (hold_last_frame and num_usable > 0 and counts[0] > 1):
            raise ValueError(_too_short(info, num_usable, counts[0], skip_start, skip_end, fps))
        return [tuple(index_of(min(i, num_usable - 1)) for i in range(counts[0]))]
    return [tuple(map(index_of, positions)) for positions in _positions(num_usable, counts, long_clips)]


def _check(frame_counts: Sequence[int], fps: float | None, long_clips: str) -> None:
    if not frame_counts or min(frame_counts) < 1:
        raise ValueError(f"frame counts are {list(frame_counts)}; there must be one, and all at least 1")
    if long_clips not in LONG_CLIPS:
        raise ValueError(f"long_clips is {long_clips!r}; it must be one of {', '.join(LONG_CLIPS)}")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps is {fps:g}; it must be above 0")
    if fps is not None and long_clips == "spread":
        raise ValueError("frames cannot be both spread over the clip and sampled at --fps")


def _positions(num_usable: int, counts: Sequence[int], long_clips: str) -> list[Sequence[int]]:
    """Return the samples as positions among the usable frames. `counts` is sorted, and the first of them fits."""
    largest = max(count for count in counts if count <= num_usable)
    if long_clips == "first":
        return [range(largest)]
    if long_clips == "spread":
        gaps = max(largest - 1, 1)
        return [[round_half_up(Fraction(i * (num_usable - 1), gaps)) for i in range(largest)]]
    samples, start = [], 0
    while num_usable - start >= counts[0]:
        count = max(count for count in counts if count <= num_usable - start)
        samples.append(range(start, start + count))
        start += count
    return samples


def _usable_frames(
    info: "VideoInfo", skip_start: int, skip_end: int, fps: float | None
) -> tuple[int, Callable[[int], int]]:
    """Return how many frames there are to choose from, and a function to their indices in the file."""
    available = max(0, info.num_frames - skip_start - skip_end)
    if fps is None or available == 0:
        return available, lambda i: skip_start + i
    if info.fps <= 0:
        raise ValueError("its frame rate is unknown, so it cannot be sampled at --fps")
    if fps > _MOST_REPEATS * info.fps:
        raise ValueError(f"plays at {info.fps:g} fps, too slow to be sampled at --fps {fps:g}")
    rate = _as_meant(fps)
    if info.frame_times is not None:
        return _frames_by_time(info.frame_times, skip_start, skip_start + available - 1, rate)
    step = _as_meant(info.fps) / rate
    # The largest count whose last index, round_half_up((count - 1) · step), is still below `available`.
    count = -((1 - 2 * available) // (2 * step))
    return count, lambda i: skip_start + round_half_up(i * step)


def _frames_by_time(times: Sequence[int], first: int, last: int, rate: Fraction) -> tuple[int, Callable[[int], int]]:
    """Do the same for a variable rate.

    Args:
        times: of every frame of the file, in microseconds.
        first, last: the usable frames.
    """
    # Twice the time at which the next frame becomes the nearest: doubled, all are integers.
    changes = [a + b for a, b in pairwise(times)]
    average = Fraction(times[-1] - times[0], len(times) - 1)
    end = changes[last] if last < len(changes) else 2 * times[last] + average
    count = -((2 * times[first] - end) // (2_000_000 / rate))

    def index_of(i: int) -> int:
        # Count the changes up to this moment; they are integers, so it may be floored.
        moment = 2 * times[first] + 2_000_000 * i * rate.denominator // rate.numerator
        return bisect_right(changes, moment, first, last)

    return count, index_of


def _as_meant(rate: float) -> Fraction:
    """Return the nearest small fraction: 30000/1001 for 29.97002997."""
    return Fraction(rate).limit_denominator(10_000) or Fraction(rate)


def _too_short(
    info: "VideoInfo", num_usable: int, smallest: int, skip_start: int, skip_end: int, fps: float | None
) -> str:
    frames = f"{num_usable} usable frame{'' if num_usable == 1 else 's'}"
    if fps is not None:
        frames += f" at {fps:g} fps (of {info.num_frames} at {info.fps:g} fps)"
    elif skip_start or skip_end:
        frames += f" (of {info.num_frames})"
    ways = []
    if num_usable == 0 or _usable_frames(info, 0, 0, fps)[0] >= smallest:
        ways.append("lower --skip_frames_start or --skip_frames_end")
    if fps is not None and _usable_frames(info, skip_start, skip_end, None)[0] >= smallest:
        ways.append("raise --fps")
    if num_usable > 1:
        ways.append("add a smaller one to --frame_buckets")
    if num_usable > 0 and smallest > 1:
        ways.append("pass --hold_last_frame")
    advice = f": {', or '.join(ways)}" if ways else ""
    return f"{frames}; the smallest frame bucket for videos has {smallest}{advice}"


def round_half_up(value: Fraction) -> int:
    """Round to the nearest integer, halves up."""
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)
