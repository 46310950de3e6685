"""Open the files that clips come in: videos with PyAV, still images with Pillow.

Content decides which of the two a file is, not its name. A picture that moves is a video: GIF and PNG of several
frames go to PyAV. Animated WebP is refused: FFmpeg does not decode it, and its first frame is not what was meant.
"""

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError


# Our own messages name the file and the reason; FFmpeg's are noise beside them. Its own log function is used because
# PyAV's takes the GIL in decoder threads, and waits there for ever when a decoder with several threads is closed.
av.logging.restore_default_callback()
av.logging.set_libav_level(av.logging.PANIC)

# What Pillow only warns of can be read: damaged notes beside the picture, or more than 89 million pixels, as scans
# have. From twice as many on it refuses.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Not all that Pillow knows: for some formats it starts other programs, and clips come from strangers.
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
# EXIF orientation -> quarter turns against the clock. 2, 4, 5 and 7 mirror the picture first.
_EXIF_TURNS = {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}


class StillImage(NamedTuple):
    """A picture as it is displayed."""

    pixels: np.ndarray  # uint8 [H, W, 3], RGB
    rotation: int  # degrees against the clock by which its EXIF orientation turned it


def read_still_image(path: Path) -> StillImage | None:
    """Read a file as `decode_still_image` does.

    Raises:
        ValueError: as there.
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        return decode_still_image(file)


def decode_still_image(file: BinaryIO) -> StillImage | None:
    """Decode a still image: upright by its EXIF orientation, RGB of 8 bits, transparent parts on white.

    Of 16 bits the upper 8 are kept, of several pages the first. Colour profiles are not applied.

    Returns:
        None where the file is no still image: then it is for `open_video`.

    Raises:
        ValueError: with a reason that does not name the file: damaged, too large, of a kind that is not read.
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
    except Exception as error:  # on damaged files Pillow raises whatever it stumbles over
        raise ValueError(f"not a readable image: {reason_of(error)}") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise ValueError("its pixels have 32 bits; save it with 8 bits a colour")
        return np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 bits a colour")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def open_video(path: Path) -> av.container.InputContainer:
    """Open a video.

    Raises:
        ValueError: it is a still image that Pillow could not read.
        av.FFmpegError, OSError: it cannot be opened.
    """
    # "file:", so that a name like "take 2: rabbit.mp4" is not taken for an address.
    # metadata_errors: a title that is not UTF-8 is no reason to refuse a clip.
    container = av.open(f"file:{path}", metadata_errors="ignore")
    if container.format.name.startswith("image2") or container.format.name.endswith("_pipe"):
        container.close()
        raise ValueError(f"not a readable image ({container.format.long_name})")
    return container


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The stream to read, set to decode on one thread.

    Raises:
        ValueError: there is none, or no decoder for it.
    """
    stream = container.streams.best("video")
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:  # cover art of a song
        raise ValueError("has no video stream")
    if stream.codec_context is None:
        raise ValueError("its codec is unknown")
    stream.codec_context.thread_count = 1  # probes run in parallel with one another, readers in parallel workers
    return stream


def packets_of(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """All packets of a stream that hold something, from where the container stands.

    Empty are the demuxer's end mark, and frames dropped in AVI.
    """
    while True:
        try:
            yield from (packet for packet in container.demux(stream) if packet.size)
            return
        except IndexError:
            # A stream began in the middle of the file, and PyAV does not know it. That packet is gone; the next call
            # goes on with the one after it.
            continue


def decode(packets: Iterable[av.Packet], stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """All frames of the packets, in display order."""
    for packet in packets:
        yield from stream.codec_context.decode(packet)
    yield from stream.codec_context.decode(None)


def quarter_turns(frame: av.VideoFrame) -> int:
    """How often `np.rot90` has to turn the stored picture for display."""
    return round(frame.rotation / 90) % 4


def reason_of(error: Exception) -> str:
    """What an error of the system or of FFmpeg says, without the file name and the number."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
