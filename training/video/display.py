"""Show decoded frames as a player does: upright, deinterlaced, with square pixels, over white, in standard range."""

import math
import threading
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain, islice

import av
import numpy as np
from av.video.reformatter import ColorTrc, VideoReformatter
from PIL import Image

from video.media import over_white


# What is done to frames besides turning them.
MIRRORED, STRETCHED, DEINTERLACED = "mirrored", "stretched to square pixels", "deinterlaced"
OVER_WHITE, TONE_MAPPED = "shown over white", "tone-mapped to SDR"

# Resizing to a rounded size leaves ratios close to 1, and damaged headers have any ratio: both count as square.
_LEAST_STRETCH, _MOST_STRETCH = 1.02, 4
_HIGH_RANGE = {ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67}  # PQ and HLG


def orientation(frame: av.VideoFrame) -> tuple[bool, int]:
    """Return whether the stored picture is first mirrored left to right, and how many `np.rot90` turns follow."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, 0
    # Pixel (x, y) is shown at (ax + cy, bx + dy), y downwards.
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    mirrored = a * d < b * c
    right = math.atan2(-b, -a) if mirrored else math.atan2(b, a)  # where the upper edge points, clockwise
    return mirrored, round(-2 * right / math.pi) % 4


def square_size(frame: av.VideoFrame, stream: av.VideoStream) -> tuple[int, int]:
    """Return height and width of the picture with square pixels, before it is turned.

    Only the width changes, to an even number.
    """
    ratio = stream.sample_aspect_ratio or 1
    if not _LEAST_STRETCH < max(ratio, 1 / ratio) <= _MOST_STRETCH:
        return frame.height, frame.width
    return frame.height, max(2, int(frame.width * ratio / 2) * 2)


def corrections_of(frame: av.VideoFrame, stream: av.VideoStream) -> set[str]:
    """Return what is done to a frame besides turning it and converting it to RGB."""
    needs = {
        MIRRORED: orientation(frame)[0],
        STRETCHED: square_size(frame, stream) != (frame.height, frame.width),
        DEINTERLACED: frame.interlaced_frame,
        OVER_WHITE: has_alpha(frame.format.name) and opacity(frame).min() < 255,
        TONE_MAPPED: frame.color_trc in _HIGH_RANGE,
    }
    return {correction for correction, needed in needs.items() if needed}


@lru_cache
def has_alpha(pixel_format: str) -> bool:
    """Return whether frames of a pixel format have an alpha channel."""
    return any(component.is_alpha for component in av.VideoFormat(pixel_format).components)


def opacity(frame: av.VideoFrame) -> np.ndarray:
    """Return the alpha channel, uint8 [H, W]."""
    return frame.to_ndarray(format="rgba")[..., 3]


def progressive(frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Yield the same number of frames in the same order; those flagged as interlaced are deinterlaced.

    Deinterlacing uses both neighbours of a frame. A clip without such frames passes through no filter.
    """
    frames, before = iter(frames), []
    for frame in frames:
        if frame.interlaced_frame:
            break
        yield frame
        before = [frame]
    else:
        return
    graph = _graph(_properties(frame), ("bwdif", "mode=send_frame:deint=interlaced"))
    deinterlaced = _filtered(graph, chain(before, [frame], frames), _properties(frame)[:3])
    yield from islice(deinterlaced, len(before), None)


def to_rgb(frame: av.VideoFrame, height: int, width: int, reformatter: VideoReformatter) -> np.ndarray:
    """Convert a progressive frame to uint8 [height, width, 3], RGB, as stored: not yet mirrored or turned."""
    if frame.color_trc in _HIGH_RANGE:
        graph = _tone_mapping(threading.get_ident(), _properties(frame))
        graph.push(frame)
        frame = graph.pull()
    if has_alpha(frame.format.name):
        rgba = frame.to_ndarray(format="rgba")
        if rgba[..., 3].min() < 255:
            # Before resizing, which would mix hidden colours into visible ones.
            frame = av.VideoFrame.from_ndarray(over_white(Image.fromarray(rgba)), "rgb24")
    return reformatter.reformat(frame, width, height, "rgb24", threads=1).to_ndarray()


def turned(pixels: np.ndarray, mirrored: bool, turns: int) -> np.ndarray:
    """Mirror frames [F, H, W, 3] left to right if asked for, then turn them counterclockwise by quarters."""
    return np.ascontiguousarray(np.rot90(pixels[:, :, ::-1] if mirrored else pixels, turns, axes=(1, 2)))


def _properties(frame: av.VideoFrame) -> tuple[int, int, str, int, int]:
    return frame.width, frame.height, frame.format.name, int(frame.colorspace), int(frame.color_range)


@lru_cache(maxsize=32)
def _tone_mapping(thread: int, properties: tuple[int, int, str, int, int]) -> av.filter.Graph:
    """Return a graph from PQ or HLG to BT.709, which maps brightness and colours as perceived.

    It computes a table at its first frame, for 5 seconds. Each thread keeps its graphs for the next clips.
    """
    scale = "out_transfer=bt709:out_primaries=bt709:intent=perceptual:flags=bilinear"
    return _graph(properties, ("scale", scale), ("format", "rgba" if has_alpha(properties[2]) else "rgb24"))


def _graph(properties: tuple[int, int, str, int, int], *filters: tuple[str, str]) -> av.filter.Graph:
    width, height, pixel_format, colorspace, color_range = properties
    graph = av.filter.Graph()
    graph.threads = 1  # threads of its own would not survive the fork of a DataLoader worker
    source = f"width={width}:height={height}:pix_fmt={pixel_format}:colorspace={colorspace}:range={color_range}"
    nodes = [graph.add(*one) for one in (("buffer", f"{source}:time_base=1/1000"), *filters, ("buffersink",))]
    graph.link_nodes(*nodes).configure()
    return graph


def _filtered(
    graph: av.filter.Graph, frames: Iterable[av.VideoFrame], kind: tuple[int, int, str]
) -> Iterator[av.VideoFrame]:
    for frame in chain(frames, [None]):
        if frame is not None and _properties(frame)[:3] != kind:  # filters would read beyond the picture
            changed = "{}x{} {} to {}x{} {}".format(*kind, *_properties(frame))
            raise ValueError(f"changes its size or pixel format from {changed}")
        graph.push(frame)
        try:
            while True:
                yield graph.pull()
        except (av.BlockingIOError, av.EOFError):
            continue
