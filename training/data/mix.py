"""Combine several data sets: the file of --dataset_mix, its repeats and weights."""

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from common.errors import UserError, described, listing
from common.remote import to_path
from common.stores import check_url, is_url
from common.text_files import read_json
from data.folder import COMPANIONS
from data.paths import expand_home, stays_inside
from data.sources import DataSource


_DATA_KEYS = ("data_root", "dataset_file", "dataset_name")  # they say which data an entry reads
_COMPANION_COLUMNS = tuple(f"{kind}_column" for kind in COMPANIONS)
_PATH_KEYS = (*_DATA_KEYS, "scores")


def read_mix(file: Path, defaults: DataSource) -> list[DataSource]:
    """Read the data sets of a --dataset_mix file, one per entry, with absolute paths; a bad entry is a `UserError`.

    Those for regularization come last, and have no id token.

    Args:
        file: JSON, an array of objects whose keys are fields of `DataSource`. Relative paths start from the file's own
            folder, ~/ is the home folder. A `dataset_file` may also be in its `data_root`. Paths must stay below the
            file's folder, unless `defaults` allow others.
        defaults: the flags, for fields that an entry omits, except which data it reads, its repeats and weight.
            Columns of controls and masks that are None are not read, whatever an entry names.
    """
    entries = [entry for _, entry in read_json(file)]
    if not entries:
        raise UserError(f"--dataset_mix {file} lists no data sets")
    for number, entry in enumerate(entries, 1):
        _check_entry(f"--dataset_mix {file}, entry {number}", entry)
    if not defaults.allow_outside_paths:
        _check_places(file, entries)
    training, regularization = partition(entries)
    for of_kind in (training, regularization):
        without = [entry for entry in of_kind if "weight" not in entry]
        if 0 < len(without) < len(of_kind):
            number = entries.index(without[0]) + 1
            raise UserError(
                f"--dataset_mix {file}, entry {number} has no weight; either all entries have one, or none"
            )
    if not training:
        raise UserError(f"--dataset_mix {file}: all entries are regularization; add the clips to train on")
    no_data = {"data_root": None, "dataset_file": None, "dataset_name": None, "dataset_config_name": None}
    blank = replace(defaults, **no_data, repeats=1.0, weight=None)
    folder = file.parent.absolute()
    # What the run does not read, because it has another task, or computes its controls.
    unread = {column: None for column in _COMPANION_COLUMNS if getattr(defaults, column) is None}
    sources = [replace(blank, **_with_paths(entry, folder) | unread) for entry in training]
    return sources + [replace(blank, id_token=None, **_with_paths(entry, folder) | unread) for entry in regularization]


def partition(entries: Iterable[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Return the entries to train on, and those for regularization."""
    kinds: tuple[list, list] = ([], [])
    for entry in entries:
        kinds[entry.get("regularization", False)].append(entry)
    return kinds


def _check_entry(where: str, entry: object) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {described(entry)}, not an object")
    known = [field.name for field in fields(DataSource) if field.name != "allow_outside_paths"]
    for key, value in entry.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1, 0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"it must be one of {', '.join(known)}"
            raise UserError(f"{where}: unknown key {key!r}; {hint}")
        _check_value(where, key, value)
    for first, second in (("repeats", "weight"), ("dataset_file", "dataset_name"), ("regularization", "id_token")):
        if entry.get(first) and second in entry:
            raise UserError(f"{where} has both {first!r} and {second!r}; omit one of them")
    if not entry.keys() & set(_DATA_KEYS):
        raise UserError(f"{where} names no data: add data_root, dataset_file or dataset_name")


def _check_value(where: str, key: str, value: object) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in ("dataset_streaming", "regularization", "caption_per_line"):
        fits, expected = isinstance(value, bool), "true or false"
    elif key in ("max_samples", "shuffle_tags"):
        fits, expected = is_number and isinstance(value, int) and value > 0, "a whole number above 0"
    elif key == "caption_dropout":
        fits, expected = is_number and 0 <= value <= 1, "a number from 0 to 1"
    elif key in ("repeats", "weight"):
        fits, expected = is_number and 1e-6 <= value <= 1e6, "a number from 0.000001 to 1000000"
    elif key == "mask_column" and value is None:  # reads no masks
        return
    else:
        fits, expected = isinstance(value, str) and value.strip(), "text"
    if not fits:
        raise UserError(f"{where}: {key!r} is {json.dumps(value)}; it must be {expected}")


def _check_places(file: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    folder = file.parent.absolute()
    outside = [
        f"entry {number}: {key!r} is {value}"
        for number, entry in enumerate(entries, 1)
        for key in _PATH_KEYS
        if (value := entry.get(key)) is not None
        # The name of a data set on the hub looks like a relative path inside.
        and (is_url(value) or not stays_inside(expand_home(value), folder, [folder]))
    ]
    if outside:
        title = (
            f"--dataset_mix {file}: data sets outside of the file's own folder; put it into a folder above them, or "
            "pass --allow_outside_paths if you trust it and what they list:"
        )
        raise UserError(listing(title, outside, most=len(outside)))


def _with_paths(entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    values = {key: expand_home(value) if key in _PATH_KEYS else value for key, value in entry.items()}
    urls = {key: to_path(values[key]) for key in _PATH_KEYS[:2] if is_url(values.get(key, ""))}
    for key, url in urls.items():
        check_url(f"--dataset_mix: {key}", str(url))
    for key in values.keys() & {"data_root", "scores"}:
        values[key] = folder / values[key]
    values |= urls
    if "dataset_file" in values and "dataset_file" not in urls:
        beside, below = (place / values["dataset_file"] for place in (folder, values.get("data_root", folder)))
        values["dataset_file"] = beside if os.path.isfile(beside) else below
    if "dataset_name" in values and os.path.isdir(folder / values["dataset_name"]):
        values["dataset_name"] = str(folder / values["dataset_name"])
    return values


def weights_to_repeats(sources: Sequence[DataSource], num_samples: Sequence[int]) -> list[float | None]:
    """Compute the repeats of each data set from its weight; None for data sets without a weight.

    A weight is a share of an epoch's samples, relative to the sum of all weights. The n samples of a data set of
    weight w repeat w / n times, scaled so that the least repeated data set comes exactly once per epoch.
    `num_samples` are the usable ones of each; `sources` all have a weight, or none. Data sets for regularization are
    apart: they are scaled only to one another, because the sampler scales their repeats.
    """
    counted = zip(sources, num_samples, strict=True)
    densities = [source.weight / count if source.weight and count else None for source, count in counted]
    kinds = [source.regularization for source in sources]
    least = {
        kind: min((density for density, of in zip(densities, kinds, strict=True) if density and of == kind), default=0)
        for kind in kinds
    }
    return [density and density / least[kind] for density, kind in zip(densities, kinds, strict=True)]
