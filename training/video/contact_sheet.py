"""Contact sheets: a picture with some frames and the caption of each sample."""

import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.files import atomic_write


_MARGIN = 20
_CELL_SIZE = _CELL_WIDTH, _CELL_HEIGHT = 222, 148
_CELL_GAP = 4
_HEADER_HEIGHT = 44
_ROW_HEIGHT = _CELL_HEIGHT + 24
_TEXT_GAP, _TEXT_WIDTH = 20, 462
_LINE_HEIGHT, _CAPTION_GAP = 20, 6
_FONT_SIZE = 15
_SHOWN_FRAMES = 5  # of a sampled video
_PAPER, _CELL, _RULE, _FAINT, _TITLE, _CAPTION = "#ffffff", "#f0f0f2", "#d8d8dc", "#808088", "#101014", "#48484f"

# More characters than a line can hold: only this part of a very long caption is measured.
_LONGEST_LINE = 300
# Characters that the built-in font lacks and Unicode does not decompose.
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
    """Draw one sample per row, each 172 pixels high, and write the sheet as a PNG to `path`.

    The sheet is 1200 pixels wide with three columns of frames, plus 226 for each further one. Frames keep their aspect
    ratio within 222x148 pixels. Titles and captions that are too long end in an ellipsis.
    """
    text_left = _cell_left(len(columns)) + _TEXT_GAP
    width = text_left + _TEXT_WIDTH + _MARGIN
    sheet = Image.new("RGB", (width, _HEADER_HEIGHT + len(rows) * _ROW_HEIGHT), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(columns):
        draw.text((_cell_left(column), 18), name, fill=_FAINT, font=_font())
    for top, row in zip(range(_HEADER_HEIGHT, sheet.height, _ROW_HEIGHT), rows, strict=True):
        draw.line((_MARGIN, top, width - _MARGIN, top), fill=_RULE)
        top += (_ROW_HEIGHT - _CELL_HEIGHT) // 2
        for column, frame in enumerate(row.frames[: len(columns)]):
            cell = ImageOps.pad(Image.fromarray(frame), _CELL_SIZE, Image.Resampling.LANCZOS, _CELL)
            sheet.paste(cell, (_cell_left(column), top))
        _draw_text(draw, row, text_left, top)
    if path is not None:
        with atomic_write(path) as partial:
            sheet.save(partial, format="PNG")
    return sheet


def shown_condition(
    condition: Image.Image | Sequence[Image.Image] | None, num_frames: int
) -> tuple[list[str], list[np.ndarray]]:
    """Return the titles and pictures of the frames that a video was made from; none for a control's."""
    if isinstance(condition, Image.Image):
        return ["start image"], [np.asarray(condition)]
    if condition is None or len(condition) >= num_frames:
        return [], []
    return ["first given", "last given"], [np.asarray(condition[0]), np.asarray(condition[-1])]


def shown_indices(num_frames: int) -> list[int]:
    """Return up to five frame numbers, spread evenly from the first frame to the last."""
    spread = np.linspace(0, num_frames - 1, _SHOWN_FRAMES).round().astype(int)
    return list(dict.fromkeys(spread.tolist()))


def _draw_text(draw: ImageDraw.ImageDraw, row: SheetRow, left: int, top: int) -> None:
    num_lines = (_CELL_HEIGHT - _CAPTION_GAP) // _LINE_HEIGHT
    title = _wrap(row.title, 2)
    caption = _wrap(row.caption, num_lines - len(title))
    for number, line in enumerate([*title, *caption]):
        color, gap = (_TITLE, 0) if number < len(title) else (_CAPTION, _CAPTION_GAP)
        draw.text((left, top + number * _LINE_HEIGHT + gap), line, fill=color, font=_font())


def _cell_left(column: int) -> int:
    return _MARGIN + column * (_CELL_WIDTH + _CELL_GAP)


def _wrap(text: str, most: int) -> list[str]:
    """Split a text into at most `most` lines that fit the text column; the last may end in an ellipsis."""
    text = "".join(map(_drawable, " ".join(text[: most * _LONGEST_LINE].split())))
    width_of = _font().getlength
    lines = []
    while text and len(lines) < most:
        counts = range(1, min(len(text), _LONGEST_LINE) + 1)
        count = max(1, bisect_right(counts, _TEXT_WIDTH, key=lambda count: width_of(text[:count])))
        if count < len(text):
            # At a space, unless the line gets less than half full: long paths and some scripts break anywhere.
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
    """Return the character, or the closest one that the font has."""
    glyph, box = (bytes(_font().getmask(one)) for one in (character, "\U0010ffff"))
    if glyph != box:  # which every font draws as a box
        return character
    plain = [c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c)]
    return "".join(_SUBSTITUTES.get(c, c) for c in plain)


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=_FONT_SIZE)
