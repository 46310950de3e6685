"""Find the media files that a row names, and write media that a row contains to a cache.

Cached files are named by their content, so each is written once however many processes read it. The probe checks what
is in them.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path, PureWindowsPath
from time import monotonic

import av
import numpy as np
from PIL import Image

from common.errors import UserError, described, one_line
from common.files import atomic_write
from common.remote import listed_below
from data.paths import expand_home, is_absolute_on_windows, spelled_on_disk, stays_inside
from data.rows import UnusableRow
from video.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, decode_still_image, reason_of


FETCH_LIMIT = 4 * 2**30  # bytes per clip
FETCH_TIMEOUT = 1800.0  # seconds per clip

_DECODED_FPS = 8  # rate of decoded videos without an fps column: what CogVideoX 1.0 was trained at
_URL_REFUSED = "is a URL; download the file and list its path, or pass the URL of its folder as --data_root"
_ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4")  # that fsspec can open


def media_file(
    value: object, folder: Path | None, cache: Path, fps: object = None, *, within: Sequence[Path] | None = None
) -> Path:
    """Find the file of a row's video or image, or write the media that the row contains to the cache.

    Args:
        value: a path, where ~/ is the home folder; a file's bytes; a dict of "bytes" and "path", as `datasets` stores
            videos and images, where the path may be a link to the hub or into an archive; a decoded video,
            [F, H, W, 3], or image, [H, W, 3], of integers from 0 to 255; or a video as a list of images, each a path,
            bytes or dict.
        folder: start of relative paths.
        cache: folder for media that rows contain. Decoded videos are stored losslessly, as FFV1.
        fps: rate of decoded videos; None for 8.
        within: folders that a path must stay in, as in `stays_inside`; None allows any path.

    Raises UnusableRow if the value is none of these, and UserError if the cache cannot be written.
    """
    match value:
        case str(path):
            return _listed_file(path, folder, within)
        case bytes(data) | {"bytes": bytes(data)}:
            name = value.get("path") if isinstance(value, dict) else None
            return _cached(cache, _digest(data), str(name or ""), lambda partial: partial.write_bytes(data))
        case {"path": str(path)}:
            return _fetch(path, folder, cache, within) if "://" in path else _listed_file(path, folder, within)
        case None | {"path": None}:
            raise UnusableRow("has no path")
        case np.ndarray():
            return _write_decoded(value, fps, cache)
        case list():
            return _write_images([_image_bytes(image, folder, within) for image in value], fps, cache)
    raise UnusableRow(f"is {described(value)}, not a path")


def first_frame_file(
    value: object, folder: Path | None, cache: Path, *, within: Sequence[Path] | None = None
) -> Path | None:
    """Find the image that image-to-video conditions on like `media_file`; a row may have none, or a list of one."""
    if isinstance(value, list):
        if len(value) > 1:
            raise UnusableRow(f"has {len(value)} images instead of one")
        value = value[0] if value else None
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        return media_file(value, folder, cache, within=within)
    except UnusableRow as problem:
        raise UnusableRow(f"its image {problem}") from problem


def _listed_file(text: str, folder: Path | None, within: Sequence[Path] | None) -> Path:
    path = expand_home(text.strip())
    if not path:
        raise UnusableRow("has no path")
    if "://" in path:
        found = listed_below(path, (folder, *(within or ())))
        if found is None:
            raise UnusableRow(_URL_REFUSED)
        return found
    if is_absolute_on_windows(path):
        example = "/".join(PureWindowsPath(path).parts[1:][-2:])
        raise UnusableRow(f"is a path on Windows; write it relative to --data_root and with slashes, like {example}")
    if folder is None and not os.path.isabs(path):
        raise UnusableRow("has a relative path; set the folder it starts from with --data_root")
    path = spelled_on_disk(path, folder)
    if within is not None and not stays_inside(path, folder, within):
        where = f"outside of {folder}" if folder else "outside of the folders that were named (--data_root)"
        raise UnusableRow(f"lies {where}; move it there, or pass --allow_outside_paths if you trust this list")
    return Path(path) if folder is None or os.path.isabs(path) else folder / path


def _fetch(url: str, folder: Path | None, cache: Path, within: Sequence[Path] | None) -> Path:
    """Copy a file on the hub or in an archive, cached by its link: the hub's links contain the revision.

    No other server is contacted, except that of a URL which the user named.
    """
    if found := listed_below(url, (folder, *(within or ()))):
        return found
    import fsspec
    from huggingface_hub import constants

    *inner, outermost = url.split("::")
    if "://" not in outermost:
        url = "::".join([*inner, str(_listed_file(outermost, folder, within).absolute())])
    elif not outermost.startswith(("hf://", f"{constants.ENDPOINT}/")):  # those that `datasets` makes
        raise UnusableRow(_URL_REFUSED)
    if not all(link.partition("://")[0] in _ARCHIVES for link in inner):
        raise UnusableRow("is an unsupported kind of link; list the path of a file")

    def copy(partial: Path) -> None:
        deadline = monotonic() + FETCH_TIMEOUT
        try:
            with fsspec.open(url, "rb") as remote, partial.open("wb") as file:
                while piece := remote.read(2**20):
                    file.write(piece)
                    if file.tell() > FETCH_LIMIT:
                        raise ValueError(f"larger than {FETCH_LIMIT / 2**20:g} MiB")
                    if monotonic() > deadline:
                        raise TimeoutError(f"not complete within {FETCH_TIMEOUT:g} s")
        except Exception as error:  # each file system of fsspec has its own exceptions
            raise UnusableRow(f"cannot be fetched: {one_line(error) or type(error).__name__}") from error

    return _cached(cache, _digest(url.encode()), url.split("::")[0].split("?")[0], copy)


def _write_decoded(array: np.ndarray, fps: object, cache: Path) -> Path:
    is_decoded = array.ndim in (3, 4) and array.shape[-1] == 3 and array.size and array.dtype.kind in "iu"
    if not is_decoded or array.min() < 0 or array.max() > 255:
        raise UnusableRow(
            f"holds {array.dtype} of shape {list(array.shape)}; decoded videos are integers, 0 to 255, [F, H, W, 3]"
        )
    array, rate = np.ascontiguousarray(array, np.uint8), _rate(fps)
    digest = _digest(f"{array.shape} at {rate}".encode(), array)
    if array.ndim == 3:
        return _cached(cache, digest, "a.png", Image.fromarray(array).save)
    return _cached(cache, digest, "a.mkv", lambda partial: _write_video(partial, array, rate))


def _write_images(images: Sequence[bytes], fps: object, cache: Path) -> Path:
    if not images:
        raise UnusableRow("holds no frames")
    rate = _rate(fps)
    digest = _digest(f"stills of {[len(image) for image in images]} bytes at {rate}".encode(), *images)
    return _cached(cache, digest, "a.mkv", lambda partial: _write_video(partial, map(_decode_image, images), rate))


def _image_bytes(image: object, folder: Path | None, within: Sequence[Path] | None) -> bytes:
    match image:
        case bytes(data) | {"bytes": bytes(data)}:
            return data
        case str(path) | {"path": str(path)}:
            try:
                return _listed_file(path, folder, within).read_bytes()
            except (OSError, ValueError) as error:  # ValueError: a path with a null character
                reason = reason_of(error)
                raise UnusableRow(f"has a frame {one_line(path, 200)} that cannot be read: {reason}") from error
    raise UnusableRow(f"has {described(image)} among its frames, not an image")


def _decode_image(data: bytes) -> np.ndarray:
    try:
        image = decode_still_image(io.BytesIO(data))
    except ValueError as error:
        raise UnusableRow(f"has a frame that is {one_line(error)}") from error
    if image is None:
        raise UnusableRow("has a frame that is not a still image")
    return image.pixels


def _rate(fps: object) -> Fraction:
    if not isinstance(fps, int | float | None) or not 0.01 <= (rate := _DECODED_FPS if fps is None else fps) <= 1000:
        raise UnusableRow(f"has {described(fps)} in its fps column; a rate is a number from 0.01 to 1000")
    return Fraction(rate).limit_denominator(1001)


def _write_video(path: Path, frames: Iterable[np.ndarray], rate: Fraction) -> None:
    # Equal frames make equal bytes: without bitexact, Matroska adds a random identifier.
    with av.open(str(path), "w", format="matroska", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.pix_fmt = "bgr0"
        for index, pixels in enumerate(frames):
            if index == 0:
                stream.height, stream.width = size = pixels.shape[:2]
            if pixels.shape[:2] != size:
                raise UnusableRow("holds frames of different sizes")
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="bgr0")
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _digest(*parts: bytes | np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _cached(cache: Path, digest: str, name: str, write: Callable[[Path], object]) -> Path:
    suffix = os.path.splitext(name)[1].lower()
    path = cache / digest[:2] / f"{digest}{suffix if suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES else ''}"
    if not path.exists():
        try:
            with atomic_write(path) as partial:
                write(partial)
        except av.FFmpegError as error:
            raise UserError(f"{path} cannot be written: {reason_of(error)}") from error
    return path
