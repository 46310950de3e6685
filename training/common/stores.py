"""Access to object stores and web servers by URL, through fsspec: find, fetch, send and remove whole files.

Each request has a time limit and is tried again after a pause. Credentials are found by the store's own library: in
the environment, its configuration files or a login.
"""

import errno
import hashlib
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple, TypeVar

from common.errors import UserError, one_line


logger = logging.getLogger(__name__)

# The protocols of URLs, and the module and pip package that each needs.
STORES = {"hf": "huggingface_hub", "s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "http": "aiohttp", "https": "aiohttp"}
PAUSES = (1.0, 2.0, 4.0)  # seconds before the tries after the first
CONNECT_SECONDS, SILENT_SECONDS = 10, 60  # longest wait for a connection, and for the next bytes
FILE_SECONDS = 1800.0  # longest time of one try to fetch a file
_HEADER_BYTES = 2**18
_VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "Last-Modified", "updated", "last_modified")

_T = TypeVar("_T")
_warned: set[str] = set()


class StoreError(UserError):
    """A file that a store does not hand out; the message names its URL, what happened and what to do."""


class StoreFailure(str):
    """The message of a `StoreError` among the reasons why clips cannot be read: no reason to give a clip up."""


class FileState(NamedTuple):
    """What changes with a file in a store."""

    size: int
    version: int | None  # a digest of its ETag or time; None if the store names neither


def is_url(text: str) -> bool:
    """Return whether a text is a URL with a protocol, not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def check_url(flag: str, url: str, *, writable: bool = False) -> None:
    """Check that a typed URL is of a supported store, has no secret in it, and that its package is installed.

    Raises UserError, also with `writable` for the protocols that can only be read.
    """
    protocol, _, rest = url.partition("://")
    # A message must not repeat a password or signature.
    shown = re.sub(r"^[^/]*@", "", re.split(r"[?#]", rest)[0]) if protocol != "hf" else rest
    if protocol not in STORES:
        known = ", ".join(f"{name}://" for name in STORES)
        raise UserError(f"{flag}: {protocol}:// is not a supported store; use {known} or a folder")
    if shown != rest:
        raise UserError(
            f"{flag}: {protocol}://{shown} was passed with a password or signature, which logs would show; pass the "
            "URL without it: credentials come from the environment or the configuration of the store's library"
        )
    if not rest.strip("/") or not {"", ".", ".."}.isdisjoint(rest.rstrip("/").split("/")):
        raise UserError(f"{flag}: {url} does not name a folder or file of a store; write it like s3://bucket/clips")
    if writable and protocol.startswith("http"):
        raise UserError(f"{flag}: {url} can only be read; pass a folder, or a URL of hf://, s3://, gs:// or az://")
    if importlib.util.find_spec(STORES[protocol]) is None:
        package = STORES[protocol]
        raise UserError(f"{flag}: {protocol}:// needs the package {package}, which is missing: pip install {package}")


def list_files(url: str) -> Iterator[tuple[str, FileState]]:
    """Yield the files below a URL in any order: path relative to it, and state."""
    root = url.rstrip("/")

    def find(store: Any, path: str) -> dict[str, dict[str, Any]]:
        store.invalidate_cache()
        return store.find(f"{path}/" if url.startswith("http") else path, detail=True)  # links start from it

    found = _request(root, "listed", find)
    place = _file_system(root)[1].rstrip("/") + "/"
    for path, info in found.items():
        # Keys may end with a slash or have empty parts, which no path can spell.
        if path.startswith(place) and {"", ".", ".."}.isdisjoint(path[len(place) :].split("/")):
            yield path[len(place) :], _state(info)


def file_state(url: str) -> FileState | None:
    """Return the state of a file; None if there is no file of this URL."""

    def look(store: Any, path: str) -> dict[str, Any]:
        store.invalidate_cache()
        return store.info(path)

    try:
        info = _request(url, "found", look)
    except FileNotFoundError:
        return None
    return None if info["type"] == "directory" else _state(info)


def fetch(url: str, file: Path, state: FileState, most: int) -> None:
    """Copy a file of this state to a local one.

    Raises FileNotFoundError if it does not exist, and StoreError if it is larger than `most` bytes, or the store does
    not answer, refuses, or is too slow.
    """
    too_large = f"{url} is larger than the {most / 1e9:.3g} GB of the cache; raise --cache_limit_gb"
    if state.size > most:
        raise StoreError(too_large)

    def copy(store: Any, path: str) -> None:
        store.get_file(path, str(file), **_limits(store))
        size = file.stat().st_size
        if size != (state.size or size):
            raise OSError(f"the connection ended after {size} of {state.size} bytes")

    _request(url, "fetched", copy)
    if file.stat().st_size > most:  # of a size that the server did not name
        raise StoreError(too_large)


def _limits(store: Any) -> dict[str, Any]:
    """Return the arguments that end a transfer that takes too long; the hub's own transfer takes none."""
    from fsspec import Callback

    if store.protocol == "hf":
        return {}
    deadline = monotonic() + FILE_SECONDS

    class Deadline(Callback):
        def relative_update(self, inc: int = 1) -> None:
            if monotonic() > deadline:
                raise OSError(f"not complete within {FILE_SECONDS:g} s")  # fsspec drops the text of TimeoutError

    return {"callback": Deadline()}


def read_start(url: str, length: int = _HEADER_BYTES) -> bytes:
    """Read the first bytes of a file."""
    return _request(url, "read", lambda store, path: store.cat_file(path, start=0, end=length))


def send(file: Path, url: str) -> None:
    """Copy a local file to a store, where it appears when it is complete."""
    if url.startswith("http"):  # fsspec would post it
        raise StoreError(f"{url} cannot be written: web servers are only read; pass a place on this machine")
    try:
        _request(url, "written", lambda store, path: store.put_file(str(file), path))
    except FileNotFoundError as error:
        raise StoreError(f"{url} cannot be written: there is no such bucket or repository; create it first") from error


def remove(url: str) -> None:
    """Remove a file; one that does not exist is fine."""
    with suppress(FileNotFoundError):
        _request(url, "removed", lambda store, path: store.rm_file(path))


def _request(url: str, what: str, call: Callable[[Any, str], _T]) -> _T:
    """Call a function of (file system, path) until it succeeds.

    Raises FileNotFoundError, or StoreError when it was refused or has failed as often as `PAUSES` allow.
    """
    for pause in (*PAUSES, None):
        try:
            return call(*_file_system(url))
        except Exception as error:  # the libraries of each store have their own exceptions
            if isinstance(error, FileNotFoundError):
                if _status(error.__cause__) in (None, 404, 410):
                    raise FileNotFoundError(errno.ENOENT, "does not exist", url) from None
                error = error.__cause__  # fsspec says this of every failure of a web server
            # Addresses in messages may be signed.
            reason = re.sub(r"\?\S+", "", one_line(error, 300)) or type(error).__name__
            if _is_refusal(error):
                raise StoreError(
                    f"{url} cannot be {what} ({reason}); check the name, and the credentials that the store's library "
                    "finds in the environment or its configuration"
                ) from error
            if pause is None:
                raise StoreError(
                    f"{url} cannot be {what} after {len(PAUSES) + 1} tries ({reason}); check the store and the "
                    "connection, then run again: finished work is kept"
                ) from error
            store = "/".join(url.split("/")[:3])
            if store not in _warned:  # an outage would fill the log
                _warned.add(store)
                logger.warning("warning: %s cannot be %s (%s); trying again, from now on silently", url, what, reason)
            sleep(pause)
    raise AssertionError


def _is_refusal(error: Exception) -> bool:
    """Return whether another try cannot help: no or wrong credentials, or a request that the server rejects."""
    is_rejected = 400 <= (_status(error) or 0) < 500 and _status(error) not in (408, 425, 429)
    return is_rejected or isinstance(error, PermissionError) or "Credential" in type(error).__name__


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status of an error of a store's library, 0 if there was no answer; None for other errors."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status
    return 0 if type(error).__module__.startswith("aiohttp") or isinstance(error, TimeoutError) else None


def _file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it; not by `url_to_fs`, which follows "::" to other servers."""
    import fsspec

    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    if protocol == "s3":
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": SILENT_SECONDS,
            "retries": {"total_max_attempts": 1},
        }
        options |= {"default_block_size": 2**24, "max_concurrency": 4}  # 64 MiB of memory for a transfer
    elif protocol == "az":
        options = {"connection_timeout": CONNECT_SECONDS, "read_timeout": SILENT_SECONDS}
    elif protocol.startswith("http"):
        from aiohttp import ClientTimeout

        waits = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
        options["client_kwargs"] = {"timeout": waits}
    # What the user has configured for fsspec comes first.
    store = fsspec.filesystem(protocol, **{**options, **fsspec.config.conf.get(protocol, {})})
    return store, store._strip_protocol(url)


def _state(info: dict[str, Any]) -> FileState:
    version = next((info[name] for name in _VERSIONS if info.get(name)), None)
    # 60 bits, which also fit into the time of a file.
    digest = None if version is None else int(hashlib.sha256(str(version).encode()).hexdigest()[:15], 16)
    return FileState(info.get("size") or 0, digest)
