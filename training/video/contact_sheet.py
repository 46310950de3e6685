"""A picture of samples, some frames and the caption of each: of the data as the model sees it, of sampled videos."""

import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.files import written_whole


_MARGIN = 20
_CELL_WIDTH, _CELL_HEIGHT, _CELL_GAP = 222, 148, 4
_HEADER_HEIGHT = 44
_ROW_HEIGHT = _CELL_HEIGHT + 24
_TEXT_GAP, _TEXT_WIDTH = 20, 462
_LINE_HEIGHT, _CAPTION_GAP = 20, 6
_FONT_SIZE = 15
_SHOWN_FRAMES = 5  # of a sampled video
_PAPER, _CELL, _RULE, _FAINT, _TITLE, _CAPTION = "#ffffff", "#f0f0f2", "#d8d8dc", "#808088", "#101014", "#48484f"

# More characters than a line can have, so that a caption as long as a book is not measured to its end.
_LONGEST_LINE = 300
# What the built-in font lacks and no decomposition helps with.
_SUBSTITUTES = {"\N{EN DASH}": "-", "\N{EM DASH}": "-", "\N{MULTIPLICATION SIGN}": "x", "ß": "ss", "æ": "ae", "ø": "o"}


@dataclass(frozen=True)
class SheetRow:
    """One sample on the sheet."""

    frames: Sequence[np.ndarray]  # one for each column, or fewer. uint8 [H, W, 3], RGB
    title: str  # "49x480x720 · videos/rabbit.mp4"
    caption: str


def draw_contact_sheet(
    rows: Sequence[SheetRow], path: Path | None = None, columns: Sequence[str] = ("first frame", "middle", "last")
) -> Image.Image:
    """Draw samples below one another, 1200 pixels wide with three columns of frames and 226 more with each other one.

    Frames keep their aspect ratio and are scaled to one height, or to one width where they are wider than 3:2. Titles
    and captions that are too long end in an ellipsis.

    Args:
        rows: 172 pixels high each; 16 are a good number.
        path: where to write the sheet as a PNG; None: nowhere.
        columns: what stands above the frames.
    """
    text_left = _cell_left(len(columns)) + _TEXT_GAP
    width = text_left + _TEXT_WIDTH + _MARGIN
    sheet = Image.new("RGB", (width, _HEADER_HEIGHT + len(rows) * _ROW_HEIGHT), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(columns):
        draw.text((_cell_left(column), 18), name, fill=_FAINT, font=_font())
    for number, row in enumerate(rows):
        top = _HEADER_HEIGHT + number * _ROW_HEIGHT
        draw.line((_MARGIN, top, width - _MARGIN, top), fill=_RULE)
        top += (_ROW_HEIGHT - _CELL_HEIGHT) // 2
        _draw_frames(sheet, draw, row.frames[: len(columns)], top)
        _draw_text(draw, row, text_left, top)
    if path is not None:
        with written_whole(path) as partial:
            sheet.save(partial, format="PNG")
    return sheet


def shown_indices(num_frames: int) -> list[int]:
    """Up to five frame numbers, spread over a video from its first to its last."""
    spread = np.linspace(0, num_frames - 1, _SHOWN_FRAMES).round().astype(int)
    return list(dict.fromkeys(spread.tolist()))


def _draw_frames(sheet: Image.Image, draw: ImageDraw.ImageDraw, frames: Sequence[np.ndarray], top: int) -> None:
    for column, frame in enumerate(frames):
        left = _cell_left(column)
        draw.rectangle((left, top, left + _CELL_WIDTH - 1, top + _CELL_HEIGHT - 1), fill=_CELL)
        picture = _fit_cell(Image.fromarray(frame))
        sheet.paste(picture, (left + (_CELL_WIDTH - picture.width) // 2, top + (_CELL_HEIGHT - picture.height) // 2))


def _draw_text(draw: ImageDraw.ImageDraw, row: SheetRow, left: int, top: int) -> None:
    num_lines = (_CELL_HEIGHT - _CAPTION_GAP) // _LINE_HEIGHT
    title = _wrap(row.title, 2)
    caption = _wrap(row.caption, num_lines - len(title))
    for number, line in enumerate(title):
        draw.text((left, top + number * _LINE_HEIGHT), line, fill=_TITLE, font=_font())
    top += len(title) * _LINE_HEIGHT + _CAPTION_GAP
    for number, line in enumerate(caption):
        draw.text((left, top + number * _LINE_HEIGHT), line, fill=_CAPTION, font=_font())


def _cell_left(column: int) -> int:
    return _MARGIN + column * (_CELL_WIDTH + _CELL_GAP)


def _fit_cell(picture: Image.Image) -> Image.Image:
    scale = min(_CELL_WIDTH / picture.width, _CELL_HEIGHT / picture.height)
    size = max(1, round(scale * picture.width)), max(1, round(scale * picture.height))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _wrap(text: str, most: int) -> list[str]:
    """Lines that fit the text column; what is more than `most` of them is cut with an ellipsis."""
    text = "".join(map(_drawable, " ".join(text[: most * _LONGEST_LINE].split())))
    width_of = _font().getlength
    lines = []
    while text and len(lines) < most:
        counts = range(1, min(len(text), _LONGEST_LINE) + 1)
        count = max(1, bisect_right(counts, _TEXT_WIDTH, key=lambda count: width_of(text[:count])))
        if count < len(text):
            # At a space, unless that leaves the line half empty: long paths and scripts without spaces break anywhere.
            space = text.rfind(" ", count // 2, count + 1)
            count = space if space > 0 else count
        lines.append(text[:count])
        text = text[count:].lstrip()
    if text:
        last = lines[-1]
        while width_of(f"{last}…") > _TEXT_WIDTH:
            last = last[:-1]
        lines[-1] = f"{last.rstrip()}…"
    return lines


@cache
def _drawable(character: str) -> str:
    """The character, or what comes nearest to it in the font."""
    if _glyph(character) != _glyph("\U0010ffff"):  # no font has that one, so it is drawn as the box for all others
        return character
    plain = [c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c)]
    return "".join(_SUBSTITUTES.get(c, c) for c in plain)


def _glyph(character: str) -> bytes:
    return bytes(_font().getmask(character))


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=_FONT_SIZE)
