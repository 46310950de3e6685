"""The prompts for a vision-language model, and how its answers become captions.

CogVideoX was trained on captions as long as a paragraph. Its authors' examples for rewriting prompts
(`inference/convert_demo.py` of THUDM/CogVideo) have 70 to 100 words in the present tense: the subject and its looks,
what happens in order, setting and light. The text encoder reads 226 tokens, about 150 words; the rest is cut.
"""

import re
from dataclasses import dataclass

from common.errors import one_line
from planning.captions import is_refusal


_RULES = """\
Describe only what can be seen, in the present tense, as definite facts: no guesses at names, thoughts, sounds or \
meaning, and nothing twice. Write English, without headings, lists, line breaks or quotation marks. Begin with the \
subject itself, never with words like "the video shows", and do not mention frames or captions. \
Answer with the paragraph alone."""

VIDEO_PROMPT = f"""\
These pictures are frames of one video, in order and evenly spread over it. Write the text from which a video \
generator could make this video again: one paragraph of 80 to 120 words. Say who or what the subject is and how it \
looks: kind, number, colours, material, clothing. Say what happens from the first frame to the last, in order: how \
the subject moves, in which direction and how fast, and what changes. Then the place and the background, the light \
and the colours, the style if it is not plain footage, and how the camera frames the scene and moves, or that it \
stands still. {_RULES}"""

IMAGE_PROMPT = f"""\
Write the text from which an image generator could make this picture again: one paragraph of 60 to 100 words. Say who \
or what the subject is and how it looks: kind, number, colours, material, clothing; its pose and what it does; then \
the place and the background, the light and the colours, the style if it is no plain photograph, and how the picture \
is framed. {_RULES}"""

# What a LoRA with an `--id_token` is to learn must not be in the captions, or the words there learn it instead.
_OMISSIONS = {
    "everything": "",
    "style": """\
 Leave out everything about the style of the pictures: medium, technique, line, texture, grain, palette, mood. Name \
things as if they had been filmed plainly.""",
    "motion": """\
 Leave out how the subject moves and what it does from frame to frame: describe the subject, the place and the light \
as in a photograph of the first frame.""",
    "camera": """\
 Leave out the camera: do not say how it moves, turns, zooms or stands still, and describe the scene and what happens \
in it.""",
}

_QUOTES = ('""', "''", "“”", "「」", "«»")


@dataclass(frozen=True)
class Questions:
    """What the model is asked about a clip."""

    video: str
    image: str

    @classmethod
    def built_in(cls, template: str) -> "Questions":
        """Return the questions of `--template`, which omits what is learned under the `--id_token`."""
        omission = _OMISSIONS[template]
        return cls(VIDEO_PROMPT + omission, IMAGE_PROMPT + omission)


class NoCaption(Exception):
    """A model's answer is not a caption; the message completes a sentence that starts with the clip."""


def clean_caption(answer: str | None, *, was_cut: bool = False) -> str:
    """Return the caption in a model's answer, on one line, without reasoning before it and quotes around it.

    If the answer was cut at the token limit, only its complete sentences are kept. Raises NoCaption for a refusal, or
    if nothing remains.
    """
    more = "; raise --max_tokens" if was_cut else ""
    text = (answer or "").rpartition("</think>")[2]  # of reasoning models
    if text.lstrip().startswith("<think>"):
        raise NoCaption(f"the model's answer has thoughts, but no caption{more}")
    caption = " ".join(text.encode("utf-8", "ignore").decode().split())
    for opening, closing in _QUOTES:
        inner = caption[1:-1]
        if caption[:1] == opening and caption[-1:] == closing and opening not in inner and closing not in inner:
            caption = inner.strip()
    if was_cut:
        sentences = re.match(r".*(?:[.!?](?=\s|$)|[\u3002\uff01\uff1f])", caption)
        caption = sentences[0] if sentences else ""
    if is_refusal(caption):
        raise NoCaption(f"the model refuses: {one_line(caption, 100)}")
    if not caption:
        raise NoCaption(f"the model's answer has {'no complete sentence' if was_cut else 'nothing'} in it{more}")
    return caption
