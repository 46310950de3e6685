"""Memory that a run takes, by its phases, from torch's own counters: reading them does not make the device wait."""

import logging
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from common.units import in_bytes


logger = logging.getLogger(__name__)


class PeakMemory:
    """The peaks of each phase of a run: set-up, training, validation; on a CPU only the host's.

    The host's is that of this process since its start, without data workers.
    """

    def __init__(self, device: torch.device):
        self.is_cuda = device.type == "cuda"
        self.device = device
        self.phases: dict[str, dict[str, int]] = {}  # bytes by phase and name
        self._enter("set-up")

    def read(self) -> dict[str, int]:
        """Return the peaks in bytes since the phase began: host, and of a GPU allocated and reserved."""
        peaks = {"host": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
        if self.is_cuda:
            peaks["allocated"] = torch.cuda.max_memory_allocated(self.device)
            peaks["reserved"] = torch.cuda.max_memory_reserved(self.device)
        return peaks

    @contextmanager
    def phase(self, name: str, at: str = "") -> Iterator[None]:
        """Log the memory before and after the body of a `with` statement, and note its peaks under the name."""
        outer = self.current
        self._log(f"before {name}{at}")
        self._note()
        self._enter(name)
        try:
            yield
        finally:
            self._log(f"after {name}{at}")
            self._note()
            self._enter(outer)

    def describe(self) -> list[str]:
        """Return a line for each phase that has ended, with its peaks."""
        return [f"peak memory of {phase}: {_described(peaks)}" for phase, peaks in self.phases.items()]

    def _enter(self, name: str) -> None:
        self.current = name
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def _note(self) -> None:
        earlier = self.phases.get(self.current, {})
        self.phases[self.current] = {name: max(size, earlier.get(name, 0)) for name, size in self.read().items()}

    def _log(self, moment: str) -> None:
        now = f"{in_bytes(torch.cuda.memory_allocated(self.device), 1024)} allocated; " if self.is_cuda else ""
        logger.info("memory %s: %speak since %s began: %s", moment, now, self.current, _described(self.read()))


def _described(peaks: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {in_bytes(size, 1024)}" for name, size in peaks.items())
