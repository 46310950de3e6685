"""The types of flag values: each turns what was typed into a value, or raises argparse.ArgumentTypeError."""

import argparse
import math
import os
from collections.abc import Callable, Sequence


TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


def positive_int(text: str) -> int:
    """A whole number of 1 or more."""
    return _whole_number(text, minimum=1)


def non_negative_int(text: str) -> int:
    """A whole number of 0 or more."""
    return _whole_number(text, minimum=0)


def seed(text: str) -> int:
    """A whole number from 0 to 2^32 - 1, the largest that NumPy takes."""
    return _whole_number(text, minimum=0, maximum=2**32 - 1)


def denoising_steps(text: str) -> int:
    """A whole number from 1 to the 1000 timesteps of the noise schedule."""
    return _whole_number(text, minimum=1, maximum=1000)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    return _number(text, lambda value: value > 0, "a number above 0")


def non_negative_float(text: str) -> float:
    """A finite number of 0 or more."""
    return _number(text, lambda value: value >= 0, "a number of 0 or more")


def finite_float(text: str) -> float:
    """A finite number."""
    return _number(text, lambda value: True, "a number")


def probability(text: str) -> float:
    """A number from 0 to 1, both included."""
    return _number(text, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def decay_rate(text: str) -> float:
    """A number from 0 to 1 without 1 itself."""
    return _number(text, lambda value: 0 <= value < 1, "a number from 0 up to, not including, 1")


def _whole_number(text: str, minimum: int, maximum: float = math.inf) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
    if value < minimum:
        raise argparse.ArgumentTypeError(f"{value} is too small; give a whole number of {minimum} or more")
    if value > maximum:
        raise argparse.ArgumentTypeError(f"{value} is too large; give a whole number up to {maximum}")
    return value


def _number(text: str, is_valid: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number; give {wanted}") from None
    if not math.isfinite(value) or not is_valid(value):
        raise argparse.ArgumentTypeError(f"{text} is out of range; give {wanted}")
    return value


def prose(text: str) -> str:
    """Text for a model to read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the text is not UTF-8; save what it comes from as UTF-8") from None
    return text


def path(text: str) -> str:
    """A path with ~ expanded."""
    if not text:
        raise argparse.ArgumentTypeError("the value is empty; is a variable in your launcher unset?")
    return os.path.expanduser(text)


def table_file(text: str) -> str:
    """A table of clips that exists."""
    file = path(text)
    if not os.path.isfile(file):
        raise argparse.ArgumentTypeError(f"no file '{file}'; give the path of a table of clips")
    if os.path.splitext(file)[1].lower() not in TABLE_SUFFIXES:
        raise argparse.ArgumentTypeError(f"'{file}' is not a table; it must be one of {', '.join(TABLE_SUFFIXES)}")
    return file


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """Return the type of a flag that takes one of `names`, in upper or lower case."""

    def choose(text: str) -> str:
        if text.lower() not in names:
            raise argparse.ArgumentTypeError(f"invalid choice '{text}'; choose from {', '.join(names)}")
        return text.lower()

    return choose
