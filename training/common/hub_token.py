"""Keep the token of the Hugging Face hub and the keys of object stores secret: none is printed or written to files.

All output goes through `without_tokens`. Trackers get neither the flag nor a command line with it.
"""

import os
import re
import sys
from pathlib import Path


TOOLKIT = Path(__file__).resolve().parents[1]  # all modules of ours
HIDDEN = "(hidden)"

_LOOKS_LIKE_ONE = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}")
# Variables in which the libraries of object stores find secrets.
_OF_STORES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN")
_OF_STORES += ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_CLIENT_SECRET")
_SHORTEST = 8  # characters; anything shorter may be part of other words
_known: set[str] = set()  # from flags


class HubToken:
    """A token that is printed and saved as "(hidden)"; it is also hidden from other texts and the command line."""

    def __init__(self, value: str):
        self.value = value
        _known.add(value)
        # Trackers record the command line.
        sys.argv[:] = [
            word.removesuffix(value) + HIDDEN if word == value or word.endswith(f"={value}") else word
            for word in sys.argv
        ]

    def __repr__(self) -> str:
        return HIDDEN


def without_tokens(text: str) -> str:
    """Replace each token in a text by "(hidden)": from flags, environment or login, or what looks like one."""
    for token in sorted({*_known, *_found()}, key=len, reverse=True):
        if len(token) >= _SHORTEST:
            text = text.replace(token, HIDDEN)
    return _LOOKS_LIKE_ONE.sub(HIDDEN, text)


def _found() -> list[str]:
    """Return the tokens that huggingface_hub would use, without importing it, which takes long."""
    environment = [os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", *_OF_STORES)]
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    try:
        of_login = Path(os.environ.get("HF_TOKEN_PATH") or Path(home, "token")).read_text(encoding="utf-8")
    except (OSError, ValueError):  # not logged in
        of_login = ""
    return [token.strip() for token in (*environment, of_login)]
