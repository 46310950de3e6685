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
from video.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES


STATE_FOLDER = ".cogvideox-app"  # in the root: logs of jobs, and former versions of captions
_MOST_FOLDERS = 5000  # that are searched, as a root may be a home folder
_MOST_FILES = 1000  # to choose from; others are typed
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


def own_path(root: Path, name: str | Path) -> Path:
    """Return a path in the app's own folder; a UserError if a link, which could lead away, or a file is in its way."""
    path = root / STATE_FOLDER / name
    for part in [path, *path.parents][: len(path.relative_to(root).parts)]:
        if part.is_symlink() or (part.is_file() and part != path):
            raise UserError(f"{part} is a link or a file in the way of the app's own files; move it away")
    return path


def list_data(root: Path) -> list[str]:
    """Return the folders and tables below `root` that may be data sets, as paths from there, sorted."""
    found = []
    for folder, below, names in _folders(root):
        if {"prepared.json", "plan.csv", "model_index.json"} & names or list_results(folder):
            below.clear()
            continue
        place = folder.relative_to(root)
        if {"videos.txt", "prompts.txt"} & names or any(Path(name).suffix.lower() in VIDEO_SUFFIXES for name in names):
            found.append(str(place))
            below.clear()
        tables = (name for name in names - _NO_CLIPS if Path(name).suffix.lower() in TABLE_SUFFIXES)
        found += [str(place / name) for name in tables]
    return sorted(found)


def list_models(root: Path) -> list[str]:
    """Return the folders of pipelines below `root`, as paths from there, sorted."""
    return sorted(str(folder.relative_to(root)) for folder, _, names in _folders(root) if "model_index.json" in names)


def list_runs(root: Path) -> list[str]:
    """Return the folders of finished runs and of checkpoints below `root`, as paths from there, the newest first."""
    found = (folder for folder, _, names in _folders(root) if LORA_FILE in names)
    return [str(folder.relative_to(root)) for folder in _newest_first(found)]


def list_media(root: Path, *, are_videos: bool) -> list[str]:
    """Return the videos or the pictures below `root` that sampling can start from, as paths from there, sorted."""
    suffixes = VIDEO_SUFFIXES if are_videos else IMAGE_SUFFIXES
    files = (folder / name for folder, _, names in _folders(root) for name in names)
    found = (str(file.relative_to(root)) for file in files if file.suffix.lower() in suffixes)
    return sorted(islice(found, _MOST_FILES))


def list_videos(folder: Path, most: int = 24) -> list[Path]:
    """Return the MP4 files directly in a folder, the newest first."""
    return _newest_first(folder.glob("*.mp4"))[:most]


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    dated = []
    for path in paths:
        with suppress(OSError):  # a link to nothing, or removed since it was listed
            dated.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(dated, reverse=True)]


def _folders(root: Path) -> Iterator[tuple[Path, list[str], set[str]]]:
    """Yield folders below `root`, the folders in them that come next, and files, without hidden ones and links."""
    for folder, folders, names in islice(os.walk(root), _MOST_FOLDERS):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        yield Path(folder), folders, {name for name in names if name[0] != "."}
