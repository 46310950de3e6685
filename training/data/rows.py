"""What every list of clips is read into, whatever its format: rows of values by column."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """The values of one row, as far as they could be read."""

    source: str  # where it is listed, for messages: "table.csv:3"
    values: Mapping[str, Any]
    problem: str | None = None  # why it cannot be used, as an `UnusableRow` says it


@dataclass(frozen=True)
class Table:
    """A list of clips, read row by row."""

    where: str  # for messages
    names: Sequence[str]  # of its columns
    rows: Iterator[Row]
    folder: Path | None  # where relative paths start, unless --data_root says so; None: there is no such folder
    filled: Sequence[Path] = ()  # folders that its files were downloaded to when it was opened


class UnusableRow(Exception):
    """What is wrong with one row, as the end of a sentence that starts with the clip: "has no caption"."""
