"""The one exception that means "the user can mend this", and how an entry point shows it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in flags, files or data. The message says what is wrong, where, and what to do now."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a `UserError` into its message on stderr and exit code 2; any other exception keeps its traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
