"""The images that validation videos begin with, from the disk or the web, read before anything heavy is loaded."""

import asyncio
from collections.abc import Sequence
from io import BytesIO

import httpx
from PIL import Image

from common.errors import UserError, listing
from video.media import decode_still_image, read_still_image, reason_of


DOWNLOAD_TIMEOUT = 30.0  # seconds that an image may take, with all that its server sends us on to
DOWNLOAD_LIMIT = 64 * 2**20  # bytes; photographs have a tenth of it
MOST_REDIRECTS = 5

# Some hosts refuse clients that do not say who they are. An image is packed already: what is packed twice may unpack
# to far more than was sent.
_HEADERS = {"User-Agent": "cogvideox-factory", "Accept-Encoding": "identity"}


def load_validation_images(references: Sequence[str], flag: str = "--validation_images") -> list[Image.Image]:
    """Read images, each one once: upright by their EXIF orientation, RGB, transparent parts on white.

    Args:
        references: paths or http(s) URLs; a few redirects are followed.
        flag: which named them, for messages.

    Returns:
        One image for each reference, in their order.

    Raises:
        UserError: names the flag and every image that cannot be had, with the reason.
    """
    images: dict[str, Image.Image] = {}
    problems = []
    for reference in dict.fromkeys(references):
        try:
            images[reference] = _load(reference)
        # ImportError: the environment names a proxy of a kind that needs another package.
        except (OSError, ValueError, ImportError, httpx.HTTPError, httpx.InvalidURL) as error:
            problems.append(f"'{reference}': {_reason(error)}")
    if len(problems) == 1:
        raise UserError(f"{flag}: {problems[0]}; give a path or an http(s) URL of a still image")
    if problems:
        title = (
            f"{flag}: {len(problems)} of {len(set(references))} cannot be read; give paths or http(s) "
            "URLs of still images:"
        )
        raise UserError(listing(title, problems, most=len(problems)))
    return [images[reference] for reference in references]


def _load(reference: str) -> Image.Image:
    is_address = reference.lower().startswith(("http://", "https://"))
    still = decode_still_image(asyncio.run(_download(reference))) if is_address else read_still_image(reference)
    if still is None:
        raise ValueError("not a still image in PNG, JPEG, WebP, BMP, TIFF or GIF")
    return Image.fromarray(still.pixels)


async def _download(url: str) -> BytesIO:
    """The answer of a server, within the limits: whatever it does, it is given up in time."""
    content = BytesIO()
    client = httpx.AsyncClient(
        follow_redirects=True, max_redirects=MOST_REDIRECTS, timeout=DOWNLOAD_TIMEOUT, headers=_HEADERS
    )
    async with asyncio.timeout(DOWNLOAD_TIMEOUT), client, client.stream("GET", url) as response:
        if not response.is_success:
            raise ValueError(f"the server answers {response.status_code} {response.reason_phrase}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise ValueError("the server packs the image once more, which was not asked for")
        async for part in response.aiter_raw():
            content.write(part)
            if content.tell() > DOWNLOAD_LIMIT:
                raise ValueError(f"larger than {DOWNLOAD_LIMIT / 2**20:g} MiB")
    content.seek(0)
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError | httpx.TimeoutException):
        return f"no whole answer within {DOWNLOAD_TIMEOUT:g} s"
    if isinstance(error, httpx.ConnectError):
        return f"the server cannot be reached ({error})"
    return reason_of(error)
