"""The source of a list of clips, and the rows of values by column that every list is read into."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DataSource:
    """A data set as set by the flags or an entry of --dataset_mix."""

    data_root: Path | None  # start of relative paths; without a file or name: the folder of the lists or clips
    dataset_file: Path | None = None  # a table: .csv .tsv .jsonl .json .parquet
    dataset_name: str | None = None  # for datasets.load_dataset: a name on the hub, or a local folder
    dataset_config_name: str | None = None
    dataset_split: str = "train"
    dataset_streaming: bool = False  # read row by row, without a copy of the data set on disk
    max_samples: int | None = None  # only the first N rows, unusable ones included
    video_column: str = "video"  # the column of paths or media, or the text file of paths
    caption_column: str = "caption"
    image_column: str | None = None  # None: "image", "images" or images.txt if it exists
    control_column: str | None = None  # None reads no controls
    mask_column: str | None = None  # None reads no masks
    caption_per_line: bool = False  # each line of a caption is a caption of its own
    shuffle_tags: int | None = None  # orders of a caption's comma-separated tags
    caption_dropout: float | None = None  # probability of no caption; None: that of the flag
    id_token: str | None = None  # added before every caption, with a space
    repeats: float = 1.0  # times that each clip comes in an epoch
    weight: float | None = None  # instead of repeats: share of an epoch's samples, relative to other data sets
    regularization: bool = False  # what the model should keep doing: without id token, in batches of their own
    keep: str | None = None  # a condition on scores, as for `planning.keep`; None keeps all clips
    scores: Path | None = None  # the table of scores; None: where score_clips.py writes it
    allow_outside_paths: bool = False  # listed paths may lead out of the named folders; only from the flags

    @property
    def folder(self) -> Path | None:
        """The folder that relative paths of clips start from, and that tables about them are written to, if any."""
        if self.data_root is not None:
            return self.data_root
        if self.dataset_file is not None:
            return self.dataset_file.parent
        return Path(self.dataset_name) if self.dataset_name and os.path.isdir(self.dataset_name) else None


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
