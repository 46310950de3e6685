"""The on-disk format of prepared data: latent moments, prompt embeddings, and the index of samples.

The default, tensors of many samples in a file (`--layout shards`):

    <folder>/prepared.json                       encoders, precision and flags of the preparation
    <folder>/index.jsonl                         one object per sample: its shards, bucket, caption and source
    <folder>/latents/<digest>.safetensors        <name>.video_latents  [2C, F', H / 8, W / 8], the VAE's moments, and
                                                 <name>.image_latents  [K, 2C, 1, H / 8, W / 8] (image-to-video)
    <folder>/prompt_embeds/<digest>.safetensors  <caption's digest>.prompt_embeds  [226, D]
    <folder>/empty_prompt.safetensors            prompt_embeds  [226, D], of the empty prompt: for caption dropout

One file per tensor (`--layout files`), as the original `prepare_dataset.py` wrote it. Its folders can also be loaded:
they lack `prepared.json` and `empty_prompt.safetensors`, and their `data.jsonl` may be incomplete.

    <folder>/data.jsonl                  one object per clip: its files, and {num_frames, height, width}
    <folder>/prompts.txt, videos.txt     the same clips as a plain list
    <folder>/video_latents/<name>.pt     [2C, F', H / 8, W / 8]
    <folder>/prompt_embeds/<name>.pt     [226, D]
    <folder>/videos/<name>.mp4           the clip as the model sees it
    <folder>/prompts/<name>.txt
    <folder>/images/<name>.png           its first frame, and
    <folder>/image_latents/<name>.pt     that frame's moments, [2C, 1, H / 8, W / 8] (image-to-video)
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError, first_line, listing
from common.files import atomic_write
from common.ranks import launch_rank
from common.remote import RemotePath, at_hand
from common.stores import StoreError
from common.text_files import read_json, read_lines
from data.buckets import Bucket
from data.paths import stays_inside
from data.tensor_files import finished_names, save_tensors


if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SETTINGS_FILE = "prepared.json"
INDEX_FILE = "index.jsonl"
FILES_INDEX = "data.jsonl"
LISTS = ("prompts.txt", "videos.txt")
EMPTY_PROMPT_FILE = "empty_prompt.safetensors"
STAGING = ".staging"
_COMPARED_SETTINGS = ("layout", "dtype", "max_sequence_length", "tiling")
# Of an index: what leads to files.
_PATH_KEYS = ("latents", "prompt_embeds", "video_latent", "prompt_embed", "image_latent")


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor on disk."""

    file: Path
    key: str | None = None  # in a safetensors file; None for a .pt file with only this tensor
    shape: tuple[int | None, ...] = ()  # expected, None for an axis of any length; () for any shape


@dataclass(frozen=True)
class PreparedClip:
    """One sample of a prepared folder."""

    name: str
    bucket: Bucket
    video_latents: StoredTensor  # [2C, F', H / 8, W / 8]
    prompt_embeds: StoredTensor  # [226, D]
    image_latents: StoredTensor | None = None  # [K, 2C, 1, H / 8, W / 8], or without K
    repeats: float = 1.0

    def __post_init__(self):
        if min(self.bucket) < 1 or not 0 < self.repeats < math.inf:
            raise ValueError(f"its size is {self.bucket} and its repeats {self.repeats}; they must be above 0")


@dataclass(frozen=True)
class PreparedSettings:
    """The settings that a folder's tensors depend on besides the clips; the same for all tensors of a folder."""

    layout: str  # shards, files
    encoders: Mapping[str, str | None]  # as from `fingerprint_encoders`
    dtype: str
    max_sequence_length: int
    tiling: bool | None  # None before it is decided
    model: str = ""  # where the encoders were, for messages
    flags: Mapping[str, Any] = field(default_factory=dict)  # that chose clips and frames in the last run


def _other_encoders(one: Mapping[str, str | None], other: Mapping[str, str | None]) -> list[str]:
    """Return the names of encoders that both sides know and that differ."""
    return [name for name, digest in one.items() if digest and other.get(name) and digest != other[name]]


def check_encoders(folder: Path, encoders: Mapping[str, str | None]) -> str:
    """Return why a model with these encoders cannot be trained on a prepared folder; "" if no reason is known."""
    settings = read_prepared_settings(folder)
    different = " and ".join(_other_encoders(encoders, settings.get("encoders", {})))
    return different and f"{folder} was prepared with another {different} (of {settings['model']}) than the model's"


def read_tensor(stored: StoredTensor) -> "torch.Tensor":
    """Read a tensor without unpickling anything else; raises ValueError if damaged, missing or of another shape."""
    import torch

    try:
        with at_hand(stored.file) as file:
            if stored.key is None:
                tensor = torch.load(file, map_location="cpu", weights_only=True)
            else:
                # A mapped file takes disk space even after it was removed from the cache.
                open_shard = _open_shard.__wrapped__ if isinstance(stored.file, RemotePath) else _open_shard
                tensor = open_shard(file).get_tensor(stored.key)
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"it holds a {type(tensor).__name__}")
        wanted = stored.shape or tensor.shape
        if len(wanted) != tensor.ndim or any(
            size not in (None, actual) for size, actual in zip(wanted, tensor.shape, strict=True)
        ):
            raise ValueError(f"its shape is {list(tensor.shape)}")
        return tensor
    except StoreError:
        raise
    except Exception as error:
        # The first line, as torch then recommends a way of loading that may run code.
        raise ValueError(f"{stored.file} cannot be read as a tensor: {first_line(error)}") from error


def write_empty_prompt(folder: Path, embeds: "torch.Tensor") -> None:
    """Write the embedding of the empty prompt, `[226, D]`."""
    with atomic_write(folder / EMPTY_PROMPT_FILE, staging=folder / STAGING) as partial:
        # A copy: a slice of a batch shares its memory, which safetensors refuses.
        save_tensors({"prompt_embeds": embeds.detach().cpu().clone().contiguous()}, partial)


def read_empty_prompt(folder: Path) -> "torch.Tensor | None":
    """Read the embedding of the empty prompt, `[226, D]`, or None without one; raises UserError if it is damaged."""
    path = folder / EMPTY_PROMPT_FILE
    if not path.exists():
        return None
    try:
        return read_tensor(StoredTensor(path, "prompt_embeds", (None, None)))
    except ValueError as error:
        raise UserError(f"{error}; remove it and prepare the data again") from error


@lru_cache(maxsize=256)
def _open_shard(file: Path) -> Any:
    """Map a shard into memory once per process, as opening one parses a header of many thousand entries."""
    from safetensors import safe_open

    return safe_open(file, "pt")


def caption_key(caption: str) -> str:
    """Return the name of a caption's embedding in shards."""
    return hashlib.sha256(caption.encode()).hexdigest()[:32]


def read_prompt(folder: Path, prompt: str) -> "torch.Tensor | None":
    """Read the embedding `[226, D]` of a caption or of the empty prompt; None if the folder's shards have none."""
    if not prompt:
        return read_empty_prompt(folder)
    key = caption_key(prompt)
    shard = finished_names(folder / "prompt_embeds").get(key)
    return shard and read_tensor(StoredTensor(shard, f"{key}.prompt_embeds", (None, None)))


def read_captions(folder: Path) -> list[str]:
    """Read the captions of the samples in their order; the original script lists them only in prompts.txt."""
    for index in (INDEX_FILE, FILES_INDEX):
        if (folder / index).is_file():
            captions = [entry.get("caption") for _, entry in read_json(folder / index)]
            if any(captions):
                return [caption for caption in captions if caption]
    prompts = folder / LISTS[0]
    return [line for line in read_lines(prompts) if line] if prompts.is_file() else []


def claim_folder(folder: Path, settings: PreparedSettings) -> PreparedSettings:
    """Mark `folder` as prepared with these settings, or check that it already is and that it has no other data.

    Returns the settings with the encoders that were known before, for `write_settings` at the end.
    """
    if (folder / SETTINGS_FILE).exists():
        earlier = read_prepared_settings(folder)
        encoders = earlier.get("encoders", {})
        differing = [f"another {name}" for name in _other_encoders(settings.encoders, encoders)]
        differing += [
            f"{name} was {earlier.get(name)!r}, is now {getattr(settings, name)!r}"
            for name in _COMPARED_SETTINGS
            if earlier.get(name) != getattr(settings, name)
        ]
        if differing:
            raise UserError(
                f"--output_dir: {folder} holds data prepared with other settings ({'; '.join(differing)}); "
                "set a new folder"
            )
        known = {name: digest or encoders.get(name) for name, digest in settings.encoders.items()}
        return replace(settings, encoders=known)
    foreign = [name for name in (INDEX_FILE, FILES_INDEX, *LISTS) if (folder / name).exists()]
    if foreign:
        raise UserError(
            f"--output_dir: {folder} already has {', '.join(foreign)} of a data set that was not prepared here; "
            "set a new folder"
        )
    write_settings(folder, settings)
    return settings


def write_settings(folder: Path, settings: PreparedSettings) -> None:
    """Write the settings; after each preparation too, as the index depends on the flags of the last run."""
    with atomic_write(folder / SETTINGS_FILE, staging=folder / STAGING) as partial:
        partial.write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")


def read_prepared_settings(folder: Path) -> dict[str, Any]:
    """Read a folder's settings, empty for one of the original script; raises UserError if they are damaged."""
    path = folder / SETTINGS_FILE
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        for name, kind in (("encoders", dict), ("flags", dict), ("model", str)):
            if not isinstance(settings.setdefault(name, kind()), kind):
                raise ValueError(f"its {name} are {settings[name]!r}")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); prepare into a new folder") from error
    # As the flags of a script hold them.
    flags = {name: tuple(one) if isinstance(one, list) else one for name, one in settings["flags"].items()}
    return settings | {"flags": flags}


def read_index(folder: Path, *, allow_outside_paths: bool = False) -> list[PreparedClip]:
    """List the samples of a prepared folder, possibly a stranger's, and check that all their tensors exist.

    Raises UserError if not, if the preparation was not finished, or if the index leads out of the folder without
    `allow_outside_paths`.
    """
    if (folder / INDEX_FILE).is_file():
        clips = _read_lines(folder / INDEX_FILE, _clip_in_shards, allow_outside_paths)
    elif not (folder / SETTINGS_FILE).is_file():
        clips = _read_original(folder, allow_outside_paths)
    elif (folder / FILES_INDEX).is_file():
        clips = _read_lines(folder / FILES_INDEX, _clip_in_files, allow_outside_paths)
    else:
        raise UserError(
            f"--load_tensors: the preparation of {folder} was not finished (there is no {INDEX_FILE}); run it again: "
            "it does only what is missing"
        )
    if not clips:
        raise UserError(
            f"--load_tensors: {folder} has no prepared data (no {INDEX_FILE}, no {FILES_INDEX} and no "
            "video_latents/*.pt); run prepare_dataset.sh first and pass its --output_dir as --data_root, or omit "
            "--load_tensors"
        )
    _check_missing(folder, _missing_tensors(folder, clips))
    return clips


def _check_missing(folder: Path, missing: Sequence[str]) -> None:
    if missing:
        raise UserError(listing(f"--load_tensors: {len(missing)} files of {folder} are missing:", missing))


def _read_original(folder: Path, allow_outside_paths: bool) -> list[PreparedClip]:
    """List the samples of a folder of the original script as its training did: by videos.txt, or else all latents.

    Its data.jsonl tells their sizes, but is empty or cut where the script failed on its last lines. It names image
    latents even if none were saved.
    """
    index, videos = folder / FILES_INDEX, folder / "videos.txt"
    indexed = _read_lines(index, _clip_in_files, allow_outside_paths, skip_damaged=True) if index.is_file() else []
    clips = {clip.name: clip if _exists(clip.image_latents) else replace(clip, image_latents=None) for clip in indexed}
    stored = sorted(path.stem for path in (folder / "video_latents").glob("[!.]*.pt"))
    names = list(dict.fromkeys([*clips, *stored]))
    if stored and videos.is_file():
        names = [Path(line).stem for line in read_lines(videos) if line]
    unindexed = {name: folder / "video_latents" / f"{name}.pt" for name in names if name not in clips}
    _check_missing(folder, [str(path) for path in unindexed.values() if not os.path.isfile(path)])
    if index.is_file() and unindexed and launch_rank() == 0:
        logger.warning("warning: %s lacks %d of the %d samples; they are used too", index, len(unindexed), len(names))
    clips |= {name: _clip_from_latents(folder, path) for name, path in unindexed.items()}
    return [clips[name] for name in names]


def _exists(tensor: StoredTensor | None) -> bool:
    return tensor is not None and os.path.isfile(tensor.file)  # Path.is_file raises on a name that is too long


def _missing_tensors(folder: Path, clips: Iterable[PreparedClip]) -> list[str]:
    stored = {
        tensor for clip in clips for tensor in (clip.video_latents, clip.prompt_embeds, clip.image_latents) if tensor
    }
    in_shards = finished_names(folder / "latents") | finished_names(folder / "prompt_embeds")

    def exists(tensor: StoredTensor) -> bool:
        if tensor.key is None:
            return _exists(tensor)
        return in_shards.get(tensor.key.rpartition(".")[0]) == tensor.file

    missing = [tensor for tensor in stored if not exists(tensor)]
    return sorted(str(tensor.file) + (f" ({tensor.key})" if tensor.key else "") for tensor in missing)


def _read_lines(
    path: Path, to_clip: Any, allow_outside_paths: bool, *, skip_damaged: bool = False
) -> list[PreparedClip]:
    clips, outside, folder = [], [], path.parent
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                clips.append(to_clip(folder, entry))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                if skip_damaged:
                    continue
                raise UserError(
                    f"{path}:{number}: not a prepared clip ({type(error).__name__}: {error}); "
                    "run prepare_dataset.sh again"
                ) from error
            named = [value for key in _PATH_KEYS if isinstance(value := entry.get(key), str)]
            outside += [f"{path.name}:{number}: {file}" for file in named if not stays_inside(file, folder, [folder])]
    if outside and not allow_outside_paths:
        title = (
            f"--load_tensors: {path} names {len(outside)} files outside of its folder; prepare the data again, "
            "or pass --allow_outside_paths if you trust its author:"
        )
        raise UserError(listing(title, outside, most=len(outside)))
    return clips


def sample_in_shards(
    folder: Path, name: str, latents: Path, embeds: Path, caption_key: str, bucket: Bucket, *, with_images: bool
) -> dict[str, Any]:
    """Return the index entry of a sample whose tensors are in these two shards."""
    return {
        "name": name,
        "latents": latents.relative_to(folder).as_posix(),
        "prompt_embeds": embeds.relative_to(folder).as_posix(),
        "caption_key": caption_key,
        "with_image": with_images,
        "metadata": bucket._asdict(),
    }


def sample_in_files(name: str, bucket: Bucket, *, with_images: bool) -> dict[str, Any]:
    """Return the index entry of a sample with one file per tensor."""
    images = {"image": f"images/{name}.png", "image_latent": f"image_latents/{name}.pt"} if with_images else {}
    return {
        "prompt": f"prompts/{name}.txt",
        "prompt_embed": f"prompt_embeds/{name}.pt",
        "video": f"videos/{name}.mp4",
        "video_latent": f"video_latents/{name}.pt",
        **images,
        "metadata": bucket._asdict(),
    }


def _clip_in_shards(folder: Path, entry: dict[str, Any]) -> PreparedClip:
    name, latents, bucket = entry["name"], _joined(folder, entry["latents"]), _bucket(entry)
    frames, height, width = bucket.latent_shape
    image = StoredTensor(latents, f"{name}.image_latents", (None, None, 1, height, width))
    return PreparedClip(
        name,
        bucket,
        StoredTensor(latents, f"{name}.video_latents", (None, frames, height, width)),
        StoredTensor(_joined(folder, entry["prompt_embeds"]), f"{entry['caption_key']}.prompt_embeds", (None, None)),
        image if entry["with_image"] else None,
        float(entry["repeats"]),
    )


@lru_cache(maxsize=4096)
def _joined(folder: Path, shard: str) -> Path:
    """Return one path object for all samples of a shard."""
    return folder / shard


def _clip_in_files(folder: Path, entry: dict[str, Any]) -> PreparedClip:
    latents, image, bucket = folder / entry["video_latent"], entry.get("image_latent"), _bucket(entry)
    frames, height, width = bucket.latent_shape
    return PreparedClip(
        latents.stem,
        bucket,
        StoredTensor(latents, shape=(None, frames, height, width)),
        StoredTensor(folder / entry["prompt_embed"], shape=(None, None)),
        StoredTensor(folder / image, shape=(None, 1, height, width)) if image else None,
        float(entry.get("repeats", 1.0)),
    )


def _bucket(entry: Mapping[str, Any]) -> Bucket:
    return Bucket(*(int(entry["metadata"][name]) for name in Bucket._fields))


def _clip_from_latents(folder: Path, path: Path) -> PreparedClip:
    with_images = (folder / "image_latents" / path.name).is_file()
    try:
        _, frames, height, width = read_tensor(StoredTensor(path)).shape
        bucket = Bucket((frames - 1) * 4 + 1, height * 8, width * 8)
        return _clip_in_files(folder, sample_in_files(path.stem, bucket, with_images=with_images))
    except ValueError as error:
        raise UserError(f"--load_tensors: {path} has no latents of a video ({error}); remove it") from error
