"""Of an answer, the caption remains: on one line, without what models put around it."""

import pytest

from captions.text import NoCaption, Questions, clean_caption


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
def test_a_caption_is_stripped_of_quotes_and_reasoning(answer, caption):
    assert clean_caption(answer) == caption


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("A cat sleeps. It is of the col", "A cat sleeps."),
        ("It is 3.5 m long! And 2.", "It is 3.5 m long! And 2."),
        ("一只猫在睡觉。它是", "一只猫在睡觉。"),
    ],
)
def test_complete_sentences_of_a_cut_answer_are_kept(answer, caption):
    assert clean_caption(answer, was_cut=True) == caption


@pytest.mark.parametrize(
    ("answer", "was_cut", "reason"),
    [
        *((empty, False, r"has nothing in it$") for empty in (None, "", " \n", '""', "<think>A cat?</think> ")),
        ("It is 3.5 m lo", True, "no complete sentence in it; raise --max_tokens"),
        ("I'm sorry, but I can't help.", False, "the model refuses: I'm sorry, but I can't help."),
        ("<think>A cat. Or", True, "thoughts, but no caption; raise --max_tokens"),
    ],
)
def test_an_answer_without_a_caption_has_a_reason(answer, was_cut, reason):
    with pytest.raises(NoCaption, match=reason):
        clean_caption(answer, was_cut=was_cut)


@pytest.mark.parametrize("template", ["everything", "style", "motion", "camera"])
def test_the_prompts_are_one_line_each(template):
    questions = Questions.built_in(template)
    for prompt in (questions.video, questions.image):
        assert "\n" not in prompt
        assert "  " not in prompt
