"""Read lists of clips in files: a pair of text files, CSV, TSV, JSON and Parquet. Rows and lines count from 1."""

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from cli.types import TABLE_SUFFIXES
from common.errors import UserError, described
from common.remote import is_file
from common.text_files import read_json, read_lines, read_utf8
from data.rows import DataSource, Row, Table
from video.media import media_suffixes


_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}


def read_text_files(source: DataSource, *, captions_needed: bool) -> Table | None:
    """Read videos.txt, prompts.txt, images.txt if it exists, and controls.txt and masks.txt if they are wanted.

    Line n of one belongs to line n of the others.

    Raises UserError if a file is missing, not UTF-8, or of another length.

    Args:
        source: its columns may name other files in its `data_root`. Columns of videos and captions that are neither
            a .txt nor a file are a table's and are ignored.
        captions_needed: require prompts.txt, with a line for each video.

    Returns:
        Columns video, caption, image, control and mask; None if no column names a file, and neither videos.txt nor
        prompts.txt exists. An empty line in images.txt is for a video without an image.
    """
    videos_file = text_file(source.data_root, source.video_column, "videos.txt")
    prompts_file = text_file(source.data_root, source.caption_column, "prompts.txt")
    images_file = _optional_file(source.data_root, source.image_column, "image")
    controls_file = _optional_file(source.data_root, source.control_column, "control")
    masks_file = _optional_file(source.data_root, source.mask_column, "mask")
    is_named = source.video_column.endswith(".txt") or source.caption_column.endswith(".txt")
    if not is_named and not any(map(is_file, (videos_file, prompts_file))):
        return None
    for file, flag, is_needed in (
        (videos_file, "--video_column", True),
        (prompts_file, "--caption_column", captions_needed or source.caption_column.endswith(".txt")),
        (images_file, "--image_column", source.image_column is not None),
        (controls_file, "--control_column", source.control_column is not None),
        (masks_file, "--mask_column", source.mask_column not in (None, "mask")),
    ):
        if is_needed and not is_file(file):
            scripts = {prompts_file: "caption_dataset.py writes captions"}
            scripts[controls_file] = "--compute_control computes controls"
            where = "below --data_root (or pass a --dataset_file)"
            more = f"; {scripts[file]}" if file in scripts else ""
            raise UserError(f"{file} does not exist; {flag} names the file, {where}{more}")
    videos = read_lines(videos_file)
    # Blank lines at the end may be for videos without an image or a mask, or without a caption if none is needed.
    prompts, *others = (
        read_lines(file, at_least=0 if complete else len(videos)) if is_read else [""] * len(videos)
        for file, complete, is_read in (
            (prompts_file, captions_needed, is_file(prompts_file)),
            (images_file, False, is_file(images_file)),
            (controls_file, False, source.control_column is not None),
            (masks_file, False, source.mask_column is not None and is_file(masks_file)),
        )
    )
    for file, lines in zip((prompts_file, images_file, controls_file, masks_file), (prompts, *others), strict=True):
        if len(lines) != len(videos):
            raise UserError(
                f"{videos_file} has {len(videos)} lines and {file} has {len(lines)}; line n of one belongs to line n "
                "of the other, so no caption may have line breaks"
            )
    names = ("video", "caption", "image", "control", "mask")
    rows = (
        Row(f"{videos_file.name}:{number}", dict(zip(names, lines, strict=True)))
        for number, lines in enumerate(zip(videos, prompts, *others, strict=True), 1)
    )
    return Table(str(videos_file), names, rows, source.data_root)


def text_file(data_root: Path, column: str, default: str) -> Path:
    """Return the file that a column flag names, or the default one if the flag holds a table's column name."""
    named = data_root / column
    return named if column.endswith(".txt") or is_file(named) else data_root / default


def _optional_file(data_root: Path, column: str | None, kind: str) -> Path:
    """Return the file of images, controls or masks. A name of the user's is a file, even if that does not exist."""
    usual = f"{kind}s.txt"
    return text_file(data_root, column or usual, usual if column in (None, kind, f"{kind}s") else column)


def read_table(file: Path, source: DataSource) -> Table:
    """Read a table in the format of its suffix; raises UserError if that is unknown or the table is malformed.

    In CSV and TSV, rows beside the rest of a caption with line breaks are unusable: `source` names the columns.
    """
    suffix = file.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _read_csv(file, source)
    if suffix in (".jsonl", ".json"):
        entries = read_json(file)
        names = list(dict.fromkeys(name for _, entry in entries if isinstance(entry, dict) for name in entry))
        rows = (
            Row(place, value) if isinstance(value, dict) else Row(place, {}, f"is {described(value)}, not an object")
            for place, value in entries
        )
        return Table(str(file), names, rows, file.parent)
    if suffix == ".parquet":
        from data.arrow import read_parquet

        return read_parquet(file)
    raise UserError(f"--dataset_file {file} is of an unknown kind; it must be one of {', '.join(TABLE_SUFFIXES)}")


def _read_csv(file: Path, source: DataSource) -> Table:
    text = read_utf8(file)
    delimiter = find_delimiter(text, usual="\t" if file.suffix.lower() == ".tsv" else ",")
    records = _csv_records(file, text, delimiter)
    _, header = next(records, (0, []))
    names = [name.strip() for name in header]

    def row(line: int, cells: list[str]) -> Row:
        problem = None
        if len(cells) != len(names):
            fields = "1 field" if len(cells) == 1 else f"{len(cells)} fields"
            separators = _SEPARATORS[delimiter] if len(cells) > len(names) else "line breaks"
            problem = f"{fields} where the header has {len(names)}; quote captions that contain {separators}"
        return Row(f"{file.name}:{line}", dict(zip(names, map(_unquoted, cells), strict=False)), problem)

    rows = (row(*record) for record in records)
    if {source.video_column, source.caption_column} <= set(names):
        rows = _without_cut_captions(rows, names, source, source.data_root or file.parent)
    return Table(str(file), names, rows, file.parent)


def find_delimiter(text: str, usual: str) -> str:
    """Return the separator that divides the header into the most fields, the usual one of equally good ones."""

    def num_fields(delimiter: str) -> int:
        try:
            return len(next(filter(any, csv_reader(text, delimiter)), ()))
        except csv.Error:  # a quoted field is followed by another character
            return 0

    return max((usual, *_SEPARATORS), key=num_fields)


def csv_reader(text: str, delimiter: str) -> Any:
    # strict: otherwise a quote that is never closed silently swallows the rest of the file
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)


def _without_cut_captions(rows: Iterator[Row], names: list[str], source: DataSource, folder: Path) -> Iterator[Row]:
    """Mark rows whose caption lost its end or start, because a line break without quotes began another row.

    That other row has no file in the column of videos. It follows, or precedes if captions come before videos.
    """

    def is_rest(row: Row) -> bool:
        video = row.values.get(source.video_column) or ""
        suffix = os.path.splitext(video)[1].lower()
        return not (suffix in media_suffixes() or "://" in video or (video and os.path.exists(folder / video)))

    is_before = names.index(source.caption_column) < names.index(source.video_column)
    before = None
    for row, after in pairwise(chain(rows, [None])):
        neighbor = before if is_before else after
        before = row
        if row.problem is None and neighbor is not None and is_rest(neighbor):
            place = f"its caption may be cut: {neighbor.source} names no clip"
            row = replace(row, problem=f"{place}; quote captions that contain line breaks")
        yield row


def _csv_records(file: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number where the record starts, its fields), without blank lines."""
    reader, line = csv_reader(text, delimiter), 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}:{line} is not valid {file.suffix[1:].upper()}: {error}") from error


def _unquoted(cell: str) -> str:
    """Remove the quotes that stay when a field is quoted three times, as in the documentation's example."""
    cell = cell.strip()
    inner = cell[1:-1]
    if len(cell) >= 2 and cell[0] == cell[-1] == '"' and '"' not in inner:
        return inner.strip()
    return cell
