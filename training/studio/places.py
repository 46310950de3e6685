"""The folders and files that the app shows: all of them inside the root that it was started with."""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from cli.types import TABLE_SUFFIXES
from common.errors import UserError
from common.run_folder import LORA_FILE, list_results
from flags.scores import SCORES_FILE
from planning.describe import SKIPPED_FILE
from video.media import VIDEO_SUFFIXES


STATE_FOLDER = ".cogvideox-app"  # in the root: logs of jobs, and former versions of captions
_MOST_FOLDERS = 5000  # that are searched, as a root may be a home folder
_NO_CLIPS = {SCORES_FILE, "plan.csv", SKIPPED_FILE, "manifest.json", "model_index.json", "config.json"}


def inside(root: Path, path: str | Path) -> Path:
    """Return a path, which starts from `root` if it is relative, with links resolved.

    Raises UserError if it leads out of `root`, as it is written or through a link.
    """
    try:
        resolved = (root / path).resolve()
    except (ValueError, OSError, RuntimeError):  # a null character, a name that is too long, a cycle of links
        resolved = root.parent
    if ".." in Path(path).parts or not resolved.is_relative_to(root.resolve()):
        raise UserError(f"{path} is not inside {root}; start the app with a --root that contains it")
    return resolved


def list_data(root: Path) -> list[str]:
    """Return the folders and tables below `root` that may be data sets, as paths from there, sorted."""
    found, closed = [], set()
    for folder, names in _folders(root):
        if closed.intersection((folder, *folder.parents)):
            continue
        if {"prepared.json", "plan.csv", "model_index.json"} & names or list_results(folder):
            closed.add(folder)
            continue
        place = folder.relative_to(root)
        if {"videos.txt", "prompts.txt"} & names or any(Path(name).suffix.lower() in VIDEO_SUFFIXES for name in names):
            found.append(str(place))
            closed.add(folder)
        tables = (name for name in names - _NO_CLIPS if Path(name).suffix.lower() in TABLE_SUFFIXES)
        found += [str(place / name) for name in tables]
    return sorted(found)


def list_models(root: Path) -> list[str]:
    """Return the folders of pipelines below `root`, as paths from there, sorted."""
    return sorted(str(folder.relative_to(root)) for folder, names in _folders(root) if "model_index.json" in names)


def list_runs(root: Path) -> list[str]:
    """Return the folders of finished runs and of checkpoints below `root`, as paths from there, the newest first."""
    found = (folder for folder, names in _folders(root) if LORA_FILE in names)
    return [str(folder.relative_to(root)) for folder in _newest_first(found)]


def list_videos(folder: Path, most: int = 24) -> list[Path]:
    """Return the MP4 files directly in a folder, the newest first."""
    return _newest_first(folder.glob("*.mp4"))[:most]


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    dated = []
    for path in paths:
        with suppress(OSError):  # a link to nothing, or removed since it was listed
            dated.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(dated, reverse=True)]


def _folders(root: Path) -> Iterator[tuple[Path, set[str]]]:
    """Yield folders below `root` with the names of their files; links to folders and hidden ones are not followed."""
    for folder, folders, names in islice(os.walk(root), _MOST_FOLDERS):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        yield Path(folder), {name for name in names if name[0] != "."}
