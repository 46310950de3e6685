"""Find the cuts of a video, and which rows and columns of its frames are dark, in one pass over it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from video.display import orientation, square_size, to_rgb, turned
from video.media import decode, open_video, packets_of, reason_of, video_stream
from video.probe import VideoInfo


if TYPE_CHECKING:
    from scenedetect.detector import SceneDetector

_COMPARED_WIDTH = 256  # pixels; the width that PySceneDetect's thresholds are meant for
# A cut changes R, G and B by this much more than the frames around it change, of which it compares two on each side.
_LEAST_RATIO, _FRAMES_AROUND = 1.5, 2


@dataclass(frozen=True)
class Glance:
    """How bright a frame is, as shown: the largest value of R, G and B in each row and column."""

    index: int
    rows: np.ndarray  # uint8 [H]
    columns: np.ndarray  # uint8 [W]


@dataclass(frozen=True)
class Survey:
    """What one pass over a video finds."""

    cuts: list[int]  # frames that begin another scene, ascending; never 0
    glances: list[Glance]  # at some frames, in order


def survey_video(
    path: Path,
    info: VideoInfo,
    detector: "SceneDetector",
    *,
    glance_every: int,
    num_threads: int = 1,
    progress: Callable[[Iterable[av.VideoFrame]], Iterable[av.VideoFrame]] = iter,
) -> Survey:
    """Decode all frames of a video once, in display order, numbered as `read_frames` numbers them.

    A cut of the detector must also stand out in R, G and B: hue and saturation, which PySceneDetect compares, are
    noise in dark pixels, so that a fade to black would be a cut.

    Args:
        info: the probe's result.
        detector: from `make_detector`.
        glance_every: frames from one glance to the next; the first is at frame 0.
        progress: wraps the frames, to count them.

    Raises ValueError, which names the file, if the video cannot be decoded or has other frames than `info` says.
    """
    from scenedetect import FrameTimecode

    cuts, glances, changes, before = [], [], [], None
    reformatter = VideoReformatter()
    try:
        with open_video(path) as container:
            stream = video_stream(container, num_threads)
            for index, frame in enumerate(progress(decode(packets_of(container, stream), stream))):
                height, width = square_size(frame, stream)
                scale = min(1, _COMPARED_WIDTH / width)
                small = to_rgb(frame, max(1, round(height * scale)), max(1, round(width * scale)), reformatter)
                if before is not None and before.shape != small.shape:
                    raise ValueError(f"changes its size to {frame.width}x{frame.height}")
                found = detector.process_frame(FrameTimecode(index, info.fps), np.ascontiguousarray(small[..., ::-1]))
                cuts += [cut.frame_num for cut in found]
                values = small.astype(np.int16)
                changes.append(0.0 if before is None else float(np.abs(values - before).mean()))
                before = values
                if index % glance_every == 0:
                    shown = to_rgb(frame, height, width, VideoReformatter())
                    shown = turned(shown[None], *orientation(frame))[0]
                    glances.append(Glance(index, shown.max(axis=(1, 2)), shown.max(axis=(0, 2))))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be decoded after {len(changes)} frames: {reason_of(error)}") from error
    if len(changes) != info.num_frames:
        raise ValueError(f"{path}: has {len(changes)} frames instead of {info.num_frames}; was it changed meanwhile?")
    return Survey([cut for cut in sorted(set(cuts)) if cut > 0 and _stands_out(changes, cut)], glances)


def _stands_out(changes: Sequence[float], cut: int) -> bool:
    """Return whether a frame changes more than those around it; frame 0 changes nothing and does not count."""
    around = [*changes[max(1, cut - _FRAMES_AROUND) : cut], *changes[cut + 1 : cut + 1 + _FRAMES_AROUND]]
    return not around or changes[cut] >= _LEAST_RATIO * sum(around) / len(around)


def make_detector(name: str, threshold: float) -> "SceneDetector":
    """Return a detector of PySceneDetect, "adaptive" or "content".

    It reports every cut, however close to the one before: PySceneDetect's minimum length of a scene would hide cuts
    in the middle of clips, and after a short scene that is skipped.
    """
    from scenedetect import AdaptiveDetector, ContentDetector

    if name == "adaptive":
        return AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=0)
    return ContentDetector(threshold=threshold, min_scene_len=0)
