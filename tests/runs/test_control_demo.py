"""`control_demo.sh`: a LoRA teaches the tiny model to follow silhouettes, and to fill in what is masked."""

import pytest

from demos import run_demo


@pytest.mark.slow
def test_the_shapes_of_the_trained_model_are_where_the_controls_say(tmp_path):
    (measured,) = run_demo("control_demo.sh", tmp_path).values()
    assert measured["videos"] == 8
    assert measured["base"] < 0.3 and measured["trained"] > 0.6


@pytest.mark.slow
def test_the_trained_model_keeps_what_is_given_and_fills_in_what_is_masked(tmp_path):
    given, masked = run_demo("control_demo.sh", tmp_path, DEMO_CONTROL="inpaint").values()
    assert given["videos"] == masked["videos"] == 8
    assert given["base"] < 0.2 and given["trained"] > 0.4
    assert masked["base"] < 0.25 and masked["trained"] > 0.35
