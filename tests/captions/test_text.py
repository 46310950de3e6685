"""Of an answer, the caption remains: on one line, without what models put around it."""

import pytest

from captions.text import IMAGE_PROMPT, VIDEO_PROMPT, NoCaption, clean_caption


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        (" A cat\n\n sleeps.\t", "A cat sleeps."),
        ('"A cat sleeps."', "A cat sleeps."),
        ("“A cat sleeps.”", "A cat sleeps."),
        ('"Stop" says a sign, "go" another"', '"Stop" says a sign, "go" another"'),
        ("A sign says 'stop'", "A sign says 'stop'"),
        ("<think>A cat?\nYes.</think>\n\nA cat sleeps.", "A cat sleeps."),
        ("A cat?</think>A cat sleeps.", "A cat sleeps."),
        ("A cat\u2028sleeps\ud800.", "A cat sleeps."),
    ],
)
def test_what_surrounds_a_caption_is_taken_away(answer, caption):
    assert clean_caption(answer) == caption


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("A cat sleeps. It is of the col", "A cat sleeps."),
        ("It is 3.5 m long! And 2.", "It is 3.5 m long! And 2."),
        ("It is 3.5 m lo", None),
        ("一只猫在睡觉。它是", "一只猫在睡觉。"),
    ],
)
def test_of_an_answer_that_was_cut_whole_sentences_remain(answer, caption):
    if caption is None:
        with pytest.raises(NoCaption, match="no complete sentence in it; raise --max_tokens"):
            clean_caption(answer, was_cut=True)
    else:
        assert clean_caption(answer, was_cut=True) == caption


@pytest.mark.parametrize("answer", [None, "", " \n", '""', "<think>A cat?</think> "])
def test_nothing_is_no_caption(answer):
    with pytest.raises(NoCaption, match=r"has nothing in it$"):
        clean_caption(answer)


def test_thoughts_that_never_end_are_no_caption():
    with pytest.raises(NoCaption, match="thoughts, but no caption; raise --max_tokens"):
        clean_caption("<think>A cat. Or", was_cut=True)


def test_the_prompts_are_one_line_each():
    for prompt in (VIDEO_PROMPT, IMAGE_PROMPT):
        assert "\n" not in prompt
        assert "  " not in prompt
