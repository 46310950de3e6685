"""The videos of runs as rows of a page, of which no more are part of the page than it may weigh."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from common.files import slug
from pages.parts import Cell, reel
from results.run_record import RunRecord
from video.preview import preview


MOST_BYTES = 12_000_000  # of the videos in a page, which becomes a third larger: 16 MB
_MOST_CAPTION = 300  # characters


@dataclass(frozen=True)
class ShownVideo:
    """A video in a row."""

    name: str  # "step 100"
    file: Path | None
    note: str = ""
    missing: str = ""  # why there is no file


def video_rows(rows: Mapping[str, Sequence[ShownVideo]], page_folder: Path) -> list[Markup]:
    """Return a row for each title; its last video comes first into the page, then its first ones, then later ones."""
    orders = map(_by_importance, rows.values())
    embedded = embed(one.file for one in chain(*zip_longest(*orders)) if one and one.file)

    def cell(one: ShownVideo) -> Cell:
        return Cell(one.name, embedded.get(one.file), link_to(one.file, page_folder), one.note, one.missing)

    return [reel(title, list(map(cell, row))) for title, row in rows.items()]


def _by_importance(row: Sequence[ShownVideo]) -> list[ShownVideo]:
    return [row[-1], *row[:3], *row[-2:2:-1]]


def embed(files: Iterable[Path]) -> dict[Path, bytes]:
    """Return previews of files, in their order as long as there is room in the page."""
    taken: dict[Path, bytes] = {}
    left = MOST_BYTES
    for file in files:
        with suppress(ValueError, OSError):  # a file that is damaged or was removed
            shown = preview(file)
            if len(shown) <= left and file not in taken:
                taken[file] = shown
                left -= len(shown)
    return taken


def link_to(file: Path | None, page_folder: Path) -> str:
    """Return the link to a file from a page in a folder."""
    return "" if file is None else quote(os.fsencode(Path(os.path.relpath(file, page_folder)).as_posix()))


def describe_video(record: RunRecord, name: str) -> tuple[str, Mapping[str, Any]]:
    """Return the title of a validation video, by its name NUMBER-VIDEO-SLUG, and what the run noted of its prompt."""
    match, videos = re.fullmatch(r"(\d+)-(\d+)-?(.*)", name), record.facts.get("videos", [])
    if match is None or int(match[1]) >= len(videos) or slug(videos[int(match[1])]["prompt"]) != match[3]:
        return name, {}  # of an earlier prompt
    video = videos[int(match[1])]
    again = [one["prompt"] for one in videos[: int(match[1])]].count(video["prompt"])  # with another control or image
    title = video["prompt"] + (f" (prompt {int(match[1]) + 1})" if again else "")
    return title + (f" (video {int(match[2]) + 1})" if int(match[2]) else ""), video


def beside_video(record: RunRecord, name: str) -> list[ShownVideo]:
    """Return the control that a validation video follows and the training clip that it aims at, as far as known."""
    _, video = describe_video(record, name)

    def shown(title: str, facts: Mapping[str, str], note: str = "") -> list[ShownVideo]:
        file = record.folder / facts["file"] if "file" in facts else None
        return [ShownVideo(title, file, note, facts.get("missing", ""))] if facts else []

    target = video.get("target", {})
    note = target.get("caption", "")[:_MOST_CAPTION]
    note = "same caption" if target.get("caption") == video.get("prompt") else note
    return shown("control", video.get("control", {})) + shown("training clip", target, note)
