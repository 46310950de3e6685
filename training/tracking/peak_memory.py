"""Memory that a run takes, by its phases, from torch's own counters: reading them does not make the device wait."""

import logging
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from common.units import in_bytes


logger = logging.getLogger(__name__)

SET_UP, OTHER = "set-up", "other work"  # before the first phase, and between the others


class PeakMemory:
    """The peaks of each phase of a run on a GPU: set-up, training, validation; and the host's.

    The host's is that of this process since its start, without data workers.
    """

    def __init__(self, device: torch.device):
        self.is_cuda = device.type == "cuda"
        self.device = device
        self.phases: dict[str, dict[str, int]] = {}  # bytes on the GPU, by phase and name; empty on a CPU
        self._enter(SET_UP)

    def read(self) -> dict[str, int]:
        """Return the peaks in bytes: of the host, and since the phase began allocated and reserved on a GPU."""
        return {"host": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, **self._on_device()}

    @contextmanager
    def phase(self, name: str, at: str = "") -> Iterator[None]:
        """Log the memory before and after the body of a `with` statement, and note its peaks under the name."""
        outer = OTHER if self.current == SET_UP else self.current
        self._log(f"before {name}{at}")
        self._note()
        self._enter(name)
        try:
            yield
        finally:
            self._log(f"after {name}{at}")
            self._note()
            self._enter(outer)

    def describe(self) -> str:
        """Return a line with the host's peak, and on a GPU one for each phase that has ended."""
        lines = [f"peak memory: host {in_bytes(self.read()['host'], 1024)}"]
        lines += [f"peak memory of {phase}: {_described(peaks)}" for phase, peaks in self.phases.items()]
        return "\n".join(lines)

    def _enter(self, name: str) -> None:
        self.current = name
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def _note(self) -> None:
        if peaks := self._on_device():
            earlier = self.phases.get(self.current, {})
            self.phases[self.current] = {name: max(size, earlier.get(name, 0)) for name, size in peaks.items()}

    def _on_device(self) -> dict[str, int]:
        if not self.is_cuda:
            return {}
        allocated, reserved = torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved
        return {"allocated": allocated(self.device), "reserved": reserved(self.device)}

    def _log(self, moment: str) -> None:
        now = f"{in_bytes(torch.cuda.memory_allocated(self.device), 1024)} allocated; " if self.is_cuda else ""
        logger.info("memory %s: %speak of %s: %s", moment, now, self.current, _described(self.read()))


def _described(peaks: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {in_bytes(size, 1024)}" for name, size in peaks.items())
