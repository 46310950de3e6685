"""The token of the Hugging Face hub, which is shown to nobody but the hub: not on the screen, not in a file.

Whatever is printed or logged goes through `without_tokens`. Trackers get neither the flag nor a command line with it.
"""

import logging
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


class TokenFreeFormatter(logging.Formatter):
    """Formats log records, tracebacks included, without tokens."""

    def format(self, record: logging.LogRecord) -> str:
        """What is written of a record."""
        return without_tokens(super().format(record))


class SaidBefore(logging.Filter):
    """Lets what a library logs through once; what the toolkit itself has to say, every time."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        message = record.getMessage()
        is_new = message not in self.said or TOOLKIT in Path(record.pathname).parents
        self.said.add(message)
        return is_new


def log_without_tokens(level: int) -> None:
    """Write what the toolkit and its libraries log to stderr, message by message, and no token.

    Args:
        level: what is less than that is not written.
    """
    from common.bars import LineHandler  # by tqdm, which is not there yet when flags are read

    handler = LineHandler()
    handler.addFilter(SaidBefore())
    handler.setFormatter(TokenFreeFormatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
