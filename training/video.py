"""Probe clips and read the frames wanted: frame counts that hold, frame choice, decoding, resize and crop.

Everything stays uint8 here; the value range is changed where the frames meet the model. torch is imported only by
the two functions that touch tensors, so that bad data is reported before it.
"""

import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from errors import UserError


if TYPE_CHECKING:
    import torch


# Our own messages name the file and the reason; FFmpeg's are noise beside them. Its own log function is used because
# PyAV's takes the GIL in decoder threads, and waits there for ever when a decoder with several threads is closed.
av.logging.restore_default_callback()
av.logging.set_libav_level(av.logging.PANIC)

# Where one packet is one frame. Elsewhere (VP8's hidden frames, packed B-frames in AVI) only decoding can count.
_PACKETS_ARE_FRAMES = {"h264", "hevc", "av1", "vp9", "prores", "mjpeg"}
_PROGRESS_BAR_FROM = 50


@dataclass(frozen=True)
class VideoInfo:
    """What a clip is once decoded.

    A phone's upright clip is stored lying down with a note to rotate it: height and width are those of the frames that
    `read_frames` returns, after that rotation.
    """

    num_frames: int  # frames that decode, never duration × fps
    height: int
    width: int
    fps: float  # average over the clip; 0.0 where the file does not say


def probe_video(path: Path) -> VideoInfo:
    """Frame count, size and rate of a clip, with proof that its last frame decodes.

    All packets are read and those after the last keyframe are decoded; the whole clip is decoded where that alone
    cannot settle the count (stream-copied cuts with an edit list, hidden frames, any sign of damage).

    Raises:
        ValueError: with a short reason ("file is empty (0 bytes)", "has no video stream", "is truncated or damaged: 80
            frames are listed but only 52 decode"). The message does not name the file.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError("does not exist")
    if not path.is_file():
        raise ValueError("is not a file")
    if path.stat().st_size == 0:
        raise ValueError("file is empty (0 bytes)")
    try:
        return _probe_packets(path) or _probe_by_decoding(path)
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"not a readable video: {_reason(error)}") from error


def _probe_packets(path: Path) -> VideoInfo | None:
    """The cheap probe; None where only decoding the whole clip can tell."""
    with _open(path) as container:
        stream = _video_stream(container)
        stream.codec_context.options = {"skip_loop_filter": "all"}  # these pictures are only counted: a fifth faster
        one_to_one = stream.codec_context.codec.canonical_name in _PACKETS_ARE_FRAMES
        if not one_to_one or _container_family(container) is None or _index_end(stream) > path.stat().st_size:
            return None
        count, first_pts, last_group = 0, None, []
        try:
            for packet in container.demux(stream):
                if packet.size == 0:  # the demuxer's end mark
                    continue
                if count == 0:
                    first_pts = packet.pts
                if packet.is_discard or packet.is_corrupt or packet.pts is None or packet.pts < first_pts:
                    return None
                if packet.is_keyframe:
                    last_group = []
                last_group.append(packet)
                count += 1
            if not last_group:
                return None
            # Frames shown before an open group's keyframe lean on the group before it and need not decode here.
            missing = {packet.pts for packet in last_group if packet.pts >= last_group[0].pts}
            for packet in [*last_group, None]:
                for frame in stream.codec_context.decode(packet):
                    missing.discard(frame.pts)
        except av.FFmpegError:
            return None
        return None if missing else _info(stream, frame, count)


def _probe_by_decoding(path: Path) -> VideoInfo:
    """Decode everything: exact whatever the container says, and the judge of damage."""
    with _open(path) as container:
        stream = _video_stream(container)
        stream.codec_context.options = {"skip_loop_filter": "all"}
        listed, bytes_missing = max(stream.frames, len(stream.index_entries)), _index_end(stream) - path.stat().st_size
        decoded, last_frame, damage = 0, None, None
        try:
            for frame in _decode(container, stream):
                decoded, last_frame = decoded + 1, frame
        except av.FFmpegError as error:
            damage = _reason(error)
        if damage is None and bytes_missing > 0:
            damage = f"the file ends {bytes_missing} bytes too early"
        if damage is not None and listed > decoded:
            raise ValueError(
                f"is truncated or damaged: {listed} frames are listed but only {decoded} decode ({damage})"
            )
        if damage is not None:
            raise ValueError(f"is damaged: decoding stops after {decoded} frames ({damage})")
        if last_frame is None:
            raise ValueError("has a video stream without a single frame")
        return _info(stream, last_frame, decoded)


def _decode(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """All frames in display order. (PyAV's own loop takes the empty packet of a frame dropped in AVI for the end.)"""
    for packet in container.demux(stream):
        if packet.size:
            yield from stream.codec_context.decode(packet)
    yield from stream.codec_context.decode(None)


def _open(path: Path) -> av.container.InputContainer:
    return av.open(str(path), metadata_errors="ignore")  # a title that is not UTF-8 is no reason to refuse a clip


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    stream = container.streams.best("video")
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:  # cover art of a song
        raise ValueError("has no video stream")
    if stream.codec_context is None:
        raise ValueError("its codec is unknown")
    stream.codec_context.thread_count = 1  # probes run in parallel with one another, readers in parallel workers
    return stream


def _container_family(container: av.container.InputContainer) -> str | None:
    return next((name for name in ("mp4", "matroska") if name in container.format.name.split(",")), None)


def _index_end(stream: av.VideoStream) -> int:
    """The byte where the last frame that an mp4's index lists ends; 0 for other containers."""
    if _container_family(stream.container) != "mp4":
        return 0
    return max((entry.pos + entry.size for entry in stream.index_entries), default=0)


def _info(stream: av.VideoStream, frame: av.VideoFrame, num_frames: int) -> VideoInfo:
    height, width = frame.height, frame.width
    if _quarter_turns(frame) % 2:
        height, width = width, height
    return VideoInfo(num_frames, height, width, float(stream.average_rate or stream.guessed_rate or 0))


def _quarter_turns(frame: av.VideoFrame) -> int:
    """How often `np.rot90` has to turn the stored picture for display."""
    return round(frame.rotation / 90) % 4


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def probe_videos(paths: Sequence[Path], num_threads: int = 0) -> dict[Path, VideoInfo]:
    """Probe every distinct path once, in parallel.

    Args:
        paths: clips; repeats are probed once.
        num_threads: 0 = one per CPU core.

    Returns:
        path -> info, in the order in which the paths first appear.

    Raises:
        UserError: one for all clips that cannot be used, each on its own line with the reason.
    """
    paths = list(dict.fromkeys(paths))
    infos, problems = {}, []
    with ThreadPoolExecutor(num_threads or os.cpu_count() or 1) as pool:
        results = pool.map(_probe_or_reason, paths)
        if len(paths) > _PROGRESS_BAR_FROM:
            from tqdm import tqdm

            results = tqdm(results, total=len(paths), desc="Checking clips", unit=" clips")
        for path, result in zip(paths, results, strict=True):
            if isinstance(result, str):
                problems.append(f"  {path}: {result}")
            else:
                infos[path] = result
    if problems:
        raise UserError("\n".join([f"{len(problems)} of {len(paths)} clips cannot be used:", *problems]))
    return infos


def _probe_or_reason(path: Path) -> VideoInfo | str:
    try:
        return probe_video(path)
    except ValueError as error:
        return str(error)


def usable_frames(info: VideoInfo, *, skip_start: int = 0, skip_end: int = 0, fps: float | None = None) -> int:
    """How many frames `choose_frames` can give: those between the skipped ends, or as many as `fps` makes of them."""
    available = max(0, info.num_frames - skip_start - skip_end)
    return available if fps is None else _frames_at_rate(available, _step(info.fps, fps))


def choose_frames(
    num_frames_available: int,
    count: int,
    *,
    skip_start: int = 0,
    skip_end: int = 0,
    clip_fps: float | None = None,
    fps: float | None = None,
) -> list[int]:
    """Indices of the frames to decode, in exact arithmetic.

    Without fps: `count` frames spread evenly from the first to the last usable one, both included. With fps: the first
    `count` frames at that rate; frame i is the one nearest to i / fps seconds after the first usable frame (halves
    round up), taking the clip's own rate as constant.

    Args:
        num_frames_available: frames in the whole clip, skipped ones included.
        count: how many to choose, at least 1.
        skip_start, skip_end: frames at either end that are never chosen.
        clip_fps: the clip's own rate; needed with fps.
        fps: the rate to sample at.

    Returns:
        `count` indices in [skip_start, num_frames_available - skip_end - 1], strictly increasing, except that frames
        repeat where fps is above clip_fps.

    Raises:
        ValueError: the clip does not have that many.
    """
    available = max(0, num_frames_available - skip_start - skip_end)
    step = None if fps is None else _step(clip_fps, fps)
    usable = available if step is None else _frames_at_rate(available, step)
    if not 1 <= count <= usable:
        raise ValueError(f"cannot choose {count} frames: {usable} are usable")
    if step is not None:
        return [skip_start + _round_half_up(i * step) for i in range(count)]
    if count == 1:
        return [skip_start]
    return [skip_start + _round_half_up(Fraction(i * (available - 1), count - 1)) for i in range(count)]


def _step(clip_fps: float | None, fps: float) -> Fraction:
    """Clip frames per sampled frame. The nearest small fraction is the rate meant: 30000/1001 for 29.97002997."""
    if not clip_fps or clip_fps <= 0:
        raise ValueError("the clip's frame rate is unknown, so it cannot be sampled at another")
    if fps <= 0:
        raise ValueError(f"fps is {fps}; it must be above 0")
    return Fraction(clip_fps).limit_denominator(10_000) / Fraction(fps).limit_denominator(10_000)


def _frames_at_rate(available: int, step: Fraction) -> int:
    """The largest count whose last index, round_half_up((count - 1) · step), is still below `available`."""
    return max(0, -((1 - 2 * available) // (2 * step)))


def _round_half_up(value: Fraction) -> int:
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)


def read_frames(path: Path, indices: Sequence[int], num_threads: int = 1) -> np.ndarray:
    """Decode frames by index, in display order and rotated for display.

    From the first frame on and without seeking: that is what makes the numbers exact. (decord 0.6, which seeks, gives
    other frames than asked for on open groups of pictures, edit lists, MPEG-4 and MPEG-TS, and is slower on short
    clips.)

    Args:
        path: the clip.
        indices: frame numbers from 0, in any order, repeats allowed.
        num_threads: decoder threads; 0 lets FFmpeg choose. With several DataLoader workers 1 is best.

    Returns:
        uint8 [F, H, W, 3], RGB.

    Raises:
        ValueError: the clip cannot be decoded, or has fewer frames; names the file.
    """
    indices = [int(index) for index in indices]
    if not indices or min(indices) < 0:
        raise ValueError(f"{path}: frame numbers {indices} are not a list of numbers from 0")
    distinct = sorted(set(indices))
    frames = _decode_indices(path, distinct, num_threads)
    if distinct == indices:
        return frames
    return frames[np.searchsorted(distinct, indices)]


def _decode_indices(path: Path, indices: list[int], num_threads: int) -> np.ndarray:
    """Frames at increasing indices, counted from the first frame that decodes."""
    frames, filled, turns = None, 0, 0
    reformatter = VideoReformatter()  # one for all frames: it keeps the conversion's tables
    try:
        with _open(path) as container:
            stream = _video_stream(container)
            stream.codec_context.thread_count = num_threads
            stream.codec_context.thread_type = "AUTO"
            for index, frame in enumerate(_decode(container, stream)):
                if index != indices[filled]:
                    continue
                if frames is None:
                    frames = np.empty((len(indices), frame.height, frame.width, 3), np.uint8)
                    turns = _quarter_turns(frame)
                _, height, width, _ = frames.shape
                plane = reformatter.reformat(frame, width, height, "rgb24", threads=1).planes[0]
                rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)  # padded at the right
                frames[filled] = rows[:, : 3 * width].reshape(height, width, 3)
                filled += 1
                if filled == len(indices):
                    return np.ascontiguousarray(np.rot90(frames, turns, axes=(1, 2))) if turns else frames
    except (av.FFmpegError, OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be decoded: {_reason(error)}") from error
    raise ValueError(f"{path}: frame {indices[filled]} was asked for, but the clip ends before it")


def reshape_frames(
    frames: "torch.Tensor", height: int, width: int, mode: str, generator: random.Random
) -> "torch.Tensor":
    """Bring frames to a bucket's size: antialiased bilinear, in uint8.

    Fastest from `torch.from_numpy(read_frames(...)).permute(0, 3, 1, 2)`, without a copy in between: torch resizes
    interleaved colours about twice as fast, and hands them back interleaved.

    Args:
        frames: uint8 [F, C, H, W].
        height, width: the size wanted.
        mode: "none" resizes to it whatever the aspect ratio; "center" and "random" resize until the size is covered
            and crop there, the middle or anywhere. One place for all frames.
        generator: for mode "random"; two draws a call.

    Returns:
        uint8 [F, C, height, width]; a view of `frames` where nothing had to be resized.
    """
    if mode not in ("center", "random", "none"):
        raise ValueError(f"video_reshape_mode is {mode!r}; it must be center, random or none")
    if mode == "none":
        return _resize(frames, height, width)
    frames = _resize(frames, *_cover_size(frames.shape[-2], frames.shape[-1], height, width))
    spare_rows, spare_columns = frames.shape[-2] - height, frames.shape[-1] - width
    if mode == "center":
        top, left = spare_rows // 2, spare_columns // 2
    else:
        top, left = generator.randint(0, spare_rows), generator.randint(0, spare_columns)
    return frames[..., top : top + height, left : left + width]


def flip_frames(frames: "torch.Tensor") -> "torch.Tensor":
    """Mirror left and right. [F, C, H, W] -> the same shape."""
    return frames.flip(-1)


def _cover_size(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """The smallest size of (almost) the same aspect ratio that covers the target; one side fits exactly."""
    if target_height * width >= target_width * height:
        return target_height, max(target_width, _round_half_up(Fraction(width * target_height, height)))
    return max(target_height, _round_half_up(Fraction(height * target_width, width))), target_width


def _resize(frames: "torch.Tensor", height: int, width: int) -> "torch.Tensor":
    if frames.shape[-2:] == (height, width):
        return frames
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as transforms

    return transforms.resize(frames, [height, width], InterpolationMode.BILINEAR, antialias=True)
