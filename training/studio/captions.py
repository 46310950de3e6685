"""The captions of a data set, to read and to change in the file that it uses.

A change keeps every other byte of the file, except in JSON arrays, and the former file.
"""

import csv
import io
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from captions.table import AUTHOR_COLUMN, USER
from common.errors import UserError
from common.files import atomic_write
from common.text_files import read_utf8
from data.clips import BadClip
from data.rows import DataSource
from data.sources import open_list, read_clips
from data.tables import csv_reader, find_delimiter, text_file
from studio.places import inside, own_path


@dataclass(frozen=True)
class Captioned:
    """A clip, and where its caption is."""

    video: Path
    text: str
    file: Path  # with the caption; it need not exist
    row: int | None = None  # number of the caption in `file`: line, or value of a JSON array; None: all of it
    column: str | None = None  # of a table
    beside: Sequence[Path | None] = ()  # its control and its mask, as far as they are read


_saving = threading.Lock()


def read_captions(source: DataSource, media_cache: Path) -> tuple[list[Captioned], list[BadClip]]:
    """Return the clips of a source, which need no captions, and the rows that cannot be used.

    Raises UserError for a table without the column of captions: they may be in another one.
    """
    if source.dataset_file is not None or source.dataset_name is not None:
        open_list(source, None)
    plain = replace(source, id_token=None, caption_per_line=False, shuffle_tags=None)  # as the file has them
    clips, bad = read_clips(plain, media_cache, captions_file=media_cache / "none")
    found = ((clip, _place(plain, clip.source, clip.video)) for clip in clips)
    return [Captioned(one.video, one.caption, *place, (one.control, one.mask)) for one, place in found], bad


def _place(source: DataSource, listed: str, video: Path) -> tuple[Path, int | None, str | None]:
    """Return the file, the row and the column of a caption, by where its clip is listed: "videos.txt:3"."""
    match = re.search(r":(?:row )?(\d+)$", listed) if listed != str(source.data_root) else None
    if source.dataset_file is not None and match:
        return source.dataset_file, int(match[1]), source.caption_column
    if source.dataset_name is not None or source.data_root is None:
        return Path(source.dataset_name or listed), None, source.caption_column
    if match:
        return text_file(source.data_root, source.caption_column, "prompts.txt"), int(match[1]), None
    beside = source.data_root / listed if listed.lower().endswith(".txt") else video.with_suffix(".txt")
    return beside, None, None


def save_caption(clip: Captioned, text: str, root: Path) -> Captioned:
    """Write a caption, and return the clip with it. The former file is kept, with the time in its name.

    Raises UserError if the caption is not what it was when `clip` was read, the file is outside `root` or it is of a
    format that cannot be changed.
    """
    is_line = clip.row is not None and clip.column is None
    text = " ".join(text.split()) if is_line else text.strip()
    file = inside(root, clip.file.absolute())
    with _saving:
        former = file.read_bytes() if file.exists() else None
        before = read_utf8(file) if former is not None and file.suffix.lower() != ".parquet" else ""
        try:
            after, found = _changed(clip, before, text)
        except (LookupError, ValueError, TypeError, csv.Error) as error:
            raise UserError(f"{clip.file} has changed since it was read; read the clips again") from error
        if _plain(found) != _plain(clip.text):
            raise UserError(f"{clip.file} has another caption there since it was read; read the clips again")
        if former is not None:
            name = f"captions/{file.relative_to(root.resolve())}.{datetime.now():%Y%m%d-%H%M%S-%f}"
            with atomic_write(own_path(root, name)) as partial:
                partial.write_bytes(former)
        mark = b"\xef\xbb\xbf" if former and former.startswith(b"\xef\xbb\xbf") else b""
        with atomic_write(file) as partial:
            partial.write_bytes(mark + after.encode())
    return replace(clip, text=text)


def _plain(caption: object) -> str:
    """Return a caption without what readers remove around it."""
    return str("" if caption is None else caption).strip().strip('"').strip()


def _changed(clip: Captioned, before: str, text: str) -> tuple[str, object]:
    """Return the text of a file with the new caption, and the caption that was there."""
    ways = {".csv": _changed_csv, ".tsv": _changed_csv, ".jsonl": _changed_json, ".json": _changed_json}
    if clip.column is not None and clip.file.suffix.lower() not in ways:
        raise UserError(f"{clip.file}: captions can be changed here in .txt, {', '.join(ways)} files only")
    if clip.column is not None:
        return ways[clip.file.suffix.lower()](clip, before, text)
    if clip.row is None:
        return text + ("\n" if before.endswith("\n") else ""), before
    lines = re.split(r"(\r\n|\r|\n)", before)  # lines and their ends in turn
    found, lines[2 * clip.row - 2] = lines[2 * clip.row - 2], text
    return "".join(lines), found


def _changed_csv(clip: Captioned, before: str, text: str) -> tuple[str, str]:
    delimiter = find_delimiter(before, usual="\t" if clip.file.suffix.lower() == ".tsv" else ",")
    reader, first, names = csv_reader(before, delimiter), 1, None
    for cells in reader:
        if first == clip.row and names is not None:
            break
        names = names or [name.strip() for name in cells] if any(map(str.strip, cells)) else names
        first = reader.line_num + 1
    else:
        raise LookupError(clip.row)
    column, lines = names.index(clip.column), list(io.StringIO(before, newline=""))
    found, cells[column] = cells[column], text
    row = io.StringIO(newline="")
    last = lines[reader.line_num - 1]
    csv.writer(row, delimiter=delimiter, lineterminator=last[len(last.rstrip("\r\n")) :]).writerow(cells)
    lines[first - 1 : reader.line_num] = [row.getvalue()]
    return "".join(lines), found


def _changed_json(clip: Captioned, before: str, text: str) -> tuple[str, object]:
    is_array = before.lstrip().startswith("[")
    values = json.loads(before) if is_array else before.split("\n")
    former = values[clip.row - 1]
    row = former if is_array else json.loads(former)
    found = row.get(clip.column)
    row |= {clip.column: text} | ({AUTHOR_COLUMN: USER} if AUTHOR_COLUMN in row else {})
    if is_array:
        return json.dumps(values, ensure_ascii=False, indent=2) + "\n", found
    values[clip.row - 1] = json.dumps(row, ensure_ascii=False) + "\r" * former.endswith("\r")
    return "\n".join(values), found
