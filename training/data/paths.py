"""Find the paths of a list, which may come from strangers, and keep them inside the folders that the user named."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path, PureWindowsPath
from unicodedata import normalize


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


def listed_path(file: Path, folder: Path | None) -> str:
    """Return the path of a file for a table: relative to the folder if it is inside, otherwise absolute."""
    if folder is not None and file.is_relative_to(folder):
        return file.relative_to(folder).as_posix()
    return str(file.absolute())


def is_absolute_on_windows(path: str) -> bool:
    """Return whether a path starts with a drive or a share of Windows, and is not absolute on this system."""
    windows = PureWindowsPath(path)
    return bool(windows.drive and windows.root) and not os.path.isabs(path)


def spelled_on_disk(path: str, start: Path | None) -> str:
    """Return a listed path as the disk spells it, or unchanged if it does not exist; it may start from `start`.

    Lists from Windows have backslashes. macOS writes é as e and an accent, other systems as one character.
    """
    if (path.isascii() and "\\" not in path) or os.path.lexists(os.path.join(start or "", path)):
        return path
    found = Path()
    for part in Path(path.replace("\\", "/")).parts:
        spellings = [part, normalize("NFC", part), normalize("NFD", part)]
        found /= next((name for name in spellings if os.path.lexists((start or Path()) / found / name)), part)
    return str(found)
