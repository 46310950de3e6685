"""The table of scores: a CSV file with a row for each clip, which `--keep` reads."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import atomic_write
from common.text_files import read_utf8
from data.clips import ClipSample
from data.paths import listed_path
from footage.duplicates import group_duplicates


@dataclass(frozen=True)
class Score:
    """A score that a threshold can be chosen for."""

    name: str  # the column
    title: str
    unit: str


SCORES = (
    Score("motion", "Motion", "% of the diagonal per second"),
    Score("still", "Still", "share of frames equal to the one 1/8 s before"),
    Score("sharpness", "Sharpness", "variance of the Laplacian at 512 pixels"),
    Score("exposure", "Exposure", "mean luma, 0 to 255"),
    Score("clipping", "Clipping", "share of pixels that are black or white"),
    Score("black", "Black", "share of black frames"),
    Score("text", "Text", "share of the picture"),
    Score("aesthetic", "Aesthetic", "of your model"),
)
_PLACE = ("video", "start_frame", "end_frame")
_FACTS = ("group", "duplicate", "frames", "seconds", "fps", "height", "width", "sha256")
COLUMNS = (*_PLACE, *(score.name for score in SCORES), *_FACTS)


def score_rows(
    samples: Sequence[ClipSample],
    scores: Sequence[Mapping[str, Any]],
    folder: Path,
    duplicate_bits: int,
    digests: Mapping[Path, str],
) -> list[dict[str, Any]]:
    """Return the rows of the table, whose paths start from its folder.

    `group` numbers groups of near-duplicates from 1. In each, `duplicate` is 0 for the clip to keep, which has the
    largest picture and, of equal ones, is the sharpest; and 1 for the others.

    Args:
        digests: SHA-256 of each file.
    """
    rows = []
    for sample, measured in zip(samples, scores, strict=True):
        clip, info = sample.clip, sample.info
        place = (listed_path(clip.video, folder), clip.start_frame, clip.end_frame)
        facts = (info.num_frames, info.num_frames / info.fps if info.fps else None, info.fps, info.height, info.width)
        rows.append(
            dict(zip(_PLACE, place, strict=True))
            | {score.name: measured[score.name] for score in SCORES if score.name in measured}
            | {"group": None, "duplicate": 0}
            | dict(zip(_FACTS[2:], (*facts, digests[clip.video]), strict=True))
        )
    hashes = np.array([measured["hashes"] for measured in scores], np.uint64)
    members = defaultdict(list)
    for group, row in zip(group_duplicates(hashes, duplicate_bits).tolist(), rows, strict=True):
        members[group].append(row)
    for number, group in enumerate((group for group in members.values() if len(group) > 1), 1):
        best = max(group, key=lambda row: (row["height"] * row["width"], row["sharpness"]))
        for row in group:
            row |= {"group": number, "duplicate": int(row is not best)}
    return rows


def check_table(file: Path) -> None:
    """Refuse to overwrite a table with other columns than those of `score_clips.py`, or a page without a table."""
    page = file.with_suffix(".html")
    if not file.exists() and page.exists():
        raise UserError(f"--output_file: {page} exists, but {file} does not; move the page, or pass another file")
    if not file.exists():
        return
    names = next(csv.reader(read_utf8(file).splitlines()), [])
    foreign = [name for name in names if name not in COLUMNS]
    if foreign or "sha256" not in names:
        columns = f"the columns {', '.join(foreign)}" if foreign else "no column sha256"
        raise UserError(f"--output_file: {file} has {columns}, so score_clips.py did not write it; pass another file")


def write_table(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write the rows atomically, numbers with four digits."""
    names = list(rows[0])
    if not any(row["start_frame"] or row["end_frame"] is not None for row in rows):
        names = [name for name in names if name not in ("start_frame", "end_frame")]
    with (
        atomic_write(file) as partial,
        open(partial, "w", newline="", encoding="utf-8", errors="backslashreplace") as text,
    ):
        table = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
