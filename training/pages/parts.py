"""Parts of a page: text, facts, tables, pictures and videos, as HTML in which the text of callers is escaped."""

import math
import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image


Media = bytes | Image.Image | np.ndarray  # a PNG, JPEG, MP4 or WebM file; a picture; uint8 [H, W, 3], RGB

_JPEG_QUALITY = 85
_NUMBER = re.compile(r"-?[\d.,]+(e[-+]\d+)?%?")
_MEDIA_TYPES = {  # by the beginning of a file, without the 4 bytes of length that MP4 starts with
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"ftyp": "video/mp4",
    b"\x1aE\xdf\xa3": "video/webm",
}


def format_number(value: float) -> str:
    """Format a number with at most four digits, or all digits of its whole part: "0.1235", "29.97", "1,234,567"."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or value == round(value) else f"{value:.4g}"


def keep_flags(text: str) -> Markup:
    """Return the text with flags such as --fps on one line, which a browser would break after their hyphens."""
    return Markup(re.sub(r"--\w+", r'<span class="flag">\g<0></span>', str(escape(text))))


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"number": format_number, "flags": keep_flags}
MACROS: Any = TEMPLATES.get_template("parts.html").module


def paragraph(text: str) -> Markup:
    """Return a paragraph; line breaks in the text are kept."""
    return MACROS.paragraph(text)


def warnings(lines: Sequence[str]) -> Markup:
    """Return a list that stands out, with an item for each line; nothing without lines."""
    return MACROS.warnings(lines) if lines else Markup()


def code(text: str) -> Markup:
    """Return a block of code, such as a command to copy."""
    return MACROS.code(text)


def facts(pairs: Iterable[tuple[str, Any]]) -> Markup:
    """Return a list of names, each with its value; numbers are formatted."""
    return MACROS.facts(list(pairs))


def table(
    header: Sequence[str], rows: Sequence[Sequence[Any]], title: str, *, most: int = 500, complete: str = ""
) -> Markup:
    """Return a table that scrolls by itself where it is too wide; columns of numbers are aligned to the right.

    Args:
        header: the names of the columns.
        rows: text, numbers, None for an empty cell, or HTML of other parts.
        title: what the table shows, above it.
        most: rows to show, so that the page stays small.
        complete: where all rows are, named below a table that is cut: "skipped_clips.csv".
    """
    shown = rows[:most]
    is_number = [
        bool(shown) and all(_NUMBER.fullmatch(str(row[column])) for row in shown if row[column] is not None)
        for column in range(len(header))
    ]
    return MACROS.table(header, shown, title, is_number, len(rows), complete)


def figure(media: Sequence[Media], caption: str = "", *, title: str = "", alt: str = "") -> Markup:
    """Return pictures or videos side by side, which are part of the page, with a title and a caption below them.

    Args:
        media: frames and pictures become JPEG; files are kept.
        alt: what they show, for readers who do not see it.
    """
    uris = list(map(data_uri, media))
    return MACROS.figure([(uri, uri.startswith("data:video")) for uri in uris], title, caption, alt)


def grid(parts: Iterable[Markup], *, is_wide: bool = False) -> Markup:
    """Return parts side by side, in as many columns as there is room for; nothing without content.

    Args:
        is_wide: for fewer columns, of charts with several curves.
    """
    shown = list(filter(None, parts))
    return MACROS.grid(shown, is_wide) if shown else Markup()


def progress(share: float, text: str) -> Markup:
    """Return a bar that is filled from 0 to 1, with a text beside it."""
    return MACROS.progress(share, text)


def verdict(kind: str, title: str, text: str) -> Markup:
    """Return a paragraph that says at once how something is; kind: "good", "bad" or "unsure"."""
    return MACROS.verdict(kind, title, text)


@dataclass(frozen=True)
class Cell:
    """A video in a row of videos."""

    name: str  # "step 100"
    media: bytes | None  # MP4 or WebM; None if the page does not contain it
    link: str = ""  # to the complete file, relative to the page
    note: str = ""  # below the video
    absent: str = "not in this page"  # instead of the video


def reel(title: str, cells: Sequence[Cell]) -> Markup:
    """Return a row of videos that play in a loop, without sound, and scrolls by itself where it is too wide."""
    shown = [asdict(cell) | {"uri": cell.media and data_uri(cell.media)} for cell in cells]
    return MACROS.reel(title, shown) if shown else Markup()


def details(summary: str, parts: Iterable[Markup]) -> Markup:
    """Return parts that are hidden until the reader opens them."""
    return MACROS.details(summary, list(parts))


def data_uri(media: Media) -> str:
    """Return a picture or video as a URI that contains it; ValueError for files of other kinds."""
    if isinstance(media, np.ndarray):
        media = Image.fromarray(media)
    if isinstance(media, Image.Image):
        file = BytesIO()
        media.convert("RGB").save(file, format="JPEG", quality=_JPEG_QUALITY)
        media = file.getvalue()
    for start, media_type in _MEDIA_TYPES.items():
        if media.startswith(start, 4 if start == b"ftyp" else 0):
            return f"data:{media_type};base64,{b64encode(media).decode()}"
    raise ValueError(f"neither PNG, JPEG, MP4 nor WebM: a file that begins with {media[:8]!r}")
