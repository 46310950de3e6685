"""Plan the clips of a video from its cuts: margins, lengths, black bars; opens no file."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from flags.footage import SceneFlags
from footage.cuts import Glance, Survey
from video.probe import VideoInfo


TOO_SHORT, BLACK = "too short", "black"

_DARK = 24  # of 255; encoders leave less than this in black bars
_BLURRED_EDGE = 2  # pixels of the picture next to a bar that the bar darkens
_LEAST_PICTURE = 0.25  # of a side; what is smaller is something bright on black, not a picture between bars


@dataclass(frozen=True)
class Scene:
    """A part of a video that becomes a clip, or is skipped."""

    start: int  # its first frame
    end: int  # the frame after its last
    seconds: float
    box: tuple[int, int, int, int]  # first row, row after the last, first column, column after the last
    skipped: str = ""  # why it becomes no clip: TOO_SHORT, BLACK


def plan_scenes(survey: Survey, info: VideoInfo, flags: SceneFlags) -> list[Scene]:
    """Return the clips and skipped scenes of a video, in order.

    The margin is dropped only at cuts, not at the beginning and end of the video. A scene is skipped if it is shorter
    than `min_seconds` or black in all frames that were checked. Longer ones than `max_seconds` become equal parts of
    whole frames. Sides are even, as encoders need them: an odd row or column is dropped.
    """
    times = _start_times(info)
    scenes = []
    for first, after in pairwise([0, *survey.cuts, info.num_frames]):
        start = first + flags.margin_frames if first > 0 else 0
        end = after - flags.margin_frames if after < info.num_frames else after
        box = (0, info.height // 2 * 2, 0, info.width // 2 * 2)
        if start >= end or times[end] - times[start] < flags.min_seconds - 1e-6:
            scenes.append(Scene(first, after, float(times[after] - times[first]), box, TOO_SHORT))
            continue
        picture = _picture_box([glance for glance in survey.glances if start <= glance.index < end], box)
        if picture is None:
            scenes.append(Scene(start, end, float(times[end] - times[start]), box, BLACK))
            continue
        box = picture if flags.crop_bars else box
        parts = pairwise(_equal_parts(start, end, times, flags.max_seconds))
        scenes += [Scene(a, b, float(times[b] - times[a]), box) for a, b in parts]
    return scenes


def glance_step(info: VideoInfo, min_seconds: float) -> int:
    """Return the frames between two glances: twice a second, and more often if scenes may be short."""
    return max(1, int(min(0.5, min_seconds / 4) * info.fps))


def _start_times(info: VideoInfo) -> np.ndarray:
    """Return when each frame is shown, in seconds, and when the last one ends: [num_frames + 1]."""
    if info.frame_times is None:
        return np.arange(info.num_frames + 1) / info.fps
    return np.array([*info.frame_times, info.frame_times[-1] + 1_000_000 / info.fps]) / 1_000_000


def _equal_parts(start: int, end: int, times: np.ndarray, max_seconds: float) -> Iterator[int]:
    """Yield the frames where the parts of a scene begin, and its end."""
    count = max(1, math.ceil((times[end] - times[start]) / max_seconds - 1e-6))
    moments = np.linspace(times[start], times[end], count + 1)
    yield from np.interp(moments, times, np.arange(len(times))).round().astype(int).tolist()


def _picture_box(glances: Sequence[Glance], box: tuple[int, int, int, int]) -> tuple[int, int, int, int] | None:
    """Return the part of the picture between black bars, with even sides; None if all of it is black."""
    if not glances:
        return box
    rows = _bright_range(np.max([glance.rows for glance in glances], axis=0))
    columns = _bright_range(np.max([glance.columns for glance in glances], axis=0))
    if rows is None or columns is None:
        return None
    return (*rows, *columns)


def _bright_range(brightest: np.ndarray) -> tuple[int, int] | None:
    """Return the first line between the dark ones at both ends and the line after the last; None if all are dark."""
    bright = np.flatnonzero(brightest > _DARK)
    if not bright.size:
        return None
    first, after = int(bright[0]), int(bright[-1]) + 1
    first += _BLURRED_EDGE if first > 0 else 0
    after -= _BLURRED_EDGE if after < len(brightest) else 0
    if after - first < max(2, _LEAST_PICTURE * len(brightest)):
        first, after = 0, len(brightest)
    return first, after - (after - first) % 2
