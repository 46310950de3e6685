"""The list of clips, read from what the user has: text files, a table, a folder, or a `datasets` data set.

Every form is read into rows under named columns, and every row becomes a `Clip` or a `BadClip`: none is dropped
without a word. Whether a listed file exists, and what is in it, is left to the probe.
"""

import difflib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, listing
from data.arrow import read_dataset
from data.clips import BadClip, Clip
from data.folder import read_folder
from data.media_cache import expand_home, first_frame_file, media_file
from data.paths import stays_inside
from data.rows import Row, Table, UnusableRow, described, one_line
from data.tables import has_text_files, read_json, read_table, read_text_files


_PATH_KEYS = ("data_root", "dataset_file", "dataset_name")  # of an entry of a mix


@dataclass(frozen=True)
class DataSource:
    """One data set as the flags, or an entry of --dataset_mix, name it."""

    data_root: Path | None  # where relative paths start; given alone: the folder of the lists or of the clips
    dataset_file: Path | None = None  # a table: .csv .tsv .jsonl .json .parquet
    dataset_name: str | None = None  # for datasets.load_dataset: a name on the hub, or a local folder
    dataset_config_name: str | None = None
    dataset_split: str = "train"
    dataset_streaming: bool = False  # read row by row, without a copy of the data set on disk
    max_samples: int | None = None  # only the first N rows; unusable ones count
    video_column: str = "video"  # the column of paths or media, or the text file of paths
    caption_column: str = "caption"
    image_column: str | None = None  # None: "image" or "images", or images.txt, where there is one
    id_token: str | None = None  # stands before every caption, with a space
    repeats: float = 1.0  # how often each clip comes in an epoch
    weight: float | None = None  # instead of repeats: share of the samples of an epoch, against the others' weights
    allow_outside_paths: bool = False  # listed paths may lead out of the folders named; of the flags alone


def read_clips(
    source: DataSource, media_cache: Path, *, name_folder: bool = False, captions_file: Path | None = None
) -> tuple[list[Clip], list[BadClip]]:
    """Read the clips that a source lists.

    What a source is, in this order: `dataset_name`; `dataset_file`; in `data_root` videos.txt and prompts.txt (or the
    files that the columns name), with images.txt where some clips have a first frame of their own; else the videos and
    still images in `data_root` and below, each with its caption in a .txt of the same name.

    Args:
        source: relative paths in its list start from `data_root`; without one, from the folder of `dataset_file` or
            from a local `dataset_name`.
        media_cache: folder for media that rows carry themselves (bytes, decoded frames).
        name_folder: say with its folder where each clip is listed: data sets of a mix may have lists of the same name.
        captions_file: a table that captions are going to be written to. Clips may be without one then; it is "".

    Returns:
        Clips in the order of the list, and the rows that cannot be used.

    Raises:
        UserError: the list as a whole cannot be used: missing, malformed, empty, without a column that was named.
    """
    table, columns = _open(source, captions_file)
    within = None if source.allow_outside_paths else _folders_named(source, table, media_cache)
    clips, bad_clips = [], []
    most = source.max_samples and min(source.max_samples, sys.maxsize)  # islice takes no more
    for row in islice(table.rows, most):
        if name_folder and table.folder is not None:
            row = replace(row, source=one_line(table.folder / row.source))
        try:
            clips.append(_clip_of(row, columns, source, source.data_root or table.folder, media_cache, within))
        except UnusableRow as problem:
            bad_clips.append(BadClip(_name_of(row.values.get(columns.video)), one_line(row.source), str(problem)))
    if not clips and not bad_clips:
        raise UserError(f"{table.where} has no rows")
    return clips, bad_clips


def _folders_named(source: DataSource, table: Table, media_cache: Path) -> list[Path]:
    """Where listed files may lie: in the folders that the user named, or that were filled on the way here.

    `make_first_frames.py` lists clips of the cache, and its own images beside its table.
    """
    named = (source.data_root, table.folder, media_cache, *table.filled)
    return [folder for folder in named if folder is not None]


@dataclass(frozen=True)
class _Columns:
    """Where in a row the parts of a clip are."""

    video: str = "video"
    caption: str = "caption"
    image: str | None = "image"
    caption_needed: bool = True


def _open(source: DataSource, captions_file: Path | None) -> tuple[Table, _Columns]:
    if source.data_root is not None and not os.path.isdir(source.data_root):
        raise UserError(f"--data_root {source.data_root} is not a folder")
    if source.dataset_file is not None and source.dataset_name is not None:
        raise UserError("--dataset_file and --dataset_name are both given; leave one of them out")
    if source.dataset_name is not None:
        table = read_dataset(
            source.dataset_name, source.dataset_config_name, source.dataset_split, source.dataset_streaming
        )
    elif source.dataset_file is not None:
        table = read_table(_find_dataset_file(source))
    else:
        return _open_data_root(source, captions_file), _Columns(caption_needed=captions_file is None)
    return table, _find_columns(table, source, caption_needed=captions_file is None)


def _open_data_root(source: DataSource, captions_file: Path | None) -> Table:
    root, columns = source.data_root, (source.video_column, source.caption_column)
    if root is None:
        raise UserError(
            "there are no clips to read: give --data_root, --dataset_file, --dataset_name or --dataset_mix"
        )
    if has_text_files(root, *columns):
        return read_text_files(root, *columns, source.image_column, captions_needed=captions_file is None)
    if source.image_column is not None:
        raise UserError(
            f"--image_column {source.image_column} names a column or a text file, and {root} holds neither; in a "
            "folder of clips, b.png beside b.mp4 is its first frame"
        )
    return read_folder(root, captions_file)


def _find_dataset_file(source: DataSource) -> Path:
    places = [source.dataset_file] + ([source.data_root / source.dataset_file] if source.data_root else [])
    for path in places:
        if os.path.isfile(path):
            return path
    looked_in = f", neither as given nor in {source.data_root}" if source.data_root else ""
    raise UserError(f"--dataset_file {source.dataset_file} does not exist{looked_in}")


def _find_columns(table: Table, source: DataSource, *, caption_needed: bool) -> _Columns:
    wanted = {source.video_column: "--video_column", source.caption_column: "--caption_column"}
    if source.image_column is not None:
        wanted[source.image_column] = "--image_column"
    if not caption_needed and source.caption_column == DataSource.caption_column:  # one that was named must be there
        wanted.pop(source.caption_column)
    for column, flag in wanted.items():
        if column not in table.names:
            there = ", ".join(map(one_line, table.names)) or "none"
            raise UserError(f"{table.where} has no column {column!r}; it has {there}: set {flag}")
        if table.names.count(column) > 1:
            raise UserError(f"{table.where} has several columns {column!r}; rename all but the one to use")
    found = [name for name in ("image", "images") if name in table.names and name not in wanted]
    image_column = source.image_column or next(iter(found), None)
    return _Columns(source.video_column, source.caption_column, image_column, caption_needed)


def _clip_of(
    row: Row,
    columns: _Columns,
    source: DataSource,
    folder: Path | None,
    media_cache: Path,
    within: Sequence[Path] | None,
) -> Clip:
    if row.problem is not None:
        raise UnusableRow(row.problem)
    values = row.values
    caption = values.get(columns.caption)
    if not isinstance(caption, str | None):
        raise UnusableRow(f"its caption is {described(caption)}, not text")
    caption = (caption or "").strip()
    if caption:
        caption = f"{(source.id_token or '').strip()} {caption}".strip()
    elif columns.caption_needed:
        raise UnusableRow("has no caption")
    metadata = _metadata(values, columns)
    try:
        video = media_file(values.get(columns.video), folder, media_cache, values.get("fps"), within=within)
        image = first_frame_file(values.get(columns.image), folder, media_cache, within=within)
        "".join((caption, str(video), str(image), *metadata, *metadata.values())).encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, and file names may be any bytes
        raise UnusableRow("has text that is not valid Unicode, which no list can hold") from error
    return Clip(video, caption, row.source, image, source.repeats, metadata)


def _metadata(values: Mapping[str, Any], columns: _Columns) -> dict[str, str]:
    """The other columns' single values: bytes, lists and objects may be as large as a video."""
    used = {columns.video, columns.caption, columns.image, ""}
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
    """What messages call a clip. A caption where a path belongs must not fill the screen."""
    name = video.get("path") if isinstance(video, dict) else video
    return one_line(name, 200) if isinstance(name, str) and name.strip() else "unnamed clip"


def read_mix(file: Path, defaults: DataSource) -> list[DataSource]:
    """Read the data sets of a --dataset_mix file.

    Args:
        file: JSON, an array of objects whose keys are fields of `DataSource`; a prepared folder has `data_root` alone.
            Relative paths start from the file's own folder, so that it means the same wherever it is used from; ~/ is
            the home folder. A `dataset_file` may also lie in its `data_root`. Paths stay below the file's folder,
            unless `defaults` allow others.
        defaults: what the flags say, for the fields that an entry leaves out. Which data an entry reads, and its
            repeats or weight, never come from there.

    Returns:
        One for each entry, its paths absolute.

    Raises:
        UserError: naming entry and key: unknown, of the wrong type, contradictory, or missing; or all that lead out of
            the file's folder.
    """
    entries = [entry for _, entry in read_json(file)]
    if not entries:
        raise UserError(f"--dataset_mix {file} lists no data sets")
    for number, entry in enumerate(entries, 1):
        _check_entry(f"--dataset_mix {file}, entry {number}", entry)
    if not defaults.allow_outside_paths:
        _check_places(file, entries)
    weighted = ["weight" in entry for entry in entries]
    if any(weighted) and not all(weighted):
        number = weighted.index(False) + 1
        raise UserError(f"--dataset_mix {file}, entry {number} has no weight; either all entries have one, or none")
    no_data = {"data_root": None, "dataset_file": None, "dataset_name": None, "dataset_config_name": None}
    blank = replace(defaults, **no_data, repeats=1.0, weight=None)
    return [replace(blank, **_with_paths(entry, file.parent.absolute())) for entry in entries]


def _check_entry(where: str, entry: object) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {described(entry)}, not an object")
    known = [field.name for field in fields(DataSource) if field.name != "allow_outside_paths"]
    for key, value in entry.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1, 0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"it must be one of {', '.join(known)}"
            raise UserError(f"{where}: unknown key {key!r}; {hint}")
        _check_value(where, key, value)
    for first, second in (("repeats", "weight"), ("dataset_file", "dataset_name")):
        if first in entry and second in entry:
            raise UserError(f"{where} has both {first!r} and {second!r}; leave one of them out")
    if not entry.keys() & {"data_root", "dataset_file", "dataset_name"}:
        raise UserError(f"{where} names no data: give it data_root, dataset_file or dataset_name")


def _check_value(where: str, key: str, value: object) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key == "dataset_streaming":
        fits, expected = isinstance(value, bool), "true or false"
    elif key == "max_samples":
        fits, expected = is_number and isinstance(value, int) and value > 0, "a whole number above 0"
    elif key in ("repeats", "weight"):
        fits, expected = is_number and 1e-6 <= value <= 1e6, "a number from 0.000001 to 1000000"
    else:
        fits, expected = isinstance(value, str) and value.strip(), "text"
    if not fits:
        raise UserError(f"{where}: {key!r} is {json.dumps(value)}; it must be {expected}")


def _check_places(file: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """No entry leads out of the folder that the file is in."""
    folder = file.parent.absolute()
    outside = [
        f"entry {number}: {key!r} is {value}"
        for number, entry in enumerate(entries, 1)
        for key in _PATH_KEYS
        if (value := entry.get(key)) is not None
        # The name of a data set on the hub starts no path.
        and not stays_inside(expand_home(value), folder, [folder])
    ]
    if outside:
        title = (
            f"--dataset_mix {file}: data sets outside of the file's own folder; put it into a folder above them, or "
            "give --allow_outside_paths if you trust it and what they list:"
        )
        raise UserError(listing(title, outside, most=len(outside)))


def _with_paths(entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    values = {key: expand_home(value) if key in _PATH_KEYS else value for key, value in entry.items()}
    if "data_root" in values:
        values["data_root"] = folder / values["data_root"]
    if "dataset_file" in values:
        beside, below = (place / values["dataset_file"] for place in (folder, values.get("data_root", folder)))
        values["dataset_file"] = beside if os.path.isfile(beside) else below
    if "dataset_name" in values and os.path.isdir(folder / values["dataset_name"]):
        values["dataset_name"] = str(folder / values["dataset_name"])
    return values


def weights_to_repeats(sources: Sequence[DataSource], num_samples: Sequence[int]) -> list[float | None]:
    """How often the samples of each data set come in an epoch by their weights; None for one without a weight.

    A weight w is the share of the samples of an epoch, against the sum of all. With n samples each repeats w / n
    times, scaled so that the least repeated data set comes exactly once an epoch.

    Args:
        sources: all with a weight, or none, as `read_mix` gives them.
        num_samples: of each that can be used.
    """
    densities = [
        source.weight / count if source.weight is not None and count else None
        for source, count in zip(sources, num_samples, strict=True)
    ]
    least = min((density for density in densities if density is not None), default=None)
    return [None if density is None else density / least for density in densities]
