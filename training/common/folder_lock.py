"""Keep two processes that do not belong together from writing to one folder."""

import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from common.errors import UserError


logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# A holder writes its name after it has begun; until then the file is empty, or for a moment names an earlier one.
_PATIENCE = 20, 400, 0.05  # tries that find a name, tries that find none, and seconds between them
_SUCCESSION = 5.0  # seconds between the tries of processes with the same work to succeed the holder


@contextmanager
def locked_folder(folder: Path, work: str = "", begin: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold the lock of a folder within a `with` statement; the system releases it when the process dies.

    Args:
        folder: of `--output_dir`, which is created; several machines may share it.
        work: what is written; processes with the same, other than "", may write together. When the holder ends, one
            of the others gets the lock.
        begin: called in the first of these processes, before another one may join it.

    Raises:
        UserError: another process holds the lock; the message names it and its machine. If the file system has no
            locks, a warning says so.
    """
    file = folder / LOCK_FILE
    # A soft lock would outlive its process. It may be acquired by one thread and released by another.
    lock = FileLock(file, fallback_to_soft=False, thread_local=False)
    leaving = threading.Event()
    successor = threading.Thread(target=_succeed, args=(lock, file, work, leaving), daemon=True)
    is_joining = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_joining = not _acquire(lock, file, work)
    except OSError as error:
        reason = error.strerror or error
        logger.warning("warning: '%s' cannot be locked (%s); start nothing else that writes there", folder, reason)
    try:
        if is_joining:
            successor.start()
        else:
            begin()
            if lock.is_locked:
                _write_holder(file, work)
        yield
    finally:
        leaving.set()
        if successor.is_alive():
            successor.join()
        if lock.is_locked:
            file.unlink(missing_ok=True)  # before the release: afterwards it may be another's
            lock.release()


def _acquire(lock: FileLock, file: Path, work: str) -> bool:
    """Return whether this process holds the lock; False if one with the same work does."""
    holder: dict[str, object] = {}
    named, unnamed, seconds = _PATIENCE
    while named and unnamed:
        try:
            lock.acquire(timeout=seconds)
        except Timeout:
            current = _read_holder(file)
            if work and current.get("work") == work:
                return False
            named, unnamed = named - bool(current), unnamed - (not current)
            holder = current or holder
        else:
            file.write_bytes(b"")
            return True
    who = "process {process} on {machine}".format_map(holder) if holder else "another process"
    raise UserError(
        f"--output_dir: {who} is writing to '{file.parent}'; wait until it ends or stop it, or set another folder"
    )


def _succeed(lock: FileLock, file: Path, work: str, leaving: threading.Event) -> None:
    """Acquire the lock when its holder ends, so that processes with other work are still refused.

    The last try, on leaving, is to remove the file of a holder that was killed.
    """
    is_leaving = False
    while not (lock.is_locked or is_leaving):
        is_leaving = leaving.wait(_SUCCESSION)
        with suppress(Timeout, OSError):
            lock.acquire(timeout=0)
            _write_holder(file, work)


def _write_holder(file: Path, work: str) -> None:
    holder = {"process": os.getpid(), "machine": socket.gethostname(), "work": work}
    with suppress(OSError):  # such as a full disk: the lock itself needs no name
        file.write_text(json.dumps(holder), encoding="utf-8")


def _read_holder(file: Path) -> dict[str, object]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
