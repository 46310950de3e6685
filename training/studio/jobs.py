"""Jobs: commands that run in a session of their own, one job at a time, and continue when the app is closed.

<root>/.cogvideox-app/lock                      locked as long as a process of a job runs
<root>/.cogvideox-app/jobs/<time>-<kind>/       job.json, process, log.txt, exit_code
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from common.errors import UserError
from common.files import atomic_write
from common.signals import STOPPED_EXIT_CODE
from studio.places import own_path
from studio.runner import EXIT_FILE, JOB_FILE, LOG_FILE, PROCESS_FILE


_LOG_BYTES = 200_000  # that the page shows, from the end


@dataclass(frozen=True)
class Job:
    """A job that was started."""

    folder: Path
    kind: str  # the button that started it
    commands: Sequence[Sequence[str]]
    result: str  # folder of what it writes, from the root
    form: Sequence[Any]  # the values of the page
    is_running: bool

    @property
    def process(self) -> int | None:
        """Its process and process group, once it has begun."""
        with suppress(OSError, ValueError):
            return int((self.folder / PROCESS_FILE).read_text(encoding="utf-8"))
        return None

    @property
    def state(self) -> str:
        """In words."""
        if self.is_running:
            return f"running, process {self.process}"
        with suppress(OSError, ValueError):
            code = int((self.folder / EXIT_FILE).read_text(encoding="utf-8"))
            if code == STOPPED_EXIT_CODE:
                return "stopped; start it again to continue"
            return "finished" if code == 0 else f"failed with exit code {code}; its log says why"
        return "was killed; start it again to continue"

    def log(self) -> str:
        """Return the end of the log, of each line only what a terminal would still show."""
        with suppress(OSError), open(self.folder / LOG_FILE, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_BYTES))
            text = file.read().decode("utf-8", "replace").replace("\r\n", "\n")
            return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))
        return ""


class Jobs:
    """The jobs of a root, of this app and of earlier ones.

    Raises UserError if a link or a file is in the way of their folder.
    """

    def __init__(self, root: Path):
        self.root = root
        for name in ("jobs/any", "lock"):
            own_path(root, name)
        self._lock = threading.Lock()

    def latest(self) -> Job | None:
        """Return the job that was started last, running or not."""
        for file in sorted(own_path(self.root, "jobs").glob(f"*/{JOB_FILE}"), reverse=True):
            if not any(path.is_symlink() for path in (file.parent, *file.parent.iterdir())):
                return Job(file.parent, **json.loads(file.read_text(encoding="utf-8")), is_running=self._is_locked())
        return None

    def start(self, kind: str, commands: Sequence[Sequence[str]], result: str, form: Sequence[Any] = ()) -> None:
        """Start commands that run one after another; a UserError if a job of this root is running."""
        folder = own_path(self.root, f"jobs/{datetime.now():%Y%m%d-%H%M%S-%f}-{kind}")
        with self._lock, self._open_lock() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError("a job is running already; wait until it ends, or stop it") from None
            folder.mkdir(parents=True)
            facts = {"kind": kind, "commands": commands, "result": result, "form": form}
            with atomic_write(folder / JOB_FILE) as partial:
                partial.write_text(json.dumps(facts), encoding="utf-8")
            with open(folder / LOG_FILE, "wb") as log:
                subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("runner.py")), str(folder)],
                    cwd=self.root,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"PYTHONUNBUFFERED": "1"},
                    pass_fds=[lock.fileno()],  # it holds the lock from now on
                    start_new_session=True,
                )

    def stop(self) -> None:
        """Send the running job SIGTERM, on which a run saves and ends; a second one ends it at once."""
        job = self.latest()
        if job is not None and job.is_running and job.process:
            with suppress(ProcessLookupError):
                os.killpg(job.process, signal.SIGTERM)

    def _is_locked(self) -> bool:
        with self._lock, self._open_lock() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _open_lock(self) -> TextIO:
        lock = own_path(self.root, "lock")
        lock.parent.mkdir(exist_ok=True)
        return open(lock, "a")
