"""Whether a path that a list names stays in the folders that the user named: lists may come from strangers."""

import os
from collections.abc import Sequence
from pathlib import Path


def stays_inside(listed: str, start: Path | None, folders: Sequence[Path]) -> bool:
    """Whether a path, as it is written, leads into one of the folders.

    Links inside a folder are followed wherever they lead, as its owner made them. What is written is not trusted: an
    absolute path, and one with "..", has to end in a folder once it is resolved, unless it begins with the folder's
    own path and never goes up from there.

    Args:
        listed: as a list has it, ~/ replaced.
        start: where relative paths start.
        folders: that the user named; where relative paths start may be one of them.
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
