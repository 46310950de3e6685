"""The values of --condition_frames, and the frames that they give."""

import pytest

from video.condition_frames import fewest_frames, given_frames, num_condition_latents, parse_condition_frames


@pytest.mark.parametrize(
    ("text", "given", "latents", "fewest"),
    [
        ("first", [0], 1, 1),
        ("First, Last", [0, 16], 2, 5),
        ("first:2", [0, 1, 2, 3, 4], 2, 9),
        ("first:3", list(range(9)), 3, 13),
    ],
)
def test_a_value_gives_frames_and_leaves_others_to_sample(text, given, latents, fewest):
    value = parse_condition_frames(text)
    assert given_frames(value, 17) == given
    assert num_condition_latents(value) == latents
    assert fewest_frames(value) == fewest


@pytest.mark.parametrize("text", ["", "last", "first:", "first:1", "first:0", "first:-2", "first:2.5", "first,first"])
def test_other_values_are_refused(text):
    with pytest.raises(ValueError, match="first, first,last and first:K"):
        parse_condition_frames(text)
