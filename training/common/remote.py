"""Paths of files in object stores, which are read through a cache on this machine.

A `RemotePath` is made only of a URL that the user typed, and of paths below it. So a list from a stranger cannot make
this machine contact another server. The cache holds whole files up to a limit; those not used for the longest time are
removed first, but none that a process is reading.

    <cache>/fetched/<2 digits>/<digest of the URL>.<suffix>     access time: last use, modification time: version
    <cache>/fetched/locks/<2 digits>
    <cache>/outgoing/<digest of the URL>/                       what a preparation has not sent yet
"""

import errno
import fnmatch
import hashlib
import os
import re
import secrets
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from time import time
from types import SimpleNamespace
from typing import IO, Any, Self

from common import stores
from common.errors import UserError
from common.stores import FileState, StoreError, is_url


DEFAULT_LIMIT_GB = 100.0
_LIMIT_VARIABLE = "COGVIDEOX_FACTORY_CACHE_LIMIT_GB"  # inherited by data workers, however they are started
_URL = re.compile(rf"^({'|'.join(stores.STORES)}):/(?!/)")
_room = 0  # bytes that this process may add before it measures the cache again
_room_lock = threading.Lock()
_listed: dict[str, FileState] = {}  # by URL, until `forget_states`
_is_used = False


class RemotePath(type(Path())):
    """A path in a store, which prints as its URL. It can be read and, where the store allows, written and removed."""

    def __str__(self) -> str:
        return _URL.sub(r"\1://", super().__str__())

    def absolute(self) -> Self:
        """Return the path, which is absolute."""
        return self

    def resolve(self, strict: bool = False) -> Self:
        """Return the path, as stores have no links."""
        return self

    def exists(self) -> bool:
        """Return whether there is a file."""
        return _known_state(self) is not None

    is_file = exists

    def is_dir(self) -> bool:
        """Return whether there are files below."""
        return next(iter(self.list_files()), None) is not None

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Do nothing, as stores have no folders."""

    def list_files(self, *, remember: bool = False) -> list[str]:
        """Return the sorted paths of all files below, relative to this one; `remember` their states for `stat`."""
        try:
            files = dict(stores.list_files(str(self)))
        except FileNotFoundError:
            return []
        if remember:
            _listed.update({f"{self}/{name}": state for name, state in files.items()})
        return sorted(files)

    def glob(self, pattern: str) -> Iterator[Self]:
        """Yield the files directly below whose name matches."""
        for name in self.list_files():
            if "/" not in name and fnmatch.fnmatchcase(name, pattern):
                yield self / name

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Return size, and as time the version, of the file; a cached copy of another version is removed."""
        state = _known_state(self)
        with suppress(OSError):
            cached = os.stat(_cached_file(self))
            if state is None or state != (cached.st_size, cached.st_mtime_ns):
                _cached_file(self).unlink()
        if state is None:
            raise FileNotFoundError(errno.ENOENT, "does not exist", str(self))
        return SimpleNamespace(st_size=state.size, st_mtime_ns=state.version)

    def open(self, mode: str = "r", *arguments: Any, **options: Any) -> IO:
        """Open the newest version for reading."""
        if set(mode) & set("wax+"):
            raise OSError(errno.EROFS, "is written with atomic_write", str(self))
        self.stat()
        with at_hand(self) as file:
            return file.open(mode, *arguments, **options)

    def read_bytes(self) -> bytes:
        """Read the newest version."""
        with self.open("rb") as file:
            return file.read()

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """Read the newest version as text."""
        with self.open("r", encoding=encoding, errors=errors) as file:
            return file.read()

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""
        stores.remove(str(self))


def to_path(typed: str) -> Path:
    """Return the path that the user typed: a `RemotePath` for a URL."""
    global _is_used
    _is_used |= is_url(typed)
    return RemotePath(typed.rstrip("/")) if is_url(typed) else Path(typed)


def is_used() -> bool:
    """Return whether the user typed a URL of a store."""
    return _is_used


def listed_below(url: str, folders: Iterable[Path | None]) -> RemotePath | None:
    """Return the path of a URL in a list, None if it is not below one of the folders that the user named."""
    for folder in folders:
        if isinstance(folder, RemotePath) and url.startswith(f"{folder}/"):
            rest = url[len(f"{folder}/") :]
            return None if ".." in rest.split("/") else folder / rest
    return None


def forget_states() -> None:
    """Free the states of listed files, when all have been checked."""
    _listed.clear()


def _known_state(path: RemotePath) -> FileState | None:
    return _listed.get(str(path)) or stores.file_state(str(path))


def is_file(path: Path) -> bool:
    """Return whether a file exists here or in a store; names that no disk takes are none."""
    return path.is_file() if isinstance(path, RemotePath) else os.path.isfile(path)


def default_cache_folder() -> Path:
    """Return $COGVIDEOX_FACTORY_CACHE, else `cogvideox-factory` in $XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get("COGVIDEOX_FACTORY_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser().absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "cogvideox-factory"
    except RuntimeError as error:  # a user without a home, as in containers
        raise UserError(f"there is no folder for caches ({error}): set COGVIDEOX_FACTORY_CACHE to one") from error


def limit_cache(gigabytes: float) -> None:
    """Set the size of the cache of fetched files, also for processes that are started later."""
    os.environ[_LIMIT_VARIABLE] = str(gigabytes)


def cache_limit() -> int:
    """Return the size of the cache of fetched files in bytes."""
    return int(float(os.environ.get(_LIMIT_VARIABLE, DEFAULT_LIMIT_GB)) * 1e9)


def on_this_machine(folder: Path) -> Path:
    """Return the folder itself, or for one in a store the folder here of what has not been sent yet."""
    return default_cache_folder() / "outgoing" / _digest(folder) if isinstance(folder, RemotePath) else folder


@contextmanager
def at_hand(path: Path) -> Iterator[Path]:
    """Yield a path on this machine for a path: a cached file of a store, fetched if needed and kept within the block.

    Raises FileNotFoundError if it does not exist, and StoreError if it cannot be fetched.
    """
    if not isinstance(path, RemotePath):
        yield path
        return
    cached = _cached_file(path)
    while (descriptor := _open_shared(cached)) is None:
        _fetch(path, cached)
    try:
        with suppress(OSError):
            os.utime(cached, ns=(int(time() * 1e9), os.fstat(descriptor).st_mtime_ns))
        yield cached
    finally:
        os.close(descriptor)


def fetch_all(paths: Iterable[RemotePath]) -> None:
    """Fetch many small files into the cache, several at a time; those that do not exist are left out."""

    def fetch(path: RemotePath) -> None:
        with suppress(FileNotFoundError), at_hand(path):
            pass

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(fetch, paths))


def _open_shared(cached: Path) -> int | None:
    """Open a cached file with a lock that keeps it in the cache until it is closed; None if there is none."""
    try:
        descriptor = os.open(cached, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with suppress(OSError, ImportError):  # a file system or machine without such locks
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_nlink:
        return descriptor
    os.close(descriptor)  # removed before the lock
    return None


def _fetch(path: RemotePath, cached: Path) -> None:
    """Fetch a file into the cache, once however many processes and threads ask for it."""
    from filelock import FileLock, Timeout

    limit = cache_limit()
    # Some files share a lock, so that locks do not fill the cache.
    lock = FileLock(_cache_folder() / "locks" / cached.name[:2])
    partial = cached.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        for folder in (cached.parent, _cache_folder() / "locks"):
            folder.mkdir(parents=True, exist_ok=True)
        with lock.acquire(timeout=2 * stores.FILE_SECONDS):
            if cached.exists():
                return
            try:
                state = _known_state(path)
                if state is None:
                    raise FileNotFoundError(errno.ENOENT, "does not exist", str(path))
                _make_room(state.size, limit)
                stores.fetch(str(path), partial, state, limit)
                # Without a version, it is fetched again whenever the newest one is asked for.
                os.utime(partial, ns=(int(time() * 1e9), state.version or 0))
                os.replace(partial, cached)
            finally:
                partial.unlink(missing_ok=True)
    except Timeout as error:
        raise StoreError(f"{path} is being fetched by another process, which does not finish; stop it") from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(
            f"{cached.parent} cannot be written ({error.strerror or error}); free some space there, lower "
            "--cache_limit_gb, or set COGVIDEOX_FACTORY_CACHE to another folder"
        ) from error


def _make_room(size: int, limit: int) -> None:
    """Remove files until one of this size fits. Each process measures the cache after it has filled 1/256 of it."""
    global _room
    with _room_lock:
        if size <= _room:
            _room -= size
            return
        files = []
        for file in _cache_folder().glob("[!l]*/*"):
            with suppress(FileNotFoundError):
                status = file.stat()
                # Left by a killed process, or being written.
                is_partial = file.name[0] == "." and time() - status.st_mtime < 2 * stores.FILE_SECONDS
                files.append((is_partial, status.st_atime_ns, status.st_size, file))
        excess = sum(length for _, _, length, _ in files) + size + limit // 256 - limit
        for is_partial, _, length, file in sorted(files):
            if excess <= 0 or is_partial:
                break
            if _remove_unused(file):
                excess -= length
        _room = limit // 256


def _remove_unused(file: Path) -> bool:
    """Remove a cached file unless a process is reading it."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return False
    try:
        with suppress(ImportError):
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _cache_folder() -> Path:
    return default_cache_folder() / "fetched"


def _cached_file(path: RemotePath) -> Path:
    digest, suffix = _digest(path), re.fullmatch(r"\.\w{1,12}", path.suffix.lower())
    return _cache_folder() / digest[:2] / (digest + (suffix[0] if suffix else ""))


def _digest(path: RemotePath) -> str:
    return hashlib.sha256(str(path).encode(errors="surrogatepass")).hexdigest()[:40]
