"""`condition_frames_demo.sh`: full fine-tuning teaches the tiny model to use given frames."""

import pytest

from demos import run_demo


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "base", "trained"), [("first,last", 0.25, 0.45), ("first:3", 0.34, 0.36)])
def test_the_videos_of_the_trained_model_are_those_of_the_given_frames(tmp_path, frames, base, trained):
    (measured,) = run_demo("condition_frames_demo.sh", tmp_path, DEMO_FRAMES=frames).values()
    assert measured["videos"] == 8
    assert measured["base"] < base and measured["trained"] > trained
