"""The index of a prepared folder: one row per sample, in an Arrow file that all processes map into memory.

A sample becomes an object when it is read; buckets and repeats are arrays. `prepared.folder` documents the folder.

| column | content |
|---|---|
| name | of the sample, as in its tensors' names |
| latents, prompt_embeds | files of its tensors, below the folder |
| image_latents, control_latents, mask | likewise; may be null, and older indexes lack the last two |
| caption_key | the name of its prompt embedding in the shard; null if each tensor has a file of its own |
| num_frames, height, width | its bucket |
| repeats | times that it comes in an epoch |
| caption, source, clip | its caption, where it was listed, and the file |
| first_frame, last_frame | frame numbers in the file, from 0 |
| extra | the other columns of its list, as JSON |
| content | `content_digest` of its file; older indexes lack it |
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute

from common.errors import UserError, one_line
from common.files import atomic_write
from common.remote import at_hand
from data.buckets import Bucket, BucketColumn
from prepared.folder import INDEX_FILE, OLDER_INDEX, STAGING, StoredTensor


LARGEST_SIZE = 2**16 - 1  # of a bucket, in frames or pixels
_TEXT, _FILE = pa.large_string(), pa.dictionary(pa.int32(), pa.large_string())
TRAINED = pa.schema(  # the columns that training reads
    [
        ("name", _TEXT),
        ("latents", _FILE),
        ("prompt_embeds", _FILE),
        ("image_latents", _FILE),
        ("caption_key", _TEXT),
        ("num_frames", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("repeats", pa.float64()),
        ("control_latents", _FILE),
        ("mask", _FILE),
    ]
)
_ORIGIN = [("caption", _TEXT), ("source", _TEXT), ("clip", _TEXT)]
_ORIGIN += [("first_frame", pa.int32()), ("last_frame", pa.int32()), ("extra", _TEXT), ("content", _TEXT)]
_SCHEMA = pa.schema([*TRAINED, *_ORIGIN])
_CAPTIONS = pa.schema([_SCHEMA.field("caption")])
_CAPTIONED = pa.schema([_SCHEMA.field(name) for name in ("caption", "clip", "first_frame", "last_frame")])
IDENTITY = pa.schema([_SCHEMA.field(name) for name in ("name", "source", "clip", "content")])
ORIGIN = pa.schema([_SCHEMA.field(name) for name in ("name", "clip", "first_frame", "last_frame", "content")])
_DESCRIBED = pa.schema([_SCHEMA.field("name"), _SCHEMA.field("caption_key")])
OPTIONAL = ("image_latents", "control_latents", "mask")
_ROWS_AT_ONCE = 2**14


@dataclass(frozen=True)
class PreparedClip:
    """One sample of a prepared folder."""

    name: str
    bucket: Bucket
    video_latents: StoredTensor  # [2C, F', H / 8, W / 8]
    prompt_embeds: StoredTensor  # [226, D]
    image_latents: StoredTensor | None = None  # [K, 2C, M, H / 8, W / 8], or without K
    repeats: float = 1.0
    control_latents: StoredTensor | None = None  # [2C, F', H / 8, W / 8]
    mask: StoredTensor | None = None  # [F', H / 8, W / 8]


@dataclass(frozen=True, eq=False)
class IndexedFolder:
    """The samples of one prepared folder. Pickled, it is the name of its file, which is mapped again."""

    folder: Path
    table: pa.Table  # the columns that training reads, each in one piece
    file: Path | None = None  # that the table is mapped from; None for one in memory
    times: float = 1.0  # factor of the samples' own repeats
    fixed: float | None = None  # the repeats of every sample instead
    regularization: bool = False  # the samples are what the model should keep doing
    caption_dropout: float | None = None  # probability of no caption; None: that of the flag

    def __reduce__(self) -> tuple[Any, ...]:
        table = self.table if self.file is None else None
        facts = (self.times, self.fixed, self.regularization, self.caption_dropout)
        return _restore, (self.folder, table, self.file, *facts)

    def column(self, name: str) -> pa.Array:
        """Return a column."""
        return self.table.column(name).chunk(0)

    def mapped_again(self, schema: pa.Schema) -> pa.Table:
        """Return columns that are read once: their pages do not stay in this process."""
        return self.table.select(schema.names) if self.file is None else map_table(self.file, schema)

    def numbers(self, name: str) -> np.ndarray:
        """Return a column of numbers, `[N]`, which is not copied."""
        return np.from_dlpack(self.column(name))  # Array.to_numpy imports pandas, which takes half a second

    def files(self, name: str) -> list[str]:
        """Return the distinct files in a column of files."""
        column = self.column(name)
        return column.dictionary.take(column.indices.unique().drop_null()).to_pylist()

    def rows_with(self, name: str, files: Sequence[str]) -> pa.Array:
        """Return the numbers of the rows that have one of the files in a column of files."""
        column = self.column(name)
        is_one = compute.is_in(column.dictionary, pa.array(files, _TEXT))
        return compute.indices_nonzero(is_one.take(column.indices))

    @property
    def repeats(self) -> np.ndarray:
        """How often each sample comes in an epoch, `[N]`."""
        own = self.numbers("repeats")
        return (
            np.full(len(own), self.fixed) if self.fixed is not None else own if self.times == 1 else own * self.times
        )

    def clip(self, row: int) -> PreparedClip:
        """Return a sample."""
        (facts,) = self.table.slice(row, 1).to_pylist()
        name, key = facts["name"], facts["caption_key"]
        bucket = Bucket(*(facts[side] for side in Bucket._fields))
        shape, image, control, mask = bucket.latent_shape, *(facts[name] for name in OPTIONAL)
        images = () if key is None else (None,)  # shards have several encodings of an image

        def stored(file: str, tensor: str, *axes: int | None) -> StoredTensor:
            return StoredTensor(self.folder / file, None if key is None else tensor, axes)

        return PreparedClip(
            name,
            bucket,
            stored(facts["latents"], f"{name}.video_latents", None, *shape),
            stored(facts["prompt_embeds"], f"{key}.prompt_embeds", None, None),
            None if image is None else stored(image, f"{name}.image_latents", *images, None, None, *shape[1:]),
            self.fixed if self.fixed is not None else facts["repeats"] * self.times,
            None if control is None else stored(control, f"{name}.control_latents", None, *shape),
            # The loss of regularization counts everywhere.
            None if mask is None or self.regularization else stored(mask, f"{name}.mask", *shape),
        )


def _restore(folder: Path, table: pa.Table | None, file: Path, *facts: float | None) -> IndexedFolder:
    return IndexedFolder(folder, map_table(file, TRAINED) if table is None else table, file, *facts)


class PreparedIndex(Sequence[PreparedClip]):
    """The samples of one or more prepared folders, except those of the row numbers `without` over all folders."""

    def __init__(self, folders: Sequence[IndexedFolder], without: Sequence[int] = ()):
        self.folders, self.omitted = tuple(folders), np.unique(np.asarray(without, np.int64))
        self._ends = np.cumsum([folder.table.num_rows for folder in folders]).tolist()

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedIndex, (self.folders, self.omitted)

    def __len__(self) -> int:
        return self._ends[-1] - len(self.omitted)

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """Return the row numbers of samples over all folders."""
        return samples + np.searchsorted(self.omitted - np.arange(len(self.omitted)), samples, side="right")

    def __getitem__(self, index: int) -> PreparedClip:
        row = int(self.rows(np.asarray(range(len(self))[index])))
        number = bisect_right(self._ends, row)
        folder = self.folders[number]
        return folder.clip(row - (self._ends[number] - folder.table.num_rows))

    @cached_property
    def buckets(self) -> BucketColumn:
        """The bucket of each sample."""
        columns = (_join([folder.numbers(side) for folder in self.folders]) for side in Bucket._fields)
        frames, heights, widths = (column.astype(np.int64) for column in columns)
        sizes = self.without_omitted(frames << 32 | heights << 16 | widths)
        kinds, codes = np.unique(sizes, return_inverse=True)
        return BucketColumn(
            [Bucket(kind >> 32, kind >> 16 & LARGEST_SIZE, kind & LARGEST_SIZE) for kind in kinds.tolist()],
            codes.astype(np.int32),
        )

    @cached_property
    def repeats(self) -> np.ndarray:
        """How often each sample comes in an epoch, `[N]`."""
        return self.without_omitted(_join([folder.repeats for folder in self.folders]))

    def without_omitted(self, rows: np.ndarray) -> np.ndarray:
        """Return the values of the samples among those of all rows."""
        return np.delete(rows, self.omitted) if len(self.omitted) else rows  # not copied

    def without(self, tensor: str) -> list[str]:
        """Return the names of the samples that have no "image_latents", "control_latents" or "mask"."""
        folders = ((folder.column("name"), folder.column(tensor)) for folder in self.folders)
        return [name for names, files in folders for name in names.filter(files.is_null()).to_pylist()]

    @cached_property
    def regularization(self) -> np.ndarray | None:
        """Which samples are for regularization, `[N]`; None if none of them is."""
        of_folders = [np.full(folder.table.num_rows, folder.regularization) for folder in self.folders]
        is_any = any(folder.regularization for folder in self.folders)
        return self.without_omitted(_join(of_folders)) if is_any else None

    @cached_property
    def num_captions(self) -> np.ndarray | None:
        """How many samples next to each other are of one clip with several captions, `[N]`; None for one each."""
        if not (self.repeats % 1).any():  # they come less often than once
            return None
        runs = [_runs(folder.column("name")) for folder in self.folders]
        counts = self.without_omitted(np.concatenate([np.repeat(of_folder, of_folder) for of_folder in runs]))
        return counts if (counts > 1).any() else None

    @property
    def captions(self) -> pa.Array:
        """The distinct captions, in their order."""
        columns = [folder.mapped_again(_CAPTIONS).column("caption") for folder in self.folders]
        captions = pa.chunked_array([chunk for column in columns for chunk in column.chunks]).unique()
        return captions.filter(compute.greater(compute.binary_length(captions), 0))

    def origin_of(self, caption: str) -> tuple[str, int, int] | None:
        """Return the file that the first sample with a caption was made of, with its first and last frame; or None."""
        start = 0
        for folder in self.folders:
            table = folder.mapped_again(_CAPTIONED)
            rows = compute.indices_nonzero(compute.equal(table.column("caption"), caption)).to_pylist()
            for row in (row for row in rows if start + row not in self.omitted):
                origin = tuple(table.slice(row, 1).to_pylist()[0].values())[1:]
                return None if None in origin else origin
            start += table.num_rows
        return None

    def take(self, samples: Sequence[int]) -> "PreparedIndex":
        """Return some of the samples, in memory, once per epoch each; those of a folder stay in their order."""
        rows, folders, start = self.rows(np.asarray(samples)), [], 0
        for folder, end in zip(self.folders, self._ends, strict=True):
            own = rows[(rows >= start) & (rows < end)] - start
            if len(own):
                table = folder.table.take(own).combine_chunks()
                folders.append(IndexedFolder(folder.folder, table, fixed=1.0))
            start = end
        return PreparedIndex(folders)

    def omit(self, samples: np.ndarray) -> "PreparedIndex":
        """Return all other samples, which are still those of the mapped files."""
        return PreparedIndex(self.folders, [*self.omitted.tolist(), *self.rows(samples).tolist()])

    def with_facts(self, **facts: float | bool | None) -> "PreparedIndex":
        """Return the samples with other facts of their folders, such as the repeats."""
        return PreparedIndex([replace(folder, **facts) for folder in self.folders], self.omitted)

    def without_regularization(self) -> "PreparedIndex":
        """Return the samples of the folders that are not for regularization."""
        kept = [not folder.regularization for folder in self.folders]
        of_folders = np.repeat(kept, [folder.table.num_rows for folder in self.folders])
        omitted = (np.cumsum(of_folders) - 1)[self.omitted[of_folders[self.omitted]]]
        return PreparedIndex([folder for folder in self.folders if not folder.regularization], omitted)

    def describe(self) -> Iterator[str]:
        """Yield a line for each sample that changes with its content, not with its path.

        Runs of earlier versions, whose checkpoints have a digest of the lines, wrote the `repr` of a tuple.
        """
        kinds, row, sample = list(map(repr, self.buckets.kinds)), 0, 0
        for folder in self.folders:
            for batch in folder.mapped_again(_DESCRIBED).to_batches(max_chunksize=_ROWS_AT_ONCE):
                omitted = self.omitted[(self.omitted >= row) & (self.omitted < row + batch.num_rows)] - row
                kept = np.delete(np.arange(batch.num_rows), omitted)
                samples = slice(sample, sample + len(kept))
                numbers = (self.buckets.codes[samples].tolist(), self.repeats[samples].tolist())
                facts = (*(column.take(pa.array(kept)).to_pylist() for column in batch.columns), *numbers)
                for name, key, kind, repeats in zip(*facts, strict=True):
                    tensor = None if key is None else f"{key}.prompt_embeds"
                    line = f"({name!r}, {tensor!r}, {kinds[kind]}, {repeats!r})"
                    yield f"{line} for regularization" if folder.regularization else line
                row, sample = row + batch.num_rows, samples.stop


def _runs(column: pa.Array) -> np.ndarray:
    """Return how often each value comes in a row."""
    differs = compute.not_equal(column[1:], column[:-1]).cast(pa.int8())
    starts = np.flatnonzero(np.append(1, np.from_dlpack(differs)))
    return np.diff(np.append(starts, len(column)))


def _join(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]  # not copied


def write_index(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the index of a folder whose tensors are in shards; that of an older version is removed."""
    table = make_table(rows)
    (folder / OLDER_INDEX).unlink(missing_ok=True)  # first, because it overrides the new one
    files = {file for name in ("latents", "prompt_embeds") for file in table.column(name).unique().to_pylist()}
    num_bytes = {file: (folder / file).stat().st_size for file in sorted(files)}
    write_table(table, folder / INDEX_FILE, {"bytes": num_bytes}, staging=folder / STAGING)


def make_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Return rows as columns, each in one piece."""
    rows = iter(rows)
    chunks = iter(lambda: list(islice(rows, _ROWS_AT_ONCE)), [])
    table = pa.Table.from_batches([pa.RecordBatch.from_pylist(chunk, _SCHEMA) for chunk in chunks], _SCHEMA)
    return table.unify_dictionaries().combine_chunks()


def write_table(table: pa.Table, file: Path, notes: Mapping[str, Any], staging: Path | None = None) -> None:
    """Write an index with notes for those who read it."""
    schema = _SCHEMA.with_metadata({name: json.dumps(note) for name, note in notes.items()})
    with atomic_write(file, staging) as partial, pa.ipc.new_file(str(partial), schema) as writer:
        writer.write_table(table)


def _open_table(file: Path, names: Sequence[str]) -> pa.Table:
    with at_hand(file) as local:  # what is mapped stays, even if the cache removes the file
        table = pa.ipc.open_file(pa.memory_map(str(local))).read_all()
    for name in {*OPTIONAL[1:], "content"}.difference(table.column_names):  # of an older version
        table = table.append_column(_SCHEMA.field(name), pa.nulls(table.num_rows, _SCHEMA.field(name).type))
    return table.select(names)


def map_table(file: Path, schema: pa.Schema) -> pa.Table:
    """Map columns of an index into memory; a damaged file is a UserError."""
    try:
        _open_table(file, schema.names).validate(full=True)  # offsets in a damaged file lead outside of it
        table = _open_table(file, schema.names)  # again, so that the pages of all rows do not stay in this process
        return table.cast(schema.with_metadata(table.schema.metadata)).combine_chunks()
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"--load_tensors: {file} cannot be read as an index ({one_line(error, 300)}); remove it and prepare the "
            "data again"
        ) from error


def read_note(table: pa.Table, name: str) -> dict[str, Any]:
    """Return a note that an index was written with; empty if it has none."""
    with suppress(ValueError):
        note = json.loads((table.schema.metadata or {}).get(name.encode(), b"{}"))
        return note if isinstance(note, dict) else {}
    return {}
