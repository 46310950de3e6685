"""Tensors by name in safetensors files of about a gigabyte, written so that a killed process loses one batch at most.

    <folder>/<digest>.safetensors                       a finished shard
    <staging>/<folder>/<digest>/<digest>-<count>.safetensors   batches of a shard that is not whole yet

Which names share a shard follows from the list of names alone, so that any number of processes, in whatever order and
however often interrupted, end with the same bytes. The processes need nothing in common but the folder.
"""

import hashlib
import shutil
import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from common.files import atomic_write, flush


if TYPE_CHECKING:
    import torch

MOST_PER_SHARD = 4096


@dataclass(frozen=True)
class Shard:
    """A file of tensors, and whose they are."""

    path: Path
    names: tuple[str, ...]


class ShardWriter:
    """Writes the tensors of samples into the shards of a folder.

    Args:
        folder: of the finished shards.
        staging: below it lies what is not finished; on the same file system.
        groups: names in their order; a shard holds names of one group. Those that lie in finished shards are left out.
        per_shard: names in a full shard, one number for each group.

    Raises:
        UserError: a finished shard is damaged.
    """

    def __init__(self, folder: Path, staging: Path, groups: Sequence[Sequence[str]], per_shard: Sequence[int]):
        self.folder, self.staging = folder, staging / folder.name
        finished = finished_names(folder)
        self.shards = [
            self._shard(names[start : start + size])
            for group, size in zip(groups, per_shard, strict=True)
            # Finished shards are taken out whole, so that what is left is cut where it was cut before.
            for names in [[name for name in group if name not in finished]]
            for start in range(0, len(names), size)
        ]
        self._shard_of = {name: shard for shard in self.shards for name in shard.names}
        self._merging = threading.Lock()
        self._adopt()

    def _shard(self, names: Sequence[str]) -> Shard:
        return Shard(self.folder / f"{_digest(names)}.safetensors", tuple(names))

    def _adopt(self) -> None:
        """Keep what an interrupted run with another list of names has staged: its shards were cut otherwise."""
        from safetensors.torch import load_file

        current = {shard.path.stem for shard in self.shards}
        for folder in sorted(self.staging.glob("*/")):
            if folder.name in current:
                continue
            for part in sorted(folder.glob("[!.]*.safetensors")):
                samples: dict[str, dict[str, torch.Tensor]] = {}
                try:
                    for key, tensor in load_file(part).items():
                        name, _, kind = key.rpartition(".")
                        if name in self._shard_of:
                            samples.setdefault(name, {})[kind] = tensor
                except FileNotFoundError:  # another rank has adopted it
                    continue
                self.write(samples)
            shutil.rmtree(folder, ignore_errors=True)

    def todo(self, batch_size: int, rank: int, world_size: int) -> list[list[str]]:
        """The batches of this rank that nobody has written yet.

        Who does what depends on the shards' names alone, not on what other ranks have finished since they started.
        """
        batches = []
        for shard in self.shards:
            staged = {name for part in self._parts(shard) for name in names_in(part)}
            first = int(shard.path.stem, 16) % world_size
            for number, start in enumerate(range(0, len(shard.names), batch_size)):
                batch = [name for name in shard.names[start : start + batch_size] if name not in staged]
                if batch and (first + number) % world_size == rank:
                    batches.append(batch)
        return batches

    def write(self, samples: Mapping[str, Mapping[str, "torch.Tensor"]]) -> None:
        """Write the tensors of a batch, {name: {kind: tensor}}; with a shard's last batch, the shard itself."""
        for shard in dict.fromkeys(self._shard_of[name] for name in samples):
            names = [name for name in samples if self._shard_of[name] == shard]
            # A copy: a slice of a batch shares its memory, which safetensors refuses.
            tensors = {
                f"{name}.{kind}": tensor.detach().cpu().clone().contiguous()
                for name in names
                for kind, tensor in samples[name].items()
            }
            with atomic_write(self._staging_of(shard) / f"{_digest(names)}-{len(names)}.safetensors") as partial:
                save_tensors(tensors, partial)
            self._merge_if_whole(shard)

    def merge(self, given_up: Container[str] = ()) -> None:
        """Finish the shards all of whose batches are there, as after a kill between the last batch and the shard.

        Args:
            given_up: names that never come; shards are whole without them.
        """
        for shard in self.shards:
            self._merge_if_whole(shard, given_up)

    def _merge_if_whole(self, shard: Shard, given_up: Container[str] = ()) -> None:
        from safetensors.torch import load_file

        with self._merging:
            parts = self._parts(shard)
            wanted = {name for name in shard.names if name not in given_up}
            # The file names tell when a look into the files is worth while.
            if not parts or sum(int(part.stem.split("-")[1]) for part in parts) < len(wanted):
                return
            if not wanted.issubset(name for part in parts for name in names_in(part)):
                return
            try:
                with atomic_write(shard.path, staging=self._staging_of(shard)) as whole:
                    save_tensors({key: tensor for part in parts for key, tensor in load_file(part).items()}, whole)
                    flush(whole)
            except FileNotFoundError:
                # Another rank saw the same last batch arrive, wrote the same shard and has tidied up already.
                if not shard.path.exists():
                    raise
            shutil.rmtree(self._staging_of(shard), ignore_errors=True)

    def _staging_of(self, shard: Shard) -> Path:
        return self.staging / shard.path.stem

    def _parts(self, shard: Shard) -> list[Path]:
        return sorted(self._staging_of(shard).glob("[!.]*.safetensors"))


def finished_names(folder: Path) -> dict[str, Path]:
    """Whose tensors lie in the finished shards of a folder, and in which.

    Raises:
        UserError: a shard is damaged.
    """
    return {name: path for path in sorted(folder.glob("[!.]*.safetensors")) for name in names_in(path)}


def names_in(path: Path) -> Iterator[str]:
    """The names in a shard, by its header; its length is checked too. None in one that is not there (any more).

    Raises:
        UserError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:  # nothing is read but the header; "pt" would import torch
            keys = list(file.keys())
    except FileNotFoundError:
        keys = []
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it and prepare the data again") from error
    return (key.rpartition(".")[0] for key in keys)


def save_tensors(tensors: Mapping[str, "torch.Tensor"], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:  # a full disk
        raise OSError(str(error)) from error


def samples_per_shard(bytes_per_sample: int, shard_bytes: int) -> int:
    """How many samples make up a shard of about that size."""
    return max(1, min(MOST_PER_SHARD, shard_bytes // bytes_per_sample))


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
