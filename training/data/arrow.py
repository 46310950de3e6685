"""Read Parquet files and data sets of the `datasets` library.

Rows that may carry media are read one by one, so that only one video is in memory at a time.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute, parquet

from common.errors import UserError, one_line
from common.remote import RemotePath
from data.rows import Row, Table


_ROWS_AT_ONCE = 1000  # of tables without media
_LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType)


def read_parquet(file: Path) -> Table:
    """Read a Parquet file; a damaged one is a `UserError`, maybe only at its last row."""
    readable = file.open("rb") if isinstance(file, RemotePath) else file
    opened = _call(str(file), parquet.ParquetFile, readable, pre_buffer=False)
    schema = opened.schema_arrow
    batches = opened.iter_batches(batch_size=_rows_at_once(schema))
    rows = _rows(str(file), batches, f"{file.name}:row", opened.metadata.num_rows)
    return Table(str(file), schema.names, rows, file.parent)


def read_dataset(name: str, config_name: str | None, split: str, streaming: bool) -> Table:
    """Read a split of a data set of the `datasets` library, without running any code that comes with it.

    `name` is one on the hub, or a local folder of data files or written by `save_to_disk`; `streaming` reads row by
    row, without a copy on disk. Raises UserError if something does not exist or cannot be read.
    """
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    datasets.config.TORCH_AVAILABLE = False  # streaming imports torch, which takes seconds, only to subclass it
    where = f"--dataset_name {name}"
    folder = Path(name) if os.path.isdir(name) else None
    with _quiet(datasets):
        if folder and any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
            dataset = _load_saved(where, folder, split)
        else:
            # An absolute path, because "csv" or "text" would select the builder of that name.
            path = str(folder.resolve()) if folder else name
            dataset = _call(where, datasets.load_dataset, path, config_name, split=split, streaming=streaming)
        # Streamed data may have no column names until the first row is read.
        names = dataset.column_names or _call(where, lambda: list(next(iter(dataset), {})))
    # The Arrow format keeps videos and images as stored: bytes, paths or numbers.
    schema = dataset.features.arrow_schema if dataset.features else None
    batches = dataset.with_format("arrow").iter(batch_size=_rows_at_once(schema))
    config = datasets.config
    downloads = [Path(place) for place in (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)]
    return Table(where, names, _rows(where, batches, f"{name}:{split}:row"), folder, downloads)


def _load_saved(where: str, folder: Path, split: str) -> Any:
    from datasets import load_from_disk

    saved = _call(where, load_from_disk, str(folder))
    splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    if split not in splits:
        raise UserError(f"{where} has no split {split!r}; it has {', '.join(splits)}: set --dataset_split")
    return splits[split]


def _call(where: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return function(*arguments, **options)
    except Exception as error:  # five libraries read the files and the network, each with its own exceptions
        cause = f" ({one_line(error.__cause__)})" if error.__cause__ else ""
        raise UserError(f"{where} cannot be read: {one_line(error) or type(error).__name__}{cause}") from error


@contextmanager
def _quiet(datasets: ModuleType) -> Iterator[None]:
    """Hide progress bars and log lines of what we report ourselves. The hub's bars are restored for the models."""
    from huggingface_hub import utils

    shown = not utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bars()


def _rows_at_once(schema: pa.Schema | None) -> int:
    def may_be_large(kind: pa.DataType) -> bool:
        is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        return is_bytes or pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType)

    return 1 if schema is None or any(map(may_be_large, schema.types)) else _ROWS_AT_ONCE


def _rows(where: str, batches: Iterator[Any], place: str, num_rows: int | None = None) -> Iterator[Row]:
    """Yield the rows, then fail if there are fewer than `num_rows`: pyarrow skips damaged rows silently."""
    number = 0
    while (batch := _call(f"{where}, after row {number},", next, batches, None)) is not None:
        for index in range(batch.num_rows):
            number += 1
            values, problem = {}, None
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                try:
                    values[name] = _value(column[index])
                except (ValueError, OverflowError) as error:  # text that is not UTF-8, times beyond Python's
                    problem = f"has an unreadable value in column {name!r}: {one_line(error)}"
            yield Row(f"{place} {number}", values, problem)
    if num_rows not in (None, number):
        raise UserError(f"{where} is damaged: it should have {num_rows} rows, and {number} can be read")


def _value(scalar: pa.Scalar) -> Any:
    """Convert to a Python value, but lists of numbers (a decoded video) to an array, which is 100 times faster."""
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.ExtensionScalar):
        scalar = scalar.value
    array = _array(scalar.values) if isinstance(scalar.type, _LISTS) else None
    return scalar.as_py() if array is None else array


def _array(values: pa.Array) -> np.ndarray | None:
    """Return nested lists of numbers as an array; None if they are not numbers or differ in length."""
    shape = [len(values)]
    while isinstance(values.type, _LISTS):
        lengths = compute.list_value_length(values).unique().to_pylist()
        if len(lengths) != 1 or lengths[0] is None:
            return None
        shape.append(lengths[0])
        values = values.flatten()
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return None
    return values.to_numpy(zero_copy_only=False).reshape(shape)
