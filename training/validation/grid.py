"""Draw a run's validations side by side: a row for each video, a column for each step."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from validation.trackers import ValidationVideo
from video.contact_sheet import SheetRow, draw_contact_sheet
from video.io import read_frames


logger = logging.getLogger(__name__)

GRID_FILE = "progress.png"

_MOST_COLUMNS = 8
_MISSING = np.full((2, 3, 3), 240, dtype=np.uint8)  # the colour of the sheet's empty cells


def draw_grid(folder: Path, videos: Sequence[ValidationVideo], frame: int, last_step: int) -> Path | None:
    """Draw one frame of each video at up to eight validations, including the first and the last one.

    The videos are read from `folder/step-<N>`, so that the grid includes steps before a resume. The cell of a frame
    that cannot be read is empty.

    Args:
        folder: folder of all the run's validations.
        videos: videos of the last validation.
        frame: number of the frame to show, from 0.
        last_step: later steps are ignored, as the run was resumed from an earlier checkpoint.

    Returns:
        The picture's file; None, with a warning, if it cannot be drawn.
    """
    names = [video.file.name for video in videos]
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    steps = sorted(step for match in found if match and (step := int(match.group(1))) <= last_step)
    shown = choose_columns(
        [step for step in steps if any((folder / f"step-{step}" / name).is_file() for name in names)]
    )
    rows = [
        SheetRow([_read_frame(folder / f"step-{step}" / name, frame) for step in shown], video.name, video.prompt)
        for name, video in zip(names, videos, strict=True)
    ]
    try:
        draw_contact_sheet(rows, folder / GRID_FILE, [f"step {step}" if step else "before training" for step in shown])
    except Exception as error:  # a missing picture must not end a run
        logger.warning("warning: cannot draw the validations side by side: %s", error)
        return None
    return folder / GRID_FILE


def choose_columns(steps: Sequence[int], most: int = _MOST_COLUMNS) -> list[int]:
    """Choose at most `most` steps, evenly spread, including the first and the last one."""
    return [steps[round(place)] for place in np.linspace(0, len(steps) - 1, min(most, len(steps)))]


def _read_frame(file: Path, frame: int) -> np.ndarray:
    try:
        return read_frames(file, [frame])[0]
    except ValueError:
        return _MISSING
