"""Signals that ask a run to save and leave: SIGTERM (schedulers, `kill`), SIGINT (Ctrl-C), SIGUSR1 (SLURM)."""

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType

from common.ranks import launch_rank


# EX_TEMPFAIL of sysexits.h: not done, but run again it goes on.
STOPPED_EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A launcher passes on what its processes got from the terminal or the scheduler too: that is one signal, not two.
ECHO_SECONDS = 2.0
# After which a worker that was told to end does so, whatever became of its parent.
WORKER_GRACE_SECONDS = 120
_PR_SET_PDEATHSIG = 1  # of prctl(2): a signal for when the parent process dies


class StopSignals:
    """Takes the signals for as long as it is entered.

    The first one sets `received`. A second one ends the process at once, with the exit code that shells give a process
    killed by it; but not an echo of the first, nor the one that tells of the launcher's death, which Ctrl-C brings
    about some seconds later.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._first_at = 0.0
        self._parent = os.getppid()
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows no other to
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_orphaned = os.getppid() != self._parent
        self._parent = os.getppid()
        if self.received is None:
            self.received, self._first_at = signal.Signals(number), time.monotonic()
            if launch_rank() == 0:
                said = "saving after this step, then leaving; a second signal ends the run at once"
                os.write(2, f"\n{self.received.name}: {said}\n".encode())  # print could be what was interrupted
        elif time.monotonic() - self._first_at > ECHO_SECONDS and not is_orphaned:
            os._exit(128 + number)


def follow_launcher() -> None:
    """Get SIGTERM when the launcher dies: without it, nobody would know of a run that goes on. To be called early."""
    is_launched = any(name.startswith(("ACCELERATE_", "TORCHELASTIC_")) for name in os.environ)
    if is_launched:
        _get_when_parent_dies(signal.SIGTERM)


def outlive_signals() -> None:
    """Let a data worker live on when its whole process group is told to stop: the parent decides, and needs it until
    its step is done. When the parent dies it dies too: torch's workers look for it only between two batches, and wait
    for ever to hand over one that nobody takes."""
    _get_when_parent_dies(signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # The alarm's own action ends the process.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_SECONDS))


def _get_when_parent_dies(number: signal.Signals) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
