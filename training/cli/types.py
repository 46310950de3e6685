"""The types of flag values: each says how typed text becomes a value, and how `--help` names that value."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from cli.conditions import parse_condition
from common.stores import is_url
from video.condition_frames import parse_condition_frames


TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Value:
    """How the command line reads a value.

    Args:
        parse: turns typed text into the value; raises argparse.ArgumentTypeError.
        metavar: placeholder for the value in `--help`.
    """

    parse: Callable[[str], Any]
    metavar: str


def _whole_number(minimum: int, maximum: float = math.inf, metavar: str = "N") -> Value:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is too small; pass a whole number of {minimum} or more")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"{value} is too large; pass a whole number up to {maximum}")
        return value

    return Value(parse, metavar)


def _number(is_valid: Callable[[float], bool], wanted: str, metavar: str = "X") -> Value:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number; pass {wanted}") from None
        if not math.isfinite(value) or not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text} is out of range; pass {wanted}")
        return value

    return Value(parse, metavar)


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the text is not UTF-8; save its source as UTF-8") from None
    return text


def path(text: str) -> str:
    """Return a path with ~ expanded."""
    if not text:
        raise argparse.ArgumentTypeError("the value is empty; is a variable in your launcher unset?")
    return os.path.expanduser(text)


def _file_name(text: str) -> str:
    if "/" in text or "\\" in text or text == "..":
        raise argparse.ArgumentTypeError(f"'{text}' would be another folder; pass a name without / and \\")
    return text


def _table_file(text: str) -> str:
    file = path(text)
    if not is_url(file) and not os.path.isfile(file):
        raise argparse.ArgumentTypeError(f"no file '{file}'; pass the path of a table of clips")
    if os.path.splitext(file)[1].lower() not in TABLE_SUFFIXES:
        raise argparse.ArgumentTypeError(f"'{file}' is not a table; it must be one of {', '.join(TABLE_SUFFIXES)}")
    return file


def _condition_frames(text: str) -> str:
    try:
        return parse_condition_frames(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _condition(text: str) -> str:
    try:
        return parse_condition(text).text
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """Return the parser of a value that is one of `names`, in upper or lower case."""

    def choose(text: str) -> str:
        if text.lower() not in names:
            raise argparse.ArgumentTypeError(f"invalid choice '{text}'; choose from {', '.join(names)}")
        return text.lower()

    return choose


PositiveInt = Annotated[int, _whole_number(1)]
Pixels = Annotated[int, _whole_number(1, metavar="PX")]
NonNegativeInt = Annotated[int, _whole_number(0)]
DuplicateBits = Annotated[int, _whole_number(0, 32)]  # 100,000 clips take 2 CPU seconds at 16, 40 at 32
Port = Annotated[int, _whole_number(0, 65535)]
Seed = Annotated[int, _whole_number(0, 2**32 - 1)]  # up to the largest that NumPy takes
DenoisingSteps = Annotated[int, _whole_number(1, 1000)]  # up to the timesteps of the noise schedule
PositiveFloat = Annotated[float, _number(lambda value: value > 0, "a number above 0")]
NonNegativeFloat = Annotated[float, _number(lambda value: value >= 0, "a number of 0 or more")]
FiniteFloat = Annotated[float, _number(lambda value: True, "a number")]
Probability = Annotated[float, _number(lambda value: 0 <= value <= 1, "a number from 0 to 1", "P")]
Share = Annotated[float, _number(lambda value: 0 < value <= 1, "a number above 0, up to 1", "P")]
DecayRate = Annotated[float, _number(lambda value: 0 <= value < 1, "a number from 0 up to, not including, 1")]
Text = Annotated[str, Value(_text, "TEXT")]
ConditionFrames = Annotated[str, Value(_condition_frames, "FRAMES")]
Condition = Annotated[str, Value(_condition, "CONDITION")]
Url = Annotated[str, Value(lambda text: text.rstrip("/"), "URL")]
FilePath = Annotated[str, Value(path, "FILE")]
FileName = Annotated[str, Value(_file_name, "NAME")]  # of a file or folder, without where it is
FolderPath = Annotated[str, Value(path, "FOLDER")]
ModelPath = Annotated[str, Value(path, "MODEL")]  # or a hub id
AnyPath = Annotated[str, Value(path, "PATH")]
TableFile = Annotated[str, Value(_table_file, "FILE")]  # exists
