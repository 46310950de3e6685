"""Write files and folders so that they exist whole or not at all."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write a file to; put it in place once the block has succeeded.

    A process that is killed leaves at most a hidden `.partial` file behind, never a half-written `path`. Its name ends
    as `path` does, because many writers pick their format by the suffix. The file is not flushed to disk: that costs
    tenths of a second on some disks, and what is written here by the thousand can be made again after a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}-{threading.get_ident()}.partial.{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace_folder(partial: Path, folder: Path) -> None:
    """Put the finished folder `partial` in the place of `folder`, flushed to disk first."""
    for file in sorted(partial.rglob("*")):
        if file.is_file():
            _flush(file)
    if folder.exists():
        replaced = folder.with_name(f".replaced.{folder.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(folder, replaced)
        os.replace(partial, folder)
        shutil.rmtree(replaced)
    else:
        os.replace(partial, folder)
    _flush(folder.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
