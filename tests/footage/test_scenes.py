"""Cuts become clips: margins at cuts, lengths in seconds, equal parts, no black bars."""

from itertools import pairwise

import numpy as np
import pytest

from flags.footage import SceneFlags
from footage.cuts import Glance, Survey
from footage.scenes import BLACK, TOO_SHORT, glance_step, plan_scenes
from video.probe import VideoInfo


INFO = VideoInfo(250, 72, 128, 25.0)
FULL = (0, 72, 0, 128)


def plan(cuts=(), info=INFO, glances=(), **flags):
    return plan_scenes(Survey(list(cuts), list(glances)), info, SceneFlags(**flags))


def frames(scenes):
    return [(scene.start, scene.end) for scene in scenes if not scene.skipped]


def glance(index, top=0, bottom=72, left=0, right=128, dark=10):
    rows, columns = np.full(72, dark, np.uint8), np.full(128, dark, np.uint8)
    rows[top:bottom] = columns[left:right] = 200
    return Glance(index, rows, columns)


def test_the_margin_is_dropped_on_both_sides_of_cuts_only():
    assert frames(plan([100], margin_frames=3)) == [(0, 97), (103, 250)]
    assert frames(plan([100], margin_frames=0)) == [(0, 100), (100, 250)]


def test_scenes_are_measured_without_their_margins():
    scenes = plan([60, 114], min_seconds=2, margin_frames=2)
    assert [(scene.start, scene.end, scene.skipped) for scene in scenes] == [
        (0, 58, ""),
        (62, 112, ""),  # exactly two seconds
        (116, 250, ""),
    ]
    assert [scene.skipped for scene in plan([60, 113], min_seconds=2, margin_frames=2)] == ["", TOO_SHORT, ""]
    assert [scene.skipped for scene in plan([90, 92], margin_frames=2)] == ["", TOO_SHORT, ""]


@pytest.mark.parametrize(("seconds", "parts"), [(10, [250]), (5, [125] * 2), (4, [83, 84, 83])])
def test_a_long_scene_is_cut_into_equal_parts(seconds, parts):
    scenes = plan(max_seconds=seconds, min_seconds=1)
    assert [scene.end - scene.start for scene in scenes] == parts
    assert all(before.end == after.start for before, after in pairwise(scenes))
    assert all(scene.seconds == pytest.approx((scene.end - scene.start) / 25) for scene in scenes)


def test_lengths_follow_the_times_of_the_frames():
    times = [*range(0, 4_000_000, 40_000), *range(4_000_000, 20_000_000, 400_000)]
    info = VideoInfo(140, 72, 128, 7.0, frame_times=tuple(times))
    scenes = plan([100], info, min_seconds=3, max_seconds=8, margin_frames=0)
    assert frames(scenes) == [(0, 100), (100, 120), (120, 140)]
    assert [round(scene.seconds, 1) for scene in scenes] == [4.0, 8.0, 7.7]


def test_a_scene_is_black_if_nothing_in_it_is_brighter():
    black, bright = glance(30, 0, 0, 0, 0), glance(60, 0, 0, 0, 0, dark=90)
    assert [scene.skipped for scene in plan([90], glances=[black, glance(100)])] == [BLACK, ""]
    assert [scene.skipped for scene in plan([80], glances=[black, bright, glance(100)])] == ["", ""]


def test_bars_are_cropped_only_where_they_are_dark_in_the_full_scene():
    glances = [glance(0, top=12, bottom=60), glance(50, top=13, bottom=52), glance(150), glance(200, top=12)]
    flags = {"margin_frames": 0, "glances": glances}
    assert [scene.box for scene in plan([100], crop_bars=True, **flags)] == [(14, 58, 0, 128), FULL]
    assert [scene.box for scene in plan([100], **flags)] == [FULL, FULL]


def test_sides_are_even():
    assert plan(info=VideoInfo(250, 71, 127, 25.0))[0].box == (0, 70, 0, 126)
    (scene,) = plan(glances=[glance(0, top=11, left=5)], crop_bars=True)
    assert scene.box == (13, 71, 7, 127)


def test_something_small_and_bright_is_not_a_picture_between_bars():
    (scene,) = plan(glances=[glance(0, top=30, bottom=40, left=60, right=70)], crop_bars=True)
    assert scene.box == FULL and not scene.skipped


@pytest.mark.parametrize(("seconds", "step"), [(2.0, 12), (0.4, 2), (0.01, 1)])
def test_even_a_short_scene_is_looked_at_several_times(seconds, step):
    assert glance_step(INFO, seconds) == step
