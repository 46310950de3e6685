"""The app of training/app.py in a process of its own, which notes every address that it connects to."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from repository import TRAINING


# Python calls the hook for every connection and every name that is looked up, of all libraries.
_NOTE_CONNECTIONS = """
import os, runpy, sys
def note(event, details):
    if event in ("socket.connect", "socket.getaddrinfo"):
        place = details[1] if event == "socket.connect" else details[0]
        with open(os.environ["NOTED"], "a") as file:
            file.write(f"{place[0] if isinstance(place, tuple) else place}\\n")
sys.addaudithook(note)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class RunningApp:
    url: str
    process: subprocess.Popen
    noted: Path

    def connections(self) -> set[str]:
        """The addresses and names that the app connected to or looked up."""
        return set(self.noted.read_text().split()) if self.noted.exists() else set()

    def close(self) -> str:
        """Press Ctrl-C until the app is closed, and return what it says then."""
        while self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=0.1)
        return self.process.communicate()[0]


@contextmanager
def running_app(root: Path, noted: Path, *flags: str, **environment: str) -> Iterator[RunningApp]:
    command = [sys.executable, "-c", _NOTE_CONNECTIONS, str(TRAINING / "app.py"), "--root", str(root), "--port", "0"]
    environment = os.environ | {"NOTED": str(noted), "OMP_NUM_THREADS": "1"} | environment
    process = subprocess.Popen(
        [*command, *flags], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        lines = []
        while not lines or not lines[-1].startswith("open "):
            lines.append(process.stdout.readline())
            assert lines[-1], "".join(lines)
        yield RunningApp(lines[-1].split()[1], process, noted)
    finally:
        process.kill()
        process.wait()
