"""Probe clips before training: exact frame counts, size, rate and hash."""

import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path

import av

from common.bars import tqdm
from common.ranks import launch_rank, launch_size, local_size, machine_rank, num_machines
from common.remote import at_hand, forget_states
from video.cache import FileCache
from video.display import corrections_of, has_alpha, opacity, orientation, square_size
from video.media import decode, open_video, packets_of, read_still_image, reason_of, video_stream


# Codecs with one frame per packet. For others (VP8's hidden frames, packed B-frames in AVI) only decoding can count.
_PACKETS_ARE_FRAMES = {"h264", "hevc", "av1", "vp9", "prores", "mjpeg"}
_PROGRESS_BAR_FROM = 50
# Raise the number whenever VideoInfo or the probe's results change.
_CACHE_KIND = "probe 2"


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """Properties of a clip as shown: height and width are those of the frames that `read_frames` returns.

    Phones store upright clips sideways, with a rotation; camcorders store pixels that are not square.
    """

    num_frames: int  # frames that decode, never duration × fps
    height: int
    width: int
    fps: float  # average over the clip; 0.0 if unknown
    rotation: int = 0  # degrees counterclockwise from the stored picture, after mirroring, to the one shown
    # [num_frames], microseconds since the first frame; None if the rate is constant
    frame_times: tuple[int, ...] | None = None
    seekable: bool = False  # time stamps identify the frames; for `read_frames`
    is_image: bool = False  # a still image: one frame, no rate
    sha256: str = ""  # of the file's bytes; of these and the frames for a part of a file
    corrections: tuple[str, ...] = ()  # what `read_frames` does besides turning: constants of `video.display`

    @property
    def content(self) -> str:
        """A digest that changes with the pictures: the file's, unless they are corrected."""
        if not self.corrections:
            return self.sha256
        return hashlib.sha256(repr((self.sha256, self.corrections)).encode()).hexdigest()

    def part(self, start: int, end: int | None) -> "VideoInfo":
        """Return the properties of frames `start` to `end` - 1, or to the last one, as of a clip of their own.

        Raises ValueError if the clip does not have them.
        """
        end = self.num_frames if end is None else end
        if self.is_image:
            raise ValueError("is a still image, which has no start_frame and end_frame")
        if not 0 <= start < end <= self.num_frames:
            raise ValueError(f"has {self.num_frames} frames, not those from start_frame {start} to end_frame {end}")
        fps, times = self.fps, self.frame_times and self.frame_times[start:end]
        if times:
            times = tuple(time - times[0] for time in times)
            fps = 1_000_000 * (len(times) - 1) / times[-1] if len(times) > 1 else fps
        digest = hashlib.sha256(repr((self.sha256, start, end)).encode()).hexdigest()
        return replace(self, num_frames=end - start, fps=fps, frame_times=times, sha256=digest)


def probe_video(path: Path) -> VideoInfo:
    """Find frame count, size, rate and hash of a clip, and check that its last frame decodes.

    All packets are read and those after the last keyframe are decoded. The complete clip is decoded if that does not
    settle the count (stream-copied cuts with an edit list, hidden frames, any sign of damage).

    The rate varies if any frame's time is more than a quarter of the average frame duration off a constant rate. It
    counts as constant if time stamps are missing or equal.

    Raises ValueError with a short reason without the file's name ("file is empty (0 bytes)", "has no video stream").
    """
    try:
        with at_hand(path) as file:
            return _probe_file(file)
    except av.FFmpegError as error:
        raise ValueError(f"not a readable video: {reason_of(error)}") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError("does not exist") from error
    except OSError as error:
        raise ValueError(f"cannot be read: {reason_of(error)}") from error


def _probe_file(path: Path) -> VideoInfo:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is not a file")
    if status.st_size == 0:
        raise ValueError("file is empty (0 bytes)")
    image = read_still_image(path)
    if image is not None:
        height, width, _ = image.pixels.shape
        info = VideoInfo(1, height, width, 0.0, rotation=image.rotation, is_image=True)
    else:
        info = _probe_packets(path) or _probe_by_decoding(path)
    with open(path, "rb") as file:
        return replace(info, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _probe_packets(path: Path) -> VideoInfo | None:
    """Probe by packets, which is cheap; None if the clip has to be decoded."""
    with open_video(path) as container:
        stream = video_stream(container)
        stream.codec_context.options = {"skip_loop_filter": "all"}  # a fifth faster; pictures are only counted
        one_to_one = stream.codec_context.codec.canonical_name in _PACKETS_ARE_FRAMES
        has_index = not {"mp4", "matroska"}.isdisjoint(container.format.name.split(","))
        if not (one_to_one and has_index) or _index_end(stream) > path.stat().st_size:
            return None
        size = stream.codec_context.height, stream.codec_context.width
        time_stamps, last_group = [], []
        try:
            for packet in packets_of(container, stream):
                if packet.is_discard or packet.is_corrupt or packet.pts is None:
                    return None
                time_stamps.append(packet.pts)
                if packet.is_keyframe:
                    last_group = []
                last_group.append(packet)
            if not last_group or min(time_stamps) < time_stamps[0]:
                return None
            # Frames shown before an open group's keyframe depend on the group before and need not decode here.
            missing = {packet.pts for packet in last_group if packet.pts >= last_group[0].pts}
            corrections = set()
            for frame in decode(last_group, stream):
                if has_alpha(frame.format.name):  # whether anything is transparent, all frames must tell
                    return None
                missing.discard(frame.pts)
                corrections |= corrections_of(frame, stream)
        except av.FFmpegError:
            return None
        if missing or (frame.height, frame.width) != size:
            return None
        info = _info(stream, frame, sorted(time_stamps), corrections)
        return replace(info, seekable=len(set(time_stamps)) == len(time_stamps))


def _probe_by_decoding(path: Path) -> VideoInfo:
    """Probe by decoding the complete clip: exact, and finds damage."""
    with open_video(path) as container:
        stream = video_stream(container)
        stream.codec_context.options = {"skip_loop_filter": "all"}
        listed, bytes_missing = max(stream.frames, len(stream.index_entries)), _index_end(stream) - path.stat().st_size
        time_stamps, frame, size, damage, corrections, visible = [], None, None, None, set(), False
        try:
            for frame in decode(packets_of(container, stream), stream):
                size = size or (frame.width, frame.height)
                if (frame.width, frame.height) != size:
                    sizes = f"{size[0]}x{size[1]} to {frame.width}x{frame.height}"
                    raise ValueError(f"changes its size from {sizes} at frame {len(time_stamps)}")
                time_stamps.append(frame.pts)
                corrections |= corrections_of(frame, stream)
                visible = visible or not has_alpha(frame.format.name) or bool(opacity(frame).any())
        except av.FFmpegError as error:
            damage = reason_of(error)
        decoded = len(time_stamps)
        if damage is None and bytes_missing > 0:
            damage = f"the file ends {bytes_missing} bytes too early"
        if damage is not None:
            extent = f"is damaged: decoding stops after {decoded} frames"
            if listed > decoded:
                extent = f"is truncated or damaged: {listed} frames are listed but only {decoded} decode"
            raise ValueError(f"{extent} ({damage})")
        if frame is None:
            raise ValueError("has a video stream without a single frame")
        if not visible:
            raise ValueError("is transparent in every frame; export it without an alpha channel")
        return _info(stream, frame, time_stamps, corrections)


def _index_end(stream: av.VideoStream) -> int:
    """Return the byte where the last frame of an mp4's index ends; 0 for other containers."""
    is_mp4 = "mp4" in stream.container.format.name.split(",")
    return max((entry.pos + entry.size for entry in stream.index_entries), default=0) if is_mp4 else 0


def _info(
    stream: av.VideoStream, frame: av.VideoFrame, time_stamps: Sequence[int | None], corrections: set[str]
) -> VideoInfo:
    """Build the info from any frame of a clip, and the time stamps of all in display order."""
    _, turns = orientation(frame)
    height, width = square_size(frame, stream)[:: -1 if turns % 2 else 1]
    fps, frame_times = _timing(stream, time_stamps)
    return VideoInfo(
        len(time_stamps),
        height,
        width,
        fps,
        rotation=90 * turns,
        frame_times=frame_times,
        corrections=tuple(sorted(corrections)),
    )


def _timing(stream: av.VideoStream, time_stamps: Sequence[int | None]) -> tuple[float, tuple[int, ...] | None]:
    """Return the average rate, and the frames' times if the rate varies."""
    stated = [rate for rate in (stream.average_rate, stream.guessed_rate) if rate]
    if len(time_stamps) < 2 or None in time_stamps or any(a >= b for a, b in pairwise(time_stamps)):
        return float(stated[0]) if stated else 0.0, None
    ticks = [time_stamp - time_stamps[0] for time_stamp in time_stamps]
    steps, seconds = len(ticks) - 1, ticks[-1] * stream.time_base
    measured = float(steps / seconds)
    if any(4 * abs(tick * steps - i * ticks[-1]) > ticks[-1] for i, tick in enumerate(ticks)):
        return measured, tuple(round(tick * stream.time_base * 1_000_000) for tick in ticks)
    # The file's own rate is more exact (Matroska's time stamps are in milliseconds) if it is right: in an mp4 it
    # includes the duration of the last frame.
    right = [rate for rate in stated if 4 * abs(rate * seconds - steps) <= 1]
    return float(right[0]) if right else measured, None


def probe_files(paths: Sequence[Path], cache: FileCache | None = None) -> dict[Path, VideoInfo | str]:
    """Probe every distinct path once, in a thread per CPU core; returns its info, or why the file is unusable.

    The ranks of a launch share the work: each starts at another part of the list and asks the cache before each file.
    Unusable files are probed again each time. The result is in the order of first appearance.
    """
    order = list(dict.fromkeys(paths))
    # Spread evenly over the ranks of each machine and over all: the cache may be local to a machine, or shared.
    begin = len(order) * (launch_rank() % local_size() * num_machines() + machine_rank()) // launch_size()
    rotated = [*order[begin:], *order[:begin]]
    hidden = launch_rank() != 0 or len(order) < _PROGRESS_BAR_FROM
    pool = ThreadPool()
    try:
        probed = pool.imap(lambda path: _probe_or_reason(path, cache), rotated)
        bar = tqdm(probed, "Checking clips", len(order), unit=" clips", delay=0, disable=hidden)
        results = dict(zip(rotated, bar, strict=True))
    finally:
        pool.terminate()  # Ctrl-C does not wait for the remaining clips
        pool.join()
        forget_states()
    return {path: results[path] for path in order}


def _probe_or_reason(path: Path, cache: FileCache | None) -> VideoInfo | str:
    try:
        if cache is None:
            return probe_video(path)
        found = cache.find(path, _CACHE_KIND, lambda path: asdict(probe_video(path)))
    except ValueError as error:
        return str(error)
    lists = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
    return VideoInfo(**found | lists)  # JSON has no tuples
