"""Measured colours and directions match the videos."""

import numpy as np
import pytest

from make_base_clips import DIRECTIONS, plan_base_scenes
from measure_model import Seen, see
from shapes import draw_frames


@pytest.mark.parametrize("scene", plan_base_scenes()[1], ids=lambda scene: scene.caption)
def test_colour_and_direction_of_drawn_scenes_are_seen(scene):
    assert see(np.stack(list(draw_frames(scene)))) == Seen(scene.colour, DIRECTIONS[scene.motion])


def test_an_empty_video_shows_nothing():
    assert see(np.full((9, 64, 96, 3), 128, dtype=np.uint8)) == Seen(None, None)


def test_a_still_video_has_no_direction():
    assert see(np.stack([next(iter(draw_frames(plan_base_scenes()[0][0])))] * 9)).direction is None
