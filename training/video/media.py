"""Open the files that clips come in: videos with PyAV, still images with Pillow.

The content of a file decides, not its name. Animated GIF and PNG are videos and go to PyAV. Animated WebP is refused,
because FFmpeg does not decode it.
"""

import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError


VIDEO_SUFFIXES = frozenset([".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".gif"])
IMAGE_SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"])

# Our messages name the file and the reason; FFmpeg's only add noise. FFmpeg's own log callback is used because PyAV's
# takes the GIL in decoder threads, which deadlocks when a multi-threaded decoder is closed.
av.logging.restore_default_callback()
av.logging.set_libav_level(av.logging.PANIC)

# Pillow warns of damaged metadata and of more than 89 million pixels, but reads them. It refuses twice as many.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Not all formats of Pillow: for some it starts other programs, and clips may come from strangers.
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
# Formats of FFmpeg that are not videos of their own: playlists could name any file of this machine.
_NOT_VIDEOS = {"hls": "a playlist", "dash": "a playlist", "concat": "a playlist", "imf": "a playlist", "tty": "text"}
_IMAGE_BRANDS = {"heic", "heix", "heim", "heis", "mif1", "avif"}  # in the container of mp4, where FFmpeg sees a video
# EXIF orientation -> counterclockwise quarter turns. 2, 4, 5 and 7 mirror the picture first.
_EXIF_TURNS = {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}
# FFmpeg's own decoders of these codecs drop the alpha channel.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


@lru_cache(maxsize=1)
def media_suffixes() -> frozenset[str]:
    """Return the suffixes of all files that FFmpeg or Pillow may open; many are of sound, subtitles or text."""
    formats = map(av.ContainerFormat, av.formats_available)
    return VIDEO_SUFFIXES | IMAGE_SUFFIXES | {f".{name}" for one in formats for name in one.extensions}


def is_clip(file: Path) -> bool:
    """Return whether a file is a clip or still image: by its suffix, or by its content if the suffix is a rare one."""
    suffix = file.suffix.lower()
    if suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES or suffix not in media_suffixes():
        return suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES
    try:
        with open_video(file) as container:
            video_stream(container)
    except (av.FFmpegError, OSError, ValueError):
        return False
    return True


class StillImage(NamedTuple):
    """A picture as displayed."""

    pixels: np.ndarray  # uint8 [H, W, 3], RGB
    rotation: int  # degrees counterclockwise, from the EXIF orientation


def read_still_image(path: Path) -> StillImage | None:
    """Read a file as `decode_still_image` does; also raises OSError if it cannot be opened."""
    with open(path, "rb") as file:
        return decode_still_image(file)


def decode_still_image(file: BinaryIO) -> StillImage | None:
    """Decode a still image: upright by its EXIF orientation, RGB of 8 bits, transparent parts on white.

    Of 16 bits the upper 8 are kept, of several pages the first. Colour profiles are not applied. Returns None if the
    file is not a still image (use `open_video` then); raises ValueError if it is damaged, too large or not supported.
    """
    try:
        with Image.open(file, formats=_IMAGE_FORMATS) as image:
            if getattr(image, "is_animated", False):
                if image.format in ("GIF", "PNG"):
                    return None
                if image.format == "WEBP":
                    raise ValueError("it is an animated WebP, which FFmpeg does not decode; convert it to mp4")
            image.load()
            turns = _EXIF_TURNS.get(image.getexif().get(ExifTags.Base.Orientation), 0)
            return StillImage(_to_rgb(ImageOps.exif_transpose(image)), 90 * turns)
    except UnidentifiedImageError:
        return None
    except Exception as error:  # Pillow raises anything on damaged files
        raise ValueError(f"not a readable image: {reason_of(error)}") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise ValueError("its pixels have 32 bits; save it with 8 bits a colour")
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 bits a colour")
    if image.has_transparency_data:
        return over_white(image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def over_white(image: Image.Image) -> np.ndarray:
    """Show a picture of mode RGBA on white; returns uint8 [H, W, 3]."""
    shown = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(shown.convert("RGB"))


def open_video(path: Path) -> av.container.InputContainer:
    """Open a video; raises ValueError for a still image that Pillow could not read, for a playlist and for text."""
    # "file:", so that a name like "take 2: rabbit.mp4" is not taken for a URL.
    # metadata_errors: a clip whose title is not UTF-8 is fine.
    container = av.open(f"file:{path}", metadata_errors="ignore")
    if container.format.name.startswith("image2") or container.format.name.endswith("_pipe"):
        container.close()
        raise ValueError(f"not a readable image ({container.format.long_name})")
    if container.metadata.get("major_brand") in _IMAGE_BRANDS:
        container.close()
        raise ValueError("is a HEIC or AVIF image; convert it to PNG or JPEG")
    if container.format.name in _NOT_VIDEOS:
        container.close()
        raise ValueError(f"is {_NOT_VIDEOS[container.format.name]}, not a video")
    return container


def video_stream(container: av.container.InputContainer, num_threads: int = 1) -> av.VideoStream:
    """Return the stream to decode on `num_threads` threads (0: FFmpeg chooses), or raise ValueError if none can be."""
    stream = container.streams.best("video")
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:  # cover art of a song
        raise ValueError("has no video stream")
    if stream.codec_context is None:
        raise ValueError("its codec is unknown")
    stream.codec_context.thread_count = num_threads
    stream.codec_context.thread_type = "AUTO"
    return stream


def packets_of(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """Yield a stream's packets from here on except the empty ones: the demuxer's end mark and AVI's dropped frames."""
    while True:
        try:
            yield from (packet for packet in container.demux(stream) if packet.size)
            return
        except IndexError:
            # A stream that PyAV does not know began in the middle of the file. The next call continues after it.
            continue


def decode(packets: Iterable[av.Packet], stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Yield all frames of the packets, in display order."""
    context = stream.codec_context
    tags = {name.lower(): value for name, value in stream.metadata.items()}  # ALPHA_MODE by older muxers
    if tags.get("alpha_mode") == "1" and context.codec.canonical_name in _ALPHA_DECODERS:
        context = av.CodecContext.create(_ALPHA_DECODERS[context.codec.canonical_name], "r")
        context.thread_count = stream.codec_context.thread_count
    for packet in packets:
        yield from context.decode(packet)
    yield from context.decode(None)


def reason_of(error: Exception) -> str:
    """Return the message of a system or FFmpeg error, without file name and number."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
