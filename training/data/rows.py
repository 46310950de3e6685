"""Rows of values by column, which every list of clips is read into."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One row, with the values that could be read."""

    source: str  # where it is listed, for messages: "table.csv:3"
    values: Mapping[str, Any]
    problem: str | None = None  # why it cannot be used, worded as an `UnusableRow`


@dataclass(frozen=True)
class Table:
    """A list of clips, read row by row."""

    where: str  # for messages
    names: Sequence[str]  # of its columns
    rows: Iterator[Row]
    folder: Path | None  # start of relative paths without --data_root; None if there is none
    filled: Sequence[Path] = ()  # folders that its files were downloaded to


class UnusableRow(Exception):
    """A row that cannot be used. The message ends a sentence that starts with the clip: "has no caption"."""
