"""The on-disk format of prepared data: latent moments, prompt embeddings, and the index of samples.

The default, tensors of many samples in a file (`--layout shards`):

    <folder>/prepared.json                       encoders, precision and flags of the preparation
    <folder>/index.arrow                         a row per sample (`prepared.index`): shards, bucket, caption, source
    <folder>/latents/<digest>.safetensors        <name>.video_latents  [2C, F', H / 8, W / 8], the VAE's moments, and
                                                 <name>.image_latents  [K, 2C, M, H / 8, W / 8] (image-to-video),
                                                 <name>.control_latents  [2C, F', H / 8, W / 8] (control-to-video),
                                                 <name>.mask  [F', H / 8, W / 8] (--use_masks)
    <folder>/prompt_embeds/<digest>.safetensors  <caption's digest>.prompt_embeds  [226, D]
    <folder>/empty_prompt.safetensors            prompt_embeds  [226, D], of the empty prompt: for caption dropout

Older versions wrote `index.jsonl` instead, which is converted when it is first read.

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError, first_line
from common.files import atomic_write
from common.remote import RemotePath, at_hand
from common.stores import StoreError
from prepared.tensor_files import find_shard, save_tensors


if TYPE_CHECKING:
    import pyarrow as pa
    import torch

SETTINGS_FILE = "prepared.json"
INDEX_FILE = "index.arrow"
OLDER_INDEX = "index.jsonl"  # of older versions
FILES_INDEX = "data.jsonl"
LISTS = ("prompts.txt", "videos.txt")
EMPTY_PROMPT_FILE = "empty_prompt.safetensors"
STAGING = ".staging"
_COMPARED_SETTINGS = ("layout", "dtype", "max_sequence_length", "tiling")


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor on disk."""

    file: Path
    key: str | None = None  # in a safetensors file; None for a .pt file with only this tensor
    shape: tuple[int | None, ...] = ()  # expected, None for an axis of any length; () for any shape


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


def sample_digest(facts: Sequence[object]) -> str:
    """Return the end of a sample's name, from all that its latents depend on."""
    return hashlib.sha256(repr(list(facts)).encode()).hexdigest()[:16]


def sample_digests(names: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """Return the `sample_digest` that ends each sample's name; null for a name that has none."""
    from pyarrow import compute

    return compute.struct_field(compute.extract_regex(names, r"-(?P<digest>[0-9a-f]{16})$"), "digest")


def content_digest(sha256: str) -> str | None:
    """Return what an index keeps of the SHA-256 of a clip, by which its copies are found; None if it is unknown."""
    return sha256[:16] or None


def caption_key(caption: str) -> str:
    """Return the name of a caption's embedding in shards."""
    return hashlib.sha256(caption.encode()).hexdigest()[:32]


def read_prompt(folder: Path, prompt: str) -> "torch.Tensor | None":
    """Read the embedding `[226, D]` of a caption or of the empty prompt; None if the folder's shards have none."""
    if not prompt:
        return read_empty_prompt(folder)
    key = caption_key(prompt)
    shard = find_shard(folder / "prompt_embeds", key)
    return shard and read_tensor(StoredTensor(shard, f"{key}.prompt_embeds", (None, None)))


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
    foreign = [name for name in (INDEX_FILE, OLDER_INDEX, FILES_INDEX, *LISTS) if (folder / name).exists()]
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
