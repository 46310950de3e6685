"""The page of scores: for each a histogram, what thresholds keep, and the clips at both ends as pictures."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from data.clips import ClipSample
from footage.score_table import SCORES, Score
from pages.charts import histogram
from pages.page import Section, render_page, write_page
from pages.parts import code, facts, figure, format_number, grid, paragraph, table
from video.io import read_frames


_SHOWN = 6  # clips at each end of a score
_FRAME_SIDE = 160  # pixels of the longer side of each of the three frames of a clip
_SHOWN_GROUPS, _SHOWN_MEMBERS = 12, 3

Row = Mapping[str, Any]  # of the table


def write_score_page(rows: Sequence[Row], samples: Sequence[ClipSample], file: Path, command: str) -> None:
    """Write the page of the rows of a table, and of their clips.

    Args:
        command: with which the other scripts keep clips by their scores.
    """
    orders = {score: rank(rows, score.name) for score in SCORES if score.name in rows[0]}
    groups = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row["group"]].append(index)
    groups.pop(None, None)
    shown = [index for group in list(groups.values())[:_SHOWN_GROUPS] for index in _best_first(group, rows)]
    needed = sorted({*shown, *(index for order in orders.values() for index in (*order[:_SHOWN], *order[-_SHOWN:]))})
    with ThreadPool() as pool:
        strips = dict(zip(needed, pool.map(lambda index: read_strip(samples[index]), needed), strict=True))

    def pictures(indices: Sequence[int], caption: Callable[[Row], str]) -> Markup:
        return grid(
            figure(strips[index], str(rows[index]["video"]), title=caption(rows[index]))
            for index in indices
            if strips[index] is not None
        )

    sections = [_summary(rows, len(groups), command)]
    sections += [_section(score, rows, order, pictures) for score, order in orders.items() if order]
    if groups:
        told = f"{min(len(groups), _SHOWN_GROUPS)} of {len(groups)} groups. duplicate == 0 keeps one clip of each."
        title = "group {group}, duplicate {duplicate}".format_map
        sections.append(Section("Near-duplicates", [paragraph(told), pictures(shown, title)]))
    write_page(file, render_page("Scores of clips", sections))


def _best_first(group: Sequence[int], rows: Sequence[Row]) -> list[int]:
    return sorted(group, key=lambda index: rows[index]["duplicate"])[:_SHOWN_MEMBERS]


def rank(rows: Sequence[Row], name: str) -> list[int]:
    """Return the rows that have a score, by ascending score."""
    having = [index for index, row in enumerate(rows) if row[name] is not None]
    return sorted(having, key=lambda index: rows[index][name])


def decile_rows(values: Sequence[float], name: str) -> list[tuple[str, str, str]]:
    """Return for each decile, once, the condition of that threshold and how many clips it and its opposite keep."""
    numbers = np.asarray(values, float)
    thresholds = dict.fromkeys(float(f"{value:.3g}") for value in np.percentile(numbers, range(10, 100, 10)))
    return [(f"{name} > {one:g}", _kept(numbers > one), _kept(numbers < one)) for one in thresholds]


def _kept(mask: np.ndarray) -> str:
    return f"{format_number(mask.sum())} ({mask.mean():.0%})"


def _summary(rows: Sequence[Row], num_groups: int, command: str) -> Section:
    pairs = [
        ("clips", len(rows)),
        ("minutes", round(sum(row["seconds"] or 0 for row in rows) / 60, 1)),
        ("groups of near-duplicates", num_groups),
        ("clips without duplicates", sum(row["duplicate"] == 0 for row in rows)),
    ]
    told = "Choose thresholds below, and pass them as the condition of --keep:"
    return Section("Choose clips", [facts(pairs), paragraph(told), code(command)])


def _section(score: Score, rows: Sequence[Row], order: Sequence[int], pictures: Callable[..., Markup]) -> Section:
    values = [rows[index][score.name] for index in order]
    header = ("condition", "keeps", "with < instead")
    deciles = table(header, decile_rows(values, score.name), "What a threshold keeps, at each tenth of the clips")
    parts = [grid([histogram(values, score.title, score.unit), deciles])]
    if values[0] != values[-1]:

        def caption(row: Row) -> str:
            return f"{score.name} {format_number(row[score.name])}"

        parts += [paragraph("Lowest"), pictures(order[:_SHOWN], caption)]
        parts += [paragraph("Highest"), pictures(order[: -_SHOWN - 1 : -1], caption)]
    return Section(score.title, parts)


def read_strip(sample: ClipSample) -> np.ndarray | None:
    """Return first, middle and last frame of a clip side by side, uint8 [H, 3 W, 3]; None if it does not decode."""
    first, last = sample.frame_indices[0], sample.clip.start_frame + sample.info.num_frames - 1
    indices = [0] if sample.info.is_image else [first, (first + last) // 2, last]
    try:
        seekable = sample.info.seekable
        frames = read_frames(sample.clip.video, indices, seekable=seekable, longer_side=_FRAME_SIDE)
    except ValueError:
        return None
    return np.concatenate(frames, axis=1)
