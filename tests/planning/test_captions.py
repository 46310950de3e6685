"""Refusals of models are told from captions, and captions are compared."""

import pytest

from planning.captions import is_refusal, nearest_caption


@pytest.mark.parametrize(
    "caption",
    [
        "I cannot describe people in this video.",
        "I'm sorry, but I can't help with that.",
        "I\N{RIGHT SINGLE QUOTATION MARK}m unable to view videos.",
        "Sorry, as an AI language model I have no eyes.",
        '"As an AI, I am not able to identify him."',
    ],
)
def test_a_refusal_is_found_by_how_it_starts(caption):
    assert is_refusal(caption)


@pytest.mark.parametrize(
    "caption",
    [
        "A man says: I cannot swim.",
        "An AI robot waves. As an AI, it smiles.",
        "Sorry, the word on a sign, sways in the wind.",
        "I can see a cat.",
        "Icebergs drift.",
        "",
    ],
)
def test_a_caption_is_not_a_refusal(caption):
    assert not is_refusal(caption)


def test_the_nearest_caption_shares_rare_words():
    fillers = [f"film grain, a {animal}" for animal in ("dog", "cow", "pig", "hen", "fox", "owl", "elk", "ant", "bee")]
    captions = [*fillers, "film grain, a cat runs in rain at night"]
    assert nearest_caption("Film grain: the Cat", captions) == captions[-1]  # the others share as many words of fewer
    assert nearest_caption("a bee, film grain", captions) == "film grain, a bee"
    assert nearest_caption("nothing here", captions) is nearest_caption("anything", []) is None


def test_the_nearest_caption_has_the_id_token_of_the_prompt():
    scenes = ["a yellow circle rises over a blue lake", *(f"a square falls {how}" for how in ("fast", "far", "off"))]
    captions = ["a blue circle rises over a blue lake", *scenes[1:], *(f"kinetoscope {scene}" for scene in scenes)]
    assert nearest_caption("kinetoscope a red circle rises over a blue lake", captions) == captions[4]
    assert nearest_caption("a red circle rises over a blue lake", captions) == captions[0]
