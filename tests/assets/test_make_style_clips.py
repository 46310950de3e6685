"""The clips of the demo's style: known scenes, in grey and with grain."""

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


def test_clips_are_grey_and_grainy_and_the_same_each_time(tmp_path):
    scenes = plan_style_scenes()[:2]
    ((path, caption), _) = draw_clips(tmp_path / "a", scenes, film)
    assert caption == scenes[0].caption
    # The drawn frames, not the file: what an encoder writes depends on what else has run in its process.
    assert np.array_equal(list(film(scenes[0])), list(film(scenes[0])))
    frames = all_frames(path).astype(int)
    assert (frames.max(axis=-1) - frames.min(axis=-1)).mean() < 2
    assert frames[:, :8, :8, 0].std() > 5
