"""Failures that end a run and that the user can fix: out of memory, and data workers that died."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.data import Dataset, get_worker_info

from common.errors import UserError, listing, one_line
from common.stores import StoreError, StoreFailure


_ADVICE_ON_HOST = (
    "lower --dataloader_num_workers or --train_batch_size (--batch_size), omit --pin_memory and the flags that keep "
    "data in host memory (--offload_checkpoints, --stream_blocks, --use_cpu_offload_optimizer)"
)
# As torch words it, in its signal handler and when it waits for a batch.
_DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (\w[\w ]*)|exited)")
_ADVICE_BY_SIGNAL = {
    "Killed": "most likely the system ran out of host memory: lower --dataloader_num_workers or the sizes",
    "Bus error": "most likely shared memory is full: enlarge /dev/shm (docker: --shm-size), or lower "
    "--dataloader_num_workers",
}
_ADVICE_ON_FILE = (
    "its decoder crashes on this file: convert the file (ffmpeg -i OLD NEW.mp4), or remove it from the list"
)
_IDLE = -1

_watched: "WeakSet[WatchedDataset]" = WeakSet()


@contextmanager
def explained_failures(advise: Callable[[], list[str]], on_host: str = _ADVICE_ON_HOST) -> Iterator[None]:
    """Turn out-of-memory errors and the death of a data worker into UserErrors that say what to do.

    Args:
        advise: returns what frees device memory, one line each, the least costly first; called only on failure.
        on_host: what frees host memory, as the end of a sentence.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        memory, explanation = exhausted_memory(error), _explain_death(error)
        # Torch adds a page about its allocator.
        reason = one_line(f"{type(error).__name__}: {'. '.join(str(error).split('. ')[:3])}", 300)
        if memory == "host":
            explanation = f"out of host memory ({reason}); {on_host}"
        elif memory == "device":
            title = f"out of GPU memory ({reason}); what to change, the least costly first:"
            explanation = listing(title, advise())
        elif explanation is None:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton")):
                error.add_note("compilation failed: pass --no-compile to train without compiled blocks")
            raise
        raise UserError(explanation) from error


def exhausted_memory(error: BaseException) -> str | None:
    """Return which memory an error reports as full, "device" or "host"; None for other errors."""
    if isinstance(error, MemoryError):
        return "host"
    if not isinstance(error, RuntimeError):
        return None
    if "DefaultCPUAllocator" in str(error):
        return "host"
    # The driver raises it for pinned memory and workspaces of libraries, not torch's allocator.
    is_full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
    return "device" if is_full else None


class WatchedDataset(Dataset):
    """A dataset of clips whose workers record which clip they read, so that errors name it.

    Args:
        dataset: with the methods `name_of(index)` and `failed(draw, reason)`.
        num_workers: of the data loader.
    """

    def __init__(self, dataset: Any, num_workers: int):
        self.dataset = dataset
        # A row per worker, shared with the workers: its process id, and the index of the clip that it reads.
        self.notes = torch.full((num_workers, 2), _IDLE)
        if num_workers:
            self.notes.share_memory_()
            _watched.add(self)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: object) -> Any:
        """Read one clip."""
        worker = get_worker_info()
        if worker is not None:
            self.notes[worker.id] = torch.tensor([os.getpid(), draw.index])
        try:
            return self.dataset[draw]
        except StoreError as error:  # also as a value
            return self.dataset.failed(draw, StoreFailure(f"{self.dataset.name_of(draw.index)}: {error}"))
        except Exception as error:
            name = self.dataset.name_of(draw.index)
            if exhausted_memory(error) == "host":
                # As a value, because torch turns an exception from a worker into a page of text.
                reason = f"{name}: too little host memory to read it ({error}); lower --dataloader_num_workers"
                return self.dataset.failed(draw, reason)
            error.add_note(f"while reading {name}")
            raise
        finally:
            if worker is not None:
                self.notes[worker.id, 1] = _IDLE


def _explain_death(error: BaseException) -> str | None:
    """Return what to do about a data worker that died, with the clip that it was reading; None for other errors."""
    # An error raised while waiting for a batch has the signal in its cause.
    deaths = [death for one in (error, error.__cause__) if (death := _DEATH.match(str(one)))]
    if not deaths:
        return None
    pids = {int(pid) for pid in deaths[0][1].split(",")}
    notes = [(watched.dataset, *note) for watched in _watched for note in watched.notes.tolist()]
    reading = [dataset.name_of(index) for dataset, pid, index in notes if pid in pids and index != _IDLE]
    cause = next((death[2] for death in deaths if death[2]), "it exited without an error")
    what = f"while reading {', '.join(reading)}" if reading else "between two clips"
    otherwise = _ADVICE_ON_FILE if reading else _ADVICE_BY_SIGNAL["Killed"]
    return f"a data worker died ({cause}) {what}; {_ADVICE_BY_SIGNAL.get(cause, otherwise)}"
