"""Run the commands of a job, one after another, until one fails or the job is stopped; its exit code goes to a file.

It is started in a session of its own (`studio.jobs`), so that it outlives the app. Imports only the standard library.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path


STOPPED_EXIT_CODE = 75  # of `common.signals`
PROCESS_FILE, EXIT_FILE, JOB_FILE, LOG_FILE = "process", "exit_code", "job.json", "log.txt"


def main(folder: Path) -> None:
    """Run the job in a folder."""
    stops: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: stops.append(number))  # the commands get it too, and save
    (folder / PROCESS_FILE).write_text(str(os.getpid()), encoding="utf-8")
    code = 0
    for command in json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))["commands"]:
        if code or stops:
            break
        print(f"$ {shlex.join(command)}", flush=True)
        # They inherit the lock, so that it is held as long as any of them runs.
        code = subprocess.call(command, close_fds=False)
    (folder / EXIT_FILE).write_text(str(STOPPED_EXIT_CODE if stops and code <= 0 else code), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
