"""The list of clips: read from what the user has, checked, and planned into buckets before anything is decoded."""

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from buckets import Bucket, assign_bucket
from errors import UserError, listing
from video import VideoInfo, choose_frames, usable_frames


@dataclass(frozen=True)
class Clip:
    """One video and its caption."""

    video: Path
    caption: str  # with the id token in front
    source: str  # where it is listed, for messages: "videos.txt:3"


@dataclass(frozen=True)
class PlannedClip:
    """A clip, and which of its frames go into which bucket."""

    clip: Clip
    info: VideoInfo
    bucket: Bucket
    frame_indices: tuple[int, ...]


def load_clips(
    data_root: Path, *, dataset_file: Path | None, video_column: str, caption_column: str, id_token: str | None
) -> list[Clip]:
    """Read the list of clips and check that every video is there.

    Args:
        data_root: folder that relative video paths start from.
        dataset_file: a CSV with a header, looked for in the working directory, then in data_root. None for a pair of
            text files in data_root with one video path and one prompt a line.
        video_column: the CSV's column of paths, or the name of the text file of paths.
        caption_column: the CSV's column of prompts, or the name of the text file of prompts.
        id_token: put in front of every caption, with a space.

    Raises:
        UserError: files, columns, prompts or videos are missing, or a file is not UTF-8.
    """
    if not data_root.is_dir():
        raise UserError(f"--data_root {data_root} is not a folder")
    if dataset_file is None:
        rows = _read_text_pair(data_root, video_column, caption_column)
    else:
        rows = _read_csv(_find_dataset_file(data_root, dataset_file), video_column, caption_column)
    prefix = f"{id_token.strip()} " if id_token and id_token.strip() else ""
    clips = [Clip(data_root / video, prefix + caption, source) for video, caption, source in rows]
    # os.path.isfile, because Path.is_file raises on a caption put by mistake where a path belongs (name too long)
    missing = [f"{clip.video} ({clip.source})" for clip in clips if not os.path.isfile(clip.video)]
    if missing:
        raise UserError(
            listing(
                f"{len(missing)} of {len(clips)} listed videos do not exist (relative paths start from --data_root):",
                missing,
            )
        )
    return clips


Row = tuple[str, str, str]  # video, caption, source


def _read_text_pair(data_root: Path, video_column: str, caption_column: str) -> list[Row]:
    videos_file = _named_or_default(data_root, video_column, "videos.txt", "--video_column")
    prompts_file = _named_or_default(data_root, caption_column, "prompts.txt", "--caption_column")
    videos, prompts = _lines(videos_file), _lines(prompts_file)
    if len(videos) != len(prompts):
        raise UserError(
            f"{videos_file} has {len(videos)} lines and {prompts_file} has {len(prompts)}; line n of one belongs to "
            "line n of the other"
        )
    if not videos:
        raise UserError(f"{videos_file} is empty")
    for file, lines, what in ((videos_file, videos, "video path"), (prompts_file, prompts, "prompt")):
        empty = [f"{file.name}:{number}" for number, line in enumerate(lines, 1) if not line]
        if empty:
            raise UserError(listing(f"{file} has {len(empty)} empty lines where a {what} belongs:", empty))
    return [
        (video, prompt, f"{videos_file.name}:{number}")
        for number, (video, prompt) in enumerate(zip(videos, prompts, strict=True), 1)
    ]


def _named_or_default(data_root: Path, name: str, default: str, flag: str) -> Path:
    """The text file that a column flag names; the default one while the flag still holds a CSV's column name."""
    named = data_root / name
    if os.path.isfile(named):
        return named
    path = named if name.endswith(".txt") else data_root / default
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist; {flag} names the file, below --data_root (or give a --dataset_file)")
    return path


def _find_dataset_file(data_root: Path, dataset_file: Path) -> Path:
    for path in (dataset_file, data_root / dataset_file):
        if os.path.isfile(path):
            return path
    raise UserError(f"--dataset_file {dataset_file} does not exist, neither as given nor in {data_root}")


def _read_csv(file: Path, video_column: str, caption_column: str) -> list[Row]:
    records = _csv_records(file)
    _, header = next(records, (0, []))
    header = [name.strip() for name in header]
    for column, flag in ((video_column, "--video_column"), (caption_column, "--caption_column")):
        if column not in header:
            raise UserError(f"{file} has no column {column!r}; it has {', '.join(header) or 'none'}: set {flag}")
    video_at, caption_at = header.index(video_column), header.index(caption_column)
    rows, uneven, empty = [], [], []
    for line, fields in records:
        source = f"{file.name}:{line}"
        if len(fields) != len(header):
            uneven.append(f"{source}: {len(fields)} fields")
            continue
        video, caption = _unquoted(fields[video_at]), _unquoted(fields[caption_at])
        if not video or not caption:
            empty.append(f"{source}: {'no prompt' if video else 'no video path'}")
        rows.append((video, caption, source))
    if uneven:
        title = (
            f"{len(uneven)} rows of {file} do not have the header's {len(header)} fields (quote captions with commas):"
        )
        raise UserError(listing(title, uneven))
    if empty:
        raise UserError(listing(f"{len(empty)} rows of {file} lack a value:", empty))
    if not rows:
        raise UserError(f"{file} has a header but no rows")
    return rows


def _csv_records(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number where the record starts, its fields), without blank lines."""
    # strict: otherwise a quote that is never closed swallows the rest of the file without a word
    reader = csv.reader(io.StringIO(_read_utf8(file), newline=""), skipinitialspace=True, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{file}:{line} is not valid CSV: {error}") from error
        if fields is None:
            return
        if any(field.strip() for field in fields):
            yield line, fields


def _unquoted(field: str) -> str:
    """Without the quotes that stay when a field is quoted three times, as the documentation's example is."""
    field = field.strip()
    inner = field[1:-1]
    if len(field) >= 2 and field[0] == field[-1] == '"' and '"' not in inner:
        return inner.strip()
    return field


def _lines(file: Path) -> list[str]:
    """Stripped lines, without blank ones at the end. Only line ends split: U+2028 and the like stay in the caption."""
    lines = [line.strip() for line in _read_utf8(file).replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _read_utf8(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: byte {error.start} does not fit; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error


def plan_clips(
    clips: Sequence[Clip],
    infos: Mapping[Path, VideoInfo],
    buckets: Sequence[Bucket],
    *,
    skip_start: int = 0,
    skip_end: int = 0,
    fps: float | None = None,
) -> list[PlannedClip]:
    """Give every clip its bucket and its frames.

    Args:
        clips: what to plan, in order.
        infos: path -> what the probe found, as from `probe_videos`.
        buckets: as from `make_buckets`.
        skip_start, skip_end: frames left out at either end of each clip.
        fps: sample at this rate; None spreads the bucket's frames evenly over the clip.

    Raises:
        UserError: one for all clips that are too short for the smallest bucket, or whose rate is unknown though fps is
            given.
    """
    planned, problems = [], []
    for clip in clips:
        info = infos[clip.video]
        if fps is not None and info.fps <= 0:
            problems.append(f"{clip.video} ({clip.source}): its frame rate is unknown, so --fps cannot be used")
            continue
        usable = usable_frames(info, skip_start=skip_start, skip_end=skip_end, fps=fps)
        bucket = assign_bucket(usable, info.height, info.width, buckets)
        if bucket is None:
            problems.append(f"{clip.video} ({clip.source}): {_usable_of(usable, info, fps)}")
            continue
        indices = choose_frames(
            info.num_frames,
            bucket.num_frames,
            skip_start=skip_start,
            skip_end=skip_end,
            clip_fps=info.fps,
            fps=fps,
        )
        planned.append(PlannedClip(clip, info, bucket, tuple(indices)))
    if problems:
        smallest = min(bucket.num_frames for bucket in buckets)
        title = (
            f"{len(problems)} of {len(clips)} clips cannot fill the smallest frame bucket of {smallest} frames; add a "
            "smaller one with --frame_buckets, or remove them:"
        )
        raise UserError("\n".join([title, *(f"  {problem}" for problem in problems)]))
    return planned


def _usable_of(usable: int, info: VideoInfo, fps: float | None) -> str:
    at_rate = "" if fps is None else f" at {fps:g} fps"
    skipped = "" if fps is None and usable == info.num_frames else f" (of {info.num_frames} at {info.fps:g} fps)"
    return f"{usable} usable frames{at_rate}{skipped}"


def describe_plan(planned: Sequence[PlannedClip]) -> str:
    """A table with one line a bucket.

    "upscaled" counts clips smaller than their bucket. "off aspect" is the median share of the picture that center and
    random crop away, and that none squeezes. "clip frames" is the median length of the clips themselves.
    """
    table = [("bucket", "clips", "upscaled", "off aspect", "clip frames")]
    for bucket in sorted({plan.bucket for plan in planned}):
        infos = [plan.info for plan in planned if plan.bucket == bucket]
        upscaled = sum(info.height < bucket.height or info.width < bucket.width for info in infos)
        off_aspect = median(_off_aspect(info, bucket) for info in infos)
        frames = median(info.num_frames for info in infos)
        table.append((str(bucket), str(len(infos)), str(upscaled), f"{off_aspect:.0%}", f"{frames:g}"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in table
    )


def _off_aspect(info: VideoInfo, bucket: Bucket) -> float:
    ratio = (info.width * bucket.height) / (info.height * bucket.width)
    return 1 - min(ratio, 1 / ratio)
