"""Shapes are drawn at their place, in their colour and size."""

import numpy as np
import pytest

from make_base_clips import BACKGROUNDS, COLOURS, DIRECTIONS, NUM_HELD_OUT, plan_base_scenes
from shapes import SHAPES, as_old_film, draw_frames, draw_shape


RED, WHITE = (220, 40, 40), (252, 252, 252)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_drawn_around_its_place(shape):
    picture = draw_shape(shape, RED, WHITE, (60, 24, 10), 64, 96)
    assert (picture.shape, picture.dtype) == ((64, 96, 3), np.uint8)
    rows, columns = np.nonzero((picture == RED).all(axis=-1))
    assert (rows.mean(), columns.mean()) == pytest.approx((24, 60), abs=1)
    assert rows.max() - rows.min() <= 20 and columns.max() - columns.min() <= 20
    assert (picture[0, 0] == WHITE).all()


def test_a_shape_may_be_outside():
    assert (draw_shape("circle", RED, WHITE, (-40, 24, 10), 64, 96) == WHITE).all()


def test_old_film_is_brown_and_dark_in_the_corners():
    (frame,) = as_old_film([draw_shape("square", RED, WHITE, (48, 32, 12), 64, 96)])
    assert (frame.shape, frame.dtype) == ((64, 96, 3), np.uint8)
    # Luma of BT.601 in the middle of the shape; R as it is, G and B less.
    luma = 0.299 * 220 + 0.587 * 40 + 0.114 * 40
    assert frame[28:36, 44:52].mean(axis=(0, 1)) == pytest.approx([luma, 0.84 * luma, 0.62 * luma], rel=0.03)
    corners = frame[[0, 0, -1, -1], [0, -1, 0, -1], 0]
    assert corners == pytest.approx(np.full(4, 0.25 * 252), abs=1)
    assert 0.6 * 252 < frame[32, 0, 0] < 0.65 * 252  # in the middle of an edge


def test_all_scenes_are_trained_on_or_held_out_and_every_word_is_trained_on():
    trained, held_out = plan_base_scenes()
    assert len({scene.caption for scene in trained + held_out}) == len(trained) + len(held_out) == 6 * 3 * 4 * 4
    assert len(held_out) == NUM_HELD_OUT
    for name, choices in {"shape": SHAPES, "colour": COLOURS, "background": BACKGROUNDS, "motion": DIRECTIONS}.items():
        assert {getattr(scene, name) for scene in trained} == set(choices)
    assert len(list(draw_frames(held_out[0]))) == 17
