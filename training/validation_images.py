"""The images that validation videos begin with, from the disk or the web, read before anything heavy is loaded."""

from collections.abc import Sequence
from io import BytesIO
from time import monotonic

import httpx
from PIL import Image

from errors import UserError, listing
from media import decode_still_image, read_still_image, reason_of


DOWNLOAD_TIMEOUT = 30.0  # seconds that a server may be silent, and that a whole image may take
DOWNLOAD_LIMIT = 64 * 2**20  # bytes; photographs have a tenth of it

# Some hosts refuse clients that do not say who they are.
_HEADERS = {"User-Agent": "cogvideox-factory"}


def load_validation_images(references: Sequence[str]) -> list[Image.Image]:
    """Read images, each one once: upright by their EXIF orientation, RGB, transparent parts on white.

    Args:
        references: paths or http(s) URLs; redirects are followed.

    Returns:
        One image for each reference, in their order.

    Raises:
        UserError: names --validation_images and every image that cannot be had, with the reason.
    """
    images: dict[str, Image.Image] = {}
    problems = []
    for reference in dict.fromkeys(references):
        try:
            images[reference] = _load(reference)
        except (OSError, ValueError, httpx.HTTPError, httpx.InvalidURL) as error:
            problems.append(f"'{reference}': {_reason(error)}")
    if len(problems) == 1:
        raise UserError(f"--validation_images: {problems[0]}; give a path or an http(s) URL of a still image")
    if problems:
        title = (
            f"--validation_images: {len(problems)} of {len(set(references))} cannot be read; give paths or http(s) "
            "URLs of still images:"
        )
        raise UserError(listing(title, problems, most=len(problems)))
    return [images[reference] for reference in references]


def _load(reference: str) -> Image.Image:
    is_address = reference.lower().startswith(("http://", "https://"))
    still = decode_still_image(_download(reference)) if is_address else read_still_image(reference)
    if still is None:
        raise ValueError("not a still image in PNG, JPEG, WebP, BMP, TIFF or GIF")
    return Image.fromarray(still.pixels)


def _download(url: str) -> BytesIO:
    content = BytesIO()
    deadline = monotonic() + DOWNLOAD_TIMEOUT
    with httpx.stream("GET", url, follow_redirects=True, timeout=DOWNLOAD_TIMEOUT, headers=_HEADERS) as response:
        if not response.is_success:
            raise ValueError(f"the server answers {response.status_code} {response.reason_phrase}")
        for part in response.iter_bytes():
            content.write(part)
            if content.tell() > DOWNLOAD_LIMIT:
                raise ValueError(f"larger than {DOWNLOAD_LIMIT / 2**20:g} MiB")
            if monotonic() > deadline:
                raise httpx.ReadTimeout("the whole took too long")
    content.seek(0)
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.TimeoutException):
        return f"no whole answer within {DOWNLOAD_TIMEOUT:g} s"
    if isinstance(error, httpx.ConnectError):
        return f"the server cannot be reached ({error})"
    return reason_of(error)
