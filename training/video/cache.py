"""Facts about files, cached on disk between runs and shared by all processes of a run."""

import json
import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.remote import RemotePath


logger = logging.getLogger(__name__)

_TABLE = """CREATE TABLE IF NOT EXISTS facts (
    kind TEXT, path BLOB, size INTEGER, mtime_ns INTEGER, value TEXT, PRIMARY KEY (kind, path)
) WITHOUT ROWID"""
_GET = "SELECT value FROM facts WHERE kind = ? AND path = ? AND size = ? AND mtime_ns = ?"
_PUT = "INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?, ?)"
_WAIT_SECONDS = 20.0  # for other processes, whose writes take milliseconds


class FileCache:
    """Facts by file, valid while the file's size and modification time do not change.

    Any number of processes and threads may use one folder at once, which machines may share over a network. If the
    cache cannot be read or written, it logs one warning and is empty from then on.
    """

    def __init__(self, folder: Path):
        self.file = folder / "files.sqlite"
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._given_up = False

    def find(self, path: Path, kind: str, examine: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Return a fact about a file: the stored one, else what `examine` returns, which is stored.

        Args:
            path: the file, relative to the working directory or in a store.
            kind: the kind of fact, with a version number: "probe 1".
            examine: returns a value for JSON. Nothing is stored if it raises or the file changes meanwhile.
        """
        state, name = _state_of(path), os.fsencode(_name_of(path))  # bytes, because names need not be text
        rows = self._execute(_GET, (kind, name, *state)) if state else []
        try:
            if rows:
                return json.loads(rows[0][0])
        except ValueError as error:
            self._give_up(error)
        value = examine(path)
        if state and _state_of(path) == state:
            self._execute(_PUT, (kind, name, *state, json.dumps(value)))
        return value

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
        connection = sqlite3.connect(self.file, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False)
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


def _name_of(path: Path) -> str:
    return str(path) if isinstance(path, RemotePath) else os.path.abspath(path)


def _state_of(path: Path) -> tuple[int, int] | None:
    """Return size in bytes and modification time in nanoseconds; None if the file cannot be read.

    In a store, the version replaces the time; None if the store names none.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a path with a null character
        return None
    return None if status.st_mtime_ns is None else (status.st_size, status.st_mtime_ns)
