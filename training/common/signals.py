"""Signals that make a run save and exit: SIGTERM (schedulers, `kill`), SIGINT (Ctrl-C), SIGUSR1 (SLURM)."""

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType

from common.ranks import launch_rank


# EX_TEMPFAIL of sysexits.h: not finished, but a new run resumes it.
STOPPED_EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A launcher forwards signals that its processes also got from the terminal or the scheduler: these count once.
ECHO_SECONDS = 2.0
# After SIGTERM a data worker exits at the latest after this time.
WORKER_GRACE_SECONDS = 120
_PR_SET_PDEATHSIG = 1  # of prctl(2): send a signal when the parent process dies


class StopSignals:
    """A context in which the first signal sets `received`.

    A second one ends the process at once, with the exit code that shells use for it, unless it is an echo of the
    first, or reports the launcher's death, which follows Ctrl-C some seconds later.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._first_at = 0.0
        self._parent = os.getppid()
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # no other thread can set handlers
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
                os.write(2, f"\n{self.received.name}: {said}\n".encode())  # print may be what was interrupted
        elif time.monotonic() - self._first_at > ECHO_SECONDS and not is_orphaned:
            os._exit(128 + number)


def follow_launcher() -> None:
    """Request SIGTERM when the launcher dies, so that no run continues unnoticed. Call this early."""
    if _is_launched():
        _get_when_parent_dies(signal.SIGTERM)


def hear_ctrl_c() -> None:
    """React to Ctrl-C even if the launcher was told to ignore it, which would otherwise print a traceback."""
    if _is_launched() and signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_launched() -> bool:
    return any(name.startswith(("ACCELERATE_", "TORCHELASTIC_")) for name in os.environ)


def outlive_signals() -> None:
    """Keep a data worker alive when its process group is signalled: the parent needs it until its step is done.

    It dies with its parent: torch's workers check for that only between two batches, and otherwise hang.
    """
    _get_when_parent_dies(signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # The alarm's default action ends the process.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_SECONDS))


def die_with_parent() -> None:
    """End this worker process at once, silently, when its parent dies or Ctrl-C is pressed."""
    _get_when_parent_dies(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _get_when_parent_dies(number: signal.Signals) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
