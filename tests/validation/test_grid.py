"""The grid of a run's validations: rows are videos, columns are steps."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from validation.grid import GRID_FILE, choose_columns, draw_grid
from validation.trackers import ValidationVideo
from video.io import write_video


COLORS = {0: (220, 20, 20), 5: (20, 200, 20), 10: (20, 20, 220)}  # of the middle frame at each step


@pytest.fixture
def validations(tmp_path) -> Path:
    """A run's folder with the videos of two prompts at three steps: only the middle frame is coloured."""
    for step, color in COLORS.items():
        for name in ("00-00-a", "01-00-b"):
            frames = [Image.new("RGB", (48, 32), color if number == 4 else "white") for number in range(9)]
            (tmp_path / f"step-{step}").mkdir(exist_ok=True)
            write_video(tmp_path / f"step-{step}" / f"{name}.mp4", frames, 8)
    return tmp_path


def videos_of(folder: Path, step: int) -> list[ValidationVideo]:
    return [
        ValidationVideo(number, name, f"prompt {name}", folder / f"step-{step}" / f"{name}.mp4", [])
        for number, name in enumerate(("00-00-a", "01-00-b"))
    ]


def cells(folder: Path, columns: int) -> list[list[tuple[int, ...]]]:
    with Image.open(folder / GRID_FILE) as grid:
        return [[grid.getpixel((131 + 226 * column, 130 + 172 * row)) for column in range(columns)] for row in (0, 1)]


def is_near(pixel: tuple[int, ...], color: tuple[int, int, int]) -> bool:
    return np.abs(np.subtract(pixel, color)).max() < 40


def test_each_row_is_a_prompt_and_each_column_a_step(validations):
    assert draw_grid(validations, videos_of(validations, 10), frame=4, last_step=10) == validations / GRID_FILE
    for row in cells(validations, 3):
        assert all(is_near(pixel, color) for pixel, color in zip(row, COLORS.values(), strict=True))


def test_a_video_that_is_missing_or_damaged_leaves_its_cell_empty(validations, caplog):
    (validations / "step-5" / "00-00-a.mp4").unlink()
    (validations / "step-5" / "01-00-b.mp4").write_bytes(b"damaged")
    (validations / "step-x").mkdir()
    draw_grid(validations, videos_of(validations, 10), frame=4, last_step=10)
    for row in cells(validations, 3):
        assert is_near(row[0], COLORS[0]) and is_near(row[1], (240, 240, 242)) and is_near(row[2], COLORS[10])
    assert not caplog.records


def test_steps_that_a_resumed_run_has_not_reached_again_are_omitted(validations):
    draw_grid(validations, videos_of(validations, 5), frame=4, last_step=5)
    for row in cells(validations, 3):
        assert is_near(row[1], COLORS[5]) and is_near(row[2], (255, 255, 255))


def test_a_grid_that_cannot_be_written_is_a_warning(validations, caplog):
    (validations / GRID_FILE).mkdir()
    assert draw_grid(validations, videos_of(validations, 10), frame=4, last_step=10) is None
    assert "warning: cannot draw the validations side by side: " in caplog.text


def test_of_many_steps_eight_are_shown_with_the_first_and_the_last():
    assert choose_columns([0, 5]) == [0, 5]
    steps = choose_columns(range(0, 1001, 10))
    assert (len(steps), steps[0], steps[-1]) == (8, 0, 1000)
    assert all(130 <= after - before <= 150 for before, after in pairwise(steps))
