"""The token of the Hugging Face hub, which is shown to nobody but the hub: not on the screen, not in a file.

Whatever is printed or logged goes through `without_tokens`. Trackers get neither the flag nor a command line with it.
"""

import os
import re
import sys
from pathlib import Path


TOOLKIT = Path(__file__).resolve().parents[1]  # all modules of ours
HIDDEN = "(hidden)"

_LOOKS_LIKE_ONE = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}")
_SHORTEST = 8  # characters; hiding anything shorter would tear up other words
_known: set[str] = set()  # given by flags


class HubToken:
    """A token that shows as "(hidden)" wherever the flags are printed or written down.

    Args:
        value: of the flag; from now on `without_tokens` knows it, and the command line no longer has it.
    """

    def __init__(self, value: str):
        self.value = value
        _known.add(value)
        # Trackers write the command line down.
        sys.argv[:] = [word.removesuffix(value) + HIDDEN if _ends_with(word, value) else word for word in sys.argv]

    def __repr__(self) -> str:
        return HIDDEN


def _ends_with(word: str, value: str) -> bool:
    return word == value or word.endswith(f"={value}")


def without_tokens(text: str) -> str:
    """A text for the user, with "(hidden)" for each token in it: given by flag, by environment, by login, or not ours.

    Huggingface_hub's own ways to find a token are not asked, because importing it takes long.
    """
    for token in sorted({*_known, *_found()}, key=len, reverse=True):
        if len(token) >= _SHORTEST:
            text = text.replace(token, HIDDEN)
    return _LOOKS_LIKE_ONE.sub(HIDDEN, text)


def _found() -> list[str]:
    """The tokens that huggingface_hub would use here."""
    environment = [os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")]
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    try:
        of_login = Path(os.environ.get("HF_TOKEN_PATH") or Path(home, "token")).read_text(encoding="utf-8")
    except (OSError, ValueError):  # nobody logged in
        of_login = ""
    return [token.strip() for token in (*environment, of_login)]
