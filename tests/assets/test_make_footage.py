"""Drawn films have their cuts where scenes.csv says, and are the same each time."""

import csv
import itertools

import numpy as np
import pytest

from encoded_clips import all_frames
from make_footage import KINDS, draw_shot, make_footage, plan_film


def test_the_scenes_fill_the_film_and_have_all_kinds():
    shots = plan_film(20_000, seed=1)
    assert [shots[0].start, shots[-1].end] == [0, 20_000]
    assert all(before.end == after.start for before, after in itertools.pairwise(shots))
    assert {shot.kind for shot in shots} == set(KINDS)
    assert all(before.background != after.background for before, after in itertools.pairwise(shots))


def test_the_files_show_the_scenes_of_the_table(tmp_path):
    planned = make_footage(tmp_path / "films", 1, 6 / 60, seed=2)
    with open(tmp_path / "films/scenes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["start"]), int(row["end"])) for row in rows] == [
        (shot.start, shot.end) for shot in planned["film-00.mp4"]
    ]
    frames = all_frames(tmp_path / "films/film-00.mp4")
    drawn = [frame for shot in planned["film-00.mp4"] for frame in draw_shot(shot)]
    assert len(frames) == len(drawn) == 6 * 24
    assert np.abs(frames[::7].astype(int) - drawn[::7]).mean() < 8


def test_a_fade_reaches_black_and_returns():
    shot = next(shot for shot in plan_film(20_000, seed=1) if shot.kind == "fade")
    brightness = [float(frame.mean()) for frame in draw_shot(shot)]
    assert min(brightness) < 0.1 * brightness[0]
    assert brightness[-1] == pytest.approx(brightness[0], rel=0.2)
