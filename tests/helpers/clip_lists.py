"""Write lists of clips in every format, and read them as training does."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from data.clips import BadClip, Clip
from data.sources import DataSource, read_clips


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        write(folder / name, b"")


def write_lists(folder: Path, **lists: bytes | str) -> None:
    """Write text files by their names: videos="a.mp4" is the content of videos.txt."""
    for name, content in lists.items():
        write(folder / f"{name}.txt", content)


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    """Write a table of text with the library of the format that the suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(data_root: Path | None, *, cache: Path | None = None, **source) -> tuple[list[Clip], list[BadClip]]:
    """Read the clips and bad clips of a source with captions in column "text"."""
    source = DataSource(data_root, **{"caption_column": "text"} | source)
    return read_clips(source, cache or Path("/nowhere/written"))


def good(*arguments, **options) -> list[Clip]:
    clips, bad_clips = read(*arguments, **options)
    assert bad_clips == []
    return clips


def bad(*arguments, **options) -> list[str]:
    return [str(clip) for clip in read(*arguments, **options)[1]]


def error_of(*arguments, **options) -> str:
    with pytest.raises(UserError) as raised:
        read(*arguments, **options)
    return str(raised.value)


def captions(clips: Sequence[Clip]) -> list[str]:
    return [clip.caption for clip in clips]
