"""Load the first frames of validation videos from disk or the web, before any model."""

import asyncio
from collections.abc import Sequence
from io import BytesIO

import httpx
from PIL import Image

from common.errors import UserError, listing
from video.media import decode_still_image, read_still_image, reason_of


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
