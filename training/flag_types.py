"""How a flag is read: the parser whose errors are one line, and the types of values."""

import argparse
import difflib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from hub_token import without_tokens


_NOT_GIVEN = object()


class FlagParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which knows the flags that were really given.

    Required flags are checked here and not by argparse, so that a misspelt one is reported as such, not as missing.
    One of each group of `required` must be given.
    """

    def __init__(self, *, required: Sequence[Sequence[str]], **options: Any):
        super().__init__(allow_abbrev=False, **options)
        self.required = required

    def error(self, message: str) -> NoReturn:
        """Write one line on stderr, without the usage, and leave with code 2."""
        line = " ".join(message.removeprefix("argument ").splitlines())
        self.exit(2, without_tokens(f"error: {line} (see --help)\n"))

    def read(self, argv: Sequence[str] | None) -> tuple[argparse.Namespace, set[str]]:
        """Parse `argv` into the flags and the set of destinations which `argv` itself named.

        Raises:
            SystemExit: code 2 for an unknown, missing or malformed flag; code 0 after `--help`.
        """
        defaults = vars(self.parse_args([]))
        # argparse fills in a default only where the namespace has no value yet, so what is still
        # _NOT_GIVEN afterwards was not on the command line, under any of its spellings.
        blank = argparse.Namespace(**dict.fromkeys(defaults, _NOT_GIVEN))
        parsed, unknown = self.parse_known_args(argv, blank)
        if unknown:
            self.error(self._explain(unknown))
        given = {name: value for name, value in vars(parsed).items() if value is not _NOT_GIVEN}
        missing = [" or ".join(f"--{name}" for name in names) for names in self.required if not given.keys() & names]
        if missing:
            self.error(f"{', '.join(missing)}: required, but not given")
        return argparse.Namespace(**(defaults | given)), set(given)

    def _explain(self, unknown: list[str]) -> str:
        flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
        if not flags:
            return f"'{unknown[0]}' belongs to no flag; put quotes around a value that contains spaces"
        close = difflib.get_close_matches(flags[0], self._option_string_actions, n=1)
        return f"{flags[0]}: unknown flag" + (f"; did you mean {close[0]}?" if close else "")


def positive_int(text: str) -> int:
    """A whole number of 1 or more; argparse.ArgumentTypeError otherwise."""
    return _whole_number(text, minimum=1)


def non_negative_int(text: str) -> int:
    """A whole number of 0 or more; argparse.ArgumentTypeError otherwise."""
    return _whole_number(text, minimum=0)


def positive_float(text: str) -> float:
    """A finite number above 0; argparse.ArgumentTypeError otherwise."""
    return _number(text, lambda value: value > 0, "a number above 0")


def non_negative_float(text: str) -> float:
    """A finite number of 0 or more; argparse.ArgumentTypeError otherwise."""
    return _number(text, lambda value: value >= 0, "a number of 0 or more")


def finite_float(text: str) -> float:
    """A finite number; argparse.ArgumentTypeError otherwise."""
    return _number(text, lambda value: True, "a number")


def probability(text: str) -> float:
    """A number from 0 to 1, both included; argparse.ArgumentTypeError otherwise."""
    return _number(text, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def decay_rate(text: str) -> float:
    """A number from 0 to 1 without 1 itself; argparse.ArgumentTypeError otherwise."""
    return _number(text, lambda value: 0 <= value < 1, "a number from 0 up to, not including, 1")


def _whole_number(text: str, minimum: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
    if value < minimum:
        raise argparse.ArgumentTypeError(f"{value} is too small; give a whole number of {minimum} or more")
    return value


def _number(text: str, is_valid: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number; give {wanted}") from None
    if not math.isfinite(value) or not is_valid(value):
        raise argparse.ArgumentTypeError(f"{text} is out of range; give {wanted}")
    return value


def path(text: str) -> str:
    """A path with ~ expanded; argparse.ArgumentTypeError for an empty one."""
    if not text:
        raise argparse.ArgumentTypeError("the value is empty; is a variable in your launcher unset?")
    return os.path.expanduser(text)


def choice(names: Sequence[str]) -> dict[str, Any]:
    """The argparse options of a flag that takes one of `names`, in upper or lower case."""

    def choose(text: str) -> str:
        if text.lower() not in names:
            raise argparse.ArgumentTypeError(f"invalid choice '{text}'; choose from {', '.join(names)}")
        return text.lower()

    return {"type": choose, "choices": names}
