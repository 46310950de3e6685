"""Read the index of a prepared folder, possibly a stranger's, from its columns or from lines of JSON.

An entry is a sample as JSON: the files of its tensors, its bucket ("metadata"), and where it comes from. Preparation
makes entries; folders of older versions and of the original script list them in their index.
"""

import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, listing
from common.ranks import launch_rank
from common.remote import RemotePath, forget_states, is_file
from common.text_files import read_lines
from data.buckets import Bucket
from data.paths import stays_inside
from prepared.folder import FILES_INDEX, INDEX_FILE, LISTS, OLDER_INDEX, SETTINGS_FILE, StoredTensor, read_tensor
from prepared.index import (
    LARGEST_SIZE,
    OPTIONAL,
    TRAINED,
    IndexedFolder,
    PreparedIndex,
    make_table,
    map_table,
    read_note,
    write_table,
)
from prepared.tensor_files import names_in


logger = logging.getLogger(__name__)

_FILES = ("latents", "prompt_embeds", "image_latents", "control_latents", "mask")
_IN_SHARDS = (("latents", "name", "video_latents"), ("prompt_embeds", "caption_key", "prompt_embeds"))
_ORIGINAL_FILES = (FILES_INDEX, *LISTS, "video_latents", "image_latents")  # what its samples are found by

Entry = Mapping[str, Any]
Row = dict[str, Any]


def sample_in_shards(
    folder: Path,
    name: str,
    latents: Path,
    embeds: Path,
    caption_key: str,
    bucket: Bucket,
    *,
    with_images: bool,
    with_controls: bool = False,
    with_masks: bool = False,
) -> dict[str, Any]:
    """Return the entry of a sample whose tensors are in these two shards."""
    return {
        "name": name,
        "latents": latents.relative_to(folder).as_posix(),
        "prompt_embeds": embeds.relative_to(folder).as_posix(),
        "caption_key": caption_key,
        "with_image": with_images,
        "with_control": with_controls,
        "with_mask": with_masks,
        "metadata": bucket._asdict(),
    }


def sample_in_files(name: str, bucket: Bucket, *, with_images: bool) -> dict[str, Any]:
    """Return the entry of a sample with one file per tensor."""
    images = {"image": f"images/{name}.png", "image_latent": f"image_latents/{name}.pt"} if with_images else {}
    return {
        "prompt": f"prompts/{name}.txt",
        "prompt_embed": f"prompt_embeds/{name}.pt",
        "video": f"videos/{name}.mp4",
        "video_latent": f"video_latents/{name}.pt",
        **images,
        "metadata": bucket._asdict(),
    }


def row_in_shards(entry: Entry) -> Row:
    """Return the row of an entry; raises ValueError, KeyError or TypeError and the like if it is damaged."""
    latents = _text(entry["latents"])
    return {
        "name": _text(entry["name"]),
        "latents": latents,
        "prompt_embeds": _text(entry["prompt_embeds"]),
        "image_latents": latents if entry["with_image"] else None,
        "caption_key": _text(entry["caption_key"]),
        "control_latents": latents if entry.get("with_control") else None,
        "mask": latents if entry.get("with_mask") else None,
        **_facts(entry),
    }


def row_in_files(entry: Entry) -> Row:
    """Do the same for a sample with one file per tensor, named after its latents."""
    latents, image = _text(entry["video_latent"]), entry.get("image_latent")
    return {
        "name": Path(latents).stem,
        "latents": latents,
        "prompt_embeds": _text(entry["prompt_embed"]),
        "image_latents": _text(image) if image else None,
        "caption_key": None,
        "control_latents": None,
        "mask": None,
        **_facts(entry),
    }


def _facts(entry: Entry) -> Row:
    sizes = {name: int(entry["metadata"][name]) for name in Bucket._fields}
    repeats, (first, last) = float(entry.get("repeats", 1.0)), entry.get("frames", (None, None))
    if not all(1 <= size <= LARGEST_SIZE for size in sizes.values()) or not 0 < repeats < math.inf:
        raise ValueError(_range_problem(Bucket(**sizes), repeats))
    texts = {name: _readable(entry.get(name)) for name in ("caption", "source", "clip", "content")}
    extra = json.dumps(entry["extra"], ensure_ascii=False) if entry.get("extra") else None
    return {
        **sizes,
        "repeats": repeats,
        **texts,
        "first_frame": None if first is None else int(first),
        "last_frame": None if last is None else int(last),
        "extra": _readable(extra),
    }


def _range_problem(bucket: Bucket, repeats: float) -> str:
    return f"its size is {bucket} and its repeats {repeats}; they must be above 0, and sizes up to {LARGEST_SIZE}"


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    value.encode()  # raises a ValueError for halves of characters, which columns cannot hold
    return value


def _readable(value: object) -> str | None:
    """Return text for people to read; the name of a file need not be UTF-8."""
    return None if value is None else str(value).encode("utf-8", "backslashreplace").decode()


def _older_state(folder: Path) -> dict[str, list[int]]:
    """Return size and modification time of the files that list a folder's samples if its index is lines of JSON.

    Empty for a folder whose only index is the one that preparation writes now.
    """
    if (folder / OLDER_INDEX).is_file():
        names = (OLDER_INDEX,)
    elif (folder / SETTINGS_FILE).is_file():
        names = (FILES_INDEX,)
    else:
        names = _ORIGINAL_FILES if any((folder / name).exists() for name in (FILES_INDEX, "video_latents")) else ()
    found = {name: (folder / name).stat() for name in names if (folder / name).exists()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def _read_older(folder: Path) -> Iterator[Row]:
    """Read the samples of a folder whose index is lines of JSON; a damaged line is a UserError that names it."""
    if (folder / OLDER_INDEX).is_file():
        return _read_rows(folder / OLDER_INDEX, row_in_shards)
    if (folder / SETTINGS_FILE).is_file():
        return _read_rows(folder / FILES_INDEX, row_in_files)
    return _read_original(folder)


def _read_rows(path: Path, to_row: Callable[[Entry], Row], *, skip_damaged: bool = False) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = to_row(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                if skip_damaged:
                    continue
                problem = f"it has no {error}" if isinstance(error, KeyError) else error
                raise UserError(
                    f"{path}:{number}: not a prepared clip ({problem}); run prepare_dataset.sh again"
                ) from error
            yield row


def _read_original(folder: Path) -> Iterator[Row]:
    """List the samples of a folder of the original script as its training did: by videos.txt, or else all latents.

    Its data.jsonl tells their sizes, but is empty or cut where the script failed on its last lines. It names image
    latents even if none were saved, and captions are only in prompts.txt.
    """
    index, (prompts, videos) = folder / FILES_INDEX, (folder / name for name in LISTS)
    indexed = _read_rows(index, row_in_files, skip_damaged=True) if index.is_file() else ()
    rows = {row["name"]: row for row in indexed}
    stored = sorted(path.stem for path in (folder / "video_latents").glob("[!.]*.pt"))
    names = list(dict.fromkeys([*rows, *stored]))
    if stored and videos.is_file():
        names = [Path(line).stem for line in read_lines(videos) if line]
    unindexed = {name: folder / "video_latents" / f"{name}.pt" for name in names if name not in rows}
    missing = [str(path) for path in unindexed.values() if not os.path.isfile(path)]
    if missing:
        raise UserError(_missing_files(folder, missing))
    if index.is_file() and unindexed and launch_rank() == 0:
        logger.warning("warning: %s lacks %d of the %d samples; they are used too", index, len(unindexed), len(names))
    rows |= {name: _row_of_latents(folder, path) for name, path in unindexed.items()}
    captions = [line for line in read_lines(prompts) if line] if prompts.is_file() else []
    if len(captions) != len(names):
        captions = [None] * len(names)
    for name, caption in zip(names, captions, strict=True):
        image = rows[name]["image_latents"]
        has_image = image and os.path.isfile(folder / image)  # Path.is_file raises on a name that is too long
        yield rows[name] | {"image_latents": image if has_image else None, "caption": rows[name]["caption"] or caption}


def _missing_files(folder: Path, missing: Sequence[str]) -> str:
    return listing(f"--load_tensors: {len(missing)} files of {folder} are missing:", missing)


def _row_of_latents(folder: Path, path: Path) -> Row:
    with_images = (folder / "image_latents" / path.name).is_file()
    try:
        _, frames, height, width = read_tensor(StoredTensor(path)).shape
        bucket = Bucket((frames - 1) * 4 + 1, height * 8, width * 8)
        return row_in_files(sample_in_files(path.stem, bucket, with_images=with_images))
    except ValueError as error:
        raise UserError(f"--load_tensors: {path} has no latents of a video ({error}); remove it") from error


def read_index(folder: Path, *, allow_outside_paths: bool = False) -> PreparedIndex:
    """Map the index of a prepared folder, possibly a stranger's, and check that the files of all tensors exist.

    Lines of JSON are converted once, and again when they have changed. A shard with the size that it had when the
    index was written has the tensors that it had then; in others they are looked up.

    Raises UserError if the preparation was not finished, files are missing, or the index leads out of the folder
    without `allow_outside_paths`.
    """
    if isinstance(folder, RemotePath):
        folder.list_files(remember=True)  # one request, for what is asked about the files below
    file, older = folder / INDEX_FILE, _older_state(folder)
    table = map_table(file, TRAINED) if file.is_file() else None
    is_older = bool(older) and (table is None or read_note(table, "older") != older)
    if is_older:
        table = make_table(_read_older(folder))
    elif table is None and (folder / SETTINGS_FILE).is_file():
        raise UserError(
            f"--load_tensors: the preparation of {folder} was not finished (there is no {INDEX_FILE}); run it again: "
            "it does only what is missing"
        )
    if not table:
        raise UserError(
            f"--load_tensors: {folder} has no prepared data (no {INDEX_FILE}, no {FILES_INDEX} and no "
            "video_latents/*.pt); run prepare_dataset.sh first and pass its --output_dir as --data_root, or omit "
            "--load_tensors"
        )
    index = IndexedFolder(folder, table, None if is_older else file)
    _check_rows(index)
    if not allow_outside_paths:
        _check_places(index)
    num_bytes = _check_files(index)
    forget_states()
    if is_older and not isinstance(folder, RemotePath):
        with suppress(UserError):  # the folder is only for reading: this process keeps the columns in its memory
            write_table(table, file, {"older": older, "bytes": num_bytes})
            index = IndexedFolder(folder, map_table(file, TRAINED), file)
    return PreparedIndex([index])


def _check_rows(index: IndexedFolder) -> None:
    """Check that all samples have the values that training needs, in their ranges."""
    file, keys = index.folder / INDEX_FILE, index.column("caption_key")
    values = [name for name in TRAINED.names if name not in (*OPTIONAL, "caption_key")]
    empty = [name for name in values if index.column(name).null_count]
    empty += ["caption_key"] if keys.null_count not in (0, len(keys)) else []
    empty += [name for name in _FILES if None in index.files(name)]
    if empty:
        raise UserError(
            f"--load_tensors: {file} has no {' and no '.join(empty)} for some samples; prepare the data again"
        )
    sizes, repeats = [index.numbers(side) for side in Bucket._fields], index.repeats
    fits = (repeats > 0) & (repeats < np.inf)
    for side in sizes:
        fits &= (side >= 1) & (side <= LARGEST_SIZE)
    if not fits.all():
        row = int(np.argmin(fits))
        problem = _range_problem(Bucket(*(side[row].item() for side in sizes)), repeats[row].item())
        raise UserError(f"--load_tensors: {file}: {_sample(index, row)}: {problem}; prepare the data again")


def _check_places(index: IndexedFolder) -> None:
    """Check that all files are inside the folder."""
    outside = set()
    for name in _FILES:
        bad = [file for file in index.files(name) if not stays_inside(file, index.folder, [index.folder])]
        rows = index.rows_with(name, bad).to_pylist() if bad else []
        outside |= {(row, index.column(name)[row].as_py()) for row in rows}
    if outside:
        title = (
            f"--load_tensors: the index of {index.folder} names {len(outside)} files outside of its folder; prepare "
            "the data again, or pass --allow_outside_paths if you trust its author:"
        )
        lines = [f"{_sample(index, row)}: {file}" for row, file in sorted(outside)]
        raise UserError(listing(title, lines, most=len(lines)))


def _check_files(index: IndexedFolder) -> dict[str, int]:
    """Check that the tensors of all samples exist; return the bytes of each shard."""
    known, num_bytes, missing = read_note(index.table, "bytes"), {}, []
    if index.column("caption_key").null_count:
        paths = [index.folder / file for name in _FILES for file in index.files(name)]
        missing = [str(path) for path in paths if not is_file(path)]
    else:
        for name, key, tensor in _IN_SHARDS:
            sizes = {file: _file_size(index.folder / file) for file in index.files(name)}
            unsure = [file for file, size in sizes.items() if size is None or known.get(file) != size]
            wanted = defaultdict(set)
            if unsure:
                rows = index.rows_with(name, unsure)
                columns = (index.column(one).take(rows).to_pylist() for one in (name, key))
                for file, one in zip(*columns, strict=True):
                    wanted[file].add(one)
            for file, names in wanted.items():
                path = index.folder / file
                if sizes[file] is None:
                    missing.append(str(path))
                else:
                    missing += [f"{path} ({one}.{tensor})" for one in names.difference(names_in(path))]
            num_bytes |= sizes
    if missing:
        raise UserError(_missing_files(index.folder, sorted(missing)))
    return num_bytes


def _file_size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # it is missing, or its name is too long or has a null character
        return None


def _sample(index: IndexedFolder, row: int) -> str:
    return f"sample {row + 1} ({index.column('name')[row].as_py()})"
