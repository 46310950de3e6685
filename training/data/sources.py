"""Read a list of clips: text files, a table, a folder, or a `datasets` data set.

Every list is read into rows with named columns, and every row becomes a `Clip` or a `BadClip`: none is skipped
silently. The probe checks whether the listed files exist and what is in them.
"""

import os
import random
import re
import sys
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, described, one_line
from common.remote import RemotePath, is_file
from data.clips import BadClip, Clip
from data.folder import COMPANIONS, read_folder
from data.media_cache import first_frame_file, media_file
from data.rows import DataSource, Row, Table, UnusableRow
from data.tables import read_table, read_text_files


# Unicode categories of control and format characters, spaces, and marks that need a letter before them.
_INVISIBLE = {"Cc", "Cf", "Zl", "Zp", "Zs", "Mn"}

# What a folder of clips has instead of columns.
_BESIDE_CLIPS = {
    "image": "b.png beside b.mp4 is its first frame",
    "control": "b.control.mp4 beside b.mp4 is its control",
    "mask": "b.mask.mp4 or b.mask.png beside b.mp4 is its mask",
}


def read_clips(
    source: DataSource, media_cache: Path, *, name_folder: bool = False, captions_file: Path | None = None
) -> tuple[list[Clip], list[BadClip]]:
    """Read the clips that a source lists, in its order, and the rows that cannot be used.

    The list is, in this order: `dataset_name`; `dataset_file`; videos.txt and prompts.txt in `data_root` (or the files
    that the columns name), with images.txt for first frames; else the videos and still images in `data_root` and its
    subfolders, each with its caption in a .txt file of the same name.

    Args:
        source: relative paths in its list start from `data_root`; without one, from the folder of `dataset_file` or
            from a local `dataset_name`.
        media_cache: folder for media that rows contain (bytes, decoded frames).
        name_folder: include the folder in each clip's `source`, as lists of a mix may have the same name.
        captions_file: a table that captions will be written to; clips may then have none, which is "".

    Raises UserError if the list is missing, malformed, empty, or lacks a column that was named.
    """
    table, source = open_list(source, captions_file)
    folder = source.data_root or table.folder
    # Listed files may be in the folders that the user named, and in those of downloads. The table of
    # `make_first_frames.py` lists clips of the cache, and images beside itself.
    named = (source.data_root, table.folder, media_cache, *table.filled)
    within = None if source.allow_outside_paths else [place for place in named if place is not None]
    clips, bad_clips = [], []
    most = source.max_samples and min(source.max_samples, sys.maxsize)  # islice takes no more
    for row in islice(table.rows, most):
        if name_folder and table.folder is not None:
            row = replace(row, source=one_line(table.folder / row.source))
        try:
            clips.append(_clip_of(row, source, folder, media_cache, within, caption_needed=captions_file is None))
        except UnusableRow as problem:
            name = _name_of(row.values.get(source.video_column))
            bad_clips.append(BadClip(name, one_line(row.source), str(problem)))
    if not clips and not bad_clips:
        raise UserError(f"{table.where} has no rows")
    return clips, bad_clips


def open_list(source: DataSource, captions_file: Path | None) -> tuple[Table, DataSource]:
    """Return a source's list, and the source with the columns that the list has; see `read_clips`."""
    root = source.data_root
    if root is not None and not isinstance(root, RemotePath) and not os.path.isdir(root):
        raise UserError(f"--data_root {root} is not a folder")
    if source.dataset_file is not None and source.dataset_name is not None:
        raise UserError("--dataset_file and --dataset_name are both set; omit one of them")
    if source.dataset_name is not None:
        from data.arrow import read_dataset

        table = read_dataset(
            source.dataset_name, source.dataset_config_name, source.dataset_split, source.dataset_streaming
        )
        return table, _with_columns(source, table, captions_file is None)
    if source.dataset_file is not None:
        table = read_table(_find_dataset_file(source), source)
        return table, _with_columns(source, table, captions_file is None)
    if root is None:
        raise UserError("there are no clips to read: set --data_root, --dataset_file, --dataset_name or --dataset_mix")
    table = read_text_files(source, captions_needed=captions_file is None)
    for kind, beside in _BESIDE_CLIPS.items() if table is None else ():
        column = getattr(source, f"{kind}_column")
        if column not in (None, kind):
            raise UserError(
                f"--{kind}_column {column} names a column or a text file, but {root} has neither; in a folder of "
                f"clips, {beside}"
            )
    columns = {"video_column": "video", "caption_column": "caption", "image_column": "image"}
    columns |= {f"{kind}_column": kind for kind in COMPANIONS if getattr(source, f"{kind}_column")}
    return table or read_folder(root, captions_file), replace(source, **columns)


def _find_dataset_file(source: DataSource) -> Path:
    if isinstance(source.dataset_file, RemotePath):
        return source.dataset_file
    for folder in (Path(), source.data_root or Path()):
        if is_file(folder / source.dataset_file):
            return folder / source.dataset_file
    searched = f", neither here nor in {source.data_root}" if source.data_root else ""
    raise UserError(f"--dataset_file {source.dataset_file} does not exist{searched}")


def _with_columns(source: DataSource, table: Table, caption_needed: bool) -> DataSource:
    """Return the source with the image column that its table has, and check that the others exist.

    A table without the usual column of masks has none, as others of a mix may have them.
    """
    wanted = {source.video_column: "--video_column", source.caption_column: "--caption_column"}
    if source.image_column is not None:
        wanted[source.image_column] = "--image_column"
    if source.control_column is not None:
        wanted[source.control_column] = "--control_column, or compute controls with --compute_control"
    if source.mask_column is not None and (source.mask_column != "mask" or "mask" in table.names):
        wanted[source.mask_column] = "--mask_column"
    if not caption_needed and source.caption_column == DataSource.caption_column:  # a column that was named must exist
        wanted.pop(source.caption_column)
    for column, flag in wanted.items():
        if column not in table.names:
            there = ", ".join(map(one_line, table.names)) or "none"
            raise UserError(f"{table.where} has no column {column!r}; it has {there}: set {flag}")
        if table.names.count(column) > 1:
            raise UserError(f"{table.where} has several columns {column!r}; rename all but the one to use")
    found = [name for name in ("image", "images") if name in table.names and name not in wanted]
    return replace(source, image_column=source.image_column or next(iter(found), None))


def _clip_of(
    row: Row,
    source: DataSource,
    folder: Path | None,
    media_cache: Path,
    within: Sequence[Path] | None,
    *,
    caption_needed: bool,
) -> Clip:
    if row.problem is not None:
        raise UnusableRow(row.problem)
    values = row.values
    captions = _captions(values.get(source.caption_column), source)
    if caption_needed and not captions:
        raise UnusableRow("has no caption")
    if not caption_needed and len(captions) > 1:
        raise UnusableRow("has several captions, and the table to write takes one for each clip")
    columns = (source.video_column, source.caption_column, source.image_column)
    metadata = _metadata(values, {*columns, source.control_column, source.mask_column, ""})
    try:
        video = media_file(values.get(source.video_column), folder, media_cache, values.get("fps"), within=within)
        image = first_frame_file(values.get(source.image_column), folder, media_cache, within=within)
        control, mask = (_companion(kind, values, source, folder, media_cache, within) for kind in COMPANIONS)
        "".join((*captions, str(video), str(image), str(control), str(mask), *metadata, *metadata.values())).encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, and file names may be any bytes
        raise UnusableRow("has text that is not valid Unicode, which no list can hold") from error
    part = (_frame_number(values, "start_frame") or 0, _frame_number(values, "end_frame"))
    several = tuple(captions) if len(captions) > 1 else ()
    facts = (control, source.regularization, several, source.caption_dropout, mask)
    return Clip(video, captions[0] if captions else "", row.source, image, source.repeats, metadata, *part, *facts)


def _captions(value: object, source: DataSource) -> list[str]:
    """Return the distinct captions in a cell, with the id token; none if there is no visible text."""
    texts = value if isinstance(value, list) else [value]
    if unfit := [text for text in texts if not isinstance(text, str | None)]:
        raise UnusableRow(f"its caption is {described(unfit[0])}, not text")
    texts = [text.strip() for text in texts if text]
    if source.caption_per_line:
        texts = [line.strip() for text in texts for line in text.splitlines()]
    visible = [text for text in texts if any(unicodedata.category(character) not in _INVISIBLE for character in text)]
    token = (source.id_token or "").strip()
    return list(dict.fromkeys(order for text in visible for order in _orders(text, token, source.shuffle_tags or 1)))


def _orders(caption: str, token: str, count: int) -> list[str]:
    """Return a caption, and other random orders of its comma-separated tags, always the same.

    Each begins with the token, which is not added to a caption that does already.
    """
    has_token = bool(token) and re.match(rf"{re.escape(token)}(?!\w)", caption) is not None
    rest = caption[len(token) :].lstrip(" ,.:;-") if has_token else caption
    tags = [tag.strip() for tag in rest.split(",") if tag.strip()]
    chance = random.Random(caption.encode(errors="surrogatepass"))  # text that is not valid Unicode is refused later
    # random.shuffle may change between versions of Python; random() may not.
    others = [", ".join(sorted(tags, key=lambda _: chance.random())) for _ in range(count - 1)]
    first = caption if has_token else f"{token} {caption}"
    return [first.strip(), *(f"{token} {order}".strip() for order in others)]


def _companion(
    kind: str,
    values: Mapping[str, Any],
    source: DataSource,
    folder: Path | None,
    media_cache: Path,
    within: Sequence[Path] | None,
) -> Path | None:
    """Find the control or the mask like the clip; None if none are read. A clip may have no mask."""
    column = getattr(source, f"{kind}_column")
    value = values.get(column) if column is not None else None
    if value is None or (isinstance(value, str) and not value.strip()):
        if kind == "control" and column is not None:
            raise UnusableRow("has no control clip")
        return None
    try:
        return media_file(value, folder, media_cache, values.get("fps"), within=within)
    except UnusableRow as problem:
        raise UnusableRow(f"its {kind} {problem}") from problem


def _frame_number(values: Mapping[str, Any], name: str) -> int | None:
    """Return the number in a column of frames, which any format of tables may hold; None if it is empty."""
    value = values.get(name)
    text = "" if value is None else str(value).strip()
    if text.lower() in ("", "nan"):  # a gap in a column of numbers
        return None
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if number < 0 or not number.is_integer():
        raise UnusableRow(f"has {one_line(text, 50)!r} as its {name}, which is not a frame number")
    return int(number)


def _metadata(values: Mapping[str, Any], used: Collection[str | None]) -> dict[str, str]:
    """Return the other columns' single values, as bytes, lists and objects may be as large as a video."""
    return {
        name: str(value)
        for name, value in values.items()
        if name not in used
        and not name.startswith("__")  # bookkeeping: pandas' __index_level_0__, WebDataset's __key__ and __url__
        and not isinstance(value, bytes | list | dict | np.ndarray)
        and value is not None
        and value != ""
    }


def _name_of(video: object) -> str:
    """Return the name of a clip for messages. A caption in the column of paths must not fill the screen."""
    name = video.get("path") if isinstance(video, dict) else video
    return one_line(name, 200) if isinstance(name, str) and name.strip() else "unnamed clip"
