"""Keep the paths of a list, which may come from strangers, inside the folders that the user named."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path


def stays_inside(listed: str, start: Path | None, folders: Sequence[Path]) -> bool:
    """Return whether a path, as it is written, leads into one of the folders.

    Links inside a folder are trusted, as its owner made them. The written path is not: an absolute path, or one with
    "..", must resolve to a place in a folder, unless it begins with the folder's own path and never goes up from
    there. `listed` has ~/ replaced; if it is relative, it starts from `start`.
    """
    climbs = ".." in listed.split("/")
    if start in folders and not climbs and not os.path.isabs(listed):
        return True
    full = os.path.join(start or "", listed)

    def is_below_any(resolved: Callable[[str | Path], str]) -> bool:
        return any(Path(resolved(full)).is_relative_to(resolved(folder)) for folder in folders)

    try:
        return (not climbs and is_below_any(os.path.abspath)) or is_below_any(os.path.realpath)
    except ValueError:  # a null character
        return False


def expand_home(path: str) -> str:
    """Replace ~/ at the start of a path by the home folder. ~name stays, because file names may begin with ~."""
    return os.path.expanduser(path) if path.startswith("~/") else path
