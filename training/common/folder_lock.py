"""Keep two processes that do not belong together from writing to one folder."""

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from common.errors import UserError


logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# A holder writes its name just after it has the lock: until then, the file is empty or names an earlier one.
_PATIENCE = 20, 0.05  # tries, and seconds between them


@contextmanager
def locked_folder(folder: Path, work: str = "") -> Iterator[None]:
    """Hold the lock of a folder within a `with` statement; the system releases it when the process dies.

    Args:
        folder: of `--output_dir`, which is created; several machines may share it.
        work: what is written; processes with the same, other than "", may write together.

    Raises:
        UserError: another process holds the lock; the message names it and its machine. If the file system has no
            locks, a warning says so.
    """
    file = folder / LOCK_FILE
    lock = FileLock(file, fallback_to_soft=False)  # a soft lock would outlive its process
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_held = _acquire(lock, file, work)
    except OSError as error:
        reason = error.strerror or error
        logger.warning("warning: '%s' cannot be locked (%s); start nothing else that writes there", folder, reason)
        is_held = False
    try:
        yield
    finally:
        if is_held:
            file.unlink(missing_ok=True)  # before the release: afterwards it may be another's
            lock.release()


def _acquire(lock: FileLock, file: Path, work: str) -> bool:
    """Return whether this process holds the lock; False if one with the same work does."""
    holder: dict[str, object] = {}
    tries, seconds = _PATIENCE
    for _ in range(tries):
        try:
            lock.acquire(timeout=seconds)
        except Timeout:
            holder = _read_holder(file) or holder
            if work and holder.get("work") == work:
                return False
        else:
            holder = {"process": os.getpid(), "machine": socket.gethostname(), "work": work}
            file.write_text(json.dumps(holder), encoding="utf-8")
            return True
    who = "process {process} on {machine}".format_map(holder) if holder else "another process"
    raise UserError(
        f"--output_dir: {who} is writing to '{file.parent}'; wait until it ends or stop it, or set another folder"
    )


def _read_holder(file: Path) -> dict[str, object]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
