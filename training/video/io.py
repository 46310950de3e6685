"""Read frames of a clip, resize and crop them, and write frames as a clip.

Everything stays uint8 here; frames are normalized where they are encoded. torch is imported only by the functions that
use tensors, so that bad data is reported before the slow import.
"""

import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain, dropwhile, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from common.remote import at_hand
from video.display import orientation, progressive, square_size, to_rgb, turned
from video.frames import round_half_up
from video.media import decode, open_video, packets_of, read_still_image, reason_of, video_stream


if TYPE_CHECKING:
    import torch


# Before this frame, decoding everything is cheaper than looking for a keyframe.
SEEK_FROM = 64


def read_frames(
    path: Path,
    indices: Sequence[int],
    num_threads: int = 1,
    *,
    seekable: bool = False,
    longer_side: int | None = None,
) -> np.ndarray:
    """Decode frames by index in display order to uint8 [F, H, W, 3], RGB, as shown; or the picture of a still image.

    As shown: upright, deinterlaced, with square pixels, over white, in standard dynamic range (`video.display`).

    Decoding starts at the first frame, which makes the indices exact. (decord 0.6 seeks: it returns wrong frames on
    open groups of pictures, edit lists, MPEG-4 and MPEG-TS, and is slower on short clips.) Only deep in a seekable
    clip does it start at a later keyframe from which the codec guarantees the same pictures, and identifies frames by
    their time stamps: the last 49 of 3000 frames of 640x360 then take 0.08 s instead of 1.9 s.

    Args:
        indices: at least one frame number from 0, in any order; they may repeat.
        num_threads: decoder threads; 0 lets FFmpeg choose. With several DataLoader workers 1 is best.
        seekable: as the probe reports; False decodes everything before the frames.
        longer_side: resize each frame to this in pixels, antialiased, when its colours are converted; so that many
            frames of a large video take little memory. None for the size of the clip.

    Raises ValueError, which names the file, if the clip cannot be decoded, has fewer frames, or changes its size.
    """
    distinct, places = np.unique(np.asarray(indices, int), return_inverse=True)
    try:
        with at_hand(path) as file:
            frames = _read_distinct(file, distinct.tolist(), num_threads, seekable, longer_side)
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{path}: cannot be decoded: {reason_of(error)}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return frames if np.array_equal(distinct, indices) else frames[places]


def _read_distinct(
    path: Path, indices: list[int], num_threads: int, seekable: bool, longer_side: int | None
) -> np.ndarray:
    image = read_still_image(path)
    if image is not None:
        if indices != [0]:
            raise ValueError(f"frame {indices[-1]} was asked for, but it is a still image")
        return _resized(image.pixels, longer_side)[None]
    if seekable and indices[0] >= SEEK_FROM:
        frames = _read_from_keyframe(path, indices, num_threads, longer_side)
        if frames is not None:
            return frames
    with open_video(path) as container:
        stream = video_stream(container, num_threads)
        first = max(indices[0] - 1, 0)  # an interlaced frame needs the one before
        frames = islice(decode(packets_of(container, stream), stream), first, None)
        return _gather(enumerate(progressive(frames), first), indices, stream, longer_side)


def _read_from_keyframe(
    path: Path, indices: list[int], num_threads: int, longer_side: int | None = None
) -> np.ndarray | None:
    """Read frames by their time stamps, decoded from the last clean start before them; None if that fails."""
    try:
        with open_video(path) as container:
            stream = video_stream(container, num_threads)
            time_stamps, clean_starts = _survey(container, stream)
            start = max((clean for clean in clean_starts if clean <= indices[0]), default=0)
            if start == 0 or indices[-1] >= len(time_stamps):
                return None
            stream.codec_context.options = {"err_detect": "explode"}  # concealment uses earlier frames
            container.seek(time_stamps[start], stream=stream)
            # Decoding starts at exactly this packet, wherever the seek went.
            packets = dropwhile(lambda packet: packet.pts != time_stamps[start], packets_of(container, stream))
            # Drops what an open group shows before its keyframe.
            shown = dropwhile(lambda frame: frame.pts != time_stamps[start], decode(packets, stream))
            first = next(shown, None)
            if first is None or (first.interlaced_frame and start == indices[0]):  # which needs the frame before
                return None
            surveyed = zip(chain([first], shown), time_stamps[start:], strict=False)
            as_surveyed = takewhile(lambda pair: pair[0].pts == pair[1], surveyed)
            frames = progressive(frame for frame, _ in as_surveyed)
            return _gather(enumerate(frames, start), indices, stream, longer_side)
    except (av.FFmpegError, ValueError):
        return None


def _gather(
    frames: Iterable[tuple[int, av.VideoFrame]], indices: list[int], stream: av.VideoStream, longer_side: int | None
) -> np.ndarray:
    """Collect the frames at `indices` in one array, as shown."""
    pixels, filled = None, 0
    reformatter = VideoReformatter()  # one for all frames: it keeps the conversion's tables
    for index, frame in frames:
        if index != indices[filled]:
            continue
        if pixels is None:
            stored, placed = (frame.width, frame.height), orientation(frame)
            shown = _scaled_size(*square_size(frame, stream), longer_side)
            pixels = np.empty((len(indices), *shown, 3), np.uint8)
        if (frame.width, frame.height) != stored:
            raise ValueError(f"changes its size from {stored[0]}x{stored[1]} to {frame.width}x{frame.height}")
        pixels[filled] = to_rgb(frame, *shown, reformatter)
        filled += 1
        if filled == len(indices):
            return turned(pixels, *placed)
    raise ValueError(f"frame {indices[filled]} was asked for, but the clip ends before it")


def stream_frames(path: Path, indices: Iterable[int], num_threads: int = 1) -> Iterator[np.ndarray]:
    """Yield frames one after another, each uint8 [H, W, 3] as `read_frames` returns it: for more than memory holds.

    The complete clip is decoded. `indices` ascend without repetition. Raises ValueError as `read_frames` does.
    """
    reformatter = VideoReformatter()
    try:
        with open_video(path) as container:
            stream = video_stream(container, num_threads)
            frames = enumerate(progressive(decode(packets_of(container, stream), stream)))
            for wanted in indices:
                frame = next((frame for index, frame in frames if index == wanted), None)
                if frame is None:
                    raise ValueError(f"frame {wanted} was asked for, but the clip ends before it")
                pixels = to_rgb(frame, *square_size(frame, stream), reformatter)
                yield turned(pixels[None], *orientation(frame))[0]
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{path}: cannot be decoded: {reason_of(error)}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _scaled_size(height: int, width: int, longer_side: int | None) -> tuple[int, int]:
    """Return height and width with this longer side; a side of very long pictures keeps 16 pixels."""
    factor = longer_side / max(height, width) if longer_side else 1
    return tuple(max(round(side * factor), min(side, 16)) for side in (height, width))


def _resized(picture: np.ndarray, longer_side: int | None) -> np.ndarray:
    height, width = _scaled_size(*picture.shape[:2], longer_side)
    if (height, width) == picture.shape[:2]:
        return picture
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))


def _survey(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[list[int], list[int]]:
    """Return the sorted time stamps of all packets, and the frame numbers that decoding can start at."""
    time_stamps, clean_starts, latest = [], [], None
    for packet in packets_of(container, stream):
        if packet.pts is None or packet.is_discard:  # not as the probe found it
            return [], []
        # If an earlier packet is shown later, time stamps do not tell how many frames come before.
        in_order = latest is not None and packet.pts > latest
        if in_order and packet.is_keyframe and _is_clean_start(bytes(packet), stream.codec_context):
            clean_starts.append(packet.pts)
        latest = packet.pts if latest is None else max(latest, packet.pts)
        time_stamps.append(packet.pts)
    time_stamps.sort()
    return time_stamps, [bisect_left(time_stamps, clean_start) for clean_start in clean_starts]


def _is_clean_start(keyframe: bytes, codec_context: av.VideoCodecContext) -> bool:
    """Return whether this and all later pictures decode the same without the packets before.

    In H.264 and HEVC a keyframe is not enough: it may be a recovery point, after which pictures become correct only
    over time, and decoders conceal missing references instead of failing. Only IDR pictures, and in HEVC also CRA and
    BLA, are a guarantee. A clip of H.264's open groups has one IDR and is decoded from there.
    """
    codec, settings = codec_context.codec.canonical_name, codec_context.extradata
    if codec not in ("h264", "hevc"):
        return True
    # In mp4 and Matroska each unit follows its length; the settings hold the size of the length field.
    size_at = 4 if codec == "h264" else 21
    if not settings or settings[0] != 1 or len(settings) <= size_at:
        return False
    headers = _unit_headers(keyframe, (settings[size_at] & 3) + 1)
    return any(header & 31 == 5 if codec == "h264" else 16 <= header >> 1 & 63 <= 21 for header in headers)


def _unit_headers(packet: bytes, length_size: int) -> Iterator[int]:
    """Return the first byte of each unit of a packet whose units follow their lengths."""
    at = 0
    while at + length_size < len(packet):
        yield packet[at + length_size]
        at += length_size + int.from_bytes(packet[at : at + length_size], "big")


def write_video(
    path: Path,
    frames: Iterable[Image.Image | np.ndarray],
    fps: int | Fraction,
    *,
    times: Sequence[int] | None = None,
    num_threads: int = 0,
    crf: int = 18,
) -> None:
    """Encode frames as H.264 in yuv420p in mp4, which all browsers play; raises OSError if that cannot be written.

    Args:
        frames: at least one. RGB, of one size with even sides: Pillow images, or uint8 [H, W, 3].
        fps: frames per second.
        times: when each frame is shown, in microseconds from 0; None for a constant rate.
        num_threads: of the encoder; 0: FFmpeg chooses.
        crf: 18 is near lossless; each 6 more halve the file.
    """
    frames = iter(frames)
    first = np.asarray(next(frames))
    # As a Python file object: FFmpeg takes some names for URLs.
    with open(path, "wb") as file, av.open(file, "w", format="mp4") as container:
        height, width, _ = first.shape
        stream = container.add_stream("libx264", rate=fps, width=width, height=height, pix_fmt="yuv420p")
        stream.options = {"crf": str(crf)}
        stream.codec_context.thread_count = num_threads
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1_000_000)
        for index, pixels in enumerate(chain([first], frames)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1_000_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())  # flushes the encoder


def reshape_frames(
    frames: "torch.Tensor", height: int, width: int, mode: str, generator: random.Random
) -> "torch.Tensor":
    """Resize and crop frames to uint8 [F, C, height, width]: antialiased bilinear; a view if the size is the same.

    Args:
        frames: uint8 [F, C, H, W]; twice as fast with interleaved channels, as `permute(0, 3, 1, 2)` makes them.
        mode: "none" resizes without regard to the aspect ratio; "center" and "random" resize to cover the target and
            crop the middle or a random part, the same for all frames.
        generator: for mode "random"; two draws per call.
    """
    size = [height, width]
    if mode != "none":
        scale = max(Fraction(height, frames.shape[-2]), Fraction(width, frames.shape[-1]))
        size = [round_half_up(side * scale) for side in frames.shape[-2:]]
    if frames.shape[-2:] != tuple(size):
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as transforms

        frames = transforms.resize(frames, size, InterpolationMode.BILINEAR, antialias=True)
    spare_rows, spare_columns = size[0] - height, size[1] - width
    if mode == "random":
        top, left = generator.randint(0, spare_rows), generator.randint(0, spare_columns)
    else:
        top, left = spare_rows // 2, spare_columns // 2
    return frames[..., top : top + height, left : left + width]
