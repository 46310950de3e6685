"""Write files and folders atomically."""

import os
import re
import secrets
import shutil
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common import stores
from common.errors import UserError
from common.remote import RemotePath, on_this_machine


@contextmanager
def atomic_write(path: Path, staging: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path, next to `path` or in `staging`, that replaces `path` when the block succeeds.

    A killed process leaves at most a hidden `.partial` file, never a half-written `path`. The temporary name ends as
    `path` does, because many writers choose their format by the suffix. The file is not flushed to disk: that takes
    tenths of a second on some disks, and these files can be made again after a power cut. A full
    disk or a missing permission is a UserError. A file in a store is written on this machine, then sent.
    """
    folder = on_this_machine(staging or path.parent)
    # Random, because processes on other machines that write the same file can have the same process id.
    partial = folder / f".{secrets.token_hex(8)}.partial.{path.name}"
    try:
        for needed in (path.parent, folder):
            needed.mkdir(parents=True, exist_ok=True)
        partial.touch()
        permissions = partial.stat().st_mode
        yield partial
        partial.chmod(permissions)  # safetensors makes files that only their owner can read
        if isinstance(path, RemotePath):
            stores.send(partial, str(path))
        else:
            os.replace(partial, path)
    except FileNotFoundError:
        raise  # another process removed something, which callers may expect
    except OSError as error:
        reason = f"({error.strerror or error})"
        raise UserError(f"{path} cannot be written {reason}; finished work is kept: run again") from error
    finally:
        with suppress(NotADirectoryError):
            partial.unlink(missing_ok=True)


def slug(text: str) -> str:
    """Return the beginning of a text as part of a file name: letters of any script, digits and hyphens."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", text).lower()).strip("-")
    return words[:40].rstrip("-")


def remove_partials(folder: Path) -> None:
    """Remove what killed processes left of `atomic_write` in a folder that no process writes to."""
    for path in folder.glob(".*.partial.*"):
        path.unlink(missing_ok=True)


def nearest_folder(path: Path) -> Path:
    """Return the folder or, if it does not exist, its nearest existing parent, on the same disk."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def path_of_script(name: str) -> str:
    """Return the path of a script of this toolkit as it is typed in the current folder."""
    script = Path(__file__).parents[1] / name
    return min(os.path.relpath(script), str(script), key=len)


def replace_folder(partial: Path, folder: Path) -> None:
    """Flush the finished folder `partial` to disk and replace `folder` with it."""
    for path in (*sorted(partial.rglob("*")), partial):
        if path.stat().st_mode & 0o777 == 0o600:  # as safetensors makes files, for whatever umask
            path.chmod(partial.stat().st_mode & 0o666)
        flush(path)
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    replaced = folder.with_name(f".replaced.{folder.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.replace(folder, replaced)
    os.replace(partial, folder)
    shutil.rmtree(replaced, ignore_errors=True)  # the new one is in place already
    flush(folder.parent)


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refresh_names(folder: Path) -> None:
    """Make this machine ask the file server again which files are in a folder and its subfolders.

    An NFS client caches the names for up to a minute, unless it changes the folder itself.
    """
    for below, _, _ in os.walk(folder):
        with suppress(FileNotFoundError):  # another process has removed it
            name = Path(below, f".{secrets.token_hex(8)}.refresh")
            name.touch()
            name.unlink()
