"""What a caption's text alone tells."""

import math
import re
from collections import Counter
from collections.abc import Sequence


# Only at the start: later in a caption, "I cannot" may be said by somebody in the clip.
_APOLOGY = r"(?:(?:i'm|i am) (?:very )?)?(?:sorry|afraid)\b.{0,60}?"
_INABILITY = r"\bi (?:cannot|can't|can not|won't)\b|\b(?:i'm|i am) (?:unable|not able|not allowed)\b"
_MODEL = r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b"
_REFUSAL = re.compile(rf"\W*(?:{_APOLOGY})?(?:{_INABILITY}|{_MODEL})")


def is_refusal(caption: str) -> bool:
    """Return whether a caption starts as a model's refusal does: "I'm sorry, but I can't", "As an AI model"."""
    return _REFUSAL.match(caption[:200].lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")) is not None


def nearest_caption(prompt: str, captions: Sequence[str]) -> str | None:
    """Return the caption that shares most words with a prompt, where rare words weigh more; None if none shares any.

    The measure is Tversky's index of the sets of words, with inverse document frequencies as weights. Words that only
    the caption has count half, because a caption without the prompt's id token is farther off than one with more.
    Source: https://doi.org/10.1037/0033-295X.84.4.327.
    """
    words = [frozenset(re.findall(r"\w+", text.lower())) for text in captions]
    counts = Counter(word for one in words for word in one)
    weigh = {word: math.log(1 + len(words) / count) for word, count in counts.items()}
    wanted = frozenset(re.findall(r"\w+", prompt.lower()))

    def weight(some: frozenset[str]) -> float:
        return math.fsum(weigh.get(word, math.log(1 + len(words))) for word in some)

    shared = [
        weight(wanted & one) / (weight(wanted) + weight(one - wanted) / 2) if wanted & one else 0.0 for one in words
    ]
    return captions[shared.index(max(shared))] if any(shared) else None
