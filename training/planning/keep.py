"""Choose clips by a condition on a table of scores (`--keep`)."""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cli.conditions import Condition, parse_condition
from cli.types import TABLE_SUFFIXES
from common.errors import UserError, one_line
from common.stores import is_url
from data.clips import BadClip, Clip
from data.rows import DataSource, Row
from data.tables import read_table
from flags.scores import SCORES_FILE
from video.probe import VideoInfo


ClipKey = tuple[str, int, int | None]  # resolved path, first frame, and the one after the last (None: to the end)


@dataclass(frozen=True)
class Scores:
    """The rows of a table of scores."""

    table: Path
    rows: Mapping[ClipKey, int]
    columns: Mapping[str, np.ndarray]  # float [N], nan for an empty cell
    digests: Sequence[str]  # SHA-256 of the clips' files when they were scored; "" if the table does not say


def keep_clips(
    clips: Sequence[Clip], infos: Mapping[Path, VideoInfo | str], source: DataSource
) -> tuple[list[Clip], list[BadClip], list[BadClip]]:
    """Return the clips of a source that its condition keeps, those that it drops, and those whose scores are missing.

    Clips that cannot be probed are kept: they are bad for another reason. Without a condition, all are kept. Kept
    clips have the scores that the condition names in their metadata. A condition or table that cannot be used is a
    UserError.

    Args:
        infos: as from `probe_files`.
    """
    if source.keep is None:
        return list(clips), [], []
    try:
        condition = parse_condition(source.keep)
    except ValueError as error:
        raise UserError(f"--keep: {error}") from error
    scores = read_scores(_table_of(source), condition)
    holds = condition.holds(scores.columns)
    kept, dropped, unscored = [], [], []
    for clip in clips:
        info = infos[clip.video]
        if isinstance(info, str):
            kept.append(clip)
            continue
        row = scores.rows.get((os.path.realpath(clip.video), clip.start_frame, clip.end_frame))
        if row is None or scores.digests[row] not in ("", info.sha256):
            problem = "has no scores" if row is None else "has changed since it was scored"
            reason = f"{problem} ({scores.table}); run score_clips.py again"
            unscored.append(BadClip(str(clip.video), clip.source, reason))
            continue
        measured = {name: _shown(column[row]) for name, column in scores.columns.items()}
        if holds[row]:
            # The report has histograms of these as of all columns of numbers.
            kept.append(replace(clip, metadata=measured | dict(clip.metadata)))
        else:
            named = ", ".join(f"{name} is {value}" for name, value in measured.items())
            dropped.append(BadClip(str(clip.video), clip.source, f"dropped by --keep: {named}"))
    return kept, dropped, unscored


def read_scores(table: Path, condition: Condition) -> Scores:
    """Read the columns that a condition names, by the clips' paths, which are relative to the table's folder.

    The UserError names a column that does not exist, with the nearest and all others, a cell that is no number,
    or a second row for a clip.
    """
    if not table.is_file():
        what = "is a folder" if table.is_dir() else "does not exist"
        raise UserError(f"--keep: {table} {what}; write it with score_clips.py, or pass another as --scores")
    if table.suffix.lower() not in TABLE_SUFFIXES:
        raise UserError(f"--scores: {table} is not a table of score_clips.py, which ends in .csv")
    found = read_table(table, DataSource(None))
    if "video" not in found.names:
        raise UserError(f"--scores: {table} has no column 'video' with the paths of the clips")
    known = [name for name in found.names if name not in ("video", "sha256")]
    for name, place in condition.names.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}? It" if close else "it"
            raise UserError(
                f'--keep: "{condition.text}" names {name!r} (character {place + 1}), which {table} does not have; '
                f"{hint} has {', '.join(map(one_line, known))}"
            )
    rows, digests, values = {}, [], {name: [] for name in condition.names}
    for number, row in enumerate(found.rows):
        if row.problem is not None:
            raise UserError(f"--scores: {row.source}: {row.problem}")
        key = _key_of(row, table)
        if key in rows:
            raise UserError(f"--scores: {row.source}: a second row for {key[0]}; remove one of them")
        rows[key] = number
        digests.append(str(row.values.get("sha256") or ""))
        for name, column in values.items():
            column.append(_number(row.values.get(name), f"{row.source}: its {name}"))
    return Scores(table, rows, {name: np.array(column, float) for name, column in values.items()}, digests)


def _table_of(source: DataSource) -> Path:
    if source.scores is not None:
        return source.scores
    if source.folder is None:
        raise UserError("--keep: the place of the scores is unknown; pass the table as --scores")
    return source.folder / SCORES_FILE


def _key_of(row: Row, table: Path) -> ClipKey:
    start, end = (_number(row.values.get(name), f"{row.source}: its {name}") for name in ("start_frame", "end_frame"))
    video = str(row.values.get("video"))
    path = os.path.realpath(video if is_url(video) else table.parent / video)
    return path, 0 if np.isnan(start) else int(start), None if np.isnan(end) else int(end)


def _number(cell: object, where: str) -> float:
    try:
        return float("nan" if cell in (None, "") else cell)
    except (TypeError, ValueError):
        raise UserError(f"--scores: {where} is {one_line(cell, 100)!r}, not a number") from None


def _shown(value: float) -> str:
    return "empty" if np.isnan(value) else f"{value:.4g}"
