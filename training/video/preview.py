"""Make a video small enough to be part of a page."""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np

from video.io import read_frames, write_video
from video.media import open_video, packets_of, video_stream


LONGER_SIDE = 320  # pixels of a preview, at most
_SMALL = 150_000  # bytes of a file that stays as it is
_CRF = 28


def preview(file: Path) -> bytes:
    """Return a video as H.264 in mp4, at most 320 pixels on its longer side; ValueError if it cannot be decoded.

    A small file is returned as it is. In one process, each file is encoded once.
    """
    stat = file.stat()
    return _preview(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=256)  # at most some tens of MB, so that a page that is made again costs little
def _preview(file: Path, _: int, num_bytes: int) -> bytes:
    try:
        with open_video(file) as container:
            stream = video_stream(container)
            rate, longer_side = stream.average_rate, max(stream.width, stream.height)
            num_frames = sum(1 for packet in packets_of(container, stream))
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{file}: cannot be decoded: {error}") from error
    if longer_side <= LONGER_SIDE and num_bytes <= _SMALL:
        return file.read_bytes()
    frames = read_frames(file, range(num_frames), longer_side=min(longer_side, LONGER_SIDE))
    with TemporaryDirectory() as folder:
        write_preview(Path(folder, "preview.mp4"), frames, rate or 8)
        return Path(folder, "preview.mp4").read_bytes()


def write_preview(file: Path, frames: Sequence[np.ndarray] | np.ndarray, fps: int | Fraction) -> None:
    """Write frames, uint8 [F, H, W, 3], RGB, as a small file; an odd last row or column is cut off."""
    frames = np.asarray(frames)
    height, width = (side // 2 * 2 for side in frames.shape[1:3])
    write_video(file, frames[:, :height, :width], fps, crf=_CRF)
