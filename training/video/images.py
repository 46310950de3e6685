"""Load first frames of validation videos from disk or the web, and their controls from disk, before any model."""

import asyncio
import random
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import torch
from PIL import Image

from common.errors import UserError, listing
from video.controls import INPAINT, check_companion, compute_control, find_mask
from video.frames import choose_samples
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


def load_controls(
    files: Sequence[str],
    size: tuple[int, int, int],
    kind: str | None,
    flag: str = "--validation_controls",
    *,
    reshape_mode: str = "center",
    fps: float | None = None,
    long_clips: str = "spread",
) -> list[list[Image.Image]]:
    """Read a control for each video to sample, cut and cropped like the control of a clip.

    The UserError names the flag and every clip that cannot be read or is too short, with the reason.

    Args:
        size: frames, height and width of the videos.
        kind: compute the controls from the clips, as `compute_control` does; None if these are controls. INPAINT
            takes the mask beside each clip.
        reshape_mode, fps, long_clips: as of clips; a random crop is the middle.
    """
    (num_frames, height, width), mode = size, "center" if reshape_mode == "random" else reshape_mode
    controls: dict[str, list[Image.Image]] = {}
    problems = []
    for file in dict.fromkeys(files):
        try:
            info = probe_video(Path(file))
            indices = choose_samples(info, [num_frames], fps=fps, long_clips=long_clips)[0]
            shaped, masks = _shaped(Path(file), info, indices, (height, width), mode), None
            if kind == INPAINT:
                mask = find_mask(Path(file))
                own = probe_video(mask)
                check_companion(own, info, f"its mask {mask}: ", may_be_still=True)
                masks = _shaped(mask, own, indices if own.num_frames > 1 else [0] * num_frames, (height, width), mode)
        except ValueError as error:
            problems.append(f"'{file}': {reason_of(error).removeprefix(f'{file}: ')}")
            continue
        controls[file] = list(map(Image.fromarray, compute_control(shaped, kind, masks) if kind else shaped.copy()))
    if problems:
        title = f"{flag}: {len(problems)} of {len(set(files))} cannot be used for videos of {num_frames} frames:"
        raise UserError(listing(title, problems, most=len(problems)))
    return [controls[file] for file in files]


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
