"""Write files and folders so that they exist whole or not at all."""

import os
import re
import secrets
import shutil
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import UserError


@contextmanager
def written_whole(path: Path, staging: Path | None = None) -> Iterator[Path]:
    """Give a path to write a file to, beside `path` or in `staging`; put it in place once the block has succeeded.

    A process that is killed leaves at most a hidden `.partial` file behind, never a half-written `path`. Its name ends
    as `path` does, because many writers pick their format by the suffix. The file is not flushed to disk: that costs
    tenths of a second on some disks, and what is written here by the thousand can be made again after a power cut.

    Raises:
        UserError: it cannot be written: the disk is full, or not ours to write to.
    """
    folder = staging or path.parent
    # Random, because processes on other machines, which may write the same file, can have the same numbers.
    partial = folder / f".{secrets.token_hex(8)}.partial.{path.name}"
    try:
        for needed in (path.parent, folder):
            needed.mkdir(parents=True, exist_ok=True)
        partial.touch()
        permissions = partial.stat().st_mode
        yield partial
        partial.chmod(permissions)  # safetensors makes files that only their owner can read
        os.replace(partial, path)
    except FileNotFoundError:
        raise  # something was taken away by another process, which it may know about
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path} cannot be written ({reason}); what is done is kept: run again") from error
    finally:
        with suppress(NotADirectoryError):
            partial.unlink(missing_ok=True)


def slug(text: str) -> str:
    """The beginning of a text as part of a file name: letters of any script, digits and hyphens."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", text).lower()).strip("-")
    return words[:40].rstrip("-")


def remove_partials(folder: Path) -> None:
    """Remove what killed processes left of `written_whole` in a folder that nobody writes to now."""
    for path in folder.glob(".*.partial.*"):
        path.unlink(missing_ok=True)


def nearest_folder(path: Path) -> Path:
    """The folder itself or, until it exists, the nearest one above it that does: they are on the same disk."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def replace_folder(partial: Path, folder: Path) -> None:
    """Put the finished folder `partial` in the place of `folder`, flushed to disk first."""
    for path in (*sorted(partial.rglob("*")), partial):
        flush(path)
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    if folder.exists():
        replaced = folder.with_name(f".replaced.{folder.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(folder, replaced)
        os.replace(partial, folder)
        shutil.rmtree(replaced, ignore_errors=True)  # the new one is in place, whatever becomes of the old one
    else:
        os.replace(partial, folder)
    flush(folder.parent)


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refresh_names(folder: Path) -> None:
    """Have this machine ask the file server which files are in a folder and in those below it.

    A client of NFS remembers for up to a minute which names a folder has, and which it lacks, unless it changes the
    folder itself; so this does.
    """
    for below in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        with suppress(FileNotFoundError):  # another process has removed it
            name = below / f".{secrets.token_hex(8)}.refresh"
            name.touch()
            name.unlink()
