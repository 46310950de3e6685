"""The clips of the demo's style: known scenes, as old film, and others as they are."""

import numpy as np

from encoded_clips import all_frames
from make_base_clips import plan_base_scenes
from make_demo_clips import draw_clips
from make_style_clips import LENGTHS, SIZES, film, plan_style_scenes


def test_the_model_knows_each_scene_and_their_files_differ():
    scenes = plan_style_scenes()
    known = {scene.caption for scene in plan_base_scenes()[0]}
    assert len({scene.caption for scene in scenes} & known) == len(scenes) == 24
    assert {(scene.height, scene.width) for scene in scenes} == set(SIZES)
    assert {scene.num_frames for scene in scenes} == set(LENGTHS)


def test_clips_are_brown_and_dark_in_the_corners(tmp_path):
    scene = plan_style_scenes()[0]
    ((path, caption),) = draw_clips(tmp_path / "a", [scene], film)
    assert caption == scene.caption
    frames = all_frames(path).astype(float)
    red, green, blue = np.moveaxis(frames, -1, 0)
    assert (red - blue)[red > 60].mean() > 20 and (red - green)[red > 60].mean() > 5
    assert frames[:, 0, 0].mean() < 0.6 * frames[:, 0, frames.shape[2] // 2].mean()


def test_the_plain_clips_are_other_scenes_that_the_model_knows():
    plain = {scene.caption for scene in plan_style_scenes(plain=True)}
    known, held_out = ({scene.caption for scene in scenes} for scenes in plan_base_scenes())
    assert len(plain) == 48 and plain <= known
    assert not plain & {scene.caption for scene in plan_style_scenes()} and not plain & held_out
