"""Failures that end a run and that the user can do something about: said in a few lines, with what to do."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch.utils.data import Dataset, get_worker_info

from common.errors import UserError, listing, one_line


_ADVICE_ON_HOST = (
    "give fewer --dataloader_num_workers or a smaller --train_batch_size (--batch_size), leave out --pin_memory and "
    "what keeps things in host memory (--offload_checkpoints, --stream_blocks, --use_cpu_offload_optimizer)"
)


@contextmanager
def explained_failures(advise: Callable[[], list[str]], on_host: str = _ADVICE_ON_HOST) -> Iterator[None]:
    """Turn a device or host that is out of memory, and a data worker that died, into errors that say what to do.

    Args:
        advise: what frees memory of the device, a line each, the least costly first; called when it is needed.
        on_host: what frees the host's memory, as the end of a sentence.

    Raises:
        UserError: in their place.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        explanation = explain_death(error) or _explain_memory(error, advise, on_host)
        if explanation is None:
            raise
        raise UserError(explanation) from error


def _explain_memory(error: BaseException, advise: Callable[[], list[str]], on_host: str) -> str | None:
    memory = memory_that_ran_out(error)
    if memory is None:
        return None
    # Torch goes on with a page about its allocator.
    reason = one_line(f"{type(error).__name__}: {'. '.join(str(error).split('. ')[:3])}", 300)
    if memory == "host":
        return f"out of host memory ({reason}); {on_host}"
    return listing(f"out of GPU memory ({reason}); what to change, the least costly first:", advise())


def memory_that_ran_out(error: BaseException) -> str | None:
    """Which memory an error says is full, "device" or "host"; None: it says something else."""
    if isinstance(error, MemoryError):
        return "host"
    if isinstance(error, torch.OutOfMemoryError):
        return "device"
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if "DefaultCPUAllocator" in text:
        return "host"
    # As the driver says it, not torch's own allocator: pinned memory, libraries' work spaces.
    return "device" if "out of memory" in text.lower() else None


_NOTHING = -1


# As torch words it, from its signal handler and from waiting for a batch.
_DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (\w[\w ]*)|exited)")


_ADVICE = {
    "Killed": "most likely the system ran out of host memory: give fewer --dataloader_num_workers, or smaller sizes",
    "Bus error": "most likely shared memory is full: enlarge /dev/shm (docker: --shm-size), or give fewer "
    "--dataloader_num_workers",
}


_OTHERWISE = (
    "its decoder does not survive this file: convert the file (ffmpeg -i OLD NEW.mp4), or take it off the list"
)


_watched: "WeakSet[WatchedDataset]" = WeakSet()


class ClipSource(Protocol):
    """A dataset of clips."""

    def __len__(self) -> int: ...

    def __getitem__(self, draw: object) -> Any: ...

    def name_of(self, index: int) -> str:
        """A clip as messages name it."""

    def failed(self, draw: object, reason: str) -> Any:
        """What stands for a clip that could not be read."""


class WatchedDataset(Dataset):
    """A dataset whose workers note which clip they read, and whose errors name it.

    Args:
        dataset: to read from.
        num_workers: that will read.
    """

    def __init__(self, dataset: ClipSource, num_workers: int):
        self.dataset = dataset
        # A row for each worker: its process id, and the index of what it is reading. Shared with the workers.
        self.notes = torch.full((num_workers, 2), _NOTHING)
        if num_workers:
            self.notes.share_memory_()
            _watched.add(self)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: object) -> Any:
        """Read one clip."""
        worker = get_worker_info()
        if worker is None:
            return self._read(draw)
        self.notes[worker.id] = torch.tensor([os.getpid(), draw.index])
        sample = self._read(draw)
        self.notes[worker.id, 1] = _NOTHING
        return sample

    def _read(self, draw: object) -> Any:
        try:
            return self.dataset[draw]
        except Exception as error:
            name = self.dataset.name_of(draw.index)
            if memory_that_ran_out(error) == "host":
                # As a value, because torch brings an exception from a worker here as a page of text.
                reason = f"{name}: too little host memory to read it ({error}); give fewer --dataloader_num_workers"
                return self.dataset.failed(draw, reason)
            error.add_note(f"while reading {name}")
            raise


def explain_death(error: BaseException) -> str | None:
    """What to do about a data worker that died, with the clip that it was reading; None: no worker did.

    Args:
        error: as torch raises it, in whatever line the main process was at that moment.
    """
    # Of an error that came while waiting for a batch, the signal is in its cause.
    deaths = [death for one in (error, error.__cause__) if (death := _DEATH.match(str(one)))]
    if not deaths:
        return None
    reading = [name for pid in deaths[0][1].split(",") if (name := _read_by(int(pid))) is not None]
    cause = next((death[2] for death in deaths if death[2]), "it ended without a word")
    what = f"while reading {', '.join(reading)}" if reading else "between two clips"
    return f"a data worker died ({cause}) {what}; {_ADVICE.get(cause, _OTHERWISE if reading else _ADVICE['Killed'])}"


def _read_by(pid: int) -> str | None:
    for watched in _watched:
        for worker, index in watched.notes.tolist():
            if worker == pid and index != _NOTHING:
                return watched.dataset.name_of(index)
    return None
