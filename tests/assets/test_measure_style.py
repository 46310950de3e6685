"""The distances between videos, base model and style."""

import numpy as np
import pytest
from PIL import Image

from make_base_clips import plan_base_scenes
from measure_style import distance, draw_picture, measure
from shapes import as_old_film, draw_frames


SCENES = plan_base_scenes()[1][:8]
COLOURED = np.stack([list(draw_frames(scene)) for scene in SCENES])
STYLE = np.stack([list(as_old_film(draw_frames(scene))) for scene in SCENES])


def test_a_distance_is_the_mean_absolute_difference():
    one, other = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 8, 8, 3), dtype=np.uint8)
    expected = np.mean([abs(int(a) - int(b)) for a, b in zip(one.ravel(), other.ravel(), strict=True)])
    assert distance(one, other) == pytest.approx(expected)


def test_a_video_halfway_is_half_as_far_and_a_reversed_one_moves_wrongly():
    halfway = ((COLOURED.astype(int) + STYLE) // 2).astype(np.uint8)
    rows = measure({"base": COLOURED, "halfway": halfway, "reversed": COLOURED[:, ::-1], "style": STYLE}, SCENES)
    assert rows["base"] == {"to_base": 0, "to_style": 1, "right_colour": 8, "right_direction": 8}
    assert [rows["style"][key] for key in ("to_base", "to_style", "right_direction")] == [1, 0, 8]
    assert (rows["halfway"]["to_base"], rows["halfway"]["to_style"]) == pytest.approx((0.5, 0.5), abs=0.01)
    assert (rows["reversed"]["right_colour"], rows["reversed"]["right_direction"]) == (8, 0)
    assert rows["reversed"]["to_base"] > 0


def test_the_picture_has_a_row_for_each_scene_and_a_training_clip(tmp_path):
    names = ("base", "lora_without_word", "lora_with_word")
    draw_picture(dict.fromkeys(names, COLOURED), SCENES, "kinetoscope", tmp_path / "style.png")
    picture = np.asarray(Image.open(tmp_path / "style.png").convert("RGB")).astype(int)
    *coloured, target = (picture[56:204, left : left + 222] for left in range(20, 20 + 4 * 226, 226))
    assert (coloured[0] == coloured[1]).all() and (coloured[0] == coloured[2]).all()
    assert (target[..., 0] - target[..., 2]).mean() > 20  # brown
