"""What a caption's text alone tells."""

import re


# Only at the start: later in a caption, "I cannot" may be said by somebody in the clip.
_APOLOGY = r"(?:(?:i'm|i am) (?:very )?)?(?:sorry|afraid)\b.{0,60}?"
_INABILITY = r"\bi (?:cannot|can't|can not|won't)\b|\b(?:i'm|i am) (?:unable|not able|not allowed)\b"
_MODEL = r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b"
_REFUSAL = re.compile(rf"\W*(?:{_APOLOGY})?(?:{_INABILITY}|{_MODEL})")


def is_refusal(caption: str) -> bool:
    """Return whether a caption starts as a model's refusal does: "I'm sorry, but I can't", "As an AI model"."""
    return _REFUSAL.match(caption[:200].lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")) is not None
