"""The exception for errors that the user can fix, the layout of its message, and how it is shown."""

import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from common.hub_token import without_tokens
from common.ranks import launch_rank
from common.signals import hear_ctrl_c


AGAIN = "run the same command again, it does only what is missing"


class UserError(Exception):
    """A mistake in flags, files or data. The message says what is wrong, where, and what to do now."""


@contextmanager
def one_line_errors(to_continue: str = AGAIN) -> Iterator[None]:
    """Turn a `UserError` into its message on stderr and exit code 2; any other exception keeps its traceback.

    Neither shows a hub token. Ctrl-C prints a line, which says what `to_continue`, and exits with the shells' usual
    code.
    """
    hear_ctrl_c()
    try:
        yield
    except KeyboardInterrupt:
        if launch_rank() == 0:
            print(f"\ninterrupted; {to_continue}", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGINT) from None
    except UserError as error:
        # Before torch is imported, flags and files are checked, with the same result on every rank.
        if launch_rank() == 0 or "torch" in sys.modules:
            print(without_tokens(f"error: {error}"), file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        if without_tokens(trace) == trace:
            raise
        print(without_tokens(trace), end="", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def listing(title: str, items: Sequence[object], most: int = 20) -> str:
    """Return a title and one indented line per item; items beyond `most` are only counted."""
    lines = [f"  {item}" for item in items[:most]]
    if len(items) > most:
        lines.append(f"  ... and {len(items) - most} more")
    return "\n".join([title, *lines])


def one_line(text: object, most: int = 1000) -> str:
    """Return text on one line of at most `most` characters, with invalid Unicode escaped."""
    line = " ".join(str(text).encode("utf-8", "backslashreplace").decode().split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def described(value: object) -> str:
    """Describe a value of the wrong type: its type, and its value if it is a number."""
    kind = type(value).__name__
    return one_line(f"{kind} {value}", 200) if isinstance(value, int | float) else kind
