"""Write tensors by name to safetensors files of about a gigabyte; a killed process loses at most one batch.

    <folder>/<digest>.safetensors                               a finished shard
    <staging>/<folder>/<digest>/<digest>-<count>.safetensors    batches of an unfinished shard

The list of names determines which names share a shard. So any number of processes, in any order and interrupted any
number of times, end with the same bytes. The processes share only the folder.
"""

import hashlib
import json
import shutil
import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import stores
from common.errors import UserError
from common.files import atomic_write, flush
from common.remote import RemotePath, on_this_machine


if TYPE_CHECKING:
    import torch

MOST_PER_SHARD = 4096
_LONGEST_HEADER = 100_000_000  # bytes that safetensors allows


class ShardWriter:
    """Writes the tensors of samples to the tensor files ("shards") of a folder.

    Args:
        folder: folder of the finished shards; a damaged one is a `UserError`.
        staging: folder for unfinished ones, on the same file system; on this machine if `folder` is in a store.
        groups: names in their order; a shard has names of only one group. Names in finished shards are skipped.
        per_shard: names in a full shard, one number for each group.
    """

    def __init__(self, folder: Path, staging: Path, groups: Sequence[Sequence[str]], per_shard: Sequence[int]):
        self.folder, self.staging = folder, on_this_machine(staging) / folder.name
        self._shards: dict[str, list[str]] = {}  # names by their digest
        self._num_names = sum(map(len, groups))
        finished = finished_names(folder)
        for group, size in zip(groups, per_shard, strict=True):
            # Finished shards leave a list that is cut where it was cut before.
            names = [name for name in group if name not in finished]
            for start in range(0, len(names), size):
                self._shards[_digest(names[start : start + size])] = names[start : start + size]
        self._shard_of = {name: digest for digest, names in self._shards.items() for name in names}
        self._merging = {digest: threading.Lock() for digest in self._shards}
        self._adopt()

    def _adopt(self) -> None:
        """Move batches that an interrupted run staged for other shards, as its list of names differed."""
        from safetensors.torch import load_file

        for folder in sorted(self.staging.glob("*/")):
            if folder.name in self._shards:
                continue
            for part in _tensor_files(folder):
                samples: dict[str, dict[str, torch.Tensor]] = {}
                try:
                    for key, tensor in load_file(part).items():
                        name, _, kind = key.rpartition(".")
                        if name in self._shard_of:
                            samples.setdefault(name, {})[kind] = tensor
                except FileNotFoundError:  # another process has moved it
                    continue
                self.write(samples)
            shutil.rmtree(folder, ignore_errors=True)

    def todo(self, batch_size: int) -> dict[str, list[list[str]]]:
        """Return the batches that have not been written yet, in parts; their names do not depend on what has been."""
        parts = {}
        for digest, names in self._shards.items():
            staged = {name for part in _tensor_files(self.staging / digest) for name in names_in(part)}
            for part, batches in cut_into_parts(digest, names, batch_size, self._num_names).items():
                left = [rest for batch in batches if (rest := [name for name in batch if name not in staged])]
                if left:
                    parts[part] = left
        return parts

    def left(self, batches: Sequence[Sequence[str]], given_up: Container[str] = ()) -> list[Sequence[str]]:
        """Return which batches of a part of `todo` are still not written, apart from names that are given up."""
        digest = self._shard_of[batches[0][0]]
        shard = self.folder / f"{digest}.safetensors"

        def is_staged(batch: Sequence[str]) -> bool:
            if self._part_file(digest, batch).exists():
                return True
            kept = [name for name in batch if name not in given_up]
            return len(kept) < len(batch) and (not kept or self._part_file(digest, kept).exists())

        if shard.exists():
            return []
        left = [batch for batch in batches if not is_staged(batch)]
        return [] if shard.exists() else left  # a finished shard replaces its batches

    def _part_file(self, digest: str, names: Sequence[str]) -> Path:
        return self.staging / digest / f"{_digest(names)}-{len(names)}.safetensors"

    def write(self, samples: Mapping[str, Mapping[str, "torch.Tensor"]]) -> None:
        """Write the tensors of a batch, {name: {kind: tensor}}; the last batch of a shard also writes the shard."""
        for digest in dict.fromkeys(self._shard_of[name] for name in samples):
            names = [name for name in samples if self._shard_of[name] == digest]
            # A copy: a slice of a batch shares its memory, which safetensors refuses.
            tensors = {
                f"{name}.{kind}": tensor.detach().cpu().clone().contiguous()
                for name in names
                for kind, tensor in samples[name].items()
            }
            with atomic_write(self._part_file(digest, names)) as partial:
                save_tensors(tensors, partial)
            self._merge_if_complete(digest)

    def merge(self, given_up: Container[str] = ()) -> None:
        """Write the shards whose batches are complete, as after a kill between the last batch and the shard.

        Shards are complete without the names that are given up.
        """
        for digest in self._shards:
            self._merge_if_complete(digest, given_up)

    def _merge_if_complete(self, digest: str, given_up: Container[str] = ()) -> None:
        from safetensors.torch import load_file

        shard, staging = self.folder / f"{digest}.safetensors", self.staging / digest
        with self._merging[digest]:
            parts = _tensor_files(staging)
            wanted = {name for name in self._shards[digest] if name not in given_up}
            # The counts in the file names save reading the headers before enough batches exist.
            num_staged = sum(int(part.stem.split("-")[1]) for part in parts)
            if not parts or num_staged < len(wanted) or wanted - {name for part in parts for name in names_in(part)}:
                return
            try:
                with atomic_write(shard, staging=staging) as partial:
                    save_tensors({key: tensor for part in parts for key, tensor in load_file(part).items()}, partial)
                    flush(partial)
            except (FileNotFoundError, UserError):
                # Another process saw the same last batch, wrote the same shard and has already cleaned up.
                if not shard.exists():
                    raise
            shutil.rmtree(staging, ignore_errors=True)


def cut_into_parts(key: str, names: Sequence[str], batch_size: int, num_names: int) -> dict[str, list[Sequence[str]]]:
    """Return names as batches, in parts small enough for many processes to share `num_names` names evenly."""
    batches = [names[at : at + batch_size] for at in range(0, len(names), batch_size)]
    size = max(1, min(16, num_names // (1024 * batch_size)))
    return {f"{key}-{start}": batches[start : start + size] for start in range(0, len(batches), size)}


def finished_names(folder: Path) -> dict[str, Path]:
    """Return the names in the finished shards of a folder, each with its shard; a damaged one is a `UserError`."""
    return {name: path for path in _tensor_files(folder) for name in names_in(path)}


def find_shard(folder: Path, name: str) -> Path | None:
    """Return the finished shard of a folder that has a name; a damaged one is a `UserError`."""
    return next((path for path in _tensor_files(folder) if name in names_in(path)), None)


def _tensor_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*.safetensors"))


def names_in(path: Path) -> Iterator[str]:
    """Read the names in a shard from its header; a missing file has none, and a damaged one is a `UserError`."""
    from safetensors import SafetensorError, safe_open

    try:
        if isinstance(path, RemotePath):
            keys = _keys_in_store(str(path))
        else:
            with safe_open(path, "numpy") as file:  # reads only the header; "pt" would import torch
                keys = list(file.keys())
    except FileNotFoundError:
        keys = []
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it and prepare the data again") from error
    return (key.rpartition(".")[0] for key in keys)


def _keys_in_store(url: str) -> list[str]:
    """Read the header of a safetensors file: its length in 8 bytes, and JSON with the tensors by name."""
    start = stores.read_start(url)
    length = 8 + int.from_bytes(start[:8], "little")
    if len(start) < min(length, _LONGEST_HEADER):
        start = stores.read_start(url, length)
    return [key for key in json.loads(start[8:length]) if key != "__metadata__"]


def save_tensors(tensors: Mapping[str, "torch.Tensor"], path: Path) -> None:
    """Write a safetensors file; a full disk is an `OSError`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def samples_per_shard(bytes_per_sample: int, shard_bytes: int) -> int:
    """Return how many samples a shard of about `shard_bytes` has."""
    return max(1, min(MOST_PER_SHARD, shard_bytes // bytes_per_sample))


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
