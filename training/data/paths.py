"""Keep the paths of a list, which may come from strangers, inside the folders that the user named."""

import os
from collections.abc import Sequence
from pathlib import Path


def stays_inside(listed: str, start: Path | None, folders: Sequence[Path]) -> bool:
    """Return whether a path, as it is written, leads into one of the folders.

    Links inside a folder are trusted, as its owner made them. The written path is not: an absolute path, or one with
    "..", must resolve to a place in a folder, unless it begins with the folder's own path and never goes up from
    there.

    Args:
        listed: the path in the list, with ~/ replaced.
        start: start of relative paths.
        folders: folders that the user named, possibly with `start`.
    """
    climbs = ".." in listed.split("/")
    if start in folders and not climbs and not os.path.isabs(listed):
        return True
    whole = os.path.join(start or "", listed)
    if not climbs and _is_below_any(os.path.abspath(whole), map(os.path.abspath, folders)):
        return True
    try:
        return _is_below_any(os.path.realpath(whole), map(os.path.realpath, folders))
    except ValueError:  # a null character
        return False


def _is_below_any(path: str, folders: "map[str]") -> bool:
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)
