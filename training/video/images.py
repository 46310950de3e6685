"""Load first frames of validation videos from disk or the web, and their controls from disk, before any model."""

import asyncio
import random
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import torch
from PIL import Image, ImageOps

from common.errors import UserError, listing
from video.condition_frames import FIRST, given_frames, is_context
from video.controls import INPAINT, NOWHERE_WHITE, check_companion, compute_control, find_mask, has_white
from video.frames import UNCUT, Cut, count_usable, usable_frames
from video.io import read_frames, reshape_frames
from video.media import decode_still_image, read_still_image, reason_of
from video.probe import VideoInfo, probe_video


DOWNLOAD_TIMEOUT = 30.0  # seconds for an image, redirects included
DOWNLOAD_LIMIT = 64 * 2**20  # bytes; photographs have about a tenth
MOST_REDIRECTS = 5

# Some hosts refuse clients without a name. Images are compressed already: a compressed answer may be a bomb.
_HEADERS = {"User-Agent": "cogvideox-factory", "Accept-Encoding": "identity"}


def load_validation_images(references: Sequence[str], flag: str = "--validation_images") -> list[Image.Image]:
    """Read one image per path or http(s) URL: upright by EXIF orientation, RGB, transparent parts on white.

    The UserError names the flag and every image that cannot be read, with the reason.
    """
    images: dict[str, Image.Image] = {}
    problems = []
    for reference in dict.fromkeys(references):
        try:
            images[reference] = _load(reference)
        # ImportError: for a proxy of the environment that needs another package.
        except (OSError, ValueError, ImportError, httpx.HTTPError, httpx.InvalidURL) as error:
            problems.append(f"'{reference}': {_reason(error)}")
    if len(problems) == 1:
        raise UserError(f"{flag}: {problems[0]}; pass a path or an http(s) URL of a still image")
    if problems:
        title = f"{flag}: {len(problems)} of {len(set(references))} cannot be read"
        advice = "pass paths or http(s) URLs of still images:"
        raise UserError(listing(f"{title}; {advice}", problems, most=len(problems)))
    return [images[reference] for reference in references]


def _load(reference: str) -> Image.Image:
    is_address = reference.lower().startswith(("http://", "https://"))
    still = decode_still_image(asyncio.run(_download(reference))) if is_address else read_still_image(reference)
    if still is None:
        raise ValueError("not a still image in PNG, JPEG, WebP, BMP, TIFF or GIF")
    return Image.fromarray(still.pixels)


def load_given_frames(
    files: Sequence[Sequence[str]],
    condition: str,
    height: int,
    width: int,
    *,
    flag: str,
    cut: Cut = UNCUT,
) -> list[Image.Image] | list[list[Image.Image]]:
    """Read what videos are sampled from: images, pairs of images, or the ends of videos that they continue.

    The UserError names the flag and every file that cannot be used, with the reason.

    Args:
        files: those of each video to sample: one or two images, or a video.
        condition: as in `condition_frames`.
        cut: that of clips. Images are cropped to the size in the middle, or with the mode "none" left alone. Of a
            video, the last frames at its rate are taken; none are skipped.
    """
    if not is_context(condition):
        # The pipeline would distort images of another aspect ratio.
        loaded = iter(load_validation_images([one for group in files for one in group], flag))
        is_cropped = cut.video_reshape_mode != "none"
        fitted = [ImageOps.fit(image, (width, height)) if is_cropped else image for image in loaded]
        return fitted if condition == FIRST else list(map(list, zip(fitted[::2], fitted[1::2], strict=True)))
    num_frames = len(given_frames(condition, 0))

    def choose(info: VideoInfo) -> Sequence[int]:
        usable = usable_frames(info, 0, 0, cut.fps)
        if len(usable) < num_frames:
            raise ValueError(f"has {count_usable(info, len(usable), 0, 0, cut.fps)}; pass a longer one")
        return usable[-num_frames:]

    title = f"{flag}: %s cannot be continued, for which --condition_frames {condition} takes {num_frames} frames:"
    videos = _load_videos([one for (one,) in files], choose, height, width, cut.video_reshape_mode, title)
    return [list(map(Image.fromarray, frames)) for frames in videos]


def load_controls(
    files: Sequence[str],
    size: tuple[int, int, int],
    kind: str | None,
    flag: str = "--validation_controls",
    cut: Cut = UNCUT,
) -> list[list[Image.Image]]:
    """Read a control for each video to sample, cut and cropped like the control of a clip.

    The UserError names the flag and every clip that cannot be read or is too short, with the reason.

    Args:
        size: frames, height and width of the videos.
        kind: compute the controls from the clips, as `compute_control` does; None if these are controls. INPAINT
            takes the mask beside each clip.
        cut: that of clips; a random crop is the middle.
    """
    num_frames, height, width = size
    title = f"{flag}: %s cannot be used for videos of {num_frames} frames:"
    choose = partial(cut.choose, num_frames=num_frames)
    videos = _load_videos(files, choose, height, width, cut.video_reshape_mode, title, kind)
    return [list(map(Image.fromarray, one)) for one in videos]


def _load_videos(
    files: Sequence[str],
    choose: Callable[[VideoInfo], Sequence[int]],
    height: int,
    width: int,
    reshape_mode: str,
    title: str,
    kind: str | None = None,
) -> list[np.ndarray]:
    """Read the chosen frames of videos, `[F, H, W, 3]` each, or controls of them.

    `title` begins the UserError, with %s for the number.
    """
    mode = "center" if reshape_mode == "random" else reshape_mode
    videos: dict[str, np.ndarray] = {}
    problems = []
    for file in dict.fromkeys(files):
        try:
            info = probe_video(Path(file))
            indices = choose(info)
            shaped, masks = _shaped(Path(file), info, indices, (height, width), mode), None
            if kind == INPAINT:
                mask = find_mask(Path(file))
                own = probe_video(mask)
                check_companion(own, info, f"its mask {mask}: ", may_be_still=True)
                shown = indices if own.num_frames > 1 else [0] * len(indices)
                masks = _shaped(mask, own, shown, (height, width), mode)
                if not has_white(masks):
                    raise ValueError(f"nothing to fill, because its mask {mask} {NOWHERE_WHITE}")
            videos[file] = compute_control(shaped, kind, masks) if kind else shaped.copy()
        except ValueError as error:
            problems.append(f"'{file}': {reason_of(error).removeprefix(f'{file}: ')}")
    if problems:
        raise UserError(listing(title % f"{len(problems)} of {len(set(files))}", problems, most=len(problems)))
    return [videos[file] for file in files]


def _shaped(file: Path, info: VideoInfo, indices: Sequence[int], size: tuple[int, int], mode: str) -> np.ndarray:
    frames = torch.from_numpy(read_frames(file, indices, seekable=info.seekable)).permute(0, 3, 1, 2)
    return reshape_frames(frames, *size, mode, random.Random(0)).permute(0, 2, 3, 1).numpy()


async def _download(url: str) -> BytesIO:
    """Return a server's answer within the limits of time and size."""
    content = BytesIO()
    client = httpx.AsyncClient(
        follow_redirects=True, max_redirects=MOST_REDIRECTS, timeout=DOWNLOAD_TIMEOUT, headers=_HEADERS
    )
    async with asyncio.timeout(DOWNLOAD_TIMEOUT), client, client.stream("GET", url) as response:
        if not response.is_success:
            raise ValueError(f"the server answers {response.status_code} {response.reason_phrase}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise ValueError("the server compresses the image, which was not requested")
        async for part in response.aiter_raw():
            content.write(part)
            if content.tell() > DOWNLOAD_LIMIT:
                raise ValueError(f"larger than {DOWNLOAD_LIMIT / 2**20:g} MiB")
    content.seek(0)
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError | httpx.TimeoutException):
        return f"no complete answer within {DOWNLOAD_TIMEOUT:g} s"
    if isinstance(error, httpx.ConnectError):
        return f"the server cannot be reached ({error})"
    return reason_of(error)
