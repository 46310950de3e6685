"""Facts about files, cached on disk between runs and shared by all processes of a run."""

import json
import logging
import os
import sqlite3
import threading
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError


logger = logging.getLogger(__name__)

_TABLE = """CREATE TABLE IF NOT EXISTS facts (
    kind TEXT, path BLOB, size INTEGER, mtime_ns INTEGER, value TEXT, PRIMARY KEY (kind, path)
) WITHOUT ROWID"""


class FileState(NamedTuple):
    """Size and modification time of a file."""

    size: int  # bytes
    mtime_ns: int


def file_state(path: Path) -> FileState | None:
    """Return the current state of a file; None if it cannot be read."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a path with a null character
        return None
    return FileState(status.st_size, status.st_mtime_ns)


def default_cache_folder() -> Path:
    """Return $COGVIDEOX_FACTORY_CACHE, else `cogvideox-factory` in $XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get("COGVIDEOX_FACTORY_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser().absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "cogvideox-factory"
    except RuntimeError as error:  # a user without a home, as in containers
        raise UserError(f"there is no folder for caches ({error}): set COGVIDEOX_FACTORY_CACHE to one") from error


class FileCache:
    """Facts by file, valid while the file's size and modification time do not change.

    Any number of processes and threads may use one folder at once. If the cache cannot be read or written, it logs one
    warning and is empty from then on.

    Args:
        folder: created when needed. Machines may share one over a network.
        wait_seconds: how long to wait for other processes, whose writes take milliseconds, before giving up.
    """

    def __init__(self, folder: Path, wait_seconds: float = 20.0):
        self.file = Path(folder) / "files.sqlite"
        self._wait_seconds = wait_seconds
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._given_up = False

    def get(self, path: Path, kind: str) -> dict[str, Any] | None:
        """Return what `put` stored under this kind, or None if the file has changed since.

        Args:
            path: the file; relative to the working directory.
            kind: the kind of fact, with a version number: "probe 1".
        """
        state = file_state(path)
        if state is None:
            return None
        rows = self._execute(
            "SELECT value FROM facts WHERE kind = ? AND path = ? AND size = ? AND mtime_ns = ?",
            (kind, _key(path), *state),
        )
        try:
            return json.loads(rows[0][0]) if rows else None
        except ValueError as error:
            self._give_up(error)
            return None

    def put(self, path: Path, kind: str, value: dict[str, Any], state: FileState | None = None) -> None:
        """Store a fact, replacing an older one of its kind.

        Args:
            path: the file.
            kind: as for `get`.
            value: JSON-serializable.
            state: of the file before it was examined; if it has changed since, nothing is stored.
        """
        now = file_state(path)
        if now is None or (state is not None and state != now):
            return
        self._execute(
            "INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?, ?)", (kind, _key(path), *now, json.dumps(value))
        )

    def _execute(self, statement: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Run one statement as a transaction; returns no rows once the cache has been given up."""
        with self._lock:
            if self._given_up:
                return []
            try:
                if self._connection is None:
                    self._connection = self._open()
                return self._connection.execute(statement, values).fetchall()
            except (sqlite3.Error, OSError) as error:
                self._give_up(error)
                return []

    def _open(self) -> sqlite3.Connection:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(
            self.file, timeout=self._wait_seconds, isolation_level=None, check_same_thread=False
        )
        # The rollback journal, because the faster write-ahead log corrupts a file that machines share over a network.
        # Unsynchronised, because a killed process loses nothing and a power cut only what can be computed again.
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(_TABLE)
        return connection

    def _give_up(self, error: Exception) -> None:
        self._given_up = True
        logger.warning(
            "%s cannot be used (%s): continuing without it; set COGVIDEOX_FACTORY_CACHE to another folder",
            self.file,
            error,
        )


def _key(path: Path) -> bytes:
    return os.fsencode(os.path.abspath(path))  # bytes, because names need not be text
